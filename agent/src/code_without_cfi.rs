//! Which code of an image goes into its skeleton, as no CFI covers it?
//!
//! A table that is made of a skeleton has to have the rows that one of the image has. Nearly all of those come from CFI, which a
//! skeleton has; the others are read off instructions: where the process starts, linkage tables, signal
//! trampolines, functions in assembly, whole C libraries without CFI. So the skeleton has the code between functions with
//! CFI, but for what aligns the next one. It is all or nothing: a function without CFI is believed as far as no other one
//! contradicts it, so that a part might say more than the whole. Of Go code there is none, as Go's own table covers it.
//! Wide code that keeps frame pointers ([`frame_pointers`](crate::frame_pointers)) is judged by itself, and bounded by itself.

use std::ops::Range;

use object::LittleEndian as LE;
use object::elf;
use object::read::ReadRef;
use object::read::elf::SectionHeader as _;

use crate::frame_pointers::{Loaded, frame_pointer_code};
use crate::image::{ProgramHeader, SectionHeader};

/// Most bytes of code without CFI in a skeleton, but for wide code that keeps frame pointers. musl has 0.4 million in all,
/// OpenSSL's assembly less; what has more is no library of which functions are read off their instructions one by one.
const MAX_KEPT_BYTES: u64 = 2 * 1024 * 1024;
/// Most bytes of wide code that keeps frame pointers: of V8 there are one and a half million.
const MAX_FRAMED_BYTES: u64 = 32 * 1024 * 1024;
/// Bytes from the process entry on, which says what `main` is though CFI covers it: 32 instructions of at most 15 bytes.
const ENTRY_BYTES: u64 = 480;
/// What compilers align functions to.
const FUNCTION_ALIGNMENT: u64 = 16;

/// Code by its image address, and where it is in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeptCode {
    pub(crate) address: u64,
    pub(crate) file: Range<u64>,
}

impl KeptCode {
    /// A section or a segment of code with this many bytes.
    pub(crate) fn new(address: u64, offset: u64, bytes: u64) -> Option<Self> {
        let is_sound = address.checked_add(bytes).is_some();
        let file = offset..offset.checked_add(bytes).filter(|_| is_sound && bytes > 0)?;
        Some(Self { address, file })
    }

    fn addresses(&self) -> Range<u64> {
        self.address..self.address + (self.file.end - self.file.start)
    }

    /// The part of it at these addresses, which are within it.
    fn part(&self, addresses: &Range<u64>) -> Self {
        let at = |address: u64| self.file.start + (address - self.address);
        Self { address: addresses.start, file: at(addresses.start)..at(addresses.end) }
    }
}

/// An image, as far as it matters here.
pub(crate) struct Code<'h, R> {
    pub(crate) architecture: elf::Machine,
    pub(crate) program_headers: &'h [ProgramHeader],
    /// Its sections of code, or segments, if it has no sections.
    pub(crate) pieces: Vec<KeptCode>,
    pub(crate) entry: u64,
    pub(crate) image: R,
}

impl<'data, R: ReadRef<'data>> Code<'_, R> {
    /// Code that goes into a skeleton, in no order; parts do not overlap.
    pub(crate) fn kept(mut self) -> Vec<KeptCode> {
        let mut kept = self.framed();
        let framed: Vec<_> = kept.iter().map(KeptCode::addresses).collect();
        self.pieces.sort_by_key(|piece| piece.address);
        let file = Loaded { program_headers: self.program_headers, image: self.image };
        let mut parts = self.gaps(&file.functions());
        let is_framed = |part: &KeptCode| {
            framed.iter().any(|range| range.start < part.addresses().end && part.address < range.end)
        };
        parts.retain(|part| !is_framed(part));
        parts.extend(self.process_entry().filter(|part| !is_framed(part)));
        parts.sort_by_key(|part| part.address);
        parts.dedup_by(|next, last| {
            let shared = last.addresses().end.checked_sub(next.address);
            let is_one =
                shared.is_some_and(|shared| last.file.end.checked_sub(shared) == Some(next.file.start));
            if is_one {
                last.file.end = last.file.end.max(next.file.end);
            }
            is_one
        });
        let bytes: u64 = parts.iter().map(|part| part.file.end - part.file.start).sum();
        if bytes <= MAX_KEPT_BYTES {
            kept.extend(parts);
        }
        kept
    }

    /// Wide code that keeps frame pointers, as much of it as is sent.
    fn framed(&self) -> Vec<KeptCode> {
        if self.architecture != elf::EM_X86_64 {
            return Vec::new();
        }
        let file = Loaded { program_headers: self.program_headers, image: self.image };
        let mut left = MAX_FRAMED_BYTES;
        let kept = frame_pointer_code(self.program_headers, self.image).into_iter().filter_map(|range| {
            let size = range.end - range.start;
            let offset = file.offset(range.start, size, true)?;
            left = left.checked_sub(size)?;
            KeptCode::new(range.start, offset, size)
        });
        kept.collect()
    }

    /// What `covered`, sorted by start, leaves of the code, but for what aligns functions.
    fn gaps(&self, covered: &[Range<u64>]) -> Vec<KeptCode> {
        let mut gaps = Vec::new();
        let mut covered = covered.iter().peekable();
        let mut covered_to = 0;
        for piece in &self.pieces {
            let Range { start, end } = piece.addresses();
            let mut at = start.max(covered_to);
            let mut add = |gap: Range<u64>| {
                if gap.start < gap.end && !self.is_padding(piece, &gap) {
                    gaps.push(piece.part(&gap));
                }
            };
            while let Some(function) = covered.next_if(|function| function.start < end) {
                add(at..function.start);
                covered_to = covered_to.max(function.end);
                at = at.max(function.end);
            }
            add(at..end);
        }
        gaps
    }

    /// Whether a gap aligns the next function: by its place, as what compiles tables has it, or for certain by its bytes.
    fn is_padding(&self, piece: &KeptCode, gap: &Range<u64>) -> bool {
        if gap.end.is_multiple_of(FUNCTION_ALIGNMENT) && gap.end - gap.start < FUNCTION_ALIGNMENT {
            return true;
        }
        let part = piece.part(gap).file;
        let bytes = self.image.read_bytes_at(part.start, part.end - part.start).unwrap_or_default();
        let mut rest = bytes;
        while let Some(length) = padding(self.architecture, rest) {
            rest = &rest[length..];
        }
        rest.is_empty()
    }

    /// The instructions where the process starts.
    fn process_entry(&self) -> Option<KeptCode> {
        let piece = self.pieces.iter().find(|piece| piece.addresses().contains(&self.entry))?;
        let end = self.entry.saturating_add(ENTRY_BYTES).min(piece.addresses().end);
        Some(piece.part(&(self.entry..end)))
    }
}

/// Bytes of the instruction of padding that `code` begins with, if it does: nop, nopw, nopl, int3, and zeros; of aarch64 nop
/// and udf.
fn padding(architecture: elf::Machine, code: &[u8]) -> Option<usize> {
    if architecture == elf::EM_AARCH64 {
        return matches!(code, [0x1f, 0x20, 0x03, 0xd5, ..] | [0, 0, 0, 0, ..]).then_some(4);
    }
    let prefixes = code.iter().take_while(|byte| matches!(byte, 0x66 | 0x2e)).count();
    let behind = match *code.get(prefixes..)? {
        [0 | 0xcc, ..] if prefixes == 0 => 1,
        [0x90, ..] => 1,
        // With a base of [rax], [rax + disp8], [rax + rax + disp8], [rax + disp32], [rax + rax + disp32].
        [0x0f, 0x1f, 0x00, ..] => 3,
        [0x0f, 0x1f, 0x40, ..] => 4,
        [0x0f, 0x1f, 0x44, 0x00, ..] => 5,
        [0x0f, 0x1f, 0x80, ..] => 7,
        [0x0f, 0x1f, 0x84, 0x00, ..] => 8,
        _ => return None,
    };
    Some(prefixes + behind).filter(|length| *length <= code.len())
}

/// The relocations of a loaded file that fill its arrays of functions to call, as ranges of the file.
pub(crate) fn array_relocations<'data, R: ReadRef<'data>>(
    sections: &[SectionHeader],
    image: R,
) -> Vec<Range<u64>> {
    let is_array = |kind| [elf::SHT_INIT_ARRAY, elf::SHT_FINI_ARRAY, elf::SHT_PREINIT_ARRAY].contains(&kind);
    let arrays = sections.iter().filter(|section| is_array(section.sh_type(LE)));
    let arrays: Vec<_> = arrays.take(MAX_SECTIONS).collect();
    let fills_array = |place: u64| {
        let into = |section: &&SectionHeader| place.checked_sub(section.sh_addr(LE));
        arrays.iter().any(|section| into(section).is_some_and(|into| into < section.sh_size(LE)))
    };
    let mut found: Vec<Range<u64>> = Vec::new();
    let is_filling = |section: &&SectionHeader| section.sh_type(LE) == elf::SHT_RELA && !arrays.is_empty();
    for section in sections.iter().filter(is_filling).take(MAX_SECTIONS) {
        let relocations = section.data_as_array::<elf::Rela64<LE>, _>(LE, image).unwrap_or_default();
        for (number, relocation) in relocations.iter().enumerate() {
            if !fills_array(relocation.r_offset.get(LE)) {
                continue;
            }
            let start = section.sh_offset(LE) + (number * size_of::<elf::Rela64<LE>>()) as u64;
            let end = start + size_of::<elf::Rela64<LE>>() as u64;
            let is_full = found.len() == MAX_RELOCATION_RUNS;
            match found.last_mut().filter(|last| last.end == start) {
                Some(last) => last.end = end,
                None if is_full => return found,
                None => found.push(start..end),
            }
        }
    }
    found
}

/// Most sections of one kind that are read, as what compiles tables does.
const MAX_SECTIONS: usize = 8;
/// Most runs of such relocations. Linkers sort them by place, and so write one for each array.
const MAX_RELOCATION_RUNS: usize = 8;
