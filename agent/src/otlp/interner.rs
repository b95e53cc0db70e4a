//! What stands once in a batch's dictionary, and by which index?
//!
//! An agent that samples all the time does this for each frame of each sample, and little else: at 97 samples a second on each
//! core, a microsecond more for each sample is a hundredth of a percent of that core. So values are hashed once, stored
//! once, and a module, whose path and identity are long to hash, is known by its place in memory while a stack is added.

use std::hash::{BuildHasher as _, Hash};

use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashTable};

use super::Module;

/// The modules met last, by where they are, and their indices.
#[derive(Default)]
pub(super) struct SeenModules<'a> {
    modules: [Option<(&'a Module, i32)>; 4],
    /// Where the next one goes.
    next: usize,
}

impl<'a> SeenModules<'a> {
    /// The index of `module`; `index` says what it is at first.
    pub(super) fn index(&mut self, module: &'a Module, index: impl FnOnce(&Module) -> i32) -> i32 {
        let known = self.modules.iter().flatten().find(|(known, _)| std::ptr::eq(*known, module));
        if let Some((_, index)) = known {
            return *index;
        }
        let index = index(module);
        self.modules[self.next] = Some((module, index));
        self.next = (self.next + 1) % self.modules.len();
        index
    }
}

/// Values in the order of their first use, each once, from index 0.
pub(super) struct Interner<T> {
    pub(super) values: Vec<T>,
    indices: HashTable<i32>,
    hasher: DefaultHashBuilder,
}

impl<T: Clone + Eq + Hash> Interner<T> {
    pub(super) fn empty() -> Self {
        Self { values: Vec::new(), indices: HashTable::new(), hasher: DefaultHashBuilder::default() }
    }

    pub(super) fn with_zero(zero: T) -> Self {
        let mut interner = Self::empty();
        interner.index(&zero);
        interner
    }

    /// The index of `value`; indices are OTLP's 32 bits, far above a batch's limit.
    pub(super) fn index<Q>(&mut self, value: &Q) -> i32
    where
        Q: Eq + Hash + ToOwned<Owned = T> + ?Sized,
        T: std::borrow::Borrow<Q>,
    {
        let Self { values, indices, hasher } = self;
        let known = |index: &i32| values[*index as usize].borrow() == value;
        let hash = |index: &i32| hasher.hash_one(values[*index as usize].borrow());
        match indices.entry(hasher.hash_one(value), known, hash) {
            Entry::Occupied(index) => *index.get(),
            Entry::Vacant(place) => {
                let index = values.len() as i32;
                place.insert(index);
                values.push(value.to_owned());
                index
            }
        }
    }
}
