//! Files to serve: installed programs, each again under build-IDs of its own.
//!
//! # Why this shape
//! Files made up would compress as no program does, and few machines have 2,000 programs of the sizes wanted. So
//! each file is an installed program with 20 other bytes in its note, which is all that both servers look at.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest, Sha256};

/// Where programs are looked for.
const FOLDERS: [&str; 2] = ["/usr/bin", "/usr/sbin"];
/// Start of the note that holds a build-ID of 20 bytes: sizes of name and content, type, name.
const NOTE: [u8; 16] = *b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0";
const ID_BYTES: usize = 20;

/// A file and its name.
pub(crate) struct Served {
    pub(crate) build_id: String,
    pub(crate) content: Vec<u8>,
}

impl Served {
    /// `content` under the build-ID that `number` gives.
    fn new(mut content: Vec<u8>, number: usize) -> Result<Self> {
        let at = content.windows(NOTE.len()).position(|found| found == NOTE).context("no build-ID")?;
        let at = at + NOTE.len();
        let hash = Sha256::digest(format!("build {number}"));
        let place = content.get_mut(at..at + ID_BYTES).context("a note cut short")?;
        place.copy_from_slice(&hash[..ID_BYTES]);
        let build_id = hex(&hash[..ID_BYTES]);
        Ok(Self { build_id, content })
    }

    pub(crate) fn sha256(&self) -> String {
        hex(&Sha256::digest(&self.content))
    }

    /// `/buildid/ID/`.
    pub(crate) fn path(&self, what: &str) -> String {
        format!("/buildid/{}/{what}", self.build_id)
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the rows ask for.
pub(crate) struct Files {
    /// One of about 100 KB.
    pub(crate) usual: Served,
    /// 288 of 30 to 200 KB.
    pub(crate) mixed: Vec<Served>,
    /// 2,000 small ones.
    pub(crate) many: Vec<Served>,
    /// One of 60 MB.
    pub(crate) large: Served,
    /// Programs as a build leaves them.
    pub(crate) built: Vec<Served>,
}

impl Files {
    /// `built` are programs with debug information.
    pub(crate) fn collect(built: &[PathBuf]) -> Result<Self> {
        let programs = programs()?;
        let within = |sizes: std::ops::Range<u64>| -> Vec<&Path> {
            programs.iter().filter(|(size, _)| sizes.contains(size)).map(|(_, path)| path.as_path()).collect()
        };
        let mut number = 0;
        let mut take = |paths: &[&Path], count: usize| -> Result<Vec<Served>> {
            ensure!(!paths.is_empty(), "too few programs in {FOLDERS:?}");
            let spread = paths.len().max(count);
            (0..count)
                .map(|at| {
                    number += 1;
                    let path = paths[at * spread / count % paths.len()];
                    Served::new(std::fs::read(path)?, number)
                })
                .collect()
        };
        let (all, small) = (within(30_000..200_000), within(10_000..40_000));
        let usual = take(&within(95_000..110_000), 1)?.remove(0);
        let (mixed, many) = (take(&all, 288)?, take(&small, 2000)?);
        let paths: Vec<&Path> = built.iter().map(PathBuf::as_path).collect();
        let built = take(&paths, paths.len())?;
        let first = usual.content.clone();
        let large = Served::new(large(first, &paths)?, usize::MAX)?;
        Ok(Self { usual, mixed, many, large, built })
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Served> {
        [&self.usual, &self.large].into_iter().chain(&self.mixed).chain(&self.many).chain(&self.built)
    }
}

/// 60 MB of programs one behind the other; to whoever reads it as ELF it is the first of them.
fn large(first: Vec<u8>, paths: &[&Path]) -> Result<Vec<u8>> {
    const BYTES: usize = 60_000_000;
    let mut content = first;
    for path in paths.iter().cycle() {
        content.extend(std::fs::read(path)?);
        if content.len() >= BYTES {
            break;
        }
    }
    content.truncate(BYTES);
    Ok(content)
}

/// Installed programs that have a build-ID, with their sizes, in order of both.
fn programs() -> Result<Vec<(u64, PathBuf)>> {
    let mut programs = Vec::new();
    for entry in FOLDERS.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten() {
        let path = entry?.path();
        let size = std::fs::symlink_metadata(&path)?.len();
        if !(10_000..200_000).contains(&size) {
            continue;
        }
        let Ok(content) = std::fs::read(&path) else { continue };
        let is_elf = content.starts_with(b"\x7fELF");
        if is_elf && content.windows(NOTE.len()).any(|found| found == NOTE) {
            programs.push((size, path));
        }
    }
    programs.sort();
    Ok(programs)
}
