//! Files that belong to an ELF file and lie elsewhere, as debuggers look for them.
//!
//! | what | where | tied by |
//! |---|---|---|
//! | debug file | `.build-id/xx/yyyy.debug` in a debug folder; by `.gnu_debuglink` beside the file, in `.debug/`, and under the debug folder by the file's own path | build-ID |
//! | supplementary file (dwz) | `.gnu_debugaltlink`, relative to the file; `.build-id/` and `.dwz/` of a debug folder | its own build-ID, which the link states |
//! | `.dwp` | beside the file, by its name | name |
//! | `.dwo` | DW_AT_dwo_name of a skeleton unit, in DW_AT_comp_dir; then relative to the file, then beside it | the unit's ID |
//!
//! (gdb, "Debugging Information in Separate Files"; DWARF 5, 7.3.) A debug file is taken by its build-ID alone: the
//! checksum of `.gnu_debuglink` proves less, and what has no build-ID the service could not tie to anything.

use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use object::Object as _;
use windlass_schema::BuildId;

use super::elf_file::{ElfFile, Owner};

/// Where distributions install debug files.
pub(crate) const DEBUG_DIR: &str = "/usr/lib/debug";

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum What {
    /// The debug file of a build-ID.
    Debug(BuildId),
    /// What dwz took out of several debug files, by its build-ID.
    Supplementary(BuildId),
    /// All split units of the file.
    Package,
    /// One split unit, by its ID.
    Unit(u64),
}

/// A file that would belong to another, and the places to look for it, the best first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Companion {
    pub(crate) what: What,
    pub(crate) places: Vec<PathBuf>,
}

/// What could belong to the file at `path` with the content `elf`.
pub(crate) fn of(path: &Path, elf: &[u8], note: Option<BuildId>, debug_dirs: &[PathBuf]) -> Vec<Companion> {
    let Ok(file) = object::File::parse(elf) else { return Vec::new() };
    let mut companions = Vec::new();
    let folder = path.parent().unwrap_or(Path::new(""));
    if let Some(id) = note {
        companions
            .push(Companion { what: What::Debug(id), places: debug_places(path, &file, id, debug_dirs) });
    }
    // What was stripped may have the link still, and no use for it.
    let has_debug_info = windlass_symbol_index::describe(elf).is_ok_and(|contents| contents.debug_info);
    if has_debug_info
        && let Ok(Some((name, id))) = file.gnu_debugaltlink()
        && let Ok(id) = BuildId::new(id)
    {
        let name = Path::new(std::ffi::OsStr::from_bytes(name));
        let mut places = vec![folder.join(name)];
        for debug_dir in debug_dirs {
            places.push(by_build_id(debug_dir, id));
            places.extend(name.file_name().map(|base| debug_dir.join(".dwz").join(base)));
        }
        companions.push(Companion { what: What::Supplementary(id), places });
    }
    let units = windlass_symbol_index::split_units(elf).unwrap_or_default();
    if !units.is_empty() {
        companions.push(Companion { what: What::Package, places: packages(path) });
    }
    for unit in units {
        let name = Path::new(&unit.name);
        let mut places = vec![Path::new(&unit.compiled_in).join(name), folder.join(name)];
        places.extend(name.file_name().map(|base| folder.join(base)));
        companions.push(Companion { what: What::Unit(unit.id), places });
    }
    companions
}

fn debug_places(path: &Path, file: &object::File<'_>, id: BuildId, debug_dirs: &[PathBuf]) -> Vec<PathBuf> {
    let mut places: Vec<_> = debug_dirs.iter().map(|debug_dir| by_build_id(debug_dir, id)).collect();
    let folder = path.parent().unwrap_or(Path::new(""));
    if let Ok(Some((name, _))) = file.gnu_debuglink()
        && let Some(name) = Path::new(std::ffi::OsStr::from_bytes(name)).file_name()
    {
        places.extend([folder.join(name), folder.join(".debug").join(name)]);
        if let Ok(absolute) = folder.canonicalize()
            && let Ok(relative) = absolute.strip_prefix("/")
        {
            places.extend(debug_dirs.iter().map(|debug_dir| debug_dir.join(relative).join(name)));
        }
    }
    places.retain(|place| place != path);
    places
}

/// `DIR/.build-id/xx/yyyy.debug`.
fn by_build_id(debug_dir: &Path, id: BuildId) -> PathBuf {
    let id = id.to_string();
    let (first, rest) = id.split_at(2);
    debug_dir.join(".build-id").join(first).join(format!("{rest}.debug"))
}

/// `FILE.dwp`, and for `FILE.debug` the package of `FILE` too.
fn packages(path: &Path) -> Vec<PathBuf> {
    let with_dwp = |path: &Path| {
        let mut name = path.as_os_str().to_owned();
        name.push(".dwp");
        PathBuf::from(name)
    };
    let mut places = vec![with_dwp(path)];
    if path.extension().is_some_and(|extension| extension == "debug") {
        places.push(with_dwp(&path.with_extension("")));
    }
    places
}

/// The first of the companion's places where it is: checked against what ties it.
pub(crate) fn find(companion: &Companion, owner: Owner) -> Option<Found> {
    companion.places.iter().find_map(|place| {
        let file = File::open(place).ok().filter(|file| file.metadata().is_ok_and(|it| it.is_file()))?;
        let elf = crate::mapped_elf::read_or_map(&file).ok()?;
        let is_it = match companion.what {
            What::Debug(id) | What::Supplementary(id) => {
                let parsed = object::File::parse(&elf[..]).ok()?;
                parsed.build_id().ok()? == Some(id.as_bytes())
            }
            What::Package => {
                let parsed = object::File::parse(&elf[..]).ok()?;
                parsed.section_by_name(".debug_cu_index").is_some()
            }
            What::Unit(id) => windlass_symbol_index::split_unit_ids(&elf).ok()?.contains(&id),
        };
        if !is_it {
            return None;
        }
        let split = match companion.what {
            What::Debug(_) | What::Supplementary(_) => None,
            What::Package => Some(ElfFile::split(place, &file, owner, None).ok()?),
            What::Unit(id) => Some(ElfFile::split(place, &file, owner, Some(id)).ok()?),
        };
        Some(Found { path: place.clone(), split })
    })
}

/// Where a companion is, and, of split DWARF, what is sent of it.
pub(crate) struct Found {
    pub(crate) path: PathBuf,
    pub(crate) split: Option<ElfFile>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_follow_the_debuggers() {
        let elf = std::fs::read("../fixtures/elf/inlined.stripped").unwrap();
        let id: BuildId = "abcd1234".parse().unwrap();
        let companions = of(Path::new("bin/inlined.stripped"), &elf, Some(id), &["/debug".into()]);
        assert_eq!(companions[0].what, What::Debug(id));
        assert_eq!(companions[0].places[0], Path::new("/debug/.build-id/ab/cd1234.debug"));
        assert_eq!(packages(Path::new("a/b.debug")), [Path::new("a/b.debug.dwp"), Path::new("a/b.dwp")]);
        assert_eq!(packages(Path::new("a/b")), [Path::new("a/b.dwp")]);
        assert!(of(Path::new("x"), b"no elf", Some(id), &[]).is_empty());
    }
}
