//! `windlass upload` against a service: what it finds in a tree, what it sends of it, and what comes of that.

mod examples;
mod interrupted;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use object::{Object as _, ObjectSection as _};
use serde_json::Value;
use windlass_schema::BuildId;
use windlass_tests::program::{fixture, program, run, text, windlass};
use windlass_tests::service::TestService;
use windlass_unwind_compiler::build_id_of;

const SOURCE: &str = "#include <stdio.h>\n\
    __attribute__((noinline)) int twice(int n) {\n\
    \x20   return n + printf(\"%d\\n\", n);\n\
    }\n\
    int main(int argc, char **argv) { return twice(argc) > 100 && argv; }\n\
    #ifdef NAME\n\
    const char *name = NAME;\n\
    #endif\n";

/// Compiles programs in a folder.
struct Compiler {
    cc: PathBuf,
    folder: PathBuf,
}

impl Compiler {
    fn new(test: &str, folder: &Path) -> Option<Self> {
        let found = ["strip", "objcopy", "readelf"].iter().all(|name| program(test, name).is_some());
        let cc = program(test, "cc").filter(|_| found)?;
        std::fs::create_dir_all(folder).expect("a folder");
        std::fs::write(folder.join("twice.c"), SOURCE).expect("the source");
        Some(Self { cc, folder: folder.to_owned() })
    }

    /// Compiles the source into `name`. Each name is another program: its text is in it.
    fn compile(&self, name: &str, flags: &[&str]) -> PathBuf {
        let path = self.folder.join(name);
        std::fs::create_dir_all(path.parent().expect("a file in a folder")).expect("a folder");
        let mut cc = Command::new(&self.cc);
        cc.args(["-O1", "-g", "-Wl,--build-id=sha1", "-o"]).arg(&path).args(flags);
        cc.arg(format!("-DNAME={name:?}")).arg("twice.c");
        run(cc.current_dir(&self.folder), &[0]);
        path
    }

    fn tool(&self, name: &str, arguments: &[&str]) {
        run(Command::new(name).args(arguments).current_dir(&self.folder), &[0]);
    }
}

fn id_of(path: &Path) -> BuildId {
    build_id_of(&std::fs::read(path).expect("read back")).expect("a build-ID was asked for")
}

fn command(service: &TestService, arguments: &[&str], paths: &[&Path]) -> Command {
    let mut upload = windlass("windlass");
    upload.args(["upload", "--server", &service.url()]).args(arguments).args(paths);
    upload
}

/// The report of an upload that ends with `code`.
fn report(service: &TestService, arguments: &[&str], paths: &[&Path], code: i32) -> Value {
    let output = run(command(service, arguments, paths).arg("--json"), &[code]);
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Path, kind and status of each file, in the order of the paths.
fn files(report: &Value, below: &Path) -> Vec<String> {
    let text = |value: &Value| value.as_str().expect("a string").to_owned();
    let files = report["files"].as_array().expect("files").iter();
    let mut files: Vec<_> = files
        .map(|file| {
            let path = text(&file["path"]);
            let path =
                Path::new(&path).strip_prefix(below).map_or(path.clone(), |it| it.display().to_string());
            format!("{path} {} {}", text(&file["kind"]), text(&file["status"]))
        })
        .collect();
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_goes_with_all_that_belongs_to_it_and_once() {
    let test = "upload::a_tree_goes_with_all_that_belongs_to_it_and_once";
    let service = TestService::start().await;
    let (tree, elsewhere) = (service.folder().join("tree"), service.folder().join("elsewhere"));
    let Some(compiler) = Compiler::new(test, &tree) else { return };
    compiler.compile("plain", &[]);
    // A debug file beside the program by its link, in a hidden folder.
    compiler.compile("linked", &[]);
    std::fs::create_dir(tree.join(".debug")).expect("a folder");
    compiler.tool("objcopy", &["--only-keep-debug", "linked", ".debug/linked.dbg"]);
    compiler.tool("objcopy", &["--strip-all", "--add-gnu-debuglink=.debug/linked.dbg", "linked"]);
    // One that is outside of the tree, by its build-ID.
    let away = compiler.compile("away", &[]);
    let id = id_of(&away).to_string();
    let debug = elsewhere.join(".build-id").join(&id[..2]).join(format!("{}.debug", &id[2..]));
    std::fs::create_dir_all(debug.parent().expect("a folder")).expect("a folder");
    compiler.tool("objcopy", &["--only-keep-debug", "away", debug.to_str().expect("UTF-8")]);
    compiler.tool("strip", &["--strip-all", "away"]);
    // Split DWARF in a file of its own, and a supplementary file by its build-ID.
    // The packer of binutils 2.40 crashes on DWARF 5.
    compiler.compile("split", &["-gdwarf-4", "-gsplit-dwarf"]);
    compiler.compile("dwz/shared", &["-nostdlib", "-shared", "-fPIC"]);
    compiler.tool("objcopy", &["--only-keep-debug", "dwz/shared", "dwz/shared.dwz"]);
    let shared = id_of(&tree.join("dwz/shared.dwz"));
    let mut link = b"dwz/shared.dwz\0".to_vec();
    link.extend(shared.as_bytes());
    std::fs::write(elsewhere.join("link"), link).expect("the section");
    compiler.compile("dwarfzipped", &[]);
    let link = format!(".gnu_debugaltlink={}", elsewhere.join("link").display());
    compiler.tool("objcopy", &["--add-section", &link, "dwarfzipped"]);
    std::fs::remove_file(tree.join("dwz/shared")).expect("remove");
    // What is no one's: an object file, a text, a loop of links.
    compiler.tool("cc", &["-c", "twice.c", "-o", "twice.o"]);
    symlink("..", tree.join("dwz/loop")).expect("a link");

    let arguments = ["--debug-dir", elsewhere.to_str().expect("UTF-8")];
    let first = report(&service, &arguments, &[&tree], 0);
    let expect = |status: &str| {
        let debug = format!("{} debuginfo", debug.display());
        let mut files: Vec<_> = [
            ".debug/linked.dbg debuginfo",
            "away executable",
            &debug,
            "dwarfzipped executable",
            "dwz/shared.dwz debuginfo",
            "linked executable",
            "plain executable",
            "split executable",
        ]
        .map(|file| format!("{file} {status}"))
        .into();
        let dwo = std::fs::read_dir(&tree).expect("the tree").filter_map(Result::ok);
        let dwo = dwo.map(|entry| entry.file_name().to_string_lossy().into_owned());
        files.extend(dwo.filter(|name| name.ends_with(".dwo")).map(|name| format!("{name} dwo {status}")));
        files.sort();
        files
    };
    assert_eq!(expect("uploaded").len(), 9, "the compiler made one .dwo file");
    assert_eq!(
        files(&first, &tree).iter().map(|it| it.replace("//", "/")).collect::<Vec<_>>(),
        expect("uploaded")
    );
    assert_eq!(first["skipped"][0]["files"], 1, "{first}");
    let again = report(&service, &arguments, &[&tree], 0);
    let mut present = expect("present");
    present.sort();
    assert_eq!(files(&again, &tree), present);
    assert_eq!(again["summary"]["uploaded"], 0);

    // Packed, the units go as one, and the loose file counts as no one's.
    if program(test, "dwp").is_some() {
        compiler.tool("dwp", &["-e", "split"]);
        let packed = report(&service, &[], &[&tree.join("split")], 0);
        assert_eq!(files(&packed, &tree), ["split executable present", "split.dwp dwp uploaded"]);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_gate_asks_for_is_named_with_its_remedy() {
    let test = "upload::what_the_gate_asks_for_is_named_with_its_remedy";
    let service = TestService::start().await;
    let Some(compiler) = Compiler::new(test, &service.folder().join("tree")) else { return };
    let whole = compiler.compile("whole", &[]);
    let plain = compiler.compile("plain", &["-g0", "-Wl,--build-id=none"]);
    let require = ["--require", "debug_info,line_table", "--require", "build_id"];
    assert_eq!(report(&service, &require, &[&whole], 0)["findings"], Value::Array(Vec::new()));
    let found = report(&service, &require, &[&plain, &whole], 1);
    let what: Vec<_> = found["findings"].as_array().expect("findings").iter().map(|it| &it["what"]).collect();
    assert_eq!(what, ["debug_info", "line_table", "build_id"]);
    for finding in found["findings"].as_array().expect("findings") {
        assert_eq!(finding["path"].as_str(), plain.to_str());
        assert!(finding["remedy"].as_str().is_some_and(|text| text.contains('-')), "{finding}");
    }
    assert_eq!(found["summary"]["uploaded"], 1, "the gate does not keep anything from the service");
    let shown = run(&mut command(&service, &require, &[&plain]), &[1]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("plain lacks DWARF: compile with -g"), "{shown}");
    assert!(run(&mut command(&service, &["--require", "dwarf"], &[&plain]), &[2]).stdout.is_empty());
    let empty = service.folder().join("empty");
    std::fs::create_dir(&empty).expect("a folder");
    run(&mut command(&service, &[], &[&empty]), &[2]);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gdb_has_lines_of_a_stripped_program_from_its_debug_part() {
    let test = "upload::gdb_has_lines_of_a_stripped_program_from_its_debug_part";
    let (Some(gdb), Some(find)) = (program(test, "gdb"), program(test, "debuginfod-find")) else { return };
    let service = TestService::start().await;
    let Some(compiler) = Compiler::new(test, &service.folder().join("tree")) else { return };
    let whole = compiler.compile("whole", &[]);
    let id = id_of(&whole).to_string();
    let sent = report(&service, &["--only-debug", "--sources"], &[&whole], 0);
    assert_eq!(
        files(&sent, &compiler.folder),
        ["whole debuginfo uploaded", "whole skeleton uploaded"],
        "{sent}"
    );
    compiler.tool("strip", &["--strip-all", "whole"]);
    std::fs::remove_file(compiler.folder.join("twice.c")).expect("the source is at the service");

    let client = |command: &mut Command, cache: &str| {
        command.env("DEBUGINFOD_URLS", service.url());
        command.env("DEBUGINFOD_CACHE_PATH", service.folder().join(cache));
    };
    let mut session = Command::new(gdb);
    session.args(["-nx", "-batch", "-iex", "set debuginfod enabled on", "-ex", "info line twice"]);
    session.args(["-ex", "break twice", "-ex", "run", "-ex", "backtrace", "-ex", "list"]).arg(&whole);
    client(&mut session, "gdb");
    let shown = text(&mut session);
    for expected in ["Line 2 of \"twice.c\"", "twice (n=1) at twice.c:", "main (argc=", "return n + printf"] {
        assert!(shown.contains(expected), "{expected:?}: {shown}");
    }

    // The file itself, before other programs.
    let mut find = Command::new(find);
    client(find.args(["debuginfo", &id]), "find");
    let debug = text(&mut find).trim().to_owned();
    check_debug_file(test, Path::new(&debug), &whole);
    // The unwind table comes from the skeleton.
    let url = format!("{}/api/v1/buildid/{id}/unwind", service.url());
    let table = async || service.client.get(&url).send().await.expect("an answer").status().as_u16();
    while table().await == 202 {
        tokio::task::yield_now().await;
    }
    assert_eq!(table().await, 200);
    service.stop().await;
}

/// Holds a debug file against its stripped program and the tools that know such files.
fn check_debug_file(test: &str, debug: &Path, stripped: &Path) {
    let shown = run(Command::new("readelf").args(["-lSW", "--debug-dump=line"]).arg(debug), &[0]);
    // What objcopy makes has it too: the name is among the bytes that are gone.
    let interpreter = "readelf: Error: Unable to find program interpreter name";
    let complaints = String::from_utf8_lossy(&shown.stderr).into_owned();
    assert!(complaints.lines().all(|line| line == interpreter), "{complaints}");
    if let Some(lint) = program(test, "eu-elflint") {
        let shown = text(Command::new(lint).args(["--gnu-ld", "--debuginfo"]).arg(debug));
        assert!(shown.contains("No errors"), "{shown}");
    }
    let (debug, stripped) =
        (std::fs::read(debug).expect("debug file"), std::fs::read(stripped).expect("program"));
    let debug_file = object::File::parse(&debug[..]).expect("an ELF file");
    let stripped = object::File::parse(&stripped[..]).expect("an ELF file");
    for section in stripped.sections().filter(|section| section.address() > 0) {
        let name = section.name().expect("a name");
        let same = debug_file.section_by_name(name).expect("all sections are there");
        assert_eq!((same.address(), same.size()), (section.address(), section.size()), "{name}");
        assert!(same.file_range().is_none() || name.starts_with(".note"), "{name} has lost its bytes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_go_as_compiled_or_say_why_not() {
    let test = "upload::sources_go_as_compiled_or_say_why_not";
    let Some(clang) = program(test, "clang") else { return };
    let service = TestService::start().await;
    let folder = service.folder().join("build");
    std::fs::create_dir_all(folder.join("deep")).expect("a folder");
    let source = |name: &str, text: &str| std::fs::write(folder.join(name), text).expect("a source");
    source("deep/own.h", "static int own(int n) { return n * 3; }\n");
    source("changed.h", "static int changed(int n) { return n * 5; }\n");
    source("gone.h", "static int gone(int n) { return n * 7; }\n");
    source(
        "main.c",
        "#include \"deep/../deep/own.h\"\n#include \"changed.h\"\n#include \"gone.h\"\n\
         int main(int argc, char **argv) { return own(argc) + changed(argc) + gone(argc) + !argv; }\n",
    );
    let mut compile = Command::new(clang);
    compile.args(["-g", "-gdwarf-5", "-O0", "-Wl,--build-id=sha1", "-o", "program", "main.c"]);
    run(compile.current_dir(&folder), &[0]);
    source("changed.h", "static int changed(int n) { return n * 6; }\n");
    std::fs::remove_file(folder.join("gone.h")).expect("remove");

    let report = report(&service, &["--sources"], &[&folder.join("program")], 0);
    let skipped: Vec<_> = report["files"][0]["sources_skipped"]
        .as_array()
        .expect("reasons")
        .iter()
        .map(|it| format!("{} {}", it["files"], it["reason"].as_str().expect("text")))
        .collect();
    assert_eq!(
        skipped,
        ["1 not on this machine", "1 changed since it was compiled (its MD5 is not the line table's)"]
    );
    let id = id_of(&folder.join("program"));
    for (name, status) in
        [("main.c", 200), ("deep/own.h", 200), ("deep/../deep/own.h", 200), ("changed.h", 404)]
    {
        let path = folder.join(name).display().to_string().replace("..", "%2E%2E");
        let url = format!("{}/buildid/{id}/source{path}", service.url());
        let answer = service.client.get(&url).send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), status, "{name}");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_named_and_the_rest_goes() {
    let service = TestService::start().await;
    let tree = service.folder().join("tree");
    std::fs::create_dir_all(tree.join("closed")).expect("a folder");
    std::fs::copy(fixture("small"), tree.join("small")).expect("copy");
    std::fs::copy(fixture("inlined"), tree.join("closed/inlined")).expect("copy");
    std::fs::write(tree.join("broken"), b"\x7fELF\x02\x01\x01").expect("write");
    symlink("itself", tree.join("itself")).expect("a link");
    symlink(".", tree.join("loop")).expect("a link");
    let found = report(&service, &[], &[&tree, &tree.join("absent"), &tree.join("itself")], 1);
    let unusable = found["unusable"].as_array().expect("paths");
    let mut named: Vec<_> = unusable.iter().map(|it| it["path"].as_str().expect("a path")).collect();
    named.sort_unstable();
    let expect = ["absent", "broken", "itself"].map(|name| tree.join(name).display().to_string());
    assert_eq!(named, expect, "{found}");
    assert_eq!(found["summary"]["uploaded"], 2);

    // Only root reads everything; who is root runs the program as somebody else.
    // SAFETY: it has no arguments and cannot fail.
    let is_root = unsafe { libc::geteuid() } == 0;
    let open = |path: &Path, mode| {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("permissions");
    };
    open(service.folder(), 0o755);
    open(&tree.join("closed"), 0o000);
    let mut upload = command(&service, &["--json"], &[&tree]);
    if is_root {
        // Where it was built, others may have no access.
        let copy = service.folder().join("windlass");
        std::fs::copy(upload.get_program(), &copy).expect("copy the program");
        let arguments: Vec<_> = upload.get_args().map(ToOwned::to_owned).collect();
        upload = Command::new(copy);
        std::os::unix::process::CommandExt::uid(upload.args(arguments).current_dir("/"), 65534);
    }
    let output = run(&mut upload, &[1]);
    open(&tree.join("closed"), 0o755);
    let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let closed = tree.join("closed").display().to_string();
    let unusable = found["unusable"].as_array().expect("paths");
    let error = unusable.iter().find(|it| it["path"] == closed.as_str()).expect("the folder is named");
    assert!(error["error"].as_str().is_some_and(|text| text.contains("ermission denied")), "{error}");
    assert_eq!(found["summary"]["present"], 1);
    service.stop().await;
}

/// Small programs that differ in their build-ID alone.
fn many(folder: &Path, count: u32) {
    let elf = std::fs::read(fixture("small")).expect("fixture");
    let id = build_id_of(&elf).expect("the fixture has a build-ID");
    let at = elf.windows(id.as_bytes().len()).position(|bytes| bytes == id.as_bytes()).expect("the note");
    std::fs::create_dir_all(folder).expect("a folder");
    for number in 0..count {
        let mut other = elf.clone();
        other[at..at + 4].copy_from_slice(&number.to_be_bytes());
        std::fs::write(folder.join(format!("program{number}")), other).expect("write");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_programs_are_asked_for_at_once_and_sent_once() {
    const COUNT: u32 = 1000;
    let service = TestService::start().await;
    let tree = service.folder().join("tree");
    many(&tree, COUNT);
    let first = report(&service, &["--jobs", "16"], &[&tree], 0);
    assert_eq!(first["summary"]["uploaded"], COUNT);
    let shown = text(&mut command(&service, &[], &[&tree]));
    assert!(shown.contains(&format!("ELF files: {COUNT} already there")), "{shown}");
    assert!(shown.lines().count() < 20, "a rerun is no wall of text: {shown}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_sees_progress_and_a_pipe_does_not() {
    let test = "upload::a_terminal_sees_progress_and_a_pipe_does_not";
    let Some(script) = program(test, "script") else { return };
    let service = TestService::start().await;
    let tree = service.folder().join("tree");
    many(&tree, 200);
    let upload = command(&service, &["--dry-run"], &[&tree]);
    let words = std::iter::once(upload.get_program()).chain(upload.get_args());
    let line: Vec<_> = words.map(|word| format!("'{}'", word.to_string_lossy())).collect();
    let shown = text(Command::new(script).args(["-qec", &line.join(" "), "/dev/null"]).env("TERM", "xterm"));
    assert!(shown.contains("reading ["), "{shown:?}");
    let piped = run(&mut command(&service, &[], &[&tree]), &[0]);
    assert!(piped.stderr.is_empty(), "{}", String::from_utf8_lossy(&piped.stderr));
    service.stop().await;
}
