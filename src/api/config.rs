//! What the HTTP side needs to know, filled in by the settings. Every bound has its reason.

use std::net::SocketAddr;
use std::time::Duration;

use super::limits::LimitConfig;
use crate::domain::audit::AuditMode;

/// Settings of the HTTP side.
#[derive(Clone, Debug)]
pub struct ApiConfig {
    /// Names that a `Host` header may have, without port, lower case; IPv6 in brackets. A page of a
    /// foreign site whose name was rebound to this address has another.
    pub allowed_hosts: Vec<String>,
    /// Patterns (`*`, `?`) that an `Origin` header must match when there is one.
    pub allowed_origins: Vec<String>,
    /// Proxies in front of the gateway whose `X-Forwarded-For` and `X-Forwarded-Proto` count.
    pub trusted_proxies: usize,
    /// What is recorded of writes.
    pub audit: AuditMode,
    /// Largest JSON body. Payloads go into the ledger, so it is not larger than a record should be.
    pub max_body_bytes: usize,
    /// Largest checkpoint; the same reason.
    pub max_checkpoint_bytes: usize,
    /// How long a body may take to arrive, so that a slow sender holds nothing for long.
    pub body_timeout: Duration,
    /// Whether operators may say what programs are run as services, like administrators.
    pub operators_may_run_commands: bool,
    /// How much callers may ask.
    pub limits: LimitConfig,
    /// What a stream tells its reader to wait before reconnecting, in milliseconds.
    pub stream_retry_ms: u64,
    /// How long `start` waits for a service's health (`contracts/gpu-gateway.md` section 3).
    pub service_start_wait: Duration,
    /// How long `stop` waits for the end of an instance, its drain and grace included.
    pub service_stop_wait: Duration,
    /// Why there is no GPU, as a sentence for people; `None` when there is one.
    pub no_gpu_reason: Option<String>,
}

impl ApiConfig {
    /// Defaults for a gateway that listens on `address`.
    pub fn for_listener(address: SocketAddr) -> Self {
        let mut allowed_hosts: Vec<String> = ["localhost", "127.0.0.1", "[::1]"]
            .map(str::to_owned)
            .into();
        let own = match address {
            SocketAddr::V4(v4) => v4.ip().to_string(),
            SocketAddr::V6(v6) => format!("[{}]", v6.ip()),
        };
        if !address.ip().is_unspecified() && !allowed_hosts.contains(&own) {
            allowed_hosts.push(own);
        }
        Self {
            allowed_hosts,
            allowed_origins: ["http://localhost:*", "http://127.0.0.1:*"]
                .map(str::to_owned)
                .into(),
            trusted_proxies: 0,
            audit: AuditMode::default(),
            max_body_bytes: 1 << 20,
            max_checkpoint_bytes: 1 << 20,
            body_timeout: Duration::from_secs(30),
            operators_may_run_commands: false,
            limits: LimitConfig::default(),
            stream_retry_ms: 1_000,
            service_start_wait: Duration::from_secs(120),
            service_stop_wait: Duration::from_secs(60),
            no_gpu_reason: None,
        }
    }
}
