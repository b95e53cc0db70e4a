//! One stack, walked by the agent's unwinder, by framehop and by the book, compared frame by frame.

use std::collections::BTreeMap;

use framehop::x86_64::{Reg, UnwindRegsX86_64};
use framehop::{FrameAddress, Unwinder as _};
use windlass_agent_ebpf::memory::StackMemory as _;
use windlass_agent_ebpf::walk::Walk;
use windlass_agent_ebpf::x86_64::Registers;
use windlass_schema::maps::MAX_USER_FRAMES;
use windlass_schema::record::{DWARF_RBP, DWARF_RSP};
use windlass_schema::{ProcessAddress, ReturnAddress, StopReason, UnsupportedReason};

use super::cfi::{End, Frame};
use super::images::ProcessImages;
use super::tracee::ProcessMemory;

/// Bytes of `_start` at most; glibc's has 38.
const START_BYTES: u64 = 64;
/// rsp and rbp by DWARF number.
const RSP: usize = DWARF_RSP as usize;
const RBP: usize = DWARF_RBP as usize;

/// A stack as the agent's unwinder walked it.
pub(crate) struct Walked {
    /// Registers of each frame, innermost first.
    pub(crate) frames: Vec<Registers>,
    pub(crate) stop: StopReason,
}

/// Compares walks of one process.
pub(crate) struct Comparison {
    pid: i32,
    pub(crate) images: ProcessImages,
    /// First instruction of the program: the function in which the stack of its first thread ends.
    start: u64,
    /// What was compared so far.
    pub(crate) tally: Tally,
}

#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) walks: usize,
    pub(crate) complete: usize,
    /// Most frames of a walk.
    pub(crate) deepest: usize,
    /// Steps that framehop took too, and steps that it cannot take.
    pub(crate) by_framehop: usize,
    pub(crate) beyond_framehop: usize,
    /// Stops short of the end: how many for each reason and place.
    pub(crate) cut: BTreeMap<(StopReason, String), usize>,
}

/// The address to look up for a frame.
pub(crate) fn lookup_address(frame: &Registers) -> ProcessAddress {
    match frame.exact {
        0 => ReturnAddress::new(frame.rip).lookup_address(),
        _ => ProcessAddress::new(frame.rip),
    }
}

impl Frame {
    /// The same, as the book has it.
    fn of(registers: &Registers) -> Self {
        let known = |number: usize| registers.known >> number & 1 != 0;
        Self {
            general: std::array::from_fn(|number| known(number).then_some(registers.general[number])),
            rip: registers.rip,
            exact: registers.exact != 0,
        }
    }

    /// Whether all that `other` knows is so here.
    fn covers(&self, other: &Self) -> bool {
        let agree = |(mine, other): (&Option<u64>, &Option<u64>)| other.is_none() || mine == other;
        (self.rip, self.exact) == (other.rip, other.exact)
            && self.general.iter().zip(&other.general).all(agree)
    }
}

impl Comparison {
    /// Of the process `pid`, which runs the program whose path ends so.
    pub(crate) fn new(pid: i32, path_end: &str) -> Self {
        let images = ProcessImages::read(pid);
        let (_, start) = images.program(path_end).expect("a process maps its program");
        Self { pid, images, start: start.get(), tally: Tally::default() }
    }

    /// Walks the stack of thread `tid` from these registers in every way, and compares.
    pub(crate) fn check(&mut self, tid: i32, memory: &ProcessMemory, innermost: Registers) -> Walked {
        let walked = self.walk(memory, innermost);
        self.follow_by_the_book(memory, &walked);
        self.follow_with_framehop(memory, &walked);
        let last = lookup_address(walked.frames.last().expect("a walk records its first frame"));
        self.tally.walks += 1;
        self.tally.deepest = self.tally.deepest.max(walked.frames.len());
        if walked.stop.is_complete() {
            self.tally.complete += 1;
            let in_start = (self.start..self.start + START_BYTES).contains(&last.get());
            assert!(tid != self.pid || in_start, "complete, but not in _start:\n{}", self.print(&walked));
        } else {
            *self.tally.cut.entry((walked.stop, self.images.describe(last))).or_default() += 1;
        }
        walked
    }

    /// The walk alone.
    pub(crate) fn walk(&self, memory: &ProcessMemory, innermost: Registers) -> Walked {
        let mut walk = Walk::new(self.pid as u32, self.images.entry, innermost);
        let mut frames = Vec::new();
        while frames.len() < MAX_USER_FRAMES {
            if walk.is_at_frame() {
                frames.push(walk.registers);
            }
            if let Err(stop) = walk.advance(&self.images.maps, memory) {
                let why = UnsupportedReason::from_code(walk.unsupported);
                assert_eq!(why.is_some(), stop == StopReason::UnsupportedRule, "{stop:?} at {why:?}");
                return Walked { frames, stop };
            }
        }
        Walked { frames, stop: StopReason::FrameLimit }
    }

    /// Every frame is the one that the CFI says, and the stop is for the reason given.
    fn follow_by_the_book(&self, memory: &ProcessMemory, walked: &Walked) {
        let read = |address| memory.word(address);
        let row_of = |frame: &Registers| {
            let (cfi, address) = self.images.cfi(lookup_address(frame))?;
            Some((cfi, cfi.row(address)?))
        };
        let mut frame = Frame::of(&walked.frames[0]);
        for (number, ours) in walked.frames.iter().enumerate() {
            assert!(
                frame.covers(&Frame::of(ours)),
                "frame {number} is {ours:x?}, but by its CFI {frame:x?}\n{}",
                self.print(walked)
            );
            let image = self.images.cfi(lookup_address(ours));
            let in_image = image.is_some();
            let row = image.and_then(|(cfi, address)| Some((cfi, cfi.row(address)?)));
            let next = row.map_or(Err(End::NotCovered), |(cfi, row)| cfi.step(&frame, &row, &read));
            if let Some(ours) = walked.frames.get(number + 1) {
                frame = match next {
                    Ok(next) => next,
                    // Code without CFI that the table knows by its instructions, or a frame by a frame pointer. The book
                    // has nothing to say: it is the calls that were watched, and gdb, that such a frame is held against.
                    Err(End::NotCovered) => Frame::of(ours),
                    Err(end) => {
                        panic!("frame {number} has no caller by its CFI ({end:?})\n{}", self.print(walked))
                    }
                };
                continue;
            }
            // With the registers that the agent has kept, the book has to stop as well, or lose rbp.
            let stuck = || match row_of(ours).map(|(cfi, row)| cfi.step(&Frame::of(ours), &row, &read)) {
                Some(Ok(next)) => next.general[RBP].is_none(),
                Some(Err(end)) => end == End::Unknown,
                None => false,
            };
            let rightly = match walked.stop {
                StopReason::EndOfStack => next == Err(End::Undefined),
                StopReason::NoCfi => in_image && next == Err(End::NotCovered),
                StopReason::NoMapping | StopReason::Jit => !in_image,
                StopReason::FramePointer => next == Err(End::NotCovered),
                StopReason::StackRead | StopReason::RegisterUnknown => stuck(),
                StopReason::NoAdvance => next.is_ok_and(|next| next.general[RSP] <= Some(ours.general[RSP])),
                StopReason::ZeroReturnAddress => next.is_ok_and(|next| next.rip == 0),
                StopReason::FrameLimit => walked.frames.len() == MAX_USER_FRAMES,
                StopReason::UnsupportedRule => true,
                _ => false,
            };
            assert!(rightly, "stopped without that reason\n{}", self.print(walked));
        }
    }

    /// As long as framehop can follow, it finds the same frames, and the same end.
    fn follow_with_framehop(&mut self, memory: &ProcessMemory, walked: &Walked) {
        let mut read = |address| memory.word(address).ok_or(());
        let mut theirs = None;
        for (number, ours) in walked.frames.iter().enumerate() {
            let at = lookup_address(ours);
            let row = self.images.cfi(at).and_then(|(cfi, address)| Some((cfi, cfi.row(address)?)));
            // Where there is no CFI, framehop tries the frame pointer, and the agent stops.
            let Some((cfi, row)) = row else { return };
            if !cfi.framehop_follows(&Frame::of(ours), &row) {
                self.tally.beyond_framehop += 1;
                theirs = None;
                continue;
            }
            // Where it could not follow, it starts again behind.
            let mut registers = theirs
                .unwrap_or_else(|| UnwindRegsX86_64::new(ours.rip, ours.general[RSP], ours.general[RBP]));
            let address = match ours.exact {
                0 => FrameAddress::from_return_address(ours.rip).expect("the agent stops at a zero"),
                _ => FrameAddress::from_instruction_pointer(ours.rip),
            };
            let cache = &mut self.images.framehop_cache;
            let found = self.images.framehop.unwind_frame(address, &mut registers, cache, &mut read);
            match walked.frames.get(number + 1) {
                Some(next) => {
                    let same = found == Ok(Some(next.rip)) && registers.get(Reg::RSP) == next.general[RSP];
                    assert!(
                        same,
                        "frame {}: framehop finds {found:x?}, {registers:x?}\n{}",
                        number + 1,
                        self.print(walked)
                    );
                }
                None if walked.stop.is_complete() => {
                    assert_eq!(found, Ok(None), "framehop goes on\n{}", self.print(walked));
                }
                None => {}
            }
            self.tally.by_framehop += 1;
            theirs = Some(registers);
        }
    }

    /// A stack for a failure's message.
    pub(crate) fn print(&self, walked: &Walked) -> String {
        let frame = |(number, frame): (usize, &Registers)| {
            let place = self.images.describe(lookup_address(frame));
            format!("#{number} rsp={:#x} rbp={:#x} {place}\n", frame.general[RSP], frame.general[RBP])
        };
        let frames: String = walked.frames.iter().enumerate().map(frame).collect();
        format!("{frames}{}", walked.stop.as_str())
    }
}
