//! Functions, inlined calls, files and lines, from DWARF into a SymCache and out of it.
//!
//! `symbolic` reads the DWARF and writes the SymCache. It names a function after whatever symbol is at
//! its address; here it gets no symbols to choose from, so that what a SymCache answers is what
//! DWARF says. The one exception: compilers leave linkage names out of DWARF, of C++ functions with
//! internal linkage and where only line tables were asked for, and the symbol at a function's first
//! address has it.
//!
//! `symbolic` is written for files that compilers made. On damaged ones its arithmetic can overflow,
//! which panics where overflow checks are on; [`guarded`] turns that into an error.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use gimli::{AbbreviationsCacheStrategy, EndianSlice, RunTimeEndian};
use object::{Object, ObjectSegment};
use symbolic::common::{Name, NameMangling};
use symbolic::debuginfo::dwarf::DwarfDebugSession;
use symbolic::debuginfo::{Function, ObjectKind, SymbolMap};
use symbolic::symcache::{SymCache, SymCacheConverter};

use crate::debug_sections::DebugSections;
use crate::elf::Image;
use crate::name::{self, Demangler};
use crate::symbol::Symbol;
use crate::{die_tree, line_only};

/// Most frames of one address: one more than DIEs may nest, so that only a damaged chain gets there.
const MAX_CHAIN: usize = die_tree::MAX_DEPTH as usize + 1;

/// What DWARF brought.
pub(crate) struct Converted {
    /// The image address of the SymCache's address 0: where the first segment is loaded.
    pub(crate) base: u64,
    pub(crate) symcache: Vec<u8>,
    /// Whether some of the DWARF could not be read.
    pub(crate) broken: bool,
}

/// A frame as a SymCache has it. An empty name: the line is known, the function is not.
pub(crate) struct DwarfFrame<'a> {
    pub(crate) name: &'a str,
    pub(crate) linkage_name: Option<&'a str>,
    pub(crate) file: Option<String>,
    pub(crate) line: Option<u32>,
}

/// Bytes of a section of DWARF.
pub(crate) type Reader<'a> = EndianSlice<'a, RunTimeEndian>;

/// Converts the DWARF in `image`. `symbols` are its functions.
pub(crate) fn convert(image: &Image<'_>, symbols: &[Symbol<'_>]) -> Option<Converted> {
    guarded(|| {
        let sections = DebugSections::load(image).ok()?;
        let mut dwarf = sections.dwarf();
        dwarf.populate_abbreviations_cache(AbbreviationsCacheStrategy::Duplicates);
        if !die_tree::is_bounded(&dwarf) {
            return None;
        }

        let base = image.file.segments().next().map_or(0, |segment| segment.address());
        let mut converter = SymCacheConverter::new();
        converter.add_transformer(Demangler::default());
        let mut covered = Vec::new();
        let mut broken = !sections.complete;
        broken |= !add_functions(&mut converter, &sections, base, symbols, &mut covered)?;
        broken |= !line_only::add(&mut converter, &dwarf, image, base, covered);
        let mut symcache = Vec::new();
        converter.serialize(&mut symcache).ok()?;
        Some(Converted { base, symcache, broken })
    })
    .flatten()
}

/// Adds what DWARF has functions for, and the ranges relative to the base that they cover. Says whether all
/// of them could be read; none if nothing could.
fn add_functions(
    converter: &mut SymCacheConverter<'_>,
    sections: &DebugSections<'_>,
    base: u64,
    symbols: &[Symbol<'_>],
    covered: &mut Vec<(u64, u64)>,
) -> Option<bool> {
    // All that the kind decides is whether code may be at address 0, as in relocatable objects.
    let kind = ObjectKind::Library;
    let session = DwarfDebugSession::parse(&sections, SymbolMap::new(), base as i64, kind).ok()?;
    let linkage_names: HashMap<u64, &str> = symbols
        .iter()
        .filter(|symbol| name::is_mangled(symbol.name))
        .map(|symbol| (symbol.start.wrapping_sub(base), symbol.name))
        .collect();
    let mut complete = true;
    for function in session.functions() {
        // An error costs the compilation unit that it is in, the next call is on the next one.
        let Ok(mut function) = function else {
            complete = false;
            continue;
        };
        covered.push((function.address, function.end_address()));
        complete_name(&mut function, &linkage_names);
        converter.process_symbolic_function(&function);
    }
    Some(complete)
}

/// Gives a function that DWARF names without its scope and arguments its linkage name.
fn complete_name(function: &mut Function<'_>, linkage_names: &HashMap<u64, &str>) {
    if function.name.mangling() != NameMangling::Unmangled {
        return;
    }
    if let Some(linkage_name) = linkage_names.get(&function.address) {
        let original = name::without_clone_suffix(linkage_name).to_owned();
        function.name = Name::new(original, NameMangling::Mangled, function.name.language());
    }
}

/// Whether the bytes are a SymCache.
pub(crate) fn check(symcache: &[u8]) -> Result<(), String> {
    SymCache::parse(symcache).map(|_| ()).map_err(|error| error.to_string())
}

/// The frames at `address` relative to the base, innermost first. None if the SymCache is broken there.
pub(crate) fn lookup(symcache: &[u8], address: u64) -> Option<Vec<DwarfFrame<'_>>> {
    guarded(|| {
        let symcache = SymCache::parse(symcache).ok()?;
        let frames: Vec<DwarfFrame<'_>> = symcache
            .lookup(address)
            .take(MAX_CHAIN)
            .map(|location| {
                let (name, linkage_name) = name::split(location.function().name());
                DwarfFrame {
                    name,
                    linkage_name,
                    file: location.file().map(|file| file.full_path()).filter(|path| !path.is_empty()),
                    line: Some(location.line()).filter(|&line| line != 0),
                }
            })
            .collect();
        (frames.len() < MAX_CHAIN).then_some(frames)
    })
    .flatten()
}

/// Runs `work` on input that may be damaged; none if it panics.
pub(crate) fn guarded<T>(work: impl FnOnce() -> T) -> Option<T> {
    // All that `work` changes is dropped with it.
    catch_unwind(AssertUnwindSafe(work)).ok()
}
