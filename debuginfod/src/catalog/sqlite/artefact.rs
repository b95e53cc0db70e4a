//! The table `artefact`.

use rusqlite::{Connection, OptionalExtension, Row, params};
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use super::audit::add_entry;
use super::content::put_blob;
use super::inventory::{add_usage, used_bytes};
use super::{SqliteCatalog, blob_at, integer, malformed, unsigned};
use crate::catalog::{
    Action, Artefact, Artefacts, AuditEntry, CatalogError, MetadataQuery, Name, Put, STORED, Subject, Writer,
    canonical_path,
};
use crate::content_hash::ContentHash;
use crate::elf::Facts;

/// The column of the last use. When that was of what is there already nobody wrote down: perhaps just now.
pub(super) const COLUMNS: &str = "
ALTER TABLE artefact ADD COLUMN used_s INTEGER NOT NULL DEFAULT 0;
UPDATE artefact SET used_s = unixepoch();
";

/// Uses recorded in one transaction, so that others get their turn.
const BATCH_USES: usize = 10_000;
pub(super) const ARTEFACT_COLUMNS: &str = "a.build_id, a.kind, a.path, b.sha256, b.size, b.stored_size, b.write, a.file_name, a.modified_s, \
     a.facts, b.damaged, a.namespace, a.stored_s, a.used_s FROM artefact a JOIN blob b USING (sha256)";

pub(super) fn artefact_row(row: &Row<'_>) -> rusqlite::Result<Artefact> {
    Ok(Artefact {
        build_id: BuildId::new(row.get_ref(0)?.as_blob()?).map_err(|e| malformed(0, e))?,
        kind: row.get_ref(1)?.as_str()?.parse().map_err(|e| malformed(1, e))?,
        path: row.get(2)?,
        blob: blob_at(row, 3)?,
        file_name: row.get(7)?,
        modified_s: unsigned(row, 8)?,
        facts: row.get_ref(9)?.as_str()?.parse().map_err(|e| malformed(9, e))?,
        damaged: row.get(10)?,
        namespace: row.get_ref(11)?.as_str()?.parse().map_err(|e| malformed(11, e))?,
        stored_s: unsigned(row, 12)?,
        used_s: unsigned(row, 13)?,
    })
}

/// Records a use, unless a later one is on record. `false`: there is no such artefact.
fn note_use(connection: &Connection, name: &Name, at_s: u64) -> rusqlite::Result<bool> {
    let Name { build_id, kind, path, namespace } = name;
    let found = connection
        .prepare_cached(
            "UPDATE artefact SET used_s = max(used_s, ?5)
             WHERE build_id = ?1 AND kind = ?2 AND path = ?3 AND namespace = ?4",
        )?
        .execute(params![build_id.as_bytes(), kind.as_str(), path, namespace.as_str(), integer(at_s)])?;
    Ok(found == 1)
}

impl SqliteCatalog {
    /// Records `artefact`, unless its name is taken in its namespace by sound content other than `poorer`.
    fn offer(
        &self,
        artefact: &Artefact,
        poorer: Option<ContentHash>,
        writer: &Writer,
        quota_bytes: Option<u64>,
    ) -> Result<Put, CatalogError> {
        let canonical = if artefact.path.is_empty() { String::new() } else { canonical_path(&artefact.path) };
        let facts = serde_json::to_string(&artefact.facts)
            .map_err(|e| CatalogError::Row { column: "facts", why: e.to_string() })?;
        let mut entry = AuditEntry {
            at_s: artefact.stored_s,
            writer: writer.clone(),
            action: Action::Upload,
            subject: Subject::from(artefact),
            result: STORED.to_owned(),
        };
        self.write(|connection| {
            let namespace = artefact.namespace.as_str();
            let key = params![artefact.build_id.as_bytes(), artefact.kind.as_str(), artefact.path, namespace];
            let present = connection
                .prepare_cached(
                    "SELECT b.sha256, b.size, b.stored_size, b.write, b.damaged
                     FROM artefact a JOIN blob b USING (sha256)
                     WHERE a.build_id = ?1 AND a.kind = ?2 AND a.path = ?3 AND a.namespace = ?4",
                )?
                .query_row(key, |row| Ok((blob_at(row, 0)?, row.get::<_, bool>(4)?)))
                .optional()?;
            match &present {
                Some((blob, _)) if blob.hash == artefact.blob.hash => {
                    put_blob(connection, artefact.blob)?;
                    note_use(connection, &artefact.name(), artefact.used_s)?;
                    return Ok(Put::Present(*blob));
                }
                Some((blob, false)) if Some(blob.hash) != poorer => return Ok(Put::Present(*blob)),
                Some((blob, _)) => entry.result = format!("{STORED} in place of {}", blob.hash),
                None => {}
            }
            let replaced = present.as_ref().map_or(0, |(blob, _)| blob.size);
            if let Some(quota_bytes) = quota_bytes {
                let used_bytes = used_bytes(connection, &artefact.namespace)?;
                if used_bytes.saturating_sub(replaced).saturating_add(artefact.blob.size) > quota_bytes {
                    return Ok(Put::OverQuota(used_bytes));
                }
            }
            put_blob(connection, artefact.blob)?;
            let added = integer(artefact.blob.size) - integer(replaced);
            add_usage(connection, &artefact.namespace, i64::from(present.is_none()), added)?;
            connection
                .prepare_cached(
                    "INSERT OR REPLACE INTO artefact VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
                )?
                .execute(params![
                    artefact.build_id.as_bytes(),
                    artefact.kind.as_str(),
                    artefact.path,
                    canonical,
                    artefact.blob.hash.as_bytes(),
                    artefact.file_name,
                    integer(artefact.modified_s),
                    facts,
                    namespace,
                    integer(artefact.stored_s),
                    integer(artefact.used_s),
                ])?;
            add_entry(connection, &entry)?;
            Ok(Put::Stored)
        })
    }
}

impl Artefacts for SqliteCatalog {
    fn versions(&self, id: BuildId, kind: ArtefactKind, path: &str) -> Result<Vec<Artefact>, CatalogError> {
        let canonical = if path.is_empty() { String::new() } else { canonical_path(path) };
        self.read(|connection| {
            connection
                .prepare_cached(&format!(
                    "SELECT {ARTEFACT_COLUMNS} WHERE a.build_id = ?1 AND a.kind = ?2
                     AND (a.path = ?3 OR a.canonical_path = ?4)"
                ))?
                .query_map(params![id.as_bytes(), kind.as_str(), path, canonical], artefact_row)?
                .collect()
        })
    }

    fn put_artefact(
        &self,
        artefact: &Artefact,
        writer: &Writer,
        quota_bytes: Option<u64>,
    ) -> Result<Put, CatalogError> {
        self.offer(artefact, None, writer, quota_bytes)
    }

    fn replace_artefact(
        &self,
        artefact: &Artefact,
        poorer: ContentHash,
        writer: &Writer,
        quota_bytes: Option<u64>,
    ) -> Result<Put, CatalogError> {
        self.offer(artefact, Some(poorer), writer, quota_bytes)
    }

    fn metadata(&self, query: &MetadataQuery, limit: usize) -> Result<Vec<Artefact>, CatalogError> {
        let (condition, value) = match query {
            MetadataQuery::File(name) => ("(a.path = ?1 OR a.file_name = ?1)", name),
            MetadataQuery::Glob(pattern) => ("(a.path GLOB ?1 OR a.file_name GLOB ?1)", pattern),
            MetadataQuery::BuildId(id) => ("lower(hex(a.build_id)) = ?1", id),
        };
        self.read(|connection| {
            connection
                .prepare_cached(&format!(
                    "SELECT {ARTEFACT_COLUMNS} WHERE {condition} AND NOT b.damaged LIMIT ?2"
                ))?
                .query_map(params![value, integer(limit as u64)], artefact_row)?
                .collect()
        })
    }

    fn note_uses(&self, uses: &[(Name, u64)]) -> Result<Vec<bool>, CatalogError> {
        let mut found = Vec::with_capacity(uses.len());
        for batch in uses.chunks(BATCH_USES) {
            let known = self.write(|connection| {
                let each = batch.iter().map(|(name, at_s)| note_use(connection, name, *at_s));
                each.collect::<rusqlite::Result<Vec<_>>>()
            })?;
            found.extend(known);
        }
        Ok(found)
    }

    fn correct_facts(&self, name: &Name, hash: ContentHash, facts: &Facts) -> Result<(), CatalogError> {
        let facts = serde_json::to_string(facts)
            .map_err(|e| CatalogError::Row { column: "facts", why: e.to_string() })?;
        let Name { build_id, kind, path, namespace } = name;
        self.write(|connection| {
            connection.execute(
                "UPDATE artefact SET facts = ?6
                 WHERE build_id = ?1 AND kind = ?2 AND path = ?3 AND namespace = ?4 AND sha256 = ?5",
                params![build_id.as_bytes(), kind.as_str(), path, namespace.as_str(), hash.as_bytes(), facts],
            )?;
            Ok(())
        })
    }

    fn artefacts_of(&self, hash: ContentHash) -> Result<Vec<Artefact>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(&format!("SELECT {ARTEFACT_COLUMNS} WHERE a.sha256 = ?"))?
                .query_map([hash.as_bytes()], artefact_row)?
                .collect()
        })
    }
}
