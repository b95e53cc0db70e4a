//! A walk over bytes as tables, code and stack.
//!
//! The kernel runs it over whatever a process has on its stack, and a table that was damaged in a map is no reason for
//! more than a wrong answer. What is laid down here is only what the agent itself says: mappings are sorted and disjoint.

use std::cell::RefCell;

use windlass_agent_ebpf::frame_pointer::MAX_SEARCH_TURNS;
use windlass_agent_ebpf::machine::Machine;
use windlass_agent_ebpf::memory::{StackMemory, Tables};
use windlass_agent_ebpf::recent::RecentRecords;
use windlass_agent_ebpf::stack_window::{StackWindow, WINDOW_WORDS};
use windlass_agent_ebpf::walk::Walk;
use windlass_agent_ebpf::{aarch64, x86_64};
use windlass_schema::maps::{
    CHUNK_BYTES, Chunk, Location, MAX_USER_FRAMES, Mapping, MappingSegment, PROCESS_SEGMENTS, ProcessEntry,
    SEGMENT_SLOTS, SegmentKey, UNUSED_START,
};
use windlass_schema::{ProcessAddress, Record, StopReason};

/// Where the code is, in two mappings, and the stack.
const CODE: u64 = 0x40_0000;
const STACK: u64 = 0x7fff_0000_0000;
/// Bytes in front of tables, code and stack.
const HEADER_BYTES: usize = 24;
const TGID: u32 = 1;
const GENERATION: u32 = 1;

struct Memory<'d> {
    code: &'d [u8],
    stack: &'d [u8],
    window: Option<RefCell<StackWindow>>,
}

impl StackMemory for Memory<'_> {
    fn words<const N: usize>(&self, address: u64) -> Option<[u64; N]> {
        [(CODE, self.code), (STACK, self.stack)].into_iter().find_map(|(start, bytes)| {
            let at = usize::try_from(address.checked_sub(start)?).ok()?;
            let words = bytes.get(at..at.checked_add(8 * N)?)?.as_chunks().0;
            Some(std::array::from_fn(|number| u64::from_le_bytes(words[number])))
        })
    }

    fn frame_words<const N: usize>(&self, address: u64, frame_bytes: u64) -> Option<[u64; N]> {
        let read = |from: u64, into: &mut [u64; WINDOW_WORDS]| {
            let words = self.words(from);
            *into = words.unwrap_or_default();
            words.is_some()
        };
        let window = self.window.as_ref();
        let held = window.and_then(|window| window.borrow_mut().words(address, frame_bytes, read));
        held.or_else(|| self.words(address))
    }

    fn unreadable(&self, _address: u64) -> StopReason {
        StopReason::StackRead
    }
}

struct Maps {
    chunk: Box<Chunk>,
    segment: MappingSegment,
    recent: Option<RefCell<Box<RecentRecords>>>,
}

impl Tables for Maps {
    fn chunk(&self, number: u32) -> Option<&Chunk> {
        (number == 0).then_some(&*self.chunk)
    }

    fn segment(&self, key: SegmentKey) -> Option<&MappingSegment> {
        (key.tgid == TGID && key.segment == 0).then_some(&self.segment)
    }

    fn remembered(&self, generation: u32, address: ProcessAddress) -> Option<Record> {
        self.recent.as_ref()?.borrow().get(generation, address)
    }

    fn remember(&self, generation: u32, address: ProcessAddress, record: Record) {
        if let Some(recent) = &self.recent {
            recent.borrow_mut().put(generation, address, record);
        }
    }
}

/// Walks over these bytes: a header, then tables, code and stack. A walk ends within its turns, and finds the same with what
/// is read of the stack at once and what is remembered of walks before.
pub fn walk(data: &[u8]) {
    let Some((header, rest)) = data.split_at_checked(HEADER_BYTES) else { return };
    let half = |at: usize| u64::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let (table, rest) = rest.split_at((half(16) as usize).min(rest.len()));
    let (code, stack) = rest.split_at((half(18) as usize).min(rest.len()));
    let mut chunk = Box::new(Chunk([0; CHUNK_BYTES as usize]));
    chunk.0[..table.len()].copy_from_slice(table);
    let mut segment = MappingSegment {
        starts: [UNUSED_START; SEGMENT_SLOTS],
        mappings: [Mapping::default(); SEGMENT_SLOTS],
    };
    let middle = CODE + code.len() as u64 / 2;
    let ends = [(CODE, middle, word(8)), (middle, CODE + code.len() as u64, word(12))];
    for (slot, (start, end, image)) in ends.into_iter().enumerate() {
        let bias = word(20).into();
        segment.starts[slot] = start;
        segment.mappings[slot] = Mapping { end, bias, image: Location(image), generation: GENERATION };
    }
    let mut maps = Maps { chunk, segment, recent: None };
    let (counter, stack_pointer, frame_pointer) = (CODE + half(0), STACK + half(2), STACK + half(4));
    // The stack and the frame pointer by their DWARF numbers; the others point to the stack as well.
    let mut general = [stack_pointer; 16];
    general[6] = frame_pointer;
    compare(x86_64::Registers::innermost(general, counter), &mut maps, code, stack);
    let mut general = [stack_pointer; 32];
    (general[29], general[30]) = (frame_pointer, CODE + half(6));
    compare(aarch64::Registers::innermost(general, counter), &mut maps, code, stack);
}

/// Walks without help, and twice with it.
fn compare<R: Machine + Copy>(registers: R, maps: &mut Maps, code: &[u8], stack: &[u8]) {
    maps.recent = None;
    let plain = frames(registers, maps, &Memory { code, stack, window: None });
    maps.recent = Some(RefCell::default());
    for _ in 0..2 {
        let memory = Memory { code, stack, window: Some(RefCell::default()) };
        assert_eq!(frames(registers, maps, &memory), plain);
    }
}

/// The frames of a walk, and why it ended.
fn frames<R: Machine>(registers: R, maps: &Maps, memory: &Memory<'_>) -> (Vec<u64>, StopReason) {
    let mut first = [UNUSED_START; PROCESS_SEGMENTS];
    first[0] = CODE;
    let process = ProcessEntry { generation: GENERATION, segments: 1, first };
    let mut walk = Walk::new(TGID, process, registers);
    let mut frames = Vec::new();
    // As many turns as the BPF program makes.
    for _ in 0..=MAX_USER_FRAMES + MAX_SEARCH_TURNS {
        if walk.is_at_frame() {
            if frames.len() == MAX_USER_FRAMES {
                return (frames, StopReason::FrameLimit);
            }
            frames.push(walk.address());
        }
        if let Err(reason) = walk.advance(maps, memory) {
            return (frames, reason);
        }
    }
    panic!("a walk that does not end: {} frames", frames.len());
}
