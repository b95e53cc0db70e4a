//! What does a line of `/proc/PID/maps` say?
//!
//! Peers split each line at white space, and lose files with spaces or line feeds in their names,
//! or take ` (deleted)` for a part of the name. Fields are taken by position here; the path is
//! everything behind the inode. Only executable mappings matter to a walk. A line that makes no sense
//! is left out: the kernel wrote it, and one odd line is no reason to lose a process.

use std::ffi::OsString;
use std::ops::Range;
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
    /// Whether it is memory laid out as V8 lays out what it has for code.
    pub is_v8_code: bool,
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
    let (mut entries, mut header, mut guard) = (Vec::new(), &[][..], &[][..]);
    for line in maps.split(|byte| *byte == b'\n') {
        if let Some(mut entry) = executable_mapping(line) {
            entry.is_v8_code = entry.backing == Backing::Anonymous && is_v8_code(entry.start, header, guard);
            entries.push(entry);
        }
        (header, guard) = (guard, line);
    }
    entries
}

/// What V8 aligns pages of its heap to, in bytes (`kPageSizeBits`, src/base/build_config.h).
const V8_PAGE_BYTES: u64 = 256 * 1024;
/// Most bytes of such a page in front of its code: the header and one page of the system's, which has up to 64 KiB.
const MAX_V8_HEADER_BYTES: u64 = 128 * 1024;

/// Whether memory at `start`, behind these two lines, is the code of a page of V8's heap. In front of that are the page's
/// header and a guard (`ObjectStartOffsetInCodePage`, src/heap/memory-chunk-layout.cc):
///
/// ```text
/// page           header   rw-p
/// page + 8192    guard    ---p
/// page + 12288   code     rwxp or r-xp
/// ```
fn is_v8_code(start: u64, header: &[u8], guard: &[u8]) -> bool {
    let page = start & !(V8_PAGE_BYTES - 1);
    if start == page || start - page > MAX_V8_HEADER_BYTES {
        return false;
    }
    let (Some((header, of_header)), Some((guard, of_guard))) = (extent(header), extent(guard)) else {
        return false;
    };
    let is_in_row =
        header.start <= page && page < header.end && header.end == guard.start && guard.end == start;
    is_in_row && of_header.starts_with("rw-") && of_guard.starts_with("---")
}

/// Where the mapping of a line is, and what of it is permitted.
fn extent(line: &[u8]) -> Option<(Range<u64>, &str)> {
    let mut fields = line.split(|byte| *byte == b' ').map(str::from_utf8);
    let (range, permissions) = (fields.next()?.ok()?, fields.next()?.ok()?);
    let (start, end) = range.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?, permissions))
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
        is_v8_code: false,
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
                is_v8_code: false,
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

    /// As node has them; then each line changed in turn.
    #[test]
    fn memory_for_code_of_v8() {
        let lines = [
            "7f9d367c0000-7f9d367c2000 rw-p 00000000 00:00 0 ",
            "7f9d367c2000-7f9d367c3000 ---p 00000000 00:00 0 ",
            "7f9d367c3000-7f9d367ff000 rwxp 00000000 00:00 0 ",
            "7f9d367ff000-7f9d36800000 ---p 00000000 00:00 0 ",
        ];
        let is_v8_code = |lines: &[&str]| -> Vec<bool> {
            let entries = executable_mappings(lines.join("\n").as_bytes());
            entries.into_iter().map(|entry| entry.is_v8_code).collect()
        };
        assert_eq!(is_v8_code(&lines), [true]);
        assert_eq!(is_v8_code(&lines[1..]), [false]);
        assert_eq!(is_v8_code(&lines[2..]), [false]);
        for (number, other) in [
            (0, "7f9d367c1000-7f9d367c2000 rw-p 00000000 00:00 0 "),
            (0, "7f9d367c0000-7f9d367c1000 rw-p 00000000 00:00 0 "),
            (0, "7f9d367c0000-7f9d367c2000 r--p 00000000 00:00 0 "),
            (1, "7f9d367c2000-7f9d367c3000 r--p 00000000 00:00 0 "),
            (2, "7f9d367c4000-7f9d367ff000 rwxp 00000000 00:00 0 "),
            (2, "7f9d367c3000-7f9d367ff000 rwxp 00000000 00:01 9 /memfd:jit (deleted)"),
        ] {
            let mut lines = lines;
            lines[number] = other;
            assert_eq!(is_v8_code(&lines), [false], "{other}");
        }
        // Another compiler's, where the page of V8 ends.
        let beside = [&lines[..3], &["7f9d367ff000-7f9d36801000 r-xp 00000000 00:00 0 "]].concat();
        assert_eq!(is_v8_code(&beside), [true, false]);
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
