//! The table `profiles`.

use std::ops::Range;

use rusqlite::{OptionalExtension, Row, params};

use super::content::put_blob;
use super::{SqliteCatalog, blob_at, integer, unsigned};
use crate::catalog::{CatalogError, ProfileBatch, ProfileBatches};
use crate::content_hash::ContentHash;

const PROFILE_COLUMNS: &str = "b.sha256, b.size, b.stored_size, b.write, p.start_ns, p.end_ns, b.damaged \
     FROM profiles p JOIN blob b USING (sha256)";

fn profiles_row(row: &Row<'_>) -> rusqlite::Result<ProfileBatch> {
    Ok(ProfileBatch {
        blob: blob_at(row, 0)?,
        start_ns: unsigned(row, 4)?,
        end_ns: unsigned(row, 5)?,
        damaged: row.get(6)?,
    })
}

impl ProfileBatches for SqliteCatalog {
    fn put_profiles(&self, batch: ProfileBatch) -> Result<(), CatalogError> {
        self.write(|connection| {
            put_blob(connection, batch.blob)?;
            connection.prepare_cached("INSERT OR IGNORE INTO profiles VALUES (?1, ?2, ?3)")?.execute(
                params![batch.blob.hash.as_bytes(), integer(batch.start_ns), integer(batch.end_ns)],
            )?;
            Ok(())
        })
    }

    fn profiles(&self, range_ns: Range<u64>, limit: usize) -> Result<Vec<ProfileBatch>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(&format!(
                    "SELECT {PROFILE_COLUMNS} WHERE p.end_ns >= ?1 AND p.start_ns < ?2
                     ORDER BY p.start_ns, b.sha256 LIMIT ?3",
                ))?
                .query_map(
                    params![integer(range_ns.start), integer(range_ns.end), integer(limit as u64)],
                    profiles_row,
                )?
                .collect()
        })
    }

    fn profiles_of(&self, hash: ContentHash) -> Result<Option<ProfileBatch>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(&format!("SELECT {PROFILE_COLUMNS} WHERE p.sha256 = ?"))?
                .query_row([hash.as_bytes()], profiles_row)
                .optional()
        })
    }
}
