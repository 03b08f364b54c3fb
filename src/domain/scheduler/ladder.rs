//! The next step of a ladder: for a run that is to stop, and for an instance that is to leave.

use smol_str::SmolStr;

use super::room::best_waiting;
use super::upkeep;
use crate::domain::event::{Event, JobStopCause, StopCause};
use crate::domain::ids::{RunId, ServiceName};
use crate::domain::ladder::{Step, StepOutcome, freed_mib};
use crate::domain::settings::Settings;
use crate::domain::spec::{Grant, ServiceSpec};
use crate::domain::state::State;
use crate::domain::state::job::{Job, Phase};
use crate::domain::state::service::{Instance, InstancePhase, Service};
use crate::domain::time::Timestamp;

/// Milliseconds after a KILL, or after its process was gone, for which the end of an instance is waited for.
const END_MS: u64 = 10_000;

/// The decision to stop a running attempt, and the first step of it where the service has declared a ladder. One that is
/// being stopped already only gets another cause, and goes straight to the end if that is to cancel.
pub fn stop_job(
    run: RunId,
    job: &Job,
    spec: &ServiceSpec,
    cause: JobStopCause,
    now: Timestamp,
) -> Vec<Event> {
    let steps = match spec.ladder.is_empty() {
        true => Vec::new(),
        false => spec.steps_of_run(&cause),
    };
    let limit_ms: u64 = steps.iter().map(|(_, step)| step.limit_ms()).sum();
    let is_cancelled = matches!(cause, JobStopCause::Cancel { .. });
    let requested = |deadline| Event::JobStopRequested {
        run,
        attempt: job.attempt,
        cause: cause.clone(),
        deadline,
    };
    match (&job.phase, &job.rung) {
        (_, Some(rung)) if is_cancelled && rung.step.part() == 0 => {
            let mut events = vec![requested(now + spec.stop_ms())];
            events.extend(ended_of_run(run, job, StepOutcome::Interrupted, None, now));
            events.extend(began_of_run(run, job, spec.stop_step(), now));
            events
        }
        (Phase::Stopping { deadline, .. }, Some(_)) => vec![requested(*deadline)],
        (Phase::Running { .. }, None) if !steps.is_empty() => {
            let mut events = vec![requested(now + limit_ms)];
            let first = steps.into_iter().next();
            events.extend(first.and_then(|first| began_of_run(run, job, first, now)));
            events
        }
        _ => vec![requested(now + spec.stop_ms())],
    }
}

/// The end of the step under way for a run, and the next one.
pub fn next_of_run(
    spec: &ServiceSpec,
    run: RunId,
    job: &Job,
    (outcome, error): (StepOutcome, Option<String>),
    now: Timestamp,
) -> Vec<Event> {
    let (Phase::Stopping { cause, .. }, Some(rung)) = (&job.phase, &job.rung) else {
        return Vec::new();
    };
    let mut later = spec.steps_of_run(cause).into_iter();
    let next = later.find(|(number, step)| *number > rung.number || step.part() == 2);
    let ended = ended_of_run(run, job, outcome, error, now);
    let began = next.and_then(|next| began_of_run(run, job, next, now));
    ended.into_iter().chain(began).collect()
}

/// The end of the step under way for a run, if there is one.
pub fn ended_of_run(
    run: RunId,
    job: &Job,
    outcome: StepOutcome,
    error: Option<String>,
    now: Timestamp,
) -> Option<Event> {
    let rung = job.rung.as_ref()?;
    let (service, generation) = job.place()?;
    Some(Event::LadderStepEnded {
        service: service.clone(),
        generation,
        run: Some(run),
        number: rung.number,
        step: SmolStr::new_static(rung.step.name()),
        outcome,
        error,
        took_ms: now.millis_since(rung.since),
        freed_mib: 0,
    })
}

fn began_of_run(run: RunId, job: &Job, step: (u32, Step), now: Timestamp) -> Option<Event> {
    let (service, generation) = job.place()?;
    let (number, step) = step;
    Some(Event::LadderStepBegan {
        service: service.clone(),
        generation,
        run: Some(run),
        attempt: job.attempt,
        cause: None,
        number,
        deadline: now + step.limit_ms(),
        step,
    })
}

/// How an instance without work leaves: by the first step of its ladder that takes its memory, else by a stop. `None`
/// while it has to wait for room in host memory, which is on its way.
pub fn leave(
    state: &State,
    settings: &Settings,
    (service, instance): (&Service, &Instance),
    cause: &StopCause,
    now: Timestamp,
) -> Option<Vec<Event>> {
    let steps = service.spec.steps_of_instance(cause);
    descend(
        state,
        settings,
        (service, instance),
        cause,
        steps,
        now,
        true,
    )
}

/// What follows a step that did not take an instance's memory.
pub fn next_of_instance(
    state: &State,
    settings: &Settings,
    (service, instance): (&Service, &Instance),
    cause: &StopCause,
    after: u32,
    now: Timestamp,
) -> Vec<Event> {
    let mut steps = service.spec.steps_of_instance(cause);
    steps.retain(|(number, _)| *number > after);
    let of = (service, instance);
    descend(state, settings, of, cause, steps, now, false).unwrap_or_default()
}

fn descend(
    state: &State,
    settings: &Settings,
    (service, instance): (&Service, &Instance),
    cause: &StopCause,
    steps: Vec<(u32, Step)>,
    now: Timestamp,
    may_wait: bool,
) -> Option<Vec<Event>> {
    let mut events = Vec::new();
    for (number, step) in steps {
        match host_room(state, settings, (service, instance), &step, now) {
            HostRoom::There => {
                events.push(began(service, instance, cause, number, step, now));
                return Some(events);
            }
            HostRoom::After(sleeper) if may_wait => {
                let (name, sleeping) = sleeper?;
                let cause = StopCause::Room {
                    service: service.spec.name.clone(),
                };
                let evicted = state.services.get(name)?;
                return Some(stop(evicted, sleeping, cause, now));
            }
            HostRoom::After(_) | HostRoom::Never => {
                let mib = instance.granted_mib();
                let error = format!(
                    "{mib} MiB more do not fit into the {} MiB of host memory for what sleeps (`sleep_host_max_mib`)",
                    settings.sleep_host_max_mib
                );
                events.push(skipped(service, instance, number, &step, error));
            }
        }
    }
    events.extend(stop(service, instance, cause.clone(), now));
    Some(events)
}

/// Whether there is room in host memory for what a step would move there.
enum HostRoom<'a> {
    There,
    /// When one that sleeps is gone, which may be on its way already: of those for which nobody waits the one that has
    /// slept for the longest, else of the others.
    After(Option<(&'a ServiceName, &'a Instance)>),
    Never,
}

fn host_room<'a>(
    state: &'a State,
    settings: &Settings,
    (service, instance): (&Service, &Instance),
    step: &Step,
    now: Timestamp,
) -> HostRoom<'a> {
    let (mib, most) = (instance.granted_mib(), settings.sleep_host_max_mib);
    if !step.fills_host() {
        return HostRoom::There;
    }
    // What an earlier step was to move there is not there twice.
    let others_mib = state
        .sleeping_host_mib()
        .saturating_sub(instance.host_mib());
    if others_mib + mib <= most {
        return HostRoom::There;
    }
    let others = state
        .services
        .values()
        .filter(|other| other.spec.name != service.spec.name);
    let (mut on_its_way, mut leaving_mib) = (false, 0);
    let mut sleepers = Vec::new();
    for other in others {
        let Some(instance) = other.instance.as_ref().filter(|i| i.host_mib() > 0) else {
            continue;
        };
        match other.sleeping() {
            // Room is being made for it to wake.
            Some(_) if state.holds.contains_key(&other.spec.name) => continue,
            Some(asleep) => {
                let is_awaited = best_waiting(state, other).is_some();
                sleepers.push((is_awaited, asleep.since, &other.spec.name, instance));
            }
            None if end_given_up_at(instance).is_some_and(|at| at <= now) => continue,
            // It falls asleep, wakes or ends just now.
            None => on_its_way = true,
        }
        leaving_mib += instance.host_mib();
    }
    if others_mib.saturating_sub(leaving_mib) + mib > most {
        return HostRoom::Never;
    }
    let first = sleepers
        .into_iter()
        .min_by_key(|(is_awaited, since, name, _)| (*is_awaited, *since, *name));
    match first {
        _ if on_its_way => HostRoom::After(None),
        Some((.., name, instance)) => HostRoom::After(Some((name, instance))),
        None => HostRoom::Never,
    }
}

/// When the end of an instance has taken so long that nothing waits for it any more.
fn end_given_up_at(instance: &Instance) -> Option<Timestamp> {
    match instance.phase {
        InstancePhase::Stopping { kill_at, .. } => Some(kill_at + END_MS),
        InstancePhase::Exited { .. } => Some(instance.since + END_MS),
        _ => None,
    }
}

/// When an instance that waits for room in host memory is to be looked at again, if nothing happens before.
pub fn host_wait_ends(state: &State, now: Timestamp) -> Option<Timestamp> {
    let instances = state.services.values().filter_map(|s| s.instance.as_ref());
    instances
        .filter(|instance| instance.host_mib() > 0)
        .filter_map(end_given_up_at)
        .filter(|at| *at > now)
        .min()
}

fn began(
    service: &Service,
    instance: &Instance,
    cause: &StopCause,
    number: u32,
    step: Step,
    now: Timestamp,
) -> Event {
    Event::LadderStepBegan {
        service: service.spec.name.clone(),
        generation: instance.generation,
        run: None,
        attempt: 0,
        cause: Some(cause.clone()),
        number,
        deadline: now + step.limit_ms(),
        step,
    }
}

fn skipped(
    service: &Service,
    instance: &Instance,
    number: u32,
    step: &Step,
    error: String,
) -> Event {
    Event::LadderStepEnded {
        service: service.spec.name.clone(),
        generation: instance.generation,
        run: None,
        number,
        step: SmolStr::new_static(step.name()),
        outcome: StepOutcome::Skipped,
        error: Some(error),
        took_ms: 0,
        freed_mib: 0,
    }
}

/// The end of the step under way for an instance, if there is one; `held` of its memory is still there.
pub fn ended_of_instance(
    service: &Service,
    instance: &Instance,
    outcome: StepOutcome,
    error: Option<String>,
    held: &[Grant],
    now: Timestamp,
) -> Option<Event> {
    let rung = instance.rung.as_ref()?;
    Some(Event::LadderStepEnded {
        service: service.spec.name.clone(),
        generation: instance.generation,
        run: None,
        number: rung.number,
        step: SmolStr::new_static(rung.step.name()),
        outcome,
        error,
        took_ms: now.millis_since(rung.since),
        freed_mib: freed_mib(&instance.grants, held),
    })
}

/// The end of a step that was taking an instance's memory when something else came between.
pub fn cut_off(service: &Service, instance: &Instance, now: Timestamp) -> Option<Event> {
    let held = &instance.grants;
    let taking = instance
        .rung
        .as_ref()
        .filter(|rung| rung.step.takes_memory());
    taking.and_then(|_| {
        ended_of_instance(service, instance, StepOutcome::Interrupted, None, held, now)
    })
}

/// The same step once more, after a restart of the gateway.
pub fn again(
    service: &Service,
    instance: &Instance,
    cause: &StopCause,
    now: Timestamp,
) -> Option<Event> {
    let rung = instance.rung.as_ref()?;
    let step = rung.step.clone();
    let mut began = began(service, instance, cause, rung.number, step, now);
    if let Event::LadderStepBegan { attempt, .. } = &mut began {
        *attempt = 1;
    }
    Some(began)
}

/// The last steps: TERM now, KILL when the time of `stop` is over. Where a ladder was declared they are steps of it.
pub fn stop(
    service: &Service,
    instance: &Instance,
    cause: StopCause,
    now: Timestamp,
) -> Vec<Event> {
    let mut events = vec![upkeep::stop(service, instance, cause.clone(), now)];
    if !service.spec.ladder.is_empty() {
        let (number, step) = service.spec.stop_step();
        let step = match service.spec.stop_ms() {
            0 if service.spec.ladder.contains(&Step::Kill) => Step::Kill,
            _ => step,
        };
        events.push(began(service, instance, &cause, number, step, now));
    }
    events
}

/// `stop` did not end it in time: `kill` has begun.
pub fn killed(service: &Service, instance: &Instance, now: Timestamp) -> Vec<Event> {
    let Some(rung) = instance.rung.as_ref().filter(|rung| rung.step.part() == 2) else {
        return Vec::new();
    };
    let ended = ended_of_instance(
        service,
        instance,
        StepOutcome::TimedOut,
        None,
        &instance.grants,
        now,
    );
    let kill = Event::LadderStepBegan {
        service: service.spec.name.clone(),
        generation: instance.generation,
        run: None,
        attempt: 0,
        cause: None,
        number: rung.number + 1,
        step: Step::Kill,
        deadline: now,
    };
    ended.into_iter().chain([kill]).collect()
}
