//! The lookup: from an image address to its frames.

use std::borrow::Cow;

use windlass_schema::ImageAddress;
use windlass_schema::http::{Provenance, Unresolved};

use crate::container::{self, IndexError, Sections};
use crate::dwarf::{self, DwarfFrame};
use crate::symbol_table::NamedSymbol;

/// What a SymCache's first byte is aligned to, so that its tables can be read in place.
const SYMCACHE_ALIGNMENT: usize = 8;

/// A function at a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Its name, demangled, with its arguments where the name holds them.
    pub function: Cow<'a, str>,
    /// Its name for the linker, where it differs.
    pub linkage_name: Option<Cow<'a, str>>,
    /// Path of the source file, as the compiler was given it.
    pub file: Option<Cow<'a, str>>,
    /// Line in the file, from 1.
    pub line: Option<u32>,
    /// Where the name comes from.
    pub provenance: Provenance,
}

/// An index, read in place.
///
/// ```
/// use windlass_schema::ImageAddress;
/// use windlass_symbol_index::{Index, Input, build};
///
/// let kallsyms = b"ffffffff81000000 T startup_64\nffffffff81000040 T secondary_startup_64\n";
/// let bytes = build(Input { kallsyms: Some(kallsyms), ..Input::default() })?;
/// let index = Index::parse(&bytes)?;
/// let frames = index.lookup(ImageAddress::new(0xffff_ffff_8100_0004)).map_err(|why| format!("{why:?}"))?;
/// assert_eq!(frames[0].function, "startup_64");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Index<'a> {
    sections: Sections<'a>,
    /// The SymCache, if `bytes` did not lie as it needs to: a copy, and where in it the SymCache starts.
    aligned: Option<(Vec<u8>, usize)>,
}

impl<'a> Index<'a> {
    /// Checks an index and opens it. Reads all of it once; copies it in part if it does not lie on a
    /// multiple of 8.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, IndexError> {
        let sections = container::parse(bytes)?;
        let index = Self { aligned: align(sections.symcache), sections };
        if !index.symcache().is_empty() {
            dwarf::check(index.symcache()).map_err(IndexError::SymCache)?;
        }
        Ok(index)
    }

    /// The frames at `address`, innermost inlined one first; at least one.
    ///
    /// A return address has to be turned into a lookup address before, with
    /// [`windlass_schema::ReturnAddress::lookup_address`].
    pub fn lookup(&self, address: ImageAddress) -> Result<Vec<Frame<'_>>, Unresolved> {
        let symbol = self.sections.symbols.lookup(address.get()).map_err(|_| Unresolved::BrokenDebuginfo)?;
        let mut chain = self.dwarf_frames(address)?;
        // An inlined function without a name has its name in a file that was not given.
        let outermost = chain.pop();
        let mut frames: Vec<Frame<'_>> =
            chain.into_iter().filter(|frame| !frame.name.is_empty()).map(Frame::from_dwarf).collect();
        frames.extend(match (outermost, symbol) {
            (Some(frame), _) if !frame.name.is_empty() => Some(Frame::from_dwarf(frame)),
            (line, Some(symbol)) => Some(Frame::from_symbol(symbol, line)),
            (_, None) => None,
        });
        if frames.is_empty() { Err(self.why_nothing()) } else { Ok(frames) }
    }

    /// Where the function starts that contains `address`, if it has no name: call frame information survives
    /// every strip. All addresses of one function have the same start.
    ///
    /// Of use where [`lookup`](Self::lookup) finds nothing; of functions that have a name nothing is kept here.
    pub fn function_at(&self, address: ImageAddress) -> Option<ImageAddress> {
        self.sections.extents.lookup(address.get()).map(ImageAddress::new)
    }

    fn dwarf_frames(&self, address: ImageAddress) -> Result<Vec<DwarfFrame<'_>>, Unresolved> {
        match address.get().checked_sub(self.sections.base) {
            Some(relative) if !self.symcache().is_empty() => {
                dwarf::lookup(self.symcache(), relative).ok_or(Unresolved::BrokenDebuginfo)
            }
            _ => Ok(Vec::new()),
        }
    }

    fn symcache(&self) -> &[u8] {
        match &self.aligned {
            Some((copy, start)) => &copy[*start..],
            None => self.sections.symcache,
        }
    }

    fn why_nothing(&self) -> Unresolved {
        if self.sections.broken {
            Unresolved::BrokenDebuginfo
        } else if self.sections.symcache.is_empty() && self.sections.symbols.is_empty() {
            Unresolved::NoSymbols
        } else {
            Unresolved::NoSymbolAtAddress
        }
    }
}

impl<'a> Frame<'a> {
    fn from_dwarf(frame: DwarfFrame<'a>) -> Self {
        Self {
            function: frame.name.into(),
            linkage_name: frame.linkage_name.map(Cow::Borrowed),
            file: frame.file.map(Cow::Owned),
            line: frame.line,
            provenance: Provenance::Dwarf,
        }
    }

    /// A function known by name, at a line if DWARF knows that.
    fn from_symbol(symbol: NamedSymbol<'a>, line: Option<DwarfFrame<'a>>) -> Self {
        let (file, line) = line.map_or((None, None), |frame| (frame.file, frame.line));
        Self {
            function: symbol.name.into(),
            linkage_name: symbol.linkage_name.map(Cow::Borrowed),
            file: file.map(Cow::Owned),
            line,
            provenance: symbol.provenance,
        }
    }
}

/// A copy of `symcache` that lies as it needs to, and where in the copy it starts; none if it does.
fn align(symcache: &[u8]) -> Option<(Vec<u8>, usize)> {
    if symcache.as_ptr().addr().is_multiple_of(SYMCACHE_ALIGNMENT) {
        return None;
    }
    let mut copy: Vec<u8> = Vec::with_capacity(symcache.len() + SYMCACHE_ALIGNMENT);
    let start = copy.as_ptr().addr().next_multiple_of(SYMCACHE_ALIGNMENT) - copy.as_ptr().addr();
    copy.resize(start, 0);
    // Stays inside the capacity, so the copy does not move.
    copy.extend_from_slice(symcache);
    Some((copy, start))
}
