//! Ways to an engine, as `DOCKER_HOST` and the other variables of docker's own client say.

use bollard::errors::Error;
use bollard::{API_DEFAULT_VERSION, BollardRequest};
use futures_util::future::BoxFuture;
use http::Response;
use hyper::body::Incoming;

use super::engine::CLIENT_LIMIT_S;
use super::ssh::{self, Ssh};
use super::tls;

/// An answer on its way.
pub type Asked = BoxFuture<'static, Result<Response<Incoming>, Error>>;

/// Why no engine can be asked.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Before it was tried: a file or an address that cannot be used.
    #[error("{0}")]
    Unusable(String),
    #[error(transparent)]
    Engine(#[from] Error),
}

/// A connection to the engine at `host`, which is not asked yet. Blocks.
///
/// # Errors
/// What of the address, or of the files that belong to it, cannot be used.
pub fn connect(host: &str) -> Result<bollard::Docker, ConnectError> {
    let scheme = host.split_once("://").map(|(scheme, _)| scheme);
    let docker = match scheme {
        Some("unix") => {
            bollard::Docker::connect_with_unix(host, CLIENT_LIMIT_S, API_DEFAULT_VERSION)?
        }
        Some("ssh") => {
            let ssh = Ssh::parse(host).map_err(ConnectError::Unusable)?;
            let transport = ssh::transport(ssh);
            // Who answers is known from the connection; HTTP wants a name all the same.
            custom(transport, "http://docker")?
        }
        Some("https") => over_tls(host)?,
        Some("tcp") if tls::is_wanted() => over_tls(host)?,
        Some("tcp" | "http") => {
            bollard::Docker::connect_with_http(host, CLIENT_LIMIT_S, API_DEFAULT_VERSION)?
        }
        _ => {
            let why = "it must begin with unix://, tcp://, http://, https:// or ssh://";
            return Err(ConnectError::Unusable(why.to_owned()));
        }
    };
    Ok(docker)
}

fn over_tls(host: &str) -> Result<bollard::Docker, ConnectError> {
    let transport = tls::transport().map_err(ConnectError::Unusable)?;
    let address = host.split_once("://").map_or(host, |(_, address)| address);
    Ok(custom(transport, &format!("https://{address}"))?)
}

fn custom(
    transport: impl Fn(BollardRequest) -> Asked + Send + Sync + 'static,
    address: &str,
) -> Result<bollard::Docker, Error> {
    bollard::Docker::connect_with_custom_transport(
        transport,
        Some(address),
        CLIENT_LIMIT_S,
        API_DEFAULT_VERSION,
    )
}
