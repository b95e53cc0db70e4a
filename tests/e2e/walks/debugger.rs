//! Stacks as gdb sees them.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use windlass_tests::program::text;

/// A frame of gdb's that has a place on the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GdbFrame {
    pub(crate) rip: u64,
    /// What gdb calls "frame at".
    pub(crate) cfa: u64,
}

/// The stack of each thread of a process, innermost frame first.
pub(crate) fn stacks_in_gdb(gdb: &Path, pid: i32) -> HashMap<i32, Vec<GdbFrame>> {
    let mut command = Command::new(gdb);
    command.args(["-q", "-nx", "-batch", "-iex", "set debuginfod enabled off", "-iex", "set auto-load no"]);
    command.args(["-ex", "set backtrace past-main on", "-ex", "set backtrace limit 0", "-p"]);
    command.arg(pid.to_string());
    // `info frame` says of each frame whether it has a place on the stack; a backtrace does not.
    command.args(["-ex", "thread apply all -c frame apply all -q -c info frame"]);
    parse(&text(&mut command))
}

/// ```text
/// Thread 2 (Thread 0x7f5d6f8006c0 (LWP 21143) "heap"):
/// Stack level 0, frame at 0x7f5d6f7ffa50:
///  rip = 0x55a5c0d5e3a1 in ... (FILE:LINE); saved rip = 0x55a5c0d5e5f0
///  inlined into frame 1
/// ```
fn parse(output: &str) -> HashMap<i32, Vec<GdbFrame>> {
    let mut stacks: HashMap<i32, Vec<GdbFrame>> = HashMap::new();
    let (mut thread, mut cfa) = (0, 0);
    for line in output.lines().map(str::trim) {
        if let Some((_, rest)) = line.split_once("(LWP ") {
            let number = rest.split(')').next().and_then(|number| number.parse().ok());
            thread = number.unwrap_or_else(|| panic!("gdb writes {line:?}"));
        } else if let Some((_, at)) = line.split_once(", frame at ") {
            cfa = hex(at.trim_end_matches(':'));
        } else if let Some(at) = line.strip_prefix("rip = ") {
            let rip = hex(at.split([' ', ';']).next().unwrap_or_default());
            stacks.entry(thread).or_default().push(GdbFrame { rip, cfa });
        } else if line.starts_with("inlined into frame") || line.starts_with("tail call frame") {
            // Neither has a frame in memory: the latter is what debug information says must have been there.
            stacks.entry(thread).or_default().pop();
        }
    }
    stacks
}

fn hex(text: &str) -> u64 {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u64::from_str_radix(digits, 16).unwrap_or_else(|_| panic!("gdb writes {text:?} for an address"))
}
