//! A walk: frame after frame until there is a reason to stop.

use windlass_schema::maps::{
    EXACT_ADDRESS, ImageHeader, Location, MAX_USER_FRAMES, ProcessEntry, SegmentKey,
};
use windlass_schema::record::kind;
use windlass_schema::{ImageAddress, LoadBias, ProcessAddress, Record, ReturnAddress, StopReason};

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
}

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
    }

    /// The frame's address as a sample holds it.
    #[inline(always)]
    pub fn address(&self) -> u64 {
        // User addresses are below 2^63: the top bit is free to say how the address is meant.
        let exact = if self.registers.is_exact() { EXACT_ADDRESS } else { 0 };
        self.registers.program_counter() & !EXACT_ADDRESS | exact
    }

    /// Steps from the frame just recorded to its caller.
    #[inline(always)]
    pub fn advance<T: Tables, M: StackMemory>(&mut self, tables: &T, memory: &M) -> Result<(), StopReason> {
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
        match self.registers.step(record, memory) {
            Err(StopReason::UnsupportedRule) => {
                self.unsupported = record.aux();
                Err(StopReason::UnsupportedRule)
            }
            stepped => stepped,
        }
    }

    /// The record that holds at `address`.
    #[inline(always)]
    fn look_up<T: Tables>(&mut self, tables: &T, address: ProcessAddress) -> Result<Record, StopReason> {
        if !(self.start <= address.get() && address.get() < self.end) {
            self.enter_mapping(tables, address)?;
        }
        let image_address: ImageAddress = address.to_image(LoadBias::new(self.bias));
        record_at(tables, &self.image, image_address)
    }

    /// Finds the mapping that holds `address`, and its image.
    #[inline(always)]
    fn enter_mapping<T: Tables>(&mut self, tables: &T, address: ProcessAddress) -> Result<(), StopReason> {
        if address.get() >> 63 != 0 {
            return Err(StopReason::NoMapping);
        }
        let segment = segment_of(&self.process, address.get()).ok_or(StopReason::NoMapping)?;
        let key = SegmentKey { tgid: self.tgid, segment };
        let segment = tables.segment(key).ok_or(StopReason::MappingsChanged)?;
        let slot = slot_of(segment, address.get()).ok_or(StopReason::NoMapping)?;
        let mapping = &segment.mappings[slot];
        if mapping.generation != self.process.generation {
            return Err(StopReason::MappingsChanged);
        }
        if address.get() >= mapping.end {
            return Err(StopReason::NoMapping);
        }
        if let Some(reason) = windlass_schema::maps::no_table::reason(mapping.image) {
            return Err(reason);
        }
        self.image = image_header(tables, mapping.image).ok_or(StopReason::TableCorrupt)?;
        self.start = segment.starts[slot];
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
        for _ in 0..MAX_USER_FRAMES {
            record(self.address());
            self.frames += 1;
            if let Err(reason) = self.advance(tables, memory) {
                return reason;
            }
        }
        StopReason::FrameLimit
    }
}
