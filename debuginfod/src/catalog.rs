//! What is stored, for which build-ID: the boundary to the database.
//!
//! elfutils keeps its index with `synchronous=0` and may lose it with the machine, which is fair for an
//! index that a scan restores; uploads cannot be scanned again. Here the catalog is the truth:
//! a content counts as stored when its row is committed, never before. Calls block and
//! run on a blocking thread. A trait for each group of tables says what callers may ask; an engine has a file for
//! each, and passes the suite in `conformance`.

mod artefact;
mod audit;
mod change;
mod collection;
#[cfg(test)]
mod conformance;
mod content;
mod derived;
mod inventory;
mod label;
mod profile;
mod provenance;
mod sqlite;
mod token;
mod unfinished;

pub use artefact::{Artefact, Artefacts, MetadataQuery, Name, Put, canonical_path};
pub use audit::{Action, AuditEntry, AuditLog, AuditRecord, STORED, Subject, UnknownAction, Writer};
pub use change::{ChangeList, Changed, Changes};
pub use collection::{Collection, Unnamed};
pub use content::{Contents, Named, Recorded};
pub use derived::{DerivedArtefacts, DerivedKey, DerivedKind, UnknownDerivedKind};
pub use inventory::{Image, ImagePage, ImageQuery, Inventory, Removal, Removed, Usage};
pub use label::{Label, LabelChange, LabelError, LabelOutcome, Labelled, Labels, MAX_LABELS};
pub use profile::{ProfileBatch, ProfileBatches};
pub use provenance::{Provenance, Provenances};
pub use sqlite::SqliteCatalog;
pub use token::Tokens;
pub use unfinished::{Appended, Part, UnfinishedUploads, UploadName};

/// The catalog failed.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// SQLite says so.
    #[error("catalog: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// A row that cannot have been written by this program.
    #[error("catalog row with malformed {column}: {why}")]
    Row {
        /// Where.
        column: &'static str,
        /// What is wrong.
        why: String,
    },
    /// Written by a newer version.
    #[error("catalog of schema version {found}, this program knows up to {known}")]
    Version {
        /// In the file.
        found: i64,
        /// Of this program.
        known: i64,
    },
    /// The URL is not usable.
    #[error("catalog {0:?} is not usable, expected sqlite:PATH")]
    Url(String),
}

/// A database of what is stored. Each method is one transaction; what it wrote is durable on return.
pub trait Catalog:
    Artefacts
    + AuditLog
    + ChangeList
    + Collection
    + Contents
    + DerivedArtefacts
    + Inventory
    + Labels
    + ProfileBatches
    + Provenances
    + Tokens
    + UnfinishedUploads
    + Send
    + Sync
{
    /// What the database finds wrong with itself.
    fn integrity(&self) -> Result<Vec<String>, CatalogError>;
}
