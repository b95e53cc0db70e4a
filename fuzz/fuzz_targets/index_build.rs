#![no_main]

libfuzzer_sys::fuzz_target!(
    // The conversion of DWARF guards itself against panics of the library under it; libFuzzer's hook would
    // abort before the guard sees them. A panic that gets past it still ends the process.
    init: std::panic::set_hook(Box::new(|_| ())),
    |data: &[u8]| windlass_fuzz::fuzz_targets::index_build(data)
);
