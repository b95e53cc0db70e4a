//! The tables, and how a database gets from one version of them to the next.
//!
//! A new database takes the same way as an old one: it starts with the tables of version 1 and goes through every step
//! after it, so no second description of the newest tables can differ from what a migration makes.

use rusqlite::{Connection, TransactionBehavior};

use crate::catalog::CatalogError;

/// Version of the tables, kept in `PRAGMA user_version`; 0 is an empty database. It counts [`STEPS`].
pub(super) const SCHEMA_VERSION: i64 = STEPS.len() as i64;

/// Statements that lead to version 1, from there to version 2, and so on. Each keeps what is stored.
const STEPS: &[&[&str]] = &[
    &[TABLES],
    &[NAMESPACES, TOKENS, AUDIT_LOG, super::unfinished::TABLES],
    &[
        super::collection::COLUMNS,
        super::change::TABLES,
        super::provenance::TABLES,
        super::artefact::COLUMNS,
        super::label::TABLES,
        super::inventory::TABLES,
        super::inventory::ADD_UP,
    ],
];

const TABLES: &str = "
CREATE TABLE blob (
    sha256 BLOB PRIMARY KEY,
    size INTEGER NOT NULL,
    stored_size INTEGER NOT NULL,
    damaged INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE TABLE artefact (
    build_id BLOB NOT NULL,
    kind TEXT NOT NULL,
    path TEXT NOT NULL,
    canonical_path TEXT NOT NULL,
    sha256 BLOB NOT NULL REFERENCES blob,
    file_name TEXT NOT NULL,
    modified_s INTEGER NOT NULL,
    facts TEXT NOT NULL,
    PRIMARY KEY (build_id, kind, path)
) STRICT, WITHOUT ROWID;
CREATE INDEX artefact_canonical ON artefact (build_id, kind, canonical_path);
CREATE INDEX artefact_content ON artefact (sha256);
CREATE INDEX artefact_file_name ON artefact (file_name);
CREATE TABLE derived (
    build_id BLOB NOT NULL,
    kind TEXT NOT NULL,
    version INTEGER NOT NULL,
    inputs BLOB NOT NULL,
    sha256 BLOB NOT NULL REFERENCES blob,
    PRIMARY KEY (build_id, kind)
) STRICT, WITHOUT ROWID;
CREATE TABLE profiles (
    sha256 BLOB PRIMARY KEY REFERENCES blob,
    start_ns INTEGER NOT NULL,
    end_ns INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX profiles_time ON profiles (end_ns, start_ns);
";

/// What was stored before there were namespaces is as trusted as anything.
const NAMESPACES: &str = "
CREATE TABLE artefact_of_namespace (
    build_id BLOB NOT NULL,
    kind TEXT NOT NULL,
    path TEXT NOT NULL,
    canonical_path TEXT NOT NULL,
    sha256 BLOB NOT NULL REFERENCES blob,
    file_name TEXT NOT NULL,
    modified_s INTEGER NOT NULL,
    facts TEXT NOT NULL,
    namespace TEXT NOT NULL,
    stored_s INTEGER NOT NULL,
    PRIMARY KEY (build_id, kind, path, namespace)
) STRICT, WITHOUT ROWID;
INSERT INTO artefact_of_namespace
    SELECT build_id, kind, path, canonical_path, sha256, file_name, modified_s, facts, 'release', modified_s
    FROM artefact;
DROP TABLE artefact;
ALTER TABLE artefact_of_namespace RENAME TO artefact;
CREATE INDEX artefact_canonical ON artefact (build_id, kind, canonical_path);
CREATE INDEX artefact_content ON artefact (sha256);
CREATE INDEX artefact_file_name ON artefact (file_name);
";

const TOKENS: &str = "
CREATE TABLE token (
    sha256 BLOB PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    scopes TEXT NOT NULL,
    created_s INTEGER NOT NULL,
    expires_s INTEGER,
    last_used_s INTEGER,
    revoked_s INTEGER
) STRICT, WITHOUT ROWID;
";

/// The log has no foreign keys: it tells of what is gone, too.
const AUDIT_LOG: &str = "
CREATE TABLE audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at_s INTEGER NOT NULL,
    token TEXT NOT NULL,
    peer TEXT NOT NULL,
    action TEXT NOT NULL,
    build_id BLOB,
    kind TEXT,
    path TEXT NOT NULL,
    namespace TEXT,
    sha256 BLOB,
    size INTEGER,
    result TEXT NOT NULL
) STRICT;
";

/// Brings the database to [`SCHEMA_VERSION`], in one transaction: it is at one version or the other, whatever happens.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), CatalogError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let found: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let done = usize::try_from(found).ok().filter(|done| *done <= STEPS.len());
    let Some(done) = done else {
        return Err(CatalogError::Version { found, known: SCHEMA_VERSION });
    };
    for statement in STEPS[done..].iter().copied().flatten() {
        transaction.execute_batch(statement)?;
    }
    transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    Ok(transaction.commit()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_database_keeps_its_rows() {
        let mut connection = Connection::open_in_memory().unwrap();
        for statement in STEPS[0] {
            connection.execute_batch(statement).unwrap();
        }
        let rows = "
            INSERT INTO blob VALUES (x'00', 1, 2, 0);
            INSERT INTO artefact VALUES (x'aabb', 'source', '/a/../b', '/b', x'00', 'b', 5, '{}');
            INSERT INTO profiles VALUES (x'00', 1, 2);
            PRAGMA user_version = 1;";
        connection.execute_batch(rows).unwrap();
        migrate(&mut connection).unwrap();
        migrate(&mut connection).unwrap();
        let found: (String, String, String, i64, i64, bool) = connection
            .query_row(
                "SELECT a.path, a.canonical_path, a.namespace, a.stored_s, p.end_ns,
                 a.used_s > unixepoch() - 1000
                 FROM artefact a JOIN blob USING (sha256) JOIN profiles p USING (sha256)",
                [],
                |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?)),
            )
            .unwrap();
        assert_eq!(found, ("/a/../b".to_owned(), "/b".to_owned(), "release".to_owned(), 5, 2, true));
    }

    /// Before there was a list of changes and after, when its triggers took a use for a change.
    #[test]
    fn a_database_of_version_2_gets_what_it_lacks() {
        const FIRST_LIST: &str = "
            CREATE TABLE change (id INTEGER PRIMARY KEY, build_id BLOB NOT NULL) STRICT;
            CREATE TRIGGER artefact_changes AFTER UPDATE ON artefact BEGIN
                INSERT INTO change (build_id) VALUES (NEW.build_id);
            END;
            INSERT INTO change VALUES (7, x'aabb');";
        for has_list in [false, true] {
            let mut connection = Connection::open_in_memory().unwrap();
            STEPS[..2].iter().copied().flatten().for_each(|step| connection.execute_batch(step).unwrap());
            if has_list {
                connection.execute_batch(FIRST_LIST).unwrap();
                connection.execute_batch(super::super::provenance::TABLES).unwrap();
            }
            let rows = "
                INSERT INTO blob VALUES (x'00', 10, 2, 0);
                INSERT INTO artefact VALUES (x'aabb', 'source', '/b', '/b', x'00', 'b', 5, '{}', 'try', 6);
                PRAGMA user_version = 2;";
            connection.execute_batch(rows).unwrap();
            migrate(&mut connection).unwrap();
            let found: (bool, i64, Option<i64>, i64, i64) = connection
                .query_row(
                    "SELECT a.used_s > unixepoch() - 1000, b.write, b.withdrawn_s, u.artefacts, u.bytes
                     FROM artefact a JOIN blob b USING (sha256) JOIN usage u USING (namespace)",
                    [],
                    |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?)),
                )
                .unwrap();
            assert_eq!(found, (true, 0, None, 1, 10));
            connection.execute_batch("UPDATE artefact SET used_s = 8").unwrap();
            let listed = || -> (i64, i64) {
                let list = "SELECT count(*), coalesce(max(id), 0) FROM change";
                connection.query_row(list, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap()
            };
            let before = listed();
            assert_eq!(
                before,
                if has_list { (1, 7) } else { (0, 0) },
                "neither migration nor use is a change"
            );
            connection.execute_batch("UPDATE artefact SET facts = '{}'; DELETE FROM artefact").unwrap();
            assert_eq!(listed(), (before.0 + 2, before.1 + 2));
            connection
                .execute_batch("INSERT INTO provenance VALUES (x'aa', 'source', x'00', 'u', 1)")
                .unwrap();
        }
    }

    #[test]
    fn a_newer_database_is_left_alone() {
        let mut connection = Connection::open_in_memory().unwrap();
        for found in [SCHEMA_VERSION + 1, -1] {
            connection.pragma_update(None, "user_version", found).unwrap();
            assert!(
                matches!(migrate(&mut connection), Err(CatalogError::Version { found: f, .. }) if f == found)
            );
        }
    }
}
