//! Bodies about what the service has stored: lists, labels, removals. Times are seconds since 1970.

use serde::{Deserialize, Serialize};

use super::{ArtefactKind, Brings};
use crate::BuildId;

/// Most images in one [`ImageList`].
pub const MAX_LISTED_IMAGES: usize = 1000;
/// Most artefacts in one [`ImageDetails`].
pub const MAX_LISTED_ARTEFACTS: usize = 10_000;
/// Most images in one [`LabelRequest`].
pub const MAX_LABELLED_IMAGES: usize = 100_000;
/// Most labels that one [`LabelRequest`] gives and takes together.
pub const MAX_CHANGED_LABELS: usize = 100;

/// Answer to `GET /api/v1/artefacts`: images in the order of their build-IDs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageList {
    /// An entry for each namespace that has something of an image.
    pub images: Vec<ImageSummary>,
    /// `after` of the next page, if there may be one.
    pub next: Option<BuildId>,
}

/// What a namespace has of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSummary {
    /// The image.
    pub build_id: BuildId,
    /// Whose.
    pub namespace: String,
    /// Name of one of its files, possibly empty.
    pub file_name: String,
    /// How many artefacts.
    pub artefacts: u64,
    /// Their decoded bytes.
    pub bytes: u64,
    /// When the last one came.
    pub stored_s: u64,
    /// When one was last used, to the hour.
    pub used_s: u64,
    /// Labels of the image, in all namespaces.
    pub labels: Vec<String>,
}

/// Answer to `GET /api/v1/artefacts/ID`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDetails {
    /// The image.
    pub build_id: BuildId,
    /// At most [`MAX_LISTED_ARTEFACTS`], by kind, path and namespace.
    pub artefacts: Vec<ArtefactDetails>,
    /// Whether these are all.
    pub complete: bool,
    /// Its labels.
    pub labels: Vec<LabelDetails>,
    /// What was made of it: thrown away and made again at any time.
    pub derived: Vec<DerivedDetails>,
}

/// A stored artefact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtefactDetails {
    /// What it is.
    pub kind: ArtefactKind,
    /// Of a source its path, of split DWARF of a unit its ID.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// Whose.
    pub namespace: String,
    /// SHA-256 of its content, lower-case hex.
    pub sha256: String,
    /// Decoded size in bytes.
    pub size_bytes: u64,
    /// What its content takes in the store, in bytes; equal contents are stored once.
    pub stored_bytes: u64,
    /// Base name of the file, possibly empty.
    pub file_name: String,
    /// When it came.
    pub stored_s: u64,
    /// When it was last used, to the hour.
    pub used_s: u64,
    /// What it has to name code with.
    pub brings: Brings,
    /// Whether it has unwind sections.
    pub unwind: bool,
    /// Whether it has code.
    pub code: bool,
    /// Whether it must be uploaded again.
    pub damaged: bool,
}

/// A label and who gave it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelDetails {
    /// `NAME=VALUE`.
    pub label: String,
    /// In which namespace it was given.
    pub namespace: String,
    /// When.
    pub since_s: u64,
}

/// A derived artefact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DerivedDetails {
    /// `unwind`, `unwind-wire` or `symbols`.
    pub kind: String,
    /// Version of its format.
    pub version: u32,
    /// Decoded size in bytes.
    pub size_bytes: u64,
}

/// Answer to `DELETE /api/v1/artefacts/ID`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// How many artefacts are off record. Their contents are collected later.
    pub artefacts: u64,
    /// Their decoded bytes.
    pub bytes: u64,
}

/// `POST /api/v1/labels`: labels to take from images and to give to them, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelRequest {
    /// At most [`MAX_LABELLED_IMAGES`].
    pub build_ids: Vec<BuildId>,
    /// `NAME=VALUE` each; of both together at most [`MAX_CHANGED_LABELS`].
    #[serde(default)]
    pub add: Vec<String>,
    /// As `add`.
    #[serde(default)]
    pub remove: Vec<String>,
}

/// Answer to a [`LabelRequest`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelResponse {
    /// How many images have other labels now.
    pub changed: u64,
    /// How many had these already.
    pub unchanged: u64,
    /// Images of which nothing is stored.
    pub unknown: Vec<BuildId>,
    /// Images that would have too many labels, and have those of before.
    pub too_many: Vec<BuildId>,
}

/// An entry of the answer to `GET /api/v1/namespaces`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceUsage {
    /// The namespace.
    pub namespace: String,
    /// How many artefacts it has.
    pub artefacts: u64,
    /// Their decoded bytes, as its quota counts.
    pub bytes: u64,
    /// Decoded bytes of uploads that are not finished.
    pub unfinished_bytes: u64,
    /// What it may take, if that is limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota_bytes: Option<u64>,
}
