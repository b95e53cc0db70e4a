//! How large are the program's maps on this machine?
//!
//! A hash map's buckets and a ring's bytes are charged when the map is made, whether or not they are ever used, and no map
//! grows. So they are sized at the start from what bounds their content: processes by the machine's memory,
//! samples by its CPUs and the sampling frequency.

use windlass_schema::maps::{MAX_MAPPING_SEGMENTS, MAX_PROCESSES, SAMPLES_RING_BYTES};

/// Memory of the machine for each process that there is room for, in bytes: what idle daemons take with their kernel
/// stacks and page tables.
const MEMORY_EACH_PROCESS: u64 = 2 * 1024 * 1024;
/// Fewest processes that there is room for: a small machine may run many copies of one small program.
const FEWEST_PROCESSES: u32 = 4096;
/// Mapping segments for each process: most have one.
const SEGMENTS_EACH_PROCESS: u32 = MAX_MAPPING_SEGMENTS / MAX_PROCESSES;
/// Most processes, and most segments of their mappings, where maps take all of their memory from the start: of segments,
/// which are some 4 KiB each, 8 MiB.
const PREALLOCATED: u32 = 2048;
/// Bytes of a sample in the ring: 40 frames with what stands around them.
const SAMPLE_BYTES: u64 = 400;
/// Smallest ring in bytes: 650 samples, of which a burst comes when all CPUs are busy and the agent is not run.
const SMALLEST_RING_BYTES: u64 = 256 * 1024;
/// Largest ring in bytes: beyond it, samples are lost whenever the agent is not run for a while, and are counted.
const LARGEST_RING_BYTES: u64 = 16 * 1024 * 1024;

const _: () = assert!(LARGEST_RING_BYTES.is_power_of_two() && SMALLEST_RING_BYTES.is_power_of_two());
const _: () = assert!(SAMPLES_RING_BYTES as u64 <= LARGEST_RING_BYTES);

/// Entries of the maps that are sized at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapSizes {
    pub(crate) processes: u32,
    pub(crate) mapping_segments: u32,
    pub(crate) samples_bytes: u32,
}

impl MapSizes {
    /// The sizes for this machine.
    pub(crate) fn of_machine(frequency_hz: u32) -> Self {
        // SAFETY: sysconf has no preconditions.
        let [pages, page_bytes, cpus] =
            [libc::_SC_PHYS_PAGES, libc::_SC_PAGESIZE, libc::_SC_NPROCESSORS_ONLN]
                .map(|name| unsafe { libc::sysconf(name) });
        // Unknown counts as much: a map too large costs memory, one too small costs stacks.
        let of = |number: libc::c_long| u64::try_from(number).unwrap_or(u64::from(u32::MAX));
        let pid_max = std::fs::read_to_string("/proc/sys/kernel/pid_max").ok();
        let pid_max = pid_max.and_then(|text| text.trim().parse().ok()).unwrap_or(u32::MAX);
        Self::new(of(pages).saturating_mul(of(page_bytes)), of(cpus), frequency_hz, pid_max)
    }

    fn new(memory_bytes: u64, cpus: u64, frequency_hz: u32, pid_max: u32) -> Self {
        let processes = u32::try_from(memory_bytes / MEMORY_EACH_PROCESS).unwrap_or(u32::MAX);
        // What the kernel would round buckets up to (htab_map_alloc, kernel/bpf/hashtab.c) may as well be used.
        let processes = processes.clamp(FEWEST_PROCESSES, MAX_PROCESSES).next_power_of_two().min(pid_max);
        let a_second = cpus.saturating_mul(u64::from(frequency_hz)).saturating_mul(SAMPLE_BYTES);
        let ring = a_second.clamp(SMALLEST_RING_BYTES, LARGEST_RING_BYTES).next_power_of_two();
        Self { processes, mapping_segments: processes * SEGMENTS_EACH_PROCESS, samples_bytes: ring as u32 }
    }

    /// The same where all that there is room for takes memory from the start.
    pub(crate) fn preallocated(self) -> Self {
        Self {
            processes: self.processes.min(PREALLOCATED),
            mapping_segments: self.mapping_segments.min(PREALLOCATED),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[track_caller]
    fn check(machine: (u64, u64, u32, u32), processes: u32, samples_bytes: u64) {
        let (memory_bytes, cpus, frequency_hz, pid_max) = machine;
        let sizes = MapSizes::new(memory_bytes, cpus, frequency_hz, pid_max);
        assert_eq!((sizes.processes, u64::from(sizes.samples_bytes)), (processes, samples_bytes));
        assert_eq!(sizes.mapping_segments, 2 * processes);
        assert!(sizes.samples_bytes.is_power_of_two());
    }

    #[test]
    fn maps_are_as_large_as_the_machine_may_need() {
        check((0, 0, 0, u32::MAX), 4096, 256 * 1024);
        check((24 * GIB, 2, 19, 32_768), 16_384, 256 * 1024);
        check((24 * GIB, 2, 997, 32_768), 16_384, 1 << 20);
        check((64 * GIB, 128, 19, 4_194_304), 32_768, 1 << 20);
        check((64 * GIB, 2, 19, 301), 301, 256 * 1024);
        check((u64::MAX, u64::MAX, u32::MAX, u32::MAX), 32_768, LARGEST_RING_BYTES);
    }
}
