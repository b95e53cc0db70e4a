//! A recording: the agent in this process, sampling for some seconds against a service, and the merged
//! profile that the service makes of it.

use std::io::Read as _;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use prost::Message as _;
use windlass_agent::{Agent, BackendChoice};
use windlass_debuginfod::Service;
use windlass_schema::pprof;

use crate::server::Server;
use crate::terminal;

/// Largest profile to read, decompressed: a day of a busy machine has tens of MiB.
const MAX_PROFILE_BYTES: u64 = 1 << 30;
/// Clocks of samples and of this process are read at different moments; the range asked for is this much wider.
const RANGE_MARGIN: Duration = Duration::from_secs(1);

/// Longest wait, before samples are kept, for the tables of what runs: it ends when they are there, and on a machine that is busy
/// with other things that takes a while.
const WARM_UP: Duration = Duration::from_secs(10);

/// How the samples were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mode {
    /// By the BPF program, which walks stacks in the kernel.
    Bpf,
    /// From copies of one process's stacks, walked in user space.
    User,
}

/// What to sample.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) mode: Mode,
    /// Only this process; `Mode::User` needs one.
    pub(crate) pid: Option<u32>,
    pub(crate) frequency_hz: u32,
}

/// An agent at work.
pub(crate) struct Recording {
    agent: Agent,
    server: Server,
    start_ns: u64,
}

/// A merged profile, as the service sent it and decoded.
pub(crate) struct Recorded {
    pub(crate) gzipped: Vec<u8>,
    pub(crate) profile: pprof::Profile,
    /// For asking again.
    asked: Asked,
}

/// Which samples are those of a recording.
#[derive(Clone, Debug)]
struct Asked {
    range_ns: (u64, u64),
    /// Others may send to the same service at the same time.
    instance_id: String,
}

impl Recording {
    /// Starts to sample; returns once the tables of what runs are in the kernel and samples are kept.
    pub(crate) async fn start(server: &Server, cache_dir: PathBuf, target: Target) -> anyhow::Result<Self> {
        let mut config = windlass_agent::Config::new(server.url().to_owned(), cache_dir);
        config.frequency_hz = target.frequency_hz;
        config.warm_up = WARM_UP;
        config.token = server.token().map(str::to_owned).into();
        config.backend = match (target.mode, target.pid) {
            (Mode::Bpf, only_pid) => {
                config.only_pid = only_pid;
                BackendChoice::Bpf
            }
            (Mode::User, Some(pid)) => BackendChoice::CopiedStacks { pid },
            (Mode::User, None) => {
                anyhow::bail!("stacks can be copied from one process only, and none is named")
            }
        };
        let start_ns = unix_ns(SystemTime::now() - RANGE_MARGIN);
        // The agent has its own threads and waits for them, which an asynchronous task must not.
        let agent = tokio::task::spawn_blocking(move || Agent::start(config)).await??;
        let warm_up = agent.warm_up();
        eprintln!(
            "windlass: fetched the unwind tables of what runs in {:.1} s; {} samples of that time are not kept \
             ({} with the whole stack)",
            warm_up.duration.as_secs_f64(),
            warm_up.samples,
            warm_up.complete
        );
        Ok(Self { agent, server: server.clone(), start_ns })
    }

    /// Samples for `duration`, or until interrupted, and fetches the profile.
    pub(crate) async fn finish_after(self, duration: Duration) -> anyhow::Result<Recorded> {
        tokio::select! {
            () = terminal::wait(duration, "sampling") => {}
            _ = tokio::signal::ctrl_c() => eprintln!("windlass: interrupted; showing what was sampled so far"),
        }
        let Self { agent, server, start_ns } = self;
        let instance_id = agent.agent_id().to_owned();
        let summary = tokio::task::spawn_blocking(move || agent.stop()).await?.context("the agent failed")?;
        if summary.lost_samples > 0 {
            eprintln!(
                "windlass: {} samples were lost: the machine was too busy to drain them",
                summary.lost_samples
            );
        }
        if summary.dropped_batches > 0 {
            eprintln!("windlass: {} batches of samples did not reach the service", summary.dropped_batches);
        }
        let range_ns = (start_ns, unix_ns(SystemTime::now() + RANGE_MARGIN));
        fetch(&server, Asked { range_ns, instance_id }).await
    }
}

impl Recorded {
    /// Fetches the same samples again, with the names that the service knows by now.
    pub(crate) async fn again(&self, server: &Server) -> anyhow::Result<Self> {
        fetch(server, self.asked.clone()).await
    }
}

async fn fetch(server: &Server, asked: Asked) -> anyhow::Result<Recorded> {
    let spinner = terminal::spinner("naming");
    let gzipped = server.profiles(asked.range_ns.0, asked.range_ns.1, &asked.instance_id).await;
    spinner.finish_and_clear();
    let gzipped = gzipped?;
    let profile = decode(&gzipped).with_context(|| format!("{} sent a broken profile", server.url()))?;
    Ok(Recorded { gzipped, profile, asked })
}

/// Reads a gzipped profile.
pub(crate) fn decode(gzipped: &[u8]) -> anyhow::Result<pprof::Profile> {
    let mut bytes = Vec::new();
    flate2::read::MultiGzDecoder::new(gzipped).take(MAX_PROFILE_BYTES + 1).read_to_end(&mut bytes)?;
    anyhow::ensure!(bytes.len() as u64 <= MAX_PROFILE_BYTES, "more than {MAX_PROFILE_BYTES} bytes");
    Ok(pprof::Profile::decode(&bytes[..])?)
}

fn unix_ns(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// A service in this process, on a free loopback port, with its data in `data_dir`.
pub(crate) async fn embedded_service(data_dir: PathBuf) -> anyhow::Result<Service> {
    let mut config = windlass_debuginfod::Config::new(data_dir);
    config.listen = ([127, 0, 0, 1], 0).into();
    windlass_debuginfod::start(config).await.context("failed to start the service in this process")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn profiles_are_decoded_and_broken_ones_refused() {
        let profile = pprof::Profile { period: 7, ..pprof::Profile::default() };
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&profile.encode_to_vec()).unwrap();
        let gzipped = encoder.finish().unwrap();
        assert_eq!(decode(&gzipped).unwrap(), profile);
        assert!(decode(&gzipped[..gzipped.len() - 9]).is_err());
        assert!(decode(b"<html>").is_err());
    }
}
