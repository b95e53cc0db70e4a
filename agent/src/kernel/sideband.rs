//! Process events from the kernel's perf sideband: exec, fork, exit, executable mappings.
//!
//! One `PERF_COUNT_SW_DUMMY` event for each CPU counts nothing and carries `PERF_RECORD_*` records of
//! what tasks on that CPU do (perf_event_open(2)). Of a mapping only the process and the address range
//! are taken from the record: what is mapped is read from `/proc`, which is right even when records were
//! lost.
//!
//! # Order
//! A process may be forked on one CPU and exec on another, and rings are read one after the other. So
//! records carry their time and are merged by it; those newer than the beginning of a drain wait for
//! the next, because a ring read before may by now have an older one.

use std::os::fd::RawFd;

use crate::backend::{Event, Sample};
use crate::perf_ring::{
    PerfEventAttr, PerfRing, PerfScope, RingRecord, SIDEBAND_TIME_FROM_END, monotonic_ns,
    record as record_kind,
};

use super::LoadError;

/// Pages of each CPU's ring: 64 KiB hold some 500 mapping records, a burst of a few hundred
/// processes starting between two polls.
const RING_PAGES: usize = 16;

/// `PERF_RECORD_MISC_COMM_EXEC`: the name changed because of an exec.
const MISC_COMM_EXEC: u16 = 1 << 13;

/// Offset of the inode in the body of a `PERF_RECORD_MMAP2`: 0 for memory that is of no file.
const MMAP2_INODE: usize = 40;

/// The events of all CPUs.
pub(super) struct Sideband {
    rings: Vec<PerfRing>,
    waiting: TimeOrder,
}

/// Events of several rings on their way into one order.
#[derive(Default)]
pub(crate) struct TimeOrder {
    events: Vec<(u64, Event)>,
}

impl TimeOrder {
    pub(crate) fn push(&mut self, time_ns: u64, event: Event) {
        self.events.push((time_ns, event));
    }

    /// Hands out all events up to `until_ns`, the oldest first; newer ones stay.
    pub(crate) fn release(&mut self, until_ns: u64, sink: &mut dyn FnMut(Event)) {
        // Stable: events of one ring with the same time stay in their order.
        self.events.sort_by_key(|(time_ns, _)| *time_ns);
        let released = self.events.partition_point(|(time_ns, _)| *time_ns <= until_ns);
        self.events.drain(..released).for_each(|(_, event)| sink(event));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.events.is_empty()
    }
}

impl Sideband {
    pub(super) fn open(cpus: &[u32]) -> Result<Self, LoadError> {
        let attr = PerfEventAttr::sideband();
        let rings = cpus
            .iter()
            .map(|cpu| {
                PerfRing::open(&attr, PerfScope::Cpu(*cpu), RING_PAGES).map_err(|error| {
                    let advice = super::sampling_advice(error.raw_os_error(), 0, None);
                    LoadError::Attach { cpu: *cpu, reason: format!("process events: {error}{advice}") }
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { rings, waiting: TimeOrder::default() })
    }

    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.rings.iter().map(PerfRing::descriptor)
    }

    /// Hands out the events up to now, and samples that were taken out before, in the order of their times.
    pub(super) fn drain(&mut self, samples: Vec<Sample>, sink: &mut dyn FnMut(Event)) {
        let until_ns = monotonic_ns();
        let waiting = &mut self.waiting;
        for sample in samples {
            waiting.push(sample.time_ns, Event::Sample(sample));
        }
        for ring in &mut self.rings {
            ring.drain(|record| {
                if let Some((time_ns, event)) = event_of(&record, SIDEBAND_TIME_FROM_END) {
                    waiting.push(time_ns, event);
                }
            });
        }
        waiting.release(until_ns, sink);
    }

    /// Whether there are events left that the next drain hands out.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }
}

/// When a record was made and what it says, if it is of use. Its time is `time_from_end` bytes before its end.
pub(crate) fn event_of(record: &RingRecord<'_>, time_from_end: usize) -> Option<(u64, Event)> {
    let (body, trailer) = record.body.split_at_checked(record.body.len().checked_sub(time_from_end)?)?;
    let time_ns = double_at(trailer, 0)?;
    // COMM: pid, tid, name. MMAP2: pid, tid, address, length, offset, device, inode, ... EXIT and FORK: pid, ppid, tid, ptid, time.
    let word = |index: usize| {
        let bytes = body.get(4 * index..4 * index + 4)?;
        Some(u32::from_ne_bytes(bytes.try_into().expect("4 bytes")))
    };
    let event = match record.kind {
        record_kind::LOST => Event::Lost,
        record_kind::COMM if record.misc & MISC_COMM_EXEC != 0 => Event::Exec { tgid: word(0)? },
        record_kind::MMAP2 => Event::Mapped {
            tgid: word(0)?,
            start: double_at(body, 8)?,
            length: double_at(body, 16)?,
            of_file: double_at(body, MMAP2_INODE)? != 0,
            time_ns,
        },
        // A thread's exit or start is no process's.
        record_kind::EXIT if word(0)? == word(2)? => Event::Exited { tgid: word(0)? },
        record_kind::FORK if word(0)? == word(2)? => {
            Event::Forked { tgid: word(0)?, parent: word(1)?, time_ns }
        }
        _ => return None,
    };
    Some((time_ns, event))
}

fn double_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().expect("8 bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perf_ring::COPIED_TIME_FROM_END;

    const TIME_NS: u64 = 5_000_000_007;

    #[track_caller]
    fn check(kind: u32, misc: u16, words: &[u32], expect: Option<Event>) {
        let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        body.extend(TIME_NS.to_ne_bytes());
        let found = |body: &[u8], time_from_end| event_of(&RingRecord { kind, misc, body }, time_from_end);
        let expect = expect.map(|event| (TIME_NS, event));
        assert_eq!(found(&body, SIDEBAND_TIME_FROM_END), expect);
        // A CPU number behind the time.
        body.extend([0; 8]);
        assert_eq!(found(&body, COPIED_TIME_FROM_END), expect);
        assert_eq!(found(&[], SIDEBAND_TIME_FROM_END), None);
    }

    #[test]
    fn records() {
        check(record_kind::COMM, 0, &[7, 7], None);
        check(record_kind::COMM, MISC_COMM_EXEC, &[7, 7], Some(Event::Exec { tgid: 7 }));
        let mapped = |of_file| Event::Mapped {
            tgid: 7,
            start: 0x1_0000_2000,
            length: 0x3000,
            of_file,
            time_ns: TIME_NS,
        };
        let words = |inode| [7, 9, 0x2000, 1, 0x3000, 0, 0, 0, 0xfe, 0, inode, 0, 0, 0];
        check(record_kind::MMAP2, 2, &words(4711), Some(mapped(true)));
        check(record_kind::MMAP2, 2, &words(0), Some(mapped(false)));
        check(record_kind::MMAP2, 2, &[7, 9, 0x2000], None);
        check(record_kind::EXIT, 0, &[7, 1, 8, 1, 0, 0], None);
        check(record_kind::EXIT, 0, &[7, 1, 7, 1, 0, 0], Some(Event::Exited { tgid: 7 }));
        let forked = Event::Forked { tgid: 8, parent: 7, time_ns: TIME_NS };
        check(record_kind::FORK, 0, &[8, 7, 8, 7, 0, 0], Some(forked));
        check(record_kind::FORK, 0, &[8], None);
        check(record_kind::LOST, 0, &[], Some(Event::Lost));
    }

    #[test]
    fn events_of_several_rings_come_in_the_order_of_their_times() {
        let (exec, exited) = (Event::Exec { tgid: 8 }, Event::Exited { tgid: 8 });
        let forked = Event::Forked { tgid: 8, parent: 7, time_ns: 10 };
        let mut order = TimeOrder::default();
        // CPU 0 is read first.
        order.push(20, exec.clone());
        order.push(31, exited.clone());
        order.push(10, forked.clone());
        let mut released = Vec::new();
        order.release(30, &mut |event| released.push(event));
        assert_eq!(released, [forked, exec]);
        // What is newer than the drain may have an older one in a ring that was read before.
        assert!(!order.is_empty());
        released.clear();
        order.push(30, Event::Lost);
        order.release(40, &mut |event| released.push(event));
        assert_eq!(released, [Event::Lost, exited]);
        assert!(order.is_empty());
    }

    #[test]
    fn a_short_life_in_order() {
        let cpus = aya::util::online_cpus().unwrap();
        let Ok(mut sideband) = Sideband::open(&cpus) else {
            eprintln!("skipped: process events of all CPUs need CAP_PERFMON");
            return;
        };
        let start_ns = monotonic_ns();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let (end_ns, mut kinds) = (monotonic_ns(), Vec::new());
        let mut note = |event| match event {
            Event::Forked { tgid, parent, time_ns } if tgid == child.id() => {
                assert_eq!(parent, std::process::id());
                assert!((start_ns..end_ns).contains(&time_ns), "{start_ns} {time_ns} {end_ns}");
                kinds.push("forked");
            }
            Event::Mapped { tgid, start, length, time_ns, .. } if tgid == child.id() => {
                assert!((start_ns..end_ns).contains(&time_ns), "{start_ns} {time_ns} {end_ns}");
                assert!(start > 0 && length >= 4096 && start.checked_add(length).is_some());
                kinds.push("mapped");
            }
            Event::Exec { tgid } if tgid == child.id() => kinds.push("exec"),
            Event::Exited { tgid } if tgid == child.id() => kinds.push("exited"),
            _ => {}
        };
        sideband.drain(Vec::new(), &mut note);
        sideband.drain(Vec::new(), &mut note);
        kinds.dedup();
        assert_eq!(kinds, ["forked", "exec", "mapped", "exited"]);
    }
}
