//! The stored form of a content: zstd in frames that can be decoded one by one.
//!
//! elfutils keeps files as the build left them, so that a section costs a seek, and pays for it in
//! disk space; the services that compress decode a whole file for one section. Here a content is cut
//! into frames of 256 KiB, so a range costs its frames only, and any zstd decoder still reads
//! the whole. The form is zstd's own "seekable format" (contrib/seekable_format), version 0.1.0:
//!
//! ```text
//! frame 0 | frame 1 | ... | skippable frame:
//!     u32  0x184D2A5E          magic of the skippable frame
//!     u32  8 * frames + 9      bytes that follow
//!     { u32 stored size, u32 decoded size } for each frame
//!     u32  frames
//!     u8   0                   no checksums here: each frame carries its own
//!     u32  0x8F92EAB1          magic of the seek table
//! ```
//! Numbers are little-endian. Each frame but the last decodes to exactly [`FRAME_BYTES`].

use std::ops::Range;

use zstd::bulk::{Compressor, Decompressor};

/// Decoded size of a frame in bytes: what one section or small range costs to read, against a loss
/// of about 2% in size to one frame for everything.
pub const FRAME_BYTES: u64 = 256 * 1024;
/// zstd's default: 300 MB/s a core, and within a fifth of what level 19 reaches.
const LEVEL: i32 = 3;
const SKIPPABLE_MAGIC: u32 = 0x184d_2a5e;
const SEEK_TABLE_MAGIC: u32 = 0x8f92_eab1;
const TABLE_FRAME_BYTES: u64 = 8 + 9;

/// Why bytes are no stored content.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SeekableError {
    /// The seek table contradicts itself or the sizes on record.
    #[error("malformed seek table: {0}")]
    Table(&'static str),
    /// A frame that zstd refuses, or that fails its checksum.
    #[error("frame {frame} does not decode: {why}")]
    Frame {
        /// Its number.
        frame: usize,
        /// What zstd says.
        why: String,
    },
}

/// Turns a content into its stored form, frame by frame.
pub struct FrameEncoder {
    compressor: Compressor<'static>,
    table: Vec<u8>,
    frames: u32,
}

impl FrameEncoder {
    /// An encoder that has seen nothing.
    pub fn new() -> std::io::Result<Self> {
        let mut compressor = Compressor::new(LEVEL)?;
        compressor.include_checksum(true)?;
        Ok(Self { compressor, table: Vec::new(), frames: 0 })
    }

    /// The frame for the next [`FRAME_BYTES`] of content, or fewer if they are the last.
    pub fn frame(&mut self, raw: &[u8]) -> std::io::Result<Vec<u8>> {
        let stored = self.compressor.compress(raw)?;
        self.table.extend((stored.len() as u32).to_le_bytes());
        self.table.extend((raw.len() as u32).to_le_bytes());
        self.frames += 1;
        Ok(stored)
    }

    /// The seek table, which ends the stored form.
    pub fn finish(self) -> Vec<u8> {
        let mut end = Vec::with_capacity(self.table.len() + TABLE_FRAME_BYTES as usize);
        end.extend(SKIPPABLE_MAGIC.to_le_bytes());
        end.extend((self.table.len() as u32 + 9).to_le_bytes());
        end.extend(self.table);
        end.extend(self.frames.to_le_bytes());
        end.push(0);
        end.extend(SEEK_TABLE_MAGIC.to_le_bytes());
        end
    }
}

/// Where the frames of a stored content lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeekTable {
    /// Stored offset of each frame, and the end of the last one.
    offsets: Vec<u64>,
    size: u64,
}

impl SeekTable {
    /// Size in bytes of the table of a content of `size` bytes, which ends its stored form.
    pub fn stored_bytes(size: u64) -> u64 {
        TABLE_FRAME_BYTES + 8 * size.div_ceil(FRAME_BYTES)
    }

    /// Reads `table`, the last [`SeekTable::stored_bytes`] of a stored form of `stored_size` bytes.
    pub fn parse(table: &[u8], size: u64, stored_size: u64) -> Result<Self, SeekableError> {
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(table.get(at..at.checked_add(4)?)?.try_into().ok()?))
        };
        let frames = size.div_ceil(FRAME_BYTES);
        if table.len() as u64 != Self::stored_bytes(size) {
            return Err(SeekableError::Table("length"));
        }
        let last = table.len();
        if word(0) != Some(SKIPPABLE_MAGIC)
            || word(last - 4) != Some(SEEK_TABLE_MAGIC)
            || table[last - 5] != 0
            || word(last - 9).map(u64::from) != Some(frames)
            || word(4).map(u64::from) != Some(8 * frames + 9)
        {
            return Err(SeekableError::Table("magic or count"));
        }
        let mut offsets = vec![0];
        let mut offset = 0;
        for (number, entry) in table[8..last - 9].chunks_exact(8).enumerate() {
            let [stored, decoded] = [0, 4].map(|at| {
                u64::from(u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]))
            });
            if decoded != FRAME_BYTES.min(size - number as u64 * FRAME_BYTES) {
                return Err(SeekableError::Table("decoded size of a frame"));
            }
            offset += stored;
            offsets.push(offset);
        }
        if offset + table.len() as u64 != stored_size {
            return Err(SeekableError::Table("stored sizes do not add up"));
        }
        Ok(Self { offsets, size })
    }

    /// Numbers of the frames that hold `range` of the content, which must lie inside it.
    pub fn frames(&self, range: &Range<u64>) -> Range<usize> {
        if range.is_empty() {
            return 0..0;
        }
        (range.start / FRAME_BYTES) as usize..range.end.div_ceil(FRAME_BYTES) as usize
    }

    /// Where `frames` lie in the stored form.
    pub fn stored_range(&self, frames: &Range<usize>) -> Range<u64> {
        self.offsets[frames.start]..self.offsets[frames.end]
    }

    /// Decodes `frames` from `stored`, the bytes of their [`SeekTable::stored_range`].
    pub fn decode(&self, frames: Range<usize>, stored: &[u8]) -> Result<Vec<u8>, SeekableError> {
        let fail = |frame: usize, why: &dyn ToString| SeekableError::Frame { frame, why: why.to_string() };
        let mut decoder = Decompressor::new().map_err(|e| fail(frames.start, &e))?;
        let base = self.offsets[frames.start];
        let mut content = Vec::with_capacity(frames.len() * FRAME_BYTES as usize);
        for frame in frames {
            let expected = FRAME_BYTES.min(self.size - frame as u64 * FRAME_BYTES) as usize;
            let range = (self.offsets[frame] - base) as usize..(self.offsets[frame + 1] - base) as usize;
            let bytes = stored.get(range).ok_or_else(|| fail(frame, &"cut short"))?;
            let raw = decoder.decompress(bytes, expected).map_err(|e| fail(frame, &e))?;
            if raw.len() != expected {
                return Err(fail(frame, &"decodes to another size"));
            }
            content.extend_from_slice(&raw);
        }
        Ok(content)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(content: &[u8]) -> Vec<u8> {
        let mut encoder = FrameEncoder::new().unwrap();
        let mut stored = Vec::new();
        for raw in content.chunks(FRAME_BYTES as usize) {
            stored.extend(encoder.frame(raw).unwrap());
        }
        stored.extend(encoder.finish());
        stored
    }

    fn table(stored: &[u8], size: usize) -> Result<SeekTable, SeekableError> {
        let bytes = SeekTable::stored_bytes(size as u64) as usize;
        SeekTable::parse(&stored[stored.len().saturating_sub(bytes)..], size as u64, stored.len() as u64)
    }

    fn sample(size: usize) -> Vec<u8> {
        (0..size).map(|at| (at / 7 % 251) as u8 ^ (at >> 13) as u8).collect()
    }

    #[test]
    fn a_stock_decoder_reads_the_whole() {
        for size in [0, 1, 262_143, 262_144, 262_145, 1_000_000] {
            let content = sample(size);
            let stored = encode(&content);
            assert_eq!(zstd::stream::decode_all(&stored[..]).unwrap(), content);
            let table = table(&stored, size).unwrap();
            let frames = table.frames(&(0..size as u64));
            let range = table.stored_range(&frames);
            assert_eq!(
                table.decode(frames, &stored[range.start as usize..range.end as usize]).unwrap(),
                content
            );
        }
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let content = sample(600_000);
        let stored = encode(&content);
        for at in (0..stored.len()).step_by(97).chain(stored.len() - 60..stored.len()) {
            let mut broken = stored.clone();
            broken[at] ^= 0x10;
            let decoded = table(&broken, content.len()).and_then(|table| {
                let frames = table.frames(&(0..content.len() as u64));
                let range = table.stored_range(&frames);
                table.decode(frames, &broken[range.start as usize..range.end as usize])
            });
            // A bit of a frame header that zstd ignores may change; the content may not.
            assert!(decoded.is_err() || decoded.as_deref() == Ok(&content[..]), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn any_range_decodes(size in 1usize..900_000, a in 0.0..1.0f64, b in 0.0..1.0f64) {
            let content = sample(size);
            let stored = encode(&content);
            let table = table(&stored, size).unwrap();
            let (a, b) = ((a * size as f64) as u64, (b * size as f64) as u64);
            let range = a.min(b)..a.max(b);
            let frames = table.frames(&range);
            let at = table.stored_range(&frames);
            let decoded = table.decode(frames.clone(), &stored[at.start as usize..at.end as usize]).unwrap();
            if !range.is_empty() {
                let skip = (range.start - frames.start as u64 * FRAME_BYTES) as usize;
                let len = (range.end - range.start) as usize;
                prop_assert_eq!(&decoded[skip..skip + len], &content[range.start as usize..range.end as usize]);
            }
        }
    }
}
