//! Where do profiles wait while the service is away?
//!
//! In files of the cache directory, one for each batch, numbered in their order, so that they survive
//! the agent and are sent in the order of their making. Their number is bounded in bytes: at the limit
//! the oldest go, and are counted. Each running agent owns a numbered folder by a file lock, so that two
//! agents with one cache directory never send the same batch.

use std::collections::VecDeque;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// Most agents that share a cache directory.
const MAX_SPOOLS: u32 = 64;
/// Ending of a batch's file name: a request, compressed.
const ENDING: &str = "otlp.zst";
/// Start of the name of a file that is being written.
const UNFINISHED: &str = ".unfinished-";

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
    bytes: u64,
}

impl Spool {
    /// Opens the first folder under `parent` that no other agent holds, with the batches left there.
    pub fn open(parent: &Path, budget_bytes: u64) -> io::Result<Self> {
        for slot in 0..MAX_SPOOLS {
            let directory = parent.join(slot.to_string());
            fs::create_dir_all(&directory)?;
            let lock = File::create(directory.join("lock"))?;
            match lock.try_lock() {
                Ok(()) => return Self::read(directory, budget_bytes, lock),
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
                if ending != ENDING {
                    return None;
                }
                Some(Spooled { number: number.parse().ok()?, bytes: entry.metadata().ok()?.len() })
            })
            .collect();
        batches.sort_unstable_by_key(|batch| batch.number);
        let bytes = batches.iter().map(|batch| batch.bytes).sum();
        let next = batches.last().map_or(0, |batch| batch.number + 1);
        Ok(Self { directory, budget_bytes, batches: batches.into(), bytes, next, _lock: lock })
    }

    fn path(&self, number: u64) -> PathBuf {
        self.directory.join(format!("{number:020}.{ENDING}"))
    }

    /// Appends a batch. Returns how many older ones were dropped for it.
    pub fn push(&mut self, batch: &[u8]) -> io::Result<u64> {
        let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(&self.directory)?;
        file.write_all(batch)?;
        file.persist(self.path(self.next))?;
        self.batches.push_back(Spooled { number: self.next, bytes: batch.len() as u64 });
        self.bytes += batch.len() as u64;
        self.next += 1;
        let mut dropped = 0;
        while self.bytes > self.budget_bytes && self.batches.len() > 1 {
            self.pop();
            dropped += 1;
        }
        Ok(dropped)
    }

    /// The oldest batch.
    pub fn front(&self) -> Option<io::Result<Vec<u8>>> {
        self.batches.front().map(|batch| fs::read(self.path(batch.number)))
    }

    /// Deletes the oldest batch.
    pub fn pop(&mut self) {
        if let Some(batch) = self.batches.pop_front() {
            self.bytes -= batch.bytes;
            if let Err(error) = fs::remove_file(self.path(batch.number)) {
                tracing::warn!(%error, "spooled batch cannot be deleted and may be sent twice");
            }
        }
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

    fn drain(spool: &mut Spool) -> Vec<String> {
        let mut batches = Vec::new();
        while let Some(batch) = spool.front() {
            batches.push(String::from_utf8(batch.unwrap()).unwrap());
            spool.pop();
        }
        batches
    }

    #[test]
    fn batches_outlive_the_agent_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = Spool::open(directory.path(), 1 << 20).unwrap();
        for number in 0..12 {
            assert_eq!(spool.push(format!("batch {number}").as_bytes()).unwrap(), 0);
        }
        spool.pop();
        drop(spool);
        let mut spool = Spool::open(directory.path(), 1 << 20).unwrap();
        spool.push(b"later").unwrap();
        let mut expect: Vec<_> = (1..12).map(|number| format!("batch {number}")).collect();
        expect.push("later".to_owned());
        assert_eq!(drain(&mut spool), expect);
        assert!(spool.is_empty());
    }

    #[test]
    fn what_a_killed_agent_left_unfinished_goes() {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = Spool::open(directory.path(), 100).unwrap();
        spool.push(b"whole").unwrap();
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
        assert_eq!(spool.push(b"aaaa").unwrap(), 0);
        assert_eq!(spool.push(b"bbbb").unwrap(), 0);
        assert_eq!(spool.push(b"cccc").unwrap(), 1);
        // One that alone exceeds the limit is kept until the next.
        assert_eq!(spool.push(b"dddddddddddddddd").unwrap(), 2);
        assert_eq!(drain(&mut spool), ["dddddddddddddddd"]);
        assert_eq!(fs::read_dir(directory.path().join("0")).unwrap().count(), 1, "only the lock is left");
    }

    #[test]
    fn two_agents_do_not_share_a_folder() {
        let directory = tempfile::tempdir().unwrap();
        let mut first = Spool::open(directory.path(), 100).unwrap();
        let second = Spool::open(directory.path(), 100).unwrap();
        first.push(b"mine").unwrap();
        assert!(second.is_empty());
        drop((first, second));
        assert_eq!(Spool::open(directory.path(), 100).unwrap().len(), 1);
    }
}
