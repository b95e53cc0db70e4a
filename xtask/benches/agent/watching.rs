//! An agent in this process whose samples can be seen as they come.

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use anyhow::Result;
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
        let samples = &self.samples;
        self.kernel.poll(timeout, &mut |event| {
            if let Event::Sample(sample) = &event {
                // Nobody may be watching any more.
                let _ = samples.send(sample.clone());
            }
            sink(event);
        })
    }

    fn lost_samples(&self) -> u64 {
        self.kernel.lost_samples()
    }
}

/// Starts an agent of the whole host, with its cache in `cache`.
pub(crate) fn start(service: &Service, cache: &Path, frequency_hz: u32) -> Result<(Agent, Receiver<Sample>)> {
    let (sender, receiver) = channel();
    let kernel = Kernel::load(&Options { frequency_hz, ..Options::default() })?;
    let config = Config { frequency_hz, ..Config::new(&service.url, cache) };
    let agent = Agent::start_with_backend(config, Box::new(Watching { kernel, samples: sender }))?;
    Ok((agent, receiver))
}
