//! Process events from the kernel's perf sideband: exec, fork, exit, executable mappings.
//!
//! One `PERF_COUNT_SW_DUMMY` event for each CPU counts nothing and carries `PERF_RECORD_*` records of
//! what tasks on that CPU do (perf_event_open(2)). Of a mapping the record has the range, and since Linux 5.12 the build-ID of
//! its file, by which an image that is known already is told without a look into `/proc`.
//!
//! # Lost records
//! A full ring loses records, and the kernel says so with the next one that it writes into it (`__perf_output_begin` in
//! kernel/events/ring_buffer.c). Those lost came after the last one that is there: that is where their loss belongs in the
//! order of events. A ring without room for one more record may have lost some already, so that is taken for a loss, too.
//!
//! # Order
//! A process may be forked on one CPU and exec on another, and rings are read one after the other. So
//! records carry their time and are merged by it; those newer than the beginning of a drain wait for
//! the next, because a ring read before may by now have an older one.

use std::ops::Range;
use std::os::fd::RawFd;

use windlass_schema::BuildId;

use crate::backend::{Event, MappedImage};
use crate::perf_ring::{
    PerfEventAttr, PerfRing, PerfScope, RingRecord, SIDEBAND_TIME_FROM_END, monotonic_ns, raw_ns,
    record as record_kind,
};
use crate::proc_maps::{Backing, backing};

use super::LoadError;

/// Pages of each CPU's ring: 64 KiB hold some 500 mapping records, a burst of a few hundred
/// processes starting between two polls.
const RING_PAGES: usize = 16;

/// By how much an event's time may be behind that of the clock before it is taken for one that has ended, in nanoseconds. They are
/// of two clocks that both go by the machine's own, `local_clock` and `CLOCK_MONOTONIC_RAW`: no daemon slews them.
const ENDED_BEHIND_NS: u64 = 100_000_000;

/// `PERF_RECORD_MISC_COMM_EXEC`: the name changed because of an exec.
const MISC_COMM_EXEC: u16 = 1 << 13;

/// `PERF_RECORD_MISC_MMAP_BUILD_ID`: the record has a build-ID where others have device and inode.
const MISC_MMAP_BUILD_ID: u16 = 1 << 14;

/// Offsets in the body of a `PERF_RECORD_MMAP2`: where in the file the mapping starts.
const MMAP2_FILE_OFFSET: usize = 24;
/// Either the length of the build-ID in a byte, three bytes of padding, and the build-ID; or device, inode and its generation.
const MMAP2_BUILD_ID_LENGTH: usize = 32;
const MMAP2_BUILD_ID: Range<usize> = 36..56;
/// The inode: 0 for memory that is of no file.
const MMAP2_INODE: usize = 40;
/// The path, up to a zero byte.
const MMAP2_PATH: usize = 64;

/// The events of all CPUs.
pub(super) struct Sideband {
    rings: Vec<Ring>,
    waiting: TimeOrder,
    /// Records that the kernel says it had no room for.
    lost_records: u64,
}

/// The events of a CPU.
struct Ring {
    cpu: u32,
    ring: PerfRing,
    end: RingEnd,
    /// For how long the event was enabled when it was looked at last, and when that was.
    enabled_ns: u64,
    looked_ns: u64,
}

impl Ring {
    /// Whether the event has ended. The kernel switches off the events of a CPU that goes (`list_del_event` by
    /// `perf_event_exit_cpu_context`, kernel/events/core.c), and not on when it comes back; `poll(2)` does not say so.
    fn has_ended(&mut self) -> bool {
        let passed_ns = raw_ns().saturating_sub(self.looked_ns);
        let Some(enabled_ns) = self.ring.enabled_ns() else { return true };
        let counted_ns = enabled_ns.saturating_sub(self.enabled_ns);
        // After the reading, as the other one is before it: the event counts what lies between, whatever that takes.
        (self.enabled_ns, self.looked_ns) = (enabled_ns, raw_ns());
        counted_ns + ENDED_BEHIND_NS < passed_ns
    }

    /// Takes the records out. Returns how many the kernel says it had no room for.
    fn drain(&mut self, waiting: &mut TimeOrder) -> u64 {
        let Self { ring, end, .. } = self;
        let mut lost_records = 0;
        let was_full = ring.drain(|record| {
            let Some(time_ns) = time_of(&record, SIDEBAND_TIME_FROM_END) else { return };
            lost_records += lost_by(&record);
            if let Some(since_ns) = end.note(time_ns, record.kind == record_kind::LOST) {
                waiting.push(since_ns, Event::Lost { until_ns: time_ns });
            }
            if record.kind != record_kind::LOST
                && let Some((time_ns, event)) = event_of(&record, SIDEBAND_TIME_FROM_END)
            {
                waiting.push(time_ns, event);
            }
        });
        if was_full {
            end.lost = true;
            waiting.push(end.last_ns, Event::Lost { until_ns: monotonic_ns() });
        }
        lost_records
    }
}

/// How far the records of a ring reach.
#[derive(Clone, Copy, Debug)]
struct RingEnd {
    /// The time of the last record.
    last_ns: u64,
    /// Whether it was said that some behind it are lost.
    lost: bool,
}

impl RingEnd {
    /// Takes note of a record, and says which loss it tells of that is not known yet: since when.
    fn note(&mut self, time_ns: u64, tells_of_loss: bool) -> Option<u64> {
        let since_ns = (tells_of_loss && !self.lost).then_some(self.last_ns);
        *self = Self { last_ns: time_ns.max(self.last_ns), lost: false };
        since_ns
    }
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
    /// Of no CPU yet.
    pub(super) fn new() -> Self {
        Self { rings: Vec::new(), waiting: TimeOrder::default(), lost_records: 0 }
    }

    /// Watches a CPU, if that is not so already. One that is not online is left out.
    pub(super) fn watch(&mut self, cpu: u32) -> Result<(), LoadError> {
        if self.rings.iter().any(|ring| ring.cpu == cpu) {
            return Ok(());
        }
        let open =
            |build_ids| PerfRing::open(&PerfEventAttr::sideband(build_ids), PerfScope::Cpu(cpu), RING_PAGES);
        // Kernels before 5.12 refuse the bit that they do not know.
        let opened = open(true).or_else(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => open(false),
            _ => Err(error),
        });
        let ring = match opened {
            Ok(ring) => ring,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
            Err(error) => {
                let advice = super::sampling_advice(error.raw_os_error(), 0, None);
                return Err(LoadError::Attach { cpu, reason: format!("process events: {error}{advice}") });
            }
        };
        let now_ns = monotonic_ns();
        let end = RingEnd { last_ns: now_ns, lost: false };
        self.rings.push(Ring { cpu, ring, end, enabled_ns: 0, looked_ns: raw_ns() });
        Ok(())
    }

    /// Events up to now are lost: a CPU was not watched.
    pub(super) fn note_lost(&mut self) {
        let now_ns = monotonic_ns();
        self.waiting.push(now_ns, Event::Lost { until_ns: now_ns });
    }

    /// The CPUs whose events have ended: each went, and may be back.
    pub(super) fn ended(&mut self) -> Vec<u32> {
        self.rings.iter_mut().filter_map(|ring| ring.has_ended().then_some(ring.cpu)).collect()
    }

    /// Watches a CPU no more. What happened there up to now is handed out with the next drain.
    pub(super) fn forget(&mut self, cpu: u32) {
        for mut ring in self.rings.extract_if(.., |ring| ring.cpu == cpu) {
            self.lost_records += ring.drain(&mut self.waiting);
        }
    }

    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.rings.iter().map(|Ring { ring, .. }| ring.descriptor())
    }

    /// Hands out the events up to now, and samples that were taken out before, each with its time, in the order of those.
    pub(super) fn drain(&mut self, samples: Vec<(u64, Event)>, sink: &mut dyn FnMut(Event)) {
        let until_ns = monotonic_ns();
        let waiting = &mut self.waiting;
        for (time_ns, sample) in samples {
            waiting.push(time_ns, sample);
        }
        self.lost_records += self.rings.iter_mut().map(|ring| ring.drain(waiting)).sum::<u64>();
        waiting.release(until_ns, sink);
    }

    /// Records that were lost since the start, as far as the kernel says how many.
    pub(super) fn lost_records(&self) -> u64 {
        self.lost_records
    }

    /// Whether there are events left that the next drain hands out.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }
}

/// How many records the kernel says with this one that it lost: `PERF_RECORD_LOST` has the event's ID and their number
/// (perf_event_open(2)).
fn lost_by(record: &RingRecord<'_>) -> u64 {
    if record.kind == record_kind::LOST { double_at(record.body, 8).unwrap_or_default() } else { 0 }
}

/// When a record was made: its time is `time_from_end` bytes before its end.
fn time_of(record: &RingRecord<'_>, time_from_end: usize) -> Option<u64> {
    double_at(record.body, record.body.len().checked_sub(time_from_end)?)
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
        record_kind::LOST => Event::Lost { until_ns: time_ns },
        record_kind::COMM if record.misc & MISC_COMM_EXEC != 0 => Event::Exec { tgid: word(0)?, time_ns },
        record_kind::MMAP2 => {
            let has_build_id = record.misc & MISC_MMAP_BUILD_ID != 0;
            Event::Mapped {
                tgid: word(0)?,
                start: double_at(body, 8)?,
                length: double_at(body, 16)?,
                of_file: has_build_id || double_at(body, MMAP2_INODE)? != 0,
                image: image_of(body, has_build_id).map(Box::new),
                time_ns,
            }
        }
        // A thread's exit or start is no process's.
        record_kind::EXIT if word(0)? == word(2)? => Event::Exited { tgid: word(0)? },
        record_kind::FORK if word(0)? == word(2)? => {
            Event::Forked { tgid: word(0)?, parent: word(1)?, time_ns }
        }
        _ => return None,
    };
    Some((time_ns, event))
}

/// What a `PERF_RECORD_MMAP2` says of the image.
fn image_of(body: &[u8], has_build_id: bool) -> Option<MappedImage> {
    let path = body.get(MMAP2_PATH..)?;
    let backing = backing(path.split(|byte| *byte == 0).next()?);
    let build_id = match &backing {
        Backing::Vdso => None,
        Backing::File { .. } if has_build_id => {
            let length = usize::from(*body.get(MMAP2_BUILD_ID_LENGTH)?);
            Some(BuildId::new(body.get(MMAP2_BUILD_ID)?.get(..length)?).ok()?)
        }
        Backing::File { .. } | Backing::Anonymous => return None,
    };
    Some(MappedImage { build_id, file_offset: double_at(body, MMAP2_FILE_OFFSET)?, backing })
}

fn double_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().expect("8 bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perf_ring::COPIED_TIME_FROM_END;

    const TIME_NS: u64 = 5_000_000_007;
    /// `PERF_EVENT_IOC_DISABLE`.
    const IOC_DISABLE: u64 = 0x2401;

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
        check(record_kind::COMM, MISC_COMM_EXEC, &[7, 7], Some(Event::Exec { tgid: 7, time_ns: TIME_NS }));
        let mapped = |of_file, image: Option<MappedImage>| Event::Mapped {
            tgid: 7,
            start: 0x1_0000_2000,
            length: 0x3000,
            of_file,
            image: image.map(Box::new),
            time_ns: TIME_NS,
        };
        let words = |of_file: [u32; 6], path: &[u8; 8]| {
            let mut words = vec![7, 9, 0x2000, 1, 0x3000, 0, 0x4000, 0];
            words.extend(of_file);
            words.extend([5, 2]);
            words.extend(path.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())));
            words
        };
        let (inode, build_id) = ([0xfe, 0, 4711, 0, 0, 0], [3, 0x0003_0201, 0, 0, 0, 0].map(u32::to_le));
        check(record_kind::MMAP2, 2, &words(inode, b"/bin/sh\0"), Some(mapped(true, None)));
        check(record_kind::MMAP2, 2, &words([0; 6], b"//anon\0\0"), Some(mapped(false, None)));
        let image = |build_id: Option<&str>, backing| MappedImage {
            build_id: build_id.map(|id| id.parse().unwrap()),
            file_offset: 0x4000,
            backing,
        };
        let vdso = image(None, Backing::Vdso);
        check(record_kind::MMAP2, 2, &words([0; 6], b"[vdso]\0\0"), Some(mapped(false, Some(vdso))));
        let of_file = |deleted| Backing::File { path: "/sh".into(), deleted };
        let shell = image(Some("010203"), of_file(false));
        let misc = MISC_MMAP_BUILD_ID | 2;
        check(record_kind::MMAP2, misc, &words(build_id, b"/sh\0\0\0\0\0"), Some(mapped(true, Some(shell))));
        let too_long = [25 << 24 | 25, 0, 0, 0, 0, 0];
        check(record_kind::MMAP2, misc, &words(too_long, b"/sh\0\0\0\0\0"), Some(mapped(true, None)));
        check(record_kind::MMAP2, 2, &[7, 9, 0x2000], None);
        check(record_kind::EXIT, 0, &[7, 1, 8, 1, 0, 0], None);
        check(record_kind::EXIT, 0, &[7, 1, 7, 1, 0, 0], Some(Event::Exited { tgid: 7 }));
        let forked = Event::Forked { tgid: 8, parent: 7, time_ns: TIME_NS };
        check(record_kind::FORK, 0, &[8, 7, 8, 7, 0, 0], Some(forked));
        check(record_kind::FORK, 0, &[8], None);
        check(record_kind::LOST, 0, &[], Some(Event::Lost { until_ns: TIME_NS }));
    }

    #[test]
    fn events_of_several_rings_come_in_the_order_of_their_times() {
        let (exec, exited) = (Event::Exec { tgid: 8, time_ns: 20 }, Event::Exited { tgid: 8 });
        let lost = Event::Lost { until_ns: 35 };
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
        order.push(30, lost.clone());
        order.release(40, &mut |event| released.push(event));
        assert_eq!(released, [lost, exited]);
        assert!(order.is_empty());
    }

    #[test]
    fn a_loss_belongs_behind_the_last_record() {
        let mut end = RingEnd { last_ns: 10, lost: false };
        assert_eq!(end.note(20, false), None);
        assert_eq!(end.note(50, true), Some(20));
        assert_eq!(end.note(60, true), Some(50), "another one");
        // The ring was found full, and the kernel says later what that came to.
        end.lost = true;
        assert_eq!(end.note(90, true), None);
        assert_eq!(end.note(91, true), Some(90));
    }

    /// The events of these CPUs, from now on.
    fn watching(cpus: &[u32]) -> Option<Sideband> {
        let mut sideband = Sideband::new();
        if cpus.iter().any(|cpu| sideband.watch(*cpu).is_err()) {
            eprintln!("skipped: process events of all CPUs need CAP_PERFMON");
            return None;
        }
        Some(sideband)
    }

    #[test]
    fn cpus_come_and_go() {
        let Some(mut sideband) = watching(&[0]) else { return };
        let check = |sideband: &Sideband, expect: &[u32]| {
            assert_eq!(sideband.rings.iter().map(|ring| ring.cpu).collect::<Vec<_>>(), expect);
        };
        sideband.watch(0).unwrap();
        check(&sideband, &[0]);
        sideband.forget(0);
        check(&sideband, &[]);
        sideband.watch(0).unwrap();
        check(&sideband, &[0]);
        sideband.note_lost();
        let mut losses = 0;
        sideband.drain(Vec::new(), &mut |event| losses += u32::from(matches!(event, Event::Lost { .. })));
        assert_eq!(losses, 1);
    }

    /// As the kernel does with the events of a CPU that goes.
    #[test]
    fn events_that_were_switched_off_have_ended() {
        let Some(mut sideband) = watching(&[0]) else { return };
        let wait = || std::thread::sleep(std::time::Duration::from_nanos(2 * ENDED_BEHIND_NS));
        wait();
        assert!(sideband.ended().is_empty());
        wait();
        assert!(sideband.ended().is_empty());
        // SAFETY: the request takes no pointer.
        let disabled = unsafe { libc::ioctl(sideband.rings[0].ring.descriptor(), IOC_DISABLE, 0) };
        assert_eq!(disabled, 0);
        wait();
        assert_eq!(sideband.ended(), [0]);
        sideband.forget(0);
        sideband.watch(0).expect("it could be watched before");
        wait();
        assert!(sideband.ended().is_empty());
    }

    #[test]
    fn what_happened_on_a_cpu_outlives_its_ring() {
        let cpus = aya::util::online_cpus().expect("the kernel lists them");
        let Some(mut sideband) = watching(&cpus) else { return };
        let mut child = std::process::Command::new("true").spawn().expect("a process");
        child.wait().expect("it ends");
        cpus.iter().for_each(|cpu| sideband.forget(*cpu));
        let mut has_exited = false;
        sideband.drain(Vec::new(), &mut |event| has_exited |= event == Event::Exited { tgid: child.id() });
        assert!(has_exited);
    }

    #[test]
    fn a_full_ring_is_a_loss_before_the_kernel_says_so() {
        let cpus = aya::util::online_cpus().unwrap();
        let Some(mut sideband) = watching(&cpus) else { return };
        let last_ns = |sideband: &Sideband| sideband.rings.iter().map(|ring| ring.end.last_ns).max();
        let start_ns = last_ns(&sideband).unwrap();
        // Each a record of some 120 bytes, of 64 KiB a CPU.
        for _ in 0..1000 * cpus.len() {
            // SAFETY: a new mapping, which nobody uses, comes and goes.
            unsafe {
                let protection = libc::PROT_READ | libc::PROT_EXEC;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let page = libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0);
                assert_ne!(page, libc::MAP_FAILED);
                libc::munmap(page, 4096);
            }
        }
        let mut losses = Vec::new();
        sideband.drain(Vec::new(), &mut |event| {
            if let Event::Lost { until_ns } = event {
                losses.push(until_ns);
            }
        });
        assert!(!losses.is_empty() && losses.iter().all(|until_ns| *until_ns > start_ns), "{losses:?}");
        assert!(sideband.rings.iter().any(|ring| ring.end.lost));
    }

    #[test]
    fn a_short_life_in_order() {
        let cpus = aya::util::online_cpus().unwrap();
        let Some(mut sideband) = watching(&cpus) else { return };
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
            Event::Exec { tgid, .. } if tgid == child.id() => kinds.push("exec"),
            Event::Exited { tgid } if tgid == child.id() => kinds.push("exited"),
            _ => {}
        };
        sideband.drain(Vec::new(), &mut note);
        sideband.drain(Vec::new(), &mut note);
        kinds.dedup();
        assert_eq!(kinds, ["forked", "exec", "mapped", "exited"]);
    }
}
