//! Tables of real images, packed into chunks as the kernel gets them, answer as the tables themselves.
//!
//! What travels is a table file; what walks is its pieces, spread over 64 KiB values that other images
//! share. Peers check their packing by profiling something. Here each piece is found again through the
//! walk's own search, byte for byte, and each row gives the record that it gives in the file.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use windlass_agent::backend::PlaceError;
use windlass_agent::chunks::{
    CHUNK_MAP_BYTES, ChunkSpace, MOST_TABLE_BYTES, OUTER_MAP_BYTES, Placed, empty_chunk,
};
use windlass_agent::kernel_memory::charge;
use windlass_agent_ebpf::memory::Tables;
use windlass_agent_ebpf::search::{image_header, record_at};
use windlass_schema::maps::{
    CHUNK_BYTES, Chunk, DIRECTORY_SEGMENT_PAGES, GRANULE_BYTES, ImageHeader, Location, MappingSegment,
    SegmentKey,
};
use windlass_schema::page::PAGE_SHIFT;
use windlass_schema::{BuildId, ImageAddress, Table};
use windlass_tests::program::fixture;
use windlass_tests::skip::may_use_bpf;
use windlass_unwind_compiler::compile;

/// Random addresses looked up in each image.
const RANDOM_LOOKUPS: u32 = 20_000;
/// Tables that come or go, one in each step.
const STEPS: u32 = 300;
/// Most by which the computed kernel memory may differ from the measured.
pub(crate) const CHARGE_TOLERANCE: f64 = 0.01;

/// What the kernel's maps would hold, in this process's memory.
#[derive(Default)]
pub(crate) struct PlainMaps {
    pub(crate) chunks: HashMap<u32, Box<Chunk>>,
    pub(crate) segments: HashMap<SegmentKey, MappingSegment>,
}

impl Tables for PlainMaps {
    fn chunk(&self, number: u32) -> Option<&Chunk> {
        self.chunks.get(&number).map(|chunk| &**chunk)
    }

    fn segment(&self, key: SegmentKey) -> Option<&MappingSegment> {
        self.segments.get(&key)
    }
}

impl PlainMaps {
    /// Takes over what changed in `space`.
    pub(crate) fn flush(&mut self, space: &mut ChunkSpace) {
        let Ok(()) = space.flush(|write| {
            write.apply(self.chunks.entry(write.number).or_insert_with(empty_chunk));
            Ok::<(), std::convert::Infallible>(())
        });
    }
}

/// Numbers that look random and are the same in each run (xorshift64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// The table of an ELF file.
fn table_of(elf: &[u8]) -> Vec<u8> {
    // A table holds its build-ID but does not depend on it.
    let build_id = BuildId::new(&[0xab; 20]).expect("20 bytes are a build-ID");
    compile(elf, build_id).expect("an x86-64 image").table
}

/// Fixtures, the workload, and libraries of the machine: images of a few rows and of tens of thousands.
pub(crate) fn images() -> &'static [(String, Vec<u8>)] {
    static IMAGES: OnceLock<Vec<(String, Vec<u8>)>> = OnceLock::new();
    IMAGES.get_or_init(compile_images)
}

fn compile_images() -> Vec<(String, Vec<u8>)> {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let mut paths: Vec<PathBuf> = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .filter(|path| path.contains(".so"))
        .map(PathBuf::from)
        .collect();
    paths.sort();
    paths.dedup();
    let libraries = paths.first().and_then(|path| path.parent()).expect("a test uses libraries").to_owned();
    let extra = ["libstdc++.so.6", "libcrypto.so.3", "libpython3.11.so.1.0"].map(|name| libraries.join(name));
    paths.extend(extra.into_iter().chain(["/usr/bin/python3".into()]).filter(|path: &PathBuf| path.exists()));
    paths.extend(["frames", "small", "inlined", "broken-fde", "small-plain", "no-build-id"].map(fixture));
    let read =
        |path: &Path| std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut images: Vec<_> =
        paths.iter().map(|path| (path.display().to_string(), table_of(&read(path)))).collect();
    images.push(("workload".to_owned(), table_of(windlass_workload::ELF)));
    assert!(images.len() >= 9, "libc, a loader, the fixtures, the workload: {}", images.len());
    images
}

/// A table in the chunks.
pub(crate) struct InChunks<'a> {
    pub(crate) name: &'a str,
    pub(crate) table: Table<'a>,
    pub(crate) placed: Placed,
}

impl InChunks<'_> {
    pub(crate) fn header(&self, maps: &PlainMaps) -> ImageHeader {
        image_header(maps, self.placed.header).unwrap_or_else(|| panic!("{} has no header", self.name))
    }

    /// Looks the address up in the chunks and in the file.
    #[track_caller]
    fn check(&self, maps: &PlainMaps, header: &ImageHeader, address: ImageAddress) {
        let expect = self.table.lookup(address);
        assert_eq!(record_at(maps, header, address), Ok(expect), "{} at {address}", self.name);
    }

    /// Looks up every row at its first and its last address, and random addresses in and around the image.
    pub(crate) fn check_every_row(&self, maps: &PlainMaps, random_lookups: u32) -> u64 {
        let header = self.header(maps);
        let mut rows = 0;
        for (start, record) in self.table.rows() {
            assert_eq!(record_at(maps, &header, start), Ok(record), "{} at {start}", self.name);
            self.check(maps, &header, ImageAddress::new(start.get().wrapping_sub(1)));
            rows += 1;
        }
        let (base, span) = (self.table.base().get(), u64::from(self.table.page_count()) << PAGE_SHIFT);
        let mut random = Random(0x2545_f491_4f6c_dd1d ^ span);
        let around = 2 << PAGE_SHIFT;
        for _ in 0..random_lookups {
            let address = base.wrapping_sub(around / 2).wrapping_add(random.below(span + around));
            self.check(maps, &header, ImageAddress::new(address));
        }
        for address in [0, base.wrapping_sub(1), base + span, 1 << 47, u64::MAX] {
            self.check(maps, &header, ImageAddress::new(address));
        }
        rows
    }

    /// Where each of its pieces lies, with the content it must have.
    fn pieces(&self, maps: &PlainMaps) -> Vec<(Location, Vec<u8>)> {
        let header = self.header(maps);
        let table = &self.table;
        let mut pieces = vec![(header.dictionary, table.dictionary().to_vec())];
        let mut segments = vec![Vec::new(); header.directory.len()];
        for page in 0..table.page_count() {
            let segment = (page / DIRECTORY_SEGMENT_PAGES) as usize;
            let directory = header.directory[segment];
            let chunk = maps.chunk(directory.chunk()).expect("the chunk of a directory");
            let location = Location(chunk.word(directory.offset() + 4 * (page % DIRECTORY_SEGMENT_PAGES)));
            segments[segment].extend(location.0.to_le_bytes());
            match table.page(page) {
                Some(bytes) => pieces.push((location, bytes.to_vec())),
                None => assert_eq!(location, Location::NOWHERE, "{}: page {page}", self.name),
            }
        }
        pieces.extend(header.directory.into_iter().zip(segments).filter(|(_, bytes)| !bytes.is_empty()));
        let mut bytes = table.base().get().to_le_bytes().to_vec();
        bytes.extend(table.page_count().to_le_bytes());
        bytes.extend(header.dictionary.0.to_le_bytes());
        bytes.extend(header.directory.iter().flat_map(|location| location.0.to_le_bytes()));
        assert_eq!(bytes.len(), size_of::<ImageHeader>());
        pieces.push((self.placed.header, bytes));
        pieces
    }
}

/// Places `images` into `space` as far as they fit, and checks that a refusal tells the truth.
fn place<'a>(space: &mut ChunkSpace, images: &'a [(String, Vec<u8>)], budget: u64) -> Vec<InChunks<'a>> {
    let mut placed = Vec::new();
    for (name, file) in images {
        let table = Table::parse(file).expect("a compiled table");
        let before = space.used_bytes();
        match space.place(&table) {
            Ok(at) => placed.push(InChunks { name, table, placed: at }),
            Err(PlaceError::Budget { used_bytes, budget_bytes, wanted_bytes }) => {
                assert_eq!((used_bytes, budget_bytes), (before, budget), "{name}");
                assert_eq!(space.used_bytes(), before, "{name} was refused but took chunks");
                assert!(wanted_bytes > 0, "{name}");
            }
            Err(error) => panic!("{name}: {error}"),
        }
        assert!(space.used_bytes() <= budget, "{name}: {} of {budget}", space.used_bytes());
    }
    placed
}

#[test]
fn every_row_of_every_image_is_found_in_shared_chunks() {
    let images = images();
    let budget = MOST_TABLE_BYTES;
    let mut space = ChunkSpace::new(budget);
    let mut maps = PlainMaps::default();
    // Flushed after each, as the agent does: a chunk is written, filled further, and written again.
    let mut placed = Vec::new();
    for image in images {
        placed.extend(place(&mut space, std::slice::from_ref(image), budget));
        maps.flush(&mut space);
    }
    assert_eq!(placed.len(), images.len());
    let rows: u64 = placed.iter().map(|image| image.check_every_row(&maps, RANDOM_LOOKUPS)).sum();
    assert!(rows > 50_000, "{rows} rows, a libc alone has more than half of them");
    let images_of_chunk = check_layout(&maps, &space, &placed);
    assert!(images_of_chunk.values().any(|images| images.len() > 1), "no chunk is shared");
}

/// As [`check_pieces`], of tables none of which was ever freed: no chunk is empty.
fn check_layout<'a>(
    maps: &PlainMaps,
    space: &ChunkSpace,
    placed: &[InChunks<'a>],
) -> HashMap<u32, BTreeSet<&'a str>> {
    let images_of_chunk = check_pieces(maps, placed);
    assert_eq!(maps.chunks.len() as u32, space.chunks());
    let numbers = 0..maps.chunks.len() as u32;
    assert!(numbers.clone().all(|number| maps.chunk(number).is_some()), "chunks are numbered without gaps");
    assert!(numbers.clone().eq(images_of_chunk.keys().copied().collect::<BTreeSet<_>>()), "an empty chunk");
    images_of_chunk
}

/// Each piece has its content and a place of its own inside one chunk, and all are accounted for. Returns
/// the images that each chunk holds pieces of.
fn check_pieces<'a>(maps: &PlainMaps, placed: &[InChunks<'a>]) -> HashMap<u32, BTreeSet<&'a str>> {
    let mut taken = Vec::new();
    let mut images_of_chunk: HashMap<u32, BTreeSet<&str>> = HashMap::new();
    for image in placed {
        let mut sum = 0;
        for (location, bytes) in image.pieces(maps) {
            let (start, length) = (location.offset(), bytes.len() as u32);
            assert!(
                start + length <= CHUNK_BYTES,
                "{}: {location:?}, {length} bytes, crosses its chunk's end",
                image.name
            );
            let chunk = maps.chunk(location.chunk()).expect("the chunk of a piece");
            assert!(
                chunk.0[start as usize..][..length as usize] == bytes[..],
                "{}: {location:?}",
                image.name
            );
            let rounded = length.next_multiple_of(GRANULE_BYTES);
            sum += u64::from(rounded);
            images_of_chunk.entry(location.chunk()).or_default().insert(image.name);
            taken.push((location.chunk(), start, start + rounded, image.name));
        }
        assert_eq!(image.placed.bytes, sum, "{}", image.name);
    }
    // An empty piece (the dictionary of an image without rows) takes no place.
    taken.retain(|(_, start, end, _)| start < end);
    taken.sort();
    if let Some((chunk, start, ..)) = taken.first() {
        assert!(*chunk > 0 || *start >= GRANULE_BYTES, "location 0 means nowhere");
    }
    for pair in taken.windows(2) {
        assert!(pair[0].0 < pair[1].0 || pair[0].2 <= pair[1].1, "pieces overlap: {pair:?}");
    }
    images_of_chunk
}

/// For every budget from nothing to enough: what was placed stays whole and of use, whatever was refused
/// in between, and no more is taken than allowed.
#[test]
fn a_budget_too_small_costs_only_what_does_not_fit() {
    let mut images = images().to_vec();
    // Large ones among small ones, so that something still fits behind a refusal.
    images.sort_by_key(|(_, file)| file.len() % 1009);
    let all: u64 = images.iter().map(|(_, file)| file.len() as u64).sum();
    let enough = all.div_ceil(u64::from(CHUNK_BYTES)) * 2;
    let (mut refused_some, mut refused_none) = (false, false);
    for chunks in (0..12).chain((12..enough).step_by(7)).chain([enough]) {
        // Bytes that do not make a whole chunk allow nothing more.
        let budget = OUTER_MAP_BYTES + chunks * CHUNK_MAP_BYTES + CHUNK_MAP_BYTES - 1;
        let mut space = ChunkSpace::new(budget);
        let placed = place(&mut space, &images, budget);
        let mut maps = PlainMaps::default();
        maps.flush(&mut space);
        for image in &placed {
            let header = image.header(&maps);
            for (start, record) in image.table.rows().step_by(997) {
                assert_eq!(record_at(&maps, &header, start), Ok(record), "{} at {start}", image.name);
            }
        }
        check_layout(&maps, &space, &placed);
        refused_some |= !placed.is_empty() && placed.len() < images.len();
        refused_none |= placed.len() == images.len();
    }
    assert!(refused_some && refused_none, "{refused_some} {refused_none}");
}

/// Whatever comes and goes, in whatever order: what is there is whole, and lies where nothing else does.
#[test]
fn tables_that_come_and_go_leave_the_others_whole() {
    let images = images();
    let all: u64 = images.iter().map(|(_, file)| file.len() as u64).sum();
    let budget = OUTER_MAP_BYTES + (all / 2 / u64::from(CHUNK_BYTES) + 1) * CHUNK_MAP_BYTES;
    let (mut space, mut maps) = (ChunkSpace::new(budget), PlainMaps::default());
    let (mut live, mut refused): (Vec<InChunks<'_>>, u32) = (Vec::new(), 0);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..STEPS {
        let image = &images[random.below(images.len() as u64) as usize];
        match live.iter().position(|other| other.name == image.0) {
            Some(at) => space.free(live.swap_remove(at).placed.header),
            None => {
                let placed = place(&mut space, std::slice::from_ref(image), budget);
                refused += u32::from(placed.is_empty());
                live.extend(placed);
            }
        }
        maps.flush(&mut space);
        check_pieces(&maps, &live);
    }
    assert!(refused > 0 && refused < STEPS / 2, "{refused} refused");
    for image in &live {
        image.check_every_row(&maps, 0);
    }
}

/// What the agent computes where it may not make BPF maps is what the kernel charges where it may.
#[test]
fn computed_kernel_memory_is_what_the_kernel_charges() {
    if !may_use_bpf("chunks::computed_kernel_memory_is_what_the_kernel_charges") {
        return;
    }
    let images = images();
    let tables = || images.iter().map(|(_, file)| &file[..]);
    let measured = charge(tables());
    let computed = std::thread::scope(|scope| {
        let unprivileged = scope.spawn(|| {
            drop_capabilities();
            charge(tables())
        });
        unprivileged.join().expect("no panic")
    });
    assert!(measured.measured && !computed.measured, "{measured:?} {computed:?}");
    assert_eq!(measured.per_table, computed.per_table);
    let off = (measured.bytes as f64 - computed.bytes as f64).abs() / measured.bytes as f64;
    assert!(off <= CHARGE_TOLERANCE, "measured {}, computed {}", measured.bytes, computed.bytes);
}

/// Takes all capabilities from the calling thread, and from it alone.
fn drop_capabilities() {
    // struct __user_cap_header_struct: version 3, this thread; two of struct __user_cap_data_struct.
    let (header, none) = ([0x2008_0522_u32, 0], [0_u32; 6]);
    // SAFETY: both arrays have the layout and size that version 3 reads, and live during the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    assert_eq!(result, 0, "capset: {}", std::io::Error::last_os_error());
}
