//! A program under ptrace: its threads' registers at any moment, its memory, and one instruction after the
//! other.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use windlass_agent_ebpf::memory::StackMemory;
use windlass_agent_ebpf::x86_64::Registers;
use windlass_schema::StopReason;

/// Longest wait for a program to get going. It takes milliseconds; machines under load take more.
const PATIENCE: Duration = Duration::from_secs(30);
/// `PTRACE_EVENT_STOP` (include/uapi/linux/ptrace.h), in the upper half of a wait status.
const EVENT_STOP: i32 = 128;
/// The instruction `int3`.
const BREAKPOINT: u8 = 0xcc;
/// `SI_TKILL` and the like have no part here: a stop's signal is all that is told apart.
const NO_SIGNAL: i32 = 0;

/// A child process; dropping it ends it. All calls must come from the thread that started it, which is
/// the one that the kernel lets trace it.
pub(crate) struct Tracee {
    child: Child,
    memory: ProcessMemory,
    /// Threads traced, each with the signal that it is to get when it goes on.
    traced: Vec<(i32, i32)>,
}

/// The memory of a process.
pub(crate) struct ProcessMemory(File);

impl StackMemory for ProcessMemory {
    fn words<const N: usize>(&self, address: u64) -> Option<[u64; N]> {
        let mut bytes = [[0; 8]; N];
        self.0.read_exact_at(bytes.as_flattened_mut(), address).ok()?;
        Some(bytes.map(u64::from_le_bytes))
    }

    fn unreadable(&self, _address: u64) -> StopReason {
        StopReason::StackRead
    }
}

/// One ptrace request on a thread.
fn ptrace(request: u32, tid: i32, data: usize) -> io::Result<()> {
    // SAFETY: the requests made here take a number in `data`, or, for GETREGS and SETREGS, a pointer that
    // `registers_of` and `set_registers` make from a live structure of the right type.
    let result = unsafe { libc::ptrace(request, tid, std::ptr::null_mut::<libc::c_void>(), data) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn registers_of(tid: i32) -> io::Result<libc::user_regs_struct> {
    // SAFETY: integers, for which zeros are a value.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    ptrace(libc::PTRACE_GETREGS, tid, (&raw mut registers).addr())?;
    Ok(registers)
}

/// Registers by DWARF number.
fn innermost(r: &libc::user_regs_struct) -> Registers {
    let general = [
        r.rax, r.rdx, r.rcx, r.rbx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ];
    Registers::innermost(general, r.rip)
}

/// Waits until a thread stops; `None` when it has ended.
fn wait(tid: i32) -> Option<i32> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let result = unsafe { libc::waitpid(tid, &mut status, libc::__WALL) };
    (result == tid && libc::WIFSTOPPED(status)).then_some(status)
}

impl Tracee {
    /// Starts a program that runs freely.
    pub(crate) fn start(command: &mut Command) -> Self {
        Self::spawn(command, || {
            // Where only ancestors may trace (kernel.yama.ptrace_scope=1), lets a debugger do so too.
            // SAFETY: takes numbers. Without Yama it fails, and is not needed.
            unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0) };
            Ok(())
        })
    }

    /// Starts a program that is stopped before its first instruction, and traced.
    pub(crate) fn start_stopped(command: &mut Command) -> Self {
        let mut tracee = Self::spawn(command, || ptrace(libc::PTRACE_TRACEME, 0, 0));
        let pid = tracee.pid();
        wait(pid).expect("stops when it has become the program");
        ptrace(libc::PTRACE_SETOPTIONS, pid, libc::PTRACE_O_EXITKILL as usize).expect("set options");
        tracee.traced.push((pid, NO_SIGNAL));
        tracee
    }

    fn spawn(
        command: &mut Command,
        before_exec: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: makes one system call and allocates nothing.
        unsafe { command.pre_exec(before_exec) };
        let child = command.spawn().unwrap_or_else(|error| panic!("start {command:?}: {error}"));
        let memory = format!("/proc/{}/mem", child.id());
        // For writing too: a breakpoint is written into code.
        let file = File::options().read(true).write(true).open(memory).expect("the memory of a child");
        Self { child, memory: ProcessMemory(file), traced: Vec::new() }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub(crate) fn memory(&self) -> &ProcessMemory {
        &self.memory
    }

    /// Waits until there are `count` threads.
    pub(crate) fn wait_for_threads(&self, count: usize) -> Vec<i32> {
        let start = Instant::now();
        loop {
            let threads = self.threads();
            if threads.len() >= count {
                return threads;
            }
            assert!(start.elapsed() < PATIENCE, "{} of {count} threads", threads.len());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until there are `count` threads, and traces them all.
    pub(crate) fn trace(&mut self, count: usize) -> Vec<i32> {
        let threads = self.wait_for_threads(count);
        for tid in &threads {
            ptrace(libc::PTRACE_SEIZE, *tid, libc::PTRACE_O_EXITKILL as usize).expect("trace a child");
            self.traced.push((*tid, NO_SIGNAL));
        }
        threads
    }

    /// Traces the threads that there are, those that are not traced yet.
    pub(crate) fn trace_all(&mut self) -> Vec<i32> {
        for tid in self.threads() {
            let is_traced = self.traced.iter().any(|(traced, _)| *traced == tid);
            // Fails for one that has ended meanwhile.
            if !is_traced && ptrace(libc::PTRACE_SEIZE, tid, libc::PTRACE_O_EXITKILL as usize).is_ok() {
                self.traced.push((tid, NO_SIGNAL));
            }
        }
        self.traced.iter().map(|(tid, _)| *tid).collect()
    }

    fn threads(&self) -> Vec<i32> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("threads of a child");
        tasks.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
    }

    /// Whether a stopped thread gets a signal when it goes on.
    pub(crate) fn has_signal(&mut self, tid: i32) -> bool {
        *self.signal(tid) != NO_SIGNAL
    }

    /// The signal that a traced thread is to get.
    fn signal(&mut self, tid: i32) -> &mut i32 {
        &mut self.traced.iter_mut().find(|(traced, _)| *traced == tid).expect("a traced thread").1
    }

    /// Stops a running thread where it is. `None` when it has ended.
    pub(crate) fn interrupt(&mut self, tid: i32) -> Option<Registers> {
        ptrace(libc::PTRACE_INTERRUPT, tid, 0).ok()?;
        loop {
            let status = wait(tid)?;
            if status >> 16 == EVENT_STOP {
                return registers_of(tid).ok().as_ref().map(innermost);
            }
            // A signal came first; the interruption follows.
            ptrace(libc::PTRACE_CONT, tid, libc::WSTOPSIG(status) as usize).ok()?;
        }
    }

    /// Lets a stopped thread run one instruction. `None` when it has ended.
    pub(crate) fn step(&mut self, tid: i32) -> Option<Registers> {
        self.go(tid, libc::PTRACE_SINGLESTEP)
    }

    /// Runs a stopped thread by one request, up to its next stop.
    fn go(&mut self, tid: i32, request: u32) -> Option<Registers> {
        let signal = std::mem::take(self.signal(tid));
        ptrace(request, tid, signal as usize).ok()?;
        let status = wait(tid)?;
        let stop = libc::WSTOPSIG(status);
        if stop != libc::SIGTRAP && status >> 16 != EVENT_STOP {
            *self.signal(tid) = stop;
        }
        registers_of(tid).ok().as_ref().map(innermost)
    }

    /// Lets a stopped thread run on.
    pub(crate) fn release(&mut self, tid: i32) {
        let signal = std::mem::take(self.signal(tid));
        // Fails only when it has ended.
        let _ = ptrace(libc::PTRACE_CONT, tid, signal as usize);
    }

    /// Runs a stopped program until it is about to run the instruction at `address`.
    pub(crate) fn run_to(&mut self, address: u64) -> Registers {
        let (pid, code) = (self.pid(), &self.memory.0);
        let mut original = [0];
        code.read_exact_at(&mut original, address).expect("read code");
        code.write_all_at(&[BREAKPOINT], address).expect("write a breakpoint");
        self.go(pid, libc::PTRACE_CONT).expect("comes to the breakpoint");
        self.memory.0.write_all_at(&original, address).expect("take the breakpoint back");
        let registers = registers_of(pid).expect("registers");
        assert_eq!(registers.rip, address + 1, "stopped elsewhere");
        self.jump(pid, address)
    }

    /// Has a stopped thread go on from `address`.
    pub(crate) fn jump(&mut self, tid: i32, address: u64) -> Registers {
        let mut registers = registers_of(tid).expect("the registers of a stopped thread");
        registers.rip = address;
        ptrace(libc::PTRACE_SETREGS, tid, (&raw mut registers).addr()).expect("set registers");
        innermost(&registers)
    }

    /// Stops the whole program as SIGSTOP does, so that others can look at it too.
    pub(crate) fn freeze(&self) {
        // SAFETY: takes numbers; the process is a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(self.pid(), libc::SIGSTOP) }, 0);
        let start = Instant::now();
        let stopped = |tid: &i32| {
            let stat = std::fs::read_to_string(format!("/proc/{}/task/{tid}/stat", self.pid()));
            stat.is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|state| state.starts_with('T')))
        };
        while !self.threads().iter().all(stopped) {
            assert!(start.elapsed() < PATIENCE, "threads do not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Gives up tracing; a frozen program stays frozen.
    pub(crate) fn detach(&mut self) {
        for (tid, signal) in std::mem::take(&mut self.traced) {
            ptrace(libc::PTRACE_DETACH, tid, signal as usize).expect("detach from a stopped thread");
        }
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        // Fails only when it has ended.
        let _ = self.child.kill();
        // The process is reaped only after all of its traced threads are.
        self.traced.sort_by_key(|(tid, _)| *tid == self.child.id() as i32);
        for (tid, _) in &self.traced {
            while wait(*tid).is_some() {}
        }
        let _ = self.child.wait();
    }
}
