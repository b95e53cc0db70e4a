//! A disk that is full, wherever it is: the sender is told so, nothing of the upload stays, and what fits is taken.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use reqwest::StatusCode;
use tempfile::TempDir;
use windlass_debuginfod::Config;

use crate::server::{Server, build};

/// A file system of its own in memory.
struct SmallDisk {
    folder: TempDir,
}

impl SmallDisk {
    /// `None` where this process may not mount.
    fn mount(bytes: u64) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let size = format!("size={bytes}");
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", &size, "windlass-test"]).arg(folder.path()).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self { folder });
        }
        eprintln!("skipped: a full disk, mounting tmpfs needs root");
        None
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Everything on it.
    fn files(&self) -> Vec<PathBuf> {
        let mut folders = vec![self.path().to_owned()];
        let mut files = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).expect("a folder") {
                let path = entry.expect("an entry").path();
                if path.is_dir() { folders.push(path) } else { files.push(path) }
            }
        }
        files.sort();
        files
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.path()).output();
    }
}

/// Bytes that zstd cannot shrink.
fn noise(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(size).collect()
}

/// What is on `disk` as `place` says, all else is elsewhere: 20 MB do not fit, 100 KB do. What is left of them when they are refused is
/// read on by the service, so that the answer arrives (`DRAIN_BYTES`).
async fn too_much_then_enough(disk: &SmallDisk, place: impl FnOnce(&mut Config)) {
    let server = Server::start_with(place).await;
    let before = disk.files();
    let name = format!("{}/source/large", build().id);
    let text = server.expect_put(&name, &noise(20 << 20), StatusCode::INSUFFICIENT_STORAGE).await;
    assert!(text.contains("nothing of this request was kept"), "{text}");
    // What a store had begun to write is removed behind the answer.
    let mut after = disk.files();
    for _ in 0..500 {
        if after == before {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        after = disk.files();
    }
    assert_eq!(after, before, "nothing half stored");
    assert_eq!(server.get(&format!("/buildid/{name}")).await.status(), StatusCode::NOT_FOUND);
    let small = noise(100_000);
    let name = format!("{}/source/small", build().id);
    server.expect_put(&name, &small, StatusCode::CREATED).await;
    let served = server.get(&format!("/buildid/{name}")).await.bytes().await.expect("all of it");
    assert!(served == small);
    server.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_that_do_not_fit_leave_nothing() {
    let Some(disk) = SmallDisk::mount(8 << 20) else { return };
    let url = reqwest::Url::from_directory_path(disk.path()).expect("an absolute path");
    too_much_then_enough(&disk, |config| config.storage = Some(url.into())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn scratch_that_does_not_fit_leaves_nothing() {
    let Some(disk) = SmallDisk::mount(8 << 20) else { return };
    let data = disk.path().to_owned();
    too_much_then_enough(&disk, |config| config.data_dir = data).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_catalog_that_does_not_fit_names_nothing() {
    let Some(disk) = SmallDisk::mount(2 << 20) else { return };
    let catalog = format!("sqlite:{}/catalog.sqlite", disk.path().display());
    let server = Server::start_with(|config| config.catalog = Some(catalog)).await;
    let filler = disk.path().join("filler");
    // As much as fits: the last write of it is cut short.
    let _ = std::fs::write(&filler, vec![1; 4 << 20]);
    let name = format!("{}/executable", build().id);
    let text = server.expect_put(&name, &build().full, StatusCode::INSUFFICIENT_STORAGE).await;
    assert!(text.contains("full"), "{text}");
    assert_eq!(server.get(&format!("/buildid/{name}")).await.status(), StatusCode::NOT_FOUND);
    std::fs::remove_file(&filler).expect("it is there");
    server.expect_put(&name, &build().full, StatusCode::CREATED).await;
    server.service.stop().await;
}
