//! A backend whose events are those that a test sends, and whose state the test can see.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use windlass_agent::backend::{Backend, Event, PlaceError, PlacedMapping, Sample};
use windlass_schema::maps::Location;
use windlass_schema::{BuildId, StopReason, Table};

#[derive(Default)]
struct State {
    processes: HashMap<u32, Vec<PlacedMapping>>,
    tables: Vec<BuildId>,
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
        assert!(!tables.contains(&table.build_id()), "{} is placed twice", table.build_id());
        tables.push(table.build_id());
        Ok(Location::new(0, 8 * tables.len() as u32))
    }

    fn set_process(&mut self, tgid: u32, mappings: &[PlacedMapping]) -> anyhow::Result<()> {
        assert!(mappings.is_sorted_by_key(|mapping| mapping.start));
        self.state.lock().unwrap().processes.insert(tgid, mappings.to_vec());
        Ok(())
    }

    fn remove_process(&mut self, tgid: u32) {
        self.state.lock().unwrap().processes.remove(&tgid);
    }

    fn poll(&mut self, timeout: Duration, sink: &mut dyn FnMut(Event)) -> anyhow::Result<()> {
        match self.events.recv_timeout(timeout) {
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
    pub(crate) fn send(&self, event: Event) {
        self.events.send(event).unwrap();
    }

    pub(crate) fn mappings(&self, tgid: u32) -> Vec<PlacedMapping> {
        self.state.lock().unwrap().processes.get(&tgid).cloned().unwrap_or_default()
    }

    pub(crate) fn mapping(&self, tgid: u32, address: u64) -> Option<PlacedMapping> {
        self.mappings(tgid)
            .into_iter()
            .find(|mapping| (mapping.start..mapping.mapping.end).contains(&address))
    }

    /// The image whose table lies at a location.
    pub(crate) fn placed_id(&self, location: Location) -> BuildId {
        self.state.lock().unwrap().tables[location.offset() as usize / 8 - 1]
    }
}

/// A sample of this process.
pub(crate) fn sample(tid: u32, stop: StopReason, user: &[u64]) -> Sample {
    Sample {
        time_ns: 0,
        tgid: std::process::id(),
        tid,
        cpu: 0,
        comm: "test".to_owned(),
        stop,
        user: user.to_vec(),
        kernel: Vec::new(),
    }
}
