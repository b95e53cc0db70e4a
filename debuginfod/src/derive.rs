//! Derived artefacts: made once from what is stored, thrown away without regret.
//!
//! Parca and symbolicator key what they derive by build-ID alone and need expiry times to see better
//! debuginfo arrive. Here the key includes a hash over the inputs, so a better upload changes the key and nothing
//! stale can be found; no invalidation is needed. What is found is checked by its own checksum
//! before it is used the first time, and made anew if that fails.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::Mmap;
use sha2::{Digest, Sha256};
use windlass_schema::{Table, wire};
use windlass_symbol_index::{Index, Input};

use crate::blob::{Blob, BlobError};
use crate::catalog::{Artefact, Catalog, DerivedKey, DerivedKind};
use crate::content_hash::ContentHash;
use crate::error::ServiceError;
use crate::flight::Flights;
use crate::holding;
use crate::service::App;

/// Most outcomes remembered; at the limit all are forgotten and checked again.
const MAX_KNOWN: usize = 65_536;

/// Bytes that cannot be derived from what is stored, and why: the same inputs give the same answer.
pub(crate) type Outcome = Result<Blob, Arc<str>>;

/// What has been derived or checked since the start.
#[derive(Default)]
pub(crate) struct Derivations {
    flights: Flights<DerivedKey, Result<Outcome, Arc<str>>>,
    known: Mutex<HashMap<DerivedKey, Outcome>>,
}

impl Derivations {
    fn known(&self, key: DerivedKey) -> Option<Outcome> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned()
    }

    fn remember(&self, key: DerivedKey, outcome: Outcome) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(key, outcome);
    }

    /// Checks everything again on its next use: something stored was found damaged.
    pub(crate) fn forget(&self) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// What something is derived from: one artefact for a table; debug file, image and symbols of a kernel or a
/// just-in-time compiler for an index.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inputs {
    /// ELF with DWARF or symbols.
    pub(crate) debug: Option<Artefact>,
    /// Executable or skeleton.
    pub(crate) image: Option<Artefact>,
    /// Kernel symbols.
    pub(crate) kallsyms: Option<Artefact>,
    /// Functions of a just-in-time compiler.
    pub(crate) perf_map: Option<Artefact>,
}

impl Inputs {
    /// What there is.
    pub(crate) fn all(&self) -> [Option<&Artefact>; 3] {
        // The ID of a perf map is made of its content, so that no second one can ever be stored under it.
        let last = self.kallsyms.as_ref().or(self.perf_map.as_ref());
        [self.debug.as_ref(), self.image.as_ref(), last]
    }

    /// The key, or `None` if there is nothing to derive from.
    pub(crate) fn key(&self, kind: DerivedKind, version: u32) -> Option<DerivedKey> {
        let build_id = self.all().into_iter().flatten().next()?.build_id;
        let mut hasher = Sha256::new();
        for input in self.all() {
            hasher.update([u8::from(input.is_some())]);
            hasher.update(input.map_or(&[][..], |artefact| artefact.blob.hash.as_bytes()));
        }
        Some(DerivedKey { build_id, kind, version, inputs: ContentHash::new(hasher.finalize().into()) })
    }
}

/// The derived artefact of `key`, which is that of `inputs`: found and checked, or made.
pub(crate) async fn derive(app: &Arc<App>, key: DerivedKey, inputs: Inputs) -> Result<Outcome, ServiceError> {
    if let Some(outcome) = app.derivations.known(key) {
        return Ok(outcome);
    }
    let shared = Arc::clone(app);
    let flight = app.derivations.flights.join(key, move || async move {
        let outcome = find_or_make(&shared, key, inputs).await;
        if let Ok(outcome) = &outcome {
            shared.derivations.remember(key, outcome.clone());
        }
        outcome.map_err(|error| Arc::from(error.to_string()))
    });
    match flight.await {
        Some(Ok(outcome)) => Ok(outcome),
        Some(Err(why)) => Err(ServiceError::Io(std::io::Error::other(why.to_string()))),
        None => Err(ServiceError::Interrupted),
    }
}

async fn find_or_make(app: &Arc<App>, key: DerivedKey, inputs: Inputs) -> Result<Outcome, ServiceError> {
    // A flight that began just after another one landed finds its result here.
    if let Some(outcome) = app.derivations.known(key) {
        return Ok(outcome);
    }
    if let Some(blob) = app.catalog(move |catalog| catalog.derived(key)).await? {
        match app.blobs.read(blob).await {
            Ok(bytes) if is_sound(key, &bytes) => return Ok(Ok(blob)),
            Ok(_) => tracing::warn!(
                "{} of {} is not what was written, making it again",
                key.kind.as_str(),
                key.build_id
            ),
            Err(error) => {
                tracing::warn!("{} of {}: {error}, making it again", key.kind.as_str(), key.build_id);
                // Otherwise what is made would be taken for another object of a content that is sound.
                if let BlobError::Damaged { hash, .. } = error {
                    app.catalog(move |catalog| catalog.mark_damaged(hash)).await?;
                }
            }
        }
    }
    let (debug, image) = (map(app, &inputs.debug).await?, map(app, &inputs.image).await?);
    let (kallsyms, perf_map) = (map(app, &inputs.kallsyms).await?, map(app, &inputs.perf_map).await?);
    let permit = app.compute.acquire().await.expect("never closed");
    let made = tokio::task::spawn_blocking(move || {
        let input = Input {
            debug: debug.as_deref(),
            image: image.as_deref(),
            kallsyms: kallsyms.as_deref(),
            perf_map: perf_map.as_deref(),
        };
        make(key, input)
    })
    .await?;
    drop(permit);
    app.metrics.count("windlass_derived_made_total", "kind", key.kind.as_str());
    let bytes = match made {
        Ok(bytes) => Arc::new(bytes),
        Err(why) => {
            tracing::warn!("{} of {}: {why}", key.kind.as_str(), key.build_id);
            return Ok(Err(why.into()));
        }
    };
    let hash = ContentHash::of(&bytes);
    // What is on record may be what could not be read.
    let blob = holding::store(app, bytes, hash).await?.blob()?;
    let recorded = move |catalog: &dyn Catalog| {
        catalog.put_derived(key, blob)?;
        catalog.derived(key)
    };
    // Of equal contents, that of another replica may be the one that counts.
    Ok(Ok(app.catalog(recorded).await?.unwrap_or(blob)))
}

async fn map(app: &Arc<App>, input: &Option<Artefact>) -> Result<Option<Mmap>, ServiceError> {
    let Some(artefact) = input else {
        return Ok(None);
    };
    let hash = artefact.blob.hash;
    app.blobs.map(artefact.blob).await.map(Some).map_err(|error| {
        if matches!(error, BlobError::Damaged { .. }) {
            app.report_damage(hash);
        }
        error.into()
    })
}

fn make(key: DerivedKey, input: Input<'_>) -> Result<Vec<u8>, String> {
    // With its sources: why a table cannot be read back is the one clue to a fault of the compiler.
    let table = || {
        windlass_unwind_compiler::compile(input.image.unwrap_or_default(), key.build_id)
            .map(|compiled| compiled.table)
            .map_err(|e| format!("{:#}", anyhow::Error::from(e)))
    };
    match key.kind {
        DerivedKind::Unwind => table(),
        DerivedKind::UnwindWire => wire::pack(&table()?).map_err(|e| e.to_string()),
        DerivedKind::Symbols => windlass_symbol_index::build(input).map_err(|e| e.to_string()),
    }
}

/// Whether it can be read, and is of the image.
pub(crate) fn is_sound(key: DerivedKey, bytes: &[u8]) -> bool {
    match key.kind {
        DerivedKind::Unwind => Table::parse(bytes).is_ok_and(|table| table.build_id() == key.build_id),
        DerivedKind::UnwindWire => wire::unpack(bytes)
            .is_ok_and(|table| is_sound(DerivedKey { kind: DerivedKind::Unwind, ..key }, &table)),
        DerivedKind::Symbols => Index::parse(bytes).is_ok(),
    }
}
