//! How long does it take to find the rule for an address?
//!
//! Unwinders are compared by walks, in which caches and the same few functions do most of the work. Here each
//! address is drawn at random from all code of the largest image, so that every lookup starts
//! cold: it is the search that is measured, over a table that no data cache holds.

use std::convert::Infallible;

use anyhow::{Context as _, Result, ensure};
use framehop::x86_64::{CacheX86_64, UnwindRegsX86_64, UnwinderX86_64};
use framehop::{ExplicitModuleSectionInfo, FrameAddress, Module, Unwinder as _};
use gimli::{EhFrame, EhFrameHdr, LittleEndian, ParsedEhFrameHdr, UnwindContext, UnwindSection as _};
use windlass_agent::chunks::{ChunkSpace, MOST_TABLE_BYTES, empty_chunk};
use windlass_agent_ebpf::memory::Tables;
use windlass_agent_ebpf::search::{image_header, record_at};
use windlass_schema::maps::{Chunk, ImageHeader, MappingSegment, SegmentKey};
use windlass_schema::{ImageAddress, Record, Table};

use crate::best::{Best, RUNS};
use crate::measured::Measured;
use crate::sections::{Reader, Section, Sections};

/// Addresses looked up in each run.
const ADDRESSES: usize = 500_000;
/// Process address minus image address, for framehop.
const BIAS: u64 = 0x5555_0000_0000;
/// rsp of every frame that framehop unwinds, and how far above it rbp is.
const STACK: u64 = 0x7fff_0000_0000;
const FRAME_BYTES: u64 = 0x1000;

/// What the kernel's maps hold, in this process's memory.
#[derive(Default)]
struct Chunks(Vec<Option<Box<Chunk>>>);

impl Tables for Chunks {
    fn chunk(&self, number: u32) -> Option<&Chunk> {
        self.0.get(number as usize)?.as_deref()
    }

    fn segment(&self, _: SegmentKey) -> Option<&MappingSegment> {
        None
    }
}

impl Chunks {
    fn of(table: &Table<'_>) -> Result<(Self, ImageHeader)> {
        let mut space = ChunkSpace::new(MOST_TABLE_BYTES);
        let placed = space.place(table)?;
        let mut chunks = Self::default();
        let Ok(()) = space.flush(|write| {
            let number = write.number as usize;
            chunks.0.resize_with(chunks.0.len().max(number + 1), || None);
            write.apply(chunks.0[number].get_or_insert_with(empty_chunk));
            Ok::<(), Infallible>(())
        });
        let header = image_header(&chunks, placed.header).context("the placed table has no header")?;
        Ok((chunks, header))
    }
}

/// Addresses drawn from all code of an image, each byte alike: the same in every run (xorshift64).
fn addresses(sections: &Sections<'_>, table: &Table<'_>) -> Result<Vec<u64>> {
    // Ends of functions in a row of all code, laid end to end.
    let mut code = sections.code();
    code.retain(|range| table.lookup(ImageAddress::new(range.start)) != Record::NO_CFI && !range.is_empty());
    let mut total = 0;
    let ends: Vec<u64> = code
        .iter()
        .map(|range| {
            total += range.end - range.start;
            total
        })
        .collect();
    ensure!(total > 0, "no FDE covers any code");
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let draw = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let at = state % total;
        let function = ends.partition_point(|end| *end <= at);
        code[function].end - (ends[function] - at)
    };
    Ok((0..ADDRESSES).map(draw).collect())
}

/// gimli's search by `.eh_frame_hdr`.
struct GimliSearch<'a> {
    header: ParsedEhFrameHdr<Reader<'a>>,
    section: EhFrame<Reader<'a>>,
    bases: gimli::BaseAddresses,
    context: UnwindContext<usize>,
}

impl<'a> GimliSearch<'a> {
    fn new(sections: &Sections<'a>) -> Result<Self> {
        let bases = sections.bases();
        let header = EhFrameHdr::new(sections.eh_frame_hdr.data, LittleEndian).parse(&bases, 8)?;
        ensure!(header.table().is_some(), ".eh_frame_hdr has no search table");
        let section = EhFrame::new(sections.eh_frame.data, LittleEndian);
        Ok(Self { header, section, bases, context: UnwindContext::new() })
    }

    fn finds(&mut self, address: u64) -> bool {
        let (section, bases) = (&self.section, &self.bases);
        let cie_of = |section: &EhFrame<_>, bases: &gimli::BaseAddresses, offset| {
            section.cie_from_offset(bases, offset)
        };
        self.header.table().is_some_and(|table| {
            let row = table.unwind_info_for_address(section, bases, &mut self.context, address, cie_of);
            std::hint::black_box(row).is_ok()
        })
    }
}

/// framehop with one module.
struct Framehop<'a> {
    unwinder: UnwinderX86_64<&'a [u8]>,
    cache: CacheX86_64,
}

impl<'a> Framehop<'a> {
    fn new(sections: &Sections<'a>, end: u64) -> Self {
        let range = |section: Section<'_>| Some(section.range());
        let info = ExplicitModuleSectionInfo {
            text_svma: range(sections.text),
            got_svma: range(sections.got),
            eh_frame_svma: range(sections.eh_frame),
            eh_frame: Some(sections.eh_frame.data),
            eh_frame_hdr_svma: range(sections.eh_frame_hdr),
            eh_frame_hdr: Some(sections.eh_frame_hdr.data),
            ..Default::default()
        };
        let mut unwinder = UnwinderX86_64::new();
        unwinder.add_module(Module::new("image".to_owned(), BIAS..BIAS + end, BIAS, info));
        Self { unwinder, cache: CacheX86_64::new() }
    }

    fn finds(&mut self, address: u64) -> bool {
        // A return address, which most frames have: the lookup is for the byte before it.
        let Some(frame) = FrameAddress::from_return_address(BIAS + address + 1) else { return false };
        let mut registers = UnwindRegsX86_64::new(BIAS + address + 1, STACK, STACK + FRAME_BYTES);
        let mut read = |address: u64| Ok(address.wrapping_add(FRAME_BYTES));
        let caller = self.unwinder.unwind_frame(frame, &mut registers, &mut self.cache, &mut read);
        std::hint::black_box(caller).is_ok()
    }
}

/// Nanoseconds of each search, best of all runs, and how many addresses peers have an answer for.
struct Times {
    table_ns: f64,
    chunks_ns: f64,
    gimli_ns: f64,
    framehop_ns: f64,
    gimli_answers: usize,
    framehop_answers: usize,
    framehop_cached: u64,
}

fn measure(sections: &Sections<'_>, table: &Table<'_>) -> Result<Times> {
    let (chunks, header) = Chunks::of(table)?;
    let addresses = addresses(sections, table)?;
    for address in addresses.iter().map(|address| ImageAddress::new(*address)) {
        let placed = record_at(&chunks, &header, address);
        ensure!(placed == Ok(table.lookup(address)), "the chunks give another record at {address}");
    }
    let end = addresses.iter().max().map_or(0, |last| last + 2);
    let (mut gimli, mut framehop) = (GimliSearch::new(sections)?, Framehop::new(sections, end));
    let in_table = |address: u64| table.lookup(ImageAddress::new(address)).0;
    let in_chunks =
        |address: u64| record_at(&chunks, &header, ImageAddress::new(address)).map_or(0, |record| record.0);
    let [mut table_time, mut chunks_time, mut gimli_time, mut framehop_time] = [Best::new(); 4];
    let (mut gimli_answers, mut framehop_answers) = (0, 0);
    for _ in 0..RUNS {
        let all = || addresses.iter().copied();
        table_time.time(|| all().map(in_table).fold(0, u64::wrapping_add));
        chunks_time.time(|| all().map(in_chunks).fold(0, u64::wrapping_add));
        gimli_answers = gimli_time.time(|| all().filter(|address| gimli.finds(*address)).count());
        framehop_answers = framehop_time.time(|| all().filter(|address| framehop.finds(*address)).count());
    }
    let ns = |best: Best| 1e9 * best.seconds() / ADDRESSES as f64;
    Ok(Times {
        table_ns: ns(table_time),
        chunks_ns: ns(chunks_time),
        gimli_ns: ns(gimli_time),
        framehop_ns: ns(framehop_time),
        gimli_answers,
        framehop_answers,
        framehop_cached: framehop.cache.stats().hits() / RUNS as u64,
    })
}

pub(crate) fn print(largest: &Measured) -> Result<()> {
    let times = measure(&largest.image.sections(), &Table::parse(&largest.compiled.table)?)?;
    println!("### Lookup\n\n| {} | ns | / lookup in chunks | answers, % |", largest.image.name());
    println!("|---|---:|---:|---:|");
    let row = |what: &str, ns: f64, answers: usize| {
        let share = 100.0 * answers as f64 / ADDRESSES as f64;
        println!("| {what} | {ns:.0} | {:.1} | {share:.2} |", ns / times.chunks_ns);
    };
    row("in chunks, the search of the BPF program", times.chunks_ns, ADDRESSES);
    row("in the table file", times.table_ns, ADDRESSES);
    row("gimli, `.eh_frame_hdr` and `unwind_info_for_address`", times.gimli_ns, times.gimli_answers);
    row("framehop, `unwind_frame`", times.framehop_ns, times.framehop_answers);
    println!(
        "\n{ADDRESSES} addresses at random over all code, on the host, from directory to record; an address's image is known. gimli searches \
         FDEs by `.eh_frame_hdr`, parses FDE and CIE, and interprets up to the row. framehop does the same, and besides finds \
         the module, makes its rule, keeps it in its cache and steps to the caller over a stack that costs nothing to \
         read; its cache of rules had the answer for {} of the addresses. Best of {RUNS}, in turn.\n",
        times.framehop_cached,
    );
    Ok(())
}
