//! Tenants as things of their own: their weight in the fair share, and how much they and their users may have
//! at once. One that only exists through its users has the defaults.

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::notify::Notify;
use super::time::Timestamp;

/// The tenant of the first administrator; it is always enabled.
pub static DEFAULT_TENANT: SmolStr = SmolStr::new_static("default");

/// The weight of a tenant of which nothing was said.
pub const DEFAULT_WEIGHT: u32 = 100;

/// Largest weight: a thousandth of it is still told apart.
pub const MAX_WEIGHT: u32 = 10_000;

/// How much a tenant or a user may have at once; `None` is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quotas {
    /// Runs that have not ended and hold no place: waiting, paused, preempted or backing off.
    pub queued_runs: Option<u64>,
    /// Runs that hold a place on an instance, those being stopped included.
    pub running_runs: Option<u64>,
    /// Whole GPUs of the instances that its runs work on, each run with its part of its instance.
    pub gpus: Option<u64>,
    /// MiB of GPU memory of those instances, in parts likewise.
    pub vram_mib: Option<u64>,
}

impl Quotas {
    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        *self == Quotas::default()
    }

    /// Whether any of them can make a waiting run wait longer.
    pub fn limits_running(&self) -> bool {
        self.running_runs.is_some() || self.gpus.is_some() || self.vram_mib.is_some()
    }
}

/// A change of quotas: `None` leaves one as it is, `Some(None)` takes the limit away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QuotasChange {
    pub queued_runs: Option<Option<u64>>,
    pub running_runs: Option<Option<u64>>,
    pub gpus: Option<Option<u64>>,
    pub vram_mib: Option<Option<u64>>,
}

impl QuotasChange {
    /// The quotas with the changes made.
    pub fn of(self, old: Quotas) -> Quotas {
        Quotas {
            queued_runs: self.queued_runs.unwrap_or(old.queued_runs),
            running_runs: self.running_runs.unwrap_or(old.running_runs),
            gpus: self.gpus.unwrap_or(old.gpus),
            vram_mib: self.vram_mib.unwrap_or(old.vram_mib),
        }
    }
}

/// How much a tenant may keep, ask and count; `None` is unlimited. Quotas too, apart from `Quotas`, which earlier
/// events hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allowance {
    /// Bytes of payloads, results, progress and checkpoints of its runs that are not purged.
    pub ledger_bytes: Option<u64>,
    /// Requests a minute of all its users together.
    pub requests_per_minute: Option<u64>,
    pub users: Option<u64>,
}

/// A change of it: `None` leaves one as it is, `Some(None)` takes the limit away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AllowanceChange {
    pub ledger_bytes: Option<Option<u64>>,
    pub requests_per_minute: Option<Option<u64>>,
    pub users: Option<Option<u64>>,
}

impl AllowanceChange {
    /// The allowance with the changes made.
    pub fn of(self, old: Allowance) -> Allowance {
        Allowance {
            ledger_bytes: self.ledger_bytes.unwrap_or(old.ledger_bytes),
            requests_per_minute: self.requests_per_minute.unwrap_or(old.requests_per_minute),
            users: self.users.unwrap_or(old.users),
        }
    }
}

/// How much a user may keep and ask; `None` is unlimited, or as the settings say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserAllowance {
    /// As a tenant's: of the runs in its runtime.
    pub ledger_bytes: Option<u64>,
    /// At most what the settings allow each user.
    pub requests_per_minute: Option<u64>,
}

/// A change of it: `None` leaves one as it is, `Some(None)` takes the limit away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UserAllowanceChange {
    pub ledger_bytes: Option<Option<u64>>,
    pub requests_per_minute: Option<Option<u64>>,
}

impl UserAllowanceChange {
    /// The allowance with the changes made.
    pub fn of(self, old: UserAllowance) -> UserAllowance {
        UserAllowance {
            ledger_bytes: self.ledger_bytes.unwrap_or(old.ledger_bytes),
            requests_per_minute: self.requests_per_minute.unwrap_or(old.requests_per_minute),
        }
    }
}

/// What an administrator decides about a tenant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantProfile {
    /// For people.
    pub name: String,
    /// Of two tenants that both wait, one of twice the weight gets twice as much. 1 to `MAX_WEIGHT`.
    pub weight: u32,
    pub quotas: Quotas,
    /// The users of a tenant that is not are refused.
    pub enabled: bool,
}

impl TenantProfile {
    /// Of a tenant about which nothing is said.
    pub fn plain(tenant: &SmolStr) -> TenantProfile {
        TenantProfile {
            name: tenant.to_string(),
            weight: DEFAULT_WEIGHT,
            quotas: Quotas::default(),
            enabled: true,
        }
    }
}

/// What is to become of a tenant; `None` leaves a member as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TenantChange {
    pub name: Option<String>,
    pub weight: Option<u32>,
    pub quotas: QuotasChange,
    pub allowance: AllowanceChange,
    pub enabled: Option<bool>,
}

impl TenantChange {
    /// The profile with the changes made.
    pub fn of(self, old: TenantProfile) -> TenantProfile {
        TenantProfile {
            name: self.name.unwrap_or(old.name),
            weight: self.weight.unwrap_or(old.weight),
            quotas: self.quotas.of(old.quotas),
            enabled: self.enabled.unwrap_or(old.enabled),
        }
    }
}

/// A tenant of which something was said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tenant {
    pub tenant: SmolStr,
    pub profile: TenantProfile,
    pub allowance: Allowance,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    /// Grows whenever it is disabled: the sessions of its users end, and enabling it brings none back.
    pub era: u64,
    pub notify: Notify,
}

/// Whose services somebody deals with: an administrator of the gateway all of them, others their tenant's and the
/// shared ones. `owner` is a service's tenant; a shared service has none, and is the gateway owner's, whose tenant is `default`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tenancy {
    All,
    Of(SmolStr),
}

impl Tenancy {
    /// The only tenant, unless it is all of them.
    pub fn tenant(&self) -> Option<&SmolStr> {
        match self {
            Tenancy::All => None,
            Tenancy::Of(tenant) => Some(tenant),
        }
    }

    /// Whether the service exists for them.
    pub fn sees(&self, owner: Option<&SmolStr>) -> bool {
        owner.is_none() || self.owns(owner)
    }

    /// Whether they start, stop, enable and disable it, once their role allows that.
    pub fn operates(&self, owner: Option<&SmolStr>) -> bool {
        self.owns(Some(owner.unwrap_or(&DEFAULT_TENANT)))
    }

    /// Whether they change and remove it, and read what it wrote: whoever does learns what its jobs bring along, so
    /// that of a shared one this is the administrator's alone.
    pub fn owns(&self, owner: Option<&SmolStr>) -> bool {
        match self {
            Tenancy::All => true,
            Tenancy::Of(tenant) => owner == Some(tenant),
        }
    }
}

/// Whose quota it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Holder {
    #[error("tenant '{0}'")]
    Tenant(SmolStr),
    #[error("user '{0}'")]
    User(SmolStr),
}

/// A quota that leaves no room for more. `Display` is what the caller reads.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{holder} has {used} of {limit} {unit} (quota {quota})")]
pub struct QuotaHit {
    pub holder: Holder,
    /// Its name on the wire.
    pub quota: &'static str,
    pub unit: &'static str,
    pub limit: u64,
    pub used: u64,
}

impl QuotaHit {
    /// What makes room within it.
    pub fn remedy(&self) -> &'static str {
        match self.quota {
            "ledger_bytes" => "purge ended runs",
            "users" => "delete one",
            _ => "wait until some have started or ended",
        }
    }
}
