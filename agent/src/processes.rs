//! Which processes run, and does the backend know what each of them maps?
//!
//! All processes are read once at the start. From then on events tell what happens to them (`announced`), and a process is
//! read when they do not tell all. An image's table is asked for when a sample touches the image. Agents that prepare every library of every
//! process at its first mapping spend most of it on code that no sample ever meets
//! (opentelemetry-ebpf-profiler #1009).
//!
//! # Which mappings a sample goes by
//! Addresses mean what was mapped when the stack was walked. So each list of mappings remembers under which
//! generations the backend had it and when it was read, and a sample of any other generation, or an
//! older one, gets no mapping at all. When a process maps something over what it had, its list is withdrawn
//! from the backend until it is read again. When events were lost, whose they were is not known: then no process's samples
//! get mappings until it was read again.

mod announced;
mod noted;
mod readings;
mod table_room;
mod table_wishes;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use windlass_schema::BuildId;

use crate::alarm::Alarm;
use crate::backend::{Backend, Event, Sample};
use crate::eviction::IN_USE;
use crate::images::Images;
use crate::process::{Content, ExecutableMapping, are_same, living_threads, mapping, plan};
use crate::process_reading::{Found, Made, NotRead};
use crate::scan_schedule::ScanSchedule;
use crate::selection::Selection;
use noted::{Merged, NotedMapping};
pub use readings::ReadingCounts;
use readings::{Out, Readings};
pub use table_wishes::Placement;

/// How long an ended process is remembered: its last samples are still on their way.
pub(crate) const EXIT_GRACE: Duration = Duration::from_secs(3);
/// How often known processes are looked up in `/proc`, for those whose end was not reported; a few hundred
/// microseconds on a host with a thousand processes.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// Shortest time between two readings of all processes because events were lost: events are lost when there
/// is much to do, and each reading takes some 100 microseconds a process.
const FULL_SCAN_PAUSE: Duration = Duration::from_secs(5);

/// How long a list of mappings counts without a look into `/proc`, in nanoseconds: mremap moves code and no event tells
/// (mm/mremap.c never calls `perf_event_mmap`). Two hundred sampled processes then take a thousandth of a core.
const REREAD_AFTER_NS: u64 = 60_000_000_000;

/// The processes and their images.
pub struct Processes {
    known: HashMap<u32, Process>,
    /// Those whose mappings events changed since the backend was told.
    announced: HashSet<u32>,
    images: Images,
    readings: Readings,
    schedule: ScanSchedule,
    selection: Selection,
    /// Whether events were lost since the last reading of all processes began.
    lost_events: bool,
    /// No event that is newer was lost.
    lost_until_ns: u64,
    /// How long a table makes no room after a sample that went through it.
    table_in_use: Duration,
    /// Tables that made room for others, since that was asked last.
    evicted: u64,
    last_full_scan: Option<Instant>,
    last_sweep: Instant,
}

#[derive(Clone)]
struct Process {
    mappings: Arc<[ExecutableMapping]>,
    /// Since when they are the process's: `CLOCK_MONOTONIC` in nanoseconds.
    read_ns: u64,
    /// When they were last known to be all: they were read, or it had none.
    whole_ns: u64,
    /// Under which generations the backend had them; `None` if it does not have them.
    stated: Option<Generations>,
    /// Whether they are known to be out of date.
    withdrawn: bool,
    /// Whether events announced a mapping of which they do not tell what it maps.
    lacks_some: bool,
    exited: Option<Instant>,
    /// Whether other threads went on when its first thread ended.
    leaderless: bool,
    /// Whether the tables of all its images were asked for.
    prefetched: bool,
}

/// The backend's generations from the first to the last, which may have wrapped around.
#[derive(Clone, Copy, Debug)]
struct Generations {
    first: u32,
    last: u32,
}

impl Generations {
    fn contain(self, generation: u32) -> bool {
        generation.wrapping_sub(self.first) <= self.last.wrapping_sub(self.first)
    }
}

impl Process {
    fn new(mappings: Vec<ExecutableMapping>, read_ns: u64, leaderless: bool) -> Self {
        Self {
            mappings: mappings.into(),
            read_ns,
            whole_ns: read_ns,
            stated: None,
            withdrawn: false,
            lacks_some: false,
            exited: None,
            leaderless,
            prefetched: false,
        }
    }
}

impl Processes {
    /// None yet.
    pub fn new(selection: Selection, now: Instant) -> Self {
        Self {
            known: HashMap::new(),
            announced: HashSet::new(),
            images: Images::default(),
            readings: Readings::new(),
            schedule: ScanSchedule::new(now),
            selection,
            lost_events: false,
            lost_until_ns: 0,
            table_in_use: IN_USE,
            evicted: 0,
            last_full_scan: None,
            last_sweep: now,
        }
    }

    /// Has tables make no room for others for `time` after a sample that went through them.
    pub fn keep_tables_for(&mut self, time: Duration) {
        self.table_in_use = time;
    }

    /// Has `alarm` ring when a process was read that was not waited for.
    pub(crate) fn ring(&mut self, alarm: &Alarm) {
        self.readings.ring(alarm);
    }

    /// Waits for `patience` for processes to be read.
    pub fn wait_for_readings(&mut self, patience: Duration) {
        self.readings.wait_for(patience);
    }

    /// What became of readings of processes since the start.
    pub fn reading_counts(&self) -> ReadingCounts {
        self.readings.counts()
    }

    /// Reads every process of the selection, but those with files in a file system that hangs.
    pub fn scan_all(&mut self, backend: &mut dyn Backend) {
        for tgid in running().unwrap_or_default() {
            self.scan(tgid);
        }
        while let Some((made, out)) = self.readings.wait(self.readings.start_deadline()) {
            self.take_reading(made, out.as_ref(), backend, Instant::now());
        }
        self.readings.go_on();
    }

    /// Has every process of the selection read as the schedule allows.
    fn want_all(&mut self, now: Instant) {
        if let Some(running) = running() {
            self.note_ended(&running, now);
            for tgid in running {
                self.want_scan(tgid, now);
            }
        }
    }

    /// Notes the ends of known processes that nobody reported.
    fn note_ended(&mut self, running: &HashSet<u32>, now: Instant) {
        self.schedule.retain(running);
        self.readings.retain(running);
        for (tgid, process) in &mut self.known {
            let is_running =
                running.contains(tgid) && !(process.leaderless && living_threads(*tgid).next().is_none());
            if !is_running {
                process.exited.get_or_insert(now);
            }
        }
    }

    /// Has a process of the selection read.
    fn scan(&mut self, tgid: u32) {
        if self.selection.includes(tgid) {
            self.readings.begin(tgid, self.images.files());
        }
    }

    /// Takes what was read of a process.
    fn take_reading(&mut self, made: Made, out: Option<&Out>, backend: &mut dyn Backend, now: Instant) {
        let Made { tgid, read_ns, work, found, .. } = made;
        self.schedule.worked(tgid, work, now);
        let found = match found {
            Ok(found) => found,
            Err(NotRead::PutOff) => {
                if out.is_some_and(|out| out.exited.is_none()) {
                    self.want_scan(tgid, now);
                }
                return;
            }
            Err(NotRead::Failed(error)) => {
                tracing::debug!(tgid, %error, "mappings cannot be read");
                Vec::new()
            }
        };
        let whole_before_ns = self.known.get(&tgid).map(|known| known.whole_ns);
        let left_out = found.iter().any(|(_, found)| matches!(found, Found::LeftOut));
        let before = (self.known.get(&tgid))
            .filter(|known| !known.withdrawn && known.whole_ns > self.lost_until_ns)
            .map(|known| known.mappings.clone());
        let before = before.as_deref().unwrap_or_default();
        // Whatever happened meanwhile, files that were identified need not be read again, and the work was done.
        let mappings: Vec<_> = found
            .into_iter()
            .map(|(entry, found)| mapping(&entry, found, before, &mut self.images))
            .collect();
        let Some(out) = out else { return };
        let Some(merged) = out.noted.merge(tgid, mappings, read_ns, &self.images) else {
            self.schedule.want_at_once(tgid, now);
            return;
        };
        let lacks_some = left_out || merged.lacks_some;
        // A kernel thread, or a process about to be reaped.
        if !merged.mappings.is_empty() && self.selection.includes(tgid) {
            self.state(tgid, merged, read_ns, backend);
            if let Some(process) = self.known.get_mut(&tgid) {
                process.lacks_some = lacks_some;
                // An event of the time between may be of what was left out.
                if let Some(whole_ns) = whole_before_ns.filter(|_| left_out) {
                    process.whole_ns = whole_ns;
                }
                process.exited = out.exited.or(process.exited);
            }
        }
        if out.is_wanted_again || lacks_some {
            self.want_scan(tgid, now);
        }
    }

    /// A process has these mappings, and those that no event told of at `read_ns`.
    fn state(&mut self, tgid: u32, merged: Merged, read_ns: u64, backend: &mut dyn Backend) {
        let Merged { mappings, since_ns, .. } = merged;
        // To set what is set already would only disturb the walks of the moment.
        let lost_until_ns = self.lost_until_ns;
        let same = self.known.get_mut(&tgid).filter(|known| {
            known.exited.is_none()
                && !known.withdrawn
                && known.stated.is_some()
                && are_same(&known.mappings, &mappings)
        });
        match same {
            Some(same) => {
                // What it mapped meanwhile, if events were lost, nobody knows.
                if same.whole_ns <= lost_until_ns {
                    same.read_ns = since_ns;
                }
                same.whole_ns = read_ns;
            }
            None => {
                let leaderless =
                    (self.known.get(&tgid)).is_some_and(|known| known.leaderless || known.exited.is_some());
                let process = Process { read_ns: since_ns, ..Process::new(mappings, read_ns, leaderless) };
                self.known.insert(tgid, process);
                self.set(tgid, backend);
            }
        }
    }

    fn set(&mut self, tgid: u32, backend: &mut dyn Backend) {
        let Some(process) = self.known.get_mut(&tgid) else { return };
        match backend.set_process(tgid, &plan(&process.mappings, &self.images)) {
            Ok(last) => {
                let first = process.stated.map_or(last, |stated| stated.first);
                process.stated = Some(Generations { first, last });
            }
            Err(error) => {
                // What it had may name tables whose places are about to be others'.
                process.stated = None;
                backend.remove_process(tgid);
                tracing::warn!(tgid, error = format!("{error:#}"), "mappings of the process are not set");
            }
        }
    }

    /// Takes note of what happened to a process. Samples go to [`Processes::touch`].
    pub fn note(&mut self, event: &Event, backend: &mut dyn Backend, now: Instant) {
        match event {
            Event::Sample(sample) => self.note_sample(sample, now),
            // Its sample has come already.
            Event::Audit(_) => {}
            Event::Exec { tgid, time_ns } => self.note_exec(*tgid, *time_ns, backend, now),
            Event::Mapped { tgid, start, length, of_file, image, time_ns } => {
                let range = *start..start.saturating_add(*length);
                self.readings.note_mapped(*tgid, || NotedMapping {
                    range: range.clone(),
                    of_file: *of_file,
                    image: image.clone(),
                    time_ns: *time_ns,
                });
                self.note_mapped(*tgid, range, *of_file, image.as_deref(), *time_ns, backend, now);
            }
            Event::Forked { tgid, parent, time_ns } => {
                self.note_forked(*tgid, *parent, *time_ns, backend, now);
            }
            Event::Exited { tgid } => {
                self.schedule.forget(*tgid);
                self.readings.note_exited(*tgid, now);
                if let Some(process) = self.known.get_mut(tgid) {
                    process.exited = Some(now);
                }
            }
            Event::Lost { until_ns } => {
                self.lost_events = true;
                self.lost_until_ns = self.lost_until_ns.max(*until_ns);
                self.selection.lost();
            }
        }
    }

    fn want_scan(&mut self, tgid: u32, now: Instant) {
        if self.selection.includes(tgid) {
            self.schedule.want(tgid, now);
        }
    }

    /// Tells the backend what events announced, and reads the processes that are due, but for those whose files are not to be had
    /// at once.
    pub fn scan_due(&mut self, backend: &mut dyn Backend, now: Instant) {
        self.take_readings(backend, now);
        self.set_announced(backend);
        let is_late = |last: Instant| now.duration_since(last) >= FULL_SCAN_PAUSE;
        if self.lost_events && self.last_full_scan.is_none_or(is_late) {
            self.lost_events = false;
            self.last_full_scan = Some(now);
            self.want_all(now);
        }
        for tgid in self.schedule.take_due(now) {
            self.scan(tgid);
        }
        let deadline = self.readings.deadline();
        while let Some((made, out)) = self.readings.wait(deadline) {
            self.take_reading(made, out.as_ref(), backend, now);
        }
        // Of those that came while others were waited for no alarm rings.
        self.take_readings(backend, now);
        self.readings.go_on();
    }

    /// Takes the readings that were made.
    fn take_readings(&mut self, backend: &mut dyn Backend, now: Instant) {
        while let Some((made, out)) = self.readings.take() {
            self.take_reading(made, out.as_ref(), backend, now);
        }
    }

    /// How long until the next one is due.
    pub fn next_due(&self, now: Instant) -> Option<Duration> {
        [self.schedule.next_due(now), self.readings.next_review()].into_iter().flatten().min()
    }

    /// Forgets processes that ended a while ago.
    pub fn expire(&mut self, backend: &mut dyn Backend, now: Instant) {
        if now.duration_since(self.last_sweep) >= SWEEP_INTERVAL {
            self.last_sweep = now;
            if let Some(running) = running() {
                self.note_ended(&running, now);
            }
        }
        let selection = &mut self.selection;
        if selection.review(now) {
            self.known.retain(|tgid, process| {
                // Of one that has ended nothing can be told any more.
                let stays = process.exited.is_some() || selection.includes(*tgid);
                if !stays {
                    backend.remove_process(*tgid);
                }
                stays
            });
        }
        self.known.retain(|tgid, process| {
            let mut expired = process.exited.is_some_and(|exited| now.duration_since(exited) >= EXIT_GRACE);
            // Asked now and not at the event: threads that end with their process are alive a little longer.
            if expired && living_threads(*tgid).next().is_some() {
                process.exited = None;
                process.leaderless = true;
                expired = false;
            }
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

    /// The executable mappings that a sample was walked by, if they are known and still hold.
    pub fn mappings_of(&self, sample: &Sample) -> Option<&Arc<[ExecutableMapping]>> {
        let process = self.known.get(&sample.tgid)?;
        let same = process.stated?.contain(sample.generation)
            && process.read_ns <= sample.time_ns
            && process.whole_ns > self.lost_until_ns;
        same.then_some(&process.mappings)
    }

    /// The path of an executable mapping of a process of which `is_wanted` holds.
    pub fn mapped_path(&self, tgid: u32, is_wanted: &dyn Fn(&str) -> bool) -> Option<Arc<str>> {
        let mut mappings = self.known.get(&tgid)?.mappings.iter();
        mappings.find(|mapping| is_wanted(&mapping.module.path)).map(|mapping| mapping.module.path.clone())
    }

    /// Path and reason of the mapped files that were found unreadable since the last call.
    pub fn take_unreadable(&mut self) -> Vec<(String, String)> {
        self.images.take_unreadable()
    }

    /// States the mappings of every process that maps one of these images again.
    pub fn set_again(&mut self, images: &HashSet<BuildId>, backend: &mut dyn Backend) {
        let maps_one = |process: &Process| {
            process.mappings.iter().any(|mapping| match &mapping.content {
                Content::Image { image, .. } => images.contains(&image.id.build_id()),
                Content::NoTable(_) => false,
            })
        };
        let concerned: Vec<u32> = self
            .known
            .iter()
            .filter(|(_, process)| !process.withdrawn && maps_one(process))
            .map(|(tgid, _)| *tgid)
            .collect();
        for tgid in concerned {
            self.set(tgid, backend);
        }
    }
}

/// The numbers of all processes, as `/proc` lists them.
fn running() -> Option<HashSet<u32>> {
    match std::fs::read_dir("/proc") {
        Ok(entries) => {
            Some(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
        }
        Err(error) => {
            tracing::warn!(%error, "/proc cannot be listed");
            None
        }
    }
}

#[cfg(test)]
mod tests;
