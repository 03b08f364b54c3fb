//! What follows from changes already made: victims whose preemptor is done go back to the queue, drained
//! instances stop, room that has become free is used, services that people want up are started again.

use std::collections::BTreeSet;

use super::ladder::{self, stop_job};
use super::{container, placement, start};
use crate::domain::event::{Event, JobStopCause, RequeueCause, StartCause, StopCause};
use crate::domain::ids::{RunId, ServiceName};
use crate::domain::ladder::{Step, StepOutcome};
use crate::domain::settings::Settings;
use crate::domain::spec::Worker;
use crate::domain::spec::{Grant, Target};
use crate::domain::state::State;
use crate::domain::state::gpu::{Hold, mib_on, signed};
use crate::domain::state::job::{Job, Phase};
use crate::domain::state::service::{Instance, InstancePhase, Service};
use crate::domain::state::timers::TimerKey;
use crate::domain::time::Timestamp;

/// The next consequence, `None` when there is none left.
pub fn step(state: &mut State, settings: &Settings, now: Timestamp) -> Option<Vec<Event>> {
    while let Some(run) = state.idle_preemptors.pop_first() {
        if state.is_active(run) {
            continue;
        }
        if let Some(victims) = state.preempted_by.get(&run) {
            return Some(requeue(victims));
        }
    }
    while let Some(name) = state.touched.pop_first() {
        if let Some(events) = service_upkeep(state, settings, now, &name) {
            // Look again: one thing done may call for the next.
            state.touched.insert(name);
            return Some(events);
        }
        let at = state
            .services
            .get(&name)
            .and_then(|service| next_deadline(state, settings, service, now));
        state.timers.set(TimerKey::Service(name), at);
    }
    holds_upkeep(state, now)
}

/// When time alone changes something for a service: the end of its start, of its drain, of the wait before a
/// restart, of its idling, or of the wait for room in host memory.
fn next_deadline(
    state: &State,
    settings: &Settings,
    service: &Service,
    now: Timestamp,
) -> Option<Timestamp> {
    let Some(instance) = &service.instance else {
        return service.retry_at.filter(|at| *at > now);
    };
    let at = match &instance.phase {
        InstancePhase::Starting { deadline } | InstancePhase::Waking { deadline } => {
            Some(*deadline)
        }
        InstancePhase::Yielding { .. } => instance.rung.as_ref().map(|rung| rung.deadline),
        InstancePhase::Draining { .. } if instance.active.is_empty() => None,
        InstancePhase::Draining { deadline, .. } => *deadline,
        InstancePhase::Ready => idle_end(settings, service, instance),
        _ => return None,
    };
    let may_leave = matches!(
        instance.phase,
        InstancePhase::Draining { .. } | InstancePhase::Ready
    );
    // Who could move nothing there does not wait for that room.
    let may_sleep = service.spec.ladder.iter().any(Step::fills_host);
    let waits = may_leave && may_sleep && instance.active.is_empty();
    at.filter(|at| *at > now)
        .or_else(|| waits.then(|| ladder::host_wait_ends(state, now))?)
}

/// When an instance without work is stopped, if nobody asked for it by hand and it holds a GPU.
fn idle_end(settings: &Settings, service: &Service, instance: &Instance) -> Option<Timestamp> {
    let idle = instance.active.is_empty() && instance.promised.is_empty();
    let limit_ms = service.idle_limit_ms(settings.idle_timeout_ms)?;
    (idle && !service.wanted).then_some(instance.idle_since + limit_ms)
}

/// Preemptors that wait without a prospect (their room or place came to nothing) keep their victims waiting
/// for nothing: the victims go back to the queue. Looked at when nothing else is left to decide.
pub fn free_stranded(state: &State, now: Timestamp) -> Option<Vec<Event>> {
    let stranded = state.preempted_by.iter().find(|(by, _)| {
        state.jobs.get(by).is_some_and(|job| {
            let waits = matches!(job.phase, Phase::Queued);
            waits && !has_prospect(state, now, **by, job)
        })
    });
    stranded.map(|(_, victims)| requeue(victims))
}

/// An instance that drains to make room which nobody holds any more, and that still has work, takes work again. Looked at
/// when nothing else is left to decide, as its room may be held for another at once.
pub fn take_back(state: &State) -> Option<Vec<Event>> {
    let is_victim = |name| state.holds.values().any(|hold| hold.victims.contains(name));
    let (service, instance) = state.services.values().find_map(|service| {
        let instance = service.instance.as_ref()?;
        let drains_for_room = matches!(
            &instance.phase,
            InstancePhase::Draining {
                cause: StopCause::Room { .. },
                ..
            }
        );
        let has_work = service.enabled && !instance.active.is_empty();
        let free = drains_for_room && has_work && !is_victim(&service.spec.name);
        free.then_some((service, instance))
    })?;
    let ready_at = instance.ready_at.unwrap_or(instance.started_at);
    Some(vec![Event::InstanceReady {
        service: service.spec.name.clone(),
        generation: instance.generation,
        startup_ms: ready_at.millis_since(instance.started_at),
    }])
}

/// A place promised, or a service that is up, on its way, or about to be tried again.
fn has_prospect(state: &State, now: Timestamp, run: RunId, job: &Job) -> bool {
    let may_come = |service: &&Service| {
        let again = service.retry_at.is_some_and(|at| at > now) && service.crash_looped.is_none();
        let is_up = service.instance.as_ref().is_some_and(|i| !i.is_asleep());
        is_up || again || state.holds.contains_key(&service.spec.name)
    };
    // At a quota it waits for its own tenant's or user's runs, not for a place.
    !state.is_at_quota(&state.lane_of(job.plane))
        && (state.promises.contains_key(&run)
            || container::candidates_for(state, run, job)
                .iter()
                .any(may_come))
}

fn requeue(victims: &BTreeSet<RunId>) -> Vec<Event> {
    let requeue = |run: &RunId| Event::JobRequeued {
        run: *run,
        cause: RequeueCause::PreemptorEnded,
    };
    victims.iter().map(requeue).collect()
}

fn service_upkeep(
    state: &State,
    settings: &Settings,
    now: Timestamp,
    name: &ServiceName,
) -> Option<Vec<Event>> {
    let service = state.services.get(name)?;
    match (&service.instance, &service.spec.worker) {
        (None, Worker::Job { .. }) => container::absent_upkeep(state, service, now),
        (None, _) => absent_upkeep(state, settings, now, service),
        (Some(instance), Worker::Job { run, .. }) => {
            container::upkeep(state, (service, instance), *run, now)
        }
        (Some(instance), _) => instance_upkeep(state, settings, now, service, instance),
    }
}

/// A service without an instance: given up after too many deaths, or started again when wanted.
fn absent_upkeep(
    state: &State,
    settings: &Settings,
    now: Timestamp,
    service: &Service,
) -> Option<Vec<Event>> {
    // What runs elsewhere is only asked, which costs little: it is asked again for as long as it is wanted.
    let ours = !matches!(service.spec.worker, Worker::External { .. });
    if ours && service.deaths >= settings.crash_loop_deaths && service.crash_looped.is_none() {
        return Some(vec![Event::ServiceCrashLooped {
            service: service.spec.name.clone(),
            deaths: service.deaths,
            last_error: format!("it died {} times in a row", service.deaths),
        }]);
    }
    if service.wanted
        && super::may_start(state, service, now)
        && !state.holds.contains_key(&service.spec.name)
    {
        let grants = placement::fit(state, service)?;
        return Some(vec![start(service, grants, StartCause::Restart, now)]);
    }
    None
}

fn instance_upkeep(
    state: &State,
    settings: &Settings,
    now: Timestamp,
    service: &Service,
    instance: &Instance,
) -> Option<Vec<Event>> {
    match &instance.phase {
        InstancePhase::Starting { deadline } | InstancePhase::Waking { deadline }
            if *deadline <= now =>
        {
            Some(not_up_in_time(service, instance, now))
        }
        InstancePhase::Yielding { cause } => {
            let rung = instance.rung.as_ref().filter(|rung| rung.deadline <= now)?;
            let held = &instance.grants;
            let outcome = StepOutcome::TimedOut;
            let ended = ladder::ended_of_instance(service, instance, outcome, None, held, now);
            let of = (service, instance);
            let next = ladder::next_of_instance(state, settings, of, cause, rung.number, now);
            Some(ended.into_iter().chain(next).collect())
        }
        InstancePhase::Asleep => {
            let asleep = instance.asleep.as_ref()?;
            // It takes nothing any more, or its GPUs are not to be had any more. Memory that others take comes back.
            let cause = match (service.enabled, placement::has_its_gpus(state, asleep)) {
                (false, _) => StopCause::Disabled,
                (true, false) => StopCause::Idle,
                (true, true) => return None,
            };
            Some(ladder::stop(service, instance, cause, now))
        }
        InstancePhase::Ready if !service.enabled => Some(vec![drain(
            service,
            instance,
            StopCause::Disabled,
            Some(now + settings.drain_ms),
        )]),
        InstancePhase::Ready
            if idle_end(settings, service, instance).is_some_and(|at| at <= now) =>
        {
            // Jobs that wait, or are on hold, may need it yet; it is looked at again when they are gone.
            let wanted = |target: &Target| {
                let shape = state.queue.shape(target);
                shape.is_some_and(|shape| match &service.tenant {
                    Some(tenant) => shape.wants(tenant),
                    None => true,
                })
            };
            let needed = service.targets().iter().any(wanted);
            let of = (service, instance);
            (!needed).then(|| ladder::leave(state, settings, of, &StopCause::Idle, now))?
        }
        InstancePhase::Draining { cause, .. } if instance.active.is_empty() => {
            ladder::leave(state, settings, (service, instance), cause, now)
        }
        InstancePhase::Draining {
            deadline: Some(deadline),
            ..
        } if *deadline <= now => {
            let events = stop_active(state, service, instance, now);
            (!events.is_empty()).then_some(events)
        }
        _ => None,
    }
}

fn not_up_in_time(service: &Service, instance: &Instance, now: Timestamp) -> Vec<Event> {
    let error = match instance.asleep {
        Some(_) => "it was not awake within its start-up time",
        None => "it was not healthy within its start-up time",
    };
    let seen = Event::InstanceUnhealthy {
        service: service.spec.name.clone(),
        generation: instance.generation,
        error: error.to_owned(),
    };
    let stop = stop(service, instance, StopCause::StartupTimeout, now);
    vec![seen, stop]
}

/// No new work from now on.
pub fn drain(
    service: &Service,
    instance: &Instance,
    cause: StopCause,
    deadline: Option<Timestamp>,
) -> Event {
    Event::InstanceDraining {
        service: service.spec.name.clone(),
        generation: instance.generation,
        cause,
        deadline,
    }
}

/// TERM now, KILL when the time of its stop is over.
pub fn stop(service: &Service, instance: &Instance, cause: StopCause, now: Timestamp) -> Event {
    Event::InstanceStopRequested {
        service: service.spec.name.clone(),
        generation: instance.generation,
        cause,
        kill_at: now + service.spec.stop_ms(),
    }
}

/// Stops every job that still runs on an instance that must go.
pub fn stop_active(
    state: &State,
    service: &Service,
    instance: &Instance,
    now: Timestamp,
) -> Vec<Event> {
    instance
        .active
        .iter()
        .filter_map(|run| Some((run, state.jobs.get(run)?)))
        .filter(|(_, job)| matches!(job.phase, Phase::Running { .. }))
        .flat_map(|(run, job)| {
            let cause = JobStopCause::InstanceStopping;
            stop_job(*run, job, &service.spec, cause, now)
        })
        .collect()
}

/// Holds that cannot come true any more end; holds whose room is free are used.
fn holds_upkeep(state: &State, now: Timestamp) -> Option<Vec<Event>> {
    for (name, hold) in &state.holds {
        let released = Event::RoomReleased {
            service: name.clone(),
        };
        let Some(service) = state
            .services
            .get(name)
            .filter(|s| is_sound(state, s, hold, now))
        else {
            return Some(vec![released]);
        };
        let missing =
            |grant: &Grant| wanted_mib(state, service, grant) - balance(state, name, grant);
        if hold.grants.iter().all(|grant| missing(grant) <= 0) {
            let start = start(service, hold.grants.clone(), StartCause::Scheduler, now);
            return Some(vec![released, start]);
        }
        // What is missing must be coming; others may have taken memory meanwhile.
        let coming = |grant: &Grant| signed(state.coming_mib(hold, &grant.gpu));
        if hold
            .grants
            .iter()
            .any(|grant| missing(grant) > coming(grant))
        {
            return Some(vec![released]);
        }
    }
    None
}

/// Whether room that is held for another counts on what an instance, that is to give way, would still hold asleep.
pub fn spoils_room(state: &State, leaving: &ServiceName, held: &[Grant]) -> bool {
    state.holds.iter().any(|(name, hold)| {
        let Some(service) = state.services.get(name) else {
            return false;
        };
        let spoils = |grant: &Grant| {
            let missing = wanted_mib(state, service, grant) - balance(state, name, grant);
            let coming = signed(state.coming_mib(hold, &grant.gpu));
            missing <= coming && missing > coming - signed(mib_on(held, &grant.gpu))
        };
        hold.victims.contains(leaving) && hold.grants.iter().any(spoils)
    })
}

/// Whether a hold is still for a run that waits, and of what its service needs now.
fn is_sound(state: &State, service: &Service, hold: &Hold, now: Timestamp) -> bool {
    let waits = state.jobs.get(&hold.run).is_some_and(|job| {
        matches!(job.phase, Phase::Queued)
            && state.serves(service, job)
            && state.may_use(job.plane, service)
    });
    let need = state.need_mib(service);
    let gpus = usize::try_from(service.spec.gpus).unwrap_or(usize::MAX);
    let fits = match (hold.grants.as_slice(), service.sleeping()) {
        (held, Some(asleep)) => {
            held == placement::grants_again(state, service, asleep)
                && placement::could_wake(state, service, asleep)
        }
        // One that was changed to need none may have learned a need before.
        ([one], None) if gpus == 0 => service.spec.needs_gpu() && one.mib == need,
        (all, None) => {
            gpus > 0 && all.len() == gpus && all.iter().all(|grant| usable(state, grant) >= need)
        }
    };
    waits && fits && super::may_start(state, service, now)
}

fn usable(state: &State, grant: &Grant) -> u64 {
    state.gpus.get(&grant.gpu).map_or(0, |gpu| gpu.usable_mib())
}

/// MiB that must be free on a held GPU: the amount, or all that is usable of a whole one.
fn wanted_mib(state: &State, service: &Service, grant: &Grant) -> i64 {
    if service.spec.gpus == 0 {
        return signed(grant.mib);
    }
    signed(usable(state, grant).max(1))
}

fn balance(state: &State, name: &ServiceName, grant: &Grant) -> i64 {
    state.balance_mib(&grant.gpu, Some(name))
}
