//! A gateway that random operations are played to, with the world around it and perhaps a twin that was read back
//! from a snapshot on the way and must do the same ever after.

use std::collections::BTreeMap;

use rungate::domain::command::{Command, InboxAction, InboxCommand};
use rungate::domain::container::{Engine, JobContainer};
use rungate::domain::ids::{PlaneId, RunId, ServiceName};
use rungate::domain::ladder::{Ask, Step};
use rungate::domain::machine::{QuarantineCause, Seen};
use rungate::domain::settings::Settings;
use rungate::domain::spec::{GpuFacts, GpuSource, JobSpec, Needs, Priority, ServiceSpec, Target};
use rungate::domain::state::job::Phase;
use smol_str::{SmolStr, format_smolstr};
use uuid::Uuid;

use super::bed::{Bed, payload};
use super::invariants;
use super::ops::{CONTAINERS, GPUS, Op, TYPES, name};
use super::world::{Luck, World};

pub fn settings() -> Settings {
    Settings {
        min_runtime_ms: 2_000,
        ageing_ms_per_level: 60_000,
        swap_max_wait_ms: 15_000,
        idle_timeout_ms: 10_000,
        drain_ms: 8_000,
        sleep_host_max_mib: 30,
        job_containers_max: 3,
        ..Settings::default()
    }
}

/// A gateway, its world, and perhaps a twin that was read back from a snapshot on the way.
pub struct Play {
    pub bed: Bed,
    pub world: World,
    pub twin: Option<Bed>,
    pub runs: Vec<RunId>,
    /// Whose runs are started, in turns; without any the first administrator's.
    pub starters: Vec<PlaneId>,
    /// Services that are one tenant's alone, once they are registered.
    pub owners: BTreeMap<ServiceName, SmolStr>,
}

impl Play {
    pub fn new() -> Play {
        let mut play = Play {
            bed: Bed::new(settings()),
            world: World::default(),
            twin: None,
            runs: Vec::new(),
            starters: Vec::new(),
            owners: BTreeMap::new(),
        };
        play.submit(Command::GatewayStarted {
            epoch: 1,
            version: SmolStr::default(),
        });
        play.list(7);
        play.engine(true);
        play
    }

    /// Submits to the gateway and to its twin, which must do the same.
    pub fn submit(&mut self, command: Command) {
        let plane = self.bed.plane_of(&command);
        self.submit_as(plane, command);
    }

    /// The same, by the user of a plane.
    fn submit_as(&mut self, plane: PlaneId, command: Command) {
        let from = self.bed.log.len();
        let reply = self.bed.submit_as(plane, command.clone());
        if let Some(twin) = &mut self.twin {
            let other = twin.submit_as(plane, command.clone());
            assert_eq!(
                reply, other,
                "replies differ after a snapshot to {command:?}"
            );
            self.compare(from);
        }
        self.rest();
    }

    fn compare(&mut self, from: usize) {
        if let Some(twin) = &mut self.twin {
            twin.effects.clear();
            assert_eq!(
                self.bed.log[from..],
                twin.log[from..],
                "decisions differ after a snapshot"
            );
            assert_eq!(self.bed.state, twin.state, "states differ after a snapshot");
        }
    }

    fn rest(&mut self) {
        self.world.absorb(&mut self.bed.effects);
        if self.bed.quiet {
            return;
        }
        if let Err(broken) = invariants::at_rest(&self.bed.state, &self.bed.settings, self.bed.now)
        {
            panic!("{broken}\n{}", self.bed.story());
        }
    }

    pub fn wait(&mut self, ms: u64) {
        let until = self.bed.now + ms;
        let from = self.bed.log.len();
        self.bed.advance_to(until);
        if let Some(twin) = &mut self.twin {
            twin.advance_to(until);
            self.compare(from);
        }
        self.rest();
    }

    /// Everything but calls goes on until nothing more comes of it.
    pub fn help(&mut self) {
        while let Some(index) = self.world.next_but_calls() {
            self.go_on(index, Luck::Good);
        }
    }

    /// Answers the calls that are open for the longest.
    pub fn answer_oldest(&mut self, count: usize) {
        for _ in 0..count {
            if let Some(index) = self.world.oldest_call() {
                self.go_on(index, Luck::Good);
            }
        }
    }

    /// Lets several commands arrive before anything follows from them.
    pub fn paused_scheduler(&mut self, paused: bool) {
        self.bed.quiet = paused;
        self.twin = None;
        if !paused {
            self.bed.settle();
            self.rest();
        }
    }

    fn run(&self, index: usize) -> Option<RunId> {
        (!self.runs.is_empty()).then(|| self.runs[index % self.runs.len()])
    }

    pub fn act(&mut self, run: RunId, action: InboxAction) {
        self.submit(Command::Inbox(InboxCommand {
            command: SmolStr::new_static("c"),
            run_text: SmolStr::new(run.to_string()),
            run: Some(run),
            action,
            client_id: None,
            payload: payload(),
            ended: None,
        }));
    }

    pub fn go_on(&mut self, index: usize, luck: Luck) {
        if let Some(command) = self.world.go_on(index, luck) {
            self.submit(command);
        }
    }

    fn list(&mut self, mask: u8) {
        let gpus = (0u8..)
            .zip(GPUS)
            .filter(|(index, _)| mask & (1 << index) != 0)
            .map(|(index, memory_mib)| GpuFacts {
                uuid: format_smolstr!("g{index}"),
                index: u32::from(index),
                name: SmolStr::default(),
                memory_mib,
                source: GpuSource::Simulated,
            });
        self.submit(Command::GpusListed {
            gpus: gpus.collect(),
        });
    }

    pub fn start(
        &mut self,
        target: u8,
        priority: u8,
        ttl: bool,
        attempts: u32,
        callback: bool,
    ) -> RunId {
        let run = RunId(Uuid::from_u128(self.runs.len() as u128 + 1));
        self.runs.push(run);
        let target = match target {
            of if of < TYPES => Target::Type(format_smolstr!("t{of}")),
            named if named < CONTAINERS => Target::Service(name(named)),
            own => Target::Container(Needs {
                vram_mib: [0, 6, 16][usize::from(own) % 3],
                gpus: u32::from(own % 4 == 3),
            }),
        };
        let asks = self.runs.len().is_multiple_of(2);
        let checkpoint = asks.then(|| Step::Checkpoint {
            ask: Ask::Signal(SmolStr::new_static("SIGUSR1")),
            ms: 1_000,
        });
        let is_own = matches!(target, Target::Container(_));
        let spec = JobSpec {
            target,
            service_type: None,
            priority: Priority::new(priority).unwrap(),
            ttl_ms: ttl.then_some(40_000),
            max_attempts: attempts,
            timeout_ms: 300_000,
            callback_url: callback.then(|| SmolStr::new_static("http://c")),
        };
        let turn = (self.runs.len() + usize::from(priority)) % self.starters.len().max(1);
        let plane = self.starters.get(turn).copied().unwrap_or(PlaneId::ROOT);
        let command = Command::StartJob {
            run,
            spec,
            session: None,
            labels: Vec::new(),
            container: is_own.then(|| Box::new(JobContainer::new(checkpoint, 2_000))),
            payload: payload(),
        };
        self.submit_as(plane, command);
        run
    }

    fn restart(&mut self) {
        // What the disk has is all that a new process gets.
        assert_eq!(
            self.bed.replayed(),
            self.bed.state,
            "a replay differs from the live State"
        );
        self.bed.state = self.bed.replayed();
        self.world.forget();
        let epoch = self.bed.state.epoch + 1;
        self.submit(Command::GatewayStarted {
            epoch,
            version: SmolStr::default(),
        });
    }

    fn service(&mut self, service: ServiceName, action: u8) {
        let drain = action.is_multiple_of(2);
        self.submit(match action {
            0 => Command::EnableService { service },
            1 => Command::DisableService { service },
            2 => Command::RemoveService { service },
            3 | 4 => Command::StartService { service },
            5 | 6 => Command::StopService { service, drain },
            _ => Command::RestartService { service, drain },
        });
    }

    pub fn register(&mut self, spec: ServiceSpec) {
        let spec = Box::new(spec);
        if self.bed.state.services.contains_key(&spec.name) {
            self.submit(Command::UpdateService { spec });
        } else {
            let tenant = self.owners.get(&spec.name).cloned();
            self.submit(Command::RegisterService { spec, tenant });
        }
    }

    pub fn perform(&mut self, op: Op) {
        match op {
            Op::Start {
                target,
                priority,
                ttl,
                attempts,
                callback,
            } => {
                self.start(target, priority, ttl, attempts, callback);
            }
            Op::Act { run, action } => {
                let other = self.run(run / 7);
                if let Some(run) = self.run(run) {
                    self.act(run, action_of(action, run, other));
                }
            }
            Op::CancelQueued(run) => {
                if let Some(run) = self.run(run) {
                    self.submit(Command::CancelQueued { run });
                }
            }
            Op::Checkpoint(run) => {
                if let Some(run) = self.run(run) {
                    let content_type = SmolStr::default();
                    self.submit(Command::SaveCheckpoint {
                        run,
                        attempt: None,
                        content_type,
                        body: payload(),
                    });
                }
            }
            other => self.perform_on_services(other),
        }
    }

    fn perform_on_services(&mut self, op: Op) {
        match op {
            Op::Register(spec) => self.register(*spec),
            Op::Service { service, action } => self.service(name(service), action),
            Op::Execute { service, run } => {
                if let Some(preemptor) = self.run(run) {
                    self.submit(Command::PreemptExecute {
                        service: name(service),
                        preemptor,
                    });
                }
            }
            Op::Release { service } => self.submit(Command::PreemptRelease {
                service: name(service),
            }),
            other => self.perform_on_world(other),
        }
    }

    fn perform_on_world(&mut self, op: Op) {
        match op {
            Op::GoOn { index, good } => {
                self.go_on(index, if good { Luck::Good } else { Luck::Bad })
            }
            Op::AllButCalls => {
                for _ in 0..self.world.pending.len() {
                    if let Some(index) = self.world.next_but_calls() {
                        self.go_on(index, Luck::Good);
                    }
                }
            }
            Op::Again(index) => {
                if !self.world.reported.is_empty() {
                    let index = index % self.world.reported.len();
                    self.submit(self.world.reported[index].clone());
                }
            }
            Op::Wait(ms) => self.wait(ms),
            Op::Foreign { gpu, mib } => self.submit(Command::GpuForeignMemory {
                gpu: format_smolstr!("g{gpu}"),
                mib,
            }),
            Op::Fault { gpu, good } => self.fault(gpu, good),
            Op::Starved { service } => {
                let service = name(service);
                let known = self.bed.state.services.get(&service);
                let generation = known.map(|known| known.generation).unwrap_or_default();
                self.submit(Command::Seen(Seen::OutOfMemory {
                    service,
                    generation,
                }));
            }
            Op::List { mask } => self.list(mask),
            Op::Peak { service, mib } => self.submit(Command::ServiceMemorySeen {
                service: name(service),
                mib,
            }),
            Op::Engine { up } => self.engine(up),
            Op::Crash => self.restart(),
            Op::Shutdown => {
                self.submit(Command::GatewayStopped);
                self.restart();
            }
            Op::Snapshot => self.twin = Some(self.bed.restored()),
            other => unreachable!("{other:?} is performed elsewhere"),
        }
    }

    fn engine(&mut self, up: bool) {
        let error = (!up).then(|| "gone".to_owned());
        let engine = Engine { up, error };
        self.submit(Command::EngineSeen { engine });
    }

    fn fault(&mut self, gpu: u8, good: bool) {
        let gpu = format_smolstr!("g{gpu}");
        self.submit(match good {
            true => Command::ReleaseGpu { gpu },
            false => Command::Seen(Seen::Fault {
                gpu,
                cause: QuarantineCause::Xid,
                detail: String::new(),
            }),
        });
    }

    /// Everybody helps from now on: every job that can run must end, and nothing may be left behind.
    pub fn finish(&mut self) {
        self.list(7);
        self.engine(true);
        for gpu in 0..3u8 {
            self.submit(Command::GpuForeignMemory {
                gpu: format_smolstr!("g{gpu}"),
                mib: 0,
            });
            self.fault(gpu, true);
        }
        for service in self.bed.state.services.keys().cloned().collect::<Vec<_>>() {
            self.submit(Command::EnableService {
                service: service.clone(),
            });
            let mut spec = self.bed.state.services[&service].spec.clone();
            spec.description.push('!'); // mended: its deaths are forgotten
            self.submit(Command::UpdateService { spec });
        }
        for round in 0.. {
            let jobs = self.bed.state.jobs.len();
            assert!(
                round < 3_000,
                "{jobs} jobs never end:\n{}",
                self.bed.story()
            );
            if let Some(index) = self.world.next_due() {
                self.go_on(index, Luck::Good);
            } else if let Some(at) = self.bed.next_deadline() {
                self.wait(u64::try_from((at - self.bed.now).max(0)).unwrap() / 1_000 + 1);
            } else if let Some(run) = self.paused() {
                self.act(run, InboxAction::Resume);
            } else if let Some(run) = self.hopeless() {
                self.act(run, InboxAction::Cancel { reason: None });
            } else {
                break;
            }
        }
        self.nothing_left();
    }

    fn paused(&self) -> Option<RunId> {
        let jobs = self.bed.state.jobs.iter();
        jobs.filter(|(_, job)| matches!(job.phase, Phase::Paused))
            .map(|(run, _)| *run)
            .min()
    }

    /// A waiting run that no service here can take, ever.
    fn hopeless(&self) -> Option<RunId> {
        let state = &self.bed.state;
        let mut waiting: Vec<RunId> = state.jobs.keys().copied().collect();
        waiting.sort();
        waiting.into_iter().find(|run| {
            let job = &state.jobs[run];
            let possible = state.services.values().any(|s| {
                let sizes = GPUS.iter().filter(|mib| **mib >= state.need_mib(s)).count();
                let fits = s.spec.gpus == 0 && s.spec.vram_mib == 0
                    || sizes >= s.spec.gpus.max(1) as usize;
                state.serves(s, job) && fits
            });
            // A container of its own fits each GPU but where it is on a smaller one.
            let possible = possible || job.container.is_some();
            matches!(job.phase, Phase::Queued) && !possible
        })
    }

    fn nothing_left(&self) {
        let state = &self.bed.state;
        let left = |what: &str| format!("{what} left behind:\n{}", self.bed.story());
        assert!(state.jobs.is_empty(), "{}", left("jobs"));
        assert!(
            state.queue.is_empty() && state.queue.shapes().next().is_none(),
            "{}",
            left("shapes")
        );
        assert!(state.holds.is_empty(), "{}", left("holds"));
        assert!(
            state.promises.is_empty() && state.preempted_by.is_empty(),
            "{}",
            left("promises")
        );
        assert!(state.callbacks.is_empty(), "{}", left("callbacks"));
        let leaving = state
            .services
            .values()
            .filter_map(|s| s.instance.as_ref())
            .any(|i| i.is_leaving());
        assert!(!leaving, "{}", left("leaving instances"));
        for service in state.services.values() {
            let awake = service.instance.as_ref().is_some_and(|i| !i.is_asleep());
            let idle = awake && service.spec.needs_gpu() && !service.wanted;
            assert!(!idle, "{}", left("idle instances"));
        }
    }
}

fn action_of(action: u8, run: RunId, other: Option<RunId>) -> InboxAction {
    match action {
        0 | 1 => InboxAction::Pause { reason: None },
        2 | 3 => InboxAction::Resume,
        4 => InboxAction::Cancel { reason: None },
        5 => InboxAction::Preempt {
            by: other.filter(|other| *other != run),
        },
        6 => InboxAction::Preempt { by: None },
        7 => InboxAction::Retry,
        _ => InboxAction::SetPriority {
            priority: Priority::new((run.0.as_u128() % 5) as u8 + 1).unwrap(),
        },
    }
}
