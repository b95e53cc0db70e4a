//! Files made to hurt: each is refused in words, or accepted for what it is, and none makes the service read more than a
//! bound.

use std::cell::Cell;
use std::io::{self, Write as _};

use reqwest::StatusCode;
use reqwest::header::CONTENT_ENCODING;
use windlass_debuginfod::content::Content;
use windlass_debuginfod::elf;
use windlass_schema::BuildId;
use windlass_schema::http::{ArtefactKind, SHA256_HEADER};

use crate::server::{Server, build, sha256};

/// What checking a file may read of it, in bytes: 24 MiB of headers, its first and last bytes.
const MAX_READ: u64 = (24 << 20) + 3 * 4096;
const SIZE: u64 = 5 << 30;
const ID: [u8; 20] = [0xab; 20];

/// A file of zeros but for some pieces, of any size. It counts what is read of it.
struct Sparse {
    size: u64,
    pieces: Vec<(u64, Vec<u8>)>,
    read: Cell<u64>,
}

impl Content for Sparse {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset + buffer.len() as u64;
        if end > self.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.read.set(self.read.get() + buffer.len() as u64);
        buffer.fill(0);
        for (start, bytes) in &self.pieces {
            let piece_end = start + bytes.len() as u64;
            if *start < end && offset < piece_end {
                let (from, to) = (offset.max(*start), end.min(piece_end));
                buffer[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&bytes[(from - start) as usize..(to - start) as usize]);
            }
        }
        Ok(())
    }
}

/// `sh_type`, `sh_flags`, `sh_offset`, `sh_size`, and where its name is among [`NAMES`].
type Section = (u32, u64, u64, u64, u32);
/// `p_type`, `p_offset`, `p_vaddr`, `p_filesz`, `p_memsz`.
type Segment = (u32, u64, u64, u64, u64);

const PROGBITS: u32 = 1;
const STRTAB: u32 = 3;
const NOTE: u32 = 7;
const EXECUTABLE: u64 = 4;
const COMPRESSED: u64 = 0x800;
const LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

const NAMES: &[u8] = b"\0.text\0.zdebug_info\0.debug_info\0";
const TEXT: u32 = 1;
const ZDEBUG: u32 = 7;
const DEBUG: u32 = 20;
const NAMES_AT: u64 = 0x1000;
const CODE: Section = (PROGBITS, EXECUTABLE, 0x2000, 16, TEXT);
const NOTE_AT: u64 = 0x3000;
const FREE_AT: u64 = 0x4000;
const TABLES_AT: u64 = 0x10_0000;

/// A shared object with a section of names, these sections and segments.
fn image(sections: &[Section], segments: &[Segment]) -> Sparse {
    let mut header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x3e\0\x01\0\0\0".to_vec();
    let segments_at = TABLES_AT + 64 * (sections.len() as u64 + 2);
    header.extend([0, segments_at, TABLES_AT].map(u64::to_le_bytes).concat());
    header.extend([0; 4]);
    let counts = [64, 56, segments.len() as u16, 64, sections.len() as u16 + 2, 1];
    header.extend(counts.map(u16::to_le_bytes).concat());
    let mut tables = vec![0; 64];
    let names: Section = (STRTAB, 0, NAMES_AT, NAMES.len() as u64, 0);
    for (section_type, flags, offset, size, name) in [names].iter().chain(sections) {
        tables.extend([*name, *section_type].map(u32::to_le_bytes).concat());
        tables.extend([*flags, 0, *offset, *size, 0, 4, 0].map(u64::to_le_bytes).concat());
    }
    for (segment_type, offset, address, file_size, memory_size) in segments {
        tables.extend([*segment_type, 5].map(u32::to_le_bytes).concat());
        let longs = [*offset, *address, *address, *file_size, *memory_size, 4];
        tables.extend(longs.map(u64::to_le_bytes).concat());
    }
    let pieces = vec![(0, header), (NAMES_AT, NAMES.to_vec()), (NOTE_AT, note(&ID)), (TABLES_AT, tables)];
    Sparse { size: SIZE, pieces, read: Cell::new(0) }
}

/// A GNU build-ID note.
fn note(id: &[u8]) -> Vec<u8> {
    [[4, id.len() as u32, 3].map(u32::to_le_bytes).concat(), b"GNU\0".to_vec(), id.to_vec()].concat()
}

const ID_NOTE: Section = (NOTE, 0, NOTE_AT, 36, 0);
const ID_SEGMENT: Segment = (PT_NOTE, NOTE_AT, NOTE_AT, 36, 36);

fn with(mut image: Sparse, at: u64, bytes: &[u8]) -> Sparse {
    image.pieces.push((at, bytes.to_vec()));
    image
}

fn check(image: &Sparse) -> Result<elf::Facts, String> {
    let id = BuildId::new(&ID).expect("20 bytes");
    let checked = elf::check(image, ArtefactKind::Executable, id).map_err(|error| error.to_string());
    assert!(image.read.get() <= MAX_READ, "{} bytes read: {checked:?}", image.read.get());
    checked
}

#[test]
fn headers_that_ask_for_too_much_are_refused() {
    let compression = |size: u64| {
        [[1, 0].map(u32::to_le_bytes).concat(), [size, 1].map(u64::to_le_bytes).concat()].concat()
    };
    let gnu = |size: u64| [&b"ZLIB"[..], &size.to_be_bytes()].concat();
    let compressed: Section = (PROGBITS, COMPRESSED, FREE_AT, 64, DEBUG);
    let extended = |count: u64, segments: u32| {
        // Section 0 has the counts that do not fit: `sh_size` and `sh_info`.
        let image = with(image(&[CODE, ID_NOTE], &[]), TABLES_AT + 32, &count.to_le_bytes());
        let image = with(with(image, TABLES_AT + 44, &segments.to_le_bytes()), 60, &[0, 0]);
        if segments > 0 { with(image, 56, &[0xff, 0xff]) } else { image }
    };
    for (image, words) in [
        (extended(1 << 20, 0), "1048576 section headers, at most 131072"),
        (extended(u64::MAX, 0), "not a readable ELF file"),
        (extended(4, 1 << 24), "16777216 program headers, at most 65534"),
        (with(image(&[CODE, ID_NOTE], &[]), 40, &(SIZE - 8).to_le_bytes()), "not a readable ELF file"),
        (
            image(&[CODE, ID_NOTE], &[(LOAD, 0, 0x1000, 1, 0x2000), (LOAD, 0, 0x2fff, 1, 0x10)]),
            "the segment loaded at 0x2fff overlaps the one at 0x1000",
        ),
        (
            with(image(&[CODE, ID_NOTE, compressed], &[]), FREE_AT, &compression(1 << 42)),
            "compressed sections that claim to be 4398046511104 bytes, at most 68719476736",
        ),
        (
            with(image(&[CODE, ID_NOTE, compressed, compressed], &[]), FREE_AT, &compression(u64::MAX)),
            "claim to be 18446744073709551615 bytes",
        ),
        (
            with(image(&[CODE, ID_NOTE, (PROGBITS, 0, FREE_AT, 64, ZDEBUG)], &[]), FREE_AT, &gnu(1 << 40)),
            "claim to be 1099511627776 bytes",
        ),
    ] {
        let found = check(&image);
        assert!(found.as_ref().is_err_and(|error| error.contains(words)), "{words}: {found:?}");
    }
    // Segments that touch, and a section that grows a thousand times, are well.
    let sound =
        image(&[CODE, ID_NOTE, compressed], &[(LOAD, 0, 0x1000, 1, 0x2000), (LOAD, 0, 0x3000, 1, 0x10)]);
    assert!(check(&with(sound, FREE_AT, &compression(64_000))).expect("sound").dwarf);
}

#[test]
fn notes_are_found_in_odd_places_and_do_not_multiply() {
    let endless: Section = (NOTE, 0, FREE_AT, SIZE - FREE_AT, 0);
    for sound in [
        image(&[CODE, ID_NOTE], &[]),
        image(&[CODE], &[ID_SEGMENT]),
        image(&[CODE, ID_NOTE], &[ID_SEGMENT]),
        // Behind another note in the same section, and behind a section whose notes do not end.
        with(image(&[CODE, (NOTE, 0, FREE_AT, 96, 0)], &[]), FREE_AT + 60, &note(&ID)),
        image(&[CODE, ID_NOTE, endless], &[]),
        // A section of notes that lies outside the file.
        image(&[CODE, (NOTE, 0, SIZE, 96, 0), ID_NOTE], &[]),
    ] {
        assert!(check(&sound).expect("sound").code);
    }
    let half = image(&[CODE, (NOTE, 0, FREE_AT, 36, 0)], &[ID_SEGMENT]);
    let long = [4, u32::MAX, 3].map(u32::to_le_bytes).concat();
    for (image, words) in [
        (image(&[CODE, endless], &[]), "no GNU build-ID among the notes that are read, and 536"),
        (
            image(&[&[CODE][..], &vec![(NOTE, 0, FREE_AT, 1 << 20, 0); 60_000]].concat(), &[]),
            "no GNU build-ID among",
        ),
        (with(half, FREE_AT, &note(&[7; 20])), "two build-ID notes: 0707"),
        (with(image(&[CODE, ID_NOTE], &[]), NOTE_AT, &long), "no GNU build-ID note and its htlhash"),
        (with(image(&[CODE, ID_NOTE], &[]), NOTE_AT, &note(&[7; 20])), "the file's build-ID note is 0707"),
        (image(&[CODE], &[]), "no GNU build-ID note and its htlhash"),
    ] {
        let found = check(&image);
        assert!(found.as_ref().is_err_and(|error| error.contains(words)), "{words}: {found:?}");
    }
}

#[test]
fn names_of_sections_are_read_so_far() {
    // A table of names that is all one name, and as large as the file.
    let endless = image(&[CODE, ID_NOTE], &[]);
    let names = [0u64, 0, FREE_AT, SIZE - FREE_AT].map(u64::to_le_bytes).concat();
    let endless = with(endless, TABLES_AT + 64 + 8, &names);
    let facts =
        check(&with(endless, FREE_AT, &vec![b'n'; 1 << 19])).expect("a file with names nobody asks for");
    assert_eq!((facts.code, facts.sections.len()), (true, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn bombs_end_at_a_bound() {
    let server = Server::start_with(|config| config.max_upload_bytes = 1 << 20).await;
    let put = async |encoding: &'static str, body: Vec<u8>| {
        let url = server.url(&format!("/api/v1/buildid/{}/source/bomb", build().id));
        let request = server.client.put(url).header(SHA256_HEADER, sha256(b""));
        let response = request.header(CONTENT_ENCODING, encoding).body(body).send().await.expect("an answer");
        (response.status(), response.text().await.expect("a reason"))
    };
    let zeros = vec![0; 64 << 20];
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&zeros).expect("in memory");
    for (encoding, bomb) in [
        ("gzip", gzip.finish().expect("in memory")),
        ("zstd", zstd::encode_all(&zeros[..], 3).expect("in memory")),
    ] {
        let (status, text) = put(encoding, bomb).await;
        assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{text}");
    }
    // A frame that asks its decoder for 128 MiB before a byte of content is there.
    let mut encoder = zstd::Encoder::new(Vec::new(), 3).expect("a context");
    encoder.window_log(27).expect("within zstd's bounds");
    encoder.write_all(b"content").expect("in memory");
    let (status, text) = put("zstd", encoder.finish().expect("in memory")).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{text}");
    assert!(text.contains("too much memory"), "{text}");
}
