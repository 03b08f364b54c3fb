//! Commands: what is asked, by people and by the executor reporting outcomes. `decide` turns each into
//! events or a rejection; nothing else changes state.

use bytes::Bytes;
use smol_str::SmolStr;

use super::audit::AuditedWrite;
use super::container::{ContainerFacts, Engine, JobContainer};
use super::event::{CommandKind, Exit};
use super::identity::{IdentityCommand, IdentityRejection};
use super::ids::{Attempt, CommandId, Generation, GpuUuid, PlaneId, RunId, Seq, ServiceName};
use super::ladder::StepOutcome;
use super::machine::Seen;
use super::notify::Channel;
use super::spec::{GpuFacts, Grant, JobSpec, Priority, ServiceSpec};
use super::tenant::{QuotaHit, Tenancy};
use super::time::Timestamp;

/// Something asked of the coordinator.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    // --- by people -----------------------------------------------------------------------------
    /// `run` is fresh. `payload` is the job's JSON.
    StartJob {
        run: RunId,
        spec: JobSpec,
        session: Option<SmolStr>,
        labels: Vec<(SmolStr, SmolStr)>,
        /// It gets a container of its own, made as `payload` says.
        container: Option<Box<JobContainer>>,
        payload: Bytes,
    },
    /// A command for one run, through the durable inbox: accepted once under its id, then applied or rejected.
    Inbox(InboxCommand),
    /// Cancels a run only while it waits (`DELETE /queue/{id}`).
    CancelQueued {
        run: RunId,
    },
    /// `tenant` alone may use it; `None` shares it with all.
    RegisterService {
        spec: Box<ServiceSpec>,
        tenant: Option<SmolStr>,
    },
    /// The whole new specification, merged by the caller from the current one.
    UpdateService {
        spec: Box<ServiceSpec>,
    },
    EnableService {
        service: ServiceName,
    },
    DisableService {
        service: ServiceName,
    },
    RemoveService {
        service: ServiceName,
    },
    StartService {
        service: ServiceName,
    },
    /// `drain` lets running jobs end first, for at most `drain_ms`.
    StopService {
        service: ServiceName,
        drain: bool,
    },
    RestartService {
        service: ServiceName,
        drain: bool,
    },
    /// Stops what runs on `service` so that `preemptor` runs there next.
    PreemptExecute {
        service: ServiceName,
        preemptor: RunId,
    },
    /// Queues again what was preempted on services of this one's type.
    PreemptRelease {
        service: ServiceName,
    },
    /// `attempt` is the pusher's own number when it knows it.
    PushProgress {
        run: RunId,
        attempt: Option<Attempt>,
        body: Bytes,
    },
    SaveCheckpoint {
        run: RunId,
        attempt: Option<Attempt>,
        content_type: SmolStr,
        body: Bytes,
    },
    /// Lets a quarantined GPU have new instances again.
    ReleaseGpu {
        gpu: GpuUuid,
    },
    /// Removes the payloads of an ended run.
    PurgeRun {
        run: RunId,
    },
    /// Something about users, tokens and runtimes.
    Identity(Box<IdentityCommand>),
    /// Writes that leave no record of their own.
    AuditWrite(Box<AuditedWrite>),

    // --- outcomes, by the executor ---------------------------------------------------------------
    /// A service was asked for its progress on a run of `plane`.
    ProgressPolled {
        plane: PlaneId,
        run: RunId,
        attempt: Attempt,
        body: Bytes,
    },
    /// The service answered, or the call failed.
    JobAnswered {
        run: RunId,
        attempt: Attempt,
        outcome: Result<Bytes, JobFailure>,
    },
    /// A stop that was asked for is done: no call of this attempt is open any more.
    JobStopDone {
        run: RunId,
        attempt: Attempt,
        confirmed: bool,
    },
    InstanceSpawned {
        service: ServiceName,
        generation: Generation,
        pid: u32,
        start_ticks: u64,
        boot_id: SmolStr,
        port: u16,
    },
    InstanceHealthy {
        service: ServiceName,
        generation: Generation,
    },
    InstanceUnhealthy {
        service: ServiceName,
        generation: Generation,
        error: String,
    },
    /// A restarted gateway found it alive and healthy.
    InstanceAdopted {
        service: ServiceName,
        generation: Generation,
        pid: u32,
    },
    InstanceSignalled {
        service: ServiceName,
        generation: Generation,
        signal: SmolStr,
    },
    InstanceExited {
        service: ServiceName,
        generation: Generation,
        exit: Exit,
    },
    /// Its GPU memory is seen to be free.
    InstanceReleased {
        service: ServiceName,
        generation: Generation,
    },
    /// What the engine tells of an instance's container.
    ContainerSeen {
        service: ServiceName,
        generation: Generation,
        container: ContainerFacts,
    },
    /// Whether the container engine answers.
    EngineSeen {
        engine: Engine,
    },
    /// A step of a ladder is over: of an attempt of a run, or of the instance itself (`None` and 0).
    LadderStepTried {
        service: ServiceName,
        generation: Generation,
        run: Option<RunId>,
        attempt: Attempt,
        number: u32,
        outcome: StepOutcome,
        error: Option<String>,
        /// GPU memory that its processes hold now; `None` where that cannot be measured.
        held: Option<Vec<Grant>>,
    },
    /// A sleeping instance was woken and answers; or why it does not.
    InstanceWoken {
        service: ServiceName,
        generation: Generation,
        error: Option<String>,
    },
    CallbackTried {
        run: RunId,
        number: u32,
        status: Option<u16>,
        error: Option<String>,
    },
    /// What came of telling a tenant's channel of something.
    NoticeTried(Box<NoticeTried>),
    GpusListed {
        gpus: Vec<GpuFacts>,
    },
    GpuForeignMemory {
        gpu: GpuUuid,
        mib: u64,
    },
    ServiceMemorySeen {
        service: ServiceName,
        mib: u64,
    },
    /// What else was seen of the GPUs.
    Seen(Seen),

    // --- the gateway itself ------------------------------------------------------------------------
    /// First command of each process: interrupted calls are tried again, instances are looked for.
    GatewayStarted {
        epoch: u64,
        version: SmolStr,
    },
    /// Last command of a process that leaves in good order.
    GatewayStopped,
    /// Time passed: acts on every deadline that is due.
    Tick,
}

/// Longest payload of a command that counts as small: what pauses, cancels or reorders fits easily.
const SMALL_COMMAND_BYTES: usize = 4 << 10;

impl Command {
    /// Whether clients make the ledger grow with it by more than a record: refused while the disk has no room. What
    /// frees, stops or reports passes.
    pub fn grows(&self) -> bool {
        match self {
            Command::StartJob { .. }
            | Command::PushProgress { .. }
            | Command::SaveCheckpoint { .. }
            | Command::ProgressPolled { .. }
            | Command::RegisterService { .. }
            | Command::UpdateService { .. } => true,
            Command::Inbox(command) => {
                matches!(command.action, InboxAction::Retry) || !command.is_small()
            }
            Command::Identity(command) => command.adds(),
            _ => false,
        }
    }
}

/// A client's command for one run (`contracts/run-gateway.md` section 5.1).
#[derive(Clone, Debug, PartialEq)]
pub struct InboxCommand {
    pub command: CommandId,
    /// As the client wrote it; an unknown one is accepted and then rejected.
    pub run_text: SmolStr,
    pub run: Option<RunId>,
    pub action: InboxAction,
    pub client_id: Option<SmolStr>,
    /// The `payload` member as it came, kept with the record.
    pub payload: Bytes,
    /// What the store knows of a run that State no longer holds; filled in by the coordinator.
    pub ended: Option<Box<EndedJob>>,
}

/// What an inbox command does, its payload parsed.
#[derive(Clone, Debug, PartialEq)]
pub enum InboxAction {
    Pause {
        reason: Option<String>,
    },
    Resume,
    Cancel {
        reason: Option<String>,
    },
    /// In favour of `by`, or back to the queue when there is none.
    Preempt {
        by: Option<RunId>,
    },
    SetPriority {
        priority: Priority,
    },
    Retry,
}

impl InboxCommand {
    /// Whether its payload is what such commands need.
    pub fn is_small(&self) -> bool {
        self.payload.len() <= SMALL_COMMAND_BYTES
    }
}

impl InboxAction {
    pub fn kind(&self) -> CommandKind {
        match self {
            InboxAction::Pause { .. } => CommandKind::Pause,
            InboxAction::Resume => CommandKind::Resume,
            InboxAction::Cancel { .. } => CommandKind::Cancel,
            InboxAction::Preempt { .. } => CommandKind::Preempt,
            InboxAction::SetPriority { .. } => CommandKind::SetPriority,
            InboxAction::Retry => CommandKind::Retry,
        }
    }
}

/// An ended job run as the projections know it: what `retry` needs to put it back.
#[derive(Clone, Debug, PartialEq)]
pub struct EndedJob {
    pub spec: JobSpec,
    /// How it ended: `completed`, `failed` or `cancelled`.
    pub status: &'static str,
    pub session: Option<SmolStr>,
    pub payload: Seq,
    pub attempt: Attempt,
    pub checkpoint: Option<Seq>,
    pub container: Option<Box<JobContainer>>,
    pub preempt_count: u32,
    /// Its payloads were removed: it cannot run again.
    pub purged: bool,
}

/// Code of an attempt that failed as its service had too little GPU memory.
pub const OUT_OF_MEMORY: &str = "out_of_memory";

/// Why an attempt failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobFailure {
    /// `http_status`, `connect`, `timeout`, `bad_answer`, `interrupted`, `instance_exited`, …
    pub code: SmolStr,
    pub error: String,
}

/// What the coordinator answers once the events are on disk.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// The run's place in its queue, from 1, at the moment it was queued. `duplicate` when an earlier
    /// request with the same Idempotency-Key started it.
    Started {
        run: RunId,
        position: u64,
        duplicate: bool,
    },
    /// The command's place in the inbox.
    Inbox {
        seq: Seq,
        duplicate: bool,
    },
    /// A service command took effect. `generation` is the instance it is about, if there is one.
    Service {
        generation: Option<Generation>,
        /// It was in the asked state already.
        already: bool,
    },
    Preempted {
        run: RunId,
        progress_saved: bool,
    },
    Released {
        runs: Vec<RunId>,
    },
    Done,
}

/// Why nothing was changed. `Display` is what the caller reads.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    #[error("Run '{0}' not found")]
    RunNotFound(SmolStr),
    #[error("Run '{0}' has already ended ({1}); retry it to run it again")]
    RunEnded(RunId, &'static str),
    #[error("Run '{0}' has not ended; only an ended run can be retried")]
    RunNotEnded(RunId),
    #[error("Run '{0}' is already paused")]
    AlreadyPaused(RunId),
    #[error("Run '{0}' is not paused")]
    NotPaused(RunId),
    #[error("Run '{0}' is not running")]
    NotRunning(RunId),
    #[error("Run '{0}' is not queued")]
    NotQueued(RunId),
    #[error("Run '{0}' is already being stopped")]
    AlreadyStopping(RunId),
    #[error("Cannot cancel a running job — use /preempt/execute to preempt it.")]
    CancelWhileRunning(RunId),
    #[error("Attempt {given} of run '{run}' is over; the current one is {current}")]
    StaleAttempt {
        run: RunId,
        given: Attempt,
        current: Attempt,
    },
    #[error("The payloads of run '{0}' were purged; it cannot run again")]
    Purged(RunId),
    #[error("Service '{0}' already exists")]
    ServiceExists(ServiceName),
    /// By another tenant's service, or one that was removed.
    #[error("The service name '{0}' is taken; choose another")]
    ServiceNameTaken(ServiceName),
    #[error(
        "Tenant '{0}' has as many services as one may have; remove some and use their names again, or ask an administrator"
    )]
    TooManyServices(SmolStr),
    #[error("Unknown service: {0}")]
    ServiceNotFound(ServiceName),
    #[error("Service '{0}' is shared by all tenants; only the gateway's administrator may do that")]
    ServiceShared(ServiceName),
    #[error("Service '{0}' has active jobs; cancel them or wait for them first")]
    ServiceHasActiveJobs(ServiceName),
    #[error("Service '{0}' is disabled; enable it first")]
    ServiceDisabled(ServiceName),
    #[error("Service '{service}' runs in a container, and {why}")]
    NoEngine { service: ServiceName, why: String },
    #[error("Service '{0}' is stopping; try again when it has stopped")]
    ServiceStopping(ServiceName),
    #[error(
        "Service '{service}' needs {required_mib} MiB of GPU memory and {available_mib} MiB are free"
    )]
    InsufficientVram {
        service: ServiceName,
        required_mib: u64,
        available_mib: u64,
    },
    #[error("Service '{0}' has no active job")]
    NoActiveJob(ServiceName),
    #[error("Unknown GPU: {0}")]
    GpuNotFound(GpuUuid),
    #[error("Run '{run}' cannot run on service '{service}'")]
    WrongService { run: RunId, service: ServiceName },
    /// Same command id, other body.
    #[error("command_id '{0}' was used before with another body; use a new command_id")]
    CommandReused(CommandId),
    /// Same Idempotency-Key, other body.
    #[error("Idempotency-Key was used before with another body; use a new key")]
    KeyReused,
    #[error("The gateway is stopping")]
    Stopping,
    #[error(
        "The gateway's disk has {free_mib} MiB left, of which {reserve_mib} MiB are kept free; an administrator has to make room"
    )]
    DiskReserve { free_mib: u64, reserve_mib: u64 },
    #[error("{0}; {remedy}, or ask an administrator for more", remedy = .0.remedy())]
    QuotaExceeded(Box<QuotaHit>),
    #[error(transparent)]
    Identity(#[from] IdentityRejection),
}

impl Rejection {
    /// Stable, machine-readable name: the `code` of a rejected command.
    pub fn code(&self) -> &'static str {
        match self {
            Rejection::RunNotFound(_) => "run_not_found",
            Rejection::RunEnded(..) => "run_ended",
            Rejection::RunNotEnded(_) => "run_not_ended",
            Rejection::AlreadyPaused(_) => "already_paused",
            Rejection::NotPaused(_) => "not_paused",
            Rejection::NotRunning(_) => "not_running",
            Rejection::NotQueued(_) => "not_queued",
            Rejection::AlreadyStopping(_) => "already_stopping",
            Rejection::CancelWhileRunning(_) => "cancel_while_running",
            Rejection::StaleAttempt { .. } => "stale_attempt",
            Rejection::Purged(_) => "purged",
            Rejection::ServiceExists(_) | Rejection::ServiceNameTaken(_) => "service_exists",
            Rejection::TooManyServices(_) => "too_many_services",
            Rejection::ServiceNotFound(_) => "service_not_found",
            Rejection::ServiceShared(_) => "role_required",
            Rejection::ServiceHasActiveJobs(_) => "service_has_active_jobs",
            Rejection::ServiceDisabled(_) => "service_disabled",
            Rejection::NoEngine { .. } => "no_engine",
            Rejection::ServiceStopping(_) => "service_stopping",
            Rejection::InsufficientVram { .. } => "insufficient_vram",
            Rejection::NoActiveJob(_) => "no_active_job",
            Rejection::GpuNotFound(_) => "gpu_not_found",
            Rejection::WrongService { .. } => "wrong_service",
            Rejection::CommandReused(_) => "command_reused",
            Rejection::KeyReused => "idempotency_key_reused",
            Rejection::Stopping => "stopping",
            Rejection::DiskReserve { .. } => "disk_reserve",
            Rejection::QuotaExceeded(_) => "quota_exceeded",
            Rejection::Identity(rejection) => rejection.code(),
        }
    }
}

/// One try to tell a tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoticeTried {
    pub tenant: SmolStr,
    pub channel: Channel,
    /// The record that it tells of.
    pub of: Seq,
    pub number: u32,
    /// Of the answer.
    pub status: Option<u16>,
    pub error: Option<String>,
}

/// Who asks, and under which request: written into every record that comes of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Origin {
    pub plane: PlaneId,
    pub actor: SmolStr,
    pub request_id: Option<SmolStr>,
    /// Whose services it may be about.
    pub tenancy: Tenancy,
    /// When it arrived.
    pub at: Timestamp,
}
