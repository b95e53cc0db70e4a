//! Counters in the Prometheus text format, with the names that elfutils' servers export.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};

/// Counters by name and label. Labels are few: each call site writes literals or names of an enum.
#[derive(Default)]
pub(crate) struct Metrics {
    counters: Mutex<BTreeMap<(&'static str, &'static str, &'static str), u64>>,
}

impl Metrics {
    /// Adds one to `name{label="value"}`.
    pub(crate) fn count(&self, name: &'static str, label: &'static str, value: &'static str) {
        let mut counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        *counters.entry((name, label, value)).or_default() += 1;
    }

    /// The text of `GET /metrics`.
    pub(crate) fn text(&self) -> String {
        let mut text = String::from("ready 1\n");
        for ((name, label, value), count) in &*self.counters.lock().unwrap_or_else(PoisonError::into_inner) {
            writeln!(text, "{name}{{{label}=\"{value}\"}} {count}").expect("writing to a string cannot fail");
        }
        text
    }
}
