//! `windlass symbolize`: addresses, or a whole pprof profile, to the service and back with names.

use std::collections::HashSet;
use std::fmt;
use std::io::{self, IsTerminal as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use windlass_schema::http::{ImageAddresses, ImageFrames, SymbolizeRequest, SymbolizeResponse, Unresolved};
use windlass_schema::{BuildId, pprof};

use crate::address_input;
use crate::recording;
use crate::server::ServerArgs;

const EXAMPLES: &str = "\
Examples:
  windlass symbolize --build-id 6be6a8c1 0x1139 0x1150
  grep -o '0x[0-9a-f]*' crash.log | windlass symbolize --build-id 6be6a8c1 --json
  windlass symbolize profile.pb.gz -o named.pb.gz

A profile may be of perf, gperftools or any other tool that writes pprof with build-IDs. Single addresses are image addresses (as nm prints them), hex. Of a stack's return addresses, give each less
one, or the line is the one after the call. Exit status: 1 if some address has no name (in a profile: some address in an image with a build-ID).";

/// Arguments of `windlass symbolize`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
#[command(override_usage = "windlass symbolize [OPTIONS] --build-id ID [ADDRESS]...\n       \
                            windlass symbolize [OPTIONS] PROFILE -o OUT")]
pub(crate) struct SymbolizeArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Build-ID of the image that the addresses are of
    #[arg(long, value_name = "ID")]
    build_id: Option<BuildId>,
    /// Where to write the profile
    #[arg(
        short,
        long,
        value_name = "OUT",
        conflicts_with = "build_id",
        required_unless_present = "build_id"
    )]
    output: Option<PathBuf>,
    /// Print the service's answer as JSON
    #[arg(long, requires = "build_id")]
    json: bool,
    /// With --build-id addresses, one a line on stdin when none is given; else a pprof profile
    #[arg(value_name = "ADDRESS|PROFILE", required_unless_present = "build_id")]
    inputs: Vec<String>,
}

/// Runs `windlass symbolize`.
pub(crate) async fn run(args: SymbolizeArgs) -> anyhow::Result<ExitCode> {
    let server = args.server.client()?;
    let Some(build_id) = args.build_id else {
        let [profile] = &args.inputs[..] else {
            anyhow::bail!("expected one profile, got {}: {}", args.inputs.len(), args.inputs.join(" "));
        };
        let output = args.output.expect("required without --build-id");
        let bytes = std::fs::read(profile).with_context(|| format!("failed to read {profile}"))?;
        let named = server.symbolize_pprof(bytes).await?;
        std::fs::write(&output, &named).with_context(|| format!("failed to write {}", output.display()))?;
        let profile =
            recording::decode(&named).with_context(|| format!("{} sent a broken profile", server.url()))?;
        let counts = Counts::of(&profile);
        crate::die_quietly_of_a_closed_pipe();
        println!("{counts}");
        return Ok(ExitCode::from(if counts.unnamed == 0 { crate::DONE } else { crate::FINDINGS }));
    };
    let addresses: Vec<u64> = addresses(&args.inputs)?.into_iter().map(|address| address.get()).collect();
    let request = SymbolizeRequest {
        images: vec![ImageAddresses { build_id, addresses: addresses.clone(), return_addresses: false }],
    };
    let answer = server.symbolize(&request).await?;
    let [image] = &answer.images[..] else {
        anyhow::bail!("{} answered for {} images instead of one", server.url(), answer.images.len());
    };
    anyhow::ensure!(
        image.addresses.len() == addresses.len(),
        "{} answered for {} addresses instead of {}",
        server.url(),
        image.addresses.len(),
        addresses.len()
    );
    crate::die_quietly_of_a_closed_pipe();
    if args.json {
        println!("{}", serde_json::to_string(&answer)?);
    } else {
        print!("{}", text(&answer, image, &addresses)?);
    }
    let all_named = image.addresses.iter().all(|frames| !frames.is_empty());
    Ok(ExitCode::from(if all_named { crate::DONE } else { crate::FINDINGS }))
}

/// How many locations of a profile have names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counts {
    named: usize,
    all: usize,
    /// Those without a name though their image has a build-ID.
    unnamed: usize,
}

impl Counts {
    fn of(profile: &pprof::Profile) -> Self {
        let identified =
            profile.mapping.iter().filter(|mapping| !profile.string(mapping.build_id).is_empty());
        let identified: HashSet<u64> = identified.map(|mapping| mapping.id).collect();
        let mut counts = Self { named: 0, all: profile.location.len(), unnamed: 0 };
        for location in &profile.location {
            counts.named += usize::from(!location.line.is_empty());
            counts.unnamed +=
                usize::from(location.line.is_empty() && identified.contains(&location.mapping_id));
        }
        counts
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { named, all, unnamed } = self;
        write!(f, "{named} of {all} locations named")?;
        if *unnamed > 0 {
            write!(
                f,
                "; {unnamed} without a name are in images with a build-ID: upload those, as they were before \
                 strip, with `windlass upload`"
            )?;
        }
        if named + unnamed < *all {
            write!(f, "; {} are in no image with a build-ID", all - named - unnamed)?;
        }
        Ok(())
    }
}

fn addresses(inputs: &[String]) -> anyhow::Result<Vec<windlass_schema::ImageAddress>> {
    if inputs.is_empty() {
        let stdin = io::stdin();
        anyhow::ensure!(!stdin.is_terminal(), "no address given (hex, as arguments or one a line on stdin)");
        return address_input::read_lines(stdin.lock());
    }
    inputs.iter().map(|text| address_input::parse(text).map_err(anyhow::Error::msg)).collect()
}

/// A block for each address: the address, then its frames, innermost first.
fn text(answer: &SymbolizeResponse, image: &ImageFrames, addresses: &[u64]) -> anyhow::Result<String> {
    let broken = || "the service's answer refers to something that it does not hold";
    let mut text = String::new();
    for (index, (address, frames)) in addresses.iter().zip(&image.addresses).enumerate() {
        text += &format!("{address:#x}\n");
        for (depth, &frame) in frames.iter().enumerate() {
            let frame = answer.frames.get(frame as usize).with_context(broken)?;
            let function = answer.functions.get(frame.function as usize).with_context(broken)?;
            let file = match frame.file {
                Some(file) => answer.files.get(file as usize).with_context(broken)?,
                None => "??",
            };
            let line = frame.line.map_or_else(|| "?".to_owned(), |line| line.to_string());
            // Every frame but the outermost was inlined into the next.
            let inlined = if depth + 1 < frames.len() { " (inlined)" } else { "" };
            text += &format!("  {} at {file}:{line}{inlined}\n", function.name);
        }
        if frames.is_empty() {
            let reason = image.unresolved.iter().find(|(at, _)| *at as usize == index);
            let reason = reason.map_or("no name", |(_, reason)| explain(*reason));
            let start = image.unnamed_functions.iter().find(|(at, _)| *at as usize == index);
            let place =
                start.map_or_else(String::new, |(_, start)| format!(" in the function at {start:#x}"));
            text += &format!("  ??{place} ({reason})\n");
        }
    }
    Ok(text)
}

const fn explain(reason: Unresolved) -> &'static str {
    match reason {
        Unresolved::UnknownImage => "nothing is stored for this build-ID: upload it with `windlass upload`",
        Unresolved::NoSymbols => "what is stored has no symbols: upload the file as it was before strip",
        Unresolved::NoSymbolAtAddress => "no symbol covers this address",
        Unresolved::BrokenDebuginfo => "what is stored could not be read: see the service's log",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_schema::http::{FrameLine, FunctionName, Provenance};

    fn answer() -> SymbolizeResponse {
        let function = |name: &str| FunctionName {
            name: name.to_owned(),
            linkage_name: None,
            provenance: Provenance::Dwarf,
        };
        SymbolizeResponse {
            files: vec!["/src/a.c".to_owned()],
            functions: vec![function("leaf"), function("main")],
            frames: vec![
                FrameLine { function: 0, file: Some(0), line: Some(3) },
                FrameLine { function: 1, file: Some(0), line: None },
            ],
            images: vec![ImageFrames {
                build_id: "abcd".parse().unwrap(),
                addresses: vec![vec![0, 1], vec![], vec![]],
                unresolved: vec![(1, Unresolved::NoSymbolAtAddress), (2, Unresolved::NoSymbols)],
                unnamed_functions: vec![(1, 0x10)],
            }],
        }
    }

    #[test]
    fn inlined_frames_and_missing_names_are_told() {
        let answer = answer();
        let text = text(&answer, &answer.images[0], &[0x1139, 0x20, 0x99]).unwrap();
        let expect = "0x1139\n  leaf at /src/a.c:3 (inlined)\n  main at /src/a.c:?\n\
                      0x20\n  ?? in the function at 0x10 (no symbol covers this address)\n\
                      0x99\n  ?? (what is stored has no symbols: upload the file as it was before strip)\n";
        assert_eq!(text, expect);
    }

    #[test]
    fn named_locations_are_counted() {
        let mapping = |id, build_id| pprof::Mapping { id, build_id, ..pprof::Mapping::default() };
        let location = |mapping_id, lines| pprof::Location {
            mapping_id,
            line: vec![pprof::Line::default(); lines],
            ..pprof::Location::default()
        };
        let mut profile = pprof::Profile {
            string_table: ["", "abcd"].map(str::to_owned).to_vec(),
            mapping: vec![mapping(1, 1), mapping(2, 0)],
            location: vec![location(1, 2), location(2, 1)],
            ..pprof::Profile::default()
        };
        assert_eq!(Counts::of(&profile).to_string(), "2 of 2 locations named");
        profile.location.extend([location(1, 0), location(2, 0), location(0, 0)]);
        let counts = Counts::of(&profile);
        assert_eq!(counts, Counts { named: 2, all: 5, unnamed: 1 });
        let text = counts.to_string();
        assert!(text.starts_with("2 of 5 locations named; 1 without a name"), "{text}");
        assert!(text.ends_with("; 2 are in no image with a build-ID"), "{text}");
    }

    #[test]
    fn an_answer_with_bad_indices_is_an_error() {
        let mut answer = answer();
        answer.frames[0].function = 9;
        assert!(text(&answer, &answer.images[0], &[0x1139, 0x20]).is_err());
    }
}
