//! How much of an image's file is read into memory?
//!
//! What a file says of itself decides what is read of it, and anyone can map a file that says anything: a section of 64 GiB
//! that takes no room on disk, or sixty thousand sections over the same bytes. `object::ReadCache` keeps all that was ever
//! read, each range for itself. So the bytes that are asked of one image are counted in one place, whoever asks for them, and
//! beyond the bound reading fails as it does behind the end of the file. What goes into a skeleton passes through, and none of it is
//! kept.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};
use std::ops::Range;
use std::sync::Arc;

use object::read::ReadRef;

/// Most bytes that are read of one image and kept while it is looked at: the first bytes of each of its functions' CFI, of
/// 16 bytes and [`RANGE_BYTES`], above all. Of half a million functions 56 million.
pub(crate) const MAX_READ_BYTES: u64 = 80 * 1024 * 1024;
/// What a range takes beside its bytes, about: its place in a hash table, and what allocators add.
const RANGE_BYTES: u64 = 96;
/// How many bytes are copied at once.
const COPIED_AT_ONCE: usize = 128 * 1024;
/// Longest string that is read to its end, as `object::ReadCache` has it.
const MAX_STRING_BYTES: u64 = 4096;

/// An image's file, read as far as it is asked for, within a bound.
#[derive(Debug)]
pub struct ImageFile {
    file: Arc<File>,
    cache: object::ReadCache<Arc<File>>,
    left: Cell<u64>,
}

/// An image of which parts can be copied without being read into memory for good.
pub trait CopyBytes<'a>: ReadRef<'a> {
    /// Writes `size` bytes from `offset` on to `out`. If that fails, as when there are not as many, some of them may be there.
    fn copy_bytes_at(self, offset: u64, size: u64, out: &mut dyn Write) -> io::Result<()>;
}

fn too_short() -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}

impl<'a> CopyBytes<'a> for &'a [u8] {
    fn copy_bytes_at(self, offset: u64, size: u64, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(self.read_bytes_at(offset, size).map_err(|()| too_short())?)
    }
}

impl<'a> CopyBytes<'a> for &'a ImageFile {
    fn copy_bytes_at(self, offset: u64, size: u64, out: &mut dyn Write) -> io::Result<()> {
        let length = ReadRef::len(self).map_err(|()| too_short())?;
        if offset.checked_add(size).is_none_or(|end| end > length) {
            return Err(too_short());
        }
        // The cache goes to its place before each reading, too.
        let mut file = &*self.file;
        file.seek(SeekFrom::Start(offset))?;
        let mut part = file.take(size);
        let mut buffer = vec![0; COPIED_AT_ONCE.min(size as usize)];
        let mut left = size;
        while left > 0 {
            let read = part.read(&mut buffer)?;
            if read == 0 {
                return Err(too_short());
            }
            out.write_all(&buffer[..read])?;
            left -= read as u64;
        }
        Ok(())
    }
}

impl ImageFile {
    pub(crate) fn new(file: File) -> Self {
        let file = Arc::new(file);
        let cache = object::ReadCache::new(file.clone());
        Self { file, cache, left: Cell::new(MAX_READ_BYTES) }
    }

    /// What is left with a range of so many bytes, if there is room for it.
    fn left_with(&self, bytes: u64) -> Result<u64, ()> {
        self.left.get().checked_sub(bytes.checked_add(RANGE_BYTES).ok_or(())?).ok_or(())
    }
}

impl<'a> ReadRef<'a> for &'a ImageFile {
    fn len(self) -> Result<u64, ()> {
        ReadRef::len(&self.cache)
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        self.left.set(self.left_with(size)?);
        self.cache.read_bytes_at(offset, size)
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        self.left_with(range.end.saturating_sub(range.start).min(MAX_STRING_BYTES))?;
        // Of a string only itself is kept, and of one without end nothing: but it was read, and will be again.
        let Ok(string) = self.cache.read_bytes_at_until(range, delimiter) else {
            self.left.set(self.left_with(MAX_STRING_BYTES)?);
            return Err(());
        };
        self.left.set(self.left_with(string.len() as u64)?);
        Ok(string)
    }
}

#[cfg(test)]
pub(crate) mod counted {
    use super::{Cell, Range, ReadRef};

    /// An image in memory that counts the bytes asked of it, but for those of strings.
    #[derive(Clone, Copy)]
    pub(crate) struct Counted<'a>(pub(crate) &'a [u8], pub(crate) &'a Cell<u64>);

    impl<'a> ReadRef<'a> for Counted<'a> {
        fn len(self) -> Result<u64, ()> {
            ReadRef::len(self.0)
        }

        fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
            self.1.set(self.1.get() + size);
            self.0.read_bytes_at(offset, size)
        }

        fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
            self.0.read_bytes_at_until(range, delimiter)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of so many bytes, none of which takes room.
    fn sparse(bytes: u64) -> ImageFile {
        let file = tempfile::tempfile().expect("a file without a name");
        file.set_len(bytes).expect("files may be sparse");
        ImageFile::new(file)
    }

    #[test]
    fn what_is_read_is_bounded_in_all() {
        let file = sparse(1 << 36);
        let file = &file;
        assert_eq!(file.read_bytes_at(0, 1 << 36), Err(()), "at once");
        assert_eq!(file.read_bytes_at(0, u64::MAX), Err(()));
        assert_eq!(file.left.get(), MAX_READ_BYTES, "what was refused does not count");
        // Ranges over each other are kept each for itself.
        let part = 4096;
        file.left.set(100 * (part + RANGE_BYTES) + part);
        let read = (0..1000).take_while(|start| file.read_bytes_at(*start, part).is_ok()).count();
        assert_eq!(read, 100);
    }

    #[test]
    fn what_is_copied_comes_whole_or_fails_and_is_not_kept() {
        use std::os::unix::fs::FileExt as _;
        let length = 3 * COPIED_AT_ONCE as u64;
        let file = sparse(length);
        file.file.write_all_at(b"windlass", 4096).expect("the file is there");
        let mut out = b"a ".to_vec();
        (&file).copy_bytes_at(4096, 8, &mut out).expect("the file is as long");
        assert_eq!(out, b"a windlass");
        let mut all = Vec::new();
        (&file).copy_bytes_at(0, length, &mut all).expect("the file is as long");
        assert_eq!((all.len() as u64, &all[4096..4104]), (length, &b"windlass"[..]));
        assert_eq!(file.left.get(), MAX_READ_BYTES);
        assert_eq!(
            (&file).read_bytes_at(4098, 6),
            Ok(&b"ndlass"[..]),
            "what is read comes from its own place"
        );
        for (offset, size) in [(length - 1, 2), (length, 1), (u64::MAX, 1), (0, u64::MAX)] {
            assert!((&file).copy_bytes_at(offset, size, &mut out).is_err(), "{offset} {size}");
        }
        // It has become shorter meanwhile.
        file.file.set_len(4100).expect("the file is there");
        assert!((&file).copy_bytes_at(4096, 8, &mut out).is_err());
    }

    #[test]
    fn small_ranges_count_with_what_they_take() {
        let file = sparse(1 << 20);
        file.left.set(1000 * (RANGE_BYTES + 1));
        let read = (0..2000).take_while(|start| (&file).read_bytes_at(*start, 1).is_ok()).count();
        assert_eq!(read, 1000);
        assert_eq!((&file).read_bytes_at_until(0..100, 0), Err(()));
    }

    /// A library has a hundred thousand names in one table, each of which is looked for up to the table's end.
    #[test]
    fn strings_count_by_their_length() {
        let file = sparse(1 << 20);
        file.left.set(MAX_STRING_BYTES + 1000 * RANGE_BYTES);
        let read =
            (0..2000).take_while(|start| (&file).read_bytes_at_until(*start..1 << 20, 0).is_ok()).count();
        assert_eq!(read, 1000);
        file.left.set(2 * MAX_STRING_BYTES);
        assert_eq!((&file).read_bytes_at_until(0..1 << 20, 1), Err(()));
        assert_eq!(file.left.get(), MAX_STRING_BYTES - RANGE_BYTES, "one without end counts as the longest");
    }
}
