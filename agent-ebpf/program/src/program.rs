//! The program and its maps.

use core::ffi::c_void;
use core::mem::MaybeUninit;
use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::bindings::{
    BPF_F_NO_PREALLOC, BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, BPF_RB_RING_SIZE,
    bpf_perf_event_data, pt_regs, task_struct,
};
use aya_ebpf::btf_maps::{Array, ArrayOfMaps, HashMap, PerCpuArray, RingBuf};
use aya_ebpf::helpers::generated::{
    bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_task_btf, bpf_get_smp_processor_id,
    bpf_get_stack, bpf_ktime_get_ns, bpf_loop, bpf_probe_read_kernel, bpf_probe_read_user,
    bpf_ringbuf_output, bpf_ringbuf_query, bpf_task_pt_regs,
};
use aya_ebpf::macros::{btf_map, perf_event};
use aya_ebpf::programs::PerfEventContext;
use windlass_agent_ebpf::frame_pointer::MAX_SEARCH_TURNS;
use windlass_agent_ebpf::memory::{StackMemory, Tables};
use windlass_agent_ebpf::recent::RecentRecords;
use windlass_agent_ebpf::stack_window::StackWindow;
use windlass_agent_ebpf::walk::Walk;
use windlass_agent_ebpf::x86_64::Registers;
use windlass_schema::maps::{
    CHUNK_BYTES, Chunk, Counter, MAX_CHUNKS, MAX_KERNEL_FRAMES, MAX_MAPPING_SEGMENTS, MAX_PROCESSES,
    MAX_USER_FRAMES, MappingSegment, ProcessEntry, SAMPLES_RING_BYTES, SampleBuffer, SampleHeader,
    SegmentKey,
};
use windlass_schema::{ProcessAddress, Record, StopReason};

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

/// What one sample needs while it is made.
#[repr(C)]
pub(crate) struct Scratch {
    pub(crate) walk: Walk<Registers>,
    stack: StackWindow,
    sample: SampleBuffer,
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
    // SAFETY: user space replaces a segment whole and with a new generation, which the walk checks.
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
fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot is this CPU's own.
        unsafe { *slot += 1 };
    }
}

/// Most turns of a walk: each makes a step, or is one of a search between two of them.
const MAX_TURNS: u32 = (MAX_USER_FRAMES + MAX_SEARCH_TURNS) as u32;

/// One turn of the walk: records a frame and steps to its caller.
unsafe extern "C" fn turn(_number: u64, context: *mut c_void) -> i64 {
    // SAFETY: the context is what `walk_from_registers` made. The values are this CPU's own, and the kernel runs one of
    // these programs on a CPU at a time.
    let (Scratch { walk, stack, sample }, recent) = unsafe {
        let turns = &*context.cast::<Turns>();
        (&mut *turns.scratch, turns.recent)
    };
    let kernel = Kernel { recent, stack };
    if walk.is_at_frame() {
        let frame = walk.frames as usize;
        if frame >= MAX_USER_FRAMES {
            return 1;
        }
        sample.addresses[frame] = walk.address();
        walk.frames = frame as u32 + 1;
    }
    match walk.advance(&kernel, &kernel) {
        Ok(()) => 0,
        Err(reason) => {
            sample.header.stop = reason as u8;
            1
        }
    }
}

/// Whether these are registers of 64-bit or 32-bit user mode: the privilege level is in the low bits of cs.
#[inline(always)]
fn is_user(cs: u64) -> bool {
    cs & 3 == 3
}

/// Fills the registers of user mode; a reason if there are none.
#[inline(always)]
fn user_registers(data: *mut bpf_perf_event_data, into: &mut Registers) -> Result<(), StopReason> {
    // SAFETY: the context's registers may be read by their fields; `bpf_task_pt_regs` gives the saved
    // registers of the current task, read with a helper that checks.
    unsafe {
        let interrupted = addr_of!((*data).regs);
        if is_user((*interrupted).cs) {
            copy_registers(&*interrupted, into);
            return Ok(());
        }
        let saved: *const pt_regs =
            bpf_task_pt_regs(bpf_get_current_task_btf() as *mut task_struct) as *const pt_regs;
        let mut registers: pt_regs = core::mem::zeroed();
        if bpf_probe_read_kernel(addr_of_mut!(registers).cast(), size_of::<pt_regs>() as u32, saved.cast())
            != 0
        {
            return Err(StopReason::RegistersUnavailable);
        }
        // A kernel thread's saved registers are zero (copy_thread in arch/x86/kernel/process.c).
        if !is_user(registers.cs) {
            return Err(StopReason::KernelThread);
        }
        copy_registers(&registers, into);
    }
    Ok(())
}

#[inline(always)]
fn copy_registers(from: &pt_regs, into: &mut Registers) {
    // In the order of DWARF numbers.
    into.general[0] = from.rax;
    into.general[1] = from.rdx;
    into.general[2] = from.rcx;
    into.general[3] = from.rbx;
    into.general[4] = from.rsi;
    into.general[5] = from.rdi;
    into.general[6] = from.rbp;
    into.general[7] = from.rsp;
    into.general[8] = from.r8;
    into.general[9] = from.r9;
    into.general[10] = from.r10;
    into.general[11] = from.r11;
    into.general[12] = from.r12;
    into.general[13] = from.r13;
    into.general[14] = from.r14;
    into.general[15] = from.r15;
    into.rip = from.rip;
    into.known = 0xffff;
    into.exact = 1;
}

/// Walks the user stack; the reason why it ended.
#[inline(always)]
fn walk_user(data: *mut bpf_perf_event_data, scratch: *mut Scratch, tgid: u32) -> StopReason {
    // SAFETY: the slot is this CPU's own.
    unsafe {
        (*scratch).walk.restart(tgid);
        (*scratch).sample.header.generation = 0;
        match user_registers(data, &mut (*scratch).walk.registers) {
            Ok(()) => walk_from_registers(scratch, tgid),
            Err(reason) => reason,
        }
    }
}

/// Walks from the registers that are in place; the reason why the walk ended.
#[inline(always)]
pub(crate) fn walk_from_registers(scratch: *mut Scratch, tgid: u32) -> StopReason {
    // SAFETY: the slot is this CPU's own; `turn` reborrows it while nothing here holds a reference.
    unsafe {
        let Some(process) = PROCESSES.get(tgid) else {
            // Known or not, where the thread stands is worth reporting.
            (*scratch).sample.addresses[0] = (*scratch).walk.address();
            (*scratch).walk.frames = 1;
            return StopReason::ProcessUnknown;
        };
        (*scratch).walk.process = *process;
        (*scratch).sample.header.generation = (*scratch).walk.process.generation;
        (*scratch).sample.header.stop = StopReason::FrameLimit as u8;
        let Some(recent) = RECENT.get_ptr_mut(0) else { return StopReason::TableCorrupt };
        // Of another walk.
        (*scratch).stack.clear();
        let mut turns = Turns { scratch, recent };
        bpf_loop(MAX_TURNS, turn as *const () as *mut c_void, (&raw mut turns).cast(), 0);
        // The agent may have replaced the mappings meanwhile; then some frame may be of the old ones.
        match PROCESSES.get(tgid) {
            Some(now) if now.generation == (*scratch).walk.process.generation => {}
            _ => return StopReason::MappingsChanged,
        }
        match StopReason::try_from((*scratch).sample.header.stop) {
            Ok(reason) => reason,
            Err(_) => StopReason::TableCorrupt,
        }
    }
}

/// Whether the agent is woken for a sample. To wake it takes several times as long as a walk, most of all in virtual machines
/// (the interrupt that `irq_work_queue` raises, kernel/bpf/ringbuf.c), and it looks ten times a second by itself. So
/// only a sample wakes it of which a later one is better if it acts on this one, or that finds a quarter of the ring full.
#[inline(always)]
fn wake_flags(stop: StopReason) -> u64 {
    let wants_agent =
        matches!(stop, StopReason::ProcessUnknown | StopReason::NoMapping | StopReason::TablePending);
    let ring = addr_of!(SAMPLES).cast_mut().cast();
    // SAFETY: the map is a ring buffer.
    let [waiting_bytes, ring_bytes] =
        [BPF_RB_AVAIL_DATA, BPF_RB_RING_SIZE].map(|what| unsafe { bpf_ringbuf_query(ring, u64::from(what)) });
    u64::from(if wants_agent || waiting_bytes > ring_bytes / 4 {
        BPF_RB_FORCE_WAKEUP
    } else {
        BPF_RB_NO_WAKEUP
    })
}

/// Takes one sample. The program's name in the object is `windlass_sample`.
#[perf_event]
fn windlass_sample(context: PerfEventContext) -> u32 {
    // SAFETY: helpers are called as their documentation asks; buffers are the per-CPU scratch value.
    unsafe {
        let pid_tgid = bpf_get_current_pid_tgid();
        let tgid = (pid_tgid >> 32) as u32;
        if tgid == 0 {
            // The idle task.
            return 0;
        }
        let Some(scratch) = SCRATCH.get_ptr_mut(0) else { return 0 };
        count(Counter::Samples);
        let stop = walk_user(context.ctx, scratch, tgid);
        let user_frames = (*scratch).walk.frames as usize;
        let user_frames = if user_frames > MAX_USER_FRAMES { MAX_USER_FRAMES } else { user_frames };
        let mut kernel_frames = 0;
        if !is_user((*context.ctx).regs.cs) {
            let at = addr_of_mut!((*scratch).sample.addresses).cast::<u64>().add(user_frames);
            let bytes = bpf_get_stack(context.ctx.cast(), at.cast(), (8 * MAX_KERNEL_FRAMES) as u32, 0);
            if bytes > 0 {
                kernel_frames = bytes as usize / 8;
            }
        }
        let kernel_frames = if kernel_frames > MAX_KERNEL_FRAMES { MAX_KERNEL_FRAMES } else { kernel_frames };
        let header = addr_of_mut!((*scratch).sample.header);
        (*header).time_ns = bpf_ktime_get_ns();
        (*header).tgid = tgid;
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
            wake_flags(stop),
        ) != 0
        {
            count(Counter::RingFull);
        }
    }
    0
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
