//! What is stored, for which build-ID: the boundary to the database.
//!
//! elfutils keeps its index with `synchronous=0` and may lose it with the machine, which is fair for an
//! index that a scan restores; uploads cannot be scanned again. Here the catalog is the truth:
//! a content counts as stored when its row is committed, never before. Calls block and
//! run on a blocking thread.

use std::ops::Range;

use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use crate::blob::Blob;
use crate::content_hash::ContentHash;
use crate::elf::Facts;

mod sqlite;

pub use sqlite::SqliteCatalog;

/// A stored artefact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artefact {
    /// Its image.
    pub build_id: BuildId,
    /// What of it.
    pub kind: ArtefactKind,
    /// For sources the path as uploaded, else empty.
    pub path: String,
    /// Its content.
    pub blob: Blob,
    /// Base name of the file, possibly empty.
    pub file_name: String,
    /// When it was last modified, in seconds since 1970.
    pub modified_s: u64,
    /// What it brings.
    pub facts: Facts,
    /// Whether its content was found unreadable. It is on record, but must be stored again.
    pub damaged: bool,
}

/// What became of an artefact offered to the catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// It is there now.
    Stored,
    /// Something is there already: its content.
    Present(Blob),
}

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

/// A content on record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// The content.
    pub blob: Blob,
    /// Whether it was found unreadable.
    pub damaged: bool,
}

/// How `/metadata` asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetadataQuery {
    /// By exact file name or path.
    File(String),
    /// By pattern.
    Glob(String),
    /// By build-ID.
    BuildId(String),
}

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
pub trait Catalog: Send + Sync {
    /// The artefact of this name. A source is found by its path as uploaded, else by its path with `.`,
    /// `..` and repeated slashes resolved.
    fn artefact(&self, id: BuildId, kind: ArtefactKind, path: &str)
    -> Result<Option<Artefact>, CatalogError>;

    /// Records an artefact whose blob is durable, unless its name is taken. A damaged content does not take a name:
    /// it is replaced.
    fn put_artefact(&self, artefact: &Artefact) -> Result<Put, CatalogError>;

    /// The blob of this name, unless it is damaged.
    fn blob(&self, hash: ContentHash) -> Result<Option<Blob>, CatalogError>;

    /// Records that a blob was written again after it was found damaged.
    fn restore_blob(&self, blob: Blob) -> Result<(), CatalogError>;

    /// Records that a blob cannot be read: it counts as missing until it is stored again.
    fn mark_damaged(&self, hash: ContentHash) -> Result<(), CatalogError>;

    /// The derived artefact of this key.
    fn derived(&self, key: DerivedKey) -> Result<Option<Blob>, CatalogError>;

    /// Records a derived artefact, in place of any other for the same image and kind.
    fn put_derived(&self, key: DerivedKey, blob: Blob) -> Result<(), CatalogError>;

    /// Records a batch of profiles; a second time it changes nothing.
    fn put_profiles(&self, batch: ProfileBatch) -> Result<(), CatalogError>;

    /// Batches that overlap `range_ns`, oldest first, with those that are damaged.
    fn profiles(&self, range_ns: Range<u64>, limit: usize) -> Result<Vec<ProfileBatch>, CatalogError>;

    /// Artefacts that match, at most `limit`.
    fn metadata(&self, query: &MetadataQuery, limit: usize) -> Result<Vec<Artefact>, CatalogError>;

    /// Blobs after `after` in order of their hashes, with those that are damaged.
    fn blobs(&self, after: Option<ContentHash>, limit: usize) -> Result<Vec<Recorded>, CatalogError>;

    /// Artefacts whose content is this blob.
    fn artefacts_of(&self, hash: ContentHash) -> Result<Vec<Artefact>, CatalogError>;

    /// The batch of profiles whose content is this blob.
    fn profiles_of(&self, hash: ContentHash) -> Result<Option<ProfileBatch>, CatalogError>;

    /// What the database finds wrong with itself.
    fn integrity(&self) -> Result<Vec<String>, CatalogError>;
}

/// A path with `.`, `..` and repeated slashes resolved (RFC 3986, 5.2.4), as elfutils compares sources.
pub fn canonical_path(path: &str) -> String {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}
