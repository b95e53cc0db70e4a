//! What is the code called that processes make at run time?
//!
//! Addresses in executable memory without a file mean nothing to the service. If the compiler writes down what it makes
//! ([`code_file`](crate::code_file)), the functions that samples met become lists, which the service takes as it takes
//! other symbols, each under the ID of its content, and the batch's mappings name that ID. A function is sent once for a
//! process, and stays in the list that it was sent in.
//!
//! A sample comes before the record that explains it, or before the reading. So an address goes into the batch with the
//! number of the reading that will say what is there ([`Reading`]), and gets its mapping when the batch is done:
//!
//! ```text
//! sample: meet() -> Reading    due: read()    batch is full: read_all(), name_batch()
//! ```
//! What a reading cannot say without doubt stays an address.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use windlass_schema::perf_map::{MAX_PERF_MAP_BYTES, perf_map_id};

use crate::code_file::{CodeFile, FileError, ProcessRoot};
use crate::code_map::{Code, CodeMap, Met};
use crate::code_records::{Progress, RecordsError};
use crate::image::ImageId;
use crate::otlp::Module;
use crate::perf_ring::monotonic_ns;
use crate::symbol_upload::SymbolUpload;

/// Most processes looked after at once, with two open files each.
const MAX_PROCESSES: usize = 128;
/// Shortest time between two readings of a process's file: the more there are, the less moves unseen in between.
const READING_PAUSE: Duration = Duration::from_millis(500);
/// How long a process without samples of such code is remembered.
const IDLE: Duration = Duration::from_secs(60);
/// Most addresses of one process that a reading explains.
const MAX_MET: usize = 16_384;
/// Most functions of one process of which it is remembered that they were sent, at some 150 bytes each; beyond it,
/// they are sent again.
const MAX_SENT: usize = 16_384;
/// Most lists for the functions of one process in one batch: as many as addresses changed their function in it.
const MAX_LISTS: usize = 16;
/// What profiles show as the file of such code.
const SHOWN_PATH: &str = "[jit]";

/// Which reading of which process says what is at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Reading {
    tgid: u32,
    number: u64,
}

/// A function as it is sent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Function {
    start: u64,
    end: u64,
    name: Arc<str>,
}

/// What the addresses of a batch came to.
pub type BatchCode = HashMap<(Reading, u64), Arc<Module>>;

/// The processes that run code of their own making.
#[derive(Default)]
pub struct JitCode {
    processes: HashMap<u32, Process>,
    /// The number of the last reading, whichever process's.
    last_reading: u64,
    /// What readings said since the batch began.
    found: HashMap<(Reading, u64), Function>,
}

struct Process {
    root: ProcessRoot,
    source: Source,
    map: CodeMap,
    met: BTreeMap<u64, Met>,
    /// Under which number the next reading goes.
    reading: u64,
    /// When the last reading began: `CLOCK_MONOTONIC` in nanoseconds.
    read_ns: u64,
    due: Instant,
    met_last: Instant,
    sent: HashMap<Function, Arc<Module>>,
}

/// Where a process's compiler names its code.
enum Source {
    /// Nowhere yet.
    None,
    File(CodeFile),
    /// In a file that is not read.
    Refused,
}

impl Process {
    fn new(root: ProcessRoot, reading: u64, now: Instant) -> Self {
        Self {
            root,
            source: Source::None,
            map: CodeMap::default(),
            met: BTreeMap::new(),
            reading,
            read_ns: 0,
            due: now,
            met_last: now,
            sent: HashMap::new(),
        }
    }

    /// Opens the process's file, if there is one that is better than what is open.
    fn find_file(&mut self, tgid: u32, jitdump: Option<&str>) {
        let replaced = match &self.source {
            Source::Refused => return,
            Source::File(file) => file.is_replaced(&self.root) || jitdump.is_some() && !file.is_jitdump(),
            Source::None => true,
        };
        if !replaced {
            return;
        }
        self.map = CodeMap::default();
        let opened = match jitdump {
            Some(path) => CodeFile::jitdump(&self.root, path),
            None => CodeFile::perf_map(&self.root),
        };
        self.source = match opened {
            Ok(file) => Source::File(file),
            Err(FileError::Open(_)) => Source::None,
            Err(error) => {
                tracing::warn!(tgid, "file with the names of its code {error}");
                Source::Refused
            }
        };
    }

    /// Reads on in the process's file, and says what was at the addresses that samples met.
    fn read(&mut self, tgid: u32) -> Vec<(u64, Function)> {
        let began_ns = monotonic_ns();
        let earliest_ns = std::mem::replace(&mut self.read_ns, began_ns);
        let met = std::mem::take(&mut self.met);
        let Source::File(file) = &mut self.source else { return Vec::new() };
        let found = match file.read_new(&mut self.map, earliest_ns, monotonic_ns) {
            Ok(Progress::CaughtUp) => self.map.find(&met),
            Ok(Progress::More) => BTreeMap::new(),
            Err(RecordsError::Cut) => {
                // Java writes the whole map anew when it is asked for one.
                self.source = Source::None;
                self.map = CodeMap::default();
                return Vec::new();
            }
            Err(error) => {
                tracing::warn!(tgid, file = %file.path().display(), "file with the names of its code {error}");
                self.source = Source::Refused;
                self.map = CodeMap::default();
                return Vec::new();
            }
        };
        self.map.settle();
        let mut names: HashMap<Code, Option<Arc<str>>> = HashMap::new();
        let functions = found.into_iter().filter_map(|(address, code)| {
            let name = names.entry(code).or_insert_with(|| file.name(&code).map(Arc::from));
            Some((address, Function { start: code.start, end: code.end, name: name.clone()? }))
        });
        functions.collect()
    }
}

impl JitCode {
    /// A sample met `address` in memory without a file at `time_ns`, and goes into the batch. Returns which reading
    /// will say what is there.
    pub fn meet(&mut self, tgid: u32, address: u64, time_ns: u64, now: Instant) -> Option<Reading> {
        if !self.processes.contains_key(&tgid) {
            if self.processes.len() >= MAX_PROCESSES {
                return None;
            }
            let root = ProcessRoot::open(tgid).ok()?;
            self.last_reading += 1;
            self.processes.insert(tgid, Process::new(root, self.last_reading, now));
        }
        let process = self.processes.get_mut(&tgid)?;
        process.met_last = now;
        // What was there before the last reading is not kept.
        if time_ns < process.read_ns || matches!(process.source, Source::Refused) {
            return None;
        }
        if process.met.len() >= MAX_MET && !process.met.contains_key(&address) {
            return None;
        }
        let met = process.met.entry(address).or_insert(Met { first_ns: time_ns, last_ns: time_ns });
        met.first_ns = met.first_ns.min(time_ns);
        met.last_ns = met.last_ns.max(time_ns);
        Some(Reading { tgid, number: process.reading })
    }

    /// Whether a compiler's file is read for what samples meet.
    pub fn has_files(&self) -> bool {
        self.processes.values().any(|process| matches!(process.source, Source::File(_)))
    }

    /// Forgets a process: another program runs under its number.
    pub fn forget(&mut self, tgid: u32) {
        self.processes.remove(&tgid);
    }

    /// Reads the files that are due. `mapped` finds a mapped file of a process by its path.
    pub fn read(&mut self, now: Instant, mapped: impl Fn(u32, &dyn Fn(&str) -> bool) -> Option<Arc<str>>) {
        self.read_if(now, |process| !process.met.is_empty() && process.due <= now, mapped);
        self.processes.retain(|_, process| now.duration_since(process.met_last) < IDLE);
    }

    /// Reads all files that have something to say for the batch.
    pub fn read_all(
        &mut self,
        now: Instant,
        mapped: impl Fn(u32, &dyn Fn(&str) -> bool) -> Option<Arc<str>>,
    ) {
        self.read_if(now, |process| !process.met.is_empty(), mapped);
    }

    fn read_if(
        &mut self,
        now: Instant,
        is_due: impl Fn(&Process) -> bool,
        mapped: impl Fn(u32, &dyn Fn(&str) -> bool) -> Option<Arc<str>>,
    ) {
        self.processes.retain(|tgid, process| !is_due(process) || process.root.is_of(*tgid));
        for (tgid, process) in self.processes.iter_mut().filter(|(_, process)| is_due(process)) {
            let jitdump = mapped(*tgid, &|path| process.root.is_jitdump(path));
            process.find_file(*tgid, jitdump.as_deref());
            let reading = Reading { tgid: *tgid, number: process.reading };
            let functions = process.read(*tgid).into_iter();
            self.found.extend(functions.map(|(address, function)| ((reading, address), function)));
            self.last_reading += 1;
            process.reading = self.last_reading;
            process.due = now + READING_PAUSE;
        }
    }

    /// Sends the functions of the batch that were not sent before, and says in which mappings its addresses are.
    pub fn name_batch(&mut self, upload: &SymbolUpload) -> BatchCode {
        let found = std::mem::take(&mut self.found);
        let mut of_process: HashMap<u32, HashSet<&Function>> = HashMap::new();
        for ((reading, _), function) in &found {
            of_process.entry(reading.tgid).or_default().insert(function);
        }
        for (tgid, functions) in of_process {
            let Some(process) = self.processes.get_mut(&tgid) else { continue };
            if process.sent.len() + functions.len() > MAX_SENT {
                process.sent.clear();
            }
            let mut unsent: Vec<&Function> =
                functions.into_iter().filter(|function| !process.sent.contains_key(*function)).collect();
            unsent.sort_unstable();
            for list in lists(&unsent) {
                let content = content(&list);
                let module = Arc::new(module(&list, &content));
                if upload.send(module.id.expect("a list has an ID").build_id(), content) {
                    process.sent.extend(list.into_iter().map(|function| (function.clone(), module.clone())));
                }
            }
        }
        let module = |reading: &Reading, function: &Function| {
            self.processes.get(&reading.tgid)?.sent.get(function).cloned()
        };
        found
            .iter()
            .filter_map(|((reading, address), function)| {
                Some(((*reading, *address), module(reading, function)?))
            })
            .collect()
    }
}

/// `functions`, sorted, as lists whose functions do not overlap; most are in the first.
fn lists<'a>(functions: &[&'a Function]) -> Vec<Vec<&'a Function>> {
    let mut lists: Vec<(Vec<&Function>, usize)> = Vec::new();
    for function in functions {
        // Two numbers of 16 digits, two spaces, a line feed.
        let bytes = function.name.len() + 35;
        let has_room = |(list, size): &&mut (Vec<&Function>, usize)| {
            list.last().is_none_or(|last| last.end <= function.start) && *size + bytes <= MAX_PERF_MAP_BYTES
        };
        let count = lists.len();
        match lists.iter_mut().find(has_room) {
            Some((list, size)) => {
                list.push(function);
                *size += bytes;
            }
            None if count < MAX_LISTS => lists.push((vec![function], bytes)),
            None => {}
        }
    }
    lists.into_iter().map(|(list, _)| list).collect()
}

/// A list as [`windlass_schema::perf_map`] defines it.
fn content(list: &[&Function]) -> Vec<u8> {
    let mut text = String::new();
    for Function { start, end, name } in list {
        writeln!(text, "{start:x} {:x} {name}", end - start).expect("a string takes everything");
    }
    text.into_bytes()
}

/// What a profile shows for the functions of a list.
fn module(list: &[&Function], content: &[u8]) -> Module {
    Module {
        start: list.first().map_or(0, |first| first.start),
        limit: list.last().map_or(0, |last| last.end),
        file_offset: 0,
        path: SHOWN_PATH.into(),
        id: Some(ImageId::PerfMap(perf_map_id(content))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(start: u64, end: u64, name: &str) -> Function {
        Function { start, end, name: name.into() }
    }

    #[test]
    fn functions_that_overlap_are_in_different_lists() {
        let functions = [
            function(0x10, 0x20, "a"),
            function(0x10, 0x20, "b"),
            function(0x18, 0x30, "c"),
            function(0x30, 0x31, "d"),
        ];
        let all: Vec<&Function> = functions.iter().collect();
        let [a, b, c, d] = [&functions[0], &functions[1], &functions[2], &functions[3]];
        assert_eq!(lists(&all), [vec![a, d], vec![b], vec![c]]);
        assert_eq!(content(&[a, d]), b"10 10 a\n30 1 d\n");
        let module = module(&[a, d], b"10 10 a\n30 1 d\n");
        assert_eq!((module.start, module.limit), (0x10, 0x31));
        let many: Vec<Function> = (0..100).map(|number| function(1, 2, &number.to_string())).collect();
        assert_eq!(lists(&many.iter().collect::<Vec<_>>()).len(), MAX_LISTS);
    }

    /// The name that this process's own map gives an address that samples met now.
    fn named(code: &mut JitCode, address: u64) -> Option<String> {
        let now = Instant::now();
        let reading = code.meet(std::process::id(), address, monotonic_ns(), now)?;
        code.read_all(now, |_, _| None);
        code.found.get(&(reading, address)).map(|function| function.name.to_string())
    }

    #[test]
    fn own_map_as_it_grows() {
        let path = format!("/tmp/perf-{}.map", std::process::id());
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        let mut code = JitCode::default();
        assert_eq!(named(&mut code, 0x1000), None, "there is none");
        write("1000 100 first\n");
        assert_eq!(named(&mut code, 0x1010).as_deref(), Some("first"));
        write("1000 100 first\n2000 10 second\n1000 100 third\n");
        assert_eq!(named(&mut code, 0x2000).as_deref(), Some("second"));
        assert_eq!(named(&mut code, 0x1010).as_deref(), Some("third"));
        write("3000 10 anew\n");
        assert_eq!(named(&mut code, 0x3000), None, "first it is noticed");
        assert_eq!(named(&mut code, 0x3000).as_deref(), Some("anew"));
        assert_eq!(named(&mut code, 0x1010), None);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(named(&mut code, 0x3000).as_deref(), Some("anew"), "it is still open");
        std::fs::create_dir(&path).unwrap();
        assert_eq!(named(&mut code, 0x3000), None);
        std::fs::remove_dir(&path).unwrap();
        code.forget(std::process::id());
        assert!(code.processes.is_empty());
    }
}
