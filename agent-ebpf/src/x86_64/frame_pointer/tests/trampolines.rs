//! CPython's, as 3.12 and 3.13 copy them.

use super::*;

/// sub $8, %rsp; call *%rcx; add $8, %rsp; ret
const TRAMPOLINE: &[u8] = &[0x48, 0x83, 0xec, 8, 0xff, 0xd1, 0x48, 0x83, 0xc4, 8, 0xc3];
/// endbr64
const ENDBR64: &[u8] = &[0xf3, 0x0f, 0x1e, 0xfa];

/// `code` three times in a row, the second at 0x1400, called when rsp was word 11.
fn called(code: &[u8]) -> Memory {
    let row = code.repeat(3);
    Memory::new(&[CALL, (0x400 - code.len(), &row)]).with_stack(&[(10, RETURN), (20, word(28)), (21, RETURN)])
}

#[test]
fn each_instruction() {
    let expect = Ok((RETURN, word(11), word(20)));
    let marked = [ENDBR64, TRAMPOLINE].concat();
    let (plain, marked) = (called(TRAMPOLINE), called(&marked));
    for (at, rsp) in [(0, word(10)), (4, word(9)), (6, word(9)), (10, word(10))] {
        assert_eq!(caller(&plain, 0x1400 + at, true, rsp, word(20)), expect, "{at}");
        assert_eq!(caller(&marked, 0x1404 + at, true, rsp, word(20)), expect, "{at}");
    }
    assert_eq!(caller(&marked, 0x1400, true, word(10), word(20)), expect);
    // As a caller. By rbp, which is that of who called the trampoline, that one would be skipped.
    assert_eq!(caller(&plain, 0x1406, false, word(9), word(20)), expect);
}

/// Each byte of it counts, and so does it that the caller's address is one.
#[test]
fn what_is_no_trampoline() {
    for at in 0..TRAMPOLINE.len() {
        let mut code = TRAMPOLINE.to_vec();
        code[at] ^= 0x20;
        assert!(caller(&called(&code), 0x1406, false, word(9), word(20)).is_err(), "{at}");
    }
    let elsewhere = called(TRAMPOLINE).with_stack(&[(10, RETURN + 1)]);
    assert_eq!(caller(&elsewhere, 0x1406, false, word(9), word(20)), Err(StopReason::FramePointer));
    // A return address is never in front of the call.
    assert!(caller(&called(TRAMPOLINE), 0x1404, false, word(9), word(20)).is_err());
}
