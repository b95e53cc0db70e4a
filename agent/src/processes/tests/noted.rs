//! What is mapped while a process is being read.

use super::*;
use crate::processes::noted::{MAX_NOTED, Noted, NotedMapping};

/// When the reading began.
const READ_NS: u64 = 1_000_000;
/// Where nothing is mapped.
const FREE: u64 = 0x10_0000;
const PAGE: u64 = 0x1000;

/// Where which image is that was not read, since when that holds, and whether something is lacking; nothing if that is not known.
type Expect<'a> = Option<(&'a [(u64, usize)], u64, bool)>;

/// A process's mappings, as they are read, and its images.
struct Read {
    processes: Processes,
    mappings: Vec<ExecutableMapping>,
}

impl Read {
    fn start() -> Self {
        let (child, now) = (Idle::start(), Instant::now());
        let mut processes = processes(child.id(), now);
        processes.scan_all(&mut Told::default());
        let mappings = processes.known[&child.id()].mappings.to_vec();
        Self { processes, mappings }
    }

    /// The `number`th image that is mapped, as if it were mapped at `start`.
    fn image(&self, number: usize, start: u64, time_ns: u64) -> NotedMapping {
        let mut images = self.mappings.iter().filter(|mapping| mapping.module.path.starts_with('/'));
        let mapping = images.nth(number).expect("a program and its libraries");
        let image = MappedImage {
            build_id: mapping.module.id.map(|id| id.build_id()),
            file_offset: mapping.module.file_offset,
            backing: crate::proc_maps::backing(mapping.module.path.as_bytes()),
        };
        let range = start..start + (mapping.end - mapping.start);
        NotedMapping { range, of_file: true, image: Some(Box::new(image)), time_ns }
    }

    /// What is there by now.
    #[track_caller]
    fn check(&self, noted: Vec<NotedMapping>, expect: Expect<'_>) {
        let mut all = Noted::default();
        noted.into_iter().for_each(|mapping| all.push(mapping));
        let merged = all.merge(7, self.mappings.clone(), READ_NS, &self.processes.images);
        let path = |number: usize| match self.image(number, 0, 0).image.expect("an image").backing {
            crate::proc_maps::Backing::File { path, .. } => path.display().to_string(),
            other => panic!("{other:?}"),
        };
        let found = merged.map(|merged| {
            let is_new = |mapping: &&ExecutableMapping| mapping.start < self.mappings[0].start;
            let new: Vec<_> = merged.mappings.iter().filter(is_new).collect();
            assert!(are_same(&merged.mappings[new.len()..], &self.mappings), "what was read is there");
            let shown = new.iter().map(|mapping| (mapping.start, mapping.module.path.to_string()));
            (shown.collect::<Vec<_>>(), merged.since_ns, merged.lacks_some)
        });
        let expect = expect.map(|(new, since_ns, lacks_some)| {
            (new.iter().map(|(start, number)| (*start, path(*number))).collect(), since_ns, lacks_some)
        });
        assert_eq!(found, expect);
    }
}

fn unnamed(start: u64, end: u64, time_ns: u64) -> NotedMapping {
    NotedMapping { range: start..end, of_file: false, image: None, time_ns }
}

#[test]
fn what_is_mapped_beside_what_is_read_is_added() {
    let read = Read::start();
    let (early, late, last) = (READ_NS, READ_NS + 1, READ_NS + 2);
    read.check(vec![], Some((&[], READ_NS, false)));
    read.check(vec![read.image(0, FREE, late)], Some((&[(FREE, 0)], late, false)));
    read.check(vec![read.image(0, FREE, early)], Some((&[], READ_NS, false)));
    // What it is, nobody tells: of just-in-time compilers, and of a file.
    read.check(vec![unnamed(FREE, FREE + PAGE, late)], Some((&[], late, true)));
    let of_file = |range: Range<u64>, time_ns| NotedMapping { range, of_file: true, image: None, time_ns };
    read.check(vec![of_file(FREE..FREE + PAGE, late)], Some((&[], late, true)));
    // The same as was read, or a part of it, whichever is newer.
    let first = read.mappings[0].start;
    read.check(vec![read.image(0, first, late)], Some((&[], READ_NS, false)));

    // Events are in order: the last one holds, whatever it leaves of others.
    let (one, other) = (|time_ns| read.image(0, FREE, time_ns), |time_ns| read.image(1, FREE, time_ns));
    read.check(vec![one(late), other(last)], Some((&[(FREE, 1)], last, false)));
    read.check(vec![other(late), one(last)], Some((&[(FREE, 0)], last, false)));
    let inside = FREE + PAGE / 2..FREE + PAGE;
    read.check(vec![one(late), unnamed(inside.start, inside.end, last)], Some((&[], last, true)));
    read.check(vec![one(late), of_file(inside, last)], Some((&[], last, true)));
}

#[test]
fn a_reading_over_which_something_is_mapped_says_nothing() {
    let read = Read::start();
    let (first, late) = (&read.mappings[0], READ_NS + 1);
    let other = read.image(1, first.start, late);
    assert!(other.range.end > first.start);
    read.check(vec![other.clone()], None);
    read.check(vec![NotedMapping { time_ns: READ_NS, ..other }], Some((&[], READ_NS, false)));
    for (of_file, start, end) in [
        (false, first.start, first.end),
        (true, first.end - 1, first.end),
        (true, first.start - PAGE, first.start + 1),
    ] {
        let over = NotedMapping { of_file, ..unnamed(start, end, late) };
        read.check(vec![over], None);
    }
    read.check(vec![unnamed(first.start - PAGE, first.start, late)], Some((&[], late, true)));
}

#[test]
fn memory_without_a_name_may_take_the_place_of_such() {
    let mut read = Read::start();
    let late = READ_NS + 1;
    let place = ExecutableMapping {
        start: FREE,
        end: FREE + 2 * PAGE,
        content: Content::NoTable(StopReason::Jit),
        is_v8_code: false,
        module: crate::otlp::Module {
            start: FREE,
            limit: FREE + 2 * PAGE,
            file_offset: 0,
            path: "".into(),
            id: None,
        },
    };
    read.mappings.insert(0, place);
    read.check(vec![unnamed(FREE, FREE + PAGE, late)], Some((&[], late, true)));
    // A library there was unloaded since, or not yet loaded.
    read.check(vec![read.image(0, FREE, late)], None);
}

/// A compiler that takes memory all the time is read.
#[test]
fn what_is_noted_is_bounded() {
    let read = Read::start();
    let blocks = |count: u64, apart: u64, from_ns: u64| {
        let block = move |number| {
            let start = FREE + number * apart;
            unnamed(start, start + PAGE, from_ns + number)
        };
        (0..count).map(block).collect::<Vec<_>>()
    };
    let most = MAX_NOTED as u64;
    // One after the other, or one for another.
    read.check(blocks(3 * most, PAGE, READ_NS), Some((&[], READ_NS + 3 * most - 1, true)));
    read.check(blocks(3 * most, 0, READ_NS), Some((&[], READ_NS + 3 * most - 1, true)));
    read.check(blocks(most, 2 * PAGE, READ_NS + 1), Some((&[], READ_NS + most, true)));
    read.check(blocks(most + 1, 2 * PAGE, READ_NS + 1), None);
    // What was made before it began, was read.
    read.check(blocks(3 * most, 2 * PAGE, READ_NS - 3 * most), Some((&[], READ_NS, false)));
}
