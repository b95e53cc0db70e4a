//! The specification of unwind tables, proved enough: `tests/reader/unwind_table.py` was written from it alone,
//! and reads compiled tables and golden ones as the Rust reader does.
//!
//! The golden tables, put together from the specification by `tests/reader/golden.py`, have what compilers'
//! output never has all of: every kind of record and every form of a page. `WINDLASS_BLESS=1` writes them anew.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use windlass_schema::{
    Architecture, BuildId, CfaRule, FramePointerRule, ImageAddress, ReturnAddressRule, Rule, Table,
    TableError,
};
use windlass_tests::program::{checkout, fixture, program, run, text};
use windlass_unwind_compiler::compile;

use crate::chunks::Random;
use crate::unwind::libc_path;

/// Random addresses looked up in each table, in and around what it covers.
const RANDOM_LOOKUPS: u64 = 4_000;
/// Bytes of code of a page.
const PAGE: u64 = 1 << 16;
/// Golden tables, by the names of their files.
const GOLDEN: [&str; 2] = ["golden", "golden-aarch64"];

/// Python, about to run in the folder of the second reader, whose modules `-B` keeps from being cached there.
#[track_caller]
fn python(test: &str) -> Option<Command> {
    let mut command = Command::new(program(test, "python3")?);
    command.arg("-B").current_dir(checkout().join("tests/reader"));
    Some(command)
}

fn golden(name: &str, extension: &str) -> PathBuf {
    checkout().join("fixtures/unwind").join(name).with_extension(extension)
}

/// A rule as the second reader prints it.
fn rule_text(rule: Rule, architecture: Architecture) -> String {
    let (cfa, return_address, frame_pointer) = match rule {
        Rule::Frame { cfa, return_address, frame_pointer } => (cfa, return_address, frame_pointer),
        Rule::Signal(offset) => return format!("signal {}{offset:+}", architecture.stack_pointer().name()),
        Rule::End => return "end".to_owned(),
        Rule::NoCfi => return "no_cfi".to_owned(),
        Rule::Unsupported(reason) => return format!("unsupported {}", reason as u8),
    };
    let fp = architecture.frame_pointer().name();
    let cfa = match cfa {
        CfaRule::Offset(register, offset) => format!("{}{offset:+}", register.name()),
        CfaRule::Deref(register, a, b) => format!("*({}{a:+}){b:+}", register.name()),
        CfaRule::DerefIndexed(a, b) => format!("*(rsp+8*r9{a:+}){b:+}"),
        CfaRule::Plt { threshold, base } => format!("rsp{base:+}+8*((rip&15)>={threshold})"),
        CfaRule::GoStack { g, depth, words } => {
            format!("*(*(rsp{g:+})+8)-*(rsp{depth:+}){:+}", 8 * i32::from(words))
        }
        CfaRule::OtherStack(offset) => format!("other_stack(rbp{offset:+})"),
    };
    let return_address = match return_address {
        ReturnAddressRule::AtCfa(offset) => format!("cfa{offset:+}"),
        ReturnAddressRule::Register(register) => register.name().to_owned(),
    };
    let frame_pointer = match frame_pointer {
        FramePointerRule::Same => "same".to_owned(),
        FramePointerRule::AtCfa(offset) => format!("cfa{offset:+}"),
        FramePointerRule::AtFramePointer(offset) => format!("{fp}{offset:+}"),
        FramePointerRule::Undefined => "undefined".to_owned(),
    };
    format!("cfa={cfa} ra={return_address} fp={frame_pointer}")
}

/// End of what the directory covers.
fn end_of(table: &Table<'_>) -> u64 {
    table.base().get() + u64::from(table.page_count()) * PAGE
}

/// The whole table as the second reader prints it, by the Rust reader.
fn dump(table: &Table<'_>) -> String {
    let (mut start, mut last) = (table.base().get(), Rule::NoCfi);
    let mut out = String::new();
    let mut line = |start: u64, end: u64, rule: Rule| {
        if start < end {
            writeln!(out, "{start:#x} {end:#x} {}", rule_text(rule, table.architecture()))
                .expect("a string takes any text");
        }
    };
    for (address, record) in table.rows() {
        let rule = Rule::of_record(record, table.architecture()).expect("the table was checked");
        line(start, address.get(), last);
        (start, last) = (address.get(), rule);
    }
    line(start, end_of(table), last);
    out
}

/// First and last byte of each interval that a dump names, and random addresses.
fn addresses_to_look_up(table: &Table<'_>, dump: &str) -> Vec<u64> {
    let bounds = dump.split_whitespace().filter_map(|word| word.strip_prefix("0x"));
    let bounds = bounds.map(|digits| u64::from_str_radix(digits, 16).expect("dumps have hexadecimal bounds"));
    let mut addresses: Vec<u64> = bounds.flat_map(|bound| [bound, bound.saturating_sub(1)]).collect();
    addresses.dedup();
    let base = table.base().get();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let span = end_of(table) - base + 2 * PAGE;
    addresses.extend((0..RANDOM_LOOKUPS).map(|_| base.saturating_sub(PAGE).wrapping_add(random.below(span))));
    addresses.extend([0, u64::MAX]);
    addresses
}

/// Both readers print the table in `file` alike and answer alike at its bounds and at random addresses.
#[track_caller]
fn check_both_agree(test: &str, file: &Path) {
    let Some(mut reader) = python(test) else { return };
    let bytes = std::fs::read(file).expect("read a table");
    let table = Table::parse(&bytes).expect("the Rust reader takes it");
    let ours = dump(&table);
    let theirs = text(reader.arg("unwind_table.py").arg(file));
    check_lines(&theirs, &ours, file);

    let addresses = addresses_to_look_up(&table, &ours);
    // An argument of 18 bytes and its pointer each; a command line may take 2 MiB (execve(2), ARG_MAX).
    for addresses in addresses.chunks(40_000) {
        let mut reader = python(test).expect("Python was there before");
        reader.arg("unwind_table.py").arg(file).arg("--lookup");
        let theirs = text(reader.args(addresses.iter().map(|address| format!("{address:#x}"))));
        let mut ours = String::new();
        for &address in addresses {
            let rule = rule_text(table.rule(ImageAddress::new(address)), table.architecture());
            writeln!(ours, "{address:#x} {rule}").expect("a string takes any text");
        }
        check_lines(&theirs, &ours, file);
    }
}

/// The texts are equal; if not, names the first line that differs and not all of them.
#[track_caller]
fn check_lines(theirs: &str, ours: &str, file: &Path) {
    for (number, (theirs, ours)) in theirs.lines().zip(ours.lines()).enumerate() {
        assert_eq!(theirs, ours, "{}, line {}", file.display(), number + 1);
    }
    assert_eq!(theirs.lines().count(), ours.lines().count(), "{}", file.display());
}

#[test]
fn the_examples_of_the_specification_and_known_hashes() {
    let Some(mut doctest) = python("second_reader") else { return };
    let report = text(doctest.args(["-m", "doctest", "--verbose", "xxh3.py", "unwind_table.py"]));
    // Silence would be the same whether no example fails or none is there.
    assert_eq!(report.matches("Test passed.").count(), 2, "{report}");
}

#[test]
fn compiled_images_read_alike() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let build_id = BuildId::new(&[0xab; 20]).expect("20 bytes are a build-ID");
    let images = ["small", "small-plain", "inlined", "frames", "broken-fde", "no-build-id"].map(fixture);
    for image in images.into_iter().chain([libc_path()]) {
        let elf = std::fs::read(&image).expect("read an ELF file");
        let table = compile(&elf, build_id).expect("these compile").table;
        let file = folder.path().join(image.file_name().expect("an image has a name"));
        std::fs::write(&file, table).expect("write a table");
        check_both_agree("second_reader", &file);
    }
}

#[test]
fn golden_tables_read_alike() {
    let Some(mut writer) = python("second_reader") else { return };
    let folder = tempfile::tempdir().expect("temporary folder");
    run(writer.arg("golden.py").arg(folder.path()), &[0]);
    for name in GOLDEN {
        let (table, expected) = (golden(name, "wlut"), golden(name, "txt"));
        let written = std::fs::read(folder.path().join(name).with_extension("wlut")).expect("was written");
        if std::env::var_os("WINDLASS_BLESS").is_some() {
            std::fs::write(&table, &written).expect("write a golden table");
            let parsed = Table::parse(&written).expect("the Rust reader takes it");
            std::fs::write(&expected, dump(&parsed)).expect("write a golden dump");
        }
        let committed = std::fs::read(&table).expect("golden tables are committed");
        assert!(committed == written, "{name} is not what golden.py writes");
        let expected = std::fs::read_to_string(expected).expect("golden dumps are committed");
        check_lines(&dump(&Table::parse(&committed).expect("the Rust reader takes it")), &expected, &table);
        check_both_agree("second_reader", &table);
    }
}

/// Cuts a table at every byte: the second reader prints how many of the cuts it takes, which is the whole alone.
const CUTS: &str = "\
import sys, unwind_table
data, taken = open(sys.argv[1], 'rb').read(), []
for cut in range(len(data) + 1):
    try:
        unwind_table.parse(data[:cut])
        taken.append(cut)
    except unwind_table.TableError:
        pass
print(len(data), taken)
";

#[test]
fn a_golden_table_cut_anywhere_is_refused() {
    for name in GOLDEN {
        let file = golden(name, "wlut");
        let bytes = std::fs::read(&file).expect("golden tables are committed");
        for cut in 0..bytes.len() {
            let refused = Table::parse(&bytes[..cut]).err();
            assert!(matches!(refused, Some(TableError::Length { .. })), "{name} cut at {cut}: {refused:?}");
        }
        let Some(mut reader) = python("second_reader") else { return };
        // A folder of modules is not searched for `-c`, but the working directory is.
        let taken = text(reader.args(["-c", CUTS]).arg(&file));
        assert_eq!(taken.trim(), format!("{0} [{0}]", bytes.len()), "{name}");
    }
}

#[test]
fn a_damaged_byte_is_refused_by_name() {
    let Some(mut reader) = python("second_reader") else { return };
    let folder = tempfile::tempdir().expect("temporary folder");
    let mut bytes = std::fs::read(golden("golden", "wlut")).expect("golden tables are committed");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    assert!(matches!(Table::parse(&bytes), Err(TableError::Checksum { .. })));
    let file = folder.path().join("damaged.wlut");
    std::fs::write(&file, bytes).expect("write a table");
    let output = run(reader.arg("unwind_table.py").arg(&file), &[1]);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("damaged.wlut: checksum: "), "{message}");
    assert!(output.stdout.is_empty());
}
