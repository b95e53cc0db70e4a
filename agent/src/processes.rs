//! Which processes run, and does the backend know what each of them maps?
//!
//! All processes are read once at the start, from then on each when something happens to it; an image's
//! table is asked for when a sample touches the image. Agents that prepare every library of every
//! process at its first mapping spend most of it on code that no sample ever meets
//! (opentelemetry-ebpf-profiler #1009).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use windlass_schema::{BuildId, StopReason, Table};

use crate::backend::{Backend, Event, PlaceError, Sample};
use crate::images::{Images, TableState};
use crate::process::{Content, ExecutableMapping, find, lookup_address, plan, read_mappings};
use crate::scan_schedule::ScanSchedule;
use crate::selection::Selection;
use crate::tables::{TableOutcome, TableRequest, TableResult};

/// How long an ended process is remembered: its last samples are still on their way.
const EXIT_GRACE: Duration = Duration::from_secs(3);

/// The processes and their images.
pub struct Processes {
    known: HashMap<u32, Process>,
    images: Images,
    schedule: ScanSchedule,
    selection: Selection,
}

struct Process {
    mappings: Arc<[ExecutableMapping]>,
    exited: Option<Instant>,
    /// Whether the tables of all its images were asked for.
    prefetched: bool,
}

/// What came of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Walks use it.
    Placed,
    /// They cannot, and why.
    Unavailable(String),
    /// The image will be asked for again.
    Postponed,
}

impl Processes {
    /// None yet.
    pub fn new(selection: Selection, now: Instant) -> Self {
        Self { known: HashMap::new(), images: Images::default(), schedule: ScanSchedule::new(now), selection }
    }

    /// Reads every process of the selection. Those that are gone are noted as ended.
    pub fn scan_all(&mut self, backend: &mut dyn Backend, now: Instant) {
        let running: HashSet<u32> = match std::fs::read_dir("/proc") {
            Ok(entries) => {
                entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
            }
            Err(error) => return tracing::warn!(%error, "/proc cannot be listed"),
        };
        for tgid in &running {
            self.scan(*tgid, backend);
        }
        for (tgid, process) in &mut self.known {
            if !running.contains(tgid) {
                process.exited.get_or_insert(now);
            }
        }
    }

    fn scan(&mut self, tgid: u32, backend: &mut dyn Backend) {
        if !self.selection.includes(tgid) {
            return;
        }
        match read_mappings(tgid, &mut self.images) {
            // A kernel thread, or a process about to be reaped.
            Ok(mappings) if mappings.is_empty() => {}
            Ok(mappings) => {
                // To set what is set already would only disturb the walks of the moment.
                let same = self.known.get(&tgid).is_some_and(|known| {
                    known.exited.is_none()
                        && plan(&known.mappings, &self.images) == plan(&mappings, &self.images)
                });
                if !same {
                    let process = Process { mappings: mappings.into(), exited: None, prefetched: false };
                    self.known.insert(tgid, process);
                    self.set(tgid, backend);
                }
            }
            Err(error) => tracing::debug!(tgid, %error, "mappings cannot be read"),
        }
    }

    fn set(&self, tgid: u32, backend: &mut dyn Backend) {
        let Some(process) = self.known.get(&tgid) else { return };
        if let Err(error) = backend.set_process(tgid, &plan(&process.mappings, &self.images)) {
            tracing::warn!(tgid, error = format!("{error:#}"), "mappings of the process are not set");
        }
    }

    /// Takes note of what happened to a process. Samples go to [`Processes::touch`].
    pub fn note(&mut self, event: &Event, backend: &mut dyn Backend, now: Instant) {
        match event {
            Event::Sample(sample) => {
                if matches!(sample.stop, StopReason::ProcessUnknown | StopReason::NoMapping) {
                    self.want_scan(sample.tgid, now);
                }
            }
            Event::Exec { tgid } => {
                if self.known.remove(tgid).is_some() {
                    backend.remove_process(*tgid);
                }
                if self.selection.includes(*tgid) {
                    self.schedule.exec(*tgid, now);
                }
            }
            Event::Mapped { tgid } => self.want_scan(*tgid, now),
            Event::Forked { tgid, parent } => {
                self.selection.forked(*tgid, *parent);
                let parent = self.known.get(parent).filter(|_| self.selection.includes(*tgid));
                if let Some(parent) = parent {
                    let child = Process {
                        mappings: parent.mappings.clone(),
                        exited: None,
                        prefetched: parent.prefetched,
                    };
                    self.known.insert(*tgid, child);
                    self.set(*tgid, backend);
                }
            }
            Event::Exited { tgid } => {
                self.schedule.forget(*tgid);
                if let Some(process) = self.known.get_mut(tgid) {
                    process.exited = Some(now);
                }
            }
            Event::Lost => self.scan_all(backend, now),
        }
    }

    fn want_scan(&mut self, tgid: u32, now: Instant) {
        if self.selection.includes(tgid) {
            self.schedule.want(tgid, now);
        }
    }

    /// Reads the processes that are due.
    pub fn scan_due(&mut self, backend: &mut dyn Backend, now: Instant) {
        for tgid in self.schedule.take_due(now) {
            self.scan(tgid, backend);
        }
    }

    /// How long until the next one is due.
    pub fn next_due(&self, now: Instant) -> Option<Duration> {
        self.schedule.next_due(now)
    }

    /// Forgets processes that ended a while ago.
    pub fn expire(&mut self, backend: &mut dyn Backend, now: Instant) {
        let selection = &mut self.selection;
        self.known.retain(|tgid, process| {
            let expired = process.exited.is_some_and(|exited| now.duration_since(exited) >= EXIT_GRACE);
            if expired {
                backend.remove_process(*tgid);
                selection.forget(*tgid);
            }
            !expired
        });
    }

    /// Whether samples of a process count.
    pub fn includes(&mut self, tgid: u32) -> bool {
        self.selection.includes(tgid)
    }

    /// The executable mappings of a process; none if it is not known.
    pub fn mappings(&self, tgid: u32) -> &[ExecutableMapping] {
        self.known.get(&tgid).map_or(&[], |process| &process.mappings)
    }

    /// Number of tables that were asked for and are not here yet.
    pub fn pending_tables(&self) -> usize {
        self.images.pending_tables()
    }

    /// The tables to ask for because of a sample: at once those of the images that it went through; and
    /// if it ended for want of one, later those of all that its process maps.
    pub fn touch(&mut self, sample: &Sample, now: Instant) -> Vec<TableRequest> {
        let Some(process) = self.known.get_mut(&sample.tgid) else { return Vec::new() };
        let images = &mut self.images;
        let mut wishes: Vec<TableRequest> = sample
            .user
            .iter()
            .filter_map(|address| find(&process.mappings, lookup_address(*address)))
            .filter_map(|mapping| wish(images, mapping, true, now))
            .collect();
        if sample.stop == StopReason::TablePending && !process.prefetched {
            process.prefetched = true;
            wishes.extend(process.mappings.iter().filter_map(|mapping| wish(images, mapping, false, now)));
        }
        wishes
    }

    /// The tables of everything that the selected processes map, to be asked for ahead of any sample;
    /// none if all processes are selected.
    pub fn prefetch(&mut self, now: Instant) -> Vec<TableRequest> {
        let mut wishes = Vec::new();
        if self.selection.is_narrow() {
            for process in self.known.values_mut().filter(|process| !process.prefetched) {
                process.prefetched = true;
                let images = &mut self.images;
                wishes
                    .extend(process.mappings.iter().filter_map(|mapping| wish(images, mapping, false, now)));
            }
        }
        wishes
    }

    /// Places a table, or notes why there is none.
    pub fn place(&mut self, result: &TableResult, backend: &mut dyn Backend, now: Instant) -> Placement {
        let unavailable =
            |reason: String| (Some(TableState::Unavailable { since: now }), Placement::Unavailable(reason));
        let (state, placement) = match &result.outcome {
            TableOutcome::ImageGone(_) => (None, Placement::Postponed),
            TableOutcome::Unavailable(reason) => unavailable(reason.clone()),
            TableOutcome::Table(bytes) => match Table::parse(bytes) {
                Err(error) => unavailable(error.to_string()),
                Ok(table) => match backend.place_table(&table) {
                    Ok(location) => (Some(TableState::Placed(location)), Placement::Placed),
                    Err(error @ PlaceError::Budget { .. }) => {
                        (Some(TableState::OverBudget), Placement::Unavailable(error.to_string()))
                    }
                    Err(error @ PlaceError::Kernel(_)) => unavailable(error.to_string()),
                },
            },
        };
        self.images.set_table(result.id, state);
        placement
    }

    /// States the mappings of every process that maps one of these images again.
    pub fn set_again(&self, images: &HashSet<BuildId>, backend: &mut dyn Backend) {
        let maps_one = |process: &Process| {
            process.mappings.iter().any(|mapping| match &mapping.content {
                Content::Image { image, .. } => images.contains(&image.id.build_id()),
                Content::NoTable(_) => false,
            })
        };
        for (tgid, process) in &self.known {
            if maps_one(process) {
                self.set(*tgid, backend);
            }
        }
    }
}

/// A request for the table of what `mapping` maps, if one is due.
fn wish(
    images: &mut Images,
    mapping: &ExecutableMapping,
    urgent: bool,
    now: Instant,
) -> Option<TableRequest> {
    let Content::Image { image, source, .. } = &mapping.content else { return None };
    let id = image.id.build_id();
    images.want_table(id, urgent, now).then(|| TableRequest {
        id,
        path: mapping.module.path.clone(),
        source: source.clone(),
        urgent,
    })
}
