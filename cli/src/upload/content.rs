//! The bytes of what is sent: a file, or what is made of it, read piece by piece when they are needed.
//!
//! A debug file that is split off is a list of pieces of the program it comes from, so that neither a copy on the disk nor
//! one in memory is needed, and each part of it can be read again after a broken connection. What was asked for by its
//! hash has to be what is sent: a file that changed since it was read ends the sending with that reason.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::debug_part::Piece;

/// Bytes hashed at a time.
const HASH_STEP_BYTES: usize = 256 << 10;

/// What tells whether a file is still the same: where it is, how long, and when it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified_ns: i128,
}

impl Stamp {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified_ns: i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec()),
        }
    }

    /// Which file it is, whatever is in it.
    pub(crate) fn file(&self) -> (u64, u64) {
        (self.device, self.inode)
    }
}

/// How the bytes are had from the file.
#[derive(Clone, Debug)]
enum Making {
    Whole,
    Pieces(Arc<[Piece]>),
    /// Cut from the file again when it is sent: it is as large as symbols are.
    Skeleton,
}

/// Bytes to send.
#[derive(Clone, Debug)]
pub(crate) struct Content {
    pub(crate) path: PathBuf,
    /// Lower-case hex.
    pub(crate) sha256: String,
    pub(crate) size_bytes: u64,
    stamp: Stamp,
    making: Making,
}

impl Content {
    /// The file itself.
    pub(crate) fn whole(path: &Path, file: &File) -> io::Result<Self> {
        Self::new(path, file, Making::Whole)
    }

    /// Pieces of it.
    pub(crate) fn pieces(path: &Path, file: &File, pieces: Vec<Piece>) -> io::Result<Self> {
        Self::new(path, file, Making::Pieces(pieces.into()))
    }

    /// Its skeleton, which is `skeleton`.
    pub(crate) fn skeleton(path: &Path, file: &File, skeleton: &[u8]) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            sha256: hex(&Sha256::digest(skeleton)),
            size_bytes: skeleton.len() as u64,
            stamp: Stamp::of(&file.metadata()?),
            making: Making::Skeleton,
        })
    }

    fn new(path: &Path, file: &File, making: Making) -> io::Result<Self> {
        let stamp = Stamp::of(&file.metadata()?);
        let mut content =
            Self { path: path.to_owned(), sha256: String::new(), size_bytes: stamp.size, stamp, making };
        if let Making::Pieces(pieces) = &content.making {
            content.size_bytes = pieces.iter().map(Piece::size).sum();
        }
        let mut reader = content.read(0..content.size_bytes)?;
        let (mut hasher, mut buffer) = (Sha256::new(), vec![0; HASH_STEP_BYTES]);
        loop {
            match reader.read(&mut buffer)? {
                0 => break,
                read => hasher.update(&buffer[..read]),
            }
        }
        content.sha256 = hex(&hasher.finalize());
        Ok(content)
    }

    pub(crate) fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// Opens the bytes of `range`.
    pub(crate) fn read(&self, range: Range<u64>) -> io::Result<ContentReader> {
        let file = File::open(&self.path)?;
        self.check(&file)?;
        let pieces: Arc<[Piece]> = match &self.making {
            Making::Whole => [Piece::File(0..self.size_bytes)].into(),
            Making::Pieces(pieces) => Arc::clone(pieces),
            Making::Skeleton => {
                let elf = crate::mapped_elf::read_or_map(&file)?;
                let skeleton = windlass_agent::skeleton::skeleton(&elf[..]).map_err(io::Error::other)?;
                [Piece::Bytes(skeleton)].into()
            }
        };
        Ok(ContentReader { content: self.clone(), file, pieces, range })
    }

    fn check(&self, file: &File) -> io::Result<()> {
        if Stamp::of(&file.metadata()?) == self.stamp {
            return Ok(());
        }
        Err(io::Error::other("it changed since it was read; upload when the build is done"))
    }
}

/// Reads a part of a [`Content`]. The last read fails if the file is not what it was any more.
pub(crate) struct ContentReader {
    content: Content,
    file: File,
    pieces: Arc<[Piece]>,
    /// What is left.
    range: Range<u64>,
}

impl Read for ContentReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.range.is_empty() {
            self.content.check(&self.file)?;
            return Ok(0);
        }
        let mut piece_start = 0;
        for piece in self.pieces.iter() {
            let within = self.range.start - piece_start;
            if within >= piece.size() {
                piece_start += piece.size();
                continue;
            }
            let wanted = (piece.size() - within).min(self.range.end - self.range.start);
            let wanted = usize::try_from(wanted).unwrap_or(usize::MAX).min(buffer.len());
            let buffer = &mut buffer[..wanted];
            let read = match piece {
                Piece::Bytes(bytes) => (&bytes[within as usize..]).read(buffer)?,
                Piece::File(part) => self.file.read_at(buffer, part.start + within)?,
            };
            if read == 0 && wanted > 0 {
                return Err(io::Error::other("it was cut short since it was read"));
            }
            self.range.start += read as u64;
            return Ok(read);
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &Content, range: Range<u64>) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        content.read(range)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    #[test]
    fn any_part_of_pieces_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"0123456789").unwrap();
        let pieces = vec![Piece::Bytes(b"ab".to_vec()), Piece::File(3..6), Piece::File(9..10)];
        let content = Content::pieces(&path, &File::open(&path).unwrap(), pieces).unwrap();
        let whole = b"ab3459";
        assert_eq!(content.size_bytes, whole.len() as u64);
        assert_eq!(content.sha256, hex(&Sha256::digest(whole)));
        for start in 0..=whole.len() {
            for end in start..=whole.len() {
                assert_eq!(read(&content, start as u64..end as u64).unwrap(), &whole[start..end]);
            }
        }
    }

    #[test]
    fn a_file_that_changed_is_not_sent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"0123456789").unwrap();
        let content = Content::whole(&path, &File::open(&path).unwrap()).unwrap();
        let mut reader = content.read(0..10).unwrap();
        let mut half = [0; 5];
        reader.read_exact(&mut half).unwrap();
        std::fs::write(&path, b"01234").unwrap();
        let mut rest = Vec::new();
        assert!(reader.read_to_end(&mut rest).unwrap_err().to_string().contains("since it was read"));
        assert!(read(&content, 0..10).unwrap_err().to_string().contains("changed"));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read(&content, 0..10).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
