//! Which source files line tables name.
//!
//! The paths are put together as debuggers do (DWARF 5, 6.2.4.1: a name that is not absolute is in its directory, that
//! one in the compilation directory), and nothing is opened here: whether such a file may be sent anywhere is
//! for who reads it to decide. The hashes of DWARF 5 tell whether it is still what was compiled.

use std::collections::{BTreeMap, HashSet};

use gimli::{AbbreviationsCacheStrategy, AttributeValue, LineProgramHeader, Unit};

use crate::debug_sections::DebugSections;
use crate::dwarf::{Reader, guarded};
use crate::elf::{ElfError, Image};

/// Most files named by one ELF file that are told. A Linux kernel names some 60,000.
const MAX_SOURCES: usize = 1_000_000;

/// A source file, as line tables name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedSource {
    /// Joined with its directory and the compilation directory; relative if all of them are.
    pub path: String,
    /// MD5 of the file as it was compiled, where the compiler wrote it.
    pub md5: Option<[u8; 16]>,
}

/// The files that the line tables of `elf` name, by path. Broken DWARF names what it can.
pub fn named_sources(elf: &[u8]) -> Result<Vec<NamedSource>, ElfError> {
    let image = Image::parse(elf)?;
    let named = guarded(|| {
        let Ok(sections) = DebugSections::load(&image) else { return BTreeMap::new() };
        collect(&mut sections.dwarf())
    });
    let named = named.unwrap_or_default().into_iter();
    Ok(named.map(|(path, md5)| NamedSource { path, md5 }).collect())
}

fn collect(dwarf: &mut gimli::Dwarf<Reader<'_>>) -> BTreeMap<String, Option<[u8; 16]>> {
    dwarf.populate_abbreviations_cache(AbbreviationsCacheStrategy::Duplicates);
    let mut named = BTreeMap::new();
    // Type units have the line table of the unit they came from.
    let mut seen = HashSet::new();
    let mut units = dwarf.units();
    while let Ok(Some(header)) = units.next() {
        let Ok(unit) = dwarf.unit(header) else { continue };
        let Some(program) = unit.line_program.as_ref().map(|program| program.header()) else { continue };
        if seen.insert(program.offset().0) {
            add_files(dwarf, &unit, program, &mut named);
        }
        if named.len() >= MAX_SOURCES {
            break;
        }
    }
    named
}

fn add_files<'a>(
    dwarf: &gimli::Dwarf<Reader<'a>>,
    unit: &Unit<Reader<'a>>,
    program: &LineProgramHeader<Reader<'a>>,
    named: &mut BTreeMap<String, Option<[u8; 16]>>,
) {
    let text = |value: AttributeValue<Reader<'a>>| {
        dwarf.attr_string(unit, value).ok().map(|text| text.to_string_lossy().into_owned())
    };
    let compiled_in = unit.comp_dir.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
    for file in program.file_names() {
        let Some(name) = text(file.path_name()).filter(|name| !name.is_empty()) else { continue };
        let folder = file.directory(program).and_then(text).unwrap_or_default();
        let path = joined(&joined(&compiled_in, &folder), &name);
        let md5 = program.file_has_md5().then(|| *file.md5()).filter(|md5| *md5 != [0; 16]);
        named.entry(path).and_modify(|known| *known = known.or(md5)).or_insert(md5);
    }
}

fn joined(folder: &str, name: &str) -> String {
    if folder.is_empty() || name.starts_with('/') {
        return name.to_owned();
    }
    if name.is_empty() {
        return folder.to_owned();
    }
    format!("{}/{name}", folder.trim_end_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_joined_up_to_the_first_absolute_one() {
        for (folder, name, expect) in [
            ("/build", "a.c", "/build/a.c"),
            ("/build/", "./a.c", "/build/./a.c"),
            ("/build", "/src/a.c", "/src/a.c"),
            ("", "a.c", "a.c"),
            ("/", "a.c", "/a.c"),
            ("/build", "", "/build"),
        ] {
            assert_eq!(joined(folder, name), expect);
        }
    }

    #[test]
    fn this_test_names_this_file() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let named = named_sources(&own).unwrap();
        assert!(named.iter().any(|source| source.path.ends_with("src/source_names.rs")), "{}", named.len());
        assert!(named_sources(b"no elf").is_err());
    }
}
