//! Which ELF files there are on this machine to measure.
//!
//! A corpus that somebody chose proves what it was chosen for. Here it is whatever is installed: every
//! executable and library below `/usr`, toolchains and interpreters in the home folder, and what
//! the environment adds. Each image counts once, however many names and copies it has.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use memmap2::Mmap;
use object::elf::{ELFCLASS64, ELFDATA2LSB, ELFMAG, ET_DYN, ET_EXEC, FileType};
use windlass_schema::{BuildId, file_id};
use windlass_unwind_compiler::build_id_of;

use crate::sections::Sections;

/// Names further folders and files of the corpus, with colons between them.
const MORE: &str = "WINDLASS_BENCH_CORPUS";
/// Folders below a variable's folder, or else below the home folder, that hold further images.
const HOMES: [(&str, &str, &str); 2] =
    [("RUSTUP_HOME", ".rustup", "toolchains"), ("PYENV_ROOT", ".pyenv", "versions")];
/// Bytes of an ELF header up to and with its type.
const HEADER_BYTES: usize = 18;

/// An image with an `.eh_frame`.
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) build_id: BuildId,
    elf: Mmap,
}

impl Image {
    /// Maps a file; `None` if it has no `.eh_frame`, as split debug files have none.
    pub(crate) fn open(path: &Path) -> Result<Option<Self>> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        // SAFETY: installed programs are replaced, not written to, while this runs.
        let elf = unsafe { Mmap::map(&file) }.with_context(|| format!("map {}", path.display()))?;
        if Sections::of(&elf).is_none() {
            return Ok(None);
        }
        let build_id = build_id_of(&elf).unwrap_or_else(|| file_id::htlhash(&elf));
        Ok(Some(Self { path: path.to_owned(), build_id, elf }))
    }

    pub(crate) fn elf(&self) -> &[u8] {
        &self.elf
    }

    pub(crate) fn sections(&self) -> Sections<'_> {
        Sections::of(&self.elf).expect("opened because it has them")
    }

    pub(crate) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

/// Every image, each once, in the order of the paths. Files that cannot be read are passed over.
pub(crate) fn images() -> Vec<Image> {
    let (mut files, mut build_ids) = (HashSet::new(), HashSet::new());
    let mut images = Vec::new();
    for root in roots() {
        let entries = walkdir::WalkDir::new(root).sort_by_file_name().into_iter().filter_map(Result::ok);
        for entry in entries.filter(|entry| entry.file_type().is_file()) {
            let Ok(metadata) = entry.metadata() else { continue };
            if !files.insert((metadata.dev(), metadata.ino())) || !is_linked_elf(entry.path()) {
                continue;
            }
            let Ok(Some(image)) = Image::open(entry.path()) else { continue };
            if build_ids.insert(image.build_id.as_bytes().to_vec()) {
                images.push(image);
            }
        }
    }
    images
}

/// Where to look, as far as it is there.
fn roots() -> Vec<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let homes = HOMES.map(|(variable, folder, below)| {
        std::env::var_os(variable).map_or_else(|| home.join(folder), PathBuf::from).join(below)
    });
    let more = std::env::var_os(MORE).unwrap_or_default();
    let more = std::env::split_paths(&more).filter(|path| !path.as_os_str().is_empty());
    std::iter::once(PathBuf::from("/usr")).chain(homes).chain(more).filter(|root| root.exists()).collect()
}

/// Whether a file is a 64-bit little-endian ELF file that a linker has placed: only these are mapped and run.
fn is_linked_elf(path: &Path) -> bool {
    let mut header = [0; HEADER_BYTES];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut header));
    let kind = u16::from_le_bytes([header[16], header[17]]);
    read.is_ok()
        && header[..4] == ELFMAG
        && (header[4], header[5]) == (ELFCLASS64.0, ELFDATA2LSB.0)
        && [ET_EXEC, ET_DYN].contains(&FileType(kind))
}
