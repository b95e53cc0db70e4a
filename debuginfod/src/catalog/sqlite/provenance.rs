//! The table `provenance`.

use rusqlite::params;
use windlass_schema::BuildId;

use super::{SqliteCatalog, integer, malformed, unsigned};
use crate::catalog::{CatalogError, Provenance, Provenances};
use crate::content_hash::ContentHash;

/// It has no foreign keys: like the log, it tells of what is gone, too. Some databases of version 2 have it.
pub(super) const TABLES: &str = "
CREATE TABLE IF NOT EXISTS provenance (
    build_id BLOB NOT NULL,
    kind TEXT NOT NULL,
    sha256 BLOB NOT NULL,
    upstream TEXT NOT NULL,
    fetched_s INTEGER NOT NULL,
    PRIMARY KEY (build_id, kind, sha256)
) STRICT, WITHOUT ROWID;
";

impl Provenances for SqliteCatalog {
    fn put_provenance(&self, provenance: &Provenance) -> Result<(), CatalogError> {
        self.write(|connection| {
            connection
                .prepare_cached("INSERT OR IGNORE INTO provenance VALUES (?1, ?2, ?3, ?4, ?5)")?
                .execute(params![
                    provenance.build_id.as_bytes(),
                    provenance.kind.as_str(),
                    provenance.hash.as_bytes(),
                    provenance.upstream,
                    integer(provenance.fetched_s)
                ])?;
            Ok(())
        })
    }

    fn provenances(&self, id: BuildId) -> Result<Vec<Provenance>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT kind, sha256, upstream, fetched_s FROM provenance WHERE build_id = ?
                     ORDER BY fetched_s, kind, sha256",
                )?
                .query_map([id.as_bytes()], |row| {
                    Ok(Provenance {
                        build_id: id,
                        kind: row.get_ref(0)?.as_str()?.parse().map_err(|e| malformed(0, e))?,
                        hash: ContentHash::new(row.get(1)?),
                        upstream: row.get(2)?,
                        fetched_s: unsigned(row, 3)?,
                    })
                })?
                .collect()
        })
    }
}
