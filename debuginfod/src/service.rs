//! The running service: its parts, its start and its stop.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use crate::access::Access;
use crate::audit::{self, Audit};
use crate::blob::{BlobError, BlobStore, Expected, scratch_folder};
use crate::catalog::{Artefact, Catalog, CatalogError, SqliteCatalog};
use crate::config::Config;
use crate::connection::{Shutdown, accept};
use crate::content_hash::ContentHash;
use crate::copies::Copies;
use crate::derive::Derivations;
use crate::error::ServiceError;
use crate::gc;
use crate::intake::Receiving;
use crate::memory::MemoryBudget;
use crate::metrics::Metrics;
use crate::namespace::{NamespaceError, Namespaces};
use crate::quota::Quotas;
use crate::routes;
use crate::rows::Rows;
use crate::symbols::Indexes;
use crate::tls::{Tls, TlsError};
use crate::upstream::{Upstreams, UpstreamsError};
use crate::uses::{self, Uses};

/// How long answers under way may take to finish at a stop, in seconds. Their clients are then reset and try
/// again elsewhere or later.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// The service could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Everyone on the network could write.
    #[error(
        "{0} is not a loopback address, and without a token everyone there could upload: \
         give --token-file FILE, make a token with `windlassd token create`, or listen on 127.0.0.1"
    )]
    OpenWithoutToken(SocketAddr),
    /// Nobody could read.
    #[error(
        "with --private reads need a token, and there is none: give --token-file FILE, or make one with \
         `windlassd token create`"
    )]
    PrivateWithoutToken,
    /// The order of trust.
    #[error("--namespaces: {0}")]
    Namespaces(#[from] NamespaceError),
    /// The certificate.
    #[error(transparent)]
    Tls(#[from] TlsError),
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
    pub(crate) rows: Rows,
    pub(crate) blobs: BlobStore,
    pub(crate) copies: Copies,
    pub(crate) access: Access,
    pub(crate) namespaces: Namespaces,
    pub(crate) audit: Audit,
    pub(crate) uses: Uses,
    pub(crate) quotas: Quotas,
    pub(crate) upstreams: Upstreams,
    pub(crate) derivations: Derivations,
    pub(crate) indexes: Indexes,
    pub(crate) metrics: Metrics,
    pub(crate) max_upload_bytes: u64,
    /// Uploads being decoded.
    pub(crate) receiving: Receiving,
    /// Uploads being checked at once: twice as many as there are processors. Each may hold 30 MiB of headers.
    pub(crate) checking: Semaphore,
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
        let catalog = open_catalog(config, &data)?;
        // An empty catalog has nothing to miss: it is the first start, or the first before an upload.
        let expected = if catalog.blobs(None, 1)?.is_empty() { Expected::New } else { Expected::Marked };
        let has_tokens = !catalog.tokens()?.is_empty();
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            catalog,
            rows: Rows::default(),
            blobs: BlobStore::open(&storage, scratch, expected).await?,
            copies: Copies::new(config.max_copies_bytes),
            access: Access::new(config, has_tokens),
            namespaces: Namespaces::new(&config.namespaces)?,
            audit: Audit::new(config.audit_days),
            uses: Uses::default(),
            quotas: Quotas::new(&config.quotas),
            upstreams: Upstreams::new(&config.upstreams, config.upstream_deadline)?,
            derivations: Derivations::default(),
            indexes: Indexes::default(),
            metrics: Metrics::default(),
            max_upload_bytes: config.max_upload_bytes,
            receiving: Receiving::default(),
            checking: Semaphore::new(2 * processors),
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

    /// The artefact of this name that is trusted most, as of at most [`crate::rows::BELIEVED`] ago.
    pub(crate) async fn artefact(
        &self,
        id: BuildId,
        kind: ArtefactKind,
        path: &str,
    ) -> Result<Option<Arc<Artefact>>, ServiceError> {
        self.rows.find(self, id, kind, path).await
    }

    /// The artefact of this kind, if its content can be read.
    pub(crate) async fn sound_artefact(
        &self,
        id: BuildId,
        kind: ArtefactKind,
    ) -> Result<Option<Artefact>, ServiceError> {
        let found = self.artefact(id, kind, "").await?.filter(|artefact| !artefact.damaged);
        Ok(found.map(Arc::unwrap_or_clone))
    }

    /// Forgets what is known of an image, whose artefacts have changed: what it has, and what upstreams lack.
    pub(crate) fn forget(&self, id: BuildId) {
        self.rows.forget(id);
        self.upstreams.forget(id);
    }

    /// Records that a content cannot be read, so that the next upload or derivation of it is stored again.
    pub(crate) async fn mark_damaged(&self, hash: ContentHash) -> Result<(), ServiceError> {
        let marked = self.catalog(move |catalog| catalog.mark_damaged(hash)).await;
        self.rows.mistrust();
        self.derivations.forget();
        marked
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

/// Opens the catalog that `config` names; `data` is the data folder.
pub(crate) fn open_catalog(config: &Config, data: &Path) -> Result<Arc<dyn Catalog>, CatalogError> {
    Ok(Arc::new(match &config.catalog {
        Some(url) => SqliteCatalog::open_url(url)?,
        None => SqliteCatalog::open(&data.join("catalog.sqlite"))?,
    }))
}

/// Seconds since 1970.
pub(crate) fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A service that answers.
pub struct Service {
    app: Arc<App>,
    address: SocketAddr,
    shutdown: Shutdown,
    tracker: TaskTracker,
    tls: Option<Arc<Tls>>,
}

/// Starts the service: when this returns, it answers.
pub async fn start(config: Config) -> Result<Service, StartError> {
    let is_token = |token: &str| !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
    if config.token.as_deref().is_some_and(|token| !is_token(token.trim())) {
        return Err(StartError::Token);
    }
    let tls = config.tls.clone().map(Tls::open).transpose()?.map(Arc::new);
    let listen = |error| StartError::Listen { address: config.listen, error };
    let app = Arc::new(App::open(&config).await?);
    require_token(&config, &app)?;
    audit::trim(&app);
    let listener = TcpListener::bind(config.listen).await.map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    let (shutdown, tracker) = (Shutdown::default(), TaskTracker::new());
    if let Some(every) = config.collect_every {
        let stop = shutdown.drain.clone();
        tokio::spawn(gc::repeat(Arc::clone(&app), config.retention.clone(), every, stop));
    }
    tokio::spawn(uses::record(Arc::clone(&app), shutdown.drain.clone()));
    tracker.spawn(accept(
        listener,
        routes::router(Arc::clone(&app)),
        tls.clone(),
        shutdown.clone(),
        tracker.clone(),
    ));
    let service = Service { app, address, shutdown, tracker, tls };
    tracing::info!("listening on {}", service.url());
    if service.tls.is_none() && !address.ip().is_loopback() {
        tracing::warn!(
            "tokens and contents go unencrypted, unless a proxy in front has TLS: --tls-cert, --tls-key"
        );
    }
    Ok(service)
}

/// Where a token is needed, there must be one. Revoked ones count: after the last was revoked, a restart still succeeds.
fn require_token(config: &Config, app: &App) -> Result<(), StartError> {
    let is_reachable = !config.listen.ip().is_loopback();
    if config.token.is_some() || !(is_reachable || config.private) || !app.catalog.tokens()?.is_empty() {
        return Ok(());
    }
    Err(if is_reachable {
        StartError::OpenWithoutToken(config.listen)
    } else {
        StartError::PrivateWithoutToken
    })
}

impl Service {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its base URL, without a slash at the end.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Reads certificate and key again, for connections from now on. On failure the old ones stay.
    pub fn reload_tls(&self) -> Result<(), TlsError> {
        self.tls.as_ref().map_or(Ok(()), |tls| tls.reload())
    }

    /// Stops: finishes answers under way for up to ten seconds, resets the others. Whatever was acknowledged
    /// is durable before; what is recorded here are the last uses.
    pub async fn stop(self) {
        self.tracker.close();
        self.shutdown.drain.cancel();
        if tokio::time::timeout(DRAIN_TIMEOUT, self.tracker.wait()).await.is_err() {
            self.shutdown.abort.cancel();
            self.tracker.wait().await;
        }
        uses::flush(&self.app).await;
    }
}
