//! Programs to profile, one on each core.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};

/// The program with stacks of a known depth.
const DEEP: &str = include_str!("deep.c");
/// Bytes that fit into any first-level cache, and bytes that fit into no cache of a core's own.
const FEW_BYTES: &str = "4096";
const MANY_BYTES: &str = "33554432";
/// How long a sleeper sleeps after some 200 microseconds of work: 300 of them work as much as a core or so.
const SLEEP_MS: &str = "50";
/// The program of 57 frames when it ends soon, as its threads are called.
pub(crate) const SHORT_NAME: &str = "windlass-short";

/// A kind of program.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    path: PathBuf,
    arguments: Vec<String>,
}

impl Program {
    fn new(name: &'static str, path: PathBuf, arguments: &[&str]) -> Self {
        Self { name, path, arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect() }
    }

    /// The bundled workload, an interpreter if there is one, stacks of 57 frames with the caches to themselves and with
    /// caches that are full of something else.
    pub(crate) fn all(folder: &Path) -> Result<Vec<Self>> {
        let workload = windlass_workload::write_executable(folder).context("write the workload")?;
        let deep = compile_deep(folder, "windlass-deep", "sha1")?;
        let mut all = vec![
            Self::new("fixtures/workload", workload, &["1000"]),
            Self::new("57 frames", deep.clone(), &["57", FEW_BYTES]),
            Self::new("57 frames, 32 MiB read at random", deep, &["57", MANY_BYTES]),
        ];
        let python = PathBuf::from("/usr/bin/python3");
        if python.exists() {
            let script = "def f(n): return 1 if n == 0 else f(n - 1) + sum(range(100))\nwhile True: f(20)";
            all.insert(1, Self::new("python3", python, &["-c", script]));
        }
        Ok(all)
    }

    /// Stacks of so many frames.
    pub(crate) fn deep(folder: &Path, name: &'static str, frames: u32) -> Result<Self> {
        let path = compile_deep(folder, "windlass-deep", "sha1")?;
        Ok(Self::new(name, path, &[&frames.to_string(), FEW_BYTES]))
    }

    /// Stacks of 57 frames for some time, which then says how many turns of its work it made.
    pub(crate) fn counting(folder: &Path, time: Duration) -> Result<Self> {
        let path = compile_deep(folder, "windlass-deep", "sha1")?;
        let time = time.as_millis().to_string();
        Ok(Self::new("57 frames", path, &["57", FEW_BYTES, "0", "0", &time]))
    }

    /// Runs one on each core to their end; the sum of the numbers that they say.
    pub(crate) fn count(&self) -> Result<u64> {
        let cores = std::thread::available_parallelism()?.get();
        let mut command = Command::new(&self.path);
        command.args(&self.arguments).stdout(Stdio::piped()).stderr(Stdio::null());
        let children: Vec<Child> = (0..cores).map(|_| command.spawn()).collect::<Result<_, _>>()?;
        let mut sum = 0;
        for child in children {
            let said = child.wait_with_output()?.stdout;
            sum +=
                String::from_utf8_lossy(&said).trim().parse::<u64>().context("a program says no number")?;
        }
        Ok(sum)
    }

    /// JavaScript that recurses and counts, if node is installed.
    pub(crate) fn node() -> Option<Self> {
        let folders = std::env::var_os("PATH")?;
        let path =
            std::env::split_paths(&folders).map(|folder| folder.join("node")).find(|path| path.exists())?;
        let script = "function down(depth) { if (depth > 0) return down(depth - 1) + 1; \
                      let sum = 0; for (let i = 0; i < 1e6; i++) sum = (sum * 31 + i) | 0; return sum; } \
                      for (;;) down(20);";
        Some(Self::new("node", path, &["-e", script]))
    }

    /// Programs like those of 57 frames, each an image of its own.
    pub(crate) fn images(folder: &Path, count: u8) -> Result<Vec<Self>> {
        let one = |number: u8| {
            let path = compile_deep(
                folder,
                &format!("windlass-new-{number}"),
                &format!("0xb0{number:02x}{:036x}", 1),
            )?;
            Ok(Self::new("57 frames", path, &["57", FEW_BYTES]))
        };
        (0..count).map(one).collect()
    }

    /// Programs that together keep a core or so busy and mostly sleep, `each` of every one of `images` images.
    pub(crate) fn sleepers(folder: &Path, images: u8, each: u8) -> Result<Running> {
        let sleepers = Self::images(folder, images)?.into_iter().map(|program| Self {
            arguments: ["57", FEW_BYTES, "0", SLEEP_MS].map(str::to_owned).to_vec(),
            ..program
        });
        let all = sleepers.flat_map(|program| (0..each).map(move |_| program.spawn()));
        all.collect::<Result<_>>().map(Running)
    }

    /// A shell for each core that starts the program of 57 frames again and again, each for a tenth of a second.
    pub(crate) fn short(folder: &Path) -> Result<Self> {
        compile_deep(folder, SHORT_NAME, "sha1")?;
        let script = folder.join("again.sh");
        std::fs::write(&script, format!("cd \"${{0%/*}}\"; while :; do ./{SHORT_NAME} 57 4096 100; done"))?;
        Ok(Self::new("0.1 s", PathBuf::from("/bin/sh"), &[&script.display().to_string()]))
    }

    /// One of it alone.
    pub(crate) fn start_one(&self) -> Result<Running> {
        Ok(Running(vec![self.spawn()?]))
    }

    fn spawn(&self) -> Result<Child> {
        let mut command = Command::new(&self.path);
        command.args(&self.arguments).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().with_context(|| format!("start {}", self.path.display()))
    }

    /// One on each core; dropping them ends them.
    pub(crate) fn start(&self) -> Result<Running> {
        let cores = std::thread::available_parallelism()?.get();
        (0..cores).map(|_| self.spawn()).collect::<Result<_>>().map(Running)
    }
}

/// Compiles the program under a name.
fn compile_deep(folder: &Path, name: &str, build_id: &str) -> Result<PathBuf> {
    let (source, path) = (folder.join("deep.c"), folder.join(name));
    std::fs::write(&source, DEEP)?;
    let mut compile = Command::new("cc");
    compile.args(["-O2", "-fomit-frame-pointer", "-fno-optimize-sibling-calls"]);
    compile.arg(format!("-Wl,--build-id={build_id}")).arg("-o");
    let status = compile.arg(&path).arg(&source).status().context("run cc")?;
    anyhow::ensure!(status.success(), "cc: {status}");
    Ok(path)
}

/// Programs that run; dropping them ends them.
pub(crate) struct Running(Vec<Child>);

impl Running {
    pub(crate) fn pids(&self) -> Vec<u32> {
        self.0.iter().map(Child::id).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // Both fail only when it has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
