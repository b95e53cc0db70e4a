//! Accepting connections, and how each one ends.
//!
//! axum's own loop closes a connection whose body failed like any other, with a FIN; a debuginfod
//! client takes the short body for "does not exist" and remembers that for ten minutes. Here a connection
//! that fails is reset, which the same client retries and forgets. Idle and excess connections have limits,
//! which that loop lacks. With TLS it is the same, but that the kernel sends no files: see module `sendfile`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt::set_socket_send_buffer_size;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::sendfile::Outlet;
use crate::tls::Tls;

/// Connections served at once; further ones wait in the listen queue. Each costs two file descriptors and
/// up to two megabytes while it is sent a body.
const MAX_CONNECTIONS: usize = 4096;
/// How long a client may take to send a request head or stay idle between two, in seconds.
const HEAD_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a TLS handshake may take, in seconds: some round trips of the slowest network.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of an answer that a connection gathers before it waits for its client, and of a request head: a piece of a body may be
/// larger, but then it is one.
const BUFFER_BYTES: usize = 64 * 1024;
/// Bytes of an answer that the kernel holds for a client on this machine, whose reads are never far away: what was just sent is then
/// still in the processor's cache when it is read. Without this limit the kernel holds up to four megabytes for each connection, and
/// eight that read a large file get half as much a second. Over a network the kernel knows better how much has to be under way.
const LOOPBACK_SEND_BYTES: usize = 256 * 1024;
/// Pause after a failed accept (out of file descriptors), in milliseconds.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The address of the client, as an extension of each request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) SocketAddr);

/// Two stages of stopping: no new requests, then no more patience.
#[derive(Clone, Default)]
pub(crate) struct Shutdown {
    /// Answers under way are finished, connections then closed.
    pub(crate) drain: CancellationToken,
    /// Connections are reset.
    pub(crate) abort: CancellationToken,
}

/// Serves `router` on `listener` until `shutdown.drain`; its connections are tasks of `tracker`.
pub(crate) async fn accept(
    listener: TcpListener,
    router: Router,
    tls: Option<Arc<Tls>>,
    shutdown: Shutdown,
    tracker: TaskTracker,
) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let next = async {
            let slot = Arc::clone(&slots).acquire_owned().await.expect("never closed");
            listener.accept().await.map(|(stream, peer)| (stream, peer, slot))
        };
        let accepted = tokio::select! {
            () = shutdown.drain.cancelled() => return,
            accepted = next => accepted,
        };
        match accepted {
            Ok((stream, peer, slot)) => {
                let (router, tls, shutdown) = (router.clone(), tls.clone(), shutdown.clone());
                tracker.spawn(async move {
                    let _ = stream.set_nodelay(true);
                    if peer.ip().is_loopback() {
                        let _ = set_socket_send_buffer_size(&stream, LOOPBACK_SEND_BYTES);
                    }
                    match tls {
                        None => serve(stream, peer, router, shutdown).await,
                        Some(tls) => serve_tls(&tls, stream, peer, router, shutdown).await,
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!("accepting a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_tls(tls: &Tls, stream: TcpStream, peer: SocketAddr, router: Router, shutdown: Shutdown) {
    let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.acceptor().accept(stream));
    let handshake = tokio::select! {
        () = shutdown.drain.cancelled() => return,
        handshake = handshake => handshake,
    };
    match handshake {
        Ok(Ok(stream)) => serve(stream, peer, router, shutdown).await,
        Ok(Err(error)) => tracing::debug!("handshake with {peer}: {error}"),
        Err(_) => tracing::debug!("handshake with {peer}: not done in {} s", HANDSHAKE_TIMEOUT.as_secs()),
    }
}

/// What a connection is made of.
trait Transport: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Whether what is written goes to the network as it is.
    const IS_PLAIN: bool;

    /// At the bottom.
    fn tcp(&self) -> &TcpStream;
}

impl Transport for TcpStream {
    const IS_PLAIN: bool = true;

    fn tcp(&self) -> &TcpStream {
        self
    }
}

impl Transport for TlsStream<TcpStream> {
    const IS_PLAIN: bool = false;

    fn tcp(&self) -> &TcpStream {
        self.get_ref().0
    }
}

async fn serve<T: Transport>(stream: T, peer: SocketAddr, router: Router, shutdown: Shutdown) {
    let router = TowerToHyperService::new(router);
    let stream = Resetting::new(stream);
    let outlet = stream.outlet.clone();
    let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(Peer(peer));
        if T::IS_PLAIN {
            request.extensions_mut().insert(outlet.clone());
        }
        router.call(request)
    });
    let mut connection = std::pin::pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .max_buf_size(BUFFER_BYTES)
            .header_read_timeout(HEAD_TIMEOUT)
            .serve_connection(stream, service)
    );
    let mut draining = false;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!("connection of {peer} reset: {error}");
                }
                return;
            }
            () = shutdown.drain.cancelled(), if !draining => {
                draining = true;
                connection.as_mut().graceful_shutdown();
            }
            () = shutdown.abort.cancelled() => return,
        }
    }
}

/// A stream that is reset when dropped, unless it was shut down in good order.
struct Resetting<T: Transport> {
    io: TokioIo<T>,
    outlet: Outlet,
    in_order: bool,
}

impl<T: Transport> Resetting<T> {
    fn new(stream: T) -> Self {
        Self { io: TokioIo::new(stream), outlet: Outlet::default(), in_order: false }
    }
}

impl<T: Transport> Drop for Resetting<T> {
    fn drop(&mut self) {
        if !self.in_order {
            let _ = self.io.inner().tcp().set_zero_linger();
        }
    }
}

mod delegate {
    use std::io;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use hyper::rt::{Read, ReadBufCursor, Write};

    use super::{Resetting, Transport};

    impl<T: Transport> Read for Resetting<T> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: ReadBufCursor<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_read(cx, buf)
        }
    }

    impl<T: Transport> Write for Resetting<T> {
        fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.in_order = true;
            Pin::new(&mut self.io).poll_shutdown(cx)
        }

        fn is_write_vectored(&self) -> bool {
            T::IS_PLAIN || self.io.is_write_vectored()
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bufs: &[io::IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            match T::IS_PLAIN {
                true => self.outlet.poll_write(self.io.inner().tcp(), cx, bufs),
                false => Pin::new(&mut self.io).poll_write_vectored(cx, bufs),
            }
        }
    }
}
