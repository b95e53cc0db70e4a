//! The column `withdrawn_s` of the table `blob`.

use rusqlite::{Row, params};

use super::{SqliteCatalog, blob_at, integer};
use crate::blob::Blob;
use crate::catalog::{CatalogError, Collection, Unnamed};
use crate::content_hash::ContentHash;

/// The columns: the number of the object, which versions before did not have, and when the content was withdrawn.
pub(super) const COLUMNS: &str = "
ALTER TABLE blob ADD COLUMN write INTEGER NOT NULL DEFAULT 0;
ALTER TABLE blob ADD COLUMN withdrawn_s INTEGER;
";

/// Whether a row of `blob` is named by none of any other table. A table that refers to `blob` belongs here, which a test holds
/// against the foreign keys.
const UNNAMED: &str = "NOT EXISTS (SELECT 1 FROM artefact WHERE sha256 = blob.sha256)
    AND NOT EXISTS (SELECT 1 FROM derived WHERE sha256 = blob.sha256)
    AND NOT EXISTS (SELECT 1 FROM profiles WHERE sha256 = blob.sha256)
    AND NOT EXISTS (SELECT 1 FROM upload_part WHERE sha256 = blob.sha256)";

fn unnamed_row(row: &Row<'_>) -> rusqlite::Result<Unnamed> {
    let withdrawn: Option<i64> = row.get(4)?;
    Ok(Unnamed { blob: blob_at(row, 0)?, withdrawn_s: withdrawn.map(|at| at.try_into().unwrap_or(0)) })
}

impl Collection for SqliteCatalog {
    fn unnamed(&self, after: Option<ContentHash>, limit: usize) -> Result<Vec<Unnamed>, CatalogError> {
        let after = after.map_or(Vec::new(), |hash| hash.as_bytes().to_vec());
        self.read(|connection| {
            connection
                .prepare_cached(&format!(
                    "SELECT sha256, size, stored_size, write, withdrawn_s FROM blob
                     WHERE sha256 > ?1 AND {UNNAMED} ORDER BY sha256 LIMIT ?2"
                ))?
                .query_map(params![after, integer(limit as u64)], unnamed_row)?
                .collect()
        })
    }

    fn withdraw(&self, hashes: &[ContentHash], at_s: u64) -> Result<u64, CatalogError> {
        self.write(|connection| {
            let mut statement = connection.prepare_cached(&format!(
                "UPDATE blob SET withdrawn_s = ?2 WHERE sha256 = ?1 AND withdrawn_s IS NULL AND {UNNAMED}"
            ))?;
            let mut withdrawn = 0;
            for hash in hashes {
                withdrawn += statement.execute(params![hash.as_bytes(), integer(at_s)])? as u64;
            }
            Ok(withdrawn)
        })
    }

    fn forget_blobs(&self, hashes: &[ContentHash], until_s: u64) -> Result<Vec<Blob>, CatalogError> {
        self.write(|connection| {
            let mut statement = connection.prepare_cached(&format!(
                "DELETE FROM blob WHERE sha256 = ?1 AND withdrawn_s <= ?2 AND {UNNAMED}
                 RETURNING sha256, size, stored_size, write"
            ))?;
            let mut forgotten = Vec::new();
            for hash in hashes {
                let rows =
                    statement.query_map(params![hash.as_bytes(), integer(until_s)], |row| blob_at(row, 0));
                forgotten.extend(rows?.collect::<rusqlite::Result<Vec<_>>>()?);
            }
            Ok(forgotten)
        })
    }

    fn recorded(&self, hashes: &[ContentHash]) -> Result<Vec<Blob>, CatalogError> {
        self.read(|connection| {
            let mut statement = connection
                .prepare_cached("SELECT sha256, size, stored_size, write FROM blob WHERE sha256 = ?")?;
            let mut found = Vec::new();
            for hash in hashes {
                let rows = statement.query_map([hash.as_bytes()], |row| blob_at(row, 0))?;
                found.extend(rows.collect::<rusqlite::Result<Vec<_>>>()?);
            }
            Ok(found)
        })
    }

    fn forget_derived(&self, limit: usize, dry_run: bool) -> Result<u64, CatalogError> {
        const WITHOUT_IMAGE: &str = "SELECT build_id, kind FROM derived AS d
            WHERE NOT EXISTS (SELECT 1 FROM artefact WHERE build_id = d.build_id) LIMIT ?";
        let limit = integer(limit as u64);
        if dry_run {
            let count = format!("SELECT count(*) FROM ({WITHOUT_IMAGE})");
            return self
                .read(|connection| connection.query_row(&count, [limit], |row| super::unsigned(row, 0)));
        }
        let delete = format!("DELETE FROM derived WHERE (build_id, kind) IN ({WITHOUT_IMAGE})");
        self.write(|connection| Ok(connection.execute(&delete, [limit])? as u64))
    }

    fn forget_profiles(&self, before_ns: u64, limit: usize, dry_run: bool) -> Result<u64, CatalogError> {
        const ENDED: &str = "SELECT sha256 FROM profiles WHERE end_ns < ?1 ORDER BY end_ns LIMIT ?2";
        let parameters = params![integer(before_ns), integer(limit as u64)];
        if dry_run {
            let count = format!("SELECT count(*) FROM ({ENDED})");
            return self
                .read(|connection| connection.query_row(&count, parameters, |row| super::unsigned(row, 0)));
        }
        let delete = format!("DELETE FROM profiles WHERE sha256 IN ({ENDED})");
        self.write(|connection| Ok(connection.execute(&delete, parameters)? as u64))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn what_names_a_content_keeps_it() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let catalog = SqliteCatalog::open(&folder.path().join("catalog.sqlite")).expect("a new catalog");
        let tables = "SELECT DISTINCT m.name FROM sqlite_schema m, pragma_foreign_key_list(m.name) f
             WHERE m.type = 'table' AND f.\"table\" = 'blob'";
        let naming: BTreeSet<String> = catalog
            .read(|connection| connection.prepare(tables)?.query_map([], |row| row.get(0))?.collect())
            .expect("the schema");
        let kept = UNNAMED.split("FROM ").skip(1).filter_map(|rest| rest.split(' ').next());
        assert_eq!(naming, kept.map(str::to_owned).collect());
    }
}
