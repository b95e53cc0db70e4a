//! What the service is started with.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::namespace::RELEASE;
use crate::quota::Quota;
use crate::retention::Retention;
use crate::tls::TlsFiles;

/// Port of debuginfod servers by custom.
pub const DEFAULT_PORT: u16 = 8002;
/// Largest artefact accepted by default, in decoded bytes: 8 GiB, above the largest debuginfo seen in public
/// (browsers, 4 GiB), and what one upload may take of the temporary folder.
pub const DEFAULT_MAX_UPLOAD_BYTES: u64 = 8 << 30;

/// How long an upstream may take to begin its answer, and be silent amid it, by default, in seconds: with two retries well under a
/// debuginfod client's 90.
pub const DEFAULT_UPSTREAM_DEADLINE: Duration = Duration::from_secs(5);

/// What copies of served contents may take of the temporary folder by default, in bytes: a distribution's most wanted few
/// hundred.
pub const DEFAULT_MAX_COPIES_BYTES: u64 = 4 << 30;

/// How long the audit log goes back by default, in days: a quarter.
pub const DEFAULT_AUDIT_DAYS: u64 = 90;

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
    /// How long each may take to begin its answer, and be silent amid it.
    pub upstream_deadline: Duration,
    /// Token that is good for everything, beside those of the catalog. Unless `listen` is a loopback address, there must be
    /// one of either.
    pub token: Option<String>,
    /// Whether reads need a token as well.
    pub private: bool,
    /// Namespaces of uploads, the most trusted first; all others come after them.
    pub namespaces: Vec<String>,
    /// Whether the last address in `X-Forwarded-For` is that of the client: only behind a proxy that sets it.
    pub trust_forwarded_for: bool,
    /// How long the audit log goes back, in days.
    pub audit_days: u64,
    /// Certificate and key, for `https`.
    pub tls: Option<TlsFiles>,
    /// Largest artefact accepted, in decoded bytes.
    pub max_upload_bytes: u64,
    /// What copies of served contents may take of the temporary folder, in bytes. A content of more than half of that is not copied.
    pub max_copies_bytes: u64,
    /// What namespaces may take; of several for one the last counts.
    pub quotas: Vec<Quota>,
    /// What is kept for how long, where it is collected.
    pub retention: Retention,
    /// How often the service collects by itself what nothing needs; never, if `None`.
    pub collect_every: Option<Duration>,
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
            upstream_deadline: DEFAULT_UPSTREAM_DEADLINE,
            token: None,
            private: false,
            namespaces: vec![RELEASE.to_owned()],
            trust_forwarded_for: false,
            audit_days: DEFAULT_AUDIT_DAYS,
            tls: None,
            max_upload_bytes: DEFAULT_MAX_UPLOAD_BYTES,
            max_copies_bytes: DEFAULT_MAX_COPIES_BYTES,
            quotas: Vec::new(),
            retention: Retention::default(),
            collect_every: None,
        }
    }
}
