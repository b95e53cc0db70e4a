//! Names of a kernel's and its modules' code: from the list of a running one, and better ones when its file arrives.

use opentelemetry_proto::tonic::common::v1::any_value::Value;
use reqwest::StatusCode;
use windlass_schema::kernel_module::MODULE_TEXT;
use windlass_schema::pprof::{self, Profile};

use crate::naming::{START_NS, batch, decode, send};
use crate::server::{Build, Server, TWICE_LINE, build_with, symbol};

/// Where kernels for x86-64 are linked to, and where this one is, which has another `CONFIG_PHYSICAL_START`.
const USUAL_TEXT: u64 = 0xffff_ffff_8100_0000;
const LINKED_TEXT: u64 = 0xffff_ffff_8200_0000;

/// Fewer bytes than `outer` has.
const OUTER_BYTES: u64 = 16;

/// A file like `vmlinux`, as far as naming is concerned.
fn vmlinux() -> Build {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("vmlinux.lds");
    let sections = format!("SECTIONS {{ . = {LINKED_TEXT:#x}; .text : {{ _text = .; *(.text*) }} }}\n");
    std::fs::write(&script, sections).unwrap();
    let script = format!("-Wl,-e,main,-T,{}", script.display());
    build_with(&["-nostdlib", "-static", "-no-pie", "-fno-asynchronous-unwind-tables", &script])
}

/// Function, file and line of each location in the kernel, inlined ones first.
fn lines(profile: &Profile) -> Vec<Vec<(String, String, i64)>> {
    let line = |line: &pprof::Line| {
        let function = profile.function.iter().find(|function| function.id == line.function_id).unwrap();
        let file = profile.string(function.filename).rsplit('/').next().unwrap_or_default();
        (profile.string(function.name).to_owned(), file.to_owned(), line.line)
    };
    let in_kernel = profile.location.iter().filter(|location| location.mapping_id != 0);
    in_kernel.map(|location| location.line.iter().map(line).collect()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_is_named_by_its_list_and_then_by_its_file() {
    let kernel = vmlinux();
    let outer = symbol(&kernel.full, "outer") - LINKED_TEXT;
    let list = format!("{USUAL_TEXT:016x} T _text\n{:016x} t outer\n", USUAL_TEXT + outer);
    check(&kernel, "[kernel.kallsyms]", USUAL_TEXT, outer, &list).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_is_named_by_its_list_and_then_by_its_file() {
    let module = build_with(&["-r", "-nostdlib"]);
    let outer = symbol(&module.full, "outer");
    let list = format!("{:016x} t outer\n", MODULE_TEXT + outer);
    check(&module, "[some_module]", MODULE_TEXT, outer, &list).await;
}

/// Names `outer`, `outer` bytes behind the start of the code, which agents place at `text` in the mapping `path`.
async fn check(build: &Build, path: &str, text: u64, outer: u64, list: &str) {
    let server = Server::start().await;
    assert!(outer < 0x1000, "{outer:#x}");
    // As agents send it: by the distance from the first byte of code.
    let addresses: Vec<u64> = (text + outer..text + outer + OUTER_BYTES).collect();
    let mut request = batch(START_NS, &addresses, [1, 1]);
    let dictionary = request.dictionary.as_mut().unwrap();
    dictionary.string_table[5] = path.to_owned();
    let mapping = &mut dictionary.mapping_table[1];
    (mapping.memory_start, mapping.memory_limit) = (text, text + outer + OUTER_BYTES);
    let attribute = dictionary.attribute_table[1].value.as_mut().unwrap();
    attribute.value = Some(Value::StringValue(build.id.to_string()));
    assert_eq!(send(&server, &request).await.status(), StatusCode::OK);
    let profile = async || {
        decode(server.get(&format!("/api/v1/profiles?start={}&end={}", START_NS, START_NS + 1)).await).await
    };

    server.expect_put(&format!("{}/kallsyms", build.id), list.as_bytes(), StatusCode::CREATED).await;
    let poor = lines(&profile().await);
    assert_eq!(poor.len(), addresses.len());
    assert!(poor.iter().all(|lines| *lines == [("outer".to_owned(), String::new(), 0)]), "{poor:?}");

    server.expect_put(&format!("{}/debuginfo", build.id), &build.debug, StatusCode::CREATED).await;
    let rich = lines(&profile().await);
    assert!(rich.iter().all(|lines| lines.last().is_some_and(|(name, ..)| name == "outer")), "{rich:?}");
    let twice = ("twice".to_owned(), "program.c".to_owned(), i64::from(TWICE_LINE));
    let inlined = rich.iter().filter(|lines| lines.len() == 2 && lines[0] == twice).count();
    assert!(inlined > 0, "{rich:?}");
}
