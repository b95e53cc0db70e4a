//! Chooses the entries that state each chain: which of its rows are one run record, which stand alone.
//!
//! # Why this shape
//! One row in two follows another by a byte or two and moves the CFA by 8. The OpenTelemetry profiler
//! merges such pairs; a run record (see [`windlass_schema::record`]) takes the whole run, exactly. Any part of a
//! run is a run, so taking the longest at each step gives the fewest entries. But a run that occurs
//! once costs a dictionary record, more than the rows it replaces. So entries are chosen by cost: a first
//! pass takes the longest runs everywhere and counts them, further ones weigh each use of a record with
//! its share of the record's own bytes. Passes go over the [`rests`](crate::rests) of distinct chains, not over the image.

use windlass_schema::Record;
use windlass_schema::page::PAGE_SHIFT;
use windlass_schema::table::MAX_RECORDS;

use crate::chains::{ChainNumber, Chains};
use crate::placement::Placed;
use crate::rests::{Choice, NOTHING, Rests};

/// An entry of a chain: from `at` bytes behind the chain's first row on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) at: u32,
    /// Number of its record, in the order of [`Folded::records`].
    pub(crate) record: u32,
}

/// The entries of every chain.
pub(crate) struct Folded {
    /// All records in question, in use or not.
    pub(crate) records: Vec<Record>,
    entries: Vec<Entry>,
    /// Where the entries of each chain end.
    ends: Vec<u32>,
}

impl Folded {
    /// The entries of a chain.
    pub(crate) fn entries(&self, chain: ChainNumber) -> &[Entry] {
        let chain = chain as usize;
        let start = if chain == 0 { 0 } else { self.ends[chain - 1] };
        &self.entries[start as usize..self.ends[chain] as usize]
    }
}

/// Passes; the one that gives the fewest bytes counts.
const PASSES: usize = 2;

/// Chooses the entries of all chains, which lie at `placed`. Without `has_runs`, each row is an entry.
pub(crate) fn fold(chains: &Chains, placed: &[Placed], has_runs: bool) -> Folded {
    let uses = Uses::of(chains.len(), placed);
    let rests = Rests::of(chains, |chain| uses.chains[chain].places > 0, has_runs);
    let possible = possible_counts(&rests, &uses);
    let mut counts = possible.clone();
    let mut best = None;
    for _ in 0..if has_runs { PASSES } else { 1 } {
        let costs: Vec<u32> = counts.iter().map(|count| count.cost(&uses)).collect();
        let chosen = choose(&rests, |record| costs[record as usize]);
        counts = chosen_counts(&rests, &chosen, &uses);
        let bytes: u64 = counts.iter().map(|count| count.bytes(&uses)).sum();
        if best.as_ref().is_none_or(|(least, _)| bytes < *least) {
            best = Some((bytes, chosen));
        }
        // A record that was not chosen would be used more than once if it were.
        for (count, possible) in counts.iter_mut().zip(&possible) {
            if count.places == 0 {
                *count = Count { places: possible.places.div_ceil(2), pages: possible.pages.div_ceil(2) };
            }
        }
    }
    entries(rests, &best.expect("there is a pass").1)
}

/// How often chains are placed, and on how many pages.
struct Uses {
    chains: Vec<Count>,
    all_pages: u32,
}

impl Uses {
    fn of(chains: usize, placed: &[Placed]) -> Self {
        let mut uses = Self { chains: vec![Count::default(); chains], all_pages: 0 };
        let mut last_page = vec![u32::MAX; chains];
        let mut page_before = u32::MAX;
        for placed in placed {
            let (chain, page) = (placed.chain as usize, placed.offset >> PAGE_SHIFT);
            let count = &mut uses.chains[chain];
            count.places += 1;
            count.pages += u32::from(last_page[chain] != page);
            uses.all_pages += u32::from(page_before != page);
            (last_page[chain], page_before) = (page, page);
        }
        uses
    }

    /// How often each rest is all of a chain.
    fn of_wholes(&self, rests: &Rests) -> Vec<Count> {
        let mut counts = vec![Count::default(); rests.len()];
        for (whole, uses) in rests.wholes().iter().zip(&self.chains) {
            counts[*whole as usize].add(*uses);
        }
        counts
    }
}

/// Bytes of an entry, of a record in the dictionary, and of a page's reference to a record.
const ENTRY_BYTES: u32 = 2;
const RECORD_BYTES: u32 = 8;
const LOCAL_BYTES: u32 = 2;
/// Share of the pages from which on a record's number is taken to be common to all of them. Measured: between
/// 0.3 and 0.7 the tables of a distribution differ by 0.5%.
const COMMON_PAGES: f64 = 0.5;

/// For each rest the cheapest way to begin it, given what a use of a record costs; of equal ones, the longest.
fn choose(rests: &Rests, cost: impl Fn(u32) -> u32) -> Vec<Choice> {
    // By rest: cost of the cheapest way to state all of it, and how that begins.
    let mut totals = vec![0u64; rests.len()];
    let mut chosen = vec![Choice { record: 0, rest: NOTHING }; rests.len()];
    for number in rests.numbers() {
        let mut best = (u64::MAX, chosen[0]);
        for choice in rests.choices(number) {
            let total = u64::from(cost(choice.record)) + totals[choice.rest as usize];
            if total <= best.0 {
                best = (total, *choice);
            }
        }
        (totals[number as usize], chosen[number as usize]) = best;
    }
    chosen
}

/// How often each record would be used, were it used wherever it can be.
fn possible_counts(rests: &Rests, uses: &Uses) -> Vec<Count> {
    let mut counts = vec![Count::default(); rests.records.len()];
    let mut of_rests = uses.of_wholes(rests);
    for number in rests.numbers().rev() {
        let uses = of_rests[number as usize];
        of_rests[rests.next(number) as usize].add(uses);
        for choice in rests.choices(number) {
            counts[choice.record as usize].add(uses);
        }
    }
    counts
}

/// How often each record is used.
fn chosen_counts(rests: &Rests, chosen: &[Choice], uses: &Uses) -> Vec<Count> {
    let mut counts = vec![Count::default(); rests.records.len()];
    let mut of_rests = uses.of_wholes(rests);
    for number in rests.numbers().rev() {
        let (uses, Choice { record, rest }) = (of_rests[number as usize], chosen[number as usize]);
        of_rests[rest as usize].add(uses);
        counts[record as usize].add(uses);
    }
    counts
}

/// The entries of all chains, as they are chosen.
fn entries(rests: Rests, chosen: &[Choice]) -> Folded {
    let mut folded = Folded { records: Vec::new(), entries: Vec::new(), ends: Vec::new() };
    for whole in rests.wholes() {
        let mut number = *whole;
        while number != NOTHING {
            let Choice { record, rest } = chosen[number as usize];
            folded.entries.push(Entry { at: rests.span(*whole) - rests.span(number), record });
            number = rest;
        }
        folded.ends.push(folded.entries.len() as u32);
    }
    folded.records = rests.records;
    folded
}

/// How often something is used.
#[derive(Clone, Copy, Default)]
struct Count {
    places: u32,
    /// At most: chains may share pages.
    pages: u32,
}

impl Count {
    fn add(&mut self, more: Self) {
        // Neither is more than the rows of a table.
        self.places = self.places.wrapping_add(more.places);
        self.pages = self.pages.wrapping_add(more.pages);
    }

    /// Bytes of a record beside its entries.
    fn record_bytes(&self, uses: &Uses) -> u64 {
        let all = f64::from(uses.all_pages.max(1));
        // Of pages, as many as random places meet, and no more than there can be.
        let pages = (all * (1.0 - (-f64::from(self.places) / all).exp())).min(self.pages.into());
        // The dictionary's first numbers, which most pages use, are every page's.
        let local = if pages > COMMON_PAGES * all { 0.0 } else { pages.max(1.0) };
        u64::from(RECORD_BYTES) + (f64::from(LOCAL_BYTES) * local) as u64
    }

    /// What a use costs, in 1/256 byte.
    fn cost(&self, uses: &Uses) -> u32 {
        256 * ENTRY_BYTES + (256 * self.record_bytes(uses) / u64::from(self.places.max(1))) as u32
    }

    /// What all uses cost.
    fn bytes(&self, uses: &Uses) -> u64 {
        if self.places == 0 {
            0
        } else {
            u64::from(ENTRY_BYTES) * u64::from(self.places) + self.record_bytes(uses)
        }
    }
}

/// Whether the plain records of all chains are few enough for a dictionary.
pub(crate) fn fits_dictionary(chains: &Chains) -> bool {
    let mut records = hashbrown::HashSet::new();
    (0..chains.len()).all(|chain| {
        records.extend(chains.steps(chain as u32).iter().map(|step| step.record));
        records.len() <= MAX_RECORDS as usize
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_schema::record::{frame_pointer, kind};

    use crate::placement::Placement;
    use crate::rows::Row;

    fn rsp(words: i32, saved: Option<i16>) -> Record {
        let (rule, f) = saved.map_or((frame_pointer::SAME, 0), |f| (frame_pointer::AT_CFA, f));
        Record::plain(kind::SP, rule, 0, 0, f, 8 * words)
    }

    fn rbp(words: i32, saved: i16) -> Record {
        Record::plain(kind::FP, frame_pointer::AT_CFA, 0, 0, saved, 8 * words)
    }

    /// Folds rows by the longest runs; `expect` are the entries' addresses. Checks each state on the way.
    #[track_caller]
    fn check(rows: &[(u64, Record)], expect: &[u64]) {
        let rows: Vec<Row> =
            rows.iter().map(|(address, record)| Row { address: *address, record: *record }).collect();
        let mut placement = Placement::new(Chains::default(), 0, 0);
        placement.rows(&rows);
        // The first pass: fewest entries.
        let uses = Uses::of(placement.chains.len(), &placement.placed);
        let rests = Rests::of(&placement.chains, |chain| uses.chains[chain].places > 0, true);
        let chosen = choose(&rests, |_| 1);
        let folded = entries(rests, &chosen);
        let entries: Vec<Row> = (placement.placed.iter())
            .flat_map(|placed| {
                folded.entries(placed.chain).iter().map(|entry| Row {
                    address: u64::from(placed.offset + entry.at),
                    record: folded.records[entry.record as usize],
                })
            })
            .collect();
        assert_eq!(entries.iter().map(|entry| entry.address).collect::<Vec<_>>(), expect);
        for address in rows[0].address..rows[rows.len() - 1].address + 40 {
            let state = rows.iter().rfind(|row| row.address <= address).unwrap().record;
            let entry = entries.iter().rfind(|entry| entry.address <= address).unwrap();
            let found = entry.record.at((address - entry.address) as u32);
            assert_eq!(found, state, "at {address:#x}");
        }
    }

    #[test]
    fn frame_pointer_prologue_is_one_entry() {
        check(&[(0, rsp(1, None)), (1, rsp(2, Some(-16))), (4, rbp(2, -16))], &[0]);
    }

    #[test]
    fn pushes_with_rbp_among_them_are_one_entry() {
        let rows = [rsp(1, None), rsp(2, None), rsp(3, Some(-24)), rsp(4, Some(-24))];
        check(&[(0, rows[0]), (2, rows[1]), (3, rows[2]), (4, rows[3])], &[0]);
        // A save at another offset than the CFA's own is no push of rbp.
        check(&[(0, rows[0]), (2, rows[1]), (3, rsp(3, Some(-16))), (4, rsp(4, Some(-16)))], &[0, 3]);
    }

    #[test]
    fn pops_are_one_entry() {
        let rows = [rsp(4, Some(-16)), rsp(3, Some(-16)), rsp(2, Some(-16)), rsp(1, None)];
        check(&[(0, rows[0]), (1, rows[1]), (2, rows[2]), (3, rows[3])], &[0]);
        check(&[(0, rows[0]), (17, rows[1]), (18, rows[2])], &[0, 17]);
        check(&[(0, rsp(0, None)), (1, rsp(-1, None))], &[0, 1]);
    }

    #[test]
    fn the_end_of_coverage_is_the_last_change_of_pops() {
        let rows = [rsp(3, Some(-16)), rsp(2, Some(-16)), rsp(1, None), Record::NO_CFI];
        check(&[(0, rows[0]), (1, rows[1]), (2, rows[2]), (3, rows[3])], &[0]);
        check(&[(0, rows[2]), (7, rows[3])], &[0]);
        check(&[(0, rows[2]), (17, rows[3])], &[0, 17]);
        // Another function, or pushes before the end.
        check(&[(0, rows[2]), (1, rows[3]), (2, rows[2])], &[0, 2]);
        check(&[(0, rows[2]), (1, rsp(2, None)), (2, rows[3])], &[0, 2]);
    }

    #[test]
    fn a_late_save_is_an_event_without_a_change() {
        check(&[(0, rsp(1, None)), (1, rsp(2, None)), (5, rsp(2, Some(-16))), (7, rsp(3, Some(-16)))], &[0]);
    }

    #[test]
    fn nothing_follows_the_frame_pointer() {
        let rows = [(0, rsp(1, None)), (1, rsp(2, Some(-16))), (4, rbp(2, -16)), (5, rsp(3, Some(-16)))];
        check(&rows, &[0, 5]);
    }

    #[test]
    fn base_beyond_a_byte_stays_plain() {
        check(&[(0, rsp(256, None)), (1, rsp(257, None))], &[0, 1]);
        check(&[(0, rsp(255, None)), (1, rsp(256, None))], &[0]);
    }
}
