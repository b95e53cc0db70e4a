//! What is the object of a content called, and what does a writer leave that is killed?
//!
//! `HASH-NUMBER`: the SHA-256 of the content and the number of the write in 16 hex digits. Objects of before there were numbers are
//! called `HASH`, and their number is 0. While it writes one, the local store has a file `HASH-NUMBER#N`.

use std::hash::{BuildHasher as _, RandomState};
use std::path::Path;
use std::time::UNIX_EPOCH;

use crate::content_hash::ContentHash;

/// An object of the store, on record or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredObject {
    /// The content that it should have.
    pub hash: ContentHash,
    /// Number of the write that made it.
    pub write: u64,
    /// Its size in bytes.
    pub stored_bytes: u64,
    /// When it was written by the store's clock, in seconds since 1970.
    pub written_s: u64,
}

/// Name of the object of a content's write.
pub(super) fn object_name(hash: ContentHash, write: u64) -> String {
    if write == 0 { hash.to_string() } else { format!("{hash}-{write:016x}") }
}

/// What [`object_name`] made.
pub(super) fn parse_object_name(name: &str) -> Option<(ContentHash, u64)> {
    let (hash, write) = match name.split_once('-') {
        None => (name.parse().ok()?, 0),
        Some((hash, write)) => (hash.parse().ok()?, u64::from_str_radix(write, 16).ok()?),
    };
    (object_name(hash, write) == name).then_some((hash, write))
}

/// A number for a write, which no other has: 63 random bits of those that the standard library's maps are seeded with.
pub(super) fn new_number() -> u64 {
    (RandomState::new().hash_one(std::process::id()) >> 1).max(1)
}

/// What the local store calls an object while it is written: its name, `#` and a number.
fn is_staging(name: &str) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    name.split_once('#').is_some_and(|(name, number)| parse_object_name(name).is_some() && is_number(number))
}

pub(super) fn remove_staging(root: &Path, until_s: u64, dry_run: bool) -> std::io::Result<(u64, u64)> {
    let (mut count, mut bytes) = (0, 0);
    for byte in 0..=u8::MAX {
        let files = match std::fs::read_dir(root.join(format!("{byte:02x}"))) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            files => files?,
        };
        for file in files {
            let file = file?;
            if !file.file_name().to_str().is_some_and(is_staging) {
                continue;
            }
            let meta = match file.metadata() {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue, // just finished
                meta => meta?,
            };
            let written = meta.modified()?.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            if written <= until_s {
                (count, bytes) = (count + 1, bytes + meta.len());
                if !dry_run {
                    std::fs::remove_file(file.path())?;
                }
            }
        }
    }
    Ok((count, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_told_by_their_names() {
        let hash = ContentHash::of(b"content");
        for write in [0, 1, 0x123, i64::MAX as u64] {
            let name = object_name(hash, write);
            assert_eq!(parse_object_name(&name), Some((hash, write)));
            assert!(is_staging(&format!("{name}#1")) && is_staging(&format!("{name}#207")));
            assert!(!is_staging(&name) && !is_staging(&format!("{name}#")));
        }
        for other in
            ["windlass-storage", "", &format!("{hash}-1"), &format!("{hash}-"), &format!("{hash}.gz")]
        {
            assert_eq!(parse_object_name(other), None, "{other}");
        }
        assert!(!is_staging("windlass-storage#1"));
    }

    #[test]
    fn no_two_writes_have_a_number() {
        let numbers: std::collections::HashSet<u64> = (0..10_000).map(|_| new_number()).collect();
        assert_eq!(numbers.len(), 10_000);
        assert!(numbers.iter().all(|number| (1..=i64::MAX as u64).contains(number)));
    }
}
