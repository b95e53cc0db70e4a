//! Artefacts by their names: what was uploaded, or fetched from another server, for which build-ID.

use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use super::{CatalogError, Subject, Writer};
use crate::blob::Blob;
use crate::content_hash::ContentHash;
use crate::elf::Facts;
use crate::namespace::Namespace;

/// What an artefact is stored under.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    /// The image.
    pub build_id: BuildId,
    /// What of it.
    pub kind: ArtefactKind,
    /// For sources the path as uploaded, for a `.dwo` file the ID of its unit, else empty.
    pub path: String,
    /// Whose.
    pub namespace: Namespace,
}

impl Name {
    /// What the log says of it.
    pub fn subject(&self) -> Subject {
        Subject {
            build_id: Some(self.build_id),
            kind: Some(self.kind),
            path: self.path.clone(),
            namespace: Some(self.namespace.clone()),
            ..Subject::default()
        }
    }
}

/// A stored artefact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artefact {
    /// Its image.
    pub build_id: BuildId,
    /// What of it.
    pub kind: ArtefactKind,
    /// For sources the path as uploaded, else empty.
    pub path: String,
    /// Whose it is. Each namespace has its own of a name.
    pub namespace: Namespace,
    /// Its content.
    pub blob: Blob,
    /// Base name of the file, possibly empty.
    pub file_name: String,
    /// When it was last modified, in seconds since 1970.
    pub modified_s: u64,
    /// When it came here, in seconds since 1970.
    pub stored_s: u64,
    /// When it was last used, in seconds since 1970; storing it is a use. A later use may not be on record yet: see
    /// [`Artefacts::note_uses`].
    pub used_s: u64,
    /// What it brings.
    pub facts: Facts,
    /// Whether its content was found unreadable. It is on record, but must be stored again.
    pub damaged: bool,
}

impl Artefact {
    /// What it is stored under.
    pub fn name(&self) -> Name {
        Name {
            build_id: self.build_id,
            kind: self.kind,
            path: self.path.clone(),
            namespace: self.namespace.clone(),
        }
    }
}

/// What became of an artefact offered to the catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// It is there now.
    Stored,
    /// Something is there already: its content.
    Present(Blob),
    /// Its namespace takes this many bytes already, and with it would take more than it may.
    OverQuota(u64),
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

/// The artefacts on record.
pub trait Artefacts {
    /// The artefacts of this name in all namespaces, in no order: who asks chooses by trust. Sources are those of the path as
    /// uploaded, and those of a path that is the same with `.`, `..` and repeated slashes resolved.
    fn versions(&self, id: BuildId, kind: ArtefactKind, path: &str) -> Result<Vec<Artefact>, CatalogError>;

    /// Records an artefact whose blob is durable, unless its name is taken in its namespace, and in the log that `writer`
    /// stored it. A damaged content does not take a name: it is replaced. To offer what is there is a use of it.
    /// `quota_bytes` is what the namespace may take, if that is limited.
    fn put_artefact(
        &self,
        artefact: &Artefact,
        writer: &Writer,
        quota_bytes: Option<u64>,
    ) -> Result<Put, CatalogError>;

    /// Records an artefact whose blob is durable in place of one in its namespace whose content is `poorer`, or of none, or of a
    /// damaged one.
    fn replace_artefact(
        &self,
        artefact: &Artefact,
        poorer: ContentHash,
        writer: &Writer,
        quota_bytes: Option<u64>,
    ) -> Result<Put, CatalogError>;

    /// Artefacts that match, in any namespace, at most `limit`.
    fn metadata(&self, query: &MetadataQuery, limit: usize) -> Result<Vec<Artefact>, CatalogError>;

    /// Records when artefacts were used, unless a later use is on record, and says for each whether it is on record itself.
    fn note_uses(&self, uses: &[(Name, u64)]) -> Result<Vec<bool>, CatalogError>;

    /// Corrects what is on record of an artefact's content, if that is still this one.
    fn correct_facts(&self, name: &Name, hash: ContentHash, facts: &Facts) -> Result<(), CatalogError>;

    /// Artefacts whose content is this blob.
    fn artefacts_of(&self, hash: ContentHash) -> Result<Vec<Artefact>, CatalogError>;
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
