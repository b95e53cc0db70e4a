//! The table `derived`.

use rusqlite::{OptionalExtension, params};
use windlass_schema::BuildId;

use super::content::put_blob;
use super::{SqliteCatalog, blob_at};
use crate::blob::Blob;
use crate::catalog::{CatalogError, DerivedArtefacts, DerivedKey, DerivedKind};

impl DerivedArtefacts for SqliteCatalog {
    fn derived(&self, key: DerivedKey) -> Result<Option<Blob>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT b.sha256, b.size, b.stored_size, b.write FROM derived d JOIN blob b USING (sha256)
                     WHERE d.build_id = ?1 AND d.kind = ?2 AND d.version = ?3 AND d.inputs = ?4
                     AND NOT b.damaged",
                )?
                .query_row(
                    params![key.build_id.as_bytes(), key.kind.as_str(), key.version, key.inputs.as_bytes()],
                    |row| blob_at(row, 0),
                )
                .optional()
        })
    }

    fn forget_derived_of(&self, id: BuildId, kind: DerivedKind) -> Result<(), CatalogError> {
        self.write(|connection| {
            connection.execute(
                "DELETE FROM derived WHERE build_id = ?1 AND kind = ?2",
                params![id.as_bytes(), kind.as_str()],
            )?;
            Ok(())
        })
    }

    fn put_derived(&self, key: DerivedKey, blob: Blob) -> Result<(), CatalogError> {
        self.write(|connection| {
            put_blob(connection, blob)?;
            connection
                .prepare_cached("INSERT OR REPLACE INTO derived VALUES (?1, ?2, ?3, ?4, ?5)")?
                .execute(params![
                    key.build_id.as_bytes(),
                    key.kind.as_str(),
                    key.version,
                    key.inputs.as_bytes(),
                    blob.hash.as_bytes()
                ])?;
            Ok(())
        })
    }
}
