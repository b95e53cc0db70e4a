//! Access tokens: what they are, and what each one may do.
//!
//! A token is 256 random bits, of which the catalog keeps the SHA-256. Passwords need a slow hash since a thief of
//! the hashes can try all that people choose; nobody tries 2^256 numbers, fast or slow, and a slow hash for each
//! request would be a way to keep the service busy.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use crate::content_hash::ContentHash;
use crate::namespace::{Namespace, NamespaceError};

/// What tokens start with, so that scanners for leaked secrets find them.
const PREFIX: &str = "windlass_";
/// Longest name in bytes.
const MAX_NAME_BYTES: usize = 63;
/// Names that the audit log has for writers without a token of the catalog.
const RESERVED_NAMES: [&str; 3] = [ANONYMOUS, TOKEN_FILE, LOCAL];
/// Who sends no token where none is needed.
pub(crate) const ANONYMOUS: &str = "anonymous";
/// Who has the token of `--token-file`.
pub(crate) const TOKEN_FILE: &str = "token-file";
/// Who runs `windlassd` on the catalog.
pub(crate) const LOCAL: &str = "local";

/// What a token is good for. One does not include another, but for `Admin`, which includes all.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Reads, where these need a token.
    Read,
    /// Uploads to a namespace, and profiles, which belong to none.
    Upload(Namespace),
    /// Everything.
    Admin,
}

/// A text that is no scope.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScopeError {
    /// No known word.
    #[error("{0:?} is no scope, expected read, upload:NAMESPACE or admin")]
    Unknown(String),
    /// A known word, and a namespace that is none.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
}

impl FromStr for Scope {
    type Err = ScopeError;

    fn from_str(text: &str) -> Result<Self, ScopeError> {
        match (text, text.strip_prefix("upload:")) {
            ("read", _) => Ok(Self::Read),
            ("admin", _) => Ok(Self::Admin),
            (_, Some(namespace)) => Ok(Self::Upload(Namespace::for_uploads(namespace)?)),
            _ => Err(ScopeError::Unknown(text.chars().take(80).collect())),
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read => f.write_str("read"),
            Self::Upload(namespace) => write!(f, "upload:{namespace}"),
            Self::Admin => f.write_str("admin"),
        }
    }
}

impl Serialize for Scope {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A token on record, without its secret. Times are seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Token {
    /// What the audit log calls its holder. No two tokens ever have the same, so that a name in the log means one.
    pub name: String,
    /// What it is good for.
    pub scopes: Vec<Scope>,
    /// When it was made.
    pub created_s: u64,
    /// From when on it is refused.
    pub expires_s: Option<u64>,
    /// When it was last used, to the hour.
    pub last_used_s: Option<u64>,
    /// When it was revoked.
    pub revoked_s: Option<u64>,
}

/// Why no token was made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Against the pattern.
    #[error("{0:?} is no name of a token: 1 to {MAX_NAME_BYTES} of A-Z, a-z, 0-9, `.`, `_` and `-`")]
    Name(String),
    /// Taken by the log.
    #[error("the name {0:?} stands for writers without a token of the catalog")]
    Reserved(String),
    /// It would be good for nothing.
    #[error("a token needs a scope: read, upload:NAMESPACE or admin")]
    NoScope,
}

impl Token {
    /// A token to be made now.
    pub fn new(
        name: &str,
        mut scopes: Vec<Scope>,
        created_s: u64,
        expires_s: Option<u64>,
    ) -> Result<Self, TokenError> {
        let fits = (1..=MAX_NAME_BYTES).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        if !fits {
            return Err(TokenError::Name(name.chars().take(80).collect()));
        }
        if RESERVED_NAMES.contains(&name) {
            return Err(TokenError::Reserved(name.to_owned()));
        }
        if scopes.is_empty() {
            return Err(TokenError::NoScope);
        }
        scopes.sort();
        scopes.dedup();
        let name = name.to_owned();
        Ok(Self { name, scopes, created_s, expires_s, last_used_s: None, revoked_s: None })
    }

    /// Why it is refused at `now_s`, if it is.
    pub fn refusal(&self, now_s: u64) -> Option<&'static str> {
        match (self.revoked_s, self.expires_s) {
            (Some(_), _) => Some("was revoked"),
            (None, Some(end)) if end <= now_s => Some("has expired"),
            _ => None,
        }
    }
}

/// What a token's holder sends. It is printed once and kept nowhere.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// 256 bits that nobody can guess.
    pub fn generate() -> std::io::Result<Self> {
        let mut bytes = [0_u8; 32];
        let random = rustls::crypto::ring::default_provider().secure_random;
        random.fill(&mut bytes).map_err(|_| std::io::Error::other("the system gives no random bytes"))?;
        Ok(Self(bytes.iter().fold(PREFIX.to_owned(), |text, byte| format!("{text}{byte:02x}"))))
    }

    /// The text to send.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// What the catalog keeps.
    pub fn hash(&self) -> ContentHash {
        ContentHash::of(self.0.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_read_as_they_are_printed() {
        for text in ["read", "admin", "upload:try"] {
            assert_eq!(text.parse::<Scope>().unwrap().to_string(), text);
        }
        for bad in ["", "write", "upload", "upload:", "upload:A", "upload:upstream", "Read"] {
            assert!(bad.parse::<Scope>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_plain_and_not_those_of_the_log() {
        let make = |name: &str| Token::new(name, vec![Scope::Read], 5, None);
        assert!(make("ci-2.main_X").is_ok());
        for bad in ["", "a b", "a\n", "upstream:http", &"a".repeat(64)] {
            assert!(matches!(make(bad), Err(TokenError::Name(_))), "{bad:?}");
        }
        for reserved in RESERVED_NAMES {
            assert!(matches!(make(reserved), Err(TokenError::Reserved(_))), "{reserved}");
        }
        assert_eq!(Token::new("ci", Vec::new(), 5, None), Err(TokenError::NoScope));
    }

    #[test]
    fn a_token_ends() {
        let token = Token::new("ci", vec![Scope::Read], 5, Some(100)).unwrap();
        assert_eq!((token.refusal(99), token.refusal(100)), (None, Some("has expired")));
        let revoked = Token { revoked_s: Some(6), ..token };
        assert_eq!(revoked.refusal(7), Some("was revoked"));
    }

    #[test]
    fn no_two_secrets_are_alike() {
        let (one, two) = (Secret::generate().unwrap(), Secret::generate().unwrap());
        assert_ne!(one.reveal(), two.reveal());
        assert_eq!(one.reveal().len(), PREFIX.len() + 64);
        assert_ne!(one.hash(), two.hash());
    }
}
