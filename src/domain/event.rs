//! Events: what happened, in the past tense. They are the only thing that changes state.
//!
//! Clients' bytes (payloads, results, progress, checkpoints) are not in here: each record of the ledger
//! has one payload beside its event, so that purging removes the bytes and leaves the history whole.
//! The order of variants and of fields is the format: add at the end only, and a reader of format 1
//! reads all of it. `tests/it/golden` holds the bytes of each variant.

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::audit::AuditedWrite;
use super::container::{ContainerFacts, Engine, JobContainer};
use super::identity::{
    NewToken, PasswordHash, Profile, ReserveReason, RevokeCause, RuntimeKey, TokenKey, UserKey,
};
use super::ids::{Attempt, CommandId, Generation, GpuUuid, PlaneId, RunId, Seq, ServiceName};
use super::ladder::{Step, StepOutcome};
use super::machine::{GpuUse, QuarantineCause};
use super::notify::{Channel, Notify};
use super::spec::{GpuFacts, Grant, JobSpec, Priority, ServiceSpec};
use super::tenant::{Allowance, Quotas, TenantProfile, UserAllowance};
use super::time::Timestamp;

/// Something that happened. In JSON: `{"job_queued": {…}}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    // --- gateway -------------------------------------------------------------------------------
    /// A gateway process took over the ledger; `epoch` counts them from 1.
    GatewayStarted {
        epoch: u64,
        version: SmolStr,
    },
    /// A gateway process left in good order.
    GatewayStopped {
        epoch: u64,
    },
    PlaneOpened {
        plane: PlaneId,
        tenant: SmolStr,
        runtime: SmolStr,
    },

    // --- inbox ---------------------------------------------------------------------------------
    /// A command has its place in the inbox. `run` is as the client wrote it when it is no run id.
    /// Payload: the command's own `payload`.
    CommandAccepted {
        command: CommandId,
        run: Option<RunId>,
        run_text: SmolStr,
        kind: CommandKind,
        client_id: Option<SmolStr>,
    },
    CommandApplied {
        command: CommandId,
        run: Option<RunId>,
        kind: CommandKind,
    },
    /// A command that could not be applied; `code` and `reason` as the client sees them.
    CommandRejected {
        command: CommandId,
        run: Option<RunId>,
        kind: CommandKind,
        code: SmolStr,
        reason: String,
    },

    // --- jobs ----------------------------------------------------------------------------------
    /// A job run was submitted. Payload: the job's payload as JSON.
    JobQueued {
        run: RunId,
        spec: JobSpec,
        session: Option<SmolStr>,
        labels: Vec<(SmolStr, SmolStr)>,
        /// It gets a container of its own.
        container: Option<Box<JobContainer>>,
    },
    /// An attempt was decided: the call is about to be made. Offers `checkpoint`, the seq of the last
    /// `CheckpointSaved`.
    JobDispatched {
        run: RunId,
        attempt: Attempt,
        service: ServiceName,
        generation: Generation,
        checkpoint: Option<Seq>,
    },
    /// Payload: the progress object.
    JobProgressed {
        run: RunId,
        attempt: Attempt,
    },
    /// Payload: the checkpoint's bytes.
    CheckpointSaved {
        run: RunId,
        attempt: Attempt,
        content_type: SmolStr,
        size_bytes: u64,
    },
    /// A running attempt is being stopped; it ends by `deadline` at the latest.
    JobStopRequested {
        run: RunId,
        attempt: Attempt,
        cause: JobStopCause,
        deadline: Timestamp,
    },
    /// The attempt's call has ended; `confirmed` tells whether the service said so.
    JobStopped {
        run: RunId,
        attempt: Attempt,
        confirmed: bool,
    },
    /// Held by a person until resumed.
    JobPaused {
        run: RunId,
        reason: Option<String>,
    },
    /// A held run went back to the queue.
    JobResumed {
        run: RunId,
    },
    /// Stopped in favour of `by`, or of whoever an operator chose; waits until that run ends.
    /// Payload: the last progress object, when there was one.
    JobPreempted {
        run: RunId,
        by: RunId,
        service: ServiceName,
    },
    /// Back in the queue, at its old age.
    JobRequeued {
        run: RunId,
        cause: RequeueCause,
    },
    JobPriorityChanged {
        run: RunId,
        priority: Priority,
    },
    /// An attempt failed. With `retry_at` it waits until then and is tried again; without, `JobFailed` follows.
    JobAttemptFailed {
        run: RunId,
        attempt: Attempt,
        code: SmolStr,
        error: String,
        retry_at: Option<Timestamp>,
    },
    /// Payload: the result as JSON.
    JobCompleted {
        run: RunId,
        attempt: Attempt,
    },
    JobFailed {
        run: RunId,
        code: SmolStr,
        error: String,
    },
    JobCancelled {
        run: RunId,
        reason: String,
    },
    /// An ended run was put back by `retry`: all that State needs of it again.
    JobRevived {
        run: RunId,
        spec: JobSpec,
        session: Option<SmolStr>,
        /// Where the payload lies.
        payload: Seq,
        /// Its last attempt's number.
        attempt: Attempt,
        checkpoint: Option<Seq>,
        preempt_count: u32,
        queued_at: Timestamp,
        container: Option<Box<JobContainer>>,
    },
    /// The outcome of an attempt that is over already: kept for the record, changes nothing.
    JobOutcomeStale {
        run: RunId,
        attempt: Attempt,
        outcome: SmolStr,
    },

    // --- callbacks -----------------------------------------------------------------------------
    /// One try to deliver the outcome. `status` is the answer's, `error` says why there was none;
    /// `next_at` is the next try, `None` when delivered or given up.
    CallbackAttempted {
        run: RunId,
        number: u32,
        status: Option<u16>,
        error: Option<String>,
        delivered: bool,
        next_at: Option<Timestamp>,
    },

    // --- services ------------------------------------------------------------------------------
    ServiceRegistered {
        spec: Box<ServiceSpec>,
    },
    ServiceUpdated {
        spec: Box<ServiceSpec>,
    },
    ServiceEnabled {
        service: ServiceName,
    },
    ServiceDisabled {
        service: ServiceName,
    },
    ServiceRemoved {
        service: ServiceName,
    },
    /// Too many deaths in a row: not started again until someone starts or updates it.
    ServiceCrashLooped {
        service: ServiceName,
        deaths: u32,
        last_error: String,
    },

    // --- instances -----------------------------------------------------------------------------
    /// A start was decided and its memory reserved.
    InstanceStartRequested {
        service: ServiceName,
        generation: Generation,
        grants: Vec<Grant>,
        cause: StartCause,
        /// When it must be healthy.
        deadline: Timestamp,
    },
    /// The process exists. `start_ticks` (of `/proc/<pid>/stat`) and `boot_id` tell it from a later
    /// process with the same pid.
    InstanceSpawned {
        service: ServiceName,
        generation: Generation,
        pid: u32,
        start_ticks: u64,
        boot_id: SmolStr,
        port: u16,
    },
    /// First good health answer. `startup_ms` since the start was requested.
    InstanceReady {
        service: ServiceName,
        generation: Generation,
        startup_ms: u64,
    },
    /// A restarted gateway found the process alive and took it over.
    InstanceAdopted {
        service: ServiceName,
        generation: Generation,
        pid: u32,
    },
    /// Several probes in a row failed: it gets no new work and is drained.
    InstanceUnhealthy {
        service: ServiceName,
        generation: Generation,
        error: String,
    },
    /// It gets no new work and is stopped when its jobs are over; at `deadline` those are stopped too.
    InstanceDraining {
        service: ServiceName,
        generation: Generation,
        cause: StopCause,
        deadline: Option<Timestamp>,
    },
    /// A stop was decided: TERM now, KILL at `kill_at`.
    InstanceStopRequested {
        service: ServiceName,
        generation: Generation,
        cause: StopCause,
        kill_at: Timestamp,
    },
    /// A signal was sent to its process group.
    InstanceSignalled {
        service: ServiceName,
        generation: Generation,
        signal: SmolStr,
    },
    /// The process is gone. Unless `expected` it counts as a death, and `retry_at` is the earliest restart.
    InstanceExited {
        service: ServiceName,
        generation: Generation,
        exit: Exit,
        expected: bool,
        retry_at: Option<Timestamp>,
        /// Deaths in a row, this one included; 0 when it was expected.
        deaths: u32,
    },
    /// Its memory is seen to be free: the reservation ends.
    InstanceReleased {
        service: ServiceName,
        generation: Generation,
    },

    // --- GPUs ----------------------------------------------------------------------------------
    /// Room was promised to `service` for `run`: `victims` end first, nobody else gets it.
    RoomHeld {
        service: ServiceName,
        run: RunId,
        grants: Vec<Grant>,
        victims: Vec<ServiceName>,
    },
    /// The promise ended: used, or not needed any more.
    RoomReleased {
        service: ServiceName,
    },
    /// The machine's GPUs, all of them.
    GpusListed {
        gpus: Vec<GpuFacts>,
    },
    /// Memory that no instance of ours accounts for, in MiB.
    GpuForeignMemoryChanged {
        gpu: GpuUuid,
        mib: u64,
    },
    /// An instance was seen to use more than its service declared.
    ServicePeakLearned {
        service: ServiceName,
        mib: u64,
    },

    // --- data ----------------------------------------------------------------------------------
    /// The payloads of an ended run's records are gone; the chain stays whole.
    RunPurged {
        run: RunId,
        records: u64,
    },

    // --- people --------------------------------------------------------------------------------
    /// Works in `plane`, its runtime's.
    UserCreated {
        key: UserKey,
        profile: Profile,
        plane: PlaneId,
    },
    /// The whole new profile.
    UserUpdated {
        key: UserKey,
        profile: Profile,
        plane: PlaneId,
    },
    UserDeleted {
        key: UserKey,
    },
    /// Holds a hash of the token, never the token.
    TokenIssued {
        owner: UserKey,
        token: NewToken,
    },
    TokenRevoked {
        key: TokenKey,
        cause: RevokeCause,
    },
    /// An imported token was used: its slow hash gave way to a keyed one.
    TokenUpgraded {
        key: TokenKey,
        digest: [u8; 32],
    },
    /// Nobody may have it until it is transferred or purged.
    RuntimeReserved {
        key: RuntimeKey,
        owner: SmolStr,
        reason: ReserveReason,
    },
    /// A reserved runtime got a user again.
    RuntimeAssigned {
        key: RuntimeKey,
        user: SmolStr,
    },
    /// What still runs in it ends; then what is in it is removed.
    RuntimePurging {
        key: RuntimeKey,
    },
    /// All that was in it is removed, and it is forgotten: the next runtime of this name gets a new plane.
    RuntimeReleased {
        key: RuntimeKey,
    },
    /// All payloads of a plane are gone, and its runs and commands from all lists; the chain stays whole.
    PlanePurged {
        plane: PlaneId,
    },

    // --- audit ---------------------------------------------------------------------------------
    /// Writes that left no record of their own. What a write changed carries its request in the record's meta.
    WriteAudited {
        write: AuditedWrite,
    },
    /// Holds a hash, never the password; `None` took it away. All of the user's sessions ended with it.
    PasswordChanged {
        key: UserKey,
        password: Option<PasswordHash>,
    },
    /// The same password, with a stronger hash.
    PasswordRehashed {
        key: UserKey,
        password: PasswordHash,
    },
    /// All of a user's sessions ended: it was disabled, or its tokens were rotated.
    SessionsEnded {
        key: UserKey,
    },

    // --- tenants -------------------------------------------------------------------------------
    /// Something was said of a tenant for the first time; until then it had the defaults.
    TenantCreated {
        tenant: SmolStr,
        profile: TenantProfile,
    },
    /// The whole new profile.
    TenantUpdated {
        tenant: SmolStr,
        profile: TenantProfile,
    },
    /// The whole new quotas of a user.
    UserQuotasChanged {
        key: UserKey,
        quotas: Quotas,
    },
    /// From now on tenants' past usage fades at another pace.
    ShareHalfLifeChanged {
        half_life_ms: u64,
    },
    /// The whole new allowance of a tenant.
    TenantAllowanceChanged {
        tenant: SmolStr,
        allowance: Allowance,
    },
    /// So many bytes of the run's payloads were removed. Of no run's ledger: it tells what its tenant keeps.
    PayloadsPurged {
        run: RunId,
        bytes: u64,
    },
    /// A service that was registered just now is this tenant's alone; one of which this is not said is shared.
    ServiceAssigned {
        service: ServiceName,
        tenant: SmolStr,
    },
    /// The whole new allowance of a user.
    UserAllowanceChanged {
        key: UserKey,
        allowance: UserAllowance,
    },

    // --- containers ----------------------------------------------------------------------------
    /// The container engine came up, or stopped answering.
    EngineChanged {
        engine: Engine,
    },
    /// An instance's container changed: its status or its name.
    ContainerChanged {
        service: ServiceName,
        generation: Generation,
        container: ContainerFacts,
    },

    // --- notifications -------------------------------------------------------------------------
    /// Where a tenant is told of its runs, as a whole.
    TenantNotifyChanged {
        tenant: SmolStr,
        notify: Notify,
    },
    /// Each of the tenant's channels is sent a test.
    NotificationTestAsked {
        tenant: SmolStr,
    },
    /// One try to tell a tenant what the record `of` says. `status` is the answer's, `error` says why there was none;
    /// the same is tried again at `next_at`, and others not before `pause_until`. What waited too long, up to
    /// `given_up_to`, is not told any more.
    NotificationAttempted {
        tenant: SmolStr,
        channel: Channel,
        of: Seq,
        run: Option<RunId>,
        number: u32,
        status: Option<u16>,
        error: Option<String>,
        delivered: bool,
        next_at: Timestamp,
        pause_until: Timestamp,
        given_up_to: Option<Seq>,
    },

    // --- ladders -------------------------------------------------------------------------------
    /// A step of a service's ladder began: for the attempt of a run, or for the instance itself, which leaves for `cause`.
    LadderStepBegan {
        service: ServiceName,
        generation: Generation,
        run: Option<RunId>,
        /// For the instance 0, or 1 where a restart of the gateway begins the step anew.
        attempt: Attempt,
        cause: Option<StopCause>,
        /// Its place in the ladder, from 0.
        number: u32,
        step: Step,
        deadline: Timestamp,
    },
    /// `freed_mib` is measured where that can be done; else what was granted counts as given back by a step that is done.
    LadderStepEnded {
        service: ServiceName,
        generation: Generation,
        run: Option<RunId>,
        number: u32,
        step: SmolStr,
        outcome: StepOutcome,
        error: Option<String>,
        took_ms: u64,
        freed_mib: u64,
    },
    /// It lives without its GPU memory since that step: `grants` are still held, and `host_mib` lie in host memory.
    InstanceSlept {
        service: ServiceName,
        generation: Generation,
        step: Step,
        grants: Vec<Grant>,
        host_mib: u64,
    },
    /// A wake-up was decided and its memory reserved; `InstanceReady` follows.
    InstanceWakeRequested {
        service: ServiceName,
        generation: Generation,
        grants: Vec<Grant>,
        cause: StartCause,
        deadline: Timestamp,
    },

    // --- GPUs, seen ----------------------------------------------------------------------------
    /// A GPU gets no new instances from now on; what runs there goes on.
    GpuQuarantined {
        gpu: GpuUuid,
        cause: QuarantineCause,
        detail: String,
    },
    /// It gets new instances again.
    GpuQuarantineLifted {
        gpu: GpuUuid,
    },
    /// How the GPUs were used since then, a minute long as a rule.
    GpuUseSummed {
        since: Timestamp,
        gpus: Vec<GpuUse>,
    },
    /// That instance ran out of GPU memory: the next one gets more.
    ServiceNeedRaised {
        service: ServiceName,
        generation: Generation,
        mib: u64,
    },
}

/// What a command asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CommandKind {
    Pause,
    Resume,
    Cancel,
    Preempt,
    SetPriority,
    Retry,
}

/// Why a running attempt is stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobStopCause {
    Pause {
        reason: Option<String>,
    },
    Cancel {
        reason: String,
    },
    /// `by` gets the slot or the memory.
    Preempt {
        by: RunId,
    },
    /// An operator asked for room without naming a run: back to the queue at once.
    Yield,
    /// Its instance is going away for reasons of its own.
    InstanceStopping,
    /// Its container has run for as long as it may.
    TimedOut,
}

/// Why a run is in the queue again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequeueCause {
    BackoffOver,
    PreemptorEnded,
    /// `POST /preempt/release/{service}`.
    Released,
    /// Its instance stopped under it by our own decision.
    InstanceStopped,
    /// A `preempt` command without a preemptor.
    Yielded,
}

/// Who wanted an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartCause {
    /// Jobs wait for it; it stops again when idle.
    Scheduler,
    /// A person; it stays until stopped, or until its memory is needed.
    Manual,
    /// It died and is started again.
    Restart,
}

/// Why an instance ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopCause {
    Manual,
    /// Stopped to be started again.
    Restart,
    Idle,
    /// Its memory is wanted by that service.
    Room {
        service: ServiceName,
    },
    Unhealthy,
    StartupTimeout,
    Disabled,
    Removed,
    /// The job whose container it is stops, or is gone.
    Job,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    Code(i32),
    Signal(i32),
    /// It was not our child, or the machine restarted.
    Unknown,
    /// It never came to be; the text says why.
    NotStarted(String),
    /// Killed by the kernel: its container had used up its memory limit.
    OutOfMemory,
    /// The container engine stopped answering before it was there: held against nobody.
    NoEngine(String),
}

impl Event {
    /// The run whose ledger shows this event, if it belongs to one.
    pub fn run(&self) -> Option<RunId> {
        match self {
            Event::CommandAccepted { run, .. }
            | Event::CommandApplied { run, .. }
            | Event::CommandRejected { run, .. }
            | Event::NotificationAttempted { run, .. } => *run,
            Event::JobQueued { run, .. }
            | Event::JobDispatched { run, .. }
            | Event::JobProgressed { run, .. }
            | Event::CheckpointSaved { run, .. }
            | Event::JobStopRequested { run, .. }
            | Event::JobStopped { run, .. }
            | Event::JobPaused { run, .. }
            | Event::JobResumed { run }
            | Event::JobPreempted { run, .. }
            | Event::JobRequeued { run, .. }
            | Event::JobPriorityChanged { run, .. }
            | Event::JobAttemptFailed { run, .. }
            | Event::JobCompleted { run, .. }
            | Event::JobFailed { run, .. }
            | Event::JobCancelled { run, .. }
            | Event::JobRevived { run, .. }
            | Event::JobOutcomeStale { run, .. }
            | Event::CallbackAttempted { run, .. }
            | Event::RunPurged { run, .. } => Some(*run),
            Event::LadderStepBegan { run, .. } | Event::LadderStepEnded { run, .. } => *run,
            _ => None,
        }
    }

    /// The service whose instance this event is about, if any.
    pub fn instance(&self) -> Option<(&ServiceName, Generation)> {
        match self {
            Event::InstanceStartRequested {
                service,
                generation,
                ..
            }
            | Event::InstanceSpawned {
                service,
                generation,
                ..
            }
            | Event::InstanceReady {
                service,
                generation,
                ..
            }
            | Event::InstanceAdopted {
                service,
                generation,
                ..
            }
            | Event::InstanceUnhealthy {
                service,
                generation,
                ..
            }
            | Event::InstanceDraining {
                service,
                generation,
                ..
            }
            | Event::InstanceStopRequested {
                service,
                generation,
                ..
            }
            | Event::InstanceSignalled {
                service,
                generation,
                ..
            }
            | Event::InstanceExited {
                service,
                generation,
                ..
            }
            | Event::InstanceReleased {
                service,
                generation,
            }
            | Event::ContainerChanged {
                service,
                generation,
                ..
            } => Some((service, *generation)),
            _ => self.ladder(),
        }
    }

    /// The service whose ladder or sleep this event is about, if any.
    fn ladder(&self) -> Option<(&ServiceName, Generation)> {
        match self {
            Event::LadderStepBegan {
                service,
                generation,
                ..
            }
            | Event::LadderStepEnded {
                service,
                generation,
                ..
            }
            | Event::InstanceSlept {
                service,
                generation,
                ..
            }
            | Event::InstanceWakeRequested {
                service,
                generation,
                ..
            } => Some((service, *generation)),
            _ => None,
        }
    }

    /// Whether it ends its run.
    pub fn ends_run(&self) -> bool {
        matches!(
            self,
            Event::JobCompleted { .. } | Event::JobFailed { .. } | Event::JobCancelled { .. }
        )
    }
}
