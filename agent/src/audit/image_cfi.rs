//! The `.eh_frame` of images, as gimli reads it.
//!
//! The bytes are those of the file that is mapped, read again: what the service compiled may have been another file of
//! the same build-ID. `.debug_frame` is not read: stripped files have none, and for Go code it does not say
//! where rbp is.

use std::collections::HashMap;

use gimli::{
    BaseAddresses, CieOrFde, EhFrame, EhFrameOffset, Encoding, EndianSlice, LittleEndian, UnwindContext,
    UnwindSection as _, UnwindTableRow,
};
use object::LittleEndian as LE;
use object::elf;
use object::read::ReadRef as _;
use object::read::elf::{FileHeader as _, SectionHeader as _};
use windlass_schema::{BuildId, ImageAddress};

use crate::image::{ImageError, file_header, section_headers};
use crate::mapped_file::{ImageBytes, ImageSource};

/// Largest `.eh_frame` read in bytes; node's has 7 MiB, those of browsers 20.
const MAX_SECTION_BYTES: u64 = 32 * 1024 * 1024;
/// Bytes kept of all images together. Beyond it all are dropped: those that are needed are read again.
const MAX_KEPT_BYTES: u64 = 64 * 1024 * 1024;
/// Most images remembered, readable or not; some bytes for each that is not.
const MAX_KEPT_IMAGES: usize = 10_000;

/// The images met by audits.
#[derive(Default)]
pub(super) struct ImageCfis {
    images: HashMap<BuildId, Option<ImageCfi>>,
    bytes: u64,
}

impl ImageCfis {
    /// An image's CFI; `None` if it cannot be read.
    pub(super) fn get(&mut self, id: BuildId, source: &ImageSource) -> Option<&mut ImageCfi> {
        if !self.images.contains_key(&id) {
            let cfi = match source.read(ImageCfi::read) {
                Ok(Ok(cfi)) => Some(cfi),
                Ok(Err(error)) => {
                    tracing::info!(%id, name = source.shown_name(), %error, "image cannot be audited");
                    None
                }
                // Its process may have ended by now; another may map it later.
                Err(error) => {
                    tracing::debug!(%id, %error, "image cannot be audited");
                    return None;
                }
            };
            let bytes = cfi.as_ref().map_or(0, ImageCfi::bytes);
            if self.bytes + bytes > MAX_KEPT_BYTES || self.images.len() >= MAX_KEPT_IMAGES {
                self.images.clear();
                self.bytes = 0;
            }
            self.bytes += bytes;
            self.images.insert(id, cfi);
        }
        self.images.get_mut(&id)?.as_mut()
    }
}

/// The section as gimli takes it.
pub(super) type Section<'a> = EhFrame<EndianSlice<'a, LittleEndian>>;

/// An FDE: where its code is, and where it is in the section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Fde {
    start: u64,
    end: u64,
    offset: usize,
}

/// The CFI of an image.
pub(super) struct ImageCfi {
    eh_frame: Vec<u8>,
    bases: BaseAddresses,
    /// By address.
    fdes: Vec<Fde>,
    context: UnwindContext<usize>,
}

/// What CFI says of an address.
pub(super) struct Row<'a> {
    pub(super) row: UnwindTableRow<usize>,
    pub(super) is_signal: bool,
    pub(super) encoding: Encoding,
    pub(super) section: Section<'a>,
}

impl ImageCfi {
    fn read(image: ImageBytes<'_>) -> Result<Self, ImageError> {
        let header = file_header(image)?;
        // Checks their number.
        section_headers(header, image)?;
        let sections = header.sections(LE, image)?;
        let named = |name: &[u8]| sections.section_by_name(LE, name).map(|(_, section)| section);
        let address = |name: &[u8]| named(name).map_or(0, |section| section.sh_addr(LE));
        let eh_frame = match named(b".eh_frame") {
            Some(section) if section.sh_type(LE) != elf::SHT_NOBITS => {
                let bytes = section.sh_size(LE);
                if bytes > MAX_SECTION_BYTES {
                    let text = format!(".eh_frame of {bytes} bytes, at most {MAX_SECTION_BYTES} are read");
                    return Err(ImageError::Malformed(text));
                }
                let outside = |()| ImageError::Malformed(".eh_frame lies outside the file".to_owned());
                image.read_bytes_at(section.sh_offset(LE), bytes).map_err(outside)?.to_vec()
            }
            _ => Vec::new(),
        };
        let bases = BaseAddresses::default()
            .set_eh_frame(address(b".eh_frame"))
            .set_text(address(b".text"))
            .set_got(address(b".got"));
        Ok(Self::new(eh_frame, bases))
    }

    pub(super) fn new(eh_frame: Vec<u8>, bases: BaseAddresses) -> Self {
        let fdes = fdes(&eh_frame, &bases);
        Self { eh_frame, bases, fdes, context: UnwindContext::new() }
    }

    fn bytes(&self) -> u64 {
        (self.eh_frame.len() + size_of::<Fde>() * self.fdes.len()) as u64
    }

    /// What holds at an address; `None` if no FDE covers it.
    pub(super) fn row(&mut self, address: ImageAddress) -> Option<Row<'_>> {
        let address = address.get();
        let behind = self.fdes.partition_point(|fde| fde.start <= address);
        let fde = self.fdes[behind.checked_sub(1)?];
        if address >= fde.end {
            return None;
        }
        let section = EhFrame::new(&self.eh_frame, LittleEndian);
        let offset = EhFrameOffset(fde.offset);
        let fde = section.fde_from_offset(&self.bases, offset, EhFrame::cie_from_offset).ok()?;
        let row = fde.unwind_info_for_address(&section, &self.bases, &mut self.context, address).ok()?;
        let (row, is_signal, encoding) = (row.clone(), fde.is_signal_trampoline(), fde.cie().encoding());
        Some(Row { row, is_signal, encoding, section })
    }
}

/// Every FDE that can be read, by address.
fn fdes(eh_frame: &[u8], bases: &BaseAddresses) -> Vec<Fde> {
    let section = EhFrame::new(eh_frame, LittleEndian);
    let mut cies = HashMap::new();
    let mut fdes = Vec::new();
    let mut entries = section.entries(bases);
    while let Ok(Some(entry)) = entries.next() {
        let CieOrFde::Fde(partial) = entry else { continue };
        let parsed = partial.parse(|section, bases, offset| match cies.get(&offset) {
            Some(cie) => Result::clone(cie),
            None => cies.entry(offset).or_insert(section.cie_from_offset(bases, offset)).clone(),
        });
        if let Ok(fde) = parsed {
            fdes.push(Fde { start: fde.initial_address(), end: fde.end_address(), offset: fde.offset() });
        }
    }
    fdes.sort_unstable();
    fdes
}
