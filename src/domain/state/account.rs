//! What tenants and users have now, and what tenants had lately: the figures of quotas and of the fair share.
//!
//! A tenant's usage is its average over the past, recent times counting more: `average' = rate − average`, so that what
//! was used one half-life ago counts half. Between two events of a tenant its rate is constant, so the average needs to
//! be brought up to date only then, and can be told for any later time. Whole numbers throughout: a replay gives the
//! same bits.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::service::Service;
use crate::domain::ids::PlaneId;
use crate::domain::spec::Target;
use crate::domain::time::Timestamp;

/// Half-life of usage until a `ShareHalfLifeChanged` says otherwise, in milliseconds.
pub const DEFAULT_HALF_LIFE_MS: u64 = 3_600_000;

/// Fraction bits of averages: a millisecond of one place is told from nothing even with a half-life of a month.
pub const FRACTION_BITS: u32 = 32;

/// What each dispatch counts as at least, in milliseconds: many short runs are no way to get more.
const MIN_CHARGE_MS: u64 = 100;

/// What is held now counts as this part of the same on average: enough to tell tenants apart before their averages
/// do, and little enough that these decide in the long run, also where places are few.
const HELD_PARTS: u64 = 8;

/// What runs hold of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amount {
    /// Places on instances, one for each run.
    pub places: u64,
    /// MiB of GPU memory.
    pub vram_mib: u64,
    /// Thousandths of whole GPUs.
    pub gpus_milli: u64,
}

impl Amount {
    /// What one run on `service` holds: one place, and that part of an instance's need of GPUs.
    pub fn of_run(service: &Service) -> Amount {
        let places = u64::from(service.spec.concurrency.max(1));
        let gpus = u64::from(service.spec.gpus);
        let vram_mib = match service.spec.needs_gpu() {
            true => service.need_mib().saturating_mul(gpus.max(1)),
            false => 0,
        };
        Amount {
            places: 1,
            vram_mib: vram_mib.div_ceil(places),
            gpus_milli: (gpus * 1_000).div_ceil(places),
        }
    }

    /// Each member by `f`.
    fn zip(self, other: Amount, f: impl Fn(u64, u64) -> u64) -> Amount {
        Amount {
            places: f(self.places, other.places),
            vram_mib: f(self.vram_mib, other.vram_mib),
            gpus_milli: f(self.gpus_milli, other.gpus_milli),
        }
    }

    pub fn plus(self, other: Amount) -> Amount {
        self.zip(other, u64::saturating_add)
    }

    pub fn minus(self, other: Amount) -> Amount {
        self.zip(other, u64::saturating_sub)
    }

    fn members(self) -> [u64; 3] {
        [self.places, self.vram_mib, self.gpus_milli]
    }
}

/// What is live of a tenant or of a user's plane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// Runs that have not ended.
    pub live: u64,
    /// What those with a place hold.
    pub held: Amount,
}

impl Holding {
    /// Live runs without a place.
    pub fn queued(&self) -> u64 {
        self.live.saturating_sub(self.held.places)
    }
}

/// A tenant's holding, its past, and when it was served.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    pub holding: Holding,
    /// Bytes of its runs' payloads, results, progress and checkpoints that are not purged.
    pub kept_bytes: u64,
    /// Places, MiB and thousandths of GPUs, averaged; with `FRACTION_BITS`.
    average: [u64; 3],
    /// As of then.
    at: Timestamp,
    /// When a run of it was last dispatched, of each shape that it still waits for.
    pub served: BTreeMap<Target, Timestamp>,
}

impl Account {
    /// What it held on average and, added to it, a part of `held`, which is what it holds or might hold, at `now`; with
    /// `FRACTION_BITS`. Places, MiB, thousandths of GPUs.
    pub fn usage(&self, half_life_ms: u64, now: Timestamp, held: Amount) -> [u64; 3] {
        let averages = self.averages(half_life_ms, now);
        let held = held.members().map(fixed);
        std::array::from_fn(|i| averages[i].saturating_add(held[i] / HELD_PARTS))
    }

    fn averages(&self, half_life_ms: u64, now: Timestamp) -> [u64; 3] {
        let kept = kept(now - self.at, half_life_ms);
        let rates = self.holding.held.members().map(fixed);
        std::array::from_fn(|i| approach(self.average[i], rates[i], kept))
    }

    /// Brings the average up to date.
    fn settle(&mut self, half_life_ms: u64, now: Timestamp) {
        self.average = self.averages(half_life_ms, now);
        self.at = self.at.max(now);
    }
}

/// All accounts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accounts {
    pub half_life_ms: u64,
    tenants: BTreeMap<SmolStr, Account>,
    /// Of planes with live runs.
    planes: BTreeMap<PlaneId, Holding>,
}

impl Default for Accounts {
    fn default() -> Self {
        Accounts {
            half_life_ms: DEFAULT_HALF_LIFE_MS,
            tenants: BTreeMap::new(),
            planes: BTreeMap::new(),
        }
    }
}

impl Accounts {
    pub fn tenant(&self, tenant: &str) -> Option<&Account> {
        self.tenants.get(tenant)
    }

    /// What is live of a user's plane.
    pub fn plane(&self, plane: PlaneId) -> Holding {
        self.planes.get(&plane).copied().unwrap_or_default()
    }

    /// From now on the past fades at another pace; what it amounts to so far stays.
    pub fn set_half_life(&mut self, half_life_ms: u64, at: Timestamp) {
        for account in self.tenants.values_mut() {
            account.settle(self.half_life_ms, at);
        }
        self.half_life_ms = half_life_ms.max(1);
    }

    /// A run of the plane begins to live.
    pub(super) fn begin(&mut self, tenant: &SmolStr, plane: PlaneId) {
        self.account(tenant).holding.live += 1;
        self.planes.entry(plane).or_default().live += 1;
    }

    /// A run of the plane has ended; it holds nothing any more.
    pub(super) fn end(&mut self, tenant: &SmolStr, plane: PlaneId) {
        let account = self.account(tenant);
        account.holding.live = account.holding.live.saturating_sub(1);
        self.change_plane(plane, |holding| {
            holding.live = holding.live.saturating_sub(1);
        });
    }

    /// What one of the plane's runs holds becomes `after` instead of `before`.
    pub(super) fn hold(
        &mut self,
        (tenant, plane): (&SmolStr, PlaneId),
        (before, after): (Amount, Amount),
        at: Timestamp,
    ) {
        let half_life_ms = self.half_life_ms;
        let account = self.account(tenant);
        account.settle(half_life_ms, at);
        account.holding.held = account.holding.held.minus(before).plus(after);
        self.change_plane(plane, |holding| {
            holding.held = holding.held.minus(before).plus(after);
        });
    }

    /// A run was dispatched: the least that it counts, and when its tenant was served. `waits` tells whether more
    /// of the tenant's runs wait for the same.
    pub(super) fn serve(
        &mut self,
        tenant: &SmolStr,
        target: &Target,
        charge: Amount,
        at: Timestamp,
        waits: bool,
    ) {
        let half_life_ms = self.half_life_ms;
        let account = self.account(tenant);
        for (average, member) in account.average.iter_mut().zip(charge.members()) {
            *average = average.saturating_add(least_charge(member, half_life_ms));
        }
        if waits {
            account.served.insert(target.clone(), at);
        } else {
            account.served.remove(target);
        }
    }

    /// So many bytes more are kept of the tenant's runs.
    pub(super) fn keep(&mut self, tenant: &SmolStr, bytes: u64) {
        let account = self.account(tenant);
        account.kept_bytes = account.kept_bytes.saturating_add(bytes);
    }

    /// So many bytes are kept no more.
    pub(super) fn give_back(&mut self, tenant: &SmolStr, bytes: u64) {
        let account = self.account(tenant);
        account.kept_bytes = account.kept_bytes.saturating_sub(bytes);
    }

    /// No run of the tenant waits for this any more.
    pub(super) fn forget_served(&mut self, tenant: &str, target: &Target) {
        if let Some(account) = self.tenants.get_mut(tenant) {
            account.served.remove(target);
        }
    }

    fn account(&mut self, tenant: &SmolStr) -> &mut Account {
        if !self.tenants.contains_key(tenant) {
            self.tenants.insert(tenant.clone(), Account::default());
        }
        self.tenants.entry(tenant.clone()).or_default()
    }

    fn change_plane(&mut self, plane: PlaneId, change: impl FnOnce(&mut Holding)) {
        let holding = self.planes.entry(plane).or_default();
        change(holding);
        if *holding == Holding::default() {
            self.planes.remove(&plane);
        }
    }
}

/// A whole number with `FRACTION_BITS`.
fn fixed(value: u64) -> u64 {
    value.min(u64::MAX >> FRACTION_BITS) << FRACTION_BITS
}

/// What a dispatch adds to an average at least: as if it had been held for `MIN_CHARGE_MS`.
fn least_charge(member: u64, half_life_ms: u64) -> u64 {
    /// ln 2 in millionths.
    const LN_2: u128 = 693_147;
    let charge = u128::from(fixed(member)) * u128::from(MIN_CHARGE_MS) * LN_2;
    let charge = charge / 1_000_000 / u128::from(half_life_ms.max(1));
    u64::try_from(charge)
        .unwrap_or(u64::MAX)
        .max(u64::from(member > 0))
}

/// One, as `kept` counts.
const ONE: u64 = 1 << 62;

/// 2^(−1/2), 2^(−1/4), 2^(−1/8), …, each in parts of `ONE`.
const ROOTS: [u64; 32] = roots();

const fn roots() -> [u64; 32] {
    let mut roots = [0; 32];
    let mut last = (ONE / 2) as u128;
    let mut i = 0;
    while i < roots.len() {
        last = (last << 62).isqrt();
        roots[i] = last as u64;
        i += 1;
    }
    roots
}

/// The part of the past that still counts after `us` microseconds, in parts of `ONE`: 2^(−us / half-life).
fn kept(us: i64, half_life_ms: u64) -> u64 {
    let us = u128::from(us.max(0).unsigned_abs());
    let half_life_us = u128::from(half_life_ms.max(1)) * 1_000;
    let whole = us / half_life_us;
    if whole >= 62 {
        return 0;
    }
    let part = ((us % half_life_us) << 32) / half_life_us;
    let mut kept = ONE;
    for (i, root) in ROOTS.iter().enumerate() {
        if part >> (31 - i) & 1 == 1 {
            kept = ((u128::from(kept) * u128::from(*root)) >> 62) as u64;
        }
    }
    kept >> whole
}

/// Where an average has come that approaches `rate`, when `kept` of the difference is left.
fn approach(average: u64, rate: u64, kept: u64) -> u64 {
    let left = ((i128::from(average) - i128::from(rate)) * i128::from(kept)) >> 62;
    u64::try_from(i128::from(rate) + left).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_past_counts_half_after_each_half_life() {
        let hour = 3_600_000;
        for (ms, expected) in [
            (0, 1.0),
            (hour, 0.5),
            (hour / 2, 0.5f64.sqrt()),
            (3 * hour, 0.125),
        ] {
            let part = kept(i64::try_from(ms * 1_000).unwrap(), hour) as f64 / ONE as f64;
            assert!((part - expected).abs() < 1e-9, "{ms} ms: {part}");
        }
        assert_eq!(kept(i64::MAX, 1), 0);
        assert_eq!(kept(-5, hour), ONE);
    }

    #[test]
    fn an_average_approaches_what_is_held_and_fades_when_it_is_given_back() {
        let (tenant, plane, hour) = (SmolStr::new_static("t"), PlaneId(1), 3_600_000);
        let one = Amount {
            places: 1,
            ..Amount::default()
        };
        let mut accounts = Accounts::default();
        accounts.begin(&tenant, plane);
        accounts.hold((&tenant, plane), (Amount::default(), one), Timestamp(0));
        let at = Timestamp::from_millis(hour);
        let used = |accounts: &Accounts, at| {
            let account = accounts.tenant("t").unwrap();
            account.usage(3_600_000, at, account.holding.held)[0]
        };
        assert_eq!(used(&accounts, at), fixed(1) / 8 + fixed(1) / 2);
        accounts.hold((&tenant, plane), (one, Amount::default()), at);
        accounts.end(&tenant, plane);
        let later = Timestamp::from_millis(2 * hour);
        assert_eq!(used(&accounts, later), fixed(1) / 4);
        assert_eq!(accounts.plane(plane), Holding::default());
        assert!(accounts.planes.is_empty());
    }

    #[test]
    fn a_dispatch_counts_however_short_it_is() {
        let tenant = SmolStr::new_static("t");
        let one = Amount {
            places: 1,
            ..Amount::default()
        };
        let mut accounts = Accounts::default();
        let target = Target::Type("x".into());
        accounts.serve(&tenant, &target, one, Timestamp(5), true);
        let account = accounts.tenant("t").unwrap();
        assert!(account.usage(3_600_000, Timestamp(0), Amount::default())[0] > 0);
        assert_eq!(account.served.get(&target), Some(&Timestamp(5)));
        accounts.forget_served("t", &target);
        assert!(accounts.tenant("t").unwrap().served.is_empty());
    }
}
