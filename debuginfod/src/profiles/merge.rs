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
use windlass_schema::perf_map::PERF_MAP_ATTRIBUTE;
use windlass_schema::pprof::{Function, Label, Line, Location, Mapping, Profile, Sample, ValueType, label};

use super::otlp::{Attribute, Dictionary};
use super::string_table::StringTable;
use super::{OtlpRequest, Selection};
use crate::error::ServiceError;

/// The attribute with a sample's process.
const PID: &str = "process.pid";
/// The attribute with the name of the host that a sample is of.
const HOST: &str = "host.name";
/// The attributes that tell one sender from all others: of our agents, and of profilers that name themselves as
/// a service.
const INSTANCES: &[&str] = &["windlass.agent.id", "service.instance.id"];
/// Attributes that become labels.
const LABELS: [(&str, &str); 5] = [
    (PID, label::PID),
    (HOST, label::HOST),
    ("thread.id", label::TID),
    ("thread.name", label::THREAD),
    ("windlass.stop_reason", label::STOP_REASON),
];
/// Attributes of a mapping that hold its build-ID, best first.
const BUILD_IDS: [&str; 3] =
    ["process.executable.build_id.gnu", "process.executable.build_id.htlhash", PERF_MAP_ATTRIBUTE];

/// What a text label and a number label have in common: key, text, number.
type LabelKey = (i64, i64, i64);

/// Mapping, address, and function and line of each inlined frame.
type LocationKey = (u64, u64, Vec<(u64, i64)>);

/// Most of what a merge may hold. A profile beyond it is more than any viewer shows, and the limits together
/// keep one request below a gigabyte.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Distinct locations, of some 200 bytes each: twice those of a kernel, a browser and a database at once.
    locations: usize,
    /// Distinct samples, of some 200 bytes each without their stacks: a fleet of a thousand processes with
    /// a thousand stacks each.
    samples: usize,
    /// Locations in the stacks of all distinct samples, of 8 bytes each: 32 in each of the most samples.
    stack_locations: usize,
    /// Bytes of distinct strings, kept twice: 128 in each of the most locations.
    string_bytes: usize,
}

const LIMITS: Limits =
    Limits { locations: 1 << 20, samples: 1 << 20, stack_locations: 32 << 20, string_bytes: 128 << 20 };

/// A merge that would take more than [`LIMITS`] allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("more than {limit} distinct {what} in this time, ask for a shorter one, one host, instance or pid")]
pub(crate) struct MergeTooLarge {
    what: &'static str,
    limit: usize,
}

impl From<MergeTooLarge> for ServiceError {
    fn from(error: MergeTooLarge) -> Self {
        Self::Malformed(error.to_string())
    }
}

/// Values of a distinct sample, and how many others came before.
type Values = (usize, Vec<i64>);

/// A merge under way.
pub(crate) struct Merge {
    wanted: Selection,
    limits: Limits,
    profile: Profile,
    end_ns: i64,
    strings: StringTable,
    mappings: HashMap<[u64; 5], u64>,
    functions: HashMap<[i64; 4], u64>,
    locations: HashMap<LocationKey, u64>,
    samples: HashMap<(Vec<u64>, Vec<LabelKey>), Values>,
    stack_locations: usize,
}

impl Merge {
    /// An empty merge of the `wanted` samples.
    pub(crate) fn new(wanted: Selection) -> Self {
        Self {
            wanted,
            limits: LIMITS,
            profile: Profile::default(),
            end_ns: 0,
            strings: StringTable::new(Vec::new()),
            mappings: HashMap::new(),
            functions: HashMap::new(),
            locations: HashMap::new(),
            samples: HashMap::new(),
            stack_locations: 0,
        }
    }

    fn string(&mut self, text: &str) -> i64 {
        self.strings.intern(text)
    }

    fn range_ns(&self) -> Range<u64> {
        self.wanted.start..self.wanted.end
    }

    /// Adds what a decoded request has of the wanted samples.
    pub(crate) fn add(&mut self, request: &OtlpRequest) -> Result<(), MergeTooLarge> {
        let empty = ProfilesDictionary::default();
        let tables = request.dictionary.as_ref().unwrap_or(&empty);
        let dictionary = Dictionary(tables);
        // IDs of the locations that samples refer to; 0 for those not met yet.
        let mut locations = vec![0; tables.location_table.len()];
        for resource in &request.resource_profiles {
            if !self.wants(dictionary, resource.resource.as_ref()) {
                continue;
            }
            for profile in resource.scope_profiles.iter().flat_map(|scope| &scope.profiles) {
                let end = profile.time_unix_nano.saturating_add(profile.duration_nano);
                if profile.time_unix_nano < self.wanted.end && end >= self.wanted.start {
                    self.add_profile(dictionary, resource.resource.as_ref(), &mut locations, profile, end)?;
                }
            }
        }
        Ok(())
    }

    /// Whether the instance and the host that sent samples are those asked for.
    fn wants(&self, dictionary: Dictionary<'_>, resource: Option<&Resource>) -> bool {
        [(INSTANCES, &self.wanted.instance), (&[HOST], &self.wanted.host)].into_iter().all(
            |(keys, wanted)| {
                wanted.as_deref().is_none_or(|wanted| {
                    let wanted = Some(Attribute::Text(wanted));
                    keys.iter().any(|key| dictionary.resource_attribute(resource, key) == wanted)
                })
            },
        )
    }

    /// Refuses what has grown beyond the limits.
    fn check_size(&self) -> Result<(), MergeTooLarge> {
        let Limits { locations, samples, stack_locations, string_bytes } = self.limits;
        let parts = [
            ("locations", self.profile.location.len(), locations),
            ("samples", self.samples.len(), samples),
            ("stacks' locations", self.stack_locations, stack_locations),
            ("strings' bytes", self.strings.bytes(), string_bytes),
        ];
        match parts.into_iter().find(|(_, count, limit)| count > limit) {
            Some((what, _, limit)) => Err(MergeTooLarge { what, limit }),
            None => Ok(()),
        }
    }

    fn add_profile(
        &mut self,
        dictionary: Dictionary<'_>,
        resource: Option<&Resource>,
        locations: &mut [u64],
        profile: &OtlpProfile,
        end_ns: u64,
    ) -> Result<(), MergeTooLarge> {
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
            self.check_size()?;
        }
        Ok(())
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
            let stated = dictionary.attribute(&sample.attribute_indices, key);
            stated.or_else(|| dictionary.resource_attribute(resource, key))
        };
        if value == 0 || self.wanted.pid.is_some_and(|pid| attribute(PID) != Some(Attribute::Number(pid))) {
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
        let stack: Vec<u64> = indices
            .filter_map(|index| usize::try_from(*index).ok().filter(|at| *at > 0))
            .filter_map(|at| {
                let (location, id) = (dictionary.0.location_table.get(at)?, locations.get_mut(at)?);
                if *id == 0 {
                    *id = self.location(dictionary, location);
                }
                Some(*id)
            })
            .collect();
        let (number, length) = (self.samples.len(), stack.len());
        let (_, values) = self.samples.entry((stack, labels)).or_insert_with(|| {
            self.stack_locations += length;
            (number, Vec::new())
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
            sample.timestamps_unix_nano.iter().zip(values).filter(|(at, _)| self.range_ns().contains(at));
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
        let mut samples: Vec<_> = self.samples.into_iter().collect();
        samples.sort_unstable_by_key(|(_, (number, _))| *number);
        for ((location_id, labels), (_, mut value)) in samples {
            value.resize(columns, 0);
            let label =
                labels.into_iter().map(|(key, str, num)| Label { key, str, num, num_unit: 0 }).collect();
            self.profile.sample.push(Sample { location_id, value, label });
        }
        self.profile.string_table = self.strings.into_strings();
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

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry_proto::tonic::profiles::v1development::{ResourceProfiles, ScopeProfiles, Stack};

    /// Two samples, of stacks with one and with two locations.
    fn request() -> OtlpRequest {
        let location = |address| OtlpLocation { address, ..OtlpLocation::default() };
        let sample = |stack_index| OtlpSample { stack_index, values: vec![1], ..OtlpSample::default() };
        let profile = OtlpProfile { samples: vec![sample(1), sample(2)], ..OtlpProfile::default() };
        let scope = ScopeProfiles { profiles: vec![profile], ..ScopeProfiles::default() };
        let stacks = [vec![], vec![1], vec![1, 2]];
        OtlpRequest {
            resource_profiles: vec![ResourceProfiles {
                scope_profiles: vec![scope],
                ..ResourceProfiles::default()
            }],
            dictionary: Some(ProfilesDictionary {
                location_table: [0, 7, 8].map(location).to_vec(),
                stack_table: stacks.map(|location_indices| Stack { location_indices }).to_vec(),
                ..ProfilesDictionary::default()
            }),
        }
    }

    #[track_caller]
    fn check(limits: Limits, expect: Result<(), &str>) {
        let mut merge = Merge::new(Selection { start: 0, end: 9, pid: None, host: None, instance: None });
        merge.limits = limits;
        // The second time nothing is new.
        let added = merge.add(&request()).and_then(|()| merge.add(&request()));
        assert_eq!(added.map_err(|error| error.what), expect);
    }

    #[test]
    fn a_merge_ends_at_its_limits_by_name() {
        let enough = Limits { locations: 2, samples: 2, stack_locations: 3, string_bytes: 0 };
        check(enough, Ok(()));
        check(Limits { locations: 1, ..enough }, Err("locations"));
        check(Limits { samples: 1, ..enough }, Err("samples"));
        check(Limits { stack_locations: 2, ..enough }, Err("stacks' locations"));
        let error = MergeTooLarge { what: "samples", limit: 1 };
        assert!(ServiceError::from(error).to_string().starts_with("more than 1 distinct samples"));
    }
}
