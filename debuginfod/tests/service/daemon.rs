//! The real binary as a process of its own, for what can only be done to a process: kill it, and see what it takes.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// `windlassd serve` on a free port.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) address: SocketAddr,
}

/// The binary under test: another one, for measuring, by `WINDLASSD`.
fn binary() -> PathBuf {
    std::env::var_os("WINDLASSD").map_or_else(|| env!("CARGO_BIN_EXE_windlassd").into(), PathBuf::from)
}

impl Daemon {
    /// Starts it on the data folder `folder`, and waits until it listens.
    pub(crate) fn start(folder: &Path) -> Self {
        let mut child = Command::new(binary())
            .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(folder)
            .env("RUST_LOG", "info")
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary of this package");
        let mut lines = BufReader::new(child.stderr.take().expect("it is piped")).lines();
        let address = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| line.split_once("listening on http://")?.1.trim().parse().ok());
        // Whoever does not read on stops the other side when the pipe is full.
        std::thread::spawn(move || lines.map_while(Result::ok).count());
        Self { child, address: address.expect("it listens") }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it is ours");
    }

    /// What it took of processors so far, in seconds.
    pub(crate) fn processor_s(&self) -> f64 {
        const TICKS_A_SECOND: f64 = 100.0; // USER_HZ, what proc(5) counts in
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
        let stat = stat.expect("the process runs");
        // Behind the name, which may have spaces: the state is field 3, user and system time are fields 14 and 15.
        let fields = stat.rsplit(") ").next().expect("a name").split(' ');
        fields.skip(11).take(2).map(|ticks| ticks.parse::<f64>().expect("a number")).sum::<f64>()
            / TICKS_A_SECOND
    }

    /// The most memory it had resident so far, in bytes.
    pub(crate) fn peak_resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("the process runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line of proc(5)");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `windlassd check` on the data folder: whether all is well, and what it prints.
pub(crate) fn check(folder: &Path) -> (bool, String) {
    let output = Command::new(binary()).args(["check", "--data-dir"]).arg(folder).output();
    let output = output.expect("the binary of this package");
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}
