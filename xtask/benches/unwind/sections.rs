//! What peers read of an image, and the least that reading it by gimli costs.

use std::ops::Range;

use gimli::{
    BaseAddresses, CieOrFde, EhFrame, EndianSlice, FrameDescriptionEntry, LittleEndian, UnwindContext,
    UnwindSection as _,
};
use object::{Object as _, ObjectSection as _};

/// A section's bytes and its address.
#[derive(Clone, Copy, Default)]
pub(crate) struct Section<'a> {
    pub(crate) data: &'a [u8],
    pub(crate) address: u64,
}

impl Section<'_> {
    pub(crate) fn range(&self) -> Range<u64> {
        self.address..self.address + self.data.len() as u64
    }
}

/// The sections of an image that unwinders read. All but `.eh_frame` may be empty.
pub(crate) struct Sections<'a> {
    pub(crate) eh_frame: Section<'a>,
    pub(crate) eh_frame_hdr: Section<'a>,
    pub(crate) text: Section<'a>,
    pub(crate) got: Section<'a>,
}

pub(crate) type Reader<'a> = EndianSlice<'a, LittleEndian>;

impl<'a> Sections<'a> {
    /// `None` for what is no ELF file or has no `.eh_frame`.
    pub(crate) fn of(elf: &'a [u8]) -> Option<Self> {
        let file = object::File::parse(elf).ok()?;
        let section = |name| {
            let section = file.section_by_name(name)?;
            Some(Section { data: section.data().ok()?, address: section.address() })
        };
        Some(Self {
            eh_frame: section(".eh_frame").filter(|section| !section.data.is_empty())?,
            eh_frame_hdr: section(".eh_frame_hdr").unwrap_or_default(),
            text: section(".text").unwrap_or_default(),
            got: section(".got").unwrap_or_default(),
        })
    }

    pub(crate) fn bases(&self) -> BaseAddresses {
        BaseAddresses::default()
            .set_eh_frame(self.eh_frame.address)
            .set_eh_frame_hdr(self.eh_frame_hdr.address)
            .set_text(self.text.address)
            .set_got(self.got.address)
    }

    /// The same sections with other bytes of `.eh_frame`.
    pub(crate) fn with_eh_frame<'b>(&self, data: &'b [u8]) -> Sections<'b>
    where
        'a: 'b,
    {
        Sections {
            eh_frame: Section { data, ..self.eh_frame },
            eh_frame_hdr: self.eh_frame_hdr,
            text: self.text,
            got: self.got,
        }
    }

    /// Iterates over the rows of every FDE, keeps nothing, and counts them; broken FDEs are passed over. It is
    /// what any compiler on gimli does before it does anything of its own.
    pub(crate) fn iterate_rows(&self) -> u64 {
        let (section, bases) = (EhFrame::new(self.eh_frame.data, LittleEndian), self.bases());
        let (mut context, mut rows) = (UnwindContext::new(), 0);
        self.for_each_fde(|fde| {
            let Ok(mut table) = fde.rows(&section, &bases, &mut context) else { return };
            while let Ok(Some(row)) = table.next_row() {
                std::hint::black_box(row);
                rows += 1;
            }
        });
        rows
    }

    /// The addresses that each FDE covers.
    pub(crate) fn code(&self) -> Vec<Range<u64>> {
        let mut ranges = Vec::new();
        self.for_each_fde(|fde| ranges.push(fde.initial_address()..fde.end_address()));
        ranges
    }

    fn for_each_fde(&self, mut visit: impl FnMut(&FrameDescriptionEntry<Reader<'a>>)) {
        let (section, bases) = (EhFrame::new(self.eh_frame.data, LittleEndian), self.bases());
        let mut entries = section.entries(&bases);
        while let Ok(Some(entry)) = entries.next() {
            let CieOrFde::Fde(partial) = entry else { continue };
            let fde = partial.parse(|section, bases, offset| section.cie_from_offset(bases, offset));
            if let Ok(fde) = fde {
                visit(&fde);
            }
        }
    }
}
