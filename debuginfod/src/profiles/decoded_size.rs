//! How much memory will a protobuf message take, once decoded?
//!
//! An empty message is two bytes on the wire and up to a hundred and more in memory, so a limit on the bytes
//! received is none on the memory. Here the lengths and tags of a message are read once, without keeping
//! anything, and each message, string and number in it is counted with the size that it will have.

use std::mem::size_of;

use opentelemetry_proto::tonic::collector::profiles::v1development::ExportProfilesServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::profiles::v1development as otlp;
use opentelemetry_proto::tonic::resource::v1::Resource;
use prost::DecodeError;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use windlass_schema::pprof;

/// Most bytes of memory for one decoded profile: twenty-five times the largest batch that an agent sends, and eight
/// times what a pprof file of a busy machine has, which decodes to some six times its bytes.
pub(super) const MAX_DECODED_BYTES: u64 = 256 << 20;
/// Messages inside messages; the decoder itself goes no deeper.
const MAX_DEPTH: u32 = 100;

/// A profile that would take too much memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a profile with so many parts that it takes more than {limit} bytes of memory, the limit; send it in several"
)]
pub struct TooManyParts {
    /// In bytes.
    pub limit: u64,
}

/// What of a message takes memory: itself, and the fields that can be there any number of times.
pub(super) struct Shape {
    bytes: usize,
    fields: &'static [(u32, Field)],
}

/// A field of a message, by what is in it.
enum Field {
    /// A message of this shape.
    Message(&'static Shape),
    /// A string or bytes.
    Text,
    /// Numbers of this size, packed or one by one.
    Numbers(usize),
    /// Numbers of eight bytes on the wire too.
    Fixed,
}
use Field::{Fixed, Message, Numbers, Text};

const fn shape<T>(fields: &'static [(u32, Field)]) -> Shape {
    Shape { bytes: size_of::<T>(), fields }
}

/// pprof's `Profile`.
pub(super) static PPROF: Shape = shape::<pprof::Profile>(&[
    (1, Message(&shape::<pprof::ValueType>(&[]))),
    (2, Message(&PPROF_SAMPLE)),
    (3, Message(&shape::<pprof::Mapping>(&[]))),
    (4, Message(&PPROF_LOCATION)),
    (5, Message(&shape::<pprof::Function>(&[]))),
    (6, Text),
    (13, Numbers(8)),
]);
static PPROF_SAMPLE: Shape =
    shape::<pprof::Sample>(&[(1, Numbers(8)), (2, Numbers(8)), (3, Message(&shape::<pprof::Label>(&[])))]);
static PPROF_LOCATION: Shape = shape::<pprof::Location>(&[(4, Message(&shape::<pprof::Line>(&[])))]);

/// OTLP's `ExportProfilesServiceRequest`.
pub(super) static OTLP: Shape =
    shape::<ExportProfilesServiceRequest>(&[(1, Message(&RESOURCE_PROFILES)), (2, Message(&DICTIONARY))]);
static RESOURCE_PROFILES: Shape =
    shape::<otlp::ResourceProfiles>(&[(1, Message(&RESOURCE)), (2, Message(&SCOPE_PROFILES)), (3, Text)]);
// An entity reference holds four strings or lists of them.
static RESOURCE: Shape = shape::<Resource>(&[(1, Message(&KEY_VALUE)), (3, Message(&ENTITY))]);
static ENTITY: Shape = shape::<[String; 4]>(&[(1, Text), (2, Text), (3, Text), (4, Text)]);
static SCOPE_PROFILES: Shape =
    shape::<otlp::ScopeProfiles>(&[(1, Message(&SCOPE)), (2, Message(&PROFILE)), (3, Text)]);
static SCOPE: Shape = shape::<InstrumentationScope>(&[(1, Text), (2, Text), (3, Message(&KEY_VALUE))]);
static PROFILE: Shape =
    shape::<otlp::Profile>(&[(2, Message(&SAMPLE)), (7, Text), (9, Text), (10, Text), (11, Numbers(4))]);
static SAMPLE: Shape = shape::<otlp::Sample>(&[(2, Numbers(4)), (4, Numbers(8)), (5, Fixed)]);
static DICTIONARY: Shape = shape::<otlp::ProfilesDictionary>(&[
    (1, Message(&shape::<otlp::Mapping>(&[(5, Numbers(4))]))),
    (2, Message(&LOCATION)),
    (3, Message(&shape::<otlp::Function>(&[]))),
    (4, Message(&shape::<otlp::Link>(&[(1, Text), (2, Text)]))),
    (5, Text),
    (6, Message(&shape::<otlp::KeyValueAndUnit>(&[(2, Message(&ANY_VALUE))]))),
    (7, Message(&shape::<otlp::Stack>(&[(1, Numbers(4))]))),
]);
static LOCATION: Shape = shape::<otlp::Location>(&[(3, Message(&shape::<otlp::Line>(&[]))), (4, Numbers(4))]);
static KEY_VALUE: Shape = shape::<KeyValue>(&[(1, Text), (2, Message(&ANY_VALUE))]);
static ANY_VALUE: Shape = shape::<AnyValue>(&[
    (1, Text),
    (5, Message(&shape::<[AnyValue; 0]>(&[(1, Message(&ANY_VALUE))]))),
    (6, Message(&shape::<[KeyValue; 0]>(&[(1, Message(&KEY_VALUE))]))),
    (7, Text),
]);

/// Refuses bytes that would decode to more than `limit` bytes. Says nothing of bytes that do not decode.
pub(super) fn check(bytes: &[u8], shape: &'static Shape, limit: u64) -> Result<(), TooManyParts> {
    let mut total = 0;
    // What cannot be read here cannot be decoded either, and the decoder says why.
    let _ = count(bytes, shape, MAX_DEPTH, limit, &mut total);
    if total > limit { Err(TooManyParts { limit }) } else { Ok(()) }
}

/// Adds the size of a message to `total`, until that is over `limit`.
fn count(
    mut bytes: &[u8],
    shape: &'static Shape,
    depth: u32,
    limit: u64,
    total: &mut u64,
) -> Result<(), DecodeError> {
    *total += shape.bytes as u64;
    while !bytes.is_empty() && *total <= limit && depth > 0 {
        let (tag, wire_type) = decode_key(&mut bytes)?;
        let field = shape.fields.iter().find(|(known, _)| *known == tag).map(|(_, field)| field);
        if wire_type != WireType::LengthDelimited {
            skip_field(wire_type, tag, &mut bytes, DecodeContext::default())?;
            *total += match field {
                Some(Numbers(size)) => *size as u64,
                Some(Fixed) => 8,
                _ => 0,
            };
            continue;
        }
        let length = decode_varint(&mut bytes)?;
        let Some((content, rest)) =
            usize::try_from(length).ok().and_then(|length| bytes.split_at_checked(length))
        else {
            return Ok(());
        };
        bytes = rest;
        match field {
            Some(Message(shape)) => count(content, shape, depth - 1, limit, total)?,
            Some(Fixed) => *total += content.len() as u64,
            Some(Text) => *total += (size_of::<String>() + content.len()) as u64,
            // A number is at least one byte, and ends with one below 0x80.
            Some(Numbers(size)) => {
                *total += (content.iter().filter(|byte| **byte < 0x80).count() * size) as u64;
            }
            None => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    #[track_caller]
    fn check_size(bytes: &[u8], shape: &'static Shape, expect: usize) {
        assert_eq!(check(bytes, shape, expect as u64), Ok(()));
        let below = expect as u64 - 1;
        assert_eq!(check(bytes, shape, below), Err(TooManyParts { limit: below }));
    }

    #[test]
    fn every_part_counts_with_its_size_in_memory() {
        let profile = pprof::Profile {
            string_table: ["", "abc"].map(str::to_owned).to_vec(),
            sample: vec![pprof::Sample {
                location_id: vec![1, 300, 70_000],
                value: vec![5],
                label: vec![pprof::Label::default(); 2],
            }],
            location: vec![pprof::Location { line: vec![pprof::Line::default()], ..Default::default() }],
            ..pprof::Profile::default()
        };
        let expect = size_of::<pprof::Profile>()
            + 2 * size_of::<String>()
            + 3
            + size_of::<pprof::Sample>()
            + 4 * 8
            + 2 * size_of::<pprof::Label>()
            + size_of::<pprof::Location>()
            + size_of::<pprof::Line>();
        check_size(&profile.encode_to_vec(), &PPROF, expect);
    }

    #[test]
    fn empty_messages_are_refused_before_they_are_decoded() {
        let limit = 64 << 20;
        // Samples, inside a scope's profile and at the top of a pprof profile.
        let samples = [0x12, 0x00].repeat(1 << 20);
        assert_eq!(check(&samples, &PPROF, limit), Err(TooManyParts { limit }));
        let mut request = samples;
        for tag in [0x12, 0x12, 0x0a] {
            let mut outer = vec![tag];
            prost::encoding::encode_varint(request.len() as u64, &mut outer);
            outer.extend(request);
            request = outer;
        }
        assert_eq!(check(&request, &OTLP, limit), Err(TooManyParts { limit }));
        assert!(ExportProfilesServiceRequest::decode(&request[..]).is_ok(), "they would decode");
        // Numbers one by one: two bytes each.
        assert_eq!(check(&[0x68, 0x00].repeat(9 << 20), &PPROF, limit), Err(TooManyParts { limit }));
    }

    #[test]
    fn broken_bytes_are_left_to_the_decoder() {
        for bytes in [&b"garbage"[..], &[0x12, 0x80], &[0x12, 0x05, 0x00], &[0xff; 12], &[0x0b, 0x0b]] {
            assert_eq!(check(bytes, &PPROF, 1 << 20), Ok(()));
            assert_eq!(check(bytes, &OTLP, 1 << 20), Ok(()));
        }
    }

    #[test]
    fn values_inside_values_end_somewhere() {
        let mut value = Vec::new();
        for _ in 0..3000 {
            let mut outer = vec![0x2a];
            prost::encoding::encode_varint(value.len() as u64 + 2, &mut outer);
            outer.extend([0x0a, 0x00]);
            outer.extend(value);
            value = outer;
        }
        assert_eq!(check(&value, &ANY_VALUE, 1 << 20), Ok(()));
    }
}
