//! Which images are there, and how far is each with its unwind table?
//!
//! An image is identified once for each file contents (device, inode, time, size), however many
//! processes map it; its table is requested once for each build-ID, however many files carry it. The
//! state of a table turns into the location that a walk finds in a mapping: the table, or the reason
//! why there is none.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use windlass_schema::maps::{Location, no_table};
use windlass_schema::{BuildId, ImageAddress, Rule, StopReason, Table};

use crate::eviction::{IN_USE, PlacedTable};
use crate::image::{Image, ImageId, identify};
use crate::mapped_file::{END_OF_32_BIT, FileKey, ImageSource, SourceError, is_own_vdso};
use crate::process_reading::identified;

/// Most files whose identity is remembered, about 10 MiB. Beyond it, all that no process maps are
/// forgotten.
pub const MAX_FILES: usize = 50_000;
/// Most vDSOs that are remembered, of 256 KiB at most: a kernel has one for each of its instruction sets, but a process may
/// write into its own copy.
const MAX_VDSOS: usize = 8;
/// At how many tables those of images that no process maps are forgotten for the first time, some 10 MiB.
const MAX_TABLES: usize = MAX_FILES;
/// How long a table that was not to be had is left alone, before a sample may ask for it again:
/// debuginfo is uploaded late, services are mended.
pub const UNAVAILABLE_RETRY: Duration = Duration::from_secs(300);

/// Most files that are named because they could not be read, in the log and in the summary.
const MAX_NAMED_UNREADABLE: usize = 1000;

/// How far an image is with its table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableState {
    /// Asked for, not yet here.
    Pending {
        /// Whether samples wait for it.
        urgent: bool,
    },
    /// In the kernel.
    Placed(Location),
    /// Not to be had.
    Unavailable {
        /// Since when.
        since: Instant,
    },
    /// It did not fit.
    OverBudget {
        /// Since when.
        since: Instant,
    },
    /// It had to go for another.
    Evicted,
}

/// An image's table, and what it is worth.
struct TableEntry {
    state: TableState,
    /// When a sample last went through the image.
    sampled: Option<Instant>,
    /// Whether it was said that there is no room for it.
    refusal_said: bool,
    /// Whether the table that is placed has rows for code without CFI that keeps frame pointers.
    has_frame_pointer_rows: bool,
}

impl TableEntry {
    fn new(state: TableState) -> Self {
        Self { state, sampled: None, refusal_said: false, has_frame_pointer_rows: false }
    }
}

/// What identifying a file came to.
pub(crate) type Identified = Result<Arc<Image>, StopReason>;

/// The files that were identified. Readings beside look here, and nobody else adds to it but [`Images`].
#[derive(Clone, Default)]
pub(crate) struct KnownFiles(Arc<Mutex<HashMap<FileKey, Identified>>>);

impl KnownFiles {
    fn lock(&self) -> MutexGuard<'_, HashMap<FileKey, Identified>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self, key: &FileKey) -> Option<Identified> {
        self.lock().get(key).cloned()
    }
}

/// All images.
#[derive(Default)]
pub struct Images {
    files: KnownFiles,
    vdsos: Vec<(Arc<[u8]>, Identified)>,
    /// The files by their GNU build-IDs, and where to read one; `None` if files of one build-ID differ.
    by_build_id: HashMap<BuildId, Option<(Weak<Image>, ImageSource)>>,
    tables: HashMap<BuildId, TableEntry>,
    /// At how many tables those of unmapped images are forgotten: twice as many as stayed, so that it is seldom done.
    full_tables: usize,
    /// Paths of the files that were named as unreadable.
    named: HashSet<String>,
    /// Path and reason of those not yet handed on.
    unreadable: Vec<(String, String)>,
}

impl Images {
    /// Takes note, and warns once for each path, of a mapped file that lack of a capability makes
    /// unreadable. Other failures are those of processes that end while they are read.
    pub fn note_unreadable(&mut self, path: &str, error: &SourceError) {
        let Some(capabilities) = error.capabilities() else {
            tracing::debug!(path, %error, "mapped file cannot be read");
            return;
        };
        if self.named.len() >= MAX_NAMED_UNREADABLE || !self.named.insert(path.to_owned()) {
            return;
        }
        tracing::warn!(
            path, %error,
            "walks stop in this file with table_unavailable: grant the agent {capabilities}, or run it as root"
        );
        if self.named.len() == MAX_NAMED_UNREADABLE {
            tracing::warn!("{MAX_NAMED_UNREADABLE} files cannot be read; further ones are not named");
        }
        self.unreadable.push((path.to_owned(), format!("{error}; it takes {capabilities}")));
    }

    /// Path and reason of the files that were found unreadable since the last call.
    pub fn take_unreadable(&mut self) -> Vec<(String, String)> {
        std::mem::take(&mut self.unreadable)
    }

    /// The files that are known by now and those that will be, for readings beside.
    pub(crate) fn files(&self) -> KnownFiles {
        self.files.clone()
    }

    /// Takes note of what identifying the file behind `source` came to. Of two readings that came to it the first counts.
    pub(crate) fn note_file(&mut self, source: &ImageSource, identified: Identified) -> Identified {
        let ImageSource::File { key, .. } = source else { return identified };
        if let Some(known) = self.files.get(key) {
            return known;
        }
        self.forget_unmapped();
        self.files.lock().insert(*key, identified.clone());
        if let Ok(image) = &identified {
            self.note_build_id(image, source);
        }
        identified
    }

    /// The image of a vDSO, or the reason that a walk through it is to stop with.
    pub(crate) fn identify_vdso(&mut self, bytes: &Arc<[u8]>) -> Identified {
        if let Some((_, identified)) = self.vdsos.iter().find(|(known, _)| known == bytes) {
            return identified.clone();
        }
        let identified = identified(&ImageSource::Memory(bytes.clone()), identify(&bytes[..]));
        // What the kernel maps into all processes stays, whatever others made of theirs before.
        if is_own_vdso(bytes) {
            self.vdsos.insert(0, (bytes.clone(), identified.clone()));
            self.vdsos.truncate(MAX_VDSOS);
        } else if self.vdsos.len() < MAX_VDSOS {
            self.vdsos.push((bytes.clone(), identified.clone()));
        }
        identified
    }

    /// Keeps the registry under its limit.
    fn forget_unmapped(&mut self) {
        let mut files = self.files.lock();
        if files.len() >= MAX_FILES {
            files.retain(|_, identified| identified.as_ref().is_ok_and(|image| Arc::strong_count(image) > 1));
            let is_alive = |(image, _): &(Weak<Image>, _)| image.strong_count() > 0;
            self.by_build_id.retain(|_, known| known.as_ref().is_some_and(is_alive));
        }
    }

    /// Keeps the tables under their limit: forgets why there is none for images that no process maps.
    fn forget_tables(&mut self) {
        if self.tables.len() < self.full_tables.max(MAX_TABLES) {
            return;
        }
        let files = self.files.lock();
        let images = files.values().chain(self.vdsos.iter().map(|(_, identified)| identified)).flatten();
        let mapped = images.filter(|image| Arc::strong_count(image) > 1);
        let mapped: HashSet<BuildId> = mapped.map(|image| image.id.build_id()).collect();
        // Of those that are placed or on their way, others know.
        self.tables.retain(|id, entry| {
            mapped.contains(id) || matches!(entry.state, TableState::Placed(_) | TableState::Pending { .. })
        });
        self.full_tables = 2 * self.tables.len();
    }

    fn note_build_id(&mut self, image: &Arc<Image>, source: &ImageSource) {
        let ImageId::Gnu(id) = image.id else { return };
        let this = || Some((Arc::downgrade(image), source.clone()));
        let known = self.by_build_id.entry(id).or_insert_with(this);
        let other = known.as_ref().and_then(|(known, _)| known.upgrade());
        match other {
            Some(other) if other != *image => *known = None,
            // The newest is there for longest.
            Some(_) => *known = this(),
            None if known.is_some() => *known = this(),
            None => {}
        }
    }

    /// Where the image of this build-ID was to be read, it is not any more.
    pub(crate) fn forget_source(&mut self, id: BuildId) {
        self.by_build_id.remove(&id);
    }

    /// The image of this build-ID and where to read it, if a process mapped it before and no other image has the same.
    pub(crate) fn known(&self, id: BuildId) -> Option<(Arc<Image>, ImageSource)> {
        let (image, source) = self.by_build_id.get(&id)?.as_ref()?;
        Some((image.upgrade()?, source.clone()))
    }

    /// The vDSO of 64-bit processes, if it is what is mapped at `range`: the kernel maps the same pages into all.
    pub(crate) fn known_vdso(&self, range: &Range<u64>) -> Option<(Arc<Image>, ImageSource)> {
        let bytes = range.end.checked_sub(range.start)?;
        let (known, identified) = self.vdsos.first().filter(|(known, _)| known.len() as u64 == bytes)?;
        if range.start < END_OF_32_BIT || !is_own_vdso(known) {
            return None;
        }
        Some((identified.clone().ok()?, ImageSource::Memory(known.clone())))
    }

    /// What the mappings of this image hold in the kernel.
    pub fn location(&self, id: BuildId) -> Location {
        match self.tables.get(&id).map(|entry| &entry.state) {
            None | Some(TableState::Pending { .. }) => no_table::location(StopReason::TablePending),
            Some(TableState::Placed(location)) => *location,
            Some(TableState::Unavailable { .. }) => no_table::location(StopReason::TableUnavailable),
            Some(TableState::OverBudget { .. } | TableState::Evicted) => {
                no_table::location(StopReason::TableBudget)
            }
        }
    }

    /// Whether the image's table is placed and has rows for code without CFI that keeps frame pointers.
    pub fn has_frame_pointer_rows(&self, id: BuildId) -> bool {
        let entry = self.tables.get(&id);
        entry
            .is_some_and(|entry| matches!(entry.state, TableState::Placed(_)) && entry.has_frame_pointer_rows)
    }

    /// Notes what the table that is placed for an image has rows for: one that was made without the image's code has none
    /// for code without CFI.
    pub(crate) fn note_rows(&mut self, id: BuildId, table: &Table<'_>) {
        let Some(entry) = self.tables.get_mut(&id) else { return };
        let files = self.files.lock();
        let images = files.values().chain(self.vdsos.iter().map(|(_, identified)| identified));
        let image = images.flatten().find(|image| image.id.build_id() == id);
        let mut ranges = image.into_iter().flat_map(|image| &image.frame_pointer_code);
        entry.has_frame_pointer_rows = ranges.all(|range| {
            let middle = range.start + (range.end - range.start) / 2;
            table.rule(ImageAddress::new(middle)) != Rule::NoCfi
        });
    }

    /// Notes a wish for the image's table, because samples touch it (`urgent`) or may. True if
    /// something is to be requested now.
    pub fn want_table(&mut self, id: BuildId, urgent: bool, now: Instant) -> bool {
        let sampled = urgent.then_some(now);
        let Some(entry) = self.tables.get_mut(&id) else {
            self.forget_tables();
            self.tables.insert(id, TableEntry { sampled, ..TableEntry::new(TableState::Pending { urgent }) });
            return true;
        };
        entry.sampled = sampled.or(entry.sampled);
        let due = urgent
            && match entry.state {
                TableState::Pending { urgent: already } => !already,
                TableState::Unavailable { since } => now.duration_since(since) >= UNAVAILABLE_RETRY,
                TableState::OverBudget { since } => now.duration_since(since) >= IN_USE,
                TableState::Evicted => true,
                TableState::Placed(_) => false,
            };
        if due {
            entry.state = TableState::Pending { urgent };
        }
        due
    }

    /// Where the table of an image is, if it is placed.
    pub(crate) fn placed(&self, id: BuildId) -> Option<Location> {
        match self.tables.get(&id)?.state {
            TableState::Placed(location) => Some(location),
            _ => None,
        }
    }

    /// The placed tables.
    pub(crate) fn placed_tables(&self) -> impl Iterator<Item = PlacedTable> {
        self.tables.iter().filter_map(|(id, entry)| match entry.state {
            TableState::Placed(location) => Some(PlacedTable { id: *id, location, sampled: entry.sampled }),
            _ => None,
        })
    }

    /// When a sample last went through the image.
    pub(crate) fn last_sampled(&self, id: BuildId) -> Option<Instant> {
        self.tables.get(&id)?.sampled
    }

    /// Notes that there is no room for a table. True at the first time: it is tried again and again.
    pub(crate) fn note_refused(&mut self, id: BuildId, now: Instant) -> bool {
        let state = TableState::OverBudget { since: now };
        let entry = self.tables.entry(id).or_insert_with(|| TableEntry::new(state.clone()));
        entry.state = state;
        !std::mem::replace(&mut entry.refusal_said, true)
    }

    /// Number of tables that were asked for and are not here yet.
    pub fn pending_tables(&self) -> usize {
        self.tables.values().filter(|entry| matches!(entry.state, TableState::Pending { .. })).count()
    }

    /// Notes what came of a request; `None` if the image was gone before it could be sent, so that
    /// the next process that maps it asks again.
    pub fn set_table(&mut self, id: BuildId, state: Option<TableState>) {
        match (state, self.tables.get_mut(&id)) {
            (Some(state), Some(entry)) => entry.state = state,
            (Some(state), None) => {
                self.tables.insert(id, TableEntry::new(state));
            }
            (None, _) => {
                self.tables.remove(&id);
            }
        }
    }
}

/// The reason to stop in a mapping whose file cannot be read.
pub(crate) fn unreadable(error: &SourceError) -> StopReason {
    match error {
        SourceError::NotRegular(_) => StopReason::Jit,
        SourceError::Open(..) | SourceError::Replaced(_) => StopReason::TableUnavailable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_requested_once_and_sooner_when_samples_wait() {
        let (mut images, now) = (Images::default(), Instant::now());
        let id = "abcd".parse().unwrap();
        assert_eq!(images.location(id), no_table::location(StopReason::TablePending));
        assert!(images.want_table(id, false, now));
        assert!(!images.want_table(id, false, now));
        assert!(images.want_table(id, true, now));
        assert!(!images.want_table(id, true, now));
        images.set_table(id, Some(TableState::Placed(Location::new(1, 8))));
        assert_eq!(images.location(id), Location::new(1, 8));
        assert!(!images.want_table(id, true, now));
    }

    #[test]
    fn tables_of_unmapped_images_are_forgotten() {
        let (mut images, now) = (Images::default(), Instant::now());
        let id = |number: usize| BuildId::new(&number.to_be_bytes()).expect("8 bytes");
        let own = std::env::current_exe().expect("this program");
        let own = std::fs::read(own).expect("this program");
        let mapped = images.identify_vdso(&own.into()).expect("an image");
        images.set_table(mapped.id.build_id(), Some(TableState::Unavailable { since: now }));
        images.set_table(id(0), Some(TableState::Placed(Location::new(1, 8))));
        for number in 1..3 * MAX_TABLES {
            images.want_table(id(number), true, now);
            images.set_table(id(number), Some(TableState::Unavailable { since: now }));
        }
        assert!(images.tables.len() <= MAX_TABLES, "{} tables", images.tables.len());
        assert!(images.tables.contains_key(&mapped.id.build_id()) && images.placed(id(0)).is_some());
    }

    #[test]
    fn vdsos_that_processes_wrote_into_are_passed_over() {
        let maps = std::fs::read("/proc/self/maps").expect("own mappings");
        let entries = crate::proc_maps::executable_mappings(&maps);
        let is_vdso = |entry: &&crate::proc_maps::MapsEntry| entry.backing == crate::proc_maps::Backing::Vdso;
        let entry = entries.iter().find(is_vdso).expect("the kernel maps it");
        let source = ImageSource::of_vdso(std::process::id(), entry).expect("own memory");
        let ImageSource::Memory(bytes) = &source else { panic!("no bytes: {source:?}") };
        let mut images = Images::default();
        for number in 0..2 * MAX_VDSOS as u8 {
            let mut other = bytes.to_vec();
            *other.last_mut().expect("it has bytes") ^= number + 1;
            let _ = images.identify_vdso(&other.into());
        }
        assert!(images.known_vdso(&(entry.start..entry.end)).is_none());
        images.identify_vdso(bytes).expect("an image");
        assert_eq!(images.vdsos.len(), MAX_VDSOS);
        let (_, known) = images.known_vdso(&(entry.start..entry.end)).expect("it was identified");
        assert!(matches!(known, ImageSource::Memory(known) if known == *bytes));
    }

    #[test]
    fn an_unreadable_file_is_named_once_with_the_capability() {
        let mut images = Images::default();
        let denied = || SourceError::Open("/x".into(), std::io::ErrorKind::PermissionDenied.into());
        images.note_unreadable("/x", &denied());
        images.note_unreadable("/x", &denied());
        images.note_unreadable(
            "/gone",
            &SourceError::Open("/gone".into(), std::io::ErrorKind::NotFound.into()),
        );
        let named = images.take_unreadable();
        assert_eq!(named.len(), 1, "{named:?}");
        assert!(named[0].0 == "/x" && named[0].1.contains("CAP_DAC_READ_SEARCH"), "{named:?}");
        for number in 0..2 * MAX_NAMED_UNREADABLE {
            images.note_unreadable(&number.to_string(), &denied());
        }
        assert_eq!(images.take_unreadable().len(), MAX_NAMED_UNREADABLE - 1);
        images.note_unreadable("/x", &denied());
        assert!(images.take_unreadable().is_empty());
    }

    #[test]
    fn a_table_without_room_comes_again_when_there_may_be_some() {
        let (mut images, now) = (Images::default(), Instant::now());
        let id = "abcd".parse().unwrap();
        let budget = no_table::location(StopReason::TableBudget);
        images.want_table(id, true, now);
        assert!(images.note_refused(id, now));
        assert_eq!(images.location(id), budget);
        assert!(!images.want_table(id, true, now), "nothing has changed since");
        assert!(!images.want_table(id, false, now + IN_USE));
        assert!(images.want_table(id, true, now + IN_USE));
        assert!(!images.note_refused(id, now), "said once");
        images.set_table(id, Some(TableState::Evicted));
        assert_eq!(images.location(id), budget);
        assert!(!images.want_table(id, false, now), "until a sample needs it");
        assert!(images.want_table(id, true, now));
    }

    #[test]
    fn an_unavailable_table_is_asked_for_again_later() {
        let (mut images, now) = (Images::default(), Instant::now());
        let id = "abcd".parse().unwrap();
        images.set_table(id, Some(TableState::Unavailable { since: now }));
        assert_eq!(images.location(id), no_table::location(StopReason::TableUnavailable));
        assert!(!images.want_table(id, true, now));
        assert!(!images.want_table(id, false, now + UNAVAILABLE_RETRY));
        assert!(images.want_table(id, true, now + UNAVAILABLE_RETRY));
        images.set_table(id, None);
        assert!(images.want_table(id, false, now));
    }
}
