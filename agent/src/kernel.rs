//! Sampling in the kernel: loads the BPF program, feeds its maps, drains its samples.
//!
//! The object is committed and embedded, so that nobody needs a BPF toolchain. Everything hangs on
//! file descriptors of this process: when it ends, however it ends, the kernel detaches the program.
//!
//! Process events come from the kernel's own sideband records (`sideband`) rather than from further
//! BPF programs: they need no tracefs and no function tracing, name every executable mapping, and
//! say when some were lost.

mod chunk_maps;
mod sideband;

use std::os::fd::AsRawFd;
use std::time::Duration;

use aya::maps::{HashMap, MapData, PerCpuArray, RingBuf};
use aya::programs::perf_event::{PerfEventConfig, PerfEventScope, SamplePolicy, SoftwareEvent};
use aya::programs::{PerfEvent, ProgramError};
use aya::{Ebpf, EbpfLoader};
use windlass_schema::maps::{
    CHUNK_BYTES, Counter, MAX_CHUNKS, Mapping, MappingSegment, PROCESS_SEGMENTS, ProcessEntry,
    SEGMENT_MAPPINGS, SEGMENT_SLOTS, SampleHeader, SegmentKey, UNUSED_START, names,
};
use windlass_schema::{StopReason, Table, maps::Location};

use crate::backend::{Backend, Event, PlaceError, PlacedMapping, Sample};
use crate::chunks::ChunkSpace;
pub use chunk_maps::ChunkMaps;
use sideband::Sideband;

/// The program and its maps, as `cargo xtask build-ebpf` made them.
pub(crate) static OBJECT: &[u8] = aya::include_bytes_aligned!("../bpf/windlass.bpf.o");

/// What to load.
#[derive(Clone, Debug)]
pub struct Options {
    /// Samples a second on each CPU.
    pub frequency_hz: u32,
    /// Most kernel memory for tables.
    pub table_budget_bytes: u64,
}

impl Default for Options {
    /// 19 Hz; as many tables as the maps hold.
    fn default() -> Self {
        Self { frequency_hz: 19, table_budget_bytes: u64::from(MAX_CHUNKS) * u64::from(CHUNK_BYTES) }
    }
}

/// The BPF program could not be put to work.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The capabilities for it are missing.
    #[error(
        "loading BPF programs is not permitted: run as root, or grant CAP_BPF, CAP_PERFMON and CAP_SYS_PTRACE \
         (setcap cap_bpf,cap_perfmon,cap_sys_ptrace+ep FILE)"
    )]
    NotPermitted,
    /// A kernel that the program does not load on.
    #[error(
        "the kernel refused the BPF program: {0} (Linux 6.1 or newer with BTF, /sys/kernel/btf/vmlinux, is needed)"
    )]
    Refused(String),
    /// Sampling could not be switched on.
    #[error("the kernel refused to sample CPU {cpu}: {reason} (see kernel.perf_event_paranoid)")]
    Attach {
        /// CPU number.
        cpu: u32,
        /// What the kernel said.
        reason: String,
    },
    /// Which CPUs there are could not be told.
    #[error("online CPUs could not be listed: {0}")]
    Cpus(String),
}

/// The program at work.
pub struct Kernel {
    // Declared first, so that sampling stops before the maps go.
    _bpf: Ebpf,
    processes: HashMap<MapData, u32, PlainProcess>,
    mappings: HashMap<MapData, PlainKey, PlainSegment>,
    counters: PerCpuArray<MapData, u64>,
    samples: RingBuf<MapData>,
    chunk_maps: ChunkMaps,
    space: ChunkSpace,
    sideband: Sideband,
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
        match &error {
            ProgramError::LoadError { io_error, verifier_log } => {
                if io_error.kind() == std::io::ErrorKind::PermissionDenied
                    && verifier_log.to_string().is_empty()
                {
                    return Self::NotPermitted;
                }
                let log = verifier_log.to_string();
                let last = log.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
                Self::Refused(format!("{io_error}: {last}"))
            }
            _ => Self::Refused(describe(&error)),
        }
    }
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

/// Loads the object's maps and program code into this process, with maps made in the kernel.
pub(crate) fn load_object() -> Result<Ebpf, LoadError> {
    EbpfLoader::new().load(OBJECT).map_err(|error| {
        let text = describe(&error);
        if text.contains("Operation not permitted") || text.contains("Permission denied") {
            LoadError::NotPermitted
        } else {
            LoadError::Refused(text)
        }
    })
}

impl Kernel {
    /// Loads the program and starts sampling every CPU.
    pub fn load(options: &Options) -> Result<Self, LoadError> {
        let mut bpf = load_object()?;
        let missing = |name: &str| LoadError::Refused(format!("the object has no map {name}"));
        let mut take = |name: &str| bpf.take_map(name).ok_or_else(|| missing(name));
        let wrong = |error: aya::maps::MapError| LoadError::Refused(describe(&error));
        let processes = HashMap::try_from(take(names::PROCESSES)?).map_err(wrong)?;
        let mappings = HashMap::try_from(take(names::MAPPINGS)?).map_err(wrong)?;
        let counters = PerCpuArray::try_from(take(names::COUNTERS)?).map_err(wrong)?;
        let samples = RingBuf::try_from(take(names::SAMPLES)?).map_err(wrong)?;
        let chunk_maps = ChunkMaps::from_map(take(names::CHUNKS)?)?;
        let cpus =
            aya::util::online_cpus().map_err(|(path, error)| LoadError::Cpus(format!("{path}: {error}")))?;
        // Events first: what happens between the scan of /proc and the first sample is then known.
        let sideband = Sideband::open(&cpus)?;
        let program = bpf
            .program_mut(names::PROGRAM)
            .ok_or_else(|| LoadError::Refused(format!("the object has no program {}", names::PROGRAM)))?;
        let program: &mut PerfEvent = program.try_into()?;
        program.load()?;
        for cpu in cpus {
            program
                .attach(
                    PerfEventConfig::Software(SoftwareEvent::CpuClock),
                    PerfEventScope::AllProcessesOneCpu { cpu },
                    SamplePolicy::Frequency(u64::from(options.frequency_hz)),
                    false,
                )
                .map_err(|error| LoadError::Attach { cpu, reason: describe(&error) })?;
        }
        Ok(Self {
            _bpf: bpf,
            processes,
            mappings,
            counters,
            samples,
            chunk_maps,
            space: ChunkSpace::new(options.table_budget_bytes),
            sideband,
            generation: 0,
        })
    }

    fn counter(&self, counter: Counter) -> u64 {
        self.counters.get(&(counter as u32), 0).map_or(0, |values| values.iter().sum())
    }

    /// Samples taken since the start.
    pub fn taken_samples(&self) -> u64 {
        self.counter(Counter::Samples)
    }
}

impl Backend for Kernel {
    fn place_table(&mut self, table: &Table<'_>) -> Result<Location, PlaceError> {
        let placed = self.space.place(table)?;
        let maps = &mut self.chunk_maps;
        self.space
            .flush(|number, chunk, last| maps.write(number, chunk, last))
            .map_err(|error| PlaceError::Kernel(describe(&error)))?;
        Ok(placed.header)
    }

    fn set_process(&mut self, tgid: u32, mappings: &[PlacedMapping]) -> anyhow::Result<()> {
        self.generation = self.generation.wrapping_add(1);
        let (entry, segments) = segments_of(mappings, self.generation);
        // Segments first: a walk that still has the old entry sees the new generation and stops.
        for (number, segment) in segments.iter().enumerate() {
            let key = PlainKey(SegmentKey { tgid, segment: number as u32 });
            self.mappings.insert(key, PlainSegment(*segment), 0)?;
        }
        self.processes.insert(tgid, PlainProcess(entry), 0)?;
        for segment in entry.segments..PROCESS_SEGMENTS as u32 {
            if self.mappings.remove(&PlainKey(SegmentKey { tgid, segment })).is_err() {
                break;
            }
        }
        Ok(())
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
        let mut descriptors =
            vec![libc::pollfd { fd: self.samples.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
        descriptors.extend(self.sideband.descriptors().map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        }));
        let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: the array is valid for its length during the call.
        let ready =
            unsafe { libc::poll(descriptors.as_mut_ptr(), descriptors.len() as libc::nfds_t, timeout_ms) };
        if ready < 0 {
            let error = std::io::Error::last_os_error();
            if error.kind() != std::io::ErrorKind::Interrupted {
                return Err(error.into());
            }
        }
        // Process events before samples: a sample of a new process then finds it known.
        self.sideband.drain(sink);
        while let Some(item) = self.samples.next() {
            if let Some(sample) = decode_sample(&item) {
                sink(Event::Sample(sample));
            }
        }
        Ok(())
    }

    fn lost_samples(&self) -> u64 {
        self.counter(Counter::RingFull)
    }
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
    let name_bytes = header.comm.iter().position(|byte| *byte == 0).unwrap_or(header.comm.len());
    Some(Sample {
        time_ns: header.time_ns,
        tgid: header.tgid,
        tid: header.tid,
        cpu: header.cpu,
        comm: String::from_utf8_lossy(&header.comm[..name_bytes]).into_owned(),
        stop: StopReason::try_from(header.stop).unwrap_or(StopReason::TableCorrupt),
        user,
        kernel,
    })
}
