//! The compiler on files that keep their call frame information elsewhere than in a plain `.eh_frame`: not
//! linked, in `.debug_frame`, compressed, apart; whole and damaged. Where a file is linked, `ld` is the oracle.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use object::elf::{self, SHT_RELA, SHT_SYMTAB};
use object::{File, Object as _, ObjectSection as _, ObjectSymbol as _, SectionFlags, SymbolKind};
use windlass_schema::{BuildId, ImageAddress, Rule, Table};
use windlass_unwind_compiler::{Compiled, SkipReason, compile, verify};

/// Relocatable files, and each as the linker makes an image of it.
const LINKED: [(&str, &str); 4] = [
    ("object.o", "object"),
    ("module.o", "debug-frame"),
    ("aarch64-pac.o", "aarch64-pac"),
    ("aarch64-b-key.o", "aarch64-b-key"),
];

/// One image and its split debug file, as it is and compressed in each way.
const APART: [&str; 5] =
    ["debug-frame", "debug-frame.debug", "debug-frame.zlib", "debug-frame.zstd", "debug-frame.zdebug"];

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fixtures/elf").join(name)).unwrap()
}

/// Compiles `elf`, which may be damaged, and checks every row of what can be read of it.
#[track_caller]
fn compiled(elf: &[u8]) -> Compiled {
    let compiled = compile(elf, BuildId::new(b"WINDLASS").unwrap()).unwrap();
    let verification = verify(elf, &Table::parse(&compiled.table).unwrap()).unwrap();
    assert_eq!(verification.wrong, 0, "{verification:#?}");
    compiled
}

/// Where sections are: of a relocatable file those that are loaded one behind the other, each aligned.
fn section_addresses(file: &File<'_>) -> BTreeMap<usize, u64> {
    let mut end = 0u64;
    let loaded = file.sections().filter(|section| match section.flags() {
        SectionFlags::Elf { sh_flags, .. } => sh_flags.contains(elf::SHF_ALLOC),
        _ => unreachable!("an ELF file"),
    });
    loaded
        .map(|section| {
            let start = end.next_multiple_of(section.align());
            end = start + section.size();
            (section.index().0, start)
        })
        .collect()
}

/// The functions of a file: name and addresses.
fn functions(elf: &[u8]) -> BTreeMap<String, Range<u64>> {
    let file = File::parse(elf).unwrap();
    let is_relocatable = file.kind() == object::ObjectKind::Relocatable;
    let addresses = section_addresses(&file);
    let functions = file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0);
    functions
        .map(|symbol| {
            let section = if is_relocatable { addresses[&symbol.section_index().unwrap().0] } else { 0 };
            let start = section + symbol.address();
            (symbol.name().unwrap().to_owned(), start..start + symbol.size())
        })
        .collect()
}

/// What a table says of each byte of some addresses.
fn rules(table: &[u8], range: &Range<u64>) -> Vec<Rule> {
    let table = Table::parse(table).unwrap();
    range.clone().map(|address| table.rule(ImageAddress::new(address))).collect()
}

#[test]
fn a_relocatable_file_has_the_rules_of_the_image_that_the_linker_makes_of_it() {
    for (relocatable, image) in LINKED.map(|(a, b)| (fixture(a), fixture(b))) {
        let (table, linked) = (compiled(&relocatable), compiled(&image));
        assert_eq!((table.report.fdes, &table.report.skipped[..]), (linked.report.fdes, &[][..]));
        let (mine, its) = (functions(&relocatable), functions(&image));
        assert!(mine.len() >= 5 && mine.keys().eq(its.keys()), "{mine:?} {its:?}");
        for (name, range) in &mine {
            let rules = rules(&table.table, range);
            assert_eq!(rules, self::rules(&linked.table, &its[name]), "{name}");
            assert!(!rules.contains(&Rule::NoCfi), "{name} {rules:?}");
        }
    }
}

#[test]
fn split_and_compressed_files_have_the_table_of_the_image() {
    let whole = compiled(&fixture(APART[0]));
    assert!(whole.report.fdes >= 5 && whole.report.skipped.is_empty(), "{:?}", whole.report);
    for name in APART {
        assert_eq!(compiled(&fixture(name)), whole, "{name}");
    }
}

/// Bytes of a file that a section header is at.
fn header_of(elf: &[u8], find: impl Fn(&[u8], u64) -> bool) -> usize {
    let start = number(elf, 40, 8) as usize;
    (0..number(elf, 60, 2) as usize)
        .map(|index| start + 64 * index)
        .find(|header| find(name_of(elf, *header), number(elf, header + 4, 4)))
        .unwrap()
}

fn name_of(elf: &[u8], header: usize) -> &[u8] {
    let names = number(elf, 40, 8) + 64 * number(elf, 62, 2);
    let name = &elf[(number(elf, names as usize + 24, 8) + number(elf, header, 4)) as usize..];
    &name[..name.iter().position(|byte| *byte == 0).unwrap()]
}

fn number(elf: &[u8], at: usize, len: usize) -> u64 {
    elf[at..at + len].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The relocations of the call frame section of a file: offset in the file of each.
fn relocations(elf: &[u8]) -> Vec<usize> {
    let is_it = |name: &[u8], kind| kind == u64::from(SHT_RELA.0) && name.ends_with(b"_frame");
    let header = header_of(elf, is_it);
    let (at, len) = (number(elf, header + 24, 8) as usize, number(elf, header + 32, 8) as usize);
    (at..at + len).step_by(24).collect()
}

/// Number of a symbol that is in no section.
fn undefined_symbol(elf: &[u8]) -> u32 {
    let file = File::parse(elf).unwrap();
    let outside = file.symbols().find(|symbol| symbol.name() == Ok("outside")).unwrap();
    assert!(outside.is_undefined());
    outside.index().0 as u32
}

/// Breaks each relocation in five ways, and expects so many of them to cost a function, each one of its own.
#[track_caller]
fn check_broken_relocations(name: &str, costly: usize) {
    let elf = fixture(name);
    let whole = compiled(&elf);
    let functions = functions(&elf);
    let undefined = undefined_symbol(&elf).to_le_bytes();
    let mut found_costly = 0;
    for at in relocations(&elf) {
        // Elf64_Rela: r_offset that is nowhere; a type that is unknown, or none; a symbol of another file, or none.
        let damages: [(usize, &[u8]); 5] = [
            (at, &[0xff; 8]),
            (at + 8, &[0xee; 2]),
            (at + 8, &[0; 4]),
            (at + 12, &undefined),
            (at + 12, &[0xff; 4]),
        ];
        for (place, bytes) in damages {
            let mut broken = elf.clone();
            broken[place..place + bytes.len()].copy_from_slice(bytes);
            let found = compiled(&broken);
            let mut lost = (functions.values())
                .map(|range| (rules(&found.table, range), rules(&whole.table, range)))
                .filter(|(found, whole)| found != whole);
            let Some((rules, _)) = lost.next() else {
                assert!(found.report.skipped.is_empty(), "{name} {place:#x}: {:?}", found.report);
                continue;
            };
            assert!(lost.next().is_none(), "{name} {place:#x}: {:?}", found.report);
            assert!(rules.iter().all(|rule| *rule == Rule::NoCfi), "{name} {place:#x}: {rules:?}");
            // One FDE has a CIE of its own.
            let reason = found.report.skipped[0].reason;
            assert!([SkipReason::Relocation, SkipReason::Cie].contains(&reason), "{name}: {reason:?}");
            assert_eq!(found.report.skipped.len(), 1, "{name} {place:#x}: {:?}", found.report);
            found_costly += 1;
        }
    }
    assert_eq!(found_costly, costly, "{name}");
}

#[test]
fn a_relocation_that_cannot_be_applied_costs_the_fde_it_lies_in() {
    // Five functions. The personality routine is of another file anyway, and only an unknown type matters; where
    // exception tables are is of no matter if nothing fills it in.
    check_broken_relocations("object.o", 5 * 5 + 1 + 4);
    check_broken_relocations("aarch64-b-key.o", 5 * 5);
    // The offset of the CIE has a relocation too, and is 0 without.
    check_broken_relocations("module.o", 5 * 5 + 5 * 4);
    check_broken_relocations("aarch64-pac.o", 5 * 5 + 5 * 4);
}

#[test]
fn a_value_that_does_not_fit_costs_its_fde() {
    let elf = fixture("object.o");
    let whole = compiled(&elf);
    // R_X86_64_PC32, and its addend.
    let mut broken = elf.clone();
    let first = relocations(&elf)[0];
    broken[first + 16..first + 24].copy_from_slice(&(1u64 << 40).to_le_bytes());
    let found = compiled(&broken);
    assert_eq!(found.report.skipped_fdes, BTreeMap::from([(SkipReason::Relocation, 1)]));
    assert_eq!(found.report.fdes, whole.report.fdes - 1);
}

#[test]
fn without_relocations_or_symbols_nothing_is_guessed() {
    for (name, _) in LINKED {
        let elf = fixture(name);
        let relocations =
            header_of(&elf, |name, kind| kind == u64::from(SHT_RELA.0) && name.ends_with(b"_frame"));
        let symbols = header_of(&elf, |_, kind| kind == u64::from(SHT_SYMTAB.0));
        for header in [relocations, symbols] {
            let mut broken = elf.clone();
            // SHT_NULL
            broken[header + 4..header + 8].fill(0);
            let report = compiled(&broken).report;
            assert_eq!((report.fdes, report.rows), (0, 0), "{name} {report:?}");
            assert!(!report.skipped.is_empty(), "{name}");
        }
    }
}

#[test]
fn truncation_at_every_byte() {
    for name in LINKED.iter().flat_map(|(relocatable, image)| [*relocatable, image]).chain(APART) {
        let elf = fixture(name);
        // Section headers come last, so a cut file has none: sections that end early lose more of what matters.
        for cut in 64..elf.len() {
            compiled(&elf[..cut]);
        }
        let headers = number(&elf, 40, 8) as usize;
        for header in (0..number(&elf, 60, 2) as usize).map(|index| headers + 64 * index) {
            let len = number(&elf, header + 32, 8);
            let is_read = [&b".eh_frame"[..], b".debug_frame", b".zdebug_frame", b".rela.eh_frame"]
                .into_iter()
                .chain([&b".rela.debug_frame"[..], b".symtab", b".text"])
                .any(|name| name_of(&elf, header) == name);
            for cut in (0..len).filter(|_| is_read) {
                let mut broken = elf.clone();
                broken[header + 32..header + 40].copy_from_slice(&cut.to_le_bytes());
                compiled(&broken);
            }
        }
    }
}

#[test]
fn damage_at_every_byte_is_survived() {
    for name in ["object.o", "aarch64-b-key.o", "debug-frame.zdebug"] {
        let elf = fixture(name);
        // Behind the ELF header, which decides whether a file is read at all.
        for at in 64..elf.len() {
            let mut broken = elf.clone();
            broken[at] ^= 0x41;
            compiled(&broken);
        }
    }
}
