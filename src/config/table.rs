//! The table of settings. Adding a row here is all that a new setting needs: the field of `Config`, the
//! key, the environment name, `config show`, `config check` and the near-miss hints follow from it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use super::load::{ConfigError, Origin, Raw};
use super::value::{FromText, LogFormat, Secret};
use super::{Setting, load};
use crate::domain::audit::AuditMode;
use crate::domain::settings::Settings as Scheduling;
use crate::outbound::Network;

/// Any number.
const ANY: (u64, u64) = (0, u64::MAX);
/// Requests a minute, or none that are counted.
const RATE: (u64, u64) = (0, 1_000_000_000);
/// A duration of at least a millisecond and at most a year.
const SPAN: (u64, u64) = (1, 365 * 86_400_000);
/// A duration that may be none at all.
const SPAN_OR_NONE: (u64, u64) = (0, 365 * 86_400_000);

macro_rules! settings {
    ($($key:ident: $kind:ty, $env:literal, $aliases:expr, $range:expr, $default:expr, $about:literal;)*) => {
        /// Every setting, parsed and in bounds.
        #[derive(Clone, Debug)]
        pub struct Config {
            $(#[doc = $about] pub $key: $kind,)*
            /// Where each value came from, by key.
            pub origins: BTreeMap<&'static str, Origin>,
            /// Sentences about things that are not wrong but probably not meant.
            pub warnings: Vec<String>,
        }

        /// The rows, in the order they are shown.
        pub const SETTINGS: &[Setting] = &[$(Setting {
            key: stringify!($key),
            env: $env,
            aliases: $aliases,
            about: $about,
            range: $range,
            secret: <$kind as FromText>::SECRET,
            kind: <$kind as FromText>::KIND,
            default: || $default,
        },)*];

        impl Config {
            pub(super) fn from_raw(raw: &BTreeMap<&'static str, Raw>) -> Result<Config, ConfigError> {
                Ok(Config {
                    $($key: load::parse::<$kind>(raw, stringify!($key))?,)*
                    origins: raw.iter().map(|(key, value)| (*key, value.origin.clone())).collect(),
                    warnings: Vec::new(),
                })
            }
        }
    };
}

settings! {
    listen: SocketAddr, "RUNGATE_LISTEN", &[], ANY, "127.0.0.1:8080".to_owned(),
        "Address and port that the gateway listens on.";
    data_dir: PathBuf, "RUNGATE_DATA_DIR", &[], ANY, load::default_data_dir(),
        "Directory of the ledger, the logs of services and the administrator's token.";
    gpus: String, "RUNGATE_GPUS", &[], ANY, String::new(),
        "GPUs to simulate, e.g. `sim:24GiB,24GiB`; `none` for none; empty takes what the machine has.";
    allowed_hosts: Vec<String>, "RUNGATE_ALLOWED_HOSTS", &[], ANY, String::new(),
        "Host names that a request may be addressed to, besides the loopback names and the listening address.";
    allowed_origins: Vec<String>, "RUNGATE_ALLOWED_ORIGINS", &[], ANY, "http://localhost:*,http://127.0.0.1:*".to_owned(),
        "Patterns (`*`, `?`) of the origins of browser pages that may call.";
    tls_cert: Option<PathBuf>, "RUNGATE_TLS_CERT", &[], ANY, String::new(),
        "File of the certificate chain to show, in PEM form; empty for plain http.";
    tls_key: Option<PathBuf>, "RUNGATE_TLS_KEY", &[], ANY, String::new(),
        "File of the certificate's key, in PEM form, for the gateway's user only.";
    insecure_http: bool, "RUNGATE_INSECURE_HTTP", &[], ANY, "false".to_owned(),
        "Whether plain http may be spoken to other machines, which shows tokens and payloads to the network.";
    trusted_proxies: u64, "RUNGATE_TRUSTED_PROXIES", &[], (0, 16), "0".to_owned(),
        "Proxies in front of the gateway; a client's address is that many entries from the right of X-Forwarded-For.";
    audit: AuditMode, "RUNGATE_AUDIT", &[], ANY, "on".to_owned(),
        "What is recorded of writes: `on`, `required` (no answer before the record is on disk) or `off`.";
    operators_may_run_commands: bool, "RUNGATE_OPERATORS_MAY_RUN_COMMANDS", &[], ANY, "false".to_owned(),
        "Whether operators may register programs as services, which run as the gateway's user; otherwise administrators alone.";
    max_body_bytes: u64, "RUNGATE_MAX_BODY_BYTES", &[], (1_024, 1 << 30), "1048576".to_owned(),
        "Largest request body, in bytes.";
    min_free_bytes: u64, "RUNGATE_MIN_FREE_BYTES", &[], (0, 1 << 50), "268435456".to_owned(),
        "Bytes of the data directory's disk that stay free: below, starts, progress and checkpoints are answered 507; 0 for none.";
    rate_limit_user: u64, "RUNGATE_RATE_LIMIT_USER", &[], RATE, "60000".to_owned(),
        "Requests a minute of each user, further ones are answered 429; 0 for any number.";
    rate_limit_address: u64, "RUNGATE_RATE_LIMIT_ADDRESS", &[], RATE, "6000".to_owned(),
        "Requests a minute from one address without valid credentials; 0 for any number.";
    limit_admins: bool, "RUNGATE_LIMIT_ADMINS", &[], ANY, "false".to_owned(),
        "Whether the limits of each user hold for administrators too.";
    max_requests: u64, "RUNGATE_MAX_REQUESTS", &[], (1, 1 << 20), "1024".to_owned(),
        "Requests worked on at once; further ones are answered 429 after 10 ms.";
    max_requests_per_user: u64, "RUNGATE_MAX_REQUESTS_PER_USER", &[], (1, 1 << 20), "256".to_owned(),
        "Requests of one user worked on at once; further ones are answered 429.";
    max_requests_per_address: u64, "RUNGATE_MAX_REQUESTS_PER_ADDRESS", &[], (1, 1 << 20), "16".to_owned(),
        "Requests without credentials (logins) from one address worked on at once, a quarter of `max_requests` at most.";
    max_connections: u64, "RUNGATE_MAX_CONNECTIONS", &[], (1, 1 << 20), "4096".to_owned(),
        "Connections served at once, further ones wait to be accepted; without `trusted_proxies` a quarter of them from one address, further ones are closed.";
    max_streams: u64, "RUNGATE_MAX_STREAMS", &[], (1, 1 << 20), "2048".to_owned(),
        "Event streams served at once; further ones are answered 429.";
    max_streams_per_user: u64, "RUNGATE_MAX_STREAMS_PER_USER", &[], (1, 1 << 20), "512".to_owned(),
        "Event streams of one user served at once; further ones are answered 429.";
    nvml_library: String, "RUNGATE_NVML_LIBRARY", &[], ANY, String::new(),
        "File of NVIDIA's management library; empty finds it by its usual name.";
    gpu_sample_ms: u64, "RUNGATE_GPU_SAMPLE_MS", &[], (50, 60_000), "1000".to_owned(),
        "Milliseconds between two looks at the GPUs.";
    gpu_history_ms: u64, "RUNGATE_GPU_HISTORY_MS", &[], (1_000, 86_400_000), "60000".to_owned(),
        "Milliseconds of looks at the GPUs that are summed up in one record of the ledger.";
    gpu_release_wait_ms: u64, "RUNGATE_GPU_RELEASE_WAIT_MS", &[], SPAN, "30000".to_owned(),
        "Milliseconds that the GPU memory of an ended instance may stay taken, and that the end of a killed one may take, before that GPU is quarantined.";
    session_idle_ms: u64, "RUNGATE_SESSION_IDLE_MS", &[], (1_000, 7 * 86_400_000), "7200000".to_owned(),
        "Milliseconds without a request after which a browser's session ends.";
    session_ttl_ms: u64, "RUNGATE_SESSION_TTL_MS", &[], (1_000, 7 * 86_400_000), "28800000".to_owned(),
        "Milliseconds after which a browser's session ends in any case.";
    session_remember_idle_ms: u64, "RUNGATE_SESSION_REMEMBER_IDLE_MS", &[], (1_000, 90 * 86_400_000), "604800000".to_owned(),
        "Milliseconds without a request, for whoever asked to be remembered.";
    session_remember_ttl_ms: u64, "RUNGATE_SESSION_REMEMBER_TTL_MS", &[], (1_000, 90 * 86_400_000), "2592000000".to_owned(),
        "Milliseconds in any case, for whoever asked to be remembered.";
    max_sessions: u64, "RUNGATE_MAX_SESSIONS", &[], (1, 1_000), "10".to_owned(),
        "Browser sessions of one user; one more ends the oldest.";
    login_attempts: u64, "RUNGATE_LOGIN_ATTEMPTS", &[], (1, 1_000), "5".to_owned(),
        "Failed logins of an account, and four times as many of an address, that lock it for a while.";
    login_lockout_ms: u64, "RUNGATE_LOGIN_LOCKOUT_MS", &[], (1_000, 86_400_000), "30000".to_owned(),
        "Milliseconds of the first lock; doubles with each further failure.";
    login_lockout_max_ms: u64, "RUNGATE_LOGIN_LOCKOUT_MAX_MS", &[], (1_000, 86_400_000), "900000".to_owned(),
        "Longest such lock, in milliseconds, and how long after the last failure all are forgotten.";
    shutdown_limit_ms: u64, "RUNGATE_SHUTDOWN_LIMIT_MS", &[], SPAN_OR_NONE, "25000".to_owned(),
        "Milliseconds that a stop waits for calls in flight.";
    callback_allow_private: bool, "RUNGATE_CALLBACK_ALLOW_PRIVATE", &[], ANY, "false".to_owned(),
        "Whether callbacks may go to private and loopback addresses.";
    callback_allow_networks: Vec<Network>, "RUNGATE_CALLBACK_ALLOW_NETWORKS", &[], ANY, String::new(),
        "Networks that callbacks may go to whatever they are, e.g. `10.1.0.0/16`.";
    notify_allow_private: bool, "RUNGATE_NOTIFY_ALLOW_PRIVATE", &[], ANY, "false".to_owned(),
        "Whether notifications may go to private and loopback addresses.";
    notify_allow_networks: Vec<Network>, "RUNGATE_NOTIFY_ALLOW_NETWORKS", &[], ANY, String::new(),
        "Networks that notifications may go to whatever they are, e.g. `10.1.0.0/16`.";
    ntfy_enabled: bool, "RUNGATE_NTFY_ENABLED", &[("NTFY_ENABLED", 1)], ANY, "false".to_owned(),
        "Whether the default tenant is told of its runs by ntfy, at `ntfy_url` and `ntfy_topic`.";
    ntfy_url: String, "RUNGATE_NTFY_URL", &[("NTFY_URL", 1)], ANY, "https://ntfy.sh".to_owned(),
        "Server of the default tenant's ntfy topic.";
    ntfy_topic: String, "RUNGATE_NTFY_TOPIC", &[("NTFY_TOPIC", 1)], ANY, String::new(),
        "Topic of the default tenant; whoever knows it reads what it is told, unless the server protects it.";
    service_allow_networks: Vec<Network>, "RUNGATE_SERVICE_ALLOW_NETWORKS", &[], ANY, String::new(),
        "Networks that services registered by URL may be in whatever they are, e.g. `100.64.0.0/10` for Tailscale.";
    probe_interval_ms: u64, "RUNGATE_PROBE_INTERVAL_MS", &[], (100, 3_600_000), "5000".to_owned(),
        "Milliseconds between health probes of a running service.";
    docker_host: String, "RUNGATE_DOCKER_HOST", &[], ANY, String::new(),
        "Container engine, e.g. `unix:///var/run/docker.sock`, `tcp://host:2376` or `ssh://user@host`; empty takes `DOCKER_HOST` or the usual socket, `none` uses none.";
    docker_address: IpAddr, "RUNGATE_DOCKER_ADDRESS", &[], ANY, "127.0.0.1".to_owned(),
        "Address of the engine's machine on which containers' ports are published, and at which they are called.";
    docker_images: Vec<String>, "RUNGATE_DOCKER_IMAGES", &[], ANY, String::new(),
        "Patterns (`*`) of the images that services may be made of; empty allows none.";
    docker_pull: bool, "RUNGATE_DOCKER_PULL", &[], ANY, "false".to_owned(),
        "Whether an allowed image that is not there is pulled when its service starts.";
    docker_credentials: Option<PathBuf>, "RUNGATE_DOCKER_CREDENTIALS", &[], ANY, String::new(),
        "File with credentials of registries, as `docker login` writes it (`config.json`).";
    docker_volumes: Vec<String>, "RUNGATE_DOCKER_VOLUMES", &[], ANY, String::new(),
        "Folders below which, and names of volumes that, containers may mount; empty allows none.";
    docker_networks: Vec<String>, "RUNGATE_DOCKER_NETWORKS", &[], ANY, String::new(),
        "Networks of the engine that containers may join besides its default bridge.";
    docker_host_ipc: bool, "RUNGATE_DOCKER_HOST_IPC", &[], ANY, "false".to_owned(),
        "Whether containers may see the host's shared memory (`ipc: host`).";
    docker_writable_root: bool, "RUNGATE_DOCKER_WRITABLE_ROOT", &[], ANY, "false".to_owned(),
        "Whether containers may write to their root file system, besides `/tmp` and volumes.";
    docker_capabilities: Vec<String>, "RUNGATE_DOCKER_CAPABILITIES", &[], ANY, String::new(),
        "Linux capabilities that containers keep, e.g. `NET_BIND_SERVICE`; all others are taken away.";
    docker_pids_max: u64, "RUNGATE_DOCKER_PIDS_MAX", &[], (1, 4_194_304), "4096".to_owned(),
        "Processes and threads that a container may have.";
    docker_memory_max_mib: u64, "RUNGATE_DOCKER_MEMORY_MAX_MIB", &[], (8, 1 << 30), "16384".to_owned(),
        "MiB of memory that a container may ask for at most, and has when it asks for none.";
    docker_jobs_max: u64, "RUNGATE_DOCKER_JOBS_MAX", &[], (1, 10_000), defaults().job_containers_max.to_string(),
        "Containers of jobs that there may be at once.";
    docker_jobs_keep_hours: u64, "RUNGATE_DOCKER_JOBS_KEEP_HOURS", &[], (0, 87_600), "168".to_owned(),
        "Hours that the output of an ended job's container, and the checkpoint folder of a failed one, are kept.";
    docker_gateway_url: String, "RUNGATE_DOCKER_GATEWAY_URL", &[], ANY, String::new(),
        "How containers reach this gateway, e.g. `http://host.docker.internal:8080`, for progress and checkpoints; empty when they share its network.";
    log: String, "RUNGATE_LOG", &[], ANY, "info".to_owned(),
        "Log filter, e.g. `info` or `rungate::executor=debug,warn`.";
    log_format: LogFormat, "RUNGATE_LOG_FORMAT", &[], ANY, "text".to_owned(),
        "How the log is written: `text` or `json`.";
    cache_mib: u64, "RUNGATE_CACHE_MIB", &[], (1, 1 << 20), "16".to_owned(),
        "MiB of memory for the ledger's page cache.";
    snapshot_idle_ms: u64, "RUNGATE_SNAPSHOT_IDLE_MS", &[], SPAN, "5000".to_owned(),
        "Milliseconds of quiet after which a snapshot is saved, so that a restart is short.";
    preempt_priority_gap: u64, "RUNGATE_PREEMPT_PRIORITY_GAP", &[("PREEMPT_PRIORITY_GAP", 1)], (1, 5), defaults().preempt_priority_gap.to_string(),
        "Levels by which a job must be more urgent to preempt another; 5 turns preemption off.";
    min_runtime_ms: u64, "RUNGATE_MIN_RUNTIME_MS", &[], SPAN_OR_NONE, defaults().min_runtime_ms.to_string(),
        "Milliseconds that an attempt runs before it may be preempted, where its service sets none.";
    ageing_ms_per_level: u64, "RUNGATE_AGEING_MS_PER_LEVEL", &[], SPAN, defaults().ageing_ms_per_level.to_string(),
        "Milliseconds of waiting that count as one level of priority.";
    share_half_life_ms: u64, "RUNGATE_SHARE_HALF_LIFE_MS", &[], SPAN, defaults().share_half_life_ms.to_string(),
        "Milliseconds after which what a tenant used counts half as much in the fair share.";
    swap_max_wait_ms: u64, "RUNGATE_SWAP_MAX_WAIT_MS", &[], SPAN_OR_NONE, defaults().swap_max_wait_ms.to_string(),
        "Milliseconds that a job waits at most for its service to be loaded while others keep the memory busy.";
    idle_timeout_ms: u64, "RUNGATE_IDLE_TIMEOUT_MS", &[("IDLE_TIMEOUT_SECONDS", 1_000)], SPAN, defaults().idle_timeout_ms.to_string(),
        "Milliseconds without work after which a service that the scheduler started is stopped.";
    drain_ms: u64, "RUNGATE_DRAIN_MS", &[], SPAN_OR_NONE, defaults().drain_ms.to_string(),
        "Milliseconds that a stop waits for running jobs when asked to drain.";
    retry_base_ms: u64, "RUNGATE_RETRY_BASE_MS", &[], SPAN, defaults().retry_base_ms.to_string(),
        "Milliseconds before a failed attempt is tried again; doubles each time.";
    retry_max_ms: u64, "RUNGATE_RETRY_MAX_MS", &[], SPAN, defaults().retry_max_ms.to_string(),
        "Longest such delay, in milliseconds.";
    restart_base_ms: u64, "RUNGATE_RESTART_BASE_MS", &[], SPAN, defaults().restart_base_ms.to_string(),
        "Milliseconds before a dead service is started again; doubles with each death in a row.";
    restart_max_ms: u64, "RUNGATE_RESTART_MAX_MS", &[], SPAN, defaults().restart_max_ms.to_string(),
        "Longest such delay, in milliseconds.";
    crash_loop_deaths: u64, "RUNGATE_CRASH_LOOP_DEATHS", &[], (1, 1_000), defaults().crash_loop_deaths.to_string(),
        "Deaths in a row after which a service is left alone.";
    crash_loop_reset_ms: u64, "RUNGATE_CRASH_LOOP_RESET_MS", &[], SPAN, defaults().crash_loop_reset_ms.to_string(),
        "Milliseconds alive after which earlier deaths are forgotten.";
    callback_base_ms: u64, "RUNGATE_CALLBACK_BASE_MS", &[], SPAN, defaults().callback_base_ms.to_string(),
        "Milliseconds before a failed callback is tried again; doubles each time.";
    callback_max_delay_ms: u64, "RUNGATE_CALLBACK_MAX_DELAY_MS", &[], SPAN, defaults().callback_max_delay_ms.to_string(),
        "Longest such delay, in milliseconds.";
    callback_give_up_ms: u64, "RUNGATE_CALLBACK_GIVE_UP_MS", &[], SPAN, defaults().callback_give_up_ms.to_string(),
        "Milliseconds after which a callback is given up.";
    sleep_host_max_mib: u64, "RUNGATE_SLEEP_HOST_MAX_MIB", &[], (0, 1 << 30), defaults().sleep_host_max_mib.to_string(),
        "MiB of GPU memory that sleeping services may keep in host memory, all together; 0 lets none.";
    cuda_checkpoint: String, "RUNGATE_CUDA_CHECKPOINT", &[], ANY, "cuda-checkpoint".to_owned(),
        "Program of the ladders' step `cuda-checkpoint`, as a path or to be found in PATH.";
    signing_key_max_age_ms: u64, "RUNGATE_SIGNING_KEY_MAX_AGE_MS", &[], SPAN, "2592000000".to_owned(),
        "Milliseconds after which job tokens are signed with a new key.";
    sso_issuer: String, "RUNGATE_SSO_ISSUER", &[], ANY, String::new(),
        "OpenID Connect issuer whose tokens are accepted, as its tokens name it; empty for no single sign-on.";
    sso_audience: String, "RUNGATE_SSO_AUDIENCE", &[], ANY, String::new(),
        "Audience that the issuer's tokens must be for.";
    sso_jwks_url: String, "RUNGATE_SSO_JWKS_URL", &[], ANY, String::new(),
        "Where the issuer's keys are; empty asks its discovery document.";
    sso_algorithms: Vec<String>, "RUNGATE_SSO_ALGORITHMS", &[], ANY, "RS256".to_owned(),
        "Algorithms that the issuer signs with: RS256 to RS512, PS256 to PS512, ES256, ES384, EdDSA.";
    sso_token_types: Vec<String>, "RUNGATE_SSO_TOKEN_TYPES", &[], ANY, "at+jwt,JWT".to_owned(),
        "Types (`typ`) that the issuer's tokens may have.";
    sso_user_claim: String, "RUNGATE_SSO_USER_CLAIM", &[], ANY, "sub".to_owned(),
        "Claim that becomes the user's id; a path of names with points between them is followed.";
    sso_tenant: String, "RUNGATE_SSO_TENANT", &[], ANY, "sso".to_owned(),
        "Tenant of the issuer's users.";
    sso_tenant_claim: String, "RUNGATE_SSO_TENANT_CLAIM", &[], ANY, String::new(),
        "Claim that becomes the tenant instead; empty for `sso_tenant`.";
    sso_roles_claim: String, "RUNGATE_SSO_ROLES_CLAIM", &[], ANY, String::new(),
        "Claim that `sso_roles` is about: a list, or words.";
    sso_roles: Vec<String>, "RUNGATE_SSO_ROLES", &[], ANY, String::new(),
        "Rules `VALUE=ROLE`: who has this value in its claim has this role; empty leaves roles to the administrator.";
    sso_default_role: String, "RUNGATE_SSO_DEFAULT_ROLE", &[], ANY, "user".to_owned(),
        "Role of those to whom no rule gives one; `none` refuses them.";
    sso_provision: bool, "RUNGATE_SSO_PROVISION", &[], ANY, "true".to_owned(),
        "Whether a user is created when it first comes; otherwise it must exist.";
    sso_allow_private: bool, "RUNGATE_SSO_ALLOW_PRIVATE", &[], ANY, "false".to_owned(),
        "Whether the issuer may be at private and loopback addresses, and speak plain http there.";
    url: String, "RUNGATE_URL", &[("GATEWAY_URL", 1)], ANY, "http://127.0.0.1:8080".to_owned(),
        "Gateway that the client commands talk to.";
    ca_cert: Option<PathBuf>, "RUNGATE_CA_CERT", &[], ANY, String::new(),
        "File of the certificates, in PEM form, that the client commands trust instead of the system's.";
    token: Secret, "RUNGATE_TOKEN", &[("GATEWAY_API_TOKEN", 1)], ANY, String::new(),
        "Bearer token of the client commands; from the environment only.";
    token_file: Option<PathBuf>, "RUNGATE_TOKEN_FILE", &[], ANY, String::new(),
        "File that holds the bearer token; empty takes the bootstrap token of `data_dir` when it is readable.";
}

fn defaults() -> Scheduling {
    Scheduling::default()
}

impl Config {
    /// The numbers that `decide` and `plan` go by.
    pub fn scheduling(&self) -> Scheduling {
        Scheduling {
            // Their ranges in the table keep the conversions from ever saturating.
            preempt_priority_gap: u8::try_from(self.preempt_priority_gap).unwrap_or(u8::MAX),
            crash_loop_deaths: u32::try_from(self.crash_loop_deaths).unwrap_or(u32::MAX),
            min_runtime_ms: self.min_runtime_ms,
            ageing_ms_per_level: self.ageing_ms_per_level,
            share_half_life_ms: self.share_half_life_ms,
            swap_max_wait_ms: self.swap_max_wait_ms,
            idle_timeout_ms: self.idle_timeout_ms,
            drain_ms: self.drain_ms,
            retry_base_ms: self.retry_base_ms,
            retry_max_ms: self.retry_max_ms,
            restart_base_ms: self.restart_base_ms,
            restart_max_ms: self.restart_max_ms,
            crash_loop_reset_ms: self.crash_loop_reset_ms,
            callback_base_ms: self.callback_base_ms,
            callback_max_delay_ms: self.callback_max_delay_ms,
            callback_give_up_ms: self.callback_give_up_ms,
            ntfy: self.ntfy_enabled.then(|| {
                let url = self.ntfy_url.trim_end_matches('/');
                (url.into(), self.ntfy_topic.as_str().into())
            }),
            sleep_host_max_mib: self.sleep_host_max_mib,
            job_containers_max: usize::try_from(self.docker_jobs_max).unwrap_or(usize::MAX),
        }
    }

    /// The file that holds the first administrator's token.
    pub fn bootstrap_token_path(&self) -> PathBuf {
        self.data_dir.join("auth").join("bootstrap-admin-token")
    }
}
