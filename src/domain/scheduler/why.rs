//! Why a run is where it is: what blocks it, and its place in the queue. Reads the same State by the same
//! rules as `step`, and decides nothing.

use super::fair::Fair;
use super::queue::LaneKey;
use super::room::{Bid, Spared};
use super::{candidates, container, placement};
use crate::domain::event::JobStopCause;
use crate::domain::ids::RunId;
use crate::domain::settings::Settings;
use crate::domain::spec::Target;
use crate::domain::state::State;
use crate::domain::state::account::Amount;
use crate::domain::state::gpu::Gpu;
use crate::domain::state::job::{Job, Phase};
use crate::domain::state::service::{InstancePhase, Service};
use crate::domain::tenant::QuotaHit;
use crate::domain::time::Timestamp;

/// The answer to "why does it wait?".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Why {
    /// `queued`, `backoff`, `paused`, `preempted`, `running` or `stopping`.
    pub state: &'static str,
    /// Everything that stands in its way, the nearest first; empty when nothing does.
    pub blocking: Vec<Blocking>,
    /// Its place among its tenant's jobs that want the same, from 1; `None` when it does not wait in the queue.
    pub position: Option<u64>,
    /// Since when it is in this state.
    pub since: Timestamp,
}

/// One thing that stands in its way, and what would move it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocking {
    /// A stable name: `no_service`, `vram`, `concurrency`, `paused`, …
    pub cause: &'static str,
    /// One sentence for people.
    pub detail: String,
}

fn blocking(cause: &'static str, detail: String) -> Blocking {
    Blocking { cause, detail }
}

/// Explains a live run; `None` when State does not hold it.
pub fn why(state: &State, settings: &Settings, run: RunId, now: Timestamp) -> Option<Why> {
    let job = state.jobs.get(&run)?;
    let (name, blocking) = match &job.phase {
        Phase::Queued => ("queued", queued(state, settings, run, job, now)),
        Phase::Backoff { until } => (
            "backoff",
            vec![blocking(
                "backoff",
                format!("attempt {} failed; the next is at {until}", job.attempt),
            )],
        ),
        Phase::Paused => (
            "paused",
            vec![blocking("paused", "held until someone resumes it".into())],
        ),
        Phase::Preempted { by } => (
            "preempted",
            vec![blocking(
                "preempted",
                format!(
                    "gave way to {}; it is queued again when that one ends",
                    named(state, job, *by)
                ),
            )],
        ),
        Phase::Running { .. } => ("running", Vec::new()),
        Phase::Stopping {
            cause, deadline, ..
        } => ("stopping", vec![stopping(state, job, cause, *deadline)]),
    };
    Some(Why {
        state: name,
        blocking,
        position: position(state, run),
        since: job.since,
    })
}

/// A waiting run's place in its lane, from 1: how many of other tenants come between cannot be known.
pub fn position(state: &State, run: RunId) -> Option<u64> {
    let job = state
        .jobs
        .get(&run)
        .filter(|job| matches!(job.phase, Phase::Queued))?;
    let key = state.queue.key(run, job.queued_at, job.spec.priority);
    let lane = state.lane_of(job.plane);
    let rank = state
        .queue
        .shape(&job.spec.target)?
        .lane(&lane)?
        .waiting
        .rank(&key);
    u64::try_from(rank).ok().map(|rank| rank + 1)
}

/// Another run, named only when it is one of the same plane.
fn named(state: &State, job: &Job, other: RunId) -> String {
    match state.job(job.plane, other) {
        Some(_) => format!("run {other}"),
        None => "another run".to_owned(),
    }
}

fn stopping(state: &State, job: &Job, cause: &JobStopCause, deadline: Timestamp) -> Blocking {
    let what = match cause {
        JobStopCause::Pause { .. } => "being paused".to_owned(),
        JobStopCause::Cancel { .. } => "being cancelled".to_owned(),
        JobStopCause::Preempt { by } => format!("giving way to {}", named(state, job, *by)),
        JobStopCause::Yield => "going back to the queue".to_owned(),
        JobStopCause::InstanceStopping => "its instance is stopping".to_owned(),
        JobStopCause::TimedOut => "it has run for as long as it may".to_owned(),
    };
    let step = match &job.rung {
        Some(rung) => format!(", now by step '{}'", rung.step.name()),
        None => String::new(),
    };
    blocking(
        "stopping",
        format!("{what}{step}; its call ends by {deadline}"),
    )
}

fn queued(
    state: &State,
    settings: &Settings,
    run: RunId,
    job: &Job,
    now: Timestamp,
) -> Vec<Blocking> {
    let mut found = Vec::new();
    let limits = state.limits_of_plane(job.plane);
    if let Some(hit) = limits.running_hit() {
        found.push(at_quota(&hit));
    }
    found.extend(behind(state, settings, run, job, now));
    if job.container.is_some() {
        found.extend(own_container(state, settings, run, job, now));
        return found;
    }
    let mut all = candidates(state, &job.spec.target);
    all.retain(|service| state.serves(service, job));
    if all.is_empty() {
        found.push(no_service(state, job));
    }
    let key = state.queue.key(run, job.queued_at, job.spec.priority);
    let earlier = |by: RunId| {
        let other = state.jobs.get(&by);
        other.is_some_and(|o| state.queue.key(by, o.queued_at, o.spec.priority) < key)
    };
    let usable = state.usable(&state.lane_of(job.plane), &all).into_owned();
    if found.is_empty() && usable.is_empty() && !all.is_empty() {
        let hits = all
            .iter()
            .filter_map(|service| limits.hit(Amount::of_run(service)));
        found.extend(hits.take(1).map(|hit| at_quota(&hit)));
    }
    let places = usable
        .iter()
        .any(|service| state.free_places(service, run, earlier) > 0);
    if !places {
        found.extend(
            usable
                .iter()
                .map(|service| of_service(state, settings, job, service, now)),
        );
    }
    found
}

/// What keeps a job's own container from being started.
fn own_container(
    state: &State,
    settings: &Settings,
    run: RunId,
    job: &Job,
    now: Timestamp,
) -> Option<Blocking> {
    let would_get = container::would_get(state, run)?;
    let known = state.services.get(&would_get.spec.name);
    let service = known.unwrap_or(&would_get);
    if let Some(hit) = state
        .limits_of_plane(job.plane)
        .hit(Amount::of_run(service))
    {
        return Some(at_quota(&hit));
    }
    if known.is_none() && container::is_full(state, settings) {
        let most = settings.job_containers_max;
        return Some(blocking(
            "containers",
            format!(
                "{most} containers of jobs are there, which is as many as there may be (`docker_jobs_max`)"
            ),
        ));
    }
    let found = of_service(state, settings, job, service, now);
    let named = format!("service '{}'", service.spec.name);
    Some(Blocking {
        detail: found.detail.replace(&named, "its container"),
        ..found
    })
}

fn at_quota(hit: &QuotaHit) -> Blocking {
    blocking(
        "quota",
        format!("{hit}; it goes on when one of these runs ends or the quota is raised"),
    )
}

/// Who is served before it: its own tenant's jobs, or other tenants.
fn behind(
    state: &State,
    settings: &Settings,
    run: RunId,
    job: &Job,
    now: Timestamp,
) -> Option<Blocking> {
    let lane = state.lane_of(job.plane);
    let ahead = position(state, run)?.saturating_sub(1);
    let shape = state.queue.shape(&job.spec.target)?;
    if ahead > 0 {
        let first = shape.lane(&lane)?.waiting.first();
        let priority = first
            .and_then(|(_, run)| state.jobs.get(&run))
            .map_or(job.spec.priority, |job| job.spec.priority);
        let cause = if priority < job.spec.priority {
            "higher_priority"
        } else {
            "queue"
        };
        return Some(blocking(
            cause,
            format!("{ahead} runs that want the same are served first"),
        ));
    }
    let fair = Fair::new(state, settings, now);
    let mut services = candidates(state, &job.spec.target);
    services.retain(|service| state.serves(service, job));
    let competes = |other: &LaneKey| {
        let shares = |service: &&Service| service.admits(&other.tenant);
        other.tenant == lane.tenant || services.iter().any(shares)
    };
    let (first, _) = fair.serving(&job.spec.target).first_of(competes)?;
    if first.tenant == lane.tenant || state.is_at_quota(&lane) {
        return None;
    }
    Some(blocking(
        "fair_share",
        "another tenant is served first: it has used less of what it is due, or has waited for longer"
            .to_owned(),
    ))
}

fn no_service(state: &State, job: &Job) -> Blocking {
    let mut services = state.services.values();
    let disabled = services.find(|service| state.serves(service, job));
    match (disabled, &job.spec.target) {
        (Some(service), _) => blocking(
            "service_disabled",
            format!("service '{0}' is disabled; enable it", service.spec.name),
        ),
        (None, Target::Container(_)) => {
            blocking("no_service", "no container was made for it yet".to_owned())
        }
        (None, Target::Type(service_type)) => blocking(
            "no_service",
            format!("no service of type '{service_type}' is registered; register one"),
        ),
        (None, Target::Service(name)) => blocking(
            "no_service",
            format!("service '{name}' is not registered; register it"),
        ),
    }
}

/// What keeps one service from taking the job.
fn of_service(
    state: &State,
    settings: &Settings,
    job: &Job,
    service: &Service,
    now: Timestamp,
) -> Blocking {
    let name = &service.spec.name;
    let Some(instance) = &service.instance else {
        return absent(state, service, now);
    };
    match &instance.phase {
        InstancePhase::Starting { deadline } => blocking(
            "starting",
            format!("service '{name}' is starting, until {deadline} at most"),
        ),
        InstancePhase::Finding => blocking(
            "recovering",
            format!("service '{name}' is being found again after a restart"),
        ),
        InstancePhase::Ready => concurrency(state, settings, job, service, now),
        InstancePhase::Draining {
            cause: crate::domain::event::StopCause::Unhealthy,
            ..
        } => blocking(
            "service_unhealthy",
            format!("service '{name}' fails its health probes and is restarted"),
        ),
        InstancePhase::Waking { deadline } => blocking(
            "starting",
            format!("service '{name}' is being woken, until {deadline} at most"),
        ),
        InstancePhase::Asleep if state.holds.contains_key(name) => making_room(service),
        InstancePhase::Asleep => asleep(state, service),
        InstancePhase::Yielding { .. } => blocking(
            "service_stopping",
            format!("the memory of service '{name}' is being taken for others"),
        ),
        InstancePhase::Draining { .. }
        | InstancePhase::Stopping { .. }
        | InstancePhase::Exited { .. } => {
            blocking("service_stopping", format!("service '{name}' is stopping"))
        }
    }
}

fn concurrency(
    state: &State,
    settings: &Settings,
    job: &Job,
    service: &Service,
    now: Timestamp,
) -> Blocking {
    let instance = service.ready();
    let active = instance.into_iter().flat_map(|instance| &instance.active);
    let victims: Vec<&Job> = active
        .filter_map(|run| Some(&**state.jobs.get(run)?))
        .collect();
    let bid = Bid {
        fair: &Fair::new(state, settings, now),
        settings,
        now,
        job,
    };
    let found = |spared: fn(&Result<(), Spared>) -> bool| {
        let mut outcomes = victims
            .iter()
            .map(|victim| bid.may_preempt(victim, service));
        outcomes.any(|outcome| spared(&outcome))
    };
    let name = &service.spec.name;
    let (busy, limit) = (victims.len(), service.spec.concurrency);
    let gap = settings.preempt_priority_gap;
    let hint = if found(|outcome| matches!(outcome, Ok(()) | Err(Spared::Until(_)))) {
        "it will preempt one when its minimum runtime is over".to_owned()
    } else if found(|outcome| *outcome == Err(Spared::Share)) {
        "it waits for one to end, as no other tenant has used enough more of what it is due"
            .to_owned()
    } else {
        format!("it waits for one to end, as none is {gap} priority levels less urgent")
    };
    blocking(
        "concurrency",
        format!("{busy} of {limit} places of service '{name}' are taken; {hint}"),
    )
}

fn making_room(service: &Service) -> Blocking {
    blocking(
        "making_room",
        format!(
            "others are leaving to make room for service '{0}'",
            service.spec.name
        ),
    )
}

fn asleep(state: &State, service: &Service) -> Blocking {
    let name = &service.spec.name;
    let grants = service
        .sleeping()
        .map(|asleep| placement::grants_again(state, service, asleep))
        .unwrap_or_default();
    let missing = grants.iter().find_map(|grant| {
        let free = state.available_mib_besides(&grant.gpu, Some(name));
        (free < grant.mib).then_some((grant, free))
    });
    let detail = match missing {
        Some((grant, free)) => format!(
            "service '{name}' sleeps; to wake it needs {} MiB of GPU {} and {free} MiB are free there",
            grant.mib, grant.gpu
        ),
        None => format!("service '{name}' sleeps; it is woken when its GPUs are free"),
    };
    blocking("sleeping", detail)
}

fn absent(state: &State, service: &Service, now: Timestamp) -> Blocking {
    let name = &service.spec.name;
    if let Some(error) = &service.crash_looped {
        return blocking(
            "crash_loop",
            format!("service '{name}' was given up: {error}; mend it and start it"),
        );
    }
    if service.spec.worker.is_container() && !state.engine.up {
        let why = state.engine.why_down();
        return blocking(
            "no_engine",
            format!("service '{name}' runs in a container, and {why}"),
        );
    }
    if let Some(at) = service.retry_at.filter(|at| *at > now) {
        return blocking(
            "service_restarting",
            format!("service '{name}' died and is started again at {at}"),
        );
    }
    if let Some(blocking) = quarantined(state, service) {
        return blocking;
    }
    let need = state.need_mib(service);
    if !placement::could_fit(state, service) {
        let largest = state
            .gpus
            .values()
            .map(|gpu| gpu.usable_mib())
            .max()
            .unwrap_or(0);
        return blocking(
            "vram_impossible",
            format!(
                "service '{name}' needs {need} MiB on each of {} GPUs; the largest here has {largest}",
                service.spec.gpus.max(1)
            ),
        );
    }
    if state.holds.contains_key(name) {
        return making_room(service);
    }
    let free = state
        .gpus
        .keys()
        .map(|gpu| state.available_mib(gpu))
        .max()
        .unwrap_or(0);
    blocking(
        "vram",
        format!(
            "service '{name}' needs {need} MiB of GPU memory and at most {free} MiB are free on one GPU"
        ),
    )
}

/// A GPU that would do and does not count, when the service does not fit without it.
fn quarantined(state: &State, service: &Service) -> Option<Blocking> {
    if placement::fit(state, service).is_some() {
        return None;
    }
    let would_do = |gpu: &&Gpu| gpu.present && gpu.facts.memory_mib >= state.need_mib(service);
    let gpu = state
        .gpus
        .values()
        .filter(would_do)
        .find(|gpu| gpu.quarantine.is_some())?;
    let why = gpu.quarantine.as_ref().map_or("", |q| q.detail.as_str());
    Some(blocking(
        "gpu_quarantined",
        format!(
            "GPU {} is quarantined ({why}); see to it and release it",
            gpu.facts.uuid
        ),
    ))
}
