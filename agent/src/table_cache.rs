//! Which tables are on this host's disk?
//!
//! One file for each build-ID, `ID.wluw`, as it came from the service: in its wire form, a sixth of the table. A table is
//! unpacked and checked to the last byte both on its way in and on its way out (checksum, build-ID, instruction
//! set), so that neither a torn write nor a bad disk becomes a wrong frame; what does not pass is deleted and fetched anew. A
//! file appears under its name only when it is complete. Beside it, `ID.etag` has the service's tag of it, and its time
//! says when the service was last asked; without, it was never asked. When all of them exceed the budget, those
//! used longest ago go first.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use windlass_schema::Architecture;
use windlass_schema::wire::{self, WIRE_MAGIC, WireError};
use windlass_schema::{BuildId, TableError, TableFile};

use crate::metrics::Metrics;

/// Ending of a table's file name.
const ENDING: &str = "wluw";
/// Ending of the name of the file with its tag.
const TAG_ENDING: &str = "etag";
/// Longest tag that is kept, in bytes: that of the service has 78.
const MAX_TAG_BYTES: usize = 256;
/// Start of the name of a file that is being written.
const UNFINISHED: &str = ".unfinished-";

/// The instruction set of this machine.
pub const HOST_ARCHITECTURE: Architecture =
    if cfg!(target_arch = "aarch64") { Architecture::Aarch64 } else { Architecture::X86_64 };

/// Tables on disk.
pub struct TableCache {
    directory: PathBuf,
    budget_bytes: u64,
    metrics: Arc<Metrics>,
}

/// A table was not taken.
#[derive(Debug, thiserror::Error)]
pub enum TableCacheError {
    /// Malformed.
    #[error(transparent)]
    Table(#[from] TableError),
    /// Malformed on the outside.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Of another image.
    #[error("unwind table is that of image {0}")]
    BuildId(BuildId),
    /// For another machine.
    #[error("unwind table for {}, expected {}", .0.as_str(), HOST_ARCHITECTURE.as_str())]
    Architecture(Architecture),
    /// The disk.
    #[error("unwind table cache {0}: {1}")]
    Io(PathBuf, io::Error),
}

/// By what the service can tell whether it has another table than the one that is here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Validator {
    /// Its tag, if there was one.
    pub tag: Option<String>,
    /// When the service was last asked, if it ever was.
    pub asked: Option<SystemTime>,
}

/// The table file of `id` for this machine that travelled as `bytes`, checked.
fn unpack(bytes: &[u8], id: BuildId) -> Result<TableFile, TableCacheError> {
    let file = if bytes.starts_with(&WIRE_MAGIC) { wire::unpack(bytes)? } else { bytes.to_vec() };
    let file = TableFile::parse(file)?;
    let table = file.table();
    if table.build_id() != id {
        return Err(TableCacheError::BuildId(table.build_id()));
    }
    if table.architecture() != HOST_ARCHITECTURE {
        return Err(TableCacheError::Architecture(table.architecture()));
    }
    Ok(file)
}

/// Whether this can be sent as an entity tag.
fn is_tag(tag: &str) -> bool {
    (1..=MAX_TAG_BYTES).contains(&tag.len()) && tag.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Deletes a file that need not be there.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl TableCache {
    /// Opens or makes the cache in `directory`; `metrics` counts evictions.
    pub fn open(directory: &Path, budget_bytes: u64, metrics: Arc<Metrics>) -> Result<Self, TableCacheError> {
        let cache = Self { directory: directory.to_owned(), budget_bytes, metrics };
        fs::create_dir_all(directory).map_err(|error| cache.io(error))?;
        for entry in fs::read_dir(directory).map_err(|error| cache.io(error))?.flatten() {
            // Left by an agent that was killed; one that runs beside this one merely writes it again.
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(cache)
    }

    fn io(&self, error: io::Error) -> TableCacheError {
        TableCacheError::Io(self.directory.clone(), error)
    }

    fn path(&self, id: BuildId) -> PathBuf {
        self.directory.join(format!("{id}.{ENDING}"))
    }

    fn tag_path(&self, id: BuildId) -> PathBuf {
        self.directory.join(format!("{id}.{TAG_ENDING}"))
    }

    /// The table file of `id`, checked; `None` if there is none that passes.
    pub fn get(&self, id: BuildId) -> Option<TableFile> {
        let path = self.path(id);
        let bytes = fs::read(&path).ok()?;
        let table = match unpack(&bytes, id) {
            Ok(table) => table,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cached unwind table is damaged, fetching it again");
                let _ = remove(&self.tag_path(id)).and_then(|()| remove(&path));
                return None;
            }
        };
        // Marks it as used; where that fails it is merely evicted sooner.
        let _ = fs::File::options()
            .append(true)
            .open(&path)
            .and_then(|file| file.set_modified(SystemTime::now()));
        Some(table)
    }

    /// What is known of the table of `id`, if there is one.
    pub fn validator(&self, id: BuildId) -> Option<Validator> {
        self.path(id).exists().then_some(())?;
        let path = self.tag_path(id);
        let asked = fs::metadata(&path).and_then(|metadata| metadata.modified()).ok();
        let tag = fs::read_to_string(&path).ok().filter(|tag| is_tag(tag));
        Some(Validator { tag, asked })
    }

    /// Takes note that the table of `id` is still the service's.
    pub fn confirm(&self, id: BuildId) {
        let confirmed = fs::File::options()
            .append(true)
            .open(self.tag_path(id))
            .and_then(|file| file.set_modified(SystemTime::now()));
        if let Err(error) = confirmed {
            tracing::debug!(error = %self.io(error), "unwind table is asked for sooner than need be");
        }
    }

    /// Puts what came in the place of the table of `id`, and gives it, if it is another one. What does not pass
    /// replaces nothing.
    pub fn replace(
        &self,
        id: BuildId,
        bytes: &[u8],
        tag: Option<&str>,
    ) -> Result<Option<TableFile>, TableCacheError> {
        let is_same = fs::read(self.path(id)).is_ok_and(|known| known == bytes);
        let table = self.put(id, bytes, tag)?;
        Ok((!is_same).then_some(table))
    }

    /// Checks what came as the table of `id`, keeps it with the service's tag of it, and gives the table file. That the disk
    /// does not take it is said in the log: it is merely fetched again some day.
    pub fn put(&self, id: BuildId, bytes: &[u8], tag: Option<&str>) -> Result<TableFile, TableCacheError> {
        let table = unpack(bytes, id)?;
        let write_file = |path: &Path, bytes: &[u8]| {
            let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(&self.directory)?;
            file.write_all(bytes)?;
            file.persist(path).map(drop).map_err(io::Error::from)
        };
        let write = || {
            // First, so that no tag is ever beside the table of another.
            remove(&self.tag_path(id))?;
            write_file(&self.path(id), bytes)?;
            write_file(&self.tag_path(id), tag.filter(|tag| is_tag(tag)).unwrap_or_default().as_bytes())?;
            self.evict()
        };
        if let Err(error) = write() {
            tracing::warn!(error = %self.io(error), "unwind table is not kept on disk");
        }
        Ok(table)
    }

    /// Deletes what was used longest ago until the rest is within the budget.
    fn evict(&self) -> io::Result<()> {
        let mut tables: Vec<(SystemTime, u64, PathBuf)> = fs::read_dir(&self.directory)?
            .flatten()
            .filter(|entry| entry.path().extension().is_some_and(|ending| ending == ENDING))
            .filter_map(|entry| {
                let metadata = entry.metadata().ok()?;
                Some((metadata.modified().ok()?, metadata.len(), entry.path()))
            })
            .collect();
        let mut total: u64 = tables.iter().map(|(_, bytes, _)| bytes).sum();
        tables.sort_unstable();
        for (_, bytes, path) in tables {
            if total <= self.budget_bytes {
                break;
            }
            remove(&path.with_extension(TAG_ENDING))?;
            fs::remove_file(path)?;
            self.metrics.table_evicted();
            total -= bytes;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use windlass_schema::table::{HEADER_BYTES, MAGIC, VERSION, checksum};

    /// A table of `id` without a row.
    fn empty_table(id: BuildId) -> Vec<u8> {
        let mut file = vec![0; HEADER_BYTES];
        file[..4].copy_from_slice(&MAGIC);
        file[4..6].copy_from_slice(&VERSION.to_le_bytes());
        file[6] = HOST_ARCHITECTURE as u8;
        file[40] = id.as_bytes().len() as u8;
        file[41..41 + id.as_bytes().len()].copy_from_slice(id.as_bytes());
        let sum = checksum(&file);
        file[8..16].copy_from_slice(&sum.to_le_bytes());
        file
    }

    /// As it travels.
    fn empty_wire(id: BuildId) -> Vec<u8> {
        wire::pack(&empty_table(id)).unwrap()
    }

    fn id(number: u16) -> BuildId {
        BuildId::new(&number.to_be_bytes()).unwrap()
    }

    #[test]
    fn a_table_comes_back_and_a_damaged_one_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let cache = TableCache::open(directory.path(), 1 << 20, Arc::default()).unwrap();
        assert_eq!(cache.get(id(1)), None);
        let table = TableFile::parse(empty_table(id(1))).unwrap();
        let wire = empty_wire(id(1));
        assert_eq!(cache.put(id(1), &wire, None).unwrap(), table);
        assert_eq!(cache.get(id(1)), Some(table.clone()));
        let path = cache.path(id(1));
        for at in 0..wire.len() {
            let mut damaged = wire.clone();
            damaged[at] ^= 1;
            fs::write(&path, &damaged).unwrap();
            assert_eq!(cache.get(id(1)), None, "byte {at}");
            assert!(!path.exists(), "a damaged table stays on disk");
            fs::write(&path, &wire[..at]).unwrap();
            assert_eq!(cache.get(id(1)), None, "{at} bytes");
        }
        fs::write(cache.path(id(2)), &wire).unwrap();
        assert_eq!(cache.get(id(2)), None, "the table of another image");
    }

    #[test]
    fn a_table_has_its_own_tag_or_none() {
        let directory = tempfile::tempdir().unwrap();
        let cache = TableCache::open(directory.path(), 1 << 20, Arc::default()).unwrap();
        assert_eq!(cache.validator(id(1)), None);
        let (one, other) = (empty_wire(id(1)), empty_table(id(1)));
        cache.put(id(1), &one, Some("\"a\"")).unwrap();
        let tag = || cache.validator(id(1)).unwrap().tag;
        assert_eq!(tag().as_deref(), Some("\"a\""));
        let past = SystemTime::now() - Duration::from_secs(1000);
        fs::File::options().append(true).open(cache.tag_path(id(1))).unwrap().set_modified(past).unwrap();
        assert_eq!(cache.validator(id(1)).unwrap().asked, Some(past));
        cache.confirm(id(1));
        assert!(cache.validator(id(1)).unwrap().asked.unwrap() > past);

        // What does not pass replaces neither.
        assert!(cache.replace(id(1), &empty_wire(id(2)), Some("\"b\"")).is_err());
        assert_eq!(tag().as_deref(), Some("\"a\""));
        assert_eq!(cache.replace(id(1), &one, Some("\"b\"")).unwrap(), None, "the same table");
        assert_eq!(tag().as_deref(), Some("\"b\""));
        assert!(cache.replace(id(1), &other, None).unwrap().is_some());
        assert_eq!(tag(), None);
        for unfit in ["", "a\nb", &"x".repeat(MAX_TAG_BYTES + 1)] {
            cache.put(id(1), &one, Some(unfit)).unwrap();
            assert_eq!(tag(), None, "{unfit:?}");
        }
        fs::write(cache.path(id(1)), b"x").unwrap();
        assert_eq!(cache.get(id(1)), None);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn only_the_right_table_goes_in() {
        let directory = tempfile::tempdir().unwrap();
        let cache = TableCache::open(directory.path(), 1 << 20, Arc::default()).unwrap();
        assert!(matches!(cache.put(id(1), b"WLUT", None), Err(TableCacheError::Table(_))));
        assert!(matches!(cache.put(id(1), &WIRE_MAGIC, None), Err(TableCacheError::Wire(_))));
        assert!(matches!(cache.put(id(1), &empty_wire(id(2)), None), Err(TableCacheError::BuildId(_))));
        let mut other = empty_table(id(1));
        other[6] = 3 - HOST_ARCHITECTURE as u8;
        // The checksum starts behind the architecture, so the bytes are still a sound table.
        assert!(matches!(cache.put(id(1), &other, None), Err(TableCacheError::Architecture(_))));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_was_used_longest_ago_is_evicted() {
        let directory = tempfile::tempdir().unwrap();
        let metrics: Arc<Metrics> = Arc::default();
        let size = empty_wire(id(1)).len() as u64;
        let cache = TableCache::open(directory.path(), 3 * size, metrics.clone()).unwrap();
        for number in 1..=3 {
            cache.put(id(number), &empty_wire(id(number)), None).unwrap();
            let age = Duration::from_secs(100 - u64::from(number));
            let file = fs::File::options().append(true).open(cache.path(id(number))).unwrap();
            file.set_modified(SystemTime::now() - age).unwrap();
        }
        assert!(cache.get(id(1)).is_some(), "used now");
        cache.put(id(4), &empty_wire(id(4)), None).unwrap();
        let left: Vec<bool> = (1..=4).map(|number| cache.get(id(number)).is_some()).collect();
        assert_eq!(left, [true, false, true, true]);
        assert!(metrics.text().contains("windlass_agent_tables_evicted_total 1\n"));
    }

    #[test]
    fn unfinished_files_of_a_killed_agent_go() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(format!("{UNFINISHED}abc")), b"x").unwrap();
        TableCache::open(directory.path(), 1, Arc::default()).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
