//! The table `blob`.

use rusqlite::{Connection, OptionalExtension, params};
use windlass_schema::BuildId;

use super::unfinished::upload_name_row;
use super::{SqliteCatalog, blob_at, integer, malformed};
use crate::blob::Blob;
use crate::catalog::{CatalogError, Contents, DerivedKey, Named, Recorded};
use crate::content_hash::ContentHash;

/// Records a blob that is durable: part of each change that refers to one. Of two objects of a content the one on record
/// stays: others may be reading it. If that is damaged or withdrawn, the other takes its place.
pub(super) fn put_blob(connection: &Connection, blob: Blob) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO blob (sha256, size, stored_size, write) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT DO UPDATE SET stored_size = ?3, write = ?4, damaged = 0, withdrawn_s = NULL
             WHERE damaged OR withdrawn_s IS NOT NULL",
        )?
        .execute(params![
            blob.hash.as_bytes(),
            integer(blob.size),
            integer(blob.stored_size),
            integer(blob.write)
        ])?;
    Ok(())
}

impl Contents for SqliteCatalog {
    fn blob(&self, hash: ContentHash) -> Result<Option<Blob>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT sha256, size, stored_size, write FROM blob
                     WHERE sha256 = ? AND NOT damaged AND withdrawn_s IS NULL",
                )?
                .query_row([hash.as_bytes()], |row| blob_at(row, 0))
                .optional()
        })
    }

    fn named(&self, hash: ContentHash) -> Result<Named, CatalogError> {
        self.read(|connection| {
            let derived = connection
                .prepare_cached("SELECT build_id, kind, version, inputs FROM derived WHERE sha256 = ?")?
                .query_map([hash.as_bytes()], |row| {
                    Ok(DerivedKey {
                        build_id: BuildId::new(row.get_ref(0)?.as_blob()?).map_err(|e| malformed(0, e))?,
                        kind: row.get_ref(1)?.as_str()?.parse().map_err(|e| malformed(1, e))?,
                        version: row.get(2)?,
                        inputs: ContentHash::new(row.get(3)?),
                    })
                })?
                .collect::<rusqlite::Result<_>>()?;
            let uploads = connection
                .prepare_cached(
                    "SELECT DISTINCT build_id, kind, whole_sha256, namespace FROM upload_part WHERE sha256 = ?",
                )?
                .query_map([hash.as_bytes()], upload_name_row)?
                .collect::<rusqlite::Result<_>>()?;
            Ok(Named { derived, uploads })
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
                    "SELECT sha256, size, stored_size, write, damaged FROM blob
                     WHERE sha256 > ?1 AND withdrawn_s IS NULL
                     ORDER BY sha256 LIMIT ?2",
                )?
                .query_map(params![after, integer(limit as u64)], |row| {
                    Ok(Recorded { blob: blob_at(row, 0)?, damaged: row.get(4)? })
                })?
                .collect()
        })
    }
}
