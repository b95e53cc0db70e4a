//! Split DWARF (DWARF 5, 7.3.2): which units have their debug information in other files, and which units such a file has.
//!
//! A skeleton unit names its `.dwo` file by DW_AT_dwo_name, relative to DW_AT_comp_dir, and an ID of 64 bits ties both
//! (version 5: in the unit's header; GCC and LLVM before: DW_AT_GNU_dwo_name and DW_AT_GNU_dwo_id). `.dwp`
//! files, which have many of them, are found by the name of the executable alone.

use gimli::{AbbreviationsCacheStrategy, DwarfFileType, UnitType};

use crate::debug_sections::DebugSections;
use crate::dwarf::{Reader, guarded};
use crate::elf::{ElfError, Image};

/// Most units told of one file. Chromium has some 50,000.
const MAX_UNITS: usize = 1_000_000;

/// A unit whose debug information is in another file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitUnit {
    /// What ties it to the unit in that file.
    pub id: u64,
    /// The file, absolute or relative to the compilation directory.
    pub name: String,
    /// The compilation directory.
    pub compiled_in: String,
}

/// The units of `elf` whose debug information is elsewhere.
pub fn split_units(elf: &[u8]) -> Result<Vec<SplitUnit>, ElfError> {
    let image = Image::parse(elf)?;
    let units = guarded(|| {
        let Ok(sections) = DebugSections::load(&image) else { return Vec::new() };
        let mut units = Vec::new();
        each_unit(sections.dwarf(), |dwarf, unit| {
            let name = unit.dwo_name().ok().flatten().and_then(|name| dwarf.attr_string(unit, name).ok());
            if let (Some(id), Some(name)) = (unit.dwo_id, name) {
                let compiled_in = unit.comp_dir.map(|path| path.to_string_lossy().into_owned());
                units.push(SplitUnit {
                    id: id.0,
                    name: name.to_string_lossy().into_owned(),
                    compiled_in: compiled_in.unwrap_or_default(),
                });
            }
            units.len() < MAX_UNITS
        });
        units
    });
    Ok(units.unwrap_or_default())
}

/// The IDs of the compilation units in `elf`, a `.dwo` file. None: it is no such file.
pub fn split_unit_ids(elf: &[u8]) -> Result<Vec<u64>, ElfError> {
    let image = Image::parse(elf)?;
    let ids = guarded(|| {
        let Ok(sections) = DebugSections::load_split(&image) else { return Vec::new() };
        let mut dwarf = sections.dwarf();
        dwarf.file_type = DwarfFileType::Dwo;
        let mut ids = Vec::new();
        each_unit(dwarf, |_, unit| {
            if !matches!(unit.header.type_(), UnitType::Type { .. } | UnitType::SplitType { .. }) {
                ids.extend(unit.dwo_id.map(|id| id.0));
            }
            ids.len() < MAX_UNITS
        });
        ids
    });
    Ok(ids.unwrap_or_default())
}

/// Shows each unit that can be read, until told that it is enough.
fn each_unit<'a>(
    mut dwarf: gimli::Dwarf<Reader<'a>>,
    mut show: impl FnMut(&gimli::Dwarf<Reader<'a>>, &gimli::Unit<Reader<'a>>) -> bool,
) {
    dwarf.populate_abbreviations_cache(AbbreviationsCacheStrategy::Duplicates);
    let mut units = dwarf.units();
    while let Ok(Some(header)) = units.next() {
        let Ok(unit) = dwarf.unit(header) else { continue };
        if !show(&dwarf, &unit) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_dwarf_has_no_split_units() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(split_unit_ids(&own), Ok(Vec::new()));
        assert!(split_units(&own).unwrap().is_empty());
        assert!(split_units(b"no elf").is_err());
    }
}
