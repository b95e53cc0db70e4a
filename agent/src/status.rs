//! Who may ask the agent how it is?
//!
//! Whoever reaches the address that it was told to listen at; by default it listens nowhere. There are two pages,
//! `GET /metrics` and `GET /healthz`, and nothing that changes anything. A handful of connections
//! are served at once and each for a few seconds: a prober that misbehaves costs the agent no more than
//! that.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::metrics::{self, Metrics};

/// Connections served at once: a scraper, a kubelet, and a person.
const CONNECTIONS: usize = 8;
/// How long a connection is served: the scrape timeout that Prometheus has by default.
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);
/// Pause when no connection can be accepted, for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An address to answer at.
pub(crate) struct StatusListener {
    listener: StdListener,
    /// The one asked for; port 0 has become a free one.
    pub(crate) address: SocketAddr,
}

impl StatusListener {
    /// Takes the address; whoever asks now waits.
    pub(crate) fn bind(address: SocketAddr) -> std::io::Result<Self> {
        let listener = StdListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// Starts to answer on `runtime`.
    pub(crate) fn start(
        self,
        runtime: &tokio::runtime::Handle,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<()> {
        // The listener belongs to the runtime that is entered.
        let _guard = runtime.enter();
        runtime.spawn(serve(TcpListener::from_std(self.listener)?, metrics));
        Ok(())
    }
}

async fn serve(listener: TcpListener, metrics: Arc<Metrics>) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // Never closed; were it, there would merely be no limit.
        let permit = connections.clone().acquire_owned().await;
        match listener.accept().await {
            Ok((stream, _)) => {
                let metrics = metrics.clone();
                tokio::spawn(async move {
                    let _permit = permit;
                    // Whoever asked gave up, or was too slow.
                    let _ = tokio::time::timeout(CONNECTION_LIMIT, converse(stream, metrics)).await;
                });
            }
            Err(error) => {
                tracing::debug!(%error, "no connection is accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn converse(stream: TcpStream, metrics: Arc<Metrics>) -> hyper::Result<()> {
    let service = service_fn(move |request: Request<Incoming>| {
        let metrics = metrics.clone();
        async move { Ok::<_, Infallible>(answer(request.method(), request.uri().path(), &metrics)) }
    });
    http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service).await
}

fn answer(method: &Method, path: &str, metrics: &Metrics) -> Response<String> {
    let (status, kind, body) = match (method, path) {
        (&Method::GET | &Method::HEAD, "/metrics") => (StatusCode::OK, metrics::CONTENT_TYPE, metrics.text()),
        (&Method::GET | &Method::HEAD, "/healthz") => match metrics.is_alive(Instant::now()) {
            true => (StatusCode::OK, "text/plain", "ok\n".to_owned()),
            false => {
                (StatusCode::SERVICE_UNAVAILABLE, "text/plain", "the sampling thread is stuck\n".to_owned())
            }
        },
        (_, "/metrics" | "/healthz") => {
            (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "expected GET\n".to_owned())
        }
        _ => (StatusCode::NOT_FOUND, "text/plain", "expected /metrics or /healthz\n".to_owned()),
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_pages_and_nothing_else() {
        let metrics = Metrics::default();
        for (method, path, expect) in [
            (Method::GET, "/metrics", 200),
            (Method::HEAD, "/healthz", 200),
            (Method::POST, "/metrics", 405),
            (Method::GET, "/", 404),
            (Method::GET, "/metrics/", 404),
        ] {
            assert_eq!(answer(&method, path, &metrics).status().as_u16(), expect, "{method} {path}");
        }
    }
}
