//! The decoders, as functions that must survive any bytes: no panic, no endless loop, no memory out of
//! proportion. The fuzzer calls them with what it invents, a plain test with the committed corpus.

#[path = "fuzz_targets/walk.rs"]
mod walk;

pub use walk::walk;
use windlass_agent::code_map::{Code, CodeMap, Met};
use windlass_agent::code_records::{Progress, Record};
use windlass_agent::jitdump::JitdumpReader;
use windlass_agent::perf_map::PerfMapReader;
use windlass_schema::perf_map::MAX_NAME_BYTES;
use windlass_schema::table::{Table, checksum};
use windlass_schema::{BuildId, ImageAddress, wire};
use windlass_symbol_index::{Index, Input};
use windlass_unwind_compiler::CompileError;

/// A target: its name, which is that of its corpus, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("table_parse", table_parse),
    ("wire_unpack", wire_unpack),
    ("compile", compile),
    ("index_build", index_build),
    ("index_parse", index_parse),
    ("skeleton", skeleton),
    ("proc_maps", proc_maps),
    ("perf_map", perf_map),
    ("jitdump", jitdump),
    ("walk", walk),
];

/// Reads bytes as a table; then once more with the checksum mended, so that a fuzzer gets past it.
pub fn table_parse(data: &[u8]) {
    read_table(data);
    let mut mended = data.to_vec();
    if let Some(field) = mended.get_mut(8..16) {
        field.copy_from_slice(&[0; 8]);
        let sum = checksum(&mended);
        mended[8..16].copy_from_slice(&sum.to_le_bytes());
        read_table(&mended);
    }
}

/// Every row of a table that passes its checks must be what a lookup of its address says.
fn read_table(data: &[u8]) {
    let Ok(table) = Table::parse(data) else { return };
    for (address, record) in table.rows() {
        assert_eq!(table.lookup(address), record, "row at {address}");
    }
    for address in [0, 1, 0xfff, u64::from(u32::MAX), u64::MAX] {
        let _ = table.rule(ImageAddress::new(address));
    }
}

/// Unpacks bytes as the wire form of a table. A table that comes out and can be packed is what was packed.
pub fn wire_unpack(data: &[u8]) {
    let Ok(file) = wire::unpack(data) else { return };
    read_table(&file);
    if let Ok(packed) = wire::pack(&file) {
        assert!(wire::unpack(&packed).as_ref() == Ok(&file), "packing and unpacking gives another table");
    }
}

/// Compiles bytes as an ELF image. What comes out must be a table that agrees with the CFI.
pub fn compile(data: &[u8]) {
    let compiled = match windlass_unwind_compiler::compile(data, build_id()) {
        Ok(compiled) => compiled,
        Err(CompileError::Table(error)) => panic!("a compiled table does not parse: {error}"),
        Err(_) => return,
    };
    let table = Table::parse(&compiled.table).expect("a compiled table parses");
    let verification = windlass_unwind_compiler::verify(data, &table).expect("what compiles can be verified");
    assert_eq!(verification.wrong, 0, "{verification:?}");
    let packed = wire::pack(&compiled.table).expect("a compiled table is written as tables are");
    assert!(wire::unpack(&packed).as_ref() == Ok(&compiled.table), "the wire form is of another table");
}

/// Builds a symbol index from bytes as an ELF file; what comes out must be an index.
pub fn index_build(data: &[u8]) {
    let input = Input { debug: Some(data), image: Some(data), kallsyms: Some(data), perf_map: Some(data) };
    if let Ok(index) = windlass_symbol_index::build(input) {
        assert!(Index::parse(&index).is_ok(), "what was built is an index");
        index_parse(&index);
    }
}

/// Reads bytes as a symbol index.
pub fn index_parse(data: &[u8]) {
    let Ok(index) = Index::parse(data) else { return };
    for address in (0..0x2000).step_by(5).chain([u64::MAX]) {
        let address = ImageAddress::new(address);
        let _ = index.lookup(address);
        assert!(index.function_at(address).is_none_or(|start| start <= address), "{address}");
    }
}

/// Takes the skeleton of bytes as an ELF file, and compiles that as the service does. Of a damaged file
/// the two may keep different parts, so tables are compared for whole files only, by a plain test.
pub fn skeleton(data: &[u8]) {
    if let Ok(skeleton) = windlass_agent::skeleton::skeleton(data) {
        compile(&skeleton);
    }
}

/// Reads bytes as the text of `/proc/PID/maps`.
pub fn proc_maps(data: &[u8]) {
    let mappings = windlass_agent::proc_maps::executable_mappings(data);
    assert!(mappings.iter().all(|mapping| mapping.start < mapping.end));
}

/// Reads bytes as a perf map, in one piece and as it grows; names what it has, as a service would check it.
pub fn perf_map(data: &[u8]) {
    let read = |reader: &mut PerfMapReader, map: &[u8], records: &mut Vec<Record>| {
        let mut sink = |record: Record| {
            records.push(record);
            Ok(())
        };
        while let Ok(Progress::More) = reader.read_new(map, &mut sink) {}
    };
    let (mut whole, mut grown) = (Vec::new(), Vec::new());
    read(&mut PerfMapReader::default(), data, &mut whole);
    let mut reader = PerfMapReader::default();
    read(&mut reader, &data[..data.len() / 2], &mut grown);
    read(&mut reader, data, &mut grown);
    assert_eq!(whole, grown);
    look_up(&whole, |code| windlass_agent::perf_map::name(data, code.named.1, code.named.0, code.end));
}

/// Reads bytes as a jitdump, in one piece and as it grows, and names what it has.
pub fn jitdump(data: &[u8]) {
    let read = |reader: &mut JitdumpReader, dump: &[u8], records: &mut Vec<Record>| {
        let mut sink = |record: Record| {
            records.push(record);
            Ok(())
        };
        while let Ok(Progress::More) = reader.read_new(dump, &mut sink) {}
    };
    let (mut whole, mut grown) = (Vec::new(), Vec::new());
    read(&mut JitdumpReader::default(), data, &mut whole);
    let mut reader = JitdumpReader::default();
    read(&mut reader, &data[..data.len() / 2], &mut grown);
    read(&mut reader, data, &mut grown);
    assert_eq!(whole, grown);
    look_up(&whole, |code| windlass_agent::jitdump::name(data, code.named.1, code.named.0));
}

/// Looks addresses of `records` up, of which half were known before; what is found covers the address.
fn look_up(records: &[Record], name: impl Fn(&Code) -> Option<String>) {
    let mut map = CodeMap::default();
    let (before, now) = records.split_at(records.len() / 2);
    for (records, times) in [(before, (0, 10)), (now, (10, 20))] {
        map.settle(10);
        for record in records {
            let _ = map.add(*record, times.0, times.1);
        }
    }
    let met = Met { first_ns: 12, last_ns: 15 };
    let addresses = records.iter().take(1000).flat_map(|record| [record.start, record.end - 1]);
    for (address, code) in map.find(&addresses.map(|address| (address, met)).collect()) {
        assert!((code.start..code.end).contains(&address), "{address:x} in {code:x?}");
        let name = name(&code);
        assert!(name.is_none_or(|name| (1..=MAX_NAME_BYTES).contains(&name.len())));
    }
}

fn build_id() -> BuildId {
    BuildId::new(&[0xab; 20]).expect("20 bytes are a build-ID")
}
