//! Symbols of a kernel, as `/proc/kallsyms` writes them: lines of `HEXADDR TYPE NAME [MODULE]`.
//!
//! The addresses must be as linked; the one who sends them takes the boot's random offset out. Lines
//! of modules are left out: a module is an image of its own. There are no sizes, so a function reaches
//! to the next symbol, of whatever type.

use windlass_schema::http::Provenance;

use crate::symbol::{Binding, Symbol};

/// How far a function without a symbol behind it is taken to reach, in bytes. A page: long enough for
/// the last function, short enough not to name what lies far behind.
const LAST_SYMBOL_BYTES: u64 = 4096;

/// The functions in `text`. Lines that are no symbols are left out.
pub(crate) fn symbols(text: &[u8]) -> Vec<Symbol<'_>> {
    let mut lines: Vec<(u64, char, &str)> =
        text.split(|&byte| byte == b'\n').filter_map(parse_line).collect();
    lines.sort_unstable();
    let mut symbols = Vec::new();
    let mut limit = None;
    let mut behind = None;
    for &(start, kind, name) in lines.iter().rev() {
        if behind.is_some_and(|behind| behind != start) {
            limit = behind;
        }
        behind = Some(start);
        let binding = match kind {
            'T' => Binding::Global,
            'W' | 'w' => Binding::Weak,
            't' => Binding::Local,
            _ => continue,
        };
        symbols.push(Symbol {
            start,
            end: start,
            limit: limit.unwrap_or(start.saturating_add(LAST_SYMBOL_BYTES)),
            is_function: true,
            binding,
            name,
            provenance: Provenance::Kallsyms,
        });
    }
    symbols
}

fn parse_line(line: &[u8]) -> Option<(u64, char, &str)> {
    let mut fields = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let address = u64::from_str_radix(fields.next()?, 16).ok()?;
    let kind = fields.next()?;
    let name = fields.next()?;
    // An unprivileged reader of /proc/kallsyms gets every address as zero.
    if address == 0 || kind.len() != 1 || fields.next().is_some() {
        return None;
    }
    Some((address, kind.chars().next()?, name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::symbol::flatten;

    #[test]
    fn functions_reach_to_the_next_symbol() {
        let text = b"ffffffff81000000 T _text\n\
            ffffffff81000000 T startup_64\n\
            ffffffff81000040 t helper\r\n\
            ffffffff81000060 D some_data\n\
            ffffffff82000000 W last\n\
            ffffffffc0000000 t in_a_module\t[module]\n\
            0000000000000000 T hidden\n\
            not a symbol\n\
            zz T x\n";
        let segments = flatten(symbols(text));
        let got: Vec<_> = segments.iter().map(|s| (s.start, s.end, s.name)).collect();
        assert_eq!(
            got,
            [
                (0xffff_ffff_8100_0000, 0xffff_ffff_8100_0040, "_text"),
                (0xffff_ffff_8100_0040, 0xffff_ffff_8100_0060, "helper"),
                (0xffff_ffff_8200_0000, 0xffff_ffff_8200_1000, "last"),
            ]
        );
    }
}
