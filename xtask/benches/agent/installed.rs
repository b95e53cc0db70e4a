//! The service and the agent as their own programs, as they are installed.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// How long a service may take to listen.
const START: Duration = Duration::from_secs(20);

/// A program; dropping it ends it.
pub(crate) struct Process(Child);

impl Process {
    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program of this workspace, which `cargo xtask bench agent` built beside this one.
fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let folder = own.parent().and_then(Path::parent).context("this program lies in a target folder")?;
    let path = folder.join(name);
    anyhow::ensure!(path.exists(), "{} is not there: cargo xtask bench agent builds it", path.display());
    Ok(path)
}

/// A service with nothing in it.
pub(crate) struct Service {
    _process: Process,
    pub(crate) url: String,
}

impl Service {
    pub(crate) fn start(folder: &Path) -> Result<Self> {
        // A free port, as far as one can tell before the service has it.
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let listen = format!("127.0.0.1:{port}");
        let mut command = Command::new(program("windlassd")?);
        command.args(["serve", "--listen", &listen, "--data-dir"]).arg(folder.join("service"));
        let process = Process(quiet(&mut command).spawn().context("start windlassd")?);
        let deadline = Instant::now() + START;
        while TcpStream::connect(&listen).is_err() {
            anyhow::ensure!(Instant::now() < deadline, "windlassd does not listen on {listen}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { _process: process, url: format!("http://{listen}") })
    }
}

/// Starts an agent of the whole host.
pub(crate) fn start_agent(service: &Service, folder: &Path, frequency_hz: u32) -> Result<Process> {
    let mut command = Command::new(program("windlass-agent")?);
    command.args(["--server", &service.url, "--frequency", &frequency_hz.to_string(), "--cache-dir"]);
    command.arg(folder.join("cache"));
    Ok(Process(quiet(&mut command).spawn().context("start windlass-agent")?))
}

fn quiet(command: &mut Command) -> &mut Command {
    command.stdout(Stdio::null()).stderr(Stdio::null()).env("RUST_LOG", "warn")
}
