//! The debuginfod protocol as its own clients speak it: elfutils' and gdb's.

use std::path::{Path, PathBuf};
use std::process::Command;

use object::{Object as _, ObjectSymbol as _};
use windlass_schema::BuildId;
use windlass_tests::program::{fixture, program, run, text, windlass};
use windlass_tests::service::TestService;
use windlass_unwind_compiler::build_id_of;

/// A program built with debug information in a folder, its stripped twin, and where its source lies.
struct Built {
    build_id: BuildId,
    whole: PathBuf,
    stripped: PathBuf,
    source: PathBuf,
}

/// Compiles the source of a fixture where the test can reach it, so that its source can be uploaded too.
fn build(test: &str, folder: &Path) -> Option<Built> {
    let (cc, strip) = (program(test, "cc")?, program(test, "strip")?);
    let source = folder.join("inlined.c");
    let original = fixture("inlined").with_file_name("../sources/inlined.c");
    std::fs::copy(original, &source).expect("copy the source");
    let (whole, stripped) = (folder.join("inlined"), folder.join("inlined.stripped"));
    run(Command::new(cc).args(["-O2", "-g", "-Wl,--build-id=sha1", "-o"]).arg(&whole).arg(&source), &[0]);
    run(Command::new(strip).arg("--strip-all").arg("-o").arg(&stripped).arg(&whole), &[0]);
    let build_id = build_id_of(&std::fs::read(&whole).expect("read back")).expect("a build-ID was asked for");
    Some(Built { build_id, whole, stripped, source })
}

/// Lets a debuginfod client ask this service, and remember nothing from elsewhere.
fn client<'a>(command: &'a mut Command, service: &TestService, cache: &str) -> &'a mut Command {
    command
        .env("DEBUGINFOD_URLS", service.url())
        .env("DEBUGINFOD_CACHE_PATH", service.folder().join(cache))
        .env("DEBUGINFOD_TIMEOUT", "20")
}

/// What a program prints that may call it a failure when it finds nothing.
fn shown_without_debuginfo(command: &mut Command) -> String {
    String::from_utf8_lossy(&run(command, &[0, 1]).stdout).into_owned()
}

fn upload(service: &TestService, path: &Path) {
    let mut upload = windlass("windlass");
    upload.args(["upload", "--sources", "--server", &service.url()]).arg(path);
    run(&mut upload, &[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn debuginfod_find_gets_what_was_uploaded() {
    let test = "debuginfod::debuginfod_find_gets_what_was_uploaded";
    let Some(find) = program(test, "debuginfod-find") else { return };
    let service = TestService::start().await;
    let Some(built) = build(test, service.folder()) else { return };
    upload(&service, &built.whole);
    let source = built.source.to_str().expect("a UTF-8 path");
    let id = built.build_id.to_string();
    for (arguments, expect) in [
        (vec!["debuginfo", &id], &built.whole),
        (vec!["executable", &id], &built.whole),
        (vec!["source", &id, source], &built.source),
    ] {
        let found = text(client(&mut Command::new(&find), &service, "find").args(&arguments));
        let content = std::fs::read(found.trim()).expect("debuginfod-find prints a path");
        assert!(content == std::fs::read(expect).expect("read back"), "{arguments:?}");
    }
    let unknown = "00".repeat(20);
    let missing = run(client(&mut Command::new(&find), &service, "none").args(["debuginfo", &unknown]), &[1]);
    assert!(String::from_utf8_lossy(&missing.stderr).contains("No such file"), "{missing:?}");
    service.stop().await;
}

/// Files of no bytes in a folder: by them a debuginfod client remembers that something does not exist.
fn empty_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let empty = entries.filter(|entry| entry.metadata().is_ok_and(|metadata| metadata.len() == 0));
    empty.map(|entry| entry.path()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_upstream_leaves_nothing_in_a_clients_cache() {
    let test = "debuginfod::a_dead_upstream_leaves_nothing_in_a_clients_cache";
    let Some(find) = program(test, "debuginfod-find") else { return };
    // It takes connections and is silent.
    let dead = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}", dead.local_addr().expect("it is bound"));
    let service = TestService::start_with(|config| {
        config.upstreams = vec![url];
        config.upstream_deadline = std::time::Duration::from_millis(500);
    })
    .await;
    let Some(built) = build(test, service.folder()) else { return };
    let id = built.build_id.to_string();
    let mut ask = Command::new(&find);
    client(&mut ask, &service, "cache").args(["debuginfo", &id]);
    let missing = run(&mut ask, &[1]);
    assert!(!String::from_utf8_lossy(&missing.stderr).contains("No such file"), "{missing:?}");
    assert_eq!(empty_files(&service.folder().join("cache").join(&id)), Vec::<PathBuf>::new());
    // So what is uploaded now is found by the same client.
    upload(&service, &built.whole);
    let found = text(&mut ask);
    assert!(std::fs::read(found.trim()).expect("a path") == std::fs::read(&built.whole).expect("read back"));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gdb_names_files_and_lines_of_a_stripped_program() {
    let test = "debuginfod::gdb_names_files_and_lines_of_a_stripped_program";
    let Some(gdb) = program(test, "gdb") else { return };
    let service = TestService::start().await;
    let Some(built) = build(test, service.folder()) else { return };
    let mut session = Command::new(&gdb);
    session.args(["-nx", "-batch", "-iex", "set debuginfod enabled on"]);
    session.args(["-ex", "info line digest", "-ex", "list digest,"]).arg(&built.stripped);
    // Nothing is known before: what gdb then shows comes from the service.
    let before = shown_without_debuginfo(client(&mut session, &service, "before"));
    assert!(!before.contains("inlined.c"), "{before}");
    upload(&service, &built.whole);
    // The source too must come from there.
    std::fs::rename(&built.source, service.folder().join("moved.c")).expect("move the source away");
    let after = text(client(&mut session, &service, "after"));
    assert!(after.contains("inlined.c\""), "{after}");
    assert!(after.contains("mix_words(count);"), "{after}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_split_debug_file_serves_its_stripped_program() {
    let test = "debuginfod::a_split_debug_file_serves_its_stripped_program";
    let Some(gdb) = program(test, "gdb") else { return };
    let service = TestService::start().await;
    upload(&service, &fixture("inlined.debug"));
    let mut session = Command::new(gdb);
    session.args(["-nx", "-batch", "-iex", "set debuginfod enabled on", "-ex", "info line digest"]);
    let shown = text(client(session.arg(fixture("inlined.stripped")), &service, "cache"));
    assert!(shown.contains("inlined.c\"") && shown.contains("<digest"), "{shown}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn elfutils_names_inlined_calls_of_a_stripped_program() {
    let test = "debuginfod::elfutils_names_inlined_calls_of_a_stripped_program";
    let Some(addr2line) = program(test, "eu-addr2line") else { return };
    let whole = std::fs::read(fixture("inlined")).expect("fixture");
    let elf = object::File::parse(&whole[..]).expect("the fixture is an ELF file");
    let digest = elf.symbol_by_name("digest").expect("the fixture has this function");
    // Somewhere in the loop, whose body is inlined from two functions.
    let ask: Vec<_> = (0..digest.size()).map(|at| format!("{:#x}", digest.address() + at)).collect();
    let service = TestService::start().await;
    let mut command = Command::new(addr2line);
    command.args(["-i", "-f", "-e"]).arg(fixture("inlined.stripped")).args(ask);
    let before = shown_without_debuginfo(client(&mut command, &service, "before"));
    assert!(!before.contains("inlined.c:"), "{before}");
    upload(&service, &fixture("inlined.debug"));
    let after = text(client(&mut command, &service, "after"));
    assert!(after.contains("inlined.c:") && after.contains("mix_word"), "{after}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sections_and_errors_are_those_of_the_protocol() {
    let service = TestService::start().await;
    upload(&service, &fixture("inlined"));
    let elf = std::fs::read(fixture("inlined")).expect("fixture");
    let id = build_id_of(&elf).expect("the fixture has a build-ID");
    let get = async |path: &str| {
        let response =
            service.client.get(format!("{}{path}", service.url())).send().await.expect("an answer");
        let size = response
            .headers()
            .get("x-debuginfod-size")
            .and_then(|size| size.to_str().ok())
            .map(str::to_owned);
        (response.status().as_u16(), size, response.bytes().await.expect("the whole body"))
    };
    let (status, size, note) = get(&format!("/buildid/{id}/section/.note.gnu.build-id")).await;
    assert_eq!((status, size.as_deref()), (200, Some("36")));
    assert!(note.ends_with(id.as_bytes()), "the note holds the build-ID");
    // 404 is final for a client, 503 sends it on to the whole file.
    assert_eq!(get(&format!("/buildid/{id}/section/.nosuch")).await.0, 404);
    assert_eq!(get(&format!("/buildid/{}/debuginfo", "ab".repeat(20))).await.0, 404);
    assert_eq!(get("/buildid/ABCD/debuginfo").await.0, 503);
    assert_eq!(get(&format!("/buildid/{id}/source/etc/passwd")).await.0, 404);
    let (status, size, whole) = get(&format!("/buildid/{id}/executable")).await;
    assert_eq!((status, size), (200, Some(elf.len().to_string())));
    assert!(whole == elf, "the executable as it was uploaded");
    service.stop().await;
}
