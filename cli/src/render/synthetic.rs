//! Profiles for tests: a builder that writes pprof as the service answers it, and a generator that
//! resembles a busy host.

use std::collections::HashMap;

use windlass_schema::pprof::{Function, Label, Line, Location, Mapping, Profile, Sample, ValueType, label};

pub(super) const KALLSYMS: &str = "[kernel.kallsyms]";

/// Writes a pprof profile, interning everything.
pub(super) struct Writer {
    pub(super) profile: Profile,
    strings: HashMap<String, i64>,
    functions: HashMap<(String, String), u64>,
    mappings: HashMap<String, u64>,
    locations: HashMap<String, u64>,
}

/// Who was sampled, and how the walk ended.
#[derive(Clone, Copy)]
pub(super) struct Thread<'t> {
    pub(super) pid: i64,
    pub(super) tid: i64,
    pub(super) name: &'t str,
    pub(super) stop: &'t str,
}

/// The main thread of process 100, walked to its end.
pub(super) const MAIN: Thread<'_> = Thread { pid: 100, tid: 100, name: "app", stop: "end_of_stack" };

impl Writer {
    pub(super) fn new() -> Self {
        let mut writer = Self {
            profile: Profile { string_table: vec![String::new()], ..Profile::default() },
            strings: HashMap::from([(String::new(), 0)]),
            functions: HashMap::new(),
            mappings: HashMap::new(),
            locations: HashMap::new(),
        };
        let [kind, unit] = ["samples", "count"].map(|text| writer.string(text));
        writer.profile.sample_type.push(ValueType { r#type: kind, unit });
        writer
    }

    pub(super) fn string(&mut self, text: &str) -> i64 {
        let next = i64::try_from(self.strings.len()).expect("a few strings");
        let index = *self.strings.entry(text.to_owned()).or_insert(next);
        if index == next {
            self.profile.string_table.push(text.to_owned());
        }
        index
    }

    fn mapping(&mut self, image: &str) -> u64 {
        let filename = self.string(image);
        let id = self.mappings.len() as u64 + 1;
        *self.mappings.entry(image.to_owned()).or_insert_with(|| {
            self.profile.mapping.push(Mapping { id, filename, ..Mapping::default() });
            id
        })
    }

    fn function(&mut self, name: &str, file: &str) -> u64 {
        let [name_index, filename] = [name, file].map(|text| self.string(text));
        let id = self.functions.len() as u64 + 1;
        *self.functions.entry((name.to_owned(), file.to_owned())).or_insert_with(|| {
            self.profile.function.push(Function { id, name: name_index, filename, ..Function::default() });
            id
        })
    }

    /// `frames` are `name@file:line`, innermost inlined first; none for an address without a name.
    pub(super) fn location(&mut self, image: &str, address: u64, frames: &[&str]) -> u64 {
        let key = format!("{image} {address:#x} {frames:?}");
        if let Some(id) = self.locations.get(&key) {
            return *id;
        }
        let mapping_id = if image.is_empty() { 0 } else { self.mapping(image) };
        let line = frames
            .iter()
            .map(|frame| {
                let (name, place) = frame.rsplit_once('@').unwrap_or((frame, ""));
                let (file, line) = place.rsplit_once(':').unwrap_or((place, "0"));
                let function_id = self.function(name, file);
                Line { function_id, line: line.parse().expect("frames are written with a line"), column: 0 }
            })
            .collect();
        let id = self.locations.len() as u64 + 1;
        self.profile.location.push(Location { id, mapping_id, address, line, is_folded: false });
        self.locations.insert(key, id);
        id
    }

    /// Says of the last sample which host it is of.
    pub(super) fn on_host(&mut self, host: &str) {
        let [key, str] = [label::HOST, host].map(|text| self.string(text));
        let sample = self.profile.sample.last_mut().expect("a sample was added");
        sample.label.push(Label { key, str, ..Label::default() });
    }

    /// `locations` innermost first.
    pub(super) fn sample(&mut self, thread: Thread<'_>, locations: &[u64], count: i64) {
        let mut labels = Vec::new();
        for (key, num) in [(label::PID, thread.pid), (label::TID, thread.tid)] {
            let key = self.string(key);
            labels.push(Label { key, num, ..Label::default() });
        }
        for (key, text) in [(label::THREAD, thread.name), (label::STOP_REASON, thread.stop)] {
            let [key, str] = [key, text].map(|text| self.string(text));
            labels.push(Label { key, str, ..Label::default() });
        }
        self.profile.sample.push(Sample {
            location_id: locations.to_vec(),
            value: vec![count],
            label: labels,
        });
    }

    /// A sample of not inlined functions of `/usr/bin/app`, innermost first.
    pub(super) fn call(&mut self, thread: Thread<'_>, functions: &[&str], count: i64) {
        let locations: Vec<u64> =
            functions.iter().map(|function| self.location("/usr/bin/app", 0, &[function])).collect();
        self.sample(thread, &locations, count);
    }
}

/// A small deterministic generator (xorshift), so that a failing test fails again.
pub(super) struct Random(u64);

impl Random {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).expect("31 bits") % limit
    }
}

/// Modules of the synthetic services: image, source folder, path of the functions.
const MODULES: [(&str, &str, &str); 6] = [
    ("/usr/bin/checkout", "/build/checkout/src", "checkout::orders::pricing"),
    (
        "/usr/bin/checkout",
        "/root/.cargo/registry/src/index-1949cf8c6b5b557f/hashbrown-0.15.2/src",
        "hashbrown::map::HashMap<K,V,S,A>",
    ),
    ("/usr/bin/checkout", "/rustc/2f4a1c/library/core/src", "core::iter::traits::iterator::Iterator"),
    ("/usr/lib/x86_64-linux-gnu/libssl.so.3", "/build/openssl/ssl", "SSL"),
    ("/usr/bin/postgres", "/build/postgresql/src/backend/executor", "Exec"),
    ("/usr/lib/x86_64-linux-gnu/libc.so.6", "./malloc", "_int"),
];
const VERBS: [&str; 12] = [
    "process_batch",
    "insert",
    "fold",
    "read_frame",
    "apply_discounts",
    "next",
    "lookup",
    "encode",
    "hash_one",
    "poll",
    "scan_tuple",
    "free_chunk",
];

/// About `samples` samples of two services, the kernel below them, images without symbols, cut stacks.
pub(super) fn realistic(samples: usize, seed: u64) -> Profile {
    let mut writer = Writer::new();
    let mut random = Random::new(seed);
    for sample in 0..samples {
        let postgres = random.below(4) == 0;
        let (pid, name) = if postgres { (800, "postgres") } else { (4242, "checkout") };
        let stop = match random.below(100) {
            0..=1 => "no_cfi",
            2 => "stack_read",
            3 => "table_pending",
            _ => "end_of_stack",
        };
        let worker = random.below(8);
        let thread = if worker == 0 { name.to_owned() } else { format!("{name}-worker-{worker}") };
        let mut stack = Vec::new();
        if stop == "end_of_stack" {
            let image = if postgres { "/usr/bin/postgres" } else { "/usr/bin/checkout" };
            for frame in ["_start", "__libc_start_main@./csu/libc-start.c:381", "main@/build/main.rs:12"] {
                stack.push(writer.location(image, 0, &[frame]));
            }
        }
        // As in real programs a function has few callees and one of them is called most, so paths part
        // and meet again.
        let mut function = 0;
        let depth = 5 + random.below(22).min(random.below(26));
        for level in 0..depth {
            let pick = random.below(3).min(random.below(5)).min(random.below(5));
            function = (function * 31 + pick * 17 + level * 7 + 5) % 97;
            let (image, folder, path) = MODULES[if postgres { 4 + function % 2 } else { function % 4 }];
            let verb = VERBS[function % VERBS.len()];
            let line = 20 + function * 3 + random.below(2);
            let outer = format!("{path}::{verb}@{folder}/{verb}.rs:{line}");
            let inner = format!("<{path} as core::ops::Deref>::deref@{folder}/deref.rs:{}", 9 + function % 5);
            let frames: &[&str] = if function % 4 == 1 { &[&inner, &outer] } else { &[&outer] };
            stack.push(writer.location(image, line as u64, frames));
        }
        match random.below(12) {
            0..=1 => {
                for name in [
                    "entry_SYSCALL_64_after_hwframe",
                    "do_syscall_64",
                    "ksys_read",
                    "vfs_read",
                    "tcp_recvmsg",
                ] {
                    stack.push(writer.location(KALLSYMS, 0xffff_ffff_8100_0000, &[name]));
                }
            }
            2 => stack.push(writer.location(
                "/opt/vendor/libcodec.so",
                0x1200 + random.below(6) as u64 * 16,
                &[],
            )),
            _ => {}
        }
        stack.reverse();
        let tid = if worker == 0 { pid } else { pid + i64::try_from(worker).expect("a few workers") };
        writer.sample(Thread { pid, tid, name: &thread, stop }, &stack, 1 + i64::from(sample % 7 == 0));
    }
    writer.profile
}
