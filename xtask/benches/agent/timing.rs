//! The programs that time the walk, loaded, and how they are run.

use anyhow::{Context as _, Result};
use aya::maps::Array;
use aya::programs::{RawTracePoint, RawTracePointRunOptions, TestRun as _};
use aya::{Ebpf, EbpfLoader};

/// Names the object; `cargo xtask bench agent` builds it.
const OBJECT: &str = "WINDLASS_BENCH_TIMING_OBJECT";
/// The map in which the programs leave what they measured.
const TIMES: &str = "TIMES";

/// The object's maps and programs in the kernel.
pub(crate) struct Timing {
    pub(crate) bpf: Ebpf,
}

/// What a program measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Measured {
    pub(crate) ns: u64,
    pub(crate) frames: u64,
    /// Code of the reason to stop.
    pub(crate) stop: u64,
}

/// The object's maps, made in the kernel, and its programs, not yet loaded.
pub(crate) fn load_object() -> Result<Ebpf> {
    let path = std::env::var_os(OBJECT).with_context(|| format!("{OBJECT} does not name an object"))?;
    let object = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(EbpfLoader::new().load(&object)?)
}

impl Timing {
    pub(crate) fn load() -> Result<Self> {
        let mut bpf = load_object()?;
        for (name, program) in bpf.programs_mut() {
            if let Ok(program) = <&mut RawTracePoint>::try_from(program) {
                program.load().with_context(|| format!("load {name}"))?;
            }
        }
        Ok(Self { bpf })
    }

    /// Runs a program once, on the CPU of this thread.
    pub(crate) fn run(&mut self, name: &str, arguments: &[u64]) -> Result<Measured> {
        let mut options = RawTracePointRunOptions::new();
        options.args[..arguments.len()].copy_from_slice(arguments);
        let program = self.bpf.program_mut(name).with_context(|| format!("no program {name}"))?;
        let program: &mut RawTracePoint = program.try_into()?;
        let result = program.test_run(options)?;
        anyhow::ensure!(result.return_value == 0, "{name} returned {}", result.return_value);
        let times: Array<_, u64> = Array::try_from(self.bpf.map(TIMES).context("no map TIMES")?)?;
        Ok(Measured { ns: times.get(&0, 0)?, frames: times.get(&1, 0)?, stop: times.get(&2, 0)? })
    }
}
