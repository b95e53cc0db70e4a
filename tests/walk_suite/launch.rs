//! How does a program of the suite come to run?
//!
//! It is compiled from `tests/programs/suite`, or is one that the machine has. Its file, and so its processes, are called
//! as no other's, by which the samples of its children are told.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use windlass_tests::program::{checkout, program, run};
use windlass_tests::skip::skip;

use super::row::{Need, Program, Row, Start};

/// When a program ends by itself, should a test be killed before it ends it: after longer than any test takes.
const SECONDS: u32 = 300;
/// Programs leave the processors to the service and the agent of the test, which have tables to make.
const NICE: i32 = 15;
/// As distributions compile, and names from symbol tables alone: no inlined functions.
const C_FLAGS: &[&str] = &["-O2", "-fomit-frame-pointer", "-fno-optimize-sibling-calls"];
/// In a file system of its own, `$0`, runs `$1` with what follows.
const RUN_IN_OWN_MOUNT: &str = "mount -t tmpfs none \"$0\" && cp \"$1\" \"$0\" && cd \"$0\" && \
     program=\"$0/${1##*/}\" && shift && exec \"$program\" \"$@\"";
/// What a program that is linked with glibc needs in another root.
const GLIBC: &[&str] = &["/lib64/ld-linux-x86-64.so.2", "/lib/x86_64-linux-gnu/libc.so.6"];

/// A running program with all that it started; dropping it ends them.
pub(crate) struct Running {
    pub(crate) row: &'static Row,
    /// The name of its processes.
    pub(crate) comm: String,
    /// Its executables and libraries that were built, and others that the service is given.
    pub(crate) images: Vec<Vec<u8>>,
    child: Child,
}

impl Running {
    pub(crate) fn pid(&self) -> i64 {
        i64::from(self.child.id())
    }

    /// Whether it has not ended by itself.
    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // SAFETY: a system call with integers alone. The group was made for this child and is nobody else's until
        // the child is waited for.
        unsafe { libc::kill(-(self.child.id() as i32), libc::SIGKILL) };
        let _ = self.child.wait();
    }
}

/// Builds the program of a row and starts it; `None` if the machine lacks what it needs.
pub(crate) fn start(test: &str, row: &'static Row, folder: &Path) -> Option<Running> {
    let test = format!("{test}: {}", row.name);
    if let Some(need) = row.needs.iter().find(|need| !is_met(**need)) {
        skip(&test, &format!("needs {need:?}"));
        return None;
    }
    let comm = format!("{}.{:04x}", row.name, std::process::id() & 0xffff);
    let path = folder.join(&comm);
    let mut built = Vec::new();
    let program = match row.program {
        Program::Installed(name) => program(&test, name)?,
        Program::Built(compiler, sources, flags) => {
            built.push(path.clone());
            build(&test, compiler, sources, flags, &path)?
        }
    };
    let mut arguments: Vec<OsString> = row.arguments.iter().map(OsString::from).collect();
    for (name, flags) in row.libraries {
        let library = folder.join(name);
        let flags = [&["-shared", "-fPIC"], *flags].concat();
        built.push(build(&test, "cc", &["library.c"], &flags, &library)?);
        arguments.push(library.into());
    }
    built.extend(row.known.iter().map(PathBuf::from));
    let images = built.iter().map(|path| std::fs::read(path).expect("an image")).collect();
    let mut command = command(row.start, &program, folder);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.envs(row.environment.iter().copied()).process_group(0);
    // SAFETY: between fork and exec only system calls are made, with integers alone. What they set outlives exec.
    unsafe {
        command.pre_exec(|| {
            libc::alarm(SECONDS);
            libc::setpriority(libc::PRIO_PROCESS, 0, NICE);
            Ok(())
        });
    }
    let child = command.spawn().unwrap_or_else(|error| panic!("{test}: start {command:?}: {error}"));
    match row.start {
        Start::Deleted => std::fs::remove_file(&path).expect("the program's file is there"),
        Start::Replaced => {
            let other = folder.join(format!("{comm}.new"));
            std::fs::copy("/bin/true", &other).expect("copy a program");
            std::fs::rename(&other, &path).expect("the program's file is there");
        }
        Start::Plainly | Start::InNamespaces | Start::InRoot => {}
    }
    Some(Running { row, comm, images, child })
}

fn is_met(need: Need) -> bool {
    match need {
        Need::File(path) => Path::new(path).exists(),
        Need::Cpu(flag) => {
            let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            info.split_whitespace().any(|word| word == flag)
        }
        // SAFETY: a system call without arguments.
        Need::Root => unsafe { libc::geteuid() == 0 },
    }
}

/// Compiles sources of the suite to `output`.
fn build(test: &str, compiler: &str, sources: &[&str], flags: &[&str], output: &Path) -> Option<PathBuf> {
    let folder = checkout().join("tests/programs/suite");
    let mut command = Command::new(program(test, compiler)?);
    match compiler {
        "rustc" => {
            command.args(["-O", "--edition=2024", "-Ccodegen-units=1", "-Cstrip=debuginfo"]);
            command.args(["-Cforce-frame-pointers=no", "-Clink-arg=-Wl,--build-id=sha1"]);
        }
        "go" => {
            let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("go-cache");
            command.env("GOCACHE", cache).env("CGO_ENABLED", "0").arg("build");
        }
        _ => {
            command.args(C_FLAGS).arg("-Wl,--build-id=sha1");
        }
    }
    command.args(flags).arg("-o").arg(output);
    command.args(sources.iter().map(|source| folder.join(source)));
    run(&mut command, &[0]);
    Some(output.to_owned())
}

/// The command that makes `program` run as `start` says.
fn command(start: Start, program: &Path, folder: &Path) -> Command {
    match start {
        Start::Plainly | Start::Deleted | Start::Replaced => Command::new(program),
        Start::InNamespaces => {
            let mount = folder.join("mount");
            std::fs::create_dir_all(&mount).expect("make a folder");
            let mut command = Command::new("unshare");
            command.args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-c", RUN_IN_OWN_MOUNT]);
            command.arg(mount).arg(program);
            command
        }
        Start::InRoot => {
            let root = folder.join("root");
            let name = Path::new(program.file_name().expect("a program has a name"));
            let copy = |from: &Path, to: &Path| {
                let to = root.join(to.strip_prefix("/").unwrap_or(to));
                std::fs::create_dir_all(to.parent().expect("it lies in the root")).expect("make a folder");
                std::fs::copy(from, to).expect("copy into the other root");
            };
            copy(program, name);
            GLIBC.iter().map(Path::new).for_each(|path| copy(path, path));
            let mut command = Command::new("chroot");
            command.arg(root).arg(Path::new("/").join(name));
            command
        }
    }
}
