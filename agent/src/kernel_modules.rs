//! Which kernel modules are loaded, and what are their addresses called?
//!
//! A module is an image of its own, with a build-ID, which the kernel places anywhere; peers ship its addresses as the
//! kernel's own, which mean nothing on another host. Here an address in a module's code becomes one that is
//! the same wherever that build is loaded, and the names that the kernel has for it go to the service once:
//!
//! ```text
//! image address = address - start of .text now + MODULE_TEXT
//! ```
//! What is loaded is read from `/proc/modules`, and of each module from `/sys/module/NAME`: `sections/.text`,
//! which takes CAP_SYSLOG, and `notes/.note.gnu.build-id`. Sections of code beside `.text` are small and rarely run
//! (`.init.text`, `.exit.text`); their addresses stay as they are. Where a section ends is where the next one starts.

use std::collections::HashSet;
use std::fs;
use std::io::{self, BufRead, Write as _};
use std::path::{Path, PathBuf};

use windlass_schema::BuildId;
use windlass_schema::http::MODULE_TEXT;

use crate::image::{ImageId, build_id_in_notes};
use crate::kallsyms::{KallsymsError, open_kallsyms, symbol_of_module};
use crate::otlp::{Frame, Module};

/// Largest file read below `/sys/module` in bytes; a page is what the kernel gives of one.
const MAX_ATTRIBUTE_BYTES: usize = 4096;

/// The `.text` of a loaded module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadedModule {
    name: String,
    start: u64,
    end: u64,
    id: BuildId,
    module: Module,
}

/// The modules of the running kernel.
#[derive(Debug)]
pub struct KernelModules {
    proc: PathBuf,
    sys: PathBuf,
    /// The text of `/proc/modules` from which `loaded` was read.
    listed: Vec<u8>,
    /// By start; disjoint.
    loaded: Vec<LoadedModule>,
    /// Those whose symbols were asked for.
    named: HashSet<BuildId>,
}

impl KernelModules {
    /// Those of this host.
    pub fn read() -> Self {
        Self::read_from("/proc".into(), "/sys".into())
    }

    fn read_from(proc: PathBuf, sys: PathBuf) -> Self {
        let (listed, loaded) = (Vec::new(), Vec::new());
        let mut modules = Self { proc, sys, listed, loaded, named: HashSet::new() };
        modules.review();
        modules
    }

    /// Reads what is loaded, if that has changed, as it does when a machine starts and hardly ever again. Due with each
    /// batch: what comes in the place of another module is taken for it until then.
    pub fn review(&mut self) {
        // Without modules in the kernel there is no such file.
        let listed = fs::read(self.proc.join("modules")).unwrap_or_default();
        if listed == self.listed {
            return;
        }
        let lines = listed.split(|byte| *byte == b'\n');
        let mut loaded: Vec<LoadedModule> = lines.filter_map(|line| load(&self.sys, line)).collect();
        loaded.sort_by_key(|module| module.start);
        loaded.dedup_by(|later, earlier| later.start < earlier.end);
        self.loaded = loaded;
        self.listed = listed;
    }

    /// Takes note of a sample's address; the module whose symbols are to be sent, if it is the first in it.
    pub fn meet(&mut self, address: u64) -> Option<LoadedModule> {
        let module = find(&self.loaded, address)?;
        self.named.insert(module.id).then(|| module.clone())
    }

    /// What a profile shows for a kernel address to look up, if it is in a module.
    pub fn frame(&self, address: u64) -> Option<Frame<'_>> {
        let module = find(&self.loaded, address)?;
        let address = address - module.start + MODULE_TEXT;
        Some(Frame { module: Some(&module.module), address, reading: None })
    }
}

fn find(loaded: &[LoadedModule], address: u64) -> Option<&LoadedModule> {
    let behind = loaded.partition_point(|module| module.start <= address);
    loaded[..behind].last().filter(|module| address < module.end)
}

/// The module of a line of `/proc/modules`: `NAME SIZE USERS BY,... STATE ADDRESS`.
fn load(sys: &Path, line: &[u8]) -> Option<LoadedModule> {
    let mut fields = str::from_utf8(line).ok()?.split(' ');
    let (name, size) = (fields.next()?, fields.next()?.parse::<u64>().ok()?);
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        return None;
    }
    let folder = sys.join("module").join(name);
    let id = build_id_in_notes(&attribute(&folder.join("notes/.note.gnu.build-id"))?, 4)?;
    let sections: Vec<(String, u64)> = fs::read_dir(folder.join("sections"))
        .ok()?
        .flatten()
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, section_address(&entry.path())?)))
        .collect();
    let (_, start) = sections.iter().find(|(section, address)| section == ".text" && *address != 0)?;
    let next = sections.iter().map(|(_, address)| *address).filter(|address| address > start).min();
    let end = next.unwrap_or(u64::MAX).min(start.checked_add(size)?);
    let module = Module {
        start: MODULE_TEXT,
        limit: MODULE_TEXT + (end - start),
        file_offset: 0,
        // As perf writes it.
        path: format!("[{name}]").into(),
        id: Some(ImageId::Gnu(id)),
    };
    Some(LoadedModule { name: name.to_owned(), start: *start, end, id, module })
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

    /// Its functions as the kernel lists them now, as lines of `ADDRESS TYPE NAME` with image addresses.
    pub fn symbols(&self) -> Result<Vec<u8>, KallsymsError> {
        open_kallsyms().and_then(|kallsyms| {
            self.symbols_in(kallsyms).map_err(|error| KallsymsError::Read("/proc/kallsyms", error))
        })
    }

    fn symbols_in(&self, kallsyms: impl BufRead) -> io::Result<Vec<u8>> {
        let mut symbols = Vec::new();
        for line in kallsyms.lines() {
            let line = line?;
            if let Some((address, kind @ ("t" | "T" | "w" | "W"), name, module)) = symbol_of_module(&line)
                && module == self.name
                && (self.start..self.end).contains(&address)
            {
                writeln!(symbols, "{:016x} {kind} {name}", address - self.start + MODULE_TEXT)?;
            }
        }
        Ok(symbols)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files as the kernel shows them of two modules, of which one has no build-ID.
    fn host(listed: &str, text: &str) -> tempfile::TempDir {
        let host = tempfile::tempdir().unwrap();
        let write = |path: &str, content: &[u8]| {
            let path = host.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        write("proc/modules", listed.as_bytes());
        let note = [&b"\x04\0\0\0\x04\0\0\0\x03\0\0\0GNU\0"[..], &[0xab, 0xcd, 0xef, 1]].concat();
        write("sys/module/nf_tables/notes/.note.gnu.build-id", &note);
        write("sys/module/nf_tables/sections/.text", text.as_bytes());
        write("sys/module/nf_tables/sections/.text.unlikely", b"0xffffffffc0203000\n");
        write("sys/module/nf_tables/sections/.data", b"0xffffffffc0300000\n");
        write("sys/module/plain/sections/.text", b"0xffffffffc0401000\n");
        host
    }

    const LISTED: &str = "nf_tables 372736 1 nft_x, Live 0xffffffffc0200000\n\
        plain 4096 0 - Live 0xffffffffc0401000\n";

    fn read(host: &Path) -> KernelModules {
        KernelModules::read_from(host.join("proc"), host.join("sys"))
    }

    #[test]
    fn addresses_are_the_same_wherever_a_module_is_loaded() {
        let host = host(LISTED, "0xffffffffc0201000\n");
        let mut modules = read(host.path());
        let frame = modules.frame(0xffff_ffff_c020_1010).unwrap();
        assert_eq!(frame.address, MODULE_TEXT + 0x10);
        let module = frame.module.unwrap();
        assert_eq!((&*module.path, module.limit), ("[nf_tables]", MODULE_TEXT + 0x2000));
        assert_eq!(module.id, Some(ImageId::Gnu("abcdef01".parse().unwrap())));
        for outside in [0xffff_ffff_c020_0fff, 0xffff_ffff_c020_3000, 0xffff_ffff_c040_1010, 0] {
            assert_eq!(modules.frame(outside), None, "{outside:#x}");
        }
        assert!(modules.meet(0).is_none());
        let met = modules.meet(0xffff_ffff_c020_1010).unwrap();
        assert!(modules.meet(0xffff_ffff_c020_1020).is_none(), "its symbols are sent once");
        let kallsyms = "ffffffff81000000 T _text\n\
            ffffffffc0201000 t nf_hook\t[nf_tables]\n\
            ffffffffc0201100 d data\t[nf_tables]\n\
            ffffffffc0201200 t other\t[plain]\n\
            ffffffffc0203000 t unlikely\t[nf_tables]\n";
        let symbols = String::from_utf8(met.symbols_in(kallsyms.as_bytes()).unwrap()).unwrap();
        assert_eq!(symbols, format!("{MODULE_TEXT:016x} t nf_hook\n"));
    }

    #[test]
    fn what_is_loaded_changes() {
        let host = host(LISTED, "0xffffffffc0201000\n");
        let mut modules = read(host.path());
        fs::write(host.path().join("proc/modules"), "").unwrap();
        modules.review();
        assert_eq!(modules.frame(0xffff_ffff_c020_1010), None);
        fs::write(host.path().join("proc/modules"), LISTED).unwrap();
        modules.review();
        assert!(modules.frame(0xffff_ffff_c020_1010).is_some());
    }

    #[test]
    fn hidden_and_odd_ones_are_left_out() {
        for (listed, text) in [
            (LISTED, "0x0000000000000000\n"),
            (LISTED, "nonsense"),
            ("../module/nf_tables 1 0 - Live 0x0\n", "0xffffffffc0201000\n"),
            ("nf_tables", "0xffffffffc0201000\n"),
        ] {
            assert!(read(host(listed, text).path()).loaded.is_empty(), "{listed} {text}");
        }
    }
}
