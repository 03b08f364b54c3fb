//! Tenants: what is said of them, and the quotas of their users.

use smol_str::SmolStr;

use super::Context;
use super::user::Decided;
use crate::domain::event::Event;
use crate::domain::identity::{IdentityRejection, User, UserKey};
use crate::domain::tenant::{
    DEFAULT_TENANT, Quotas, QuotasChange, TenantChange, UserAllowanceChange,
};

/// Tenants at most of which something is said: each costs memory in State.
const MAX_TENANTS: usize = 10_000;

impl Context<'_> {
    /// Says something of a tenant. One that only exists through its users may be created as well as changed.
    pub(super) fn set_tenant(
        &self,
        tenant: SmolStr,
        change: TenantChange,
        create: bool,
    ) -> Decided {
        let people = &self.state.people;
        let known = people.tenants.contains_key(&tenant);
        if create && known {
            return Err(IdentityRejection::TenantExists(tenant));
        }
        let has_users = || tenant == DEFAULT_TENANT || people.users_of(&tenant).next().is_some();
        if !create && !known && !has_users() {
            return Err(IdentityRejection::TenantNotFound);
        }
        if !known {
            self.room_for_tenant()?;
        }
        let old = people.tenant_profile(&tenant);
        let kept = people.tenants.get(&tenant).map(|known| known.allowance);
        let kept = kept.unwrap_or_default();
        let allowance = change.allowance.of(kept);
        let profile = change.of(old.clone());
        if !profile.enabled && tenant == DEFAULT_TENANT {
            return Err(IdentityRejection::TenantProtected);
        }
        let of = || tenant.clone();
        let mut events = match known {
            false => vec![Event::TenantCreated {
                tenant: of(),
                profile,
            }],
            true if profile == old => Vec::new(),
            true => vec![Event::TenantUpdated {
                tenant: of(),
                profile,
            }],
        };
        if allowance != kept {
            events.push(Event::TenantAllowanceChanged { tenant, allowance });
        }
        Ok(events)
    }

    /// Whether something may be said of one tenant more.
    pub(super) fn room_for_tenant(&self) -> Result<(), IdentityRejection> {
        match self.state.people.tenants.len() < MAX_TENANTS {
            true => Ok(()),
            false => Err(IdentityRejection::TooManyTenants(MAX_TENANTS)),
        }
    }

    /// The change of a user's quotas, if it is one.
    pub(super) fn change_quotas(&self, key: &UserKey, change: QuotasChange) -> Option<Event> {
        let old = self.state.people.quotas.get(key).copied();
        let old = old.unwrap_or_default();
        let quotas = change.of(old);
        (quotas != old).then(|| Event::UserQuotasChanged {
            key: key.clone(),
            quotas,
        })
    }

    /// The change of what a user may keep and ask, if it is one.
    pub(super) fn change_allowance(user: &User, change: UserAllowanceChange) -> Option<Event> {
        let allowance = change.of(user.allowance);
        (allowance != user.allowance).then(|| Event::UserAllowanceChanged {
            key: user.key.clone(),
            allowance,
        })
    }

    /// A user that goes leaves no quotas to the next of its name.
    pub(super) fn lift_quotas(&self, key: &UserKey) -> Option<Event> {
        let any = self.state.people.quotas.contains_key(key);
        any.then(|| Event::UserQuotasChanged {
            key: key.clone(),
            quotas: Quotas::default(),
        })
    }
}
