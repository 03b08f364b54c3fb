//! A service and the current life of its process, and how their events change them.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::State;
use super::job::{Job, Phase};
use super::sleep::Asleep;
use crate::domain::container::{ContainerFacts, Engine};
use crate::domain::effect::ProcessIdentity;
use crate::domain::event::{Event, StartCause, StopCause};
use crate::domain::ids::{Generation, RunId, ServiceName};
use crate::domain::ladder::Rung;
use crate::domain::spec::{Grant, ServiceSpec, Target, Worker};
use crate::domain::time::Timestamp;

/// A registered service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Service {
    pub spec: Box<ServiceSpec>,
    /// Whose jobs alone it takes; `None` takes everybody's.
    pub tenant: Option<SmolStr>,
    pub enabled: bool,
    /// The last generation given.
    pub generation: Generation,
    pub instance: Option<Instance>,
    /// A person wants it up: it is started again when it dies, and never stopped for idling.
    pub wanted: bool,
    /// Unexpected deaths in a row.
    pub deaths: u32,
    /// Not started before.
    pub retry_at: Option<Timestamp>,
    /// Given up after too many deaths; the text is the last one's error.
    pub crash_looped: Option<String>,
    /// The most GPU memory that an instance was seen to use, when more than declared.
    pub learned_mib: Option<u64>,
    /// The instance whose death raised the need: each raises it once.
    pub raised_by: Option<Generation>,
}

/// What is kept of a removed service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retired {
    /// The last one given.
    pub generation: Generation,
    pub tenant: Option<SmolStr>,
}

/// One life of a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Instance {
    pub generation: Generation,
    pub phase: InstancePhase,
    /// When it entered its phase.
    pub since: Timestamp,
    pub started_at: Timestamp,
    pub ready_at: Option<Timestamp>,
    /// GPU memory reserved for it, from the decision to start until it is seen free.
    pub grants: Vec<Grant>,
    pub cause: StartCause,
    pub process: Option<ProcessIdentity>,
    pub container: Option<ContainerFacts>,
    /// Jobs that hold one of its places, those being stopped included.
    pub active: BTreeSet<RunId>,
    /// When `active` last became empty.
    pub idle_since: Timestamp,
    /// Places of jobs being stopped, promised to these waiting runs.
    pub promised: BTreeSet<RunId>,
    /// The step of its service's ladder that is under way for the instance itself.
    pub rung: Option<Rung>,
    /// From when it sleeps until it is awake again.
    pub asleep: Option<Asleep>,
}

/// Where an instance stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum InstancePhase {
    /// Decided or spawned, not yet healthy.
    Starting {
        deadline: Timestamp,
    },
    /// The gateway restarted and looks for it; it may have died meanwhile.
    Finding,
    Ready,
    /// No new work; stopped when its jobs are over, which `deadline` may hasten.
    Draining {
        cause: StopCause,
        deadline: Option<Timestamp>,
    },
    Stopping {
        cause: StopCause,
        kill_at: Timestamp,
    },
    /// Gone; its memory is not yet seen free.
    Exited {
        cause: Option<StopCause>,
    },
    /// It has no work, and its memory is being taken by a step of its ladder.
    Yielding {
        cause: StopCause,
    },
    /// It lives without its GPU memory.
    Asleep,
    /// Its memory is reserved again, and it is being woken.
    Waking {
        deadline: Timestamp,
    },
}

impl Service {
    /// One that nobody has started yet, shared by all.
    pub fn new(spec: Box<ServiceSpec>) -> Service {
        Service {
            spec,
            tenant: None,
            enabled: true,
            generation: Generation::default(),
            instance: None,
            wanted: false,
            deaths: 0,
            retry_at: None,
            crash_looped: None,
            learned_mib: None,
            raised_by: None,
        }
    }

    /// MiB that an instance is known to need: declared or learned, whichever is larger.
    pub fn need_mib(&self) -> u64 {
        self.spec.vram_mib.max(self.learned_mib.unwrap_or(0))
    }

    /// Whether it takes jobs of this tenant.
    pub fn admits(&self, tenant: &SmolStr) -> bool {
        self.tenant.as_ref().is_none_or(|owner| owner == tenant)
    }

    /// Whether it takes jobs of `target`, of tenants that it admits.
    pub fn serves(&self, target: &Target) -> bool {
        if self.spec.worker.is_job() {
            return false;
        }
        match target {
            Target::Container(_) => false,
            Target::Type(service_type) => self.spec.service_type == *service_type,
            Target::Service(name) => self.spec.name == *name,
        }
    }

    /// The shapes whose jobs it serves.
    pub fn targets(&self) -> Vec<Target> {
        if self.spec.worker.is_job() {
            return Vec::new();
        }
        vec![
            Target::Type(self.spec.service_type.clone()),
            Target::Service(self.spec.name.clone()),
        ]
    }

    /// Its instance, if that takes new work.
    pub fn ready(&self) -> Option<&Instance> {
        self.instance
            .as_ref()
            .filter(|i| i.phase == InstancePhase::Ready)
    }

    /// Jobs that one instance takes at once.
    pub fn places(&self) -> usize {
        usize::try_from(self.spec.concurrency).unwrap_or(usize::MAX)
    }

    /// Milliseconds without work after which a scheduler's instance stops, if it ever does.
    pub fn idle_limit_ms(&self, default_ms: u64) -> Option<u64> {
        self.spec
            .needs_gpu()
            .then(|| self.spec.idle_timeout_ms.unwrap_or(default_ms))
    }
}

impl Instance {
    /// Whether it is on its way out.
    pub fn is_leaving(&self) -> bool {
        matches!(
            self.phase,
            InstancePhase::Draining { .. }
                | InstancePhase::Stopping { .. }
                | InstancePhase::Exited { .. }
                | InstancePhase::Yielding { .. }
        )
    }

    /// Whether it will take work once it is up.
    pub fn is_coming(&self) -> bool {
        matches!(
            self.phase,
            InstancePhase::Starting { .. } | InstancePhase::Finding | InstancePhase::Waking { .. }
        )
    }
}

impl State {
    /// Whether a job may run on a service.
    pub fn serves(&self, service: &Service, job: &Job) -> bool {
        let serves = match &service.spec.worker {
            // Its own job has that payload, and no other has.
            Worker::Job { payload, .. } => job.payload == *payload,
            _ => service.serves(&job.spec.target),
        };
        serves && service.admits(self.tenant_of(job.plane))
    }

    /// Changes a service and marks it for the scheduler's attention. Whatever changes of it may help any
    /// shape: its jobs' leaving makes room as well as its own.
    pub(super) fn edit_service(&mut self, name: &ServiceName, edit: impl FnOnce(&mut Service)) {
        if let Some(service) = self.services.get_mut(name) {
            edit(service);
            self.touched.insert(name.clone());
            self.queue.unpark_all();
        }
    }

    /// Changes the instance of that generation; an older generation changes nothing.
    pub(super) fn edit_instance(
        &mut self,
        name: &ServiceName,
        generation: Generation,
        edit: impl FnOnce(&mut Instance),
    ) {
        self.edit_service(name, |service| {
            if let Some(instance) = service
                .instance
                .as_mut()
                .filter(|i| i.generation == generation)
            {
                edit(instance);
            }
        });
    }

    pub(super) fn take_place(&mut self, name: &ServiceName, generation: Generation, run: RunId) {
        // A place that is taken helps nobody else, except those who may preempt there later. An instance that was
        // idle becomes a victim of another kind.
        if let Some(service) = self.services.get_mut(name)
            && let Some(instance) = service
                .instance
                .as_mut()
                .filter(|i| i.generation == generation)
        {
            if instance.active.is_empty() {
                self.queue.unpark_all();
            }
            instance.active.insert(run);
            for target in service.targets() {
                self.queue.unpark(&target);
            }
            self.touched.insert(name.clone());
        }
    }

    /// Places on `service` that `run` may take now: those promised to others are not among them, except to jobs of
    /// the same shape that are served later anyway; `before` knows the others. A place promised to a run that has to
    /// wait for a quota is free meanwhile.
    pub fn free_places(
        &self,
        service: &Service,
        run: RunId,
        before: impl Fn(RunId) -> bool,
    ) -> usize {
        let (Some(instance), Some(job)) = (service.ready(), self.jobs.get(&run)) else {
            return 0;
        };
        let keeps = |by: &&RunId| {
            let Some(other) = self.jobs.get(by) else {
                return true;
            };
            match other.spec.target == job.spec.target {
                true => **by != run && before(**by),
                false => self.may_use(other.plane, service),
            }
        };
        let others = instance.promised.iter().filter(keeps).count();
        service
            .places()
            .saturating_sub(instance.active.len() + others)
    }

    /// A run gave its place back at `now` of the event being applied.
    pub(super) fn leave_place(&mut self, name: &ServiceName, run: RunId) {
        let at = self.now;
        self.edit_service(name, |service| {
            if let Some(instance) = service.instance.as_mut()
                && instance.active.remove(&run)
                && instance.active.is_empty()
            {
                instance.idle_since = at;
            }
        });
    }

    /// The place of `victim` will go to `by`.
    pub(super) fn promise_place(&mut self, victim: RunId, by: RunId) {
        let Some((name, generation)) = self
            .jobs
            .get(&victim)
            .and_then(|job| job.place())
            .map(|(name, generation)| (name.clone(), generation))
        else {
            return;
        };
        let wants_it = !self.promises.contains_key(&by)
            && self.services.get(&name).is_some_and(|service| {
                let job = self.jobs.get(&by);
                let job = job.filter(|job| matches!(job.phase, Phase::Queued));
                service.ready().is_some() && job.is_some_and(|job| self.serves(service, job))
            });
        if wants_it {
            self.promises.insert(by, name.clone());
            self.edit_instance(&name, generation, |instance| {
                instance.promised.insert(by);
            });
        }
    }

    /// `run` does not wait any more: what was promised to it is free for others.
    pub(super) fn drop_promises(&mut self, run: RunId) {
        if let Some(name) = self.promises.remove(&run) {
            self.edit_service(&name, |service| {
                if let Some(instance) = &mut service.instance {
                    instance.promised.remove(&run);
                }
            });
        }
    }

    /// What was promised on an instance that will not take work, or not of this kind, is promised no more.
    pub(super) fn drop_promises_on(&mut self, name: &ServiceName) {
        let Some(service) = self.services.get(name) else {
            return;
        };
        let Some(instance) = &service.instance else {
            return;
        };
        let lost: Vec<RunId> = instance
            .promised
            .iter()
            .filter(|run| {
                let job = self.jobs.get(run);
                instance.is_leaving() || job.is_none_or(|job| !self.serves(service, job))
            })
            .copied()
            .collect();
        for run in lost {
            self.drop_promises(run);
        }
        self.trim_promises(name);
    }

    /// Keeps no more promises than there will be places: a job that was served before one of its shape took
    /// that one's place, and of those promised the last has to wait on.
    pub(super) fn trim_promises(&mut self, name: &ServiceName) {
        while let Some(last) = self.promise_too_many(name) {
            self.drop_promises(last);
        }
    }

    fn promise_too_many(&self, name: &ServiceName) -> Option<RunId> {
        let service = self.services.get(name)?;
        let instance = service.instance.as_ref()?;
        let staying = |run: &&RunId| {
            let job = self.jobs.get(run);
            job.is_some_and(|job| matches!(job.phase, Phase::Running { .. }))
        };
        let taken = instance.active.iter().filter(staying).count();
        if instance.promised.len() <= service.places().saturating_sub(taken) {
            return None;
        }
        let key = |run: &&RunId| {
            let job = self.jobs.get(run);
            job.map(|job| self.queue.key(**run, job.queued_at, job.spec.priority))
        };
        instance.promised.iter().max_by_key(key).copied()
    }

    /// Jobs that no service took may have one now.
    fn serve_shapes(&mut self, name: &ServiceName) {
        for target in self.services.get(name).iter().flat_map(|s| s.targets()) {
            self.queue.serve(&target);
        }
    }

    /// Applies an event about a service's registration.
    pub(super) fn apply_service(&mut self, event: &Event) {
        match event {
            Event::ServiceRegistered { spec } => {
                let retired = self.retired.remove(&spec.name);
                let mut service = Service::new(spec.clone());
                service.generation = match (&spec.worker, retired) {
                    // Each attempt is a generation of its own.
                    (Worker::Job { run, .. }, _) => {
                        let attempt = self.jobs.get(run).map_or(0, |job| job.attempt);
                        Generation(u64::from(attempt))
                    }
                    (_, Some(retired)) => retired.generation,
                    (_, None) => Generation::default(),
                };
                self.services.insert(spec.name.clone(), service);
                self.touched.insert(spec.name.clone());
                self.queue.unpark_all();
                self.serve_shapes(&spec.name);
            }
            Event::ServiceUpdated { spec } => {
                self.edit_service(&spec.name, |service| {
                    if !spec.needs_memory_as(&service.spec) {
                        service.learned_mib = None;
                    }
                    service.spec = spec.clone();
                    service.forget_deaths();
                });
                self.drop_promises_on(&spec.name);
                self.serve_shapes(&spec.name);
            }
            Event::ServiceEnabled { service } => {
                self.edit_service(service, |service| service.enabled = true);
                self.serve_shapes(service);
            }
            Event::ServiceDisabled { service } => self.edit_service(service, |service| {
                service.enabled = false;
                service.wanted = false;
            }),
            Event::ServiceRemoved { service } => {
                let removed = self.services.remove(service);
                // A job's own is not made again but for that job.
                if let Some(removed) = removed.filter(|removed| !removed.spec.worker.is_job()) {
                    let retired = Retired {
                        generation: removed.generation,
                        tenant: removed.tenant,
                    };
                    self.retired.insert(service.clone(), retired);
                }
                self.queue.unpark_all();
            }
            Event::ServiceAssigned { service, tenant } => {
                self.edit_service(service, |service| service.tenant = Some(tenant.clone()));
                self.queue.unpark_all();
            }
            Event::ServiceCrashLooped {
                service,
                last_error,
                ..
            } => {
                self.edit_service(service, |service| {
                    service.crash_looped = Some(last_error.clone());
                    service.wanted = false;
                });
            }
            Event::ServicePeakLearned { .. } | Event::ServiceNeedRaised { .. } => {
                self.learn_need(event);
            }
            _ => {}
        }
    }

    /// How much memory a service needs was found out.
    fn learn_need(&mut self, event: &Event) {
        match event {
            Event::ServicePeakLearned { service, mib } => {
                self.edit_service(service, |service| service.learned_mib = Some(*mib));
            }
            Event::ServiceNeedRaised {
                service,
                generation,
                mib,
            } => {
                self.edit_service(service, |service| {
                    service.learned_mib = Some(*mib);
                    service.raised_by = Some(*generation);
                });
            }
            _ => {}
        }
    }

    /// Applies an event about an instance.
    pub(super) fn apply_instance(&mut self, at: Timestamp, event: &Event) {
        match event {
            Event::InstanceStartRequested {
                service,
                generation,
                grants,
                cause,
                deadline,
            } => {
                self.start_instance(at, service, *generation, grants, *cause, *deadline);
            }
            Event::InstanceSpawned {
                service,
                generation,
                pid,
                start_ticks,
                boot_id,
                port,
            } => {
                let process = ProcessIdentity {
                    pid: *pid,
                    start_ticks: *start_ticks,
                    boot_id: boot_id.clone(),
                    port: *port,
                };
                self.edit_instance(service, *generation, |i| i.process = Some(process));
            }
            Event::ContainerChanged {
                service,
                generation,
                container,
            } => {
                let container = Some(container.clone());
                self.edit_instance(service, *generation, |i| i.container = container);
            }
            Event::InstanceExited { service, .. } => {
                self.exit_instance(at, event);
                self.drop_promises_on(service);
            }
            Event::InstanceReleased {
                service,
                generation,
            } => {
                self.release_instance(service, *generation);
            }
            Event::LadderStepBegan { .. }
            | Event::LadderStepEnded { .. }
            | Event::InstanceSlept { .. }
            | Event::InstanceWakeRequested { .. } => self.step_instance(at, event),
            _ => self.move_instance(at, event),
        }
    }

    /// Applies an event that moves an instance from one phase to another.
    fn move_instance(&mut self, at: Timestamp, event: &Event) {
        match event {
            Event::InstanceReady {
                service,
                generation,
                ..
            }
            | Event::InstanceAdopted {
                service,
                generation,
                ..
            } => {
                let mut was_asleep = false;
                self.edit_instance(service, *generation, |instance| {
                    let found = matches!(event, Event::InstanceAdopted { .. });
                    if found && instance.phase != InstancePhase::Finding {
                        return;
                    }
                    was_asleep = instance.asleep.take().is_some();
                    instance.phase = InstancePhase::Ready;
                    instance.since = at;
                    instance.ready_at.get_or_insert(at);
                    instance.idle_since = at;
                });
                if was_asleep {
                    self.look_at_leaving();
                }
            }
            Event::InstanceDraining {
                service,
                generation,
                cause,
                deadline,
            } => {
                self.edit_instance(service, *generation, |instance| {
                    instance.phase = InstancePhase::Draining {
                        cause: cause.clone(),
                        deadline: *deadline,
                    };
                    instance.since = at;
                });
                self.keep_wanted(service, cause);
                self.drop_promises_on(service);
            }
            Event::InstanceStopRequested {
                service,
                generation,
                cause,
                kill_at,
            } => {
                self.edit_instance(service, *generation, |instance| {
                    instance.since = at;
                    let cause = cause.clone();
                    instance.phase = match instance.phase {
                        InstancePhase::Exited { .. } => {
                            InstancePhase::Exited { cause: Some(cause) }
                        }
                        _ => InstancePhase::Stopping {
                            cause,
                            kill_at: *kill_at,
                        },
                    };
                });
                self.keep_wanted(service, cause);
                self.drop_promises_on(service);
                self.look_at_leaving();
            }
            _ => {}
        }
    }

    /// Only a stop that leads to a restart leaves the wish for an instance standing.
    pub(super) fn keep_wanted(&mut self, service: &ServiceName, cause: &StopCause) {
        self.edit_service(service, |service| match cause {
            StopCause::Restart => service.wanted = true,
            StopCause::Unhealthy | StopCause::StartupTimeout => {}
            _ => service.wanted = false,
        });
    }

    fn start_instance(
        &mut self,
        at: Timestamp,
        name: &ServiceName,
        generation: Generation,
        grants: &[Grant],
        cause: StartCause,
        deadline: Timestamp,
    ) {
        self.edit_service(name, |service| {
            service.generation = generation;
            if cause == StartCause::Manual {
                service.wanted = true;
                service.forget_deaths();
            }
            service.instance = Some(Instance {
                generation,
                phase: InstancePhase::Starting { deadline },
                since: at,
                started_at: at,
                ready_at: None,
                grants: grants.to_vec(),
                cause,
                process: None,
                container: None,
                active: BTreeSet::new(),
                idle_since: at,
                promised: BTreeSet::new(),
                rung: None,
                asleep: None,
            });
        });
        for grant in grants {
            if let Some(gpu) = self.gpus.get_mut(&grant.gpu) {
                gpu.reserved_mib += grant.mib;
            }
        }
    }

    fn exit_instance(&mut self, at: Timestamp, event: &Event) {
        let Event::InstanceExited {
            service,
            generation,
            retry_at,
            deaths,
            ..
        } = event
        else {
            return;
        };
        self.edit_service(service, |service| {
            let Some(instance) = service
                .instance
                .as_mut()
                .filter(|i| i.generation == *generation)
            else {
                return;
            };
            let cause = match &instance.phase {
                InstancePhase::Stopping { cause, .. } => Some(cause.clone()),
                _ => None,
            };
            instance.phase = InstancePhase::Exited { cause };
            instance.since = at;
            service.deaths = *deaths;
            service.retry_at = *retry_at;
        });
    }

    fn release_instance(&mut self, name: &ServiceName, generation: Generation) {
        let mut freed = Vec::new();
        self.edit_service(name, |service| {
            if service
                .instance
                .as_ref()
                .is_some_and(|i| i.generation == generation)
                && let Some(instance) = service.instance.take()
            {
                freed = instance.grants;
            }
        });
        for grant in freed {
            if let Some(gpu) = self.gpus.get_mut(&grant.gpu) {
                gpu.reserved_mib = gpu.reserved_mib.saturating_sub(grant.mib);
            }
        }
        self.forget_absent_gpus();
        self.look_at_absent();
        self.look_at_leaving();
    }

    /// What waits for containers may go on, or has to wait.
    pub(super) fn change_engine(&mut self, engine: &Engine) {
        self.engine = engine.clone();
        self.queue.unpark_all();
        self.look_at_absent();
    }

    /// Room has changed: services that people want up may fit again.
    pub(super) fn look_at_absent(&mut self) {
        let absent = self
            .services
            .values()
            .filter(|s| s.wanted && s.instance.is_none());
        self.touched.extend(absent.map(|s| s.spec.name.clone()));
    }

    /// A new gateway process does not know yet which instances are alive.
    pub(super) fn doubt_instances(&mut self, at: Timestamp) {
        for (name, service) in &mut self.services {
            if let Some(instance) = &mut service.instance
                && matches!(
                    instance.phase,
                    InstancePhase::Starting { .. } | InstancePhase::Ready
                )
            {
                instance.phase = InstancePhase::Finding;
                instance.since = at;
                self.touched.insert(name.clone());
            }
        }
    }
}

impl Service {
    fn forget_deaths(&mut self) {
        self.deaths = 0;
        self.retry_at = None;
        self.crash_looped = None;
    }
}
