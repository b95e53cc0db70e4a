//! What did a just-in-time compiler write down of its code?
//!
//! Two formats are in use: perf maps ([`crate::perf_map`]) and jitdump ([`crate::jitdump`]). Both are files that grow
//! while code is made, and are read here from where the last reading ended; both become the same records. Names stay
//! in the file: of ten thousand functions samples touch a hundred, and those are read again when they are needed.

use std::fs::File;
use std::io;

/// Bytes that can be read in any order: a file, or what stands for one in tests.
pub trait ReadAt {
    /// Reads at `offset`; fewer bytes than asked for only at the end.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Number of bytes now.
    fn size(&self) -> io::Result<u64>;
}

impl ReadAt for File {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        while filled < bytes.len() {
            match std::os::unix::fs::FileExt::read_at(self, &mut bytes[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl ReadAt for [u8] {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|start| self.get(start..)).unwrap_or_default();
        let read = rest.len().min(bytes.len());
        bytes[..read].copy_from_slice(&rest[..read]);
        Ok(read)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

/// Something that a compiler did with memory from `start` to `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// First process address.
    pub start: u64,
    /// First process address behind it; above `start`.
    pub end: u64,
    /// When: `CLOCK_MONOTONIC` in nanoseconds, if the format says.
    pub time_ns: Option<u64>,
    /// What.
    pub event: CodeEvent,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeEvent {
    /// Code was put there. Its name is in the record at this offset of the file.
    Made {
        /// In bytes.
        record_at: u64,
    },
    /// Code was moved there from another start.
    Moved {
        /// Where it was.
        from: u64,
    },
}

/// How far a reading came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Everything that was there has been read.
    CaughtUp,
    /// There is more.
    More,
}

/// A file is not read any further.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// The file.
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    /// The file was cut, or written anew.
    #[error("was cut")]
    Cut,
    /// More than is kept of one process.
    #[error("exceeds {limit} {what}")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// It is no jitdump, or one that says nothing of use.
    #[error("is no usable jitdump: {0}")]
    Jitdump(&'static str),
}
