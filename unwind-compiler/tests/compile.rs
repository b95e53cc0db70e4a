//! The compiler on a hand-made image with every rule (`tests/data/rules.s`), whole and damaged, and on this
//! test's own executable.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::path::PathBuf;

use windlass_schema::page::PAGE_SHIFT;
use windlass_schema::table::{MAX_PAGES, checksum};
use windlass_schema::{BuildId, ImageAddress, Record, Rule, Table};
use windlass_unwind_compiler::{
    CompileError, Compiled, SkipReason, Verification, build_id_of, compile, verify,
};

/// The code of `rules.elf`, and a little around it.
const CODE: std::ops::Range<u64> = 0x4000f8..0x4002c8;

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn rules_elf() -> Vec<u8> {
    std::fs::read(data("rules.elf")).unwrap()
}

fn compiled(elf: &[u8]) -> Compiled {
    compile(elf, BuildId::new(b"WINDLASS").unwrap()).unwrap()
}

/// Compiles `elf`, which may be damaged, and checks every row of what can be read of it.
#[track_caller]
fn verified(elf: &[u8]) -> Verification {
    let table = compiled(elf).table;
    let verification = verify(elf, &Table::parse(&table).unwrap()).unwrap();
    assert_eq!(verification.wrong, 0, "{verification:#?}");
    verification
}

/// Compares with the file `name` in `tests/data`; `WINDLASS_BLESS=1` writes it.
#[track_caller]
fn compare(name: &str, found: &[u8], hint: &str) {
    if std::env::var_os("WINDLASS_BLESS").is_some() {
        std::fs::write(data(name), found).unwrap();
    }
    let expected = std::fs::read(data(name)).unwrap();
    assert!(found == expected, "{}\n\nother than tests/data/{name}: {hint}", String::from_utf8_lossy(found));
}

#[test]
fn rules_as_printed() {
    let compiled = compiled(&rules_elf());
    let table = Table::parse(&compiled.table).unwrap();
    let mut text = String::new();
    for (address, record) in table.rows() {
        text += &format!("{address} {}\n", Rule::of_record(record, table.architecture()).unwrap());
    }
    text += &format!("\n{:#?}\n", compiled.report);
    compare("rules.dump", text.as_bytes(), "is the change meant?");
}

#[test]
fn golden_bytes() {
    let table = compiled(&rules_elf()).table;
    compare("rules.wlut", &table, "a change of the format needs another version of it");
}

#[test]
fn the_same_image_gives_the_same_bytes() {
    let own = std::fs::read("/proc/self/exe").unwrap();
    assert!(compiled(&own).table == compiled(&own).table);
}

#[test]
fn every_row_is_what_the_interpreter_says() {
    let elf = rules_elf();
    let verification = verified(&elf);
    // All of the file's FDEs, and one row each for what cannot be stated but for the two that overlap.
    assert_eq!(verification.fdes, 18);
    assert_eq!(verification.unsupported.values().copied().max(), Some(2));
    assert_eq!(verification.unsupported.len(), 8);

    let own = verified(&std::fs::read("/proc/self/exe").unwrap());
    assert!(own.rows_checked > 1000, "{own:?}");
    assert!(own.addresses_checked > own.rows_checked, "{own:?}");
}

#[test]
fn a_wrong_table_is_found() {
    let elf = rules_elf();
    let table = compiled(&elf).table;
    let records = u32::from_le_bytes(table[28..32].try_into().unwrap()) as usize;
    let mut changed = 0;
    for record in 0..records {
        for byte in 0..8 {
            let mut table = table.clone();
            table[112 + 8 * record + byte] ^= 0x10;
            let sum = checksum(&table).to_le_bytes();
            table[8..16].copy_from_slice(&sum);
            let Ok(table) = Table::parse(&table) else { continue };
            let was = compiled(&elf).table;
            let was = Table::parse(&was).unwrap();
            let addresses = || CODE.map(ImageAddress::new);
            // A claim not to know is no error, and bits of a run may say nothing about its rows.
            let lies = |address| {
                let rule = table.rule(address);
                rule != was.rule(address) && !matches!(rule, Rule::Unsupported(_))
            };
            if addresses().any(lies) {
                changed += 1;
                let verification = verify(&elf, &table).unwrap();
                assert!(verification.wrong > 0, "record {record} byte {byte}");
                assert!(!verification.disagreements.is_empty());
            }
        }
    }
    assert!(changed > records, "{changed} changes of {records} records");
}

#[test]
fn a_cfa_that_nothing_defines_is_not_rax() {
    let mut elf = rules_elf();
    let (_, at, len) = eh_frame(&elf);
    // DW_CFA_def_cfa rsp, 8 of the CIE that most functions have: then rax, 0, which is what gimli starts with.
    let is_definition = |at: &usize| elf[*at..].starts_with(&[0x0c, 7, 8]);
    let cie = (at + 0x58..at + len).find(is_definition).unwrap();
    elf[cie..cie + 3].copy_from_slice(&[0x0c, 0, 0]);
    verified(&elf);
    let defined = compiled(&elf).table;
    elf[cie..cie + 3].fill(0);
    verified(&elf);
    let found = verify(&elf, &Table::parse(&defined).unwrap()).unwrap();
    assert!(found.disagreements.iter().any(|wrong| wrong.image.starts_with("cfa=undefined")), "{found:#?}");
}

#[test]
fn what_is_not_supported_is_an_error_that_says_what() {
    let id = BuildId::new(b"WINDLASS").unwrap();
    let with = |at: usize, value: u8| {
        let mut elf = rules_elf();
        elf[at] = value;
        compile(&elf, id).map(|_| ())
    };
    assert_eq!(compile(b"", id).map(|_| ()), Err(CompileError::NotElf));
    assert_eq!(with(0, 0), Err(CompileError::NotElf));
    assert_eq!(with(4, 1), Err(CompileError::Class(1)));
    assert_eq!(with(5, 2), Err(CompileError::ByteOrder(2)));
    assert_eq!(with(18, 243), Err(CompileError::Machine(243)));
    assert_eq!(
        CompileError::Machine(243).to_string(),
        "ELF machine 243, expected 62 (x86-64) or 183 (aarch64)"
    );
}

#[test]
fn an_image_without_cfi_is_an_empty_table() {
    let mut elf = rules_elf();
    // An object file without relocations: its addresses are not final.
    elf[16] = 1;
    let object = compiled(&elf);
    let mut elf = rules_elf();
    // A split debug file: SHT_NOBITS.
    for name in [".eh_frame", ".text"] {
        let (header, _, _) = section(&elf, name);
        elf[header + 4] = 8;
    }
    for compiled in [object, compiled(&elf)] {
        let table = Table::parse(&compiled.table).unwrap();
        assert_eq!((table.row_count(), table.page_count(), table.rows().count()), (0, 0, 0));
        assert_eq!(table.lookup(ImageAddress::new(0x400123)), Record::NO_CFI);
        assert_eq!((compiled.report.fdes, compiled.report.rows), (0, 0));
    }
    verified(&elf);
}

#[test]
fn build_ids() {
    assert_eq!(build_id_of(&rules_elf()), Some(BuildId::new(b"WINDLASS").unwrap()));
    let mut no_sections = rules_elf();
    no_sections[40..48].fill(0);
    no_sections[60..64].fill(0);
    assert_eq!(build_id_of(&no_sections), build_id_of(&rules_elf()), "by program headers");
    let mut no_segments = rules_elf();
    no_segments[56..58].fill(0);
    assert_eq!(build_id_of(&no_segments), build_id_of(&rules_elf()), "by sections");
    assert_eq!(build_id_of(b"\x7fELF"), None);
}

#[test]
fn without_section_headers_the_program_header_leads_to_the_same_rows() {
    let mut own = std::fs::read("/proc/self/exe").unwrap();
    let whole = compiled(&own);
    // e_shoff, e_shnum, e_shstrndx
    own[40..48].fill(0);
    own[60..64].fill(0);
    let stripped = compiled(&own);
    assert!(whole.report.rows > 1000, "{:?}", stripped.report);
    assert_eq!(stripped.report.cfi_rows, whole.report.cfi_rows);
    // But for code without CFI: where its functions start is lost.
    let (whole, stripped) = (Table::parse(&whole.table).unwrap(), Table::parse(&stripped.table).unwrap());
    for (address, _) in stripped.rows() {
        let (whole, stripped) = (whole.rule(address), stripped.rule(address));
        assert!(whole == stripped || stripped == Rule::NoCfi, "{address} {whole} {stripped}");
    }
    // The size of .eh_frame is lost, no more.
    verified(&own);
}

#[test]
fn a_compressed_section_is_read() {
    let elf = rules_elf();
    let (header, at, len) = eh_frame(&elf);
    let section = &elf[at..at + len];
    // Elf64_Chdr, then a zlib stream of one stored block (RFC 1950, RFC 1951).
    let mut stream = Vec::new();
    for field in [1u64, len as u64, 8] {
        stream.extend(field.to_le_bytes());
    }
    stream.extend([0x78, 0x01, 0x01]);
    stream.extend((len as u16).to_le_bytes());
    stream.extend((!(len as u16)).to_le_bytes());
    stream.extend(section);
    let adler = section.iter().fold((1u32, 0u32), |(a, b), byte| {
        let a = (a + u32::from(*byte)) % 65521;
        (a, (b + a) % 65521)
    });
    stream.extend((adler.1 << 16 | adler.0).to_be_bytes());
    let mut compressed = elf.clone();
    compressed[header + 9] |= 8; // SHF_COMPRESSED
    compressed[header + 24..header + 32].copy_from_slice(&(elf.len() as u64).to_le_bytes());
    compressed[header + 32..header + 40].copy_from_slice(&(stream.len() as u64).to_le_bytes());
    compressed.extend(&stream);
    assert_eq!(compiled(&compressed), compiled(&elf));

    // A size that no section has costs nothing but the section.
    let chdr_size = elf.len() + 8;
    compressed[chdr_size..chdr_size + 8].fill(0x7f);
    let report = compiled(&compressed).report;
    assert_eq!((report.rows, report.skipped_fdes[&SkipReason::SectionLimit]), (0, 1));
    // One that is only wrong: found out when it is read.
    compressed[chdr_size..chdr_size + 8].copy_from_slice(&(len as u64 + 1).to_le_bytes());
    let report = compiled(&compressed).report;
    assert_eq!((report.rows, report.skipped_fdes[&SkipReason::Unreadable]), (0, 1));
}

/// Bytes that a section of [`bomb`] decompresses to.
const BOMB_BYTES: u64 = 3 << 17;

/// `Elf64_Chdr` and a zstd frame (RFC 8878) of three blocks that repeat a zero 128 Ki times.
fn bomb() -> Vec<u8> {
    let mut bytes: Vec<u8> = [2, BOMB_BYTES, 8].iter().flat_map(|field| field.to_le_bytes()).collect();
    bytes.extend([0x28, 0xb5, 0x2f, 0xfd, 0xa0]);
    bytes.extend((BOMB_BYTES as u32).to_le_bytes());
    for is_last in [0, 0, 1u32] {
        bytes.extend(&(is_last | 1 << 1 | 1 << 20).to_le_bytes()[..3]);
        bytes.push(0);
    }
    bytes
}

/// `rules.elf` with further sections named `.eh_frame`, compressed, at these offsets from its end, where
/// `payload` lies.
fn with_sections(payload: &[u8], sections: &[(u64, u64)]) -> Vec<u8> {
    let mut elf = rules_elf();
    let (eh_frame, _, _) = eh_frame(&elf);
    let (whole, headers) = (elf.len() as u64, elf[40..48].try_into().unwrap());
    let count = u16::from_le_bytes([elf[60], elf[61]]);
    let start = u64::from_le_bytes(headers) as usize;
    let mut headers = elf[start..start + 64 * usize::from(count)].to_vec();
    for (offset, len) in sections {
        let mut header = elf[eh_frame..eh_frame + 64].to_vec();
        header[9] |= 8; // SHF_COMPRESSED
        header[24..32].copy_from_slice(&(whole + offset).to_le_bytes());
        header[32..40].copy_from_slice(&len.to_le_bytes());
        headers.extend(header);
    }
    elf.extend(payload);
    let at = elf.len() as u64;
    elf.extend(headers);
    elf[40..48].copy_from_slice(&at.to_le_bytes());
    elf[60..62].copy_from_slice(&(count + sections.len() as u16).to_le_bytes());
    elf
}

#[test]
fn sections_that_decompress_to_much_have_a_budget_together() {
    let whole = compiled(&rules_elf());
    let own_bytes = whole.report.eh_frame_bytes;
    let bomb = bomb();
    let len = bomb.len() as u64;
    let check = |elf: &[u8], bombs_read: u64, reason: SkipReason, skipped: u64| {
        let found = compiled(elf);
        assert_eq!(found.table, whole.table);
        assert_eq!(found.report.eh_frame_bytes, own_bytes + bombs_read * BOMB_BYTES);
        assert_eq!(found.report.skipped_fdes.get(&reason), Some(&skipped), "{:?}", found.report);
        verified(elf);
    };
    // Four headers that name one payload, then four with a payload each: 1 MiB is for all of a small file.
    check(&with_sections(&bomb, &[(0, len); 4]), 1, SkipReason::SectionOverlap, 3);
    let four = [0, len, 2 * len, 3 * len].map(|offset| (offset, len));
    check(&with_sections(&bomb.repeat(4), &four), 2, SkipReason::SectionLimit, 2);
    // Sections that are small, but many.
    let many: Vec<_> = (0..40).map(|number| (24 * number, 24)).collect();
    let empty: Vec<u8> = [1u64, 0, 8].iter().flat_map(|field| field.to_le_bytes()).collect();
    let report = compiled(&with_sections(&empty.repeat(40), &many)).report;
    assert_eq!(report.skipped_fdes[&SkipReason::SectionLimit], 25, "{report:?}");
}

#[test]
fn an_fde_that_ends_where_the_table_does() {
    let mut elf = rules_elf();
    let fde = &fdes(&elf)[0];
    let (header, at, _) = eh_frame(&elf);
    // As far behind as a signed half says, and as long.
    let address = u64::from_le_bytes(elf[header + 16..header + 24].try_into().unwrap());
    let field = at + fde.offset + 8;
    let start = address + fde.offset as u64 + 8 + i32::MAX as u64;
    elf[field..field + 4].copy_from_slice(&i32::MAX.to_le_bytes());
    // The p_memsz of the one segment with code.
    elf[64 + 40..64 + 48].copy_from_slice(&(1u64 << 33).to_le_bytes());
    let reach = (CODE.start >> PAGE_SHIFT << PAGE_SHIFT) + (u64::from(MAX_PAGES) << PAGE_SHIFT);
    for (back, is_reached) in [(0, false), (1, false), (256, false), (257, true)] {
        let len = i32::try_from(reach - back - start).unwrap();
        elf[field + 4..field + 8].copy_from_slice(&len.to_le_bytes());
        let compiled = compiled(&elf);
        let table = Table::parse(&compiled.table).unwrap();
        let outside = compiled.report.skipped_fdes.get(&SkipReason::OutsideImage);
        assert_eq!((table.page_count() == MAX_PAGES, outside.is_none()), (is_reached, is_reached), "{back}");
        verified(&elf);
    }
}

#[test]
fn a_renamed_section_is_found_by_the_program_header() {
    let mut own = std::fs::read("/proc/self/exe").unwrap();
    let whole = compiled(&own);
    // Without a name, which is as good as another.
    let (header, _, _) = eh_frame(&own);
    own[header..header + 4].fill(0);
    let renamed = compiled(&own);
    assert!(whole.report.rows > 1000 && renamed.table == whole.table, "{:?}", renamed.report);
    verified(&own);

    // A program header that leads nowhere is no silence.
    let field = |at: usize, len: usize| {
        own[at..at + len].iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte))
    };
    let mut segments = (0..field(56, 2)).map(|number| field(32, 8) + 56 * number);
    let segment = segments.find(|segment| field(*segment, 4) == 0x6474_e550).unwrap();
    let at = field(segment + 8, 8);
    own[at] = 0xff;
    let report = compiled(&own).report;
    assert_eq!((report.fdes, report.skipped_fdes[&SkipReason::Unreadable]), (0, 1));
}

#[test]
fn truncation_at_every_byte() {
    let elf = rules_elf();
    for cut in 0..elf.len() {
        if cut < 64 {
            assert_eq!(
                compile(&elf[..cut], BuildId::new(&[0; 2]).unwrap()).map(|_| ()),
                Err(CompileError::NotElf)
            );
        } else {
            verified(&elf[..cut]);
        }
    }
    // The section's second half lies behind the end: what is there counts, the rest is reported.
    let (header, at, len) = eh_frame(&elf);
    let mut cut = elf.clone();
    cut.extend(&elf[at..at + len / 2]);
    cut[header + 24..header + 32].copy_from_slice(&(elf.len() as u64).to_le_bytes());
    let report = compiled(&cut).report;
    assert!(report.fdes > 3 && report.skipped_fdes.contains_key(&SkipReason::Truncated), "{report:?}");
}

#[test]
fn a_broken_entry_costs_itself_alone() {
    let elf = rules_elf();
    let whole = compiled(&elf).table;
    let whole = Table::parse(&whole).unwrap();
    let (_, at, len) = eh_frame(&elf);
    let mut tried = 0;
    for fde in fdes(&elf) {
        // CIE pointer, then instructions: what may break without moving the FDE itself.
        for byte in (fde.offset + 4..fde.offset + 8).chain(fde.offset + 17..fde.end) {
            for value in [0x00, 0x0f, 0x3f, 0xff] {
                let mut broken = elf.clone();
                broken[at + byte] = value;
                verified(&broken);
                let table = compiled(&broken).table;
                let table = Table::parse(&table).unwrap();
                for address in CODE.filter(|address| !fde.range.contains(address)) {
                    let address = ImageAddress::new(address);
                    let right = whole.rule(address) == table.rule(address);
                    // The one FDE in another: without it, the other's rule stands.
                    let overlap = matches!(whole.rule(address), Rule::Unsupported(reason) if reason.as_str() == "overlap");
                    // A nop in front of a trampoline: the FDE does not count it in.
                    let recognised =
                        whole.rule(address) == Rule::NoCfi && table.rule(address) == Rule::Signal(40);
                    assert!(
                        right || overlap || recognised,
                        "byte {byte:#x} = {value:#x}: {address} {}",
                        table.rule(address)
                    );
                }
                tried += 1;
            }
        }
    }
    assert!(tried > 1000);
    // And anything anywhere, as long as nothing panics and no row lies.
    for byte in at..at + len {
        for value in [0x00, 0x04, 0x80] {
            let mut broken = elf.clone();
            broken[byte] = value;
            verified(&broken);
        }
    }
}

/// As [`section`].
fn eh_frame(elf: &[u8]) -> (usize, usize, usize) {
    section(elf, ".eh_frame")
}

/// Offset of the header of the section `name`, and offset and size of the section.
fn section(elf: &[u8], name: &str) -> (usize, usize, usize) {
    let name = format!("{name}\0");
    let field = |at: usize, len: usize| {
        elf[at..at + len].iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte))
    };
    let header = |number: usize| field(40, 8) + 64 * number;
    let names = field(header(field(62, 2)) + 24, 8);
    let is_named = |header: &usize| elf[names + field(*header, 4)..].starts_with(name.as_bytes());
    let header = (0..field(60, 2)).map(header).find(is_named).unwrap();
    (header, field(header + 24, 8), field(header + 32, 8))
}

struct Fde {
    offset: usize,
    end: usize,
    range: std::ops::Range<u64>,
}

/// The FDEs of the fixture: all with 4-byte lengths, pc-relative 4-byte addresses, and no augmentation data.
fn fdes(elf: &[u8]) -> Vec<Fde> {
    let (header, at, len) = eh_frame(elf);
    let address = u64::from_le_bytes(elf[header + 16..header + 24].try_into().unwrap());
    let field = |offset: usize| u32::from_le_bytes(elf[at + offset..at + offset + 4].try_into().unwrap());
    let mut offset = 0;
    let mut fdes = Vec::new();
    while offset + 4 <= len && field(offset) != 0 {
        let end = offset + 4 + field(offset) as usize;
        if field(offset + 4) != 0 {
            let start = (address + offset as u64 + 8).wrapping_add_signed((field(offset + 8) as i32).into());
            fdes.push(Fde { offset, end, range: start..start + u64::from(field(offset + 12)) });
        }
        offset = end;
    }
    fdes
}
