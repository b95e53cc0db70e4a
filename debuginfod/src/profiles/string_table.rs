//! The string table of a pprof profile under construction: each string once, the empty one first.

use std::collections::HashMap;

/// Strings and where they are.
#[derive(Debug)]
pub(super) struct StringTable {
    strings: Vec<String>,
    indices: HashMap<String, i64>,
    bytes: usize,
}

impl StringTable {
    /// A table that goes on after `strings`, whose indices stay as they are.
    pub(super) fn new(strings: Vec<String>) -> Self {
        let bytes = strings.iter().map(String::len).sum();
        let mut indices = HashMap::new();
        for (index, text) in strings.iter().enumerate() {
            indices.entry(text.clone()).or_insert(index as i64);
        }
        let mut table = Self { strings, indices, bytes };
        table.intern("");
        table
    }

    /// The index of `text`, which is added if it is new.
    pub(super) fn intern(&mut self, text: &str) -> i64 {
        if let Some(index) = self.indices.get(text) {
            return *index;
        }
        let index = self.strings.len() as i64;
        self.strings.push(text.to_owned());
        self.indices.insert(text.to_owned(), index);
        self.bytes += text.len();
        index
    }

    /// The string with this index, empty when out of range.
    pub(super) fn get(&self, index: i64) -> &str {
        usize::try_from(index).ok().and_then(|index| self.strings.get(index)).map_or("", String::as_str)
    }

    /// Length of all strings.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The strings in the order of their indices.
    pub(super) fn into_strings(self) -> Vec<String> {
        self.strings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_there_once_and_keep_their_indices() {
        let mut table = StringTable::new(["", "a", "a", "b"].map(str::to_owned).to_vec());
        assert_eq!(["b", "a", "", "c", "c"].map(|text| table.intern(text)), [3, 1, 0, 4, 4]);
        assert_eq!([4, 9, -1].map(|index| table.get(index).to_owned()), ["c", "", ""]);
        assert_eq!(table.bytes(), 4);
        assert_eq!(table.into_strings(), ["", "a", "a", "b", "c"]);
        assert_eq!(StringTable::new(Vec::new()).into_strings(), [""]);
    }
}
