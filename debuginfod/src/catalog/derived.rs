//! What was derived from which inputs.

use std::str::FromStr;

use windlass_schema::BuildId;

use super::CatalogError;
use crate::blob::Blob;
use crate::content_hash::ContentHash;

/// What a derived artefact was made from, and by what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DerivedKey {
    /// Its image.
    pub build_id: BuildId,
    /// What it is.
    pub kind: DerivedKind,
    /// Version of its format.
    pub version: u32,
    /// Hash over the contents it was made from: better inputs are another key, so nothing made from
    /// poorer ones is ever found again.
    pub inputs: ContentHash,
}

/// What can be derived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DerivedKind {
    /// The unwind table.
    Unwind,
    /// The unwind table in its wire form.
    UnwindWire,
    /// The symbol index.
    Symbols,
}

impl DerivedKind {
    /// Its name in the catalog and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unwind => "unwind",
            Self::UnwindWire => "unwind-wire",
            Self::Symbols => "symbols",
        }
    }
}

/// A row with a kind that this program does not know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown derived kind {0:?}")]
pub struct UnknownDerivedKind(String);

impl FromStr for DerivedKind {
    type Err = UnknownDerivedKind;

    fn from_str(text: &str) -> Result<Self, UnknownDerivedKind> {
        let mut all = [Self::Unwind, Self::UnwindWire, Self::Symbols].into_iter();
        all.find(|kind| kind.as_str() == text).ok_or_else(|| UnknownDerivedKind(text.to_owned()))
    }
}

/// The derived artefacts on record.
pub trait DerivedArtefacts {
    /// The derived artefact of this key.
    fn derived(&self, key: DerivedKey) -> Result<Option<Blob>, CatalogError>;

    /// Forgets the derived artefact of this image and kind, of whatever version.
    fn forget_derived_of(&self, id: BuildId, kind: DerivedKind) -> Result<(), CatalogError>;

    /// Records a derived artefact, in place of any other for the same image and kind.
    fn put_derived(&self, key: DerivedKey, blob: Blob) -> Result<(), CatalogError>;
}
