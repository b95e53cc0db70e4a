//! Frames by another register than rsp and rbp.

use super::*;

/// OpenBLAS's kernels: the stack pointer in a register that functions preserve, while it is aligned.
#[test]
fn x86_64_frames_by_a_register_that_is_preserved() {
    // sub rsp, 24; mov [rsp], rbx; mov [rsp + 8], rbp; mov rbx, rsp
    let mut code =
        vec![0x48, 0x83, 0xec, 24, 0x48, 0x89, 0x1c, 0x24, 0x48, 0x89, 0x6c, 0x24, 8, 0x48, 0x89, 0xe3];
    // sub rsp, 96; and rsp, -64; mov rbp, rdi; mov edi, 1; test edi, edi; je +2; xor ebp, ebp
    code.extend([0x48, 0x83, 0xec, 96, 0x48, 0x83, 0xe4, 0xc0, 0x48, 0x89, 0xfd, 0xbf, 1, 0, 0, 0]);
    code.extend([0x85, 0xff, 0x74, 2, 0x31, 0xed]);
    // mov rsp, rbx; mov rbx, [rsp]; mov rbp, [rsp + 8]; add rsp, 24; ret
    code.extend([
        0x48, 0x89, 0xdc, 0x48, 0x8b, 0x1c, 0x24, 0x48, 0x8b, 0x6c, 0x24, 8, 0x48, 0x83, 0xc4, 24, 0xc3,
    ]);
    let expect = [
        "0..4 function cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "4..13 function cfa=rsp+32 ra=*(cfa-8) rbp=same",
        "13..20 function cfa=rsp+32 ra=*(cfa-8) rbp=*(cfa-24)",
        "20..24 function cfa=rsp+128 ra=*(cfa-8) rbp=*(cfa-24)",
        "24..41 function cfa=rbx+32 ra=*(cfa-8) rbp=*(cfa-24)",
        "41..50 function cfa=rsp+32 ra=*(cfa-8) rbp=*(cfa-24)",
        "50..54 function cfa=rsp+32 ra=*(cfa-8) rbp=same",
        "54..55 function cfa=rsp+8 ra=*(cfa-8) rbp=same",
    ];
    let starts = symbols(&[(0, code.len() as u64)]);
    check(X86_64, &code, &starts, &expect);
    // What writes rbx on the way, all of it or a byte, whatever the rest says: cpuid for je; bh, bl; xchg for test.
    for (at, other) in [(34, [0x0f, 0xa2]), (36, [0x30, 0xff]), (36, [0x30, 0xdb]), (32, [0x87, 0xdf])] {
        let mut code = code.clone();
        code[at..at + 2].copy_from_slice(&other);
        check(X86_64, &code, &starts, &[]);
    }
    // By rdi, which what is called need not preserve: mov rdi, rsp; mov rsp, rdi.
    (code[15], code[40]) = (0xe7, 0xfc);
    check(X86_64, &code, &starts, &[]);
}
