//! All ELF files under the paths, and what belongs to them elsewhere.
//!
//! First every file of the trees is looked at, then what is known of them says which companions are still worth a
//! search: a program whose debug file is in the tree too has nothing to look for under `/usr/lib/debug`. Companions may have
//! companions of their own (a debug file its dwz file), so the search goes in rounds.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::{Stream, StreamExt as _};
use indicatif::ProgressBar;
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use super::companions::{self, Companion, Found, What};
use super::content::Stamp;
use super::elf_file::{self, Inspected, Inspection, Owner, SkipReason};
use super::tree::Candidate;
use crate::terminal;

/// Rounds of the search: program, debug file, dwz file, and one to see that there is no more.
const MAX_ROUNDS: usize = 4;

/// A file and what it turned out to be.
pub(crate) type InspectedFile = (Candidate, anyhow::Result<Inspected>);

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    pub(crate) inspected: Vec<InspectedFile>,
    /// Images with units whose `.dwo` file was not found.
    pub(crate) absent_units: HashSet<BuildId>,
    /// Images that name a supplementary file which was not found.
    pub(crate) absent_supplementary: HashSet<BuildId>,
}

/// Looks at `candidates` and for their companions, `jobs` at a time.
pub(crate) async fn gather(
    candidates: Vec<Candidate>,
    inspection: Arc<Inspection>,
    jobs: usize,
) -> anyhow::Result<Gathered> {
    let bar = terminal::count_bar(candidates.len() as u64, "reading");
    let mut search = Search {
        inspection,
        jobs,
        bar,
        gathered: Gathered::default(),
        looked_at: 0,
        units: HashSet::new(),
        absent_units: HashSet::new(),
    };
    search.inspect(candidates).await?;
    for _ in 0..MAX_ROUNDS {
        if !search.companions().await? {
            break;
        }
    }
    search.bar.finish_and_clear();
    Ok(search.finish())
}

struct Search {
    inspection: Arc<Inspection>,
    jobs: usize,
    bar: ProgressBar,
    gathered: Gathered,
    /// How many of the inspected files had their companions searched for.
    looked_at: usize,
    /// Units whose `.dwo` file was found, and those where it was not for one of the files that name it.
    units: HashSet<(BuildId, u64)>,
    absent_units: HashSet<(BuildId, u64)>,
}

/// A companion of an image.
type Wish = (Owner, Companion);

impl Search {
    /// Reads and classifies files, in their order.
    async fn inspect(&mut self, candidates: Vec<Candidate>) -> anyhow::Result<()> {
        let inspection = &self.inspection;
        let tasks = futures_util::stream::iter(candidates).map(|candidate| {
            let inspection = Arc::clone(inspection);
            tokio::task::spawn_blocking(move || {
                let result = match &candidate.error {
                    Some(error) => Err(anyhow::anyhow!("{error}")),
                    None => elf_file::inspect(&candidate.path, &inspection),
                };
                (candidate, result)
            })
        });
        let results = collect(tasks.buffered(self.jobs), &self.bar).await?;
        self.gathered.inspected.extend(results);
        Ok(())
    }

    /// Looks for companions of the files that are new. Says whether it found any.
    async fn companions(&mut self) -> anyhow::Result<bool> {
        let (mut wishes, mut units) = (Vec::new(), Vec::new());
        let known = Known::of(&self.gathered.inspected);
        for (_, result) in &self.gathered.inspected[self.looked_at..] {
            for file in artefacts(result) {
                for companion in &file.companions {
                    let wish = (file.owner(), companion.clone());
                    match companion.what {
                        What::Debug(id) if known.with_debug_info.contains(&id) => {}
                        What::Supplementary(id) if known.ids.contains(&id) => {}
                        What::Unit(_) => units.push(wish),
                        _ => wishes.push(wish),
                    }
                }
            }
        }
        self.looked_at = self.gathered.inspected.len();
        let mut results = self.find(wishes).await?;
        let has_package = |wanted: &Owner| {
            let mut found = results.iter().filter(|(_, found)| found.is_some());
            found.any(|((owner, companion), _)| owner == wanted && companion.what == What::Package)
        };
        units.retain(|(owner, _)| !has_package(owner));
        results.extend(self.find(units).await?);
        self.take(results, &known).await
    }

    async fn find(&self, wishes: Vec<Wish>) -> anyhow::Result<Vec<(Wish, Option<Found>)>> {
        self.bar.inc_length(wishes.len() as u64);
        let tasks = futures_util::stream::iter(wishes).map(|wish| {
            tokio::task::spawn_blocking(move || {
                let found = companions::find(&wish.1, wish.0);
                (wish, found)
            })
        });
        self.bar.set_message("companions");
        collect(tasks.buffered(self.jobs), &self.bar).await
    }

    async fn take(&mut self, results: Vec<(Wish, Option<Found>)>, known: &Known) -> anyhow::Result<bool> {
        let mut seen = known.files.clone();
        let mut candidates = Vec::new();
        for ((owner, companion), found) in results {
            match (found, companion.what) {
                (Some(Found { path, split: Some(split) }), what) => {
                    if let What::Unit(id) = what
                        && !self.units.insert((owner.build_id, id))
                    {
                        continue;
                    }
                    let candidate = Candidate { path, named: false, error: None };
                    self.gathered.inspected.push((candidate, Ok(Inspected::Artefacts(vec![split]))));
                }
                (Some(Found { path, split: None }), _) => {
                    if file_of(&path).is_some_and(|file| seen.insert(file)) {
                        candidates.push(Candidate { path, named: false, error: None });
                    }
                }
                (None, What::Unit(id)) => {
                    self.absent_units.insert((owner.build_id, id));
                }
                (None, What::Supplementary(_)) => {
                    self.gathered.absent_supplementary.insert(owner.build_id);
                }
                (None, What::Debug(_) | What::Package) => {}
            }
        }
        let found = !candidates.is_empty();
        self.bar.inc_length(candidates.len() as u64);
        self.inspect(candidates).await?;
        Ok(found)
    }

    /// Settles what is absent after all, and that split DWARF which has its program is none of those without one.
    fn finish(mut self) -> Gathered {
        let files = self.gathered.inspected.iter().flat_map(|(_, result)| artefacts(result));
        let packed = files.filter(|file| file.kind == ArtefactKind::Dwp).map(|file| file.build_id);
        let packed: HashSet<_> = packed.collect();
        let absent = self.absent_units.difference(&self.units).map(|(id, _)| *id);
        self.gathered.absent_units = absent.filter(|id| !packed.contains(id)).collect();
        let taken: HashSet<_> = self
            .gathered
            .inspected
            .iter()
            .flat_map(|(_, result)| artefacts(result))
            .map(|file| file.content.stamp().file())
            .collect();
        self.gathered.inspected.retain(|(candidate, result)| {
            !matches!(result, Ok(Inspected::Skipped(SkipReason::SplitDwarf)))
                || !file_of(&candidate.path).is_some_and(|file| taken.contains(&file))
        });
        self.gathered
    }
}

/// What is there already, so that it need not be looked for.
struct Known {
    with_debug_info: HashSet<BuildId>,
    ids: HashSet<BuildId>,
    files: HashSet<(u64, u64)>,
}

impl Known {
    fn of(inspected: &[InspectedFile]) -> Self {
        let files = || inspected.iter().flat_map(|(_, result)| artefacts(result));
        Self {
            with_debug_info: files()
                .filter(|file| file.contents.debug_info)
                .map(|file| file.build_id)
                .collect(),
            ids: files().map(|file| file.build_id).collect(),
            files: files().map(|file| file.content.stamp().file()).collect(),
        }
    }
}

fn artefacts(result: &anyhow::Result<Inspected>) -> &[elf_file::ElfFile] {
    match result {
        Ok(Inspected::Artefacts(files)) => files,
        _ => &[],
    }
}

fn file_of(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| Stamp::of(&metadata).file())
}

async fn collect<T>(
    mut tasks: impl Stream<Item = Result<T, tokio::task::JoinError>> + Unpin,
    bar: &ProgressBar,
) -> anyhow::Result<Vec<T>> {
    let mut results = Vec::new();
    while let Some(result) = tasks.next().await {
        results.push(result?);
        bar.inc(1);
    }
    Ok(results)
}

/// The folders with debug files that are there.
pub(crate) fn debug_dirs(given: &[PathBuf]) -> Vec<PathBuf> {
    if given.is_empty() { vec![PathBuf::from(companions::DEBUG_DIR)] } else { given.to_vec() }
}
