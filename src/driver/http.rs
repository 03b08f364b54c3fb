//! The HTTP clients that speak to services: no proxies, no redirects. Not for addresses that a job's
//! submitter chose: those go through `outbound`.

use std::error::Error;
use std::time::Duration;

/// Longest time to connect; a service is on this machine or near it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an idle connection is kept: less than the 5 s after which common servers (uvicorn, Node) close
/// theirs, so that a job is not posted into a connection that is just being closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// For jobs: keeps connections, since latency matters.
pub fn call_client() -> Result<reqwest::Client, reqwest::Error> {
    base().pool_idle_timeout(IDLE_TIMEOUT).build()
}

/// For probes: keeps no connection, which would occupy a server that serves one at a time.
pub fn probe_client() -> Result<reqwest::Client, reqwest::Error> {
    base().pool_max_idle_per_host(0).build()
}

fn base() -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .user_agent(concat!("rungate/", env!("CARGO_PKG_VERSION")))
}

/// `base` and `path` joined by exactly one slash.
pub fn join(base: &str, path: &str) -> String {
    format!(
        "{}/{}",
        base.trim_end_matches('/'),
        path.trim_start_matches('/')
    )
}

/// The innermost cause of an HTTP error, which is what tells people something: `Connection refused (os error 111)`.
pub fn error_text(error: reqwest::Error) -> String {
    if error.is_timeout() {
        return "no answer in time".into();
    }
    let error = error.without_url();
    let mut cause: &dyn Error = &error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
