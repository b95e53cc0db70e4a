//! The real binary with any arguments, as an administrator runs it.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long something may take that takes a moment, on the busiest machine.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct Program {
    child: Child,
    /// Without a slash at the end.
    pub(crate) url: String,
}

impl Program {
    /// `windlassd serve` on a free port, when it answers.
    pub(crate) fn serve(data: &Path, arguments: &[&str]) -> Self {
        let mut child = windlassd(&["serve", "--listen", "127.0.0.1:0"], data)
            .args(arguments)
            .env("RUST_LOG", "info")
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines().map_while(Result::ok);
        let url = lines.find_map(|line| line.split_once("listening on ").map(|(_, url)| url.to_owned()));
        // Read on, or it would block on a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, url: url.expect("it listens") }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn windlassd(command: &[&str], data: &Path) -> Command {
    let mut windlassd = Command::new(env!("CARGO_BIN_EXE_windlassd"));
    windlassd.args(command).arg("--data-dir").arg(data).env_remove("WINDLASS_TOKEN_FILE");
    windlassd.env_remove("WINDLASS_STORAGE").env_remove("WINDLASS_CATALOG");
    windlassd
}

/// Another command of the binary, to its end.
pub(crate) fn administer(data: &Path, arguments: &[&str]) -> Output {
    windlassd(arguments, data).output().expect("the binary runs")
}

/// Its output as text; it must succeed.
#[track_caller]
pub(crate) fn administered(data: &Path, arguments: &[&str]) -> String {
    let output = administer(data, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text").trim_end().to_owned()
}

/// Asks again until the answer is yes.
#[track_caller]
pub(crate) fn eventually<F: Future<Output = bool>>(
    what: &str,
    ask: impl Fn() -> F,
) -> impl Future<Output = ()> {
    let at = std::panic::Location::caller();
    async move {
        let start = Instant::now();
        while !ask().await {
            assert!(start.elapsed() < PATIENCE, "{at}: never {what}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
