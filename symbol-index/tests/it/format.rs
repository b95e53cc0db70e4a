//! The bytes of an index. A change here is a change of the format: it needs a new `FORMAT_VERSION`.

use std::process::Command;

use windlass_symbol_index::{FORMAT_VERSION, Input, build};

use crate::program::{Workshop, run};

/// A program of two functions without names, from 0x1000 to 0x1020 and from 0x1030 to 0x1100.
fn two_functions() -> Vec<u8> {
    let workshop = Workshop::new();
    let (source, program) = (workshop.path("two.s"), workshop.path("two"));
    let [first, second] = [0x20, 0xd0].map(|size| format!(".cfi_startproc\n.skip {size}\n.cfi_endproc\n"));
    std::fs::write(&source, format!("{first}.skip 0x10\n{second}")).unwrap();
    let link = ["-nostdlib", "-static", "-no-pie", "-s", "-Wl,-Ttext=0x1000,-e,0x1000"];
    run(Command::new("cc").args(link).arg("-o").arg(&program).arg(&source));
    std::fs::read(program).unwrap()
}

#[track_caller]
fn check(image: Option<&[u8]>, kallsyms: &[u8], expect: &str) {
    let bytes = build(Input { image, kallsyms: Some(kallsyms), ..Input::default() }).unwrap();
    let words: Vec<String> =
        bytes.chunks(8).map(|word| word.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
    let expect: Vec<&str> = expect.split_ascii_whitespace().collect();
    assert_eq!(words, expect);
}

#[test]
fn golden_bytes() {
    assert_eq!(FORMAT_VERSION, 3);
    check(
        None,
        b"",
        "574c535803000000 461b6ee70f9d6158 0000000000000000 0000000000000000
        7000000000000000 0000000000000000
        7000000000000000 0000000000000000
        7000000000000000 0000000000000000
        7000000000000000 0000000000000000
        7000000000000000 0000000000000000",
    );
    check(
        None,
        b"00001000 T _ZN3foo3barEv\n00001010 t baz\n",
        "574c535803000000 c097694be512ddb8 0000000000000000 0000000000000000
        7000000000000000 0000000000000000
        7000000000000000 3000000000000000
        a000000000000000 2600000000000000
        c800000000000000 0000000000000000
        c800000000000000 0000000000000000
        0010000000000000 1000000000000000 0e00000002000000
        1010000000000000 001000001f000000 ffffffff02000000
        0a000000666f6f3a 3a62617228290d00 00005f5a4e33666f 6f33626172457603 00000062617a0000",
    );
    check(
        Some(&two_functions()),
        b"",
        "574c535803000000 e18a669422f77078 0000000000000000 0000000000000000
        7000000000000000 0000000000000000
        7000000000000000 0000000000000000
        7000000000000000 0000000000000000
        7000000000000000 0c00000000000000
        8000000000000000 0400000000000000
        0010000000000000 0000000000000000
        2010d001",
    );
}
