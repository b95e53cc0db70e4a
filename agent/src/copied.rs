//! Sampling without privilege: copied stacks of one process, walked here.
//!
//! Where BPF is not to be had, the kernel still gives a process's owner registers and a copy of the
//! stack with each sample (`PERF_SAMPLE_REGS_USER | PERF_SAMPLE_STACK_USER`). They are walked by the
//! same `search` and `step` as in the kernel, over the same packed chunks. A copy is at most
//! 32 KiB; a walk that leaves it stops with `CopiedStackEnd`.
//!
//! A sample is walked when it is read, by the mappings of that moment and not by those of its own. Its time
//! tells whether they were known already when it was taken, and what the process mapped since comes
//! as events from the same rings.

#[cfg(target_arch = "aarch64")]
#[path = "copied/aarch64.rs"]
mod machine;
#[cfg(not(target_arch = "aarch64"))]
#[path = "copied/x86_64.rs"]
mod machine;

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use machine::{REGISTERS, Registers};
use windlass_agent_ebpf::memory::{StackMemory, Tables};
use windlass_agent_ebpf::walk::Walk;
use windlass_schema::maps::{Chunk, Location, MappingSegment, ProcessEntry, SegmentKey};
use windlass_schema::{StopReason, Table};

use crate::alarm::Alarm;
use crate::backend::{Backend, Event, PlaceError, PlacedMapping, Sample, unsupported_reason};
use crate::chunks::{ChunkSpace, MOST_TABLE_BYTES, empty_chunk};
use crate::kernel::sideband::{TimeOrder, event_of};
use crate::kernel::{max_sample_rate, next_generation, sampling_advice, segments_of};
use crate::perf_ring::{
    COPIED_TIME_FROM_END, PerfEventAttr, PerfRing, PerfScope, RingRecord, monotonic_ns, record as record_kind,
};

/// Bytes of stack in each sample: half of what a perf record, whose size is 16 bits, has room for.
const STACK_BYTES: u32 = 32 * 1024;
/// Pages of each thread's ring, 256 KiB: seven samples. An unprivileged user may lock 516 KiB for each CPU
/// and RLIMIT_MEMLOCK beyond.
const RING_PAGES: usize = 64;
/// How often new threads are looked for.
const THREAD_SCAN: Duration = Duration::from_millis(100);

/// A process's stacks could not be sampled.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Permission, or no perf events in this kernel.
    #[error("the kernel refused to sample process {pid}: {error}{advice}")]
    Refused {
        /// Process.
        pid: u32,
        /// What the kernel said.
        error: io::Error,
        /// What to do, as the end of a sentence; or nothing.
        advice: String,
    },
}

/// The sampler of one process.
pub struct CopiedStacks {
    pid: u32,
    attr: PerfEventAttr,
    rings: HashMap<u32, PerfRing>,
    names: HashMap<u32, String>,
    tables: LocalTables,
    space: ChunkSpace,
    processes: HashMap<u32, ProcessEntry>,
    generation: u32,
    lost: u64,
    /// Samples newer than the process events that were handed out.
    early: Vec<Sample>,
    last_scan: std::time::Instant,
    alarm: Option<Alarm>,
}

/// What the kernel's maps hold, in this process's memory.
#[derive(Default)]
struct LocalTables {
    chunks: HashMap<u32, Box<Chunk>>,
    segments: HashMap<SegmentKey, MappingSegment>,
}

impl Tables for LocalTables {
    fn chunk(&self, number: u32) -> Option<&Chunk> {
        self.chunks.get(&number).map(|chunk| &**chunk)
    }

    fn segment(&self, key: SegmentKey) -> Option<&MappingSegment> {
        self.segments.get(&key)
    }
}

/// The copied part of a stack.
struct CopiedStack<'a> {
    start: u64,
    bytes: &'a [u8],
}

impl StackMemory for CopiedStack<'_> {
    fn words<const N: usize>(&self, address: u64) -> Option<[u64; N]> {
        let at = usize::try_from(address.checked_sub(self.start)?).ok()?;
        let bytes = self.bytes.get(at..at.checked_add(8 * N)?)?;
        let mut words = [0; N];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into().expect("8 bytes"));
        }
        Some(words)
    }

    fn unreadable(&self, address: u64) -> StopReason {
        if address >= self.start { StopReason::CopiedStackEnd } else { StopReason::StackRead }
    }
}

impl CopiedStacks {
    /// Starts to sample all threads of `pid`.
    pub fn attach(pid: u32, frequency_hz: u32) -> Result<Self, AttachError> {
        let mut sampler = Self {
            pid,
            attr: PerfEventAttr::copied_stacks(frequency_hz, REGISTERS, STACK_BYTES),
            rings: HashMap::new(),
            names: HashMap::new(),
            tables: LocalTables::default(),
            space: ChunkSpace::new(MOST_TABLE_BYTES),
            processes: HashMap::new(),
            generation: 0,
            lost: 0,
            early: Vec::new(),
            last_scan: std::time::Instant::now(),
            alarm: None,
        };
        sampler.watch(pid).map_err(|error| {
            let advice = sampling_advice(error.raw_os_error(), frequency_hz, max_sample_rate());
            AttachError::Refused { pid, error, advice }
        })?;
        sampler.scan_threads();
        Ok(sampler)
    }

    fn watch(&mut self, tid: u32) -> io::Result<()> {
        let ring = PerfRing::open(&self.attr, PerfScope::Thread(tid), RING_PAGES)?;
        ring.enable()?;
        self.rings.insert(tid, ring);
        Ok(())
    }

    /// Finds threads started since; a ring of an ended thread is kept until it is drained.
    fn scan_threads(&mut self) {
        self.last_scan = std::time::Instant::now();
        let Ok(entries) = std::fs::read_dir(format!("/proc/{}/task", self.pid)) else { return };
        for entry in entries.flatten() {
            let Some(tid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            if !self.rings.contains_key(&tid) {
                // A thread that just ended is no loss; one that is refused was refused before.
                let _ = self.watch(tid);
            }
            if let Ok(name) = std::fs::read_to_string(entry.path().join("comm")) {
                self.names.insert(tid, name.trim_end().to_owned());
            }
        }
    }

    /// Walks one sample.
    fn sample(&self, record: &RingRecord<'_>) -> Option<Sample> {
        let copied = CopiedSample::parse(record.body)?;
        let Some(registers) = copied.registers else {
            return Some(self.stack_of(&copied, 0, StopReason::RegistersUnavailable, Vec::new()));
        };
        let mut user = Vec::new();
        let Some(process) = self.processes.get(&copied.pid) else {
            user.push(Walk::new(copied.pid, ProcessEntry::default(), registers).address());
            return Some(self.stack_of(&copied, 0, StopReason::ProcessUnknown, user));
        };
        let memory = CopiedStack { start: machine::stack_pointer(&registers), bytes: copied.stack };
        let mut walk = Walk::new(copied.pid, *process, registers);
        let stop = walk.run(&self.tables, &memory, |address| user.push(address));
        let unsupported = unsupported_reason(stop, walk.unsupported);
        Some(Sample { unsupported, ..self.stack_of(&copied, process.generation, stop, user) })
    }

    fn stack_of(
        &self,
        copied: &CopiedSample<'_>,
        generation: u32,
        stop: StopReason,
        user: Vec<u64>,
    ) -> Sample {
        Sample {
            time_ns: copied.time_ns,
            tgid: copied.pid,
            tid: copied.tid,
            cpu: copied.cpu,
            generation,
            comm: self.names.get(&copied.tid).cloned().unwrap_or_default(),
            stop,
            unsupported: None,
            user,
            kernel: Vec::new(),
        }
    }
}

/// Whether an event is about the mappings of `pid`. Its children are not sampled.
fn is_of(event: &Event, pid: u32) -> bool {
    match event {
        Event::Exec { tgid, .. } | Event::Mapped { tgid, .. } | Event::Exited { tgid } => *tgid == pid,
        Event::Sample(_) | Event::Audit(_) | Event::Forked { .. } => false,
        Event::Lost { .. } => true,
    }
}

/// A `PERF_RECORD_SAMPLE` with the fields that [`PerfEventAttr::copied_stacks`] asks for.
struct CopiedSample<'a> {
    pid: u32,
    tid: u32,
    time_ns: u64,
    cpu: u32,
    /// `None` if the thread was not in user mode.
    registers: Option<Registers>,
    stack: &'a [u8],
}

impl<'a> CopiedSample<'a> {
    /// Fields in the order of perf_event_open(2): pid tid, time, cpu, abi and registers, stack size,
    /// stack, size of what was really copied.
    fn parse(body: &'a [u8]) -> Option<Self> {
        let mut rest = body;
        let mut next = |bytes: usize| {
            let (head, tail) = rest.split_at_checked(bytes)?;
            rest = tail;
            Some(head)
        };
        let half = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().expect("4 bytes"));
        let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("8 bytes"));
        let (pid, tid) = (half(next(4)?), half(next(4)?));
        let time_ns = word(next(8)?);
        let cpu = half(next(4)?);
        next(4)?;
        let abi = word(next(8)?);
        let mut registers = None;
        if abi != 0 {
            let mut words = [0; REGISTERS.count_ones() as usize];
            for register in &mut words {
                *register = word(next(8)?);
            }
            registers = Some(machine::registers(&words));
        }
        let size = usize::try_from(word(next(8)?)).ok()?;
        let mut stack: &[u8] = &[];
        if size > 0 {
            stack = next(size)?;
            let copied = usize::try_from(word(next(8)?)).ok()?;
            stack = &stack[..copied.min(stack.len())];
        }
        Some(Self { pid, tid, time_ns, cpu, registers, stack })
    }
}

impl Backend for CopiedStacks {
    fn place_table(&mut self, table: &Table<'_>) -> Result<Location, PlaceError> {
        let placed = self.space.place(table)?;
        let chunks = &mut self.tables.chunks;
        let Ok(()) = self.space.flush(|write| {
            write.apply(chunks.entry(write.number).or_insert_with(empty_chunk));
            Ok::<(), std::convert::Infallible>(())
        });
        Ok(placed.header)
    }

    fn to_remove(&self, table: &Table<'_>, candidates: &[Location]) -> Option<usize> {
        self.space.to_free(table, candidates)
    }

    fn remove_tables(&mut self, tables: &[Location]) -> Result<(), PlaceError> {
        // Walks run in this thread.
        tables.iter().for_each(|table| self.space.free(*table));
        Ok(())
    }

    fn set_process(&mut self, tgid: u32, mappings: &[PlacedMapping]) -> anyhow::Result<u32> {
        self.generation = next_generation(self.generation);
        let (entry, segments) = segments_of(mappings, self.generation);
        self.tables.segments.retain(|key, _| key.tgid != tgid);
        for (number, segment) in segments.into_iter().enumerate() {
            self.tables.segments.insert(SegmentKey { tgid, segment: number as u32 }, segment);
        }
        self.processes.insert(tgid, entry);
        Ok(self.generation)
    }

    fn remove_process(&mut self, tgid: u32) {
        self.processes.remove(&tgid);
        self.tables.segments.retain(|key, _| key.tgid != tgid);
    }

    fn poll(&mut self, timeout: Duration, sink: &mut dyn FnMut(Event)) -> anyhow::Result<()> {
        if self.last_scan.elapsed() >= THREAD_SCAN {
            self.scan_threads();
        }
        let mut descriptors: Vec<libc::pollfd> = self
            .rings
            .values()
            .map(PerfRing::descriptor)
            .chain(self.alarm.iter().map(Alarm::descriptor))
            .map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 })
            .collect();
        let timeout_ms = i32::try_from(timeout.min(THREAD_SCAN).as_millis()).unwrap_or(i32::MAX);
        // SAFETY: the array is valid for its length during the call.
        let ready =
            unsafe { libc::poll(descriptors.as_mut_ptr(), descriptors.len() as libc::nfds_t, timeout_ms) };
        if ready < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error.into());
            }
        }
        let drained_ns = monotonic_ns();
        let mut samples = std::mem::take(&mut self.early);
        let mut events = TimeOrder::default();
        let mut rings = std::mem::take(&mut self.rings);
        for ring in rings.values_mut() {
            let mut lost = 0;
            ring.drain(|record| {
                if record.kind == record_kind::SAMPLE {
                    samples.extend(self.sample(&record));
                    return;
                }
                if record.kind == record_kind::LOST {
                    // id, number lost
                    let number = record.body.get(8..16);
                    lost += number.map_or(0, |bytes| u64::from_ne_bytes(bytes.try_into().expect("8 bytes")));
                }
                if let Some((time_ns, event)) = event_of(&record, COPIED_TIME_FROM_END)
                    && is_of(&event, self.pid)
                {
                    events.push(time_ns, event);
                }
            });
            self.lost += lost;
        }
        events.release(u64::MAX, sink);
        // Of a newer one, a ring that was drained before its own may hold events that come before it.
        for sample in samples {
            match sample.time_ns <= drained_ns {
                true => sink(Event::Sample(sample)),
                false => self.early.push(sample),
            }
        }
        // A hang-up says that the thread has ended; its ring was drained just now.
        let ended: Vec<_> =
            descriptors.iter().filter(|fd| fd.revents & libc::POLLHUP != 0).map(|fd| fd.fd).collect();
        rings.retain(|_, ring| !ended.contains(&ring.descriptor()));
        self.rings = rings;
        Ok(())
    }

    fn heed(&mut self, alarm: &Alarm) {
        self.alarm = Some(alarm.clone());
    }

    fn lost_samples(&self) -> u64 {
        self.lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_of_the_process_are_reported() {
        let pid = std::process::id();
        let mut sampler = match CopiedStacks::attach(pid, 19) {
            Ok(sampler) => sampler,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let file = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
        // SAFETY: nobody writes to a program that runs.
        let mapped = unsafe { memmap2::MmapOptions::new().len(8192).map_exec(&file) }.unwrap();
        let now_ns = monotonic_ns();
        let mut found = None;
        let sink = &mut |event| match event {
            Event::Mapped { tgid, start, length, of_file, time_ns, .. }
                if start == mapped.as_ptr() as u64 =>
            {
                found = Some((tgid, length, of_file, now_ns.abs_diff(time_ns) < 1_000_000_000));
            }
            _ => {}
        };
        sampler.poll(Duration::ZERO, sink).unwrap();
        assert_eq!(found, Some((pid, 8192, true, true)));
    }
}
