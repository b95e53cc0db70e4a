//! Which CPUs are sampled, and watched for process events?
//!
//! All that are online, and they come and go: virtual machines are given more, and others save power. What runs on a CPU that
//! nobody watches maps and unmaps unseen, and addresses of its process would be read by mappings that are no more; so the list
//! is read every few seconds, and when one has come, events up to then count as lost. The kernel ends the events of a
//! CPU that goes, for good (`perf_event_exit_cpu`, kernel/events/core.c); one that went and came back in between, as all
//! but the first do when a machine sleeps, is told by its events: those of processes end with those of samples.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::programs::perf_event::{
    PerfEventConfig, PerfEventLinkId, PerfEventScope, SamplePolicy, SoftwareEvent,
};

use super::sideband::Sideband;
use super::{LoadError, describe, errno, max_sample_rate, program, sampling_advice};

/// How often the list of CPUs is read, which takes some microseconds.
const REVIEW_INTERVAL: Duration = Duration::from_secs(5);

/// The CPUs, each with its samples.
pub(super) struct Cpus {
    /// The program that takes them, by its name in the object.
    program: &'static str,
    frequency_hz: u32,
    sampled: BTreeMap<u32, PerfEventLinkId>,
    /// Whether CPUs were watched before: then events of one that was not are lost.
    has_watched: bool,
    reviewed: Instant,
}

impl Cpus {
    /// None yet.
    pub(super) fn new(program: &'static str, frequency_hz: u32) -> Self {
        Self { program, frequency_hz, sampled: BTreeMap::new(), has_watched: false, reviewed: Instant::now() }
    }

    /// Samples and watches the CPUs that are online, and no others.
    pub(super) fn review(&mut self, bpf: &mut Ebpf, sideband: &mut Sideband) -> Result<(), LoadError> {
        self.reviewed = Instant::now();
        let online =
            aya::util::online_cpus().map_err(|(path, error)| LoadError::Cpus(format!("{path}: {error}")))?;
        let ended = sideband.ended();
        ended.iter().for_each(|cpu| sideband.forget(*cpu));
        let has_gone = |cpu: &u32, _: &mut _| !online.contains(cpu) || ended.contains(cpu);
        for (cpu, link) in self.sampled.extract_if(.., has_gone) {
            tracing::info!(cpu, "the CPU went offline");
            sideband.forget(cpu);
            // It is gone from the kernel with its CPU; what is left is a descriptor.
            let _ = program::program(bpf, self.program)?.detach(link);
        }
        // Events before samples: what happens between the reading of /proc and the first sample is then known.
        for cpu in &online {
            sideband.watch(*cpu)?;
        }
        if self.has_watched && online.iter().any(|cpu| !self.sampled.contains_key(cpu)) {
            sideband.note_lost();
        }
        self.has_watched = true;
        for cpu in online {
            if !self.sampled.contains_key(&cpu)
                && let Some(link) = self.attach(cpu, bpf)?
            {
                self.sampled.insert(cpu, link);
            }
        }
        Ok(())
    }

    /// Does so again if it is time. What fails is tried again.
    pub(super) fn review_if_due(&mut self, bpf: &mut Ebpf, sideband: &mut Sideband) {
        if self.reviewed.elapsed() < REVIEW_INTERVAL {
            return;
        }
        if let Err(error) = self.review(bpf, sideband) {
            tracing::warn!(error = describe(&error), "a CPU is not sampled");
        }
    }

    /// Samples a CPU; `None` if it has gone since it was listed.
    fn attach(&self, cpu: u32, bpf: &mut Ebpf) -> Result<Option<PerfEventLinkId>, LoadError> {
        let attached = program::program(bpf, self.program)?.attach(
            PerfEventConfig::Software(SoftwareEvent::CpuClock),
            PerfEventScope::AllProcessesOneCpu { cpu },
            SamplePolicy::Frequency(u64::from(self.frequency_hz)),
            false,
        );
        match attached {
            Ok(link) => Ok(Some(link)),
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
            Err(error) => {
                let advice = sampling_advice(errno(&error), self.frequency_hz, max_sample_rate());
                Err(LoadError::Attach { cpu, reason: format!("{}{advice}", describe(&error)) })
            }
        }
    }
}
