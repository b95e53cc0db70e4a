//! The images that a process maps, as each unwinder takes them: as tables in chunks, as framehop's modules,
//! as CFI to interpret. Which image is mapped where is the agent's own answer.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, LazyLock, Mutex};

use framehop::x86_64::{CacheX86_64, UnwinderX86_64};
use framehop::{ExplicitModuleSectionInfo, Module, Unwinder as _};
use object::{Object as _, ObjectSection as _, ReadRef as _};
use windlass_agent::chunks::{ChunkSpace, MOST_TABLE_BYTES};
use windlass_agent::images::{Images, TableState};
use windlass_agent::kernel::segments_of;
use windlass_agent::mapped_file::ImageSource;
use windlass_agent::process::{Content, ExecutableMapping, find, plan, read_mappings};
use windlass_schema::maps::{ProcessEntry, SegmentKey};
use windlass_schema::{BuildId, ImageAddress, LoadBias, ProcessAddress, Table};
use windlass_unwind_compiler::compile;

use super::cfi::Cfi;
use crate::chunks::PlainMaps;

/// The sections of an image that unwinding needs, and their addresses.
#[derive(Debug, Default)]
pub(crate) struct Sections {
    pub(crate) eh_frame: Arc<[u8]>,
    pub(crate) eh_frame_address: u64,
    header: Option<Arc<[u8]>>,
    header_address: u64,
    pub(crate) text: Range<u64>,
    pub(crate) got: Range<u64>,
    /// The first instruction of a program.
    pub(crate) entry: u64,
}

/// What is kept of an image's file.
struct Kept {
    table: Vec<u8>,
    sections: Arc<Sections>,
}

/// Images met by any test, compiled once: most programs map the same libraries.
static KEPT: LazyLock<Mutex<HashMap<BuildId, Arc<Kept>>>> = LazyLock::new(Mutex::default);

fn kept(id: BuildId, source: &ImageSource) -> Arc<Kept> {
    let mut all = KEPT.lock().expect("no test failed here");
    let make = || {
        let bytes = source.read(|image| {
            let length = image.len().expect("a length");
            image.read_bytes_at(0, length).expect("a file is read").to_vec()
        });
        let elf = bytes.unwrap_or_else(|error| panic!("{error}"));
        let table = compile(&elf, id).expect("an image that runs here").table;
        Arc::new(Kept { table, sections: Arc::new(sections(&elf)) })
    };
    all.entry(id).or_insert_with(make).clone()
}

fn sections(elf: &[u8]) -> Sections {
    let elf = object::File::parse(elf).expect("an ELF file");
    let section = |name| elf.section_by_name(name);
    let range =
        |name| section(name).map_or(0..0, |section| section.address()..section.address() + section.size());
    let data = |name| section(name).map(|section| Arc::<[u8]>::from(section.data().expect("section data")));
    Sections {
        eh_frame: data(".eh_frame").unwrap_or_default(),
        eh_frame_address: range(".eh_frame").start,
        header: data(".eh_frame_hdr"),
        header_address: range(".eh_frame_hdr").start,
        text: range(".text"),
        got: range(".got"),
        entry: elf.entry(),
    }
}

/// A process's executable memory in the three forms.
pub(crate) struct ProcessImages {
    pub(crate) mappings: Vec<ExecutableMapping>,
    pub(crate) maps: PlainMaps,
    pub(crate) entry: ProcessEntry,
    pub(crate) framehop: UnwinderX86_64<Arc<[u8]>>,
    pub(crate) framehop_cache: CacheX86_64,
    cfis: HashMap<BuildId, Cfi>,
    /// The lines of `/proc/PID/maps` that all of this is made from.
    source: String,
}

/// The lines of `/proc/PID/maps` about executable memory.
fn executable_lines(pid: i32) -> String {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    maps.lines().filter(|line| line.contains("xp ")).collect()
}

impl ProcessImages {
    pub(crate) fn read(pid: i32) -> Self {
        let source = executable_lines(pid);
        let mut images = Images::default();
        let mappings = read_mappings(pid as u32, &mut images).expect("mappings of a child");
        let mut space = ChunkSpace::new(MOST_TABLE_BYTES);
        let (mut maps, mut cfis, mut framehop) =
            (PlainMaps::default(), HashMap::new(), UnwinderX86_64::new());
        for mapping in &mappings {
            let Content::Image { image, bias, source } = &mapping.content else { continue };
            let id = image.id.build_id();
            let kept = kept(id, source);
            cfis.entry(id).or_insert_with(|| {
                let table = Table::parse(&kept.table).expect("a compiled table");
                let placed = space.place(&table).expect("a process's images fit");
                images.set_table(id, Some(TableState::Placed(placed.header)));
                Cfi::new(kept.sections.clone())
            });
            framehop.add_module(module(mapping, *bias, &kept.sections));
        }
        maps.flush(&mut space);
        let (entry, segments) = segments_of(&plan(&mappings, &images), 1);
        for (segment, content) in (0..).zip(segments) {
            maps.segments.insert(SegmentKey { tgid: pid as u32, segment }, content);
        }
        let framehop_cache = CacheX86_64::new();
        Self { mappings, maps, entry, framehop, framehop_cache, cfis, source }
    }

    /// Reads them again if the process has mapped or unmapped code since.
    pub(crate) fn refresh(&mut self, pid: i32) {
        if executable_lines(pid) != self.source {
            *self = Self::read(pid);
        }
    }

    /// The CFI of the image at an address, and the address in it.
    pub(crate) fn cfi(&self, address: ProcessAddress) -> Option<(&Cfi, ImageAddress)> {
        let mapping = find(&self.mappings, address)?;
        let Content::Image { image, bias, .. } = &mapping.content else { return None };
        Some((self.cfis.get(&image.id.build_id())?, address.to_image(*bias)))
    }

    /// The program itself: the image whose path ends so. Its bias and its first instruction's address.
    pub(crate) fn program(&self, path_end: &str) -> Option<(LoadBias, ProcessAddress)> {
        self.mappings.iter().find_map(|mapping| {
            let Content::Image { image, bias, .. } = &mapping.content else { return None };
            let entry = self.cfis.get(&image.id.build_id())?.entry();
            mapping.module.path.ends_with(path_end).then(|| (*bias, entry.to_process(*bias)))
        })
    }

    /// An address as a reader of a failure's message can look it up.
    pub(crate) fn describe(&self, address: ProcessAddress) -> String {
        match find(&self.mappings, address) {
            Some(ExecutableMapping { content: Content::Image { bias, .. }, module, .. }) => {
                format!("{}+{}", module.path, address.to_image(*bias))
            }
            Some(mapping) => format!("{address} in {}", mapping.module.path),
            None => format!("{address} in no mapping"),
        }
    }
}

fn module(mapping: &ExecutableMapping, bias: LoadBias, sections: &Sections) -> Module<Arc<[u8]>> {
    let range = |start: u64, data: &Arc<[u8]>| Some(start..start + data.len() as u64);
    let info = ExplicitModuleSectionInfo {
        text_svma: Some(sections.text.clone()),
        got_svma: Some(sections.got.clone()),
        eh_frame_svma: range(sections.eh_frame_address, &sections.eh_frame),
        eh_frame: Some(sections.eh_frame.clone()),
        eh_frame_hdr_svma: sections.header.as_ref().and_then(|data| range(sections.header_address, data)),
        eh_frame_hdr: sections.header.clone(),
        ..Default::default()
    };
    Module::new(mapping.module.path.to_string(), mapping.start..mapping.end, bias.get(), info)
}
