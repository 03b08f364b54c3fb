//! What must hold after every event, whatever was asked; and what must hold when nothing is left to decide.

use std::collections::{BTreeMap, BTreeSet};

use rungate::domain::effect::Effect;
use rungate::domain::event::{Event, JobStopCause};
use rungate::domain::ids::{Generation, GpuUuid, PlaneId, RunId, ServiceName};
use rungate::domain::scheduler::container;
use rungate::domain::scheduler::fair::Fair;
use rungate::domain::scheduler::step;
use rungate::domain::settings::Settings;
use rungate::domain::spec::Target;
use rungate::domain::state::State;
use rungate::domain::state::account::Amount;
use rungate::domain::state::gpu::{Hold, mib_on};
use rungate::domain::state::job::Phase;
use rungate::domain::state::service::{InstancePhase, Service};
use rungate::domain::time::Timestamp;
use smol_str::SmolStr;

/// A broken invariant, in words.
pub type Broken = String;

macro_rules! hold {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err(format!($($text)+));
        }
    };
}

/// What has to be remembered from event to event.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    /// A person is at work: what the scheduler may not do by itself, a person may.
    pub by_hand: bool,
    ended: BTreeSet<RunId>,
    /// Instances that were given whole GPUs.
    whole: BTreeSet<(ServiceName, Generation)>,
    preempted_at: BTreeMap<(RunId, RunId), Timestamp>,
    /// Nothing fails and nobody interferes: a preemptor starts before its victims go on.
    pub benign: bool,
    /// Victims of preemptors that have not started since.
    owed: BTreeMap<RunId, BTreeSet<RunId>>,
}

/// What State said of an event's subject just before it.
#[derive(Clone, Debug, Default)]
pub struct Before {
    first_of_shape: Option<RunId>,
    victim: Option<(RunId, u8, Timestamp, ServiceName)>,
}

impl Watch {
    pub fn before(
        &self,
        state: &State,
        settings: &Settings,
        now: Timestamp,
        event: &Event,
    ) -> Before {
        let mut before = Before::default();
        match event {
            Event::JobDispatched { run, service, .. } => {
                before.first_of_shape = state.jobs.get(run).and_then(|job| match job.container {
                    // Room was made for it before, perhaps.
                    Some(_) => Some(*run),
                    None => first_of(state, settings, now, &job.spec.target, service),
                });
            }
            Event::JobStopRequested {
                run,
                cause: JobStopCause::Preempt { by },
                ..
            } => {
                before.victim = state.jobs.get(run).and_then(|job| {
                    let (service, _) = job.place()?;
                    Some((*by, job.spec.priority.get(), job.since, service.clone()))
                });
            }
            _ => {}
        }
        before
    }

    pub fn after(
        &mut self,
        state: &State,
        settings: &Settings,
        now: Timestamp,
        event: &Event,
        before: Before,
    ) -> Result<(), Broken> {
        self.terminal_stays_terminal(event)?;
        self.started_whole(state, event)?;
        self.memory(state)?;
        self.preemption(state, settings, now, event, &before)?;
        match event {
            Event::JobDispatched {
                run,
                service,
                generation,
                ..
            } => {
                within_quotas(state, *run)?;
                let first = before.first_of_shape;
                hold!(first == Some(*run), "{run} starts ahead of {first:?}");
                let entry = state
                    .services
                    .get(service)
                    .ok_or("dispatched to an unknown service")?;
                admitted(state, entry, *run)?;
                let own = entry.instance.as_ref().filter(|instance| {
                    let starts = matches!(instance.phase, InstancePhase::Starting { .. });
                    entry.spec.worker.is_job() && starts
                });
                let instance = entry
                    .ready()
                    .or(own)
                    .ok_or("dispatched to an instance that is not ready")?;
                hold!(
                    instance.generation == *generation,
                    "dispatched to another generation"
                );
                hold!(
                    instance.active.len() <= entry.spec.concurrency as usize,
                    "{service} has {} jobs, at most {}",
                    instance.active.len(),
                    entry.spec.concurrency
                );
            }
            Event::RoomHeld { service, .. } => room_will_be_free(state, service)?,
            _ => {}
        }
        sleep_agrees(state, settings)?;
        accounts_agree(state)?;
        places_agree(state)
    }

    fn terminal_stays_terminal(&mut self, event: &Event) -> Result<(), Broken> {
        let Some(run) = event.run() else {
            return Ok(());
        };
        match event {
            Event::JobRevived { .. } => {
                hold!(self.ended.remove(&run), "{run} was revived alive");
            }
            Event::JobOutcomeStale { .. }
            | Event::CallbackAttempted { .. }
            | Event::NotificationAttempted { .. }
            | Event::RunPurged { .. }
            | Event::CommandAccepted { .. }
            | Event::CommandApplied { .. }
            | Event::CommandRejected { .. } => {}
            _ => hold!(!self.ended.contains(&run), "{run} has ended and goes on"),
        }
        if event.ends_run() {
            self.ended.insert(run);
        }
        Ok(())
    }

    /// An instance gets what it needs: an amount on one GPU, or whole GPUs, all or none.
    fn started_whole(&mut self, state: &State, event: &Event) -> Result<(), Broken> {
        if let Event::InstanceStartRequested {
            service,
            generation,
            grants,
            ..
        } = event
        {
            let entry = state
                .services
                .get(service)
                .ok_or("an unknown service is started")?;
            let gpus: BTreeSet<&GpuUuid> = grants.iter().map(|grant| &grant.gpu).collect();
            hold!(
                gpus.len() == grants.len(),
                "{service} has two grants on one GPU"
            );
            if entry.spec.gpus > 0 {
                hold!(
                    grants.len() == entry.spec.gpus as usize,
                    "{service} got {} GPUs",
                    grants.len()
                );
                self.whole.insert((service.clone(), *generation));
            } else {
                let wanted = usize::from(entry.spec.vram_mib > 0);
                hold!(
                    grants.len() == wanted,
                    "{service} got {} GPUs",
                    grants.len()
                );
                hold!(
                    grants.iter().all(|g| g.mib == state.need_mib(entry)),
                    "{service} got another amount"
                );
            }
            for grant in grants {
                let gpu = state
                    .gpus
                    .get(&grant.gpu)
                    .ok_or("started on an unknown GPU")?;
                hold!(gpu.present, "started on a GPU that is gone");
                let whole = entry.spec.gpus > 0;
                hold!(
                    whole || gpu.reserved_mib <= gpu.usable_mib(),
                    "started into others' memory"
                );
            }
        }
        Ok(())
    }

    /// Invariant 6, holds included; whole GPUs are whole.
    fn memory(&self, state: &State) -> Result<(), Broken> {
        for (uuid, gpu) in &state.gpus {
            let on_it: Vec<(&Service, u64)> = state
                .services
                .values()
                .map(|s| (s, granted(s, uuid)))
                .filter(|(_, mib)| *mib > 0)
                .collect();
            let sum: u64 = on_it.iter().map(|(_, mib)| mib).sum();
            hold!(
                sum == gpu.reserved_mib,
                "{uuid}: reserved {} but granted {sum}",
                gpu.reserved_mib
            );
            let held: u64 = state
                .holds
                .values()
                .map(|hold| still_needed(state, hold, uuid))
                .sum();
            hold!(
                sum + held <= gpu.facts.memory_mib,
                "{uuid}: {sum} reserved and {held} held of {}",
                gpu.facts.memory_mib
            );
            let whole = on_it.iter().any(|(service, _)| {
                service.instance.as_ref().is_some_and(|instance| {
                    // What one that sleeps keeps is no whole GPU any more.
                    let has_all = instance.asleep.is_none()
                        || matches!(instance.phase, InstancePhase::Waking { .. });
                    has_all
                        && self
                            .whole
                            .contains(&(service.spec.name.clone(), instance.generation))
                })
            });
            hold!(
                !whole || on_it.len() == 1,
                "{uuid} is shared though given whole"
            );
        }
        Ok(())
    }

    /// The gap, the minimum runtime, and that an eviction leads to the preemptor's start.
    fn preemption(
        &mut self,
        state: &State,
        settings: &Settings,
        now: Timestamp,
        event: &Event,
        before: &Before,
    ) -> Result<(), Broken> {
        if let (Event::JobStopRequested { run, .. }, Some((by, priority, since, service))) =
            (event, &before.victim)
            && !self.by_hand
        {
            let preemptor = state
                .jobs
                .get(by)
                .ok_or("preempted for a run that is no more")?;
            hold!(
                matches!(preemptor.phase, Phase::Queued),
                "preempted for a run that does not wait"
            );
            let gap = priority.saturating_sub(preemptor.spec.priority.get());
            hold!(
                gap >= settings.preempt_priority_gap,
                "preempted for a gap of {gap}"
            );
            let min_ms = state
                .services
                .get(service)
                .and_then(|s| s.spec.min_runtime_ms)
                .unwrap_or(settings.min_runtime_ms);
            hold!(
                now.millis_since(*since) >= min_ms,
                "{run} preempted before its minimum runtime"
            );
            let last = self.preempted_at.insert((*by, *run), now);
            hold!(
                last.is_none_or(|at| now.millis_since(at) >= min_ms),
                "{by} preempted {run} twice within the minimum runtime"
            );
        }
        match event {
            Event::JobStopRequested {
                run,
                cause: JobStopCause::Preempt { by },
                ..
            } => {
                self.owed.entry(*by).or_default().insert(*run);
            }
            Event::JobRequeued { run, .. } if self.benign => {
                let in_vain = self.owed.iter().find(|(_, victims)| victims.contains(run));
                hold!(in_vain.is_none(), "{run} was evicted in vain: {in_vain:?}");
            }
            Event::JobDispatched { run, .. } => {
                // The place may pass to a job of the same shape that is served earlier.
                let target = |run: &RunId| state.jobs.get(run).map(|job| &job.spec.target);
                let started = target(run);
                self.owed.retain(|by, _| target(by) != started);
            }
            Event::JobPaused { run, .. } => {
                self.owed.remove(run);
            }
            event if event.ends_run() => {
                if let Some(run) = event.run() {
                    self.owed.remove(&run);
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// What sleeps has no work, takes none, and fills host memory no further than allowed.
fn sleep_agrees(state: &State, settings: &Settings) -> Result<(), Broken> {
    for (name, service) in &state.services {
        let Some(instance) = &service.instance else {
            continue;
        };
        let gives_memory = matches!(
            instance.phase,
            InstancePhase::Yielding { .. } | InstancePhase::Asleep | InstancePhase::Waking { .. }
        );
        hold!(
            !gives_memory || (instance.active.is_empty() && instance.promised.is_empty()),
            "{name} has work and no memory: {:?}",
            instance.phase
        );
        hold!(
            !instance.is_asleep() || instance.asleep.is_some(),
            "{name} sleeps and nobody knows how"
        );
    }
    let mib = state.sleeping_host_mib();
    hold!(
        mib <= settings.sleep_host_max_mib,
        "{mib} MiB of what sleeps lie in host memory"
    );
    Ok(())
}

/// Whether an effect carries the generation or attempt of the event that implies it (invariant 3).
pub fn is_fenced(event: &Event, effect: &Effect) -> bool {
    match (event, effect) {
        (
            Event::InstanceStartRequested { .. },
            Effect::StartInstance {
                spec, generation, ..
            },
        ) => event.instance() == Some((&spec.name, *generation)),
        (
            Event::LadderStepBegan {
                run,
                attempt,
                number,
                ..
            },
            Effect::AskCheckpoint(ask),
        ) => (*run, *attempt, *number) == (Some(ask.run), ask.attempt, ask.number),
        (
            Event::LadderStepBegan { run, attempt, .. },
            Effect::StopCall {
                run: of,
                attempt: number,
                ..
            },
        ) => (*run, attempt) == (Some(*of), number),
        (Event::LadderStepBegan { number, .. }, Effect::TakeMemory(take)) => {
            *number == take.number && event.instance() == Some((&take.service, take.generation))
        }
        (Event::InstanceWakeRequested { .. }, Effect::WakeInstance(wake)) => {
            event.instance() == Some((&wake.service, wake.generation))
        }
        (
            Event::InstanceStopRequested { .. },
            Effect::StopInstance {
                service,
                generation,
                ..
            },
        ) => event.instance() == Some((service, *generation)),
        (
            Event::JobDispatched {
                run,
                attempt,
                service,
                generation,
                ..
            },
            Effect::Dispatch(call),
        ) => {
            (*run, *attempt, service, *generation)
                == (call.run, call.attempt, &call.service, call.generation)
        }
        (
            Event::JobDispatched {
                run,
                attempt,
                service,
                generation,
                ..
            },
            Effect::StartJob { spec, job, .. },
        ) => {
            (*run, *attempt, service, *generation)
                == (job.run, job.attempt, &spec.name, job.generation)
        }
        (
            Event::JobStopRequested { run, attempt, .. },
            Effect::StopCall {
                run: of,
                attempt: number,
                ..
            },
        ) => (run, attempt) == (of, number),
        (Event::CallbackAttempted { number: last, .. }, Effect::SendCallback { number, .. }) => {
            *number == last + 1
        }
        (event, Effect::SendCallback { run, .. }) => event.ends_run() && event.run() == Some(*run),
        _ => false,
    }
}

/// MiB of a GPU granted to a service's instance.
fn granted(service: &Service, gpu: &GpuUuid) -> u64 {
    service
        .instance
        .as_ref()
        .map_or(0, |instance| mib_on(&instance.grants, gpu))
}

/// MiB of a GPU that a hold needs beyond what its leaving victims will give back.
fn still_needed(state: &State, hold: &Hold, gpu: &GpuUuid) -> u64 {
    let there = coming(state, hold, gpu) + own_part(owner(state, hold), gpu);
    mib_on(&hold.grants, gpu).saturating_sub(there)
}

/// For whom room is held.
fn owner<'a>(state: &'a State, hold: &Hold) -> Option<&'a Service> {
    let mut holds = state.holds.iter();
    let (name, _) = holds.find(|(_, other)| *other == hold)?;
    state.services.get(name)
}

/// MiB of a GPU that an instance of the service itself gives to what is held for it: asleep, or being ended meanwhile.
fn own_part(service: Option<&Service>, gpu: &GpuUuid) -> u64 {
    let leaves = |service: &&Service| service.instance.as_ref().is_some_and(|i| i.is_leaving());
    let leaving = service.filter(leaves);
    leaving.map_or_else(|| remains(service, gpu), |service| granted(service, gpu))
}

/// MiB of a GPU that a sleeping instance of a service still holds.
fn remains(service: Option<&Service>, gpu: &GpuUuid) -> u64 {
    let asleep = service.filter(|service| service.sleeping().is_some());
    asleep.map_or(0, |service| granted(service, gpu))
}

fn coming(state: &State, hold: &Hold, gpu: &GpuUuid) -> u64 {
    hold.victims
        .iter()
        .filter_map(|name| state.services.get(name))
        .filter(|service| service.instance.as_ref().is_some_and(|i| i.is_leaving()))
        .map(|service| granted(service, gpu))
        .sum()
}

/// When the victims are gone, the held room is there: nobody is evicted in vain.
fn room_will_be_free(state: &State, service: &ServiceName) -> Result<(), Broken> {
    let hold = state.holds.get(service).ok_or("no hold")?;
    let entry = state.services.get(service);
    let whole = entry.is_some_and(|s| s.spec.gpus > 0);
    for grant in &hold.grants {
        let gpu = state.gpus.get(&grant.gpu).ok_or("room on an unknown GPU")?;
        let others: u64 = state
            .holds
            .iter()
            .filter(|(name, _)| *name != service)
            .map(|(_, other)| still_needed(state, other, &grant.gpu))
            .sum();
        let own = remains(entry, &grant.gpu);
        let left = gpu.reserved_mib - own - coming(state, hold, &grant.gpu) + others;
        let wanted = if whole {
            gpu.usable_mib().max(1)
        } else {
            grant.mib
        };
        hold!(
            left + wanted <= gpu.usable_mib(),
            "{service} would not fit on {}: {left} left, {wanted} wanted, {} usable",
            grant.gpu,
            gpu.usable_mib()
        );
    }
    Ok(())
}

/// The run whose turn it is on a service: those that it does not admit, or quotas keep from it, are passed over.
fn first_of(
    state: &State,
    settings: &Settings,
    now: Timestamp,
    target: &Target,
    service: &ServiceName,
) -> Option<RunId> {
    let service = state.services.get(service)?;
    let fair = Fair::new(state, settings, now);
    let mut turns = fair.serving(target).filter(|(lane, key)| {
        service.admits(&lane.tenant) && state.may_use(state.jobs[&key.1].plane, service)
    });
    turns.next().map(|(_, key)| key.1)
}

/// Accounts are what jobs amount to, and no running quota is exceeded.
fn accounts_agree(state: &State) -> Result<(), Broken> {
    let mut held: BTreeMap<SmolStr, (u64, Amount)> = BTreeMap::new();
    let mut of_planes: BTreeMap<PlaneId, (u64, Amount)> = BTreeMap::new();
    for job in state.jobs.values() {
        let tenant = held.entry(state.tenant_of(job.plane).clone()).or_default();
        let plane = of_planes.entry(job.plane).or_default();
        for sum in [tenant, plane] {
            sum.0 += 1;
            if job.place().is_some() {
                sum.1 = sum.1.plus(job.charge);
            }
        }
    }
    for (plane, (live, sum)) in of_planes {
        let has = state.accounts.plane(plane);
        hold!(
            (has.live, has.held) == (live, sum),
            "{plane:?} has {has:?}, not {live}, {sum:?}"
        );
    }
    for (tenant, (live, sum)) in held {
        let has = state
            .accounts
            .tenant(&tenant)
            .map(|account| account.holding);
        let has = has.ok_or("a tenant with runs has no account")?;
        hold!(
            (has.live, has.held) == (live, sum),
            "{tenant} has {has:?}, not {live}, {sum:?}"
        );
    }
    Ok(())
}

/// Whoever was dispatched is one of those whom the service admits.
fn admitted(state: &State, service: &Service, run: RunId) -> Result<(), Broken> {
    let job = state.jobs.get(&run).ok_or("an unknown run is dispatched")?;
    let tenant = state.tenant_of(job.plane);
    let name = &service.spec.name;
    hold!(
        service.admits(tenant),
        "{name} is not for {run} of {tenant}"
    );
    Ok(())
}

/// Whoever was dispatched was within all quotas of its tenant and user.
fn within_quotas(state: &State, run: RunId) -> Result<(), Broken> {
    let job = state.jobs.get(&run).ok_or("an unknown run is dispatched")?;
    let (plane, charge) = (job.plane, job.charge);
    let tenant = state.tenant_of(plane);
    let has_tenant = state
        .accounts
        .tenant(tenant)
        .map(|account| account.holding.held);
    let tenant = state
        .people
        .tenants
        .get(tenant)
        .map(|tenant| tenant.profile.quotas);
    let user = state.user_limits.get(&plane).map(|(_, quotas)| *quotas);
    let has_user = state.accounts.plane(plane).held;
    for (quotas, has) in [(tenant, has_tenant.unwrap_or_default()), (user, has_user)] {
        let Some(quotas) = quotas else { continue };
        // A quota may have been lowered below what is held: of what the run does not need there may be too much.
        let gpus = quotas.gpus.map(|gpus| gpus * 1_000);
        let members = [
            (quotas.running_runs, has.places, charge.places),
            (quotas.vram_mib, has.vram_mib, charge.vram_mib),
            (gpus, has.gpus_milli, charge.gpus_milli),
        ];
        for (quota, has, needed) in members {
            let within = needed == 0 || quota.is_none_or(|quota| has <= quota);
            hold!(within, "{run} needs {charge:?}: {has} of {quotas:?}");
        }
    }
    Ok(())
}

/// Jobs, places and promises say the same.
fn places_agree(state: &State) -> Result<(), Broken> {
    let mut promised = BTreeMap::new();
    for (name, service) in &state.services {
        let Some(instance) = &service.instance else {
            continue;
        };
        for run in &instance.active {
            let job = state.jobs.get(run).ok_or("an ended run holds a place")?;
            hold!(
                job.place() == Some((name, instance.generation)),
                "{run} is not on {name}: {:?}",
                job.phase
            );
        }
        for run in &instance.promised {
            hold!(
                promised.insert(*run, name.clone()).is_none(),
                "{run} was promised two places"
            );
            let queued = state
                .jobs
                .get(run)
                .is_some_and(|job| matches!(job.phase, Phase::Queued));
            hold!(queued, "{run} was promised a place and does not wait");
        }
    }
    hold!(
        promised == state.promises,
        "promises differ: {promised:?} and {:?}",
        state.promises
    );
    for (run, job) in &state.jobs {
        if let Some((name, generation)) = job.place() {
            let there = state.services.get(name).and_then(|s| s.instance.as_ref());
            let there = there.filter(|i| i.generation == generation && i.active.contains(run));
            hold!(there.is_some(), "{run} holds a place that is not there");
        }
    }
    Ok(())
}

/// What must hold when `step` has nothing left to decide.
pub fn at_rest(state: &State, settings: &Settings, now: Timestamp) -> Result<(), Broken> {
    // With every shape open and every service looked at, there is still nothing to do: no wake-up was lost.
    let bytes = state.to_snapshot().map_err(|e| e.to_string())?;
    let mut fresh =
        State::from_snapshot(&bytes, settings.ageing_ms_per_level).map_err(|e| e.to_string())?;
    hold!(fresh == *state, "a snapshot differs from its State");
    if let Some(events) = step(&mut fresh, settings, now) {
        return Err(format!("a wake-up was lost: {events:?}"));
    }
    for (name, held) in &state.holds {
        let waits = state
            .jobs
            .get(&held.run)
            .is_some_and(|job| matches!(job.phase, Phase::Queued));
        hold!(
            waits,
            "room for {name} is held for a run that does not wait"
        );
        let pending = held.victims.iter().any(|victim| {
            let entry = state.services.get(victim).and_then(|s| s.instance.as_ref());
            entry.is_some_and(|instance| instance.is_leaving())
        });
        hold!(pending, "room for {name} is held and nobody leaves");
    }
    for (target, shape) in state.queue.shapes() {
        if !shape.is_empty() {
            nothing_idle(state, settings, now, target)?;
        }
    }
    Ok(())
}

/// No free place, and no room for another instance, while jobs of this shape wait. By brute force.
fn nothing_idle(
    state: &State,
    settings: &Settings,
    now: Timestamp,
    target: &Target,
) -> Result<(), Broken> {
    if let Target::Container(_) = target {
        return no_container_fits(state, settings, now, target);
    }
    let fair = Fair::new(state, settings, now);
    let all: Vec<&Service> = state
        .services
        .values()
        .filter(|s| s.enabled && s.serves(target))
        .collect();
    for (lane, _) in fair.serving(target) {
        // What admits the lane, and its quotas let it use.
        let usable = state.usable(lane, &all).into_owned();
        no_idle_place(&fair, now, (target, &lane.tenant), &usable)?;
        if usable.len() == all.len() {
            break;
        }
    }
    Ok(())
}

/// Whoever comes first of those for whom no room is being made does not fit.
fn no_container_fits(
    state: &State,
    settings: &Settings,
    now: Timestamp,
    target: &Target,
) -> Result<(), Broken> {
    let fair = Fair::new(state, settings, now);
    for (_, (_, run)) in fair.serving(target) {
        let service = container::would_get(state, run).ok_or("a job without its container")?;
        let leaves = state.services.contains_key(&service.spec.name);
        if leaves || !state.may_use(state.jobs[&run].plane, &service) {
            continue;
        }
        let may = state.engine.up && !container::is_full(state, settings);
        hold!(
            !may || !room_for(state, &service),
            "a container fits and {run} waits"
        );
        break;
    }
    Ok(())
}

fn no_idle_place(
    fair: &Fair,
    now: Timestamp,
    (target, tenant): (&Target, &SmolStr),
    all: &[&Service],
) -> Result<(), Broken> {
    let state = fair.state;
    let admitted = |tenant: &SmolStr| all.iter().any(|service| service.admits(tenant));
    let waiting = fair.demand(target, tenant, all);
    let mut coming = 0;
    for service in all {
        let places = service.spec.concurrency as usize;
        if let Some(instance) = service
            .instance
            .as_ref()
            .filter(|i| i.phase == InstancePhase::Ready)
        {
            let keeps = |run: &&RunId| state.may_use(state.jobs[*run].plane, service);
            let taken = instance.active.len() + instance.promised.iter().filter(keeps).count();
            hold!(
                taken >= places,
                "{} has a free place and {target:?} waits",
                service.spec.name
            );
        }
        let is_coming = service.instance.as_ref().is_some_and(|i| i.is_coming());
        if is_coming || state.holds.contains_key(&service.spec.name) {
            coming += places;
        }
    }
    coming += state
        .promises
        .keys()
        .map(|run| &state.jobs[run])
        .filter(|job| job.spec.target == *target && admitted(state.tenant_of(job.plane)))
        .count();
    if waiting <= coming {
        return Ok(());
    }
    for service in all {
        let may_start = (service.instance.is_none() || service.sleeping().is_some())
            && service.crash_looped.is_none()
            && service.retry_at.is_none_or(|at| at <= now)
            && (state.engine.up || !service.spec.worker.is_container())
            && !state.holds.contains_key(&service.spec.name);
        let room = room_for(state, service);
        hold!(
            !may_start || !room,
            "{} fits and {target:?} waits",
            service.spec.name
        );
    }
    Ok(())
}

fn room_for(state: &State, service: &Service) -> bool {
    if service.spec.vram_mib == 0 && service.spec.gpus == 0 {
        return true;
    }
    let fitting = state.gpus.iter().filter(|(uuid, gpu)| {
        let held: u64 = state
            .holds
            .values()
            .map(|hold| still_needed(state, hold, uuid))
            .sum();
        let taken = gpu.reserved_mib + held;
        if service.spec.gpus > 0 {
            taken == 0 && gpu.usable_mib() > 0 && gpu.usable_mib() >= state.need_mib(service)
        } else {
            gpu.usable_mib() >= taken + state.need_mib(service) && gpu.usable_mib() > 0
        }
    });
    fitting.count() >= service.spec.gpus.max(1) as usize
}
