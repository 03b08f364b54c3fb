//! Jobs with containers of their own. Each gets a service that is its alone while it is being started, runs, or has room
//! held for it; so memory, preemption, ladders and releases are those of all services. An attempt is dispatched in the
//! instant in which its start is decided: making the container is part of it.

use super::fair::Fair;
use super::queue::Parking;
use super::room::{Bid, Leave, Request};
use super::upkeep::stop;
use super::{Outcome, hasten, make_room, may_start, placement, start, start_held, wake_at};
use crate::domain::container::JobContainer;
use crate::domain::event::{Event, StartCause, StopCause};
use crate::domain::ids::{Generation, PlaneId, RunId, ServiceName};
use crate::domain::settings::Settings;
use crate::domain::spec::{Needs, ProgressMode, ServiceSpec, Target, Worker};
use crate::domain::state::State;
use crate::domain::state::job::{Job, Phase};
use crate::domain::state::service::{Instance, InstancePhase, Service};
use crate::domain::time::Timestamp;

/// What the names of jobs' services begin with: no other service's name does.
pub const NAME_PREFIX: &str = "_job.";

/// The name of a run's own service, which tells whose it is wherever it stands: on containers, on files.
pub fn name_of(plane: PlaneId, run: RunId) -> ServiceName {
    ServiceName::from(format!("{NAME_PREFIX}{}.{}", plane.0, run.0.simple()))
}

/// Back from `name_of`; `None` for every other name.
pub fn run_of(name: &str) -> Option<(PlaneId, RunId)> {
    let (plane, run) = name.strip_prefix(NAME_PREFIX)?.split_once('.')?;
    Some((PlaneId(plane.parse().ok()?), run.parse().ok()?))
}

/// The service that a job with a container of its own gets.
fn service_of(state: &State, run: RunId, job: &Job, container: &JobContainer) -> Service {
    let needs = match &job.spec.target {
        Target::Container(needs) => *needs,
        _ => Needs::default(),
    };
    let spec = ServiceSpec {
        name: name_of(job.plane, run),
        service_type: "container".into(),
        container: String::new(),
        port: 0,
        health_endpoint: String::new(),
        description: String::new(),
        vram_mib: needs.vram_mib,
        gpus: needs.gpus,
        progress_mode: ProgressMode::Queue,
        progress_endpoint: None,
        worker: Worker::Job {
            run,
            payload: job.payload,
        },
        concurrency: 1,
        dispatch_path: None,
        cancel_path: None,
        idle_timeout_ms: None,
        grace_ms: container.grace_ms,
        startup_timeout_ms: job.spec.timeout_ms,
        min_runtime_ms: None,
        ladder: container.ladder.clone(),
        mps_percent: None,
    };
    let mut service = Service::new(Box::new(spec));
    service.tenant = Some(state.tenant_of(job.plane).clone());
    // So each attempt is a generation of its own.
    service.generation = Generation(u64::from(job.attempt));
    service
}

/// Tries the first jobs of a shape whose jobs have containers of their own.
pub(super) fn try_shape(
    fair: &Fair,
    settings: &Settings,
    now: Timestamp,
    target: &Target,
) -> Outcome {
    let state = fair.state;
    let (mut parking, mut earliest) = (Parking::default(), None);
    let mut serving = fair.serving(target);
    while let Some((lane, key)) = serving.next() {
        let run = key.1;
        let Some((job, container)) = waiting(state, run) else {
            continue;
        };
        let bid = Bid {
            fair,
            settings,
            now,
            job,
        };
        // Room is being made for it, or the container of its last attempt has to leave first.
        if let Some(service) = state.services.get(&name_of(job.plane, run)) {
            let started = start_held(state, &state.usable(lane, &[service]), now);
            if let Some(events) = started.or_else(|| hasten(&[service], &bid, run)) {
                return Outcome::Act(events);
            }
            let (wake_at, by_share) = wake_at(&bid, &[service], false);
            parking.by_share |= by_share;
            earliest = earliest.into_iter().chain(wake_at).min();
            continue;
        }
        let service = service_of(state, run, job, container);
        let usable = !state.usable(lane, &[&service]).is_empty();
        match usable.then(|| try_job(&bid, run, &service)) {
            Some(Outcome::Act(events)) => return Outcome::Act(events),
            Some(Outcome::Park(of_job, wake_at)) => {
                parking.by_share |= of_job.by_share;
                earliest = earliest.into_iter().chain(wake_at).min();
            }
            None => {}
        }
        parking.tried.get_or_insert(key);
        // Another tenant's may fit into its quotas.
        if usable {
            break;
        }
        serving.pass(lane);
    }
    Outcome::Park(parking, earliest)
}

fn waiting(state: &State, run: RunId) -> Option<(&Job, &JobContainer)> {
    let job = state.jobs.get(&run)?;
    Some((job, job.container.as_deref()?))
}

/// Starts a job's container, or makes room for it.
fn try_job(bid: &Bid, run: RunId, service: &Service) -> Outcome {
    let (state, now) = (bid.fair.state, bid.now);
    if is_full(state, bid.settings) || !may_start(state, service, now) {
        return Outcome::Park(Parking::default(), None);
    }
    let made = |events| Outcome::Act(registered(service).into_iter().chain(events).collect());
    if let Some(grants) = placement::fit(state, service) {
        return made(vec![start(service, grants, StartCause::Scheduler, now)]);
    }
    let ways = [Leave::Idle, Leave::Preempt, Leave::Drain];
    let room = ways.into_iter().find_map(|worst| {
        let request = Request {
            state,
            bid,
            run,
            service,
            worst,
        };
        Some(make_room(&request, request.plan()?))
    });
    match room {
        Some(events) => made(events),
        None => {
            let (wake_at, by_share) = wake_at(bid, &[service], true);
            let parking = Parking {
                by_share,
                ..Parking::default()
            };
            Outcome::Park(parking, wake_at)
        }
    }
}

/// Whether there are as many containers of jobs as there may be.
pub fn is_full(state: &State, settings: &Settings) -> bool {
    let jobs = state.services.values().filter(|s| s.spec.worker.is_job());
    jobs.count() >= settings.job_containers_max
}

/// The service that a job would get if it were its turn.
pub fn would_get(state: &State, run: RunId) -> Option<Service> {
    let (job, container) = waiting(state, run)?;
    Some(service_of(state, run, job, container))
}

fn registered(service: &Service) -> Vec<Event> {
    let spec = service.spec.clone();
    let name = spec.name.clone();
    let tenant = service.tenant.clone();
    let assigned = tenant.map(|tenant| Event::ServiceAssigned {
        service: name,
        tenant,
    });
    [Event::ServiceRegistered { spec }]
        .into_iter()
        .chain(assigned)
        .collect()
}

/// A job's service without an instance: it is for a start that was decided, for room that is held, or for a pause; else it
/// goes.
pub(super) fn absent_upkeep(
    state: &State,
    service: &Service,
    now: Timestamp,
) -> Option<Vec<Event>> {
    let name = &service.spec.name;
    let removed = Event::ServiceRemoved {
        service: name.clone(),
    };
    let rests = service.retry_at.is_some_and(|at| at > now);
    (!rests && !state.holds.contains_key(name)).then(|| vec![removed])
}

/// What follows for a job's container from where the job stands.
pub(super) fn upkeep(
    state: &State,
    (service, instance): (&Service, &Instance),
    run: RunId,
    now: Timestamp,
) -> Option<Vec<Event>> {
    let cause = match &instance.phase {
        InstancePhase::Starting { .. } | InstancePhase::Finding | InstancePhase::Ready => {
            StopCause::Job
        }
        InstancePhase::Draining { cause, .. } => cause.clone(),
        _ => return None,
    };
    let job = state.jobs.get(&run);
    if !instance.active.contains(&run) {
        let is_new = matches!(instance.phase, InstancePhase::Starting { .. });
        let waits = job.filter(|job| is_new && matches!(job.phase, Phase::Queued));
        return Some(vec![match waits {
            Some(job) => super::dispatch(run, job, service),
            None => stop(service, instance, cause, now),
        }]);
    }
    let ends = job.is_some_and(|job| {
        let rests = job.rung.as_ref().is_some_and(|rung| rung.step.part() == 0);
        matches!(job.phase, Phase::Stopping { .. }) && !rests
    });
    ends.then(|| vec![stop(service, instance, cause, now)])
}

/// Those that may run a certain job now: its own, or those of its target that admit it.
pub fn candidates_for<'a>(state: &'a State, run: RunId, job: &Job) -> Vec<&'a Service> {
    let mut all = match &job.spec.target {
        Target::Container(_) => state
            .services
            .get(&name_of(job.plane, run))
            .into_iter()
            .collect(),
        target => super::candidates(state, target),
    };
    all.retain(|service| state.serves(service, job));
    all
}
