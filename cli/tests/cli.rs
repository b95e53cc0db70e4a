//! The built binary from outside: help, errors that say what to do, exit statuses, and symbol lookups
//! beside addr2line.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A port on which nothing listens (discard; never assigned to a service here).
const NOWHERE: &str = "http://127.0.0.1:9";

struct Run {
    status: i32,
    stdout: String,
    stderr: String,
}

fn windlass(arguments: &[&str], stdin: &str) -> Run {
    let mut child = Command::new(env!("CARGO_BIN_EXE_windlass"))
        .args(arguments)
        .env_remove("WINDLASS_SERVER")
        .env_remove("WINDLASS_TOKEN")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that reads no stdin may end before this: that is no failure.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    let output = child.wait_with_output().unwrap();
    Run {
        status: output.status.code().expect("ended by a signal"),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

#[track_caller]
fn check(arguments: &[&str], status: i32, words: &[&str]) {
    let run = windlass(arguments, "");
    let text = format!("{}{}", run.stdout, run.stderr);
    assert_eq!(run.status, status, "windlass {arguments:?}\n{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is not in the output of windlass {arguments:?}:\n{text}");
    }
    assert!(!text.contains("panicked"), "{text}");
}

#[test]
fn help_shows_examples() {
    check(&["--help"], 0, &["quickstart", "upload", "symbolize", "Exit status"]);
    for command in ["quickstart", "upload", "profile", "symbolize", "symbols"] {
        check(&[command, "--help"], 0, &["Examples:", &format!("windlass {command}")]);
    }
    check(&["completions", "bash"], 0, &["_windlass"]);
    check(&["--version"], 0, &[env!("CARGO_PKG_VERSION")]);
    check(&[], 2, &["Usage"]);
    check(&["launch"], 2, &["launch"]);
}

#[test]
fn an_unreachable_service_says_what_to_do() {
    let what_to_do = [NOWHERE, "windlassd serve", "--server", "WINDLASS_SERVER", "refused"];
    check(&["upload", "/proc/self/exe", "--server", NOWHERE], 2, &what_to_do);
    check(&["symbolize", "--build-id", "abcd", "0x1", "--server", NOWHERE], 2, &what_to_do);
    check(
        &["upload", "/proc/self/exe", "--server", NOWHERE, "--dry-run"],
        0,
        &["would go", "Nothing was sent"],
    );
    check(&["upload", "/proc/self/exe", "--server", "nonsense"], 2, &["nonsense", "http://"]);
}

#[test]
fn a_token_comes_from_a_file_that_must_exist() {
    let arguments = ["upload", "/proc/self/exe", "--server", NOWHERE, "--token-file", "/nonexistent/token"];
    check(&arguments, 2, &["token file /nonexistent/token"]);
}

#[test]
fn input_that_is_no_elf_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("notes.txt");
    fs::write(&text, "no ELF").unwrap();
    let text = text.to_str().unwrap();
    let dry = ["--dry-run", "--server", NOWHERE];
    check(&[&["upload", text], &dry[..]].concat(), 2, &[text, "not an ELF file"]);
    check(&[&["upload", "/proc/self/exe", text], &dry[..]].concat(), 1, &[text, "not an ELF file"]);
    check(&[&["upload", "/nonexistent"], &dry[..]].concat(), 2, &["/nonexistent", "No such file"]);
    check(&[&["upload", dir.path().to_str().unwrap()], &dry[..]].concat(), 2, &["no ELF file under"]);
    check(&["symbols", "build", text, "-o", "/dev/null"], 2, &[text]);
    check(&["symbols", "lookup", "--obj", text, "0x1"], 2, &[text, "neither an ELF file nor a symbol index"]);
    check(&["symbols", "lookup", "--obj", "/nonexistent", "0x1"], 2, &["/nonexistent", "No such file"]);
    check(&["symbols", "lookup", "--obj", text, "main"], 2, &["main", "hex"]);
    check(&["profile", "--pid", "4294967295", "-o", "x.html"], 2, &["no process 4294967295"]);
    check(&["profile", "--pid", "1", "-o", "x.svg"], 2, &[".pb.gz, .html or .folded"]);
}

/// A C program with an inlined call, and the addresses of its functions.
struct Program {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

const SOURCE: &str = "\
static inline __attribute__((always_inline)) int twice(int x) {
    volatile int y = x;
    return y + y;
}
__attribute__((noinline)) int leaf(int x) {
    return twice(x) + 1;
}
int main(int argc, char **argv) {
    return leaf(argc);
}
";

impl Program {
    fn compile(options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (source, path) = (dir.path().join("program.c"), dir.path().join("program"));
        fs::write(&source, SOURCE).unwrap();
        run(Command::new("cc").args(["-O1"]).args(options).arg(&source).arg("-o").arg(&path));
        Self { _dir: dir, path }
    }

    /// Every byte of `leaf` and `main`, as nm gives them.
    fn addresses(&self) -> Vec<String> {
        let symbols = run(Command::new("nm").arg("-S").arg(&self.path));
        let mut addresses = Vec::new();
        for line in symbols.lines() {
            let fields: Vec<_> = line.split(' ').collect();
            if let [start, size, _, "leaf" | "main"] = fields[..] {
                let hex = |text| u64::from_str_radix(text, 16).unwrap();
                addresses.extend((hex(start)..hex(start) + hex(size)).map(|address| format!("{address:#x}")));
            }
        }
        assert!(addresses.len() > 8, "{symbols}");
        addresses
    }
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The blocks that addr2line prints, in the form of llvm-symbolizer.
fn addr2line(path: &Path, addresses: &[String]) -> Vec<String> {
    let printed = run(Command::new("addr2line").arg("-afie").arg(path).args(addresses));
    let mut blocks: Vec<String> = Vec::new();
    for line in printed.lines() {
        if line.starts_with("0x") {
            blocks.push(String::new());
            continue;
        }
        let line = line.split(" (discriminator").next().unwrap();
        let block = blocks.last_mut().unwrap();
        *block += line;
        *block += if line.contains(':') { ":0\n" } else { "\n" };
    }
    blocks
}

#[test]
fn lookups_agree_with_addr2line() {
    let program = Program::compile(&["-g"]);
    let addresses = program.addresses();
    let expect = addr2line(&program.path, &addresses);
    assert!(
        expect.iter().any(|block| block.starts_with("twice\n") && block.contains("leaf\n")),
        "{expect:?}"
    );
    let index = program.path.with_extension("symbols");
    let (elf, index) = (program.path.to_str().unwrap(), index.to_str().unwrap());
    check(&["symbols", "build", elf, "-o", index], 0, &[]);
    let stdin = addresses.join("\n");
    for obj in [elf, index] {
        let answered = windlass(&["symbols", "lookup", "--obj", obj], &stdin);
        assert_eq!(answered.status, 0, "{}", answered.stderr);
        let blocks: Vec<_> =
            answered.stdout.split_terminator("\n\n").map(|block| format!("{block}\n")).collect();
        for ((address, block), expect) in addresses.iter().zip(&blocks).zip(&expect) {
            assert_eq!(block, expect, "{address} in {obj}");
        }
        assert_eq!(blocks.len(), expect.len());
    }
}

#[test]
fn lookups_of_nothing_and_of_nonsense_keep_their_place() {
    let program = Program::compile(&["-g"]);
    let elf = program.path.to_str().unwrap();
    let answered = windlass(&["symbols", "lookup", "--obj", elf], "0x1\nnonsense\n0x1");
    assert_eq!(answered.stdout, "??\n??:0:0\n\nnonsense\n??\n??:0:0\n\n");
    let json = windlass(&["symbols", "lookup", "--obj", elf, "--output-style", "JSON", "0x1"], "");
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json[0]["Address"], "0x1");
    assert_eq!(json[0]["Symbol"][0]["FunctionName"], "");
}

#[test]
fn upload_says_what_a_file_lacks_and_how_to_add_it() {
    let dry = |program: &Program| {
        let path = program.path.to_str().unwrap();
        let run = windlass(&["upload", path, "--dry-run", "--json", "--server", NOWHERE], "");
        assert_eq!(run.status, 0, "{}", run.stderr);
        let report: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
        report["files"][0].clone()
    };
    let full = dry(&Program::compile(&["-g", "-Wl,--build-id"]));
    assert_eq!((&full["kind"], &full["identity"]), (&"executable".into(), &"gnu".into()));
    assert_eq!(full["lacks"], serde_json::json!([]));
    assert_eq!(full["status"], "would_upload");
    let bare = dry(&Program::compile(&["-s", "-Wl,--build-id=none"]));
    assert_eq!(bare["identity"], "htlhash");
    assert_eq!(bare["build_id"].as_str().unwrap().len(), 32);
    let lacks = bare["lacks"].to_string();
    for remedy in ["-Wl,--build-id", "-g", "before strip"] {
        assert!(lacks.contains(remedy), "{lacks}");
    }
}

#[test]
fn upload_tells_split_debug_files_and_objects_apart() {
    let program = Program::compile(&["-g", "-Wl,--build-id"]);
    let dir = program.path.parent().unwrap();
    let debug = program.path.with_extension("debug");
    run(Command::new("objcopy").arg("--only-keep-debug").args([&program.path, &debug]));
    run(Command::new("strip").arg(&program.path));
    run(Command::new("cc").arg("-c").arg(dir.join("program.c")).arg("-o").arg(dir.join("program.o")));
    let run = windlass(&["upload", dir.to_str().unwrap(), "--dry-run", "--json", "--server", NOWHERE], "");
    assert_eq!(run.status, 0, "{}", run.stderr);
    let report: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    let kinds: Vec<_> = report["files"].as_array().unwrap().iter().map(|file| &file["kind"]).collect();
    assert_eq!(kinds, ["executable", "debuginfo"], "{report:#}");
    assert_eq!(report["files"][0]["build_id"], report["files"][1]["build_id"]);
    assert_eq!(report["skipped"][0]["files"], 1, "{report:#}");
}
