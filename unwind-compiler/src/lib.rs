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
//! - `entries`: its CIEs and FDEs; `instructions`: the rows of each; `plain`: those of nearly all, sooner
//! - `go`, `go_functions`: the rows of Go code, which has other tables
//! - `code_bytes`, `recognise`, `function_set`, `function_walk`: the rows of code that none of these covers, from its
//!   instructions; `x86_64`, `aarch64`: what instructions mean; `framed_code`, `frame_pointers`,
//!   `uncovered`
//! - `projection`, `expression`: a row of CFI as a [`Rule`](windlass_schema::Rule)
//! - `shapes`, `chains`: what functions have in common, once
//! - `rows`: what several FDEs say of one address
//! - `placement`: all rows at their addresses; `density`: what the format cannot hold, marked as such
//! - `run`, `rests`, `fold`: runs of rows as one record
//! - `dictionary`, `encode`: the bytes
//! - `report`: what became of everything
//! - `oracle`, `verify`: the proof, by another interpreter
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

mod aarch64;
mod chains;
mod code_bytes;
mod compile;
mod cursor;
mod density;
mod dictionary;
mod elf;
mod encode;
mod entries;
mod expression;
mod fold;
mod frame_pointers;
mod framed_code;
mod function_set;
mod function_walk;
mod go;
mod go_functions;
mod instructions;
mod oracle;
mod placement;
mod plain;
mod projection;
mod recognise;
mod report;
mod rests;
mod rows;
mod run;
mod shapes;
mod stretch;
mod uncovered;
mod verify;
mod x86_64;

pub use compile::{Compiled, REVISION, compile};
pub use elf::{CompileError, build_id_of};
pub use report::{MAX_SKIPPED_LISTED, RecognisedKind, Report, SkipReason, SkippedFde};
pub use verify::{Disagreement, MAX_DISAGREEMENTS_LISTED, Verification, verify};
