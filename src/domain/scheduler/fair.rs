//! Whose turn it is: among the tenants whose jobs wait for the same, the one that has used the least of what it is
//! due. How urgent its jobs are is a tenant's own affair: whoever calls all of them urgent gets no more.
//!
//! - **Overdue**: a lane whose first job has waited for `OVERDUE_LEVELS` × `ageing_ms_per_level`, and no other of its
//!   tenant was served meanwhile, comes before those that have not. So nobody starves, and a long queue is no older
//!   than its tenant's last turn.
//! - **Share**: the largest part that a tenant uses of any resource (dominant resource fairness, Ghodsi et al., NSDI
//!   2011), of places, GPU memory and whole GPUs, now and on average, divided by its weight.
//! - Then the place in the lane, by priority and age. With one tenant that alone counts.
//!
//! Lanes whose tenant or user is at a quota wait (`quota`). Time enters in steps, so that the order changes with
//! events and at known times only.

use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use rustc_hash::FxHashMap;
use smol_str::SmolStr;

use super::queue::{Lane, LaneKey, OrderKey, RunsIter, Shape};
use crate::domain::settings::Settings;
use crate::domain::spec::Target;
use crate::domain::state::State;
use crate::domain::state::account::{Account, Amount};
use crate::domain::state::service::{Instance, InstancePhase, Service};
use crate::domain::tenant::DEFAULT_WEIGHT;
use crate::domain::time::Timestamp;

/// Shortest and longest time after which the order is looked at anew, in milliseconds.
const STEP_MS: (u64, u64) = (1_000, 60_000);

/// Such steps in a half-life: the error of a share is about a hundredth.
const STEPS_PER_HALF_LIFE: u64 = 64;

/// Levels of ageing after which a lane that is not served comes first: as many as make a job of the default priority
/// one of the most urgent.
const OVERDUE_LEVELS: u64 = 2;

/// Where a lane stands: smaller is served first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// Not overdue.
    pub in_time: bool,
    /// What its tenant used, in parts of what it is due.
    pub share: u64,
    pub key: OrderKey,
}

/// One lane of a shape while its jobs are told in order.
struct Front<'a> {
    lane: &'a LaneKey,
    first: OrderKey,
    rest: RunsIter<'a>,
    rank: Option<Rank>,
}

/// State as the order of service sees it.
pub struct Fair<'a> {
    pub state: &'a State,
    overdue_ms: u64,
    /// The beginning of the step that the time is in.
    now: Timestamp,
    /// Places, MiB and thousandths of GPUs that there are.
    capacity: OnceCell<[u64; 3]>,
    /// What was asked before.
    shares: RefCell<Shares>,
}

/// Shares as they were last weighed, in one step of time and of one machine. State keeps them from decision to decision,
/// as only the tenants at work have others each time.
#[derive(Clone, Debug, Default)]
pub struct Shares {
    weighed_in: Option<(Timestamp, [u64; 3])>,
    of: FxHashMap<SmolStr, u64>,
}

impl Shares {
    /// The tenant's account has changed.
    pub fn forget(&mut self, tenant: &str) {
        self.of.remove(tenant);
    }
}

impl<'a> Fair<'a> {
    pub fn new(state: &'a State, settings: &Settings, now: Timestamp) -> Fair<'a> {
        Fair::with(state, settings, now, Shares::default())
    }

    /// The same, with what was weighed before.
    pub fn with(state: &'a State, settings: &Settings, now: Timestamp, shares: Shares) -> Fair<'a> {
        let step_us = step_us(state);
        Fair {
            state,
            overdue_ms: settings
                .ageing_ms_per_level
                .saturating_mul(OVERDUE_LEVELS)
                .max(1),
            now: Timestamp(now.0.div_euclid(step_us).saturating_mul(step_us)),
            capacity: OnceCell::new(),
            shares: RefCell::new(shares),
        }
    }

    /// What was weighed, for the next time.
    pub fn into_shares(self) -> Shares {
        self.shares.into_inner()
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
                front.rank = Some(self.rank(target, front));
            }
        }
        serving
    }

    /// Open shapes, the one to be tried first at the end. A tenant's own are in the order of their first jobs, unless
    /// one is overdue.
    pub fn order(&self, open: BTreeSet<Target>) -> Vec<Target> {
        let mut shapes = Vec::with_capacity(open.len());
        for target in open {
            let first = self.serving(&target).into_first();
            shapes.push((target, first));
        }
        let mut tenants = shapes.iter().filter_map(|(_, first)| tenant_of(first));
        let one = tenants.next();
        let several = tenants.any(|tenant| Some(tenant) != one);
        shapes.sort_by_cached_key(|(target, first)| {
            let place = first.as_ref().map(|front| {
                let turn = several.then(|| self.rank(target, front));
                (turn, front.first)
            });
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
    fn share(&self, tenant: &SmolStr) -> u64 {
        let mut shares = self.shares.borrow_mut();
        let weighed_in = (self.now, *self.capacity());
        if shares.weighed_in != Some(weighed_in) {
            shares.of.clear();
            shares.weighed_in = Some(weighed_in);
        }
        if let Some(share) = shares.of.get(tenant) {
            return *share;
        }
        let share = self.weighed_share(tenant);
        shares.of.insert(tenant.clone(), share);
        share
    }

    fn capacity(&self) -> &[u64; 3] {
        self.capacity.get_or_init(|| capacity(self.state))
    }

    fn weighed_share(&self, tenant: &SmolStr) -> u64 {
        let account = self.state.accounts.tenant(tenant);
        account.map_or(0, |account| {
            self.weighed(tenant, account, account.holding.held)
        })
    }

    /// The same if the tenant held `held` instead of what it does.
    fn weighed(&self, tenant: &SmolStr, account: &Account, held: Amount) -> u64 {
        let usage = account.usage(self.state.accounts.half_life_ms, self.now, held);
        let capacity = self.capacity();
        let dominant = usage.iter().zip(capacity).map(|(used, there)| match there {
            0 => 0,
            there => (u128::from(*used) << 16) / u128::from(*there),
        });
        let dominant = dominant.max().unwrap_or(0);
        let weight = u128::from(self.state.people.weight_of(tenant).max(1));
        u64::try_from(dominant * u128::from(DEFAULT_WEIGHT) / weight).unwrap_or(u64::MAX)
    }

    /// Whether a tenant would not have used more of what it is due than another even after it took `gain` and the
    /// other lost `loss`. So what is taken is not taken back at once.
    pub fn may_take(
        &self,
        (to, gain): (&SmolStr, Amount),
        (from, loss): (&SmolStr, Amount),
    ) -> bool {
        let none = Account::default();
        let account = |tenant: &SmolStr| self.state.accounts.tenant(tenant).unwrap_or(&none);
        let (takes, gives) = (account(to), account(from));
        let after = self.weighed(to, takes, takes.holding.held.plus(gain));
        after < self.weighed(from, gives, gives.holding.held.minus(loss))
    }

    /// Whether a tenant has used less of what it is due than any other that waits for one of `targets` and may be served.
    pub fn is_first_of(&self, tenant: &SmolStr, targets: &[Target]) -> bool {
        let shapes = targets
            .iter()
            .filter_map(|target| self.state.queue.shape(target));
        let mut others = shapes
            .flat_map(Shape::lanes)
            .map(|(lane, _)| lane)
            .filter(|lane| lane.tenant != *tenant && !self.state.is_at_quota(lane));
        others.all(|lane| self.share(tenant) < self.share(&lane.tenant))
    }

    /// Whether whoever has waited for so long comes first for it.
    pub fn is_overdue(&self, waited_ms: u64) -> bool {
        waited_ms >= self.overdue_ms
    }

    fn rank(&self, target: &Target, front: &Front<'a>) -> Rank {
        let job = self.state.jobs.get(&front.first.1);
        let waited_ms = job.map_or(0, |job| {
            let account = self.state.accounts.tenant(&front.lane.tenant);
            let served = account.and_then(|account| account.served.get(target));
            let since = served.map_or(job.queued_at, |at| job.queued_at.max(*at));
            self.now.millis_since(since)
        });
        Rank {
            in_time: !self.is_overdue(waited_ms),
            share: self.share(&front.lane.tenant),
            key: front.first,
        }
    }
}

fn tenant_of<'a>(front: &Option<Front<'a>>) -> Option<&'a SmolStr> {
    front.as_ref().map(|front| &front.lane.tenant)
}

fn front<'a>(key: &'a LaneKey, lane: &'a Lane) -> Option<Front<'a>> {
    let mut rest = lane.waiting.iter();
    Some(Front {
        lane: key,
        first: rest.next()?,
        rest,
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

impl State {
    /// Whether places of a service are on their way: it comes up, or room is made for it.
    pub fn is_coming(&self, service: &Service) -> bool {
        let instance = service.instance.as_ref();
        // Nobody can look for it.
        let is_lost = |i: &Instance| {
            i.phase == InstancePhase::Finding
                && service.spec.worker.is_container()
                && !self.engine.up
        };
        self.holds.contains_key(&service.spec.name)
            || instance.is_some_and(|i| i.is_coming() && !is_lost(i))
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
}
