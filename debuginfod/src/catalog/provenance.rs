//! Which other server a content came from.

use serde::Serialize;
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use super::CatalogError;
use crate::content_hash::ContentHash;

/// Where something was fetched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Provenance {
    /// For this image.
    pub build_id: BuildId,
    /// As this.
    pub kind: ArtefactKind,
    /// What came.
    #[serde(rename = "sha256", serialize_with = "as_text")]
    pub hash: ContentHash,
    /// URL of the server, without a slash at the end.
    pub upstream: String,
    /// When, in seconds since 1970.
    pub fetched_s: u64,
}

fn as_text<S: serde::Serializer>(hash: &ContentHash, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(hash)
}

/// Where things came from.
pub trait Provenances {
    /// Records where a content came from. Of a content that came more than once the first time counts.
    fn put_provenance(&self, provenance: &Provenance) -> Result<(), CatalogError>;

    /// Where contents of an image came from, in the order in which they did.
    fn provenances(&self, id: BuildId) -> Result<Vec<Provenance>, CatalogError>;
}
