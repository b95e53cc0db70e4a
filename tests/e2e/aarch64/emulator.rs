//! A program of aarch64 under `qemu-aarch64`, driven by gdb: its registers and its stack at each instruction of
//! its own, and its frames as gdb sees them.

use std::fmt::Write as _;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use windlass_agent_ebpf::memory::StackMemory;
use windlass_schema::{Register, StopReason};

/// Longest wait for a run to end. It takes two seconds; machines under load take more.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at whether something has happened.
const POLL: Duration = Duration::from_millis(5);
/// x0 to x30 and sp.
const REGISTERS: usize = 32;
/// Above `argc`, the stack of the first thread holds no frames.
const BEHIND_STACK: u64 = 16;
/// Within this of the first thread's stack pointer at its start, an address is in that stack.
const STACK_BYTES: u64 = 1 << 20;

/// How to run the program.
pub(crate) struct Emulator {
    pub(crate) qemu: PathBuf,
    pub(crate) gdb: PathBuf,
    pub(crate) program: PathBuf,
    pub(crate) breakpoints: Vec<u64>,
    /// Code in which the program runs one instruction at a time.
    pub(crate) stepped: Range<u64>,
    pub(crate) thread_stack_end: u64,
}

/// A frame: its address and its stack pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) pc: u64,
    pub(crate) sp: u64,
}

/// The bytes of a stack from its stack pointer on.
pub(crate) struct Stack {
    start: u64,
    bytes: Vec<u8>,
}

impl StackMemory for Stack {
    fn words<const N: usize>(&self, address: u64) -> Option<[u64; N]> {
        let at = usize::try_from(address.checked_sub(self.start)?).ok()?;
        let bytes = self.bytes.get(at..at.checked_add(8 * N)?)?;
        let mut words = [0; N];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Some(words)
    }

    fn unreadable(&self, _address: u64) -> StopReason {
        StopReason::StackRead
    }
}

/// One moment of one thread.
pub(crate) struct Stop {
    pub(crate) general: [u64; REGISTERS],
    pub(crate) pc: u64,
    pub(crate) stack: Stack,
    /// As gdb sees them, if it was asked, innermost first.
    pub(crate) frames: Vec<Frame>,
    /// The stack pointer with which the process started.
    start: u64,
}

impl Stop {
    /// An address in a stack, such that it can be compared with that of another run. The system may put the
    /// first thread's stack anywhere; the other one is the program's own memory.
    pub(crate) fn place(&self, sp: u64) -> u64 {
        let below = self.start.wrapping_sub(sp);
        if below < STACK_BYTES { below } else { sp }
    }
}

/// Ends a program when the test is done with it.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        command.stdin(Stdio::null());
        Self(command.spawn().unwrap_or_else(|error| panic!("start {command:?}: {error}")))
    }

    /// Waits until `done`.
    #[track_caller]
    fn wait_until(&mut self, what: &str, mut done: impl FnMut(&mut Child) -> bool) {
        let start = Instant::now();
        while !done(&mut self.0) {
            assert!(start.elapsed() < PATIENCE, "{what} takes too long");
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails only when it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Emulator {
    /// Runs the program on a processor. With `frames`, gdb also says what it sees on the stack.
    pub(crate) fn run(&self, processor: &str, frames: bool) -> Vec<Stop> {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = |name: &str| folder.path().join(name);
        let mut qemu = Command::new(&self.qemu);
        // A socket in the folder, so that runs at the same time do not meet.
        qemu.args(["-cpu", processor, "-g", "./gdb.socket"]).arg(&self.program).current_dir(folder.path());
        let mut qemu = Running::start(&mut qemu);
        qemu.wait_until("the emulator's start", |_| file("gdb.socket").exists());
        std::fs::write(file("script"), self.script(frames)).expect("write a script");
        let output = |name| File::create(file(name)).expect("a file for gdb's output");
        let mut gdb = Command::new(&self.gdb);
        gdb.args(["-q", "-nx", "-batch", "-iex", "set debuginfod enabled off", "-iex", "set auto-load no"])
            .args(["-x", "script"])
            .arg(&self.program)
            .current_dir(folder.path())
            .stdout(output("stdout"))
            .stderr(output("stderr"));
        let mut gdb = Running::start(&mut gdb);
        gdb.wait_until("the program's run in gdb", |child| child.try_wait().expect("a child").is_some());
        let read = |name| std::fs::read_to_string(file(name)).expect("gdb's output");
        let (stdout, stderr) = (read("stdout"), read("stderr"));
        assert!(stdout.contains("exited normally"), "the program has not ended as it should:\n{stderr}");
        parse(&stdout, folder.path())
    }

    /// What gdb is to do: note the state at each breakpoint and, from there on, at each instruction of the code
    /// to be stepped through. Where that calls other code, the program runs to the next breakpoint.
    fn script(&self, frames: bool) -> String {
        let mut registers: Vec<_> = (0..REGISTERS - 1).map(|number| format!("$x{number}")).collect();
        registers.extend(["$sp".to_owned(), "$pc".to_owned()]);
        let (format, registers) = (" %#lx".repeat(registers.len()), registers.join(", "));
        let frames = if frames {
            // Goes on where a frame cannot print, such as the outermost one, whose return address is undefined.
            r#"frame apply all -q -c printf "@frame %#lx %#lx\n", $pc, $sp"#
        } else {
            ""
        };
        let Self { thread_stack_end, stepped, .. } = self;
        let mut script = format!(
            r#"
set confirm off
set pagination off
set width 0
set backtrace past-main on
set backtrace limit 0
handle SIGSEGV nostop noprint pass
target remote ./gdb.socket
set $start = $sp
set $number = 0
define state
  set $end = $start + {BEHIND_STACK}
  if $_thread != 1
    set $end = {thread_stack_end}
  end
  printf "@stop %d %#lx{format}\n", $number, $start, {registers}
  eval "dump binary memory %d.stack $sp %#lx", $number, $end
  {frames}
  set $number = $number + 1
end
"#
        );
        for address in &self.breakpoints {
            writeln!(script, "break *{address}").expect("a string takes all");
        }
        write!(
            script,
            "continue
while $_isvoid($_exitcode)
  state
  if $pc >= {} && $pc < {}
    stepi
  else
    continue
  end
end
",
            stepped.start, stepped.end
        )
        .expect("a string takes all");
        script
    }
}

/// The lines that the script prints, among gdb's own.
fn parse(output: &str, folder: &Path) -> Vec<Stop> {
    let mut stops: Vec<Stop> = Vec::new();
    for line in output.lines() {
        if let Some(line) = line.strip_prefix("@stop ") {
            let (number, numbers) = line.split_once(' ').expect("a number, and others");
            let numbers: Vec<_> = numbers.split(' ').map(hex).collect();
            let [start, general @ .., pc] = &numbers[..] else { panic!("gdb writes {line:?}") };
            let general: [u64; REGISTERS] = general.try_into().expect("all registers");
            let bytes = std::fs::read(folder.join(format!("{number}.stack"))).expect("a stack's memory");
            let stack = Stack { start: general[usize::from(Register::SP.number())], bytes };
            stops.push(Stop { general, pc: *pc, stack, frames: Vec::new(), start: *start });
        } else if let Some(frame) = line.strip_prefix("@frame ") {
            let (pc, sp) = frame.split_once(' ').expect("an address and a stack pointer");
            let stop = stops.last_mut().expect("frames of a stop");
            stop.frames.push(Frame { pc: hex(pc), sp: hex(sp) });
        }
    }
    stops
}

fn hex(text: &str) -> u64 {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u64::from_str_radix(digits, 16).unwrap_or_else(|_| panic!("gdb writes {text:?} for a number"))
}
