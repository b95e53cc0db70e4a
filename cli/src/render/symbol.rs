//! Functions and frames: what a location of a pprof profile is called.
//!
//! A function is told apart by name and source file and, where no file is known, by image: `memcpy` of
//! libc and `memcpy` of the kernel are two. A name that is missing stays missing (`IMAGE+0xADDRESS`, or
//! [`UNKNOWN`] where an index leads nowhere); nothing is guessed from neighbours. The address is the one in
//! the profile, which our agent writes as an image address, so `windlass symbolize` takes it as it is; or,
//! where the service knows it, that of the function's start, so that a function without a name is still one.

use std::cmp::Ordering;
use std::collections::HashMap;

use windlass_schema::pprof;

/// Stands for a name, an image or a process that the profile does not give.
pub(super) const UNKNOWN: &str = "[unknown]";

/// Mapping names with this prefix are the kernel's (`[kernel.kallsyms]`).
const KERNEL_PREFIX: &str = "[kernel";

/// What a name stands for. The discriminants are those of `flamegraph_tree.js`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(super) enum Kind {
    /// A function of user space.
    Native = 0,
    /// A function of the kernel.
    Kernel = 1,
    /// An address without a name.
    Unresolved = 2,
    /// The reason why the stacks below it were cut.
    Stop = 3,
    /// Stands for many: a process, all of them, calls too small to keep.
    Group = 4,
}

/// A function, or what stands in its place.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Function {
    pub(super) name: String,
    pub(super) file: Option<String>,
    /// Base name of the image, for functions whose file is unknown.
    pub(super) image: Option<String>,
    pub(super) kind: Kind,
}

/// Index into [`Symbols`]' functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct FunctionId(u32);

impl FunctionId {
    fn at(index: usize) -> Self {
        Self(u32::try_from(index).expect("2^32 functions would need more memory than a profile may take"))
    }

    pub(super) const fn index(self) -> usize {
        self.0 as usize
    }
}

/// A function at a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) function: FunctionId,
    pub(super) line: Option<u32>,
    /// Whether the compiler inlined it into the next outer frame.
    pub(super) inlined: bool,
}

/// The distinct functions of a profile.
#[derive(Clone, Debug, Default)]
pub(super) struct Symbols {
    functions: Vec<Function>,
    ids: HashMap<Function, FunctionId>,
}

impl Symbols {
    pub(super) fn function(&self, id: FunctionId) -> &Function {
        &self.functions[id.index()]
    }

    /// All, in the order of their ids.
    pub(super) fn functions(&self) -> impl ExactSizeIterator<Item = &Function> {
        self.functions.iter()
    }

    /// Their ids.
    pub(super) fn ids(&self) -> impl Iterator<Item = FunctionId> + use<> {
        (0..self.functions.len()).map(FunctionId::at)
    }

    pub(super) fn intern(&mut self, function: Function) -> FunctionId {
        if let Some(id) = self.ids.get(&function) {
            return *id;
        }
        let id = FunctionId::at(self.functions.len());
        self.functions.push(function.clone());
        self.ids.insert(function, id);
        id
    }

    /// A frame that is a bare name: a process, a reason to stop, a location that is not there.
    pub(super) fn named(&mut self, name: &str, kind: Kind) -> Frame {
        let function = Function { name: name.to_owned(), file: None, image: None, kind };
        Frame { function: self.intern(function), line: None, inlined: false }
    }
}

/// The locations of one pprof profile, named once each.
pub(super) struct Locations<'p> {
    profile: &'p pprof::Profile,
    locations: HashMap<u64, &'p pprof::Location>,
    mappings: HashMap<u64, &'p pprof::Mapping>,
    functions: HashMap<u64, &'p pprof::Function>,
    named: HashMap<u64, Vec<Frame>>,
}

impl<'p> Locations<'p> {
    pub(super) fn new(profile: &'p pprof::Profile) -> Self {
        Self {
            profile,
            locations: profile.location.iter().map(|location| (location.id, location)).collect(),
            mappings: profile.mapping.iter().map(|mapping| (mapping.id, mapping)).collect(),
            functions: profile.function.iter().map(|function| (function.id, function)).collect(),
            named: HashMap::new(),
        }
    }

    /// The frames of a location, innermost first; never empty.
    pub(super) fn frames(&mut self, id: u64, symbols: &mut Symbols) -> &[Frame] {
        if !self.named.contains_key(&id) {
            let frames = self.name(id, symbols);
            self.named.insert(id, frames);
        }
        &self.named[&id]
    }

    fn name(&self, id: u64, symbols: &mut Symbols) -> Vec<Frame> {
        let Some(location) = self.locations.get(&id) else {
            return vec![symbols.named(UNKNOWN, Kind::Unresolved)];
        };
        let mapping = self.mappings.get(&location.mapping_id);
        let path = mapping.map_or("", |mapping| self.profile.string(mapping.filename));
        let kind = if path.starts_with(KERNEL_PREFIX) { Kind::Kernel } else { Kind::Native };
        let image = image_name(path);
        let described = self.described(location, image);
        let Some(outermost) = location.line.len().checked_sub(1).filter(|_| described.is_none()) else {
            let name = match (image, described.unwrap_or(location.address)) {
                (None, 0) => UNKNOWN.to_owned(),
                (image, address) => format!("{}+{address:#x}", image.unwrap_or(UNKNOWN)),
            };
            let image = image.map(str::to_owned);
            let function = symbols.intern(Function { name, file: None, image, kind: Kind::Unresolved });
            return vec![Frame { function, line: None, inlined: false }];
        };
        location
            .line
            .iter()
            .enumerate()
            .map(|(depth, line)| Frame {
                function: symbols.intern(self.line_function(line, image, kind)),
                line: u32::try_from(line.line).ok().filter(|line| *line > 0),
                inlined: depth < outermost,
            })
            .collect()
    }

    /// The address that its only function states in words: what services write for viewers that cannot show a
    /// location without a function (`libc.so.6+0x1234`, `libc.so.6!0x1234`, `0x1234`). It is that of the location, or
    /// one before it in the same image: the start of the function.
    fn described(&self, location: &pprof::Location, image: Option<&str>) -> Option<u64> {
        let [line] = location.line[..] else { return None };
        let function = self.functions.get(&line.function_id).filter(|function| function.filename == 0)?;
        let (prefix, digits) = self.profile.string(function.name).rsplit_once("0x")?;
        let address = u64::from_str_radix(digits, 16).ok()?;
        let stated = prefix.strip_suffix(['+', '!']);
        let in_image = prefix.is_empty() || (stated.is_some() && stated == image);
        let is_described = match address.cmp(&location.address) {
            Ordering::Less => in_image,
            Ordering::Equal => prefix.is_empty() || stated.is_some(),
            Ordering::Greater => false,
        };
        is_described.then_some(address)
    }

    fn line_function(&self, line: &pprof::Line, image: Option<&str>, kind: Kind) -> Function {
        let text = |index| Some(self.profile.string(index)).filter(|text| !text.is_empty());
        let function = self.functions.get(&line.function_id);
        let name = function.and_then(|function| text(function.name).or_else(|| text(function.system_name)));
        let file = function.and_then(|function| text(function.filename)).map(str::to_owned);
        Function {
            name: name.unwrap_or(UNKNOWN).to_owned(),
            image: if file.is_none() { image.map(str::to_owned) } else { None },
            file,
            kind: if name.is_some() { kind } else { Kind::Unresolved },
        }
    }
}

/// The last part of a mapping's path, if it has one.
pub(super) fn image_name(path: &str) -> Option<&str> {
    path.trim_end_matches('/').rsplit('/').next().filter(|name| !name.is_empty())
}
