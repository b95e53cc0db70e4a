//! Bodies of the service's JSON interfaces, and the names in its paths.

mod inventory;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::BuildId;
pub use inventory::{
    ArtefactDetails, Deleted, DerivedDetails, ImageDetails, ImageList, ImageSummary, LabelDetails,
    LabelRequest, LabelResponse, MAX_CHANGED_LABELS, MAX_LABELLED_IMAGES, MAX_LISTED_ARTEFACTS,
    MAX_LISTED_IMAGES, NamespaceUsage,
};

/// What can be stored for a build-ID, by the name in its path: `/buildid/ID/KIND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ArtefactKind {
    /// An ELF file with debug sections.
    Debuginfo,
    /// The ELF file that runs.
    Executable,
    /// A source file, named by its path in the line table.
    Source,
    /// An ELF file's headers, notes, symbol tables and unwind sections, without its code.
    Skeleton,
    /// Symbols of a running kernel: lines of `ADDRESS TYPE NAME`, hex addresses as linked (not as
    /// randomised at boot), or of a kernel module, as [`crate::kernel_module`] places its code.
    Kallsyms,
    /// Functions that a just-in-time compiler made, under an ID of their own: see [`crate::perf_map`].
    PerfMap,
    /// Split DWARF of all units of an image: a `.dwp` file.
    Dwp,
    /// Split DWARF of some units: a `.dwo` file, named by the ID of its unit as 16 hex digits.
    Dwo,
}

impl ArtefactKind {
    /// Every kind.
    pub const ALL: &[Self] = &[
        Self::Debuginfo,
        Self::Executable,
        Self::Source,
        Self::Skeleton,
        Self::Kallsyms,
        Self::PerfMap,
        Self::Dwp,
        Self::Dwo,
    ];

    /// The name in paths and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Debuginfo => "debuginfo",
            Self::Executable => "executable",
            Self::Source => "source",
            Self::Skeleton => "skeleton",
            Self::Kallsyms => "kallsyms",
            Self::PerfMap => "perfmap",
            Self::Dwp => "dwp",
            Self::Dwo => "dwo",
        }
    }
}

impl fmt::Display for ArtefactKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A path names no [`ArtefactKind`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown artefact kind {0:?}")]
pub struct UnknownArtefactKind(pub String);

impl FromStr for ArtefactKind {
    type Err = UnknownArtefactKind;

    fn from_str(text: &str) -> Result<Self, UnknownArtefactKind> {
        Self::ALL
            .iter()
            .copied()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| UnknownArtefactKind(text.to_owned()))
    }
}

/// Media type of an unwind table.
pub const UNWIND_TYPE: &str = "application/vnd.windlass.unwind";
/// Media type of an unwind table in its wire form: sent to whoever lists it in `Accept`.
pub const UNWIND_WIRE_TYPE: &str = "application/vnd.windlass.unwind-wire";
/// Header of an upload: SHA-256 of the body after content decoding, lower-case hex. Required.
pub const SHA256_HEADER: &str = "x-windlass-sha256";
/// Header of an upload: the file's base name, percent-encoded, for `X-DEBUGINFOD-FILE`. Optional.
pub const FILE_NAME_HEADER: &str = "x-windlass-file";
/// Header of an upload, and of the question what is missing: the namespace. Optional.
pub const NAMESPACE_HEADER: &str = "x-windlass-namespace";
/// Header of an upload in parts (draft-ietf-httpbis-resumable-upload): where the part begins, or how much is there, in
/// decoded bytes.
pub const UPLOAD_OFFSET_HEADER: &str = "upload-offset";
/// Header of an upload in parts: size of the whole in decoded bytes.
pub const UPLOAD_LENGTH_HEADER: &str = "upload-length";
/// Header of an upload in parts: `?1` with the last part and when all is there, else `?0`.
pub const UPLOAD_COMPLETE_HEADER: &str = "upload-complete";
/// Header of an upload in parts: its limits, as `max-size=..., min-append-size=..., max-append-size=..., max-age=...`.
pub const UPLOAD_LIMIT_HEADER: &str = "upload-limit";

/// What an ELF file has to name code with, poorest first: the best there is with data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Brings {
    /// None of the others.
    Nothing,
    /// `.dynsym`.
    Dynsym,
    /// `.symtab`.
    Symtab,
    /// `.debug_line`.
    LineTable,
    /// `.debug_info`.
    DebugInfo,
}

impl fmt::Display for Brings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "no names",
            Self::Dynsym => "dynamic symbols",
            Self::Symtab => "a symbol table",
            Self::LineTable => "a line table",
            Self::DebugInfo => "debug_info",
        })
    }
}

/// `POST /api/v1/missing`: which of these does the service lack?
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingRequest {
    /// At most [`MAX_MISSING_ARTEFACTS`].
    pub artefacts: Vec<ArtefactName>,
}

/// Most artefacts in one [`MissingRequest`].
pub const MAX_MISSING_ARTEFACTS: usize = 100_000;

/// An artefact, and optionally the content that the asker has of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ArtefactName {
    /// The image.
    pub build_id: BuildId,
    /// What of it.
    pub kind: ArtefactKind,
    /// For sources: the path; for split DWARF of a unit: its ID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// SHA-256 of the asker's content, lower-case hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// What the asker's content brings: other content that brings less counts as missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub brings: Option<Brings>,
}

/// Answer to a [`MissingRequest`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingResponse {
    /// Those that the service does not have, or has with other content that brings less, as they were named.
    pub missing: Vec<ArtefactName>,
    /// Those that it has with another SHA-256 than the one named, which it keeps.
    pub differing: Vec<ArtefactName>,
}

/// Answer to an upload that was stored (201) or already there (200).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// The image.
    pub build_id: BuildId,
    /// What of it.
    pub kind: ArtefactKind,
    /// SHA-256 of the content, lower-case hex.
    pub sha256: String,
    /// Size of the content in bytes.
    pub size_bytes: u64,
    /// SHA-256 of the poorer content whose place it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaced: Option<String>,
}

/// Body of every answer with status 4xx or 5xx under `/api/`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What is wrong and what to do.
    pub error: String,
}

/// `POST /api/v1/symbolize`, as JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SymbolizeRequest {
    /// At most [`MAX_SYMBOLIZE_ADDRESSES`] addresses over all images.
    pub images: Vec<ImageAddresses>,
}

/// Most addresses in one [`SymbolizeRequest`].
pub const MAX_SYMBOLIZE_ADDRESSES: usize = 1_000_000;

/// Addresses of one image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageAddresses {
    /// The image.
    pub build_id: BuildId,
    /// Image addresses (ELF virtual addresses).
    pub addresses: Vec<u64>,
    /// Whether they are return addresses, to be looked up one byte back.
    #[serde(default)]
    pub return_addresses: bool,
}

/// Answer to a [`SymbolizeRequest`]: each distinct string, function and frame once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SymbolizeResponse {
    /// File paths.
    pub files: Vec<String>,
    /// Functions.
    pub functions: Vec<FunctionName>,
    /// Frames.
    pub frames: Vec<FrameLine>,
    /// As in the request, in its order.
    pub images: Vec<ImageFrames>,
}

/// A function.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FunctionName {
    /// Demangled.
    pub name: String,
    /// As the linker knows it, where it differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linkage_name: Option<String>,
    /// Where the name comes from.
    pub provenance: Provenance,
}

/// A function at a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FrameLine {
    /// Index into `functions`.
    pub function: u32,
    /// Index into `files`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<u32>,
    /// Line, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
}

/// The frames of one image's addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFrames {
    /// The image.
    pub build_id: BuildId,
    /// For each address, in the order asked: indices into `frames`, innermost inlined one first.
    /// Empty where there is no name.
    pub addresses: Vec<Vec<u32>>,
    /// Why those without frames have none: index into `addresses` and the reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unresolved: Vec<(u32, Unresolved)>,
    /// Of those without frames, where the function starts that has no name, as far as it is known: index into
    /// `addresses` and image address. Addresses of one function have the same start.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unnamed_functions: Vec<(u32, u64)>,
}

/// Where a name comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provenance {
    /// DWARF debug information.
    Dwarf,
    /// The ELF symbol table.
    Symtab,
    /// The ELF dynamic symbol table.
    Dynsym,
    /// Go's pclntab.
    Pclntab,
    /// The compressed symbol table of `.gnu_debugdata`.
    MiniDebugInfo,
    /// The running kernel.
    Kallsyms,
    /// A JIT's perf map.
    PerfMap,
}

impl Provenance {
    /// The name used in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Dwarf => "dwarf",
            Self::Symtab => "symtab",
            Self::Dynsym => "dynsym",
            Self::Pclntab => "pclntab",
            Self::MiniDebugInfo => "minidebuginfo",
            Self::Kallsyms => "kallsyms",
            Self::PerfMap => "perfmap",
        }
    }
}

/// Why an address has no name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unresolved {
    /// Nothing is stored for the build-ID.
    UnknownImage,
    /// What is stored has neither DWARF nor symbols.
    NoSymbols,
    /// The image has symbols, but none covers the address.
    NoSymbolAtAddress,
    /// What is stored could not be read; the service's log says why.
    BrokenDebuginfo,
}
