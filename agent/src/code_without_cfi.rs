//! Which code of an image goes into its skeleton, as no CFI covers it?
//!
//! A table that is made of a skeleton has to have the rows that one of the image has. Nearly all of those come from CFI, which a
//! skeleton has; the others are read off instructions: where the process starts, linkage tables, signal
//! trampolines, functions in assembly, whole C libraries without CFI. So the skeleton has the code between functions with
//! CFI, but for what aligns the next one. It is all or nothing: a function without CFI is believed as far as no other one
//! contradicts it, so that a part might say more than the whole. Little code is kept though CFI covers it: where the process
//! starts, and libc's [`coroutine_code`](crate::coroutine_code). Of Go code there is none, as Go's own table covers it.
//! Wide code that keeps frame pointers ([`frame_pointers`](crate::frame_pointers)) is judged by itself, and bounded by itself.

use std::ops::Range;

use object::LittleEndian as LE;
use object::elf;
use object::read::ReadRef;
use object::read::elf::SectionHeader as _;

use crate::coroutine_code::ends;
use crate::frame_pointers::{Loaded, frame_pointer_code};
use crate::image::{ProgramHeader, SectionHeader};

/// Most bytes of code without CFI in a skeleton, but for wide code that keeps frame pointers. musl has 0.4 million in all,
/// OpenSSL's assembly less; what has more is no library of which functions are read off their instructions one by one.
const MAX_KEPT_BYTES: u64 = 2 * 1024 * 1024;
/// Most bytes of wide code that keeps frame pointers: of V8 there are one and a half million.
const MAX_FRAMED_BYTES: u64 = 32 * 1024 * 1024;
/// Most bytes in all that may align functions, where only their bytes tell: a few for each function, and up to two million where
/// a linker aligns a segment.
const MAX_PADDING_BYTES: u64 = 16 * 1024 * 1024;
/// How many bytes of a gap are read at once: all code but the shortest is seen not to be padding by the first.
const CHUNK_BYTES: u64 = 4096;
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
    /// What makes libc's coroutines, if it is there.
    pub(crate) makecontext: Option<Range<u64>>,
    pub(crate) image: R,
}

impl<'data, R: ReadRef<'data>> Code<'_, R> {
    /// Code that goes into a skeleton, in no order; parts do not overlap.
    pub(crate) fn kept(mut self) -> Vec<KeptCode> {
        let mut kept = self.framed();
        let framed: Vec<_> = kept.iter().map(KeptCode::addresses).collect();
        self.pieces = apart(self.pieces);
        let file = Loaded { program_headers: self.program_headers, image: self.image };
        let functions = file.functions();
        let mut parts = self.gaps(&functions);
        let is_framed = |part: &KeptCode| {
            framed.iter().any(|range| range.start < part.addresses().end && part.address < range.end)
        };
        parts.retain(|part| !is_framed(part));
        // Before any of them is read: anyone can map a file that says it has nothing but gaps.
        if bytes_of(&parts) > MAX_KEPT_BYTES + MAX_PADDING_BYTES {
            return kept;
        }
        parts.retain(|part| !self.is_padding(part));
        let covered = self.process_entry().into_iter().chain(self.coroutines(&functions));
        parts.extend(covered.filter(|part| !is_framed(part)));
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
        if bytes_of(&parts) <= MAX_KEPT_BYTES {
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

    /// What `covered`, sorted by start, leaves of the code, but for what aligns functions by its place, as what compiles tables
    /// has it.
    fn gaps(&self, covered: &[Range<u64>]) -> Vec<KeptCode> {
        let mut gaps = Vec::new();
        let mut covered = covered.iter().peekable();
        let mut covered_to = 0;
        for piece in &self.pieces {
            let Range { start, end } = piece.addresses();
            let mut at = start.max(covered_to);
            let mut add = |gap: Range<u64>| {
                if gap.start < gap.end && !aligns_next(&gap) {
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

    /// Whether a gap is for certain nothing but what aligns the next function, or cannot be read.
    fn is_padding(&self, gap: &KeptCode) -> bool {
        let mut at = gap.file.start;
        while at < gap.file.end {
            let Ok(bytes) = self.image.read_bytes_at(at, CHUNK_BYTES.min(gap.file.end - at)) else {
                return true;
            };
            let mut rest = bytes;
            while let Some(length) = padding(self.architecture, rest) {
                rest = &rest[length..];
            }
            // What is left may go on in the next chunk.
            if rest.len() == bytes.len() {
                return false;
            }
            at += (bytes.len() - rest.len()) as u64;
        }
        true
    }

    /// What libc's coroutines start in, and what tells it.
    fn coroutines(&self, functions: &[Range<u64>]) -> Vec<KeptCode> {
        let Some(range) = self.makecontext.as_ref().filter(|_| self.architecture == elf::EM_X86_64) else {
            return Vec::new();
        };
        let part = |range: &Range<u64>| {
            let holds = |piece: &&KeptCode| {
                let Range { start, end } = piece.addresses();
                start <= range.start && range.start < range.end && range.end <= end
            };
            self.pieces.iter().find(holds).map(|piece| piece.part(range))
        };
        let Some(makecontext) = part(range) else { return Vec::new() };
        let bytes = makecontext.file.end - makecontext.file.start;
        let code = self.image.read_bytes_at(makecontext.file.start, bytes).unwrap_or_default();
        let mut parts: Vec<_> = ends(code, range.start, functions).iter().filter_map(part).collect();
        parts.push(makecontext);
        parts
    }

    /// The instructions where the process starts.
    fn process_entry(&self) -> Option<KeptCode> {
        let piece = self.pieces.iter().find(|piece| piece.addresses().contains(&self.entry))?;
        let end = self.entry.saturating_add(ENTRY_BYTES).min(piece.addresses().end);
        Some(piece.part(&(self.entry..end)))
    }
}

/// Whether a gap aligns the next function by its place.
fn aligns_next(gap: &Range<u64>) -> bool {
    gap.end.is_multiple_of(FUNCTION_ALIGNMENT) && gap.end - gap.start < FUNCTION_ALIGNMENT
}

/// Pieces by address, none over another: where they are, the one that starts first counts.
fn apart(mut pieces: Vec<KeptCode>) -> Vec<KeptCode> {
    pieces.sort_by_key(|piece| piece.address);
    let mut end = 0;
    pieces.retain_mut(|piece| {
        let addresses = piece.addresses();
        let rest = addresses.start.max(end)..addresses.end;
        end = end.max(addresses.end);
        if !rest.is_empty() {
            *piece = piece.part(&rest);
        }
        !rest.is_empty()
    });
    pieces
}

fn bytes_of(parts: &[KeptCode]) -> u64 {
    parts.iter().map(|part| part.file.end - part.file.start).sum()
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::image_file::counted::Counted;

    /// What is kept of an image without CFI whose code is these pieces, by address and size, each where its address says; and
    /// how many bytes were read.
    fn kept(image: &[u8], pieces: &[(u64, u64)]) -> (Vec<Range<u64>>, u64) {
        let read = Cell::new(0);
        let piece = |&(address, bytes): &(u64, u64)| KeptCode::new(address, address, bytes);
        let code = Code {
            architecture: elf::EM_X86_64,
            program_headers: &[],
            pieces: pieces.iter().filter_map(piece).collect(),
            entry: u64::MAX,
            makecontext: None,
            image: Counted(image, &read),
        };
        let parts = code.kept();
        (parts.iter().map(KeptCode::addresses).collect(), read.get())
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_is_read_of_gaps_is_bounded() {
        let zeros = vec![0; 64 << 20];
        assert_eq!(
            kept(&zeros, &[(0, 64 * MIB)]),
            (Vec::new(), 0),
            "it is not read whole to see that it is too large"
        );
        let over_each_other: Vec<_> = (0..1000).map(|number| (number, 8 * MIB)).collect();
        let (parts, read) = kept(&zeros, &over_each_other);
        assert!(parts.is_empty() && read <= MAX_KEPT_BYTES + MAX_PADDING_BYTES, "{read} bytes read");
    }

    #[test]
    fn code_is_seen_by_its_first_bytes_and_kept_once() {
        let code = vec![0xc3; MIB as usize];
        let (parts, read) = kept(&code, &[(0, MIB)]);
        assert_eq!((parts.len(), parts[0].clone(), read), (1, 0..MIB, CHUNK_BYTES));
        let (parts, _) = kept(&code, &[(100, 1000), (0, 200), (50, 100), (4096, 100)]);
        assert_eq!(parts, [0..1100, 4096..4196]);
    }

    #[test]
    fn padding_goes_on_in_the_next_chunk() {
        // nopw 0x0(%rax,%rax,1), nine bytes long.
        let mut image = [0x66, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0].repeat(2000);
        let bytes = image.len() as u64;
        assert_eq!(kept(&image, &[(0, bytes)]).0, []);
        *image.last_mut().expect("it has bytes") = 1;
        assert_eq!(kept(&image, &[(0, bytes)]).0, [], "a displacement is part of it");
        image.push(0xc3);
        let (parts, _) = kept(&image, &[(0, bytes + 1)]);
        assert_eq!((parts.len(), parts[0].clone()), (1, 0..bytes + 1));
    }
}
