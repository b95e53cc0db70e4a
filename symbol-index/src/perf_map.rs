//! Functions of just-in-time compiled code, by name only, out of the list that an agent made of a perf map.
//!
//! The list says of each function where it ends, so nothing has to be guessed; its addresses are those of one process.

use windlass_schema::http::Provenance;
use windlass_schema::perf_map::parse_line;

use crate::symbol::{Binding, Symbol};

/// The functions in `text`. Lines that are none, and names that are no text, are left out.
pub(crate) fn symbols(text: &[u8]) -> Vec<Symbol<'_>> {
    let lines = text.split(|&byte| byte == b'\n').filter_map(parse_line);
    lines
        .filter_map(|line| {
            Some(Symbol {
                start: line.start,
                end: line.end,
                limit: line.end,
                is_function: true,
                binding: Binding::Global,
                name: std::str::from_utf8(line.name).ok().filter(|name| !name.is_empty())?,
                provenance: Provenance::PerfMap,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::symbol::flatten;

    #[test]
    fn functions_end_where_their_lines_say() {
        let text =
            b"1000 40 JS:*fib /srv/app.js:3:12\n2000 1c RegExp:[a-z]+\n3000 10 \n4000 10 \xff\nno line\n";
        let segments = flatten(symbols(text));
        let got: Vec<_> = segments.iter().map(|s| (s.start, s.end, s.name)).collect();
        assert_eq!(got, [(0x1000, 0x1040, "JS:*fib /srv/app.js:3:12"), (0x2000, 0x201c, "RegExp:[a-z]+")]);
    }
}
