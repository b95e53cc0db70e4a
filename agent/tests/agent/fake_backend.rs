//! A backend whose events are those that a test sends, and whose state the test can see.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use windlass_agent::backend::{Backend, Event, PlaceError, PlacedMapping, Sample};
use windlass_schema::maps::Location;
use windlass_schema::{BuildId, StopReason, Table};

/// In a sample's time: when it is sent.
pub(crate) const NOW: u64 = u64::MAX;

/// `CLOCK_MONOTONIC` in nanoseconds.
pub(crate) fn now_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills the structure it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[derive(Default)]
struct State {
    processes: HashMap<u32, Vec<PlacedMapping>>,
    /// Their places, in order, and whether each was freed.
    tables: Vec<(BuildId, bool)>,
    generations: HashMap<u32, u32>,
    last_generation: u32,
    is_broken: bool,
}

pub(crate) struct FakeBackend {
    events: Receiver<Event>,
    state: Arc<Mutex<State>>,
}

/// What a test holds of a backend.
pub(crate) struct View {
    events: Sender<Event>,
    state: Arc<Mutex<State>>,
}

impl FakeBackend {
    pub(crate) fn new() -> (Self, View) {
        let (sender, events) = channel();
        let state = Arc::new(Mutex::new(State::default()));
        (Self { events, state: state.clone() }, View { events: sender, state })
    }
}

impl Backend for FakeBackend {
    fn place_table(&mut self, table: &Table<'_>) -> Result<Location, PlaceError> {
        let tables = &mut self.state.lock().unwrap().tables;
        let live = tables.iter().filter(|(id, freed)| *id == table.build_id() && !freed).count();
        assert!(live < 2, "{} is placed beside two others", table.build_id());
        tables.push((table.build_id(), false));
        Ok(Location::new(0, 8 * tables.len() as u32))
    }

    fn to_remove(&self, _table: &Table<'_>, _candidates: &[Location]) -> Option<usize> {
        None
    }

    fn remove_tables(&mut self, tables: &[Location]) -> Result<(), PlaceError> {
        let state = &mut *self.state.lock().unwrap();
        for table in tables {
            let named = state.processes.values().flatten().any(|placed| placed.mapping.image == *table);
            assert!(!named, "walks may still go by {table:?}");
            state.tables[place(*table)].1 = true;
        }
        Ok(())
    }

    fn set_process(&mut self, tgid: u32, mappings: &[PlacedMapping]) -> anyhow::Result<u32> {
        assert!(mappings.is_sorted_by_key(|mapping| mapping.start));
        let state = &mut *self.state.lock().unwrap();
        state.processes.insert(tgid, mappings.to_vec());
        state.last_generation += 1;
        state.generations.insert(tgid, state.last_generation);
        Ok(state.last_generation)
    }

    fn remove_process(&mut self, tgid: u32) {
        let state = &mut *self.state.lock().unwrap();
        state.processes.remove(&tgid);
        state.generations.remove(&tgid);
    }

    fn poll(&mut self, timeout: Duration, sink: &mut dyn FnMut(Event)) -> anyhow::Result<()> {
        let is_broken = self.state.lock().unwrap().is_broken;
        assert!(!is_broken, "the backend is broken");
        match self.events.recv_timeout(timeout.min(Duration::from_millis(100))) {
            Ok(event) => sink(event),
            Err(_) => std::thread::sleep(timeout.min(Duration::from_millis(5))),
        }
        self.events.try_iter().for_each(sink);
        Ok(())
    }

    fn lost_samples(&self) -> u64 {
        0
    }
}

impl View {
    /// From now on the backend panics.
    pub(crate) fn break_down(&self) {
        self.state.lock().unwrap().is_broken = true;
    }

    /// Sends an event. A sample that says [`NOW`] was walked by the mappings of this moment.
    pub(crate) fn send(&self, mut event: Event) {
        if let Event::Sample(sample) = &mut event
            && sample.time_ns == NOW
        {
            sample.time_ns = now_ns();
            sample.generation = self.generation(sample.tgid);
        }
        self.events.send(event).unwrap();
    }

    /// The generation of a process's mappings; 0 if it has none.
    pub(crate) fn generation(&self, tgid: u32) -> u32 {
        self.state.lock().unwrap().generations.get(&tgid).copied().unwrap_or_default()
    }

    pub(crate) fn mappings(&self, tgid: u32) -> Vec<PlacedMapping> {
        self.state.lock().unwrap().processes.get(&tgid).cloned().unwrap_or_default()
    }

    pub(crate) fn mapping(&self, tgid: u32, address: u64) -> Option<PlacedMapping> {
        self.mappings(tgid)
            .into_iter()
            .find(|mapping| (mapping.start..mapping.mapping.end).contains(&address))
    }

    /// How often a table of an image was placed.
    pub(crate) fn placements(&self, id: BuildId) -> usize {
        self.state.lock().unwrap().tables.iter().filter(|(placed, _)| *placed == id).count()
    }

    /// The image whose table lies at a location.
    pub(crate) fn placed_id(&self, location: Location) -> BuildId {
        let (id, freed) = self.state.lock().unwrap().tables[place(location)];
        assert!(!freed, "{id} is no longer at {location:?}");
        id
    }
}

/// The number of a place.
fn place(location: Location) -> usize {
    location.offset() as usize / 8 - 1
}

/// A sample of this process.
pub(crate) fn sample(tid: u32, stop: StopReason, user: &[u64]) -> Sample {
    Sample {
        time_ns: NOW,
        tgid: std::process::id(),
        tid,
        cpu: 0,
        generation: 0,
        comm: "test".to_owned(),
        stop,
        unsupported: None,
        user: user.to_vec(),
        kernel: Vec::new(),
    }
}
