//! What does one reading of a process's file with the names of its code say?
//!
//! The file lies where the process's user put it, so it is read on a thread of [`crate::file_threads`]: what a reading
//! takes goes there and comes back with what it found. Meanwhile samples go on, so a reading answers for the addresses that
//! samples met before it was sent, and what it finds in the file stays apart from what was there before
//! ([`CodeMap::settle`]) until a sample from that time can no more be asked for.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::code_file::{CodeFile, FileError, ProcessRoot};
use crate::code_map::{Code, CodeMap, Met};
use crate::code_records::{Progress, RecordsError};
use crate::perf_ring::monotonic_ns;

/// A function as it is sent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Function {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) name: Arc<str>,
}

/// A process's file, and what was read of it.
pub(crate) struct ProcessCode {
    pub(crate) root: ProcessRoot,
    pub(crate) source: Source,
    pub(crate) map: CodeMap,
    /// What comes in the file now was written after this: `CLOCK_MONOTONIC` in nanoseconds.
    earliest_ns: u64,
}

/// Where a process's compiler names its code.
pub(crate) enum Source {
    /// Nowhere yet.
    None,
    File(CodeFile),
    /// In a file that is not read.
    Refused,
}

/// Addresses that samples met, by the number of the reading that is to answer for them.
pub(crate) type Asked = Vec<(u64, BTreeMap<u64, Met>)>;

/// What is to be done beside sampling.
pub(crate) enum Job {
    Read(Wanted),
    /// To close files waits for servers as well (`fuse_flush`; `put_nfs_open_context_sync` in fs/nfs/file.c).
    Close(Box<ProcessCode>),
}

/// What came of it.
pub(crate) enum Done {
    Read(Made),
    Closed,
}

/// Does a job.
pub(crate) fn work(job: Job) -> Done {
    match job {
        Job::Read(wanted) => Done::Read(read(wanted)),
        Job::Close(code) => {
            drop(code);
            Done::Closed
        }
    }
}

/// A reading that is to be made.
pub(crate) struct Wanted {
    pub(crate) tgid: u32,
    /// Which of the processes of this number.
    pub(crate) incarnation: u64,
    pub(crate) code: Box<ProcessCode>,
    pub(crate) jitdump: Option<Arc<str>>,
    pub(crate) asked: Asked,
    /// No sample is asked for from before: `CLOCK_MONOTONIC` in nanoseconds.
    pub(crate) since_ns: u64,
}

/// A reading that was made.
pub(crate) struct Made {
    pub(crate) tgid: u32,
    pub(crate) incarnation: u64,
    pub(crate) code: Box<ProcessCode>,
    /// Which function was at which address, by the number of the reading.
    pub(crate) found: Vec<((u64, u64), Function)>,
    pub(crate) took: Duration,
}

/// Makes a reading.
fn read(wanted: Wanted) -> Made {
    let start = Instant::now();
    let Wanted { tgid, incarnation, mut code, jitdump, asked, since_ns } = wanted;
    code.find_file(tgid, jitdump.as_deref());
    let found = code.read(tgid, &asked, since_ns);
    Made { tgid, incarnation, code, found, took: start.elapsed() }
}

impl ProcessCode {
    pub(crate) fn new(root: ProcessRoot) -> Self {
        Self { root, source: Source::None, map: CodeMap::default(), earliest_ns: 0 }
    }

    pub(crate) fn refuse(&mut self) {
        self.source = Source::Refused;
        self.map = CodeMap::default();
    }

    /// Opens the process's file, if there is one that is better than what is open.
    fn find_file(&mut self, tgid: u32, jitdump: Option<&str>) {
        // As good as no file: the process may have ended.
        let _ = self.root.enter();
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
            Some(path) => CodeFile::jitdump(&self.root, tgid, path),
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
    fn read(&mut self, tgid: u32, asked: &Asked, since_ns: u64) -> Vec<((u64, u64), Function)> {
        let began_ns = monotonic_ns();
        let Source::File(file) = &mut self.source else {
            self.earliest_ns = began_ns;
            return Vec::new();
        };
        self.map.settle(since_ns);
        match file.read_new(&mut self.map, self.earliest_ns, monotonic_ns) {
            Ok(Progress::CaughtUp) => self.earliest_ns = began_ns,
            // What is left was written before this reading as well as after.
            Ok(Progress::More) => return Vec::new(),
            Err(RecordsError::Cut) => {
                // Java writes the whole map anew when it is asked for one.
                self.source = Source::None;
                self.map = CodeMap::default();
                return Vec::new();
            }
            Err(error) => {
                tracing::warn!(tgid, file = %file.path().display(), "file with the names of its code {error}");
                self.refuse();
                return Vec::new();
            }
        }
        let mut names: HashMap<Code, Option<Arc<str>>> = HashMap::new();
        let mut functions = Vec::new();
        for (number, met) in asked {
            for (address, code) in self.map.find(met) {
                let name = names.entry(code).or_insert_with(|| file.name(&code).map(Arc::from));
                if let Some(name) = name.clone() {
                    functions.push(((*number, address), Function { start: code.start, end: code.end, name }));
                }
            }
        }
        functions
    }
}
