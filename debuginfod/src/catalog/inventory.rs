//! What there is, by image and namespace, and how it goes.

use serde::Serialize;
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use super::{Artefact, CatalogError, DerivedKey, Label, Writer};
use crate::blob::Blob;
use crate::namespace::Namespace;

/// What a namespace has of an image. Its artefacts age together: what one of them is used for may need the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Image {
    /// The image.
    pub build_id: BuildId,
    /// Whose.
    pub namespace: Namespace,
    /// A file name of one of them, possibly empty.
    pub file_name: String,
    /// How many artefacts.
    pub artefacts: u64,
    /// Their decoded bytes together.
    pub bytes: u64,
    /// When the last of them came, in seconds since 1970.
    pub stored_s: u64,
    /// When one of them was last used, in seconds since 1970.
    pub used_s: u64,
}

/// Which images.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageQuery {
    /// Of this namespace only.
    pub namespace: Option<Namespace>,
    /// With this label only, whoever gave it.
    pub label: Option<Label>,
}

/// A page of images.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImagePage {
    /// In the order of their build-IDs.
    pub images: Vec<Image>,
    /// Where the next page begins, unless this is the last.
    pub next: Option<BuildId>,
}

/// What a namespace takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// The namespace.
    pub namespace: Namespace,
    /// How many artefacts.
    pub artefacts: u64,
    /// Their decoded bytes together, each for itself, as the quota counts.
    pub bytes: u64,
    /// Decoded bytes of uploads that are not finished.
    pub unfinished_bytes: u64,
}

/// Which artefacts of an image are to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removal {
    /// The image.
    pub build_id: BuildId,
    /// Of this namespace.
    pub namespace: Namespace,
    /// Of this kind only.
    pub kind: Option<ArtefactKind>,
    /// Under this path only.
    pub path: Option<String>,
    /// None at all, if the namespace's artefacts of the image were used at this time or later, in seconds since 1970.
    pub unless_used_since_s: Option<u64>,
    /// When, in seconds since 1970.
    pub at_s: u64,
    /// Why, for the log.
    pub why: String,
}

/// What went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// How many artefacts.
    pub artefacts: u64,
    /// Their decoded bytes together.
    pub bytes: u64,
}

/// The images on record.
pub trait Inventory {
    /// The images of `limit` build-IDs behind `after`, in all namespaces that the query is about.
    fn images(
        &self,
        query: &ImageQuery,
        after: Option<BuildId>,
        limit: usize,
    ) -> Result<ImagePage, CatalogError>;

    /// All artefacts of an image, damaged ones too, at most `limit`.
    fn artefacts(&self, id: BuildId, limit: usize) -> Result<Vec<Artefact>, CatalogError>;

    /// What was derived of an image.
    fn derived_of(&self, id: BuildId) -> Result<Vec<(DerivedKey, Blob)>, CatalogError>;

    /// What each namespace takes, in their order.
    fn usage(&self) -> Result<Vec<Usage>, CatalogError>;

    /// Namespaces of which [`Inventory::usage`] says something else than their artefacts.
    fn wrong_usage(&self) -> Result<Vec<Namespace>, CatalogError>;

    /// Adds up what namespaces take again, from their artefacts.
    fn add_up_usage(&self) -> Result<(), CatalogError>;

    /// Takes artefacts off record, and with them what was derived of the image and, with the last of all, its labels. It is in the
    /// log as `writer`'s. Contents stay, for whoever collects what nothing names.
    fn remove(&self, removal: &Removal, writer: &Writer) -> Result<Removed, CatalogError>;
}
