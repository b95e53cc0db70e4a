//! The table of functions, `runtime.pclntab`: its header, its functions, and the stack depths of each.
//!
//! # Why this shape
//! The format has no specification but the runtime's source, and each version moved fields. Readers
//! branch on the version at each access; here a version is a row of offsets, and one reader serves all. Nothing
//! in the table is taken for granted: an offset that leaves it costs the one function.
//!
//! # Layout
//! Little-endian. `word` is 8 bytes. Sources: runtime/symtab.go (`pcHeader`, `functab`), runtime/runtime2.go
//! (`_func`), cmd/link/internal/ld/pcln.go of Go 1.16, 1.18, 1.20, 1.26.
//!
//! | offset | size | header field |
//! |---|---|---|
//! | 0 | 4 | magic: the version |
//! | 4 | 2 | 0 |
//! | 6 | 1 | smallest instruction in bytes: 1 on x86-64, 4 on aarch64 |
//! | 7 | 1 | bytes of a pointer |
//! | 8 | 8 | functions |
//! | 16 | 8 | files |
//! | 24 | 8 | from 1.18: address of `runtime.text`; 0 from 1.26 |
//! | 24 or 32 | 40 | offsets from the header: names, compilation units, files, depths (`pctab`), functions |
//!
//! At the offset of functions there is for each one its start and the offset of its description from there, words in
//! 1.16, 4 bytes from 1.18, then starts relative to `runtime.text`; one more start ends the last function.
//!
//! Depths are pairs of varints: change of the depth, zigzag, then how much code it holds over, in smallest instructions. The
//! depth before the first pair is -1. A change of 0 that is not the first ends them.

use std::ops::Range;

use windlass_schema::Architecture;

use super::GoSkip;

/// Smallest instructions of the instruction sets that are read, in bytes.
const QUANTA: [u8; 2] = [quantum(Architecture::X86_64), quantum(Architecture::Aarch64)];

/// Bytes of a pointer of theirs.
const POINTER_BYTES: u8 = 8;

/// A name is compared up to here, in bytes. Longer than each that is of interest.
const MAX_NAME_BYTES: usize = 64;

/// Most bytes of a varint of 32 bits.
const MAX_VARINT_BYTES: usize = 5;

/// Alignment of the table in its section, in bytes: that of a pointer at least.
const TABLE_ALIGNMENT: usize = 8;

/// A function begins its own stack (`funcFlag_TOPFRAME`, runtime/symtab.go).
const FLAG_TOP_FRAME: u8 = 1;
/// It writes a value to the stack pointer other than by adding a constant (`funcFlag_SPWRITE`).
const FLAG_SP_WRITE: u8 = 2;
/// It is written in assembly (`funcFlag_ASM`).
const FLAG_ASM: u8 = 4;

/// Why a table cannot be read at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum GoTableError {
    /// It begins with no known magic.
    #[error("magic {0:#010x} is of no known version")]
    Magic(u32),
    /// It is of another architecture.
    #[error("instructions of {quantum} bytes and pointers of {pointer} are of another architecture")]
    Architecture {
        /// Smallest instruction, in bytes.
        quantum: u8,
        /// Pointer, in bytes.
        pointer: u8,
    },
    /// A part that the header names is not inside the data.
    #[error("the table is cut off")]
    Truncated,
    /// Neither the header nor the caller says where code begins.
    #[error("the start of code is unknown")]
    NoText,
}

/// A version of the format, as offsets in bytes.
#[derive(Clone, Copy, Debug)]
struct Version {
    magic: u32,
    /// Of the first of the five offsets in the header.
    parts: usize,
    /// Bytes of a start, and of an offset, in the list of functions.
    entry_bytes: usize,
    /// In a function's description:
    name: usize,
    depths: usize,
    flag: usize,
    /// Whether starts are relative to `runtime.text`, and assembly has its flag.
    is_relative: bool,
}

/// The versions, by the first release with each: 1.16, 1.18, 1.20.
const VERSIONS: [Version; 3] = [
    Version {
        magic: 0xffff_fffa,
        parts: 24,
        entry_bytes: 8,
        name: 8,
        depths: 20,
        flag: 41,
        is_relative: false,
    },
    Version {
        magic: 0xffff_fff0,
        parts: 32,
        entry_bytes: 4,
        name: 4,
        depths: 16,
        flag: 37,
        is_relative: true,
    },
    Version {
        magic: 0xffff_fff1,
        parts: 32,
        entry_bytes: 4,
        name: 4,
        depths: 16,
        flag: 41,
        is_relative: true,
    },
];

/// A table whose header is sound.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table<'a> {
    version: Version,
    text: u64,
    count: usize,
    names: &'a [u8],
    depths: &'a [u8],
    functions: &'a [u8],
    bytes: usize,
    quantum: u8,
    has_flags: bool,
}

/// A function, as the table describes it.
#[derive(Clone, Debug)]
pub(super) struct Function<'a> {
    /// From its first byte to that of the next function.
    pub(super) range: Range<u64>,
    /// Its name and, in a long one, not all of it; empty if unknown.
    pub(super) name: &'a [u8],
    depths: usize,
    flag: u8,
}

impl Function<'_> {
    pub(super) fn is_named(&self, name: &str) -> bool {
        self.name == name.as_bytes()
    }

    pub(super) fn is_top_frame(&self) -> bool {
        self.flag & FLAG_TOP_FRAME != 0
    }

    pub(super) fn writes_stack_pointer(&self) -> bool {
        self.flag & FLAG_SP_WRITE != 0
    }

    pub(super) fn is_assembly(&self) -> bool {
        self.flag & FLAG_ASM != 0
    }
}

/// Bytes of a function, from its start, over which the stack has one depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) start: u32,
    pub(super) end: u32,
    /// Bytes between the return address and rsp, or between the CFA and sp of aarch64; `None` if unknown.
    pub(super) depth: Option<i32>,
}

impl<'a> Table<'a> {
    pub(super) fn parse(
        data: &'a [u8],
        text: Option<u64>,
        architecture: Architecture,
    ) -> Result<Self, GoTableError> {
        let mut table = Self::header(data, text)?;
        if table.quantum != quantum(architecture) {
            return Err(GoTableError::Architecture { quantum: table.quantum, pointer: POINTER_BYTES });
        }
        // Flags came with Go 1.17, without a new version: some function always has one.
        table.has_flags = table.version.is_relative
            || (0..table.count).any(|index| table.function(index).is_ok_and(|function| function.flag != 0));
        Ok(table)
    }

    /// A table of which nothing behind the header has been read.
    fn header(data: &'a [u8], text: Option<u64>) -> Result<Self, GoTableError> {
        let magic = half(data, 0).ok_or(GoTableError::Truncated)?;
        let version =
            *VERSIONS.iter().find(|version| version.magic == magic).ok_or(GoTableError::Magic(magic))?;
        let (quantum, pointer) = match data.get(4..8) {
            Some([0, 0, quantum, pointer]) => (*quantum, *pointer),
            Some(_) => return Err(GoTableError::Magic(magic)),
            None => return Err(GoTableError::Truncated),
        };
        if !QUANTA.contains(&quantum) || pointer != POINTER_BYTES {
            return Err(GoTableError::Architecture { quantum, pointer });
        }
        let size = |at| word(data, at).and_then(|value| usize::try_from(value).ok());
        let part = |number: usize| size(version.parts + 8 * number).and_then(|offset| data.get(offset..));
        let parts = || Some((size(8)?, part(0)?, part(3)?, part(4)?));
        let (count, names, depths, functions) = parts().ok_or(GoTableError::Truncated)?;
        let list = count.checked_mul(2).and_then(|n| n.checked_add(1)?.checked_mul(version.entry_bytes));
        if list.is_none_or(|bytes| bytes > functions.len()) {
            return Err(GoTableError::Truncated);
        }
        let stated = if version.is_relative { word(data, 24).filter(|text| *text != 0) } else { Some(0) };
        let text = if version.is_relative { text.or(stated) } else { stated };
        let text = text.ok_or(GoTableError::NoText)?;
        let bytes = data.len();
        Ok(Self { version, text, count, names, depths, functions, bytes, quantum, has_flags: false })
    }

    pub(super) fn function_count(&self) -> usize {
        self.count
    }

    /// Whether functions say of themselves that they begin a stack or write the stack pointer.
    pub(super) fn has_flags(&self) -> bool {
        self.has_flags
    }

    /// Whether functions say of themselves that they are written in assembly.
    pub(super) fn marks_assembly(&self) -> bool {
        self.version.is_relative
    }

    /// Most bytes of depths that are read. Functions may share depths, so a hostile table could have each point
    /// at the longest; a real one has more bytes for each function's description alone.
    pub(super) fn depth_budget(&self) -> usize {
        self.bytes
    }

    pub(super) fn function(&self, index: usize) -> Result<Function<'a>, GoSkip> {
        let entry = |position: usize| {
            let at = position * self.version.entry_bytes;
            match self.version.entry_bytes {
                4 => half(self.functions, at).map(u64::from),
                _ => word(self.functions, at),
            }
        };
        let start = |position| self.text.checked_add(entry(position)?);
        let read = || {
            let range = start(2 * index)?..start(2 * index + 2)?;
            let at = usize::try_from(entry(2 * index + 1)?).ok()?;
            let description = self.functions.get(at..)?;
            let name = usize::try_from(half(description, self.version.name)?).ok()?;
            let depths = usize::try_from(half(description, self.version.depths)?).ok()?;
            let flag = *description.get(self.version.flag)?;
            Some(Function { range, name: self.name(name), depths, flag })
        };
        let function = read().ok_or(GoSkip::Truncated)?;
        // Offsets of bytes in a function are 32 bits wide, as Go's are.
        match function.range.end.checked_sub(function.range.start) {
            Some(bytes) if bytes != 0 && u32::try_from(bytes).is_ok() => Ok(function),
            _ => Err(GoSkip::Order),
        }
    }

    fn name(&self, at: usize) -> &'a [u8] {
        let name = self.names.get(at..).unwrap_or_default();
        let name = &name[..name.len().min(MAX_NAME_BYTES)];
        name.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    /// Appends the depths of `function`. On an error, those before the fault, and one that is unknown.
    pub(super) fn depths(
        &self,
        function: &Function<'_>,
        budget: &mut usize,
        spans: &mut Vec<Span>,
    ) -> Result<(), GoSkip> {
        if function.depths == 0 {
            return Err(GoSkip::NoDepths);
        }
        let size = function.range.end - function.range.start;
        let size = u32::try_from(size).map_err(|_| GoSkip::Order)?;
        let mut data = self.depths.get(function.depths..).unwrap_or_default();
        data = &data[..data.len().min(*budget)];
        let whole = data.len();
        let is_short_of_budget = whole == *budget;
        let mut depth = -1i32;
        let mut start = 0u32;
        let result = loop {
            let fault = if is_short_of_budget { GoSkip::Budget } else { GoSkip::Depths };
            let Some(change) = varint(&mut data) else { break Err(fault) };
            if change == 0 && start != 0 {
                break Ok(());
            }
            let bytes = varint(&mut data).and_then(|steps| steps.checked_mul(self.quantum.into()));
            let Some(bytes) = bytes else { break Err(fault) };
            depth = depth.wrapping_add((change >> 1) as i32 ^ -((change & 1) as i32));
            match start.checked_add(bytes) {
                Some(end) if end <= size && end > start => {
                    spans.push(Span { start, end, depth: Some(depth) });
                    start = end;
                }
                _ => break Err(GoSkip::Depths),
            }
        };
        *budget -= whole - data.len();
        if result.is_err() && start < size {
            spans.push(Span { start, end: size, depth: None });
        }
        result
    }
}

/// The offset of the first table in `data`, section or segment: for executables without section headers.
pub(crate) fn find_table(data: &[u8]) -> Option<usize> {
    (0..data.len()).step_by(TABLE_ALIGNMENT).find(|at| {
        let data = &data[*at..];
        let is_magic =
            half(data, 0).is_some_and(|magic| VERSIONS.iter().any(|version| version.magic == magic));
        is_magic && is_sound(data)
    })
}

/// Whether the parts are in the order in which linkers lay them out, and the first function can be read.
fn is_sound(data: &[u8]) -> bool {
    let Some(version) = VERSIONS.iter().find(|version| half(data, 0) == Some(version.magic)) else {
        return false;
    };
    let header = version.parts as u64 + 8 * 5;
    let mut last = header - 1;
    let in_order = (0..5).all(|part| {
        let offset = word(data, version.parts + 8 * part).unwrap_or(0);
        std::mem::replace(&mut last, offset) < offset
    });
    in_order && Table::header(data, Some(0)).is_ok_and(|table| table.count > 0 && table.function(0).is_ok())
}

/// Offsets from `runtime.text`, or addresses, of the first function and of the end of the last.
pub(super) fn bounds(data: &[u8]) -> Option<(u64, u64)> {
    let table = Table::header(data, Some(0)).ok()?;
    let last = table.count.checked_sub(1)?;
    Some((table.function(0).ok()?.range.start, table.function(last).ok()?.range.end))
}

/// Bytes of the smallest instruction.
const fn quantum(architecture: Architecture) -> u8 {
    match architecture {
        Architecture::X86_64 => 1,
        Architecture::Aarch64 => 4,
    }
}

fn half(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(data.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn word(data: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(data.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// Reads a varint of 32 bits, least significant 7 bits first.
fn varint(data: &mut &[u8]) -> Option<u32> {
    let mut value = 0u64;
    for (position, byte) in data.iter().take(MAX_VARINT_BYTES).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * position);
        if byte & 0x80 == 0 {
            *data = &data[position + 1..];
            return u32::try_from(value).ok();
        }
    }
    None
}
