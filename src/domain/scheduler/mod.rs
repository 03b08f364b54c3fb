//! The scheduler: what follows from State as it is. `step` gives the next decision as events, or `None`
//! when there is nothing to do until something changes. It changes nothing but its own parking marks.

pub mod container;
pub mod fair;
pub mod ladder;
pub mod placement;
pub mod queue;
pub mod quota;
pub mod room;
pub mod status;
pub mod upkeep;
pub mod why;

use smol_str::SmolStr;

use self::fair::Fair;
use self::ladder::stop_job;
use self::queue::{OrderKey, Parking};
use self::room::{Bid, Leave, Request, Spared};
use super::event::{Event, JobStopCause, StartCause, StopCause};
use super::ids::{Generation, RunId, ServiceName};
use super::settings::Settings;
use super::spec::{Grant, Target};
use super::state::State;
use super::state::job::{Job, Phase};
use super::state::service::{InstancePhase, Service};
use super::state::timers::TimerKey;
use super::time::Timestamp;

/// The next decision. Call it after each batch of events, apply what it gives, and call it again until
/// it gives `None`.
pub fn step(state: &mut State, settings: &Settings, now: Timestamp) -> Option<Vec<Event>> {
    if let Some(events) = upkeep::step(state, settings, now) {
        return Some(events);
    }
    let open = state.queue.open().clone();
    // Parking changes nobody's turn: the order holds until something is decided.
    let shares = std::mem::take(&mut state.shares);
    let fair = Fair::with(state, settings, now, shares);
    let mut order = fair.order(open);
    let mut parked = Vec::new();
    let mut decided = None;
    while let Some(target) = order.pop().filter(|_| decided.is_none()) {
        match try_shape(&fair, settings, now, &target) {
            Outcome::Act(events) => decided = Some(events),
            Outcome::Park(parking, wake_at) => parked.push((target, parking, wake_at)),
        }
    }
    state.shares = fair.into_shares();
    for (target, parking, wake_at) in parked {
        state.queue.park(&target, parking);
        state.timers.set(TimerKey::Shape(target), wake_at);
    }
    decided
        .or_else(|| upkeep::free_stranded(state, now))
        .or_else(|| upkeep::take_back(state))
}

/// What trying a shape came to.
enum Outcome {
    Act(Vec<Event>),
    /// Nothing helps until something changes, or until that time.
    Park(Parking, Option<Timestamp>),
}

/// Tries the first job of a shape. Those to which a place was promised wait for it, so behind them the next
/// one is tried.
///
/// A lane that may not use all of the services is passed over when it gets nowhere with the others.
fn try_shape(fair: &Fair, settings: &Settings, now: Timestamp, target: &Target) -> Outcome {
    if let Target::Container(_) = target {
        return container::try_shape(fair, settings, now, target);
    }
    let state = fair.state;
    let all = candidates(state, target);
    if all.is_empty() {
        let parking = Parking {
            unserved: true,
            ..Parking::default()
        };
        return Outcome::Park(parking, None);
    }
    let mut serving = fair.serving(target);
    // It may be another tenant's turn by then, where a turn is worth something.
    let may_serve = |service: &&Service| {
        let may_start = may_start(state, service, now) && placement::could_fit(state, service);
        service.instance.is_some() || may_start
    };
    let matters = all
        .iter()
        .any(|service| serving.is_contested_for(service) && may_serve(service));
    let next_look = matters.then(|| fair.next_look());
    // Of this shape, with places promised, and served before.
    let mut before = Vec::new();
    let (mut parking, mut earliest) = (Parking::default(), next_look);
    while let Some((lane, key)) = serving.next() {
        let run = key.1;
        let Some(job) = state.jobs.get(&run) else {
            continue;
        };
        let usable = state.usable(lane, &all);
        if let Some(service) = free_place(&usable, state, run, &before) {
            return Outcome::Act(vec![dispatch(run, job, service)]);
        }
        if let Some(place) = state.promises.get(&run) {
            // A place that quotas keep it from is not kept for it.
            if usable.iter().any(|service| service.spec.name == *place) {
                before.push(run);
            }
            continue;
        }
        let everything = usable.len() == all.len();
        match try_harder(state, settings, now, key, job, &usable, fair) {
            Outcome::Act(events) => return Outcome::Act(events),
            Outcome::Park(of_lane, wake_at) => {
                parking.tried.get_or_insert(key);
                parking.by_share |= of_lane.by_share;
                // What is on its way may be for some of the lanes only: the first of them to want more opens the shape.
                let enough = parking.enough_for.into_iter().chain(of_lane.enough_for);
                parking.enough_for = enough.min();
                earliest = earliest.into_iter().chain(wake_at).min();
            }
        }
        if everything {
            break;
        }
        serving.pass(lane);
    }
    let wake_at = earliest.filter(|_| parking.tried.is_some());
    Outcome::Park(parking, wake_at)
}

/// The ways to get a job going that finds no free place, the least harmful first: free memory instead of that which others
/// are to leave, a place on its way, a new instance, one in the room of an idle one, another job's place, another instance's room.
fn try_harder(
    state: &State,
    settings: &Settings,
    now: Timestamp,
    key: OrderKey,
    job: &Job,
    all: &[&Service],
    fair: &Fair,
) -> Outcome {
    let (_, run) = key;
    if let Some(events) = start_held(state, all, now) {
        return Outcome::Act(events);
    }
    let enough_for = places_coming(state, job, all, fair);
    if enough_for.is_some() {
        let parking = Parking {
            tried: Some(key),
            enough_for,
            ..Parking::default()
        };
        return Outcome::Park(parking, None);
    }
    let mut startable: Vec<&Service> = all
        .iter()
        .copied()
        .filter(|s| may_start(state, s, now) && !state.holds.contains_key(&s.spec.name))
        .collect();
    // To wake one takes less than to start one.
    startable.sort_by_key(|service| service.sleeping().is_none());
    if let Some((service, grants)) = best_start(state, &startable) {
        let cause = StartCause::Scheduler;
        return Outcome::Act(vec![start(service, grants, cause, now)]);
    }
    if let Some(events) = give_up_sleep(state, &startable, now) {
        return Outcome::Act(events);
    }
    let bid = Bid {
        fair,
        settings,
        now,
        job,
    };
    let make_room = |worst| {
        let mut startable = startable.iter();
        startable.find_map(|service| clear(&bid, run, service, worst))
    };
    let events = make_room(Leave::Idle)
        .or_else(|| preempt_place(all, &bid, run))
        .or_else(|| hasten(all, &bid, run))
        .or_else(|| make_room(Leave::Preempt))
        .or_else(|| make_room(Leave::Drain));
    events.map_or_else(
        || {
            let (wake_at, by_share) = wake_at(&bid, all, !startable.is_empty());
            let parking = Parking {
                tried: Some(key),
                by_share,
                ..Parking::default()
            };
            Outcome::Park(parking, wake_at)
        },
        Outcome::Act,
    )
}

/// Services that may run jobs of this shape, of tenants that they admit; in the order of their names. Jobs with containers
/// of their own share none.
pub fn candidates<'a>(state: &'a State, target: &Target) -> Vec<&'a Service> {
    let usable = |service: &&Service| service.enabled && service.serves(target);
    match target {
        Target::Service(name) => state
            .services
            .get(name)
            .into_iter()
            .filter(usable)
            .collect(),
        Target::Type(_) => state.services.values().filter(usable).collect(),
        Target::Container(_) => Vec::new(),
    }
}

/// The ready service with a place for `run`: the one promised to it, else the least busy.
fn free_place<'a>(
    all: &[&'a Service],
    state: &State,
    run: RunId,
    before: &[RunId],
) -> Option<&'a Service> {
    let promised = state.promises.get(&run);
    all.iter()
        .copied()
        .filter(|service| state.free_places(service, run, |by| before.contains(&by)) > 0)
        .min_by_key(|service| {
            let busy = service.ready().map_or(0, |instance| instance.active.len());
            (Some(&service.spec.name) != promised, busy)
        })
}

fn dispatch(run: RunId, job: &Job, service: &Service) -> Event {
    Event::JobDispatched {
        run,
        attempt: job.attempt + 1,
        service: service.spec.name.clone(),
        generation: service
            .instance
            .as_ref()
            .map_or(Generation(0), |i| i.generation),
        checkpoint: job.checkpoint,
    }
}

/// How many jobs of this shape have places on their way: on instances that come up, in room being made, or
/// promised. `None` when more jobs wait than that, of those that quotas let run.
fn places_coming(state: &State, job: &Job, all: &[&Service], fair: &Fair) -> Option<usize> {
    let target = &job.spec.target;
    let coming: usize = all
        .iter()
        .filter(|service| state.is_coming(service))
        .fold(0, |sum, service| sum.saturating_add(service.places()));
    if coming == 0 {
        return None;
    }
    let admitted = |tenant: &SmolStr| all.iter().any(|service| service.admits(tenant));
    let same_shape = |run: &&RunId| {
        let job = state.jobs.get(run);
        job.is_some_and(|job| job.spec.target == *target && admitted(state.tenant_of(job.plane)))
    };
    let promised = state.promises.keys().filter(same_shape).count();
    let waiting = fair.demand(target, state.tenant_of(job.plane), all);
    let enough_for = coming.saturating_add(promised);
    (waiting <= enough_for).then_some(enough_for)
}

/// Whether the scheduler may bring this service up: from nothing, or out of its sleep.
fn may_start(state: &State, service: &Service, now: Timestamp) -> bool {
    service.enabled
        && (service.instance.is_none() || service.sleeping().is_some())
        && service.crash_looped.is_none()
        && (state.engine.up || !service.spec.worker.is_container())
        && service.retry_at.is_none_or(|at| at <= now)
}

/// A sleeping instance whose own GPUs are taken, while the service would fit elsewhere: it ends, to be started there.
fn give_up_sleep(state: &State, startable: &[&Service], now: Timestamp) -> Option<Vec<Event>> {
    let service = startable
        .iter()
        .find(|service| service.sleeping().is_some() && placement::fit_elsewhere(state, service))?;
    let instance = service.instance.as_ref()?;
    Some(ladder::stop(service, instance, StopCause::Idle, now))
}

/// Makes room for a service; one that sleeps where there would still be none ends, to be started anew.
fn clear(bid: &Bid, run: RunId, service: &Service, worst: Leave) -> Option<Vec<Event>> {
    let state = bid.fair.state;
    let anew = anew(state, service);
    let request = Request {
        state,
        bid,
        run,
        service: anew.as_ref().unwrap_or(service),
        worst,
    };
    let plan = request.plan()?;
    match (&service.instance, &anew) {
        (Some(asleep), Some(_)) => Some(ladder::stop(service, asleep, StopCause::Idle, bid.now)),
        _ => Some(make_room(&request, plan)),
    }
}

/// A service whose instance sleeps and could not wake if all others left its GPUs, as if it had none.
fn anew(state: &State, service: &Service) -> Option<Service> {
    let asleep = service.sleeping()?;
    (!placement::could_wake(state, service, asleep)).then(|| Service {
        instance: None,
        ..service.clone()
    })
}

/// A service for which others leave, though it fits by now: their end may take long.
fn start_held(state: &State, all: &[&Service], now: Timestamp) -> Option<Vec<Event>> {
    let held = all.iter().filter(|service| {
        state.holds.contains_key(&service.spec.name) && may_start(state, service, now)
    });
    let (service, grants) = held
        .filter_map(|service| Some((service, placement::fit(state, service)?)))
        .next()?;
    let released = Event::RoomReleased {
        service: service.spec.name.clone(),
    };
    let start = start(service, grants, StartCause::Scheduler, now);
    Some(vec![released, start])
}

/// One that sleeps, else the service that fits now with the smallest need.
fn best_start<'a>(state: &State, startable: &[&'a Service]) -> Option<(&'a Service, Vec<Grant>)> {
    startable
        .iter()
        .filter_map(|service| Some((*service, placement::fit(state, service)?)))
        .min_by_key(|(service, grants)| {
            let mib = grants.iter().map(|grant| grant.mib).sum::<u64>();
            (service.sleeping().is_none(), mib)
        })
}

/// The decision to start, its generation one more than the last; or to wake the instance that sleeps.
pub fn start(service: &Service, grants: Vec<Grant>, cause: StartCause, now: Timestamp) -> Event {
    if let Some(instance) = service.instance.as_ref().filter(|i| i.is_asleep()) {
        return Event::InstanceWakeRequested {
            service: service.spec.name.clone(),
            generation: instance.generation,
            grants,
            cause,
            deadline: now + service.spec.startup_timeout_ms,
        };
    }
    Event::InstanceStartRequested {
        service: service.spec.name.clone(),
        generation: Generation(service.generation.0 + 1),
        grants,
        cause,
        deadline: now + service.spec.startup_timeout_ms,
    }
}

/// Commits a way to make room: no new work for the victims, the hold, and the end of what they do.
fn make_room(request: &Request, plan: room::Plan) -> Vec<Event> {
    let wanted = &request.service.spec.name;
    let names: Vec<ServiceName> = plan.victims.iter().map(|(name, _)| name.clone()).collect();
    let mut events = Vec::new();
    let mut stops = Vec::new();
    for (name, leave) in &plan.victims {
        let Some(victim) = request.state.services.get(name) else {
            continue;
        };
        let Some(instance) = victim
            .instance
            .as_ref()
            .filter(|_| *leave != Leave::Leaving)
        else {
            continue;
        };
        let cause = StopCause::Room {
            service: wanted.clone(),
        };
        if instance.is_asleep() {
            events.extend(ladder::stop(victim, instance, cause, request.bid.now));
            continue;
        }
        events.push(upkeep::drain(victim, instance, cause, None));
        if *leave == Leave::Preempt {
            stops.extend(preempt_all(
                request.state,
                victim,
                request.run,
                request.bid.now,
            ));
        }
    }
    events.push(Event::RoomHeld {
        service: wanted.clone(),
        run: request.run,
        grants: plan.grants,
        victims: names,
    });
    events.extend(stops);
    events
}

/// Preempts every job that still runs on an instance.
fn preempt_all(state: &State, victim: &Service, by: RunId, now: Timestamp) -> Vec<Event> {
    running_on(state, victim)
        .flat_map(|(run, job)| {
            let cause = JobStopCause::Preempt { by };
            stop_job(run, job, &victim.spec, cause, now)
        })
        .collect()
}

fn running_on<'a>(
    state: &'a State,
    service: &'a Service,
) -> impl Iterator<Item = (RunId, &'a Job)> {
    let active = service.instance.iter().flat_map(|i| &i.active);
    active
        .filter_map(|run| Some((*run, &**state.jobs.get(run)?)))
        .filter(|(_, job)| matches!(job.phase, Phase::Running { .. }))
}

/// Room is being made for this shape, but what runs there may take long: a job that is urgent enough preempts
/// it, if that clears the room.
fn hasten(all: &[&Service], bid: &Bid, run: RunId) -> Option<Vec<Event>> {
    let (state, now) = (bid.fair.state, bid.now);
    all.iter().find_map(|service| {
        let hold = state.holds.get(&service.spec.name)?;
        let victims: Vec<&Service> = hold
            .victims
            .iter()
            .filter_map(|name| state.services.get(name))
            .collect();
        let may = |victim: &&Service| {
            running_on(state, victim)
                .all(|(_, other)| bid.may_preempt_all_of(other, victim, service).is_ok())
        };
        if !victims.iter().all(may) {
            return None;
        }
        let events: Vec<Event> = victims
            .iter()
            .flat_map(|victim| preempt_all(state, victim, run, now))
            .collect();
        (!events.is_empty()).then_some(events)
    })
}

/// Preempts one job to take its place on an instance that is up.
fn preempt_place(all: &[&Service], bid: &Bid, run: RunId) -> Option<Vec<Event>> {
    let (state, now) = (bid.fair.state, bid.now);
    let allowed = |service: &Service, victim: &Job| bid.may_preempt(victim, service).ok();
    let (service, victim) = best_victim(all, state, allowed, now)?;
    let victim_job = state.jobs.get(&victim)?;
    let cause = JobStopCause::Preempt { by: run };
    Some(stop_job(victim, victim_job, &service.spec, cause, now))
}

/// The cheapest victim among the jobs running on ready instances: the least urgent, then the least
/// unsaved work, then the youngest.
pub fn best_victim<'a>(
    all: &[&'a Service],
    state: &State,
    allowed: impl Fn(&Service, &Job) -> Option<()>,
    now: Timestamp,
) -> Option<(&'a Service, RunId)> {
    all.iter()
        .filter_map(|service| Some((*service, service.ready()?)))
        .flat_map(|(service, instance)| instance.active.iter().map(move |run| (service, *run)))
        .filter_map(|(service, run)| {
            let job = state.jobs.get(&run)?;
            allowed(service, job)?;
            let key = (
                std::cmp::Reverse(job.spec.priority),
                job.unsaved_ms(now),
                std::cmp::Reverse(job.since),
                run,
            );
            Some((key, service, run))
        })
        .min_by(|a, b| a.0.cmp(&b.0))
        .map(|(_, service, run)| (service, run))
}

/// When time alone improves a blocked job's chances, and whether what tenants use may do so too.
fn wake_at(bid: &Bid, all: &[&Service], wants_room: bool) -> (Option<Timestamp>, bool) {
    let (state, job, now) = (bid.fair.state, bid.job, bid.now);
    // Whose jobs may become victims: those on its own services, and any while it wants room or room is made for it.
    let wants_room = wants_room
        || all
            .iter()
            .any(|service| state.holds.contains_key(&service.spec.name));
    let swap_at = Some(job.since + bid.settings.swap_max_wait_ms);
    let swap_at = swap_at.filter(|at| wants_room && *at > now);
    let retries = all
        .iter()
        .filter_map(|service| service.retry_at)
        .filter(|at| *at > now);
    let own = all.iter().copied().filter(|_| !wants_room);
    let others = || state.services.values().filter(|_| wants_room);
    let (mut minimum, mut by_share) =
        (None, others().any(|other| bid.is_outranked_by_share(other)));
    for service in own.chain(others()) {
        let instance = service.instance.as_ref().filter(|instance| {
            matches!(
                instance.phase,
                InstancePhase::Ready | InstancePhase::Draining { .. }
            )
        });
        let active = instance.into_iter().flat_map(|instance| &instance.active);
        for victim in active.filter_map(|run| state.jobs.get(run)) {
            match bid.may_preempt(victim, service) {
                Err(Spared::Until(at)) => {
                    minimum = minimum.into_iter().chain([at]).min();
                }
                Err(Spared::Share) => by_share = true,
                // Not with all that run there, perhaps.
                Ok(()) => by_share |= state.tenant_of(victim.plane) != state.tenant_of(job.plane),
                Err(_) => {}
            }
        }
    }
    let next_look = by_share.then(|| bid.fair.next_look());
    let all = swap_at.into_iter().chain(retries).chain(minimum);
    (all.chain(next_look).min(), by_share)
}
