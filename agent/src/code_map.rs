//! Which function was at an address of just-in-time compiled code, at the time of a sample?
//!
//! A compiler puts code where other code was, and its records say so later or without a time. So what was known before any
//! sample is kept apart from what came since, and an address is asked for together with the times between which
//! samples met it:
//!
//! ```text
//! a record of code at the address      what was there counts as
//!   from before the first sample         that code
//!   from after the last one              what it was
//!   possibly from between                unknown, unless nothing else was known to be there
//! ```
//! Of a perf map, a record's time is known to lie between two readings, of a jitdump exactly. What overlaps code of
//! before has overwritten it, as a whole: its other addresses mean nothing any more.

use std::collections::{BTreeMap, HashMap};

use crate::code_records::{CodeEvent, Record, RecordsError};

/// Most functions kept of one process, at some 50 bytes each: thirty times those of a large server under node.
pub const MAX_FUNCTIONS: usize = 250_000;
/// Most answers that the records of one reading may change: what a hostile file with records that cover everything can
/// cost, some ten milliseconds.
const MAX_CHANGES: usize = 1 << 20;

/// Code that a record told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Code {
    /// First process address.
    pub start: u64,
    /// First process address behind it.
    pub end: u64,
    /// Where code with this name was recorded first: its start, and the offset of the record with the name.
    pub named: (u64, u64),
}

/// When samples met an address: `CLOCK_MONOTONIC` in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Met {
    /// The first time.
    pub first_ns: u64,
    /// The last time.
    pub last_ns: u64,
}

/// Records of one process.
#[derive(Debug, Default)]
pub struct CodeMap {
    /// Code by its start, as of before any sample that is asked for; disjoint.
    settled: BTreeMap<u64, (u64, (u64, u64))>,
    /// What readings brought since.
    news: Vec<News>,
    /// The last of it by start.
    news_at: HashMap<u64, usize>,
}

#[derive(Clone, Copy, Debug)]
struct News {
    code: Code,
    earliest_ns: u64,
    latest_ns: u64,
}

/// What is known of an address so far.
#[derive(Clone, Copy, Debug)]
enum Known {
    Nothing,
    Code(Code),
    Doubtful,
}

impl CodeMap {
    /// Takes a record that was read between `earliest_ns` and `latest_ns`.
    pub fn add(&mut self, record: Record, earliest_ns: u64, latest_ns: u64) -> Result<(), RecordsError> {
        if self.settled.len() + self.news.len() >= MAX_FUNCTIONS {
            return Err(RecordsError::TooMuch { what: "functions", limit: MAX_FUNCTIONS as u64 });
        }
        let (earliest_ns, latest_ns) = match record.time_ns {
            None => (earliest_ns, latest_ns),
            Some(time) if time > latest_ns => {
                return Err(RecordsError::Jitdump("its times are not of the clock of samples"));
            }
            Some(time) => (time, time),
        };
        let named = match record.event {
            CodeEvent::Made { record_at } => (record.start, record_at),
            CodeEvent::Moved { from } => match self.named(from) {
                Some(named) => named,
                None => return Ok(()),
            },
        };
        let code = Code { start: record.start, end: record.end, named };
        self.news_at.insert(code.start, self.news.len());
        self.news.push(News { code, earliest_ns, latest_ns });
        Ok(())
    }

    /// The name's place of the code that starts at `start`, as of now.
    fn named(&self, start: u64) -> Option<(u64, u64)> {
        let news = self.news_at.get(&start).map(|at| self.news[*at].code.named);
        news.or_else(|| self.settled.get(&start).map(|(_, named)| *named))
    }

    /// The code at each address, as far as there is no doubt.
    pub fn find(&self, met: &BTreeMap<u64, Met>) -> BTreeMap<u64, Code> {
        let mut known: BTreeMap<u64, (Met, Known)> = met
            .iter()
            .map(|(address, met)| {
                (*address, (*met, self.settled(*address).map_or(Known::Nothing, Known::Code)))
            })
            .collect();
        let mut changes = 0;
        for news in &self.news {
            for (_, (met, known)) in known.range_mut(news.code.start..news.code.end) {
                changes += 1;
                *known = match *known {
                    _ if news.latest_ns <= met.first_ns => Known::Code(news.code),
                    // It was not there yet.
                    known if news.earliest_ns > met.last_ns => known,
                    Known::Nothing => Known::Code(news.code),
                    Known::Code(_) | Known::Doubtful => Known::Doubtful,
                };
            }
            if changes > MAX_CHANGES {
                return BTreeMap::new();
            }
        }
        let found = known.into_iter().filter_map(|(address, (_, known))| match known {
            Known::Code(code) => Some((address, code)),
            Known::Nothing | Known::Doubtful => None,
        });
        found.collect()
    }

    fn settled(&self, address: u64) -> Option<Code> {
        let (start, (end, named)) = self.settled.range(..=address).next_back()?;
        (address < *end).then_some(Code { start: *start, end: *end, named: *named })
    }

    /// Makes what records brought by `until_ns` a part of what is known: no sample from before will be asked for.
    pub fn settle(&mut self, until_ns: u64) {
        let settled = self.news.iter().take_while(|news| news.latest_ns <= until_ns).count();
        for News { code, .. } in self.news.drain(..settled) {
            while let Some((start, (end, _))) = self.settled.range(..code.end).next_back()
                && *end > code.start
            {
                let start = *start;
                self.settled.remove(&start);
            }
            self.settled.insert(code.start, (code.end, code.named));
        }
        self.news.shrink_to(1024);
        self.news_at.clear();
        self.news_at.extend(self.news.iter().enumerate().map(|(at, news)| (news.code.start, at)));
    }

    /// How many functions it has.
    pub fn len(&self) -> usize {
        self.settled.len() + self.news.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(start: u64, size: u64, record_at: u64) -> Record {
        Record { start, end: start + size, time_ns: None, event: CodeEvent::Made { record_at } }
    }

    fn at(record: Record, time: u64) -> Record {
        Record { time_ns: Some(time), ..record }
    }

    /// The offset of the record that names `address` for samples between two times.
    fn find(map: &CodeMap, address: u64, first_ns: u64, last_ns: u64) -> Option<u64> {
        let met = BTreeMap::from([(address, Met { first_ns, last_ns })]);
        map.find(&met).get(&address).map(|code| code.named.1)
    }

    #[test]
    fn the_latest_that_covers_the_address() {
        let mut map = CodeMap::default();
        map.add(made(0x1000, 0x100, 1), 0, 50).unwrap();
        assert_eq!(find(&map, 0x1000, 40, 45), Some(1));
        assert_eq!(find(&map, 0x10ff, 40, 45), Some(1));
        assert_eq!(find(&map, 0xfff, 40, 45), None);
        assert_eq!(find(&map, 0x1100, 40, 45), None);
        map.settle(u64::MAX);
        assert_eq!(find(&map, 0x1080, 60, 70), Some(1));
        // Between the readings at 50 and 100, other code came there.
        map.add(made(0x1040, 0x10, 2), 50, 100).unwrap();
        assert_eq!(find(&map, 0x1044, 60, 70), None, "it may have been either");
        assert_eq!(find(&map, 0x1044, 100, 100), Some(2));
        assert_eq!(find(&map, 0x1080, 60, 70), Some(1));
        map.settle(u64::MAX);
        assert_eq!(find(&map, 0x1044, 110, 120), Some(2));
        assert_eq!(find(&map, 0x1080, 110, 120), None, "overwritten as a whole");
        assert_eq!(map.settled.len(), 1);
    }

    /// A reading takes a while, and samples are taken meanwhile.
    #[test]
    fn what_was_read_after_a_sample_is_not_what_it_met() {
        let mut map = CodeMap::default();
        map.add(made(0x1000, 0x100, 1), 0, 50).unwrap();
        map.settle(60);
        map.add(made(0x1000, 0x100, 2), 60, 110).unwrap();
        // The next reading, for samples from 100 on.
        map.settle(100);
        assert_eq!(find(&map, 0x1010, 105, 105), None);
        assert_eq!(find(&map, 0x1010, 110, 120), Some(2));
        map.settle(110);
        assert_eq!((map.news.len(), map.len()), (0, 1));
    }

    #[test]
    fn with_times_there_is_no_doubt() {
        let mut map = CodeMap::default();
        map.add(at(made(0x1000, 0x100, 1), 10), 0, 100).unwrap();
        map.add(at(made(0x1000, 0x100, 2), 20), 0, 100).unwrap();
        assert_eq!(find(&map, 0x1000, 5, 8), None);
        assert_eq!(find(&map, 0x1000, 12, 18), Some(1));
        assert_eq!(find(&map, 0x1000, 20, 30), Some(2));
        assert_eq!(find(&map, 0x1000, 12, 30), None);
        let late = map.add(at(made(0x1000, 0x100, 3), 101), 0, 100);
        assert!(matches!(late, Err(RecordsError::Jitdump(_))));
    }

    #[test]
    fn moved_code_keeps_its_name() {
        let mut map = CodeMap::default();
        let moved = |from, to| Record { event: CodeEvent::Moved { from }, ..made(to, 0x100, 0) };
        map.add(at(made(0x1000, 0x100, 7), 10), 0, 100).unwrap();
        map.add(at(moved(0x1000, 0x5000), 20), 0, 100).unwrap();
        map.settle(u64::MAX);
        map.add(at(moved(0x5000, 0x8000), 120), 100, 200).unwrap();
        map.add(at(moved(0x6000, 0x9000), 130), 100, 200).unwrap();
        assert_eq!(find(&map, 0x5010, 110, 115), Some(7));
        assert_eq!(find(&map, 0x8010, 125, 126), Some(7));
        assert_eq!(find(&map, 0x9010, 140, 150), None, "nobody knows what that was");
        let met = BTreeMap::from([(0x8010, Met { first_ns: 125, last_ns: 126 })]);
        assert_eq!(map.find(&met)[&0x8010].named, (0x1000, 7), "its name is where it was first");
    }

    #[test]
    fn limits() {
        let mut map = CodeMap::default();
        for number in 0..MAX_FUNCTIONS as u64 {
            map.add(made(0, 1 << 40, number), 0, 1).unwrap();
        }
        assert!(matches!(map.add(made(0, 1, 0), 0, 1), Err(RecordsError::TooMuch { .. })));
        let met = Met { first_ns: 1, last_ns: 1 };
        let met: BTreeMap<u64, Met> = (0..1000).map(|address| (address, met)).collect();
        assert!(map.find(&met).is_empty(), "too much work");
    }
}
