//! The gateway as seen from the command line: one JSON call at a time, with the caller's token.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use reqwest::Method;
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use url::Url;

use super::error::{CliError, Problem};
use crate::config::Config;
use crate::worker::is_loopback;

/// A gateway on this machine or next door answers a connection at once.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// `service start` waits up to 120 s for health; nothing takes longer.
const CALL_TIMEOUT: Duration = Duration::from_secs(150);
/// Silence after which a stream is taken for dead; the gateway's heartbeats are far denser.
pub(super) const STREAM_SILENCE: Duration = Duration::from_secs(60);
/// Largest token file read, in bytes: a token has under 100.
const MAX_TOKEN_BYTES: u64 = 8 << 10;

/// A connection's settings; cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    calls: reqwest::Client,
    streams: reqwest::Client,
    base: Url,
    token: Option<SecretString>,
}

impl Client {
    /// Talks to `config.url` with the token of the environment, of `token_file`, or of the default
    /// data directory when the gateway is on this machine.
    ///
    /// # Errors
    /// A URL that is none, a token file that cannot be read.
    pub fn new(config: &Config) -> Result<Self, CliError> {
        let base = parse_base(&config.url)?;
        let token = find_token(config, &base)?;
        Self::trusting(base, token, &trusted(config)?)
    }

    /// Talks to `base` with `token`.
    ///
    /// # Errors
    /// The HTTP client cannot be made.
    pub fn with_token(base: Url, token: Option<SecretString>) -> Result<Self, CliError> {
        Self::trusting(base, token, &[])
    }

    /// Trusts `roots` instead of the system's when there are any.
    fn trusting(
        base: Url,
        token: Option<SecretString>,
        roots: &[reqwest::Certificate],
    ) -> Result<Self, CliError> {
        let builder = || {
            let builder = reqwest::Client::builder()
                .connect_timeout(CONNECT_TIMEOUT)
                .user_agent(concat!("rungate/", env!("CARGO_PKG_VERSION")))
                // A redirect would carry the token to where nobody asked for.
                .redirect(reqwest::redirect::Policy::none());
            let builder = match roots {
                [] => builder,
                roots => builder.tls_certs_only(roots.iter().cloned()),
            };
            match is_loopback(&base) {
                true => builder.no_proxy(),
                false => builder,
            }
        };
        let failed = |error: reqwest::Error| CliError::Failed(error.to_string());
        Ok(Self {
            calls: builder().timeout(CALL_TIMEOUT).build().map_err(failed)?,
            streams: builder()
                .read_timeout(STREAM_SILENCE)
                .build()
                .map_err(failed)?,
            base,
            token,
        })
    }

    pub fn base(&self) -> &Url {
        &self.base
    }

    pub async fn get(&self, path: &str, query: &[(&str, String)]) -> Result<Value, CliError> {
        self.call(Method::GET, path, query, None).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, CliError> {
        self.call(Method::POST, path, &[], Some(body)).await
    }

    /// One call; a success is its JSON body (null when empty), anything else an error.
    ///
    /// # Errors
    /// `Unreachable`, `Problem`, or an answer that is no JSON.
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, String)],
        body: Option<&Value>,
    ) -> Result<Value, CliError> {
        self.call_with(method, path, query, body, &[]).await
    }

    /// As `call`, with headers of the caller's.
    pub async fn call_with(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, String)],
        body: Option<&Value>,
        headers: &[(&str, &str)],
    ) -> Result<Value, CliError> {
        let mut request = self.calls.request(method, self.address(path, query)?);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = self.send(request).await?;
        let bytes = answer
            .bytes()
            .await
            .map_err(|error| self.unreachable(&error))?;
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&bytes).map_err(|error| CliError::Answer(error.to_string()))
    }

    /// Opens a stream; the answer's body is read by the caller.
    ///
    /// # Errors
    /// As `call`.
    pub async fn open(
        &self,
        path: &str,
        query: &[(&str, String)],
        last_event_id: Option<&str>,
    ) -> Result<reqwest::Response, CliError> {
        let mut request = self.streams.get(self.address(path, query)?);
        if let Some(id) = last_event_id {
            request = request.header("last-event-id", id);
        }
        self.send(request).await
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<reqwest::Response, CliError> {
        let request = match &self.token {
            Some(token) => request.bearer_auth(token.expose_secret()),
            None => request,
        };
        let answer = request
            .send()
            .await
            .map_err(|error| self.unreachable(&error))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let body = answer.bytes().await.unwrap_or_default();
        Err(CliError::Problem(Problem::from_answer(
            status.as_u16(),
            &body,
        )))
    }

    fn address(&self, path: &str, query: &[(&str, String)]) -> Result<Url, CliError> {
        let mut url = self
            .base
            .join(path.trim_start_matches('/'))
            .map_err(|error| CliError::Usage(format!("{path} is no path: {error}")))?;
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        Ok(url)
    }

    pub(super) fn unreachable(&self, error: &reqwest::Error) -> CliError {
        // The innermost cause is the one that people know: "connection refused".
        let mut cause: &dyn std::error::Error = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        CliError::Unreachable {
            url: self.base.to_string(),
            reason: cause.to_string(),
        }
    }
}

/// `text` encoded as one segment of a path, so that a name cannot leave its place.
pub fn segment(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}

/// A base address with a path that ends in `/`, so that `join` appends to it.
fn parse_base(text: &str) -> Result<Url, CliError> {
    let problem = |reason: String| {
        CliError::Usage(format!(
            "the gateway's URL is '{text}': {reason}; write it like http://127.0.0.1:8080"
        ))
    };
    let mut url = Url::parse(text).map_err(|error| problem(error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(problem("neither http nor https".to_owned()));
    }
    // Clients of the GPU API may be given the gateway's second root, below which nothing else is.
    let path = url.path().trim_end_matches('/');
    let path = path.strip_suffix("/api/gateway").unwrap_or(path);
    let path = format!("{}/", path.trim_end_matches('/'));
    url.set_path(&path);
    // `serve --listen 0.0.0.0:…` is not an address to connect to everywhere.
    if let Some(url::Host::Ipv4(ip)) = url.host()
        && ip.is_unspecified()
    {
        let _ = url.set_ip_host(IpAddr::from([127, 0, 0, 1]));
    }
    Ok(url)
}

fn find_token(config: &Config, base: &Url) -> Result<Option<SecretString>, CliError> {
    if let Some(token) = config.token.reveal() {
        return Ok(Some(token.into()));
    }
    if let Some(path) = &config.token_file {
        let what = format!("read the token file {}", path.display());
        return read_token(path).map(Some).map_err(CliError::io(what));
    }
    // The administrator's token of this machine's gateway is for this machine's gateway.
    if !is_loopback(base) {
        return Ok(None);
    }
    Ok(read_token(&config.bootstrap_token_path()).ok())
}

/// The certificates of `ca_cert`; none when it is not set.
///
/// # Errors
/// The file cannot be read or holds none.
pub(super) fn trusted(config: &Config) -> Result<Vec<reqwest::Certificate>, CliError> {
    let Some(path) = &config.ca_cert else {
        return Ok(Vec::new());
    };
    let what = || format!("use the certificates of {}", path.display());
    let text = std::fs::read(path).map_err(CliError::io(what()))?;
    let roots = reqwest::Certificate::from_pem_bundle(&text)
        .ok()
        .filter(|roots| !roots.is_empty());
    let none = || std::io::Error::other("it holds none in PEM form");
    roots.ok_or_else(none).map_err(CliError::io(what()))
}

/// The token in the file at `path`, without the white space around it.
///
/// # Errors
/// The file cannot be read or holds no token.
pub fn read_token(path: &Path) -> std::io::Result<SecretString> {
    if std::fs::metadata(path)?.len() > MAX_TOKEN_BYTES {
        return Err(std::io::Error::other("it is too large to be a token"));
    }
    let file = SecretString::from(std::fs::read_to_string(path)?);
    let text = file.expose_secret().trim();
    match text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic()) {
        true => Err(std::io::Error::other("it holds no token")),
        false => Ok(text.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_in_its_segment_of_the_path() {
        assert_eq!(segment("../a b?c"), "%2E%2E%2Fa%20b%3Fc");
    }

    #[test]
    fn a_base_keeps_its_path_and_must_be_http() {
        let base = parse_base("https://gate.example/gpu").unwrap();
        assert_eq!(base.join("health").unwrap().path(), "/gpu/health");
        for text in [
            "https://x/api/gateway",
            "https://x/api/gateway/",
            "https://x",
        ] {
            assert_eq!(parse_base(text).unwrap().as_str(), "https://x/");
        }
        assert!(parse_base("127.0.0.1:8080").is_err());
        assert!(parse_base("ftp://x").is_err());
    }

    #[test]
    fn a_token_is_read_without_its_line_end() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "abc\n").unwrap();
        assert_eq!(read_token(file.path()).unwrap().expose_secret(), "abc");
        std::fs::write(file.path(), "\n").unwrap();
        assert!(read_token(file.path()).is_err());
    }
}
