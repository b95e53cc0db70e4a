//! Compiles the call frame information of an ELF image into an unwind table. No I/O: bytes in, bytes out.
//!
//! # Why this shape
//! Profilers compile tables on the host they profile, again on every host, inside the agent's own memory
//! limit; one malformed function, or one rule their rows have no room for, costs the whole file or
//! is truncated silently. Here compiling is a pure function that a server runs once for each build-ID. Every
//! row is exact or says why it is not, a broken FDE costs that FDE alone, and [`verify`] holds the result
//! against a full DWARF interpreter, row by row.
//!
//! In reading order, each step a module:
//!
//! - `elf`: where the image keeps its call frame information
//! - `cfi`: its FDEs, one at a time, and the rows of each
//! - `projection`, `expression`: a row of CFI as a [`Rule`](windlass_schema::Rule)
//! - `rows`: the rows of all FDEs as one list, sorted and disjoint
//! - `density`: what the format cannot hold, marked as such
//! - `fold`: runs of rows as one record
//! - `dictionary`, `page`, `encode`: the bytes
//! - `report`: what became of everything; `verify`: the proof
//!
//! ```
//! use windlass_unwind_compiler::{build_id_of, compile};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let elf = std::fs::read("/proc/self/exe")?;
//! # let Some(build_id) = build_id_of(&elf) else { return Ok(()) };
//! let compiled = compile(&elf, build_id)?;
//! let table = windlass_schema::Table::parse(&compiled.table)?;
//! assert_eq!(u64::from(table.row_count()), compiled.report.rows);
//! # Ok(())
//! # }
//! ```

mod cfi;
mod compile;
mod density;
mod dictionary;
mod elf;
mod encode;
mod expression;
mod fold;
mod page;
mod projection;
mod report;
mod rows;
mod verify;

pub use compile::{Compiled, compile};
pub use elf::{CompileError, build_id_of};
pub use report::{MAX_SKIPPED_LISTED, Report, SkipReason, SkippedFde};
pub use verify::{Disagreement, MAX_DISAGREEMENTS_LISTED, Verification, verify};
