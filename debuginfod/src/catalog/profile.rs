//! Batches of profiles by their times.

use std::ops::Range;

use super::CatalogError;
use crate::blob::Blob;
use crate::content_hash::ContentHash;

/// A stored batch of profiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProfileBatch {
    /// The OTLP request as it came.
    pub blob: Blob,
    /// Start of the earliest and end of the latest profile in it, in nanoseconds since 1970.
    pub start_ns: u64,
    /// See `start_ns`.
    pub end_ns: u64,
    /// Whether its content was found unreadable.
    pub damaged: bool,
}

/// The batches of profiles on record.
pub trait ProfileBatches {
    /// Records a batch of profiles; a second time it changes nothing.
    fn put_profiles(&self, batch: ProfileBatch) -> Result<(), CatalogError>;

    /// Batches that overlap `range_ns`, oldest first, with those that are damaged.
    fn profiles(&self, range_ns: Range<u64>, limit: usize) -> Result<Vec<ProfileBatch>, CatalogError>;

    /// The batch of profiles whose content is this blob.
    fn profiles_of(&self, hash: ContentHash) -> Result<Option<ProfileBatch>, CatalogError>;
}
