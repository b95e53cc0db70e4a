//! Sampling in the kernel: loads the BPF program, feeds its maps, drains its samples.
//!
//! The object is committed and embedded, so that nobody needs a BPF toolchain. Everything hangs on
//! file descriptors of this process: when it ends, however it ends, the kernel detaches the program.
//!
//! Process events come from the kernel's own sideband records (`sideband`) rather than from further
//! BPF programs: they need no tracefs and no function tracing, name every executable mapping, and
//! say when some were lost.

mod audits;
mod chunk_maps;
mod cpus;
mod map_sizes;
mod object;
mod program;
pub(crate) mod sideband;

use std::num::NonZeroU32;
use std::os::fd::AsRawFd;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{HashMap, MapData, PerCpuArray, RingBuf};
use aya::programs::ProgramError;
use windlass_schema::maps::{
    Counter, Mapping, MappingSegment, PROCESS_SEGMENTS, ProcessEntry, SEGMENT_MAPPINGS, SEGMENT_SLOTS,
    SampleHeader, SegmentKey, UNUSED_START, names,
};
use windlass_schema::{StopReason, Table, maps::Location};

use crate::alarm::Alarm;
use crate::backend::{Backend, Event, PlaceError, PlacedMapping, Sample, TableMemory, unsupported_reason};
use crate::chunks::ChunkSpace;
use audits::Audits;
pub use chunk_maps::ChunkMaps;
use cpus::Cpus;
use map_sizes::MapSizes;
pub(crate) use object::{HashMaps, load_object};
pub use program::Turns;
use sideband::Sideband;

/// Most kernel memory for tables in bytes, unless said otherwise: every ELF file of a Debian developer's machine (23
/// million rows) takes three quarters.
pub const DEFAULT_TABLE_BUDGET_BYTES: u64 = 32 * 1024 * 1024;

/// What to load.
#[derive(Clone, Debug)]
pub struct Options {
    /// Samples a second on each CPU.
    pub frequency_hz: u32,
    /// Most kernel memory for tables.
    pub table_budget_bytes: u64,
    /// How walks make their turns.
    pub turns: Turns,
    /// One sample in so many is audited; `None` for none.
    pub audit_every: Option<NonZeroU32>,
}

impl Default for Options {
    /// 19 Hz; tables up to the default budget; no audits.
    fn default() -> Self {
        Self {
            frequency_hz: 19,
            table_budget_bytes: DEFAULT_TABLE_BUDGET_BYTES,
            turns: Turns::default(),
            audit_every: None,
        }
    }
}

/// The BPF program could not be put to work.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The capabilities for it are missing.
    #[error("loading BPF programs is not permitted")]
    NotPermitted,
    /// A kernel from before the program's helpers.
    #[error("the kernel has no {missing}, and is too old for the BPF program: Linux 5.15 or newer is needed")]
    TooOld {
        /// What it lacks.
        missing: &'static str,
    },
    /// A kernel that the program does not load on.
    #[error(
        "the kernel refused the BPF program: {0} (Linux 5.15 or newer with BTF, /sys/kernel/btf/vmlinux, is needed)"
    )]
    Refused(String),
    /// Sampling could not be switched on.
    #[error("the kernel refused to sample CPU {cpu}: {reason}")]
    Attach {
        /// CPU number.
        cpu: u32,
        /// What the kernel said, and what to do.
        reason: String,
    },
    /// Which CPUs there are could not be told.
    #[error("online CPUs could not be listed: {0}")]
    Cpus(String),
}

/// The program at work.
pub struct Kernel {
    // Declared first, so that sampling stops before the maps go.
    bpf: Ebpf,
    processes: HashMap<MapData, u32, PlainProcess>,
    mappings: HashMap<MapData, PlainKey, PlainSegment>,
    counters: PerCpuArray<MapData, u64>,
    samples: RingBuf<MapData>,
    chunk_maps: ChunkMaps,
    space: ChunkSpace,
    /// Tables that nothing names any more, but walks may still read.
    removed: Vec<Location>,
    sideband: Sideband,
    cpus: Cpus,
    /// If there are any.
    audits: Option<Audits>,
    alarm: Option<Alarm>,
    generation: u32,
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct PlainProcess(ProcessEntry);
// SAFETY: integers without padding.
unsafe impl aya::Pod for PlainProcess {}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct PlainKey(SegmentKey);
// SAFETY: integers without padding.
unsafe impl aya::Pod for PlainKey {}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct PlainSegment(MappingSegment);
// SAFETY: integers without padding.
unsafe impl aya::Pod for PlainSegment {}

impl From<ProgramError> for LoadError {
    fn from(error: ProgramError) -> Self {
        Self::Refused(describe(&error))
    }
}

/// What the verifier objects to: the last line of its log, before that of its statistics (`print_verification_stats`
/// in kernel/bpf/verifier.c).
fn refusal(log: &str) -> &str {
    const STATISTICS: [&str; 3] = ["verification time ", "stack depth ", "processed "];
    let is_statistics = |line: &str| STATISTICS.iter().any(|start| line.starts_with(start));
    let mut lines = log.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.rfind(|line| !is_statistics(line)).unwrap_or("the verifier does not say why")
}

/// An error with its sources on one line.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

/// The error number of the system call at the root of `error`.
fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    std::iter::successors(Some(error), |error| error.source())
        .find_map(|error| error.downcast_ref::<std::io::Error>()?.raw_os_error())
}

/// `kernel.perf_event_max_sample_rate`, which the kernel itself lowers when sampling takes it too long.
pub(crate) fn max_sample_rate() -> Option<u32> {
    std::fs::read_to_string("/proc/sys/kernel/perf_event_max_sample_rate").ok()?.trim().parse().ok()
}

/// What to do when `perf_event_open` fails for samples, to be put behind what the kernel said; empty if nothing
/// is known (perf_event_open(2), ERRORS).
pub(crate) fn sampling_advice(errno: Option<i32>, frequency_hz: u32, max_rate: Option<u32>) -> String {
    match (errno, max_rate) {
        (Some(libc::EINVAL), Some(max_rate)) if frequency_hz > max_rate => format!(
            "; {frequency_hz} Hz are more than kernel.perf_event_max_sample_rate allows: sample at {max_rate} Hz or \
             less"
        ),
        (Some(libc::EACCES | libc::EPERM), _) => "; grant CAP_PERFMON, or lower kernel.perf_event_paranoid \
             (at most 2 to sample processes of your own)"
            .to_owned(),
        (Some(libc::EMFILE), _) => "; allow more open files (ulimit -n)".to_owned(),
        (Some(libc::ENOENT | libc::ENOSYS | libc::EOPNOTSUPP), _) => {
            "; this kernel, or this virtual machine, has no such perf events".to_owned()
        }
        _ => String::new(),
    }
}

/// Loads the object and its program: with maps as large as this kernel lets them be.
fn load_program(options: &Options) -> Result<(Ebpf, &'static str), LoadError> {
    let sizes = MapSizes::of_machine(options.frequency_hz);
    let load = |sizes, hash_maps| {
        let mut bpf = load_object(sizes, hash_maps, options.audit_every)?;
        let name = program::load(&mut bpf, options.turns)?;
        Ok((bpf, name))
    };
    // As kernels are that have no bpf_loop.
    if options.turns == Turns::WithoutLoop {
        return load(sizes.preallocated(), HashMaps::Preallocated);
    }
    match load(sizes, HashMaps::Growing) {
        Err(LoadError::Refused(text)) if text.contains(program::NO_GROWING_MAPS) => {
            load(sizes.preallocated(), HashMaps::Preallocated)
        }
        loaded => loaded,
    }
}

impl Kernel {
    /// Loads the program and starts sampling every CPU.
    pub fn load(options: &Options) -> Result<Self, LoadError> {
        let (mut bpf, name) = load_program(options)?;
        let missing = |name: &str| LoadError::Refused(format!("the object has no map {name}"));
        let mut take = |name: &str| bpf.take_map(name).ok_or_else(|| missing(name));
        let wrong = |error: aya::maps::MapError| LoadError::Refused(describe(&error));
        let processes = HashMap::try_from(take(names::PROCESSES)?).map_err(wrong)?;
        let mappings = HashMap::try_from(take(names::MAPPINGS)?).map_err(wrong)?;
        let counters = PerCpuArray::try_from(take(names::COUNTERS)?).map_err(wrong)?;
        let samples = RingBuf::try_from(take(names::SAMPLES)?).map_err(wrong)?;
        let chunk_maps = ChunkMaps::from_map(take(names::CHUNKS)?)?;
        let audits = match options.audit_every {
            Some(_) => Some(Audits::new(take(names::AUDITS)?).map_err(wrong)?),
            None => None,
        };
        let mut sideband = Sideband::new();
        let mut cpus = Cpus::new(name, options.frequency_hz);
        cpus.review(&mut bpf, &mut sideband)?;
        Ok(Self {
            bpf,
            processes,
            mappings,
            counters,
            samples,
            chunk_maps,
            space: ChunkSpace::new(options.table_budget_bytes),
            removed: Vec::new(),
            sideband,
            cpus,
            audits,
            alarm: None,
            generation: 0,
        })
    }

    fn counter(&self, counter: Counter) -> u64 {
        self.counters.get(&(counter as u32), 0).map_or(0, |values| values.iter().sum())
    }

    /// Entries of the program's maps: processes, and segments of their mappings.
    pub fn process_entries(&self) -> (usize, usize) {
        (self.processes.keys().flatten().count(), self.mappings.keys().flatten().count())
    }

    /// Samples taken since the start.
    pub fn taken_samples(&self) -> u64 {
        self.counter(Counter::Samples)
    }
}

impl Backend for Kernel {
    fn place_table(&mut self, table: &Table<'_>) -> Result<Location, PlaceError> {
        let placed = self.space.place(table)?;
        if let Err(error) = self.chunk_maps.flush(&mut self.space) {
            self.space.free(placed.header);
            return Err(PlaceError::Kernel(describe(&error)));
        }
        Ok(placed.header)
    }

    fn to_remove(&self, table: &Table<'_>, candidates: &[Location]) -> Option<usize> {
        self.space.to_free(table, candidates)
    }

    fn remove_tables(&mut self, tables: &[Location]) -> Result<(), PlaceError> {
        // Should the wait fail, they keep their places until it succeeds for others.
        self.removed.extend_from_slice(tables);
        self.chunk_maps.wait_for_walks().map_err(|error| PlaceError::Kernel(describe(&error)))?;
        self.removed.drain(..).for_each(|table| self.space.free(table));
        Ok(())
    }

    fn set_process(&mut self, tgid: u32, mappings: &[PlacedMapping]) -> anyhow::Result<u32> {
        self.generation = next_generation(self.generation);
        let (entry, segments) = segments_of(mappings, self.generation);
        // The entry first. The kernel may write a segment where the one lay that it has just replaced (since Linux 6.1
        // the elements of such maps are used again at once: bpf_mem_alloc), under a walk that still reads that: such a walk
        // finds another generation at its end. One that begins now stops at segments of an older one.
        self.processes.insert(tgid, PlainProcess(entry), 0)?;
        for (number, segment) in segments.iter().enumerate() {
            let key = PlainKey(SegmentKey { tgid, segment: number as u32 });
            self.mappings.insert(key, PlainSegment(*segment), 0)?;
        }
        for segment in entry.segments..PROCESS_SEGMENTS as u32 {
            if self.mappings.remove(&PlainKey(SegmentKey { tgid, segment })).is_err() {
                break;
            }
        }
        Ok(self.generation)
    }

    fn remove_process(&mut self, tgid: u32) {
        // Not being there is what was asked for.
        let _ = self.processes.remove(&tgid);
        for segment in 0..PROCESS_SEGMENTS as u32 {
            if self.mappings.remove(&PlainKey(SegmentKey { tgid, segment })).is_err() {
                break;
            }
        }
    }

    fn poll(&mut self, timeout: Duration, sink: &mut dyn FnMut(Event)) -> anyhow::Result<()> {
        self.cpus.review_if_due(&mut self.bpf, &mut self.sideband);
        let mut descriptors =
            vec![libc::pollfd { fd: self.samples.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
        let others = (self.sideband.descriptors())
            .chain(self.audits.iter().map(Audits::descriptor))
            .chain(self.alarm.iter().map(Alarm::descriptor));
        descriptors.extend(others.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }));
        let timeout_ms = match self.sideband.has_waiting() {
            true => 0,
            false => i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX),
        };
        // SAFETY: the array is valid for its length during the call.
        let ready =
            unsafe { libc::poll(descriptors.as_mut_ptr(), descriptors.len() as libc::nfds_t, timeout_ms) };
        if ready < 0 {
            let error = std::io::Error::last_os_error();
            if error.kind() != std::io::ErrorKind::Interrupted {
                return Err(error.into());
            }
        }
        // Samples are taken out first, so that all process events older than one of them are drained after it.
        let mut samples = Vec::new();
        while let Some(item) = self.samples.next() {
            samples.extend(decode_sample(&item).map(|sample| (sample.time_ns, Event::Sample(sample))));
        }
        for walk in self.audits.iter_mut().flat_map(Audits::drain) {
            samples.push((walk.sample.time_ns, Event::Audit(Box::new(walk))));
        }
        self.sideband.drain(samples, sink);
        Ok(())
    }

    fn heed(&mut self, alarm: &Alarm) {
        self.alarm = Some(alarm.clone());
    }

    fn lost_samples(&self) -> u64 {
        self.counter(Counter::RingFull)
    }

    fn lost_process_events(&self) -> u64 {
        self.sideband.lost_records()
    }

    fn table_memory(&self) -> TableMemory {
        TableMemory { used_bytes: self.space.used_bytes(), budget_bytes: self.space.budget_bytes() }
    }

    fn lost_audits(&self) -> u64 {
        self.counter(Counter::AuditsLost)
    }
}

/// The generation after `generation`. 0 says that there is none.
pub(crate) fn next_generation(generation: u32) -> u32 {
    generation.wrapping_add(1).max(1)
}

/// The map values that state `mappings`. Left out are those beyond a process's limit, and those above
/// the user half of the address space (`[vsyscall]`), where the search's comparisons do not hold.
pub fn segments_of(mappings: &[PlacedMapping], generation: u32) -> (ProcessEntry, Vec<MappingSegment>) {
    let users = mappings.partition_point(|placed| placed.start < UNUSED_START);
    let mappings = &mappings[..users];
    let mut entry = ProcessEntry { generation, segments: 0, first: [UNUSED_START; PROCESS_SEGMENTS] };
    let mut segments = Vec::new();
    for (number, part) in mappings.chunks(SEGMENT_MAPPINGS).take(PROCESS_SEGMENTS).enumerate() {
        let mut segment = MappingSegment {
            starts: [UNUSED_START; SEGMENT_SLOTS],
            mappings: [Mapping::default(); SEGMENT_SLOTS],
        };
        for (slot, placed) in part.iter().enumerate() {
            segment.starts[slot] = placed.start;
            segment.mappings[slot] = Mapping { generation, ..placed.mapping };
        }
        entry.first[number] = part[0].start;
        entry.segments += 1;
        segments.push(segment);
    }
    (entry, segments)
}

/// A sample from its bytes in the ring buffer.
fn decode_sample(bytes: &[u8]) -> Option<Sample> {
    let (head, rest) = bytes.split_at_checked(size_of::<SampleHeader>())?;
    // SAFETY: `head` has the size of the header, which is valid for any bytes; the read is unaligned.
    let header = unsafe { head.as_ptr().cast::<SampleHeader>().read_unaligned() };
    let mut addresses =
        rest.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("8 bytes")));
    let user: Vec<u64> = addresses.by_ref().take(usize::from(header.user_frames)).collect();
    let kernel: Vec<u64> = addresses.take(usize::from(header.kernel_frames)).collect();
    Some(sample_of(&header, user, kernel))
}

fn sample_of(header: &SampleHeader, user: Vec<u64>, kernel: Vec<u64>) -> Sample {
    let name_bytes = header.comm.iter().position(|byte| *byte == 0).unwrap_or(header.comm.len());
    let stop = StopReason::try_from(header.stop).unwrap_or(StopReason::TableCorrupt);
    Sample {
        time_ns: header.time_ns,
        tgid: header.tgid,
        tid: header.tid,
        cpu: header.cpu,
        generation: header.generation,
        comm: String::from_utf8_lossy(&header.comm[..name_bytes]).into_owned(),
        stop,
        unsupported: unsupported_reason(stop, header.unsupported),
        user,
        kernel,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(errno: i32, frequency_hz: u32, max_rate: Option<u32>, naming: &str, not: &str) {
        let advice = sampling_advice(Some(errno), frequency_hz, max_rate);
        assert!(advice.contains(naming) && !advice.contains(not), "{advice}");
    }

    #[test]
    fn the_objection_is_found_in_the_log() {
        let log = "0: (b7) r0 = 0\nunknown func bpf_loop#181\nverification time 9 usec\n\
                   stack depth 0+0+0\nprocessed 1 insns (limit 1000000)\n\n";
        assert_eq!(refusal(log), "unknown func bpf_loop#181");
        assert_eq!(refusal("processed 0 insns (limit 1000000)\n"), refusal(""));
    }

    #[test]
    fn advice_is_about_what_the_kernel_refused() {
        check(libc::EINVAL, 5000, Some(1000), "perf_event_max_sample_rate", "paranoid");
        check(libc::EACCES, 5000, Some(1000), "perf_event_paranoid", "max_sample_rate");
        assert_eq!(sampling_advice(Some(libc::EINVAL), 97, Some(1000)), "");
        assert_eq!(sampling_advice(None, 97, None), "");
        let error = LoadError::Refused("no number".to_owned());
        assert_eq!(errno(&error), None);
        let syscall = ProgramError::SyscallError(aya::sys::SyscallError {
            call: "perf_event_open",
            io_error: std::io::Error::from_raw_os_error(libc::EINVAL),
        });
        assert_eq!(errno(&syscall), Some(libc::EINVAL));
    }
}
