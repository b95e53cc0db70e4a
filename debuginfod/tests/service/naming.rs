//! Names: for batches of addresses, for pprof profiles, and for stored OTLP profiles.

use std::io::Read;

use flate2::read::GzDecoder;
use opentelemetry_proto::tonic::collector::profiles::v1development::{
    ExportProfilesServiceRequest, ExportProfilesServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::{AnyValue, any_value::Value};
use opentelemetry_proto::tonic::profiles::v1development::{
    KeyValueAndUnit, Location, Mapping, Profile as OtlpProfile, ProfilesDictionary, ResourceProfiles, Sample,
    ScopeProfiles, Stack, ValueType,
};
use opentelemetry_proto::tonic::resource::v1::Resource;
use prost::Message;
use reqwest::header::{CONTENT_ENCODING, CONTENT_TYPE};
use reqwest::{Response, StatusCode};
use windlass_schema::http::{ImageAddresses, Provenance, SymbolizeRequest, SymbolizeResponse, Unresolved};
use windlass_schema::pprof::{self, Profile};

use crate::server::{Server, TWICE_LINE, blob_path, build, symbol};

pub(crate) async fn symbolize(server: &Server, images: Vec<ImageAddresses>) -> SymbolizeResponse {
    let request = SymbolizeRequest { images };
    let response = server.client.post(server.url("/api/v1/symbolize")).json(&request).send().await.unwrap();
    assert_eq!(response.status(), 200);
    response.json().await.unwrap()
}

/// An address inside `outer` at which `twice` is inlined, found with binutils.
fn inlined_address() -> u64 {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("full");
    std::fs::write(&path, &build().full).unwrap();
    let outer = symbol(&build().full, "outer");
    (outer..outer + 64)
        .find(|address| {
            let mut command = std::process::Command::new("addr2line");
            let output = crate::server::run(command.args(["-fie"]).arg(&path).arg(format!("{address:#x}")));
            String::from_utf8(output).unwrap().starts_with("twice\n")
        })
        .expect("the compiler inlined it")
}

/// Function names of one address, innermost first.
pub(crate) fn names(response: &SymbolizeResponse, image: usize, address: usize) -> Vec<(&str, Provenance)> {
    response.images[image].addresses[address]
        .iter()
        .map(|frame| &response.functions[response.frames[*frame as usize].function as usize])
        .map(|function| (function.name.as_str(), function.provenance))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_get_better_names_as_files_arrive() {
    let server = Server::start().await;
    let build = build();
    let address = inlined_address();
    let ask = || {
        let unknown = "00112233".parse().unwrap();
        symbolize(
            &server,
            vec![
                ImageAddresses { build_id: build.id, addresses: vec![address, 1], return_addresses: false },
                ImageAddresses { build_id: unknown, addresses: vec![7], return_addresses: false },
                ImageAddresses { build_id: build.id, addresses: vec![address + 1], return_addresses: true },
            ],
        )
    };
    let before = ask().await;
    assert_eq!(before.images[0].unresolved, [(0, Unresolved::UnknownImage), (1, Unresolved::UnknownImage)]);

    server.expect_put(&format!("{}/skeleton", build.id), &build.stripped, StatusCode::CREATED).await;
    let poor = ask().await;
    assert!(names(&poor, 0, 0).iter().all(|(_, provenance)| *provenance != Provenance::Dwarf));

    server.expect_put(&format!("{}/debuginfo", build.id), &build.debug, StatusCode::CREATED).await;
    let rich = ask().await;
    let expect = [("twice", Provenance::Dwarf), ("outer", Provenance::Dwarf)];
    assert_eq!(names(&rich, 0, 0), expect);
    assert_eq!(names(&rich, 2, 0), expect, "a return address is looked up one byte back");
    let innermost = rich.frames[rich.images[0].addresses[0][0] as usize];
    assert_eq!(innermost.line, Some(TWICE_LINE));
    assert!(rich.files[innermost.file.unwrap() as usize].ends_with("program.c"));
    assert_eq!(rich.images[0].unresolved, [(1, Unresolved::NoSymbolAtAddress)]);
    assert_eq!(rich.images[1].unresolved, [(0, Unresolved::UnknownImage)]);
    assert_eq!(rich.functions.len(), 2, "each function once");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_cannot_be_answered() {
    let server = Server::start().await;
    for (content_type, body) in [
        ("application/json", &b"{\"images\": 7}"[..]),
        ("text/plain", b"0x1000"),
        ("application/vnd.google.pprof", b"\xff\xff\xff"),
        ("application/vnd.google.pprof", b"\x1f\x8bxyz"),
    ] {
        let request = server.client.post(server.url("/api/v1/symbolize")).header(CONTENT_TYPE, content_type);
        assert_eq!(request.body(body).send().await.unwrap().status(), 400, "{content_type}");
    }
    for query in ["", "?start=5", "?start=9&end=3", "?start=x&end=y"] {
        assert_eq!(server.get(&format!("/api/v1/profiles{query}")).await.status(), 400, "{query}");
    }
}

pub(crate) const START_NS: u64 = 1_800_000_000_000_000_000;
const STRINGS: [&str; 12] = [
    "",
    "samples",
    "count",
    "cpu",
    "nanoseconds",
    "/usr/bin/program",
    "process.executable.build_id.gnu",
    "process.pid",
    "thread.name",
    "windlass.stop_reason",
    "worker",
    "thread.id",
];

/// A batch as an agent sends it: two samples of one stack in two threads, one of them outside any image.
pub(crate) fn batch(start_ns: u64, addresses: &[u64], values: [i64; 2]) -> ExportProfilesServiceRequest {
    let attribute = |key: i32, value: Value| KeyValueAndUnit {
        key_strindex: key,
        value: Some(AnyValue { value: Some(value) }),
        unit_strindex: 0,
    };
    let mut location_table = vec![Location::default()];
    location_table.extend(addresses.iter().map(|address| Location {
        mapping_index: 1,
        address: *address,
        ..Location::default()
    }));
    location_table.push(Location { mapping_index: 0, address: 0x7f00, ..Location::default() });
    let dictionary = ProfilesDictionary {
        mapping_table: vec![
            Mapping::default(),
            Mapping {
                memory_start: 0,
                memory_limit: 0x10_0000,
                filename_strindex: 5,
                attribute_indices: vec![1],
                file_offset: 0,
            },
        ],
        stack_table: vec![
            Stack::default(),
            Stack { location_indices: (1..location_table.len() as i32).collect() },
        ],
        location_table,
        string_table: STRINGS.map(str::to_owned).to_vec(),
        attribute_table: vec![
            KeyValueAndUnit::default(),
            attribute(6, Value::StringValue(build().id.to_string())),
            attribute(7, Value::IntValue(42)),
            attribute(8, Value::StringValueStrindex(10)),
            attribute(9, Value::StringValue("end_of_stack".to_owned())),
            attribute(11, Value::IntValue(43)),
            attribute(11, Value::IntValue(44)),
            attribute(7, Value::IntValue(99)),
        ],
        ..ProfilesDictionary::default()
    };
    let samples = vec![
        Sample {
            stack_index: 1,
            attribute_indices: vec![2, 3, 4, 5],
            values: vec![values[0]],
            ..Sample::default()
        },
        Sample {
            stack_index: 1,
            attribute_indices: vec![7, 6],
            values: vec![values[1]],
            ..Sample::default()
        },
    ];
    let profile = OtlpProfile {
        sample_type: Some(ValueType { type_strindex: 1, unit_strindex: 2 }),
        period_type: Some(ValueType { type_strindex: 3, unit_strindex: 4 }),
        period: 10_000_000,
        time_unix_nano: start_ns,
        duration_nano: 5_000_000_000,
        samples,
        ..OtlpProfile::default()
    };
    let scope = ScopeProfiles { profiles: vec![profile], ..ScopeProfiles::default() };
    let resource = ResourceProfiles { scope_profiles: vec![scope], ..ResourceProfiles::default() };
    ExportProfilesServiceRequest { resource_profiles: vec![resource], dictionary: Some(dictionary) }
}

pub(crate) async fn send(server: &Server, batch: &ExportProfilesServiceRequest) -> Response {
    let body = zstd::stream::encode_all(&batch.encode_to_vec()[..], 3).unwrap();
    let request = server.client.post(server.url("/v1development/profiles")).header(CONTENT_ENCODING, "zstd");
    request.header(CONTENT_TYPE, "application/x-protobuf").body(body).send().await.unwrap()
}

pub(crate) async fn decode(response: Response) -> Profile {
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()[CONTENT_TYPE], "application/vnd.google.pprof");
    let mut bytes = Vec::new();
    GzDecoder::new(&response.bytes().await.unwrap()[..]).read_to_end(&mut bytes).unwrap();
    Profile::decode(&bytes[..]).unwrap()
}

/// Per sample: functions innermost first, value, labels.
fn rows(profile: &Profile) -> Vec<(Vec<String>, i64, Vec<String>)> {
    let function = |line: &pprof::Line| {
        let function = profile.function.iter().find(|function| function.id == line.function_id).unwrap();
        profile.string(function.name).to_owned()
    };
    let location = |id: &u64| profile.location.iter().find(|location| location.id == *id).unwrap();
    let label = |label: &pprof::Label| match label.str {
        0 => format!("{}={}", profile.string(label.key), label.num),
        text => format!("{}={}", profile.string(label.key), profile.string(text)),
    };
    profile
        .sample
        .iter()
        .map(|sample| {
            let functions = sample.location_id.iter().flat_map(|id| location(id).line.iter().map(function));
            (functions.collect(), sample.value[0], sample.label.iter().map(label).collect())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn profiles_merge_and_get_names_when_read() {
    let server = Server::start().await;
    let build = build();
    let (inlined, main) = (inlined_address(), symbol(&build.full, "main"));
    let first = batch(START_NS, &[inlined, main, 0x9_9999], [3, 4]);
    let second = batch(START_NS + 5_000_000_000, &[inlined, main, 0x9_9999], [10, 20]);
    for batch in [&first, &second, &second] {
        let response = send(&server, batch).await;
        assert_eq!(response.status(), 200);
        let answer = ExportProfilesServiceResponse::decode(response.bytes().await.unwrap()).unwrap();
        assert_eq!(answer.partial_success, None);
    }
    let server = server.restart().await;
    let get = async |query: &str| decode(server.get(&format!("/api/v1/profiles?{query}")).await).await;
    let all = format!("start={START_NS}&end={}", START_NS + 20_000_000_000);
    let unnamed = get(&all).await;
    let program = |address: u64| format!("program+{address:#x}");
    let thread = |labels: [&str; 4]| labels.map(str::to_owned).to_vec();
    let labels = thread(["pid=42", "tid=43", "thread=worker", "stop_reason=end_of_stack"]);
    let other = vec!["pid=99".to_owned(), "tid=44".to_owned()];
    let bare = vec![program(inlined), program(main), program(0x9_9999), "0x7f00".to_owned()];
    // A batch sent twice counts once.
    assert_eq!(rows(&unnamed), [(bare.clone(), 13, labels.clone()), (bare, 24, other.clone())]);
    assert!(unnamed.mapping.iter().all(|mapping| !mapping.has_functions));

    server.expect_put(&format!("{}/executable", build.id), &build.full, StatusCode::CREATED).await;
    let named = get(&all).await;
    let stack: Vec<String> =
        ["twice", "outer", "main", "program+0x99999", "0x7f00"].map(str::to_owned).to_vec();
    assert_eq!(rows(&named), [(stack.clone(), 13, labels.clone()), (stack.clone(), 24, other)]);
    let mapping = named.mapping[0];
    assert!(
        mapping.has_functions
            && mapping.has_filenames
            && mapping.has_line_numbers
            && mapping.has_inline_frames
    );
    assert_eq!(named.string(mapping.build_id), build.id.to_string());
    assert_eq!(named.string(mapping.filename), "/usr/bin/program");
    let [sample_type] = &named.sample_type[..] else { panic!("one sample type") };
    assert_eq!((named.string(sample_type.r#type), named.string(sample_type.unit)), ("samples", "count"));
    assert_eq!(
        (named.time_nanos as u64, named.duration_nanos, named.period),
        (START_NS, 10_000_000_000, 10_000_000)
    );
    let line = named.location[0].line[0];
    assert_eq!(line.line, i64::from(TWICE_LINE));

    assert_eq!(rows(&get(&format!("{all}&pid=42")).await), [(stack.clone(), 13, labels.clone())]);
    let early = get(&format!("start={START_NS}&end={}&pid=42", START_NS + 1)).await;
    assert_eq!(rows(&early), [(stack, 3, labels)]);
    assert!(rows(&get("start=1&end=2").await).is_empty());

    // One damaged batch does not cost the others.
    std::fs::write(blob_path(server.folder.path(), &first.encode_to_vec()), b"gone").unwrap();
    let values: Vec<i64> = rows(&get(&all).await).iter().map(|row| row.1).collect();
    assert_eq!(values, [10, 20]);
    assert_eq!(server.counter("windlass_profile_batches_total{result=\"damaged\"}").await, 1);
}

/// Two agents on one service: process 42 runs on both their hosts.
#[tokio::test(flavor = "multi_thread")]
async fn samples_of_agents_and_hosts_are_kept_apart() {
    let server = Server::start().await;
    for (host, instance, values) in
        [("alpha", "one", [3, 4]), ("beta", "two", [10, 20]), ("beta", "three", [1, 2])]
    {
        let key = if instance == "two" { "service.instance.id" } else { "windlass.agent.id" };
        let mut batch = batch(START_NS, &[0x1000], values);
        let attribute = |key: &str, text: &str| KeyValue {
            key: key.to_owned(),
            value: Some(AnyValue { value: Some(Value::StringValue(text.to_owned())) }),
            ..KeyValue::default()
        };
        batch.resource_profiles[0].resource = Some(Resource {
            attributes: vec![attribute("host.name", host), attribute(key, instance)],
            ..Resource::default()
        });
        assert_eq!(send(&server, &batch).await.status(), 200);
    }
    // Process, host and value of each sample.
    let get = async |query: &str| {
        let query = format!("/api/v1/profiles?start={START_NS}&end={}{query}", START_NS + 1);
        let profile = decode(server.get(&query).await).await;
        let rows = rows(&profile).into_iter();
        let mut rows: Vec<_> =
            rows.map(|(_, value, labels)| format!("{} {value}", labels[..2].join(" "))).collect();
        rows.sort();
        rows
    };
    let all = ["pid=42 host=alpha 3", "pid=42 host=beta 11", "pid=99 host=alpha 4", "pid=99 host=beta 22"];
    assert_eq!(get("").await, all);
    assert_eq!(get("&instance=one").await, [all[0], all[2]]);
    assert_eq!(get("&instance=two").await, ["pid=42 host=beta 10", "pid=99 host=beta 20"]);
    assert_eq!(get("&host=beta").await, [all[1], all[3]]);
    assert_eq!(get("&host=beta&pid=42").await, all[1..2]);
    assert!(get("&host=alpha&instance=two").await.is_empty());
    assert!(get("&host=").await.is_empty());
}

/// Call frame information of a stripped program says which addresses are of one function.
#[tokio::test(flavor = "multi_thread")]
async fn functions_without_names_are_told_apart_by_their_start() {
    let server = Server::start().await;
    let build = build();
    let start = symbol(&build.full, "outer");
    let request = || {
        let addresses = vec![start + 1, 0x9_9999];
        symbolize(&server, vec![ImageAddresses { build_id: build.id, addresses, return_addresses: true }])
    };
    let profile = async || {
        send(&server, &batch(START_NS, &[start, start + 1, 0x9_9999], [3, 4])).await;
        let query = format!("/api/v1/profiles?start={START_NS}&end={}&pid=42", START_NS + 1);
        let rows = rows(&decode(server.get(&query).await).await);
        assert_eq!(rows.len(), 1);
        rows[0].0.clone()
    };
    let program = |address: u64| format!("program+{address:#x}");
    let bare = [program(start), program(start + 1), program(0x9_9999), "0x7f00".to_owned()];
    assert_eq!(profile().await, bare);
    assert_eq!(request().await.images[0].unnamed_functions, []);

    server.expect_put(&format!("{}/skeleton", build.id), &build.stripped, StatusCode::CREATED).await;
    let merged = [program(start), program(start), program(0x9_9999), "0x7f00".to_owned()];
    assert_eq!(profile().await, merged);
    let answer = request().await;
    assert_eq!(answer.images[0].unnamed_functions, [(0, start)]);
    assert!(answer.images[0].addresses.iter().all(Vec::is_empty));
    assert_eq!(answer.images[0].unresolved.len(), 2, "a start is no name");

    server.expect_put(&format!("{}/debuginfo", build.id), &build.debug, StatusCode::CREATED).await;
    assert_eq!(profile().await[0], "outer");
    assert_eq!(request().await.images[0].unnamed_functions, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pprof_profile_comes_back_named() {
    let server = Server::start().await;
    let build = build();
    server.expect_put(&format!("{}/debuginfo", build.id), &build.debug, StatusCode::CREATED).await;
    let profile = Profile {
        string_table: vec![String::new(), "program".to_owned(), build.id.to_string()],
        mapping: vec![pprof::Mapping {
            id: 1,
            memory_limit: 0x10_0000,
            filename: 1,
            build_id: 2,
            ..Default::default()
        }],
        location: vec![
            pprof::Location { id: 1, mapping_id: 1, address: inlined_address(), ..Default::default() },
            pprof::Location { id: 2, mapping_id: 1, address: 0x9_9999, ..Default::default() },
            pprof::Location { id: 3, mapping_id: 0, address: 0x1234, ..Default::default() },
        ],
        sample: vec![pprof::Sample { location_id: vec![1, 2, 3], value: vec![5], label: Vec::new() }],
        ..Profile::default()
    };
    let request = server.client.post(server.url("/api/v1/symbolize"));
    let request = request.header(CONTENT_TYPE, "application/vnd.google.pprof").body(profile.encode_to_vec());
    let named = decode(request.send().await.unwrap()).await;
    assert_eq!(rows(&named)[0].0, ["twice", "outer"], "what has no name keeps none");
    assert_eq!(named.location.len(), 3);
}

/// perf, gperftools and Go write the addresses of the process.
#[tokio::test(flavor = "multi_thread")]
async fn a_pprof_profile_may_hold_the_addresses_of_processes() {
    let server = Server::start().await;
    let build = build();
    server.expect_put(&format!("{}/executable", build.id), &build.full, StatusCode::CREATED).await;
    let address = inlined_address();
    // Code lies in the file where it lies in the image, or the places below would be others.
    let page = address & !0xfff;
    let mapping = |id, memory_start, length, file_offset| pprof::Mapping {
        id,
        memory_start,
        memory_limit: memory_start + length,
        file_offset,
        filename: 1,
        build_id: 2,
        ..Default::default()
    };
    let base = 0x5581_2345_6000;
    let location =
        |id, mapping_id, address| pprof::Location { id, mapping_id, address, ..Default::default() };
    let profile = Profile {
        string_table: vec![String::new(), "program".to_owned(), build.id.to_string()],
        mapping: vec![
            mapping(1, base, 0x1000, page),
            mapping(2, base, 0x4000, 0),
            mapping(3, page, 0x1000, page),
            mapping(4, base, 0x1000, page + 0x70_0000),
        ],
        location: vec![
            location(1, 1, base + (address - page)),
            location(2, 2, base + address),
            location(3, 3, address),
            location(4, 4, base + (address - page)),
        ],
        sample: (1..=4)
            .map(|id| pprof::Sample { location_id: vec![id], value: vec![5], label: Vec::new() })
            .collect(),
        ..Profile::default()
    };
    let request = server.client.post(server.url("/api/v1/symbolize"));
    let request = request.header(CONTENT_TYPE, "application/vnd.google.pprof").body(profile.encode_to_vec());
    let named = decode(request.send().await.unwrap()).await;
    let names: Vec<_> = rows(&named).into_iter().map(|row| row.0).collect();
    let expect = ["twice", "outer"].map(str::to_owned).to_vec();
    assert_eq!(names, [expect.clone(), expect.clone(), expect, Vec::new()]);
    assert_eq!(named.location[0].address, base + (address - page), "addresses stay as they were");
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_batches_are_refused_by_name() {
    let server = Server::start().await;
    let mut stack = batch(START_NS, &[1], [1, 1]);
    stack.resource_profiles[0].scope_profiles[0].profiles[0].samples[0].stack_index = 77;
    let mut mapping = batch(START_NS, &[1], [1, 1]);
    mapping.dictionary.as_mut().unwrap().location_table[1].mapping_index = -1;
    let mut string = batch(START_NS, &[1], [1, 1]);
    string.dictionary.as_mut().unwrap().attribute_table[2].key_strindex = 1000;
    let mut table = batch(START_NS, &[1], [1, 1]);
    table.dictionary = None;
    for (batch, expect) in [
        (stack, "sample.stack_index is 77"),
        (mapping, "location.mapping_index is -1"),
        (string, "attribute.key_strindex is 1000"),
        (table, "dictionary."),
    ] {
        let response = send(&server, &batch).await;
        assert_eq!(response.status(), 400);
        let text = response.text().await.unwrap();
        assert!(text.contains(expect), "{text}");
    }
    // Sixteen MiB of empty messages, as a pprof file and inside a batch: half a gigabyte, decoded.
    let empty = [0x12, 0x00].repeat(8 << 20);
    let request = server.client.post(server.url("/api/v1/symbolize"));
    let request = request.header(CONTENT_TYPE, "application/vnd.google.pprof").body(empty);
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
    assert!(response.text().await.unwrap().contains("of memory, the limit"));
    let locations = 8 << 20;
    let mut dictionary = vec![0x12, 0x80, 0x80, 0x80, 0x08];
    dictionary.extend([0x12, 0x00].repeat(locations));
    let response = server.client.post(server.url("/v1development/profiles")).body(dictionary).send().await;
    assert_eq!(response.unwrap().status(), StatusCode::PAYLOAD_TOO_LARGE);
    let garbage =
        server.client.post(server.url("/v1development/profiles")).body("garbage").send().await.unwrap();
    assert_eq!(garbage.status(), 400);
    let all = decode(server.get("/api/v1/profiles?start=0&end=9000000000000000").await).await;
    assert!(all.sample.is_empty());
}
