//! Makes `schema/src/wire/prior.bin`, the records that are expected in any table, from the tables of a machine:
//!
//! ```sh
//! find /usr -type f | cargo run --release --package windlass-unwind-compiler --example prior > prior.bin
//! ```

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{Write as _, stdin, stdout};

use windlass_schema::{BuildId, Record, Table, wire};

/// Tables that a record must be found in: rarer ones would cost more to say no to than they save.
const LEAST_TABLES: u32 = 8;

fn main() -> Result<(), Box<dyn Error>> {
    let mut found: BTreeMap<Record, u32> = BTreeMap::new();
    for path in stdin().lines() {
        let Ok(file) = std::fs::read(path?) else { continue };
        // What is no image, or does not compile, has nothing to say here.
        let Ok(compiled) = windlass_unwind_compiler::compile(&file, BuildId::new(&[0; 16])?) else {
            continue;
        };
        for record in Table::parse(&compiled.table)?.records() {
            *found.entry(record).or_default() += 1;
        }
    }
    let list: Vec<(Record, u32)> = found.into_iter().filter(|(_, tables)| *tables >= LEAST_TABLES).collect();
    stdout().write_all(&wire::encode_prior(&list))?;
    eprintln!("{} records", list.len());
    Ok(())
}
