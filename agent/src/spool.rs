//! Where do profiles wait while the service is away?
//!
//! In files of the cache directory, one for each batch, numbered in their order, so that they survive
//! the agent and are sent in the order of their making. Their number is bounded in bytes: at the limit
//! the oldest go, and are counted. Each running agent owns a numbered folder by a file lock, so that two
//! agents with one cache directory never send the same batch. What an agent left in a folder that nobody owns any more
//! goes behind what the next agent that starts has itself, as far as there is room.

use std::collections::VecDeque;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::compression::Compression;

/// Most agents that share a cache directory.
const MAX_SPOOLS: u32 = 64;
/// What a batch's file name has between its number and the ending of its [coding](Compression::ending).
const KIND: &str = "otlp";
/// Start of the name of a file that is being written.
const UNFINISHED: &str = ".unfinished-";

/// An encoded OTLP request, compressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedBatch {
    /// How.
    pub compression: Compression,
    /// The result.
    pub bytes: Bytes,
}

/// Batches on disk, oldest first.
pub struct Spool {
    directory: PathBuf,
    budget_bytes: u64,
    batches: VecDeque<Spooled>,
    bytes: u64,
    next: u64,
    // Held until the end.
    _lock: File,
}

#[derive(Clone, Copy, Debug)]
struct Spooled {
    number: u64,
    compression: Compression,
    bytes: u64,
}

impl Spool {
    /// Opens the first folder under `parent` that no other agent holds, with the batches left there and in others that
    /// nobody holds.
    pub fn open(parent: &Path, budget_bytes: u64) -> io::Result<Self> {
        for slot in 0..MAX_SPOOLS {
            let directory = parent.join(slot.to_string());
            fs::create_dir_all(&directory)?;
            let lock = File::create(directory.join("lock"))?;
            match lock.try_lock() {
                Ok(()) => {
                    let mut spool = Self::read(directory, budget_bytes, lock)?;
                    for other in slot + 1..MAX_SPOOLS {
                        let other = parent.join(other.to_string());
                        // One of another user's, or a broken one, is no reason not to start.
                        if let Err(error) = spool.adopt(&other) {
                            tracing::warn!(%error, folder = %other.display(), "profiles that another agent left are not sent");
                        }
                    }
                    return Ok(spool);
                }
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
        Err(io::Error::other(format!("{MAX_SPOOLS} agents already share {}", parent.display())))
    }

    fn read(directory: PathBuf, budget_bytes: u64, lock: File) -> io::Result<Self> {
        let mut batches: Vec<Spooled> = fs::read_dir(&directory)?
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let name = name.to_str()?;
                if name.starts_with(UNFINISHED) {
                    // Left by an agent that was killed: whoever holds the lock writes alone.
                    let _ = fs::remove_file(entry.path());
                }
                let (number, ending) = name.split_once('.')?;
                let ending = ending.strip_prefix(KIND)?.strip_prefix('.')?;
                // An agent may be started with another choice than the last.
                let compression = Compression::ALL.into_iter().find(|known| known.ending() == ending)?;
                let bytes = entry.metadata().ok()?.len();
                Some(Spooled { number: number.parse().ok()?, compression, bytes })
            })
            .collect();
        batches.sort_unstable_by_key(|batch| batch.number);
        let bytes = batches.iter().map(|batch| batch.bytes).sum();
        let next = batches.last().map_or(0, |batch| batch.number + 1);
        Ok(Self { directory, budget_bytes, batches: batches.into(), bytes, next, _lock: lock })
    }

    /// Takes over what lies in another folder, if nobody holds that: the oldest first, as far as there is room.
    fn adopt(&mut self, directory: &Path) -> io::Result<()> {
        let lock = match File::options().write(true).open(directory.join("lock")) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(()),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let other = Self::read(directory.to_owned(), self.budget_bytes, lock)?;
        let mut adopted = 0;
        for batch in &other.batches {
            if self.bytes + batch.bytes > self.budget_bytes {
                break;
            }
            let own = Spooled { number: self.next, ..*batch };
            fs::rename(other.path(*batch), self.path(own))?;
            self.batches.push_back(own);
            self.bytes += own.bytes;
            self.next += 1;
            adopted += 1;
        }
        let left = other.batches.len() - adopted;
        if adopted + left > 0 {
            tracing::info!(adopted, left, folder = %directory.display(), "another agent left profiles");
        }
        Ok(())
    }

    fn path(&self, batch: Spooled) -> PathBuf {
        self.directory.join(format!("{:020}.{KIND}.{}", batch.number, batch.compression.ending()))
    }

    /// Appends a batch. Returns how many older ones were dropped for it.
    pub fn push(&mut self, batch: &EncodedBatch) -> io::Result<u64> {
        let EncodedBatch { compression, bytes } = batch;
        let spooled = Spooled { number: self.next, compression: *compression, bytes: bytes.len() as u64 };
        let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(&self.directory)?;
        file.write_all(bytes)?;
        file.persist(self.path(spooled))?;
        self.batches.push_back(spooled);
        self.bytes += spooled.bytes;
        self.next += 1;
        let mut dropped = 0;
        while self.bytes > self.budget_bytes && self.batches.len() > 1 {
            self.remove(0);
            dropped += 1;
        }
        Ok(dropped)
    }

    /// A batch by its place in the line; the oldest has 0.
    pub fn get(&self, place: usize) -> Option<io::Result<EncodedBatch>> {
        self.batches.get(place).map(|batch| {
            let bytes = fs::read(self.path(*batch))?.into();
            Ok(EncodedBatch { compression: batch.compression, bytes })
        })
    }

    /// Deletes a batch by its place in the line.
    pub fn remove(&mut self, place: usize) {
        if let Some(batch) = self.batches.remove(place) {
            self.bytes -= batch.bytes;
            if let Err(error) = fs::remove_file(self.path(batch)) {
                tracing::warn!(%error, "spooled batch cannot be deleted and may be sent twice");
            }
        }
    }

    /// Bytes that they take together.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Batches that wait.
    pub fn len(&self) -> usize {
        self.batches.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(text: impl AsRef<str>) -> EncodedBatch {
        let bytes = Bytes::copy_from_slice(text.as_ref().as_bytes());
        EncodedBatch { compression: Compression::Zstd, bytes }
    }

    fn drain(spool: &mut Spool) -> Vec<String> {
        let mut batches = Vec::new();
        while let Some(batch) = spool.get(0) {
            batches.push(String::from_utf8(batch.unwrap().bytes.to_vec()).unwrap());
            spool.remove(0);
        }
        batches
    }

    #[test]
    fn batches_outlive_the_agent_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = Spool::open(directory.path(), 1 << 20).unwrap();
        for number in 0..12 {
            assert_eq!(spool.push(&batch(format!("batch {number}"))).unwrap(), 0);
        }
        spool.remove(0);
        drop(spool);
        let mut spool = Spool::open(directory.path(), 1 << 20).unwrap();
        spool.push(&batch("later")).unwrap();
        let mut expect: Vec<_> = (1..12).map(|number| format!("batch {number}")).collect();
        expect.push("later".to_owned());
        assert_eq!(drain(&mut spool), expect);
        assert!(spool.is_empty());
    }

    #[test]
    fn batches_of_either_coding_come_back_as_they_were() {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = Spool::open(directory.path(), 1 << 20).unwrap();
        let batches = Compression::ALL.map(|compression| EncodedBatch { compression, ..batch("one") });
        for batch in &batches {
            spool.push(batch).unwrap();
        }
        assert_eq!(spool.bytes(), 6);
        drop(spool);
        let mut spool = Spool::open(directory.path(), 1 << 20).unwrap();
        for batch in batches {
            assert_eq!(spool.get(0).unwrap().unwrap(), batch);
            spool.remove(0);
        }
        assert_eq!((spool.bytes(), spool.is_empty()), (0, true));
    }

    #[test]
    fn what_a_killed_agent_left_unfinished_goes() {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = Spool::open(directory.path(), 100).unwrap();
        spool.push(&batch("whole")).unwrap();
        let unfinished = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(directory.path().join("0"));
        let (_, path) = unfinished.unwrap().keep().unwrap();
        drop(spool);
        let mut spool = Spool::open(directory.path(), 100).unwrap();
        assert!(!path.exists());
        assert_eq!(drain(&mut spool), ["whole"]);
    }

    #[test]
    fn the_oldest_go_at_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = Spool::open(directory.path(), 10).unwrap();
        assert_eq!(spool.push(&batch("aaaa")).unwrap(), 0);
        assert_eq!(spool.push(&batch("bbbb")).unwrap(), 0);
        assert_eq!(spool.push(&batch("cccc")).unwrap(), 1);
        // One that alone exceeds the limit is kept until the next.
        assert_eq!(spool.push(&batch("dddddddddddddddd")).unwrap(), 2);
        assert_eq!(drain(&mut spool), ["dddddddddddddddd"]);
        assert_eq!(fs::read_dir(directory.path().join("0")).unwrap().count(), 1, "only the lock is left");
    }

    #[test]
    fn two_agents_do_not_share_a_folder() {
        let directory = tempfile::tempdir().unwrap();
        let mut first = Spool::open(directory.path(), 100).unwrap();
        let second = Spool::open(directory.path(), 100).unwrap();
        first.push(&batch("mine")).unwrap();
        assert!(second.is_empty());
        drop((first, second));
        assert_eq!(Spool::open(directory.path(), 100).unwrap().len(), 1);
    }

    #[test]
    fn what_another_agent_left_goes_behind_what_is_ones_own() {
        let directory = tempfile::tempdir().unwrap();
        let mut agents: Vec<_> = (0..3).map(|_| Spool::open(directory.path(), 16).unwrap()).collect();
        for (agent, text) in [(0, "own0"), (1, "his0"), (2, "her0"), (1, "his1"), (2, "her1")] {
            agents[agent].push(&batch(text)).unwrap();
        }
        let second = agents.remove(1);
        drop(agents);
        // The second runs still; of the third's there is room for all.
        let mut first = Spool::open(directory.path(), 16).unwrap();
        assert_eq!((first.len(), first.bytes()), (3, 12));
        drop((first, second));
        first = Spool::open(directory.path(), 16).unwrap();
        assert_eq!(drain(&mut first), ["own0", "her0", "her1", "his0"]);
        drop(first);
        // What had no room then.
        assert_eq!(drain(&mut Spool::open(directory.path(), 16).unwrap()), ["his1"]);
    }
}
