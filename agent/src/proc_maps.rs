//! What does a line of `/proc/PID/maps` say?
//!
//! Peers split each line at white space, and lose files with spaces or line feeds in their names,
//! or take ` (deleted)` for a part of the name. Fields are taken by position here; the path is
//! everything behind the inode. Only executable mappings matter to a walk. A line that makes no sense
//! is left out: the kernel wrote it, and one odd line is no reason to lose a process.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

/// An executable mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapsEntry {
    /// First process address.
    pub start: u64,
    /// First process address behind it.
    pub end: u64,
    /// Where in the file it starts, in bytes.
    pub file_offset: u64,
    /// Device of the file: major, minor.
    pub device: (u32, u32),
    /// Inode of the file; 0 for none.
    pub inode: u64,
    /// What is mapped.
    pub backing: Backing,
}

/// What a mapping maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A file, or what looks like one (`/memfd:jit`, `/dev/zero`, `/SYSV00000000`).
    File {
        /// As the process sees it.
        path: PathBuf,
        /// Whether it has no name any more.
        deleted: bool,
    },
    /// The image that the kernel maps into each process.
    Vdso,
    /// Memory.
    Anonymous,
}

/// First address that is the kernel's. Of what lies there, maps show only `[vsyscall]`; a walk never meets
/// it, for calls into it trap, and searches among mappings rely on the top bit being clear.
const KERNEL_HALF: u64 = 1 << 63;

/// The executable mappings of user memory in the text of `/proc/PID/maps`, in the order of addresses.
pub fn executable_mappings(maps: &[u8]) -> Vec<MapsEntry> {
    maps.split(|byte| *byte == b'\n').filter_map(executable_mapping).collect()
}

/// `START-END rwxp OFFSET MAJOR:MINOR INODE   PATH`, all numbers but the inode in hex.
fn executable_mapping(line: &[u8]) -> Option<MapsEntry> {
    let mut rest = line;
    let mut field = || {
        let length = rest.iter().position(|byte| *byte == b' ').unwrap_or(rest.len());
        let (field, behind) = rest.split_at(length);
        rest = behind.get(1..).unwrap_or_default();
        str::from_utf8(field).ok()
    };
    let (range, permissions, offset) = (field()?, field()?, field()?);
    let (device, inode) = (field()?, field()?);
    if permissions.as_bytes().get(2) != Some(&b'x') {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let (major, minor) = device.split_once(':')?;
    let entry = MapsEntry {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        file_offset: u64::from_str_radix(offset, 16).ok()?,
        device: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
        inode: inode.parse().ok()?,
        backing: backing(rest.trim_ascii_start()),
    };
    (entry.start < entry.end && entry.end <= KERNEL_HALF).then_some(entry)
}

/// What a mapping of this name maps.
pub(crate) fn backing(name: &[u8]) -> Backing {
    match name {
        b"[vdso]" => Backing::Vdso,
        [b'/', ..] => {
            let (name, deleted) = match name.strip_suffix(b" (deleted)") {
                Some(name) => (name, true),
                None => (name, false),
            };
            Backing::File { path: PathBuf::from(OsString::from_vec(unescape(name))), deleted }
        }
        // Nothing, `[heap]`, `[stack]`, `[anon:...]`, `[uprobes]`.
        _ => Backing::Anonymous,
    }
}

/// The kernel writes a line feed in a name as `\012` and nothing else so (`seq_file_path(.., "\n")`
/// in fs/proc/task_mmu.c).
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((first, behind)) = rest.split_first() {
        if let Some(behind) = rest.strip_prefix(b"\\012") {
            plain.push(b'\n');
            rest = behind;
        } else {
            plain.push(*first);
            rest = behind;
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, expect: Option<Backing>) {
        let found = executable_mappings(line.as_bytes());
        assert_eq!(found.into_iter().next().map(|entry| entry.backing), expect);
    }

    fn file(path: &str, deleted: bool) -> Option<Backing> {
        Some(Backing::File { path: path.into(), deleted })
    }

    #[test]
    fn all_fields() {
        let text = b"557b981e3000-557b981e5000 r--p 00000000 fe:00 247030      /usr/bin/cat\n\
                     557b981e5000-557b981ea000 r-xp 00002000 fe:10 247030      /usr/bin/cat\n";
        assert_eq!(
            executable_mappings(text),
            [MapsEntry {
                start: 0x557b_981e_5000,
                end: 0x557b_981e_a000,
                file_offset: 0x2000,
                device: (0xfe, 0x10),
                inode: 247_030,
                backing: file("/usr/bin/cat", false).unwrap(),
            }]
        );
    }

    #[test]
    fn names() {
        check("1000-2000 r-xp 00000000 fe:00 12 /opt/a b/c  d.so", file("/opt/a b/c  d.so", false));
        check("1000-2000 r-xp 00000000 fe:00 12 /opt/x (deleted)", file("/opt/x", true));
        check("1000-2000 r-xp 00000000 fe:00 12 /opt/a\\012b", file("/opt/a\nb", false));
        check("1000-2000 r-xp 00000000 fe:00 12 /opt/a\\040b", file("/opt/a\\040b", false));
        check("1000-2000 rwxs 00000000 00:01 1026 /memfd:jit (deleted)", file("/memfd:jit", true));
        check("1000-2000 r-xp 00000000 00:00 0 [vdso]", Some(Backing::Vdso));
        check("ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]", None);
        check("1000-2000 rwxp 00000000 00:00 0 ", Some(Backing::Anonymous));
        check("1000-2000 rwxp 00000000 00:00 0", Some(Backing::Anonymous));
        check("1000-2000 rwxp 00000000 00:00 0 [anon:v8]", Some(Backing::Anonymous));
    }

    #[test]
    fn nonsense_is_left_out() {
        for line in [
            "",
            "-",
            "1000-2000",
            "2000-1000 r-xp 0 0:0 0",
            "1000-2000 r-xp zz 0:0 0 /x",
            "1000-2000 r 0 0:0 0",
        ] {
            check(line, None);
        }
        check("1000-2000 rw-p 00000000 fe:00 12 /x", None);
    }

    #[test]
    fn own_process_maps_its_code() {
        let maps = std::fs::read("/proc/self/maps").unwrap();
        let here = nonsense_is_left_out as *const () as u64;
        let entries = executable_mappings(&maps);
        let own = entries.iter().find(|entry| (entry.start..entry.end).contains(&here)).unwrap();
        let path = std::env::current_exe().unwrap();
        assert_eq!(own.backing, Backing::File { path, deleted: false });
        assert!(entries.iter().any(|entry| entry.backing == Backing::Vdso));
    }
}
