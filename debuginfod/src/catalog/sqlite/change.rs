//! The table `change`: triggers fill it, in the transaction of the change, whoever makes that.

use rusqlite::OptionalExtension;
use windlass_schema::BuildId;

use super::{SqliteCatalog, integer, malformed, unsigned};
use crate::catalog::{CatalogError, ChangeList, Changed, Changes};

/// The latest 1,024 to 1,151 entries are kept: at a thousand uploads a second, what a replica misses in one. The greatest number is
/// never deleted, so none is given twice. That an artefact was used is no change of it: nobody is to ask again for that.
///
/// Some databases of version 2 have the table, and triggers that know no uses.
pub(super) const TABLES: &str = "
CREATE TABLE IF NOT EXISTS change (
    id INTEGER PRIMARY KEY,
    build_id BLOB NOT NULL
) STRICT;
DROP TRIGGER IF EXISTS change_ends;
DROP TRIGGER IF EXISTS artefact_comes;
DROP TRIGGER IF EXISTS artefact_changes;
DROP TRIGGER IF EXISTS artefact_goes;
DROP TRIGGER IF EXISTS content_changes;
CREATE TRIGGER change_ends AFTER INSERT ON change WHEN NEW.id % 128 = 0 BEGIN
    DELETE FROM change WHERE id <= NEW.id - 1024;
END;
CREATE TRIGGER artefact_comes AFTER INSERT ON artefact BEGIN
    INSERT INTO change (build_id) VALUES (NEW.build_id);
END;
CREATE TRIGGER artefact_changes AFTER UPDATE OF
    build_id, kind, path, canonical_path, sha256, file_name, modified_s, facts, namespace, stored_s
ON artefact BEGIN
    INSERT INTO change (build_id) VALUES (NEW.build_id);
END;
CREATE TRIGGER artefact_goes AFTER DELETE ON artefact BEGIN
    INSERT INTO change (build_id) VALUES (OLD.build_id);
END;
CREATE TRIGGER content_changes AFTER UPDATE ON blob
WHEN OLD.damaged <> NEW.damaged OR OLD.stored_size <> NEW.stored_size OR OLD.write <> NEW.write BEGIN
    INSERT INTO change (build_id) SELECT DISTINCT build_id FROM artefact WHERE sha256 = NEW.sha256;
END;
";

impl ChangeList for SqliteCatalog {
    fn changes(&self, since: Option<u64>) -> Result<Changes, CatalogError> {
        self.read(|connection| {
            let end = "SELECT coalesce(max(id), 0) FROM change";
            let Some(since) = since else {
                let position = connection.prepare_cached(end)?.query_row([], |row| unsigned(row, 0))?;
                return Ok(Changes { position, changed: Changed::Images(Vec::new()) });
            };
            let mut images = Vec::new();
            let mut position = since;
            let mut query =
                connection.prepare_cached("SELECT id, build_id FROM change WHERE id > ? ORDER BY id")?;
            let mut rows = query.query([integer(since)])?;
            while let Some(row) = rows.next()? {
                position = unsigned(row, 0)?;
                let id = BuildId::new(row.get_ref(1)?.as_blob()?).map_err(|e| malformed(1, e))?;
                images.push(id);
            }
            // Asked last: what was deleted before the query above is missing in it.
            let kept = "SELECT min(id), max(id) FROM change HAVING count(*) > 0";
            let kept = connection
                .prepare_cached(kept)?
                .query_row([], |row| Ok((unsigned(row, 0)?, unsigned(row, 1)?)))
                .optional()?;
            let changed = match kept {
                Some((first, last)) if first <= since + 1 && since <= last => {
                    images.sort_unstable();
                    images.dedup();
                    Changed::Images(images)
                }
                None if since == 0 => Changed::Images(Vec::new()),
                Some((_, last)) => {
                    position = position.max(last);
                    if since > last {
                        position = last; // another database than before, restored from a backup
                    }
                    Changed::Any
                }
                None => {
                    position = 0;
                    Changed::Any
                }
            };
            Ok(Changes { position, changed })
        })
    }
}
