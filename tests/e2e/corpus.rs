//! The committed corpus of every fuzz target, replayed: what a fuzzer once found stays found.

use std::path::PathBuf;

use windlass_schema::BuildId;
use windlass_tests::fuzz_targets::TARGETS;
use windlass_tests::program::{checkout, fixture};

fn folder(target: &str) -> PathBuf {
    checkout().join("fuzz/corpus").join(target)
}

#[test]
fn every_seed_of_every_target() {
    for (target, body) in TARGETS {
        let mut seeds = 0;
        for entry in
            std::fs::read_dir(folder(target)).unwrap_or_else(|error| panic!("corpus of {target}: {error}"))
        {
            let path = entry.expect("an entry").path();
            let seed = std::fs::read(&path).expect("a seed is a file");
            // Cut at places spread over it, and with one byte changed, as well as whole.
            body(&seed);
            for at in (0..seed.len()).step_by(seed.len() / 64 + 1) {
                body(&seed[..at]);
                let mut damaged = seed.clone();
                damaged[at] ^= 0x41;
                body(&damaged);
            }
            seeds += 1;
        }
        assert!(seeds > 0, "{target} has no seeds");
    }
}

#[test]
fn every_target_has_its_fuzzing_binary() {
    for (target, _) in TARGETS {
        let file = checkout().join(format!("fuzz/fuzz_targets/{target}.rs"));
        let text =
            std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        assert!(text.contains(&format!("fuzz_targets::{target}(")), "{} calls its target", file.display());
    }
}

/// Seeds of the compiler alone: not linked, in `.debug_frame`, compressed, apart, of aarch64.
const COMPILE_ONLY: [&str; 12] = [
    "object.o",
    "object",
    "module.o",
    "debug-frame",
    "debug-frame.debug",
    "debug-frame.zlib",
    "debug-frame.zstd",
    "debug-frame.zdebug",
    "aarch64-pac.o",
    "aarch64-pac",
    "aarch64-b-key.o",
    "aarch64-b-key",
];

/// The seeds that come from fixtures are there. `WINDLASS_BLESS=1 cargo test -p windlass-tests seeds` writes them.
#[test]
fn seeds_of_fixtures() {
    let bless = std::env::var_os("WINDLASS_BLESS").is_some();
    let small = std::fs::read(fixture("small")).expect("fixture");
    let plain = std::fs::read(fixture("small-plain")).expect("fixture");
    let broken = std::fs::read(fixture("broken-fde")).expect("fixture");
    let intake = COMPILE_ONLY.map(|name| (name, std::fs::read(fixture(name)).expect("fixture")));
    let build_id = BuildId::new(&[0xab; 20]).expect("20 bytes are a build-ID");
    let table =
        |elf: &[u8]| windlass_unwind_compiler::compile(elf, build_id).expect("fixtures compile").table;
    let wire =
        |elf: &[u8]| windlass_schema::wire::pack(&table(elf)).expect("compiled tables have a wire form");
    let index = |elf: &[u8]| {
        let input = windlass_symbol_index::Input { debug: Some(elf), ..Default::default() };
        windlass_symbol_index::build(input).expect("fixtures have an index")
    };
    let maps = b"00400000-00452000 r-xp 00000000 08:02 173521      /usr/bin/a b\n\
        7f0000000000-7f0000001000 rwxp 00000000 00:00 0 \n\
        7fffb2c0d000-7fffb2c0e000 r-xp 00001000 fe:01 1 /x\\012y (deleted)\n\
        7fffb2d48000-7fffb2d49000 r-xp 00000000 00:00 0          [vdso]\n";
    for (target, name, seed) in [
        ("compile", "small", &small[..]),
        ("compile", "small-plain", &plain),
        ("compile", "broken-fde", &broken),
        ("index_build", "small", &small),
        ("skeleton", "small", &small),
        ("skeleton", "broken-fde", &broken),
        ("table_parse", "small-plain", &table(&plain)),
        ("table_parse", "broken-fde", &table(&broken)),
        ("wire_unpack", "small-plain", &wire(&plain)),
        ("wire_unpack", "small", &wire(&small)),
        ("index_parse", "small", &index(&small)),
        ("index_parse", "small-plain", &index(&plain)),
        ("proc_maps", "five-kinds", maps),
    ]
    .into_iter()
    .chain(intake.iter().map(|(name, elf)| ("compile", *name, &elf[..])))
    {
        let path = folder(target).join(name);
        if bless {
            std::fs::create_dir_all(folder(target)).expect("folder of a corpus");
            std::fs::write(&path, seed).expect("write a seed");
        }
        let kept = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(kept == seed, "{} is not what its fixture gives: WINDLASS_BLESS=1 writes it", path.display());
    }
}
