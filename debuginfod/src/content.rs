//! How the bytes of a content are read without holding them: a few at a time, where they lie.
//!
//! A mapping is the easy way, and counts: whoever hashes a mapped file of 4 GB has 4 GB resident. Uploads are checked
//! and stored through this trait, so that their size costs disk, not memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;

/// Bytes that are read where they lie.
pub trait Content {
    /// How many there are.
    fn size(&self) -> u64;

    /// Fills `buffer` with the bytes from `offset` on, all of which must be there.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl Content for [u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = usize::try_from(offset).ok().and_then(|start| self.get(start..)?.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl Content for Vec<u8> {
    fn size(&self) -> u64 {
        self[..].size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self[..].read_at(buffer, offset)
    }
}

impl Content for Bytes {
    fn size(&self) -> u64 {
        self[..].size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self[..].read_at(buffer, offset)
    }
}

impl<C: Content + ?Sized> Content for Arc<C> {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_at(buffer, offset)
    }
}

/// A file that nobody else writes to, and its size.
#[derive(Debug)]
pub struct FileContent {
    file: File,
    size: u64,
}

impl FileContent {
    /// Takes a file of `size` bytes.
    pub fn new(file: File, size: u64) -> Self {
        Self { file, size }
    }
}

impl Content for FileContent {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
}

/// Reads a content in order.
pub struct ContentReader<'c, C: ?Sized> {
    content: &'c C,
    at: u64,
}

impl<'c, C: Content + ?Sized> ContentReader<'c, C> {
    /// From its beginning.
    pub fn new(content: &'c C) -> Self {
        Self { content, at: 0 }
    }
}

impl<C: Content + ?Sized> io::Read for ContentReader<'_, C> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.content.size() - self.at;
        let count = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        self.content.read_at(&mut buffer[..count], self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[test]
    fn files_and_bytes_read_alike() {
        let bytes: Vec<u8> = (0..=255).collect();
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(&bytes).expect("room for 256 bytes");
        let file = FileContent::new(file, 256);
        for content in [&file as &dyn Content, &bytes] {
            let mut part = [0; 4];
            content.read_at(&mut part, 252).expect("inside");
            assert_eq!(part, [252, 253, 254, 255]);
            assert!(content.read_at(&mut part, 253).is_err());
            assert!(content.read_at(&mut part, u64::MAX).is_err());
            let mut whole = Vec::new();
            ContentReader::new(content).read_to_end(&mut whole).expect("all inside");
            assert_eq!(whole, bytes);
        }
    }
}
