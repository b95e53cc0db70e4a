//! A walk: frame after frame until there is a reason to stop.

use windlass_schema::maps::{
    EXACT_ADDRESS, ImageHeader, Location, MAX_USER_FRAMES, Mapping, ProcessEntry, SegmentKey, no_table,
};
use windlass_schema::record::kind;
use windlass_schema::{
    ImageAddress, LoadBias, ProcessAddress, Record, ReturnAddress, StopReason, UnsupportedReason,
};

use crate::frame_pointer::{CodeWithoutTable, Search};
use crate::machine::Machine;
use crate::memory::{StackMemory, Tables};
use crate::search::{image_header, record_at, segment_of, slot_of};

/// A walk under way. Consecutive frames are often in one image, so the mapping and the image
/// header of the last frame whose record was looked up are kept.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Walk<R> {
    /// Registers of the frame that is next to be recorded.
    pub registers: R,
    /// The process's mappings.
    pub process: ProcessEntry,
    /// The process.
    pub tgid: u32,
    /// Frames recorded.
    pub frames: u32,
    /// Code of the [`windlass_schema::UnsupportedReason`] when the walk stopped with `UnsupportedRule`.
    pub unsupported: u8,
    start: u64,
    end: u64,
    bias: u64,
    image: ImageHeader,
    /// What the mapping is, if it has no table: the code of its reason. 0 if it has one.
    without_table: u64,
    /// 1 if the mapping is memory of a JIT compiler, 2 if of one that is known to keep frame pointers, else 0.
    is_jit: u64,
    /// 1 if all functions of the code searched keep frame pointers, else 0.
    keeps_frame_pointers: u64,
    search: Search,
}

/// What stands for memory of a JIT compiler.
const JIT: u64 = StopReason::Jit as u64;
/// What stands for memory of a JIT compiler that is known to keep frame pointers.
const OF_KNOWN_JIT: u64 = 2;
const _: () = assert!(JIT != 0 && StopReason::FramePointer as u64 != 0);
/// The record of code that can be walked by frame pointers.
const FRAME_POINTERS_ONLY: Record = Record::unsupported(UnsupportedReason::FramePointersOnly);

impl<R: Machine> Walk<R> {
    /// A walk from these registers.
    pub const fn new(tgid: u32, process: ProcessEntry, registers: R) -> Self {
        Self {
            registers,
            process,
            tgid,
            frames: 0,
            unsupported: 0,
            start: 0,
            end: 0,
            bias: 0,
            image: ImageHeader {
                base: 0,
                pages: 0,
                dictionary: Location::NOWHERE,
                directory: [Location::NOWHERE; 8],
            },
            without_table: 0,
            is_jit: 0,
            keeps_frame_pointers: 0,
            search: Search::START,
        }
    }

    /// Starts again from `registers`, which the caller has already put in place.
    #[inline(always)]
    pub fn restart(&mut self, tgid: u32) {
        self.tgid = tgid;
        self.frames = 0;
        self.unsupported = 0;
        self.start = 0;
        self.end = 0;
        self.search = Search::START;
    }

    /// Whether the registers are those of a frame that is to be recorded. Otherwise the last turn found out
    /// something about the frame recorded before it.
    #[inline(always)]
    pub fn is_at_frame(&self) -> bool {
        self.search.phase == Search::NONE
    }

    /// The frame's address as a sample holds it.
    #[inline(always)]
    pub fn address(&self) -> u64 {
        // User addresses are below 2^63: the top bit is free to say how the address is meant.
        let exact = if self.registers.is_exact() { EXACT_ADDRESS } else { 0 };
        self.registers.program_counter() & !EXACT_ADDRESS | exact
    }

    /// Steps from the frame just recorded to its caller, or a turn nearer to it.
    #[inline(always)]
    pub fn advance<T: Tables, M: StackMemory>(&mut self, tables: &T, memory: &M) -> Result<(), StopReason> {
        if self.is_at_frame() {
            let record = self.record(tables)?;
            let is_only = record.0 == FRAME_POINTERS_ONLY.0;
            if !is_only && record.0 != Record::NO_CFI.0 {
                return match self.registers.step(record, memory) {
                    Err(StopReason::UnsupportedRule) => {
                        self.unsupported = record.aux();
                        Err(StopReason::UnsupportedRule)
                    }
                    stepped => stepped,
                };
            }
            self.keeps_frame_pointers = is_only as u64;
        }
        self.look_for_caller(tables, memory)
    }

    /// The record of the frame just recorded.
    #[inline(always)]
    fn record<T: Tables>(&mut self, tables: &T) -> Result<Record, StopReason> {
        let counter = self.registers.program_counter();
        let address = if self.registers.is_exact() {
            ProcessAddress::new(counter)
        } else {
            ReturnAddress::new(counter).lookup_address()
        };
        let generation = self.process.generation;
        let record = match tables.remembered(generation, address) {
            Some(record) => record,
            None => {
                let record = self.look_up(tables, address)?;
                // What is not a frame's rule ends the walk or needs its mapping, which is found on the way to the record.
                if !matches!(record.kind(), kind::NO_CFI | kind::UNSUPPORTED) {
                    tables.remember(generation, address, record);
                }
                record
            }
        };
        Ok(record)
    }

    /// The record that holds at `address`.
    #[inline(always)]
    fn look_up<T: Tables>(&mut self, tables: &T, address: ProcessAddress) -> Result<Record, StopReason> {
        if !(self.start <= address.get() && address.get() < self.end) {
            self.enter_mapping(tables, address)?;
        }
        if self.without_table != 0 {
            return Ok(if self.without_table == JIT { Record::NO_CFI } else { FRAME_POINTERS_ONLY });
        }
        let image_address: ImageAddress = address.to_image(LoadBias::new(self.bias));
        record_at(tables, &self.image, image_address)
    }

    /// One turn of going on by frame pointers.
    #[inline(always)]
    fn look_for_caller<T: Tables, M: StackMemory>(
        &mut self,
        tables: &T,
        memory: &M,
    ) -> Result<(), StopReason> {
        let keeps_frame_pointers = self.keeps_frame_pointers != 0;
        let is_jit = self.is_jit != 0;
        let unproved = match (keeps_frame_pointers, is_jit) {
            (true, _) => StopReason::FramePointer,
            (false, false) => StopReason::NoCfi,
            (false, true) => StopReason::Jit,
        };
        let is_of_known_jit = self.is_jit == OF_KNOWN_JIT;
        let code =
            CodeWithoutTable { start: self.start, keeps_frame_pointers, is_jit, is_of_known_jit, unproved };
        let Some(candidate) = self.registers.look_for_caller(&mut self.search, &code, memory)? else {
            return Ok(());
        };
        let is_return_address = self.is_executable(tables, candidate.address.wrapping_sub(1))?
            && R::follows_call(candidate.address, memory).ok_or(StopReason::FramePointer)?;
        if is_return_address != candidate.is_caller {
            return Err(StopReason::FramePointer);
        }
        if candidate.is_caller {
            self.search.phase = Search::NONE;
            self.registers.return_to(&candidate);
        }
        Ok(())
    }

    /// Whether there is executable memory at `address`.
    #[inline(always)]
    fn is_executable<T: Tables>(&self, tables: &T, address: u64) -> Result<bool, StopReason> {
        if self.start <= address && address < self.end {
            return Ok(true);
        }
        match self.find_mapping(tables, address) {
            Ok(_) => Ok(true),
            Err(StopReason::NoMapping) => Ok(false),
            Err(reason) => Err(reason),
        }
    }

    /// The mapping at `address`, and where it starts.
    #[inline(always)]
    fn find_mapping<'t, T: Tables>(
        &self,
        tables: &'t T,
        address: u64,
    ) -> Result<(u64, &'t Mapping), StopReason> {
        if address >> 63 != 0 {
            return Err(StopReason::NoMapping);
        }
        let segment = segment_of(&self.process, address).ok_or(StopReason::NoMapping)?;
        let key = SegmentKey { tgid: self.tgid, segment };
        let segment = tables.segment(key).ok_or(StopReason::MappingsChanged)?;
        let slot = slot_of(segment, address).ok_or(StopReason::NoMapping)?;
        let mapping = &segment.mappings[slot];
        if mapping.generation != self.process.generation {
            return Err(StopReason::MappingsChanged);
        }
        if address >= mapping.end {
            return Err(StopReason::NoMapping);
        }
        Ok((segment.starts[slot], mapping))
    }

    /// Finds the mapping that holds `address`, and its image.
    #[inline(always)]
    fn enter_mapping<T: Tables>(&mut self, tables: &T, address: ProcessAddress) -> Result<(), StopReason> {
        let (start, mapping) = self.find_mapping(tables, address.get())?;
        match no_table::reason(mapping.image) {
            None => {
                self.image = image_header(tables, mapping.image).ok_or(StopReason::TableCorrupt)?;
                self.without_table = 0;
            }
            Some(reason @ (StopReason::Jit | StopReason::FramePointer)) => self.without_table = reason as u64,
            Some(reason) => return Err(reason),
        }
        let is_jit = self.without_table == JIT || mapping.image.0 == no_table::ANY_JIT_FRAME_POINTERS.0;
        let is_of_known_jit = mapping.image.0 == no_table::JIT_FRAME_POINTERS.0;
        self.is_jit = is_jit as u64 | OF_KNOWN_JIT * is_of_known_jit as u64;
        self.start = start;
        self.end = mapping.end;
        self.bias = mapping.bias;
        Ok(())
    }

    /// Walks to the end, handing each frame's address to `record`: the host's loop. The BPF program
    /// makes the same calls from `bpf_loop`.
    pub fn run<T: Tables, M: StackMemory>(
        &mut self,
        tables: &T,
        memory: &M,
        mut record: impl FnMut(u64),
    ) -> StopReason {
        loop {
            if self.is_at_frame() {
                if self.frames as usize == MAX_USER_FRAMES {
                    return StopReason::FrameLimit;
                }
                record(self.address());
                self.frames += 1;
            }
            if let Err(reason) = self.advance(tables, memory) {
                return reason;
            }
        }
    }
}
