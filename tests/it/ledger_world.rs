//! What the ledger's tests share: one of each event, and a seeded trace of batches that a gateway might
//! write.

use std::sync::Arc;

use bytes::Bytes;
use rungate::domain::audit::{Asked, AuditedWrite, Details, Source};
use rungate::domain::container::{ContainerFacts, ContainerStatus, Engine, JobContainer};
use rungate::domain::event::{
    CommandKind, Event, Exit, JobStopCause, RequeueCause, StartCause, StopCause,
};
use rungate::domain::identity::{
    NewToken, PasswordHash, Profile, ReserveReason, RevokeCause, Role, RuntimeKey,
    Scope as TokenScope, TokenHash, TokenKey, UserKey,
};
use rungate::domain::ids::{Generation, PlaneId, RunId};
use rungate::domain::ladder::{SleepCall, Step, StepOutcome};
use rungate::domain::machine::{GpuUse, QuarantineCause, Spread};
use rungate::domain::notify::{Channel, Notice, Notify, Ntfy, Webhook};
use rungate::domain::record::NewRecord;
use rungate::domain::spec::{
    GpuFacts, GpuSource, Grant, JobSpec, Priority, ProgressMode, ServiceSpec, Target, Worker,
};
use rungate::domain::tenant::{Allowance, Quotas, TenantProfile, UserAllowance};
use rungate::domain::time::Timestamp;
use rungate::ledger::{CommitError, Hash, Writer};
use smol_str::SmolStr;
use uuid::Uuid;

/// 2025-11-21T02:00:00Z.
pub const START: Timestamp = Timestamp(1_763_690_400_000_000);

/// SplitMix64 (Steele, Lea, Flood 2014): small, and the same everywhere.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// The `n`th run: ids ascend with `n`, a millisecond apart.
pub fn run_id(n: u64) -> RunId {
    let ms = u128::from(START.0.unsigned_abs() / 1_000 + n);
    RunId(Uuid::from_u128(
        (ms << 80) | (7 << 76) | (2 << 62) | u128::from(n),
    ))
}

pub fn job() -> JobSpec {
    JobSpec {
        target: Target::Type("llm".into()),
        service_type: Some("llm".into()),
        priority: Priority::default(),
        ttl_ms: Some(3_600_000),
        max_attempts: 3,
        timeout_ms: 300_000,
        callback_url: None,
    }
}

pub fn service(name: &str) -> ServiceSpec {
    ServiceSpec {
        name: name.into(),
        service_type: "llm".into(),
        container: name.into(),
        port: 8_080,
        health_endpoint: "/health".into(),
        description: String::new(),
        vram_mib: 8_192,
        gpus: 0,
        progress_mode: ProgressMode::Queue,
        progress_endpoint: None,
        worker: Worker::Process {
            command: vec!["worker".into()],
            env: vec![("A".into(), "b".into())],
            working_dir: None,
        },
        concurrency: 1,
        dispatch_path: None,
        cancel_path: Some("/cancel".into()),
        idle_timeout_ms: None,
        grace_ms: 5_000,
        startup_timeout_ms: 60_000,
        min_runtime_ms: None,
        ladder: Vec::new(),
        mps_percent: None,
    }
}

pub fn queued(run: RunId) -> Event {
    Event::JobQueued {
        run,
        spec: job(),
        session: None,
        labels: vec![],
        container: None,
    }
}

pub fn record(at: Timestamp, event: Event, payload: &str) -> NewRecord {
    NewRecord {
        plane: PlaneId::ROOT,
        at,
        actor: "admin".into(),
        request_id: Some("req-1".into()),
        asked: matches!(event, Event::JobQueued { .. }).then(|| Asked {
            source: source(),
            duration_us: 1,
        }),
        event,
        payload: Bytes::copy_from_slice(payload.as_bytes()),
    }
}

/// Appends and commits each event on its own.
pub fn append(writer: &mut Writer, events: impl IntoIterator<Item = (Event, &'static str)>) {
    for (event, payload) in events {
        let mut batch = writer.begin().unwrap();
        batch.append(&record(START, event, payload)).unwrap();
        batch.commit().unwrap();
    }
}

/// A life of the gateway, decided by a seed: what was put into each batch, and how the ledger stands
/// after it.
pub struct Trace {
    rng: Rng,
    runs: u64,
    commands: u64,
    at: Timestamp,
    services: u64,
}

impl Trace {
    pub fn new(seed: u64) -> Self {
        Self {
            rng: Rng(seed),
            runs: 0,
            commands: 0,
            at: START,
            services: 0,
        }
    }

    /// The records of the next batch.
    pub fn batch(&mut self) -> Vec<NewRecord> {
        let count = 1 + self.rng.below(12);
        let mut records = Vec::new();
        for _ in 0..count {
            self.at = self.at + 1;
            let events = self.step();
            for (event, payload) in events {
                records.push(record(self.at, event, &payload));
            }
        }
        records
    }

    fn step(&mut self) -> Vec<(Event, String)> {
        let some_run = run_id(self.rng.below(self.runs.max(1)));
        let kind = self.rng.below(14);
        match kind {
            0..=3 => self.start(),
            4 => self.command(some_run),
            5..=7 => self.service_step(kind),
            _ => vec![self.run_step(kind, some_run)],
        }
    }

    fn run_step(&mut self, kind: u64, some_run: RunId) -> (Event, String) {
        let attempt = 1 + u32::try_from(self.rng.below(3)).unwrap();
        let name = self.some_service();
        let generation = Generation(1 + self.rng.below(3));
        let text = |rng: &mut Rng, most: u64| {
            let size = usize::try_from(rng.below(most)).unwrap();
            format!("{{\"x\":\"{}\"}}", "y".repeat(size))
        };
        match kind {
            8 => (
                Event::JobDispatched {
                    run: some_run,
                    attempt,
                    service: name,
                    generation,
                    checkpoint: None,
                },
                String::new(),
            ),
            9 => (
                Event::JobProgressed {
                    run: some_run,
                    attempt,
                },
                text(&mut self.rng, 200),
            ),
            10 => (
                Event::JobCompleted {
                    run: some_run,
                    attempt,
                },
                text(&mut self.rng, 9_000),
            ),
            11 => (
                Event::JobAttemptFailed {
                    run: some_run,
                    attempt,
                    code: "connect".into(),
                    error: "refused".into(),
                    retry_at: self.rng.chance(50).then_some(self.at + 1_000),
                },
                String::new(),
            ),
            12 if self.rng.chance(30) => (
                Event::RunPurged {
                    run: some_run,
                    records: 1,
                },
                String::new(),
            ),
            _ => (
                Event::JobPreempted {
                    run: some_run,
                    by: run_id(0),
                    service: name,
                },
                text(&mut self.rng, 50),
            ),
        }
    }

    fn some_service(&mut self) -> SmolStr {
        format!("s{}", self.rng.below(self.services.max(1))).into()
    }

    fn service_step(&mut self, kind: u64) -> Vec<(Event, String)> {
        let name = self.some_service();
        let generation = Generation(1 + self.rng.below(3));
        let event = match kind {
            5 => {
                self.services += 1;
                let spec = Box::new(service(&format!("s{}", self.services - 1)));
                Event::ServiceRegistered { spec }
            }
            6 => Event::InstanceStartRequested {
                service: name,
                generation,
                grants: vec![Grant {
                    gpu: "SIM-0".into(),
                    mib: 8_192,
                }],
                cause: StartCause::Scheduler,
                deadline: self.at + 60_000,
            },
            _ => Event::InstanceReady {
                service: name,
                generation,
                startup_ms: 12,
            },
        };
        vec![(event, String::new())]
    }

    fn start(&mut self) -> Vec<(Event, String)> {
        let run = run_id(self.runs);
        self.runs += 1;
        let session = self.rng.chance(30).then(|| SmolStr::new_static("s"));
        let labels = vec![("n".into(), self.runs.to_string().into())];
        let event = Event::JobQueued {
            run,
            spec: job(),
            session,
            labels,
            container: None,
        };
        vec![(event, format!("{{\"n\":{}}}", self.runs))]
    }

    fn command(&mut self, run: RunId) -> Vec<(Event, String)> {
        self.commands += 1;
        let command: SmolStr = format!("c{}", self.commands).into();
        let accepted = Event::CommandAccepted {
            command: command.clone(),
            run: Some(run),
            run_text: run.to_string().into(),
            kind: CommandKind::Cancel,
            client_id: None,
        };
        let kind = CommandKind::Cancel;
        let decided = if self.rng.chance(50) {
            Event::CommandApplied {
                command,
                run: Some(run),
                kind,
            }
        } else {
            let (code, reason) = ("run_ended".into(), "it has ended".into());
            Event::CommandRejected {
                command,
                run: Some(run),
                kind,
                code,
                reason,
            }
        };
        vec![
            (accepted, "{\"reason\":\"r\"}".into()),
            (decided, String::new()),
        ]
    }
}

/// Writes `batches` batches of a trace; answers the tail after each that was acknowledged, and the error
/// that ended it.
pub fn write_trace(
    writer: &mut Writer,
    seed: u64,
    batches: usize,
    mut committed: impl FnMut(u64, Hash),
) -> Result<(), CommitError> {
    let mut trace = Trace::new(seed);
    for _ in 0..batches {
        let mut batch = writer.begin()?;
        for record in trace.batch() {
            batch.append(&record)?;
        }
        batch.put_idempotency(
            PlaneId::ROOT,
            "start",
            &batch.len().to_string(),
            [7; 32],
            b"{}",
        )?;
        let (seq, hash) = (batch.len(), batch.tail_hash());
        let tail = batch.commit()?;
        assert!(seq <= tail);
        committed(tail, hash);
    }
    Ok(())
}

/// One of each event, in the order of the enum, with every optional part present.
pub fn one_of_each() -> Vec<Event> {
    let mut events = gateway_and_inbox();
    events.extend(job_steps());
    events.extend(job_outcomes());
    events.extend(services());
    events.extend(instances());
    events.extend(gpus_and_data());
    events.extend(people());
    events.extend(logins());
    events.extend(tenants());
    events.extend(containers());
    events.extend(notifications());
    events.extend(ladders());
    events.extend(gpus_seen());
    events
}

fn containers() -> Vec<Event> {
    let engine = Engine {
        up: false,
        error: Some("it does not answer".into()),
    };
    let container = ContainerFacts {
        id: "4c01db0b339c".into(),
        name: "rungate-s-1".into(),
        status: ContainerStatus::Paused,
    };
    vec![
        Event::EngineChanged { engine },
        Event::ContainerChanged {
            service: "s".into(),
            generation: Generation(1),
            container,
        },
    ]
}

fn gateway_and_inbox() -> Vec<Event> {
    let run = Some(run_id(1));
    let kind = CommandKind::SetPriority;
    vec![
        Event::GatewayStarted {
            epoch: 3,
            version: "0.1.0".into(),
        },
        Event::GatewayStopped { epoch: 3 },
        Event::PlaneOpened {
            plane: PlaneId(2),
            tenant: "t".into(),
            runtime: "r".into(),
        },
        Event::CommandAccepted {
            command: "c1".into(),
            run,
            run_text: "text".into(),
            kind,
            client_id: Some("cli".into()),
        },
        Event::CommandApplied {
            command: "c1".into(),
            run,
            kind,
        },
        Event::CommandRejected {
            command: "c1".into(),
            run,
            kind,
            code: "code".into(),
            reason: "why".into(),
        },
    ]
}

fn callback_job() -> JobSpec {
    JobSpec {
        callback_url: Some("http://c".into()),
        ..job()
    }
}

fn job_steps() -> Vec<Event> {
    let (run, attempt) = (run_id(1), 2);
    let (service, generation): (SmolStr, _) = ("svc".into(), Generation(4));
    let spec = callback_job();
    vec![
        Event::JobQueued {
            run,
            spec: spec.clone(),
            session: Some("s".into()),
            labels: vec![("k".into(), "v".into())],
            container: Some(Box::new(JobContainer::new(None, 1))),
        },
        Event::JobDispatched {
            run,
            attempt,
            service: service.clone(),
            generation,
            checkpoint: Some(9),
        },
        Event::JobProgressed { run, attempt },
        Event::CheckpointSaved {
            run,
            attempt,
            content_type: "application/json".into(),
            size_bytes: 300,
        },
        Event::JobStopRequested {
            run,
            attempt,
            cause: JobStopCause::Cancel { reason: "r".into() },
            deadline: START + 1,
        },
        Event::JobStopped {
            run,
            attempt,
            confirmed: true,
        },
        Event::JobPaused {
            run,
            reason: Some("r".into()),
        },
        Event::JobResumed { run },
        Event::JobPreempted {
            run,
            by: run_id(2),
            service,
        },
        Event::JobRequeued {
            run,
            cause: RequeueCause::PreemptorEnded,
        },
        Event::JobPriorityChanged {
            run,
            priority: Priority::MOST_URGENT,
        },
    ]
}

fn job_outcomes() -> Vec<Event> {
    let (run, attempt) = (run_id(1), 2);
    let spec = callback_job();
    vec![
        Event::JobAttemptFailed {
            run,
            attempt,
            code: "http_status".into(),
            error: "500".into(),
            retry_at: Some(START + 2),
        },
        Event::JobCompleted { run, attempt },
        Event::JobFailed {
            run,
            code: "expired".into(),
            error: "expired".into(),
        },
        Event::JobCancelled {
            run,
            reason: "Cancelled".into(),
        },
        Event::JobRevived {
            run,
            spec,
            session: Some("s".into()),
            payload: 7,
            attempt,
            checkpoint: Some(8),
            preempt_count: 1,
            queued_at: START + 3,
            container: None,
        },
        Event::JobOutcomeStale {
            run,
            attempt,
            outcome: "completed".into(),
        },
        Event::CallbackAttempted {
            run,
            number: 1,
            status: Some(503),
            error: Some("busy".into()),
            delivered: false,
            next_at: Some(START + 4),
        },
    ]
}

fn services() -> Vec<Event> {
    let service = SmolStr::new_static("svc");
    let spec = || Box::new(self::service("svc"));
    vec![
        Event::ServiceRegistered { spec: spec() },
        Event::ServiceUpdated { spec: spec() },
        Event::ServiceEnabled {
            service: service.clone(),
        },
        Event::ServiceDisabled {
            service: service.clone(),
        },
        Event::ServiceRemoved {
            service: service.clone(),
        },
        Event::ServiceCrashLooped {
            service: service.clone(),
            deaths: 5,
            last_error: "e".into(),
        },
    ]
}

fn instances() -> Vec<Event> {
    let service = SmolStr::new_static("svc");
    let generation = Generation(4);
    vec![
        Event::InstanceStartRequested {
            service: service.clone(),
            generation,
            grants: vec![Grant {
                gpu: "SIM-0".into(),
                mib: 8_192,
            }],
            cause: StartCause::Manual,
            deadline: START + 5,
        },
        Event::InstanceSpawned {
            service: service.clone(),
            generation,
            pid: 77,
            start_ticks: 88,
            boot_id: "b".into(),
            port: 9_000,
        },
        Event::InstanceReady {
            service: service.clone(),
            generation,
            startup_ms: 12,
        },
        Event::InstanceAdopted {
            service: service.clone(),
            generation,
            pid: 77,
        },
        Event::InstanceUnhealthy {
            service: service.clone(),
            generation,
            error: "e".into(),
        },
        Event::InstanceDraining {
            service: service.clone(),
            generation,
            cause: StopCause::Room {
                service: "other".into(),
            },
            deadline: None,
        },
        Event::InstanceStopRequested {
            service: service.clone(),
            generation,
            cause: StopCause::Idle,
            kill_at: START + 6,
        },
        Event::InstanceSignalled {
            service: service.clone(),
            generation,
            signal: "TERM".into(),
        },
        Event::InstanceExited {
            service: service.clone(),
            generation,
            exit: Exit::Signal(15),
            expected: true,
            retry_at: Some(START + 7),
            deaths: 3,
        },
        Event::InstanceReleased {
            service,
            generation,
        },
    ]
}

fn gpus_and_data() -> Vec<Event> {
    let service = SmolStr::new_static("svc");
    vec![
        Event::RoomHeld {
            service: service.clone(),
            run: run_id(1),
            grants: vec![Grant {
                gpu: "SIM-0".into(),
                mib: 1,
            }],
            victims: vec!["v".into()],
        },
        Event::RoomReleased {
            service: service.clone(),
        },
        Event::GpusListed {
            gpus: vec![GpuFacts {
                uuid: "SIM-0".into(),
                index: 0,
                name: "Simulated".into(),
                memory_mib: 24_576,
                source: GpuSource::Simulated,
            }],
        },
        Event::GpuForeignMemoryChanged {
            gpu: "SIM-0".into(),
            mib: 5,
        },
        Event::ServicePeakLearned {
            service,
            mib: 9_000,
        },
        Event::RunPurged {
            run: run_id(1),
            records: 3,
        },
    ]
}

fn people() -> Vec<Event> {
    let key = UserKey {
        tenant: "acme".into(),
        user: "ann".into(),
    };
    let profile = Profile {
        email: "ann@example.com".into(),
        roles: Role::ALL.to_vec(),
        scopes: TokenScope::ALL.to_vec(),
        enabled: true,
        runtime: "ann".into(),
    };
    let token = TokenKey {
        owner: key.clone(),
        token: "tok_1".into(),
    };
    let runtime = RuntimeKey {
        tenant: "acme".into(),
        runtime: "ann".into(),
    };
    vec![
        Event::UserCreated {
            key: key.clone(),
            profile: profile.clone(),
            plane: PlaneId(2),
        },
        Event::UserUpdated {
            key: key.clone(),
            profile,
            plane: PlaneId(3),
        },
        Event::UserDeleted { key: key.clone() },
        Event::TokenIssued {
            owner: key,
            token: NewToken {
                token: "tok_1".into(),
                name: "ci".into(),
                scopes: vec![TokenScope::RunsRead],
                hash: TokenHash::Pbkdf2 {
                    iterations: 260_000,
                    salt: vec![1, 2],
                    digest: [3; 32],
                    fingerprint: [4; 6],
                },
                expires_at: Some(START),
            },
        },
        Event::TokenRevoked {
            key: token.clone(),
            cause: RevokeCause::Rotated,
        },
        Event::TokenUpgraded {
            key: token,
            digest: [5; 32],
        },
        Event::RuntimeReserved {
            key: runtime.clone(),
            owner: "ann".into(),
            reason: ReserveReason::DeletedUser,
        },
        Event::RuntimeAssigned {
            key: runtime.clone(),
            user: "bob".into(),
        },
        Event::RuntimePurging {
            key: runtime.clone(),
        },
        Event::RuntimeReleased { key: runtime },
        Event::PlanePurged { plane: PlaneId(2) },
        Event::WriteAudited {
            write: AuditedWrite {
                source: source(),
                status: 403,
                code: Some("role_required".into()),
                duration_us: 250,
                count: 2,
                since: START,
            },
        },
    ]
}

/// A request as the audit keeps it.
pub fn source() -> Arc<Source> {
    Arc::new(Source {
        user: Some(UserKey {
            tenant: "acme".into(),
            user: "ann".into(),
        }),
        token: Some("0123456789ab".into()),
        address: Some([192, 0, 2, 7].into()),
        method: "POST".into(),
        route: "/services/{name}/stop".into(),
        path: Some("/services/a/stop".into()),
        query: vec!["drain".into()],
        details: Details::default(),
    })
}

/// What records have of it from format 3 on.
pub fn details() -> Details {
    Details {
        tried: Some(UserKey {
            tenant: "acme".into(),
            user: "bob".into(),
        }),
        about: Some("acme".into()),
        origin: Some("https://gpu.example".into()),
        user_agent: Some("curl/8.5.0".into()),
        bytes_in: Some(300),
    }
}

fn logins() -> Vec<Event> {
    let key = UserKey {
        tenant: "acme".into(),
        user: "ann".into(),
    };
    let password = PasswordHash("$argon2id$v=19$m=19456,t=2,p=1$c2FsdA$aGFzaA".to_owned());
    vec![
        Event::PasswordChanged {
            key: key.clone(),
            password: Some(password.clone()),
        },
        Event::PasswordRehashed {
            key: key.clone(),
            password,
        },
        Event::SessionsEnded { key },
    ]
}

/// Tenants and quotas.
fn tenants() -> Vec<Event> {
    let quotas = Quotas {
        queued_runs: Some(1_000),
        vram_mib: Some(0),
        ..Quotas::default()
    };
    let profile = TenantProfile {
        name: "Acme Labs".to_owned(),
        weight: 250,
        quotas,
        enabled: false,
    };
    let key = UserKey {
        tenant: "acme".into(),
        user: "ann".into(),
    };
    vec![
        Event::TenantCreated {
            tenant: "acme".into(),
            profile: profile.clone(),
        },
        Event::TenantUpdated {
            tenant: "acme".into(),
            profile,
        },
        Event::UserQuotasChanged {
            key: key.clone(),
            quotas,
        },
        Event::ShareHalfLifeChanged {
            half_life_ms: 60_000,
        },
        Event::TenantAllowanceChanged {
            tenant: "acme".into(),
            allowance: Allowance {
                ledger_bytes: Some(1 << 40),
                requests_per_minute: None,
                users: Some(50),
            },
        },
        Event::PayloadsPurged {
            run: run_id(1),
            bytes: 300_000,
        },
        Event::ServiceAssigned {
            service: "svc".into(),
            tenant: "acme".into(),
        },
        Event::UserAllowanceChanged {
            key,
            allowance: UserAllowance {
                ledger_bytes: Some(1 << 30),
                requests_per_minute: Some(600),
            },
        },
    ]
}

/// What is seen of GPUs.
fn gpus_seen() -> Vec<Event> {
    vec![
        Event::GpuQuarantined {
            gpu: "SIM-0".into(),
            cause: QuarantineCause::Xid,
            detail: "the driver reported XID 79".to_owned(),
        },
        Event::GpuQuarantineLifted {
            gpu: "SIM-0".into(),
        },
        Event::GpuUseSummed {
            since: START,
            gpus: vec![GpuUse {
                gpu: "SIM-0".into(),
                samples: 60,
                used_mib: Some(Spread {
                    min: 1,
                    mean: 2,
                    max: 3,
                }),
                utilization_pct: None,
                temperature_c: None,
                power_mw: None,
            }],
        },
        Event::ServiceNeedRaised {
            service: "svc".into(),
            generation: Generation(1),
            mib: 10_240,
        },
    ]
}

/// What tenants are told.
fn notifications() -> Vec<Event> {
    vec![
        Event::TenantNotifyChanged {
            tenant: "acme".into(),
            notify: Notify {
                ntfy: Some(Ntfy {
                    url: "https://ntfy.sh".into(),
                    topic: "acme-7Qm2x9Lb4T".into(),
                    events: Notice::OF_NTFY.to_vec(),
                    by_settings: true,
                }),
                webhook: Some(Webhook {
                    url: "https://example.org/runs".into(),
                    events: Notice::OF_RUNS.to_vec(),
                }),
            },
        },
        Event::NotificationTestAsked {
            tenant: "acme".into(),
        },
        Event::NotificationAttempted {
            tenant: "acme".into(),
            channel: Channel::Webhook,
            of: 300,
            run: Some(run_id(1)),
            number: 2,
            status: Some(503),
            error: Some("it answered 503".to_owned()),
            delivered: false,
            next_at: Timestamp(START.0 + 7),
            pause_until: Timestamp(START.0 + 8),
            given_up_to: Some(299),
        },
    ]
}

fn ladders() -> Vec<Event> {
    let run = run_id(1);
    let grants = vec![Grant {
        gpu: "GPU-1".into(),
        mib: 1_024,
    }];
    vec![
        Event::LadderStepBegan {
            service: "svc".into(),
            generation: Generation(2),
            run: Some(run),
            attempt: 2,
            cause: Some(StopCause::Idle),
            number: 1,
            step: Step::Sleep {
                call: SleepCall {
                    level: 1,
                    path: "/sleep?level=1".into(),
                    wake_path: "/wake_up".into(),
                    is_sleeping_path: Some("/is_sleeping".into()),
                },
                ms: 30_000,
            },
            deadline: START + 30_000,
        },
        Event::LadderStepEnded {
            service: "svc".into(),
            generation: Generation(2),
            run: None,
            number: 1,
            step: "sleep".into(),
            outcome: StepOutcome::Failed,
            error: Some("it answered 500".into()),
            took_ms: 1_500,
            freed_mib: 1_024,
        },
        Event::InstanceSlept {
            service: "svc".into(),
            generation: Generation(2),
            step: Step::CudaCheckpoint { ms: 10_000 },
            grants: grants.clone(),
            host_mib: 7_168,
        },
        Event::InstanceWakeRequested {
            service: "svc".into(),
            generation: Generation(2),
            grants,
            cause: StartCause::Scheduler,
            deadline: START + 60_000,
        },
    ]
}
