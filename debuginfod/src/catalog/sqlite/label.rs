//! The table `label`.

use rusqlite::{Connection, params};
use windlass_schema::BuildId;

use super::audit::add_entry;
use super::{SqliteCatalog, integer, malformed, unsigned};
use crate::catalog::{
    Action, AuditEntry, CatalogError, LabelChange, LabelOutcome, Labelled, Labels, MAX_LABELS, Subject,
    Writer,
};

/// The table. It has no foreign key: an image has labels as long as anything is stored of it, whatever comes and goes.
pub(super) const TABLES: &str = "
CREATE TABLE label (
    build_id BLOB NOT NULL,
    namespace TEXT NOT NULL,
    label TEXT NOT NULL,
    since_s INTEGER NOT NULL,
    PRIMARY KEY (build_id, namespace, label)
) STRICT, WITHOUT ROWID;
";

/// Images changed in one transaction, so that others get their turn.
const BATCH_IMAGES: usize = 1000;

fn change(
    connection: &Connection,
    id: BuildId,
    change: &LabelChange,
    writer: &Writer,
) -> rusqlite::Result<LabelOutcome> {
    let LabelChange { namespace, add, remove, at_s } = change;
    let is_known: bool = connection
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM artefact WHERE build_id = ?)")?
        .query_row([id.as_bytes()], |row| row.get(0))?;
    if !is_known {
        return Ok(LabelOutcome::Unknown);
    }
    connection.execute_batch("SAVEPOINT labels")?;
    let mut words = Vec::new();
    for label in remove {
        let removed = connection
            .prepare_cached("DELETE FROM label WHERE build_id = ?1 AND namespace = ?2 AND label = ?3")?
            .execute(params![id.as_bytes(), namespace.as_str(), label.to_string()])?;
        words.extend((removed > 0).then(|| format!("removed {label}")));
    }
    for label in add {
        let added = connection
            .prepare_cached("INSERT OR IGNORE INTO label VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![id.as_bytes(), namespace.as_str(), label.to_string(), integer(*at_s)])?;
        words.extend((added > 0).then(|| format!("added {label}")));
    }
    let count: i64 = connection
        .prepare_cached("SELECT count(*) FROM label WHERE build_id = ?1 AND namespace = ?2")?
        .query_row(params![id.as_bytes(), namespace.as_str()], |row| row.get(0))?;
    if count > MAX_LABELS as i64 {
        connection.execute_batch("ROLLBACK TO labels; RELEASE labels")?;
        return Ok(LabelOutcome::TooMany);
    }
    connection.execute_batch("RELEASE labels")?;
    if words.is_empty() {
        return Ok(LabelOutcome::Unchanged);
    }
    let subject = Subject { build_id: Some(id), namespace: Some(namespace.clone()), ..Subject::default() };
    let (action, writer) = (Action::Label, writer.clone());
    add_entry(connection, &AuditEntry { at_s: *at_s, writer, action, subject, result: words.join(", ") })?;
    Ok(LabelOutcome::Changed)
}

impl Labels for SqliteCatalog {
    fn labels(&self, id: BuildId) -> Result<Vec<Labelled>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT namespace, label, since_s FROM label WHERE build_id = ? ORDER BY namespace, label",
                )?
                .query_map([id.as_bytes()], |row| {
                    Ok(Labelled {
                        namespace: row.get_ref(0)?.as_str()?.parse().map_err(|e| malformed(0, e))?,
                        label: row.get_ref(1)?.as_str()?.parse().map_err(|e| malformed(1, e))?,
                        since_s: unsigned(row, 2)?,
                    })
                })?
                .collect()
        })
    }

    fn change_labels(
        &self,
        ids: &[BuildId],
        change: &LabelChange,
        writer: &Writer,
    ) -> Result<Vec<LabelOutcome>, CatalogError> {
        let mut outcomes = Vec::with_capacity(ids.len());
        for batch in ids.chunks(BATCH_IMAGES) {
            let changed = self.write(|connection| {
                let each = batch.iter().map(|id| self::change(connection, *id, change, writer));
                each.collect::<rusqlite::Result<Vec<_>>>()
            })?;
            outcomes.extend(changed);
        }
        Ok(outcomes)
    }
}
