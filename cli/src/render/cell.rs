//! Text that fits a column of a terminal.
//!
//! Names come out of files that anyone may have written, so control characters never reach the
//! terminal. A name that is too long loses its middle: the crate at its front and the function at its
//! end are what a reader recognises it by. A path loses folders at its front, which most files of
//! a profile share. A column counts characters.

/// Stands for what was cut out.
const ELLIPSIS: char = '…';

/// `text` without characters that move the cursor, colour or reorder what follows them.
pub(super) fn printable(text: &str) -> String {
    let disturbs = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if disturbs(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// `text` in at most `width` characters, both ends kept.
pub(super) fn fit(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width {
        return text.to_owned();
    }
    let Some(room) = width.checked_sub(1) else { return String::new() };
    let end = room.div_ceil(2);
    text.chars().take(room - end).chain([ELLIPSIS]).chain(text.chars().skip(length - end)).collect()
}

/// `text` in at most `width` characters, its end kept.
pub(super) fn fit_end(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width {
        return text.to_owned();
    }
    let Some(room) = width.checked_sub(1) else { return String::new() };
    [ELLIPSIS].into_iter().chain(text.chars().skip(length - room)).collect()
}

/// A path in at most `width` characters: as many of its last components as fit.
pub(super) fn fit_path(path: &str, width: usize) -> String {
    if path.chars().count() <= width {
        return path.to_owned();
    }
    let fitting = path.match_indices('/').map(|(slash, _)| &path[slash..]);
    match fitting.into_iter().find(|components| components.chars().count() < width) {
        Some(components) => format!("{ELLIPSIS}{components}"),
        None => fit_end(path, width),
    }
}

/// A count with its thousands apart: `12,345`.
pub(super) fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_loses_its_middle() {
        assert_eq!(fit("alloc::vec::Vec<T>::push", 11), "alloc…:push");
        assert_eq!(fit("ünïcödé", 7), "ünïcödé");
        assert_eq!(fit("ünïcödé", 3), "ü…é");
        assert_eq!((fit("abc", 1), fit("abc", 0)), ("…".into(), String::new()));
    }

    #[test]
    fn long_paths_lose_folders() {
        assert_eq!(fit_path("/usr/src/lib/sort.rs:12", 23), "/usr/src/lib/sort.rs:12");
        assert_eq!(fit_path("/usr/src/lib/sort.rs:12", 22), "…/src/lib/sort.rs:12");
        assert_eq!(fit_path("/usr/src/lib/sort.rs:12", 13), "…/sort.rs:12");
        assert_eq!(fit_path("/usr/src/lib/sort.rs:12", 8), "…t.rs:12");
        assert_eq!(fit_path("/usr/src/lib/sort.rs:12", 0), "");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("a\x1b[31mb\nc\u{202e}d"), "a\u{fffd}[31mb\u{fffd}c\u{fffd}d");
    }

    #[test]
    fn counts_are_grouped() {
        let counts = [0, 999, 1000, 1_234_567].map(grouped);
        assert_eq!(counts, ["0", "999", "1,000", "1,234,567"]);
    }
}
