//! `windlass artefacts`: what the service has stored, and what goes or stays by somebody's word.

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use windlass_schema::BuildId;
use windlass_schema::http::{ArtefactKind, ImageDetails, ImageSummary, MAX_LISTED_IMAGES, NamespaceUsage};

use crate::server::{Deletion, Listing, Server, ServerArgs};

const EXAMPLES: &str = "\
Examples:
  windlass artefacts list --namespace try
  windlass artefacts show 5471803c0b9fa1b2
  windlass artefacts label --add release=1.4 --namespace release 5471803c0b9fa1b2
  windlass artefacts delete 5471803c0b9fa1b2 --namespace try

Who may read may list and show; who may upload to a namespace labels for it; who has the scope admin deletes.";

const DAY_S: u64 = 24 * 3600;

/// Arguments of `windlass artefacts`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ArtefactsArgs {
    #[command(subcommand)]
    command: ArtefactsCommand,
}

#[derive(Debug, clap::Subcommand)]
enum ArtefactsCommand {
    /// List images with what is stored of them, and their labels
    List {
        #[command(flatten)]
        server: ServerArgs,
        /// Of this namespace only
        #[arg(long, value_name = "NAME")]
        namespace: Option<String>,
        /// With this label only
        #[arg(long, value_name = "NAME=VALUE")]
        label: Option<String>,
        /// Most images
        #[arg(long, value_name = "N", default_value_t = 1000)]
        limit: usize,
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
    /// Show all that is stored of an image
    Show {
        #[command(flatten)]
        server: ServerArgs,
        /// Its build-ID
        #[arg(value_name = "BUILD-ID")]
        id: BuildId,
        /// Print the service's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Give labels to images, and take them; retention keeps what has certain labels
    Label {
        #[command(flatten)]
        server: ServerArgs,
        /// Label to give; may be repeated
        #[arg(long, value_name = "NAME=VALUE", required_unless_present = "remove")]
        add: Vec<String>,
        /// Label to take; may be repeated
        #[arg(long, value_name = "NAME=VALUE")]
        remove: Vec<String>,
        /// For this namespace, of those that the token allows
        #[arg(long, value_name = "NAME", env = "WINDLASS_NAMESPACE")]
        namespace: Option<String>,
        /// The images
        #[arg(value_name = "BUILD-ID", required = true)]
        ids: Vec<BuildId>,
    },
    /// Delete what a namespace has of images
    Delete {
        #[command(flatten)]
        server: ServerArgs,
        /// Of this namespace [default: the service's most trusted one]
        #[arg(long, value_name = "NAME")]
        namespace: Option<String>,
        /// Of this kind only, as debuginfo or source
        #[arg(long)]
        kind: Option<ArtefactKind>,
        /// Of this source path only
        #[arg(long, requires = "kind")]
        path: Option<String>,
        /// The images
        #[arg(value_name = "BUILD-ID", required = true)]
        ids: Vec<BuildId>,
    },
    /// List what namespaces take, and may take
    Namespaces {
        #[command(flatten)]
        server: ServerArgs,
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
}

/// Runs `windlass artefacts`.
pub(crate) async fn run(args: ArtefactsArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        ArtefactsCommand::List { server, namespace, label, limit, json } => {
            let images = list(&server.client()?, Listing { namespace, label, after: None, limit }).await?;
            crate::die_quietly_of_a_closed_pipe();
            match json {
                true => println!("{}", serde_json::to_string_pretty(&images)?),
                false => images.iter().for_each(|image| println!("{}", image_line(image))),
            }
            Ok(ExitCode::from(crate::DONE))
        }
        ArtefactsCommand::Show { server, id, json } => {
            let image = server.client()?.image(id).await?;
            crate::die_quietly_of_a_closed_pipe();
            match json {
                true => println!("{}", serde_json::to_string_pretty(&image)?),
                false => print!("{}", image_text(&image)),
            }
            Ok(ExitCode::from(crate::DONE))
        }
        ArtefactsCommand::Label { server, add, remove, namespace, ids } => {
            let server = server.client()?.in_namespace(namespace.as_deref())?;
            let answer = server.label(&ids, &add, &remove).await?;
            println!("{} images changed, {} were labelled so already", answer.changed, answer.unchanged);
            for id in &answer.unknown {
                println!("{id}: nothing is stored of it");
            }
            for id in &answer.too_many {
                println!("{id}: it would have too many labels, remove some");
            }
            let done = answer.unknown.is_empty() && answer.too_many.is_empty();
            Ok(ExitCode::from(if done { crate::DONE } else { crate::FINDINGS }))
        }
        ArtefactsCommand::Delete { server, namespace, kind, path, ids } => {
            let server = server.client()?;
            let kind = kind.map(|kind| kind.to_string());
            let deletion = Deletion { namespace, kind, path };
            for id in ids {
                let deleted = server.delete(id, &deletion).await?;
                println!("{id}: {} artefacts of {} bytes deleted", deleted.artefacts, deleted.bytes);
            }
            Ok(ExitCode::from(crate::DONE))
        }
        ArtefactsCommand::Namespaces { server, json } => {
            let namespaces = server.client()?.namespaces().await?;
            crate::die_quietly_of_a_closed_pipe();
            match json {
                true => println!("{}", serde_json::to_string_pretty(&namespaces)?),
                false => namespaces.iter().for_each(|usage| println!("{}", usage_line(usage))),
            }
            Ok(ExitCode::from(crate::DONE))
        }
    }
}

/// Pages until there are as many images as asked for, or no more.
async fn list(server: &Server, mut listing: Listing) -> anyhow::Result<Vec<ImageSummary>> {
    let (mut images, limit) = (Vec::new(), listing.limit);
    while images.len() < limit {
        listing.limit = (limit - images.len()).min(MAX_LISTED_IMAGES);
        let page = server.images(&listing).await?;
        images.extend(page.images);
        listing.after = page.next;
        if page.next.is_none() {
            break;
        }
    }
    images.truncate(limit);
    Ok(images)
}

/// What others chose is quoted, so that it cannot pass for more lines or for commands to the terminal.
fn image_line(image: &ImageSummary) -> String {
    let ImageSummary { build_id, namespace, file_name, artefacts, bytes, used_s, labels, .. } = image;
    let mut line = format!(
        "{build_id} {namespace} {file_name:?}: {artefacts} artefacts, {bytes} bytes, last used {}",
        ago(*used_s)
    );
    for label in labels {
        line += &format!(", {}", label.escape_debug());
    }
    line
}

fn image_text(image: &ImageDetails) -> String {
    let mut text = format!("{}\n", image.build_id);
    for artefact in &image.artefacts {
        let path = if artefact.path.is_empty() { &artefact.file_name } else { &artefact.path };
        let mut has = vec![artefact.brings.to_string()];
        has.extend(artefact.unwind.then(|| "unwind sections".to_owned()));
        has.extend(artefact.code.then(|| "code".to_owned()));
        let state = if artefact.damaged { ", DAMAGED: upload it again" } else { "" };
        text += &format!(
            "  {} {path:?} in {}: {} bytes ({} stored), {}; stored {}, last used {}{state}\n    sha256 {}\n",
            artefact.kind,
            artefact.namespace,
            artefact.size_bytes,
            artefact.stored_bytes,
            has.join(", "),
            ago(artefact.stored_s),
            ago(artefact.used_s),
            artefact.sha256,
        );
    }
    if !image.complete {
        text += "  and more\n";
    }
    for label in &image.labels {
        let (name, since) = (label.label.escape_debug(), ago(label.since_s));
        text += &format!("  label {name}, given in {} {since}\n", label.namespace);
    }
    for derived in &image.derived {
        text += &format!(
            "  derived {} of version {}: {} bytes\n",
            derived.kind, derived.version, derived.size_bytes
        );
    }
    text
}

fn usage_line(usage: &NamespaceUsage) -> String {
    let NamespaceUsage { namespace, artefacts, bytes, unfinished_bytes, quota_bytes } = usage;
    let mut line = format!("{namespace}: {artefacts} artefacts, {bytes} bytes");
    if *unfinished_bytes > 0 {
        line += &format!(", {unfinished_bytes} bytes of unfinished uploads");
    }
    match quota_bytes {
        Some(quota) => line + &format!(" of {quota}"),
        None => line,
    }
}

/// Days are what retention counts.
fn ago(time_s: u64) -> String {
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    match now_s.saturating_sub(time_s) / DAY_S {
        0 => "today".to_owned(),
        1 => "1 day ago".to_owned(),
        days => format!("{days} days ago"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_stays_in_its_line() {
        let image = ImageSummary {
            build_id: "aabb".parse().expect("an ID"),
            namespace: "try".to_owned(),
            file_name: "a\nb\u{1b}[2J".to_owned(),
            artefacts: 2,
            bytes: 30,
            stored_s: 0,
            used_s: 0,
            labels: vec!["release=1\u{202e}".to_owned()],
        };
        let line = image_line(&image);
        assert!(!line.contains('\n') && !line.contains('\u{1b}') && !line.contains('\u{202e}'), "{line:?}");
        assert!(line.starts_with("aabb try \"a\\nb") && line.contains("2 artefacts, 30 bytes"), "{line}");
    }
}
