//! Quotas: which lanes have to wait for them, and which services they leave to a lane's jobs.

use std::borrow::Cow;

use smol_str::SmolStr;

use super::queue::LaneKey;
use crate::domain::ids::PlaneId;
use crate::domain::spec::{Priority, Target};
use crate::domain::state::State;
use crate::domain::state::account::{Amount, Holding};
use crate::domain::state::service::Service;
use crate::domain::tenant::{Holder, QuotaHit, Quotas};

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
