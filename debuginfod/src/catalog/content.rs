//! Contents by their hashes: what the bucket holds that counts.

use super::{CatalogError, DerivedKey, UploadName};
use crate::blob::Blob;
use crate::content_hash::ContentHash;

/// A content on record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// The content.
    pub blob: Blob,
    /// Whether it was found unreadable.
    pub damaged: bool,
}

/// What names a content beside artefacts and profiles.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Named {
    /// Derived artefacts.
    pub derived: Vec<DerivedKey>,
    /// Uploads of which it is a part.
    pub uploads: Vec<UploadName>,
}

/// The contents on record.
pub trait Contents {
    /// The blob of this name, unless it is damaged or withdrawn: then it must be stored again.
    fn blob(&self, hash: ContentHash) -> Result<Option<Blob>, CatalogError>;

    /// What names this content, beside artefacts and profiles.
    fn named(&self, hash: ContentHash) -> Result<Named, CatalogError>;

    /// Records that a blob was written again after it was found damaged.
    fn restore_blob(&self, blob: Blob) -> Result<(), CatalogError>;

    /// Records that a blob cannot be read: it counts as missing until it is stored again.
    fn mark_damaged(&self, hash: ContentHash) -> Result<(), CatalogError>;

    /// Blobs after `after` in order of their hashes, with those that are damaged, without those that are withdrawn.
    fn blobs(&self, after: Option<ContentHash>, limit: usize) -> Result<Vec<Recorded>, CatalogError>;
}
