//! Is each return address one that a call leaves?

use std::collections::HashMap;

use object::{Object as _, ObjectSegment as _};
use windlass_tests::stacks::{Frame, Stack};

use super::chain::base_name;
use super::launch::Running;

/// `mov $15, %eax` or `%rax`, and `syscall`: what the kernel lets a signal handler return to (`__restore_rt`).
const SIGNAL_RETURNS: [&[u8]; 2] =
    [&[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05], &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05]];
/// Bytes of the longer of them.
const LONGEST_SIGNAL_RETURN: u64 = 9;
/// Functions that are returned to without having called.
const FIRST: [&str; 1] = ["runtime.goexit"];
/// What the first function of a coroutine returns to, which no call is in front of: `mov %rbx, %rsp; mov (%rsp), %rdi` (glibc's
/// sysdeps/unix/sysv/linux/x86_64/__start_context.S).
const COROUTINE_END: [u8; 7] = [0x48, 0x89, 0xdc, 0x48, 0x8b, 0x3c, 0x24];
/// Frames around libgcc's unwinder that may be where no call is: its caller's, when it has put what another function saved in place
/// of its own, those between, and the one whose landing pad is in place of its return address (uw_install_context,
/// libgcc/unwind-dw2.c).
const INSTALLED: usize = 3;
/// Most bytes of a call of a register or of memory.
const LONGEST_CALL: u64 = 8;

/// The files of a process's images, by path.
pub(crate) struct Images<'a> {
    program: &'a Running,
    files: HashMap<String, Option<Vec<u8>>>,
}

impl<'a> Images<'a> {
    pub(crate) fn of(program: &'a Running) -> Self {
        Self { program, files: HashMap::new() }
    }

    /// Whether all frames of a stack but the innermost are behind a call, or what a signal interrupted, or
    /// where the unwinder of exceptions returns to, or one of [`FIRST`], or [`COROUTINE_END`]; that at which a walk was cut short is not
    /// looked at. Of an image whose file is not there nothing is said. Of the [`INSTALLED`]
    /// frames around the unwinder nothing is said either.
    pub(crate) fn returns_behind_calls(&mut self, stack: &Stack) -> bool {
        let mut unjudged = 1;
        let count = stack.frames.len() - usize::from(!stack.is_complete() && !stack.frames.is_empty());
        stack.frames[..count].iter().all(|frame| {
            let is_judged = unjudged == 0;
            unjudged = match frame.function.starts_with("_Unwind_") {
                true => INSTALLED,
                // An inlined function is where the one around it is.
                false if self.is_signal_return(frame, !is_judged) || !is_judged && frame.inlined => {
                    unjudged.max(1)
                }
                false => unjudged.saturating_sub(1),
            };
            let is_first = FIRST.contains(&frame.function.as_str()) || self.is_coroutine_end(frame);
            !is_judged || unjudged > 0 || is_first || self.is_behind_call(frame).unwrap_or(true)
        })
    }

    /// The bytes of an image at an address of its own, `before` of them before it.
    fn bytes(&mut self, frame: &Frame, before: u64, count: u64) -> Option<Vec<u8>> {
        // The program's own file may be another by now.
        let read = || match base_name(&frame.image).starts_with(&self.program.comm) {
            true => self.program.images.first().cloned(),
            false => std::fs::read(&frame.image).ok(),
        };
        let file = self.files.entry(frame.image.clone()).or_insert_with(read);
        let elf = object::File::parse(&file.as_ref()?[..]).ok()?;
        let start = frame.address.checked_sub(before)?;
        let bytes = elf.segments().find_map(|segment| segment.data_range(start, count).ok().flatten())?;
        Some(bytes.to_vec())
    }

    /// The address is the signal return's first, or, lowered as if it were behind a call, the one before it. Interrupted
    /// is anything of it.
    fn is_signal_return(&mut self, frame: &Frame, interrupted: bool) -> bool {
        let Some(bytes) = self.bytes(frame, LONGEST_SIGNAL_RETURN, 2 * LONGEST_SIGNAL_RETURN + 1) else {
            return false;
        };
        let first = LONGEST_SIGNAL_RETURN as usize;
        let mut starts = if interrupted { 0..first + 2 } else { first..first + 2 };
        starts.any(|start| SIGNAL_RETURNS.iter().any(|code| bytes[start..].starts_with(code)))
    }

    /// The address is lowered into the padding in front of it.
    fn is_coroutine_end(&mut self, frame: &Frame) -> bool {
        let bytes = self.bytes(frame, 0, 1 + COROUTINE_END.len() as u64);
        bytes.is_some_and(|bytes| bytes[1..] == COROUTINE_END)
    }

    /// The address is lowered into the call: the byte behind it is the return address.
    fn is_behind_call(&mut self, frame: &Frame) -> Option<bool> {
        let bytes = self.bytes(frame, LONGEST_CALL - 1, LONGEST_CALL)?;
        let is_indirect = |length: usize| {
            let call = &bytes[bytes.len() - length..];
            let call = if call[0] & 0xf0 == 0x40 { &call[1..] } else { call };
            call.len() >= 2 && call[0] == 0xff && call[1] >> 3 & 7 == 2
        };
        Some(bytes[bytes.len() - 5] == 0xe8 || (2..=LONGEST_CALL as usize).any(is_indirect))
    }
}
