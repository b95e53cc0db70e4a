//! `windlass upload`: a build's ELF files to the service, before the strip loses them.
//!
//! sentry-cli is the strongest here: it asks what lacks, sends only that, and a second run costs one
//! request. What users of upload tools complain of: hidden `.debug` folders missed, files silently left
//! out, whole files held in memory, a retry of what the server had refused, and no advice for binaries
//! without a build-ID. So: a walk over everything, one question, parallel streams compressed on the way,
//! and a line for each file that says what it brings, what it lacks and which flag adds it.
//!
//! In reading order: `tree` finds files, `elf_file` classifies one (`debug_part` splits its debug information off), `gather`
//! adds what belongs to it elsewhere (`companions`), `sources` what its line table names, `plan` decides what to send, `transfer`
//! sends (`body`: bytes on their way, `content`: of what they are made), `report` tells, in the words of `contents`.
//! The shape of `--json` is in docs/ci/README.md.

mod body;
mod companions;
mod content;
mod contents;
mod debug_part;
mod elf_file;
mod gather;
mod plan;
mod report;
mod sources;
mod transfer;
pub(crate) mod tree;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use windlass_schema::BuildId;
use windlass_schema::http::{MAX_MISSING_ARTEFACTS, MissingRequest, MissingResponse};

use crate::server::{Server, ServerArgs, ServerError};
use crate::terminal;
use contents::Requirement;
use elf_file::Inspection;
use plan::Plan;
pub(crate) use report::Report;
use sources::SourceReader;

const EXAMPLES: &str = "\
Examples:
  windlass upload target/release                        after the build, before strip
  windlass upload --sources --server https://debuginfod.example:8002 build/bin build/lib
  windlass upload --only-debug build/bin                debug files and unwind sections, no code
  windlass upload --require debug_info,unwind dist      for CI: status 1 if a file lacks one of them
  windlass upload --dry-run --json dist | jq '.files[] | select(.lacks != [])'

A file with code goes up as executable, and serves its DWARF too; a split off .debug file as debuginfo.
What belongs to a file goes with it: its debug file (.build-id, .gnu_debuglink), its dwz file, its .dwp or .dwo files.
--sources sends every file of this machine that the line tables name: use it on builds that you trust.
Exit status: 0 all there, 1 some file could not be uploaded or lacks what --require asks for, 2 nothing could be done.";

/// Uploads in flight when not said otherwise: enough to hide the service's fsync.
const DEFAULT_JOBS: usize = 4;

/// Arguments of `windlass upload`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct UploadArgs {
    /// Files, or folders to search for ELF files
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
    /// Also send the source files that the line tables name, where they exist here
    #[arg(long)]
    sources: bool,
    /// Send split off debug information and unwind sections instead of whole programs
    #[arg(long)]
    only_debug: bool,
    /// Folder with debug files, beside those of the programs themselves [default: /usr/lib/debug]
    #[arg(long, value_name = "DIR")]
    debug_dir: Vec<PathBuf>,
    /// What each program must bring; status 1 if one does not. Repeated or separated by commas
    #[arg(long, value_name = "WHAT", value_delimiter = ',')]
    require: Vec<Requirement>,
    /// Namespace to upload to, of those that the token allows
    #[arg(long, value_name = "NAME", env = "WINDLASS_NAMESPACE")]
    namespace: Option<String>,
    /// Label for what is stored then, as release=1.4; may be repeated. Retention keeps what has certain labels
    #[arg(long, value_name = "NAME=VALUE")]
    label: Vec<String>,
    /// Only say what would be sent
    #[arg(long)]
    dry_run: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Files to read and send at the same time
    #[arg(long, value_name = "N", default_value_t = DEFAULT_JOBS as u64, value_parser = clap::value_parser!(u64).range(1..=64))]
    jobs: u64,
}

/// How to upload.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) sources: bool,
    pub(crate) only_debug: bool,
    pub(crate) debug_dirs: Vec<PathBuf>,
    pub(crate) require: Vec<Requirement>,
    pub(crate) dry_run: bool,
    pub(crate) jobs: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            sources: false,
            only_debug: false,
            debug_dirs: Vec::new(),
            require: Vec::new(),
            dry_run: false,
            jobs: DEFAULT_JOBS,
        }
    }
}

/// Runs `windlass upload`.
pub(crate) async fn run(args: UploadArgs) -> anyhow::Result<ExitCode> {
    let server = args.server.client()?.in_namespace(args.namespace.as_deref())?;
    let options = Options {
        sources: args.sources,
        only_debug: args.only_debug,
        debug_dirs: args.debug_dir,
        require: args.require,
        dry_run: args.dry_run,
        jobs: args.jobs as usize,
    };
    let report = upload(&server, &args.paths, options).await?;
    if !args.label.is_empty() && !args.dry_run {
        label(&server, &report.stored(), &args.label).await?;
    }
    crate::die_quietly_of_a_closed_pipe();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(ExitCode::from(report.exit_status()))
}

/// Uploads every ELF file under `paths` to `server`.
pub(crate) async fn upload(server: &Server, paths: &[PathBuf], options: Options) -> anyhow::Result<Report> {
    let searched = paths.to_vec();
    let candidates = tokio::task::spawn_blocking(move || tree::files_under(&searched)).await?;
    let inspection = Inspection {
        sources: options.sources.then(SourceReader::default),
        only_debug: options.only_debug,
        debug_dirs: gather::debug_dirs(&options.debug_dirs),
    };
    let mut plan = Plan::new(gather::gather(candidates, Arc::new(inspection), options.jobs).await?);
    anyhow::ensure!(!plan.is_empty(), "no ELF file under {}", listed(paths));
    match missing(server, &plan.questions()).await {
        Ok(answer) => plan.decide(&answer),
        Err(error) if options.dry_run => {
            eprintln!("windlass: {error}; taking every file for one that the service lacks");
            plan.decide(&MissingResponse { missing: plan.questions(), differing: Vec::new() });
        }
        Err(error) => return Err(error.into()),
    }
    if !options.dry_run {
        transfer::send(server, &mut plan, options.jobs).await;
    }
    Ok(Report::new(plan, &options.require, options.dry_run))
}

/// Labels images that are stored.
async fn label(server: &Server, ids: &[BuildId], labels: &[String]) -> anyhow::Result<()> {
    let answer = transfer::insist(|| server.label(ids, labels, &[])).await?;
    let without = answer.unknown.len() + answer.too_many.len();
    anyhow::ensure!(
        without == 0,
        "{without} images could not be labelled: they have too many labels, or were deleted"
    );
    Ok(())
}

/// Asks for all artefacts at once: one request up to the interface's limit.
async fn missing(
    server: &Server,
    questions: &[windlass_schema::http::ArtefactName],
) -> Result<MissingResponse, ServerError> {
    let mut whole = MissingResponse::default();
    for artefacts in questions.chunks(MAX_MISSING_ARTEFACTS) {
        let request = MissingRequest { artefacts: artefacts.to_vec() };
        let bar = terminal::spinner("asking");
        let part = transfer::insist(|| server.missing(&request)).await;
        bar.finish_and_clear();
        let part = part?;
        whole.missing.extend(part.missing);
        whole.differing.extend(part.differing);
    }
    Ok(whole)
}

fn listed(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
