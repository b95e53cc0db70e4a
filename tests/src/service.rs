//! A service on embedded storage, in this process, on a port of its own.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost::Message as _;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use windlass_debuginfod::{Config, Service, start};
use windlass_schema::pprof::Profile;
use windlass_schema::{BuildId, http};

/// A running service and its folder.
pub struct TestService {
    service: Service,
    folder: TempDir,
    /// For requests of the test itself.
    pub client: reqwest::Client,
}

impl TestService {
    /// Starts one with nothing in it.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// Starts one with another configuration.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn start_with(adapt: impl FnOnce(&mut Config)) -> Self {
        // Fails when it was installed before, by another test or the service: then one is there.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = TempDir::with_prefix("windlass-e2e-").expect("temporary folder");
        let mut config = Config::new(folder.path().join("data"));
        config.listen = ([127, 0, 0, 1], 0).into();
        adapt(&mut config);
        let service = start(config).await.expect("service starts");
        let client =
            reqwest::Client::builder().timeout(Duration::from_secs(60)).build().expect("HTTP client");
        Self { service, folder, client }
    }

    /// Where it listens, `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        self.service.url()
    }

    /// A folder for the test's own files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Ends it in good order.
    pub async fn stop(self) {
        self.service.stop().await;
    }

    /// Uploads an artefact.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn put(&self, build_id: BuildId, kind: http::ArtefactKind, content: Vec<u8>) {
        let url = format!("{}/api/v1/buildid/{build_id}/{kind}", self.url());
        let sha256: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
        let request = self.client.put(&url).header(http::SHA256_HEADER, sha256).body(content);
        let response = request.send().await.expect("the service answers");
        let status = response.status();
        let body = response.text().await.unwrap_or_default();
        assert!(status.is_success(), "PUT {url}: {status} {body}");
    }

    /// The merged profile of all samples since `from`.
    ///
    /// # Panics
    /// When there is none, or it is no gzipped pprof.
    pub async fn profile_since(&self, from: SystemTime) -> Profile {
        self.try_profile_since(from).await.expect("profiles")
    }

    /// The same; `None` if there is none.
    ///
    /// # Panics
    /// When the service does not answer, or with something that is no gzipped pprof.
    pub async fn try_profile_since(&self, from: SystemTime) -> Option<Profile> {
        self.try_profile(from, "").await
    }

    /// The same of one instance of a service, by its `service.instance.id`.
    ///
    /// # Panics
    /// As [`Self::try_profile_since`].
    pub async fn try_profile_of(&self, instance: &str, from: SystemTime) -> Option<Profile> {
        self.try_profile(from, &format!("&instance={instance}")).await
    }

    async fn try_profile(&self, from: SystemTime, selection: &str) -> Option<Profile> {
        let nanoseconds =
            |at: SystemTime| at.duration_since(UNIX_EPOCH).expect("clock after 1970").as_nanos();
        let end = SystemTime::now() + Duration::from_secs(1);
        let (start, end) = (nanoseconds(from), nanoseconds(end));
        let url = format!("{}/api/v1/profiles?start={start}&end={end}{selection}", self.url());
        let response = self.client.get(&url).send().await.expect("the service answers");
        let response = response.error_for_status().ok()?;
        Some(decode(&response.bytes().await.expect("the whole body")))
    }
}

/// A gzipped pprof profile.
///
/// # Panics
/// When it is none.
pub fn decode(gzipped: &[u8]) -> Profile {
    let mut plain = Vec::new();
    std::io::copy(&mut flate2::read::GzDecoder::new(gzipped), &mut plain).expect("gzip");
    Profile::decode(&plain[..]).expect("pprof")
}
