//! Why a walk ended.
//!
//! Every walk ends with exactly one reason, and only [`StopReason::is_complete`] ones count as
//! complete. A profiler that calls a cut stack complete sends its reader looking in the wrong place,
//! so a reason is never dropped on the way: it travels from the BPF program through the OTLP sample
//! (attribute `windlass.stop_reason`) to the printed summary.

macro_rules! stop_reasons {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $text:literal;)*) => {
        /// Why a walk ended. The discriminant is what the BPF program writes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum StopReason {
            $($(#[$doc])* $name = $code,)*
        }

        impl StopReason {
            /// Every reason, in the order of the codes.
            pub const ALL: &[StopReason] = &[$(StopReason::$name,)*];

            /// The name used in JSON, labels and metrics.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(StopReason::$name => $text,)*
                }
            }
        }

        impl TryFrom<u8> for StopReason {
            type Error = UnknownStopReason;

            fn try_from(code: u8) -> Result<Self, UnknownStopReason> {
                match code {
                    $($code => Ok(StopReason::$name),)*
                    _ => Err(UnknownStopReason(code)),
                }
            }
        }
    };
}

stop_reasons! {
    /// The CFI of the last frame says that it has no caller (`_start`, `clone3`).
    EndOfStack = 0, "end_of_stack";
    /// A kernel thread: there is no user stack to walk.
    KernelThread = 1, "kernel_thread";
    /// The agent has not yet read this process's mappings.
    ProcessUnknown = 2, "process_unknown";
    /// The address lies in no executable mapping of the process.
    NoMapping = 3, "no_mapping";
    /// The image's table is on its way.
    TablePending = 4, "table_pending";
    /// No table can be had for the image; the agent's log says why.
    TableUnavailable = 5, "table_unavailable";
    /// The image's table did not fit into the agent's byte budget.
    TableBudget = 6, "table_budget";
    /// Anonymous executable memory: code that a JIT compiler wrote. Nothing proves that it keeps frame pointers.
    Jit = 7, "jit";
    /// The address is inside an image, but no CFI covers it, and nothing proves that the code keeps frame pointers.
    NoCfi = 8, "no_cfi";
    /// CFI covers the address with a rule that the table marks unsupported.
    UnsupportedRule = 9, "unsupported_rule";
    /// The CFA needs a register that earlier frames did not restore.
    RegisterUnknown = 10, "register_unknown";
    /// Stack memory could not be read.
    StackRead = 11, "stack_read";
    /// The stack pointer did not move towards the stack's base.
    NoAdvance = 12, "no_advance";
    /// The walk reached its limit of frames.
    FrameLimit = 13, "frame_limit";
    /// A table held something that its format forbids.
    TableCorrupt = 14, "table_corrupt";
    /// The process's mappings changed under the walk.
    MappingsChanged = 15, "mappings_changed";
    /// The walk left the copied part of the stack (walks in user space only).
    CopiedStackEnd = 16, "copied_stack_end";
    /// The registers of user mode could not be had.
    RegistersUnavailable = 17, "registers_unavailable";
    /// The return address is zero, though CFI promised a caller.
    ZeroReturnAddress = 18, "zero_return_address";
    /// The code keeps frame pointers, but here none leads to a caller for certain.
    FramePointer = 19, "frame_pointer";
}

/// A code that names no [`StopReason`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown stop reason code {0}")]
pub struct UnknownStopReason(pub u8);

impl StopReason {
    /// Number of codes; counters are arrays of this length.
    pub const COUNT: usize = Self::ALL.len();

    /// Whether the walk reached a real end of stack.
    pub const fn is_complete(self) -> bool {
        matches!(self, Self::EndOfStack | Self::KernelThread)
    }

    /// The reason with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.as_str() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_dense_and_names_distinct() {
        for (code, reason) in StopReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, code);
            assert_eq!(StopReason::try_from(code as u8), Ok(*reason));
            assert_eq!(StopReason::from_name(reason.as_str()), Some(*reason));
        }
        assert_eq!(StopReason::try_from(200), Err(UnknownStopReason(200)));
    }
}
