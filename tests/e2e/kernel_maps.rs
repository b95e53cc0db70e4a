//! The kernel's maps over time: tables that make room for others, processes that come and go.
//!
//! What a walk reads is read back here through the kernel, and counted there: what this process believes of the maps
//! is what is under test.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use windlass_agent::backend::{Backend as _, Event, PlaceError};
use windlass_agent::choice::Choice;
use windlass_agent::chunks::{CHUNK_MAP_BYTES, ChunkSpace, OUTER_MAP_BYTES};
use windlass_agent::kernel::{ChunkMaps, Kernel, Options};
use windlass_agent::processes::Processes;
use windlass_agent::selection::Selection;
use windlass_agent_ebpf::search::record_at;
use windlass_schema::Table;
use windlass_schema::maps::{CHUNK_BYTES, Location};
use windlass_tests::skip::may_use_bpf;

use crate::chunks::{CHARGE_TOLERANCE, InChunks, PlainMaps, images};

/// Rows of the largest image that are looked up after each change.
const ROWS_EACH_TIME: usize = 200;
/// How often each image is placed.
const ROUNDS: usize = 4;
/// Processes that end at once without running another program, and as many that run one.
const SHORT_PROCESSES: usize = 200;
/// How often events are drained after the last process has ended: those newer than the start of a turn wait for the
/// next, so that they come in their order.
const TURNS_AFTER_THE_END: u32 = 3;
/// Longer than an agent remembers a process that ended, and than it waits before it looks for one.
const LATER: Duration = Duration::from_secs(60);

/// What the kernel holds.
fn read_back(maps: &ChunkMaps, space: &ChunkSpace) -> PlainMaps {
    let mut plain = PlainMaps::default();
    for number in 0..space.chunks() {
        plain.chunks.insert(number, maps.read(number).expect("a chunk in use"));
    }
    plain
}

/// Places the table, in place of the oldest ones if there is no room. Returns how many went.
fn place_with_room<'a>(
    space: &mut ChunkSpace,
    maps: &mut ChunkMaps,
    live: &mut Vec<InChunks<'a>>,
    (name, file): &'a (String, Vec<u8>),
) -> usize {
    let table = Table::parse(file).expect("a compiled table");
    let mut gone = 0;
    let placed = match space.place(&table) {
        Ok(placed) => placed,
        Err(PlaceError::Budget { .. }) => {
            let headers: Vec<Location> = live.iter().map(|image| image.placed.header).collect();
            gone = space.to_free(&table, &headers).expect("each fits without all others");
            assert!(gone > 0 && space.to_free(&table, &headers[..gone - 1]).is_none(), "{name}: {gone}");
            maps.wait_for_walks().expect("the kernel waits");
            live.drain(..gone).for_each(|image| space.free(image.placed.header));
            space.place(&table).expect("there is room now")
        }
        Err(error) => panic!("{name}: {error}"),
    };
    maps.flush(space).expect("the kernel takes it");
    live.push(InChunks { name, table, placed });
    gone
}

#[test]
fn tables_make_room_for_others_within_a_budget() {
    if !may_use_bpf("kernel_maps::tables_make_room_for_others_within_a_budget") {
        return;
    }
    let images = images();
    let largest = images.iter().map(|(_, file)| file.len()).max().expect("images");
    let all: usize = images.iter().map(|(_, file)| file.len()).sum();
    // What the largest needs alone, with a chunk for what is lost; less than all together.
    let chunks = largest as u64 / u64::from(CHUNK_BYTES) + 2;
    assert!(chunks * u64::from(CHUNK_BYTES) < all as u64, "{largest} bytes of {all}");
    let budget = OUTER_MAP_BYTES + chunks * CHUNK_MAP_BYTES;
    let (mut space, mut maps) = (ChunkSpace::new(budget), ChunkMaps::create().expect("BPF is permitted"));
    let (mut live, mut gone) = (Vec::new(), 0);
    for round in 0..ROUNDS {
        for number in 0..images.len() {
            // In another order each time, so that places are of other sizes than before.
            let image = &images[(number * (2 * round + 1) + round) % images.len()];
            if live.iter().any(|other: &InChunks<'_>| other.name == image.0) {
                continue;
            }
            gone += place_with_room(&mut space, &mut maps, &mut live, image);
            let charged = maps.memlock_bytes().expect("fdinfo");
            let used = space.used_bytes();
            assert!(charged <= used && used <= budget, "{charged} of {used} of {budget}");
            assert!(charged as f64 >= used as f64 * (1.0 - CHARGE_TOLERANCE), "{charged} of {used}");
            let plain = read_back(&maps, &space);
            for image in &live {
                let header = image.header(&plain);
                for (start, record) in
                    image.table.rows().step_by(image.table.rows().count() / ROWS_EACH_TIME + 1)
                {
                    assert_eq!(record_at(&plain, &header, start), Ok(record), "{} at {start}", image.name);
                }
            }
        }
        let plain = read_back(&maps, &space);
        let rows: u64 = live.iter().map(|image| image.check_every_row(&plain, 0)).sum();
        assert!(rows > 0, "round {round}");
    }
    assert!(gone >= images.len(), "{gone} tables made room");
    live.drain(..).for_each(|image| space.free(image.placed.header));
    assert_eq!(u64::from(space.chunks()), chunks, "no more than the budget, and all of it");
}

/// A shell that starts processes when it is told to.
struct Shell {
    child: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Shell {
    fn start() -> Self {
        let script = format!(
            "echo ready; read line; i=0; while [ $i -lt {SHORT_PROCESSES} ]; do ( : ); /bin/true; i=$((i+1)); done; \
             echo done; read line"
        );
        let mut child = Command::new("/bin/sh")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell");
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        let mut shell = Self { child, answers };
        shell.expect("ready");
        shell
    }

    fn expect(&mut self, answer: &str) {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("an answer");
        assert_eq!(line.trim(), answer);
    }

    fn go_on(&mut self) {
        self.child.stdin.as_mut().expect("piped").write_all(b"\n").expect("the shell reads");
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn short_processes_leave_the_maps_as_they_were() {
    if !may_use_bpf("kernel_maps::short_processes_leave_the_maps_as_they_were") {
        return;
    }
    let mut shell = Shell::start();
    let pid = shell.child.id();
    let mut kernel = Kernel::load(&Options::default()).expect("BPF is permitted");
    let now = Instant::now();
    let mut processes = Processes::new(Selection::new(Some(pid), Choice::default()), now);
    processes.scan_all(&mut kernel);
    assert_eq!(kernel.process_entries(), (1, 1), "the shell alone");
    // In another thread: this one drains the events.
    std::thread::scope(|scope| {
        let running = scope.spawn(|| {
            shell.go_on();
            shell.expect("done");
        });
        let (mut forked, mut lost) = (0, false);
        let mut turns_left = TURNS_AFTER_THE_END;
        while turns_left > 0 {
            turns_left -= u32::from(running.is_finished());
            let mut events = Vec::new();
            kernel.poll(Duration::from_millis(1), &mut |event| events.push(event)).expect("events");
            for event in &events {
                processes.note(event, &mut kernel, now);
                forked += usize::from(matches!(event, Event::Forked { parent, .. } if *parent == pid));
                lost |= matches!(event, Event::Lost { .. });
            }
            processes.scan_due(&mut kernel, now);
        }
        assert!(lost || forked == 2 * SHORT_PROCESSES, "{forked}");
        running.join().expect("the shell did what it was told");
    });
    let (entries, segments) = kernel.process_entries();
    // Those that ran no other program have the shell's mappings, and are remembered for a while.
    assert!(entries > SHORT_PROCESSES && segments >= entries, "{entries} {segments}");
    processes.expire(&mut kernel, now + LATER);
    processes.expire(&mut kernel, now + 2 * LATER);
    assert_eq!(kernel.process_entries(), (1, 1), "the shell alone");
    drop(shell);
    processes.expire(&mut kernel, now + 3 * LATER);
    processes.expire(&mut kernel, now + 4 * LATER);
    assert_eq!(kernel.process_entries(), (0, 0));
}
