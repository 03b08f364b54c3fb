//! What the executor reports of instances and GPUs. A report about an older generation changes nothing.

use bytes::Bytes;
use smol_str::SmolStr;

use super::job::backoff_ms;
use super::{Context, Decision};
use crate::domain::command::{Command, JobFailure};
use crate::domain::container::ContainerFacts;
use crate::domain::event::{Event, Exit, RequeueCause, StopCause};
use crate::domain::ids::{Generation, ServiceName};
use crate::domain::ladder::StepOutcome;
use crate::domain::scheduler::ladder;
use crate::domain::scheduler::upkeep::{drain, stop};
use crate::domain::state::job::Phase;
use crate::domain::state::service::{Instance, InstancePhase, Service};

/// The result of a job whose container has done its work; what it wrote is kept apart.
const ENDED_WELL: &[u8] = br#"{"exit_code":0}"#;

/// Milliseconds before a job's container is tried again that its engine did not make.
const NO_ENGINE_PAUSE_MS: u64 = 5_000;

impl Context<'_> {
    /// The service and its instance, if `generation` is the current one and still there.
    pub(super) fn instance(
        &self,
        name: &ServiceName,
        generation: Generation,
    ) -> Option<(&Service, &Instance)> {
        let service = self.state.services.get(name)?;
        let instance = service
            .instance
            .as_ref()
            .filter(|i| i.generation == generation)?;
        Some((service, instance))
    }

    pub(super) fn instance_outcome(&self, command: Command) -> Decision {
        let mut decision = Decision::done(self.seen_of_instance(command));
        for (event, result) in &mut decision.events {
            if matches!(event, Event::JobCompleted { .. }) {
                *result = Bytes::from_static(ENDED_WELL);
            }
        }
        decision
    }

    fn seen_of_instance(&self, command: Command) -> Vec<Event> {
        match command {
            Command::InstanceSpawned {
                service,
                generation,
                pid,
                start_ticks,
                boot_id,
                port,
            } => self.if_current(Event::InstanceSpawned {
                service,
                generation,
                pid,
                start_ticks,
                boot_id,
                port,
            }),
            Command::InstanceHealthy {
                service,
                generation,
            } => self.healthy(service, generation),
            Command::InstanceUnhealthy {
                service,
                generation,
                error,
            } => self.unhealthy(service, generation, error),
            Command::InstanceAdopted {
                service,
                generation,
                pid,
            } => self.adopted(service, generation, pid),
            Command::InstanceSignalled {
                service,
                generation,
                signal,
            } => self.signalled(service, generation, signal),
            Command::InstanceExited {
                service,
                generation,
                exit,
            } => self.exited(service, generation, exit),
            Command::InstanceReleased {
                service,
                generation,
            } => self.released(service, generation),
            Command::ContainerSeen {
                service,
                generation,
                container,
            } => self.container_seen(service, generation, container),
            Command::EngineSeen { engine } => match engine == self.state.engine {
                true => Vec::new(),
                false => vec![Event::EngineChanged { engine }],
            },
            seen => self.memory_seen(seen),
        }
    }

    /// The event, if it is about a current instance.
    fn if_current(&self, event: Event) -> Vec<Event> {
        let current = event
            .instance()
            .and_then(|(name, generation)| self.instance(name, generation));
        current.map(|_| event).into_iter().collect()
    }

    /// Each change once, however often the engine tells it.
    fn container_seen(
        &self,
        service: ServiceName,
        generation: Generation,
        container: ContainerFacts,
    ) -> Vec<Event> {
        match self.instance(&service, generation) {
            Some((_, instance)) if instance.container.as_ref() != Some(&container) => {
                vec![Event::ContainerChanged {
                    service,
                    generation,
                    container,
                }]
            }
            _ => Vec::new(),
        }
    }

    /// What the executor saw of GPUs and of their memory's use.
    fn memory_seen(&self, command: Command) -> Vec<Event> {
        match command {
            Command::GpusListed { gpus } => {
                let known = self.state.gpus.values().filter(|g| g.present);
                let same = known.clone().count() == gpus.len()
                    && known.into_iter().all(|g| gpus.contains(&g.facts));
                if same {
                    Vec::new()
                } else {
                    vec![Event::GpusListed { gpus }]
                }
            }
            Command::GpuForeignMemory { gpu, mib } => match self.state.gpus.get(&gpu) {
                Some(entry) if entry.foreign_mib != mib => {
                    vec![Event::GpuForeignMemoryChanged { gpu, mib }]
                }
                _ => Vec::new(),
            },
            Command::ServiceMemorySeen { service, mib } => {
                match self.state.services.get(&service) {
                    Some(entry) if mib > entry.need_mib() => {
                        vec![Event::ServicePeakLearned { service, mib }]
                    }
                    _ => Vec::new(),
                }
            }
            of_ladder => self.ladder_outcome(of_ladder),
        }
    }

    fn signalled(
        &self,
        service: ServiceName,
        generation: Generation,
        signal: SmolStr,
    ) -> Vec<Event> {
        let Some((entry, instance)) = self.instance(&service, generation) else {
            return Vec::new();
        };
        let killed = match signal.as_str() {
            "KILL" => ladder::killed(entry, instance, self.now),
            _ => Vec::new(),
        };
        let mut events = vec![Event::InstanceSignalled {
            service,
            generation,
            signal,
        }];
        events.extend(killed);
        events
    }

    /// One that sleeps, or that is on its way to or from sleep, is adopted as that.
    fn adopted(&self, service: ServiceName, generation: Generation, pid: u32) -> Vec<Event> {
        let found = |instance: &Instance| {
            matches!(
                instance.phase,
                InstancePhase::Finding
                    | InstancePhase::Asleep
                    | InstancePhase::Yielding { .. }
                    | InstancePhase::Waking { .. }
            )
        };
        match self.instance(&service, generation) {
            Some((_, instance)) if found(instance) => {
                vec![Event::InstanceAdopted {
                    service,
                    generation,
                    pid,
                }]
            }
            _ => Vec::new(),
        }
    }

    fn healthy(&self, service: ServiceName, generation: Generation) -> Vec<Event> {
        match self.instance(&service, generation) {
            Some((_, instance)) if instance.is_coming() && instance.asleep.is_none() => {
                let startup_ms = self.now.millis_since(instance.started_at);
                vec![Event::InstanceReady {
                    service,
                    generation,
                    startup_ms,
                }]
            }
            _ => Vec::new(),
        }
    }

    /// One that never became healthy is stopped; one that was is drained, so that what still works may end, also when it
    /// drains already for room that may not be needed after all.
    fn unhealthy(&self, service: ServiceName, generation: Generation, error: String) -> Vec<Event> {
        let Some((entry, instance)) = self.instance(&service, generation) else {
            return Vec::new();
        };
        let seen = Event::InstanceUnhealthy {
            service,
            generation,
            error,
        };
        match &instance.phase {
            InstancePhase::Starting { .. } | InstancePhase::Finding => {
                vec![
                    seen,
                    stop(entry, instance, StopCause::StartupTimeout, self.now),
                ]
            }
            InstancePhase::Ready
            | InstancePhase::Draining {
                cause: StopCause::Room { .. },
                ..
            } => {
                let deadline = self.now + entry.spec.grace_ms;
                vec![
                    seen,
                    drain(entry, instance, StopCause::Unhealthy, Some(deadline)),
                ]
            }
            _ => Vec::new(),
        }
    }

    fn exited(&self, service: ServiceName, generation: Generation, exit: Exit) -> Vec<Event> {
        let Some((entry, instance)) = self.instance(&service, generation) else {
            return Vec::new();
        };
        let expected = match &instance.phase {
            _ if matches!(exit, Exit::NoEngine(_)) => true,
            InstancePhase::Exited { .. } => return Vec::new(),
            // It ended while no gateway watched: nobody knows why, so it is not held against it.
            InstancePhase::Finding => true,
            InstancePhase::Stopping { cause, .. } => {
                !matches!(cause, StopCause::Unhealthy | StopCause::StartupTimeout)
            }
            _ => false,
        };
        if entry.spec.worker.is_job() {
            return self.container_ended(instance, service, exit);
        }
        let mut events = self.abandon_jobs(instance, &service, &exit);
        events.extend(ladder::cut_off(entry, instance, self.now));
        let lived_ms = instance.ready_at.map_or(0, |at| self.now.millis_since(at));
        let earlier = if lived_ms >= self.settings.crash_loop_reset_ms {
            0
        } else {
            entry.deaths
        };
        let deaths = earlier + 1;
        // The engine is given a moment, though nobody is blamed.
        let waits = !expected || matches!(exit, Exit::NoEngine(_));
        let retry_at = waits.then(|| {
            let settings = self.settings;
            self.now + backoff_ms(settings.restart_base_ms, settings.restart_max_ms, deaths)
        });
        events.push(Event::InstanceExited {
            service,
            generation,
            exit,
            expected,
            retry_at,
            deaths: if expected { 0 } else { deaths },
        });
        events
    }

    /// The container of a job has ended: that is the outcome of the job's attempt, unless it was being stopped.
    fn container_ended(&self, instance: &Instance, service: ServiceName, exit: Exit) -> Vec<Event> {
        let mut events = Vec::new();
        for run in &instance.active {
            let Some(job) = self.state.jobs.get(run) else {
                continue;
            };
            let (run, attempt) = (*run, job.attempt);
            match (&job.phase, &exit) {
                // What it was asked to save it has saved, or not: how it ends says nothing of its work then.
                (Phase::Stopping { cause, .. }, _) => {
                    events.extend(self.stopped(run, job, cause, true));
                }
                (_, Exit::Code(0)) => events.push(Event::JobCompleted { run, attempt }),
                // Held against nobody.
                (_, Exit::NoEngine(_)) => events.push(Event::JobRequeued {
                    run,
                    cause: RequeueCause::InstanceStopped,
                }),
                (_, exit) => events.extend(self.failed(run, job, failure_of(exit), None)),
            }
        }
        // Its service stays for as long, and with it nothing is tried.
        let is_away = matches!(exit, Exit::NoEngine(_));
        events.push(Event::InstanceExited {
            service,
            generation: instance.generation,
            exit,
            expected: true,
            retry_at: is_away.then(|| self.now + NO_ENGINE_PAUSE_MS),
            deaths: 0,
        });
        events
    }

    /// Jobs on an instance that is gone: being stopped, they have; running, their attempt failed.
    fn abandon_jobs(&self, instance: &Instance, service: &ServiceName, exit: &Exit) -> Vec<Event> {
        let mut events = Vec::new();
        for run in &instance.active {
            let Some(job) = self.state.jobs.get(run) else {
                continue;
            };
            match &job.phase {
                Phase::Stopping { cause, .. } => {
                    events.extend(self.stopped(*run, job, cause, true))
                }
                _ => {
                    let failure = JobFailure {
                        code: SmolStr::new_static("instance_exited"),
                        error: format!(
                            "service '{service}' ended while it worked: {}",
                            describe(exit)
                        ),
                    };
                    events.extend(self.failed(*run, job, failure, None));
                }
            }
        }
        events
    }

    fn released(&self, service: ServiceName, generation: Generation) -> Vec<Event> {
        let Some((entry, instance)) = self.instance(&service, generation) else {
            return Vec::new();
        };
        let InstancePhase::Exited { cause } = &instance.phase else {
            return Vec::new();
        };
        let removed = *cause == Some(StopCause::Removed);
        let done = StepOutcome::Done;
        let ended = ladder::ended_of_instance(entry, instance, done, None, &[], self.now);
        let mut events: Vec<Event> = ended.into_iter().collect();
        events.push(Event::InstanceReleased {
            service: service.clone(),
            generation,
        });
        if removed {
            events.push(Event::ServiceRemoved { service });
        }
        events
    }
}

/// Why an attempt failed whose container ended so.
fn failure_of(exit: &Exit) -> JobFailure {
    let code = match exit {
        Exit::Code(_) => "exit_code",
        Exit::Signal(_) => "signal",
        Exit::OutOfMemory => "memory_limit",
        Exit::NotStarted(_) => "not_started",
        Exit::Unknown | Exit::NoEngine(_) => "interrupted",
    };
    JobFailure {
        code: SmolStr::new_static(code),
        error: match exit {
            Exit::Unknown => "its container is gone, and how it ended is not known".to_owned(),
            told => describe(told),
        },
    }
}

/// How a process ended, for people.
fn describe(exit: &Exit) -> String {
    match exit {
        Exit::Code(code) => format!("exit code {code}"),
        Exit::Signal(signal) => format!("killed by signal {signal}"),
        Exit::Unknown => "its process is gone".to_owned(),
        Exit::NotStarted(error) | Exit::NoEngine(error) => error.clone(),
        Exit::OutOfMemory => "killed, as it had used up its memory limit".to_owned(),
    }
}
