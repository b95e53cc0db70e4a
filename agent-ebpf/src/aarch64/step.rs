//! One step: from a frame's registers and its record to the caller's registers.
//!
//! A step is exact or it fails with a reason. It never tries a second way: a chain of frame records that
//! happens to look like a stack is worse than a stack that says where it ends.

use windlass_schema::record::{frame_pointer, kind, return_address};
use windlass_schema::{Record, StopReason};

use super::registers::{DWARF_SP, DWARF_X29, DWARF_X30, Registers};
use crate::memory::StackMemory;

/// Bit of each register that every frame restores: sp and x29.
const FRAME_REGISTERS: u32 = 1 << DWARF_SP | 1 << DWARF_X29;
/// Registers in the kernel's `sigcontext`, in words: x0 to x30, sp, pc
/// (arch/arm64/include/uapi/asm/sigcontext.h). All but the last are in the order of DWARF numbers.
const SIGNAL_CONTEXT_WORDS: usize = 33;

#[inline(always)]
fn word<M: StackMemory>(memory: &M, address: u64) -> Result<u64, StopReason> {
    match memory.word(address) {
        Some(word) => Ok(word),
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
    let sp = registers.general[DWARF_SP as usize];
    let (a, b) = (i64::from(record.a()), i64::from(record.b()));
    match record.kind() {
        kind::SP => Ok(offset(sp, i64::from(record.offset()))),
        kind::FP => Ok(offset(registers.get(DWARF_X29)?, i64::from(record.offset()))),
        kind::REGISTER | kind::FAR_CFA => {
            Ok(offset(registers.get(record.aux())?, i64::from(record.offset())))
        }
        kind::DEREF => Ok(offset(word(memory, offset(registers.get(record.aux())?, a))?, b)),
        kind::NO_CFI => Err(StopReason::NoCfi),
        kind::END => Err(StopReason::EndOfStack),
        kind::UNSUPPORTED => Err(StopReason::UnsupportedRule),
        // The others are for x86-64 alone.
        _ => Err(StopReason::TableCorrupt),
    }
}

/// The register that holds the return address. Where the record names that of the CFA, it is x30.
#[inline(always)]
fn return_address_register(record: Record) -> u8 {
    match record.kind() {
        kind::REGISTER | kind::DEREF => DWARF_X30,
        _ => record.aux(),
    }
}

/// Replaces `registers` by those of the caller. On an error they are unchanged, and
/// `EndOfStack` means that there is no caller.
#[inline(always)]
pub fn step<M: StackMemory>(registers: &mut Registers, record: Record, memory: &M) -> Result<(), StopReason> {
    if record.kind() == kind::SIGNAL {
        return leave_signal_frame(registers, record, memory);
    }
    let sp = registers.general[DWARF_SP as usize];
    let cfa = canonical_frame_address(registers, record, memory)?;
    let in_register = record.return_address() == return_address::REGISTER;
    // A call pushes nothing, so a function that keeps its return address in a register may have no frame.
    // Such a step is the first of a walk, or behind a signal: no other frame knows registers but sp and x29.
    if cfa < sp || cfa == sp && !in_register {
        return Err(StopReason::NoAdvance);
    }
    let mut known = FRAME_REGISTERS & registers.known | 1 << DWARF_SP;
    let mut x29 = registers.general[DWARF_X29 as usize];
    let pc;
    let f = i64::from(record.frame_pointer_offset());
    // From where f counts: a frame's lower end may be too far from the CFA.
    let base = if record.kind() == kind::FAR_CFA { offset(cfa, -i64::from(record.offset())) } else { cfa };
    let is_above = record.return_address() == return_address::AT_CFA && f == -16
        || record.return_address() == return_address::ABOVE_FP;
    if record.frame_pointer() == frame_pointer::AT_CFA && is_above {
        // A frame record: x29 and x30, stored as a pair (AAPCS64, 6.4.6).
        let Some([saved, address]) = memory.words(offset(base, f)) else {
            return Err(memory.unreadable(offset(base, f)));
        };
        known |= 1 << DWARF_X29;
        (x29, pc) = (saved, address);
    } else {
        pc = match record.return_address() {
            return_address::AT_CFA => word(memory, cfa.wrapping_sub(8))?,
            return_address::REGISTER => registers.get(return_address_register(record))?,
            return_address::ABOVE_FP => word(memory, offset(base, f + 8))?,
            _ => word(memory, offset(cfa, 8 * i64::from(record.aux() as i8)))?,
        };
        match record.frame_pointer() {
            frame_pointer::SAME => {}
            frame_pointer::AT_CFA => {
                x29 = word(memory, offset(cfa, f))?;
                known |= 1 << DWARF_X29;
            }
            frame_pointer::AT_FP => {
                let at = offset(registers.get(DWARF_X29)?, f);
                // What this frame saved lies inside this frame, or x29 is the caller's already.
                if at >= sp && at < cfa {
                    x29 = word(memory, at)?;
                } else {
                    known &= !(1 << DWARF_X29);
                }
            }
            _ => known &= !(1 << DWARF_X29),
        }
    }
    let pc = pc & !registers.pac_mask;
    if pc == 0 {
        return Err(StopReason::ZeroReturnAddress);
    }
    registers.general[DWARF_SP as usize] = cfa;
    registers.general[DWARF_X29 as usize] = x29;
    registers.pc = pc;
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
    let at = offset(registers.general[DWARF_SP as usize], i64::from(record.a()));
    // On two pages at most: where the first and the last can be read, those between can.
    let [sp, pc] = part::<2, M>(memory, at, SIGNAL_CONTEXT_WORDS - 2)?;
    put(registers, 0, part::<8, M>(memory, at, 0)?);
    put(registers, 8, part::<8, M>(memory, at, 8)?);
    put(registers, 16, part::<8, M>(memory, at, 16)?);
    put(registers, 24, part::<7, M>(memory, at, 24)?);
    registers.general[DWARF_SP as usize] = sp;
    registers.pc = pc;
    registers.known = Registers::ALL;
    registers.exact = 1;
    Ok(())
}

/// `N` words of the context at `at`, from word `first` on: all at once are half of what a BPF program has for a stack.
#[inline(always)]
fn part<const N: usize, M: StackMemory>(memory: &M, at: u64, first: usize) -> Result<[u64; N], StopReason> {
    let at = offset(at, 8 * first as i64);
    match memory.words(at) {
        Some(words) => Ok(words),
        None => Err(memory.unreadable(at)),
    }
}

#[inline(always)]
fn put<const N: usize>(registers: &mut Registers, first: usize, words: [u64; N]) {
    for (number, word) in words.iter().enumerate() {
        registers.general[(first + number) & 31] = *word;
    }
}

#[cfg(test)]
mod tests {
    use windlass_schema::{
        Architecture, CfaRule, FramePointerRule, Register, ReturnAddressRule, Rule, UnsupportedReason,
    };

    use super::super::PAC_MASK;
    use super::super::registers::REGISTERS;
    use super::*;

    /// A stack whose word at `BASE + 8 * n` is `100 + n`, signed.
    struct Stack;

    const BASE: u64 = 0x7000;
    const WORDS: u64 = 64;
    /// Some signature.
    const SIGNED: u64 = 0x2b << 48;

    impl StackMemory for Stack {
        fn words<const N: usize>(&self, address: u64) -> Option<[u64; N]> {
            let first = address.checked_sub(BASE)? / 8;
            let fits = first + N as u64 <= WORDS;
            fits.then(|| std::array::from_fn(|index| SIGNED | 100 + first + index as u64))
        }

        fn unreadable(&self, _address: u64) -> StopReason {
            StopReason::StackRead
        }
    }

    fn x(number: u16) -> Register {
        Register::new(Architecture::Aarch64, number).unwrap()
    }

    fn frame(cfa: CfaRule, return_address: ReturnAddressRule, frame_pointer: FramePointerRule) -> Rule {
        Rule::Frame { cfa, return_address, frame_pointer }
    }

    const SP: usize = DWARF_SP as usize;
    const X29: usize = DWARF_X29 as usize;
    const X30: usize = DWARF_X30 as usize;

    fn registers() -> Registers {
        let mut general = [0; REGISTERS];
        general[SP] = BASE + 16;
        general[X29] = BASE + 80;
        general[X30] = SIGNED | 0x5050;
        general[10] = BASE + 64;
        general[11] = 0x4242;
        Registers::innermost(general, 0x40_1008)
    }

    /// `expect`: the caller's (sp, x29, pc).
    #[track_caller]
    fn check(rule: Rule, expect: Result<(u64, u64, u64), StopReason>) {
        let mut after = registers();
        let outcome = step(&mut after, rule.to_record(), &Stack);
        assert_eq!(outcome.map(|()| (after.general[SP], after.general[X29], after.pc)), expect, "{rule}");
        match outcome {
            Ok(()) => assert_eq!((after.exact, after.known & !FRAME_REGISTERS), (0, 0), "{rule}"),
            Err(_) => assert_eq!(after, registers(), "a failed step changes nothing"),
        }
    }

    const LR: ReturnAddressRule = ReturnAddressRule::Register(Register::X30);
    const SAME: FramePointerRule = FramePointerRule::Same;

    fn sp(offset: i32) -> CfaRule {
        CfaRule::Offset(Register::SP, offset)
    }

    #[test]
    fn each_rule_of_the_closed_set() {
        let (at_cfa, saved) = (ReturnAddressRule::AtCfa, FramePointerRule::AtCfa);
        let x29 = BASE + 80;
        // Leaves, without a frame and with one.
        check(frame(sp(0), LR, SAME), Ok((BASE + 16, x29, 0x5050)));
        check(frame(sp(32), LR, SAME), Ok((BASE + 48, x29, 0x5050)));
        // x29 and x30 as a pair, at the frame's bottom and at its top.
        check(frame(sp(32), at_cfa(-24), saved(-32)), Ok((BASE + 48, SIGNED | 102, 103)));
        check(frame(sp(32), at_cfa(-8), saved(-16)), Ok((BASE + 48, SIGNED | 104, 105)));
        check(
            frame(CfaRule::Offset(Register::X29, 48), at_cfa(-40), saved(-48)),
            Ok((BASE + 128, SIGNED | 110, 111)),
        );
        // The same far below the CFA, and x30 alone: BASE + 16 + 32, and + 24.
        check(
            frame(sp(0x9000), at_cfa(40 - 0x9000), saved(32 - 0x9000)),
            Ok((BASE + 0x9010, SIGNED | 106, 107)),
        );
        check(frame(sp(0x2000), at_cfa(24 - 0x2000), SAME), Ok((BASE + 0x2010, x29, 105)));
        check(
            frame(CfaRule::Offset(x(10), 0x9000), at_cfa(8 - 0x9000), saved(-0x9000)),
            Ok((BASE + 0x9040, SIGNED | 108, 109)),
        );
        // x30 alone, and both apart.
        check(frame(sp(16), at_cfa(-16), SAME), Ok((BASE + 32, x29, 102)));
        check(frame(sp(16), at_cfa(-8), SAME), Ok((BASE + 32, x29, 103)));
        check(frame(sp(48), at_cfa(-16), saved(-40)), Ok((BASE + 64, SIGNED | 103, 106)));
        check(frame(sp(48), at_cfa(-8), saved(-40)), Ok((BASE + 64, SIGNED | 103, 107)));
        // Other registers.
        check(frame(CfaRule::Offset(x(10), 8), LR, SAME), Ok((BASE + 72, x29, 0x5050)));
        check(frame(CfaRule::Offset(x(10), 16), at_cfa(-8), SAME), Ok((BASE + 80, x29, 109)));
        check(frame(sp(0), ReturnAddressRule::Register(x(11)), SAME), Ok((BASE + 16, x29, 0x4242)));
        // *(x10 - 8) is word 7 of the stack.
        let deref = CfaRule::Deref(x(10), -8, 0);
        check(frame(deref, LR, SAME), Ok((SIGNED | 107, x29, 0x5050)));
        check(frame(sp(80), LR, FramePointerRule::AtFramePointer(-8)), Ok((BASE + 96, SIGNED | 109, 0x5050)));
        check(Rule::End, Err(StopReason::EndOfStack));
        check(Rule::NoCfi, Err(StopReason::NoCfi));
        check(Rule::Unsupported(UnsupportedReason::CfaExpression), Err(StopReason::UnsupportedRule));
    }

    #[test]
    fn rules_of_the_other_instruction_set_are_corrupt() {
        let other = [
            kind::DEREF_INDEXED,
            kind::PLT,
            kind::PUSH_RUN,
            kind::POP_RUN,
            kind::GO_STACK,
            kind::OTHER_STACK,
            15,
        ];
        for kind in other {
            let mut after = registers();
            let record = Record::plain(kind, 0, 0, 0, 0, 32);
            assert_eq!(step(&mut after, record, &Stack), Err(StopReason::TableCorrupt), "{kind}");
            assert_eq!(after, registers());
        }
    }

    #[test]
    fn a_frame_must_advance_and_be_readable() {
        let top = ReturnAddressRule::AtCfa(-8);
        check(frame(sp(0), top, SAME), Err(StopReason::NoAdvance));
        check(frame(sp(-16), top, SAME), Err(StopReason::NoAdvance));
        check(frame(sp(-16), LR, SAME), Err(StopReason::NoAdvance));
        check(frame(CfaRule::Offset(Register::X29, -80), LR, SAME), Err(StopReason::NoAdvance));
        check(frame(sp(0x10000), top, SAME), Err(StopReason::StackRead));
        check(frame(sp(0x10000), top, FramePointerRule::AtCfa(-16)), Err(StopReason::StackRead));
        check(frame(sp(0x10000), LR, FramePointerRule::AtCfa(-16)), Err(StopReason::StackRead));
        check(frame(CfaRule::Deref(x(11), 0, 0), LR, SAME), Err(StopReason::StackRead));
        check(Rule::Signal(0x4000), Err(StopReason::StackRead));
    }

    #[test]
    fn registers_that_frames_do_not_restore_are_unknown_in_the_caller() {
        let leaf = frame(sp(0), LR, SAME).to_record();
        let mut after = registers();
        step(&mut after, leaf, &Stack).unwrap();
        assert_eq!((after.exact, after.known), (0, FRAME_REGISTERS));
        let known = after;
        let by_x10 = frame(CfaRule::Offset(x(10), 8), ReturnAddressRule::AtCfa(-8), SAME).to_record();
        // A caller's return address is not in x30, where the call put another.
        for record in [leaf, by_x10] {
            assert_eq!(step(&mut after, record, &Stack), Err(StopReason::RegisterUnknown));
            assert_eq!(after, known);
        }
        let lost = frame(sp(16), ReturnAddressRule::AtCfa(-8), FramePointerRule::Undefined).to_record();
        step(&mut after, lost, &Stack).unwrap();
        let by_x29 =
            frame(CfaRule::Offset(Register::X29, 16), ReturnAddressRule::AtCfa(-8), SAME).to_record();
        assert_eq!(step(&mut after, by_x29, &Stack), Err(StopReason::RegisterUnknown));
        // A signal frame knows them all again.
        step(&mut after, Rule::Signal(0).to_record(), &Stack).unwrap();
        assert_eq!((after.exact, after.known), (1, u32::MAX));
    }

    #[test]
    fn a_frame_pointer_saved_outside_of_the_frame_is_unknown() {
        let record = frame(sp(32), LR, FramePointerRule::AtFramePointer(0)).to_record();
        for x29 in [BASE + 80, BASE + 48, BASE + 8, 1, u64::MAX] {
            let mut after = registers();
            after.general[X29] = x29;
            step(&mut after, record, &Stack).unwrap();
            assert_eq!((after.pc, after.known), (0x5050, 1 << DWARF_SP), "{x29:#x}");
        }
        let mut after = registers();
        after.general[X29] = BASE + 16;
        step(&mut after, record, &Stack).unwrap();
        assert_eq!((after.general[X29], after.known), (SIGNED | 102, FRAME_REGISTERS));
    }

    #[test]
    fn signatures_are_taken_off_return_addresses_alone() {
        let signed = |signature: u64| {
            let mut before = registers();
            before.general[X30] = signature | 0xaaaa_b0de_1234;
            before
        };
        let leaf = frame(sp(0), LR, SAME).to_record();
        for signature in [0, 1 << 48, 1 << 54, PAC_MASK] {
            let mut after = signed(signature);
            step(&mut after, leaf, &Stack).unwrap();
            assert_eq!(after.pc, 0xaaaa_b0de_1234, "{signature:#x}");
        }
        // What no signature touches stays, and is in no mapping: such an address is none of user space.
        for other in [1 << 55, 1 << 63] {
            let mut after = signed(other);
            step(&mut after, leaf, &Stack).unwrap();
            assert_eq!(after.pc, other | 0xaaaa_b0de_1234);
        }
        // As the kernel states it for user addresses of 39 bits.
        let mut after = signed(0);
        after.pac_mask = 0xffff << 39;
        after.general[X30] = 0x2a_b0de_1234 | 0x5a5a << 39;
        step(&mut after, leaf, &Stack).unwrap();
        assert_eq!(after.pc, 0x2a_b0de_1234);
        // A signature alone is no address.
        let mut zero = registers();
        zero.general[X30] = SIGNED;
        assert_eq!(step(&mut zero, leaf, &Stack), Err(StopReason::ZeroReturnAddress));
    }

    #[test]
    fn a_signal_frame_restores_every_register_from_its_place() {
        let mut after = registers();
        step(&mut after, Rule::Signal(40).to_record(), &Stack).unwrap();
        // sp is word 2, so x0 is word 7.
        let expect: [u64; REGISTERS] = std::array::from_fn(|number| SIGNED | 107 + number as u64);
        assert_eq!(after.general, expect);
        assert_eq!((after.pc, after.exact, after.known), (SIGNED | 139, 1, u32::MAX));
        // The interrupted function may be a leaf, with its return address in x30.
        step(&mut after, frame(sp(0), LR, SAME).to_record(), &Stack).unwrap();
        assert_eq!((after.general[SP], after.pc, after.exact), (SIGNED | 138, 137, 0));
    }

    #[test]
    fn a_zero_return_address_is_no_caller_but_no_promise_either() {
        let mut before = registers();
        before.general[X30] = 0;
        let mut after = before;
        let record = frame(sp(0), LR, SAME).to_record();
        assert_eq!(step(&mut after, record, &Stack), Err(StopReason::ZeroReturnAddress));
        assert_eq!(after, before);
        assert!(!StopReason::ZeroReturnAddress.is_complete());
    }
}
