//! The table `upload_part`.

use rusqlite::{Connection, OptionalExtension, Row, params};
use windlass_schema::BuildId;

use super::content::put_blob;
use super::{SqliteCatalog, blob_at, integer, malformed, unsigned};
use crate::catalog::{Appended, CatalogError, Part, UnfinishedUploads, UploadName};
use crate::content_hash::ContentHash;

/// The table. A blob that it names is not to be collected.
pub(super) const TABLES: &str = "
CREATE TABLE upload_part (
    build_id BLOB NOT NULL,
    kind TEXT NOT NULL,
    namespace TEXT NOT NULL,
    whole_sha256 BLOB NOT NULL,
    start INTEGER NOT NULL,
    sha256 BLOB NOT NULL REFERENCES blob,
    total INTEGER NOT NULL,
    received_s INTEGER NOT NULL,
    PRIMARY KEY (build_id, kind, namespace, whole_sha256, start)
) STRICT, WITHOUT ROWID;
CREATE INDEX upload_part_content ON upload_part (sha256);
";

const OF_UPLOAD: &str = "p.build_id = ?1 AND p.kind = ?2 AND p.whole_sha256 = ?3 AND p.namespace = ?4";
const PART_COLUMNS: &str = "b.sha256, b.size, b.stored_size, b.write, p.start, p.total, p.received_s \
     FROM upload_part p JOIN blob b USING (sha256)";

fn part_row(row: &Row<'_>) -> rusqlite::Result<Part> {
    Ok(Part {
        blob: blob_at(row, 0)?,
        start: unsigned(row, 4)?,
        total: unsigned(row, 5)?,
        received_s: unsigned(row, 6)?,
    })
}

pub(super) fn upload_name_row(row: &Row<'_>) -> rusqlite::Result<UploadName> {
    Ok(UploadName {
        build_id: BuildId::new(row.get_ref(0)?.as_blob()?).map_err(|e| malformed(0, e))?,
        kind: row.get_ref(1)?.as_str()?.parse().map_err(|e| malformed(1, e))?,
        sha256: ContentHash::new(row.get(2)?),
        namespace: row.get_ref(3)?.as_str()?.parse().map_err(|e| malformed(3, e))?,
    })
}

/// The parameters of [`OF_UPLOAD`].
macro_rules! of_upload {
    ($upload:expr) => {
        params![
            $upload.build_id.as_bytes(),
            $upload.kind.as_str(),
            $upload.sha256.as_bytes(),
            $upload.namespace.as_str()
        ]
    };
}

fn last_part(connection: &Connection, upload: &UploadName) -> rusqlite::Result<Option<Part>> {
    connection
        .prepare_cached(&format!("SELECT {PART_COLUMNS} WHERE {OF_UPLOAD} ORDER BY p.start DESC LIMIT 1"))?
        .query_row(of_upload!(upload), part_row)
        .optional()
}

fn forget(connection: &Connection, upload: &UploadName) -> rusqlite::Result<()> {
    connection
        .prepare_cached(&format!("DELETE FROM upload_part AS p WHERE {OF_UPLOAD}"))?
        .execute(of_upload!(upload))?;
    Ok(())
}

impl UnfinishedUploads for SqliteCatalog {
    fn parts(&self, upload: &UploadName) -> Result<Vec<Part>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(&format!("SELECT {PART_COLUMNS} WHERE {OF_UPLOAD} ORDER BY p.start"))?
                .query_map(of_upload!(upload), part_row)?
                .collect()
        })
    }

    fn append_part(&self, upload: &UploadName, part: &Part) -> Result<Appended, CatalogError> {
        self.write(|connection| {
            let last = last_part(connection, upload)?;
            if let Some(total) = last.map(|last| last.total).filter(|total| *total != part.total) {
                return Ok(Appended::OtherTotal(total));
            }
            let end = last.map_or(0, |last| last.end());
            if end != part.start {
                return Ok(Appended::At(end));
            }
            put_blob(connection, part.blob)?;
            connection
                .prepare_cached("INSERT INTO upload_part VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")?
                .execute(params![
                    upload.build_id.as_bytes(),
                    upload.kind.as_str(),
                    upload.namespace.as_str(),
                    upload.sha256.as_bytes(),
                    integer(part.start),
                    part.blob.hash.as_bytes(),
                    integer(part.total),
                    integer(part.received_s),
                ])?;
            Ok(Appended::Yes)
        })
    }

    fn forget_upload(&self, upload: &UploadName) -> Result<(), CatalogError> {
        self.write(|connection| forget(connection, upload))
    }

    fn forget_stale_upload(&self, upload: &UploadName, before_s: u64) -> Result<bool, CatalogError> {
        self.write(|connection| {
            let young: bool = connection
                .prepare_cached(&format!(
                    "SELECT EXISTS (SELECT 1 FROM upload_part p WHERE {OF_UPLOAD} AND p.received_s >= ?5)"
                ))?
                .query_row(
                    params![
                        upload.build_id.as_bytes(),
                        upload.kind.as_str(),
                        upload.sha256.as_bytes(),
                        upload.namespace.as_str(),
                        integer(before_s)
                    ],
                    |row| row.get(0),
                )?;
            if !young {
                forget(connection, upload)?;
            }
            Ok(!young)
        })
    }

    fn stale_uploads(&self, before_s: u64, limit: usize) -> Result<Vec<UploadName>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT build_id, kind, whole_sha256, namespace FROM upload_part
                     GROUP BY build_id, kind, whole_sha256, namespace HAVING max(received_s) < ?1
                     ORDER BY max(received_s) LIMIT ?2",
                )?
                .query_map(params![integer(before_s), integer(limit as u64)], upload_name_row)?
                .collect()
        })
    }
}
