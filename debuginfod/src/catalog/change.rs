//! Which images changed, for who keeps in memory what the catalog said.

use windlass_schema::BuildId;

use super::CatalogError;

/// A part of the list of changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// From where to go on.
    pub position: u64,
    /// Since the position that was asked for.
    pub changed: Changed,
}

/// What changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changed {
    /// Artefacts of these images, once each: came, went, became damaged or sound.
    Images(Vec<BuildId>),
    /// Too long ago to tell.
    Any,
}

/// The list of changes.
pub trait ChangeList {
    /// What changed since `since`, by whichever process, and committed before this call. Without a position nothing has, and
    /// the answer says where the list ends.
    fn changes(&self, since: Option<u64>) -> Result<Changes, CatalogError>;
}
