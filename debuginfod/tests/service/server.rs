//! A service for one test, a client for it, and small ELF files to upload.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use reqwest::{Client, Response, StatusCode};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use windlass_debuginfod::{Config, Service, start};
use windlass_schema::BuildId;
use windlass_schema::http::{FILE_NAME_HEADER, SHA256_HEADER};

pub(crate) struct Server {
    pub(crate) folder: TempDir,
    pub(crate) service: Service,
    pub(crate) client: Client,
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(crate) async fn start_with(adapt: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::start_in(folder, adapt).await
    }

    pub(crate) async fn start_in(folder: TempDir, adapt: impl FnOnce(&mut Config)) -> Self {
        let mut config = config(folder.path());
        adapt(&mut config);
        let service = start(config).await.unwrap();
        Self { folder, service, client: client() }
    }

    /// Stops it and starts it again on what it stored.
    pub(crate) async fn restart(self) -> Self {
        self.service.stop().await;
        Self::start_in(self.folder, |_| {}).await
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.service.url())
    }

    pub(crate) async fn get(&self, path: &str) -> Response {
        self.client.get(self.url(path)).send().await.unwrap()
    }

    /// Uploads `content` to `/api/v1/buildid/` + `name`.
    pub(crate) async fn put(&self, name: &str, content: &[u8]) -> Response {
        let mut request = self.client.put(self.url(&format!("/api/v1/buildid/{name}")));
        if !name.contains("/source/") {
            request = request.header(FILE_NAME_HEADER, "dir/program");
        }
        request.header(SHA256_HEADER, sha256(content)).body(content.to_vec()).send().await.unwrap()
    }

    #[track_caller]
    pub(crate) fn expect_put<'a>(
        &'a self,
        name: &'a str,
        content: &'a [u8],
        status: StatusCode,
    ) -> impl Future<Output = String> + 'a {
        let at = std::panic::Location::caller();
        async move {
            let response = self.put(name, content).await;
            let found = response.status();
            let text = response.text().await.unwrap();
            assert_eq!(found, status, "{at}: {text}");
            text
        }
    }

    /// The value of a counter, 0 if it is not there.
    pub(crate) async fn counter(&self, name: &str) -> u64 {
        let text = self.get("/metrics").await.text().await.unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        line.unwrap_or(0)
    }
}

pub(crate) fn config(folder: &Path) -> Config {
    let mut config = Config::new(folder.to_owned());
    config.listen.set_port(0);
    config
}

pub(crate) fn client() -> Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder().no_zstd().no_gzip().no_proxy().build().unwrap()
}

/// The object of a content in the store of the data folder, as the catalog names it.
pub(crate) fn blob_path(folder: &Path, content: &[u8]) -> PathBuf {
    let name = sha256(content);
    let catalog = rusqlite::Connection::open(folder.join("catalog.sqlite")).unwrap();
    let number = "SELECT write FROM blob WHERE lower(hex(sha256)) = ?";
    let write: i64 = catalog.query_row(number, [&name], |row| row.get(0)).unwrap();
    folder.join("blobs").join(&name[..2]).join(format!("{name}-{write:016x}"))
}

pub(crate) fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One build of a small C program, in the forms a distribution ships.
pub(crate) struct Build {
    pub(crate) id: BuildId,
    /// As the linker wrote it.
    pub(crate) full: Vec<u8>,
    /// Without `.symtab` and DWARF.
    pub(crate) stripped: Vec<u8>,
    /// What `strip` took away, code as `SHT_NOBITS`.
    pub(crate) debug: Vec<u8>,
}

const SOURCE: &str = "\
static inline __attribute__((always_inline)) int twice(int x) {
    return x * 2 + (x >> 3);
}
__attribute__((noinline)) int outer(int x) {
    volatile int y = x;
    return twice(y) + 1;
}
int main(int argc, char **argv) {
    (void)argv;
    return outer(argc) + outer(argc + 1);
}
";

/// Line of the body of `twice`, which is inlined into `outer`.
pub(crate) const TWICE_LINE: u32 = 2;

fn compile(folder: &Path, name: &str, flags: &[&str]) -> PathBuf {
    let output = folder.join(name);
    std::fs::write(folder.join("program.c"), SOURCE).unwrap();
    run(Command::new("cc").args(flags).arg("-o").arg(&output).arg("program.c").current_dir(folder));
    output
}

pub(crate) fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// The build that most tests share.
pub(crate) fn build() -> &'static Build {
    static BUILD: OnceLock<Build> = OnceLock::new();
    BUILD.get_or_init(|| build_with(&[]))
}

/// A build with further compiler flags.
pub(crate) fn build_with(flags: &[&str]) -> Build {
    let folder = tempfile::tempdir().unwrap();
    let mut all = vec!["-g", "-O1", "-Wl,--build-id=sha1"];
    all.extend(flags);
    let full = compile(folder.path(), "full", &all);
    let path = |name: &str| folder.path().join(name);
    run(Command::new("strip").arg("-o").arg(path("stripped")).arg(&full));
    run(Command::new("objcopy").arg("--only-keep-debug").arg(&full).arg(path("debug")));
    let notes = String::from_utf8(run(Command::new("readelf").arg("-n").arg(&full))).unwrap();
    let id = notes.lines().find_map(|line| line.trim().strip_prefix("Build ID: ")).unwrap();
    let read = |name: &str| std::fs::read(path(name)).unwrap();
    Build { id: id.parse().unwrap(), full: read("full"), stripped: read("stripped"), debug: read("debug") }
}

/// An executable without a build-ID note, and its `htlhash`.
pub(crate) fn build_without_note() -> (Vec<u8>, String) {
    let folder = tempfile::tempdir().unwrap();
    let content = std::fs::read(compile(folder.path(), "plain", &["-O1", "-Wl,--build-id=none"])).unwrap();
    let hashed =
        [&content[..4096], &content[content.len() - 4096..], &(content.len() as u64).to_be_bytes()].concat();
    let id = sha256(&hashed)[..32].to_owned();
    (content, id)
}

/// Address of a symbol, as `nm` prints it.
pub(crate) fn symbol(elf: &[u8], name: &str) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, elf).unwrap();
    let symbols = String::from_utf8(run(Command::new("nm").arg(&path))).unwrap();
    let line = symbols.lines().find(|line| line.ends_with(&format!(" {name}"))).unwrap();
    u64::from_str_radix(line.split(' ').next().unwrap(), 16).unwrap()
}
