//! The stack as calls and returns made it: known from watching every instruction, not from any CFI.
//!
//! CFI can be wrong, and then all who read it agree on a wrong frame. What a call pushed and no return has
//! taken back is there.

use windlass_agent_ebpf::memory::StackMemory as _;
use windlass_agent_ebpf::x86_64::Registers;

use super::tracee::ProcessMemory;

/// Lengths of call instructions: two bytes for `call *%rax`, seven with a long displacement.
const CALL_BYTES: std::ops::RangeInclusive<u64> = 2..=7;
const RSP: usize = windlass_schema::record::DWARF_RSP as usize;

/// What is on the stack.
#[derive(Debug)]
pub(crate) struct CallStack(Vec<Caller>);

/// A caller: where on the stack its address lies, the address, and whether it is that of an instruction
/// that a signal interrupted.
#[derive(Clone, Copy, Debug)]
struct Caller {
    at: u64,
    rip: u64,
    exact: bool,
}

impl CallStack {
    /// From the frames of a stack, innermost first.
    pub(crate) fn of(frames: &[Registers]) -> Self {
        let caller = |frame: &Registers| Caller {
            at: frame.general[RSP] - 8,
            rip: frame.rip,
            exact: frame.exact != 0,
        };
        Self(frames[1..].iter().rev().map(caller).collect())
    }

    /// Takes note of one instruction, or of the delivery of a signal.
    pub(crate) fn step(
        &mut self,
        before: &Registers,
        after: &Registers,
        signal: bool,
        memory: &ProcessMemory,
    ) {
        let rsp = after.general[RSP];
        if signal {
            // The kernel leaves the interrupted registers, and above them the address that the handler returns to.
            self.0.push(Caller { at: rsp + 8, rip: before.rip, exact: true });
            let rip = memory.word(rsp).expect("a signal frame");
            self.0.push(Caller { at: rsp, rip, exact: false });
            return;
        }
        while self.0.last().is_some_and(|caller| caller.at < rsp) {
            self.0.pop();
        }
        let pushed = if rsp == before.general[RSP].wrapping_sub(8) { memory.word(rsp) } else { None };
        if let Some(rip) = pushed.filter(|rip| CALL_BYTES.contains(&rip.wrapping_sub(before.rip))) {
            self.0.push(Caller { at: rsp, rip, exact: false });
        }
    }

    /// Whether these are its frames, innermost first, as far as they go.
    pub(crate) fn has(&self, frames: &[Registers], complete: bool) -> bool {
        let callers = &frames[1..];
        let same = |(caller, frame): (&Caller, &Registers)| {
            (caller.rip, caller.exact) == (frame.rip, frame.exact != 0)
        };
        callers.len() <= self.0.len()
            && (!complete || callers.len() == self.0.len())
            && self.0.iter().rev().zip(callers).all(same)
    }
}
