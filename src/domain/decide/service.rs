//! Services: registering, starting and stopping them by hand, and preemption on demand.

use smol_str::SmolStr;

use super::{Context, Decision};
use crate::domain::command::{Rejection, Reply};
use crate::domain::event::{Event, JobStopCause, RequeueCause, StartCause, StopCause};
use crate::domain::ids::{Generation, PlaneId, RunId, ServiceName};
use crate::domain::scheduler::ladder::cut_off;
use crate::domain::scheduler::upkeep::{drain, stop, stop_active};
use crate::domain::scheduler::{best_victim, placement, start};
use crate::domain::spec::ServiceSpec;
use crate::domain::state::job::Phase;
use crate::domain::state::service::{Instance, InstancePhase, Service};
use crate::domain::tenant::Tenancy;

/// Names that a tenant may take by itself, those of removed services included: every name is remembered, and the scheduler
/// looks at every service.
pub const MAX_SERVICES_OF_TENANT: usize = 1_000;

impl Context<'_> {
    /// A service that exists for whoever asks.
    fn service(&self, name: &ServiceName) -> Result<&Service, Rejection> {
        let service = self.state.services.get(name);
        service
            .filter(|service| !service.spec.worker.is_job())
            .filter(|service| self.tenancy.sees(service.tenant.as_ref()))
            .ok_or_else(|| Rejection::ServiceNotFound(name.clone()))
    }

    /// One that they may start and stop.
    fn operated(&self, name: &ServiceName) -> Result<&Service, Rejection> {
        let service = self.service(name)?;
        match self.tenancy.operates(service.tenant.as_ref()) {
            true => Ok(service),
            false => Err(Rejection::ServiceShared(name.clone())),
        }
    }

    /// One that they may change.
    fn owned(&self, name: &ServiceName) -> Result<&Service, Rejection> {
        let service = self.service(name)?;
        match self.tenancy.owns(service.tenant.as_ref()) {
            true => Ok(service),
            false => Err(Rejection::ServiceShared(name.clone())),
        }
    }

    /// The name of a removed service stays with its owner, as its log does.
    pub(super) fn register_service(
        &self,
        spec: Box<ServiceSpec>,
        tenant: Option<SmolStr>,
    ) -> Result<Decision, Rejection> {
        let taken = self.state.services.get(&spec.name);
        if taken.is_some_and(|service| self.tenancy.sees(service.tenant.as_ref())) {
            return Err(Rejection::ServiceExists(spec.name.clone()));
        }
        let retired = self.state.retired.get(&spec.name);
        let is_kept = retired.is_some_and(|retired| !self.tenancy.owns(retired.tenant.as_ref()));
        if taken.is_some() || is_kept {
            return Err(Rejection::ServiceNameTaken(spec.name.clone()));
        }
        if retired.is_none() {
            self.may_take_a_name()?;
        }
        let service = spec.name.clone();
        let mut events = vec![Event::ServiceRegistered { spec }];
        events.extend(tenant.map(|tenant| Event::ServiceAssigned { service, tenant }));
        Ok(Decision::of(events, answer(None, false)))
    }

    fn may_take_a_name(&self) -> Result<(), Rejection> {
        let Tenancy::Of(tenant) = self.tenancy else {
            return Ok(());
        };
        let services = self.state.services.values().map(|service| &service.tenant);
        let retired = self.state.retired.values().map(|retired| &retired.tenant);
        let own = |owner: &&Option<SmolStr>| owner.as_ref() == Some(tenant);
        match services.chain(retired).filter(own).count() < MAX_SERVICES_OF_TENANT {
            true => Ok(()),
            false => Err(Rejection::TooManyServices(tenant.clone())),
        }
    }

    /// A running instance keeps what it was started with; the next one gets the new specification.
    pub(super) fn update_service(&self, spec: Box<ServiceSpec>) -> Result<Decision, Rejection> {
        let service = self.owned(&spec.name)?;
        if *service.spec == *spec {
            return Ok(Decision::of(Vec::new(), answer(None, true)));
        }
        Ok(Decision::of(
            vec![Event::ServiceUpdated { spec }],
            answer(None, false),
        ))
    }

    pub(super) fn enable_service(&self, name: ServiceName) -> Result<Decision, Rejection> {
        let already = self.operated(&name)?.enabled;
        let events = if already {
            vec![]
        } else {
            vec![Event::ServiceEnabled { service: name }]
        };
        Ok(Decision::of(events, answer(None, already)))
    }

    /// A running instance is drained and stopped.
    pub(super) fn disable_service(&self, name: ServiceName) -> Result<Decision, Rejection> {
        let already = !self.operated(&name)?.enabled;
        let events = if already {
            vec![]
        } else {
            vec![Event::ServiceDisabled { service: name }]
        };
        Ok(Decision::of(events, answer(None, already)))
    }

    /// An idle instance is stopped first, and the service goes with it.
    pub(super) fn remove_service(&self, name: ServiceName) -> Result<Decision, Rejection> {
        let service = self.owned(&name)?;
        let Some(instance) = &service.instance else {
            return Ok(Decision::of(
                vec![Event::ServiceRemoved { service: name }],
                answer(None, false),
            ));
        };
        if !instance.active.is_empty() {
            return Err(Rejection::ServiceHasActiveJobs(name));
        }
        // Its end was told already: a stop would wait for another that never comes.
        if matches!(instance.phase, InstancePhase::Exited { .. }) {
            return Err(Rejection::ServiceStopping(name));
        }
        let mut events: Vec<Event> = cut_off(service, instance, self.now).into_iter().collect();
        if service.enabled {
            events.push(Event::ServiceDisabled { service: name });
        }
        events.push(stop(service, instance, StopCause::Removed, self.now));
        Ok(Decision::of(
            events,
            answer(Some(instance.generation), false),
        ))
    }

    pub(super) fn start_service(&self, name: &ServiceName) -> Result<Decision, Rejection> {
        let service = self.operated(name)?;
        if !service.enabled {
            return Err(Rejection::ServiceDisabled(name.clone()));
        }
        let engine = &self.state.engine;
        if service.spec.worker.is_container() && service.instance.is_none() && !engine.up {
            return Err(Rejection::NoEngine {
                service: name.clone(),
                why: engine.why_down().to_owned(),
            });
        }
        match &service.instance {
            Some(instance) if instance.is_leaving() => {
                return Err(Rejection::ServiceStopping(name.clone()));
            }
            Some(instance) if !instance.is_asleep() => {
                return Ok(Decision::of(
                    Vec::new(),
                    answer(Some(instance.generation), true),
                ));
            }
            Some(_) | None => {}
        }
        let Some(grants) = placement::fit(self.state, service) else {
            let free = self
                .state
                .gpus
                .keys()
                .map(|gpu| self.state.available_mib(gpu))
                .max();
            return Err(Rejection::InsufficientVram {
                service: name.clone(),
                required_mib: self.state.need_mib(service),
                available_mib: free.unwrap_or(0),
            });
        };
        let mut events = Vec::new();
        if self.state.holds.contains_key(name) {
            // What is held for it is used, or not needed any more.
            events.push(Event::RoomReleased {
                service: name.clone(),
            });
        }
        events.push(start(service, grants, StartCause::Manual, self.now));
        let generation = match service.sleeping() {
            Some(_) => service.generation,
            None => Generation(service.generation.0 + 1),
        };
        Ok(Decision::of(events, answer(Some(generation), false)))
    }

    pub(super) fn stop_service(
        &self,
        name: &ServiceName,
        drain: bool,
    ) -> Result<Decision, Rejection> {
        let service = self.operated(name)?;
        let Some(instance) = &service.instance else {
            // It may be about to be started again: that is over now.
            let events = if service.wanted {
                vec![Event::InstanceStopRequested {
                    service: name.clone(),
                    generation: service.generation,
                    cause: StopCause::Manual,
                    kill_at: self.now,
                }]
            } else {
                Vec::new()
            };
            return Ok(Decision::of(events, answer(None, true)));
        };
        let events = self.bring_down(service, instance, drain, StopCause::Manual);
        Ok(Decision::of(
            events,
            answer(Some(instance.generation), false),
        ))
    }

    /// Stops it if it runs, and starts it again when it is gone. The answer names the generation that comes.
    pub(super) fn restart_service(
        &self,
        name: &ServiceName,
        drain: bool,
    ) -> Result<Decision, Rejection> {
        let service = self.operated(name)?;
        let Some(instance) = service.instance.as_ref().filter(|_| service.enabled) else {
            return self.start_service(name);
        };
        let next = Some(Generation(service.generation.0 + 1));
        match &instance.phase {
            // It comes again already.
            InstancePhase::Stopping {
                cause: StopCause::Restart,
                ..
            }
            | InstancePhase::Exited {
                cause: Some(StopCause::Restart),
            } => {
                return Ok(Decision::of(Vec::new(), answer(next, true)));
            }
            // On its way out for another reason: nothing would start it again.
            InstancePhase::Stopping { .. } | InstancePhase::Exited { .. } => {
                return Err(Rejection::ServiceStopping(name.clone()));
            }
            _ => {}
        }
        let events = self.bring_down(service, instance, drain, StopCause::Restart);
        Ok(Decision::of(events, answer(next, false)))
    }

    /// No new work, then the end: at once when nothing runs, or when its jobs are over. Without `drain`
    /// the jobs are stopped too, and go back to the queue.
    fn bring_down(
        &self,
        service: &Service,
        instance: &Instance,
        drain_first: bool,
        cause: StopCause,
    ) -> Vec<Event> {
        match &instance.phase {
            // It goes already; what may change is whether it comes again.
            InstancePhase::Stopping { cause: old, .. }
            | InstancePhase::Exited { cause: Some(old) }
                if *old == StopCause::Removed || *old == cause =>
            {
                Vec::new()
            }
            InstancePhase::Stopping { .. } | InstancePhase::Exited { .. } => {
                vec![stop(service, instance, cause, self.now)]
            }
            _ if instance.active.is_empty() => {
                let stop = stop(service, instance, cause, self.now);
                let cut_off = cut_off(service, instance, self.now);
                cut_off.into_iter().chain([stop]).collect()
            }
            _ if drain_first => {
                let deadline = self.now + self.settings.drain_ms;
                vec![drain(service, instance, cause, Some(deadline))]
            }
            _ => {
                let mut events = vec![drain(service, instance, cause, Some(self.now))];
                events.extend(stop_active(self.state, service, instance, self.now));
                events
            }
        }
    }

    pub(super) fn preempt_execute(
        &self,
        plane: PlaneId,
        name: &ServiceName,
        by: RunId,
    ) -> Result<Decision, Rejection> {
        let service = self.service(name)?;
        let preemptor = self.live(plane, by)?;
        if !matches!(preemptor.phase, Phase::Queued) {
            return Err(Rejection::NotQueued(by));
        }
        // Another plane's job is none to the caller; the scheduler alone weighs one plane's against another's.
        let running = |_: &Service, job: &crate::domain::state::job::Job| {
            (job.plane == plane && matches!(job.phase, Phase::Running { .. })).then_some(())
        };
        let Some((_, run)) = best_victim(&[service], self.state, running, self.now) else {
            return Err(Rejection::NoActiveJob(name.clone()));
        };
        if !self.state.serves(service, preemptor) {
            return Err(Rejection::WrongService {
                run: by,
                service: name.clone(),
            });
        }
        let Some(victim) = self.state.jobs.get(&run) else {
            return Err(Rejection::NoActiveJob(name.clone()));
        };
        let events = self.request_stop(run, victim, JobStopCause::Preempt { by });
        let progress_saved = victim.progress.is_some() || victim.checkpoint.is_some();
        Ok(Decision::of(
            events,
            Reply::Preempted {
                run,
                progress_saved,
            },
        ))
    }

    /// Queues again every preempted run of the plane and of this service's type.
    pub(super) fn preempt_release(
        &self,
        plane: PlaneId,
        name: &ServiceName,
    ) -> Result<Decision, Rejection> {
        let service = self.service(name)?;
        let runs: Vec<RunId> = self
            .state
            .preempted_by
            .values()
            .flatten()
            .copied()
            .filter(|run| {
                self.state.job(plane, *run).is_some_and(|job| {
                    self.state.serves(service, job)
                        || job.spec.service_type.as_ref() == Some(&service.spec.service_type)
                })
            })
            .collect();
        let requeue = |run: &RunId| Event::JobRequeued {
            run: *run,
            cause: RequeueCause::Released,
        };
        let events = runs.iter().map(requeue).collect();
        Ok(Decision::of(events, Reply::Released { runs }))
    }
}

fn answer(generation: Option<Generation>, already: bool) -> Reply {
    Reply::Service {
        generation,
        already,
    }
}
