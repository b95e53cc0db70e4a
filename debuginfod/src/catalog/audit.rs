//! The log of writes.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use super::{Artefact, CatalogError};
use crate::content_hash::ContentHash;
use crate::namespace::Namespace;

/// Who writes, and from where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Writer {
    /// Name of a token, or who else: see [`crate::token`]; `upstream:URL` for what another server had.
    pub token: String,
    /// Address of the client, empty if there is none.
    pub peer: String,
}

/// What was done, or tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// An artefact came.
    Upload,
    /// Artefacts were taken off record.
    Delete,
    /// Labels of an image changed.
    Label,
    /// A token was made.
    CreateToken,
    /// A token was ended.
    RevokeToken,
}

impl Action {
    const ALL: [Self; 5] = [Self::Upload, Self::Delete, Self::Label, Self::CreateToken, Self::RevokeToken];

    /// Its name in the log.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Upload => "upload",
            Self::Delete => "delete",
            Self::Label => "label",
            Self::CreateToken => "create-token",
            Self::RevokeToken => "revoke-token",
        }
    }
}

/// A row with an action that this program does not know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown action {0:?}")]
pub struct UnknownAction(String);

impl FromStr for Action {
    type Err = UnknownAction;

    fn from_str(text: &str) -> Result<Self, UnknownAction> {
        Self::ALL
            .into_iter()
            .find(|action| action.as_str() == text)
            .ok_or_else(|| UnknownAction(text.to_owned()))
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Action {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// What was written. What is not known, or does not apply, is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Subject {
    /// The image.
    pub build_id: Option<BuildId>,
    /// What of it.
    pub kind: Option<ArtefactKind>,
    /// Of a source its path; of a token its name.
    pub path: String,
    /// Where it went.
    pub namespace: Option<Namespace>,
    /// Its content.
    #[serde(serialize_with = "as_text")]
    pub sha256: Option<ContentHash>,
    /// Size of that in bytes.
    pub size_bytes: Option<u64>,
}

fn as_text<S: Serializer>(hash: &Option<ContentHash>, serializer: S) -> Result<S::Ok, S::Error> {
    match hash {
        Some(hash) => serializer.collect_str(hash),
        None => serializer.serialize_none(),
    }
}

impl From<&Artefact> for Subject {
    fn from(artefact: &Artefact) -> Self {
        Self {
            build_id: Some(artefact.build_id),
            kind: Some(artefact.kind),
            path: artefact.path.clone(),
            namespace: Some(artefact.namespace.clone()),
            sha256: Some(artefact.blob.hash),
            size_bytes: Some(artefact.blob.size),
        }
    }
}

/// An entry of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AuditEntry {
    /// When, in seconds since 1970.
    pub at_s: u64,
    /// Who.
    #[serde(flatten)]
    pub writer: Writer,
    /// What was done.
    pub action: Action,
    /// To what.
    #[serde(flatten)]
    pub subject: Subject,
    /// `stored`, `created`, `revoked`, what was removed and why, which labels changed, or why it was refused.
    pub result: String,
}

/// Result of an upload that is recorded by [`super::Artefacts::put_artefact`].
pub const STORED: &str = "stored";

/// An entry on record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AuditRecord {
    /// Its number: later entries have greater ones.
    pub id: u64,
    /// The entry.
    #[serde(flatten)]
    pub entry: AuditEntry,
}

/// The log on record.
pub trait AuditLog {
    /// Adds an entry.
    fn record(&self, entry: &AuditEntry) -> Result<(), CatalogError>;

    /// Entries with numbers below `before`, latest first, at most `limit`.
    fn audit(&self, before: Option<u64>, limit: usize) -> Result<Vec<AuditRecord>, CatalogError>;

    /// Forgets entries from before `since_s`, and the oldest ones beyond the latest `keep`.
    fn trim_audit(&self, since_s: u64, keep: u64) -> Result<(), CatalogError>;
}
