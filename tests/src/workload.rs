//! The bundled program with known stacks, running.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// When it ends by itself, should a test be killed before it ends it: after longer than any test takes.
const SECONDS: &str = "120";

/// A running workload; dropping it ends it.
pub struct Workload {
    /// The executable.
    pub path: PathBuf,
    child: Child,
}

impl Workload {
    /// Starts one from `folder`.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(folder: &Path) -> Self {
        Self::start_by(folder, |_| {})
    }

    /// Starts one from `folder`, by a command that `change` completes.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start_by(folder: &Path, change: impl FnOnce(&mut Command)) -> Self {
        let path = windlass_workload::write_executable(folder).expect("write the workload");
        Self::run_by(path, change)
    }

    /// Starts the one at `path`.
    ///
    /// # Panics
    /// When it does not start.
    pub fn run(path: PathBuf) -> Self {
        Self::run_by(path, |_| {})
    }

    fn run_by(path: PathBuf, change: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(&path);
        command.arg(SECONDS).stdout(Stdio::null());
        change(&mut command);
        let child = command.spawn().expect("the workload starts");
        Self { path, child }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended by itself.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
