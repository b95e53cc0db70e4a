//! Both servers as their own programs, over the same files.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::files::{Files, Served};
use crate::load::{get, put};

/// How long a server may take until it has all files.
const START: Duration = Duration::from_secs(120);
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(2);

/// A running server; dropping it ends it.
pub(crate) struct Server {
    process: Child,
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Server {
    fn start(name: &'static str, command: &mut Command, address: SocketAddr) -> Result<Self> {
        let process = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .env_remove("DEBUGINFOD_URLS")
            .env_remove("RUST_LOG")
            .spawn()
            .with_context(|| format!("start {name}"))?;
        Ok(Self { process, name, address })
    }

    pub(crate) fn wait_until_it_listens(&self) -> Result<()> {
        let start = Instant::now();
        while TcpStream::connect(self.address).is_err() {
            ensure!(start.elapsed() < START, "{} does not listen", self.name);
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Waits until it answers with a file, and returns how long that took.
    pub(crate) fn wait_for(&self, path: &str) -> Result<Duration> {
        let start = Instant::now();
        loop {
            let answer =
                TcpStream::connect(self.address).ok().and_then(|_| get(self.address, path, "identity").ok());
            if answer.is_some_and(|(status, _)| status == 200) {
                return Ok(start.elapsed());
            }
            ensure!(start.elapsed() < START, "{} has no {path}", self.name);
            std::thread::sleep(PAUSE);
        }
    }

    /// Every file as it should be: who is quick with something else is not measured.
    pub(crate) fn check(&self, files: &Files) -> Result<()> {
        for file in files.all() {
            self.wait_for(&file.path("executable"))?;
            let (_, content) = get(self.address, &file.path("executable"), "identity")?;
            ensure!(content == file.content, "{}: another content for {}", self.name, file.build_id);
        }
        Ok(())
    }

    /// Resident bytes now.
    pub(crate) fn resident_bytes(&self) -> Result<u64> {
        self.memory("VmRSS:")
    }

    /// Most resident bytes since [`Server::forget_peak`].
    pub(crate) fn peak_bytes(&self) -> Result<u64> {
        self.memory("VmHWM:")
    }

    /// Sets the peak to what is resident now: `5` does that, proc(5).
    pub(crate) fn forget_peak(&self) -> Result<()> {
        Ok(std::fs::write(format!("/proc/{}/clear_refs", self.process.id()), "5")?)
    }

    fn memory(&self, key: &str) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(key)).context("no such line")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
    }
}

/// A free port, as far as one can tell before somebody has it.
fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// A program of this workspace, which `cargo xtask bench service` built beside this one.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let folder = own.parent().and_then(Path::parent).context("this program lies in a target folder")?;
    let path = folder.join(name);
    ensure!(path.exists(), "{} is not there: cargo xtask bench service builds it", path.display());
    Ok(path)
}

/// `windlassd` on what `data` holds.
pub(crate) fn windlassd(data: &Path) -> Result<Server> {
    let address = free_address()?;
    let mut command = Command::new(program("windlassd")?);
    command.args(["serve", "--listen", &address.to_string(), "--data-dir"]).arg(data);
    Server::start("windlassd", &mut command, address)
}

/// `windlassd` with these files uploaded.
pub(crate) fn stocked_windlassd(data: &Path, files: &Files) -> Result<Server> {
    let server = windlassd(data)?;
    server.wait_until_it_listens()?;
    for file in files.all() {
        upload(&server, file)?;
    }
    Ok(server)
}

pub(crate) fn upload(server: &Server, file: &Served) -> Result<()> {
    let path = format!("/api/v1{}", file.path("executable"));
    put(server.address, &path, &file.sha256(), &file.content)
}

/// elfutils' server, over a folder of these files.
pub(crate) fn stocked_elfutils(folder: &Path, files: &Files) -> Result<Server> {
    let files_folder = folder.join("files");
    std::fs::create_dir_all(&files_folder)?;
    for file in files.all() {
        std::fs::write(files_folder.join(&file.build_id), &file.content)?;
    }
    let address = free_address()?;
    let mut command = Command::new("debuginfod");
    // Scanned once and never groomed: only requests cost it anything.
    command.args(["-F", "-t", "0", "-g", "0", "-p", &address.port().to_string(), "-d"]);
    command.arg(folder.join("index.sqlite")).arg(files_folder);
    Server::start("elfutils", &mut command, address)
}

/// What it calls itself.
pub(crate) fn elfutils_version() -> Option<String> {
    let output = Command::new("debuginfod").arg("--version").output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.to_owned())
}
