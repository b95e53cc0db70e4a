//! What is recognised of code once its CFI is taken away, held against that CFI: over libraries and programs of this
//! machine. A row that is recognised has to be what the compiler, or who wrote the assembly, says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use object::LittleEndian as LE;
use object::elf;
use object::read::elf::{FileHeader as _, SectionHeader as _};
use windlass_schema::{BuildId, CfaRule, FramePointerRule, ImageAddress, Rule, Table};
use windlass_unwind_compiler::compile;

type FileHeader = elf::FileHeader64<LE>;

/// An image without its CFI: the sections have other names, and the segment that leads to it another type.
fn without_cfi(elf: &[u8]) -> Option<Vec<u8>> {
    const TYPE_BYTES: usize = 4;
    let header = FileHeader::parse(elf).ok()?;
    let sections = header.sections(LE, elf).ok()?;
    let mut stripped = elf.to_vec();
    for section in sections.iter() {
        let name = sections.section_name(LE, section).ok()?;
        if [&b".eh_frame"[..], b".debug_frame", b".zdebug_frame"].contains(&name) {
            let names = sections
                .section(header.shstrndx(LE, elf).ok().map(|index| object::SectionIndex(index as usize))?)
                .ok()?;
            let at = (names.sh_offset(LE) + u64::from(section.sh_name(LE))) as usize;
            // Of the first letter: the dot may be shared with a name that this one is the end of.
            stripped[at + 1] = b'X';
        }
        if name == b".gopclntab" {
            return None;
        }
    }
    let count = usize::from(header.e_phnum(LE));
    for number in 0..count {
        let at = header.e_phoff(LE) as usize + number * size_of::<elf::ProgramHeader64<LE>>();
        let kind = stripped.get_mut(at..at + TYPE_BYTES)?;
        if kind == elf::PT_GNU_EH_FRAME.0.to_le_bytes() {
            kind.fill(0);
        }
    }
    Some(stripped)
}

/// Counts of addresses where rows begin.
#[derive(Debug, Default)]
struct Counts {
    files: u64,
    same: u64,
    /// The one counts from the stack pointer, the other from the frame pointer: which may be the same.
    other_bases: u64,
    /// The CFA or the return address is another.
    others: Vec<String>,
}

fn compare(path: &Path, counts: &mut Counts) -> Option<()> {
    let elf = std::fs::read(path).ok()?;
    let build_id = BuildId::new(b"WINDLASS").expect("8 bytes are a build-ID");
    let stated = compile(&elf, build_id).ok()?;
    let recognised = compile(&without_cfi(&elf)?, build_id).ok()?;
    let stated = Table::parse(&stated.table).expect("compiled tables are tables");
    let recognised = Table::parse(&recognised.table).expect("compiled tables are tables");
    counts.files += 1;
    let addresses: BTreeMap<ImageAddress, ()> =
        stated.rows().chain(recognised.rows()).map(|(address, _)| (address, ())).collect();
    for address in addresses.into_keys() {
        let (expect, found) = (stated.rule(address), recognised.rule(address));
        if matches!(expect, Rule::NoCfi | Rule::Unsupported(_))
            || matches!(found, Rule::NoCfi | Rule::Unsupported(_))
        {
            continue;
        }
        if has_other_base(expect, found) {
            counts.other_bases += 1;
        } else if is_same(expect, found) {
            counts.same += 1;
        } else {
            counts.others.push(format!("{} {address:?}: {found}, CFI {expect}", path.display()));
        }
    }
    Some(())
}

/// Whether the CFA counts from different registers.
fn has_other_base(expect: Rule, found: Rule) -> bool {
    let base = |rule| match rule {
        Rule::Frame { cfa: CfaRule::Offset(register, _), .. } => Some(register),
        _ => None,
    };
    base(expect).zip(base(found)).is_some_and(|(expect, found)| expect != found)
}

/// Whether both lead to one frame. A register may be both saved and unchanged.
fn is_same(expect: Rule, found: Rule) -> bool {
    let (
        Rule::Frame { cfa, return_address, frame_pointer },
        Rule::Frame { cfa: other_cfa, return_address: other_address, frame_pointer: other_pointer },
    ) = (expect, found)
    else {
        return expect == found;
    };
    let is_same_pointer = frame_pointer == other_pointer
        || frame_pointer == FramePointerRule::Same
        || other_pointer == FramePointerRule::Same;
    cfa == other_cfa && return_address == other_address && is_same_pointer
}

#[test]
fn recognised_rows_are_what_cfi_says() {
    const FOLDERS: [&str; 2] = ["/usr/lib/x86_64-linux-gnu", "/usr/bin"];
    const ONE_IN: usize = 40;
    const MAX_BYTES: u64 = 4 << 20;
    let all = std::env::var_os("WINDLASS_ALL_FILES").is_some();
    let entries = FOLDERS.iter().flat_map(std::fs::read_dir).flatten().flatten().map(|entry| entry.path());
    let is_taken = |path: &PathBuf| {
        let file = path.symlink_metadata();
        file.is_ok_and(|file| file.is_file() && (all || file.len() <= MAX_BYTES))
    };
    let mut files: Vec<PathBuf> = entries.filter(is_taken).collect();
    files.sort();
    let mut counts = Counts::default();
    for path in files.iter().step_by(if all { 1 } else { ONE_IN }) {
        let _ = compare(path, &mut counts);
    }
    println!("{} files, {} rows the same, {} others", counts.files, counts.same, counts.others.len());
    assert!(counts.others.is_empty(), "{:#?}", counts.others);
}
