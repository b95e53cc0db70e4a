//! An agent in this process whose samples can be seen as they come.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Result;
use windlass_agent::alarm::Alarm;
use windlass_agent::backend::{Backend, Event, PlaceError, PlacedMapping, Sample};
use windlass_agent::kernel::{Kernel, Options};
use windlass_agent::{Agent, Config};
use windlass_schema::Table;
use windlass_schema::maps::Location;

use crate::installed::Service;

/// The kernel's samples, a copy of each handed on.
struct Watching {
    kernel: Kernel,
    samples: Sender<Sample>,
    turns: Arc<Turns>,
    polled: Option<Instant>,
}

/// How the agent's loop turns.
#[derive(Default)]
pub(crate) struct Turns {
    longest_work_us: AtomicU64,
    wants_entries: AtomicBool,
    entries: AtomicUsize,
}

impl Turns {
    /// The longest time so far from one wait for events to the next.
    pub(crate) fn longest_work(&self) -> Duration {
        Duration::from_micros(self.longest_work_us.load(Ordering::Relaxed))
    }

    /// Entries of the kernel's maps of processes, some time after this call.
    pub(crate) fn entries(&self, within: Duration) -> usize {
        self.wants_entries.store(true, Ordering::Release);
        std::thread::sleep(within);
        self.entries.load(Ordering::Acquire)
    }
}

impl Backend for Watching {
    fn place_table(&mut self, table: &Table<'_>) -> Result<Location, PlaceError> {
        self.kernel.place_table(table)
    }

    fn to_remove(&self, table: &Table<'_>, candidates: &[Location]) -> Option<usize> {
        self.kernel.to_remove(table, candidates)
    }

    fn remove_tables(&mut self, tables: &[Location]) -> Result<(), PlaceError> {
        self.kernel.remove_tables(tables)
    }

    fn set_process(&mut self, tgid: u32, mappings: &[PlacedMapping]) -> Result<u32> {
        self.kernel.set_process(tgid, mappings)
    }

    fn remove_process(&mut self, tgid: u32) {
        self.kernel.remove_process(tgid);
    }

    fn poll(&mut self, timeout: Duration, sink: &mut dyn FnMut(Event)) -> Result<()> {
        if let Some(polled) = self.polled {
            let work_us = u64::try_from(polled.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.turns.longest_work_us.fetch_max(work_us, Ordering::Relaxed);
        }
        if self.turns.wants_entries.swap(false, Ordering::Acquire) {
            let (processes, segments) = self.kernel.process_entries();
            self.turns.entries.store(processes + segments, Ordering::Release);
        }
        let samples = &self.samples;
        let outcome = self.kernel.poll(timeout, &mut |event| {
            if let Event::Sample(sample) = &event {
                // Nobody may be watching any more.
                let _ = samples.send(sample.clone());
            }
            sink(event);
        });
        self.polled = Some(Instant::now());
        outcome
    }

    fn heed(&mut self, alarm: &Alarm) {
        self.kernel.heed(alarm);
    }

    fn lost_samples(&self) -> u64 {
        self.kernel.lost_samples()
    }
}

/// Starts an agent of the whole host, with its cache in `cache`.
pub(crate) fn start(service: &Service, cache: &Path, frequency_hz: u32) -> Result<(Agent, Receiver<Sample>)> {
    let (agent, samples, _) = start_with_turns(service, cache, frequency_hz)?;
    Ok((agent, samples))
}

/// The same, with how its loop turns.
pub(crate) fn start_with_turns(
    service: &Service,
    cache: &Path,
    frequency_hz: u32,
) -> Result<(Agent, Receiver<Sample>, Arc<Turns>)> {
    let ((sender, receiver), turns) = (channel(), Arc::<Turns>::default());
    let kernel = Kernel::load(&Options { frequency_hz, ..Options::default() })?;
    let config = Config { frequency_hz, ..Config::new(&service.url, cache) };
    let watching = Watching { kernel, samples: sender, turns: turns.clone(), polled: None };
    let agent = Agent::start_with_backend(config, Box::new(watching))?;
    Ok((agent, receiver, turns))
}
