//! The little language of the golden scripts: one command a line, played to the bed. `scripts/README.md` lists them.

use std::collections::BTreeMap;

use bytes::Bytes;
use rungate::domain::command::{Command, InboxAction, InboxCommand, JobFailure};
use rungate::domain::container::{Engine, JobContainer};
use rungate::domain::effect::Effect;
use rungate::domain::event::Exit;
use rungate::domain::identity::{
    IdentityCommand, NewToken, Profile, ProfileChange, Role, TokenHash, UserKey,
};
use rungate::domain::ids::{Attempt, Generation, PlaneId, RunId, ServiceName};
use rungate::domain::ladder::{Ask, SleepCall, Step, StepOutcome};
use rungate::domain::machine::{QuarantineCause, Seen};
use rungate::domain::scheduler::container::{NAME_PREFIX, name_of};
use rungate::domain::scheduler::why::why;
use rungate::domain::settings::Settings;
use rungate::domain::spec::{
    GpuFacts, GpuSource, Grant, JobSpec, Needs, Priority, ProgressMode, ServiceSpec, Target, Worker,
};
use rungate::domain::tenant::{QuotasChange, TenantChange, UserAllowanceChange};
use rungate::domain::time::Timestamp;
use smol_str::{SmolStr, format_smolstr};
use uuid::Uuid;

use super::bed::{Bed, payload};
use super::invariants;
use super::text::{self, Names};
use super::words::{Line, mib, ms};

/// A script being played.
pub struct Script {
    bed: Bed,
    names: Names,
    runs: BTreeMap<String, RunId>,
    /// Events already told.
    told: usize,
    /// Effects already taken.
    effects: Vec<Effect>,
}

impl Script {
    pub fn new() -> Script {
        let mut script = Script {
            bed: Bed::new(Settings::default()),
            names: Names::new(),
            runs: BTreeMap::new(),
            told: 0,
            effects: Vec::new(),
        };
        script.restart();
        script.told = script.bed.log.len();
        script
    }

    /// Plays one line and tells what came of it.
    pub fn play(&mut self, text: &str) -> Vec<String> {
        let mut said = Vec::new();
        let mut words = text.trim();
        if let Some(rest) = words.strip_prefix("at ") {
            let (time, rest) = rest.split_once(' ').unwrap_or((rest, ""));
            let until = Timestamp::from_millis(i64::try_from(ms(time)).unwrap());
            assert!(until >= self.bed.now, "{text}: time does not run backwards");
            self.bed.advance_to(until);
            words = rest.trim();
        }
        let refused = if words.is_empty() {
            None
        } else {
            self.perform(&Line::parse(words), &mut said)
        };
        let mut told = self.tell();
        told.extend(said.drain(..).map(|line| self.own_named(line)));
        told.extend(refused.map(|reason| format!("{}  refused: {reason}", self.clock())));
        if self.bed.quiet {
            return told;
        }
        invariants::at_rest(&self.bed.state, &self.bed.settings, self.bed.now)
            .unwrap_or_else(|broken| panic!("{text}: {broken}\n{}", self.bed.story()));
        assert_eq!(
            self.bed.replayed(),
            self.bed.state,
            "{text}: a replay gives another State"
        );
        told
    }

    /// The events since the last time.
    fn tell(&mut self) -> Vec<String> {
        let new = &self.bed.log[self.told..];
        let lines = new.iter().filter_map(|entry| {
            let line = self.own_named(text::event(&self.names, &entry.event)?);
            Some(format!("{:>8}  {line}", text::time(entry.at)))
        });
        let lines = lines.collect();
        self.told = self.bed.log.len();
        self.effects.append(&mut self.bed.effects);
        lines
    }

    /// The services of jobs with containers of their own, by their jobs' names.
    fn own_named(&self, mut text: String) -> String {
        if text.contains(NAME_PREFIX) {
            for (run, name) in &self.names {
                let plane = self.bed.planes.get(run).copied().unwrap_or(PlaneId::ROOT);
                text = text.replace(name_of(plane, *run).as_str(), &format!("job:{name}"));
            }
        }
        text
    }

    /// The service that a line names: of a job with a container of its own `job:NAME`.
    fn named_service(&self, line: &Line) -> ServiceName {
        match line.name().strip_prefix("job:") {
            Some(name) => {
                let run = self.run(name);
                let plane = self.bed.planes.get(&run).copied();
                name_of(plane.unwrap_or(PlaneId::ROOT), run)
            }
            None => line.name().into(),
        }
    }

    fn clock(&self) -> String {
        format!("{:>8}", text::time(self.bed.now))
    }

    fn perform(&mut self, line: &Line, said: &mut Vec<String>) -> Option<String> {
        let command = self
            .of_settings(line)
            .or_else(|| self.of_run(line))
            .or_else(|| self.of_service(line))
            .or_else(|| self.outcome(line));
        if let Some(command) = command {
            let by = line.keyed.get("by").filter(|_| line.verb == "start");
            let reply = match by {
                Some(user) => self.bed.submit_as(self.plane_of(user), command),
                None => self.bed.submit(command),
            };
            return reply
                .err()
                .map(|rejection| text::with_names(&self.names, &rejection.to_string()));
        }
        match line.verb {
            "settings" => self.settings(line),
            "crash" => self.restart(),
            "gone" => {
                for command in ["exited", "freed"] {
                    let line = Line {
                        verb: command,
                        plain: line.plain.clone(),
                        keyed: line.keyed.clone(),
                    };
                    let command = self.outcome(&line).unwrap();
                    self.bed.submit(command).unwrap();
                }
            }
            "why" => said.push(self.why(line.name())),
            "memory" => said.extend(self.memory()),
            "effects" => said.extend(self.show_effects()),
            verb => panic!("unknown command '{verb}'"),
        }
        None
    }

    fn settings(&mut self, line: &Line) {
        let settings = &mut self.bed.settings;
        for key in line.keyed.keys() {
            if *key == "containers" {
                settings.job_containers_max = line.number(key).unwrap() as usize;
                continue;
            }
            if *key == "host" {
                settings.sleep_host_max_mib = mib(line.keyed[key]);
                continue;
            }
            let field = match *key {
                "ageing" => &mut settings.ageing_ms_per_level,
                "min_runtime" => &mut settings.min_runtime_ms,
                "half_life" => &mut settings.share_half_life_ms,
                "swap" => &mut settings.swap_max_wait_ms,
                "idle" => &mut settings.idle_timeout_ms,
                "drain" => &mut settings.drain_ms,
                "retry" => &mut settings.retry_base_ms,
                "restart" => &mut settings.restart_base_ms,
                "forgive" => &mut settings.crash_loop_reset_ms,
                key => panic!("unknown setting '{key}'"),
            };
            *field = line.ms(key).unwrap();
        }
        assert!(self.bed.log.len() <= 3, "settings come first");
        *self = Script {
            bed: Bed::new(self.bed.settings.clone()),
            ..Script::new()
        };
        self.restart();
        self.told = self.bed.log.len();
    }

    /// A new process on the same disk.
    fn restart(&mut self) {
        self.bed.state = self.bed.replayed();
        self.effects.clear();
        self.bed.effects.clear();
        let epoch = self.bed.state.epoch + 1;
        self.bed
            .submit(Command::GatewayStarted {
                epoch,
                version: SmolStr::default(),
            })
            .unwrap();
    }

    /// What the machine and its administrators say.
    fn of_settings(&mut self, line: &Line) -> Option<Command> {
        Some(match line.verb {
            "gpus" => {
                let facts = (0u32..)
                    .zip(&line.plain)
                    .filter(|(_, size)| **size != "-")
                    .map(|(index, size)| GpuFacts {
                        uuid: format_smolstr!("g{index}"),
                        index,
                        name: SmolStr::default(),
                        memory_mib: mib(size),
                        source: GpuSource::Simulated,
                    });
                Command::GpusListed {
                    gpus: facts.collect(),
                }
            }
            "foreign" => Command::GpuForeignMemory {
                gpu: line.name().into(),
                mib: mib(line.plain[1]),
            },
            "fault" => Command::Seen(Seen::Fault {
                gpu: line.name().into(),
                cause: QuarantineCause::Xid,
                detail: String::new(),
            }),
            "starved" => {
                let service = SmolStr::from(line.name());
                let generation = self.bed.state.services[&service].generation;
                Command::Seen(Seen::OutOfMemory {
                    service,
                    generation,
                })
            }
            "lift" => Command::ReleaseGpu {
                gpu: line.name().into(),
            },
            "peak" => Command::ServiceMemorySeen {
                service: line.name().into(),
                mib: mib(line.plain[1]),
            },
            "engine" => {
                let up = line.name() == "up";
                let error = (!up).then(|| "it is away".to_owned());
                Command::EngineSeen {
                    engine: Engine { up, error },
                }
            }
            "shutdown" => Command::GatewayStopped,
            "tenant" => Command::Identity(Box::new(self.tenant(line))),
            "user" => Command::Identity(Box::new(self.user(line))),
            _ => return None,
        })
    }

    fn tenant(&self, line: &Line) -> IdentityCommand {
        let tenant = SmolStr::new(line.name());
        let change = TenantChange {
            weight: line.number("weight"),
            quotas: quotas(line),
            ..TenantChange::default()
        };
        let create = !self.bed.state.people.tenants.contains_key(&tenant);
        IdentityCommand::SetTenant {
            tenant,
            change,
            create,
        }
    }

    /// A user `tenant/name` with a plane of its own: created, or its quotas changed.
    fn user(&self, line: &Line) -> IdentityCommand {
        let key = user_key(line.name());
        if self.bed.state.people.users.contains_key(&key) {
            return IdentityCommand::UpdateUser {
                key,
                change: ProfileChange::default(),
                quotas: quotas(line),
                allowance: UserAllowanceChange::default(),
                rotate: None,
            };
        }
        create_user(key)
    }

    fn plane_of(&self, user: &str) -> PlaneId {
        let user = self.bed.state.people.users.get(&user_key(user));
        user.unwrap_or_else(|| panic!("there is no such user"))
            .plane
    }

    fn run(&self, name: &str) -> RunId {
        *self
            .runs
            .get(name)
            .unwrap_or_else(|| panic!("there is no run '{name}'"))
    }

    fn of_run(&mut self, line: &Line) -> Option<Command> {
        let reason = Some("because".to_owned());
        let action = match line.verb {
            "start" => return Some(self.start(line)),
            "delete" => {
                return Some(Command::CancelQueued {
                    run: self.run(line.name()),
                });
            }
            "checkpoint" => {
                return Some(Command::SaveCheckpoint {
                    run: self.run(line.name()),
                    attempt: line.number("attempt"),
                    content_type: SmolStr::default(),
                    body: payload(),
                });
            }
            "pause" => InboxAction::Pause { reason },
            "resume" => InboxAction::Resume,
            "cancel" => InboxAction::Cancel { reason },
            "retry" => InboxAction::Retry,
            "preempt" => InboxAction::Preempt {
                by: line.keyed.get("by").map(|by| self.run(by)),
            },
            "priority" => {
                let priority = Priority::new(line.plain[1].parse().unwrap()).unwrap();
                InboxAction::SetPriority { priority }
            }
            _ => return None,
        };
        let run = self.run(line.name());
        Some(Command::Inbox(InboxCommand {
            command: SmolStr::new_static("c"),
            run_text: SmolStr::new(run.to_string()),
            run: Some(run),
            action,
            client_id: None,
            payload: payload(),
            ended: None,
        }))
    }

    fn start(&mut self, line: &Line) -> Command {
        let name = line.name().to_owned();
        let run = RunId(Uuid::from_u128(self.runs.len() as u128 + 1));
        assert!(
            self.runs.insert(name.clone(), run).is_none(),
            "run '{name}' was started before"
        );
        self.names.insert(run, name);
        let target = match (line.keyed.get("type"), line.keyed.get("service")) {
            (Some(of), None) => Target::Type((*of).into()),
            (None, Some(of)) => Target::Service((*of).into()),
            _ if line.has("container") => Target::Container(Needs {
                vram_mib: line.keyed.get("vram").map_or(0, |text| mib(text)),
                gpus: line.number("gpus").unwrap_or(0),
            }),
            _ => panic!("start needs type=, service= or container"),
        };
        let checkpoint = line.ms("asks").map(|ms| Step::Checkpoint {
            ask: Ask::Signal(SmolStr::new_static("SIGUSR1")),
            ms,
        });
        let grace_ms = line.ms("grace").unwrap_or(10_000);
        let container = line
            .has("container")
            .then(|| Box::new(JobContainer::new(checkpoint, grace_ms)));
        let priority = line.number("priority").unwrap_or(3);
        let spec = JobSpec {
            target,
            service_type: None,
            priority: Priority::new(u8::try_from(priority).unwrap()).unwrap(),
            ttl_ms: line.ms("ttl"),
            max_attempts: line.number("attempts").unwrap_or(3),
            timeout_ms: line.ms("timeout").unwrap_or(300_000),
            callback_url: line
                .has("callback")
                .then(|| SmolStr::new_static("http://there")),
        };
        Command::StartJob {
            run,
            spec,
            session: None,
            labels: Vec::new(),
            container,
            payload: payload(),
        }
    }

    fn of_service(&mut self, line: &Line) -> Option<Command> {
        let service = || SmolStr::new(line.name());
        let drain = line.has("drain");
        Some(match line.verb {
            "service" => Command::RegisterService {
                spec: Box::new(spec(line, None)),
                tenant: line.keyed.get("tenant").map(SmolStr::new),
            },
            "update" => {
                let old = &self.bed.state.services[line.name()].spec;
                Command::UpdateService {
                    spec: Box::new(spec(line, Some(old))),
                }
            }
            "enable" => Command::EnableService { service: service() },
            "disable" => Command::DisableService { service: service() },
            "remove" => Command::RemoveService { service: service() },
            "up" => Command::StartService { service: service() },
            "down" => Command::StopService {
                service: service(),
                drain,
            },
            "restart" => Command::RestartService {
                service: service(),
                drain,
            },
            "execute" => Command::PreemptExecute {
                service: service(),
                preemptor: self.run(line.plain[1]),
            },
            "release" => Command::PreemptRelease { service: service() },
            _ => return None,
        })
    }

    fn generation(&self, line: &Line) -> Generation {
        let current = self
            .bed
            .state
            .services
            .get(&self.named_service(line))
            .map_or(0, |service| service.generation.0);
        Generation(line.number("gen").map_or(current, u64::from))
    }

    fn attempt(&self, line: &Line) -> Attempt {
        let run = self.run(line.name());
        let current = self.bed.state.jobs.get(&run).map_or(1, |job| job.attempt);
        line.number("attempt").unwrap_or(current)
    }

    fn outcome(&mut self, line: &Line) -> Option<Command> {
        if let Some(command) = self.outcome_of_run(line) {
            return Some(command);
        }
        let verbs = [
            "spawned",
            "healthy",
            "unhealthy",
            "adopted",
            "exited",
            "freed",
            "took",
            "woken",
            "killed",
        ];
        if !verbs.contains(&line.verb) {
            return None;
        }
        let service = self.named_service(line);
        let generation = self.generation(line);
        Some(match line.verb {
            "spawned" => Command::InstanceSpawned {
                service,
                generation,
                pid: 1,
                start_ticks: 1,
                boot_id: SmolStr::default(),
                port: 1,
            },
            "healthy" => Command::InstanceHealthy {
                service,
                generation,
            },
            "unhealthy" => Command::InstanceUnhealthy {
                service,
                generation,
                error: "no answer".to_owned(),
            },
            "adopted" => Command::InstanceAdopted {
                service,
                generation,
                pid: 1,
            },
            "killed" => Command::InstanceSignalled {
                service,
                generation,
                signal: SmolStr::new_static("KILL"),
            },
            "woken" => Command::InstanceWoken {
                service,
                generation,
                error: line.has("fail").then(|| "no answer".to_owned()),
            },
            "took" => {
                let instance = self.bed.state.services[line.name()].instance.as_ref();
                let rung = instance.and_then(|i| i.rung.as_ref());
                let grants = instance.map(|i| i.grants.clone()).unwrap_or_default();
                let held = line.keyed.get("held").map(|held| {
                    let of = |grant: &Grant| Grant {
                        gpu: grant.gpu.clone(),
                        mib: mib(held),
                    };
                    grants.iter().map(of).collect()
                });
                Command::LadderStepTried {
                    service,
                    generation,
                    run: None,
                    attempt: 0,
                    number: line
                        .number("step")
                        .unwrap_or_else(|| rung.map_or(0, |rung| rung.number)),
                    outcome: step_outcome(line),
                    error: None,
                    held,
                }
            }
            "exited" => {
                let exit = match line.number("code") {
                    Some(code) => Exit::Code(i32::try_from(code).unwrap()),
                    None if line.has("away") => Exit::NoEngine("it is away".to_owned()),
                    None => Exit::Unknown,
                };
                Command::InstanceExited {
                    service,
                    generation,
                    exit,
                }
            }
            _ => Command::InstanceReleased {
                service,
                generation,
            },
        })
    }

    fn outcome_of_run(&mut self, line: &Line) -> Option<Command> {
        Some(match line.verb {
            "answer" => {
                let failure = JobFailure {
                    code: SmolStr::new_static("http_status"),
                    error: "500".to_owned(),
                };
                let outcome = if line.has("fail") {
                    Err(failure)
                } else {
                    Ok(Bytes::from_static(b"{}"))
                };
                Command::JobAnswered {
                    run: self.run(line.name()),
                    attempt: self.attempt(line),
                    outcome,
                }
            }
            "asked" => Command::LadderStepTried {
                service: SmolStr::default(),
                generation: Generation::default(),
                run: Some(self.run(line.name())),
                attempt: self.attempt(line),
                number: line.number("step").unwrap_or_else(|| {
                    let job = self.bed.state.jobs.get(&self.run(line.name()));
                    job.and_then(|job| job.rung.as_ref())
                        .map_or(0, |rung| rung.number)
                }),
                outcome: step_outcome(line),
                error: None,
                held: None,
            },
            "stopped" => Command::JobStopDone {
                run: self.run(line.name()),
                attempt: self.attempt(line),
                confirmed: !line.has("unconfirmed"),
            },
            "callback" => {
                let run = self.run(line.name());
                let number = line.number("number").unwrap();
                let status = if line.has("fail") { 503 } else { 200 };
                Command::CallbackTried {
                    run,
                    number,
                    status: Some(status),
                    error: None,
                }
            }
            _ => return None,
        })
    }

    fn why(&self, name: &str) -> String {
        let run = self.run(name);
        let Some(why) = why(&self.bed.state, &self.bed.settings, run, self.bed.now) else {
            return format!("{}  {name} is not live", self.clock());
        };
        let place = why
            .position
            .map_or(String::new(), |n| format!(", place {n}"));
        let causes: Vec<&str> = why.blocking.iter().map(|b| b.cause).collect();
        let causes = if causes.is_empty() {
            String::new()
        } else {
            format!(", blocked by {}", causes.join(", "))
        };
        format!("{}  {name} is {}{place}{causes}", self.clock(), why.state)
    }

    fn memory(&self) -> Vec<String> {
        let all = rungate::domain::scheduler::status::gpu_status(&self.bed.state);
        all.iter()
            .filter(|gpu| gpu.present)
            .map(|gpu| {
                let by: Vec<String> = gpu
                    .reservations
                    .iter()
                    .map(|(name, amount)| format!("{name} {}", text::mib(*amount)))
                    .collect();
                format!(
                    "{}  {}: {} reserved ({}), {} held, {} used by others",
                    self.clock(),
                    gpu.facts.uuid,
                    text::mib(gpu.reserved_mib),
                    by.join(", "),
                    text::mib(gpu.held_mib),
                    text::mib(gpu.foreign_mib)
                )
            })
            .collect()
    }

    /// What the executor was told since it was asked the last time.
    fn show_effects(&mut self) -> Vec<String> {
        self.effects.append(&mut self.bed.effects);
        let clock = self.clock();
        let names = &self.names;
        let told = |effect: Effect| format!("{clock}  effect: {}", text::effect(names, &effect));
        self.effects.drain(..).map(told).collect()
    }
}

/// How a step ended: `fail` or `skip`, else well.
fn step_outcome(line: &Line) -> StepOutcome {
    match (line.has("fail"), line.has("skip")) {
        (true, _) => StepOutcome::Failed,
        (_, true) => StepOutcome::Skipped,
        _ => StepOutcome::Done,
    }
}

/// `drain:5s,checkpoint:1s,sleep:30s,sleep2:30s,cuda:10s,stop:3s,kill`.
fn ladder(text: &str) -> Vec<Step> {
    let step = |text: &str| {
        let (name, limit) = text.split_once(':').unwrap_or((text, "0s"));
        let ms = ms(limit);
        let call = |level| SleepCall {
            level,
            path: "/sleep".to_owned(),
            wake_path: "/wake_up".to_owned(),
            is_sleeping_path: None,
        };
        match name {
            "drain" => Step::Drain { ms },
            "checkpoint" => Step::Checkpoint {
                ask: Ask::Path("/checkpoint".to_owned()),
                ms,
            },
            "sleep" => Step::Sleep { call: call(1), ms },
            "sleep2" => Step::Sleep { call: call(2), ms },
            "cuda" => Step::CudaCheckpoint { ms },
            "stop" => Step::Stop { ms },
            "kill" => Step::Kill,
            _ => panic!("'{name}' is no step"),
        }
    };
    text.split(',')
        .filter(|text| *text != "none")
        .map(step)
        .collect()
}

/// `acme/ann`.
pub fn user_key(name: &str) -> UserKey {
    let (tenant, user) = name.split_once('/').unwrap_or(("default", name));
    UserKey {
        tenant: tenant.into(),
        user: user.into(),
    }
}

/// A user with a plane of its own.
pub fn create_user(key: UserKey) -> IdentityCommand {
    let mut digest = [0; 32];
    let name = key.to_string();
    digest[..name.len()].copy_from_slice(name.as_bytes());
    IdentityCommand::CreateUser {
        profile: Profile {
            email: String::new(),
            roles: vec![Role::User],
            scopes: Vec::new(),
            enabled: true,
            runtime: key.user.clone(),
        },
        token: NewToken {
            token: SmolStr::new_static("t"),
            name: SmolStr::new_static("t"),
            scopes: Vec::new(),
            hash: TokenHash::Keyed(digest),
            expires_at: None,
        },
        key,
    }
}

/// `queued=`, `running=`, `gpus=`, `vram=`; `none` lifts one.
fn quotas(line: &Line) -> QuotasChange {
    let of = |key: &str, read: &dyn Fn(&str) -> u64| {
        let text = line.keyed.get(key)?;
        Some((*text != "none").then(|| read(text)))
    };
    let number = |text: &str| text.parse().unwrap();
    QuotasChange {
        queued_runs: of("queued", &number),
        running_runs: of("running", &number),
        gpus: of("gpus", &number),
        vram_mib: of("vram", &mib),
    }
}

/// A service's specification: what the line says, else what it was, else small defaults.
fn spec(line: &Line, old: Option<&ServiceSpec>) -> ServiceSpec {
    let worker = if line.has("external") {
        Worker::External {
            url: "http://there".to_owned(),
        }
    } else if line.has("container") {
        Worker::Container
    } else {
        Worker::Process {
            command: vec!["worker".to_owned()],
            env: Vec::new(),
            working_dir: None,
        }
    };
    let mut spec = old.cloned().unwrap_or_else(|| ServiceSpec {
        name: line.name().into(),
        service_type: line.name().into(),
        container: String::new(),
        port: 0,
        health_endpoint: "/health".to_owned(),
        description: String::new(),
        vram_mib: 0,
        gpus: 0,
        progress_mode: ProgressMode::Stateless,
        progress_endpoint: None,
        worker,
        concurrency: 1,
        dispatch_path: None,
        cancel_path: None,
        idle_timeout_ms: None,
        grace_ms: 5_000,
        startup_timeout_ms: 60_000,
        min_runtime_ms: None,
        ladder: Vec::new(),
        mps_percent: None,
    });
    if let Some(of) = line.keyed.get("type") {
        spec.service_type = (*of).into();
    }
    spec.vram_mib = line
        .keyed
        .get("vram")
        .map_or(spec.vram_mib, |text| mib(text));
    spec.gpus = line.number("gpus").unwrap_or(spec.gpus);
    spec.concurrency = line.number("places").unwrap_or(spec.concurrency);
    spec.idle_timeout_ms = line.ms("idle").or(spec.idle_timeout_ms);
    spec.grace_ms = line.ms("grace").unwrap_or(spec.grace_ms);
    spec.startup_timeout_ms = line.ms("startup").unwrap_or(spec.startup_timeout_ms);
    spec.min_runtime_ms = line.ms("min_runtime").or(spec.min_runtime_ms);
    if let Some(text) = line.keyed.get("ladder") {
        spec.ladder = ladder(text);
    }
    spec
}
