//! The table `audit`.

use rusqlite::{Connection, Row, params};
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use super::{SqliteCatalog, integer, malformed, unsigned};
use crate::catalog::{AuditEntry, AuditLog, AuditRecord, CatalogError, Subject, Writer};
use crate::content_hash::ContentHash;
use crate::namespace::Namespace;

fn record_row(row: &Row<'_>) -> rusqlite::Result<AuditRecord> {
    let build_id = row.get_ref(5)?.as_blob_or_null()?.map(BuildId::new).transpose();
    let kind = row.get_ref(6)?.as_str_or_null()?.map(str::parse::<ArtefactKind>).transpose();
    let namespace = row.get_ref(8)?.as_str_or_null()?.map(str::parse::<Namespace>).transpose();
    let size = row.get::<_, Option<i64>>(10)?.map(u64::try_from).transpose();
    let subject = Subject {
        build_id: build_id.map_err(|e| malformed(5, e))?,
        kind: kind.map_err(|e| malformed(6, e))?,
        path: row.get(7)?,
        namespace: namespace.map_err(|e| malformed(8, e))?,
        sha256: row.get::<_, Option<[u8; 32]>>(9)?.map(ContentHash::new),
        size_bytes: size.map_err(|e| malformed(10, e))?,
    };
    let entry = AuditEntry {
        at_s: unsigned(row, 1)?,
        writer: Writer { token: row.get(2)?, peer: row.get(3)? },
        action: row.get_ref(4)?.as_str()?.parse().map_err(|e| malformed(4, e))?,
        subject,
        result: row.get(11)?,
    };
    Ok(AuditRecord { id: unsigned(row, 0)?, entry })
}

/// Adds an entry: part of each change that belongs in the log.
pub(super) fn add_entry(connection: &Connection, entry: &AuditEntry) -> rusqlite::Result<()> {
    let AuditEntry { at_s, writer, action, subject, result } = entry;
    connection
        .prepare_cached(
            "INSERT INTO audit (at_s, token, peer, action, build_id, kind, path, namespace, sha256, size, result)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
        )?
        .execute(params![
            integer(*at_s),
            writer.token,
            writer.peer,
            action.as_str(),
            subject.build_id.as_ref().map(BuildId::as_bytes),
            subject.kind.map(|kind| kind.as_str()),
            subject.path,
            subject.namespace.as_ref().map(|namespace| namespace.as_str()),
            subject.sha256.as_ref().map(ContentHash::as_bytes),
            subject.size_bytes.map(integer),
            result,
        ])?;
    Ok(())
}

impl AuditLog for SqliteCatalog {
    fn record(&self, entry: &AuditEntry) -> Result<(), CatalogError> {
        self.write(|connection| add_entry(connection, entry))
    }

    fn audit(&self, before: Option<u64>, limit: usize) -> Result<Vec<AuditRecord>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT id, at_s, token, peer, action, build_id, kind, path, namespace, sha256, size, result
                     FROM audit WHERE id < ?1 ORDER BY id DESC LIMIT ?2",
                )?
                .query_map(params![integer(before.unwrap_or(u64::MAX)), integer(limit as u64)], record_row)?
                .collect()
        })
    }

    fn trim_audit(&self, since_s: u64, keep: u64) -> Result<(), CatalogError> {
        self.write(|connection| {
            connection.execute(
                "DELETE FROM audit WHERE at_s < ?1 OR id <= (SELECT max(id) FROM audit) - ?2",
                params![integer(since_s), integer(keep)],
            )?;
            Ok(())
        })
    }
}
