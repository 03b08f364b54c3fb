//! Which tenant a plane belongs to, what its runs amount to, and how events change tenants' and users' quotas.

use std::collections::BTreeSet;

use smol_str::SmolStr;

use super::State;
use super::account::{Account, Amount};
use super::job::{Job, Phase};
use super::user::People;
use crate::domain::event::Event;
use crate::domain::identity::{User, UserKey};
use crate::domain::ids::{PlaneId, RunId};
use crate::domain::notify::Notify;
use crate::domain::scheduler::fair::Shares;
use crate::domain::spec::Target;
use crate::domain::tenant::{DEFAULT_TENANT, DEFAULT_WEIGHT, Holder, QuotaHit, TenantProfile};
use crate::domain::time::Timestamp;

impl People {
    /// A tenant's weight in the fair share.
    pub fn weight_of(&self, tenant: &str) -> u32 {
        let tenant = self.tenants.get(tenant);
        tenant.map_or(DEFAULT_WEIGHT, |tenant| tenant.profile.weight)
    }

    /// Where a tenant is told of its runs; `None` where nothing was ever said of the tenant.
    pub fn notify_of(&self, tenant: &str) -> Option<&Notify> {
        self.tenants.get(tenant).map(|tenant| &tenant.notify)
    }

    /// What was decided about a tenant, or the defaults.
    pub fn tenant_profile(&self, tenant: &SmolStr) -> TenantProfile {
        let known = self.tenants.get(tenant);
        known.map_or_else(
            || TenantProfile::plain(tenant),
            |known| known.profile.clone(),
        )
    }
}

impl State {
    /// Whose a plane is.
    pub fn tenant_of(&self, plane: PlaneId) -> &SmolStr {
        let plane = self.planes.get(&plane);
        plane.map_or(&DEFAULT_TENANT, |plane| &plane.tenant)
    }

    /// Whether a plane takes anything in: it was not purged.
    pub fn is_open(&self, plane: PlaneId) -> bool {
        plane == PlaneId::ROOT || self.planes.contains_key(&plane)
    }

    /// Whether anybody has quotas that a waiting run may have to wait for.
    pub fn is_limited(&self) -> bool {
        self.limited
    }

    /// What a run of a plane holds becomes another amount: whose turn it is may change, and who is at a quota.
    pub(super) fn change_holding(
        &mut self,
        plane: PlaneId,
        before: Amount,
        after: Amount,
        at: Timestamp,
    ) {
        if before == after {
            return;
        }
        let tenant = self.tenant_of(plane).clone();
        self.accounts.hold((&tenant, plane), (before, after), at);
        self.shares.forget(&tenant);
        match self.limited {
            true => self.queue.unpark_all(),
            false => self.queue.unpark_shared(),
        }
    }

    /// Counts a run that begins to live, or has ended.
    pub(super) fn count_live(&mut self, plane: PlaneId, begins: bool) {
        let tenant = self.tenant_of(plane).clone();
        match begins {
            true => self.accounts.begin(&tenant, plane),
            false => self.accounts.end(&tenant, plane),
        }
    }

    /// Counts what a record keeps of its run's bytes. Beside `apply`, since a record knows its length and the event
    /// does not.
    pub(super) fn keep(&mut self, plane: PlaneId, event: &Event, payload_bytes: u64) {
        if payload_bytes > 0 && event.run().is_some() {
            let tenant = self.tenant_of(plane).clone();
            self.accounts.keep(&tenant, payload_bytes);
            if let Some(plane) = self.planes.get_mut(&plane) {
                plane.kept_bytes = plane.kept_bytes.saturating_add(payload_bytes);
            }
        }
    }

    pub(super) fn give_back(&mut self, plane: PlaneId, bytes: u64) {
        let tenant = self.tenant_of(plane).clone();
        self.accounts.give_back(&tenant, bytes);
        if let Some(plane) = self.planes.get_mut(&plane) {
            plane.kept_bytes = plane.kept_bytes.saturating_sub(bytes);
        }
    }

    /// The quota that forbids to keep so many bytes more: the user's, or the tenant's.
    pub fn ledger_hit(&self, plane: PlaneId, bytes: usize) -> Option<QuotaHit> {
        let hit = |holder, limit, used: u64| {
            (used.saturating_add(bytes as u64) > limit).then_some(QuotaHit {
                holder,
                quota: "ledger_bytes",
                unit: "bytes in the ledger",
                limit,
                used,
            })
        };
        if let Some((user, limit)) = self.byte_limits.get(&plane) {
            let used = self.planes.get(&plane).map_or(0, |plane| plane.kept_bytes);
            if let Some(hit) = hit(Holder::User(user.user.clone()), *limit, used) {
                return Some(hit);
            }
        }
        let tenant = self.tenant_of(plane);
        let limit = self.people.tenants.get(tenant)?.allowance.ledger_bytes?;
        let account = self.accounts.tenant(tenant);
        let used = account.map_or(0, |account| account.kept_bytes);
        hit(Holder::Tenant(tenant.clone()), limit, used)
    }

    /// The quota that forbids a tenant one user more.
    pub fn users_hit(&self, tenant: &SmolStr) -> Option<QuotaHit> {
        let limit = self.people.tenants.get(tenant)?.allowance.users?;
        let used = self.people.users_of(tenant).count() as u64;
        (used >= limit).then(|| QuotaHit {
            holder: Holder::Tenant(tenant.clone()),
            quota: "users",
            unit: "users",
            limit,
            used,
        })
    }

    /// A run was dispatched: its tenant has been served.
    pub(super) fn serve(&mut self, plane: PlaneId, target: &Target, charge: Amount, at: Timestamp) {
        let tenant = self.tenant_of(plane).clone();
        let waits = self.awaits(&tenant, target);
        self.accounts.serve(&tenant, target, charge, at, waits);
        self.shares.forget(&tenant);
    }

    /// Milliseconds at `at` since a run was queued, or its tenant was served with one like it.
    pub(super) fn waited_ms(&self, job: &Job, at: Timestamp) -> u64 {
        let account = self.accounts.tenant(self.tenant_of(job.plane));
        let served = account.and_then(|account| account.served.get(&job.spec.target));
        at.millis_since(served.map_or(job.queued_at, |served| job.queued_at.max(*served)))
    }

    /// The last run of a tenant that waited for this may be gone, and not only to come back at once.
    pub(super) fn forget_served(&mut self, plane: PlaneId, target: &Target) {
        let tenant = self.tenant_of(plane);
        let known = |account: &Account| account.served.contains_key(target);
        if self.accounts.tenant(tenant).is_some_and(known) && !self.awaits(tenant, target) {
            let tenant = tenant.clone();
            self.accounts.forget_served(&tenant, target);
        }
    }

    fn awaits(&self, tenant: &SmolStr, target: &Target) -> bool {
        let shape = self.queue.shape(target);
        shape.is_some_and(|shape| shape.awaits(tenant))
    }

    /// Applies an event about people or tenants.
    pub(super) fn apply_tenancy(&mut self, at: Timestamp, event: &Event) {
        if let Event::ShareHalfLifeChanged { half_life_ms } = event {
            self.accounts.set_half_life(*half_life_ms, at);
            self.shares = Shares::default();
            self.queue.unpark_all();
        }
        self.people.apply(event, at);
        match event {
            Event::TenantCreated { .. } | Event::TenantUpdated { .. } => self.limits_changed(),
            Event::UserCreated { key, .. }
            | Event::UserUpdated { key, .. }
            | Event::UserDeleted { key }
            | Event::UserQuotasChanged { key, .. } => self.user_limits_changed(key),
            _ => {}
        }
        if let Event::UserUpdated { key, .. }
        | Event::UserDeleted { key }
        | Event::UserAllowanceChanged { key, .. } = event
        {
            self.byte_limits.retain(|_, (of, _)| of != key);
            let user = self.people.users.get(key);
            self.byte_limits.extend(user.and_then(byte_limit));
        }
    }

    /// Makes the indexes of quotas anew.
    pub(super) fn index_limits(&mut self) {
        let people = &self.people;
        let limits = people.quotas.iter().filter_map(|(key, quotas)| {
            let plane = people.users.get(key)?.plane;
            Some((plane, (key.clone(), *quotas)))
        });
        self.user_limits = limits.collect();
        self.byte_limits = people.users.values().filter_map(byte_limit).collect();
        self.limits_changed();
    }

    fn limits_changed(&mut self) {
        let mut tenants = self.people.tenants.values();
        let mut users = self.user_limits.values();
        self.limited = tenants.any(|tenant| tenant.profile.quotas.limits_running())
            || users.any(|(_, quotas)| quotas.limits_running());
        self.shares = Shares::default();
        self.queue.unpark_all();
    }

    /// A user's quotas or plane may have changed. Its waiting runs change lanes with them, which takes a look at
    /// all live runs; administrators do this rarely.
    fn user_limits_changed(&mut self, key: &UserKey) {
        let quotas = self.people.quotas.get(key).copied();
        let now = quotas.and_then(|quotas| Some((self.people.users.get(key)?.plane, quotas)));
        let mut before = self.user_limits.iter().filter(|(_, (of, _))| of == key);
        let before = before.next().map(|(plane, (_, quotas))| (*plane, *quotas));
        if before == now {
            return;
        }
        let planes = [before, now].into_iter().flatten().map(|(plane, _)| plane);
        let planes: BTreeSet<PlaneId> = planes.collect();
        let mut waiting: Vec<RunId> = self
            .jobs
            .iter()
            .filter(|(_, job)| matches!(job.phase, Phase::Queued) && planes.contains(&job.plane))
            .map(|(run, _)| *run)
            .collect();
        waiting.sort_unstable();
        let waiting: Vec<(RunId, Box<Job>)> = waiting
            .into_iter()
            .filter_map(|run| Some((run, self.unindex_job(run)?)))
            .collect();
        if let Some((plane, _)) = before {
            self.user_limits.remove(&plane);
        }
        if let Some((plane, quotas)) = now {
            self.user_limits.insert(plane, (key.clone(), quotas));
        }
        for (run, job) in waiting {
            self.index_job(run, job);
        }
        self.limits_changed();
    }
}

/// How many bytes a user may keep, by its plane.
fn byte_limit(user: &User) -> Option<(PlaneId, (UserKey, u64))> {
    Some((user.plane, (user.key.clone(), user.allowance.ledger_bytes?)))
}
