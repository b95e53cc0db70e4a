//! Chooses the entries that state each chain: which of its rows are one run record, which stand alone.
//!
//! # Why this shape
//! One row in two follows another by a byte or two and moves the CFA by 8. The OpenTelemetry profiler
//! merges such pairs; a run record (see [`windlass_schema::record`]) takes the whole run, exactly. Any part of a
//! run is a run, so taking the longest at each step gives the fewest entries. But a run that occurs
//! once costs a dictionary record, more than the rows it replaces. So entries are chosen by cost: a first
//! pass takes the longest runs everywhere and counts them, further ones weigh each use of a record with
//! its share of the record's own bytes. Passes go over the distinct chains, not over the image.

use hashbrown::HashMap;
use windlass_schema::Record;
use windlass_schema::page::PAGE_SHIFT;
use windlass_schema::record::kind;
use windlass_schema::table::MAX_RECORDS;

use crate::chains::{ChainNumber, Chains, Step};
use crate::placement::Placed;
use crate::run::Run;

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
    let options = Options::of(chains, &uses, has_runs);
    let possible = options.possible_counts(&uses);
    let mut counts = possible.clone();
    let mut best = None;
    for _ in 0..if has_runs { PASSES } else { 1 } {
        let costs: Vec<u32> = counts.iter().map(|count| count.cost(&uses)).collect();
        let chosen = options.choose(|record| costs[record as usize]);
        counts = options.counts(&chosen, &uses);
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
    let mut chosen = best.expect("there is a pass").1;
    chosen.records = options.records;
    chosen
}

/// How often chains are placed, and on how many pages.
struct Uses {
    places: Vec<u32>,
    pages: Vec<u32>,
    all_pages: u32,
}

impl Uses {
    fn of(chains: usize, placed: &[Placed]) -> Self {
        let mut uses = Self { places: vec![0; chains], pages: vec![0; chains], all_pages: 0 };
        let mut last_page = vec![u32::MAX; chains];
        let mut page_before = u32::MAX;
        for placed in placed {
            let (chain, page) = (placed.chain as usize, placed.offset >> PAGE_SHIFT);
            uses.places[chain] += 1;
            uses.pages[chain] += u32::from(last_page[chain] != page);
            uses.all_pages += u32::from(page_before != page);
            (last_page[chain], page_before) = (page, page);
        }
        uses
    }
}

/// A way to begin the rest of a chain: `len` rows by one record.
#[derive(Clone, Copy)]
struct Choice {
    len: u16,
    record: u32,
}

/// The ways there are.
struct Options {
    records: Vec<Record>,
    /// Ways for each step of each chain in use, chains and steps in order.
    choices: Vec<Choice>,
    /// For each step: where its choices end, and how many bytes it is behind the chain's first.
    steps: Vec<(u32, u32)>,
    /// For each chain: where its steps end.
    chains: Vec<u32>,
}

/// Bytes of an entry, of a record in the dictionary, and of a page's reference to a record.
const ENTRY_BYTES: u32 = 2;
const RECORD_BYTES: u32 = 8;
const LOCAL_BYTES: u32 = 2;
/// Share of the pages from which on a record's number is taken to be common to all of them. Measured: between
/// 0.3 and 0.7 the tables of a distribution differ by 0.5%.
const COMMON_PAGES: f64 = 0.5;

impl Options {
    fn of(chains: &Chains, uses: &Uses, has_runs: bool) -> Self {
        let mut options =
            Self { records: Vec::new(), choices: Vec::new(), steps: Vec::new(), chains: Vec::new() };
        let mut numbers: HashMap<Record, u32> = HashMap::new();
        for chain in 0..chains.len() {
            // One that is placed nowhere was divided, or has become longer.
            let steps = if uses.places[chain] == 0 { &[][..] } else { chains.steps(chain as u32) };
            for (index, step) in steps.iter().enumerate() {
                let mut add = |len: usize, record: Record| {
                    let records = &mut options.records;
                    let number = *numbers.entry(record).or_insert_with(|| {
                        records.push(record);
                        records.len() as u32 - 1
                    });
                    options.choices.push(Choice { len: len as u16, record: number });
                };
                add(1, step.record);
                if has_runs {
                    runs_at(&steps[index..], add);
                }
                options.steps.push((options.choices.len() as u32, step.at));
            }
            options.chains.push(options.steps.len() as u32);
        }
        options
    }

    /// Chooses the cheapest entries, given what a use of a record costs; of equal ones, the longest first.
    fn choose(&self, cost: impl Fn(u32) -> u32) -> Folded {
        let mut folded = Folded { records: Vec::new(), entries: Vec::new(), ends: Vec::new() };
        // Cheapest way to state the rows from each step on.
        let mut best: Vec<(u64, Choice)> = Vec::new();
        let mut first = 0;
        for end in &self.chains {
            let steps = first..*end as usize;
            best.clear();
            best.resize(steps.len() + 1, (0, Choice { len: 0, record: 0 }));
            for index in (0..steps.len()).rev() {
                let step = steps.start + index;
                let choices = self.choices_from(step)..self.steps[step].0 as usize;
                let total = |choice: &Choice| {
                    u64::from(cost(choice.record)) + best[index + usize::from(choice.len)].0
                };
                let cheapest = self.choices[choices].iter().rev().map(|choice| (total(choice), *choice));
                best[index] = cheapest.min_by_key(|(total, _)| *total).expect("a row can stand alone");
            }
            let mut index = 0;
            while index < steps.len() {
                let choice = best[index].1;
                folded.entries.push(Entry { at: self.steps[steps.start + index].1, record: choice.record });
                index += usize::from(choice.len);
            }
            folded.ends.push(folded.entries.len() as u32);
            first = *end as usize;
        }
        folded
    }

    fn choices_from(&self, step: usize) -> usize {
        if step == 0 { 0 } else { self.steps[step - 1].0 as usize }
    }

    /// How often each record would be used, were it used wherever it can be.
    fn possible_counts(&self, uses: &Uses) -> Vec<Count> {
        let mut counts = vec![Count::default(); self.records.len()];
        let mut first = 0;
        for (chain, end) in self.chains.iter().enumerate() {
            let choices = if *end == 0 { 0 } else { self.steps[*end as usize - 1].0 as usize };
            for choice in &self.choices[first..choices.max(first)] {
                counts[choice.record as usize].add(chain, uses);
            }
            first = choices.max(first);
        }
        counts
    }

    /// How often each record is used.
    fn counts(&self, chosen: &Folded, uses: &Uses) -> Vec<Count> {
        let mut counts = vec![Count::default(); self.records.len()];
        for chain in 0..self.chains.len() {
            for entry in chosen.entries(chain as u32) {
                counts[entry.record as usize].add(chain, uses);
            }
        }
        counts
    }
}

/// How often a record is used.
#[derive(Clone, Copy, Default)]
struct Count {
    places: u64,
    /// At most: chains may share pages.
    pages: u64,
}

impl Count {
    fn add(&mut self, chain: usize, uses: &Uses) {
        self.places += u64::from(uses.places[chain]);
        self.pages += u64::from(uses.pages[chain]);
    }

    /// Bytes of a record beside its entries.
    fn record_bytes(&self, uses: &Uses) -> u64 {
        let all = f64::from(uses.all_pages.max(1));
        // Of pages, as many as random places meet, and no more than there can be.
        let pages = (all * (1.0 - (-(self.places as f64) / all).exp())).min(self.pages as f64);
        // The dictionary's first numbers, which most pages use, are every page's.
        let local = if pages > COMMON_PAGES * all { 0.0 } else { pages.max(1.0) };
        u64::from(RECORD_BYTES) + (f64::from(LOCAL_BYTES) * local) as u64
    }

    /// What a use costs, in 1/256 byte.
    fn cost(&self, uses: &Uses) -> u32 {
        256 * ENTRY_BYTES + (256 * self.record_bytes(uses) / self.places.max(1)) as u32
    }

    /// What all uses cost.
    fn bytes(&self, uses: &Uses) -> u64 {
        if self.places == 0 { 0 } else { u64::from(ENTRY_BYTES) * self.places + self.record_bytes(uses) }
    }
}

/// Calls `found` with the length and the record of each run of at least two rows that begins `rows`.
fn runs_at(rows: &[Step], mut found: impl FnMut(usize, Record)) {
    for kind in [kind::PUSH_RUN, kind::POP_RUN] {
        let Some(mut run) = Run::begin(rows[0].record, kind) else { return };
        for (index, row) in rows.iter().enumerate().skip(1) {
            if !run.extend(u64::from(row.at - rows[0].at), row.record) {
                break;
            }
            found(index + 1, run.to_record());
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
    use windlass_schema::record::frame_pointer;

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
        let mut placement = Placement::new(0, 0);
        placement.rows(&rows);
        // The first pass: fewest entries.
        let uses = Uses::of(placement.chains.len(), &placement.placed);
        let options = Options::of(&placement.chains, &uses, true);
        let mut folded = options.choose(|_| 1);
        folded.records = options.records;
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
