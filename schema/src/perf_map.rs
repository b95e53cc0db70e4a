//! Names of functions that a just-in-time compiler made: perf maps, and the lists that agents send of them.
//!
//! Code without a file has no build-ID, and its addresses mean something in one process only, for a time. So the
//! functions that samples touched become a small image of their own: a perf map of them alone, as perf's
//! `tools/perf/Documentation/jit-interface.txt` defines that text, under an ID that is made of its content. Whoever
//! names an address by it can only mean this list, and whoever uploads another under the same ID is refused.
//!
//! ```text
//! line = START " " SIZE " " NAME "\n"          hex without sign; some writers put 0x before it
//! ID   = SHA-256(all lines)[..20]
//! ```
//! In a list for the service, lines ascend by start and do not overlap, and names are as [`clean_name`] leaves them.
//! For example
//! ```text
//! 7f3a00001000 40 JS:*fib /srv/app.js:3:12
//! 7f3a00001040 1c RegExp:[a-z]+
//! ```

use sha2::{Digest as _, Sha256};

use crate::BuildId;

/// The OTLP attribute by which a mapping names the list of its functions.
pub const PERF_MAP_ATTRIBUTE: &str = "windlass.perf_map.id";
/// Length of a list's ID in bytes.
pub const PERF_MAP_ID_BYTES: usize = 20;
/// Longest name in a list in bytes: compilers' names hold a path (`PATH_MAX` is 4096, hardly ever used up) and a
/// signature.
pub const MAX_NAME_BYTES: usize = 1024;
/// Largest list in bytes: as many functions of usual length as a batch of samples has stacks.
pub const MAX_PERF_MAP_BYTES: usize = 8 << 20;

/// A line of a perf map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PerfMapLine<'a> {
    /// First process address.
    pub start: u64,
    /// First process address behind it; above `start`.
    pub end: u64,
    /// The function's name as it was written, possibly empty.
    pub name: &'a [u8],
}

/// Reads a line without its line feed; `None` if it is none of a perf map.
///
/// ```
/// # use windlass_schema::perf_map::parse_line;
/// let line = parse_line(b"1000 20 f (x) a.js:1").ok_or("not a line of a perf map")?;
/// assert_eq!((line.start, line.end, line.name), (0x1000, 0x1020, &b"f (x) a.js:1"[..]));
/// assert!(parse_line(b"1000 0 empty").is_none());
/// # Ok::<(), &str>(())
/// ```
pub fn parse_line(line: &[u8]) -> Option<PerfMapLine<'_>> {
    let (start, rest) = number(line)?;
    let (size, name) = number(rest)?;
    let end = start.checked_add(size).filter(|end| *end > start)?;
    Some(PerfMapLine { start, end, name })
}

/// A hex number and what follows the space behind it.
fn number(text: &[u8]) -> Option<(u64, &[u8])> {
    let at = text.iter().position(|byte| *byte == b' ')?;
    let digits = text[..at].strip_prefix(b"0x").unwrap_or(&text[..at]);
    if !digits.first()?.is_ascii_hexdigit() {
        return None; // `from_str_radix` takes a sign
    }
    Some((u64::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()?, &text[at + 1..]))
}

/// A name as it may be shown anywhere: UTF-8, without control characters, not longer than [`MAX_NAME_BYTES`].
/// `None` if nothing is left.
pub fn clean_name(name: &[u8]) -> Option<String> {
    let cut = &name[..name.len().min(MAX_NAME_BYTES)];
    let mut clean = String::with_capacity(cut.len());
    for letter in String::from_utf8_lossy(cut).trim().chars() {
        let letter = if letter.is_control() { '\u{fffd}' } else { letter };
        if clean.len() + letter.len_utf8() > MAX_NAME_BYTES {
            break;
        }
        clean.push(letter);
    }
    (!clean.is_empty()).then_some(clean)
}

/// The ID of a list.
pub fn perf_map_id(content: &[u8]) -> BuildId {
    let digest = Sha256::digest(content);
    BuildId::new(&digest[..PERF_MAP_ID_BYTES]).expect("20 bytes are a legal length")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, expect: Option<(u64, u64, &str)>) {
        let line = parse_line(line.as_bytes());
        assert_eq!(line.map(|line| (line.start, line.end, str::from_utf8(line.name).unwrap())), expect);
    }

    #[test]
    fn lines() {
        check("7f00 1A f", Some((0x7f00, 0x7f1a, "f")));
        check("0x00007f00 0x1a void Foo.bar(int)", Some((0x7f00, 0x7f1a, "void Foo.bar(int)")));
        check("7f00 1a ", Some((0x7f00, 0x7f1a, "")));
        for nonsense in
            ["", " ", "f", "1 2", "1  2 f", "+1 2 f", "0x 2 f", "1 0 f", "g 1 f", "ffffffffffffffff 2 f"]
        {
            check(nonsense, None);
        }
    }

    #[test]
    fn names_are_safe_to_show() {
        assert_eq!(clean_name(b"JS:*f a.js:1\r").as_deref(), Some("JS:*f a.js:1"));
        assert_eq!(clean_name(b"a\x1b[31m\nb").as_deref(), Some("a\u{fffd}[31m\u{fffd}b"));
        assert_eq!(clean_name("süß".as_bytes()).as_deref(), Some("süß"));
        assert_eq!(clean_name(b" \t"), None);
        for long in [vec![b'x'; 5000], "ß".repeat(5000).into_bytes(), vec![0xff; 5000], vec![1; 5000]] {
            let clean = clean_name(&long).unwrap();
            assert!((MAX_NAME_BYTES - 3..=MAX_NAME_BYTES).contains(&clean.len()), "{}", clean.len());
        }
    }

    #[test]
    fn id_is_of_the_content() {
        // printf '1000 20 f\n' | sha256sum
        assert_eq!(perf_map_id(b"1000 20 f\n").to_string(), ID);
    }

    const ID: &str = "ee69b4db07e81261987d666fd81e7b5a2ff167b6";
}
