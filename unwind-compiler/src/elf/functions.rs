//! Where an image's functions start, by what the toolchain wrote for others to call.

use std::ops::Range;

use object::LittleEndian;
use object::elf::{self, Rela64, Sym64};
use object::read::elf::{SectionHeader, Sym};
use windlass_schema::Architecture;

use super::{Image, LE};
use crate::code_bytes::CodeBytes;
use crate::recognise::Starts;

/// Most sections of one kind that are read. Linkers write one to three.
const MAX_SECTIONS: usize = 8;

impl<'a> Image<'a> {
    /// The bytes of its code that are final: skeletons have those that no CFI covers; files that are not linked yet have
    /// none. Sections may name bytes of the file many times; they are taken as long as there are no more than the
    /// file has.
    pub(crate) fn code_bytes(&self) -> CodeBytes<'a> {
        let mut left = self.file.len();
        let is_final = |range: &Range<u64>| !self.is_relocatable() && self.reaches(range);
        let pieces = self.code().filter(|(range, _)| is_final(range));
        let pieces = pieces.filter_map(|(range, bytes)| Some((range.start, bytes?)));
        let pieces = pieces.take_while(|(_, bytes)| {
            let taken = left.checked_sub(bytes.len());
            left = taken.unwrap_or(left);
            taken.is_some()
        });
        CodeBytes::new(pieces.collect()).of(self.code_sections().filter(is_final).collect())
    }

    /// Where code starts, of functions within `ranges`, which are sorted and disjoint.
    pub(crate) fn starts(&self, ranges: &[Range<u64>]) -> Starts {
        let is_within = |start: u64| {
            let behind = ranges.partition_point(|range| range.start <= start);
            behind > 0 && ranges[behind - 1].contains(&start)
        };
        let mut starts = Starts { process: self.entry, ..Starts::default() };
        let mut call = |start: u64| {
            if is_within(start) {
                starts.called.insert(start);
            }
        };
        for section in self.sections.iter() {
            // What crti.o begins and crtn.o ends (System V gABI, "Special Sections").
            if let Ok(b".init" | b".fini") = self.sections.section_name(LE, section) {
                call(section.sh_addr(LE));
            }
        }
        self.called_by_arrays(call);
        self.symbols(|start, bytes, is_global| {
            if let Some(end) = start.checked_add(bytes).filter(|_| is_within(start)) {
                // Of several ends the nearest: what lies behind may be another function.
                let known = starts.symbols.entry(start).or_insert(end);
                *known = end.min(*known);
                starts.global.extend(is_global.then_some(start));
            }
        });
        starts
    }

    /// Words of `.init_array` and its like, in the file or as relocations state them.
    fn called_by_arrays(&self, mut add: impl FnMut(u64)) {
        let is_array =
            |kind| matches!(kind, elf::SHT_INIT_ARRAY | elf::SHT_FINI_ARRAY | elf::SHT_PREINIT_ARRAY);
        let mut arrays: Vec<Range<u64>> = Vec::new();
        for section in self.sections.iter().filter(|section| is_array(section.sh_type(LE))).take(MAX_SECTIONS)
        {
            let Ok(words) = section.data(LE, self.file) else { continue };
            words.as_chunks().0.iter().for_each(|word| add(u64::from_le_bytes(*word)));
            let start = section.sh_addr(LE);
            arrays.push(start..start.saturating_add(section.sh_size(LE)));
        }
        let relative = match self.architecture {
            Architecture::X86_64 => elf::R_X86_64_RELATIVE,
            Architecture::Aarch64 => elf::R_AARCH64_RELATIVE,
        };
        for section in
            self.sections.iter().filter(|section| section.sh_type(LE) == elf::SHT_RELA).take(MAX_SECTIONS)
        {
            let entries = section.data_as_array::<Rela64<LittleEndian>, _>(LE, self.file).unwrap_or_default();
            for entry in entries {
                let place = entry.r_offset.get(LE);
                if entry.r_info.get(LE) == u64::from(relative.0)
                    && arrays.iter().any(|array| array.contains(&place))
                {
                    add(entry.r_addend.get(LE) as u64);
                }
            }
        }
    }

    /// The name that the definitions of symbols' versions give this image: that by which others ask for it.
    fn version_base(&self) -> Option<&'a [u8]> {
        let (mut versions, strings) = self.sections.gnu_verdef(LE, self.file).ok()??;
        let (base, mut names) = versions.next().ok()??;
        let strings = self.sections.strings(LE, self.file, strings).ok()?;
        let is_base = base.vd_flags.get(LE).contains(elf::VER_FLG_BASE);
        names.next().ok()?.filter(|_| is_base)?.name(LE, strings).ok()
    }

    /// The function that the dynamic symbol `name` is of, if this is the library `of` and defines it. Names of symbols are not looked
    /// at in any other: there are tens of thousands in some.
    pub(crate) fn dynamic_function(&self, of: &[u8], name: &[u8]) -> Option<Range<u64>> {
        if self.version_base() != Some(of) {
            return None;
        }
        let symbols = self.sections.symbols(LE, self.file, elf::SHT_DYNSYM).ok()?;
        let is_it = |symbol: &&Sym64<LittleEndian>| {
            symbol.st_type() == elf::STT_FUNC
                && symbol.st_shndx.get(LE) != elf::SHN_UNDEF
                && symbol.name(LE, symbols.strings()) == Ok(name)
        };
        let symbol = symbols.iter().find(is_it)?;
        let start = symbol.st_value(LE);
        Some(start..start.checked_add(symbol.st_size(LE))?)
    }

    /// Symbols of functions with a size, and whether other files may refer to them.
    fn symbols(&self, mut add: impl FnMut(u64, u64, bool)) {
        let is_table = |kind| matches!(kind, elf::SHT_SYMTAB | elf::SHT_DYNSYM);
        for section in self.sections.iter().filter(|section| is_table(section.sh_type(LE))).take(MAX_SECTIONS)
        {
            let symbols = section.data_as_array::<Sym64<LittleEndian>, _>(LE, self.file).unwrap_or_default();
            for symbol in symbols {
                let is_function = matches!(symbol.st_type(), elf::STT_FUNC | elf::STT_GNU_IFUNC);
                if is_function && symbol.st_shndx.get(LE) != elf::SHN_UNDEF && symbol.st_size(LE) > 0 {
                    let is_global = matches!(symbol.st_bind(), elf::STB_GLOBAL | elf::STB_WEAK);
                    add(symbol.st_value(LE), symbol.st_size(LE), is_global);
                }
            }
        }
    }
}
