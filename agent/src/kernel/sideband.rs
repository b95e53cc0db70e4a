//! Process events from the kernel's perf sideband: exec, fork, exit, executable mappings.
//!
//! One `PERF_COUNT_SW_DUMMY` event for each CPU counts nothing and carries `PERF_RECORD_*` records of
//! what tasks on that CPU do (perf_event_open(2)). Of a mapping only the process is taken from the
//! record: what is mapped is read from `/proc`, which is right even when records were lost.

use std::os::fd::RawFd;

use crate::backend::Event;
use crate::perf_ring::{PerfEventAttr, PerfRing, PerfScope, RingRecord};

use super::LoadError;

/// Pages of each CPU's ring: 64 KiB hold some 500 mapping records, a burst of a few hundred
/// processes starting between two polls.
const RING_PAGES: usize = 16;

/// `PERF_RECORD_LOST` and so on, from include/uapi/linux/perf_event.h.
const RECORD_LOST: u32 = 2;
const RECORD_COMM: u32 = 3;
const RECORD_EXIT: u32 = 4;
const RECORD_FORK: u32 = 7;
const RECORD_MMAP2: u32 = 10;
/// `PERF_RECORD_MISC_COMM_EXEC`: the name changed because of an exec.
const MISC_COMM_EXEC: u16 = 1 << 13;

/// The events of all CPUs.
pub(super) struct Sideband {
    rings: Vec<PerfRing>,
}

impl Sideband {
    pub(super) fn open(cpus: &[u32]) -> Result<Self, LoadError> {
        let attr = PerfEventAttr::sideband();
        let rings =
            cpus.iter()
                .map(|cpu| {
                    PerfRing::open(&attr, PerfScope::Cpu(*cpu), RING_PAGES).map_err(|error| {
                        LoadError::Attach { cpu: *cpu, reason: format!("process events: {error}") }
                    })
                })
                .collect::<Result<_, _>>()?;
        Ok(Self { rings })
    }

    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.rings.iter().map(PerfRing::descriptor)
    }

    pub(super) fn drain(&mut self, sink: &mut dyn FnMut(Event)) {
        for ring in &mut self.rings {
            ring.drain(|record| {
                if let Some(event) = event_of(&record) {
                    sink(event);
                }
            });
        }
    }
}

/// What a record says, if it is of use.
fn event_of(record: &RingRecord<'_>) -> Option<Event> {
    // COMM: pid, tid, name. MMAP2: pid, tid, ... EXIT and FORK: pid, ppid, tid, ptid, time.
    let word = |index: usize| {
        let bytes = record.body.get(4 * index..4 * index + 4)?;
        Some(u32::from_ne_bytes(bytes.try_into().expect("4 bytes")))
    };
    match record.kind {
        RECORD_LOST => Some(Event::Lost),
        RECORD_COMM if record.misc & MISC_COMM_EXEC != 0 => Some(Event::Exec { tgid: word(0)? }),
        RECORD_MMAP2 => Some(Event::Mapped { tgid: word(0)? }),
        // A thread's exit or start is no process's.
        RECORD_EXIT if word(0)? == word(2)? => Some(Event::Exited { tgid: word(0)? }),
        RECORD_FORK if word(0)? == word(2)? => Some(Event::Forked { tgid: word(0)?, parent: word(1)? }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(kind: u32, misc: u16, words: &[u32], expect: Option<Event>) {
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(event_of(&RingRecord { kind, misc, body: &body }), expect);
    }

    #[test]
    fn records() {
        check(RECORD_COMM, 0, &[7, 7], None);
        check(RECORD_COMM, MISC_COMM_EXEC, &[7, 7], Some(Event::Exec { tgid: 7 }));
        check(RECORD_MMAP2, 2, &[7, 9], Some(Event::Mapped { tgid: 7 }));
        check(RECORD_EXIT, 0, &[7, 1, 8, 1, 0, 0], None);
        check(RECORD_EXIT, 0, &[7, 1, 7, 1, 0, 0], Some(Event::Exited { tgid: 7 }));
        check(RECORD_FORK, 0, &[8, 7, 8, 7, 0, 0], Some(Event::Forked { tgid: 8, parent: 7 }));
        check(RECORD_FORK, 0, &[8], None);
        check(RECORD_LOST, 0, &[], Some(Event::Lost));
    }
}
