//! An engine behind TLS: it must show a certificate of the authority in `ca.pem`, and no other, and is shown `cert.pem`.
//! They lie in `DOCKER_CERT_PATH`, as for docker's own client.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bollard::BollardRequest;
use futures_util::FutureExt;
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

use super::connect::Asked;
use super::ssh::IDLE_CONNECTIONS;

/// Whether `tcp://` means TLS: also where docker's own client would not look at the engine's certificate.
pub fn is_wanted() -> bool {
    ["DOCKER_TLS_VERIFY", "DOCKER_TLS", "DOCKER_CERT_PATH"]
        .iter()
        .any(|name| said(name).is_some())
}

fn said(name: &str) -> Option<PathBuf> {
    let value = std::env::var_os(name).filter(|value| !value.is_empty());
    value.map(PathBuf::from)
}

/// Where docker's own client has its files.
fn folder() -> Result<PathBuf, String> {
    let folder = said("DOCKER_CERT_PATH").or_else(|| said("DOCKER_CONFIG"));
    folder
        .or_else(|| said("HOME").map(|home| home.join(".docker")))
        .ok_or_else(|| "no folder has its certificates; set DOCKER_CERT_PATH".to_owned())
}

/// The connections; the files are read once.
///
/// # Errors
/// Which file cannot be used.
pub fn transport() -> Result<impl Fn(BollardRequest) -> Asked + Send + Sync + 'static, String> {
    let config = read(&folder()?)?;
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(config)
        .https_only()
        .enable_http1()
        .build();
    let client = Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(IDLE_CONNECTIONS)
        .build(connector);
    Ok(move |request: BollardRequest| {
        let asked = client.request(request);
        async move { asked.await.map_err(bollard::errors::Error::from) }.boxed()
    })
}

fn read(folder: &Path) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    let authorities = folder.join("ca.pem");
    for authority in certificates(&authorities)? {
        roots
            .add(authority)
            .map_err(|error| format!("{} cannot be used: {error}", authorities.display()))?;
    }
    let (cert, key) = (folder.join("cert.pem"), folder.join("key.pem"));
    let unusable = |error: rustls::Error| {
        let (cert, key) = (cert.display(), key.display());
        format!("{cert} and {key} cannot be used together: {error}")
    };
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_root_certificates(roots);
    // An engine that lets everybody in needs none.
    if !cert.exists() && !key.exists() {
        return Ok(config.with_no_client_auth());
    }
    let chain = certificates(&cert)?;
    let secret = PrivateKeyDer::from_pem_slice(&content(&key)?)
        .map_err(|_| format!("{} holds no private key in PEM form", key.display()))?;
    config
        .with_client_auth_cert(chain, secret)
        .map_err(unusable)
}

fn content(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error: io::Error| {
        let path = path.display();
        format!("cannot read {path} ({error}); set DOCKER_CERT_PATH")
    })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let text = content(path)?;
    let all: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&text).collect();
    all.ok()
        .filter(|all| !all.is_empty())
        .ok_or_else(|| format!("{} holds no certificate in PEM form", path.display()))
}
