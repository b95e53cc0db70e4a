//! A table that owns its bytes, and was checked when it came to them.

use crate::table::{Table, TableError};

/// The bytes of a table that passed [`Table::parse`]. Checking takes as long as copying a few times, so it is done
/// once, and the type remembers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableFile(Vec<u8>);

impl TableFile {
    /// Checks `bytes` to the last.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, TableError> {
        Table::parse(&bytes)?;
        Ok(Self(bytes))
    }

    /// The table.
    pub fn table(&self) -> Table<'_> {
        Table::read(&self.0).expect("parse has read it, and it has not changed since")
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}
