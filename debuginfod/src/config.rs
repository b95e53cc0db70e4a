//! What the service is started with.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

/// Port of debuginfod servers by custom.
pub const DEFAULT_PORT: u16 = 8002;
/// Largest artefact accepted by default, in decoded bytes: 8 GiB, above the largest debuginfo seen in public
/// (browsers, 4 GiB), and what one upload may take of the temporary folder.
pub const DEFAULT_MAX_UPLOAD_BYTES: u64 = 8 << 30;

/// How to run the service. Only the data folder has no default.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Folder for the default catalog, the default storage and temporary files.
    pub data_dir: PathBuf,
    /// URL of the blob storage: `file:///...` or `s3://bucket/prefix`; by default the folder `blobs` of the
    /// data folder.
    pub storage: Option<String>,
    /// Catalog, `sqlite:PATH`; by default `catalog.sqlite` in the data folder.
    pub catalog: Option<String>,
    /// debuginfod servers to ask for what is not stored here.
    pub upstreams: Vec<String>,
    /// Token that writers must send. Required unless `listen` is a loopback address.
    pub token: Option<String>,
    /// Largest artefact accepted, in decoded bytes.
    pub max_upload_bytes: u64,
}

impl Config {
    /// Defaults: loopback, port 8002, everything in `data_dir`, no upstreams, no token.
    pub fn new(data_dir: PathBuf) -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_PORT)),
            data_dir,
            storage: None,
            catalog: None,
            upstreams: Vec::new(),
            token: None,
            max_upload_bytes: DEFAULT_MAX_UPLOAD_BYTES,
        }
    }
}
