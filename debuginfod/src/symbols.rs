//! The symbol index of an image, ready for lookups.
//!
//! Pyroscope fetches and checks a whole index for each query. Here an index is mapped and checked once and
//! stays open while a byte budget allows; the mapping is of a file, so under memory pressure the
//! kernel drops its pages rather than something dearer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::Mmap;
use windlass_schema::BuildId;
use windlass_schema::http::{ArtefactKind, Unresolved};
use windlass_symbol_index::{FORMAT_VERSION, Index};

use crate::blob::BlobError;
use crate::catalog::{DerivedKey, DerivedKind};
use crate::derive::{Inputs, derive};
use crate::error::ServiceError;
use crate::flight::Flights;
use crate::service::App;

/// Bytes of indexes kept open: thirty of the size of a kernel's or a large C++ program's.
const BUDGET_BYTES: u64 = 1 << 30;

/// An index and the mapping it is read from.
pub(crate) struct OpenIndex {
    // Declared before `map`, so dropped before it.
    index: Index<'static>,
    map: Mmap,
}

impl OpenIndex {
    fn new(map: Mmap) -> Result<Self, windlass_symbol_index::IndexError> {
        // SAFETY: the slice is the mapping's, whose address does not change when `map` is moved
        // and which lives as long as `index`: both are private fields of one value, and `get`
        // shortens the lifetime to that of the value.
        let bytes: &'static [u8] = unsafe { std::slice::from_raw_parts(map.as_ptr(), map.len()) };
        Ok(Self { index: Index::parse(bytes)?, map })
    }

    /// The index.
    pub(crate) fn get<'a>(&'a self) -> &'a Index<'a> {
        &self.index
    }
}

type Opened = Result<Arc<OpenIndex>, Unresolved>;

/// Open indexes, the least recently used closed first.
#[derive(Default)]
pub(crate) struct Indexes {
    flights: Flights<DerivedKey, Result<Opened, Arc<str>>>,
    open: Mutex<OpenSet>,
}

#[derive(Default)]
struct OpenSet {
    indexes: HashMap<DerivedKey, (Arc<OpenIndex>, u64)>,
    bytes: u64,
    clock: u64,
}

impl Indexes {
    fn find(&self, key: DerivedKey) -> Option<Arc<OpenIndex>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.clock += 1;
        let now = open.clock;
        open.indexes.get_mut(&key).map(|(index, used)| {
            *used = now;
            Arc::clone(index)
        })
    }

    fn keep(&self, key: DerivedKey, index: &Arc<OpenIndex>) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.clock += 1;
        let now = open.clock;
        open.bytes += index.map.len() as u64;
        if let Some((replaced, _)) = open.indexes.insert(key, (Arc::clone(index), now)) {
            open.bytes -= replaced.map.len() as u64;
        }
        while open.bytes > BUDGET_BYTES && open.indexes.len() > 1 {
            let oldest = open.indexes.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| *key);
            if let Some((closed, _)) = oldest.and_then(|key| open.indexes.remove(&key)) {
                open.bytes -= closed.map.len() as u64;
            }
        }
    }
}

/// The index made from the best that is stored of `id`, or why there is none.
pub(crate) async fn open(app: &Arc<App>, id: BuildId) -> Result<Opened, ServiceError> {
    let image = match app.sound_artefact(id, ArtefactKind::Executable).await? {
        None => app.sound_artefact(id, ArtefactKind::Skeleton).await?,
        executable => executable,
    };
    let inputs = Inputs {
        debug: app.sound_artefact(id, ArtefactKind::Debuginfo).await?,
        image,
        kallsyms: app.sound_artefact(id, ArtefactKind::Kallsyms).await?,
        perf_map: app.sound_artefact(id, ArtefactKind::PerfMap).await?,
    };
    inputs.all().into_iter().flatten().for_each(|input| app.uses.note(input));
    let Some(key) = inputs.key(DerivedKind::Symbols, FORMAT_VERSION) else {
        return Ok(Err(Unresolved::UnknownImage));
    };
    if let Some(index) = app.indexes.find(key) {
        return Ok(Ok(index));
    }
    let shared = Arc::clone(app);
    let flight = app.indexes.flights.join(key, move || async move {
        load(&shared, key, inputs).await.map_err(|error| Arc::from(error.to_string()))
    });
    match flight.await {
        Some(Ok(opened)) => Ok(opened),
        Some(Err(why)) => Err(ServiceError::Io(std::io::Error::other(why.to_string()))),
        None => Err(ServiceError::Interrupted),
    }
}

async fn load(app: &Arc<App>, key: DerivedKey, inputs: Inputs) -> Result<Opened, ServiceError> {
    let Ok(blob) = derive(app, key, inputs.clone()).await? else {
        return Ok(Err(Unresolved::BrokenDebuginfo));
    };
    let map = match app.blobs.map(blob).await {
        // The stored index went bad after it was checked: it is disposable, so make it again.
        Err(BlobError::Damaged { hash, .. }) => {
            app.mark_damaged(hash).await?;
            let Ok(blob) = derive(app, key, inputs).await? else {
                return Ok(Err(Unresolved::BrokenDebuginfo));
            };
            app.blobs.map(blob).await?
        }
        map => map?,
    };
    let opened = tokio::task::spawn_blocking(move || OpenIndex::new(map)).await?;
    let index = Arc::new(opened.map_err(|e| ServiceError::Io(std::io::Error::other(e)))?);
    app.indexes.keep(key, &index);
    Ok(Ok(index))
}
