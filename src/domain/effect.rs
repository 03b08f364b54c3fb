//! Effects: what committed events imply for the world. The executor performs them and reports each
//! outcome as a command; it decides nothing, so an effect carries all that it needs.

use smol_str::SmolStr;

use super::event::{Event, JobStopCause};
use super::ids::{Attempt, Generation, PlaneId, RunId, Seq, ServiceName};
use super::ladder::{Ask, Step};
use super::notify::{Destination, Notice};
use super::spec::{Grant, ServiceSpec};
use super::state::State;
use super::state::job::{Job, Phase};
use super::state::service::{Instance, InstancePhase, Service};
use super::time::Timestamp;

/// Something to do in the world, fenced by generation and attempt.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Bring an instance to life and probe it until it is healthy. Outcomes: `InstanceSpawned`, then
    /// `InstanceHealthy`; or `InstanceExited`. From then on probe it and report `InstanceUnhealthy`.
    StartInstance {
        spec: Box<ServiceSpec>,
        generation: Generation,
        grants: Vec<Grant>,
    },
    /// Make and start the container of one attempt of a job. Outcomes: `InstanceSpawned`, `InstanceHealthy` as soon as it
    /// runs, `InstanceExited` with what it came to.
    StartJob {
        spec: Box<ServiceSpec>,
        grants: Vec<Grant>,
        job: Box<Dispatch>,
    },
    /// TERM its process group now, KILL at `kill_at`. Outcomes: `InstanceSignalled` each,
    /// `InstanceExited`, then `InstanceReleased` when its memory is free.
    StopInstance {
        service: ServiceName,
        generation: Generation,
        kill_at: Timestamp,
    },
    /// After a restart of the gateway: find the process of this instance. Outcomes: `InstanceAdopted`
    /// when it is alive, ours and healthy within `spec.startup_timeout_ms`; else it is stopped and `InstanceExited` with
    /// `Exit::Unknown`, then `InstanceReleased`.
    FindInstance {
        spec: Box<ServiceSpec>,
        generation: Generation,
        grants: Vec<Grant>,
        process: Option<ProcessIdentity>,
        /// The engine's id of its container, if it had one.
        container: Option<SmolStr>,
        /// It was being stopped: go on stopping it rather than adopt it.
        stop_at: Option<Timestamp>,
        /// It sleeps, or is being put to sleep or woken: it need not be healthy.
        asleep: bool,
    },
    /// After a restart: stop every process that bears this gateway's mark and is none of `live`.
    SweepOrphans {
        live: Vec<(ServiceName, Generation)>,
    },
    /// Report that the memory of an exited instance is free (again, after a restart): `InstanceReleased`.
    WatchRelease {
        service: ServiceName,
        generation: Generation,
        grants: Vec<Grant>,
    },
    /// Post the job's payload. Outcome: `JobAnswered`.
    Dispatch(Box<Dispatch>),
    /// Ask the service to stop this attempt, then drop the call, by `deadline`. Outcome: `JobStopDone`.
    StopCall {
        run: RunId,
        attempt: Attempt,
        service: ServiceName,
        generation: Generation,
        /// `pause`, `cancel`, `preempt`, `instance_stopping`, `timeout`.
        reason: &'static str,
        deadline: Timestamp,
    },
    /// Ask a service to save a run's checkpoint. Outcome: `LadderStepTried`, unless the checkpoint itself comes before.
    AskCheckpoint(Box<AskCheckpoint>),
    /// Take an instance's GPU memory and leave it alive. Outcome: `LadderStepTried`.
    TakeMemory(Box<TakeMemory>),
    /// Give a sleeping instance its memory again. Outcome: `InstanceWoken`.
    WakeInstance(Box<WakeInstance>),
    /// Post the outcome of an ended run, not before `not_before`. Outcome: `CallbackTried`.
    SendCallback {
        plane: PlaneId,
        /// Whose plane it is.
        tenant: SmolStr,
        run: RunId,
        number: u32,
        url: SmolStr,
        not_before: Timestamp,
    },
    /// Tell a tenant's channel of something. Outcome: `NoticeTried`.
    SendNotice(Box<SendNotice>),
}

/// One try to tell a tenant.
#[derive(Clone, Debug, PartialEq)]
pub struct SendNotice {
    pub tenant: SmolStr,
    pub destination: Destination,
    /// The record that it tells of.
    pub of: Seq,
    pub plane: PlaneId,
    /// `None` for a test.
    pub run: Option<RunId>,
    pub notice: Notice,
    /// When it happened.
    pub at: Timestamp,
    /// Counts from 1.
    pub number: u32,
    pub not_before: Timestamp,
}

/// One attempt's call.
#[derive(Clone, Debug, PartialEq)]
pub struct Dispatch {
    pub plane: PlaneId,
    pub run: RunId,
    pub attempt: Attempt,
    pub service: ServiceName,
    pub generation: Generation,
    /// Where the job's payload lies in the ledger.
    pub payload: Seq,
    /// The last checkpoint's seq, offered as `X-Rungate-Checkpoint`.
    pub checkpoint: Option<Seq>,
    pub timeout_ms: u64,
}

/// A checkpoint that is asked for, as the step `number` of a ladder.
#[derive(Clone, Debug, PartialEq)]
pub struct AskCheckpoint {
    pub run: RunId,
    pub attempt: Attempt,
    pub service: ServiceName,
    pub generation: Generation,
    pub number: u32,
    pub ask: Ask,
    pub deadline: Timestamp,
}

/// A step of an instance's ladder that takes what it was granted.
#[derive(Clone, Debug, PartialEq)]
pub struct TakeMemory {
    pub service: ServiceName,
    pub generation: Generation,
    pub number: u32,
    pub step: Step,
    pub grants: Vec<Grant>,
    /// An earlier gateway process began it: it may have taken effect already.
    pub is_anew: bool,
    pub deadline: Timestamp,
}

/// An instance that sleeps by `step`, to be woken.
#[derive(Clone, Debug, PartialEq)]
pub struct WakeInstance {
    pub service: ServiceName,
    pub generation: Generation,
    pub step: Step,
    pub deadline: Timestamp,
}

/// What tells a process from a later one with the same pid.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ProcessIdentity {
    pub pid: u32,
    /// Field 22 of `/proc/<pid>/stat`.
    pub start_ticks: u64,
    pub boot_id: SmolStr,
    pub port: u16,
}

/// What an event implies, given State just after it was applied.
pub fn implied(state: &State, event: &Event) -> Option<Effect> {
    match event {
        Event::InstanceStartRequested {
            service,
            generation,
            grants,
            ..
        } => {
            let spec = state.services.get(service)?.spec.clone();
            // A job's own is started by the job's dispatch, which follows.
            (!spec.worker.is_job()).then(|| Effect::StartInstance {
                spec,
                generation: *generation,
                grants: grants.clone(),
            })
        }
        Event::InstanceStopRequested {
            service,
            generation,
            kill_at,
            ..
        } => {
            // One that has exited already needs no stopping.
            let instance = state.services.get(service)?.instance.as_ref()?;
            let stopping = matches!(instance.phase, InstancePhase::Stopping { .. });
            (stopping && instance.generation == *generation).then(|| Effect::StopInstance {
                service: service.clone(),
                generation: *generation,
                kill_at: *kill_at,
            })
        }
        Event::JobDispatched { .. } => dispatched(state, event),
        Event::JobStopRequested {
            run,
            attempt,
            cause,
            deadline,
        } => {
            let job = state.jobs.get(run)?;
            // A declared ladder says when its call is ended; a container of its own is stopped instead.
            let (service, _) = job.place()?;
            let spec = &state.services.get(service)?.spec;
            let at_once = spec.ladder.is_empty() && !spec.worker.is_job();
            at_once.then(|| stop_call(*run, *attempt, job, cause, *deadline))?
        }
        Event::LadderStepBegan { .. } | Event::InstanceWakeRequested { .. } => {
            of_ladder(state, event)
        }
        Event::JobCompleted { run, .. }
        | Event::JobFailed { run, .. }
        | Event::JobCancelled { run, .. }
        | Event::CallbackAttempted { run, .. } => callback(state, *run),
        _ => None,
    }
}

/// An attempt begins: by a call, or by a container of its own.
fn dispatched(state: &State, event: &Event) -> Option<Effect> {
    let Event::JobDispatched {
        run,
        attempt,
        service,
        generation,
        checkpoint,
    } = event
    else {
        return None;
    };
    let job = state.jobs.get(run)?;
    let dispatch = Box::new(Dispatch {
        plane: job.plane,
        run: *run,
        attempt: *attempt,
        service: service.clone(),
        generation: *generation,
        payload: job.payload,
        checkpoint: *checkpoint,
        timeout_ms: job.spec.timeout_ms,
    });
    let own = state.services.get(service);
    match own.filter(|service| service.spec.worker.is_job()) {
        Some(own) => Some(Effect::StartJob {
            spec: own.spec.clone(),
            grants: own.instance.as_ref()?.grants.clone(),
            job: dispatch,
        }),
        None => Some(Effect::Dispatch(dispatch)),
    }
}

fn of_ladder(state: &State, event: &Event) -> Option<Effect> {
    match event {
        Event::LadderStepBegan { run: Some(_), .. } => of_run(state, event),
        Event::LadderStepBegan {
            service,
            generation,
            run: None,
            attempt,
            number,
            step,
            deadline,
            ..
        } => {
            let instance = state.services.get(service)?.instance.as_ref()?;
            step.takes_memory().then(|| {
                Effect::TakeMemory(Box::new(TakeMemory {
                    service: service.clone(),
                    generation: *generation,
                    number: *number,
                    step: step.clone(),
                    grants: instance.grants.clone(),
                    is_anew: *attempt > 0,
                    deadline: *deadline,
                }))
            })
        }
        Event::InstanceWakeRequested {
            service,
            generation,
            deadline,
            ..
        } => {
            let instance = state.services.get(service)?.instance.as_ref()?;
            Some(Effect::WakeInstance(Box::new(WakeInstance {
                service: service.clone(),
                generation: *generation,
                step: instance.asleep.as_ref()?.step.clone(),
                deadline: *deadline,
            })))
        }
        _ => None,
    }
}

/// The step of a ladder that began for a run.
fn of_run(state: &State, event: &Event) -> Option<Effect> {
    match event {
        Event::LadderStepBegan {
            service,
            generation,
            run: Some(run),
            attempt,
            number,
            step,
            deadline,
            ..
        } => {
            let job = state.jobs.get(run)?;
            match (step, &job.phase) {
                (Step::Checkpoint { ask, .. }, _) => {
                    Some(Effect::AskCheckpoint(Box::new(AskCheckpoint {
                        run: *run,
                        attempt: *attempt,
                        service: service.clone(),
                        generation: *generation,
                        number: *number,
                        ask: ask.clone(),
                        deadline: *deadline,
                    })))
                }
                (Step::Stop { .. } | Step::Kill, Phase::Stopping { cause, .. })
                    if job.container.is_none() =>
                {
                    stop_call(*run, *attempt, job, cause, *deadline)
                }
                _ => None,
            }
        }
        _ => None,
    }
}

fn stop_call(
    run: RunId,
    attempt: Attempt,
    job: &Job,
    cause: &JobStopCause,
    deadline: Timestamp,
) -> Option<Effect> {
    let Phase::Stopping {
        service,
        generation,
        ..
    } = &job.phase
    else {
        return None;
    };
    let reason = match cause {
        JobStopCause::Pause { .. } => "pause",
        JobStopCause::Cancel { .. } => "cancel",
        JobStopCause::Preempt { .. } | JobStopCause::Yield => "preempt",
        JobStopCause::InstanceStopping => "instance_stopping",
        JobStopCause::TimedOut => "timeout",
    };
    Some(Effect::StopCall {
        run,
        attempt,
        service: service.clone(),
        generation: *generation,
        reason,
        deadline,
    })
}

/// The next try of a run's callback, if one is owed.
fn callback(state: &State, run: RunId) -> Option<Effect> {
    let callback = state.callbacks.get(&run)?;
    Some(Effect::SendCallback {
        plane: callback.plane,
        tenant: state.tenant_of(callback.plane).clone(),
        run,
        number: callback.number + 1,
        url: callback.url.clone(),
        not_before: callback.next_at,
    })
}

/// What a new gateway process must take up again: find the instances, stop orphans, go on with callbacks.
/// Interrupted calls are not among them: `GatewayStarted` has put their runs back into the queue.
pub fn at_start(state: &State) -> Vec<Effect> {
    let mut effects = Vec::new();
    let mut live = Vec::new();
    for (name, service) in &state.services {
        if let Some(instance) = &service.instance {
            effects.push(find_instance(service, instance));
            live.push((name.clone(), instance.generation));
        }
    }
    effects.push(Effect::SweepOrphans { live });
    effects.extend(
        state
            .callbacks
            .keys()
            .filter_map(|run| callback(state, *run)),
    );
    effects.extend(state.open_notices());
    effects
}

fn find_instance(service: &Service, instance: &Instance) -> Effect {
    let stop_at = match &instance.phase {
        InstancePhase::Exited { .. } => {
            return Effect::WatchRelease {
                service: service.spec.name.clone(),
                generation: instance.generation,
                grants: instance.grants.clone(),
            };
        }
        InstancePhase::Stopping { kill_at, .. } => Some(*kill_at),
        _ => None,
    };
    Effect::FindInstance {
        spec: service.spec.clone(),
        generation: instance.generation,
        grants: instance.grants.clone(),
        process: instance.process.clone(),
        container: instance.container.as_ref().map(|seen| seen.id.clone()),
        stop_at,
        asleep: matches!(
            instance.phase,
            InstancePhase::Yielding { .. } | InstancePhase::Asleep | InstancePhase::Waking { .. }
        ),
    }
}
