//! The catalog in one SQLite file: WAL, synchronous=FULL, so a commit survives the power cut.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::types::Type;
use rusqlite::{Connection, Row};

use super::{Catalog, CatalogError};
use crate::blob::Blob;
use crate::content_hash::ContentHash;
use group_commit::Writer;

mod artefact;
mod audit;
mod change;
mod collection;
mod content;
mod derived;
mod group_commit;
mod inventory;
mod label;
mod profile;
mod provenance;
mod schema;
mod token;
mod unfinished;

/// How long a write waits for another process's write before it fails.
const BUSY_TIMEOUT: Duration = Duration::from_secs(30);
/// Idle read connections kept open; more are opened while needed.
const MAX_IDLE_READERS: usize = 8;

/// See the module.
pub struct SqliteCatalog {
    path: PathBuf,
    writer: Writer,
    readers: Mutex<Vec<Connection>>,
}

impl SqliteCatalog {
    /// Opens or creates the database in `path`.
    pub fn open(path: &Path) -> Result<Self, CatalogError> {
        let mut writer = connect(path)?;
        writer.pragma_update(None, "journal_mode", "WAL")?;
        schema::migrate(&mut writer)?;
        Ok(Self { path: path.to_owned(), writer: Writer::new(writer), readers: Mutex::default() })
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
        Ok(self.writer.write(change)?)
    }
}

fn connect(path: &Path) -> Result<Connection, CatalogError> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // Otherwise a statement that was prepared once is prepared again for values that could make another plan better: a tenth
    // of the time of an upload.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
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

/// Columns `at..at + 4`: sha256, size, stored_size, write.
fn blob_at(row: &Row<'_>, at: usize) -> rusqlite::Result<Blob> {
    let hash = ContentHash::new(row.get(at)?);
    Ok(Blob {
        hash,
        size: unsigned(row, at + 1)?,
        stored_size: unsigned(row, at + 2)?,
        write: unsigned(row, at + 3)?,
    })
}

impl Catalog for SqliteCatalog {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::conformance::{Open, conformance_suite};

    fn run(case: impl Fn(Open<'_>)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalog.sqlite");
        case(&|| Box::new(SqliteCatalog::open(&path).unwrap()));
    }

    conformance_suite!(super::run);
}
