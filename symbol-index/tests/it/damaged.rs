//! Damaged indexes and damaged inputs: an error or an answer, never a panic.

use std::path::Path;
use std::sync::LazyLock;

use proptest::prelude::*;
use windlass_schema::ImageAddress;
use windlass_schema::http::Unresolved;
use windlass_symbol_index::{
    BuildError, Index, IndexError, Input, build, describe, named_sources, split_unit_ids, split_units,
};
use xxhash_rust::xxh3::xxh3_64;

use crate::program::{Workshop, function_addresses};

/// A program, its index, and addresses in it. DWARF, symbols and extents of functions without symbol are in both.
static PROGRAM: LazyLock<(Vec<u8>, Vec<u8>, Vec<u64>)> = LazyLock::new(|| {
    let workshop = Workshop::new();
    let arguments = ["-g", "-nostdlib", "-static", "-Wl,--unresolved-symbols=ignore-all,-e,main"];
    let whole = workshop.compile("shapes.c", &arguments);
    let elf = workshop.objcopy(&whole, &["--strip-symbol=digest", "--strip-symbol=compare"], "partly");
    let elf = std::fs::read(elf).unwrap();
    let index = build(Input { debug: Some(&elf), ..Input::default() }).unwrap();
    let addresses = function_addresses(&std::fs::read(whole).unwrap(), 4);
    let opened = Index::parse(&index).unwrap();
    let unnamed = |address| opened.function_at(ImageAddress::new(address)).is_some();
    assert_eq!([true, false].map(|is| addresses.iter().any(|&address| unnamed(address) == is)), [true; 2]);
    (elf, index, addresses)
});

/// States the right checksum, so that a reader gets past it.
fn fix_checksum(index: &mut [u8]) {
    if index.len() >= 16 {
        let checksum = xxh3_64(&index[16..]);
        index[8..16].copy_from_slice(&checksum.to_le_bytes());
    }
}

fn look_around(bytes: &[u8], addresses: &[u64]) {
    if let Ok(index) = Index::parse(bytes) {
        for &address in addresses.iter().chain(&[0, u64::MAX]) {
            let _ = index.lookup(ImageAddress::new(address));
            let _ = index.function_at(ImageAddress::new(address));
        }
    }
}

#[test]
fn every_truncation_is_an_error() {
    let (_, index, _) = &*PROGRAM;
    for length in 0..index.len() {
        let error = Index::parse(&index[..length]).err();
        let cut_header = length < 112;
        assert!(
            matches!(error, Some(IndexError::Short(_))) == cut_header
                && matches!(error, Some(IndexError::Checksum { .. })) != cut_header,
            "{length}: {error:?}"
        );
    }
}

#[test]
fn truncations_with_a_right_checksum() {
    let (_, index, addresses) = &*PROGRAM;
    for length in 112..index.len() {
        let mut cut = index[..length].to_vec();
        fix_checksum(&mut cut);
        let error = Index::parse(&cut).err();
        assert!(matches!(error, Some(IndexError::Section { .. })), "{length}: {error:?}");
        look_around(&cut, addresses);
    }
}

#[test]
fn an_index_is_read_wherever_it_lies() {
    let (_, index, addresses) = &*PROGRAM;
    let straight = Index::parse(index).unwrap();
    for shift in 0..16 {
        let mut shifted = vec![0; shift];
        shifted.extend_from_slice(index);
        let shifted = Index::parse(&shifted[shift..]).unwrap();
        for &address in addresses {
            let address = ImageAddress::new(address);
            assert_eq!(straight.lookup(address), shifted.lookup(address));
            assert_eq!(straight.function_at(address), shifted.function_at(address));
        }
    }
}

#[test]
fn version_and_magic() {
    let (_, index, _) = &*PROGRAM;
    let mut other = index.clone();
    other[4] = 99;
    assert_eq!(Index::parse(&other).err(), Some(IndexError::Version(99)));
    other[0] = b'X';
    assert_eq!(Index::parse(&other).err(), Some(IndexError::Magic(*b"XLSX")));
}

#[test]
fn unreadable_inputs() {
    let (elf, _, addresses) = &*PROGRAM;
    let none = build(Input { debug: Some(b"no elf"), ..Input::default() });
    assert!(matches!(none, Err(BuildError::Elf { input: "debug", .. })));
    let none = build(Input { image: Some(b"no elf"), ..Input::default() });
    assert!(matches!(none, Err(BuildError::Elf { input: "image", .. })));

    // The readable one is used, and what it does not answer is put down to the other.
    let bytes = build(Input { debug: Some(b"no elf"), image: Some(elf), ..Input::default() }).unwrap();
    let index = Index::parse(&bytes).unwrap();
    assert!(index.lookup(ImageAddress::new(addresses[0])).is_ok());
    assert_eq!(index.lookup(ImageAddress::new(1)), Err(Unresolved::BrokenDebuginfo));
    let empty = build(Input::default()).unwrap();
    assert_eq!(Index::parse(&empty).unwrap().lookup(ImageAddress::new(1)), Err(Unresolved::NoSymbols));
}

/// A broken compilation unit loses itself, not the symbols nor the other units.
#[test]
fn one_broken_unit() {
    let workshop = Workshop::new();
    let program = workshop.compile("shapes.c", &["-g"]);
    let garbage = workshop.path("garbage");
    std::fs::write(&garbage, [0xff; 64]).unwrap();
    let update = format!(".debug_abbrev={}", garbage.display());
    let broken = workshop.objcopy(Path::new(&program), &["--update-section", &update], "broken");
    let elf = std::fs::read(broken).unwrap();
    let bytes = build(Input { debug: Some(&elf), ..Input::default() }).unwrap();
    let index = Index::parse(&bytes).unwrap();
    for address in function_addresses(&elf, 0) {
        assert!(index.lookup(ImageAddress::new(address)).is_ok());
    }
    assert_eq!(index.lookup(ImageAddress::new(1)), Err(Unresolved::BrokenDebuginfo));
}

/// Bytes of the program to overwrite.
fn damage(length: usize, most: usize) -> impl Strategy<Value = Vec<(usize, u8)>> {
    let byte = prop_oneof![any::<u8>(), Just(0), Just(0xff), Just(0x80)];
    prop::collection::vec((0..length, byte), 1..most)
}

proptest! {
    #[test]
    fn arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300), as_header in any::<bool>()) {
        let mut bytes = bytes;
        if as_header && bytes.len() >= 16 {
            bytes[..8].copy_from_slice(b"WLSX\x02\x00\x00\x00");
            fix_checksum(&mut bytes);
        }
        look_around(&bytes, &[]);
        let _ = describe(&bytes);
    }

    #[test]
    fn damaged_index(damage in damage(PROGRAM.1.len(), 40)) {
        let (_, index, addresses) = &*PROGRAM;
        let mut damaged = index.clone();
        for (at, byte) in damage.into_iter().filter(|&(at, _)| at >= 16) {
            damaged[at] = byte;
        }
        fix_checksum(&mut damaged);
        look_around(&damaged, addresses);
    }

    #[test]
    fn damaged_elf(damage in damage(PROGRAM.0.len(), 20)) {
        let (elf, _, addresses) = &*PROGRAM;
        let mut damaged = elf.clone();
        for (at, byte) in damage {
            damaged[at] = byte;
        }
        let _ = describe(&damaged);
        let _ = (named_sources(&damaged), split_units(&damaged), split_unit_ids(&damaged));
        if let Ok(index) = build(Input { debug: Some(&damaged), ..Input::default() }) {
            prop_assert!(Index::parse(&index).is_ok());
            look_around(&index, addresses);
        }
    }
}
