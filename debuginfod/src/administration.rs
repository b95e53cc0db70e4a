//! What an administrator does on the catalog itself, with the service running or not: tokens, and the log.
//!
//! There is no interface over the network that makes tokens, so none can be stolen through it: whoever makes one has
//! the catalog anyway.

use crate::catalog::{Action, AuditEntry, AuditRecord, Catalog, CatalogError, Subject, Writer};
use crate::config::Config;
use crate::service::{StartError, now_s, open_catalog};
use crate::token::{LOCAL, Scope, Secret, Token, TokenError};

/// It could not be done.
#[derive(Debug, thiserror::Error)]
pub enum AdministrationError {
    /// The data folder.
    #[error(transparent)]
    Open(#[from] StartError),
    /// The catalog failed.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// No such token can be.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// No secret.
    #[error("random bytes: {0}")]
    Random(#[from] std::io::Error),
    /// The name is taken.
    #[error("there is or was a token {0:?}; a name means one token for good, so that the log stays clear")]
    Taken(String),
    /// No such name.
    #[error("there is no token {0:?}")]
    Unknown(String),
}

/// The catalog of a service.
pub struct Administration {
    catalog: std::sync::Arc<dyn Catalog>,
}

impl Administration {
    /// Opens the catalog that `config` names, or makes it. Blocks, as all here does.
    pub fn open(config: &Config) -> Result<Self, AdministrationError> {
        std::fs::create_dir_all(&config.data_dir)
            .map_err(|error| StartError::DataFolder { path: config.data_dir.clone(), error })?;
        Ok(Self { catalog: open_catalog(config, &config.data_dir)? })
    }

    /// Makes a token that ends after `lifetime_s`, or never.
    pub fn create_token(
        &self,
        name: &str,
        scopes: Vec<Scope>,
        lifetime_s: Option<u64>,
    ) -> Result<(Secret, Token), AdministrationError> {
        let now_s = now_s();
        let token = Token::new(name, scopes, now_s, lifetime_s.map(|s| now_s.saturating_add(s)))?;
        let secret = Secret::generate()?;
        if !self.catalog.put_token(secret.hash(), &token)? {
            return Err(AdministrationError::Taken(token.name));
        }
        self.record(Action::CreateToken, name, "created")?;
        Ok((secret, token))
    }

    /// All tokens that there are and were.
    pub fn tokens(&self) -> Result<Vec<Token>, AdministrationError> {
        Ok(self.catalog.tokens()?)
    }

    /// Ends a token. Services still accept it for up to five seconds.
    pub fn revoke_token(&self, name: &str) -> Result<(), AdministrationError> {
        if !self.catalog.revoke_token(name, now_s())? {
            return Err(AdministrationError::Unknown(name.to_owned()));
        }
        self.record(Action::RevokeToken, name, "revoked")
    }

    /// The latest entries of the log, latest first.
    pub fn audit(&self, limit: usize) -> Result<Vec<AuditRecord>, AdministrationError> {
        Ok(self.catalog.audit(None, limit)?)
    }

    fn record(&self, action: Action, token: &str, result: &str) -> Result<(), AdministrationError> {
        let writer = Writer { token: LOCAL.to_owned(), peer: String::new() };
        let subject = Subject { path: token.to_owned(), ..Subject::default() };
        let entry = AuditEntry { at_s: now_s(), writer, action, subject, result: result.to_owned() };
        Ok(self.catalog.record(&entry)?)
    }
}
