//! A function known by name only, and which name counts where several overlap.
//!
//! Symbol tables name one address many times (aliases), nest (an outlined part inside its function),
//! and leave sizes out (assembly, kallsyms). Peers differ in what they pick, some by the order of the
//! file; here the choice is a total order over the symbols, so that the same inputs always give the
//! same names.

use windlass_schema::http::Provenance;

/// How a linker binds a name. The better name first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Binding {
    Global,
    Weak,
    Local,
}

/// A name for a range of code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Symbol<'a> {
    pub(crate) start: u64,
    /// Exclusive; equal to `start` if the size is not known.
    pub(crate) end: u64,
    /// Where code must end at the latest: a symbol of unknown size reaches to the next symbol, but not
    /// past its section.
    pub(crate) limit: u64,
    /// Whether the symbol says that it is a function, rather than a label in code.
    pub(crate) is_function: bool,
    pub(crate) binding: Binding,
    pub(crate) name: &'a str,
    pub(crate) provenance: Provenance,
}

impl Symbol<'_> {
    fn has_size(&self) -> bool {
        self.end > self.start
    }

    /// Orders by address; among aliases, the one whose name counts comes first.
    fn order(&self) -> impl Ord + '_ {
        (
            self.start,
            !self.has_size(),
            !self.is_function,
            self.binding,
            self.name.len(),
            self.name,
            self.provenance,
            self.end,
        )
    }
}

/// A range of code that one symbol names. `end` is exclusive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment<'a> {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) name: &'a str,
    pub(crate) provenance: Provenance,
}

/// Turns symbols into disjoint segments, ascending: one name for each address, the innermost symbol's.
pub(crate) fn flatten(mut symbols: Vec<Symbol<'_>>) -> Vec<Segment<'_>> {
    symbols.sort_by(|a, b| a.order().cmp(&b.order()));
    symbols.dedup_by_key(|symbol| symbol.start);
    drop_labels_inside_functions(&mut symbols);
    give_sizes(&mut symbols);

    let mut segments: Vec<Segment<'_>> = Vec::with_capacity(symbols.len());
    let mut open: Vec<&Symbol<'_>> = Vec::new();
    let mut at = 0;
    for symbol in &symbols {
        close(&mut segments, &mut open, &mut at, symbol.start);
        if let Some(outer) = open.last() {
            push(&mut segments, at, symbol.start, outer);
        }
        at = symbol.start;
        open.push(symbol);
    }
    close(&mut segments, &mut open, &mut at, u64::MAX);
    segments
}

/// Moves `symbols` so that the one called `landmark` lies where `fixed` has it; they stay if one of the two has none. Who
/// sends a kernel's symbols knows how far each is from the kernel's start, and may not know where that was linked to.
pub(crate) fn align(symbols: &mut [Symbol<'_>], fixed: &[Symbol<'_>], landmark: &str) {
    let start = |symbols: &[Symbol<'_>]| {
        symbols.iter().find(|symbol| symbol.name == landmark).map(|symbol| symbol.start)
    };
    let (Some(from), Some(to)) = (start(symbols), start(fixed)) else { return };
    for symbol in symbols {
        for address in [&mut symbol.start, &mut symbol.end, &mut symbol.limit] {
            *address = address.wrapping_sub(from).wrapping_add(to);
        }
    }
}

/// Ends the open symbols that end at or before `until`, innermost first.
fn close<'a>(segments: &mut Vec<Segment<'a>>, open: &mut Vec<&Symbol<'a>>, at: &mut u64, until: u64) {
    while let Some(symbol) = open.pop_if(|symbol| symbol.end <= until) {
        push(segments, *at, symbol.end, symbol);
        *at = symbol.end.max(*at);
    }
}

fn push<'a>(segments: &mut Vec<Segment<'a>>, start: u64, end: u64, symbol: &Symbol<'a>) {
    if start < end {
        segments.push(Segment { start, end, name: symbol.name, provenance: symbol.provenance });
    }
}

/// A label without size inside a function with size is a place in it, not a function.
fn drop_labels_inside_functions(symbols: &mut Vec<Symbol<'_>>) {
    let mut covered_until = 0;
    symbols.retain(|symbol| {
        if symbol.has_size() {
            covered_until = covered_until.max(symbol.end);
        }
        symbol.has_size() || symbol.start >= covered_until
    });
}

fn give_sizes(symbols: &mut [Symbol<'_>]) {
    let mut next_start = u64::MAX;
    for symbol in symbols.iter_mut().rev() {
        if !symbol.has_size() {
            symbol.end = symbol.limit.min(next_start).max(symbol.start);
        }
        next_start = symbol.start;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn symbol(start: u64, size: u64, name: &str) -> Symbol<'_> {
        Symbol {
            start,
            end: start + size,
            limit: 1000,
            is_function: true,
            binding: Binding::Global,
            name,
            provenance: Provenance::Symtab,
        }
    }

    #[track_caller]
    fn check(symbols: Vec<Symbol<'_>>, expect: &[(u64, u64, &str)]) {
        let segments = flatten(symbols);
        let got: Vec<_> = segments.iter().map(|s| (s.start, s.end, s.name)).collect();
        assert_eq!(got, expect);
    }

    #[test]
    fn aligned_at_a_landmark() {
        let fixed = [symbol(10, 0, "other"), symbol(500, 0, "_text")];
        let mut symbols = [symbol(100, 0, "_text"), symbol(120, 5, "f")];
        align(&mut symbols, &fixed[..1], "_text");
        assert_eq!(symbols[1].start, 120);
        align(&mut symbols, &fixed, "_text");
        assert_eq!((symbols[1].start, symbols[1].end, symbols[1].limit), (520, 525, 1400));
    }

    #[test]
    fn aliases() {
        let weak = Symbol { binding: Binding::Weak, ..symbol(10, 5, "a") };
        let local = Symbol { binding: Binding::Local, ..symbol(10, 5, "b") };
        check(vec![local, weak.clone(), symbol(10, 5, "name")], &[(10, 15, "name")]);
        check(vec![symbol(10, 5, "longer"), weak, symbol(10, 5, "long")], &[(10, 15, "long")]);
        check(vec![symbol(10, 5, "zz"), symbol(10, 5, "yy")], &[(10, 15, "yy")]);
        check(vec![symbol(10, 0, "no_size"), symbol(10, 5, "with_a_size")], &[(10, 15, "with_a_size")]);
    }

    #[test]
    fn sizes() {
        check(vec![symbol(10, 0, "a"), symbol(20, 0, "b")], &[(10, 20, "a"), (20, 1000, "b")]);
        check(vec![symbol(10, 5, "a"), symbol(20, 5, "b")], &[(10, 15, "a"), (20, 25, "b")]);
    }

    #[test]
    fn nesting() {
        check(
            vec![symbol(10, 30, "outer"), symbol(20, 5, "inner"), symbol(22, 0, "label")],
            &[(10, 20, "outer"), (20, 25, "inner"), (25, 40, "outer")],
        );
        check(vec![symbol(10, 20, "a"), symbol(20, 20, "b")], &[(10, 20, "a"), (20, 40, "b")]);
    }

    proptest! {
        #[test]
        fn segments_are_disjoint_and_cover_the_sized_symbols(
            ranges in prop::collection::vec((1u64..200, 0u64..60), 0..40)
        ) {
            let symbols: Vec<_> = ranges.iter().map(|&(start, size)| symbol(start, size, "f")).collect();
            let segments = flatten(symbols);
            prop_assert!(segments.iter().all(|s| s.start < s.end));
            prop_assert!(segments.windows(2).all(|w| w[0].end <= w[1].start));
            let covers = |address| segments.iter().any(|s| s.start <= address && address < s.end);
            for (start, size) in ranges {
                // Of aliases only the one with the best name counts, here the shortest.
                prop_assert!(size == 0 || covers(start));
            }
        }
    }
}
