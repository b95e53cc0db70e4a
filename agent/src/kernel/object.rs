//! The BPF object, and its maps made in the kernel.
//!
//! Two of its maps are hash maps that take memory as they are filled, as most hosts run a small part of the processes that there
//! is room for. Kernels before 6.1 refuse those to programs of perf events ("perf_event programs can only use
//! preallocated hash map", `check_map_prog_compatibility` in kernel/bpf/verifier.c). For them the object's description of
//! its maps is changed before it is loaded: one object then serves all kernels, and what it does is the same.

use std::num::NonZeroU32;

use aya::{Ebpf, EbpfLoader};
use object::{Object as _, ObjectSection as _};
use windlass_schema::maps::{AUDITS_RING_BYTES, names};

use super::map_sizes::MapSizes;
use super::{LoadError, describe};

/// The program and its maps, as `cargo xtask build-ebpf` made them.
#[cfg(not(target_arch = "aarch64"))]
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../bpf/windlass.bpf.o");
/// The same for this instruction set, whose registers are others.
#[cfg(target_arch = "aarch64")]
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../bpf/windlass-aarch64.bpf.o");

/// Where the kernel says which numbers CPUs may have.
const POSSIBLE_CPUS: &str = "/sys/devices/system/cpu/possible";

/// How hash maps take memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HashMaps {
    /// As they are filled.
    Growing,
    /// All of it when they are made.
    Preallocated,
}

/// Loads the object's maps and program code into this process, with maps made in the kernel. One sample in `audit_every` is
/// to be audited.
pub(crate) fn load_object(
    sizes: MapSizes,
    hash_maps: HashMaps,
    audit_every: Option<NonZeroU32>,
) -> Result<Ebpf, LoadError> {
    let mut loader = EbpfLoader::new();
    let every = audit_every.map_or(0, NonZeroU32::get);
    // What the maps for audits charge while there are none: a page, the least that the kernel takes
    // (ringbuf_map_alloc in kernel/bpf/ringbuf.c), and the frames of one walk.
    let (audits_bytes, walked) = match audit_every {
        Some(_) => (AUDITS_RING_BYTES, cpu_numbers()?),
        None => (page_bytes(), 1),
    };
    loader
        .override_global(names::AUDIT_EVERY, &every, true)
        .map_max_entries(names::AUDITS, audits_bytes)
        .map_max_entries(names::WALKED, walked)
        .map_max_entries(names::PROCESSES, sizes.processes)
        .map_max_entries(names::MAPPINGS, sizes.mapping_segments)
        .map_max_entries(names::SAMPLES, sizes.samples_bytes);
    let loaded = match hash_maps {
        HashMaps::Growing => loader.load(OBJECT),
        HashMaps::Preallocated => {
            let changed = with_preallocated_maps(OBJECT);
            loader.load(&changed.ok_or_else(|| LoadError::Refused("the object has no growing maps".into()))?)
        }
    };
    loaded.map_err(|error| {
        let text = describe(&error);
        if text.contains("Operation not permitted") || text.contains("Permission denied") {
            LoadError::NotPermitted
        } else {
            LoadError::Refused(text)
        }
    })
}

/// One more than the highest number that a CPU may have: the numbers may have gaps.
fn cpu_numbers() -> Result<u32, LoadError> {
    let wrong = |reason: String| LoadError::Cpus(format!("{POSSIBLE_CPUS}: {reason}"));
    let possible = std::fs::read_to_string(POSSIBLE_CPUS).map_err(|error| wrong(error.to_string()))?;
    last_cpu(&possible).map(|last| last.saturating_add(1)).ok_or_else(|| wrong(possible))
}

/// The last of a list such as `0-3,5`, which ascends.
fn last_cpu(list: &str) -> Option<u32> {
    list.trim_end().rsplit([',', '-']).next()?.parse().ok()
}

fn page_bytes() -> u32 {
    // SAFETY: sysconf has no preconditions.
    u32::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// Kinds of types in BPF type information, and bytes of what follows their first twelve: by the number of parts, and besides
/// (Documentation/bpf/btf.rst).
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const PARTS: [(u32, usize); 7] = [(STRUCT, 12), (5, 12), (6, 8), (13, 8), (15, 12), (19, 12), (0, 0)];
const BESIDES: [(u32, usize); 4] = [(1, 4), (ARRAY, 12), (14, 4), (17, 4)];

/// A copy of the object in which no map has flags.
///
/// A map is a structure with a member for each property, whose type points at an array of as many elements as its value
/// is. So members named `map_flags` get the type of one whose value is 0. `None` if there is none, or nothing to change.
fn with_preallocated_maps(elf: &[u8]) -> Option<Vec<u8>> {
    let (start, size) = object::File::parse(elf).ok()?.section_by_name(".BTF")?.file_range()?;
    let (start, size) = (usize::try_from(start).ok()?, usize::try_from(size).ok()?);
    let btf = elf.get(start..start.checked_add(size)?)?;
    let word = |at: usize| Some(u32::from_le_bytes(btf.get(at..at + 4)?.try_into().ok()?));
    let offset = |at: usize| Some(word(at)? as usize);
    let header = offset(4)?;
    let (types, end) = (header + offset(8)?, header + offset(8)? + offset(12)?);
    let names = header + offset(16)?;
    // Where each type is; the first number is 1.
    let (mut places, mut at) = (vec![None], types);
    while at < end {
        places.push(Some(at));
        let information = word(at + 4)?;
        let (kind, parts) = (information >> 24 & 0x1f, (information & 0xffff) as usize);
        let of = |sizes: &[(u32, usize)]| {
            sizes.iter().find(|(of_kind, _)| *of_kind == kind).map_or(0, |(_, bytes)| *bytes)
        };
        at += 12 + of(&PARTS) * parts + of(&BESIDES);
    }
    let place = |number: u32| *places.get(number as usize)?;
    let mut members = Vec::new();
    for structure in places.iter().flatten() {
        let information = word(structure + 4)?;
        let parts = if information >> 24 & 0x1f == STRUCT { (information & 0xffff) as usize } else { 0 };
        for member in (0..parts).map(|part| structure + 12 + 12 * part) {
            if btf.get(names + offset(member)?..)?.starts_with(b"map_flags\0") {
                let array = place(word(place(word(member + 4)?)? + 8)?)?;
                members.push((member + 4, word(array + 20)?));
            }
        }
    }
    let (without, _) = members.iter().find(|(_, flags)| *flags == 0)?;
    let without = word(*without)?.to_le_bytes();
    let mut changed = elf.to_vec();
    let mut is_changed = false;
    for (member, _) in members.iter().filter(|(_, flags)| *flags != 0) {
        changed[start + member..start + member + 4].copy_from_slice(&without);
        is_changed = true;
    }
    is_changed.then_some(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_cpus_may_have_gaps() {
        for (list, last) in [("0-1\n", Some(1)), ("0\n", Some(0)), ("0,2-3,8\n", Some(8)), ("\n", None)] {
            assert_eq!(last_cpu(list), last, "{list:?}");
        }
    }

    #[test]
    fn two_maps_grow_and_need_not() {
        let changed = with_preallocated_maps(OBJECT).expect("the object has growing maps");
        let differing = changed.iter().zip(OBJECT).filter(|(one, other)| one != other).count();
        assert!((2..=8).contains(&differing), "{differing} bytes of two type numbers");
        assert_eq!(with_preallocated_maps(&changed), None);
        assert_eq!(with_preallocated_maps(b"no ELF file"), None);
    }
}
