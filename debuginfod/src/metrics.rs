//! Counters in the Prometheus text format, with the names that elfutils' servers export.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};

/// A literal, found by where it lies: to compare three texts for each counter of each request takes longer than to count.
#[derive(Clone, Copy)]
struct Literal(&'static str);

impl PartialEq for Literal {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl Eq for Literal {}

impl std::hash::Hash for Literal {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        state.write_usize(self.0.as_ptr().addr());
    }
}

/// Counters by name and label. Labels are few: each call site writes literals or names of an enum. A text that lies in several
/// places has as many counters, which are added up when they are shown.
#[derive(Default)]
pub(crate) struct Metrics {
    counters: Mutex<HashMap<[Literal; 3], u64>>,
}

impl Metrics {
    /// Adds one to `name{label="value"}`.
    pub(crate) fn count(&self, name: &'static str, label: &'static str, value: &'static str) {
        let mut counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        *counters.entry([name, label, value].map(Literal)).or_default() += 1;
    }

    /// The text of `GET /metrics`.
    pub(crate) fn text(&self) -> String {
        let mut sums = BTreeMap::<[&str; 3], u64>::new();
        for (key, count) in &*self.counters.lock().unwrap_or_else(PoisonError::into_inner) {
            *sums.entry(key.map(|literal| literal.0)).or_default() += count;
        }
        let mut text = String::from("ready 1\n");
        for ([name, label, value], count) in sums {
            writeln!(text, "{name}{{{label}=\"{value}\"}} {count}").expect("writing to a string cannot fail");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_are_one_counter_wherever_they_lie() {
        let metrics = Metrics::default();
        let elsewhere: &'static str = String::from("b").leak();
        for value in ["b", "b", elsewhere, "a"] {
            metrics.count("n", "l", value);
        }
        assert_eq!(metrics.text(), "ready 1\nn{l=\"a\"} 1\nn{l=\"b\"} 3\n");
    }
}
