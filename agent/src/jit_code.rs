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
//! sample: meet() -> Reading    due: read()    batch is full: close_batch()    has_read(): name_batch()
//! ```
//! Readings are made beside ([`code_reading`](crate::code_reading)), since files of others may take their time. What a
//! reading cannot say without doubt stays an address.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use windlass_schema::perf_map::{MAX_PERF_MAP_BYTES, perf_map_id};

use crate::alarm::Alarm;
use crate::code_file::ProcessRoot;
use crate::code_map::{MAX_FUNCTIONS, Met};
use crate::code_reading::{Asked, Done, Function, Job, Made, ProcessCode, Source, Wanted, work};
use crate::file_threads::{FileThreads, Manner};
use crate::image::ImageId;
use crate::otlp::Module;
use crate::perf_ring::monotonic_ns;
use crate::process::living_threads;
use crate::symbol_upload::SymbolUpload;

/// Most processes looked after at once, with two open files each; among them those whose files are yet to be closed.
const MAX_PROCESSES: usize = 128;
/// Shortest time between two readings of a process's file: the more there are, the less moves unseen in between.
const READING_PAUSE: Duration = Duration::from_millis(500);
/// How many times as long as a reading took there is none of that process's file: it gets a twentieth of a core.
const PAUSE_PER_READING: u32 = 20;
/// How long a process without samples of such code is remembered.
const IDLE: Duration = Duration::from_secs(60);
/// How long after its end a process's file is read for the last time and closed: Java writes its map when it ends.
const AFTER_END: Duration = Duration::from_secs(2);
/// Most functions kept of all processes, at some 50 bytes each. Beyond it, the process with most of them gets none.
const MAX_FUNCTIONS_IN_ALL: usize = 4 * MAX_FUNCTIONS;
/// Most addresses of one process that readings are to explain.
const MAX_MET: usize = 16_384;
/// Most readings of one process that are asked for and not made: of one that hangs, the oldest are given up.
const MAX_ASKED: usize = 4;
/// Most addresses of all processes that are explained in a batch, with a name of a kilobyte at most.
const MAX_FOUND: usize = 65_536;
/// Most functions of one process of which it is remembered that they were sent, at some 150 bytes each; beyond it,
/// they are sent again.
const MAX_SENT: usize = 16_384;
/// Most bytes of the functions of all processes that are remembered so.
const MAX_SENT_BYTES: usize = 64 * 1024 * 1024;
/// What one of them takes beside its name.
const SENT_BYTES: usize = 128;
/// Most lists for the functions of one process in one batch: as many as addresses changed their function in it.
const MAX_LISTS: usize = 16;
/// How files are read: nobody waits for them.
const READING: Manner =
    Manner { name: "windlass-jit", hangs_after: Duration::from_secs(2), is_awaited: false };
/// What profiles show as the file of such code.
const SHOWN_PATH: &str = "[jit]";

/// Which reading of which process says what is at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Reading {
    tgid: u32,
    number: u64,
}

/// What the addresses of a batch came to.
pub type BatchCode = HashMap<(Reading, u64), Arc<Module>>;

/// Finds a mapped file of a process by its path.
pub type Mapped<'a> = &'a dyn Fn(u32, &dyn Fn(&str) -> bool) -> Option<Arc<str>>;

/// The processes that run code of their own making.
pub struct JitCode {
    processes: HashMap<u32, Process>,
    threads: FileThreads<Job, Done>,
    /// Forgotten processes whose files are not closed yet.
    leaving: usize,
    /// The number of the last reading, whichever process's.
    last_reading: u64,
    /// Readings up to this are of batches that are named.
    named_reading: u64,
    /// What readings said for batches that are not named.
    found: HashMap<(Reading, u64), Function>,
}

struct Process {
    /// Which of the processes of its number.
    incarnation: u64,
    /// What a reading needs.
    code: Held,
    /// Addresses of readings that were not sent. Samples meet those of the last one.
    asked: Asked,
    /// Numbers of the readings that are out.
    out: Vec<u64>,
    functions: usize,
    /// When the last reading was sent: `CLOCK_MONOTONIC` in nanoseconds.
    sent_ns: u64,
    due: Instant,
    met_last: Instant,
    ended: Option<Instant>,
    sent: HashMap<Function, Arc<Module>>,
    sent_bytes: usize,
}

/// Where a process's code is.
enum Held {
    Here(Box<ProcessCode>),
    /// A reading is out.
    Out,
    /// Nowhere: its file is not read, or the process ended.
    Closed,
}

impl Process {
    fn new(root: ProcessRoot, number: u64, now: Instant) -> Self {
        Self {
            incarnation: number,
            code: Held::Here(Box::new(ProcessCode::new(root))),
            asked: vec![(number, BTreeMap::new())],
            out: Vec::new(),
            functions: 0,
            sent_ns: 0,
            due: now,
            met_last: now,
            ended: None,
            sent: HashMap::new(),
            sent_bytes: 0,
        }
    }

    fn has_asked(&self) -> bool {
        self.asked.iter().any(|(_, met)| !met.is_empty())
    }

    /// Gives up on the process's names. Returns what is to be let go.
    fn close(&mut self) -> Held {
        self.functions = 0;
        for (_, met) in &mut self.asked {
            met.clear();
        }
        std::mem::replace(&mut self.code, Held::Closed)
    }

    /// Whether it ended, and that long ago.
    fn is_over(&mut self, tgid: u32, now: Instant) -> bool {
        let is_over = self.ended.is_some_and(|ended| now.duration_since(ended) >= AFTER_END);
        // Asked now and not at the event, which is that of one thread.
        if is_over && living_threads(tgid).next().is_some() {
            self.ended = None;
            return false;
        }
        is_over
    }
}

impl Default for JitCode {
    fn default() -> Self {
        Self {
            processes: HashMap::new(),
            threads: FileThreads::new(READING, work),
            leaving: 0,
            last_reading: 0,
            named_reading: 0,
            found: HashMap::new(),
        }
    }
}

impl JitCode {
    /// Has `alarm` ring when a reading was made.
    pub(crate) fn ring(&mut self, alarm: &Alarm) {
        self.threads.ring(alarm);
    }

    /// A sample met `address` in memory without a file at `time_ns`, and goes into the batch. Returns which reading
    /// will say what is there.
    pub fn meet(&mut self, tgid: u32, address: u64, time_ns: u64, now: Instant) -> Option<Reading> {
        if !self.processes.contains_key(&tgid) {
            if self.processes.len() + self.leaving >= MAX_PROCESSES {
                return None;
            }
            let root = ProcessRoot::of(tgid).ok()?;
            self.last_reading += 1;
            self.processes.insert(tgid, Process::new(root, self.last_reading, now));
        }
        let process = self.processes.get_mut(&tgid)?;
        process.met_last = now;
        // What was there before the last reading is not kept.
        if time_ns < process.sent_ns || matches!(process.code, Held::Closed) {
            return None;
        }
        let all: usize = process.asked.iter().map(|(_, met)| met.len()).sum();
        let (number, met) = process.asked.last_mut()?;
        if all >= MAX_MET && !met.contains_key(&address) {
            return None;
        }
        let met = met.entry(address).or_insert(Met { first_ns: time_ns, last_ns: time_ns });
        met.first_ns = met.first_ns.min(time_ns);
        met.last_ns = met.last_ns.max(time_ns);
        Some(Reading { tgid, number: *number })
    }

    /// Whether a compiler's file is read for what samples meet.
    pub fn has_files(&self) -> bool {
        self.processes.values().any(|process| match &process.code {
            Held::Here(code) => matches!(code.source, Source::File(_)),
            Held::Out => true,
            Held::Closed => false,
        })
    }

    /// Forgets a process: another program runs under its number.
    pub fn forget(&mut self, tgid: u32) {
        if let Some(process) = self.processes.remove(&tgid) {
            self.let_go(process.code);
        }
    }

    /// Has the files of a process that is not known any more closed beside sampling.
    fn let_go(&mut self, held: Held) {
        match held {
            Held::Here(code) => {
                self.leaving += 1;
                self.threads.submit(Job::Close(code));
            }
            // When it comes back.
            Held::Out => self.leaving += 1,
            Held::Closed => {}
        }
    }

    /// Forgets the processes that `is_gone` says.
    fn forget_if(&mut self, mut is_gone: impl FnMut(u32, &Process) -> bool) {
        let gone: Vec<_> = self.processes.extract_if(|tgid, process| is_gone(*tgid, process)).collect();
        for (_, process) in gone {
            self.let_go(process.code);
        }
    }

    /// Notes the end of a process, or of one of its threads.
    pub fn exited(&mut self, tgid: u32, now: Instant) {
        if let Some(process) = self.processes.get_mut(&tgid) {
            process.ended = Some(now);
        }
    }

    /// Takes the readings that were made, and sends those that are due. `mapped` finds a mapped file of a process by its
    /// path.
    pub fn read(&mut self, now: Instant, mapped: Mapped<'_>) {
        while let Some(done) = self.threads.try_result() {
            match done {
                Done::Read(made) => self.take(made, now),
                Done::Closed => self.leaving -= 1,
            }
        }
        let mut over = Vec::new();
        for (tgid, process) in &mut self.processes {
            if matches!(process.code, Held::Here(_)) && !process.has_asked() && process.is_over(*tgid, now) {
                over.push(process.close());
            }
        }
        over.into_iter().for_each(|held| self.let_go(held));
        // At once for a batch that waits, and while the last of a process can be read.
        let is_due =
            |process: &Process| process.due <= now || process.ended.is_some() || process.asked.len() > 1;
        self.send_if(is_due, mapped);
        self.forget_if(|_, process| now.duration_since(process.met_last) >= IDLE);
        self.threads.review(now);
    }

    /// Nothing more is met for the batch: sends all readings that say something for it. Returns the number of the last.
    pub fn close_batch(&mut self, now: Instant, mapped: Mapped<'_>) -> u64 {
        let last = self.last_reading;
        for process in self.processes.values_mut() {
            self.last_reading += 1;
            process.asked.retain(|(_, met)| !met.is_empty());
            process.asked.push((self.last_reading, BTreeMap::new()));
            process.asked.drain(..process.asked.len().saturating_sub(MAX_ASKED));
        }
        self.send_if(|_| true, mapped);
        self.threads.review(now);
        last
    }

    /// Whether all readings up to this one are made.
    pub fn has_read(&self, last: u64) -> bool {
        self.processes.values().all(|process| {
            let mut asked = process.asked.iter().filter(|(_, met)| !met.is_empty());
            asked.all(|(number, _)| *number > last) && process.out.iter().all(|number| *number > last)
        })
    }

    fn send_if(&mut self, is_due: impl Fn(&Process) -> bool, mapped: Mapped<'_>) {
        self.forget_if(|tgid, process| match &process.code {
            Held::Here(code) if process.has_asked() && is_due(process) => !code.root.is_of(tgid),
            _ => false,
        });
        for (tgid, process) in &mut self.processes {
            if !process.has_asked() || !is_due(process) || !matches!(process.code, Held::Here(_)) {
                continue;
            }
            let Held::Here(code) = std::mem::replace(&mut process.code, Held::Out) else { continue };
            let jitdump = mapped(*tgid, &|path| code.root.is_jitdump(path));
            self.last_reading += 1;
            let asked = std::mem::replace(&mut process.asked, vec![(self.last_reading, BTreeMap::new())]);
            process.out = asked.iter().map(|(number, _)| *number).collect();
            let since_ns = std::mem::replace(&mut process.sent_ns, monotonic_ns());
            let incarnation = process.incarnation;
            let wanted = Wanted { tgid: *tgid, incarnation, code, jitdump, asked, since_ns };
            self.threads.submit(Job::Read(wanted));
        }
    }

    fn take(&mut self, made: Made, now: Instant) {
        let Made { tgid, incarnation, code, found, took } = made;
        let process = self.processes.get_mut(&tgid).filter(|process| process.incarnation == incarnation);
        let Some(process) = process else { return self.threads.submit(Job::Close(code)) };
        process.out.clear();
        process.due = now + READING_PAUSE.max(took * PAUSE_PER_READING);
        process.functions = code.map.len();
        match code.source {
            Source::Refused => {
                process.close();
                self.let_go(Held::Here(code));
            }
            Source::None | Source::File(_) => process.code = Held::Here(code),
        }
        for ((number, address), function) in found {
            if number > self.named_reading && self.found.len() < MAX_FOUND {
                self.found.insert((Reading { tgid, number }, address), function);
            }
        }
        self.bound_functions();
    }

    /// Gives up on the largest process's names if all have too many together.
    fn bound_functions(&mut self) {
        if self.processes.values().map(|process| process.functions).sum::<usize>() <= MAX_FUNCTIONS_IN_ALL {
            return;
        }
        let here = self.processes.iter_mut().filter(|(_, process)| matches!(process.code, Held::Here(_)));
        if let Some((tgid, process)) = here.max_by_key(|(_, process)| process.functions) {
            tracing::warn!(
                tgid,
                functions = process.functions,
                "too many functions of all processes: names end"
            );
            let held = process.close();
            self.let_go(held);
        }
    }

    /// Sends the functions of the batch whose last reading this is that were not sent before, and says in which
    /// mappings its addresses are.
    pub fn name_batch(&mut self, last: u64, upload: &SymbolUpload) -> BatchCode {
        self.named_reading = self.named_reading.max(last);
        let all = std::mem::take(&mut self.found);
        let (found, later) = all.into_iter().partition(|((reading, _), _)| reading.number <= last);
        self.found = later;
        let code = self.send_functions(&found, upload);
        while self.processes.values().map(|process| process.sent_bytes).sum::<usize>() > MAX_SENT_BYTES {
            let largest = self.processes.values_mut().max_by_key(|process| process.sent_bytes);
            let largest = largest.expect("a sum of none is not above the limit");
            largest.sent = HashMap::new();
            largest.sent_bytes = 0;
        }
        code
    }

    fn send_functions(
        &mut self,
        found: &HashMap<(Reading, u64), Function>,
        upload: &SymbolUpload,
    ) -> BatchCode {
        let mut of_process: HashMap<u32, HashSet<&Function>> = HashMap::new();
        for ((reading, _), function) in found {
            of_process.entry(reading.tgid).or_default().insert(function);
        }
        for (tgid, functions) in of_process {
            let Some(process) = self.processes.get_mut(&tgid) else { continue };
            if process.sent.len() + functions.len() > MAX_SENT {
                process.sent.clear();
                process.sent_bytes = 0;
            }
            let mut unsent: Vec<&Function> =
                functions.into_iter().filter(|function| !process.sent.contains_key(*function)).collect();
            unsent.sort_unstable();
            for list in lists(&unsent) {
                let content = content(&list);
                let module = Arc::new(module(&list, &content));
                if upload.send(module.id.expect("a list has an ID").build_id(), content) {
                    process.sent_bytes +=
                        list.iter().map(|function| SENT_BYTES + function.name.len()).sum::<usize>();
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

    /// Makes the readings up to `last`.
    fn wait(code: &mut JitCode, last: u64) {
        while !code.has_read(last) {
            code.read(Instant::now(), &|_, _| None);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The name that this process's own map gives an address that samples met now.
    fn named(code: &mut JitCode, address: u64) -> Option<String> {
        let now = Instant::now();
        let reading = code.meet(std::process::id(), address, monotonic_ns(), now)?;
        let last = code.close_batch(now, &|_, _| None);
        assert!(reading.number <= last);
        wait(code, last);
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
        write("4000 10 again\n3000 20 longer\n");
        assert_eq!(named(&mut code, 0x4000), None, "first it is noticed");
        assert_eq!(named(&mut code, 0x4000).as_deref(), Some("again"));
        assert_eq!(named(&mut code, 0x3010).as_deref(), Some("longer"));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(named(&mut code, 0x4000).as_deref(), Some("again"), "it is still open");
        std::fs::create_dir(&path).unwrap();
        assert_eq!(named(&mut code, 0x3000), None);
        std::fs::remove_dir(&path).unwrap();
        code.forget(std::process::id());
        assert!(code.processes.is_empty());
    }

    /// A process of this one's files under another number.
    fn process(number: u64, functions: usize) -> Process {
        let root = ProcessRoot::of(std::process::id()).expect("this process");
        Process { functions, ..Process::new(root, number, Instant::now()) }
    }

    #[test]
    fn functions_have_a_bound_over_all_processes() {
        let mut code = JitCode::default();
        for number in 0..MAX_PROCESSES as u32 {
            // Of processes with a few and processes with as many as one may have.
            let functions = if number % 2 == 0 { 1000 } else { MAX_FUNCTIONS };
            code.processes.insert(u32::MAX - number, process(number.into(), functions));
            code.bound_functions();
            let all: usize = code.processes.values().map(|process| process.functions).sum();
            assert!(all <= MAX_FUNCTIONS_IN_ALL, "{all}");
        }
        let kept = code.processes.values().filter(|process| process.functions == 1000).count();
        assert_eq!(kept, MAX_PROCESSES / 2, "the largest goes");
    }

    #[test]
    fn readings_hold_up_nobody() {
        let mut code = JitCode::default();
        let (held, hanging) = std::sync::mpsc::channel::<()>();
        static HANGING: std::sync::Mutex<Option<std::sync::mpsc::Receiver<()>>> = std::sync::Mutex::new(None);
        *HANGING.lock().expect("nobody panics with it") = Some(hanging);
        code.threads = FileThreads::new(READING, |job| {
            let hanging = HANGING.lock().expect("nobody panics with it").take();
            let _ = hanging.map(|hanging| hanging.recv());
            work(job)
        });
        let now = Instant::now();
        let reading = code.meet(std::process::id(), 0x1000, monotonic_ns(), now).expect("it runs");
        let last = code.close_batch(now, &|_, _| None);
        for _ in 0..2 * MAX_ASKED {
            let next = code.meet(std::process::id(), 0x1000, monotonic_ns(), now).expect("it runs");
            assert_ne!(next, reading);
            code.close_batch(now, &|_, _| None);
            code.read(now, &|_, _| None);
        }
        assert!(!code.has_read(last));
        assert!(code.processes[&std::process::id()].asked.len() <= MAX_ASKED);
        drop(held);
        wait(&mut code, last);
    }

    #[test]
    fn forgotten_processes_count_until_their_files_are_closed() {
        let mut code = JitCode::default();
        static HANGS: std::sync::Mutex<()> = std::sync::Mutex::new(());
        let held = HANGS.lock().expect("nobody panics with it");
        code.threads = FileThreads::new(READING, |job| {
            drop(HANGS.lock());
            work(job)
        });
        let (own, now) = (std::process::id(), Instant::now());
        for number in 0..MAX_PROCESSES {
            code.meet(own, 0x1000, monotonic_ns(), now).expect("there is room");
            if number % 2 == 0 {
                // With a reading that is out.
                code.close_batch(now, &|_, _| None);
            }
            code.forget(own);
        }
        assert_eq!(code.meet(own, 0x1000, monotonic_ns(), now), None, "their files are open");
        drop(held);
        while code.leaving > 0 {
            code.read(now, &|_, _| None);
            std::thread::sleep(Duration::from_millis(1));
        }
        code.meet(own, 0x1000, monotonic_ns(), now).expect("there is room");
    }

    #[test]
    fn files_of_ended_processes_are_closed() {
        let mut child =
            std::process::Command::new("sleep").arg("60").spawn().expect("a program of the machine");
        let (mut code, now) = (JitCode::default(), Instant::now());
        code.meet(child.id(), 0x1000, monotonic_ns(), now).expect("it runs");
        code.exited(child.id(), now);
        let later = now + AFTER_END;
        while code.processes[&child.id()].has_asked() || !code.processes[&child.id()].out.is_empty() {
            code.read(now, &|_, _| None);
            std::thread::sleep(Duration::from_millis(1));
        }
        code.read(later, &|_, _| None);
        assert!(matches!(code.processes[&child.id()].code, Held::Here(_)), "other threads go on");
        child.kill().expect("own child");
        child.wait().expect("own child");
        code.exited(child.id(), now);
        code.read(now, &|_, _| None);
        assert!(matches!(code.processes[&child.id()].code, Held::Here(_)));
        code.read(later, &|_, _| None);
        assert!(matches!(code.processes[&child.id()].code, Held::Closed));
    }
}
