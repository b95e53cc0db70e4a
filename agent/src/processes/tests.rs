//! Against real processes, and a backend that only remembers.

use std::ops::Range;
use std::process::{Child, Command};

use super::*;
use crate::backend::{MappedImage, PlaceError, PlacedMapping};
use crate::choice::Choice;
use crate::perf_ring::monotonic_ns;
use crate::proc_maps::executable_mappings;
use crate::process::find;
use crate::tables::{TableOutcome, TableResult};
use windlass_schema::maps::{EXACT_ADDRESS, Location, no_table};
use windlass_schema::table_writer::{TableHeader, write_table};
use windlass_schema::{Architecture, ImageAddress, ProcessAddress, StopReason, Table, TableFile};

mod announced;
mod noted;

const MS: Duration = Duration::from_millis(1);

/// What [`Processes`] told its backend.
#[derive(Default)]
struct Told {
    generation: u32,
    set: Vec<u32>,
    processes: HashMap<u32, Vec<PlacedMapping>>,
    /// Places of tables, and which are taken.
    places: Vec<bool>,
}

impl Backend for Told {
    fn place_table(&mut self, _table: &Table<'_>) -> Result<Location, PlaceError> {
        match self.places.iter().position(|taken| !taken) {
            Some(place) => {
                self.places[place] = true;
                Ok(Location::new(place as u32, 8))
            }
            None => Err(PlaceError::Budget { used_bytes: 1, budget_bytes: 1, wanted_bytes: 1 }),
        }
    }

    fn to_remove(&self, _table: &Table<'_>, candidates: &[Location]) -> Option<usize> {
        (!candidates.is_empty()).then_some(1)
    }

    fn remove_tables(&mut self, tables: &[Location]) -> Result<(), PlaceError> {
        for table in tables {
            let named = self.processes.values().flatten().any(|placed| placed.mapping.image == *table);
            assert!(!named, "walks may still go by {table:?}");
            self.places[table.chunk() as usize] = false;
        }
        Ok(())
    }

    fn set_process(&mut self, tgid: u32, mappings: &[PlacedMapping]) -> anyhow::Result<u32> {
        self.generation += 1;
        self.set.push(tgid);
        self.processes.insert(tgid, mappings.to_vec());
        Ok(self.generation)
    }

    fn remove_process(&mut self, tgid: u32) {
        self.processes.remove(&tgid);
    }

    fn poll(&mut self, _timeout: Duration, _sink: &mut dyn FnMut(Event)) -> anyhow::Result<()> {
        Ok(())
    }

    fn lost_samples(&self) -> u64 {
        0
    }
}

/// A child that does nothing, ended when dropped.
struct Idle(Child);

impl Idle {
    fn start() -> Self {
        let child = Self(Command::new("sleep").arg("600").spawn().expect("sleep starts"));
        // Until it has its executable and its libraries.
        let names_libc = |maps: &str| maps.contains("sleep") && maps.contains("libc");
        while !std::fs::read_to_string(format!("/proc/{}/maps", child.id()))
            .is_ok_and(|maps| names_libc(&maps))
        {
            std::thread::sleep(MS);
        }
        std::thread::sleep(10 * MS);
        child
    }

    fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn processes(root: u32, now: Instant) -> Processes {
    let mut processes = Processes::new(Selection::new(Some(root), Choice::default()), now);
    // However busy the machine is.
    processes.wait_for_readings(Duration::from_secs(600));
    processes
}

fn sample(tgid: u32, generation: u32, time_ns: u64) -> Sample {
    Sample {
        time_ns,
        tgid,
        tid: tgid,
        cpu: 0,
        generation,
        comm: String::new(),
        stop: StopReason::EndOfStack,
        unsupported: None,
        user: vec![0x1000 | EXACT_ADDRESS],
        kernel: Vec::new(),
    }
}

#[test]
fn a_reading_that_hangs_holds_up_no_other_and_counts_only_if_nothing_changed() {
    let (hanging, other, now) = (Idle::start(), Idle::start(), Instant::now());
    let (mut told, mut processes) = (Told::default(), processes(std::process::id(), now));
    let held = processes.readings.hang(hanging.id());
    processes.wait_for_readings(MS);
    let read = |processes: &mut Processes, told: &mut Told, tgid: u32, now: Instant| {
        processes.want_scan(tgid, now);
        let start = Instant::now();
        while !told.processes.contains_key(&tgid) {
            assert!(start.elapsed() < Duration::from_secs(60), "{tgid} is not read");
            processes.scan_due(told, now);
        }
    };
    processes.want_scan(hanging.id(), now);
    processes.scan_due(&mut told, now);
    read(&mut processes, &mut told, other.id(), now);
    assert!(!told.processes.contains_key(&hanging.id()));
    // It is not read twice at a time.
    processes.want_scan(hanging.id(), now + 20 * MS);
    processes.scan_due(&mut told, now + 20 * MS);
    let counts = processes.reading_counts();
    assert!(counts.late >= 1 && counts.skipped == 1 && counts.waiting == 1, "{counts:?}");

    // Of what is mapped over what it finds, after it began, it says nothing.
    let tgid = hanging.id();
    let maps = std::fs::read(format!("/proc/{tgid}/maps")).expect("it is a child");
    let start = executable_mappings(&maps)[0].start;
    let mapped = |time_ns| Event::Mapped { tgid, start, length: 1, of_file: true, image: None, time_ns };
    let later_ns = monotonic_ns() + 3_600_000_000_000;
    processes.note(&mapped(later_ns), &mut told, now);
    drop(held);
    while processes.reading_counts().waiting > 0 {
        processes.scan_due(&mut told, now + 20 * MS);
    }
    assert!(!told.processes.contains_key(&tgid), "it may have another executable by now");
    assert!(processes.next_due(now + 20 * MS).is_some(), "it is read again");
    read(&mut processes, &mut told, tgid, now + 100 * MS);
    assert!(!told.processes[&tgid].is_empty());
}

#[test]
fn a_process_that_is_put_off_is_read_later_and_keeps_what_it_had() {
    let (child, now) = (Idle::start(), Instant::now());
    let (tgid, mut told, mut processes) = (child.id(), Told::default(), processes(child.id(), now));
    let scan = |processes: &mut Processes, told: &mut Told, at: Duration| {
        processes.scan_due(told, now + at);
        processes.next_due(now + at)
    };
    processes.readings.put_off(true);
    processes.want_scan(tgid, now);
    assert_eq!(scan(&mut processes, &mut told, Duration::ZERO), Some(10 * MS), "it is wanted again");
    assert_eq!(scan(&mut processes, &mut told, 10 * MS), Some(20 * MS), "ever more seldom");
    assert!(told.processes.is_empty());
    assert_eq!(processes.reading_counts().put_off, 2);
    processes.readings.put_off(false);
    assert_eq!(scan(&mut processes, &mut told, 30 * MS), None);
    assert!(!told.processes[&tgid].is_empty());
    processes.readings.put_off(true);
    processes.want_scan(tgid, now + 1000 * MS);
    scan(&mut processes, &mut told, 1000 * MS).expect("it is wanted again");
    assert!(!told.processes[&tgid].is_empty());
    // Of one that ended meanwhile nothing is wanted.
    processes.scan(tgid);
    processes.note(&Event::Exited { tgid }, &mut told, now + 1000 * MS);
    assert_eq!(scan(&mut processes, &mut told, 9000 * MS), None);
}

#[test]
fn a_mapping_over_another_withdraws_the_process_until_it_is_read() {
    let (child, now) = (Idle::start(), Instant::now());
    let tgid = child.id();
    let (mut told, mut processes) = (Told::default(), processes(tgid, now));
    processes.scan_all(&mut told);
    let placed = told.processes[&tgid].clone();
    let (first, last) = (placed[0], placed[placed.len() - 1]);
    // The pause has grown to seconds.
    for elapsed in 0..3000 {
        processes.want_scan(tgid, now + elapsed * MS);
        processes.scan_due(&mut told, now + elapsed * MS);
    }
    let now = now + 3000 * MS;
    let mapped =
        |start, length, time_ns| Event::Mapped { tgid, start, length, of_file: true, image: None, time_ns };
    assert_eq!(told.set, [tgid], "what is the same is not set again");

    // One that was there when the process was read, and one beside all others.
    processes.note(&mapped(first.start, 0x1000, 1), &mut told, now);
    processes.note(&mapped(0x1000, 0x1000, monotonic_ns()), &mut told, now);
    processes.scan_due(&mut told, now);
    assert_eq!((told.set.len(), &told.processes[&tgid]), (1, &placed));
    let (before, old) = (monotonic_ns(), told.generation);
    assert!(processes.mappings_of(&sample(tgid, old, before)).is_some());

    processes.note(&mapped(last.mapping.end - 1, 1, monotonic_ns()), &mut told, now);
    assert!(!told.processes.contains_key(&tgid), "walks stop at once");
    assert!(processes.mappings_of(&sample(tgid, old, before)).is_none());
    processes.set_again(&HashSet::new(), &mut told);
    // A child of that moment is read, too.
    let time_ns = monotonic_ns();
    processes.note(&Event::Forked { tgid: u32::MAX - 1, parent: tgid, time_ns }, &mut told, now);
    assert!(!told.processes.contains_key(&(u32::MAX - 1)));

    processes.scan_due(&mut told, now + 10 * MS);
    assert_eq!(told.processes[&tgid], placed, "read outside of the pauses");
    let now_ns = monotonic_ns();
    for (generation, time_ns, expect) in [
        (told.generation, now_ns, true),
        (old, now_ns, false),
        (0, now_ns, false),
        (told.generation, before, false),
    ] {
        let found = processes.mappings_of(&sample(tgid, generation, time_ns));
        assert_eq!(found.is_some(), expect, "{generation} {time_ns}");
    }
}

#[test]
fn a_table_that_is_placed_leaves_samples_their_mappings() {
    let (child, now) = (Idle::start(), Instant::now());
    let tgid = child.id();
    let (mut told, mut processes) = (Told::default(), processes(tgid, now));
    processes.scan_all(&mut told);
    let taken = sample(tgid, told.generation, monotonic_ns());
    let of_process = |processes: &Processes| {
        let mappings = processes.mappings_of(&taken)?.iter();
        Some(mappings.filter_map(|mapping| Some(mapping.module.id?.build_id())).collect::<HashSet<_>>())
    };
    let images = of_process(&processes).expect("the process is known");
    processes.set_again(&images, &mut told);
    assert_eq!(told.set.len(), 2);
    assert_eq!(of_process(&processes), Some(images));
    assert!(processes.mappings_of(&sample(tgid, told.generation, monotonic_ns())).is_some());
    assert!(processes.mappings_of(&sample(tgid, told.generation + 1, monotonic_ns())).is_none());
}

/// An empty table of an image.
fn table(id: BuildId) -> TableResult {
    let base = ImageAddress::new(0);
    let header = TableHeader { architecture: Architecture::X86_64, build_id: id, base, rows: 0 };
    let file = TableFile::parse(write_table(&header, &[], &[])).expect("a table that was just written");
    TableResult { id, path: "".into(), outcome: TableOutcome::Table(file) }
}

/// Asked for ahead of samples, and then by one that the first answer has not reached.
#[test]
fn a_table_that_comes_twice_is_placed_once() {
    let (child, now) = (Idle::start(), Instant::now());
    let mut told = Told { places: vec![false; 3], ..Told::default() };
    let mut processes = processes(child.id(), now);
    processes.scan_all(&mut told);
    let wishes = processes.prefetch(now);
    let id = wishes.first().expect("a program maps an image").id;
    assert_eq!(processes.place(&table(id), &mut told, now), Placement::Placed);
    let unavailable = TableResult { outcome: TableOutcome::Unavailable("late".to_owned()), ..table(id) };
    for late in [table(id), unavailable] {
        assert_eq!(processes.place(&late, &mut told, now), Placement::Postponed);
        assert_eq!(told.places, [true, false, false]);
        assert_eq!(processes.images.placed(id), Some(Location::new(0, 8)));
    }
}

#[test]
fn a_table_goes_when_no_mapping_names_it_and_comes_again_when_a_sample_wants_it() {
    let (child, now) = (Idle::start(), Instant::now());
    let tgid = child.id();
    let mut told = Told { places: vec![false], ..Told::default() };
    let mut processes = processes(tgid, now);
    processes.scan_all(&mut told);
    let images: Vec<_> = told.processes[&tgid]
        .iter()
        .filter_map(|placed| {
            let address = placed.start;
            let mapping = find(&processes.known[&tgid].mappings, ProcessAddress::new(address))?;
            Some((address, mapping.module.id?.build_id()))
        })
        .collect();
    let [(first, first_id), (second, second_id)] = images[..2] else { unreachable!("a slice of two") };
    let image_of = |told: &Told, address| {
        told.processes[&tgid]
            .iter()
            .find(|placed| placed.start == address)
            .expect("the mapping is placed")
            .mapping
            .image
    };
    let touch = |processes: &mut Processes, address, stop, now| {
        let taken = Sample { user: vec![address | EXACT_ADDRESS], stop, ..sample(tgid, 1, 1) };
        let wishes = processes.touch(&taken, now);
        wishes.into_iter().filter(|wish| wish.urgent).map(|wish| wish.id).collect::<Vec<_>>()
    };
    let place = |processes: &mut Processes, told: &mut Told, id, now| {
        let placement = processes.place(&table(id), told, now);
        processes.set_again(&HashSet::from([id]), told);
        placement
    };
    let (pending, budget) = (StopReason::TablePending, StopReason::TableBudget);
    assert_eq!(touch(&mut processes, first, pending, now), [first_id]);
    assert_eq!(place(&mut processes, &mut told, first_id, now), Placement::Placed);
    assert_eq!(image_of(&told, first), Location::new(0, 8));

    // A moment later the first is in use; when it is not, it makes room.
    let refused = |placement| matches!(placement, Placement::Unavailable(_));
    assert_eq!(touch(&mut processes, second, pending, now), [second_id]);
    assert!(refused(place(&mut processes, &mut told, second_id, now)));
    assert_eq!(image_of(&told, second), no_table::location(budget));
    assert_eq!(touch(&mut processes, second, budget, now), []);
    let now = now + IN_USE;
    assert_eq!(touch(&mut processes, second, budget, now), [second_id]);
    assert_eq!(place(&mut processes, &mut told, second_id, now), Placement::Placed);
    assert_eq!(image_of(&told, second), Location::new(0, 8));
    assert_eq!(image_of(&told, first), no_table::location(budget));
    assert_eq!([processes.take_evicted(), processes.take_evicted()], [1, 0]);

    assert_eq!(touch(&mut processes, first, budget, now), [first_id], "it is wanted at once");
    assert!(refused(place(&mut processes, &mut told, first_id, now)), "and refused: the other is in use");
    assert_eq!(touch(&mut processes, first, budget, now + IN_USE), [first_id]);
    let again = place(&mut processes, &mut told, first_id, now + IN_USE - MS);
    assert_eq!(again, Placement::Postponed, "which is said once");
    let now = now + 2 * IN_USE;
    assert_eq!(touch(&mut processes, first, budget, now), [first_id]);
    assert_eq!(place(&mut processes, &mut told, first_id, now), Placement::Placed);

    // Without the process, its table goes for any, and nothing remembers it.
    drop(child);
    let now = now + IN_USE;
    processes.expire(&mut told, now);
    processes.expire(&mut told, now + EXIT_GRACE);
    assert_eq!(place(&mut processes, &mut told, second_id, now), Placement::Placed);
    assert_eq!(processes.images.location(first_id), no_table::location(pending));
}

#[test]
fn a_sampled_process_is_read_now_and_then() {
    let (child, now) = (Idle::start(), Instant::now());
    let tgid = child.id();
    let (mut told, mut processes) = (Told::default(), processes(tgid, now));
    processes.scan_all(&mut told);
    let at = |time_ns| Event::Sample(sample(tgid, 1, time_ns));
    let read_ns = processes.known[&tgid].whole_ns;
    processes.note(&at(read_ns + REREAD_AFTER_NS), &mut told, now);
    assert_eq!(processes.next_due(now), None);
    processes.note(&at(read_ns + REREAD_AFTER_NS + 1), &mut told, now);
    processes.scan_due(&mut told, now);
    assert!(processes.known[&tgid].whole_ns > read_ns);
}

#[test]
fn generations_wrap_around() {
    let generations = Generations { first: u32::MAX, last: 2 };
    for (generation, expect) in [(u32::MAX - 1, false), (u32::MAX, true), (1, true), (2, true), (3, false)] {
        assert_eq!(generations.contain(generation), expect, "{generation}");
    }
}

#[test]
fn a_fork_older_than_what_is_known_of_its_parent_is_read() {
    let (child, now) = (Idle::start(), Instant::now());
    let (mut told, mut processes) = (Told::default(), processes(child.id(), now));
    processes.scan_all(&mut told);
    let forked = |time_ns| Event::Forked { tgid: u32::MAX - 1, parent: child.id(), time_ns };
    processes.note(&forked(monotonic_ns()), &mut told, now);
    assert_eq!(told.processes[&(u32::MAX - 1)], told.processes[&child.id()]);
    processes.note(&forked(1), &mut told, now);
    assert!(!told.processes.contains_key(&(u32::MAX - 1)), "nor has it what another one had");
}

#[test]
fn processes_whose_end_nobody_reported_are_forgotten() {
    let (child, now) = (Idle::start(), Instant::now());
    let tgid = child.id();
    let (mut told, mut processes) = (Told::default(), processes(tgid, now));
    processes.scan_all(&mut told);
    processes.want_scan(tgid, now);
    drop(child);
    processes.expire(&mut told, now + SWEEP_INTERVAL - MS);
    assert!(processes.next_due(now).is_some());
    processes.expire(&mut told, now + SWEEP_INTERVAL);
    assert!(told.processes.contains_key(&tgid), "its last samples may be on their way");
    assert_eq!(processes.next_due(now), None);
    processes.expire(&mut told, now + SWEEP_INTERVAL + EXIT_GRACE);
    assert!(told.processes.is_empty() && processes.known.is_empty());
}

#[test]
fn lost_events_are_made_up_for_within_the_schedule() {
    let (child, now) = (Idle::start(), Instant::now());
    let tgid = child.id();
    let (mut told, mut processes) = (Told::default(), processes(tgid, now));
    for _ in 0..1000 {
        processes.note(&Event::Lost { until_ns: 1 }, &mut told, now);
    }
    assert!(told.set.is_empty(), "nothing is read for each of them");
    processes.scan_due(&mut told, now);
    assert_eq!(told.set, [tgid]);
    processes.note(&Event::Lost { until_ns: 1 }, &mut told, now);
    processes.scan_due(&mut told, now + FULL_SCAN_PAUSE - MS);
    assert_eq!(processes.next_due(now), None, "a while passes before the next");
    let scan = processes.schedule.clone();
    processes.scan_due(&mut told, now + FULL_SCAN_PAUSE);
    assert_ne!(format!("{:?}", processes.schedule), format!("{scan:?}"), "it was read again");
    assert!(!processes.lost_events);
}

/// A process whose first thread has ended, while another sleeps.
struct Leaderless(u32);

impl Leaderless {
    fn start() -> Self {
        extern "C" fn sleep(_: *mut libc::c_void) -> *mut libc::c_void {
            // SAFETY: the process has nothing to leave behind.
            unsafe {
                libc::sleep(60);
                libc::_exit(0)
            }
        }
        // SAFETY: the child, whose first thread this one is, calls nothing but the C library, whose locks
        // are good after a fork.
        unsafe {
            let pid = libc::fork();
            if pid == 0 {
                let mut thread = 0;
                libc::pthread_create(&raw mut thread, std::ptr::null(), sleep, std::ptr::null_mut());
                libc::syscall(libc::SYS_exit, 0);
            }
            Self(u32::try_from(pid).expect("a process number is positive"))
        }
    }
}

impl Drop for Leaderless {
    fn drop(&mut self) {
        // SAFETY: the process is a child of this one, and is waited for nowhere else.
        unsafe {
            libc::kill(self.0 as i32, libc::SIGKILL);
            libc::waitpid(self.0 as i32, std::ptr::null_mut(), 0);
        }
    }
}

#[test]
fn a_process_goes_on_without_its_first_thread() {
    let (child, now) = (Leaderless::start(), Instant::now());
    let tgid = child.0;
    let leader_ended = || {
        let stat = std::fs::read_to_string(format!("/proc/{tgid}/stat")).expect("the process runs");
        stat[stat.rfind(')').expect("a name in parentheses")..].starts_with(") Z")
    };
    while !leader_ended() {
        assert!(now.elapsed() < Duration::from_secs(10), "the first thread did not end");
        std::thread::sleep(MS);
    }
    assert!(living_threads(tgid).count() == 1 && living_threads(tgid).all(|tid| tid != tgid));

    let (mut told, mut processes) = (Told::default(), processes(tgid, now));
    processes.scan_all(&mut told);
    let images = processes.known[&tgid].mappings.iter().filter(|mapping| mapping.module.id.is_some());
    assert!(images.count() >= 2, "the executable and libc: {:?}", processes.known[&tgid].mappings);
    processes.note(&Event::Exited { tgid }, &mut told, now);
    processes.expire(&mut told, now + EXIT_GRACE);
    processes.expire(&mut told, now + SWEEP_INTERVAL + EXIT_GRACE);
    processes.expire(&mut told, now + SWEEP_INTERVAL + 2 * EXIT_GRACE);
    assert!(told.processes.contains_key(&tgid), "it still runs");

    drop(child);
    let now = now + 3 * SWEEP_INTERVAL;
    processes.expire(&mut told, now);
    processes.expire(&mut told, now + EXIT_GRACE);
    assert!(told.processes.is_empty());
}
