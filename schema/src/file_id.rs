//! The OpenTelemetry file ID (`htlhash`): the name of an image that has no GNU build-ID note.
//!
//! Agent, service and uploader must come to the same ID, so the definition is here once, over whatever
//! reads the file: its ends and its length are enough, which makes an ID of a large file cheap.
//!
//! ```text
//! block = min(length, 4096)
//! ID    = SHA-256(first `block` bytes, last `block` bytes, length as big-endian u64)[..16]
//! ```
//! Of a file shorter than two blocks, some or all bytes count twice. Defined by `process.executable.build_id.htlhash`
//! of OpenTelemetry's semantic conventions.

use std::convert::Infallible;

use sha2::{Digest as _, Sha256};

use crate::BuildId;

/// Length of a file ID in bytes.
pub const FILE_ID_BYTES: usize = 16;

/// Most bytes that count at each end of a file.
const BLOCK_BYTES: u64 = 4096;

/// The file ID of `content`.
///
/// ```
/// # use windlass_schema::file_id;
/// assert_eq!(file_id::htlhash(b"abc").to_string(), "a7e79e8a85da69bad5c3fea209342ac9");
/// ```
pub fn htlhash(content: &[u8]) -> BuildId {
    // The range is inside `content`, so its numbers fit.
    let read = |offset: u64, size: u64| Ok(&content[offset as usize..(offset + size) as usize]);
    htlhash_with(content.len() as u64, read).unwrap_or_else(|never: Infallible| match never {})
}

/// The file ID of a file of `length` bytes, of which `read` gives as many as asked for from an offset on; the first
/// error of `read` otherwise.
pub fn htlhash_with<'a, E>(
    length: u64,
    mut read: impl FnMut(u64, u64) -> Result<&'a [u8], E>,
) -> Result<BuildId, E> {
    let block = length.min(BLOCK_BYTES);
    let digest = Sha256::new()
        .chain_update(read(0, block)?)
        .chain_update(read(length - block, block)?)
        .chain_update(length.to_be_bytes())
        .finalize();
    Ok(BuildId::new(&digest[..FILE_ID_BYTES]).expect("16 bytes are a legal length"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected values: Python's hashlib over `first + last + struct.pack(">Q", length)`.
    #[track_caller]
    fn check(content: &[u8], expect: &str) {
        assert_eq!(htlhash(content).to_string(), expect);
    }

    #[test]
    fn vectors() {
        let counted: Vec<u8> = (0..10_000_u32).map(|at| at as u8).collect();
        check(b"", "af5570f5a1810b7af78caf4bc70a660f");
        check(b"abc", "a7e79e8a85da69bad5c3fea209342ac9");
        check(&counted[..4096], "85cb3aa4a10dc6668d6bf0c5802e9150");
        check(&counted[..5000], "fb14ff4fb9f5898784db33cca8fc3173");
        check(&counted, "978d635ecf2bdf15d106915edbfcbc6f");
    }

    #[test]
    fn ends_and_length_count() {
        let mut long = vec![7; 10_000];
        let before = htlhash(&long);
        long[5000] = 8;
        assert_eq!(htlhash(&long), before, "the middle does not");
        for at in [0, 4095, 10_000 - 4096, 9999] {
            let mut other = long.clone();
            other[at] = 8;
            assert_ne!(htlhash(&other), before, "byte {at}");
        }
        assert_ne!(htlhash(&[7; 10_001]), before);
    }

    #[test]
    fn what_cannot_be_read_has_no_id() {
        assert_eq!(
            htlhash_with(10_000, |offset, _| if offset == 0 { Ok(b"") } else { Err(offset) }),
            Err(5904)
        );
    }
}
