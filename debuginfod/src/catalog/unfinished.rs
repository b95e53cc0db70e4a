//! Uploads that come in parts, before all of them are there.
//!
//! A part is a blob like any other; a row here says which bytes of which upload it is. So whichever replica is asked knows
//! how far an upload is, and what was given up is found by its age.

use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use super::CatalogError;
use crate::blob::Blob;
use crate::content_hash::ContentHash;
use crate::namespace::Namespace;

/// What is uploaded in parts: one content for one name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UploadName {
    /// The image.
    pub build_id: BuildId,
    /// What of it; never a source.
    pub kind: ArtefactKind,
    /// Where it goes: who uploads to one namespace has no say in the uploads to another.
    pub namespace: Namespace,
    /// The whole.
    pub sha256: ContentHash,
}

/// A part that is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where it begins in the whole, in bytes.
    pub start: u64,
    /// Its content.
    pub blob: Blob,
    /// Size of the whole in bytes, as the sender says.
    pub total: u64,
    /// When it came, in seconds since 1970.
    pub received_s: u64,
}

impl Part {
    /// Where the next part begins.
    pub fn end(&self) -> u64 {
        self.start + self.blob.size
    }
}

/// What became of a part offered to the catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    /// It is there now.
    Yes,
    /// It does not begin where the parts end, which is here.
    At(u64),
    /// The parts before it are of a whole of another size: this one.
    OtherTotal(u64),
}

/// Uploads under way.
pub trait UnfinishedUploads {
    /// The parts of an upload in their order: each begins where the one before ends, the first at 0.
    fn parts(&self, upload: &UploadName) -> Result<Vec<Part>, CatalogError>;

    /// Records a part whose blob is durable, if it begins where the parts before it end. A part must not be empty.
    fn append_part(&self, upload: &UploadName, part: &Part) -> Result<Appended, CatalogError>;

    /// Forgets the parts of an upload. Their blobs stay, for whoever collects what nothing names.
    fn forget_upload(&self, upload: &UploadName) -> Result<(), CatalogError>;

    /// [`UnfinishedUploads::forget_upload`], unless a part of it came at `before_s` or later; whether it is forgotten.
    fn forget_stale_upload(&self, upload: &UploadName, before_s: u64) -> Result<bool, CatalogError>;

    /// Uploads whose last part came before `before_s`, at most `limit`.
    fn stale_uploads(&self, before_s: u64, limit: usize) -> Result<Vec<UploadName>, CatalogError>;
}
