//! What the service decodes of what others wrote, on any bytes and on damaged ones: an error or a right
//! answer, never a panic. These run here and not under the fuzzer, which would have to build the service.

use std::path::Path;
use std::sync::LazyLock;

use opentelemetry_proto::tonic::collector::profiles::v1development::ExportProfilesServiceRequest;
use opentelemetry_proto::tonic::profiles::v1development::{
    Location, Mapping, Profile, ProfilesDictionary, ResourceProfiles, Sample, ScopeProfiles, Stack,
};
use proptest::prelude::*;
use prost::Message;
use windlass_debuginfod::elf;
use windlass_debuginfod::profiles::{decode, time_range_ns};
use windlass_debuginfod::seekable::{FRAME_BYTES, FrameEncoder, SeekTable};
use windlass_schema::BuildId;
use windlass_schema::file_id::htlhash;
use windlass_schema::http::ArtefactKind;

/// Decodes as OTLP: what is accepted has a time range, and is accepted again after it was encoded.
fn decode_otlp(bytes: &[u8]) -> bool {
    let Ok(request) = decode(bytes) else { return false };
    let range = time_range_ns(&request);
    assert!(range.start <= range.end, "{range:?}");
    // Compared as bytes: a NaN is not equal to itself.
    let encoded = request.encode_to_vec();
    assert_eq!(decode(&encoded).unwrap().encode_to_vec(), encoded);
    true
}

/// Decodes the stored form of a content of `size` bytes, frame by frame and as a whole.
fn decode_stored(stored: &[u8], size: u64) -> Option<Vec<u8>> {
    let table_bytes = usize::try_from(SeekTable::stored_bytes(size)).unwrap();
    let end = &stored[stored.len().saturating_sub(table_bytes)..];
    let table = SeekTable::parse(end, size, stored.len() as u64).ok()?;
    let frames = table.frames(&(0..size));
    let read = |frames: std::ops::Range<usize>| {
        let range = table.stored_range(&frames);
        assert!(range.start <= range.end && range.end <= stored.len() as u64, "{range:?}");
        table.decode(frames, &stored[range.start as usize..range.end as usize]).ok()
    };
    let single: Option<Vec<Vec<u8>>> = frames.clone().map(|frame| read(frame..frame + 1)).collect();
    let whole = read(frames);
    assert_eq!(whole, single.map(|frames| frames.concat()));
    whole
}

/// Checks as each kind, under the file's own hash too: what is accepted lies inside the file.
fn check_elf(bytes: &[u8]) {
    for kind in ArtefactKind::ALL {
        for stated in [BuildId::new(&[1; 20]).unwrap(), htlhash(bytes)] {
            let Ok(facts) = elf::check(bytes, *kind, stated) else { continue };
            for section in facts.sections.iter().filter(|section| !section.nobits) {
                let end = section.offset.checked_add(section.size);
                assert!(end.is_some_and(|end| end <= bytes.len() as u64), "{section:?}");
            }
        }
    }
}

/// A request with an entry in each table that samples lead to.
static REQUEST: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let dictionary = ProfilesDictionary {
        string_table: ["", "cpu", "/usr/bin/server"].map(str::to_owned).to_vec(),
        mapping_table: vec![
            Mapping::default(),
            Mapping { memory_limit: 0x2000, filename_strindex: 2, ..Mapping::default() },
        ],
        location_table: vec![
            Location::default(),
            Location { mapping_index: 1, address: 0x1139, ..Location::default() },
        ],
        stack_table: vec![Stack::default(), Stack { location_indices: vec![1] }],
        ..ProfilesDictionary::default()
    };
    let sample =
        Sample { stack_index: 1, values: vec![1], timestamps_unix_nano: vec![7], ..Sample::default() };
    let profile =
        Profile { samples: vec![sample], time_unix_nano: 5, duration_nano: 9, ..Profile::default() };
    let scope = ScopeProfiles { profiles: vec![profile], ..ScopeProfiles::default() };
    let resource = ResourceProfiles { scope_profiles: vec![scope], ..ResourceProfiles::default() };
    ExportProfilesServiceRequest { resource_profiles: vec![resource], dictionary: Some(dictionary) }
        .encode_to_vec()
});

/// A content of two frames and its stored form.
static STORED: LazyLock<(Vec<u8>, Vec<u8>)> = LazyLock::new(|| {
    let content: Vec<u8> = (0..FRAME_BYTES + 1000).map(|at| (at / 5) as u8).collect();
    let mut encoder = FrameEncoder::new().unwrap();
    let mut stored = Vec::new();
    for raw in content.chunks(FRAME_BYTES as usize) {
        stored.extend(encoder.frame(raw).unwrap());
    }
    stored.extend(encoder.finish());
    (content, stored)
});

static ELF: LazyLock<Vec<u8>> = LazyLock::new(|| {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/elf/small")).unwrap()
});

#[test]
fn whole_and_cut_at_every_byte() {
    assert!(decode_otlp(&REQUEST));
    for end in 0..REQUEST.len() {
        decode_otlp(&REQUEST[..end]);
    }
    let (content, stored) = &*STORED;
    let size = content.len() as u64;
    assert_eq!(decode_stored(stored, size).as_ref(), Some(content));
    for end in 0..stored.len() {
        assert_eq!(decode_stored(&stored[..end], size), None, "cut at {end}");
    }
    for end in 0..=ELF.len() {
        check_elf(&ELF[..end]);
    }
}

/// `bytes` with some of them overwritten.
fn damaged(bytes: &'static [u8]) -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![any::<u8>(), Just(0), Just(0xff), Just(0x80)];
    prop::collection::vec((0..bytes.len(), byte), 1..8).prop_map(|damage| {
        let mut damaged = bytes.to_vec();
        for (at, byte) in damage {
            damaged[at] = byte;
        }
        damaged
    })
}

proptest! {
    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400), size in any::<u32>()) {
        decode_otlp(&bytes);
        decode_stored(&bytes, size.into());
        check_elf(&bytes);
    }

    #[test]
    fn damaged_requests(bytes in damaged(&REQUEST)) {
        decode_otlp(&bytes);
    }

    #[test]
    fn damaged_frames(bytes in damaged(&STORED.1), size in prop_oneof![4 => Just(STORED.0.len() as u64), 1 => any::<u32>().prop_map(u64::from)]) {
        let decoded = decode_stored(&bytes, size);
        // Bits of a frame's header that zstd ignores may change; the content may not.
        prop_assert!(decoded.is_none_or(|decoded| decoded == STORED.0));
    }

    #[test]
    fn damaged_files(bytes in damaged(&ELF)) {
        check_elf(&bytes);
    }
}
