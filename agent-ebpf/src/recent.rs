//! Which records did recent walks find?
//!
//! A stack that is sampled resembles those sampled before: most of its return addresses have been looked up already. To
//! look one up again is three map lookups and a search that waits for memory at each step; to remember what was found is one
//! line of memory. framehop remembers its rules so in user space. There, a module that is unloaded empties the cache; here
//! nothing ever does: an entry names the generation of the mappings by which it was found, which the agent gives to one
//! state of one process and never again (`set_process` in the agent's backend), and tables do not change where they
//! lie while mappings of that generation name them.

use windlass_schema::{ProcessAddress, Record};

/// log2 of [`SLOTS`].
const SLOTS_SHIFT: u32 = 10;
/// Records remembered: with 24 bytes each they fit into a per-CPU value, of which the kernel allows 32 KiB
/// (`PCPU_MIN_UNIT_SIZE`, include/linux/percpu.h), and some hundreds of different frames are all that a CPU's programs
/// have at a time.
pub const SLOTS: usize = 1 << SLOTS_SHIFT;

const _: () = assert!(size_of::<RecentRecords>() <= 32 * 1024);

/// One record; all zero if none, as no mappings are of generation 0.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Slot {
    address: u64,
    record: u64,
    generation: u32,
    reserved: u32,
}

/// The records found last, each in the one place where it may lie.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct RecentRecords {
    slots: [Slot; SLOTS],
}

impl Default for RecentRecords {
    fn default() -> Self {
        Self { slots: [Slot::default(); SLOTS] }
    }
}

/// The place of an address: the top bits of a product by 2^64 divided by the golden ratio, which spreads what differs in a
/// few bits (Knuth, The Art of Computer Programming, 6.4).
#[inline(always)]
const fn place(generation: u32, address: u64) -> usize {
    let mixed = (address ^ (generation as u64) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> (u64::BITS - SLOTS_SHIFT)) as usize & (SLOTS - 1)
}

impl RecentRecords {
    /// The record of a lookup address in mappings of this generation.
    #[inline(always)]
    pub fn get(&self, generation: u32, address: ProcessAddress) -> Option<Record> {
        let slot = &self.slots[place(generation, address.get())];
        if slot.address == address.get() && slot.generation == generation {
            return Some(Record(slot.record));
        }
        None
    }

    /// Remembers a record, in place of another.
    #[inline(always)]
    pub fn put(&mut self, generation: u32, address: ProcessAddress, record: Record) {
        self.slots[place(generation, address.get())] =
            Slot { address: address.get(), record: record.0, generation, reserved: 0 };
    }

    /// Forgets what lies in one of [`SLOTS`] places.
    #[inline(always)]
    pub fn forget(&mut self, place: usize) {
        self.slots[place & (SLOTS - 1)] = Slot::default();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is remembered in between: an answer is the last one given for that generation and address.
        #[test]
        fn what_is_found_is_what_was_put(
            puts in prop::collection::vec((1u32..4, 0u64..5000, any::<u64>()), 1..5000),
        ) {
            let mut recent = Box::new(RecentRecords::default());
            let mut all = std::collections::HashMap::new();
            let mut found = 0;
            for (generation, address, record) in puts {
                let address = ProcessAddress::new(address);
                recent.put(generation, address, Record(record));
                all.insert((generation, address.get()), record);
                prop_assert_eq!(recent.get(generation, address), Some(Record(record)));
            }
            for ((generation, address), record) in &all {
                if let Some(remembered) = recent.get(*generation, ProcessAddress::new(*address)) {
                    prop_assert_eq!(remembered.0, *record);
                    found += 1;
                }
            }
            prop_assert!(found > 0);
            prop_assert_eq!(recent.get(4, ProcessAddress::new(0)), None);
        }
    }

    #[test]
    fn neighbouring_addresses_have_places_of_their_own() {
        let places: std::collections::BTreeSet<_> =
            (0..256).map(|number| place(7, 0x7f12_3456_7000 + 5 * number)).collect();
        assert!(places.len() > 192, "{} of 256", places.len());
    }
}
