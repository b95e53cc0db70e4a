//! The table `artefact`.

use rusqlite::{OptionalExtension, Row, params};
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use super::audit::add_entry;
use super::content::put_blob;
use super::{SqliteCatalog, blob_at, integer, malformed, unsigned};
use crate::catalog::{
    Action, Artefact, Artefacts, AuditEntry, CatalogError, MetadataQuery, Put, STORED, Subject, Writer,
    canonical_path,
};
use crate::content_hash::ContentHash;

const ARTEFACT_COLUMNS: &str = "a.build_id, a.kind, a.path, b.sha256, b.size, b.stored_size, a.file_name, a.modified_s, \
     a.facts, b.damaged, a.namespace, a.stored_s FROM artefact a JOIN blob b USING (sha256)";

fn artefact_row(row: &Row<'_>) -> rusqlite::Result<Artefact> {
    Ok(Artefact {
        build_id: BuildId::new(row.get_ref(0)?.as_blob()?).map_err(|e| malformed(0, e))?,
        kind: row.get_ref(1)?.as_str()?.parse().map_err(|e| malformed(1, e))?,
        path: row.get(2)?,
        blob: blob_at(row, 3)?,
        file_name: row.get(6)?,
        modified_s: unsigned(row, 7)?,
        facts: row.get_ref(8)?.as_str()?.parse().map_err(|e| malformed(8, e))?,
        damaged: row.get(9)?,
        namespace: row.get_ref(10)?.as_str()?.parse().map_err(|e| malformed(10, e))?,
        stored_s: unsigned(row, 11)?,
    })
}

impl SqliteCatalog {
    /// Records `artefact`, unless its name is taken in its namespace by sound content other than `poorer`.
    fn offer(
        &self,
        artefact: &Artefact,
        poorer: Option<ContentHash>,
        writer: &Writer,
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
                    "SELECT b.sha256, b.size, b.stored_size, b.damaged
                     FROM artefact a JOIN blob b USING (sha256)
                     WHERE a.build_id = ?1 AND a.kind = ?2 AND a.path = ?3 AND a.namespace = ?4",
                )?
                .query_row(key, |row| Ok((blob_at(row, 0)?, row.get::<_, bool>(3)?)))
                .optional()?;
            match present {
                Some((blob, _)) if blob.hash == artefact.blob.hash => {
                    put_blob(connection, artefact.blob)?;
                    return Ok(Put::Present(blob));
                }
                Some((blob, false)) if Some(blob.hash) != poorer => return Ok(Put::Present(blob)),
                Some((blob, _)) => entry.result = format!("{STORED} in place of {}", blob.hash),
                None => {}
            }
            put_blob(connection, artefact.blob)?;
            connection
                .prepare_cached(
                    "INSERT OR REPLACE INTO artefact VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
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

    fn put_artefact(&self, artefact: &Artefact, writer: &Writer) -> Result<Put, CatalogError> {
        self.offer(artefact, None, writer)
    }

    fn replace_artefact(
        &self,
        artefact: &Artefact,
        poorer: ContentHash,
        writer: &Writer,
    ) -> Result<Put, CatalogError> {
        self.offer(artefact, Some(poorer), writer)
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

    fn artefacts_of(&self, hash: ContentHash) -> Result<Vec<Artefact>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(&format!("SELECT {ARTEFACT_COLUMNS} WHERE a.sha256 = ?"))?
                .query_map([hash.as_bytes()], artefact_row)?
                .collect()
        })
    }
}
