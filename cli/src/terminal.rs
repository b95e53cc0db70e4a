//! What differs between a terminal and a pipe: progress bars, the width, sizes for reading.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Columns when the output is no terminal.
const PIPE_WIDTH: usize = 120;

/// Columns to print in.
pub(crate) fn width() -> usize {
    terminal_size::terminal_size().map_or(PIPE_WIDTH, |(width, _)| usize::from(width.0))
}

/// A bar over `bytes`, drawn on stderr and only if that is a terminal.
pub(crate) fn byte_bar(bytes: u64, verb: &'static str) -> ProgressBar {
    styled(ProgressBar::new(bytes), "{msg:>10} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}", verb)
}

/// A bar over `count` things, drawn on stderr and only if that is a terminal.
pub(crate) fn count_bar(count: u64, verb: &'static str) -> ProgressBar {
    styled(ProgressBar::new(count), "{msg:>10} [{bar:30}] {pos}/{len} {eta}", verb)
}

/// A sign of life while something of unknown length goes on.
pub(crate) fn spinner(verb: &'static str) -> ProgressBar {
    /// Redrawn this often.
    const TICK: Duration = Duration::from_millis(120);
    let bar = styled(ProgressBar::new_spinner(), "{msg:>10} {spinner} {elapsed}", verb);
    bar.enable_steady_tick(TICK);
    bar
}

/// Waits while a bar fills.
pub(crate) async fn wait(duration: Duration, verb: &'static str) {
    /// A bar that moves smoothly to the eye.
    const STEP: Duration = Duration::from_millis(100);
    let template = "{msg:>10} [{bar:30}] {elapsed}";
    let bar = styled(ProgressBar::new(duration.as_millis() as u64), template, verb);
    let begin = tokio::time::Instant::now();
    while let Some(left) = duration.checked_sub(begin.elapsed()).filter(|left| !left.is_zero()) {
        tokio::time::sleep(left.min(STEP)).await;
        bar.set_position(begin.elapsed().as_millis() as u64);
    }
    bar.finish_and_clear();
}

fn styled(bar: ProgressBar, template: &str, verb: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the templates of this file are valid");
    bar.set_style(style.progress_chars("=> "));
    bar.set_message(verb);
    bar
}

/// `bytes` for a reader: `312 B`, `4.0 KiB`, `12.3 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    indicatif::HumanBytes(bytes).to_string()
}

/// `part` of `whole` in percent; 0 of 0 is 0.
pub(crate) fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}
