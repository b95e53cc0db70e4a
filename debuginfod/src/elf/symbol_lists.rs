//! Is this list of symbols what it is uploaded as? Kernel symbols line by line, however many; a perf map as a whole,
//! since its ID is made of all of it.

use std::io::{BufRead, BufReader, Read};

use windlass_schema::BuildId;
use windlass_schema::perf_map::{MAX_PERF_MAP_BYTES, clean_name, parse_line, perf_map_id};

use super::{ContentError, Mismatch};
use crate::content::{Content, ContentReader};

/// Types of kernel symbols that are functions: global, local and weak text.
const KERNEL_CODE_TYPES: [u8; 4] = *b"TtWw";
/// Longest line of kernel symbols in bytes: names have at most 512 (`KSYM_NAME_LEN` of the kernel), and the rest is short.
const MAX_LINE_BYTES: u64 = 4096;
/// How much of a malformed line is shown, in bytes.
const SHOWN_BYTES: usize = 80;

fn shown(line: &[u8]) -> String {
    String::from_utf8_lossy(&line[..line.len().min(SHOWN_BYTES)]).into_owned()
}

/// Whether a line is `ADDRESS TYPE NAME`, and whether it names code of the kernel at an address.
fn kernel_symbol(line: &[u8]) -> Option<bool> {
    let mut words = line.split(|byte| byte.is_ascii_whitespace());
    let address = words.next().and_then(|word| std::str::from_utf8(word).ok());
    let address = u64::from_str_radix(address?, 16).ok()?;
    let symbol_type = words.next().filter(|word| word.len() == 1)?;
    words.next().filter(|word| !word.is_empty())?;
    // A module is an image of its own: a fourth word names it, and its line names nothing of the kernel.
    let of_kernel = words.all(<[u8]>::is_empty);
    Some(address != 0 && of_kernel && KERNEL_CODE_TYPES.contains(&symbol_type[0]))
}

/// Checks that `content` is lines of kernel symbols, some of them code.
pub(super) fn check_kallsyms(content: &(impl Content + ?Sized)) -> Result<(), ContentError> {
    let mut reader = BufReader::new(ContentReader::new(content));
    let (mut lines, mut usable) = (0, false);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read =
            (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).map_err(ContentError::Read)?;
        if read == 0 {
            break;
        }
        let malformed = |line: &[u8]| ContentError::Kallsyms { line: number, text: shown(line) };
        let text = match line.strip_suffix(b"\n") {
            Some(text) => text,
            None if read as u64 == MAX_LINE_BYTES => return Err(malformed(&line)),
            None => &line[..],
        };
        if text.is_empty() {
            continue;
        }
        lines += 1;
        usable |= kernel_symbol(text).ok_or_else(|| malformed(text))?;
    }
    match (lines, usable) {
        (0, _) => Err(ContentError::EmptyKallsyms),
        (_, false) => Err(ContentError::HiddenKallsyms),
        (_, true) => Ok(()),
    }
}

/// Checks that `content` is the list of functions whose ID is `stated`, as `perf_map` of the schema defines it.
pub(super) fn check_perf_map(content: &(impl Content + ?Sized), stated: BuildId) -> Result<(), ContentError> {
    if !(1..=MAX_PERF_MAP_BYTES as u64).contains(&content.size()) {
        return Err(ContentError::PerfMapSize(content.size()));
    }
    let mut whole = Vec::new();
    ContentReader::new(content).read_to_end(&mut whole).map_err(ContentError::Read)?;
    let found = perf_map_id(&whole);
    if found != stated {
        return Err(ContentError::PerfMapId(Box::new(Mismatch { found, stated })));
    }
    let mut behind = 0;
    let lines = whole.strip_suffix(b"\n").unwrap_or(&whole).split(|byte| *byte == b'\n');
    for (number, line) in lines.enumerate() {
        let parsed = parse_line(line).filter(|parsed| parsed.start >= behind);
        let parsed = parsed
            .filter(|parsed| clean_name(parsed.name).is_some_and(|clean| clean.as_bytes() == parsed.name));
        let Some(parsed) = parsed else {
            return Err(ContentError::PerfMap { line: number + 1, text: shown(line) });
        };
        behind = parsed.end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perf_maps_are_what_their_id_says() {
        let check = |text: &str| {
            let content = text.as_bytes();
            check_perf_map(content, perf_map_id(content))
        };
        assert!(check("1000 20 f\n1020 10 g (x)\n").is_ok());
        let other = BuildId::new(&[1; 20]).unwrap();
        let found = check_perf_map(&b"1000 20 f\n"[..], other);
        assert!(matches!(found, Err(ContentError::PerfMapId(_))));
        for (text, bad) in [
            ("1000 20 f\n101f 10 g\n", 2),
            ("1000 20 f\n\n2000 1 g\n", 2),
            ("1000 20 f\n2000 10 \u{7}g\n", 2),
            ("1000 20 \n", 1),
            ("1000 20 f \n", 1),
            ("nonsense\n", 1),
        ] {
            assert!(
                matches!(check(text), Err(ContentError::PerfMap { line, .. }) if line == bad),
                "{text:?}: {:?}",
                check(text)
            );
        }
        assert!(matches!(check(""), Err(ContentError::PerfMapSize(0))));
    }

    #[test]
    fn kernel_symbols_are_checked_line_by_line() {
        let check = |text: &str| check_kallsyms(text.as_bytes());
        assert!(check("ffffffff81000000 T _text\nffffffff81000100 t x [mod]\n").is_ok());
        assert!(matches!(
            check("ffffffff81000000 T _text\nnonsense\n"),
            Err(ContentError::Kallsyms { line: 2, .. })
        ));
        assert!(check("ffffffff81000000 T _text").is_ok(), "without an end of line");
        assert!(matches!(check(""), Err(ContentError::EmptyKallsyms)));
        let hidden = |text: &str| matches!(check(text), Err(ContentError::HiddenKallsyms));
        assert!(hidden("0000000000000000 T _text\n0000000000000000 t helper\n"));
        assert!(hidden("0000000000000000 T _text\nffffffff82000000 D data\n"));
        assert!(hidden("0000000000000000 T _text\nffffffffc0000000 t x\t[mod]\n"));
    }

    #[test]
    fn a_line_without_end_is_not_gathered() {
        let endless = format!("ffffffff81000000 T {}", "x".repeat(1 << 20));
        let found = check_kallsyms(endless.as_bytes());
        assert!(
            matches!(&found, Err(ContentError::Kallsyms { line: 1, text }) if text.len() == SHOWN_BYTES),
            "{found:?}"
        );
    }
}
