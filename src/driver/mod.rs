//! Brings services to life and ends them: local processes, containers, and services that run elsewhere. Takes plain
//! requests, reports outcomes as commands, decides nothing about when.
//!
//! `instance` one life from start to release, `body` what it lives in, `contained` and `docker` containers, `credentials` its token, `process` signals and exits, `procfs` who is who, `health` probes,
//! `orphans` what nobody knows any more, `cuda` GPU memory taken to the host, `logs` their output, `meter` their GPU memory, `mps` sharing one, `out_of_memory` the want of it, `outcome` the seam to the coordinator, `tasks` spawning.

mod body;
mod contained;
mod credentials;
mod cuda;
mod docker;
mod freezer;
mod health;
mod http;
mod instance;
mod logs;
mod meter;
mod mps;
mod orphans;
mod out_of_memory;
mod outcome;
mod process;
mod procfs;
mod table;
mod tasks;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use rustix::process::Signal;
use smol_str::SmolStr;
use uuid::Uuid;

pub use credentials::Credentials;
pub use cuda::CudaError;
pub use docker::{
    Checkpoint, ContainerOwners, ContainerRules, Docker, DockerError, DockerOptions, Forbidden,
    JobParts, Kept,
};
pub use health::ProbeTimings;
pub use http::{error_text, join};
pub use logs::{LogError, LogLine, Logs};
pub use meter::{Meter, StillHeld, Unmetered};
pub use out_of_memory::{answers_out_of_memory, tells_out_of_memory};
pub use outcome::{NotTaken, Outcomes, Sink};
pub use procfs::{MARK_VARIABLE, Mark, Marked, mark_of, marked_by};
pub use table::Endpoint;
pub use tasks::Tasks;

use crate::domain::container::ImageSpec;
use crate::domain::effect::ProcessIdentity;
use crate::domain::event::Exit;
use crate::domain::ids::{Generation, ServiceName};
use crate::domain::spec::{Grant, ServiceSpec};
use crate::domain::time::Timestamp;
use crate::outbound::{GuardedClient, Rules};
use instance::{Found, Instance};
use process::Process;
use table::Table;

/// How long the engine may take to tell that a container ended whose connection broke, and how often it is looked.
const SETTLE: Duration = Duration::from_millis(1_500);
const SETTLE_LOOK: Duration = Duration::from_millis(20);

/// What a driver is made of.
pub struct DriverOptions {
    /// The gateway's data directory; logs lie in `logs/` under it.
    pub data_dir: PathBuf,
    /// The ledger's own id: marks our processes.
    pub ledger: Uuid,
    pub probes: ProbeTimings,
    /// Which addresses services may have.
    pub services: Rules,
    pub credentials: Arc<dyn Credentials>,
    pub docker: DockerOptions,
    /// Told which containers instances live in.
    pub container_owners: ContainerOwners,
    pub meter: Arc<dyn Meter>,
    /// The program `cuda-checkpoint`, as a path or to be found in PATH.
    pub cuda_checkpoint: String,
}

/// Why no driver could be made.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    #[error("cannot create the log directory {path}")]
    LogDirectory { path: String, source: io::Error },
    #[error("cannot read this boot's id from /proc, which process services need")]
    BootId(#[source] io::Error),
    #[error("cannot make an HTTP client")]
    Client(#[source] reqwest::Error),
}

/// Cloneable handle. Dropping it, or stopping its tasks, leaves every service running: a later driver finds them.
#[derive(Clone)]
pub struct Driver {
    shared: Arc<Shared>,
}

/// What all instances need.
struct Shared {
    ledger: Uuid,
    boot_id: SmolStr,
    probes: ProbeTimings,
    probe_client: GuardedClient,
    logs: Logs,
    outcomes: Outcomes,
    credentials: Arc<dyn Credentials>,
    docker: Docker,
    container_owners: ContainerOwners,
    meter: Arc<dyn Meter>,
    cuda_checkpoint: String,
    tasks: Tasks,
    table: Table,
}

impl Shared {
    fn mark(&self, service: &ServiceName, generation: Generation) -> Mark {
        Mark {
            ledger: self.ledger,
            service: service.clone(),
            generation,
        }
    }
}

impl Driver {
    /// Creates the log directory and starts keeping logs bounded. Needs a runtime's context.
    pub fn new(
        options: DriverOptions,
        outcomes: Outcomes,
        tasks: Tasks,
    ) -> Result<Driver, DriverError> {
        let dir = options.data_dir.join("logs");
        fs::create_dir_all(&dir).map_err(|source| DriverError::LogDirectory {
            path: dir.display().to_string(),
            source,
        })?;
        let logs = Logs::new(dir);
        tasks.spawn("log rotation", logs.clone().keep_bounded());
        let docker = Docker::new(options.docker, options.ledger, &outcomes, &tasks);
        let shared = Shared {
            ledger: options.ledger,
            boot_id: procfs::boot_id().map_err(DriverError::BootId)?,
            probes: options.probes,
            probe_client: GuardedClient::for_probes(options.services)
                .map_err(DriverError::Client)?,
            logs,
            outcomes,
            credentials: options.credentials,
            docker,
            container_owners: options.container_owners,
            meter: options.meter,
            cuda_checkpoint: options.cuda_checkpoint,
            tasks,
            table: Table::default(),
        };
        let shared = Arc::new(shared);
        Ok(Driver { shared })
    }

    /// Starts an instance. Nothing happens if this generation was started, found or stopped before.
    pub fn start(&self, spec: ServiceSpec, generation: Generation, grants: Vec<Grant>) {
        if let Some(instance) = Instance::enter(&self.shared, &spec.name, generation) {
            self.shared
                .tasks
                .spawn("instance", instance.start(Arc::new(spec), grants));
        }
    }

    /// Makes and runs the container of one attempt of a job. Nothing happens if this generation was started, found or stopped
    /// before.
    pub fn run_job(
        &self,
        spec: ServiceSpec,
        generation: Generation,
        grants: Vec<Grant>,
        making: (Box<ImageSpec>, JobParts),
    ) {
        if let Some(instance) = Instance::enter(&self.shared, &spec.name, generation) {
            let running = instance.run_job(Arc::new(spec), grants, making);
            self.shared.tasks.spawn("job", running);
        }
    }

    /// Reports that an instance did not come to be.
    pub fn refuse(&self, service: &ServiceName, generation: Generation, why: String) {
        if let Some(instance) = Instance::enter(&self.shared, service, generation) {
            instance.never_started(Exit::NotStarted(why));
        }
    }

    /// TERM now, KILL at `kill_at`; a second call can only bring the KILL forward. Cancels a start in progress. A
    /// generation that this driver never saw is looked for by its mark.
    pub fn stop(&self, service: &ServiceName, generation: Generation, kill_at: Timestamp) {
        if self.shared.table.stop(service, generation, kill_at) {
            return;
        }
        if let Some(instance) = Instance::enter(&self.shared, service, generation) {
            self.shared
                .tasks
                .spawn("instance", instance.stop_unknown(kill_at));
        }
    }

    /// Looks for an instance of an earlier gateway process and adopts it, or goes on stopping it by `stop_at`.
    pub fn find(
        &self,
        spec: ServiceSpec,
        generation: Generation,
        process: Option<ProcessIdentity>,
        container: Option<SmolStr>,
        stop_at: Option<Timestamp>,
    ) {
        if let Some(instance) = Instance::enter(&self.shared, &spec.name, generation) {
            let found = Found {
                process,
                container,
                stop_at,
                asleep: false,
            };
            self.shared
                .tasks
                .spawn("instance", instance.find(Arc::new(spec), found));
        } else if let Some(stop_at) = stop_at {
            self.shared.table.stop(&spec.name, generation, stop_at);
        }
    }

    /// Looks for an instance that slept, or was on its way to or from sleep, and adopts it as that: it need not be healthy.
    pub fn find_asleep(
        &self,
        spec: ServiceSpec,
        generation: Generation,
        process: Option<ProcessIdentity>,
        container: Option<SmolStr>,
    ) {
        if let Some(instance) = Instance::enter(&self.shared, &spec.name, generation) {
            let found = Found {
                process,
                container,
                stop_at: None,
                asleep: true,
            };
            self.shared
                .tasks
                .spawn("instance", instance.find(Arc::new(spec), found));
        }
    }

    /// Stops every process and container with this ledger's mark that is neither in `live` nor known to this driver.
    pub fn sweep_orphans(&self, live: Vec<(ServiceName, Generation)>) {
        let tasks = &self.shared.tasks;
        if self.shared.docker.is_wanted() {
            let sweeping = contained::sweep_first(self.shared.clone(), live.clone());
            tasks.spawn("orphaned containers", sweeping);
        }
        tasks.spawn("orphan sweep", orphans::sweep(self.shared.clone(), live));
    }

    /// Reports `InstanceReleased` when nothing is left of an instance that has exited.
    pub fn watch_release(&self, service: &ServiceName, generation: Generation) {
        if let Some(instance) = Instance::enter(&self.shared, service, generation) {
            self.shared.tasks.spawn("instance", instance.release());
        }
    }

    /// After a call broke off: returns when the instance is seen to be gone, or still there after a while. The end of a
    /// process is known before that of its connections; the engine tells a container's later.
    pub async fn settle(&self, endpoint: &Endpoint, generation: Generation) {
        if !endpoint.spec.worker.is_container() {
            return;
        }
        let deadline = tokio::time::Instant::now() + SETTLE;
        while tokio::time::Instant::now() < deadline
            && self.shared.table.holds(&endpoint.spec.name, generation)
        {
            tokio::time::sleep(SETTLE_LOOK).await;
        }
    }

    /// Where an instance is reached; `None` before it was spawned and after it was released.
    pub fn endpoint(&self, service: &ServiceName, generation: Generation) -> Option<Arc<Endpoint>> {
        self.shared.table.endpoint(service, generation)
    }

    /// The container engine.
    pub fn docker(&self) -> &Docker {
        &self.shared.docker
    }

    /// Sends a signal (`SIGUSR1` or `SIGUSR2`) to an instance's process group or container. Tells whether anyone was there.
    pub async fn signal(
        &self,
        service: &ServiceName,
        generation: Generation,
        signal: &str,
    ) -> bool {
        // What is in a container is its engine's to reach; of a process no engine is asked.
        let container = self
            .shared
            .container_owners
            .container_of(service, generation);
        if let Some(id) = container {
            return self.shared.docker.signal(&id, signal).await.is_ok();
        }
        let mark = self.shared.mark(service, generation);
        let signal = match signal {
            "SIGUSR1" => Signal::USR1,
            "SIGUSR2" => Signal::USR2,
            _ => return false,
        };
        blocking(move || Process::find(&mark).is_some_and(|process| process.signal_group(signal)))
            .await
    }

    /// What is measured of instances' GPU memory.
    pub fn meter(&self) -> &dyn Meter {
        &*self.shared.meter
    }

    /// The services' output.
    pub fn logs(&self) -> &Logs {
        &self.shared.logs
    }
}

/// Time from now until `at`, zero when it has passed.
pub fn until(at: Timestamp) -> Duration {
    Duration::from_micros(u64::try_from(at - crate::clock::now()).unwrap_or(0))
}

/// Runs what reads `/proc` or files off the asynchronous threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // Only a runtime that shuts down cancels blocking work; so is this task, at its next await.
        Err(_) => std::future::pending().await,
    }
}
