//! Which kernel modules are loaded, and what are their addresses called?
//!
//! A module is an image of its own, with a build-ID, which the kernel places anywhere; peers ship its addresses as the
//! kernel's own, which mean nothing on another host. Here an address in a module's code becomes one that is
//! the same wherever that build is loaded, and under which its debug file has functions, files and lines; the names
//! that the kernel has for it go to the service once:
//!
//! ```text
//! image address = address - start of its section now + place of a section of that name
//! ```
//! Places are those of [`kernel_module`]. What is loaded is read from `/proc/modules`, and of each module from
//! `/sys/module/NAME`: `sections/SECTION`, which takes CAP_SYSLOG, and `notes/.note.gnu.build-id`. Those are some twenty files
//! of each, while who uses a module, which the list says too, changes with every container: so a module is read when it
//! comes, and not again while it stays where it is.
//!
//! The kernel says where a section starts and not how long it is, so it ends where the next one starts, of whatever
//! module: Linux 6.4 and later put the code of several close together (kernel/module/main.c, `layout_sections`), where
//! a module's size, which counts its data, reaches into others. Sections that are only for loading are freed
//! after it, and their addresses stay in `sections` when others have the memory; they count while the module is being
//! loaded.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, BufRead, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use windlass_schema::BuildId;
use windlass_schema::kernel_module::{self, SECTION_SPAN};

use crate::image::{ImageId, build_id_in_notes};
use crate::kallsyms::{KallsymsError, open_kallsyms, symbol_of_module};
use crate::otlp::{Frame, Module};

/// Largest file read below `/sys/module` in bytes; a page is what the kernel gives of one.
const MAX_ATTRIBUTE_BYTES: usize = 4096;

/// How often it is looked whether other modules are loaded.
const REVIEW_INTERVAL: Duration = Duration::from_secs(5);

/// A module as it is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadedModule {
    name: String,
    id: BuildId,
    code: Vec<Section>,
}

/// A section with code.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Section {
    start: u64,
    end: u64,
    /// Where it is among the image's addresses.
    module: Module,
}

impl Section {
    fn image_address(&self, address: u64) -> Option<u64> {
        let is_inside = (self.start..self.end).contains(&address);
        is_inside.then(|| address - self.start + self.module.start)
    }
}

/// The modules of the running kernel.
#[derive(Debug)]
pub struct KernelModules {
    proc: PathBuf,
    sys: PathBuf,
    /// What `/proc/modules` said when `loaded` was made.
    lines: Vec<Line>,
    /// What was read of those, as far as it could be.
    listed: HashMap<Line, Listed>,
    loaded: Vec<LoadedModule>,
    /// Start of each section with code, and which one it is of which module; ascending.
    starts: Vec<(u64, usize, usize)>,
    /// Those whose symbols were asked for.
    named: HashSet<BuildId>,
    reviewed: Instant,
}

impl KernelModules {
    /// Those of this host.
    pub fn read() -> Self {
        Self::read_from("/proc".into(), "/sys".into())
    }

    fn read_from(proc: PathBuf, sys: PathBuf) -> Self {
        let (lines, listed) = (Vec::new(), HashMap::new());
        let (loaded, starts, named) = (Vec::new(), Vec::new(), HashSet::new());
        let mut modules = Self { proc, sys, lines, listed, loaded, starts, named, reviewed: Instant::now() };
        modules.review();
        modules
    }

    /// Reads what is loaded, if that has changed, as it does when a machine starts and hardly ever again. Returns what is
    /// not where it was: of frames there since the last review it is not known whose they are.
    pub fn review(&mut self) -> Vec<Module> {
        self.reviewed = Instant::now();
        // Without modules in the kernel there is no such file.
        let text = fs::read(self.proc.join("modules")).unwrap_or_default();
        let lines: Vec<Line> =
            text.split(|byte| *byte == b'\n').filter_map(|line| Line::read(line, &self.sys)).collect();
        if lines == self.lines {
            return Vec::new();
        }
        let mut before = std::mem::take(&mut self.listed);
        for line in &lines {
            // Of a module that is being loaded, sections come and go.
            let is_known = |listed: &Listed| line.state == "Live" && listed.id.is_some();
            let known = before.remove(line).filter(is_known);
            if let Some(listed) = known.or_else(|| Listed::read(&self.sys, line)) {
                self.listed.insert(line.clone(), listed);
            }
        }
        let sections = self.listed.values().flat_map(|module| &module.sections);
        let mut boundaries: Vec<u64> = sections.map(|(_, start)| *start).collect();
        boundaries.sort_unstable();
        let before = std::mem::take(&mut self.loaded);
        let listed = lines.iter().filter_map(|line| Some((line, self.listed.get(line)?)));
        self.loaded = listed.filter_map(|(line, module)| module.loaded(line, &boundaries)).collect();
        self.lines = lines;
        let modules = self.loaded.iter().enumerate();
        let code = modules.flat_map(|(module, it)| it.code.iter().enumerate().map(move |it| (module, it)));
        self.starts = code.map(|(module, (number, section))| (section.start, module, number)).collect();
        self.starts.sort_unstable();
        let gone = before.into_iter().filter(|module| !self.loaded.contains(module));
        gone.flat_map(|module| module.code).map(|section| section.module).collect()
    }

    /// Does so if it was not done lately.
    pub fn review_if_due(&mut self) -> Vec<Module> {
        if self.reviewed.elapsed() < REVIEW_INTERVAL { Vec::new() } else { self.review() }
    }

    /// The symbols of a module could not be taken: the next sample in it has them sent.
    pub fn forget(&mut self, id: BuildId) {
        self.named.remove(&id);
    }

    /// Takes note of a sample's address; the module whose symbols are to be sent, if it is the first in it.
    pub fn meet(&mut self, address: u64) -> Option<LoadedModule> {
        let (module, ..) = self.find(address)?;
        let module = &self.loaded[module];
        self.named.insert(module.id).then(|| module.clone())
    }

    /// What a profile shows for a kernel address to look up, if it is in a module.
    pub fn frame(&self, address: u64) -> Option<Frame<'_>> {
        let (module, section, address) = self.find(address)?;
        let module = &self.loaded[module].code[section].module;
        Some(Frame { module: Some(module), address, reading: None })
    }

    /// Module, section, and image address.
    fn find(&self, address: u64) -> Option<(usize, usize, u64)> {
        let behind = self.starts.partition_point(|(start, ..)| *start <= address);
        let (_, module, section) = *self.starts[..behind].last()?;
        Some((module, section, self.loaded[module].code[section].image_address(address)?))
    }
}

/// What tells a module from others in `/proc/modules`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Line {
    name: String,
    /// Of all that it keeps loaded, in bytes.
    size: u64,
    state: String,
    address: String,
    /// The inode of its folder below `/sys/module`, which is new each time a module is loaded: another build may come to where
    /// the last one was.
    folder: Option<u64>,
}

impl Line {
    /// Reads a line, `NAME SIZE USERS BY,... STATE ADDRESS`.
    fn read(line: &[u8], sys: &Path) -> Option<Self> {
        let mut fields = str::from_utf8(line).ok()?.split(' ');
        let (name, size) = (fields.next()?, fields.next()?.parse().ok()?);
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return None;
        }
        let state = fields.nth(2).unwrap_or_default().to_owned();
        let address = fields.next().unwrap_or_default().to_owned();
        let folder = fs::metadata(sys.join("module").join(name)).ok().map(|folder| folder.ino());
        Some(Self { name: name.to_owned(), size, state, address, folder })
    }
}

/// What the kernel says of a module elsewhere.
#[derive(Debug)]
struct Listed {
    id: Option<BuildId>,
    /// Those that are where they were put, with code or without.
    sections: Vec<(String, u64)>,
}

impl Listed {
    /// Reads what `sys` has of a module.
    fn read(sys: &Path, line: &Line) -> Option<Self> {
        let is_loading = line.state == "Loading";
        let folder = sys.join("module").join(&line.name);
        let notes = attribute(&folder.join("notes/.note.gnu.build-id"));
        let sections = fs::read_dir(folder.join("sections")).ok()?.flatten().filter_map(|entry| {
            let section = entry.file_name().into_string().ok()?;
            let address = section_address(&entry.path()).filter(|address| *address != 0)?;
            (is_loading || !is_for_loading(&section)).then_some((section, address))
        });
        let id = notes.and_then(|notes| build_id_in_notes(&notes, 4));
        Some(Self { id, sections: sections.collect() })
    }

    /// The module, if it can be told from others. `boundaries` are where sections start, ascending.
    fn loaded(&self, line: &Line, boundaries: &[u64]) -> Option<LoadedModule> {
        let id = self.id?;
        let code = self.sections.iter().filter_map(|(section, start)| {
            let place = kernel_module::section_start(section)?;
            let first = boundaries.partition_point(|boundary| boundary < start);
            let behind = boundaries.partition_point(|boundary| boundary <= start);
            if behind - first > 1 {
                // Another was put there while they were read; which is there now is not known.
                return None;
            }
            let last = start.checked_add(line.size.min(SECTION_SPAN))?;
            let end = boundaries.get(behind).map_or(last, |next| last.min(*next));
            let module = Module {
                start: place,
                limit: place + (end - start),
                file_offset: 0,
                // As perf writes it.
                path: format!("[{}]", line.name).into(),
                id: Some(ImageId::Gnu(id)),
            };
            Some(Section { start: *start, end, module })
        });
        Some(LoadedModule { name: line.name.clone(), id, code: code.collect() })
    }
}

/// Whether a section is freed when its module is loaded: the initial code and data (`module_init_section`), and the
/// symbol tables, of which the kernel keeps a copy of its own (kernel/module/kallsyms.c, `layout_symtab`).
fn is_for_loading(section: &str) -> bool {
    section.starts_with(".init") || section == ".symtab" || section == ".strtab"
}

fn section_address(path: &Path) -> Option<u64> {
    let text = attribute(path)?;
    u64::from_str_radix(str::from_utf8(&text).ok()?.trim().strip_prefix("0x")?, 16).ok()
}

fn attribute(path: &Path) -> Option<Vec<u8>> {
    fs::read(path).ok().filter(|content| content.len() <= MAX_ATTRIBUTE_BYTES)
}

impl LoadedModule {
    /// The module's identity.
    pub fn build_id(&self) -> BuildId {
        self.id
    }

    /// Its functions as the kernel lists them now, as lines of `ADDRESS TYPE NAME` with image addresses. `None` if it is
    /// not loaded there any more: the names may be another build's.
    pub fn symbols(&self) -> Result<Option<Vec<u8>>, KallsymsError> {
        let symbols = open_kallsyms().and_then(|kallsyms| {
            self.symbols_in(kallsyms).map_err(|error| KallsymsError::Read("/proc/kallsyms", error))
        })?;
        // It was when it was met: a build of the same name in its place has another build-ID.
        Ok(self.is_loaded(&KernelModules::read()).then_some(symbols))
    }

    fn is_loaded(&self, modules: &KernelModules) -> bool {
        modules.loaded.contains(self)
    }

    fn symbols_in(&self, kallsyms: impl BufRead) -> io::Result<Vec<u8>> {
        let mut symbols = Vec::new();
        for line in kallsyms.lines() {
            let line = line?;
            if let Some((address, kind @ ("t" | "T" | "w" | "W"), name, module)) = symbol_of_module(&line)
                && module == self.name
                && let Some(address) = self.code.iter().find_map(|section| section.image_address(address))
            {
                writeln!(symbols, "{address:016x} {kind} {name}")?;
            }
        }
        Ok(symbols)
    }
}

#[cfg(test)]
mod tests {
    use windlass_schema::kernel_module::{MODULE_TEXT, section_start};

    use super::*;

    const ID: [u8; 4] = [0xab, 0xcd, 0xef, 1];

    /// Adds a module as the kernel shows it.
    fn add(host: &Path, name: &str, id: Option<[u8; 4]>, sections: &[(&str, &str)]) {
        let write = |path: &str, content: &[u8]| {
            let path = host.join("sys/module").join(name).join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        if let Some(id) = id {
            let note = [&b"\x04\0\0\0\x04\0\0\0\x03\0\0\0GNU\0"[..], &id].concat();
            write("notes/.note.gnu.build-id", &note);
        }
        for (section, address) in sections {
            write(&format!("sections/{section}"), format!("{address}\n").as_bytes());
        }
    }

    /// Three modules, of which one has no build-ID. The first is longer than the distance to the second.
    fn host(listed: &str, text: &str) -> tempfile::TempDir {
        let host = tempfile::tempdir().unwrap();
        list(host.path(), listed);
        let sections = [
            (".text", text),
            (".exit.text", "0xffffffffc0203000"),
            (".altinstr_replacement", "0xffffffffc0203100"),
            (".init.text", "0xffffffffc0205000"),
            (".symtab", "0xffffffffc0205800"),
            (".data", "0xffffffffc0300000"),
        ];
        add(host.path(), "nf_tables", Some(ID), &sections);
        add(host.path(), "neighbour", Some([7; 4]), &[(".text", "0xffffffffc0204000")]);
        add(host.path(), "plain", None, &[(".text", "0xffffffffc0401000")]);
        host
    }

    fn list(host: &Path, listed: &str) {
        fs::create_dir_all(host.join("proc")).unwrap();
        fs::write(host.join("proc/modules"), listed).unwrap();
    }

    const LISTED: &str = "nf_tables 372736 1 nft_x, Live 0xffffffffc0200000\n\
        neighbour 8192 0 - Live 0xffffffffc0204000\n\
        plain 4096 0 - Live 0xffffffffc0401000\n";

    fn read(host: &Path) -> KernelModules {
        KernelModules::read_from(host.join("proc"), host.join("sys"))
    }

    /// Path and image address of what a sample at `address` shows.
    fn shown(modules: &KernelModules, address: u64) -> Option<(&str, u64)> {
        let frame = modules.frame(address)?;
        let module = frame.module.unwrap();
        assert!((module.start..module.limit).contains(&frame.address), "{address:#x}");
        Some((&module.path, frame.address))
    }

    #[test]
    fn addresses_are_the_same_wherever_a_module_is_loaded() {
        let host = host(LISTED, "0xffffffffc0201000");
        let mut modules = read(host.path());
        let exit = section_start(".exit.text").unwrap();
        for (address, expect) in [
            (0xffff_ffff_c020_0fff, None),
            (0xffff_ffff_c020_1000, Some(("[nf_tables]", MODULE_TEXT))),
            (0xffff_ffff_c020_2fff, Some(("[nf_tables]", MODULE_TEXT + 0x1fff))),
            (0xffff_ffff_c020_3020, Some(("[nf_tables]", exit + 0x20))),
            // Not a section of functions.
            (0xffff_ffff_c020_3100, None),
            // Of the neighbour, though less than the first one's size behind its start.
            (0xffff_ffff_c020_4010, Some(("[neighbour]", MODULE_TEXT + 0x10))),
            // Where the initial code of the first was lies the neighbour now.
            (0xffff_ffff_c020_5010, Some(("[neighbour]", MODULE_TEXT + 0x1010))),
            (0xffff_ffff_c020_6000, None),
            (0xffff_ffff_c040_1010, None),
            (0, None),
        ] {
            assert_eq!(shown(&modules, address), expect, "{address:#x}");
        }
        let frame = modules.frame(0xffff_ffff_c020_1010).unwrap();
        assert_eq!(frame.module.unwrap().id, Some(ImageId::Gnu(BuildId::new(&ID).unwrap())));

        assert!(modules.meet(0).is_none());
        let met = modules.meet(0xffff_ffff_c020_1010).unwrap();
        assert!(modules.meet(0xffff_ffff_c020_3020).is_none(), "its symbols are sent once");
        let kallsyms = "ffffffff81000000 T _text\n\
            ffffffffc0201000 t nf_hook\t[nf_tables]\n\
            ffffffffc0201100 d data\t[nf_tables]\n\
            ffffffffc0201200 t other\t[plain]\n\
            ffffffffc0203004 t cleanup_module\t[nf_tables]\n\
            ffffffffc0204000 t elsewhere\t[nf_tables]\n";
        let symbols = String::from_utf8(met.symbols_in(kallsyms.as_bytes()).unwrap()).unwrap();
        let cleanup = exit + 4;
        assert_eq!(symbols, format!("{MODULE_TEXT:016x} t nf_hook\n{cleanup:016x} t cleanup_module\n"));
    }

    #[test]
    fn what_is_loaded_changes() {
        let host = host(LISTED, "0xffffffffc0201000");
        let mut modules = read(host.path());
        let met = modules.meet(0xffff_ffff_c020_1010).unwrap();
        let shown = modules.frame(0xffff_ffff_c020_1010).unwrap().module.unwrap().clone();
        assert!(met.is_loaded(&modules) && modules.review().is_empty());
        list(host.path(), "");
        assert!(modules.review().contains(&shown), "of what is gone, no frames since then are believed");
        assert_eq!(modules.frame(0xffff_ffff_c020_1010), None);
        assert!(!met.is_loaded(&modules));
        // The same name at the same place: another build.
        add(host.path(), "nf_tables", Some([9; 4]), &[]);
        list(host.path(), LISTED);
        assert!(modules.review().is_empty());
        let other = modules.meet(0xffff_ffff_c020_1010).unwrap();
        assert!(other.is_loaded(&modules) && !met.is_loaded(&modules));
        assert!(modules.meet(0xffff_ffff_c020_1010).is_none());
        modules.forget(other.build_id());
        assert!(modules.meet(0xffff_ffff_c020_1010).is_some(), "it was not sent");
    }

    #[test]
    fn functions_may_be_in_sections_of_their_kind() {
        let host = host(LISTED, "0xffffffffc0201000");
        add(host.path(), "neighbour", Some([7; 4]), &[(".kprobes.text", "0xffffffffc0204800")]);
        let modules = read(host.path());
        let kprobes = section_start(".kprobes.text").expect("it has a place");
        assert_eq!(shown(&modules, 0xffff_ffff_c020_47ff), Some(("[neighbour]", MODULE_TEXT + 0x7ff)));
        assert_eq!(shown(&modules, 0xffff_ffff_c020_4810), Some(("[neighbour]", kprobes + 0x10)));
    }

    #[test]
    fn modules_that_stay_are_read_once() {
        let host = host(LISTED, "0xffffffffc0201000");
        let mut modules = read(host.path());
        fs::remove_dir_all(host.path().join("sys/module/nf_tables/sections")).expect("they are there");
        let used = LISTED.replace("372736 1 nft_x,", "372736 3 nft_x,nft_y,");
        list(host.path(), &used);
        assert!(modules.review().is_empty(), "another uses it");
        add(host.path(), "nft_y", Some([5; 4]), &[(".text", "0xffffffffc0600000")]);
        list(host.path(), &format!("{used}nft_y 4096 0 - Live 0xffffffffc0600000\n"));
        assert!(modules.review().is_empty());
        assert_eq!(shown(&modules, 0xffff_ffff_c060_0000), Some(("[nft_y]", MODULE_TEXT)));
        assert_eq!(shown(&modules, 0xffff_ffff_c020_1000), Some(("[nf_tables]", MODULE_TEXT)));
        list(host.path(), &used.replace("0xffffffffc0200000", "0xffffffffc0700000"));
        assert_eq!(modules.review().len(), 3, "one has gone, and one is elsewhere and cannot be read");
        assert_eq!(shown(&modules, 0xffff_ffff_c020_1000), None);
    }

    /// In the same place, with the same size, between two reviews.
    #[test]
    fn another_build_of_a_module_is_noticed() {
        let host = host(LISTED, "0xffffffffc0201000");
        let mut modules = read(host.path());
        let met = modules.meet(0xffff_ffff_c020_1010).expect("it is loaded");
        let folder = host.path().join("sys/module/neighbour");
        // Kept, so that the new one has another inode, as in sysfs.
        fs::rename(&folder, host.path().join("before")).expect("it is there");
        add(host.path(), "neighbour", Some([8; 4]), &[(".text", "0xffffffffc0204000")]);
        assert_eq!(modules.review().len(), 1, "what was there");
        let other = modules.meet(0xffff_ffff_c020_4010).expect("it is loaded");
        assert_eq!(other.build_id(), BuildId::new(&[8; 4]).expect("four bytes"));
        assert!(met.is_loaded(&modules), "the others stay");
    }

    #[test]
    fn initial_code_counts_while_it_is_there() {
        let listed = "nf_tables 372736 0 - Loading 0xffffffffc0200000\n";
        let host = host(listed, "0xffffffffc0201000");
        let mut modules = read(host.path());
        let init = section_start(".init.text").unwrap();
        assert_eq!(shown(&modules, 0xffff_ffff_c020_5010), Some(("[nf_tables]", init + 0x10)));
        list(host.path(), &listed.replace("Loading", "Live"));
        modules.review();
        assert_eq!(shown(&modules, 0xffff_ffff_c020_5010), None);
    }

    #[test]
    fn two_at_one_address_are_left_out() {
        let host = host(LISTED, "0xffffffffc0204000");
        let modules = read(host.path());
        assert_eq!(shown(&modules, 0xffff_ffff_c020_4010), None);
    }

    #[test]
    fn hidden_and_odd_ones_are_left_out() {
        for (listed, text) in [
            ("nf_tables 4096 0 - Live 0x0\n", "0x0000000000000000"),
            ("nf_tables 4096 0 - Live 0x0\n", "nonsense"),
            ("../module/nf_tables 1 0 - Live 0x0\n", "0xffffffffc0201000"),
            ("nf_tables", "0xffffffffc0201000"),
            ("nf_tables 18446744073709551615 0 - Live 0x0\n", "0xfffffffffffffff0"),
        ] {
            let host = host(listed, text);
            let modules = read(host.path());
            for address in [0xffff_ffff_c020_1010, 0xffff_ffff_ffff_fff1, 0] {
                assert_eq!(modules.frame(address), None, "{listed} {text}");
            }
        }
    }
}
