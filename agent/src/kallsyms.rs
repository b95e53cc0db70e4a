//! Which kernel is running, and what are its addresses called?
//!
//! Kernel addresses are random at each boot (KASLR), so peers either name them on the host or ship
//! addresses that nobody can look up afterwards. Here an address in the kernel's text becomes the
//! address as linked, which is the same on every host that runs the build:
//!
//! ```text
//! linked address = address - (address of _text now - address of _text as linked)
//! ```
//! and the symbols go to the service under the kernel's build-ID, as linked, once for a whole fleet.
//! Modules are images of their own ([`crate::kernel_modules`]). BPF programs keep their addresses.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write as _};
use std::time::Duration;

use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use crate::image::{ImageId, build_id_in_notes};
use crate::otlp::{Frame, Module};
use crate::service::{Service, ServiceError};

/// Name of the kernel's mapping, as perf and the OpenTelemetry profiler write it.
const KERNEL_PATH: &str = "[kernel.kallsyms]";
/// Address of `_text` as linked: on x86-64 `__START_KERNEL_map` + `CONFIG_PHYSICAL_START`, 16 MiB in every distribution's
/// kernel.
#[cfg(target_arch = "x86_64")]
const LINKED_TEXT: u64 = 0xffff_ffff_8100_0000;
/// On aarch64 it depends on the bits of addresses and the kernel's version (`KIMAGE_VADDR` in
/// arch/arm64/include/asm/memory.h). This is that of 48 bits from Linux 6.5 on, whatever the kernel: agents have to agree on one, and
/// the service tells by `_text` where a `vmlinux` has it.
#[cfg(not(target_arch = "x86_64"))]
const LINKED_TEXT: u64 = 0xffff_8000_8000_0000;
/// Pause between tries to send the symbols while the service is away.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// The running kernel.
#[derive(Clone, Debug)]
pub struct KernelImage {
    text: Text,
    module: Module,
}

/// Where its text lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Text {
    start: u64,
    end: u64,
    linked_start: u64,
}

/// Kernel addresses cannot be made into linked ones.
#[derive(Debug, thiserror::Error)]
pub enum KallsymsError {
    /// One of the two files.
    #[error("{0} cannot be read: {1}")]
    Read(&'static str, io::Error),
    /// Addresses are zero without CAP_SYSLOG, or under `kernel.kptr_restrict=2`.
    #[error("/proc/kallsyms hides addresses (kernel.kptr_restrict, CAP_SYSLOG)")]
    Hidden,
    /// No note.
    #[error("the kernel has no build-ID in /sys/kernel/notes")]
    NoBuildId,
}

impl KernelImage {
    /// The running kernel.
    pub fn read() -> Result<Self, KallsymsError> {
        let notes = std::fs::read("/sys/kernel/notes")
            .map_err(|error| KallsymsError::Read("/sys/kernel/notes", error))?;
        let id = build_id_in_notes(&notes, 4).ok_or(KallsymsError::NoBuildId)?;
        let text = Text::find(open_kallsyms()?)?;
        let module = Module {
            start: text.linked_start,
            limit: text.linked(text.end),
            file_offset: 0,
            path: KERNEL_PATH.into(),
            id: Some(ImageId::Gnu(id)),
        };
        Ok(Self { text, module })
    }

    /// What a profile shows for a kernel address to look up.
    pub fn frame(&self, address: u64) -> Frame<'_> {
        if (self.text.start..self.text.end).contains(&address) {
            Frame { module: Some(&self.module), address: self.text.linked(address), reading: None }
        } else {
            Frame { module: None, address, reading: None }
        }
    }

    /// Sends the kernel's symbols to the service, unless it has them. Tries until it gets an answer.
    pub async fn upload(self, service: Service) {
        loop {
            match self.upload_once(&service).await {
                Err(error) if error.is_transient() => tokio::time::sleep(RETRY_PAUSE).await,
                Err(error) => return tracing::warn!(%error, "kernel symbols were not taken"),
                Ok(()) => return,
            }
        }
    }

    async fn upload_once(&self, service: &Service) -> Result<(), ServiceError> {
        let Some(ImageId::Gnu(id)) = self.module.id else { return Ok(()) };
        if !service.lacks(id, ArtefactKind::Kallsyms).await? {
            return Ok(());
        }
        let text = self.text;
        let symbols = tokio::task::spawn_blocking(move || {
            open_kallsyms().and_then(|kallsyms| text.symbols(kallsyms).map_err(read_error))
        });
        match symbols.await {
            Ok(Ok(symbols)) => {
                tracing::info!(kernel = %id, bytes = symbols.len(), "sending kernel symbols");
                service.put(id, ArtefactKind::Kallsyms, symbols).await
            }
            Ok(Err(error)) => Err(ServiceError::Client(error.to_string())),
            Err(error) => Err(ServiceError::Client(error.to_string())),
        }
    }

    /// The kernel's identity.
    pub fn build_id(&self) -> Option<BuildId> {
        self.module.id.map(ImageId::build_id)
    }
}

fn read_error(error: io::Error) -> KallsymsError {
    KallsymsError::Read("/proc/kallsyms", error)
}

pub(crate) fn open_kallsyms() -> Result<BufReader<File>, KallsymsError> {
    File::open("/proc/kallsyms").map(BufReader::new).map_err(read_error)
}

impl Text {
    /// Finds `_text` and `_etext`.
    fn find(kallsyms: impl BufRead) -> Result<Self, KallsymsError> {
        let (mut start, mut end) = (None, None);
        for line in kallsyms.lines() {
            let line = line.map_err(read_error)?;
            match symbol(&line) {
                Some((address, _, "_text")) => start = Some(address),
                Some((address, _, "_etext")) => end = Some(address),
                _ => continue,
            }
            if let (Some(start), Some(end)) = (start, end) {
                if start == 0 || end <= start {
                    return Err(KallsymsError::Hidden);
                }
                return Ok(Self { start, end, linked_start: LINKED_TEXT });
            }
        }
        Err(KallsymsError::Hidden)
    }

    fn linked(&self, address: u64) -> u64 {
        address.wrapping_sub(self.start).wrapping_add(self.linked_start)
    }

    /// The functions of the kernel's text as lines of `ADDRESS TYPE NAME`, addresses as linked.
    fn symbols(&self, kallsyms: impl BufRead) -> io::Result<Vec<u8>> {
        let mut symbols = Vec::new();
        for line in kallsyms.lines() {
            let line = line?;
            if let Some((address, kind @ ("t" | "T" | "w" | "W"), name)) = symbol(&line)
                && (self.start..self.end).contains(&address)
            {
                writeln!(symbols, "{:016x} {kind} {name}", self.linked(address))?;
            }
        }
        Ok(symbols)
    }
}

/// The four fields of `ADDRESS TYPE NAME\t[MODULE]`.
pub(crate) fn symbol_of_module(line: &str) -> Option<(u64, &str, &str, &str)> {
    let (symbol_line, module) = line.split_once('\t')?;
    let (address, kind, name) = symbol(symbol_line)?;
    Some((address, kind, name, module.strip_prefix('[')?.strip_suffix(']')?))
}

/// `ADDRESS TYPE NAME`, and for modules `\t[MODULE]`, which are left out.
fn symbol(line: &str) -> Option<(u64, &str, &str)> {
    let mut fields = line.split(' ');
    let (address, kind, name) = (fields.next()?, fields.next()?, fields.next()?);
    if name.contains('\t') {
        return None;
    }
    Some((u64::from_str_radix(address, 16).ok()?, kind, name))
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::*;

    const KALLSYMS: &str = "0000000000000000 A fixed_percpu_data\n\
        ffffffffa2000000 T _stext\n\
        ffffffffa2000000 T _text\n\
        ffffffffa2000a10 t do_one_initcall\n\
        ffffffffa2000a90 d not_code\n\
        ffffffffa2100000 W weak_one\n\
        ffffffffa3000000 T _etext\n\
        ffffffffa4000000 t init_code\n\
        ffffffffc0201000 t nf_hook\t[nf_tables]\n";

    #[test]
    fn addresses_become_linked_ones() {
        let text = Text::find(KALLSYMS.as_bytes()).unwrap();
        let symbols = String::from_utf8(text.symbols(KALLSYMS.as_bytes()).unwrap()).unwrap();
        assert_eq!(
            symbols,
            "ffffffff81000000 T _stext\n\
             ffffffff81000000 T _text\n\
             ffffffff81000a10 t do_one_initcall\n\
             ffffffff81100000 W weak_one\n"
        );
        let module = Module { start: 0, limit: 0, file_offset: 0, path: KERNEL_PATH.into(), id: None };
        let kernel = KernelImage { text, module: module.clone() };
        let linked = Frame { module: Some(&module), address: 0xffff_ffff_8100_0a12, reading: None };
        assert_eq!(kernel.frame(0xffff_ffff_a200_0a12), linked);
        for address in [0xffff_ffff_c020_1000, 0xffff_ffff_a300_0000, 0] {
            assert_eq!(kernel.frame(address), Frame { module: None, address, reading: None });
        }
    }

    #[test]
    fn hidden_addresses_are_an_error() {
        let hidden: String = KALLSYMS
            .lines()
            .map(|line| format!("{}{}\n", "0".repeat(16), line.get(16..).unwrap_or_default()))
            .collect();
        for text in [&hidden, "", "zz T _text\n"] {
            assert!(matches!(Text::find(text.as_bytes()), Err(KallsymsError::Hidden)));
        }
    }
}
