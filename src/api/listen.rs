//! The HTTP server loop: TLS where there is a certificate, connections bounded in number, in header size and in the time a header may take,
//! and closed in good order when the gateway stops.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service;

use super::client::{Connection, network};
use super::shares::Shares;
use super::tls::Tls;

/// Bounds of the server loop.
#[derive(Clone, Debug)]
pub struct ListenConfig {
    /// Open connections; more wait in the kernel's queue. Streams are most of them.
    pub max_connections: usize,
    /// Those of one peer's network; more are closed at once, so that nobody alone keeps all others waiting. `None` where
    /// a proxy brings everybody.
    pub max_connections_per_peer: Option<u32>,
    /// The certificate to show; `None` for plain http.
    pub tls: Option<Tls>,
    /// How long agreeing on TLS and the header of a request may take each, and how long an idle connection is kept.
    pub header_timeout: Duration,
    /// How long a client may take nothing of what is sent to it, before its connection is cut: a reader that stands still,
    /// or is gone without a word, holds its place no longer.
    pub stall_timeout: Duration,
    /// How long requests may go on after the stop.
    pub drain_timeout: Duration,
}

impl Default for ListenConfig {
    fn default() -> Self {
        Self {
            max_connections: 4_096,
            max_connections_per_peer: None,
            tls: None,
            header_timeout: Duration::from_secs(15),
            stall_timeout: Duration::from_secs(120),
            drain_timeout: Duration::from_secs(10),
        }
    }
}

/// Largest header of a request: hyper's least buffer would be 8 KiB, and tokens and paths fit into 16.
const MAX_HEADER_BYTES: usize = 16 << 10;

/// Most header lines of a request.
const MAX_HEADERS: usize = 64;

/// How long accepting pauses after an error, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `stopping` is cancelled and open requests have ended, or `drain_timeout` has passed.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    config: ListenConfig,
    stopping: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(config.max_connections));
    let of_peers = config.max_connections_per_peer.map(Shares::new);
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stopping.cancelled() => break,
            accepted = accept(&listener, &places, config.stall_timeout) => accepted,
        };
        let (stream, peer, place) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(error = %error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let share = match &of_peers {
            Some(of_peers) => match of_peers.take(&network(peer.ip())) {
                Some(share) => Some(share),
                None => {
                    metrics::counter!("rungate_http_connections_refused_total").increment(1);
                    continue;
                }
            },
            None => None,
        };
        let (router, config, stopping) = (router.clone(), config.clone(), stopping.clone());
        connections.spawn(async move {
            metrics::gauge!("rungate_http_connections").increment(1.0);
            secure_and_serve(stream, peer.ip(), router, config, stopping).await;
            metrics::gauge!("rungate_http_connections").decrement(1.0);
            drop((place, share));
        });
    }
    drop(listener);
    connections.close();
    if tokio::time::timeout(config.drain_timeout, connections.wait())
        .await
        .is_err()
    {
        tracing::warn!(
            http.connections = connections.len(),
            "requests did not end in time; their connections are dropped"
        );
    }
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
    stall_timeout: Duration,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let place = Arc::clone(places)
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let (stream, peer) = listener.accept().await?;
    // Frames are small and wanted at once.
    stream.set_nodelay(true)?;
    // Data that is not taken counts as data that is not acknowledged (tcp(7), TCP_USER_TIMEOUT).
    let stall_ms = u32::try_from(stall_timeout.as_millis()).unwrap_or(u32::MAX);
    rustix::net::sockopt::set_tcp_user_timeout(&stream, stall_ms)?;
    Ok((stream, peer, place))
}

/// Agrees on TLS first where the gateway has a certificate.
async fn secure_and_serve(
    stream: TcpStream,
    peer: IpAddr,
    router: Router,
    config: ListenConfig,
    stopping: CancellationToken,
) {
    let is_tls = config.tls.is_some();
    let connection = Connection { peer, is_tls };
    let Some(tls) = &config.tls else {
        return serve_connection(stream, connection, router, &config, stopping).await;
    };
    let agreed = tokio::select! {
        () = stopping.cancelled() => return,
        agreed = Box::pin(tokio::time::timeout(config.header_timeout, tls.accept(stream))) => agreed,
    };
    match agreed {
        // Boxed: connections without TLS need not have room for its state.
        Ok(Ok(stream)) => {
            Box::pin(serve_connection(
                stream, connection, router, &config, stopping,
            ))
            .await;
        }
        // A scanner, a browser that does not trust the certificate, plain http: daily business.
        Ok(Err(error)) => {
            tracing::debug!(error = %error, client.address = %peer, "no TLS with a client")
        }
        Err(_) => tracing::debug!(client.address = %peer, "a client was too slow for TLS"),
    }
}

async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    connection: Connection,
    router: Router,
    config: &ListenConfig,
    stopping: CancellationToken,
) {
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(connection);
        router.clone().call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(config.header_timeout)
        .max_buf_size(MAX_HEADER_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopping.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        // A reader that went away, a header that never came: daily business.
        tracing::debug!(error = %error, "a connection ended early");
    }
}
