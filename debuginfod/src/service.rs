//! The running service: its parts, its start and its stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use crate::access::Access;
use crate::blob::{BlobError, BlobStore, Expected, scratch_folder};
use crate::catalog::{Artefact, Catalog, CatalogError, SqliteCatalog};
use crate::config::Config;
use crate::connection::{Shutdown, accept};
use crate::content_hash::ContentHash;
use crate::derive::Derivations;
use crate::error::ServiceError;
use crate::memory::MemoryBudget;
use crate::metrics::Metrics;
use crate::routes;
use crate::symbols::Indexes;
use crate::upstream::{Upstreams, UpstreamsError};

/// How long answers under way may take to finish at a stop, in seconds. Their clients are then reset and try
/// again elsewhere or later.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// The service could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Everyone on the network could write.
    #[error(
        "{0} is not a loopback address, and without a token everyone there could upload: \
         give --token-file FILE, or listen on 127.0.0.1"
    )]
    OpenWithoutToken(SocketAddr),
    /// A token that no client could send.
    #[error("the token is empty or not printable ASCII")]
    Token,
    /// The data folder.
    #[error("data folder {path:?}: {error}")]
    DataFolder {
        /// As configured.
        path: std::path::PathBuf,
        /// What failed.
        error: std::io::Error,
    },
    /// The address.
    #[error("listening on {address}: {error}")]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// What failed.
        error: std::io::Error,
    },
    /// The blob storage.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The catalog.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The upstream servers.
    #[error(transparent)]
    Upstreams(#[from] UpstreamsError),
}

/// What requests share.
pub struct App {
    catalog: Arc<dyn Catalog>,
    pub(crate) blobs: BlobStore,
    pub(crate) access: Access,
    pub(crate) upstreams: Upstreams,
    pub(crate) derivations: Derivations,
    pub(crate) indexes: Indexes,
    pub(crate) metrics: Metrics,
    pub(crate) max_upload_bytes: u64,
    /// Compilations and conversions at once: as many as there are processors.
    pub(crate) compute: Semaphore,
    /// Memory of requests being decoded.
    pub(crate) decoding: MemoryBudget,
    /// Memory of merges.
    pub(crate) merging: MemoryBudget,
}

impl App {
    /// Opens the storage and the catalog that `config` names.
    pub(crate) async fn open(config: &Config) -> Result<Self, StartError> {
        let folder = |error| StartError::DataFolder { path: config.data_dir.clone(), error };
        let scratch = scratch_folder(&config.data_dir).map_err(folder)?;
        let data = std::fs::canonicalize(&config.data_dir).map_err(folder)?;
        let storage = match &config.storage {
            Some(url) => url.clone(),
            None => reqwest::Url::from_directory_path(data.join("blobs"))
                .expect("a canonical path is absolute")
                .into(),
        };
        let catalog = match &config.catalog {
            Some(url) => SqliteCatalog::open_url(url)?,
            None => SqliteCatalog::open(&data.join("catalog.sqlite"))?,
        };
        // An empty catalog has nothing to miss: it is the first start, or the first before an upload.
        let expected = if catalog.blobs(None, 1)?.is_empty() { Expected::New } else { Expected::Marked };
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            catalog: Arc::new(catalog),
            blobs: BlobStore::open(&storage, scratch, expected).await?,
            access: Access::new(config.token.as_deref()),
            upstreams: Upstreams::new(&config.upstreams)?,
            derivations: Derivations::default(),
            indexes: Indexes::default(),
            metrics: Metrics::default(),
            max_upload_bytes: config.max_upload_bytes,
            compute: Semaphore::new(processors),
            decoding: MemoryBudget::for_decoding(),
            merging: MemoryBudget::for_merging(),
        })
    }

    /// Runs a call of the catalog on a blocking thread.
    pub(crate) async fn catalog<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Catalog) -> Result<T, CatalogError> + Send + 'static,
    ) -> Result<T, ServiceError> {
        let catalog = Arc::clone(&self.catalog);
        Ok(tokio::task::spawn_blocking(move || call(&*catalog)).await??)
    }

    /// The artefact of this name.
    pub(crate) async fn artefact(
        &self,
        id: BuildId,
        kind: ArtefactKind,
        path: &str,
    ) -> Result<Option<Artefact>, ServiceError> {
        let path = path.to_owned();
        self.catalog(move |catalog| catalog.artefact(id, kind, &path)).await
    }

    /// The artefact of this kind, if its content can be read.
    pub(crate) async fn sound_artefact(
        &self,
        id: BuildId,
        kind: ArtefactKind,
    ) -> Result<Option<Artefact>, ServiceError> {
        Ok(self.artefact(id, kind, "").await?.filter(|artefact| !artefact.damaged))
    }

    /// Records that a content cannot be read, so that the next upload or derivation of it is stored again.
    pub(crate) async fn mark_damaged(&self, hash: ContentHash) -> Result<(), ServiceError> {
        self.catalog(move |catalog| catalog.mark_damaged(hash)).await?;
        self.derivations.forget();
        Ok(())
    }

    /// [`App::mark_damaged`] in the background.
    pub(crate) fn report_damage(self: &Arc<Self>, hash: ContentHash) {
        let app = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = app.mark_damaged(hash).await {
                tracing::error!("recording damage of {hash}: {error}");
            }
        });
    }
}

/// Seconds since 1970.
pub(crate) fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A service that answers.
pub struct Service {
    address: SocketAddr,
    shutdown: Shutdown,
    tracker: TaskTracker,
}

/// Starts the service: when this returns, it answers.
pub async fn start(config: Config) -> Result<Service, StartError> {
    match &config.token {
        None if !config.listen.ip().is_loopback() => return Err(StartError::OpenWithoutToken(config.listen)),
        Some(token)
            if token.trim().is_empty() || !token.trim().bytes().all(|byte| byte.is_ascii_graphic()) =>
        {
            return Err(StartError::Token);
        }
        _ => {}
    }
    let listen = |error| StartError::Listen { address: config.listen, error };
    let app = Arc::new(App::open(&config).await?);
    let listener = TcpListener::bind(config.listen).await.map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    let (shutdown, tracker) = (Shutdown::default(), TaskTracker::new());
    tracker.spawn(accept(listener, routes::router(app), shutdown.clone(), tracker.clone()));
    tracing::info!("listening on http://{address}");
    Ok(Service { address, shutdown, tracker })
}

impl Service {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its base URL, without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Stops: finishes answers under way for up to ten seconds, resets the others. Whatever was acknowledged
    /// is durable before, so nothing has to be saved here.
    pub async fn stop(self) {
        self.tracker.close();
        self.shutdown.drain.cancel();
        if tokio::time::timeout(DRAIN_TIMEOUT, self.tracker.wait()).await.is_err() {
            self.shutdown.abort.cancel();
            self.tracker.wait().await;
        }
    }
}
