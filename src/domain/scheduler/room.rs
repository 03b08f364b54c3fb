//! Making room: which instances leave so that another service fits. Simulated to the end before anything
//! is stopped, and all or nothing: a victim never goes unless its successor then fits.

use std::collections::BTreeSet;

use super::fair::Fair;
use super::placement;
use crate::domain::ids::{GpuUuid, RunId, ServiceName};
use crate::domain::settings::Settings;
use crate::domain::spec::Grant;
use crate::domain::state::State;
use crate::domain::state::account::Amount;
use crate::domain::state::gpu::{mib_on, signed};
use crate::domain::state::job::{Job, Phase};
use crate::domain::state::service::{Instance, InstancePhase, Service};
use crate::domain::state::sleep::Asleep;
use crate::domain::time::Timestamp;

/// Who leaves, in the order of least harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leave {
    /// It is leaving already.
    Leaving,
    /// It has no work, and nobody waits for it.
    Idle,
    /// Its jobs are less urgent by the gap and have run for their minimum: they are preempted.
    Preempt,
    /// Its jobs end first, and it gets no new ones.
    Drain,
}

/// A way to make room: `grants` are free when `victims` are gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub grants: Vec<Grant>,
    pub victims: Vec<(ServiceName, Leave)>,
}

/// What one instance's leaving costs: compared in order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    leave: Leave,
    /// 5 − the most urgent priority among its jobs: less urgent work is cheaper.
    urgency: u8,
    /// Milliseconds of work since the last checkpoints.
    unsaved_ms: u64,
    jobs: usize,
    /// Microseconds since the epoch when it started, negated: the youngest first.
    age: i64,
    service: ServiceName,
}

/// Who asks for room.
pub struct Request<'a, 's> {
    pub state: &'a State,
    pub bid: &'a Bid<'a, 's>,
    pub run: RunId,
    /// The service to be started.
    pub service: &'a Service,
    /// The worst that may be done.
    pub worst: Leave,
}

impl Request<'_, '_> {
    /// The cheapest way to make room, `None` when there is none.
    pub fn plan(&self) -> Option<Plan> {
        if let Some(asleep) = self.service.sleeping() {
            self.plan_again(asleep)
        } else if self.service.spec.gpus == 0 {
            self.plan_one()
        } else {
            self.plan_whole()
        }
    }

    /// A sleeping instance needs the GPUs that it had.
    fn plan_again(&self, asleep: &Asleep) -> Option<Plan> {
        if !placement::could_wake(self.state, self.service, asleep) {
            return None;
        }
        let grants = placement::grants_again(self.state, self.service, asleep);
        let mut victims = BTreeSet::new();
        for grant in &grants {
            let usable = self.state.gpus.get(&grant.gpu)?.usable_mib();
            let need = match self.service.spec.gpus {
                0 => grant.mib,
                _ => usable,
            };
            let costs = self.clear(&grant.gpu, need)?;
            victims.extend(costs.into_iter().map(|cost| (cost.service, cost.leave)));
        }
        Some(Plan {
            grants,
            victims: victims.into_iter().collect(),
        })
    }

    fn plan_one(&self) -> Option<Plan> {
        let need = self.state.need_mib(self.service);
        self.state
            .gpus
            .iter()
            .filter(|(_, gpu)| gpu.usable_mib() > 0 && gpu.usable_mib() >= need)
            .filter_map(|(uuid, _)| {
                let victims = self.clear(uuid, need)?;
                Some((victims, uuid))
            })
            .min()
            .map(|(victims, uuid)| Plan {
                grants: vec![Grant {
                    gpu: uuid.clone(),
                    mib: need,
                }],
                victims: victims
                    .into_iter()
                    .map(|cost| (cost.service, cost.leave))
                    .collect(),
            })
    }

    /// The cheapest GPUs that can be emptied. An instance that spans several is counted with each.
    fn plan_whole(&self) -> Option<Plan> {
        let need = self.state.need_mib(self.service);
        let mut ways: Vec<(Vec<Cost>, u64, &GpuUuid)> = self
            .state
            .gpus
            .iter()
            .filter(|(_, gpu)| gpu.usable_mib() > 0 && gpu.usable_mib() >= need)
            .filter_map(|(uuid, gpu)| {
                Some((
                    self.clear(uuid, gpu.usable_mib())?,
                    gpu.facts.memory_mib,
                    uuid,
                ))
            })
            .collect();
        ways.sort();
        let count = usize::try_from(self.service.spec.gpus).ok()?;
        if ways.len() < count {
            return None;
        }
        let mut victims = BTreeSet::new();
        let mut grants = Vec::with_capacity(count);
        for (costs, mib, uuid) in ways.into_iter().take(count) {
            victims.extend(costs.into_iter().map(|cost| (cost.service, cost.leave)));
            grants.push(Grant {
                gpu: uuid.clone(),
                mib,
            });
        }
        grants.sort_by(|a, b| a.gpu.cmp(&b.gpu));
        Some(Plan {
            grants,
            victims: victims.into_iter().collect(),
        })
    }

    /// The instances that leave `gpu` so that `need_mib` are free on it: greedily the cheapest, then
    /// those turn out unneeded are given back.
    fn clear(&self, gpu: &GpuUuid, need_mib: u64) -> Option<Vec<Cost>> {
        let need_mib = signed(need_mib);
        let mut free = self.state.balance_mib(gpu, Some(&self.service.spec.name));
        let mut costs: Vec<(Cost, i64)> = self
            .state
            .services
            .values()
            .filter(|other| other.spec.name != self.service.spec.name)
            .filter_map(|other| {
                let mib = mib_on(&other.instance.as_ref()?.grants, gpu);
                let promised = self
                    .state
                    .holds
                    .values()
                    .any(|h| h.victims.contains(&other.spec.name));
                (mib > 0 && !promised).then(|| Some((self.cost(other)?, signed(mib))))?
            })
            .collect();
        costs.sort();
        let mut chosen = Vec::new();
        for (cost, mib) in costs {
            if free >= need_mib {
                break;
            }
            free += mib;
            chosen.push((cost, mib));
        }
        if free < need_mib {
            return None;
        }
        // Walk back from the dearest: what is not needed stays.
        let mut index = chosen.len();
        while index > 0 {
            index -= 1;
            let mib = chosen[index].1;
            if free - mib >= need_mib {
                free -= mib;
                chosen.remove(index);
            }
        }
        let mut chosen: Vec<Cost> = chosen.into_iter().map(|(cost, _)| cost).collect();
        chosen.sort_by(|a, b| b.cmp(a)); // the dearest decides which GPU is taken
        Some(chosen)
    }

    /// What it costs when `other` leaves, `None` when it may not.
    fn cost(&self, other: &Service) -> Option<Cost> {
        let instance = other.instance.as_ref()?;
        let leave = self.leave(other)?;
        if leave > self.worst {
            return None;
        }
        let jobs = instance
            .active
            .iter()
            .filter_map(|run| self.state.jobs.get(run));
        let urgency = jobs
            .clone()
            .map(|job| 5 - job.spec.priority.get())
            .max()
            .unwrap_or(0);
        Some(Cost {
            leave,
            urgency,
            unsaved_ms: jobs.map(|job| job.unsaved_ms(self.bid.now)).sum(),
            jobs: instance.active.len(),
            age: instance.started_at.0.saturating_neg(),
            service: other.spec.name.clone(),
        })
    }

    fn leave(&self, other: &Service) -> Option<Leave> {
        let instance = other.instance.as_ref()?;
        match &instance.phase {
            InstancePhase::Stopping { .. } | InstancePhase::Exited { .. } => Some(Leave::Leaving),
            InstancePhase::Draining { .. } | InstancePhase::Yielding { .. } => Some(Leave::Leaving),
            InstancePhase::Starting { .. }
            | InstancePhase::Finding
            | InstancePhase::Waking { .. } => None,
            // What it still holds is to be had by its end.
            InstancePhase::Asleep => self.outranks_waiting(other).then_some(Leave::Idle),
            InstancePhase::Ready => self.leave_ready(other, instance),
        }
    }

    fn leave_ready(&self, other: &Service, instance: &Instance) -> Option<Leave> {
        // It could take this very job, if it had a place.
        let same_shape = self.state.serves(other, self.bid.job);
        // What was stopped for others, or has left for this one to come up, must not have been so in vain.
        let idle = instance.active.is_empty();
        let unused = idle && instance.idle_since <= instance.since;
        let awaited = unused && best_waiting(self.state, other).is_some();
        if same_shape || awaited || !instance.promised.is_empty() {
            return None;
        }
        let outranked = self.outranks_waiting(other);
        if idle {
            return outranked.then_some(Leave::Idle);
        }
        if outranked && self.may_preempt_all(other, instance) {
            return Some(Leave::Preempt);
        }
        self.may_drain(other, outranked).then_some(Leave::Drain)
    }

    /// Nobody waits for `other`, or only less urgent jobs, of its own tenant or of such as have used more of what they
    /// are due; or this run has waited for long enough.
    fn outranks_waiting(&self, other: &Service) -> bool {
        self.has_waited()
            || best_waiting(self.state, other).is_none()
            || (self.bid.is_more_urgent(other) && self.bid.has_used_less(other))
    }

    fn may_drain(&self, other: &Service, outranked: bool) -> bool {
        let anyone_waits = best_waiting(self.state, other).is_some();
        self.has_waited() || (anyone_waits && outranked)
    }

    /// The bound on waiting while others keep the memory busy.
    fn has_waited(&self) -> bool {
        self.bid.now.millis_since(self.bid.job.since) >= self.bid.settings.swap_max_wait_ms
    }

    fn may_preempt_all(&self, other: &Service, instance: &Instance) -> bool {
        instance.active.iter().all(|victim| {
            self.state.jobs.get(victim).is_some_and(|victim| {
                matches!(victim.phase, Phase::Stopping { .. })
                    || self
                        .bid
                        .may_preempt_all_of(victim, other, self.service)
                        .is_ok()
            })
        })
    }
}

/// The most urgent priority among the jobs that wait for `service`.
pub(super) fn best_waiting(
    state: &State,
    service: &Service,
) -> Option<crate::domain::spec::Priority> {
    let targets = service.targets();
    targets
        .iter()
        .filter_map(|target| state.most_urgent(service, target))
        .min()
}

/// Why a running job may not be preempted (yet).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spared {
    /// The other is not urgent enough, ever.
    Priority,
    /// It is being stopped already.
    Stopping,
    /// Its tenant has not used enough more of what it is due than the other's.
    Share,
    /// Its minimum runtime ends then.
    Until(Timestamp),
}

/// A waiting job that is to get what others have.
pub struct Bid<'a, 's> {
    pub fair: &'a Fair<'s>,
    pub settings: &'a Settings,
    pub now: Timestamp,
    pub job: &'a Job,
}

impl Bid<'_, '_> {
    /// Whether it is more urgent than those who wait for `other`.
    fn is_more_urgent(&self, other: &Service) -> bool {
        best_waiting(self.fair.state, other).is_some_and(|p| self.job.spec.priority < p)
    }

    fn has_used_less(&self, other: &Service) -> bool {
        let tenant = self.fair.state.tenant_of(self.job.plane);
        self.fair.is_first_of(tenant, &other.targets())
    }

    /// Whether those who wait for `other` keep its room only because their tenants have used less.
    pub fn is_outranked_by_share(&self, other: &Service) -> bool {
        self.is_more_urgent(other) && !self.has_used_less(other)
    }

    /// Whether the job may preempt `victim` and take its place on `service`.
    pub fn may_preempt(&self, victim: &Job, service: &Service) -> Result<(), Spared> {
        self.weigh(victim, service, victim.charge, victim.charge)
    }

    /// Whether the job may preempt `victim` with all the others that run on `service`, to make room for `wanted`.
    pub fn may_preempt_all_of(
        &self,
        victim: &Job,
        service: &Service,
        wanted: &Service,
    ) -> Result<(), Spared> {
        let state = self.fair.state;
        let tenant = state.tenant_of(victim.plane);
        let runs = service.instance.iter().flat_map(|i| &i.active);
        let loss = runs
            .filter_map(|run| state.jobs.get(run))
            .filter(|job| state.tenant_of(job.plane) == tenant)
            .fold(Amount::default(), |sum, job| sum.plus(job.charge));
        self.weigh(victim, service, Amount::of_run(wanted), loss)
    }

    /// More urgent by the gap, and not served after it anyway: a job that has waited until it came first by its age
    /// would otherwise never get further. Of other tenants only those lose theirs that would have used more of what
    /// they are due even then.
    fn weigh(
        &self,
        victim: &Job,
        service: &Service,
        gain: Amount,
        loss: Amount,
    ) -> Result<(), Spared> {
        let (job, state, settings) = (self.job, self.fair.state, self.settings);
        let (ours, theirs) = (state.tenant_of(job.plane), state.tenant_of(victim.plane));
        let gap = job.spec.priority.gap_to(victim.spec.priority);
        let ageing_ms = u64::from(gap).saturating_mul(settings.ageing_ms_per_level);
        let aged = match ours == theirs {
            true => victim.queued_at + ageing_ms <= job.queued_at,
            // Another tenant's long queue makes none of its jobs old; that it was not served for so long does.
            false => self.fair.is_overdue(victim.waited_ms),
        };
        if gap < settings.preempt_priority_gap.max(1) || aged {
            return Err(Spared::Priority);
        }
        if !matches!(victim.phase, Phase::Running { .. }) {
            return Err(Spared::Stopping);
        }
        let min_runtime_ms = service.spec.min_runtime_ms;
        let until = victim.since + min_runtime_ms.unwrap_or(settings.min_runtime_ms);
        if until > self.now {
            return Err(Spared::Until(until));
        }
        match ours == theirs || self.fair.may_take((ours, gain), (theirs, loss)) {
            true => Ok(()),
            false => Err(Spared::Share),
        }
    }
}
