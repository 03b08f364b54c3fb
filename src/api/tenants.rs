//! Tenants, for administrators: their weight in the fair share and their quotas. A tenant's own administrators see
//! theirs and change nothing of it.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use smol_str::SmolStr;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::body::{JsonBody, PathOf};
use super::error::ApiError;
use super::fields::{Fields, TextRule};
use super::guard::Caller;
use super::routes::Routes;
use super::state::App;
use super::users::{id, sees, submit};
use crate::domain::command::Rejection;
use crate::domain::identity::{IdentityCommand, IdentityRejection, sanitised};
use crate::domain::tenant::{
    Allowance, AllowanceChange, DEFAULT_TENANT, MAX_WEIGHT, Quotas, QuotasChange, Tenant,
    TenantChange, TenantProfile, UserAllowance, UserAllowanceChange,
};
use crate::domain::time::Timestamp;
use crate::ledger::{Ledger, ReadError};

/// Longest name.
const MAX_NAME_CHARS: usize = 100;

/// Largest quota: beyond it there is no difference to none.
const MAX_QUOTA: u64 = 1_000_000_000;

/// The routes of this file, under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(list, create))
        .routes(routes!(read, update))
}

/// How much somebody may have at once; null is unlimited.
#[derive(Serialize, ToSchema)]
pub struct QuotasView {
    /// Runs that wait, are paused, preempted or backing off.
    pub queued_runs: Option<u64>,
    /// Runs that hold a place on an instance.
    pub running_runs: Option<u64>,
    /// Whole GPUs under its runs.
    pub gpus: Option<u64>,
    /// MiB of GPU memory under its runs.
    pub vram_mib: Option<u64>,
}

impl From<Quotas> for QuotasView {
    fn from(quotas: Quotas) -> Self {
        QuotasView {
            queued_runs: quotas.queued_runs,
            running_runs: quotas.running_runs,
            gpus: quotas.gpus,
            vram_mib: quotas.vram_mib,
        }
    }
}

/// How much a user may have at once, keep and ask; null is unlimited, or as the settings say.
#[derive(Serialize, ToSchema)]
pub struct UserQuotasView {
    #[serde(flatten)]
    pub of_runs: QuotasView,
    /// Bytes of its runs' payloads, results, progress and checkpoints that are not purged.
    pub ledger_bytes: Option<u64>,
    /// Requests a minute, if that is less than the settings allow each user.
    pub requests_per_minute: Option<u64>,
}

impl UserQuotasView {
    /// `None` where nothing is limited.
    pub fn new(quotas: Quotas, allowance: UserAllowance) -> Option<UserQuotasView> {
        let is_limited = !quotas.is_unlimited() || allowance != UserAllowance::default();
        is_limited.then(|| UserQuotasView {
            of_runs: quotas.into(),
            ledger_bytes: allowance.ledger_bytes,
            requests_per_minute: allowance.requests_per_minute,
        })
    }
}

/// How much a tenant may have at once, keep and ask; null is unlimited.
#[derive(Serialize, ToSchema)]
pub struct TenantQuotasView {
    #[serde(flatten)]
    pub of_runs: QuotasView,
    /// Bytes of its runs' payloads, results, progress and checkpoints that are not purged.
    pub ledger_bytes: Option<u64>,
    /// Requests a minute of all its users together.
    pub requests_per_minute: Option<u64>,
    pub users: Option<u64>,
}

impl TenantQuotasView {
    fn new(quotas: Quotas, allowance: Allowance) -> TenantQuotasView {
        TenantQuotasView {
            of_runs: quotas.into(),
            ledger_bytes: allowance.ledger_bytes,
            requests_per_minute: allowance.requests_per_minute,
            users: allowance.users,
        }
    }
}

/// A tenant.
#[derive(Serialize, ToSchema)]
pub struct TenantView {
    pub tenant_id: String,
    /// For people.
    pub name: String,
    /// Of two tenants that both wait, one of twice the weight gets twice as much.
    pub weight: u32,
    pub quotas: TenantQuotasView,
    /// The users of one that is not are refused.
    pub enabled: bool,
    pub users: u64,
    /// Null for a tenant that only exists through its users.
    #[schema(value_type = Option<String>)]
    pub created_at: Option<Timestamp>,
    #[schema(value_type = Option<String>)]
    pub updated_at: Option<Timestamp>,
}

impl TenantView {
    fn of(tenant: &SmolStr, known: Option<Tenant>, users: u64) -> TenantView {
        let times = known
            .as_ref()
            .map(|known| (known.created_at, known.updated_at));
        let allowance = known.as_ref().map(|known| known.allowance);
        let profile = known.map_or_else(|| TenantProfile::plain(tenant), |known| known.profile);
        TenantView {
            tenant_id: tenant.to_string(),
            name: profile.name,
            weight: profile.weight,
            quotas: TenantQuotasView::new(profile.quotas, allowance.unwrap_or_default()),
            enabled: profile.enabled,
            users,
            created_at: times.map(|(created, _)| created),
            updated_at: times.map(|(_, updated)| updated),
        }
    }
}

/// Tenants.
#[derive(Serialize, ToSchema)]
pub struct TenantList {
    pub tenants: Vec<TenantView>,
}

/// One tenant.
#[derive(Serialize, ToSchema)]
pub struct TenantAnswer {
    pub tenant: TenantView,
}

/// All tenants: those of which something was said, and those that have users.
fn all(ledger: &Ledger) -> Result<Vec<TenantView>, ReadError> {
    let mut users: BTreeMap<SmolStr, u64> = BTreeMap::new();
    for user in ledger.users()? {
        *users.entry(user.key.tenant).or_default() += 1;
    }
    let known = ledger.tenants()?.into_iter();
    let mut known: BTreeMap<SmolStr, Tenant> = known.map(|t| (t.tenant.clone(), t)).collect();
    for tenant in known.keys() {
        users.entry(tenant.clone()).or_default();
    }
    let view = |(tenant, count)| TenantView::of(&tenant, known.remove(&tenant), count);
    Ok(users.into_iter().map(view).collect())
}

/// List tenants.
#[utoipa::path(get, path = "/admin/tenants", tag = "users", responses((status = 200, body = TenantList, example = json!({"tenants": [{"tenant_id": "acme", "name": "Acme Labs", "weight": 200, "quotas": {"queued_runs": 1000, "running_runs": null, "gpus": null, "vram_mib": 49152, "ledger_bytes": 10737418240u64, "requests_per_minute": null, "users": 50}, "enabled": true, "users": 3, "created_at": "2026-11-21T02:00:00.000120+00:00", "updated_at": "2026-11-21T02:00:00.000120+00:00"}]}))))]
async fn list(State(app): State<App>, caller: Caller) -> Result<Json<TenantList>, ApiError> {
    let mut tenants = app.scan(all).await?;
    tenants.retain(|tenant| sees(&caller, &tenant.tenant_id));
    Ok(Json(TenantList { tenants }))
}

/// A tenant that the caller sees; another is as good as none.
pub(super) async fn find(
    app: &App,
    caller: &Caller,
    tenant: &SmolStr,
) -> Result<TenantView, ApiError> {
    let seen = sees(caller, tenant);
    let wanted = tenant.clone();
    let found = app.scan(move |ledger| {
        let known = ledger.tenant(&wanted)?;
        let users = ledger.users()?;
        let users = users
            .iter()
            .filter(|user| user.key.tenant == wanted)
            .count();
        let is_there = known.is_some() || users > 0 || wanted == DEFAULT_TENANT;
        Ok(is_there.then(|| TenantView::of(&wanted, known, users as u64)))
    });
    let none = || ApiError::from(Rejection::from(IdentityRejection::TenantNotFound));
    found.await?.filter(|_| seen).ok_or_else(none)
}

/// A new tenant.
#[derive(Serialize, ToSchema)]
pub struct NewTenant {
    /// Characters outside `[A-Za-z0-9_.@-]` become `_`.
    pub tenant_id: String,
    /// The id when absent.
    pub name: Option<String>,
    /// 1 to 10000; 100 when absent.
    pub weight: Option<u32>,
    pub quotas: Option<TenantQuotasView>,
    pub enabled: Option<bool>,
}

/// Largest number of bytes.
const MAX_QUOTA_BYTES: u64 = 1 << 50;

/// The quotas of users and tenants, and that of tenants only.
const QUOTAS: [&str; 6] = [
    "queued_runs",
    "running_runs",
    "gpus",
    "vram_mib",
    "ledger_bytes",
    "requests_per_minute",
];
const TENANT_QUOTA: &str = "users";

/// The members of a user's `quotas`: a number, or null for unlimited; absent ones stay as they are.
pub fn read_quotas(fields: &Fields) -> (QuotasChange, UserAllowanceChange) {
    let (quotas, allowance) = read_all_quotas(fields, &QUOTAS);
    let AllowanceChange {
        ledger_bytes,
        requests_per_minute,
        users: _,
    } = allowance;
    let allowance = UserAllowanceChange {
        ledger_bytes,
        requests_per_minute,
    };
    (quotas, allowance)
}

/// The same of a tenant's, which has one more.
fn read_tenant_quotas(fields: &Fields) -> (QuotasChange, AllowanceChange) {
    read_all_quotas(fields, &[&QUOTAS[..], &[TENANT_QUOTA]].concat())
}

fn read_all_quotas(fields: &Fields, names: &[&str]) -> (QuotasChange, AllowanceChange) {
    let Some(quotas) = fields.object("quotas") else {
        let whole = fields.is_null("quotas").then_some(None);
        let allowance = AllowanceChange {
            ledger_bytes: whole,
            requests_per_minute: whole,
            users: whole,
        };
        return (all_run_quotas(whole.is_some()), allowance);
    };
    quotas.forbid_others(names);
    let allowance = AllowanceChange {
        ledger_bytes: quota(&quotas, "ledger_bytes", 0..=MAX_QUOTA_BYTES),
        // Who may ask nothing is disabled instead.
        requests_per_minute: quota(&quotas, "requests_per_minute", 1..=MAX_QUOTA),
        users: match names.contains(&TENANT_QUOTA) {
            true => quota(&quotas, TENANT_QUOTA, 0..=MAX_QUOTA),
            false => None,
        },
    };
    (run_quotas(&quotas), allowance)
}

fn run_quotas(quotas: &Fields) -> QuotasChange {
    let quota = |name| quota(quotas, name, 0..=MAX_QUOTA);
    QuotasChange {
        queued_runs: quota("queued_runs"),
        running_runs: quota("running_runs"),
        gpus: quota("gpus"),
        vram_mib: quota("vram_mib"),
    }
}

/// All of them lifted, or none changed.
fn all_run_quotas(lifted: bool) -> QuotasChange {
    let whole = lifted.then_some(None);
    QuotasChange {
        queued_runs: whole,
        running_runs: whole,
        gpus: whole,
        vram_mib: whole,
    }
}

fn quota(quotas: &Fields, name: &str, range: RangeInclusive<u64>) -> Option<Option<u64>> {
    match quotas.is_null(name) {
        true => Some(None),
        false => quotas.int(name, range).map(Some),
    }
}

fn read_change(fields: &Fields) -> TenantChange {
    let weight = fields.int("weight", 1..=u64::from(MAX_WEIGHT));
    let (quotas, allowance) = read_tenant_quotas(fields);
    TenantChange {
        name: fields.text("name", TextRule::name(MAX_NAME_CHARS)),
        weight: weight.and_then(|weight| u32::try_from(weight).ok()),
        quotas,
        allowance,
        enabled: fields.boolean("enabled"),
    }
}

/// Create a tenant, or say something of one that only exists through its users.
#[utoipa::path(post, path = "/admin/tenants", tag = "users",
    request_body(content = NewTenant, example = json!({"tenant_id": "acme", "name": "Acme Labs", "weight": 200, "quotas": {"queued_runs": 1000}})),
    responses((status = 200, body = TenantAnswer, example = json!({"tenant": {"tenant_id": "acme", "name": "Acme Labs", "weight": 200, "quotas": {"queued_runs": 1000, "running_runs": null, "gpus": null, "vram_mib": null, "ledger_bytes": 10737418240u64, "requests_per_minute": null, "users": 50}, "enabled": true, "users": 0, "created_at": "2026-11-21T02:00:00.000120+00:00", "updated_at": "2026-11-21T02:00:00.000120+00:00"}})), (status = 400, description = "Tenant already exists: t")))]
async fn create(
    State(app): State<App>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<TenantAnswer>, ApiError> {
    let (tenant, change) = {
        let fields = body.fields()?;
        fields.forbid_others(&["tenant_id", "name", "weight", "quotas", "enabled"]);
        if !fields.has("tenant_id") {
            fields.missing("tenant_id");
        }
        let tenant = id(&fields, "tenant_id").unwrap_or_default();
        let change = read_change(&fields);
        fields.finish()?;
        (tenant, change)
    };
    set(&app, &caller, tenant, change, true).await
}

async fn set(
    app: &App,
    caller: &Caller,
    tenant: SmolStr,
    change: TenantChange,
    create: bool,
) -> Result<Json<TenantAnswer>, ApiError> {
    caller.about(&tenant);
    let command = IdentityCommand::SetTenant {
        tenant: tenant.clone(),
        change,
        create,
    };
    submit(app, caller, command).await?;
    let tenant = find(app, caller, &tenant).await?;
    Ok(Json(TenantAnswer { tenant }))
}

/// Read a tenant.
#[utoipa::path(get, path = "/admin/tenants/{tenant_id}", tag = "users",
    responses((status = 200, body = TenantAnswer, example = json!({"tenant": {"tenant_id": "acme", "name": "acme", "weight": 100, "quotas": {"queued_runs": null, "running_runs": null, "gpus": null, "vram_mib": null, "ledger_bytes": 10737418240u64, "requests_per_minute": null, "users": 50}, "enabled": true, "users": 3, "created_at": null, "updated_at": null}})), (status = 404, description = "Tenant not found")))]
async fn read(
    State(app): State<App>,
    caller: Caller,
    PathOf(tenant): PathOf<String>,
) -> Result<Json<TenantAnswer>, ApiError> {
    let tenant = find(&app, &caller, &sanitised(&tenant)).await?;
    Ok(Json(TenantAnswer { tenant }))
}

/// Change a tenant. Absent members stay as they are; a quota that is null is lifted.
#[utoipa::path(patch, path = "/admin/tenants/{tenant_id}", tag = "users",
    request_body(content = Object, example = json!({"weight": 200, "quotas": {"running_runs": 8, "gpus": null}, "enabled": true})),
    responses((status = 200, body = TenantAnswer, example = json!({"tenant": {"tenant_id": "acme", "name": "acme", "weight": 200, "quotas": {"queued_runs": null, "running_runs": 8, "gpus": null, "vram_mib": null, "ledger_bytes": 10737418240u64, "requests_per_minute": null, "users": 50}, "enabled": true, "users": 3, "created_at": "2026-11-21T02:00:00.000120+00:00", "updated_at": "2026-11-21T02:00:00.000120+00:00"}})), (status = 404, description = "Tenant not found")))]
async fn update(
    State(app): State<App>,
    caller: Caller,
    PathOf(tenant): PathOf<String>,
    body: JsonBody,
) -> Result<Json<TenantAnswer>, ApiError> {
    let change = {
        let fields = body.fields()?;
        fields.forbid_others(&["name", "weight", "quotas", "enabled"]);
        let change = read_change(&fields);
        fields.finish()?;
        change
    };
    set(&app, &caller, sanitised(&tenant), change, false).await
}
