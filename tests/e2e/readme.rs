//! README's commands, run as they are printed.
//!
//! Its `sh` blocks are run in their order in one shell. What differs from a reader's terminal: the
//! programs are those under test instead of a release build, a free port takes the place of 8002 and a
//! temporary folder that of `/tmp`, and the shell waits until the service it started answers.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use windlass_tests::program::{checkout, program, run, windlass};
use windlass_tests::service::decode;
use windlass_tests::skip::may_use_bpf;

/// Blocks that build or run everything; other tests and the suite itself are these.
const WHOLE_BUILDS: &[&str] = &["cargo run", "cargo xtask test", "cargo build"];
/// The command that stays in the background.
const SERVE: &str = "windlassd serve";

#[test]
fn commands_work_as_printed() {
    let test = "readme::commands_work_as_printed";
    if !may_use_bpf(test) || ["gdb", "curl", "readelf"].iter().any(|name| program(test, name).is_none()) {
        return;
    }
    let folder = tempfile::tempdir().expect("temporary folder");
    let port = free_port();
    let readme = std::fs::read_to_string(checkout().join("README.md")).expect("README.md");
    let script = script(&readme, folder.path(), port);

    let programs = Path::new(windlass("windlass").get_program()).parent().expect("a folder").to_owned();
    let path = std::env::var("PATH").unwrap_or_default();
    let mut shell = Command::new("bash");
    shell
        .args(["-e", "-u", "-x", "-c", &script])
        .current_dir(checkout())
        .env("PATH", format!("{}:{path}", programs.display()))
        .env("WINDLASS_SERVER", format!("http://127.0.0.1:{port}"))
        .env("WINDLASS_CACHE_DIR", folder.path().join("agent"))
        .env("DEBUGINFOD_CACHE_PATH", folder.path().join("debuginfod"));
    let output = run(&mut shell, &[0]);
    let shown = String::from_utf8_lossy(&output.stdout);
    for expected in
        ["uploaded  fixtures/elf/inlined", "inlined.c\" starts at", "mix_word", "rows", " 0 wrong"]
    {
        assert!(shown.contains(expected), "{expected:?} is not in what the commands print:\n{shown}");
    }
    let fleet = std::fs::read(folder.path().join("fleet.pb.gz")).expect("the profile that curl fetched");
    assert!(!decode(&fleet).sample.is_empty(), "the agent's samples are in the fleet's profile");
    assert!(folder.path().join("machine.html").is_file(), "the flame graph of `windlass profile`");
}

/// The commands of README as one script.
fn script(readme: &str, folder: &Path, port: u16) -> String {
    let mut script = String::from("trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\n");
    let blocks = readme.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    let mut commands = 0;
    for block in blocks.filter(|block| !WHOLE_BUILDS.iter().any(|build| block.contains(build))) {
        commands += block.lines().count();
        let block = block
            .replace(SERVE, &format!("{SERVE} --listen 127.0.0.1:{port}"))
            .replace(":8002", &format!(":{port}"))
            .replace("/tmp/", &format!("{}/", folder.display()));
        script += &block;
        if block.contains(SERVE) {
            script +=
                &format!("until curl -sf http://127.0.0.1:{port}/readyz >/dev/null; do sleep 0.1; done\n");
        }
    }
    assert!(commands > 10, "README has lost its commands");
    script
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound listener has an address").port()
}
