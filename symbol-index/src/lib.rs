//! From ELF and DWARF to a symbol index, and from an address to its frames. Bytes in, bytes or values
//! out: no file, socket or clock.
//!
//! An index is built once for a build-ID, kept as bytes, and read in place. In reading order:
//!
//! - [`build`]: what the inputs bring, put together ([`Input`], [`BuildError`])
//! - `elf`: opening an ELF file, and what it holds ([`describe`], [`Contents`])
//! - `relocatable`: where code is in kernel modules, which are not linked
//! - `debug_sections`: DWARF's sections, decompressed within bounds
//! - `dwarf`: functions, inlined calls and lines; `die_tree`: what has to hold before; `line_only`: lines of code
//!   that no function describes
//! - `source_names`: which files the line tables name ([`named_sources`]); `split_units`: which units are in files of
//!   their own ([`split_units`], [`split_unit_ids`])
//! - `elf_symbols`, `kallsyms`, `perf_map`: functions by name only; `symbol`: which of several names counts
//! - `call_frames`: extents of functions that have no name; `range`: lists of such extents
//! - `symbol_table`, `extent_table`: names and extents as sorted tables of bytes
//! - `container`: the format of an index, around all of these
//! - `index`: the lookup ([`Index`], [`Frame`])

mod build;
mod call_frames;
mod container;
mod debug_sections;
mod die_tree;
mod dwarf;
mod elf;
mod elf_symbols;
mod extent_table;
mod index;
mod kallsyms;
mod line_only;
mod name;
mod perf_map;
mod range;
mod relocatable;
mod source_names;
mod split_units;
mod symbol;
mod symbol_table;

pub use build::{BuildError, Input, build};
pub use container::{FORMAT_VERSION, IndexError};
pub use elf::{Contents, ElfError, describe};
pub use index::{Frame, Index};
pub use source_names::{NamedSource, named_sources};
pub use split_units::{SplitUnit, split_unit_ids, split_units};
