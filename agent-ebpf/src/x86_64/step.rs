//! One step: from a frame's registers and its record to the caller's registers.
//!
//! A step is exact or it fails with a reason. It never tries a second way: a guess that happens to
//! look like a frame is worse than a stack that says where it ends.

use windlass_schema::record::{DWARF_RBP, DWARF_RSP, frame_pointer, kind, return_address};
use windlass_schema::{Record, StopReason};

use super::registers::Registers;
use crate::memory::StackMemory;

/// Bit of each register that every frame restores: rsp and rbp.
const FRAME_REGISTERS: u32 = 1 << DWARF_RSP | 1 << DWARF_RBP;
/// Number of the sign register of `DEREF_INDEXED`.
const DWARF_R9: usize = 9;
/// Offset of `stack.hi` in Go's `runtime.g`: its first field is the `stack`, two words.
const GO_STACK_END: i64 = 8;
/// Registers in the kernel's `sigcontext`, in words: r8 to r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip
/// (arch/x86/include/uapi/asm/sigcontext.h).
const SIGNAL_CONTEXT_WORDS: usize = 17;
/// DWARF number of each of them, but for the last, which is rip.
const SIGNAL_CONTEXT_ORDER: [u8; SIGNAL_CONTEXT_WORDS - 1] =
    [8, 9, 10, 11, 12, 13, 14, 15, 5, 4, 6, 3, 1, 0, 2, 7];

#[inline(always)]
fn word<M: StackMemory>(memory: &M, address: u64) -> Result<u64, StopReason> {
    match memory.word(address) {
        Some(word) => Ok(word),
        None => Err(memory.unreadable(address)),
    }
}

/// A word that a frame of so many bytes saved.
#[inline(always)]
fn saved_word<M: StackMemory>(memory: &M, address: u64, frame_bytes: u64) -> Result<u64, StopReason> {
    match memory.frame_words::<1>(address, frame_bytes) {
        Some([word]) => Ok(word),
        None => Err(memory.unreadable(address)),
    }
}

#[inline(always)]
fn offset(base: u64, offset: i64) -> u64 {
    base.wrapping_add(offset as u64)
}

/// The canonical frame address that `record` states.
#[inline(always)]
fn canonical_frame_address<M: StackMemory>(
    registers: &Registers,
    record: Record,
    memory: &M,
) -> Result<u64, StopReason> {
    let rsp = registers.general[DWARF_RSP as usize];
    let (a, b) = (i64::from(record.a()), i64::from(record.b()));
    match record.kind() {
        kind::SP => Ok(offset(rsp, i64::from(record.offset()))),
        kind::FP | kind::OTHER_STACK => Ok(offset(registers.get(DWARF_RBP)?, i64::from(record.offset()))),
        kind::REGISTER => Ok(offset(registers.get(record.aux())?, i64::from(record.offset()))),
        kind::DEREF => Ok(offset(word(memory, offset(registers.get(record.aux())?, a))?, b)),
        kind::DEREF_INDEXED => {
            let index = registers.get(DWARF_R9 as u8)?;
            Ok(offset(word(memory, offset(rsp.wrapping_add(index.wrapping_mul(8)), a))?, b))
        }
        kind::PLT => {
            let pushed = i64::from((registers.rip & 15) as i64 >= a) * 8;
            Ok(offset(rsp, b + pushed))
        }
        kind::GO_STACK => {
            let g = word(memory, offset(rsp, a))?;
            let stack_end = word(memory, offset(g, GO_STACK_END))?;
            let stack_pointer = stack_end.wrapping_sub(word(memory, offset(rsp, b))?);
            Ok(offset(stack_pointer, 8 * i64::from(record.aux() as i8)))
        }
        kind::NO_CFI => Err(StopReason::NoCfi),
        kind::END => Err(StopReason::EndOfStack),
        kind::UNSUPPORTED => Err(StopReason::UnsupportedRule),
        _ => Err(StopReason::TableCorrupt),
    }
}

/// Replaces `registers` by those of the caller. On an error they are unchanged, and
/// `EndOfStack` means that there is no caller.
#[inline(always)]
pub fn step<M: StackMemory>(registers: &mut Registers, record: Record, memory: &M) -> Result<(), StopReason> {
    if record.kind() == kind::SIGNAL {
        return leave_signal_frame(registers, record, memory);
    }
    let rsp = registers.general[DWARF_RSP as usize];
    let cfa = canonical_frame_address(registers, record, memory)?;
    // A call pushes its return address, so the caller's stack pointer lies above the callee's, but for
    // a caller on another stack, and where the callee has popped the address into a register. No caller knows
    // such a register, so that a step like that is not followed by another.
    let is_popped = record.return_address() == return_address::REGISTER;
    if (cfa < rsp || cfa == rsp && !is_popped) && record.kind() < kind::GO_STACK {
        return Err(StopReason::NoAdvance);
    }
    let frame_bytes = cfa.wrapping_sub(rsp);
    let mut known = FRAME_REGISTERS & registers.known | 1 << DWARF_RSP;
    let mut rbp = registers.general[DWARF_RBP as usize];
    let rip;
    let f = i64::from(record.frame_pointer_offset());
    if record.frame_pointer() == frame_pointer::AT_CFA
        && f == -16
        && record.return_address() == return_address::AT_CFA
    {
        let Some([saved, address]) = memory.frame_words(cfa.wrapping_sub(16), frame_bytes) else {
            return Err(memory.unreadable(cfa.wrapping_sub(16)));
        };
        known |= 1 << DWARF_RBP;
        (rbp, rip) = (saved, address);
    } else {
        // What was saved lies below the return address: in the order of addresses, one window may hold both.
        match record.frame_pointer() {
            frame_pointer::SAME => {}
            frame_pointer::AT_CFA => {
                rbp = saved_word(memory, offset(cfa, f), frame_bytes)?;
                known |= 1 << DWARF_RBP;
            }
            frame_pointer::AT_FP => {
                let at = offset(registers.get(DWARF_RBP)?, f);
                // GCC states this rule to the end of a DRAP frame's epilogue, behind the `leave` that has made
                // rbp the caller's. What this frame saved lies inside this frame.
                if at >= rsp && at < cfa {
                    rbp = word(memory, at)?;
                } else {
                    known &= !(1 << DWARF_RBP);
                }
            }
            _ => known &= !(1 << DWARF_RBP),
        }
        rip = match record.return_address() {
            return_address::AT_CFA => saved_word(memory, cfa.wrapping_sub(8), frame_bytes)?,
            return_address::REGISTER => registers.get(record.aux() >> 4)?,
            return_address::ABOVE_FP => word(memory, offset(cfa, f + 8))?,
            _ => word(memory, offset(cfa, 8 * i64::from(record.aux() as i8)))?,
        };
    }
    if rip == 0 {
        return Err(StopReason::ZeroReturnAddress);
    }
    registers.general[DWARF_RSP as usize] = cfa;
    registers.general[DWARF_RBP as usize] = rbp;
    registers.rip = rip;
    registers.known = known;
    registers.exact = 0;
    Ok(())
}

/// Takes all registers from the context that the kernel pushed when it delivered a signal. The
/// interrupted stack may be another one, so the stack pointer may move either way.
#[inline(always)]
fn leave_signal_frame<M: StackMemory>(
    registers: &mut Registers,
    record: Record,
    memory: &M,
) -> Result<(), StopReason> {
    let at = offset(registers.general[DWARF_RSP as usize], i64::from(record.a()));
    let Some(context) = memory.words::<SIGNAL_CONTEXT_WORDS>(at) else {
        return Err(memory.unreadable(at));
    };
    for (word, number) in context.iter().zip(SIGNAL_CONTEXT_ORDER) {
        registers.general[number as usize & 15] = *word;
    }
    registers.rip = context[SIGNAL_CONTEXT_WORDS - 1];
    registers.known = Registers::ALL;
    registers.exact = 1;
    Ok(())
}

#[cfg(test)]
mod tests {
    use windlass_schema::record::REGISTERS;
    use windlass_schema::{CfaRule, FramePointerRule, Register, ReturnAddressRule, Rule};

    use super::*;

    /// A stack whose word at `BASE + 8 * n` is `100 + n`.
    struct Stack;

    const BASE: u64 = 0x7000;
    const WORDS: u64 = 64;

    impl StackMemory for Stack {
        fn words<const N: usize>(&self, address: u64) -> Option<[u64; N]> {
            let first = address.checked_sub(BASE)? / 8;
            let fits = first + N as u64 <= WORDS;
            fits.then(|| std::array::from_fn(|index| 100 + first + index as u64))
        }

        fn unreadable(&self, _address: u64) -> StopReason {
            StopReason::StackRead
        }
    }

    fn x86(number: u16) -> Register {
        Register::new(windlass_schema::Architecture::X86_64, number).unwrap()
    }

    fn frame(cfa: CfaRule, return_address: ReturnAddressRule, frame_pointer: FramePointerRule) -> Rule {
        Rule::Frame { cfa, return_address, frame_pointer }
    }

    fn registers() -> Registers {
        let mut general = [0; REGISTERS];
        general[7] = BASE + 16;
        general[6] = BASE + 80;
        general[9] = 3;
        general[10] = BASE + 64;
        general[5] = 0x4242;
        Registers::innermost(general, 0x40100b)
    }

    /// `expect`: the caller's (rsp, rbp, rip).
    #[track_caller]
    fn check(rule: Rule, expect: Result<(u64, u64, u64), StopReason>) {
        let mut after = registers();
        let outcome = step(&mut after, rule.to_record(), &Stack);
        assert_eq!(outcome.map(|()| (after.general[7], after.general[6], after.rip)), expect, "{rule}");
        if outcome.is_err() {
            assert_eq!(after, registers(), "a failed step changes nothing");
        }
    }

    const AT_CFA: ReturnAddressRule = ReturnAddressRule::AtCfa(-8);
    const SAME: FramePointerRule = FramePointerRule::Same;

    #[test]
    fn each_rule_of_the_closed_set() {
        let rbp = BASE + 80;
        check(frame(CfaRule::Offset(Register::RSP, 8), AT_CFA, SAME), Ok((BASE + 24, rbp, 102)));
        check(
            frame(CfaRule::Offset(Register::RSP, 32), AT_CFA, FramePointerRule::AtCfa(-16)),
            Ok((BASE + 48, 104, 105)),
        );
        check(
            frame(CfaRule::Offset(Register::RSP, 48), AT_CFA, FramePointerRule::AtCfa(-32)),
            Ok((BASE + 64, 104, 107)),
        );
        check(
            frame(CfaRule::Offset(Register::RBP, 16), AT_CFA, FramePointerRule::AtFramePointer(0)),
            Ok((BASE + 96, 110, 111)),
        );
        let r10 = x86(10);
        check(frame(CfaRule::Offset(r10, 8), AT_CFA, SAME), Ok((BASE + 72, rbp, 108)));
        let rdi = ReturnAddressRule::Register(x86(5));
        check(frame(CfaRule::Offset(Register::RSP, 8), rdi, SAME), Ok((BASE + 24, rbp, 0x4242)));
        check(frame(CfaRule::Offset(Register::RSP, 0), rdi, SAME), Ok((BASE + 16, rbp, 0x4242)));
        for (return_address, f, rip) in [(-24, FramePointerRule::AtCfa(-32), 105), (-32, SAME, 104)] {
            let rbp = if f == SAME { rbp } else { 104 };
            let rule = frame(CfaRule::Offset(Register::RSP, 48), ReturnAddressRule::AtCfa(return_address), f);
            check(rule, Ok((BASE + 64, rbp, rip)));
        }
        // rip & 15 = 11: the PLT entry has pushed its number.
        let plt = |threshold| frame(CfaRule::Plt { threshold, base: 8 }, AT_CFA, SAME);
        check(plt(11), Ok((BASE + 32, rbp, 103)));
        check(plt(12), Ok((BASE + 24, rbp, 102)));
        check(Rule::End, Err(StopReason::EndOfStack));
        check(Rule::NoCfi, Err(StopReason::NoCfi));
        check(
            Rule::Unsupported(windlass_schema::UnsupportedReason::CfaExpression),
            Err(StopReason::UnsupportedRule),
        );
    }

    #[test]
    fn dereferenced_frame_addresses() {
        // *(rbp - 8) is word 9 of the stack, which holds 109; as an address it is below rsp.
        check(frame(CfaRule::Deref(Register::RBP, -8, 0), AT_CFA, SAME), Err(StopReason::NoAdvance));
        // With b it is an address in the stack.
        check(
            frame(CfaRule::Deref(Register::RBP, -8, 0x7020 - 109), AT_CFA, SAME),
            Ok((BASE + 32, BASE + 80, 103)),
        );
        // rsp + 8 * r9 + 8 is word 2 + 3 + 1 = 6, which holds 106.
        check(frame(CfaRule::DerefIndexed(8, 0x7028 - 106), AT_CFA, SAME), Ok((BASE + 40, BASE + 80, 104)));
    }

    /// From the system stack back to a goroutine's, which may lie below it.
    #[test]
    fn a_go_stack_may_lie_anywhere() {
        struct Stacks;
        impl StackMemory for Stacks {
            fn words<const N: usize>(&self, address: u64) -> Option<[u64; N]> {
                let word = match address {
                    // Saved on the system stack: the depth, and the goroutine.
                    0x7010 => 0x100,
                    0x7018 => 0xc000,
                    // stack.hi of the goroutine; the return address at its stack pointer.
                    0xc008 => 0x3000,
                    0x2f00 => 0x4242,
                    _ => return None,
                };
                (N == 1).then_some([word; N])
            }
            fn unreadable(&self, _: u64) -> StopReason {
                StopReason::StackRead
            }
        }
        let mut after = registers();
        let rule = frame(CfaRule::GoStack { g: 8, depth: 0, words: 1 }, AT_CFA, SAME);
        step(&mut after, rule.to_record(), &Stacks).unwrap();
        assert_eq!((after.rip, after.general[7], after.general[6]), (0x4242, 0x2f08, BASE + 80));
        // By a frame pointer that points there.
        let mut after = registers();
        after.general[6] = 0x2f00 - 8;
        let rule = frame(CfaRule::OtherStack(16), AT_CFA, SAME);
        step(&mut after, rule.to_record(), &Stacks).unwrap();
        assert_eq!((after.rip, after.general[7]), (0x4242, 0x2f08));
    }

    #[test]
    fn a_frame_must_advance_and_be_readable() {
        check(frame(CfaRule::Offset(Register::RSP, 0), AT_CFA, SAME), Err(StopReason::NoAdvance));
        check(frame(CfaRule::Offset(Register::RSP, -8), AT_CFA, SAME), Err(StopReason::NoAdvance));
        let rdi = ReturnAddressRule::Register(x86(5));
        check(frame(CfaRule::Offset(Register::RSP, -8), rdi, SAME), Err(StopReason::NoAdvance));
        check(frame(CfaRule::Offset(Register::RSP, 0x10000), AT_CFA, SAME), Err(StopReason::StackRead));
    }

    /// glibc's vfork holds its return address in rdi, with nothing on the stack.
    #[test]
    fn a_return_address_in_a_register_is_that_of_one_frame() {
        let rdi = ReturnAddressRule::Register(x86(5));
        let popped = frame(CfaRule::Offset(Register::RSP, 0), rdi, SAME).to_record();
        let mut after = registers();
        step(&mut after, popped, &Stack).unwrap();
        let caller = after;
        assert_eq!(step(&mut after, popped, &Stack), Err(StopReason::RegisterUnknown));
        assert_eq!(after, caller);
    }

    #[test]
    fn registers_that_frames_do_not_restore_are_unknown_in_the_caller() {
        let r10 = frame(CfaRule::Offset(x86(10), 8), AT_CFA, SAME).to_record();
        let mut after = registers();
        step(&mut after, frame(CfaRule::Offset(Register::RSP, 8), AT_CFA, SAME).to_record(), &Stack).unwrap();
        assert_eq!(after.exact, 0);
        assert_eq!(step(&mut after, r10, &Stack), Err(StopReason::RegisterUnknown));
        let lost = frame(CfaRule::Offset(Register::RSP, 8), AT_CFA, FramePointerRule::Undefined).to_record();
        step(&mut after, lost, &Stack).unwrap();
        let by_rbp = frame(CfaRule::Offset(Register::RBP, 16), AT_CFA, SAME).to_record();
        assert_eq!(step(&mut after, by_rbp, &Stack), Err(StopReason::RegisterUnknown));
        // A signal frame knows them all again.
        step(&mut after, Rule::Signal(0).to_record(), &Stack).unwrap();
        assert_eq!((after.exact, after.known), (1, 0xffff));
    }

    /// Behind `leave`, rbp is the caller's, and what it points at is not what the frame saved.
    #[test]
    fn a_frame_pointer_saved_outside_of_the_frame_is_unknown() {
        let ret =
            frame(CfaRule::Offset(Register::RSP, 8), AT_CFA, FramePointerRule::AtFramePointer(0)).to_record();
        for rbp in [BASE + 80, BASE + 24, BASE + 8, 1, u64::MAX] {
            let mut after = registers();
            after.general[6] = rbp;
            step(&mut after, ret, &Stack).unwrap();
            assert_eq!((after.rip, after.known), (102, 1 << DWARF_RSP), "{rbp:#x}");
        }
        // In the body, it lies between the stack pointer and the CFA.
        let mut after = registers();
        after.general[6] = BASE + 16;
        step(&mut after, ret, &Stack).unwrap();
        assert_eq!((after.general[6], after.known), (102, FRAME_REGISTERS));
    }

    #[test]
    fn a_signal_frame_restores_every_register_from_its_place() {
        let mut after = registers();
        step(&mut after, Rule::Signal(40).to_record(), &Stack).unwrap();
        // rsp is word 2, so r8 is word 7.
        let expect = [120, 119, 121, 118, 116, 115, 117, 122, 107, 108, 109, 110, 111, 112, 113, 114];
        assert_eq!(after.general, expect);
        assert_eq!((after.rip, after.exact, after.known), (123, 1, 0xffff));
    }

    #[test]
    fn a_zero_return_address_is_no_caller_but_no_promise_either() {
        struct Zero;
        impl StackMemory for Zero {
            fn words<const N: usize>(&self, _: u64) -> Option<[u64; N]> {
                Some([0; N])
            }
            fn unreadable(&self, _: u64) -> StopReason {
                StopReason::StackRead
            }
        }
        let rule = frame(CfaRule::Offset(Register::RSP, 8), AT_CFA, SAME).to_record();
        assert_eq!(step(&mut registers(), rule, &Zero), Err(StopReason::ZeroReturnAddress));
        assert!(!StopReason::ZeroReturnAddress.is_complete());
    }
}
