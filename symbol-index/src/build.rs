//! Building an index: what each input brings, put together.

use crate::container::{self, Parts};
use crate::elf::{self, ElfError, Image};
use crate::symbol::{self, Symbol};
use crate::{call_frames, dwarf, elf_symbols, extent_table, kallsyms, perf_map, symbol_table};

/// Where a kernel's code starts, in its file (arch/x86/kernel/vmlinux.lds.S) and in its list of symbols.
const KERNEL_TEXT: &str = "_text";

/// What is known of an image. Each part is optional.
#[derive(Clone, Copy, Debug, Default)]
pub struct Input<'a> {
    /// An ELF file with debug sections: DWARF, `.symtab`, or both.
    pub debug: Option<&'a [u8]>,
    /// The executable, shared object or skeleton: `.symtab`, `.dynsym`, `.eh_frame`, and DWARF if `debug` has
    /// none.
    pub image: Option<&'a [u8]>,
    /// Symbols of a kernel: lines of `HEXADDR TYPE NAME`, addresses as linked, or of a module, as
    /// [`windlass_schema::kernel_module`] places its code.
    pub kallsyms: Option<&'a [u8]>,
    /// Functions that a just-in-time compiler made: see [`windlass_schema::perf_map`].
    pub perf_map: Option<&'a [u8]>,
}

/// No index can be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// None of the inputs brings anything, and this one cannot be read.
    #[error("read {input}")]
    Elf {
        /// `debug` or `image`.
        input: &'static str,
        /// What is wrong with it.
        source: ElfError,
    },
    /// The names do not fit the format: all of them together have 4 GiB.
    #[error("index {0} symbols: their names take more than 4 GiB")]
    TooManyNames(usize),
}

/// Builds the index of one image. What cannot be read is left out, and addresses that find nothing in the
/// rest are then answered with [`Unresolved::BrokenDebuginfo`].
///
/// [`Unresolved::BrokenDebuginfo`]: windlass_schema::http::Unresolved::BrokenDebuginfo
pub fn build(input: Input<'_>) -> Result<Vec<u8>, BuildError> {
    let mut unreadable = None;
    let mut images = Vec::new();
    for (name, bytes) in [("debug", input.debug), ("image", input.image)] {
        let Some(bytes) = bytes else { continue };
        match Image::parse(bytes) {
            Ok(image) => images.push(image),
            Err(source) => unreadable = Some(BuildError::Elf { input: name, source }),
        }
    }
    let mut symbols: Vec<Symbol<'_>> = images.iter().flat_map(elf_symbols::symbols).collect();
    let mut functions = images.iter().rev().map(call_frames::functions);
    let functions = functions.find(|functions| !functions.is_empty()).unwrap_or_default();
    call_frames::limit_symbols(&mut symbols, &functions);
    let mut of_kernel = input.kallsyms.map(kallsyms::symbols).unwrap_or_default();
    symbol::align(&mut of_kernel, &symbols, KERNEL_TEXT);
    symbols.extend(of_kernel);
    symbols.extend(input.perf_map.map(perf_map::symbols).unwrap_or_default());

    let mut parts = Parts { broken: unreadable.is_some(), ..Parts::default() };
    if let Some(image) = images.iter().find(|image| elf::has_debug_info(&image.file)) {
        match dwarf::convert(image, &symbols) {
            Some(converted) => {
                parts.base = converted.base;
                parts.symcache = converted.symcache;
                parts.broken |= converted.broken;
            }
            None => parts.broken = true,
        }
    }
    let nothing = symbols.is_empty() && functions.is_empty() && parts.symcache.is_empty();
    if let Some(error) = unreadable.filter(|_| nothing) {
        return Err(error);
    }
    let segments = symbol::flatten(symbols);
    parts.extents = extent_table::encode(&call_frames::unnamed(functions, &segments));
    parts.symbols = symbol_table::encode(&segments).map_err(|_| BuildError::TooManyNames(segments.len()))?;
    Ok(container::encode(&parts))
}
