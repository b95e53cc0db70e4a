//! How much memory decoded requests may take, all of them together.
//!
//! A limit for each request bounds nothing when many come at once, and a limit on bytes of a body says little about
//! what it decodes to: two bytes of protobuf can be a struct of eighty. Here whoever decodes or merges first asks for
//! as much of a budget as it may need, and waits, in order, while others hold it.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::profiles::MAX_BATCH_BYTES;

const MIB: u64 = 1 << 20;

/// Bytes in memory for each byte of an encoded message, at most: an empty message takes two bytes on the wire and up
/// to 80 as a struct, in a vector that may just have doubled its capacity.
const DECODED_EXPANSION: u64 = 80;
/// What all requests being decoded may take in MiB: one of the largest, or some thirty as agents usually send them.
const DECODING_BUDGET_MIB: u32 = 1280;
/// Bytes in memory for each byte of the batches in a merge, at most: an index of one byte in a stack becomes an ID of
/// eight. What repeats between batches is merged, so it is far less as a rule.
const MERGED_EXPANSION: u64 = 8;
/// What all merges may take in MiB: two of the largest, which their own limits end at a gigabyte.
const MERGING_BUDGET_MIB: u32 = 2048;
/// Most that one merge asks for in MiB.
const LARGEST_MERGE_MIB: u32 = 1024;

const _: () = assert!(MAX_BATCH_BYTES * DECODED_EXPANSION <= DECODING_BUDGET_MIB as u64 * MIB);
const _: () = assert!(2 * LARGEST_MERGE_MIB <= MERGING_BUDGET_MIB);

/// A part of the memory, shared by the requests that do one thing.
pub(crate) struct MemoryBudget {
    expansion: u64,
    /// Most for one request.
    largest_mib: u32,
    /// One for each MiB.
    permits: Arc<Semaphore>,
}

/// Memory that is taken until this is dropped. It belongs where the memory is: in the closure of a blocking thread,
/// which goes on when its request is gone.
pub(crate) type Admission = OwnedSemaphorePermit;

impl MemoryBudget {
    /// For decoding bodies and batches.
    pub(crate) fn for_decoding() -> Self {
        Self::new(DECODED_EXPANSION, DECODING_BUDGET_MIB, DECODING_BUDGET_MIB)
    }

    /// For merging batches. It is not that of decoding, so no merge, however long, keeps batches from coming in.
    pub(crate) fn for_merging() -> Self {
        Self::new(MERGED_EXPANSION, LARGEST_MERGE_MIB, MERGING_BUDGET_MIB)
    }

    fn new(expansion: u64, largest_mib: u32, budget_mib: u32) -> Self {
        Self { expansion, largest_mib, permits: Arc::new(Semaphore::new(budget_mib as usize)) }
    }

    /// What a request of `encoded_bytes` may take. One beyond the largest is admitted as the largest.
    fn weight_mib(&self, encoded_bytes: u64) -> u32 {
        let mib = encoded_bytes.saturating_mul(self.expansion).div_ceil(MIB).max(1);
        u32::try_from(mib).map_or(self.largest_mib, |mib| mib.min(self.largest_mib))
    }

    /// Waits until there is memory for what `encoded_bytes` become.
    pub(crate) async fn admit(&self, encoded_bytes: u64) -> Admission {
        let permits = Arc::clone(&self.permits);
        permits.acquire_many_owned(self.weight_mib(encoded_bytes)).await.expect("never closed")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::body::Body;
    use axum::extract::{Query, State};
    use axum::http::HeaderMap;
    use tempfile::TempDir;

    use super::*;
    use crate::config::Config;
    use crate::profiles::{Selection, ingest, merged};
    use crate::service::App;

    const SHORTLY: Duration = Duration::from_millis(200);

    async fn app() -> (TempDir, Arc<App>) {
        let folder = tempfile::tempdir().unwrap();
        let app = App::open(&Config::new(folder.path().to_owned())).await.unwrap();
        (folder, Arc::new(app))
    }

    #[test]
    fn weights_are_in_mebibytes_and_end_at_the_largest() {
        let decoding = MemoryBudget::for_decoding();
        for (bytes, mib) in
            [(0, 1), (1, 1), (MIB, 80), (MAX_BATCH_BYTES, 1280), (64 * MIB, 1280), (u64::MAX, 1280)]
        {
            assert_eq!(decoding.weight_mib(bytes), mib, "{bytes}");
        }
        assert_eq!(MemoryBudget::for_merging().weight_mib(MIB), 8);
        assert_eq!(MemoryBudget::for_merging().weight_mib(u64::MAX), 1024);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_batch_waits_while_the_memory_is_taken() {
        let (_folder, app) = app().await;
        let ingest = || ingest(State(Arc::clone(&app)), HeaderMap::new(), Body::empty());
        let taken = app.decoding.admit(MAX_BATCH_BYTES).await;
        assert!(tokio::time::timeout(SHORTLY, ingest()).await.is_err());
        drop(taken);
        assert_eq!(ingest().await.unwrap().status(), 200);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_merge_waits_for_merges_and_a_batch_does_not() {
        let (_folder, app) = app().await;
        let ingest = || ingest(State(Arc::clone(&app)), HeaderMap::new(), Body::empty());
        let merged = || {
            let selection = Query::<Selection>::try_from_uri(&"/?start=0&end=1".parse().unwrap());
            merged(State(Arc::clone(&app)), Ok(selection.unwrap()))
        };
        let taken = [app.merging.admit(u64::MAX).await, app.merging.admit(u64::MAX).await];
        assert_eq!(ingest().await.unwrap().status(), 200);
        assert!(tokio::time::timeout(SHORTLY, merged()).await.is_err());
        drop(taken);
        assert_eq!(merged().await.unwrap().status(), 200);
    }
}
