//! How do writes that come together share one commit?
//!
//! A commit is one `fsync` of the log, some milliseconds on most disks, and SQLite has one writer at a time: alone, three hundred
//! uploads a second is all there would be. Here each write runs in turn in a transaction that is open already, if there is one, and
//! leaves the commit to the next one that waits for its turn. The last commits for all, and each returns when
//! the commit has its changes on the disk, so what a return means is the same as without. A write that fails is
//! rolled back alone; a commit that fails is a failure of each write in it.
//!
//! Who waits for nobody commits at once: a single writer pays for itself only.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, ffi};

/// Most writes in one commit. Without a limit, the first of them would wait for as long as others keep coming.
const MAX_GROUP: usize = 256;

/// The one connection that writes.
pub(super) struct Writer {
    state: Mutex<State>,
    /// Writes that are about to lock the state, and will see what is open in it.
    waiting: AtomicUsize,
    settled: Condvar,
}

struct State {
    connection: Connection,
    /// Number of the group that is open or will be next.
    group: u64,
    /// Writes in the open transaction; without any, none is open.
    members: usize,
    /// Why SQLite gave the open transaction up by itself: a disk that is full, for example.
    broken: Option<rusqlite::Error>,
    /// Groups that failed, as long as not all who wait know it.
    failures: BTreeMap<u64, Failure>,
}

/// Why a commit failed, for several to report.
struct Failure {
    code: ffi::Error,
    text: String,
    /// Members that have not heard of it.
    unheard: usize,
}

fn failure(error: &rusqlite::Error, unheard: usize) -> Failure {
    let code = error.sqlite_error().copied().unwrap_or_else(|| ffi::Error::new(ffi::SQLITE_ERROR));
    Failure { code, text: error.to_string(), unheard }
}

fn report(failure: &Failure) -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(failure.code, Some(failure.text.clone()))
}

impl State {
    /// Runs `change` in the open transaction, or opens one. On failure nothing of it stays.
    fn join<T>(&mut self, change: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
        if self.members == 0 {
            self.connection.execute_batch("BEGIN IMMEDIATE")?;
        }
        self.members += 1;
        self.connection.execute_batch("SAVEPOINT change")?;
        let answer = catch_unwind(AssertUnwindSafe(|| change(&self.connection)));
        let undone = match &answer {
            Ok(Ok(_)) => self.connection.execute_batch("RELEASE change"),
            _ => self.connection.execute_batch("ROLLBACK TO change; RELEASE change"),
        };
        let answer = answer.unwrap_or_else(|panic| {
            // Whoever else is in this group hears that it failed.
            let _ = self.connection.execute_batch("ROLLBACK");
            self.members -= 1;
            resume_unwind(panic)
        });
        match answer {
            Err(error) if self.connection.is_autocommit() => {
                let known = report(&failure(&error, 0));
                self.broken = Some(error);
                Err(known)
            }
            answer => undone.and(answer),
        }
    }

    /// Ends the group, for better or worse.
    fn settle(&mut self) {
        let committed = match self.broken.take() {
            Some(error) => Err(error),
            None => self.connection.execute_batch("COMMIT"),
        };
        if let Err(error) = committed {
            if !self.connection.is_autocommit() {
                let _ = self.connection.execute_batch("ROLLBACK");
            }
            self.failures.insert(self.group, failure(&error, self.members));
        }
        self.group += 1;
        self.members = 0;
    }

    /// What a member of the group is told after it settled.
    fn outcome(&mut self, group: u64) -> rusqlite::Result<()> {
        let Some(failure) = self.failures.get_mut(&group) else { return Ok(()) };
        let error = report(failure);
        failure.unheard -= 1;
        if failure.unheard == 0 {
            self.failures.remove(&group);
        }
        Err(error)
    }
}

impl Writer {
    pub(super) fn new(connection: Connection) -> Self {
        let state = State { connection, group: 1, members: 0, broken: None, failures: BTreeMap::new() };
        Self { state: Mutex::new(state), waiting: AtomicUsize::new(0), settled: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        state
    }

    /// Makes `change`. When this returns `Ok`, it is durable.
    pub(super) fn write<T>(
        &self,
        change: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let mut turn = Turn { writer: self, state: Some(self.lock()) };
        let (group, before) = (turn.state().group, turn.state().members);
        let answer = turn.state().join(change);
        let is_member = turn.state().members > before;
        drop(turn);
        if !is_member {
            return answer; // not even a transaction could be opened
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.group == group {
            state = self.settled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.outcome(group).and(answer)
    }
}

/// A write's turn. Its end settles the group if nobody else will, also if the write panics.
struct Turn<'a> {
    writer: &'a Writer,
    state: Option<MutexGuard<'a, State>>,
}

impl Turn<'_> {
    fn state(&mut self) -> &mut State {
        self.state.as_mut().expect("taken by drop alone")
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let Some(mut state) = self.state.take() else { return };
        let is_last = self.writer.waiting.load(Ordering::SeqCst) == 0;
        let is_gone = state.connection.is_autocommit();
        if state.members > 0 && (is_last || is_gone || state.members >= MAX_GROUP) {
            state.settle();
            self.writer.settled.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn writer(path: &Path) -> Writer {
        let connection = Connection::open(path).expect("a folder that can be written");
        connection
            .execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE t (n INTEGER PRIMARY KEY) STRICT")
            .expect("a new database");
        Writer::new(connection)
    }

    fn insert(n: i64) -> impl FnOnce(&Connection) -> rusqlite::Result<usize> {
        move |connection| connection.execute("INSERT INTO t VALUES (?)", [n])
    }

    fn rows(path: &Path) -> Vec<i64> {
        let connection = Connection::open(path).expect("the same database");
        let mut statement = connection.prepare("SELECT n FROM t ORDER BY n").expect("the table");
        statement.query_map([], |row| row.get(0)).expect("rows").map(|n| n.expect("an integer")).collect()
    }

    type Write = Box<dyn FnOnce(&Writer) -> rusqlite::Result<usize> + Send>;

    /// Starts writes while the state is locked, so that all are waiting when the first has its turn.
    fn together(writer: &Writer, writes: Vec<Write>) -> Vec<std::thread::Result<rusqlite::Result<usize>>> {
        let count = writes.len();
        std::thread::scope(|scope| {
            let state = writer.state.lock().expect("nobody panicked yet");
            let threads: Vec<_> =
                writes.into_iter().map(|write| scope.spawn(move || write(writer))).collect();
            while writer.waiting.load(Ordering::SeqCst) < count {
                std::thread::yield_now();
            }
            drop(state);
            threads.into_iter().map(|thread| thread.join()).collect()
        })
    }

    #[test]
    fn those_who_wait_are_committed_together_and_the_bad_ones_alone_fail() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("db");
        let writer = writer(&path);
        assert_eq!(writer.write(insert(100)).expect("alone"), 1);
        let writes = (0..20).map(|n| {
            // Each third one breaks a constraint after a change of its own.
            let write = move |writer: &Writer| {
                writer.write(|connection| {
                    insert(n)(connection)?;
                    if n % 3 == 0 { insert(100)(connection) } else { Ok(1usize) }
                })
            };
            Box::new(write) as Write
        });
        let outcomes = together(&writer, writes.collect());
        for (n, outcome) in outcomes.into_iter().enumerate() {
            assert_eq!(outcome.expect("no panic").is_ok(), n % 3 != 0, "{n}");
        }
        let expect: Vec<i64> = (0..20).filter(|n| n % 3 != 0).chain([100]).collect();
        assert_eq!(rows(&path), expect);
        assert_eq!(writer.state.lock().expect("sound").group, 3, "two groups: one alone, and the others");
    }

    #[test]
    fn a_commit_that_fails_fails_for_all_and_for_nobody_later() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("db");
        let writer = writer(&path);
        let writes = (0..10).map(|n| {
            let write = move |writer: &Writer| {
                writer.write(|connection| {
                    insert(n)(connection)?;
                    // As SQLite does when the disk is full.
                    if n == 5 {
                        connection.execute_batch("ROLLBACK")?;
                        return Err(rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_FULL), None));
                    }
                    Ok(1usize)
                })
            };
            Box::new(write) as Write
        });
        let mut stored = Vec::new();
        for (n, outcome) in together(&writer, writes.collect()).into_iter().enumerate() {
            match outcome.expect("no panic") {
                Ok(_) => stored.push(n as i64),
                Err(error) => assert_eq!(error.sqlite_error_code(), Some(rusqlite::ErrorCode::DiskFull)),
            }
        }
        assert!(!stored.contains(&5));
        assert_eq!(rows(&path), stored, "what was acknowledged is there, and nothing else");
        writer.write(insert(50)).expect("room again");
        assert!(writer.state.lock().expect("sound").failures.is_empty(), "all heard of it");
    }

    #[test]
    fn a_panic_is_not_acknowledged_to_others() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("db");
        let writer = writer(&path);
        let writes = (0..6).map(|n| {
            let write = move |writer: &Writer| {
                writer.write(|connection| {
                    assert_ne!(n, 3, "on purpose");
                    insert(n)(connection)
                })
            };
            Box::new(write) as Write
        });
        let outcomes = together(&writer, writes.collect());
        let stored: Vec<i64> = (0..6).filter(|n| matches!(outcomes[*n as usize], Ok(Ok(_)))).collect();
        assert!(outcomes[3].is_err());
        assert_eq!(rows(&path), stored);
        writer.write(insert(50)).expect("goes on");
    }
}
