//! `windlass profile`: samples a process or the whole machine for some seconds and writes the profile.
//!
//! With `--server` tables and names come from there and the samples stay there too. Without, a service
//! runs in this process for the time, and debug information that this machine has is added to it.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use windlass_schema::pprof;

use windlass_agent::privilege::Privilege;

use crate::mapped_elf;
use crate::recording::{Mode, Recorded, Recording, Target, embedded_service};
use crate::server::{Server, TokenArgs};
use crate::summary::{ProfileFile, Summary};
use crate::upload;

/// Files with more are not added to the service of this process: indexing them would outlast the sampling.
const MAX_DEBUGINFO_BYTES: u64 = 512 << 20;

const EXAMPLES: &str = "\
Examples:
  windlass profile --pid 4711 -o profile.html
  windlass profile --all --seconds 30 --server http://debuginfod.example:8002 -o machine.pb.gz
  windlass profile --pid 4711 --json -o profile.folded | jq '.functions[:5]'

Sampling every process needs root or capabilities; one process of your own can be sampled without.
Exit status: 0 done, 1 no sample was taken, 2 could not.";

/// Arguments of `windlass profile`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
#[command(group(clap::ArgGroup::new("target").required(true).args(["pid", "all"])))]
pub(crate) struct ProfileArgs {
    /// Process to sample, with its children
    #[arg(long)]
    pid: Option<u32>,
    /// Sample every process
    #[arg(long)]
    all: bool,
    /// How long to sample; Ctrl-C ends it earlier
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    seconds: u32,
    /// Samples per second for each CPU
    #[arg(long, value_name = "HZ", default_value_t = 97, value_parser = clap::value_parser!(u32).range(1..=999))]
    frequency: u32,
    /// The service; without, one runs in this process for the time
    #[arg(long, value_name = "URL", env = "WINDLASS_SERVER")]
    server: Option<String>,
    #[command(flatten)]
    token: TokenArgs,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    /// Where to write the profile, in the form that the ending names: .pb.gz, .html or .folded
    #[arg(short, long, value_name = "OUT")]
    output: ProfileFile,
}

/// Runs `windlass profile`.
pub(crate) async fn run(args: ProfileArgs) -> anyhow::Result<ExitCode> {
    if let Some(pid) = args.pid {
        anyhow::ensure!(Path::new(&format!("/proc/{pid}")).exists(), "there is no process {pid}");
    }
    if let Some(url) = &args.server {
        let server = Server::new(url, args.token.read()?)?;
        let (mode, recorded) = record(&args, &server, table_cache()?).await?;
        return show(&args, mode, &recorded);
    }
    let dir = tempfile::tempdir().context("failed to make a temporary folder")?;
    let service = embedded_service(dir.path().join("service")).await?;
    let result = async {
        let server = Server::new(&service.url(), None)?;
        let (mode, recorded) = record(&args, &server, dir.path().join("tables")).await?;
        let recorded = with_local_debuginfo(&server, recorded, args.pid).await?;
        show(&args, mode, &recorded)
    }
    .await;
    service.stop().await;
    result
}

async fn record(args: &ProfileArgs, server: &Server, cache_dir: PathBuf) -> anyhow::Result<(Mode, Recorded)> {
    let target = |mode| Target { mode, pid: args.pid, frequency_hz: args.frequency };
    let (mode, recording) = match Recording::start(server, cache_dir.clone(), target(Mode::Bpf)).await {
        Ok(recording) => (Mode::Bpf, recording),
        Err(error) => {
            let advice = Privilege::current().bpf_advice().join("\n  ");
            let Some(pid) = args.pid else {
                return Err(error.context(format!("failed to sample in the kernel\n  {advice}\n ")));
            };
            eprintln!("windlass: failed to sample in the kernel: {error:#}\n  {advice}");
            eprintln!("windlass: sampling process {pid} alone instead, through copies of its stacks");
            let recording =
                Recording::start(server, cache_dir, target(Mode::User)).await.with_context(|| {
                    let advice = Privilege::current().copied_stacks_advice().join("\n  ");
                    format!("failed to sample process {pid}\n  {advice}\n ")
                })?;
            (Mode::User, recording)
        }
    };
    Ok((mode, recording.finish_after(Duration::from_secs(args.seconds.into())).await?))
}

fn show(args: &ProfileArgs, mode: Mode, recorded: &Recorded) -> anyhow::Result<ExitCode> {
    let mut summary = Summary::new(recorded, mode, args.pid);
    let title = args.pid.map_or_else(|| "all processes".to_owned(), |pid| format!("process {pid}"));
    summary.write(&args.output, &title)?;
    crate::die_quietly_of_a_closed_pipe();
    if args.json {
        println!("{}", summary.json()?);
    } else {
        print!("{}", summary.text());
    }
    if summary.is_empty() {
        eprintln!("windlass: no sample was taken: nothing of it ran on a CPU in this time");
        return Ok(ExitCode::from(crate::FINDINGS));
    }
    Ok(ExitCode::from(crate::DONE))
}

/// Unwind tables stay on disk between runs against a service.
fn table_cache() -> anyhow::Result<PathBuf> {
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = cache.or_else(home).context("neither XDG_CACHE_HOME nor HOME is set")?;
    Ok(cache.join("windlass/tables"))
}

/// Uploads what this machine has of DWARF for the sampled images, and asks for the names again. The
/// agent has sent skeletons, with everything but DWARF, so other files would add nothing.
async fn with_local_debuginfo(
    server: &Server,
    recorded: Recorded,
    pid: Option<u32>,
) -> anyhow::Result<Recorded> {
    let root = pid.map_or_else(|| "/".into(), |pid| PathBuf::from(format!("/proc/{pid}/root")));
    let paths: Vec<_> =
        debuginfo_candidates(&recorded.profile, &root).into_iter().filter(|path| has_dwarf(path)).collect();
    if paths.is_empty() {
        return Ok(recorded);
    }
    upload::upload(server, &paths, upload::Options::default()).await?;
    recorded.again(server).await
}

/// The sampled files, and where distributions install their debug information.
fn debuginfo_candidates(profile: &pprof::Profile, root: &Path) -> BTreeSet<PathBuf> {
    let mut paths = BTreeSet::new();
    for mapping in &profile.mapping {
        let (file, build_id) = (profile.string(mapping.filename), profile.string(mapping.build_id));
        if let Some(relative) = file.strip_prefix('/') {
            paths.insert(root.join(relative));
        }
        if let (Some(first), Some(rest)) = (build_id.get(..2), build_id.get(2..)) {
            paths.insert(format!("/usr/lib/debug/.build-id/{first}/{rest}.debug").into());
        }
    }
    paths
}

fn has_dwarf(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    if !file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() <= MAX_DEBUGINFO_BYTES) {
        return false;
    }
    let Ok(elf) = mapped_elf::map_open(&file) else { return false };
    windlass_symbol_index::describe(&elf).is_ok_and(|contents| contents.debug_info)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampled_files_and_their_installed_debug_files_are_candidates() {
        let strings = ["", "/usr/bin/x", "6be6a8c1", "[vdso]", "é"];
        let mapping = |filename, build_id| pprof::Mapping { filename, build_id, ..pprof::Mapping::default() };
        let profile = pprof::Profile {
            string_table: strings.map(str::to_owned).to_vec(),
            mapping: vec![mapping(1, 2), mapping(3, 0), mapping(9, 4), mapping(-1, 0)],
            ..pprof::Profile::default()
        };
        let paths: Vec<_> = debuginfo_candidates(&profile, Path::new("/proc/7/root")).into_iter().collect();
        let expect: [&Path; 3] = [
            "/proc/7/root/usr/bin/x".as_ref(),
            "/usr/lib/debug/.build-id/6b/e6a8c1.debug".as_ref(),
            "/usr/lib/debug/.build-id/é/.debug".as_ref(),
        ];
        assert_eq!(paths, expect);
    }
}
