//! How a content goes that nothing names any more, while others are about to name it.
//!
//! Between the moment an upload's content is found on record, or written to the store, and the one when a row names it, nothing
//! shows that it is needed. So it goes in two steps, a grace time apart, within which whoever works with it has named it
//! ([`crate::holding`]):
//!
//! 1. It is *withdrawn*: from now on it counts as missing. Who needs it stores it again, as a new object.
//! 2. Unless something names it by now, which undoes the withdrawal, it is forgotten, and then its object removed.

use super::CatalogError;
use crate::blob::Blob;
use crate::content_hash::ContentHash;

/// A content that nothing names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unnamed {
    /// The content.
    pub blob: Blob,
    /// When it was withdrawn, in seconds since 1970.
    pub withdrawn_s: Option<u64>,
}

/// The contents that can go.
pub trait Collection {
    /// Contents that nothing names after `after`, in order of their hashes.
    fn unnamed(&self, after: Option<ContentHash>, limit: usize) -> Result<Vec<Unnamed>, CatalogError>;

    /// Withdraws those of `hashes` that nothing names and that are not withdrawn yet; how many.
    fn withdraw(&self, hashes: &[ContentHash], at_s: u64) -> Result<u64, CatalogError>;

    /// Forgets those of `hashes` that were withdrawn at `until_s` or before and that nothing names: their objects can be
    /// removed.
    fn forget_blobs(&self, hashes: &[ContentHash], until_s: u64) -> Result<Vec<Blob>, CatalogError>;

    /// Of these contents those on record, withdrawn and damaged ones too.
    fn recorded(&self, hashes: &[ContentHash]) -> Result<Vec<Blob>, CatalogError>;

    /// Forgets what was derived of images of which no artefact is on record, at most `limit`; how many. With `dry_run` only
    /// the number.
    fn forget_derived(&self, limit: usize, dry_run: bool) -> Result<u64, CatalogError>;

    /// Forgets profiles that ended before `before_ns`, at most `limit`; how many. With `dry_run` only the number.
    fn forget_profiles(&self, before_ns: u64, limit: usize, dry_run: bool) -> Result<u64, CatalogError>;
}
