//! Which store is behind a URL?

use std::fs::File;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use reqwest::Url;

use super::{BlobError, Expected};

/// The folder of a file URL.
pub(super) fn local_root(url: &str) -> Option<PathBuf> {
    Url::parse(url).ok().filter(|url| url.scheme() == "file")?.to_file_path().ok()
}

/// Creates the folders that blobs are in, so that no upload has to: one that finds a folder which another is just creating
/// does not wait until its name is durable.
pub(super) fn create_folders(root: &FilePath) -> std::io::Result<()> {
    let mut created = false;
    for byte in 0..=u8::MAX {
        match std::fs::create_dir(root.join(format!("{byte:02x}"))) {
            Ok(()) => created = true,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    if created { File::open(root)?.sync_all() } else { Ok(()) }
}

/// The store behind `url`, and the path in it. The folder of a file URL is created only if nothing is expected there.
pub(super) fn connect(url: &str, expected: Expected) -> Result<(Arc<dyn ObjectStore>, Path), BlobError> {
    let fail = |why: &dyn ToString| BlobError::Storage { url: url.to_owned(), why: why.to_string() };
    let parsed = Url::parse(url).map_err(|e| fail(&e))?;
    if parsed.scheme() == "file" {
        let root = parsed.to_file_path().map_err(|()| fail(&"not an absolute path"))?;
        match expected {
            Expected::New => std::fs::create_dir_all(&root).map_err(|e| fail(&e))?,
            Expected::Marked if !root.try_exists().map_err(|e| fail(&e))? => {
                return Err(BlobError::Away { url: url.to_owned() });
            }
            Expected::Marked => {}
        }
        let store = LocalFileSystem::new_with_prefix(root)?.with_fsync(true);
        return Ok((Arc::new(store), Path::default()));
    }
    let environment = std::env::vars().map(|(key, value)| (key.to_ascii_lowercase(), value));
    let (store, prefix) = object_store::parse_url_opts(&parsed, environment).map_err(|e| fail(&e))?;
    Ok((store.into(), prefix))
}
