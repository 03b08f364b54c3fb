//! Whose turn it is: among the tenants whose jobs wait for the same, the most urgent one, and of equally urgent ones
//! that which has used the least of what it is due.
//!
//! - **Level**: a lane is as urgent as its most urgent job, and gains a level with each `ageing_ms_per_level` that its
//!   first job has waited since the lane was last served. So nobody starves under the urgent jobs of others, and a
//!   long queue does not make itself urgent.
//! - **Share**: the largest part that a tenant uses of any resource (dominant resource fairness, Ghodsi et al., NSDI
//!   2011), of places, GPU memory and whole GPUs, now and on average, divided by its weight.
//! - Then the place in the lane. With one tenant that alone counts.
//!
//! Lanes whose tenant or user is at a quota wait. Time enters in steps, so that the order changes with events and
//! at known times only.

use std::borrow::Cow;
use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use rustc_hash::FxHashMap;
use smol_str::SmolStr;

use super::queue::{Lane, LaneKey, OrderKey, RunsIter, Shape};
use crate::domain::ids::PlaneId;
use crate::domain::settings::Settings;
use crate::domain::spec::{Priority, Target};
use crate::domain::state::State;
use crate::domain::state::account::{Amount, Holding};
use crate::domain::state::service::Service;
use crate::domain::tenant::{DEFAULT_WEIGHT, Holder, QuotaHit, Quotas};
use crate::domain::time::Timestamp;

/// Shortest and longest time after which the order is looked at anew, in milliseconds.
const STEP_MS: (u64, u64) = (1_000, 60_000);

/// Such steps in a half-life: the error of a share is about a hundredth.
const STEPS_PER_HALF_LIFE: u64 = 64;

/// Where a lane stands: smaller is served first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// From 1, the most urgent.
    pub level: u8,
    /// What its tenant used, in parts of what it is due.
    pub share: u64,
    pub key: OrderKey,
}

/// One lane of a shape while its jobs are told in order.
struct Front<'a> {
    lane: &'a LaneKey,
    share: u64,
    first: OrderKey,
    rest: RunsIter<'a>,
    /// Of the first and the rest, by priority.
    counts: [u64; 5],
    rank: Option<Rank>,
}

/// State as the order of service sees it.
pub struct Fair<'a> {
    pub state: &'a State,
    ageing_ms: u64,
    /// The beginning of the step that the time is in.
    now: Timestamp,
    /// Places, MiB and thousandths of GPUs that there are.
    capacity: OnceCell<[u64; 3]>,
    /// What was asked before.
    shares: RefCell<FxHashMap<&'a SmolStr, u64>>,
}

impl<'a> Fair<'a> {
    pub fn new(state: &'a State, settings: &Settings, now: Timestamp) -> Fair<'a> {
        let step_us = step_us(state);
        Fair {
            state,
            ageing_ms: settings.ageing_ms_per_level.max(1),
            now: Timestamp(now.0.div_euclid(step_us).saturating_mul(step_us)),
            capacity: OnceCell::new(),
            shares: RefCell::default(),
        }
    }

    /// When time alone may change the order.
    pub fn next_look(&self) -> Timestamp {
        Timestamp(self.now.0.saturating_add(step_us(self.state)))
    }

    /// The jobs of a shape in the order of service, those at a quota left out.
    pub fn serving(&self, target: &Target) -> Serving<'_, 'a> {
        let shape = self.state.queue.shape(target);
        let lanes = shape.into_iter().flat_map(Shape::lanes);
        let free = lanes.filter(|(lane, _)| !self.state.is_at_quota(lane));
        let fronts: Vec<Front<'a>> = free.filter_map(|(key, lane)| front(key, lane)).collect();
        let mut serving = Serving {
            fair: self,
            target: target.clone(),
            contested: fronts.len() > 1,
            fronts,
        };
        if serving.contested {
            for front in &mut serving.fronts {
                front.share = self.share(&front.lane.tenant);
                front.rank = Some(self.rank(target, front));
            }
        }
        serving
    }

    /// Open shapes, the one to be tried first at the end. A tenant's own are in the order of their first jobs.
    pub fn order(&self, open: BTreeSet<Target>) -> Vec<Target> {
        let mut shapes = Vec::with_capacity(open.len());
        for target in open {
            let first = self.serving(&target).into_first();
            shapes.push((target, first));
        }
        let tenants = |(_, first): &(Target, Option<Front<'a>>)| {
            first.as_ref().map(|front| front.lane.tenant.clone())
        };
        let distinct: BTreeSet<SmolStr> = shapes.iter().filter_map(tenants).collect();
        let mut turns: BTreeMap<SmolStr, Rank> = BTreeMap::new();
        if distinct.len() > 1 {
            for (target, front) in &mut shapes {
                let Some(front) = front else { continue };
                front.share = self.share(&front.lane.tenant);
                let rank = self.rank(target, front);
                let turn = turns.entry(front.lane.tenant.clone()).or_insert(rank);
                *turn = rank.min(*turn);
            }
        }
        shapes.sort_by_cached_key(|(_, front)| {
            let place = front
                .as_ref()
                .map(|front| (turns.get(&front.lane.tenant).copied(), front.first));
            // Those without anybody who may be served come last.
            std::cmp::Reverse((place.is_none(), place))
        });
        shapes.into_iter().map(|(target, _)| target).collect()
    }

    /// Jobs that wait for the places of `services`, those that `tenant` may use, and that quotas let run at once. Those of
    /// other tenants do not count as far as services of their own are coming.
    pub fn demand(&self, target: &Target, tenant: &SmolStr, services: &[&Service]) -> usize {
        let Some(shape) = self.state.queue.shape(target) else {
            return 0;
        };
        let mut waiting: BTreeMap<&SmolStr, usize> = BTreeMap::new();
        let mut demand = 0;
        let own = self.state.own_places_coming(target);
        let competes = |key: &LaneKey| services.iter().any(|service| service.admits(&key.tenant));
        for (key, lane) in shape.lanes().iter().filter(|(key, _)| competes(key)) {
            let room = self.state.limits_of_lane(key).headroom();
            let room = usize::try_from(room).unwrap_or(usize::MAX);
            let waits = lane.waiting.len().min(room);
            match own.contains_key(&key.tenant) && key.tenant != *tenant {
                true => *waiting.entry(&key.tenant).or_default() += waits,
                false => demand += waits,
            }
        }
        for (of, waits) in waiting {
            demand += waits.saturating_sub(own.get(of).copied().unwrap_or(0));
        }
        demand
    }

    /// The part of the machine that a tenant uses, in parts of its weight.
    fn share(&self, tenant: &'a SmolStr) -> u64 {
        let known = self.shares.borrow().get(tenant).copied();
        known.unwrap_or_else(|| {
            let share = self.weighed_share(tenant);
            self.shares.borrow_mut().insert(tenant, share);
            share
        })
    }

    fn weighed_share(&self, tenant: &SmolStr) -> u64 {
        let Some(account) = self.state.accounts.tenant(tenant) else {
            return 0;
        };
        let usage = account.usage(self.state.accounts.half_life_ms, self.now);
        let capacity = self.capacity.get_or_init(|| capacity(self.state));
        let dominant = usage.iter().zip(capacity).map(|(used, there)| match there {
            0 => 0,
            there => (u128::from(*used) << 16) / u128::from(*there),
        });
        let dominant = dominant.max().unwrap_or(0);
        let weight = u128::from(self.state.people.weight_of(tenant).max(1));
        u64::try_from(dominant * u128::from(DEFAULT_WEIGHT) / weight).unwrap_or(u64::MAX)
    }

    fn rank(&self, target: &Target, front: &Front) -> Rank {
        Rank {
            level: self.level(target, front),
            share: front.share,
            key: front.first,
        }
    }

    /// How urgent a lane is: by its most urgent job, or by the age of its first.
    fn level(&self, target: &Target, front: &Front) -> u8 {
        let least = Priority::LEAST_URGENT.get();
        let most_urgent = front
            .counts
            .iter()
            .zip(1u8..)
            .find(|(count, _)| **count > 0);
        let most_urgent = most_urgent.map_or(least, |(_, level)| level);
        let Some(job) = self.state.jobs.get(&front.first.1) else {
            return most_urgent;
        };
        let account = self.state.accounts.tenant(&front.lane.tenant);
        let served = account.and_then(|account| account.served.get(target));
        let since = served.map_or(job.queued_at, |at| job.queued_at.max(*at));
        let gained = self.now.millis_since(since) / self.ageing_ms;
        let gained = u8::try_from(gained).unwrap_or(u8::MAX);
        let aged = job.spec.priority.get().saturating_sub(gained).max(1);
        aged.min(most_urgent)
    }
}

fn front<'a>(key: &'a LaneKey, lane: &'a Lane) -> Option<Front<'a>> {
    let mut rest = lane.waiting.iter();
    Some(Front {
        lane: key,
        share: 0,
        first: rest.next()?,
        rest,
        counts: lane.by_priority,
        rank: None,
    })
}

fn step_us(state: &State) -> i64 {
    let step_ms = state.accounts.half_life_ms / STEPS_PER_HALF_LIFE;
    i64::try_from(step_ms.clamp(STEP_MS.0, STEP_MS.1) * 1_000).unwrap_or(i64::MAX)
}

/// Places of services that take work, memory and number of the GPUs that are there.
fn capacity(state: &State) -> [u64; 3] {
    let enabled = state.services.values().filter(|service| service.enabled);
    let places = enabled
        .map(|service| u64::from(service.spec.concurrency))
        .sum();
    let gpus = || state.gpus.values().filter(|gpu| gpu.present);
    let vram_mib = gpus().map(|gpu| gpu.facts.memory_mib).sum();
    [places, vram_mib, gpus().count() as u64 * 1_000]
}

/// The jobs of a shape, in the order of service.
pub struct Serving<'f, 'a> {
    fair: &'f Fair<'a>,
    target: Target,
    fronts: Vec<Front<'a>>,
    /// Several lanes may be served.
    contested: bool,
}

impl<'a> Serving<'_, 'a> {
    /// Whether it depends on the tenants' shares who is first on a service.
    pub fn is_contested_for(&self, service: &Service) -> bool {
        let admits = |front: &&Front| service.admits(&front.lane.tenant);
        self.contested && self.fronts.iter().filter(admits).nth(1).is_some()
    }

    /// The next job of those lanes.
    pub fn first_of(
        &mut self,
        wanted: impl Fn(&LaneKey) -> bool,
    ) -> Option<(&'a LaneKey, OrderKey)> {
        self.fronts.retain(|front| wanted(front.lane));
        self.next()
    }

    /// Tells no further jobs of a lane.
    pub fn pass(&mut self, lane: &LaneKey) {
        self.fronts.retain(|front| front.lane != lane);
    }

    fn into_first(mut self) -> Option<Front<'a>> {
        let index = self.first()?;
        Some(self.fronts.swap_remove(index))
    }

    fn first(&self) -> Option<usize> {
        let ranks = self.fronts.iter().map(|front| front.rank);
        ranks
            .enumerate()
            .min_by_key(|(_, rank)| *rank)
            .map(|(index, _)| index)
    }
}

impl<'a> Iterator for Serving<'_, 'a> {
    type Item = (&'a LaneKey, OrderKey);

    fn next(&mut self) -> Option<Self::Item> {
        let index = self.first()?;
        let front = &mut self.fronts[index];
        let told = (front.lane, front.first);
        if let Some(job) = self.fair.state.jobs.get(&front.first.1) {
            let count = &mut front.counts[usize::from(job.spec.priority.get() - 1)];
            *count = count.saturating_sub(1);
        }
        match front.rest.next() {
            Some(next) => {
                front.first = next;
                if self.contested {
                    front.rank = Some(self.fair.rank(&self.target, front));
                }
            }
            None => {
                self.fronts.swap_remove(index);
            }
        }
        Some(told)
    }
}

/// One holder's quotas and what it has.
struct Limit<'a> {
    holder: HolderRef<'a>,
    quotas: &'a Quotas,
    has: Holding,
}

enum HolderRef<'a> {
    Tenant(&'a SmolStr),
    User(&'a SmolStr),
}

/// The quotas that a run is under: its tenant's and its user's.
#[derive(Default)]
pub struct Limits<'a>([Option<Limit<'a>>; 2]);

impl Limits<'_> {
    /// The quota that forbids one run more which holds `charge`.
    pub fn hit(&self, charge: Amount) -> Option<QuotaHit> {
        self.0.iter().flatten().find_map(|limit| limit.hit(charge))
    }

    /// The quota that forbids one run more, whatever it needs.
    pub fn running_hit(&self) -> Option<QuotaHit> {
        self.hit(Amount {
            places: 1,
            ..Amount::default()
        })
    }

    /// The quota that forbids to queue one run more.
    pub fn queued_hit(&self) -> Option<QuotaHit> {
        self.0.iter().flatten().find_map(|limit| {
            let (used, quota) = (limit.has.queued(), limit.quotas.queued_runs);
            let hit = quota.filter(|quota| used >= *quota)?;
            Some(limit.told("queued_runs", "queued runs", hit, used))
        })
    }

    /// How many runs more may get a place.
    pub fn headroom(&self) -> u64 {
        let room = |limit: &Limit| {
            let running = limit.quotas.running_runs?;
            Some(running.saturating_sub(limit.has.held.places))
        };
        self.0
            .iter()
            .flatten()
            .filter_map(room)
            .min()
            .unwrap_or(u64::MAX)
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }
}

impl Limit<'_> {
    fn hit(&self, charge: Amount) -> Option<QuotaHit> {
        let (has, quotas) = (self.has.held, self.quotas);
        let after = has.plus(charge);
        let over = |quota: Option<u64>, after: u64, charge: u64| {
            quota.filter(|quota| charge > 0 && after > *quota)
        };
        if let Some(limit) = over(quotas.running_runs, after.places, charge.places) {
            return Some(self.told("running_runs", "running runs", limit, has.places));
        }
        let whole = quotas.gpus.map(|gpus| gpus.saturating_mul(1_000));
        if over(whole, after.gpus_milli, charge.gpus_milli).is_some() {
            let used = has.gpus_milli.div_ceil(1_000);
            return Some(self.told("gpus", "GPUs", quotas.gpus.unwrap_or(0), used));
        }
        let limit = over(quotas.vram_mib, after.vram_mib, charge.vram_mib)?;
        Some(self.told("vram_mib", "MiB of GPU memory", limit, has.vram_mib))
    }

    fn told(&self, quota: &'static str, unit: &'static str, limit: u64, used: u64) -> QuotaHit {
        QuotaHit {
            holder: match self.holder {
                HolderRef::Tenant(tenant) => Holder::Tenant(tenant.clone()),
                HolderRef::User(user) => Holder::User(user.clone()),
            },
            quota,
            unit,
            limit,
            used,
        }
    }
}

impl State {
    /// Whether places of a service are on their way: it comes up, or room is made for it.
    pub fn is_coming(&self, service: &Service) -> bool {
        let instance = service.instance.as_ref();
        self.holds.contains_key(&service.spec.name) || instance.is_some_and(|i| i.is_coming())
    }

    /// Places on their way for `target`, of services that are one tenant's alone.
    fn own_places_coming(&self, target: &Target) -> BTreeMap<&SmolStr, usize> {
        let mut places: BTreeMap<&SmolStr, usize> = BTreeMap::new();
        for service in self.services.values() {
            let Some(tenant) = &service.tenant else {
                continue;
            };
            if service.enabled && service.serves(target) && self.is_coming(service) {
                let sum = places.entry(tenant).or_default();
                *sum = sum.saturating_add(service.places());
            }
        }
        places
    }

    /// Whose lane a plane's jobs wait in.
    pub fn lane_of(&self, plane: PlaneId) -> LaneKey {
        let quotas = self.user_limits.get(&plane);
        LaneKey {
            tenant: self.tenant_of(plane).clone(),
            user: quotas.filter(|(_, q)| q.limits_running()).map(|_| plane),
        }
    }

    /// The quotas of a lane: with a user among them only where it has a lane of its own.
    pub fn limits_of_lane<'a>(&'a self, lane: &'a LaneKey) -> Limits<'a> {
        Limits([
            self.tenant_limit(&lane.tenant),
            lane.user.and_then(|plane| self.user_limit(plane)),
        ])
    }

    /// The quotas of a plane's runs.
    pub fn limits_of_plane(&self, plane: PlaneId) -> Limits<'_> {
        Limits([
            self.tenant_limit(self.tenant_of(plane)),
            self.user_limit(plane),
        ])
    }

    fn tenant_limit<'a>(&'a self, tenant: &'a SmolStr) -> Option<Limit<'a>> {
        let quotas = &self.people.tenants.get(tenant)?.profile.quotas;
        let account = self.accounts.tenant(tenant);
        (!quotas.is_unlimited()).then(|| Limit {
            holder: HolderRef::Tenant(tenant),
            quotas,
            has: account.map(|account| account.holding).unwrap_or_default(),
        })
    }

    fn user_limit(&self, plane: PlaneId) -> Option<Limit<'_>> {
        let (key, quotas) = self.user_limits.get(&plane)?;
        Some(Limit {
            holder: HolderRef::User(&key.user),
            quotas,
            has: self.accounts.plane(plane),
        })
    }

    /// Whether no job of a lane may run now, wherever.
    pub fn is_at_quota(&self, lane: &LaneKey) -> bool {
        self.limits_of_lane(lane).headroom() == 0
    }

    /// Whether quotas let a run of this plane take a place on `service` now.
    pub fn may_use(&self, plane: PlaneId, service: &Service) -> bool {
        let limits = self.limits_of_plane(plane);
        limits.is_empty() || limits.hit(Amount::of_run(service)).is_none()
    }

    /// Those of `services` that admit a lane's jobs, and that its quotas let them use now.
    pub fn usable<'s, 'a>(
        &self,
        lane: &LaneKey,
        services: &'s [&'a Service],
    ) -> Cow<'s, [&'a Service]> {
        let limits = self.limits_of_lane(lane);
        let allowed = |service: &&&Service| {
            let admitted = service.admits(&lane.tenant);
            admitted && (limits.is_empty() || limits.hit(Amount::of_run(service)).is_none())
        };
        if services.iter().all(|service| allowed(&service)) {
            return Cow::Borrowed(services);
        }
        Cow::Owned(services.iter().filter(allowed).copied().collect())
    }

    /// The most urgent priority among the jobs of a shape that `service` admits and quotas let run, if any.
    pub fn most_urgent(&self, service: &Service, target: &Target) -> Option<Priority> {
        let shape = self.queue.shape(target)?;
        let level = match self.is_limited() || service.tenant.is_some() {
            false => shape.most_urgent(),
            true => {
                let lanes = shape.lanes().iter();
                let free = lanes
                    .filter(|(lane, _)| service.admits(&lane.tenant) && !self.is_at_quota(lane));
                free.filter_map(|(_, lane)| lane.most_urgent()).min()
            }
        }?;
        Priority::new(u8::try_from(level + 1).ok()?)
    }
}
