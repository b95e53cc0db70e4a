//! The program and its maps.

use core::ffi::c_void;
use core::hint::black_box;
use core::mem::MaybeUninit;
use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::bindings::{
    BPF_F_NO_PREALLOC, BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, BPF_RB_RING_SIZE,
    bpf_perf_event_data,
};
use aya_ebpf::btf_maps::{Array, ArrayOfMaps, HashMap, PerCpuArray, RingBuf};
use aya_ebpf::helpers::generated::{
    bpf_for_each_map_elem, bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_smp_processor_id,
    bpf_get_stack, bpf_ktime_get_ns, bpf_loop, bpf_probe_read_user, bpf_ringbuf_output, bpf_ringbuf_query,
};
use aya_ebpf::macros::{btf_map, perf_event};
use aya_ebpf::programs::PerfEventContext;
use windlass_agent_ebpf::frame_pointer::MAX_SEARCH_TURNS;
use windlass_agent_ebpf::memory::{StackMemory, Tables};
use windlass_agent_ebpf::recent::RecentRecords;
use windlass_agent_ebpf::stack_window::StackWindow;
use windlass_agent_ebpf::walk::Walk;
use windlass_schema::maps::{
    CHUNK_BYTES, Chunk, Counter, MAX_CHUNKS, MAX_KERNEL_FRAMES, MAX_MAPPING_SEGMENTS, MAX_PROCESSES,
    MAX_USER_FRAMES, MappingSegment, ProcessEntry, SAMPLES_RING_BYTES, SampleBuffer, SampleHeader,
    SegmentKey,
};
use windlass_schema::{ProcessAddress, Record, StopReason};

use crate::audit::{self, WalkedFrames};
use crate::machine::{Registers, SavedRegisters, is_user, user_registers};

#[btf_map]
pub(crate) static PROCESSES: HashMap<
    u32,
    ProcessEntry,
    { MAX_PROCESSES as usize },
    { BPF_F_NO_PREALLOC as usize },
> = HashMap::new();

#[btf_map]
static MAPPINGS: HashMap<
    SegmentKey,
    MappingSegment,
    { MAX_MAPPING_SEGMENTS as usize },
    { BPF_F_NO_PREALLOC as usize },
> = HashMap::new();

/// A [`Chunk`] as the type information of its map's values says it: as an array. The kernel puts only those maps
/// into `CHUNKS` that are like the one it was made with, and before Linux 6.2 a map whose values are of a struct type
/// is unlike one without type information, as user space makes them: `timer_off`, which `bpf_map_meta_equal`
/// (kernel/bpf/map_in_map.c) compares, is -ENOENT of the former, and -EINVAL of the latter and of arrays
/// (`btf_find_timer`, kernel/bpf/btf.c).
type ChunkValue = [u64; CHUNK_BYTES as usize / 8];
const _: () = assert!(size_of::<ChunkValue>() == size_of::<Chunk>());
const _: () = assert!(align_of::<ChunkValue>() == align_of::<Chunk>());

#[btf_map]
static CHUNKS: ArrayOfMaps<Array<ChunkValue, 1>, { MAX_CHUNKS as usize }> = ArrayOfMaps::new();

#[btf_map]
static SAMPLES: RingBuf<SampleHeader, { SAMPLES_RING_BYTES as usize }> = RingBuf::new();

#[btf_map]
pub(crate) static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

#[btf_map]
pub(crate) static RECENT: PerCpuArray<RecentRecords, 1> = PerCpuArray::new();

#[btf_map]
static COUNTERS: PerCpuArray<u64, { Counter::COUNT as usize }> = PerCpuArray::new();

/// As many elements as a walk has turns: what a kernel without `bpf_loop` goes through instead. Nobody reads them.
#[btf_map]
static TURNS: Array<u64, { MAX_TURNS as usize }> = Array::new();

/// What one sample needs while it is made.
#[repr(C)]
pub(crate) struct Scratch {
    pub(crate) walk: Walk<Registers>,
    stack: StackWindow,
    pub(crate) sample: SampleBuffer,
    pub(crate) saved: SavedRegisters,
}

/// The maps and the current thread's memory; what is of this CPU alone was looked up once.
pub(crate) struct Kernel {
    recent: *mut RecentRecords,
    stack: *mut StackWindow,
}

/// What the turns of a walk work on.
#[repr(C)]
struct Turns {
    scratch: *mut Scratch,
    recent: *mut RecentRecords,
    /// Where to note frames for an audit; null if there are none.
    audited: *mut WalkedFrames,
}

/// The chunk with this number.
#[inline(always)]
pub(crate) fn chunk(number: u32) -> Option<&'static Chunk> {
    let value: &ChunkValue = CHUNKS.get_value(number, &0)?;
    // SAFETY: both are bytes of any value, of the same size and alignment.
    Some(unsafe { &*addr_of!(*value).cast() })
}

/// A segment of a process's mappings.
#[inline(always)]
pub(crate) fn segment(key: SegmentKey) -> Option<&'static MappingSegment> {
    // SAFETY: the kernel may write another segment to this place while it is read. User space gives the process a new
    // generation before, so that a walk which may have read of both ends with another generation than it began with.
    unsafe { MAPPINGS.get(key) }
}

impl Tables for Kernel {
    #[inline(always)]
    fn chunk(&self, number: u32) -> Option<&Chunk> {
        chunk(number)
    }

    #[inline(always)]
    fn segment(&self, key: SegmentKey) -> Option<&MappingSegment> {
        segment(key)
    }

    #[inline(always)]
    fn remembered(&self, generation: u32, address: ProcessAddress) -> Option<Record> {
        // SAFETY: the value is this CPU's own, and nothing holds a reference to it beyond a call.
        unsafe { (*self.recent).get(generation, address) }
    }

    #[inline(always)]
    fn remember(&self, generation: u32, address: ProcessAddress, record: Record) {
        // SAFETY: as in `remembered`.
        unsafe { (*self.recent).put(generation, address, record) };
    }
}

/// Reads `N` words of user memory.
#[inline(always)]
fn read_user<const N: usize>(address: u64) -> Option<[u64; N]> {
    let mut words = MaybeUninit::<[u64; N]>::uninit();
    // SAFETY: the helper fills the words, with zeros if it fails.
    unsafe { if read_user_at(address, &raw mut words) { Some(words.assume_init()) } else { None } }
}

/// Reads as many bytes of user memory as a value has; false if they cannot be read to the last, and then the value is zero.
///
/// # Safety
/// `into` can be written to, and any bytes are a `T`.
#[inline(always)]
unsafe fn read_user_at<T>(address: u64, into: *mut T) -> bool {
    // SAFETY: the destination has the size that is said. Any source address is allowed.
    unsafe { bpf_probe_read_user(into.cast(), size_of::<T>() as u32, address as *const c_void) == 0 }
}

impl StackMemory for Kernel {
    #[inline(always)]
    fn words<const N: usize>(&self, address: u64) -> Option<[u64; N]> {
        read_user(address)
    }

    #[inline(always)]
    fn frame_words<const N: usize>(&self, address: u64, frame_bytes: u64) -> Option<[u64; N]> {
        // SAFETY: the value is this CPU's own, and nothing else holds a reference to it.
        let stack = unsafe { &mut *self.stack };
        match stack.words(address, frame_bytes, |from, into| {
            // SAFETY: any bytes are words.
            unsafe { read_user_at(from, into) }
        }) {
            Some(words) => Some(words),
            None => read_user(address),
        }
    }

    #[inline(always)]
    fn unreadable(&self, _address: u64) -> StopReason {
        StopReason::StackRead
    }
}

#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot is this CPU's own.
        unsafe { *slot += 1 };
    }
}

/// Most turns of a walk: each makes a step, or is one of a search between two of them.
const MAX_TURNS: u32 = (MAX_USER_FRAMES + MAX_SEARCH_TURNS) as u32;

/// One turn of the walk in `bpf_loop`; 1 if it was the last.
unsafe extern "C" fn turn(_number: u64, context: *mut c_void) -> i64 {
    // SAFETY: the context is what `walk` passes.
    let turns = unsafe { &*context.cast::<Turns>() };
    i64::from(!make_turn(turns))
}

/// The same for an element of `TURNS`.
unsafe extern "C" fn turn_of_element(
    _map: *mut c_void,
    _key: *const c_void,
    _value: *mut c_void,
    context: *mut c_void,
) -> i64 {
    // SAFETY: the context is what `walk_elements` passes.
    let turns = unsafe { &*context.cast::<Turns>() };
    i64::from(!make_turn(turns))
}

/// Records a frame and steps to its caller; false if that was the last.
#[inline(always)]
fn make_turn(turns: &Turns) -> bool {
    // SAFETY: the values are this CPU's own, and the kernel runs one of these programs on a CPU at a time.
    let Scratch { walk, stack, sample, .. } = unsafe { &mut *turns.scratch };
    let kernel = Kernel { recent: turns.recent, stack };
    if walk.is_at_frame() {
        let frame = walk.frames as usize;
        if frame >= MAX_USER_FRAMES {
            return false;
        }
        sample.addresses[frame] = walk.address();
        if !turns.audited.is_null() {
            // SAFETY: this CPU's own.
            unsafe { (*turns.audited)[frame] = audit::walked_frame(&walk.registers) };
        }
        walk.frames = frame as u32 + 1;
    }
    match walk.advance(&kernel, &kernel) {
        Ok(()) => true,
        Err(reason) => {
            sample.header.stop = reason as u8;
            false
        }
    }
}

/// Makes ready to walk the user stack of what the event interrupted; the reason if it cannot be walked.
#[inline(always)]
fn start_walk(data: *mut bpf_perf_event_data, scratch: *mut Scratch, tgid: u32) -> Result<Turns, StopReason> {
    // SAFETY: the slot is this CPU's own.
    unsafe {
        (*scratch).walk.restart(tgid);
        (*scratch).sample.header.generation = 0;
        let saved = &raw mut (*scratch).saved;
        user_registers(&raw const (*data).regs, saved, &mut (*scratch).walk.registers)?;
    }
    start_from_registers(scratch, tgid)
}

/// The same from the registers that are in place.
#[inline(always)]
fn start_from_registers(scratch: *mut Scratch, tgid: u32) -> Result<Turns, StopReason> {
    // SAFETY: the slot is this CPU's own.
    unsafe {
        let Some(process) = PROCESSES.get(tgid) else {
            // Known or not, where the thread stands is worth reporting.
            (*scratch).sample.addresses[0] = (*scratch).walk.address();
            (*scratch).walk.frames = 1;
            return Err(StopReason::ProcessUnknown);
        };
        (*scratch).walk.process = *process;
        (*scratch).sample.header.generation = (*scratch).walk.process.generation;
        (*scratch).sample.header.stop = StopReason::FrameLimit as u8;
        // Of another walk.
        (*scratch).stack.clear();
        let recent = RECENT.get_ptr_mut(0).ok_or(StopReason::TableCorrupt)?;
        let audited = audit::frames().ok_or(StopReason::TableCorrupt)?;
        Ok(Turns { scratch, recent, audited })
    }
}

/// Why the walk ended whose last turn was made.
#[inline(always)]
fn end_walk(scratch: *mut Scratch) -> StopReason {
    // SAFETY: the slot is this CPU's own.
    unsafe {
        // The agent may have replaced the mappings meanwhile; then some frame may be of the old ones.
        match PROCESSES.get((*scratch).walk.tgid) {
            Some(now) if now.generation == (*scratch).walk.process.generation => {}
            _ => return StopReason::MappingsChanged,
        }
        match StopReason::try_from((*scratch).sample.header.stop) {
            Ok(reason) => reason,
            Err(_) => StopReason::TableCorrupt,
        }
    }
}

/// Makes the turns of a walk that was started; the reason why it ended.
#[inline(always)]
fn walk(mut turns: Turns) -> StopReason {
    // SAFETY: `turn` takes such a context, and nothing here holds a reference to what it reborrows.
    unsafe { bpf_loop(MAX_TURNS, turn as *const () as *mut c_void, (&raw mut turns).cast(), 0) };
    end_walk(turns.scratch)
}

/// The same without `bpf_loop`.
#[inline(always)]
fn walk_elements(mut turns: Turns) -> StopReason {
    let (elements, turn) = (addr_of!(TURNS).cast_mut(), turn_of_element as *const ());
    // SAFETY: as in `walk`.
    unsafe { bpf_for_each_map_elem(elements.cast(), turn as *mut c_void, (&raw mut turns).cast(), 0) };
    end_walk(turns.scratch)
}

/// Walks from the registers that are in place; the reason why the walk ended.
#[cfg(feature = "timing")]
#[inline(always)]
pub(crate) fn walk_from_registers(scratch: *mut Scratch, tgid: u32) -> StopReason {
    match start_from_registers(scratch, tgid) {
        Ok(turns) => walk(turns),
        Err(reason) => reason,
    }
}

/// Whether the agent is woken for a sample. To wake it takes several times as long as a walk, most of all in virtual machines
/// (the interrupt that `irq_work_queue` raises, kernel/bpf/ringbuf.c), and it looks by itself every second. So only a sample
/// wakes it of which a later one is better if it acts on this one, or that finds more than a quarter of the ring full: of those one in
/// every 32nd part of the ring, since an agent that was woken may have to wait for a processor.
#[inline(always)]
fn wake_flags(stop: StopReason, sample_bytes: u64) -> u64 {
    let wants_agent =
        matches!(stop, StopReason::ProcessUnknown | StopReason::NoMapping | StopReason::TablePending);
    let ring = addr_of!(SAMPLES).cast_mut().cast();
    // SAFETY: the map is a ring buffer.
    let [waiting_bytes, ring_bytes] =
        [BPF_RB_AVAIL_DATA, BPF_RB_RING_SIZE].map(|what| unsafe { bpf_ringbuf_query(ring, u64::from(what)) });
    // Parts of the ring are powers of two, as it is.
    let part_bytes = ring_bytes >> 5;
    let is_late = waiting_bytes > ring_bytes / 4
        && (waiting_bytes ^ waiting_bytes.wrapping_add(sample_bytes)) & !part_bytes.wrapping_sub(1) != 0;
    u64::from(if wants_agent || is_late { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP })
}

/// Takes one sample. The program's name in the object is `windlass_sample`.
#[perf_event]
fn windlass_sample(context: PerfEventContext) -> u32 {
    take_sample(context, walk)
}

/// The same for kernels without `bpf_loop`.
#[perf_event]
fn windlass_sample_each(context: PerfEventContext) -> u32 {
    take_sample(context, walk_elements)
}

#[inline(always)]
fn take_sample(context: PerfEventContext, walk: impl FnOnce(Turns) -> StopReason) -> u32 {
    // SAFETY: the helper has no preconditions.
    let pid_tgid = unsafe { bpf_get_current_pid_tgid() };
    let tgid = (pid_tgid >> 32) as u32;
    if tgid == 0 {
        // The idle task.
        return 0;
    }
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else { return 0 };
    count(Counter::Samples);
    let stop = match start_walk(context.ctx, scratch, tgid) {
        Ok(turns) => walk(turns),
        Err(reason) => reason,
    };
    send_sample(context.ctx, scratch, pid_tgid, stop);
    0
}

/// A number that the verifier knows to be at most `MOST`. The compiler knows of a copy that it made before as much as of what
/// was compared; older verifiers, as that of Linux 6.1, do not.
#[inline(always)]
fn at_most<const MOST: usize>(number: usize) -> usize {
    black_box(if number > MOST { MOST } else { number })
}

/// Adds what a sample has beside its user frames, and sends it.
#[inline(always)]
fn send_sample(data: *mut bpf_perf_event_data, scratch: *mut Scratch, pid_tgid: u64, stop: StopReason) {
    // SAFETY: helpers are called as their documentation asks; buffers are the per-CPU scratch value.
    unsafe {
        let user_frames = at_most::<MAX_USER_FRAMES>((*scratch).walk.frames as usize);
        let mut kernel_frames = 0;
        if !is_user(&raw const (*data).regs) {
            let at = addr_of_mut!((*scratch).sample.addresses).cast::<u64>().add(user_frames);
            let bytes = bpf_get_stack(data.cast(), at.cast(), (8 * MAX_KERNEL_FRAMES) as u32, 0);
            if bytes > 0 {
                kernel_frames = at_most::<MAX_KERNEL_FRAMES>(bytes as usize / 8);
            }
        }
        let header = addr_of_mut!((*scratch).sample.header);
        (*header).time_ns = bpf_ktime_get_ns();
        (*header).tgid = (pid_tgid >> 32) as u32;
        (*header).tid = pid_tgid as u32;
        (*header).cpu = bpf_get_smp_processor_id() as u32;
        (*header).user_frames = user_frames as u16;
        (*header).kernel_frames = kernel_frames as u16;
        (*header).stop = stop as u8;
        (*header).unsupported = (*scratch).walk.unsupported;
        (*header).reserved = [0; 2];
        bpf_get_current_comm(addr_of_mut!((*header).comm).cast(), 16);
        let bytes = size_of::<SampleHeader>() + 8 * (user_frames + kernel_frames);
        if bpf_ringbuf_output(
            addr_of!(SAMPLES).cast_mut().cast(),
            addr_of_mut!((*scratch).sample).cast(),
            bytes as u64,
            wake_flags(stop, bytes as u64),
        ) != 0
        {
            count(Counter::RingFull);
        }
        // A walk without mappings says nothing.
        if (*header).generation != 0 && stop != StopReason::MappingsChanged && audit::is_due() {
            audit::send(data, scratch);
        }
    }
}

/// The kernel lets programs use its GPL-only helpers if they declare a compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier rejects a program in which this could run.
    loop {}
}
