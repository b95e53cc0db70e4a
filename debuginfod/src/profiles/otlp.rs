//! Reading an OTLP request: every index in it checked once.

use std::ops::Range;

use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::profiles::v1development::{KeyValueAndUnit, Profile, ProfilesDictionary};
use opentelemetry_proto::tonic::resource::v1::Resource;
use prost::Message;

use super::OtlpRequest;
use super::decoded_size::{self, MAX_DECODED_BYTES, TooManyParts};

/// Bytes that are no valid OTLP profiles request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OtlpError {
    /// Not protobuf of this shape.
    #[error("not an OTLP profiles request: {0}")]
    Protobuf(String),
    /// More than memory is given to.
    #[error(transparent)]
    Size(#[from] TooManyParts),
    /// An index into a dictionary table beyond its end, or below zero.
    #[error("{field} is {index}, but dictionary.{table} has {length} entries")]
    Index {
        /// Which index.
        field: &'static str,
        /// Its value.
        index: i32,
        /// What it points into.
        table: &'static str,
        /// Of the table.
        length: usize,
    },
    /// Values and timestamps of a sample that do not pair up.
    #[error("a sample has {values} values but {timestamps} timestamps")]
    Shape {
        /// Their number.
        values: usize,
        /// Their number.
        timestamps: usize,
    },
}

/// Decodes a request and checks each index, so that reading it cannot fail later.
pub fn decode(bytes: &[u8]) -> Result<OtlpRequest, OtlpError> {
    decoded_size::check(bytes, &decoded_size::OTLP, MAX_DECODED_BYTES)?;
    let request = OtlpRequest::decode(bytes).map_err(|e| OtlpError::Protobuf(e.to_string()))?;
    let empty = ProfilesDictionary::default();
    let checker = Checker(request.dictionary.as_ref().unwrap_or(&empty));
    checker.check_dictionary()?;
    for profile in profiles(&request) {
        checker.check_profile(profile)?;
    }
    Ok(request)
}

/// All profiles of a request.
pub(super) fn profiles(request: &OtlpRequest) -> impl Iterator<Item = &Profile> {
    request.resource_profiles.iter().flat_map(|r| &r.scope_profiles).flat_map(|s| &s.profiles)
}

/// From the start of the earliest to the end of the latest profile, in nanoseconds since 1970.
pub fn time_range_ns(request: &OtlpRequest) -> Range<u64> {
    let start = profiles(request).map(|profile| profile.time_unix_nano).min();
    let end =
        profiles(request).map(|profile| profile.time_unix_nano.saturating_add(profile.duration_nano)).max();
    start.unwrap_or_default()..end.unwrap_or_default()
}

struct Checker<'a>(&'a ProfilesDictionary);

impl Checker<'_> {
    fn check(field: &'static str, index: i32, table: &'static str, length: usize) -> Result<(), OtlpError> {
        // Index 0 is "not set", whether the sender wrote the table's null entry or left it out.
        match usize::try_from(index) {
            Ok(at) if at == 0 || at < length => Ok(()),
            _ => Err(OtlpError::Index { field, index, table, length }),
        }
    }

    fn string(&self, field: &'static str, index: i32) -> Result<(), OtlpError> {
        Self::check(field, index, "string_table", self.0.string_table.len())
    }

    fn attributes(&self, field: &'static str, indices: &[i32]) -> Result<(), OtlpError> {
        let length = self.0.attribute_table.len();
        indices.iter().try_for_each(|index| Self::check(field, *index, "attribute_table", length))
    }

    fn check_dictionary(&self) -> Result<(), OtlpError> {
        for attribute in &self.0.attribute_table {
            self.string("attribute.key_strindex", attribute.key_strindex)?;
            if let Some(Value::StringValueStrindex(index)) =
                attribute.value.as_ref().and_then(|value| value.value.as_ref())
            {
                self.string("attribute.value", *index)?;
            }
        }
        for mapping in &self.0.mapping_table {
            self.string("mapping.filename_strindex", mapping.filename_strindex)?;
            self.attributes("mapping.attribute_indices", &mapping.attribute_indices)?;
        }
        for function in &self.0.function_table {
            self.string("function.name_strindex", function.name_strindex)?;
            self.string("function.system_name_strindex", function.system_name_strindex)?;
            self.string("function.filename_strindex", function.filename_strindex)?;
        }
        for location in &self.0.location_table {
            let (mappings, functions) = (self.0.mapping_table.len(), self.0.function_table.len());
            Self::check("location.mapping_index", location.mapping_index, "mapping_table", mappings)?;
            for line in &location.lines {
                Self::check("line.function_index", line.function_index, "function_table", functions)?;
            }
        }
        for stack in &self.0.stack_table {
            for index in &stack.location_indices {
                Self::check("stack.location_indices", *index, "location_table", self.0.location_table.len())?;
            }
        }
        Ok(())
    }

    fn check_profile(&self, profile: &Profile) -> Result<(), OtlpError> {
        for value_type in [&profile.sample_type, &profile.period_type].into_iter().flatten() {
            self.string("value_type.type_strindex", value_type.type_strindex)?;
            self.string("value_type.unit_strindex", value_type.unit_strindex)?;
        }
        for sample in &profile.samples {
            Self::check("sample.stack_index", sample.stack_index, "stack_table", self.0.stack_table.len())?;
            self.attributes("sample.attribute_indices", &sample.attribute_indices)?;
            let (values, timestamps) = (sample.values.len(), sample.timestamps_unix_nano.len());
            if values != 0 && timestamps != 0 && values != timestamps {
                return Err(OtlpError::Shape { values, timestamps });
            }
        }
        Ok(())
    }
}

/// Lookups in a dictionary whose indices [`decode`] has checked; a table without its null entry reads as
/// if it had one.
#[derive(Clone, Copy)]
pub(super) struct Dictionary<'a>(pub(super) &'a ProfilesDictionary);

/// The value of an attribute, as far as profiles use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attribute<'a> {
    Text(&'a str),
    Number(i64),
}

impl<'a> Dictionary<'a> {
    pub(super) fn string(&self, index: i32) -> &'a str {
        usize::try_from(index)
            .ok()
            .and_then(|index| self.0.string_table.get(index))
            .map_or("", String::as_str)
    }

    /// The value of the attribute `key` among these.
    pub(super) fn attribute(&self, indices: &[i32], key: &str) -> Option<Attribute<'a>> {
        let named = |attribute: &&KeyValueAndUnit| self.string(attribute.key_strindex) == key;
        let entry = |index: &i32| usize::try_from(*index).ok().and_then(|at| self.0.attribute_table.get(at));
        self.value(indices.iter().filter_map(entry).find(named)?.value.as_ref()?.value.as_ref()?)
    }

    /// The value of the attribute `key` of whoever sent the samples.
    pub(super) fn resource_attribute(
        &self,
        resource: Option<&'a Resource>,
        key: &str,
    ) -> Option<Attribute<'a>> {
        let entry = resource?.attributes.iter().find(|entry| entry.key == key)?;
        self.value(entry.value.as_ref()?.value.as_ref()?)
    }

    fn value(&self, value: &'a Value) -> Option<Attribute<'a>> {
        match value {
            Value::StringValue(text) => Some(Attribute::Text(text)),
            Value::StringValueStrindex(index) => Some(Attribute::Text(self.string(*index))),
            Value::IntValue(number) => Some(Attribute::Number(*number)),
            _ => None,
        }
    }
}
