//! Many OTLP requests as one pprof profile, still without names.
//!
//! Samples with the same stack and labels become one. Everything else is merged by value, since
//! indices of different requests have nothing in common.

use std::collections::HashMap;
use std::hash::Hash;
use std::ops::Range;

use opentelemetry_proto::tonic::profiles::v1development::{
    Location as OtlpLocation, Profile as OtlpProfile, ProfilesDictionary, Sample as OtlpSample,
};
use opentelemetry_proto::tonic::resource::v1::Resource;
use windlass_schema::pprof::{Function, Label, Line, Location, Mapping, Profile, Sample, ValueType, label};

use super::OtlpRequest;
use super::otlp::{Attribute, Dictionary};

/// Attributes that become labels, and whether as number.
const LABELS: [(&str, &str); 4] = [
    ("process.pid", label::PID),
    ("thread.id", label::TID),
    ("thread.name", label::THREAD),
    ("windlass.stop_reason", label::STOP_REASON),
];
/// Attributes of a mapping that hold its build-ID, best first.
const BUILD_IDS: [&str; 2] = ["process.executable.build_id.gnu", "process.executable.build_id.htlhash"];

/// What a text label and a number label have in common: key, text, number.
type LabelKey = (i64, i64, i64);

/// Mapping, address, and function and line of each inlined frame.
type LocationKey = (u64, u64, Vec<(u64, i64)>);

/// A merge under way.
pub(crate) struct Merge {
    range_ns: Range<u64>,
    pid: Option<i64>,
    profile: Profile,
    end_ns: i64,
    strings: HashMap<String, i64>,
    mappings: HashMap<[u64; 5], u64>,
    functions: HashMap<[i64; 4], u64>,
    locations: HashMap<LocationKey, u64>,
    samples: HashMap<(Vec<u64>, Vec<LabelKey>), Vec<i64>>,
    order: Vec<(Vec<u64>, Vec<LabelKey>)>,
}

impl Merge {
    /// An empty merge of the samples inside `range_ns`, of one process or all.
    pub(crate) fn new(range_ns: Range<u64>, pid: Option<i64>) -> Self {
        let mut merge = Self {
            range_ns,
            pid,
            profile: Profile::default(),
            end_ns: 0,
            strings: HashMap::new(),
            mappings: HashMap::new(),
            functions: HashMap::new(),
            locations: HashMap::new(),
            samples: HashMap::new(),
            order: Vec::new(),
        };
        merge.string("");
        merge
    }

    fn string(&mut self, text: &str) -> i64 {
        if let Some(index) = self.strings.get(text) {
            return *index;
        }
        let index = self.profile.string_table.len() as i64;
        self.profile.string_table.push(text.to_owned());
        self.strings.insert(text.to_owned(), index);
        index
    }

    /// Adds what a decoded request has inside the time range.
    pub(crate) fn add(&mut self, request: &OtlpRequest) {
        let empty = ProfilesDictionary::default();
        let tables = request.dictionary.as_ref().unwrap_or(&empty);
        let dictionary = Dictionary(tables);
        // IDs of the locations that samples refer to; 0 for those not met yet.
        let mut locations = vec![0; tables.location_table.len()];
        for resource in &request.resource_profiles {
            for profile in resource.scope_profiles.iter().flat_map(|scope| &scope.profiles) {
                let end = profile.time_unix_nano.saturating_add(profile.duration_nano);
                if profile.time_unix_nano < self.range_ns.end && end >= self.range_ns.start {
                    self.add_profile(dictionary, resource.resource.as_ref(), &mut locations, profile, end);
                }
            }
        }
    }

    fn add_profile(
        &mut self,
        dictionary: Dictionary<'_>,
        resource: Option<&Resource>,
        locations: &mut [u64],
        profile: &OtlpProfile,
        end_ns: u64,
    ) {
        let value_type = |merge: &mut Self, stated: Option<(i32, i32)>| {
            let (kind, unit) = stated.unwrap_or_default();
            ValueType {
                r#type: merge.string(dictionary.string(kind)),
                unit: merge.string(dictionary.string(unit)),
            }
        };
        let sample_type =
            value_type(self, profile.sample_type.as_ref().map(|t| (t.type_strindex, t.unit_strindex)));
        let column = match self.profile.sample_type.iter().position(|known| *known == sample_type) {
            Some(column) => column,
            None => {
                self.profile.sample_type.push(sample_type);
                self.profile.sample_type.len() - 1
            }
        };
        if self.profile.period_type.is_none() && profile.period != 0 {
            let stated = profile.period_type.as_ref().map(|t| (t.type_strindex, t.unit_strindex));
            self.profile.period_type = Some(value_type(self, stated));
            self.profile.period = profile.period;
        }
        let start = i64::try_from(profile.time_unix_nano).unwrap_or(i64::MAX);
        if self.profile.time_nanos == 0 || start < self.profile.time_nanos {
            self.profile.time_nanos = start;
        }
        self.end_ns = self.end_ns.max(i64::try_from(end_ns).unwrap_or(i64::MAX));
        for sample in &profile.samples {
            self.add_sample(dictionary, resource, locations, sample, column);
        }
    }

    fn add_sample(
        &mut self,
        dictionary: Dictionary<'_>,
        resource: Option<&Resource>,
        locations: &mut [u64],
        sample: &OtlpSample,
        column: usize,
    ) {
        let value = self.value(sample);
        let attribute = |key| {
            dictionary.attribute(&sample.attribute_indices, key).or_else(|| {
                let entry = resource?.attributes.iter().find(|entry| entry.key == key)?;
                dictionary.value(entry.value.as_ref()?.value.as_ref()?)
            })
        };
        if value == 0 || self.pid.is_some_and(|pid| attribute(LABELS[0].0) != Some(Attribute::Number(pid))) {
            return;
        }
        let labels = LABELS
            .iter()
            .filter_map(|(key, name)| Some((attribute(key)?, name)))
            .map(|(value, name)| match value {
                Attribute::Text(text) => (self.string(name), self.string(text), 0),
                Attribute::Number(number) => (self.string(name), 0, number),
            })
            .collect();
        let stack = usize::try_from(sample.stack_index).ok().and_then(|at| dictionary.0.stack_table.get(at));
        let indices = stack.map(|stack| stack.location_indices.iter()).unwrap_or_default();
        let stack = indices
            .filter_map(|index| usize::try_from(*index).ok().filter(|at| *at > 0))
            .filter_map(|at| {
                let (location, id) = (dictionary.0.location_table.get(at)?, locations.get_mut(at)?);
                if *id == 0 {
                    *id = self.location(dictionary, location);
                }
                Some(*id)
            })
            .collect();
        let key = (stack, labels);
        let values = self.samples.entry(key.clone()).or_insert_with(|| {
            self.order.push(key);
            Vec::new()
        });
        values.resize(values.len().max(column + 1), 0);
        values[column] = values[column].saturating_add(value);
    }

    /// What counts of a sample: values inside the time range; a timestamp without value is one event.
    fn value(&self, sample: &OtlpSample) -> i64 {
        if sample.timestamps_unix_nano.is_empty() {
            return sample.values.iter().fold(0, |sum, value| sum.saturating_add(*value));
        }
        let values =
            sample.values.iter().copied().chain(std::iter::repeat_n(1, sample.timestamps_unix_nano.len()));
        let inside =
            sample.timestamps_unix_nano.iter().zip(values).filter(|(at, _)| self.range_ns.contains(at));
        inside.fold(0, |sum, (_, value)| sum.saturating_add(value))
    }

    fn location(&mut self, dictionary: Dictionary<'_>, location: &OtlpLocation) -> u64 {
        let mapping_id = self.mapping(dictionary, location.mapping_index);
        let lines: Vec<(u64, i64)> = location
            .lines
            .iter()
            .map(|line| (self.function(dictionary, line.function_index), line.line))
            .collect();
        let key = (mapping_id, location.address, lines);
        if let Some(id) = self.locations.get(&key) {
            return *id;
        }
        let id = self.profile.location.len() as u64 + 1;
        let line = key.2.iter().map(|(function_id, line)| Line {
            function_id: *function_id,
            line: *line,
            column: 0,
        });
        self.profile.location.push(Location {
            id,
            mapping_id,
            address: location.address,
            line: line.collect(),
            is_folded: false,
        });
        self.locations.insert(key, id);
        id
    }

    fn mapping(&mut self, dictionary: Dictionary<'_>, index: i32) -> u64 {
        let Some(mapping) = usize::try_from(index)
            .ok()
            .filter(|at| *at > 0)
            .and_then(|at| dictionary.0.mapping_table.get(at))
        else {
            return 0;
        };
        let build_id = BUILD_IDS.iter().find_map(|key| dictionary.attribute(&mapping.attribute_indices, key));
        let build_id = match build_id {
            Some(Attribute::Text(text)) => self.string(text),
            _ => 0,
        };
        let filename = self.string(dictionary.string(mapping.filename_strindex));
        let (memory_start, memory_limit, file_offset) =
            (mapping.memory_start, mapping.memory_limit, mapping.file_offset);
        let id = self.profile.mapping.len() as u64 + 1;
        let key = [memory_start, memory_limit, file_offset, filename as u64, build_id as u64];
        intern(&mut self.mappings, key, id, || {
            self.profile.mapping.push(Mapping {
                id,
                memory_start,
                memory_limit,
                file_offset,
                filename,
                build_id,
                ..Mapping::default()
            });
        })
    }

    fn function(&mut self, dictionary: Dictionary<'_>, index: i32) -> u64 {
        let Some(function) = usize::try_from(index)
            .ok()
            .filter(|at| *at > 0)
            .and_then(|at| dictionary.0.function_table.get(at))
        else {
            return 0;
        };
        let name = self.string(dictionary.string(function.name_strindex));
        let system_name = self.string(dictionary.string(function.system_name_strindex));
        let filename = self.string(dictionary.string(function.filename_strindex));
        let start_line = function.start_line;
        let id = self.profile.function.len() as u64 + 1;
        intern(&mut self.functions, [name, system_name, filename, start_line], id, || {
            self.profile.function.push(Function { id, name, system_name, filename, start_line });
        })
    }

    /// The profile, its samples in the order they came.
    pub(crate) fn finish(mut self) -> Profile {
        let columns = self.profile.sample_type.len();
        for key in self.order {
            let mut value = self.samples.remove(&key).expect("each key of the order is in the map once");
            value.resize(columns, 0);
            let (location_id, labels) = key;
            let label =
                labels.into_iter().map(|(key, str, num)| Label { key, str, num, num_unit: 0 }).collect();
            self.profile.sample.push(Sample { location_id, value, label });
        }
        self.profile.duration_nanos = self.end_ns.saturating_sub(self.profile.time_nanos).max(0);
        self.profile
    }
}

/// The ID known for `key`, or `id` after `add` has added it.
fn intern<K: Hash + Eq>(known: &mut HashMap<K, u64>, key: K, id: u64, add: impl FnOnce()) -> u64 {
    *known.entry(key).or_insert_with(|| {
        add();
        id
    })
}
