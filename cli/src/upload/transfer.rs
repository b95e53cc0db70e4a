//! Sends what the plan says: several streams at once, compressed while they are read, memory bounded
//! by a few chunks for each stream.
//!
//! Trouble that may pass is waited for, longer each time. A large file goes in parts, of which those that arrived
//! are never sent again, not even by the next run: the service knows by the file's hash how far it came. What the service
//! refused, and what went wrong with the file itself, is not tried again.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::StreamExt as _;
use indicatif::ProgressBar;
use windlass_schema::http::{ArtefactKind, ArtefactName};

use super::body::compressed;
use super::content::Content;
use super::plan::{Fate, Plan};
use crate::server::{Appended, Part, Server, ServerError};
use crate::terminal;

/// Tries without any progress, the first included: half a minute in which a service starts again.
const ATTEMPTS: u32 = 7;
/// Pause before the second try; it doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// Contents of more bytes go in parts of so many, as far as the service allows. Some seconds on a slow line, which
/// is what a broken connection then costs.
const PART_BYTES: u64 = if cfg!(test) { 1 << 20 } else { 32 << 20 };

/// One artefact to send, and where its fate is kept.
struct Item {
    artefact: ArtefactName,
    content: Content,
    /// Base name for debuggers.
    name: String,
    file: usize,
    source: Option<usize>,
}

/// Sends everything whose fate is [`Fate::Send`], ELF files first, and settles the fates.
pub(crate) async fn send(server: &Server, plan: &mut Plan, jobs: usize) {
    let (files, sources) = (elf_items(plan), source_items(plan));
    let bytes = files.iter().chain(&sources).map(|item| item.content.size_bytes).sum();
    let bar = terminal::byte_bar(bytes, "sending");
    for items in [files, sources] {
        let sent = futures_util::stream::iter(items).map(|item| async {
            let fate = send_one(server, &item, &bar).await;
            (item, fate)
        });
        let mut sent = sent.buffer_unordered(jobs);
        while let Some((item, fate)) = sent.next().await {
            let planned = &mut plan.files[item.file];
            match item.source {
                Some(source) => planned.sources[source] = fate,
                None => planned.fate = fate,
            }
        }
    }
    bar.finish_and_clear();
}

fn elf_items(plan: &Plan) -> Vec<Item> {
    let files = plan.files.iter().enumerate().filter(|(_, planned)| planned.fate == Fate::Send);
    files
        .map(|(index, planned)| {
            let name = planned.file.path.file_name().unwrap_or_default().to_string_lossy();
            let is_part = planned.file.kind == ArtefactKind::Debuginfo && planned.file.contents.code;
            Item {
                artefact: planned.file.artefact(planned.kind),
                content: planned.file.content.clone(),
                name: if is_part { format!("{name}.debug") } else { name.into_owned() },
                file: index,
                source: None,
            }
        })
        .collect()
}

fn source_items(plan: &Plan) -> Vec<Item> {
    let mut items = Vec::new();
    for (index, planned) in plan.files.iter().enumerate() {
        for (source_index, (source, fate)) in
            planned.file.sources.files.iter().zip(&planned.sources).enumerate()
        {
            if *fate == Fate::Send {
                items.push(Item {
                    artefact: source.artefact(planned.file.build_id),
                    content: source.content.clone(),
                    name: source.path.rsplit('/').next().unwrap_or_default().to_owned(),
                    file: index,
                    source: Some(source_index),
                });
            }
        }
    }
    items
}

/// Why one try failed.
enum Trouble {
    /// The file.
    Content(String),
    Server(ServerError),
}

async fn send_one(server: &Server, item: &Item, bar: &ProgressBar) -> Fate {
    let mut attempt = 1;
    let mut reached = 0;
    loop {
        let before = reached;
        let result = if item.content.size_bytes > PART_BYTES {
            send_parts(server, item, bar, &mut reached).await
        } else {
            send_whole(server, item, bar).await
        };
        let error = match result {
            Ok(true) => return Fate::Sent,
            Ok(false) => return Fate::Present,
            Err(Trouble::Content(why)) => return Fate::Failed(why),
            Err(Trouble::Server(error)) => error,
        };
        if reached > before {
            attempt = 1;
        }
        if attempt == ATTEMPTS || !error.may_pass() {
            return Fate::Failed(reason(&error));
        }
        let pause = pause(attempt);
        tracing::info!("sending {} again in {pause:?}: {error}", item.content.path.display());
        tokio::time::sleep(pause).await;
        attempt += 1;
    }
}

/// Asks until there is an answer: a service that starts again is waited for, but not one that was never reached.
pub(crate) async fn insist<T>(ask: impl AsyncFn() -> Result<T, ServerError>) -> Result<T, ServerError> {
    let mut attempt = 1;
    loop {
        match ask().await {
            Err(error @ ServerError::Status { .. }) if error.may_pass() && attempt < ATTEMPTS => {
                tracing::info!("asking again: {error}");
                tokio::time::sleep(pause(attempt)).await;
                attempt += 1;
            }
            result => return result,
        }
    }
}

/// Before the next try: doubled each time, and different for each of those that were interrupted together.
fn pause(attempt: u32) -> Duration {
    let longest = FIRST_PAUSE.saturating_mul(1 << (attempt - 1).min(16)).min(MAX_PAUSE);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let random = f64::from(now.subsec_micros() % 1000) / 1000.0;
    longest.mul_f64(0.5 + random / 2.0)
}

async fn send_whole(server: &Server, item: &Item, bar: &ProgressBar) -> Result<bool, Trouble> {
    let (body, watch) = compressed(&item.content, 0..item.content.size_bytes, bar).await.split();
    let sent = server.put(&item.artefact, &item.content.sha256, &item.name, body).await;
    sent.map_err(|error| watch.failed().map_or(Trouble::Server(error), Trouble::Content))
}

/// Sends what the service does not have of a large file yet. `reached` is how far it is.
async fn send_parts(
    server: &Server,
    item: &Item,
    bar: &ProgressBar,
    reached: &mut u64,
) -> Result<bool, Trouble> {
    let whole = item.content.size_bytes;
    let progress = server.progress(&item.artefact, &item.content.sha256).await.map_err(Trouble::Server)?;
    let Some(progress) = progress else {
        return send_whole(server, item, bar).await;
    };
    let part_bytes = PART_BYTES.max(progress.min_part).min(progress.max_part).max(1);
    let mut go_on = |offset: u64| {
        bar.inc(offset.saturating_sub(*reached));
        bar.dec(reached.saturating_sub(offset));
        *reached = offset;
    };
    go_on(progress.offset.min(whole));
    if progress.complete {
        go_on(whole);
        return Ok(false);
    }
    let mut offset = progress.offset;
    loop {
        if offset >= whole {
            let cause = format!("{offset} of {whole} bytes are there, but not the whole");
            return Err(Trouble::Server(ServerError::Body { url: server.url().to_owned(), cause }));
        }
        let end = whole.min(offset.saturating_add(part_bytes));
        let (body, watch) = compressed(&item.content, offset..end, bar).await.split();
        let part = Part { offset, whole, last: end == whole };
        let sent = server.append(&item.artefact, &item.content.sha256, &item.name, part, body).await;
        // What the part showed while it was read is shown again as what the service has of it.
        let trouble = watch.failed();
        match sent {
            Ok(Appended::Stored(is_new)) => {
                go_on(whole);
                return Ok(is_new);
            }
            Ok(Appended::GoOn(next)) if next > offset => {
                go_on(next.min(whole));
                offset = next;
            }
            Ok(Appended::GoOn(_)) => {
                let cause = "a part was taken, but the upload did not get further".to_owned();
                return Err(Trouble::Server(ServerError::Unreachable {
                    url: server.url().to_owned(),
                    cause,
                }));
            }
            Err(error) => return Err(trouble.map_or(Trouble::Server(error), Trouble::Content)),
        }
    }
}

fn reason(error: &ServerError) -> String {
    match error {
        ServerError::Status { status, message, .. } => format!("{status}: {message}"),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests;
