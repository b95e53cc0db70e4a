//! How do samples become an OTLP profile?
//!
//! The wire form is OpenTelemetry's Profiles signal, so that any collector takes it and our service
//! takes any agent's. Samples are merged as they come: same stack, process, thread and stop reason are
//! one sample with a count, and everything named twice is in the dictionary once, so a batch grows
//! with what is different in it. Addresses are ELF virtual addresses, return addresses already lowered
//! into the call: peers disagree on who does that, and functions that end in a call get their
//! successor's name when nobody does.
//!
//! There is a profile for each resource: the processes of one service, container and pod ([`Resource`]). All of
//! them share the dictionary, and carry the host's attributes and `windlass.agent.id`, by which one agent's samples
//! are found among those of all; `service.instance.id` is the service's own, if it has one. A sample
//! carries the attributes `process.pid`, `thread.id`, `thread.name`, `cpu.logical_number`,
//! `windlass.stop_reason`, a mapping `process.executable.build_id.gnu` or `.htlhash`, or `windlass.perf_map.id` for
//! code of a just-in-time compiler. Entry 0 of
//! each table is its zero value.

mod interner;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use hashbrown::HashMap;
use opentelemetry_proto::tonic::collector::profiles::v1development::ExportProfilesServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
use opentelemetry_proto::tonic::profiles::v1development::{
    Function, KeyValueAndUnit, Link, Location, Mapping, Profile, ProfilesDictionary, ResourceProfiles,
    Sample, ScopeProfiles, Stack, ValueType,
};
use opentelemetry_proto::tonic::resource::v1::Resource as OtlpResource;
use windlass_schema::StopReason;
use windlass_schema::perf_map::PERF_MAP_ATTRIBUTE;

use self::interner::{Interner, SeenModules};
use crate::image::ImageId;
use crate::jit_code::{BatchCode, Reading};
use crate::owners::Owner;
use crate::resource::Resource;

/// What a profile shows of a mapping. Addresses are ELF virtual addresses if there is an id.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Module {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub limit: u64,
    /// Where in the file it starts, in bytes.
    pub file_offset: u64,
    /// As the process sees it.
    pub path: Arc<str>,
    /// The image's identity.
    pub id: Option<ImageId>,
}

/// A frame of a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Where it is; `None` for an address that lies in nothing known.
    pub module: Option<&'a Module>,
    /// The address to look up: in the module's addresses, or as the process or kernel has it.
    pub address: u64,
    /// For code of a just-in-time compiler: what may still put it into a module.
    pub reading: Option<Reading>,
}

/// What is said of a sample beside its stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Labels<'a> {
    /// Process.
    pub tgid: u32,
    /// Thread.
    pub tid: u32,
    /// Name of the thread.
    pub comm: &'a str,
    /// CPU number.
    pub cpu: u32,
    /// Why the walk ended.
    pub stop: StopReason,
}

/// What is said of a whole batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recording {
    /// The host's name.
    pub host_name: String,
    /// Which agent it is: no other one, on any host, has this.
    pub agent_id: String,
    /// Samples a second on each CPU.
    pub frequency_hz: u32,
    /// Start, in nanoseconds since 1970.
    pub start_unix_ns: u64,
    /// Length in nanoseconds.
    pub duration_ns: u64,
    /// Names the batch, so that one sent twice can be told.
    pub batch_id: [u8; 16],
}

/// Bytes of a batch at which it is full: some 50,000 distinct samples as they mostly are, 3,500 of the deepest stacks.
pub(crate) const MAX_BATCH_BYTES: usize = 16 * 1024 * 1024;
/// What one more value of each kind takes in a batch, in bytes: what it holds itself, and its place in a hash table.
const SAMPLE_BYTES: usize = 48;
const STACK_BYTES: usize = 48;
const LOCATION_BYTES: usize = 64;
const MAPPING_BYTES: usize = 128;
const ATTRIBUTE_BYTES: usize = 64;
/// What one frame of a stack takes in bytes.
const FRAME_BYTES: usize = size_of::<i32>();

/// Samples on their way into one request.
pub struct Batch {
    strings: Interner<String>,
    attributes: Interner<(i32, AttributeValue)>,
    mappings: Interner<Option<Module>>,
    locations: Interner<(i32, u64, Option<Reading>)>,
    stacks: Interner<Vec<i32>>,
    owners: Interner<Owner>,
    samples: HashMap<SampleKey, i64>,
    /// Of the stacks together.
    frames: usize,
    /// Bytes of the mappings' paths.
    path_bytes: usize,
}

/// What samples that are merged have in common: owner, stack and attributes.
type SampleKey = (i32, i32, [i32; 5]);

/// The value of an attribute.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum AttributeValue {
    Text(String),
    Number(i64),
}

impl Default for Batch {
    fn default() -> Self {
        Self {
            strings: Interner::with_zero(String::new()),
            attributes: Interner::with_zero((0, AttributeValue::Text(String::new()))),
            mappings: Interner::with_zero(None),
            locations: Interner::with_zero((0, 0, None)),
            stacks: Interner::with_zero(Vec::new()),
            owners: Interner::empty(),
            samples: HashMap::new(),
            frames: 0,
            path_bytes: 0,
        }
    }
}

impl Batch {
    /// Adds a sample of `owner`. `frames` are innermost first: those of the kernel, then those of
    /// the process.
    pub fn add<'a>(
        &mut self,
        owner: &Owner,
        labels: &Labels<'_>,
        frames: impl IntoIterator<Item = Frame<'a>>,
    ) {
        // Of this call's modules, which stay where they are: frames in turn are often of a few.
        let mut seen = SeenModules::default();
        let stack: Vec<i32> = frames
            .into_iter()
            .map(|frame| {
                let mapping = frame.module.map_or(0, |module| {
                    seen.index(module, |module| {
                        let known = self.mappings.values.len();
                        let index = self.mappings.index(&Some(module.clone()));
                        self.path_bytes += if index as usize >= known { module.path.len() } else { 0 };
                        index
                    })
                });
                self.locations.index(&(mapping, frame.address, frame.reading))
            })
            .collect();
        let (frames, known) = (stack.len(), self.stacks.values.len());
        let stack = self.stacks.index(&stack[..]);
        self.frames += if stack as usize >= known { frames } else { 0 };
        let attributes = [
            self.attribute("process.pid", AttributeValue::Number(labels.tgid.into())),
            self.attribute("thread.id", AttributeValue::Number(labels.tid.into())),
            self.attribute("thread.name", AttributeValue::Text(labels.comm.to_owned())),
            self.attribute("cpu.logical_number", AttributeValue::Number(labels.cpu.into())),
            self.attribute("windlass.stop_reason", AttributeValue::Text(labels.stop.as_str().to_owned())),
        ];
        let owner = self.owners.index(owner);
        *self.samples.entry((owner, stack, attributes)).or_default() += 1;
    }

    /// Whether it is known as well as it will be whose its samples are.
    pub(crate) fn is_settled(&self, now: Instant) -> bool {
        self.owners.values.iter().all(|owner| owner.is_settled(now))
    }

    /// Samples that differ.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether it is to be shipped, however young it is.
    pub fn is_full(&self) -> bool {
        self.bytes() >= MAX_BATCH_BYTES
    }

    /// About how many bytes it takes.
    fn bytes(&self) -> usize {
        self.samples.len() * SAMPLE_BYTES
            + self.stacks.values.len() * STACK_BYTES
            + self.frames * FRAME_BYTES
            + self.locations.values.len() * LOCATION_BYTES
            + self.mappings.values.len() * MAPPING_BYTES
            + self.path_bytes
            + self.attributes.values.len() * ATTRIBUTE_BYTES
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    fn attribute(&mut self, key: &str, value: AttributeValue) -> i32 {
        let key = self.strings.index(key);
        self.attributes.index(&(key, value))
    }

    /// The request that ships the batch. Of addresses that a reading was to explain, `code` says where they are. Those in
    /// modules that are `gone` are no one's.
    pub fn into_request(
        mut self,
        recording: &Recording,
        code: &BatchCode,
        gone: &[Module],
    ) -> ExportProfilesServiceRequest {
        let locations = self.location_table(code, gone);
        let mapping_table = self.mapping_table();
        let [samples, count, cpu, nanoseconds] =
            ["samples", "count", "cpu", "nanoseconds"].map(|text| self.strings.index(text));
        let mut resources = Interner::<Resource>::empty();
        let of_owner: Vec<i32> =
            self.owners.values.iter().map(|owner| resources.index(owner.resource())).collect();
        let mut merged: Vec<(SampleKey, i64)> = (self.samples.into_iter())
            .map(|((owner, stack, attributes), count)| ((of_owner[owner as usize], stack, attributes), count))
            .collect();
        // Like batches give like bytes, which compress and compare.
        merged.sort_unstable();
        merged.dedup_by(|(key, count), (kept, sum)| {
            *sum += if key == kept { *count } else { 0 };
            key == kept
        });
        let profiles = merged.chunk_by(|(one, _), (other, _)| one.0 == other.0).map(|group| {
            let (resource, ..) = group[0].0;
            let profile = Profile {
                sample_type: Some(ValueType { type_strindex: samples, unit_strindex: count }),
                samples: group.iter().map(sample).collect(),
                time_unix_nano: recording.start_unix_ns,
                duration_nano: recording.duration_ns,
                period_type: Some(ValueType { type_strindex: cpu, unit_strindex: nanoseconds }),
                period: 1_000_000_000 / i64::from(recording.frequency_hz.max(1)),
                profile_id: profile_id(recording.batch_id, resource),
                ..Profile::default()
            };
            resource_profiles(recording, &resources.values[resource as usize], profile)
        });
        let resource_profiles = profiles.collect();
        let dictionary = ProfilesDictionary {
            mapping_table,
            location_table: locations,
            function_table: vec![Function::default()],
            link_table: vec![Link::default()],
            attribute_table: (self.attributes.values.into_iter().enumerate())
                .map(|(index, (key_strindex, value))| KeyValueAndUnit {
                    key_strindex,
                    value: (index > 0).then(|| value.into()),
                    unit_strindex: 0,
                })
                .collect(),
            stack_table: (self.stacks.values.into_iter())
                .map(|location_indices| Stack { location_indices })
                .collect(),
            string_table: self.strings.values,
        };
        ExportProfilesServiceRequest { resource_profiles, dictionary: Some(dictionary) }
    }

    fn location_table(&mut self, code: &BatchCode, gone: &[Module]) -> Vec<Location> {
        let gone: HashSet<i32> = (self.mappings.values.iter().zip(0..))
            .filter(|(module, _)| module.as_ref().is_some_and(|module| gone.contains(module)))
            .map(|(_, index)| index)
            .collect();
        let locations = std::mem::take(&mut self.locations.values).into_iter();
        locations
            .map(|(mapping, address, reading)| {
                // An address of the image says nothing without it.
                if gone.contains(&mapping) {
                    return Location::default();
                }
                let module = reading.and_then(|reading| code.get(&(reading, address)));
                let mapping_index = match module {
                    Some(module) => self.mappings.index(&Some(Module::clone(module))),
                    None => mapping,
                };
                Location { mapping_index, address, ..Location::default() }
            })
            .collect()
    }

    fn mapping_table(&mut self) -> Vec<Mapping> {
        let modules = std::mem::take(&mut self.mappings.values);
        modules
            .into_iter()
            .map(|module| {
                let Some(module) = module else { return Mapping::default() };
                let id = module.id.map(|id| {
                    let key = match id {
                        ImageId::Gnu(_) => "process.executable.build_id.gnu",
                        ImageId::FileHash(_) => "process.executable.build_id.htlhash",
                        ImageId::PerfMap(_) => PERF_MAP_ATTRIBUTE,
                    };
                    self.attribute(key, AttributeValue::Text(id.build_id().to_string()))
                });
                Mapping {
                    memory_start: module.start,
                    memory_limit: module.limit,
                    file_offset: module.file_offset,
                    filename_strindex: self.strings.index(&*module.path),
                    attribute_indices: id.into_iter().collect(),
                }
            })
            .collect()
    }
}

impl From<AttributeValue> for AnyValue {
    fn from(value: AttributeValue) -> Self {
        Self {
            value: Some(match value {
                AttributeValue::Text(text) => any_value::Value::StringValue(text),
                AttributeValue::Number(number) => any_value::Value::IntValue(number),
            }),
        }
    }
}

/// A sample of a key that has its resource in the place of its owner.
fn sample(merged: &(SampleKey, i64)) -> Sample {
    let ((_, stack_index, attributes), count) = merged;
    Sample {
        stack_index: *stack_index,
        attribute_indices: attributes.to_vec(),
        values: vec![*count],
        ..Sample::default()
    }
}

/// The name of the profile of one resource in a batch.
fn profile_id(mut batch_id: [u8; 16], resource: i32) -> Vec<u8> {
    for (byte, number) in batch_id[12..].iter_mut().zip(resource.to_be_bytes()) {
        *byte ^= number;
    }
    batch_id.to_vec()
}

fn resource_profiles(recording: &Recording, resource: &Resource, profile: Profile) -> ResourceProfiles {
    let host = [
        ("host.name", recording.host_name.as_str()),
        ("host.arch", host_architecture()),
        ("os.type", "linux"),
        ("windlass.agent.id", &recording.agent_id),
    ];
    let attributes = host.into_iter().chain(resource.attributes()).map(|(key, text)| KeyValue {
        key: key.to_owned(),
        value: Some(AttributeValue::Text(text.to_owned()).into()),
        ..KeyValue::default()
    });
    ResourceProfiles {
        resource: Some(OtlpResource { attributes: attributes.collect(), ..OtlpResource::default() }),
        scope_profiles: vec![ScopeProfiles {
            scope: Some(InstrumentationScope {
                name: "windlass-agent".to_owned(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                ..InstrumentationScope::default()
            }),
            profiles: vec![profile],
            ..ScopeProfiles::default()
        }],
        ..ResourceProfiles::default()
    }
}

/// The name that the OpenTelemetry conventions give this machine's instruction set.
fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    fn module(path: &str, id: Option<ImageId>) -> Module {
        Module { start: 0x1000, limit: 0x9000, file_offset: 0x1000, path: path.into(), id }
    }

    fn shop() -> Owner {
        Resource::new([("service.name", "shop".to_owned())]).into()
    }

    fn recording() -> Recording {
        Recording {
            host_name: "alpha".to_owned(),
            agent_id: "one-of-many".to_owned(),
            frequency_hz: 19,
            start_unix_ns: 1_700_000_000_000_000_000,
            duration_ns: 5_000_000_000,
            batch_id: [7; 16],
        }
    }

    fn encoded(batch: Batch) -> ExportProfilesServiceRequest {
        let bytes = batch.into_request(&recording(), &BatchCode::new(), &[]).encode_to_vec();
        ExportProfilesServiceRequest::decode(&bytes[..]).unwrap()
    }

    /// A request as text: each sample as count, labels, frames.
    fn print(request: &ExportProfilesServiceRequest) -> Vec<String> {
        let dictionary = request.dictionary.as_ref().unwrap();
        let string = |index: i32| dictionary.string_table[index as usize].as_str();
        let attribute = |index: &i32| {
            let attribute = &dictionary.attribute_table[*index as usize];
            let value = match attribute.value.as_ref().unwrap().value.as_ref().unwrap() {
                any_value::Value::StringValue(text) => text.clone(),
                any_value::Value::IntValue(number) => number.to_string(),
                other => panic!("{other:?}"),
            };
            format!("{}={value}", string(attribute.key_strindex))
        };
        let frame = |index: &i32| {
            let location = &dictionary.location_table[*index as usize];
            let mapping = &dictionary.mapping_table[location.mapping_index as usize];
            let ids: Vec<_> = mapping.attribute_indices.iter().map(attribute).collect();
            format!("{:#x}@{}[{}]", location.address, string(mapping.filename_strindex), ids.join(","))
        };
        let mut lines: Vec<String> = request.resource_profiles[0].scope_profiles[0].profiles[0]
            .samples
            .iter()
            .map(|sample| {
                let labels: Vec<_> = sample.attribute_indices.iter().map(attribute).collect();
                let stack = &dictionary.stack_table[sample.stack_index as usize];
                let frames: Vec<_> = stack.location_indices.iter().map(frame).collect();
                format!("{:?} {} {}", sample.values, labels.join(" "), frames.join(" "))
            })
            .collect();
        lines.sort();
        lines
    }

    /// Samples of stacks of `depth` frames until the batch is full.
    fn samples_until_full(depth: u64, comm: &str) -> u64 {
        let labels = Labels { tgid: 7, tid: 8, comm, cpu: 3, stop: StopReason::EndOfStack };
        let (mut batch, app, shop) = (Batch::default(), module("/opt/app", None), shop());
        let mut samples = 0;
        while !batch.is_full() {
            let top = Frame { module: None, address: samples, reading: None };
            let below = (1..depth).map(|address| Frame { module: Some(&app), address, reading: None });
            // The second of a kind takes nothing.
            for _ in 0..2 {
                batch.add(&shop, &labels, [top].into_iter().chain(below.clone()));
            }
            samples += 1;
            assert!(samples <= 1 << 20, "never full");
        }
        samples
    }

    #[test]
    fn deep_stacks_fill_a_batch_sooner() {
        let (usual, deepest) = (samples_until_full(40, "worker"), samples_until_full(1151, "worker"));
        assert!((40_000..80_000).contains(&usual), "{usual}");
        assert!((3_000..4_000).contains(&deepest), "{deepest}");
    }

    #[test]
    fn samples_merge_and_come_back() {
        let app = module("/opt/app", Some(ImageId::Gnu("abcd".parse().unwrap())));
        let hashed = module("/opt/go", Some(ImageId::FileHash("0123".parse().unwrap())));
        let labels = Labels { tgid: 7, tid: 8, comm: "worker", cpu: 3, stop: StopReason::EndOfStack };
        let cut = Labels { stop: StopReason::NoCfi, ..labels };
        let frames = [
            Frame { module: Some(&app), address: 0x1234, reading: None },
            Frame { module: Some(&hashed), address: 0x2000, reading: None },
            Frame { module: None, address: 0x7f00_0000_0000, reading: None },
        ];
        let (shop, mut batch) = (shop(), Batch::default());
        for labels in [&labels, &cut, &labels] {
            batch.add(&shop, labels, frames);
        }
        batch.add(&shop, &labels, []);
        assert_eq!(batch.len(), 3);
        let request = encoded(batch);
        let stack = "0x1234@/opt/app[process.executable.build_id.gnu=abcd] \
                     0x2000@/opt/go[process.executable.build_id.htlhash=0123] 0x7f0000000000@[]";
        let thread = "process.pid=7 thread.id=8 thread.name=worker cpu.logical_number=3 windlass.stop_reason";
        assert_eq!(
            print(&request),
            [
                format!("[1] {thread}=end_of_stack "),
                format!("[1] {thread}=no_cfi {stack}"),
                format!("[2] {thread}=end_of_stack {stack}"),
            ]
        );
    }

    #[test]
    fn frames_of_what_is_gone_are_no_ones() {
        let [gone, stays] = ["[nf_tables]", "[xfs]"].map(|name| module(name, None));
        let labels = Labels { tgid: 7, tid: 8, comm: "worker", cpu: 3, stop: StopReason::EndOfStack };
        let frames = [(&gone, 0x1234), (&stays, 0x2000)];
        let mut batch = Batch::default();
        let frame = |(module, address)| Frame { module: Some(module), address, reading: None };
        batch.add(&shop(), &labels, frames.map(frame));
        let request = batch.into_request(&recording(), &BatchCode::new(), &[gone]);
        assert!(
            print(&request)[0].ends_with("windlass.stop_reason=end_of_stack 0x0@[] 0x2000@[xfs][]"),
            "{:?}",
            print(&request)
        );
    }

    #[test]
    fn tables_start_with_zero_and_hold_nothing_twice() {
        let app = module("/opt/app", None);
        let mut batch = Batch::default();
        for tid in 0..50 {
            let labels = Labels { tgid: 7, tid, comm: "worker", cpu: 3, stop: StopReason::EndOfStack };
            batch.add(
                &shop(),
                &labels,
                (0..20).map(|address| Frame { module: Some(&app), address, reading: None }),
            );
        }
        let request = encoded(batch);
        let dictionary = request.dictionary.unwrap();
        assert_eq!(dictionary.mapping_table[0], Mapping::default());
        assert_eq!(dictionary.location_table[0], Location::default());
        assert_eq!(dictionary.function_table, [Function::default()]);
        assert_eq!(dictionary.link_table, [Link::default()]);
        assert_eq!(dictionary.string_table[0], "");
        assert_eq!(dictionary.attribute_table[0], KeyValueAndUnit::default());
        assert_eq!(dictionary.stack_table[0], Stack::default());
        assert_eq!(dictionary.location_table.len(), 21);
        assert_eq!(dictionary.stack_table.len(), 2);
        assert_eq!(dictionary.mapping_table.len(), 2);
        // Zero, pid, 50 thread ids, name, CPU, stop reason.
        assert_eq!(dictionary.attribute_table.len(), 55);
        let mut strings = dictionary.string_table.clone();
        strings.sort();
        strings.dedup();
        assert_eq!(strings.len(), dictionary.string_table.len());
    }

    #[test]
    fn profile_says_what_it_counts() {
        let mut batch = Batch::default();
        batch.add(&shop(), &Labels { tgid: 1, tid: 1, comm: "a", cpu: 0, stop: StopReason::EndOfStack }, []);
        let request = encoded(batch);
        let dictionary = request.dictionary.as_ref().unwrap();
        let profile = &request.resource_profiles[0].scope_profiles[0].profiles[0];
        let value_type = |value: Option<ValueType>| {
            let value = value.unwrap();
            [value.type_strindex, value.unit_strindex].map(|at| dictionary.string_table[at as usize].as_str())
        };
        assert_eq!(value_type(profile.sample_type), ["samples", "count"]);
        assert_eq!(value_type(profile.period_type), ["cpu", "nanoseconds"]);
        assert_eq!(profile.period, 52_631_578);
        assert_eq!(
            (profile.time_unix_nano, profile.duration_nano),
            (1_700_000_000_000_000_000, 5_000_000_000)
        );
        assert_eq!(profile.profile_id, [7; 16]);
    }

    #[test]
    fn each_resource_has_a_profile_of_its_own() {
        let other =
            Resource::new([("service.name", "till".to_owned()), ("container.id", "c1".to_owned())]).into();
        let labels = Labels { tgid: 1, tid: 1, comm: "a", cpu: 0, stop: StopReason::EndOfStack };
        let mut batch = Batch::default();
        // Two processes are of one.
        for owner in [&shop(), &other, &shop()] {
            batch.add(owner, &labels, []);
        }
        let request = encoded(batch);
        let host = "host.name=alpha host.arch=HERE os.type=linux windlass.agent.id=one-of-many";
        let host = host.replace("HERE", host_architecture());
        let resources: Vec<String> = (request.resource_profiles.iter())
            .map(|profiles| {
                let attributes = profiles.resource.as_ref().unwrap().attributes.iter().map(|attribute| {
                    match attribute.value.as_ref().unwrap().value.as_ref().unwrap() {
                        any_value::Value::StringValue(text) => format!("{}={text}", attribute.key),
                        other => panic!("{other:?}"),
                    }
                });
                let profile = &profiles.scope_profiles[0].profiles[0];
                format!("{:?} {}", profile.samples[0].values, attributes.collect::<Vec<_>>().join(" "))
            })
            .collect();
        assert_eq!(
            resources,
            [
                format!("[2] {host} service.name=shop"),
                format!("[1] {host} container.id=c1 service.name=till"),
            ]
        );
        let ids = request.resource_profiles.iter().map(|of| &of.scope_profiles[0].profiles[0].profile_id);
        let ids: std::collections::HashSet<_> = ids.collect();
        assert_eq!(ids.len(), 2, "a profile's name is its own");
    }
}
