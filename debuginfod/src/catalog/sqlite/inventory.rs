//! The table `usage`, and the table `artefact` by image.

use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Row, params, params_from_iter};
use windlass_schema::BuildId;

use super::artefact::{ARTEFACT_COLUMNS, artefact_row};
use super::audit::add_entry;
use super::{SqliteCatalog, blob_at, integer, malformed, unsigned};
use crate::blob::Blob;
use crate::catalog::{
    Action, Artefact, AuditEntry, CatalogError, DerivedKey, DerivedKind, Image, ImagePage, ImageQuery,
    Inventory, Removal, Removed, Subject, Usage, Writer,
};
use crate::content_hash::ContentHash;
use crate::namespace::Namespace;

/// The table: sums over `artefact`, so that an upload need not add up all that its namespace has.
pub(super) const TABLES: &str = "
CREATE TABLE usage (
    namespace TEXT PRIMARY KEY,
    artefacts INTEGER NOT NULL,
    bytes INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX derived_content ON derived (sha256);
";
/// What the table is to say.
pub(super) const ADD_UP: &str = "
DELETE FROM usage;
INSERT INTO usage
    SELECT a.namespace, count(*), sum(b.size) FROM artefact a JOIN blob b USING (sha256) GROUP BY a.namespace;
";

/// Adds to what a namespace takes: part of each change to its artefacts.
pub(super) fn add_usage(
    connection: &Connection,
    namespace: &Namespace,
    artefacts: i64,
    bytes: i64,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO usage VALUES (?1, ?2, ?3)
             ON CONFLICT DO UPDATE SET artefacts = artefacts + ?2, bytes = bytes + ?3",
        )?
        .execute(params![namespace.as_str(), artefacts, bytes])?;
    Ok(())
}

/// Decoded bytes of the artefacts of a namespace.
pub(super) fn used_bytes(connection: &Connection, namespace: &Namespace) -> rusqlite::Result<u64> {
    let bytes = connection
        .prepare_cached("SELECT bytes FROM usage WHERE namespace = ?")?
        .query_row([namespace.as_str()], |row| unsigned(row, 0))
        .optional()?;
    Ok(bytes.unwrap_or(0))
}

fn image_row(row: &Row<'_>) -> rusqlite::Result<Image> {
    Ok(Image {
        build_id: BuildId::new(row.get_ref(0)?.as_blob()?).map_err(|e| malformed(0, e))?,
        namespace: row.get_ref(1)?.as_str()?.parse().map_err(|e| malformed(1, e))?,
        file_name: row.get(2)?,
        artefacts: unsigned(row, 3)?,
        bytes: unsigned(row, 4)?,
        stored_s: unsigned(row, 5)?,
        used_s: unsigned(row, 6)?,
    })
}

/// Sources have names of their own, which say less of the image.
const IMAGES: &str = "
    SELECT a.build_id, a.namespace, coalesce(max(CASE WHEN a.path = '' THEN a.file_name END), ''),
           count(*), sum(b.size), max(a.stored_s), max(a.used_s)
    FROM artefact a JOIN blob b USING (sha256)
    WHERE a.build_id > ?1 AND a.build_id <= ?2 AND (?3 IS NULL OR a.namespace = ?3)
    AND (?4 IS NULL OR EXISTS (SELECT 1 FROM label l WHERE l.build_id = a.build_id AND l.label = ?4))
    GROUP BY a.build_id, a.namespace ORDER BY a.build_id, a.namespace";

/// The last build-ID of a page.
const PAGE_END: &str = "
    SELECT max(build_id), count(*) FROM (
        SELECT DISTINCT a.build_id FROM artefact a WHERE a.build_id > ?1 AND (?2 IS NULL OR a.namespace = ?2)
        AND (?3 IS NULL OR EXISTS (SELECT 1 FROM label l WHERE l.build_id = a.build_id AND l.label = ?3))
        ORDER BY a.build_id LIMIT ?4)";

/// The condition under which artefacts are to go, and its parameters.
fn condition(removal: &Removal) -> (String, Vec<Value>) {
    let mut condition = String::from("a.build_id = ? AND a.namespace = ?");
    let mut values =
        vec![removal.build_id.as_bytes().to_vec().into(), removal.namespace.as_str().to_owned().into()];
    if let Some(kind) = removal.kind {
        condition += " AND a.kind = ?";
        values.push(kind.as_str().to_owned().into());
    }
    if let Some(path) = &removal.path {
        condition += " AND a.path = ?";
        values.push(path.clone().into());
    }
    (condition, values)
}

fn remove(connection: &Connection, removal: &Removal, writer: &Writer) -> rusqlite::Result<Removed> {
    let Removal { build_id, namespace, unless_used_since_s, .. } = removal;
    if let Some(since_s) = unless_used_since_s {
        let used: bool = connection
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM artefact WHERE build_id = ?1 AND namespace = ?2 AND used_s >= ?3)",
            )?
            .query_row(params![build_id.as_bytes(), namespace.as_str(), integer(*since_s)], |row| row.get(0))?;
        if used {
            return Ok(Removed::default());
        }
    }
    let (condition, values) = condition(removal);
    let removed = connection
        .prepare_cached(&format!(
            "SELECT count(*), coalesce(sum(b.size), 0) FROM artefact a JOIN blob b USING (sha256) WHERE {condition}"
        ))?
        .query_row(params_from_iter(&values), |row| {
            Ok(Removed { artefacts: unsigned(row, 0)?, bytes: unsigned(row, 1)? })
        })?;
    if removed.artefacts == 0 {
        return Ok(removed);
    }
    connection
        .prepare_cached(&format!("DELETE FROM artefact AS a WHERE {condition}"))?
        .execute(params_from_iter(&values))?;
    add_usage(connection, namespace, -integer(removed.artefacts), -integer(removed.bytes))?;
    connection.prepare_cached("DELETE FROM derived WHERE build_id = ?")?.execute([build_id.as_bytes()])?;
    connection
        .prepare_cached(
            "DELETE FROM label WHERE build_id = ?1 AND NOT EXISTS (SELECT 1 FROM artefact WHERE build_id = ?1)",
        )?
        .execute([build_id.as_bytes()])?;
    let subject = Subject {
        build_id: Some(*build_id),
        kind: removal.kind,
        path: removal.path.clone().unwrap_or_default(),
        namespace: Some(namespace.clone()),
        sha256: None,
        size_bytes: Some(removed.bytes),
    };
    let result = format!("removed {} artefacts: {}", removed.artefacts, removal.why);
    let (at_s, writer) = (removal.at_s, writer.clone());
    add_entry(connection, &AuditEntry { at_s, writer, action: Action::Delete, subject, result })?;
    Ok(removed)
}

impl Inventory for SqliteCatalog {
    fn images(
        &self,
        query: &ImageQuery,
        after: Option<BuildId>,
        limit: usize,
    ) -> Result<ImagePage, CatalogError> {
        let after = after.map_or(Vec::new(), |id| id.as_bytes().to_vec());
        let namespace = query.namespace.as_ref().map(Namespace::as_str);
        let label = query.label.as_ref().map(ToString::to_string);
        self.read(|connection| {
            let (end, count): (Option<Vec<u8>>, i64) = connection
                .prepare_cached(PAGE_END)?
                .query_row(params![after, namespace, label, integer(limit as u64)], |row| {
                    Ok((row.get(0)?, row.get(1)?))
                })?;
            let Some(end) = end else { return Ok(ImagePage::default()) };
            let images = connection
                .prepare_cached(IMAGES)?
                .query_map(params![after, end, namespace, label], image_row)?
                .collect::<rusqlite::Result<_>>()?;
            let next = BuildId::new(&end).map_err(|e| malformed(0, e))?;
            Ok(ImagePage { images, next: (count == integer(limit as u64)).then_some(next) })
        })
    }

    fn artefacts(&self, id: BuildId, limit: usize) -> Result<Vec<Artefact>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(&format!(
                    "SELECT {ARTEFACT_COLUMNS} WHERE a.build_id = ?1 ORDER BY a.kind, a.path, a.namespace LIMIT ?2"
                ))?
                .query_map(params![id.as_bytes(), integer(limit as u64)], artefact_row)?
                .collect()
        })
    }

    fn derived_of(&self, id: BuildId) -> Result<Vec<(DerivedKey, Blob)>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT d.kind, d.version, d.inputs, b.sha256, b.size, b.stored_size, b.write
                     FROM derived d JOIN blob b USING (sha256) WHERE d.build_id = ? ORDER BY d.kind",
                )?
                .query_map([id.as_bytes()], |row| {
                    let kind: DerivedKind = row.get_ref(0)?.as_str()?.parse().map_err(|e| malformed(0, e))?;
                    let (version, inputs) = (row.get(1)?, ContentHash::new(row.get(2)?));
                    Ok((DerivedKey { build_id: id, kind, version, inputs }, blob_at(row, 3)?))
                })?
                .collect()
        })
    }

    fn usage(&self) -> Result<Vec<Usage>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT namespace, sum(artefacts), sum(bytes), sum(unfinished) FROM (
                         SELECT namespace, artefacts, bytes, 0 AS unfinished FROM usage
                         UNION ALL
                         SELECT p.namespace, 0, 0, b.size FROM upload_part p JOIN blob b USING (sha256))
                     GROUP BY namespace HAVING sum(artefacts) > 0 OR sum(unfinished) > 0 ORDER BY namespace",
                )?
                .query_map([], |row| {
                    Ok(Usage {
                        namespace: row.get_ref(0)?.as_str()?.parse().map_err(|e| malformed(0, e))?,
                        artefacts: unsigned(row, 1)?,
                        bytes: unsigned(row, 2)?,
                        unfinished_bytes: unsigned(row, 3)?,
                    })
                })?
                .collect()
        })
    }

    fn wrong_usage(&self) -> Result<Vec<Namespace>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare(
                    "SELECT namespace FROM (
                         SELECT namespace, artefacts, bytes FROM usage WHERE artefacts <> 0 OR bytes <> 0
                         UNION ALL
                         SELECT a.namespace, count(*), sum(b.size) FROM artefact a JOIN blob b USING (sha256)
                         GROUP BY a.namespace)
                     GROUP BY namespace
                     HAVING count(*) <> 2 OR min(artefacts) <> max(artefacts) OR min(bytes) <> max(bytes)",
                )?
                .query_map([], |row| row.get_ref(0)?.as_str()?.parse().map_err(|e| malformed(0, e)))?
                .collect()
        })
    }

    fn add_up_usage(&self) -> Result<(), CatalogError> {
        self.write(|connection| connection.execute_batch(ADD_UP))
    }

    fn remove(&self, removal: &Removal, writer: &Writer) -> Result<Removed, CatalogError> {
        self.write(|connection| remove(connection, removal, writer))
    }
}
