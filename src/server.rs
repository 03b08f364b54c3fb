//! Wiring: what is started in which order, what a stop waits for, and one sentence for each thing that can
//! be wrong at the start.

mod checkpoint;
mod gpus;
mod logins;
mod recover;
mod seams;
mod transport;

pub use checkpoint::{public_key_path, sign_checkpoint};
pub use recover::recover_admin;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use smol_str::SmolStr;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use self::gpus::Gpus;
use self::seams::{InstanceTokens, LedgerSource, ToCoordinator};
use self::transport::TransportError;
use crate::api::limits::{LimitConfig, quarter};
use crate::api::listen::ListenConfig;
use crate::api::tls::Tls;
use crate::api::{ApiConfig, App, Parts};
use crate::auth::Authenticator;
use crate::auth::bootstrap::{self, BootstrapError};
use crate::auth::checkpoint_key::{CheckpointKey, CheckpointKeyError};
use crate::auth::jwt::signing::{SigningKeys, SigningKeysError};
use crate::auth::jwt::work::WorkTokens;
use crate::auth::logins::LoginsError;
use crate::auth::ntfy_token::NtfyTokens;
use crate::auth::secret::{TokenKey, TokenKeyError};
use crate::auth::sso::{self, Sso, SsoError};
use crate::auth::uses::Uses;
use crate::config::Config;
use crate::coordinator::{self, Handle, Running, SnapshotRules};
use crate::domain::command::{Command, Origin};
use crate::domain::container::Engine;
use crate::domain::ids::PlaneId;
use crate::domain::spec::GpuFacts;
use crate::domain::tenant::Tenancy;
use crate::driver::{
    ContainerOwners, ContainerRules, Docker, DockerOptions, Driver, DriverError, DriverOptions,
    Meter, Outcomes, ProbeTimings, Tasks,
};
use crate::executor::{Executor, ExecutorOptions, PROGRESS_EVERY, Secret, SecretError};
use crate::gpu::{self, InventoryError, Machine};
use crate::ledger::{CommitError, Ledger, OpenError, OpenOptions, Space, Writer};
use crate::outbound::{Purpose, Reach, Rules};
use crate::telemetry::Metrics;

/// The gateway answers now.
#[derive(Clone, Debug)]
pub struct Ready {
    /// The address it listens on, its port chosen when the setting's was 0.
    pub addr: SocketAddr,
    /// Whether it speaks TLS.
    pub is_tls: bool,
    /// Where the administrator's token lies.
    pub token_path: PathBuf,
}

/// Why the gateway did not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(
        "cannot listen on {addr}: the port is taken; stop the other program or set --listen to another port"
    )]
    PortTaken { addr: SocketAddr },
    #[error("cannot listen on {addr}; check --listen")]
    Listen {
        addr: SocketAddr,
        source: std::io::Error,
    },
    #[error("cannot create the data directory {path}; check --data-dir and its permissions")]
    DataDir {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(transparent)]
    Ledger(#[from] OpenError),
    #[error("the ledger could not be replayed; `rungate ledger verify` tells more")]
    Recover(#[from] coordinator::RecoverError),
    #[error(transparent)]
    Token(#[from] BootstrapError),
    #[error(transparent)]
    TokenKey(#[from] TokenKeyError),
    #[error(transparent)]
    CheckpointKey(#[from] CheckpointKeyError),
    #[error(transparent)]
    Logins(#[from] LoginsError),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error(transparent)]
    SigningKeys(#[from] SigningKeysError),
    #[error(transparent)]
    Sso(#[from] SsoError),
    #[error(transparent)]
    Gpus(#[from] InventoryError),
    #[error(transparent)]
    Driver(#[from] DriverError),
    #[error("cannot make an HTTP client")]
    Client(#[from] reqwest::Error),
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    /// State is ahead of the disk: nothing may go on.
    #[error("the ledger could not be written; nothing that was answered is lost")]
    Commit(#[from] CommitError),
    #[error("the coordinator ended unexpectedly; see the log")]
    CoordinatorGone,
}

/// How long requests may go on once no call is open any more: all but streams, which have ended by then, are short.
const REQUESTS_DRAIN: Duration = Duration::from_secs(5);

/// How long a start waits for what a killed predecessor still holds, and how often it looks. A person who mistook
/// the port hardly notices; a child needs milliseconds, more on a busy machine.
const PREDECESSOR_WAIT: Duration = Duration::from_secs(2);
const PREDECESSOR_PAUSE: Duration = Duration::from_millis(20);

/// The HTTP server loop.
struct Http {
    task: tokio::task::JoinHandle<()>,
    /// Accepts no more connections from then on.
    closing: CancellationToken,
}

impl Http {
    fn start(listener: TcpListener, app: App, listening: ListenConfig) -> Http {
        let closing = CancellationToken::new();
        let router = crate::api::router(app);
        let serving = crate::api::listen::serve(listener, router, listening, closing.clone());
        Http {
            task: tokio::spawn(serving),
            closing,
        }
    }
}

/// What runs while the gateway does.
struct Core {
    ledger: Ledger,
    space: Space,
    handle: Handle,
    driver: Driver,
    executor: Executor,
    outcomes: Outcomes,
    gpus: Gpus,
    tasks: Tasks,
    /// Resolves when the coordinator has ended.
    ended: oneshot::Receiver<Result<(), ServeError>>,
    /// Which gateway process of this ledger this is, from 1.
    epoch: u64,
}

/// Runs a gateway until `shutdown` is cancelled.
///
/// # Errors
/// One sentence for each thing that can be wrong at the start, before anything on disk is changed by it; and
/// a failed commit, after which the process must end.
pub async fn serve(
    config: Config,
    ready: Option<oneshot::Sender<Ready>>,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let taken = |error: &ServeError| matches!(error, ServeError::PortTaken { .. });
    let tls = transport::tls(&config)?;
    let reload = transport::reload_on_hangup(tls.clone())?;
    let listener = patiently(taken, || bind(config.listen)).await?;
    let addr = listener.local_addr().map_err(|source| ServeError::Listen {
        addr: config.listen,
        source,
    })?;
    let machine = Machine::here(&config.nvml_library);
    let inventory = gpu::inventory(&config.gpus, &machine)?;
    bootstrap::check(&config.data_dir)?;
    Secret::check(&config.data_dir)?;
    let sso = Sso::new(&sso_settings(&config))?;
    let metrics = Metrics::install();
    let locked = |error: &ServeError| matches!(error, ServeError::Ledger(OpenError::Locked { .. }));
    let opened = patiently(locked, || open_ledger(&config)).await?;
    let keys = SigningKeys::load_or_create(&config.data_dir, crate::clock::now())?;
    let work = WorkTokens::new(keys, opened.0.instance_id());
    let mut core = Core::start(&config, addr, opened, (&work, inventory.is_measured))?;
    let token = bootstrap::load_or_create(&config.data_dir)?;
    let token_key = TokenKey::load_or_create(&config.data_dir)?;
    let logins = logins::open(&config, &token_key).await?;
    let uses = Uses::load(&config.data_dir);
    core.tasks.spawn("token uses", keep_uses(uses.clone()));
    core.tasks.spawn("metrics", metrics.clone().keep_up());
    core.tasks.spawn("certificate", reload);
    let renewing = keep_keys_young(work.clone(), config.signing_key_max_age_ms);
    core.tasks.spawn("signing keys", renewing);
    core.begin(inventory.gpus).await;

    let app = App::new(Parts {
        config: api_config(&config, addr, inventory.reason),
        handle: core.handle.clone(),
        ledger: core.ledger.clone(),
        space: core.space.clone(),
        auth: Authenticator::new(&token.token, token_key, uses.clone()).with_signed(work, sso),
        checkpoint_key: CheckpointKey::load_or_create(&config.data_dir)?,
        logins: logins.clone(),
        ntfy_tokens: NtfyTokens::new(&config.data_dir),
        metrics,
        logs: core.driver.logs().clone(),
        docker: core.driver.docker().clone(),
        gpus: core.gpus.samples.clone(),
        stopping: shutdown.child_token(),
    });
    core.keep_up(&app);
    let http = Http::start(listener, app.clone(), listen_config(&config, tls));
    if let Some(ready) = ready {
        // A caller that does not care has dropped it.
        let _ = ready.send(Ready {
            addr,
            is_tls: config.tls_cert.is_some(),
            token_path: token.path,
        });
    }
    tokio::select! {
        () = shutdown.cancelled() => {}
        result = &mut core.ended => {
            http.closing.cancel();
            core.tasks.stop().await;
            return result.unwrap_or(Err(ServeError::CoordinatorGone)).and(Err(ServeError::CoordinatorGone));
        }
    }
    let stopped = core
        .stop(http, &app, Duration::from_millis(config.shutdown_limit_ms))
        .await;
    save_uses(&uses);
    logins.sessions.save_uses().await;
    stopped
}

fn listen_config(config: &Config, tls: Option<Tls>) -> ListenConfig {
    let max_connections = usize::try_from(config.max_connections).unwrap_or(usize::MAX);
    ListenConfig {
        max_connections,
        // A trusted proxy brings everybody, and is asked to bound its own clients.
        max_connections_per_peer: (config.trusted_proxies == 0).then(|| quarter(max_connections)),
        drain_timeout: REQUESTS_DRAIN,
        tls,
        ..ListenConfig::default()
    }
}

/// Whether the container engine of the settings answers, and where it is.
pub async fn probe_engine(config: &Config) -> (String, Engine) {
    Docker::probe(docker_options(config)).await
}

/// Whether the gateway would listen as the settings say: its certificate and key, or plain http.
///
/// # Errors
/// As `serve`, in one sentence.
pub fn check_transport(config: &Config) -> Result<(), ServeError> {
    Ok(transport::tls(config).map(drop)?)
}

/// Bounds of how often it is looked whether the signing key is too old.
const KEY_AGE_EVERY: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(3_600);

async fn keep_keys_young(work: WorkTokens, max_age_ms: u64) {
    let every = Duration::from_millis(max_age_ms / 8);
    let every = every.clamp(*KEY_AGE_EVERY.start(), *KEY_AGE_EVERY.end());
    loop {
        let keys = work.keys().clone();
        let now = crate::clock::now();
        if keys.is_older_than(max_age_ms, now) {
            match tokio::task::spawn_blocking(move || keys.rotate(now)).await {
                Ok(Ok(kid)) => tracing::info!(kid, "job tokens are signed with a new key"),
                Ok(Err(error)) => tracing::error!(%error, "the signing key could not be renewed"),
                // Only a runtime that shuts down cancels it; so is this task.
                Err(_) => return,
            }
        }
        tokio::time::sleep(every).await;
    }
}

fn sso_settings(config: &Config) -> sso::Settings {
    sso::Settings {
        issuer: config.sso_issuer.clone(),
        audience: config.sso_audience.clone(),
        jwks_url: config.sso_jwks_url.clone(),
        algorithms: config.sso_algorithms.clone(),
        token_types: config.sso_token_types.clone(),
        user_claim: config.sso_user_claim.clone(),
        tenant: config.sso_tenant.clone(),
        tenant_claim: config.sso_tenant_claim.clone(),
        roles_claim: config.sso_roles_claim.clone(),
        roles: config.sso_roles.clone(),
        default_role: config.sso_default_role.clone(),
        provision: config.sso_provision,
        allow_private: config.sso_allow_private,
    }
}

/// How often the last uses of tokens are written down.
const USES_EVERY: Duration = Duration::from_secs(60);

async fn keep_uses(uses: Uses) {
    loop {
        tokio::time::sleep(USES_EVERY).await;
        let uses = uses.clone();
        // It logs what goes wrong itself.
        let _ = tokio::task::spawn_blocking(move || save_uses(&uses)).await;
    }
}

fn save_uses(uses: &Uses) {
    if let Err(error) = uses.save() {
        tracing::warn!(%error, "when tokens were last used could not be written down");
    }
}

impl Core {
    /// Makes State anew from the ledger and starts coordinator and executor.
    fn start(
        config: &Config,
        addr: SocketAddr,
        (ledger, writer): (Ledger, Writer),
        (work, has_gpus): (&WorkTokens, bool),
    ) -> Result<Core, ServeError> {
        let settings = config.scheduling();
        let state = coordinator::recover(&ledger, settings.ageing_ms_per_level)?;
        let epoch = state.epoch + 1;
        let space = Space::new(&config.data_dir, config.min_free_bytes);
        let (sender, effects) = tokio::sync::mpsc::unbounded_channel();
        let Running { handle, thread } = coordinator::start(coordinator::Parts {
            writer,
            state,
            settings,
            effects: sender,
            snapshots: SnapshotRules::after(Duration::from_millis(config.snapshot_idle_ms)),
            space: space.clone(),
        })
        .map_err(ServeError::Thread)?;
        let tasks = Tasks::new();
        let outcomes = Outcomes::new(Arc::new(ToCoordinator(handle.clone())));
        let gpus = Gpus::start(config, has_gpus, ledger.instance_id());
        let gpus = gpus.map_err(ServeError::Thread)?;
        let seams = (&outcomes, gpus.meter(&handle), gpus.containers.clone());
        let (executor, driver) = executor(config, addr, &ledger, seams, (work, &tasks))?;
        let performing = executor.clone();
        tasks.spawn("disk space", space.clone().keep_looking());
        tasks.spawn("executor", async move { performing.run(effects).await });
        Ok(Core {
            ledger,
            space,
            handle,
            driver,
            executor,
            outcomes,
            gpus,
            tasks,
            ended: watch_thread(thread),
            epoch,
        })
    }

    /// What is done now and then for those who ask over HTTP.
    fn keep_up(&self, app: &App) {
        let (logins, audit) = (app.clone(), app.clone());
        self.tasks.spawn("logins", logins::keep_up(logins));
        self.tasks
            .spawn("audit", async move { audit.audit.keep_telling().await });
    }

    /// The first commands of a process: which GPUs there are, and what a restart left open.
    async fn begin(&self, gpus: Vec<GpuFacts>) {
        let version = SmolStr::new_static(env!("CARGO_PKG_VERSION"));
        let started = Command::GatewayStarted {
            epoch: self.epoch,
            version,
        };
        // Both fail only when the coordinator has ended, which its thread reports.
        let listed = Command::GpusListed { gpus };
        let _ = self.handle.submit(gateway_origin(), listed).await;
        let _ = self.handle.submit(gateway_origin(), started).await;
        self.gpus
            .watch(&self.handle, self.outcomes.clone(), &self.tasks);
    }

    /// Begins nothing new, lets open calls end for at most `limit`, puts what still runs back into the queue, and
    /// ends with a snapshot. Requests are answered until the calls have ended: services report progress and save
    /// checkpoints to the last, and `/readyz` tells that it is over.
    async fn stop(self, http: Http, app: &App, limit: Duration) -> Result<(), ServeError> {
        self.handle.quiet().await;
        let open = self.executor.finish_calls(limit).await;
        if open > 0 {
            tracing::info!(
                calls.open = open,
                "calls did not end in time; their runs go back to the queue"
            );
        }
        http.closing.cancel();
        // It logs what it had to cut off.
        let _ = http.task.await;
        app.audit.tell(true);
        self.tasks.stop().await;
        // A coordinator that has ended meanwhile says why below.
        let _ = self
            .handle
            .submit(gateway_origin(), Command::GatewayStopped)
            .await;
        self.handle.stop().await;
        self.ended.await.unwrap_or(Err(ServeError::CoordinatorGone))
    }
}

/// Tries again for a while what a predecessor may still hold: one that was killed while it started a service has
/// left a child that keeps its port and its lock until it becomes that service.
async fn patiently<T>(
    held: impl Fn(&ServeError) -> bool,
    attempt: impl Fn() -> Result<T, ServeError>,
) -> Result<T, ServeError> {
    let deadline = tokio::time::Instant::now() + PREDECESSOR_WAIT;
    loop {
        match attempt() {
            Err(error) if held(&error) && tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(PREDECESSOR_PAUSE).await;
            }
            result => return result,
        }
    }
}

fn open_ledger(config: &Config) -> Result<(Ledger, Writer), ServeError> {
    create_private(&config.data_dir)?;
    let options = OpenOptions {
        cache_bytes: usize::try_from(config.cache_mib << 20).unwrap_or(usize::MAX),
    };
    Ok(Ledger::open(&config.data_dir, &options)?)
}

/// Connections that wait to be accepted at most; the kernel's own bound (`net.core.somaxconn`) may be lower.
const BACKLOG: u32 = 1_024;

fn bind(addr: SocketAddr) -> Result<TcpListener, ServeError> {
    let listen = || {
        let socket = if addr.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        // Connections of an earlier process that are still being closed are no obstacle.
        socket.set_reuseaddr(true)?;
        socket.bind(addr)?;
        socket.listen(BACKLOG)
    };
    listen().map_err(|source: std::io::Error| match source.kind() {
        std::io::ErrorKind::AddrInUse => ServeError::PortTaken { addr },
        _ => ServeError::Listen { addr, source },
    })
}

/// Creates the data directory for its owner only.
fn create_private(path: &Path) -> Result<(), ServeError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| ServeError::DataDir {
            path: path.to_owned(),
            source,
        })
}

fn executor(
    config: &Config,
    addr: SocketAddr,
    ledger: &Ledger,
    (outcomes, meter, container_owners): (&Outcomes, Arc<dyn Meter>, ContainerOwners),
    (work, tasks): (&WorkTokens, &Tasks),
) -> Result<(Executor, Driver), ServeError> {
    let driver = Driver::new(
        DriverOptions {
            data_dir: config.data_dir.clone(),
            ledger: ledger.instance_id(),
            probes: ProbeTimings {
                liveness: Duration::from_millis(config.probe_interval_ms),
                ..ProbeTimings::default()
            },
            services: service_rules(config),
            credentials: Arc::new(InstanceTokens::new(work.clone(), &config.data_dir)),
            docker: docker_options(config),
            container_owners,
            meter,
            cuda_checkpoint: config.cuda_checkpoint.clone(),
        },
        outcomes.clone(),
        tasks.clone(),
    )?;
    let options = ExecutorOptions {
        gateway_url: transport::gateway_url(config, addr),
        container_gateway_url: config.docker_gateway_url.clone(),
        ledger: ledger.instance_id(),
        callbacks: callback_rules(config),
        notices: notice_rules(config),
        ntfy_token: seams::ntfy_token(NtfyTokens::new(&config.data_dir)),
        services: service_rules(config),
        secret: Secret::load_or_create(&config.data_dir)?,
        job_token: seams::job_token(work.clone()),
        read_container: Arc::new(crate::api::container_of_job),
        jobs_kept: Duration::from_secs(config.docker_jobs_keep_hours * 3_600),
        progress_every: PROGRESS_EVERY,
    };
    let source = Arc::new(LedgerSource(ledger.clone()));
    let outcomes = outcomes.clone();
    let executor = Executor::new(driver.clone(), outcomes, source, tasks.clone(), options)?;
    Ok((executor, driver))
}

fn docker_options(config: &Config) -> DockerOptions {
    DockerOptions {
        host: config.docker_host.clone(),
        address: config.docker_address,
        credentials: config.docker_credentials.clone(),
        rules: container_rules(config),
    }
}

fn container_rules(config: &Config) -> ContainerRules {
    ContainerRules {
        images: config.docker_images.clone(),
        volumes: config.docker_volumes.clone(),
        networks: config.docker_networks.clone(),
        host_ipc: config.docker_host_ipc,
        writable_root: config.docker_writable_root,
        capabilities: config.docker_capabilities.clone(),
        pids_max: config.docker_pids_max,
        memory_max_mib: config.docker_memory_max_mib,
        pull: config.docker_pull,
    }
}

fn callback_rules(config: &Config) -> Rules {
    let allowed = config.callback_allow_networks.clone();
    let reach = reach(config.callback_allow_private);
    Rules::new(Purpose::Callbacks, reach, allowed)
}

fn notice_rules(config: &Config) -> Rules {
    let allowed = config.notify_allow_networks.clone();
    let reach = reach(config.notify_allow_private);
    Rules::new(Purpose::Notifications, reach, allowed)
}

fn reach(allow_private: bool) -> Reach {
    match allow_private {
        true => Reach::PublicAndPrivate,
        false => Reach::Public,
    }
}

/// Operators choose services' addresses, and services are near: only what is no service anywhere is refused.
fn service_rules(config: &Config) -> Rules {
    let allowed = config.service_allow_networks.clone();
    Rules::new(Purpose::Services, Reach::PublicAndPrivate, allowed)
}

fn gateway_origin() -> Origin {
    Origin {
        plane: PlaneId::ROOT,
        actor: SmolStr::new_static("gateway"),
        request_id: None,
        tenancy: Tenancy::All,
        at: crate::clock::now(),
    }
}

fn api_config(config: &Config, addr: SocketAddr, no_gpu: Option<String>) -> ApiConfig {
    let mut api = ApiConfig::for_listener(addr);
    api.allowed_hosts
        .extend(config.allowed_hosts.iter().cloned());
    api.allowed_origins = config.allowed_origins.clone();
    if config.tls_cert.is_some() {
        // Pages of our own, which only come from names of ours.
        for host in &api.allowed_hosts {
            let own = [format!("https://{host}"), format!("https://{host}:*")];
            api.allowed_origins.extend(own);
        }
    }
    api.trusted_proxies = usize::try_from(config.trusted_proxies).unwrap_or(usize::MAX);
    api.audit = config.audit;
    api.max_body_bytes = usize::try_from(config.max_body_bytes).unwrap_or(usize::MAX);
    api.operators_may_run_commands = config.operators_may_run_commands;
    api.limits = limits(config);
    api.no_gpu_reason = no_gpu;
    api
}

fn limits(config: &Config) -> LimitConfig {
    // Their ranges in the table keep the conversions from ever saturating.
    let size = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
    let count = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
    LimitConfig {
        user_per_minute: config.rate_limit_user,
        address_per_minute: config.rate_limit_address,
        requests: size(config.max_requests),
        requests_per_user: count(config.max_requests_per_user),
        requests_per_address: count(config.max_requests_per_address),
        streams: size(config.max_streams),
        streams_per_user: count(config.max_streams_per_user),
        are_admins_limited: config.limit_admins,
    }
}

/// The end of the coordinator's thread, as something to wait for.
fn watch_thread(
    thread: std::thread::JoinHandle<Result<(), CommitError>>,
) -> oneshot::Receiver<Result<(), ServeError>> {
    let (sender, receiver) = oneshot::channel();
    // Not on the runtime: it lasts as long as the gateway.
    std::thread::spawn(move || {
        let result = match thread.join() {
            Ok(result) => result.map_err(ServeError::from),
            Err(_) => Err(ServeError::CoordinatorGone),
        };
        // Nobody waits any more when the server was dropped.
        let _ = sender.send(result);
    });
    receiver
}
