//! What executable memory does a process have, and what is placed for it?
//!
//! Mapping lists are read from `/proc` ([`process_reading`](crate::process_reading)) and planned here without I/O: the plan turns each mapping into
//! what a walk needs, the address turns into what a profile shows. Peers ship process addresses with a
//! mapping each and leave the arithmetic, and the question of return addresses, to every reader; here
//! both are answered once.

use std::ops::Range;
use std::sync::Arc;

use windlass_schema::maps::{EXACT_ADDRESS, Location, Mapping, PROCESS_SEGMENTS, SEGMENT_MAPPINGS, no_table};
use windlass_schema::{FileOffset, ImageAddress, LoadBias, ProcessAddress, ReturnAddress, StopReason};

use crate::backend::{MappedImage, PlacedMapping};
use crate::image::Image;
use crate::images::{Images, unreadable};
use crate::mapped_file::{ImageSource, shown_path};
use crate::otlp::{Frame, Module};
use crate::proc_maps::{Backing, MapsEntry};
use crate::process_reading::{Found, find_mappings};
use crate::visits::Visits;

/// Most mappings that a backend takes of a process.
pub const MAX_PLACED_MAPPINGS: usize = SEGMENT_MAPPINGS * PROCESS_SEGMENTS;
/// An executable mapping.
#[derive(Clone, Debug)]
pub struct ExecutableMapping {
    /// First process address.
    pub start: u64,
    /// First process address behind it.
    pub end: u64,
    /// What is mapped.
    pub content: Content,
    /// Whether it is memory laid out as V8 lays out what it has for code.
    pub is_v8_code: bool,
    /// What profiles show of it.
    pub module: Module,
}

/// What a mapping maps.
#[derive(Clone, Debug)]
pub enum Content {
    /// A part of an image.
    Image {
        /// The image.
        image: Arc<Image>,
        /// Process address minus image address.
        bias: LoadBias,
        /// Where to read it.
        source: ImageSource,
    },
    /// Something that has no table, and why walks stop there.
    NoTable(StopReason),
}

/// Reads the executable mappings of process `pid`, sorted by start, and waits for the file systems of what it maps.
pub fn read_mappings(pid: u32, images: &mut Images) -> std::io::Result<Vec<ExecutableMapping>> {
    let found = find_mappings(pid, &images.files(), &Visits::default())?;
    Ok(found.into_iter().map(|(entry, found)| mapping(&entry, found, &[], images)).collect())
}

/// The threads of process `pid`, and the state of each: the field behind the name in `/proc/PID/task/TID/stat` (proc_pid_stat(5)).
pub(crate) fn threads(pid: u32) -> impl Iterator<Item = (u32, u8)> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads.filter_map(move |entry| {
        let tid = entry.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
        // The name is in parentheses and may hold any others.
        let name_end = stat.iter().rposition(|byte| *byte == b')')?;
        Some((tid, *stat.get(name_end + 2)?))
    })
}

/// The threads of process `pid` that have not ended: neither zombies nor dead.
pub fn living_threads(pid: u32) -> impl Iterator<Item = u32> {
    let living = threads(pid).filter(|(_, state)| !matches!(state, b'Z' | b'X' | b'x'));
    living.map(|(tid, _)| tid)
}

/// Whether two lists say the same of the same addresses.
pub fn are_same(left: &[ExecutableMapping], right: &[ExecutableMapping]) -> bool {
    left.len() == right.len() && left.iter().zip(right).all(|(left, right)| is_same(left, right))
}

/// Whether a list of mappings has this one.
pub(crate) fn is_among(mapping: &ExecutableMapping, mappings: &[ExecutableMapping]) -> bool {
    mappings.iter().any(|known| is_same(known, mapping))
}

fn is_same(left: &ExecutableMapping, right: &ExecutableMapping) -> bool {
    let content = match (&left.content, &right.content) {
        (Content::Image { bias: left, .. }, Content::Image { bias: right, .. }) => left == right,
        (Content::NoTable(left), Content::NoTable(right)) => left == right,
        _ => false,
    };
    let of = |mapping: &ExecutableMapping| (mapping.start, mapping.end, mapping.is_v8_code);
    content && of(left) == of(right) && left.module == right.module
}

/// Whether both are parts of one image where it lies once: one address means the same by either.
pub(crate) fn is_of_same_image(left: &ExecutableMapping, right: &ExecutableMapping) -> bool {
    match (&left.content, &right.content) {
        (Content::Image { image, bias, .. }, Content::Image { image: other, bias: other_bias, .. }) => {
            bias == other_bias && image.id == other.id && left.module.path == right.module.path
        }
        _ => false,
    }
}

/// The parts of a mapping of an image that are not in `range`.
pub(crate) fn outside(mapping: &ExecutableMapping, range: &Range<u64>) -> Vec<ExecutableMapping> {
    let part = |start: u64, end: u64| {
        let module = Module {
            start: mapping.module.start + (start - mapping.start),
            limit: mapping.module.limit - (mapping.end - end),
            file_offset: mapping.module.file_offset + (start - mapping.start),
            ..mapping.module.clone()
        };
        ExecutableMapping { start, end, module, ..mapping.clone() }
    };
    let before = (mapping.start, mapping.end.min(range.start));
    let behind = (mapping.start.max(range.end), mapping.end);
    [before, behind]
        .into_iter()
        .filter(|(start, end)| start < end)
        .map(|(start, end)| part(start, end))
        .collect()
}

/// Whether executable memory that now appears in `range` replaces any of `mappings`, so
/// that its addresses mean something else than before. Anonymous memory in the place of other such memory does not, and
/// just-in-time compilers change theirs all the time.
pub fn is_replaced(mappings: &[ExecutableMapping], range: &Range<u64>, of_file: bool) -> bool {
    let behind = mappings.partition_point(|mapping| mapping.start < range.end);
    let mut replaced = mappings[..behind].iter().rev().take_while(|mapping| mapping.end > range.start);
    replaced.any(|mapping| of_file || has_name(mapping))
}

/// Whether a profile shows addresses in a mapping as addresses of a file.
pub(crate) fn has_name(mapping: &ExecutableMapping) -> bool {
    matches!(mapping.content, Content::Image { .. }) || mapping.module.path.starts_with('/')
}

/// The mapping at `entry`, where a reading found `found`. What it left out is as it was `before`.
pub(crate) fn mapping(
    entry: &MapsEntry,
    found: Found,
    before: &[ExecutableMapping],
    images: &mut Images,
) -> ExecutableMapping {
    let (source, identified) = match found {
        Found::Anonymous => return without_table(entry, StopReason::Jit),
        Found::LeftOut => {
            let path = shown_path(entry);
            let is_it = |known: &&ExecutableMapping| {
                (known.start, known.end, known.module.file_offset, &known.module.path)
                    == (entry.start, entry.end, entry.file_offset, &path)
            };
            // Had another file taken its place, an event would have told.
            let known = before.iter().find(is_it).cloned();
            return known.unwrap_or_else(|| without_table(entry, StopReason::TableUnavailable));
        }
        Found::Unreadable(name, error) => {
            images.note_unreadable(name.as_deref().unwrap_or(&shown_path(entry)), &error);
            return without_table(entry, unreadable(&error));
        }
        Found::File(source, identified) => {
            let identified = images.note_file(&source, identified);
            (source, identified)
        }
        Found::Vdso(bytes) => {
            let identified = images.identify_vdso(&bytes);
            (ImageSource::Memory(bytes), identified)
        }
    };
    match identified {
        Ok(image) => {
            of_image(entry, image, source).unwrap_or_else(|| without_table(entry, StopReason::NoCfi))
        }
        Err(reason) => without_table(entry, reason),
    }
}

/// The mapping that the kernel says process `pid` made at `range`, if its image is known.
pub(crate) fn announced_mapping(
    pid: u32,
    range: &Range<u64>,
    mapped: &MappedImage,
    images: &Images,
) -> Option<ExecutableMapping> {
    let entry = MapsEntry {
        start: range.start,
        end: range.end,
        file_offset: mapped.file_offset,
        device: (0, 0),
        inode: 0,
        backing: mapped.backing.clone(),
        is_v8_code: false,
    };
    let (image, source) = match (&mapped.backing, mapped.build_id) {
        (Backing::File { path, .. }, Some(id)) => {
            let (image, source) = images.known(id)?;
            (image, source.mapped_by(pid, &entry, path))
        }
        (Backing::Vdso, _) => images.known_vdso(range)?,
        (Backing::File { .. } | Backing::Anonymous, _) => return None,
    };
    of_image(&entry, image, source)
}

fn of_image(entry: &MapsEntry, image: Arc<Image>, source: ImageSource) -> Option<ExecutableMapping> {
    let start = ProcessAddress::new(entry.start);
    let bias = image.bias(start, FileOffset::new(entry.file_offset), entry.end - entry.start)?;
    Some(ExecutableMapping {
        start: entry.start,
        end: entry.end,
        module: Module {
            start: start.to_image(bias).get(),
            limit: ProcessAddress::new(entry.end).to_image(bias).get(),
            file_offset: entry.file_offset,
            path: shown_path(entry),
            id: Some(image.id),
        },
        content: Content::Image { image, bias, source },
        is_v8_code: false,
    })
}

fn without_table(entry: &MapsEntry, reason: StopReason) -> ExecutableMapping {
    ExecutableMapping {
        start: entry.start,
        end: entry.end,
        content: Content::NoTable(reason),
        is_v8_code: entry.is_v8_code,
        module: Module {
            start: entry.start,
            limit: entry.end,
            file_offset: entry.file_offset,
            path: shown_path(entry),
            id: None,
        },
    }
}

/// What a backend is told of `mappings`, with the tables there are now. Of more than it takes, the
/// images stay.
pub fn plan(mappings: &[ExecutableMapping], images: &Images) -> Vec<PlacedMapping> {
    let is_image = |mapping: &&ExecutableMapping| matches!(mapping.content, Content::Image { .. });
    let spare = MAX_PLACED_MAPPINGS.saturating_sub(mappings.iter().filter(is_image).count());
    let mut others = 0;
    // A compiler whose functions keep frame pointers in the image makes such at run time, V8: what is laid out as its
    // memory is its own, and the rest may be another's.
    let keeps_frame_pointers = mappings.iter().any(|mapping| match &mapping.content {
        Content::Image { image, .. } => !image.frame_pointer_code.is_empty(),
        Content::NoTable(_) => false,
    });
    let mut placed: Vec<_> = mappings
        .iter()
        .filter(|mapping| {
            is_image(mapping) || {
                others += 1;
                others <= spare
            }
        })
        .flat_map(|mapping| match &mapping.content {
            Content::Image { image, bias, .. } => {
                let id = image.id.build_id();
                parts(mapping, image, *bias, images.location(id), images.has_frame_pointer_rows(id))
            }
            Content::NoTable(StopReason::Jit) if keeps_frame_pointers => {
                let of_any = no_table::ANY_JIT_FRAME_POINTERS;
                let location = if mapping.is_v8_code { no_table::JIT_FRAME_POINTERS } else { of_any };
                vec![part(mapping.start, mapping.end, 0, location)]
            }
            Content::NoTable(reason) => {
                vec![part(mapping.start, mapping.end, 0, no_table::location(*reason))]
            }
        })
        .collect();
    placed.truncate(MAX_PLACED_MAPPINGS);
    placed
}

fn part(start: u64, end: u64, bias: u64, image: Location) -> PlacedMapping {
    PlacedMapping { start, mapping: Mapping { end, bias, image, generation: 0 } }
}

/// The mapping of an image whose table is at `location`; what of it keeps frame pointers and has no CFI apart, unless
/// the table has rows for that.
fn parts(
    mapping: &ExecutableMapping,
    image: &Image,
    bias: LoadBias,
    location: Location,
    has_rows: bool,
) -> Vec<PlacedMapping> {
    let (mut parts, mut at) = (Vec::new(), mapping.start);
    let to_process = |address: u64| ImageAddress::new(address).to_process(bias).get();
    for range in image.frame_pointer_code.iter().filter(|_| !has_rows) {
        let (start, end) = (to_process(range.start).max(at), to_process(range.end).min(mapping.end));
        if start < end {
            parts.extend((at < start).then(|| part(at, start, bias.get(), location)));
            parts.push(part(start, end, bias.get(), no_table::FRAME_POINTERS));
            at = end;
        }
    }
    parts.extend((at < mapping.end).then(|| part(at, mapping.end, bias.get(), location)));
    parts
}

/// The mapping that holds a process address.
pub fn find(mappings: &[ExecutableMapping], address: ProcessAddress) -> Option<&ExecutableMapping> {
    let behind = mappings.partition_point(|mapping| mapping.start <= address.get());
    let mapping = &mappings[behind.checked_sub(1)?];
    (address.get() < mapping.end).then_some(mapping)
}

/// The mappings that one stack meets. It meets few, most of them again and again.
pub struct Met<'a> {
    mappings: &'a [ExecutableMapping],
    met: Vec<&'a ExecutableMapping>,
}

impl<'a> Met<'a> {
    /// Of `mappings`, none so far.
    pub fn new(mappings: &'a [ExecutableMapping]) -> Self {
        Self { mappings, met: Vec::new() }
    }

    /// The mapping that holds a process address.
    pub fn find(&mut self, address: ProcessAddress) -> Option<&'a ExecutableMapping> {
        let holds = |mapping: &&&ExecutableMapping| (mapping.start..mapping.end).contains(&address.get());
        if let Some(mapping) = self.met.iter().find(holds) {
            return Some(mapping);
        }
        let mapping = find(self.mappings, address)?;
        self.met.push(mapping);
        Some(mapping)
    }

    /// Those that were found, each once.
    pub fn all(&self) -> &[&'a ExecutableMapping] {
        &self.met
    }
}

/// The process address to look up for a user address of a sample: itself if exact, else inside the
/// call before it.
pub fn lookup_address(sampled: u64) -> ProcessAddress {
    if sampled & EXACT_ADDRESS != 0 {
        ProcessAddress::new(sampled & !EXACT_ADDRESS)
    } else {
        ReturnAddress::new(sampled).lookup_address()
    }
}

/// Whether this is memory that a just-in-time compiler may have filled. Some map it twice, through a file in memory.
pub fn is_made_code(mapping: &ExecutableMapping) -> bool {
    match mapping.content {
        Content::Image { .. } => false,
        Content::NoTable(_) => !has_name(mapping) || mapping.module.path.starts_with("/memfd:"),
    }
}

/// What a profile shows for a process address, and the mapping that holds it, if any.
pub fn frame(mapping: Option<&ExecutableMapping>, address: ProcessAddress) -> Frame<'_> {
    match mapping {
        Some(ExecutableMapping { content: Content::Image { bias, .. }, module, .. }) => {
            Frame { module: Some(module), address: address.to_image(*bias).get(), reading: None }
        }
        Some(mapping) if has_name(mapping) => {
            Frame { module: Some(&mapping.module), address: address.get(), reading: None }
        }
        _ => Frame { module: None, address: address.get(), reading: None },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::TableState;

    /// Memory of no file.
    const ANONYMOUS: MapsEntry = MapsEntry {
        start: 0x1000,
        end: 0x2000,
        file_offset: 0,
        device: (0, 0),
        inode: 0,
        backing: Backing::Anonymous,
        is_v8_code: false,
    };

    #[test]
    fn own_process() {
        let mut images = Images::default();
        let mappings = read_mappings(std::process::id(), &mut images).unwrap();
        let here = ProcessAddress::new(own_process as *const () as u64);
        let mapping = find(&mappings, here).expect("this function is mapped");
        let Content::Image { image, bias, .. } = &mapping.content else {
            panic!("no image: {mapping:?}");
        };
        let id = image.id.build_id();
        // The symbol table says the same image address.
        let exe = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let elf = object::File::parse(&exe[..]).unwrap();
        use object::{Object as _, ObjectSymbol as _};
        let symbol = elf
            .symbols()
            .find(|symbol| symbol.address() == here.to_image(*bias).get() && symbol.size() > 0)
            .expect("a symbol at the image address");
        assert!(symbol.name().unwrap().contains("own_process"), "{symbol:?}");
        let shown = frame(find(&mappings, here), here);
        assert_eq!(shown.address, symbol.address());
        assert_eq!(shown.module.unwrap().id, Some(image.id));

        let placed = |images: &Images| {
            let plan = plan(&mappings, images);
            assert!(plan.is_sorted_by_key(|mapping| mapping.start));
            plan.into_iter().find(|placed| placed.start == mapping.start).unwrap().mapping
        };
        assert_eq!(placed(&images).image, no_table::location(StopReason::TablePending));
        images.set_table(id, Some(TableState::Placed(Location::new(2, 16))));
        assert_eq!(placed(&images).image, Location::new(2, 16));
        assert_eq!(placed(&images).bias, bias.get());
    }

    #[test]
    fn addresses_outside_of_mappings() {
        let mappings = [without_table(&ANONYMOUS, StopReason::Jit)];
        for (address, inside) in [(0, false), (0xfff, false), (0x1000, true), (0x1fff, true), (0x2000, false)]
        {
            assert_eq!(find(&mappings, ProcessAddress::new(address)).is_some(), inside, "{address:#x}");
            assert_eq!(
                frame(find(&mappings, ProcessAddress::new(address)), ProcessAddress::new(address)),
                Frame { module: None, address, reading: None }
            );
        }
        assert!(find(&[], ProcessAddress::new(0x1000)).is_none());
    }

    #[test]
    fn what_replaces_a_mapping() {
        let mapping = |start: u64, path: &str| {
            let entry = MapsEntry { start, end: start + 0x1000, ..ANONYMOUS };
            let mut mapping = without_table(&entry, StopReason::Jit);
            mapping.module.path = path.into();
            mapping
        };
        let mappings = [mapping(0x1000, "/a"), mapping(0x3000, ""), mapping(0x5000, "/b")];
        assert!(
            is_replaced(&mappings, &(0x3800..0x3801), true),
            "code of a file in the place of a compiler's"
        );
        assert!(!is_replaced(&mappings, &(0x4000..0x5000), true));
        for (start, length, replaces) in [
            (0, 0x1000, false),
            (0, 0x1001, true),
            (0x1fff, 1, true),
            (0x2000, 0x1000, false),
            (0x2000, 0x3000, false),
            (0x2000, 0x3001, true),
            (0x3000, 0x1000, false),
            (0x6000, 0x1000, false),
            (0, u64::MAX, true),
            (0x5800, u64::MAX, true),
        ] {
            assert_eq!(
                is_replaced(&mappings, &(start..start.saturating_add(length)), false),
                replaces,
                "{start:#x} {length:#x}"
            );
        }
        assert!(are_same(&mappings, &mappings.clone()));
        let mut others = mappings.clone();
        others[2] = mapping(0x5000, "/c");
        assert!(!are_same(&mappings, &others), "another file at the same address");
        assert!(!are_same(&mappings, &mappings[..2]));
    }

    /// Process addresses and what is placed for them, of mappings of this process's own program.
    #[test]
    fn code_with_frame_pointers_is_placed_apart() {
        let mut images = Images::default();
        let own = read_mappings(std::process::id(), &mut images).unwrap();
        let mapping = own.iter().find(|mapping| matches!(mapping.content, Content::Image { .. })).unwrap();
        let Content::Image { image, bias, source } = &mapping.content else { unreachable!() };
        let address = |process| ProcessAddress::new(process).to_image(*bias).get();
        let (start, end) = (mapping.start, mapping.end);
        let pending = no_table::location(StopReason::TablePending);
        let (apart, jit_apart) = (no_table::FRAME_POINTERS, no_table::ANY_JIT_FRAME_POINTERS);
        for (ranges, of_jit, expect) in [
            (vec![], no_table::location(StopReason::Jit), vec![(start, end, pending)]),
            (
                vec![(start + 16, end - 16)],
                jit_apart,
                vec![(start, start + 16, pending), (start + 16, end - 16, apart), (end - 16, end, pending)],
            ),
            (
                vec![(start - 16, start + 16)],
                jit_apart,
                vec![(start, start + 16, apart), (start + 16, end, pending)],
            ),
            (vec![(start, end + 16)], jit_apart, vec![(start, end, apart)]),
            (vec![(end, end + 16)], jit_apart, vec![(start, end, pending)]),
        ] {
            let frame_pointer_code =
                ranges.iter().map(|(start, end)| address(*start)..address(*end)).collect();
            let mut image = (**image).clone();
            image.frame_pointer_code = frame_pointer_code;
            let content = Content::Image { image: Arc::new(image), bias: *bias, source: source.clone() };
            let mapping = ExecutableMapping { content, ..mapping.clone() };
            let anonymous = without_table(&ANONYMOUS, StopReason::Jit);
            let v8_code = MapsEntry { is_v8_code: true, ..ANONYMOUS };
            let of_v8 = plan(&[without_table(&v8_code, StopReason::Jit), mapping.clone()], &images);
            let of_known = if of_jit == jit_apart { no_table::JIT_FRAME_POINTERS } else { of_jit };
            assert_eq!(of_v8[0].mapping.image, of_known, "{ranges:x?}");
            let plan = plan(&[anonymous, mapping], &images);
            let placed: Vec<_> =
                plan.iter().map(|placed| (placed.start, placed.mapping.end, placed.mapping.image)).collect();
            assert_eq!(placed[0], (0x1000, 0x2000, of_jit), "{ranges:x?}");
            assert_eq!(placed[1..], expect, "{ranges:x?}");
            assert!(plan[1..].iter().all(|placed| placed.mapping.bias == bias.get()));
        }
        // Not where the table has rows for it.
        let mut image = (**image).clone();
        image.frame_pointer_code.clear();
        image.frame_pointer_code.push(address(start + 16)..address(end - 16));
        let whole = |has_rows| parts(mapping, &image, *bias, Location::new(2, 16), has_rows).len();
        assert_eq!((whole(false), whole(true)), (3, 1));
    }

    #[test]
    fn images_stay_when_there_are_too_many_mappings() {
        let mut images = Images::default();
        let own = read_mappings(std::process::id(), &mut images).unwrap();
        let image = own.iter().find(|mapping| matches!(mapping.content, Content::Image { .. })).unwrap();
        let entry = |number: u64| MapsEntry {
            start: number << 12,
            end: (number + 1) << 12,
            file_offset: 0,
            device: (0, 0),
            inode: 0,
            backing: Backing::Anonymous,
            is_v8_code: false,
        };
        let mut mappings: Vec<_> =
            (1..3000).map(|number| without_table(&entry(number), StopReason::Jit)).collect();
        mappings.push(image.clone());
        let plan = plan(&mappings, &images);
        assert_eq!(plan.len(), MAX_PLACED_MAPPINGS);
        assert_eq!(plan.last().unwrap().start, image.start);
    }

    #[test]
    fn return_addresses_are_looked_up_inside_the_call() {
        assert_eq!(lookup_address(0x1005), ProcessAddress::new(0x1004));
        assert_eq!(lookup_address(0x1005 | EXACT_ADDRESS), ProcessAddress::new(0x1005));
    }
}
