//! The catalog in one SQLite file: WAL, synchronous=FULL, so a commit survives the power cut.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Row, TransactionBehavior, params};
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use super::{
    Artefact, Catalog, CatalogError, DerivedKey, MetadataQuery, ProfileBatch, Put, Recorded, canonical_path,
};
use crate::blob::Blob;
use crate::content_hash::ContentHash;

const SCHEMA_VERSION: i64 = 1;
const SCHEMA: &str = "
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

/// How long a write waits for another process's write before it fails.
const BUSY_TIMEOUT: Duration = Duration::from_secs(30);
/// Idle read connections kept open; more are opened while needed.
const MAX_IDLE_READERS: usize = 8;

const ARTEFACT_COLUMNS: &str = "a.build_id, a.kind, a.path, b.sha256, b.size, b.stored_size, a.file_name, a.modified_s, \
     a.facts, b.damaged FROM artefact a JOIN blob b USING (sha256)";

const PROFILE_COLUMNS: &str = "b.sha256, b.size, b.stored_size, p.start_ns, p.end_ns, b.damaged \
     FROM profiles p JOIN blob b USING (sha256)";

/// See the module.
pub struct SqliteCatalog {
    path: PathBuf,
    writer: Mutex<Connection>,
    readers: Mutex<Vec<Connection>>,
}

impl SqliteCatalog {
    /// Opens or creates the database in `path`.
    pub fn open(path: &Path) -> Result<Self, CatalogError> {
        let mut writer = connect(path)?;
        writer.pragma_update(None, "journal_mode", "WAL")?;
        let transaction = writer.transaction_with_behavior(TransactionBehavior::Immediate)?;
        match transaction.pragma_query_value(None, "user_version", |row| row.get(0))? {
            0 => {
                transaction.execute_batch(SCHEMA)?;
                transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
            }
            SCHEMA_VERSION => {}
            found => return Err(CatalogError::Version { found, known: SCHEMA_VERSION }),
        }
        transaction.commit()?;
        Ok(Self { path: path.to_owned(), writer: Mutex::new(writer), readers: Mutex::default() })
    }

    /// Opens `sqlite:PATH`.
    pub fn open_url(url: &str) -> Result<Self, CatalogError> {
        let path = url.strip_prefix("sqlite:").map(|path| path.strip_prefix("//").unwrap_or(path));
        match path {
            Some(path) if !path.is_empty() => Self::open(Path::new(path)),
            _ => Err(CatalogError::Url(url.to_owned())),
        }
    }

    fn read<T>(&self, query: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, CatalogError> {
        let idle = self.readers.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let connection = match idle {
            Some(connection) => connection,
            None => connect(&self.path)?,
        };
        let answer = query(&connection)?;
        let mut idle = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE_READERS {
            idle.push(connection);
        }
        Ok(answer)
    }

    fn write<T>(&self, change: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, CatalogError> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let transaction = writer.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let answer = change(&transaction)?;
        transaction.commit()?;
        Ok(answer)
    }
}

fn connect(path: &Path) -> Result<Connection, CatalogError> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    Ok(connection)
}

fn malformed(column: usize, why: impl std::error::Error + Send + Sync + 'static) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, Type::Blob, Box::new(why))
}

/// SQLite's integers are signed: a size or time beyond 2^63 is stored as the largest there is.
fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    let value: i64 = row.get(column)?;
    u64::try_from(value).map_err(|e| malformed(column, e))
}

/// Columns `at..at + 3`: sha256, size, stored_size.
fn blob_at(row: &Row<'_>, at: usize) -> rusqlite::Result<Blob> {
    let hash = ContentHash::new(row.get(at)?);
    Ok(Blob { hash, size: unsigned(row, at + 1)?, stored_size: unsigned(row, at + 2)? })
}

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
    })
}

fn profiles_row(row: &Row<'_>) -> rusqlite::Result<ProfileBatch> {
    Ok(ProfileBatch {
        blob: blob_at(row, 0)?,
        start_ns: unsigned(row, 3)?,
        end_ns: unsigned(row, 4)?,
        damaged: row.get(5)?,
    })
}

fn put_blob(connection: &Connection, blob: Blob) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO blob (sha256, size, stored_size) VALUES (?1, ?2, ?3)
             ON CONFLICT DO UPDATE SET stored_size = ?3, damaged = 0",
        )?
        .execute(params![blob.hash.as_bytes(), integer(blob.size), integer(blob.stored_size)])?;
    Ok(())
}

impl Catalog for SqliteCatalog {
    fn artefact(
        &self,
        id: BuildId,
        kind: ArtefactKind,
        path: &str,
    ) -> Result<Option<Artefact>, CatalogError> {
        let canonical = if path.is_empty() { String::new() } else { canonical_path(path) };
        self.read(|connection| {
            connection
                .prepare_cached(&format!(
                    "SELECT {ARTEFACT_COLUMNS} WHERE a.build_id = ?1 AND a.kind = ?2
                     AND (a.path = ?3 OR a.canonical_path = ?4)
                     ORDER BY a.path = ?3 DESC, a.path LIMIT 1"
                ))?
                .query_row(params![id.as_bytes(), kind.as_str(), path, canonical], artefact_row)
                .optional()
        })
    }

    fn put_artefact(&self, artefact: &Artefact) -> Result<Put, CatalogError> {
        let canonical = if artefact.path.is_empty() { String::new() } else { canonical_path(&artefact.path) };
        let facts = serde_json::to_string(&artefact.facts)
            .map_err(|e| CatalogError::Row { column: "facts", why: e.to_string() })?;
        self.write(|connection| {
            let key = params![artefact.build_id.as_bytes(), artefact.kind.as_str(), artefact.path];
            let present = connection
                .prepare_cached(
                    "SELECT b.sha256, b.size, b.stored_size, b.damaged
                     FROM artefact a JOIN blob b USING (sha256)
                     WHERE a.build_id = ?1 AND a.kind = ?2 AND a.path = ?3",
                )?
                .query_row(key, |row| Ok((blob_at(row, 0)?, row.get::<_, bool>(3)?)))
                .optional()?;
            match present {
                Some((blob, _)) if blob.hash == artefact.blob.hash => {
                    put_blob(connection, artefact.blob)?;
                    return Ok(Put::Present(blob));
                }
                Some((blob, false)) => return Ok(Put::Present(blob)),
                Some((_, true)) | None => {}
            }
            put_blob(connection, artefact.blob)?;
            connection
                .prepare_cached("INSERT OR REPLACE INTO artefact VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")?
                .execute(params![
                    artefact.build_id.as_bytes(),
                    artefact.kind.as_str(),
                    artefact.path,
                    canonical,
                    artefact.blob.hash.as_bytes(),
                    artefact.file_name,
                    integer(artefact.modified_s),
                    facts,
                ])?;
            Ok(Put::Stored)
        })
    }

    fn blob(&self, hash: ContentHash) -> Result<Option<Blob>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT sha256, size, stored_size FROM blob WHERE sha256 = ? AND NOT damaged",
                )?
                .query_row([hash.as_bytes()], |row| blob_at(row, 0))
                .optional()
        })
    }

    fn restore_blob(&self, blob: Blob) -> Result<(), CatalogError> {
        self.write(|connection| put_blob(connection, blob))
    }

    fn mark_damaged(&self, hash: ContentHash) -> Result<(), CatalogError> {
        self.write(|connection| {
            connection.execute("UPDATE blob SET damaged = 1 WHERE sha256 = ?", [hash.as_bytes()])?;
            Ok(())
        })
    }

    fn derived(&self, key: DerivedKey) -> Result<Option<Blob>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT b.sha256, b.size, b.stored_size FROM derived d JOIN blob b USING (sha256)
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

    fn put_profiles(&self, batch: ProfileBatch) -> Result<(), CatalogError> {
        self.write(|connection| {
            put_blob(connection, batch.blob)?;
            connection.prepare_cached("INSERT OR IGNORE INTO profiles VALUES (?1, ?2, ?3)")?.execute(
                params![batch.blob.hash.as_bytes(), integer(batch.start_ns), integer(batch.end_ns)],
            )?;
            Ok(())
        })
    }

    fn profiles(&self, range_ns: Range<u64>, limit: usize) -> Result<Vec<ProfileBatch>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(&format!(
                    "SELECT {PROFILE_COLUMNS} WHERE p.end_ns >= ?1 AND p.start_ns < ?2
                     ORDER BY p.start_ns, b.sha256 LIMIT ?3",
                ))?
                .query_map(
                    params![integer(range_ns.start), integer(range_ns.end), integer(limit as u64)],
                    profiles_row,
                )?
                .collect()
        })
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

    fn blobs(&self, after: Option<ContentHash>, limit: usize) -> Result<Vec<Recorded>, CatalogError> {
        let after = after.map_or(Vec::new(), |hash| hash.as_bytes().to_vec());
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT sha256, size, stored_size, damaged FROM blob WHERE sha256 > ?1
                     ORDER BY sha256 LIMIT ?2",
                )?
                .query_map(params![after, integer(limit as u64)], |row| {
                    Ok(Recorded { blob: blob_at(row, 0)?, damaged: row.get(3)? })
                })?
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

    fn profiles_of(&self, hash: ContentHash) -> Result<Option<ProfileBatch>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(&format!("SELECT {PROFILE_COLUMNS} WHERE p.sha256 = ?"))?
                .query_row([hash.as_bytes()], profiles_row)
                .optional()
        })
    }

    fn integrity(&self) -> Result<Vec<String>, CatalogError> {
        self.read(|connection| {
            let mut findings: Vec<String> = connection
                .prepare("PRAGMA integrity_check")?
                .query_map([], |row| row.get(0))?
                .collect::<rusqlite::Result<_>>()?;
            findings.retain(|finding| finding != "ok");
            let dangling = connection.prepare("PRAGMA foreign_key_check")?.query_map([], |_| Ok(()))?.count();
            if dangling > 0 {
                findings.push(format!("{dangling} rows name a content that is not on record"));
            }
            Ok(findings)
        })
    }
}
