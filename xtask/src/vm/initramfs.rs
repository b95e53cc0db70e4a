//! An initial file system, in the archive format that the kernel unpacks it from.
//!
//! The format is `newc` of cpio, one header of hexadecimal fields for each entry
//! (Documentation/driver-api/early-userspace/buffer-format.rst of the kernel): so little that it is written here,
//! which asks for no program and gives the same bytes for the same files.

use std::collections::BTreeSet;

use anyhow::{Context, Result};

/// Mode of a folder that everyone may enter.
const FOLDER_MODE: u32 = 0o040_755;
/// Mode of a file that everyone may run.
const EXECUTABLE_MODE: u32 = 0o100_755;
/// Headers and contents begin at multiples of this many bytes.
const ALIGNMENT: usize = 4;
/// Name of the entry after the last.
const END: &str = "TRAILER!!!";

/// An archive in the making.
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    entries: u32,
}

impl Archive {
    /// Adds a file at the absolute `path`, and the folders on the way to it.
    pub(super) fn add_executable(&mut self, path: &str, content: &[u8]) -> Result<()> {
        let path = path.strip_prefix('/').context("paths are absolute")?;
        for (end, _) in path.match_indices('/') {
            if self.folders.insert(path[..end].to_owned()) {
                self.add(&path[..end], FOLDER_MODE, &[])?;
            }
        }
        self.add(path, EXECUTABLE_MODE, content)
    }

    /// The archive's bytes.
    pub(super) fn finish(mut self) -> Result<Vec<u8>> {
        self.add(END, 0, &[])?;
        Ok(self.bytes)
    }

    fn add(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entries += 1;
        let size =
            u32::try_from(content.len()).context("a file of 4 GiB or more has no place in an archive")?;
        let name_size = u32::try_from(name.len() + 1)?;
        let links = 1;
        // Inode, mode, uid, gid, links, time, size, device (major, minor), device of a special file (major,
        // minor), size of the name with its zero, checksum (none in this variant).
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
        Ok(())
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_folders_once_and_before_what_is_in_them() {
        let mut archive = Archive::default();
        archive.add_executable("/lib/a", b"12345").unwrap();
        archive.add_executable("/lib/b", b"").unwrap();
        let text = String::from_utf8(archive.finish().unwrap()).unwrap();
        let entry = |inode: u32, mode: &str, size: u32, name_size: u32| {
            format!(
                "070701{inode:08x}{mode}{:016x}{:08x}{:08x}{size:08x}{:032x}{name_size:08x}{:08x}",
                0, 1, 0, 0, 0
            )
        };
        let expect = [
            entry(1, "000041ed", 0, 4) + "lib\0\0\0",
            entry(2, "000081ed", 5, 6) + "lib/a\x0012345\0\0\0",
            entry(3, "000081ed", 0, 6) + "lib/b\0",
            entry(4, "00000000", 0, 11) + "TRAILER!!!\0\0\0\0",
        ];
        assert_eq!(text, expect.concat());
        assert!(Archive::default().add_executable("lib/a", b"").is_err());
    }
}
