//! How the gateway is reached: by TLS, by plain http on this machine only, or by plain http from elsewhere where that
//! was asked for.

use std::future::Future;
use std::net::SocketAddr;

use tokio::signal::unix::{SignalKind, signal};

use crate::api::tls::{Tls, TlsError};
use crate::config::Config;

/// Why the gateway does not listen as it is told to.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error("{set} is set and {missing} is not; TLS needs both")]
    HalfTls {
        set: &'static str,
        missing: &'static str,
    },
    #[error(
        "other machines can reach {addr}, and plain http shows tokens and payloads to the network: set --tls-cert and --tls-key, \
         listen on 127.0.0.1 behind a proxy, or say --insecure-http where the network is trusted"
    )]
    PlainHttp { addr: SocketAddr },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("cannot listen for the HUP signal")]
    Signal(#[source] std::io::Error),
}

/// The certificate that the settings name; `None` for plain http.
///
/// # Errors
/// The certificate or its key cannot be used, or plain http would be seen by others.
pub fn tls(config: &Config) -> Result<Option<Tls>, TransportError> {
    let half = |set, missing| Err(TransportError::HalfTls { set, missing });
    let addr = config.listen;
    match (&config.tls_cert, &config.tls_key) {
        (Some(cert), Some(key)) => Ok(Some(Tls::load(cert.clone(), key.clone())?)),
        (Some(_), None) => half("tls_cert", "tls_key"),
        (None, Some(_)) => half("tls_key", "tls_cert"),
        (None, None) if !addr.ip().to_canonical().is_loopback() && !config.insecure_http => {
            Err(TransportError::PlainHttp { addr })
        }
        (None, None) => Ok(None),
    }
}

/// Reads the certificate again at each HUP. Connections that are open go on with what they agreed on. Without a
/// certificate there is nothing to read: HUP, which by default ends a program, is taken all the same, since a unit
/// file that reloads must not stop the gateway.
///
/// # Errors
/// The signal cannot be listened for.
pub fn reload_on_hangup(tls: Option<Tls>) -> Result<impl Future<Output = ()>, TransportError> {
    let mut hangups = signal(SignalKind::hangup()).map_err(TransportError::Signal)?;
    Ok(async move {
        while hangups.recv().await.is_some() {
            let Some(tls) = tls.clone() else {
                tracing::info!("HUP: there is no certificate (tls_cert), so nothing is read again");
                continue;
            };
            match tokio::task::spawn_blocking(move || tls.reload()).await {
                Ok(Ok(())) => tracing::info!("the TLS certificate was read again"),
                Ok(Err(error)) => tracing::error!(
                    source = std::error::Error::source(&error),
                    "the TLS certificate stays as it was: {error}"
                ),
                Err(error) => {
                    tracing::error!(%error, "the TLS certificate stays as it was");
                }
            }
        }
    })
}

/// How a service on this machine reaches the gateway. A certificate is for a name: the first of `allowed_hosts`.
pub fn gateway_url(config: &Config, addr: SocketAddr) -> String {
    let mut here = addr;
    if addr.ip().is_unspecified() {
        here.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
    }
    match (&config.tls_cert, config.allowed_hosts.first()) {
        (None, _) => format!("http://{here}"),
        (Some(_), Some(name)) => format!("https://{name}:{}", addr.port()),
        (Some(_), None) => format!("https://{here}"),
    }
}
