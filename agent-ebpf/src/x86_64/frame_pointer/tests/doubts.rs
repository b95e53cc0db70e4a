//! Code in front of an address that must not be taken for its own function's.

use super::*;

/// Where rbp is the caller's again and not the last instruction, there is a caller or none, but never the next.
#[test]
fn what_stands_between_a_frames_end_and_the_return() {
    for (behind, starts) in [
        // jmp .., near and short; jmp *%r11; repz ret
        (&[0xe9, 0, 1, 0, 0][..], &[0][..]),
        (&[0xeb, 0x10], &[0]),
        (&[0x41, 0xff, 0xe3], &[0]),
        (&[0xf3, 0xc3], &[0]),
        // cmp ..(%r15), %rsp; ja ..; ret
        (&[0x49, 0x3b, 0xa7, 0x30, 4, 0, 0, 0x0f, 0x87, 1, 0, 0, 0, 0xc3], &[0, 7, 13]),
        // xor %ecx, %ecx; xor %r8d, %r8d; xor %rdx, %rdx; ret
        (&[0x31, 0xc9, 0x45, 0x31, 0xc0, 0x48, 0x31, 0xd2, 0xc3], &[0, 2, 5, 8]),
        // vzeroupper; ret
        (&[0xc5, 0xf8, 0x77, 0xc3], &[0, 3]),
        // test %eax, %eax; jne ..; ret
        (&[0x85, 0xc0, 0x75, 0x11, 0xc3], &[0, 2, 4]),
    ] {
        for function in [0x200, 0x203, 0x206] {
            // push %rbp; mov %rsp, %rbp; push %rbx; mov -8(%rbp), %rbx; pop %rbx; pop %rbp
            let frame = &[0x55, 0x48, 0x89, 0xe5, 0x53, 0x48, 0x8b, 0x5d, 0xf8, 0x5b, 0x5d][..];
            let end = function + frame.len();
            for content in [no_table::location(StopReason::Jit), no_table::FRAME_POINTERS] {
                let memory = Memory::new(&[CALL, (function, frame), (end, behind)]).keeping(content);
                let stack = [(8, 0xb), (9, word(20)), (10, RETURN), (20, word(28)), (21, RETURN)];
                let memory = memory.with_stack(&stack);
                let at = |offset: usize| CODE + (end + offset) as u64;
                for start in starts {
                    let found = caller(&memory, at(*start), true, word(10), word(20));
                    assert!(
                        matches!(found, Err(StopReason::FramePointer | StopReason::Jit))
                            || found == Ok((RETURN, word(11), word(20))),
                        "{behind:x?} {start} of {function:#x}: {found:x?}"
                    );
                }
                // In its body the displacement is no such end.
                let found = caller(&memory, CODE + function as u64 + 9, true, word(8), word(9));
                assert_eq!(found, Ok((RETURN, word(11), word(20))), "{behind:x?}");
            }
        }
    }
}

/// A function whose last instruction does not come back, and behind it one without a frame.
#[test]
fn the_function_in_front_need_not_end_with_a_return() {
    let leaf: &[u8] = &[0x31, 0xc0, 0xff, 0xc0, 0xc3];
    for last in [
        // call ..; call *..(%rip); jmp ..; jmp .; ud2; hlt
        &[0xe8, 0xf0, 0xff, 0xff, 0xff][..],
        &[0xff, 0x15, 0xf0, 0xff, 0xff, 0xff],
        &[0xe9, 0xf0, 0xff, 0xff, 0xff],
        &[0xff, 0x25, 0xf0, 0xff, 0xff, 0xff],
        &[0xeb, 0xfe],
        &[0x0f, 0x0b],
        &[0xf4],
    ] {
        // push %rbp; mov %rsp, %rbp; mov %edi, %eax ..
        let mut function = vec![0x55, 0x48, 0x89, 0xe5];
        while function.len() + last.len() < 16 {
            function.push(if function.len() % 2 == 0 { 0x89 } else { 0xf8 });
        }
        function.extend(last);
        let memory = Memory::new(&[CALL, (0x200, &function), (0x210, leaf)]);
        let memory = memory.with_stack(&[(10, RETURN), (20, word(28)), (21, RETURN)]);
        let found = caller(&memory, 0x1212, true, word(10), word(20));
        assert_eq!(found, Err(StopReason::FramePointer), "{last:x?}");
    }
}

/// The same where functions are not aligned, so that nothing tells the one's end from a call or jump within it.
#[test]
fn the_next_function_need_not_be_aligned() {
    for last in [
        // call ..; jmp *%rax; jmp ..
        &[0xe8, 0x20, 0, 0, 0][..],
        &[0xff, 0xe0],
        &[0xe9, 0x20, 0, 0, 0],
    ] {
        // push %rbp; mov %rsp, %rbp; .. and sub $0x18, %rsp; mov .., %rax; call *%rax; add $0x18, %rsp; ret
        let function = [&[0x55, 0x48, 0x89, 0xe5][..], last].concat();
        let next: &[u8] =
            &[0x48, 0x83, 0xec, 0x18, 0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8, 0xff, 0xd0, 0x48, 0x83];
        for content in [no_table::location(StopReason::Jit), no_table::ANY_JIT_FRAME_POINTERS] {
            let memory =
                Memory::new(&[CALL, (0x241, &function), (0x241 + function.len(), next)]).keeping(content);
            let memory = memory.with_stack(&[(7, RETURN), (20, word(28)), (21, RETURN)]);
            let at = CODE + 0x241 + function.len() as u64;
            for (exact, offset) in [(false, 16), (true, 4), (true, 14)] {
                let found = caller(&memory, at + offset, exact, word(4), word(20));
                assert_eq!(found, Err(StopReason::FramePointer), "{last:x?} {offset}");
            }
        }
    }
}

/// A function that looks at its arguments before it builds a frame, right behind another.
#[test]
fn a_prologue_ahead_is_a_doubt() {
    // mov %edi, %eax
    let body = [0x89, 0xf8].repeat(6);
    // test %edi, %edi; je ..; push %rbp; mov %rsp, %rbp
    let checks: &[u8] = &[0x85, 0xff, 0x74, 0x20, 0x55, 0x48, 0x89, 0xe5];
    let code = [&[0x55, 0x48, 0x89, 0xe5][..], &body, checks].concat();
    let memory = Memory::new(&[CALL, (0x201, &code)]);
    let memory = memory.with_stack(&[(10, RETURN), (20, word(28)), (21, RETURN)]);
    for at in [0x1211, 0x1213] {
        let found = caller(&memory, at, true, word(10), word(20));
        assert_eq!(found, Err(StopReason::FramePointer), "{at:#x}");
    }
}

/// The innermost frame of an image may be of a function that is not aligned and stands behind any call.
#[test]
fn in_an_image_the_stack_has_to_be_clean() {
    let rest = (0x20a, &[0x89, 0xf8, 0x89, 0xf8, 0x89, 0xf8][..]);
    let code = (0x200, &WITH_FRAME.1[..8]);
    let found = |left: u64| {
        let memory = Memory::new(&[CALL, code, (0x208, &[0x89, 0xf8]), rest])
            .keeping(no_table::location(StopReason::FramePointer));
        let memory =
            memory.with_stack(&[(7, left), (9, word(20)), (10, RETURN), (20, word(28)), (21, RETURN)]);
        caller(&memory, 0x120c, true, word(7), word(9))
    };
    assert_eq!(found(0), Ok((RETURN, word(11), word(20))));
    assert_eq!(found(RETURN), Err(StopReason::FramePointer));
}

/// GCC's realigned frames: lea 8(%rsp), %r10; and $-32, %rsp; push -8(%r10); push %rbp; mov %rsp, %rbp
#[test]
fn the_caller_of_a_realigned_frame_is_not_beside_it() {
    let function: &[u8] = &[
        0x4c, 0x8d, 0x54, 0x24, 0x08, 0x48, 0x83, 0xe4, 0xe0, 0x41, 0xff, 0x72, 0xf8, 0x55, 0x48, 0x89, 0xe5,
        0x41, 0x52, 0x89, 0xf8, 0x89, 0xf8,
    ];
    let stack = [(8, 0), (9, word(20)), (10, RETURN), (14, RETURN), (20, word(28)), (21, RETURN)];
    for content in [no_table::location(StopReason::Jit), no_table::FRAME_POINTERS] {
        let memory = Memory::new(&[CALL, (0x200, function)]).keeping(content).with_stack(&stack);
        for (exact, at, rsp, rbp) in [
            (true, 0x120d, word(10), word(20)),
            (true, 0x120e, word(9), word(20)),
            (true, 0x1211, word(9), word(9)),
            (true, 0x1215, word(8), word(9)),
            (false, 0x1215, word(8), word(9)),
        ] {
            let found = caller(&memory, at, exact, rsp, rbp);
            assert!(found.is_err(), "{at:#x}: {found:x?}");
        }
    }
}
