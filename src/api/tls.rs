//! TLS: the certificate and key that the listener shows, read from two files, and read again on request. A file that
//! cannot be used changes nothing.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};
use tokio_rustls::server::TlsStream;

/// A chain and a key have a few KiB.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// What others must not do with a key's file: read it, nor anybody but its owner write it. A group may read it, as the
/// group of all that serve TLS often does.
const FORBIDDEN_MODE: u32 = 0o027;

/// Why the certificate and the key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {}; check {setting}", path.display())]
    Unreadable {
        path: PathBuf,
        setting: &'static str,
        source: io::Error,
    },
    #[error(
        "{} can be read or written by others than its owner and its group; `chmod 600` it", path.display()
    )]
    Exposed { path: PathBuf },
    #[error("{} holds no certificate in PEM form; check --tls-cert", path.display())]
    NoCertificate { path: PathBuf },
    #[error("{} holds no private key in PEM form; check --tls-key", path.display())]
    NoKey { path: PathBuf },
    #[error(
        "the certificate {} and the key {} cannot be used together", cert.display(), key.display()
    )]
    Unusable {
        cert: PathBuf,
        key: PathBuf,
        source: Box<rustls::Error>,
    },
}

/// Shows the certificate that was last read; cheap to clone.
#[derive(Clone, Debug)]
pub struct Tls(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cert: PathBuf,
    key: PathBuf,
    current: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    /// Reads the chain at `cert`, the gateway's own certificate first, and its key.
    ///
    /// # Errors
    /// One sentence for each thing that can be wrong with the files.
    pub fn load(cert: PathBuf, key: PathBuf) -> Result<Tls, TlsError> {
        let current = RwLock::new(read(&cert, &key)?);
        Ok(Tls(Arc::new(Inner { cert, key, current })))
    }

    /// Reads both files again, for connections that are made from now on.
    ///
    /// # Errors
    /// As `load`; what was read last goes on.
    pub fn reload(&self) -> Result<(), TlsError> {
        let config = read(&self.0.cert, &self.0.key)?;
        let current = self.0.current.write();
        // A reference is never half.
        *current.unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    /// Agrees on TLS with a client.
    ///
    /// # Errors
    /// The client speaks no TLS, or none of ours.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let current = self.0.current.read();
        let config = Arc::clone(&current.unwrap_or_else(PoisonError::into_inner));
        TlsAcceptor::from(config).accept(stream).await
    }
}

/// TLS 1.2 and 1.3 with the library's choice of ciphers; HTTP/1.1 only, as that is what the server loop speaks.
fn read(cert: &Path, key: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let chain = read_chain(cert)?;
    let secret = read_key(key)?;
    let unusable = |error| TlsError::Unusable {
        cert: cert.to_owned(),
        key: key.to_owned(),
        source: Box::new(error),
    };
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, secret)
        .map_err(unusable)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn read_chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let (_, text) = read_file(path, "--tls-cert")?;
    let chain: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&text).collect();
    chain
        .ok()
        .filter(|chain| !chain.is_empty())
        .ok_or_else(|| TlsError::NoCertificate {
            path: path.to_owned(),
        })
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let (mode, text) = read_file(path, "--tls-key")?;
    let path = path.to_owned();
    if mode & FORBIDDEN_MODE != 0 {
        return Err(TlsError::Exposed { path });
    }
    PrivateKeyDer::from_pem_slice(&text).map_err(|_| TlsError::NoKey { path })
}

/// A file's permissions and its bytes.
fn read_file(path: &Path, setting: &'static str) -> Result<(u32, Vec<u8>), TlsError> {
    let read = || {
        let file = File::open(path)?;
        let mode = file.metadata()?.permissions().mode();
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
        Ok((mode, bytes))
    };
    read().map_err(|source| TlsError::Unreadable {
        path: path.to_owned(),
        setting,
        source,
    })
}
