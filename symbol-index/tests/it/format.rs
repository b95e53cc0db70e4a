//! The bytes of an index. A change here is a change of the format: it needs a new `FORMAT_VERSION`.

use windlass_symbol_index::{FORMAT_VERSION, Input, build};

#[track_caller]
fn check(kallsyms: &[u8], expect: &str) {
    let bytes = build(Input { kallsyms: Some(kallsyms), ..Input::default() }).unwrap();
    let words: Vec<String> =
        bytes.chunks(8).map(|word| word.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
    let expect: Vec<&str> = expect.split_ascii_whitespace().collect();
    assert_eq!(words, expect);
}

#[test]
fn golden_bytes() {
    assert_eq!(FORMAT_VERSION, 1);
    check(
        b"",
        "574c535801000000 e606fda49c3b38fb 0000000000000000 0000000000000000
        5000000000000000 0000000000000000
        5000000000000000 0000000000000000
        5000000000000000 0000000000000000",
    );
    check(
        b"00001000 T _ZN3foo3barEv\n00001010 t baz\n",
        "574c535801000000 13d2ff41f023891c 0000000000000000 0000000000000000
        5000000000000000 0000000000000000
        5000000000000000 3000000000000000
        8000000000000000 2600000000000000
        0010000000000000 1000000000000000 0e00000002000000
        1010000000000000 001000001f000000 ffffffff02000000
        0a000000666f6f3a 3a62617228290d00 00005f5a4e33666f 6f33626172457603 00000062617a",
    );
}
