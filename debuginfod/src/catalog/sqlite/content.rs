//! The table `blob`.

use rusqlite::{Connection, OptionalExtension, params};

use super::{SqliteCatalog, blob_at, integer};
use crate::blob::Blob;
use crate::catalog::{CatalogError, Contents, Recorded};
use crate::content_hash::ContentHash;

/// Records a blob that is durable: part of each change that refers to one.
pub(super) fn put_blob(connection: &Connection, blob: Blob) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO blob (sha256, size, stored_size) VALUES (?1, ?2, ?3)
             ON CONFLICT DO UPDATE SET stored_size = ?3, damaged = 0",
        )?
        .execute(params![blob.hash.as_bytes(), integer(blob.size), integer(blob.stored_size)])?;
    Ok(())
}

impl Contents for SqliteCatalog {
    fn blob(&self, hash: ContentHash) -> Result<Option<Blob>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT sha256, size, stored_size FROM blob WHERE sha256 = ? AND NOT damaged",
                )?
                .query_row([hash.as_bytes()], |row| blob_at(row, 0))
                .optional()
        })
    }

    fn restore_blob(&self, blob: Blob) -> Result<(), CatalogError> {
        self.write(|connection| put_blob(connection, blob))
    }

    fn mark_damaged(&self, hash: ContentHash) -> Result<(), CatalogError> {
        self.write(|connection| {
            connection.execute("UPDATE blob SET damaged = 1 WHERE sha256 = ?", [hash.as_bytes()])?;
            Ok(())
        })
    }

    fn blobs(&self, after: Option<ContentHash>, limit: usize) -> Result<Vec<Recorded>, CatalogError> {
        let after = after.map_or(Vec::new(), |hash| hash.as_bytes().to_vec());
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT sha256, size, stored_size, damaged FROM blob WHERE sha256 > ?1
                     ORDER BY sha256 LIMIT ?2",
                )?
                .query_map(params![after, integer(limit as u64)], |row| {
                    Ok(Recorded { blob: blob_at(row, 0)?, damaged: row.get(3)? })
                })?
                .collect()
        })
    }
}
