//! From the address that a profile holds to the image's own, which an index is asked for.
//!
//! In a pprof file an address is the process's, and its mapping says where the file lay in the process:
//!
//! ```text
//! offset = address - memory_start + file_offset          where in the file the instruction is
//! image address = offset - p_offset + p_vaddr            of the PT_LOAD with p_offset <= offset < p_offset + p_filesz
//! ```
//! Our own agents send image addresses, in mappings that say where the file lies among those:
//! `memory_start = file_offset - p_offset + p_vaddr`. Put into the equations, this gives the address itself. So
//! one rule serves both, and nobody need say which kind a profile is.
//!
//! The kernel is not mapped from its file. Its mapping starts at its first byte of code, `_text`, wherever the sender
//! takes that to be, and is not longer than its segment with code:
//!
//! ```text
//! image address = address - memory_start + p_vaddr       of the first PT_LOAD with code
//! ```
//! Two kinds of address are taken as they are: those outside their mapping, which cannot be the process's, and
//! those of the kernel in any other mapping. An address that no segment holds has no name
//! rather than a wrong one. If no file that says where the segments were is stored, addresses are
//! taken as they are: a process's own are then far above those of the image, and find nothing.

use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;

use futures_util::TryStreamExt;
use object::elf::{self, FileHeader64, ProgramHeader64};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, pod};
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;
use windlass_schema::pprof::Mapping;

use crate::blob::{Blob, BlobError};
use crate::error::ServiceError;
use crate::service::App;

/// Bytes read of a file at first: its header and seventy program headers, more than linkers make.
const HEAD_BYTES: u64 = 4096;
/// Addresses from here on are the kernel's, on x86-64 and aarch64.
const KERNEL_START: u64 = 1 << 63;
/// The path of the kernel's mapping.
const KERNEL_PATH: &str = "[kernel.kallsyms]";

/// A `PT_LOAD` with code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    offset: u64,
    size: u64,
    address: u64,
}

/// Where the code of a file is among its image's addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Segments {
    /// Those of which the file has the bytes.
    in_file: Vec<Segment>,
    /// Start and size in memory of the first one.
    text: Option<(u64, u64)>,
}

/// Whether `address` is not the image's own but lies in this mapping of it, whose path is `path`.
pub(super) fn is_mapped(mapping: &Mapping, path: &str, address: u64) -> bool {
    let is_image = address < KERNEL_START || is_kernel(mapping, path);
    (mapping.memory_start..mapping.memory_limit).contains(&address) && is_image
}

/// Whether it is the mapping of the kernel as perf and our agents name it.
fn is_kernel(mapping: &Mapping, path: &str) -> bool {
    mapping.memory_start >= KERNEL_START && path == KERNEL_PATH
}

impl Segments {
    /// The image address of a mapped address, if a segment holds it.
    pub(super) fn image_address(&self, mapping: &Mapping, address: u64) -> Option<u64> {
        if address >= KERNEL_START {
            return Some(self.kernel_address(mapping, address).unwrap_or(address));
        }
        if self.in_file.is_empty() {
            return Some(address);
        }
        let offset = address.checked_sub(mapping.memory_start)?.checked_add(mapping.file_offset)?;
        let mut found = self.in_file.iter().filter_map(|segment| {
            let into = offset.checked_sub(segment.offset).filter(|into| *into < segment.size)?;
            segment.address.checked_add(into)
        });
        let address = found.next()?;
        // Two segments may show the same bytes at two addresses; then the offset does not tell which.
        found.all(|other| other == address).then_some(address)
    }

    /// The image address of an address in the kernel's mapping.
    fn kernel_address(&self, mapping: &Mapping, address: u64) -> Option<u64> {
        let (start, size) = self.text?;
        let length = mapping.memory_limit.checked_sub(mapping.memory_start)?;
        (length <= size).then(|| (address - mapping.memory_start).checked_add(start)).flatten()
    }

    /// Segments out of program headers. `strict` are those of a debug file: where it was made by emptying sections, a
    /// segment with code has lost bytes, and its offset says nothing any more.
    fn new(headers: &[ProgramHeader64<Endianness>], endian: Endianness, strict: bool) -> Self {
        let code = headers.iter().filter(|header| {
            header.p_type(endian) == elf::PT_LOAD && header.p_flags(endian).0 & elf::PF_X.0 != 0
        });
        let text = code.clone().next().map(|header| (header.p_vaddr(endian), header.p_memsz(endian)));
        let code = code.filter(|header| !strict || header.p_filesz(endian) == header.p_memsz(endian));
        let segments = code.map(|header| Segment {
            offset: header.p_offset(endian),
            size: header.p_filesz(endian),
            address: header.p_vaddr(endian),
        });
        Self { in_file: segments.filter(|segment| segment.size > 0).collect(), text }
    }
}

/// The segments of an image, from the best file stored of it that has them.
pub(super) async fn find(app: &Arc<App>, id: BuildId) -> Result<Option<Segments>, ServiceError> {
    for kind in [ArtefactKind::Executable, ArtefactKind::Skeleton, ArtefactKind::Debuginfo] {
        let Some(artefact) = app.sound_artefact(id, kind).await? else { continue };
        match read(app, artefact.blob, kind == ArtefactKind::Debuginfo).await {
            Ok(Some(segments)) if segments.text.is_some() => return Ok(Some(segments)),
            Ok(_) => {}
            Err(BlobError::Damaged { hash, .. }) => app.mark_damaged(hash).await?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

async fn read(app: &App, blob: Blob, strict: bool) -> Result<Option<Segments>, BlobError> {
    let head = read_range(app, blob, 0..HEAD_BYTES).await?;
    let Some((endian, range)) = program_headers(&head) else { return Ok(None) };
    let tail;
    let inside = usize::try_from(range.end).ok().and_then(|end| head.get(range.start as usize..end));
    let bytes = match inside {
        Some(bytes) => bytes,
        None => {
            tail = read_range(app, blob, range).await?;
            &tail
        }
    };
    let count = bytes.len() / size_of::<ProgramHeader64<Endianness>>();
    let headers = pod::slice_from_bytes::<ProgramHeader64<Endianness>>(bytes, count);
    Ok(headers.ok().map(|(headers, _)| Segments::new(headers, endian, strict)))
}

/// Where in a 64-bit ELF file its program headers are: at most 65535 of 56 bytes each.
fn program_headers(head: &[u8]) -> Option<(Endianness, Range<u64>)> {
    let header = FileHeader64::<Endianness>::parse(head).ok()?;
    let endian = header.endian().ok()?;
    let bytes = u64::from(header.e_phnum(endian)) * size_of::<ProgramHeader64<Endianness>>() as u64;
    let start = header.e_phoff(endian);
    Some((endian, start..start.checked_add(bytes)?))
}

async fn read_range(app: &App, blob: Blob, range: Range<u64>) -> Result<Vec<u8>, BlobError> {
    let mut bytes = Vec::new();
    let mut pieces = pin!(app.blobs.stream(blob, range));
    while let Some(piece) = pieces.try_next().await? {
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPPING: Mapping = Mapping {
        id: 1,
        memory_start: 0,
        memory_limit: 0,
        file_offset: 0,
        filename: 0,
        build_id: 0,
        has_functions: false,
        has_filenames: false,
        has_line_numbers: false,
        has_inline_frames: false,
    };

    fn segments(list: &[[u64; 3]]) -> Segments {
        let in_file = list.iter().map(|&[offset, size, address]| Segment { offset, size, address }).collect();
        Segments { in_file, text: list.first().map(|&[_, size, address]| (address, size)) }
    }

    /// `mapping` as memory_start, length and file_offset.
    #[track_caller]
    fn check(segments: &Segments, mapping: [u64; 3], address: u64, expect: Option<u64>) {
        let [memory_start, length, file_offset] = mapping;
        let mapping = Mapping { memory_start, memory_limit: memory_start + length, file_offset, ..MAPPING };
        assert!(is_mapped(&mapping, "/usr/bin/program", address));
        assert_eq!(segments.image_address(&mapping, address), expect);
    }

    #[test]
    fn addresses_of_processes_and_of_images_agree() {
        // As lld places code: another offset than address, not at a page's start.
        let lld = segments(&[[0x7d0, 0x5000, 0x217d0]]);
        check(&lld, [0x5555_5555_5000, 0x6000, 0], 0x5555_5555_5900, Some(0x21900));
        check(&lld, [0x21000, 0x6000, 0], 0x21900, Some(0x21900));
        // A part of the code, mapped by itself.
        check(&lld, [0x7f00_0000_2000, 0x1000, 0x2000], 0x7f00_0000_2010, Some(0x23010));
        // ET_EXEC: both are one.
        let fixed = segments(&[[0x1000, 0x2000, 0x40_1000]]);
        check(&fixed, [0x40_1000, 0x2000, 0x1000], 0x40_1abc, Some(0x40_1abc));
        // One mapping over all segments of a file, as some tools merge them.
        check(&fixed, [0x40_0000, 0x4000, 0], 0x40_1abc, Some(0x40_1abc));
    }

    #[test]
    fn what_no_segment_or_more_than_one_holds_has_no_address() {
        let twice = segments(&[[0x1000, 0x1000, 0x1000], [0x1800, 0x1000, 0x9800]]);
        check(&twice, [0x7000, 0x9000, 0], 0x7ffe, None);
        check(&twice, [0x7000, 0x9000, 0], 0x8010, Some(0x1010));
        check(&twice, [0x7000, 0x9000, 0], 0x8810, None);
        check(&twice, [0x7000, 0x9000, u64::MAX], 0x8010, None);
    }

    #[test]
    fn the_kernel_and_what_lies_outside_the_mapping_are_left_alone() {
        let mapping = Mapping { memory_start: 0x1000, memory_limit: 0x2000, ..MAPPING };
        for address in [0xfff, 0x2000] {
            assert!(!is_mapped(&mapping, "", address));
        }
        let start = 0xffff_ffff_8100_0000;
        let kernel = Mapping { memory_start: start, memory_limit: start + 0x1000, ..MAPPING };
        assert!(!is_mapped(&kernel, "[guest.kernel.kallsyms]", start));
    }

    #[test]
    fn the_kernel_lies_where_its_file_was_linked_to() {
        let text = segments(&[[0x20_0000, 0x100_0000, 0xffff_ffff_8100_0000]]);
        let kernel = |start, length| Mapping { memory_start: start, memory_limit: start + length, ..MAPPING };
        let at = |mapping: &Mapping, address| {
            is_mapped(mapping, KERNEL_PATH, address).then(|| text.image_address(mapping, address).unwrap())
        };
        let linked = kernel(0xffff_ffff_8100_0000, 0xf0_0000);
        assert_eq!(at(&linked, 0xffff_ffff_8100_1234), Some(0xffff_ffff_8100_1234));
        let random = kernel(0xffff_ffff_a340_0000, 0xf0_0000);
        assert_eq!(at(&random, 0xffff_ffff_a340_1234), Some(0xffff_ffff_8100_1234));
        assert_eq!(at(&random, 0xffff_ffff_a330_0000), None);
        let all = kernel(0xffff_ffff_8000_0000, 0x4000_0000);
        assert_eq!(at(&all, 0xffff_ffff_8100_1234), Some(0xffff_ffff_8100_1234), "that starts elsewhere");
    }
}
