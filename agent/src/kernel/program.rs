//! Which of the object's programs takes the samples?
//!
//! Both are the same but for the helper that makes a walk's turns: `bpf_loop` where there is one, since Linux 5.17, otherwise
//! `bpf_for_each_map_elem`. Versions say little of kernels to which distributions added helpers, and a probe would load a
//! program of its own; so the first is tried, and what the verifier says of its helpers decides. Both need
//! `bpf_task_pt_regs`, which Linux 5.15 brought.

use std::time::Instant;

use aya::Ebpf;
use aya::programs::{PerfEvent, ProgramError};
use windlass_schema::maps::names;

use super::{LoadError, describe, refusal};

/// Helpers by the numbers that the verifier gives of those that it does not know, and the kernel that brought them
/// (`___BPF_FUNC_MAPPER`, include/uapi/linux/bpf.h).
const HELPERS: [(u32, &str); 4] = [
    (158, "bpf_get_current_task_btf"),
    (164, "bpf_for_each_map_elem"),
    (175, "bpf_task_pt_regs"),
    (BPF_LOOP, "bpf_loop"),
];
const BPF_LOOP: u32 = 181;
/// What kernels before 5.13 say of functions that a helper calls: they take them for no function, or not for an operand
/// (`check_btf_func`, `resolve_pseudo_ldimm64`, kernel/bpf/verifier.c).
const NO_CALLBACKS: [&str; 2] =
    ["number of funcs in func_info doesn't match number of subprogs", "unrecognized bpf_ld_imm64 insn"];

/// What kernels before 6.1 say of hash maps that take memory as they are filled.
pub(super) const NO_GROWING_MAPS: &str = "can only use preallocated hash map";

/// How a walk makes its turns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Turns {
    /// As the kernel can.
    #[default]
    Probed,
    /// As kernels without `bpf_loop` do.
    WithoutLoop,
}

impl Turns {
    /// Variable of the environment for tests in other kernels.
    pub const VARIABLE: &str = "WINDLASS_BPF_TURNS";

    /// Without `bpf_loop` if [`Self::VARIABLE`] is `without-loop`.
    pub fn from_environment() -> Self {
        match std::env::var_os(Self::VARIABLE) {
            Some(value) if value == "without-loop" => Self::WithoutLoop,
            _ => Self::Probed,
        }
    }
}

/// Loads the program that this kernel can run; its name.
pub(super) fn load(bpf: &mut Ebpf, turns: Turns) -> Result<&'static str, LoadError> {
    const WITH: &str = names::PROGRAM;
    const WITHOUT: &str = names::PROGRAM_WITHOUT_LOOP;
    let start = Instant::now();
    let loaded = match turns {
        Turns::WithoutLoop => load_named(bpf, WITHOUT),
        Turns::Probed => match load_named(bpf, WITH) {
            Err(error) if lacks_loop(&error) => load_named(bpf, WITHOUT),
            loaded => loaded,
        },
    };
    let name = loaded.map_err(|error| load_error(&error))?;
    let info = program(bpf, name)?.info().ok();
    tracing::info!(
        load_ms = start.elapsed().as_millis(),
        verified_instructions = info.and_then(|info| info.verified_instruction_count()),
        turns = if name == WITH { "bpf_loop" } else { "bpf_for_each_map_elem" },
        "the kernel verified the BPF program"
    );
    Ok(name)
}

/// The program of that name.
pub(super) fn program<'b>(bpf: &'b mut Ebpf, name: &str) -> Result<&'b mut PerfEvent, ProgramError> {
    bpf.program_mut(name).ok_or(ProgramError::NotLoaded)?.try_into()
}

fn load_named(bpf: &mut Ebpf, name: &'static str) -> Result<&'static str, ProgramError> {
    program(bpf, name)?.load()?;
    Ok(name)
}

/// Whether a program was refused because there is no `bpf_loop`.
fn lacks_loop(error: &ProgramError) -> bool {
    let ProgramError::LoadError { verifier_log, .. } = error else { return false };
    let log = verifier_log.to_string();
    missing_helper(refusal(&log)) == Some(BPF_LOOP) || has_no_callbacks(&log)
}

fn has_no_callbacks(log: &str) -> bool {
    NO_CALLBACKS.iter().any(|text| refusal(log).contains(text))
}

/// The number of the helper that the verifier does not know (`check_helper_call`, kernel/bpf/verifier.c).
fn missing_helper(refusal: &str) -> Option<u32> {
    const STARTS: [&str; 3] = ["invalid func ", "unknown func ", "program of this type cannot use helper "];
    let helper = STARTS.iter().find_map(|start| refusal.strip_prefix(start))?;
    helper.split_once('#')?.1.parse().ok()
}

/// Why a program was refused.
fn load_error(error: &ProgramError) -> LoadError {
    let ProgramError::LoadError { io_error, verifier_log } = error else {
        return LoadError::Refused(describe(error));
    };
    let log = verifier_log.to_string();
    if io_error.kind() == std::io::ErrorKind::PermissionDenied && log.is_empty() {
        return LoadError::NotPermitted;
    }
    tracing::debug!("the verifier's log: {log}");
    let missing = missing_helper(refusal(&log));
    let missing = HELPERS.iter().find_map(|(number, name)| (Some(*number) == missing).then_some(*name));
    match missing.or(has_no_callbacks(&log).then_some("functions that helpers call")) {
        Some(missing) => LoadError::TooOld { missing },
        None => LoadError::Refused(format!("{io_error}: {}", refusal(&log))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn helpers_that_a_kernel_lacks_are_known_by_their_number() {
        assert_eq!(missing_helper("invalid func unknown#181"), Some(BPF_LOOP));
        assert_eq!(missing_helper("unknown func bpf_loop#181"), Some(BPF_LOOP));
        assert_eq!(missing_helper("program of this type cannot use helper bpf_loop#181"), Some(BPF_LOOP));
        assert_eq!(missing_helper("invalid func unknown#175"), Some(175));
        assert_eq!(missing_helper("BPF program is too large. Processed 1000001 insn"), None);
        assert_eq!(missing_helper("unknown func #"), None);
    }
}
