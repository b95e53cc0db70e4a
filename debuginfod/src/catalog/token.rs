//! Access tokens by the hashes of their secrets.

use super::CatalogError;
use crate::content_hash::ContentHash;
use crate::token::Token;

/// The tokens on record.
pub trait Tokens {
    /// Records a token under the hash of its secret. `false`: there is or was one of that name.
    fn put_token(&self, secret: ContentHash, token: &Token) -> Result<bool, CatalogError>;

    /// The token of a secret, revoked or expired ones too.
    fn token(&self, secret: ContentHash) -> Result<Option<Token>, CatalogError>;

    /// All tokens in the order of their names.
    fn tokens(&self) -> Result<Vec<Token>, CatalogError>;

    /// Ends a token for good; one that is revoked already keeps its time. `false`: there is none of that name.
    fn revoke_token(&self, name: &str, at_s: u64) -> Result<bool, CatalogError>;

    /// Records a use at `at_s`, unless one is on record from `unless_since_s` on.
    fn use_token(&self, secret: ContentHash, at_s: u64, unless_since_s: u64) -> Result<(), CatalogError>;
}
