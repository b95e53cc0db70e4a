//! How soon does a service with a million build-IDs on record answer with a file?

use std::path::Path;

use anyhow::{Context as _, Result};
use rusqlite::Connection;

use crate::files::Files;
use crate::servers::{upload, windlassd};

const BUILD_IDS: u64 = 1_000_000;
const ROUNDS: usize = 5;

/// The table.
pub(crate) fn print(data: &Path, files: &Files) -> Result<()> {
    let path = files.usual.path("executable");
    let server = windlassd(data)?;
    server.wait_until_it_listens()?;
    upload(&server, &files.usual)?;
    drop(server);
    let catalog = data.join("catalog.sqlite");
    multiply(&catalog)?;
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let server = windlassd(data)?;
        times.push(server.wait_for(&path)?.as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    println!("### Start\n\n| build-IDs on record | catalog MB | first file, ms |\n|---:|---:|---:|");
    let bytes = std::fs::metadata(&catalog)?.len();
    println!("| {} | {:.0} | {:.0} |\n", BUILD_IDS + 1, bytes as f64 / 1e6, times[times.len() / 2]);
    println!("From the start of the process; median of {ROUNDS}.\n");
    Ok(())
}

/// Gives the one artefact on record a million build-IDs more, without lists of sections, which no start reads.
fn multiply(catalog: &Path) -> Result<()> {
    let connection = Connection::open(catalog).context("open the catalog")?;
    // Nothing is lost with this database: no journal of a million rows.
    connection.execute_batch("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF")?;
    let columns: Vec<String> = connection
        .prepare("SELECT name FROM pragma_table_info('artefact') WHERE name NOT IN ('build_id', 'facts')")?
        .query_map([], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    let columns = columns.join(", ");
    connection.execute_batch(&format!(
        "WITH RECURSIVE number(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < {BUILD_IDS}),
         id(id) AS (SELECT randomblob(20) AS id FROM number ORDER BY id)
         INSERT INTO artefact (build_id, facts, {columns})
         SELECT id.id, json_set(facts, '$.sections', json('[]')), {columns}
         FROM id, (SELECT * FROM artefact LIMIT 1);
         PRAGMA journal_mode = WAL;"
    ))?;
    Ok(())
}
