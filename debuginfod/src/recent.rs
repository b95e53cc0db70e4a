//! What was used lately, within a budget?
//!
//! A list in the order of use costs a move at each use. Here there are two generations: what is used goes to the young one, and when
//! that is full it becomes the old one, of which nothing is left but what was used since. So what makes room was not used
//! while half a budget of other things was.

use std::collections::HashMap;
use std::hash::Hash;

/// Values by key; each weighs something.
pub(crate) struct Recent<K, V> {
    /// Most weight of a generation.
    most: u64,
    weight: u64,
    young: HashMap<K, (u64, V)>,
    old: HashMap<K, (u64, V)>,
}

impl<K: Eq + Hash, V: Clone> Recent<K, V> {
    /// Keeps what weighs `budget` in all.
    pub(crate) fn new(budget: u64) -> Self {
        Self { most: budget / 2, weight: 0, young: HashMap::new(), old: HashMap::new() }
    }

    /// The largest weight that is kept.
    pub(crate) fn most(&self) -> u64 {
        self.most
    }

    /// The value, which counts as used.
    pub(crate) fn get(&mut self, key: &K) -> Option<V> {
        if let Some((_, value)) = self.young.get(key) {
            return Some(value.clone());
        }
        let (key, (weight, value)) = self.old.remove_entry(key)?;
        self.insert(key, weight, value.clone());
        Some(value)
    }

    /// Whether there is a value that meets `condition`, without using it.
    pub(crate) fn holds(&self, key: &K, condition: impl FnOnce(&V) -> bool) -> bool {
        self.young.get(key).or_else(|| self.old.get(key)).is_some_and(|(_, value)| condition(value))
    }

    /// Keeps a value in place of any other of its key. One that is heavier than [`Recent::most`] is not kept.
    pub(crate) fn insert(&mut self, key: K, weight: u64, value: V) {
        self.remove(&key);
        if weight > self.most {
            return;
        }
        if self.weight + weight > self.most {
            self.old = std::mem::take(&mut self.young);
            self.weight = 0;
        }
        self.weight += weight;
        self.young.insert(key, (weight, value));
    }

    /// Forgets a value.
    pub(crate) fn remove(&mut self, key: &K) {
        if let Some((weight, _)) = self.young.remove(key) {
            self.weight -= weight;
        }
        self.old.remove(key);
    }

    /// Forgets all.
    pub(crate) fn clear(&mut self) {
        *self = Self::new(2 * self.most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_the_budget_holds() {
        let mut recent = Recent::new(20);
        for key in 0..1000u32 {
            recent.insert(key, 3, key);
            assert_eq!(recent.get(&0), Some(0), "used all the time, at {key}");
            assert_eq!(recent.get(&key), Some(key));
            let kept: u64 = recent.young.values().chain(recent.old.values()).map(|(weight, _)| weight).sum();
            assert!(kept <= 20, "{kept} at {key}");
        }
        assert_eq!(recent.get(&500), None);
    }

    #[test]
    fn a_value_is_replaced_and_forgotten_in_either_generation() {
        let mut recent = Recent::new(8);
        for key in [1, 2, 3] {
            recent.insert(key, 2, "first");
        }
        recent.insert(1, 2, "second");
        assert_eq!(recent.get(&1), Some("second"));
        assert!(recent.holds(&3, |value| *value == "first"));
        for key in [1, 2, 3] {
            recent.remove(&key);
            assert_eq!(recent.get(&key), None);
        }
        assert_eq!(recent.weight, 0);
    }

    #[test]
    fn what_would_push_out_all_is_not_kept() {
        let mut recent = Recent::new(8);
        recent.insert(1, 4, ());
        recent.insert(2, 5, ());
        assert_eq!((recent.get(&1), recent.get(&2)), (Some(()), None));
        recent.clear();
        assert_eq!(recent.get(&1), None);
    }
}
