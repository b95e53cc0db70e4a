//! The table `token`.

use rusqlite::{OptionalExtension, Row, params};

use super::{SqliteCatalog, integer, malformed, unsigned};
use crate::catalog::{CatalogError, Tokens};
use crate::content_hash::ContentHash;
use crate::token::{Scope, Token};

const TOKEN_COLUMNS: &str = "name, scopes, created_s, expires_s, last_used_s, revoked_s FROM token";

fn time(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<u64>> {
    match row.get::<_, Option<i64>>(column)? {
        Some(value) => u64::try_from(value).map(Some).map_err(|e| malformed(column, e)),
        None => Ok(None),
    }
}

fn token_row(row: &Row<'_>) -> rusqlite::Result<Token> {
    let scopes = row.get_ref(1)?.as_str()?.split(' ').map(str::parse::<Scope>).collect::<Result<Vec<_>, _>>();
    Ok(Token {
        name: row.get(0)?,
        scopes: scopes.map_err(|e| malformed(1, e))?,
        created_s: unsigned(row, 2)?,
        expires_s: time(row, 3)?,
        last_used_s: time(row, 4)?,
        revoked_s: time(row, 5)?,
    })
}

impl Tokens for SqliteCatalog {
    fn put_token(&self, secret: ContentHash, token: &Token) -> Result<bool, CatalogError> {
        let scopes = token.scopes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        self.write(|connection| {
            let added = connection.execute(
                "INSERT INTO token VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT DO NOTHING",
                params![
                    secret.as_bytes(),
                    token.name,
                    scopes,
                    integer(token.created_s),
                    token.expires_s.map(integer),
                    token.last_used_s.map(integer),
                    token.revoked_s.map(integer),
                ],
            )?;
            Ok(added == 1)
        })
    }

    fn token(&self, secret: ContentHash) -> Result<Option<Token>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(&format!("SELECT {TOKEN_COLUMNS} WHERE sha256 = ?"))?
                .query_row([secret.as_bytes()], token_row)
                .optional()
        })
    }

    fn tokens(&self) -> Result<Vec<Token>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(&format!("SELECT {TOKEN_COLUMNS} ORDER BY name"))?
                .query_map([], token_row)?
                .collect()
        })
    }

    fn revoke_token(&self, name: &str, at_s: u64) -> Result<bool, CatalogError> {
        self.write(|connection| {
            let found = connection.execute(
                "UPDATE token SET revoked_s = coalesce(revoked_s, ?2) WHERE name = ?1",
                params![name, integer(at_s)],
            )?;
            Ok(found == 1)
        })
    }

    fn use_token(&self, secret: ContentHash, at_s: u64, unless_since_s: u64) -> Result<(), CatalogError> {
        self.write(|connection| {
            connection.execute(
                "UPDATE token SET last_used_s = ?2
                 WHERE sha256 = ?1 AND (last_used_s IS NULL OR last_used_s < ?3)",
                params![secret.as_bytes(), integer(at_s), integer(unless_since_s)],
            )?;
            Ok(())
        })
    }
}
