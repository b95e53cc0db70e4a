//! Tests of the intake.

use windlass_schema::Architecture;

use super::*;

/// Where the reach of an image with code at `first` ends, which `end` is just short of or at.
#[track_caller]
fn check_reach(first: u64, end: u64) {
    let image = Image { first_code: Some(first), ..Image::new(&[], Architecture::X86_64) };
    assert!(image.reaches(&(first..end - 1)), "{first:#x}..{end:#x}");
    assert!(!image.reaches(&(first..end)), "{first:#x}..{end:#x}");
}

#[test]
fn the_row_behind_the_last_fde_has_a_page() {
    check_reach(0, (1 << 32) - 256);
    check_reach(0x40_0123, 0x40_0000 + (1 << 32) - 256);
    // The kernel's half: the last page of the address space is out of reach.
    check_reach(0xffff_ffff_8000_0000, 0xffff_ffff_fffe_ff00);
}
