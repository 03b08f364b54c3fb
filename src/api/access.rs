//! What each route needs: the one place that says which role and which scope. A route without a line here is
//! the administrator's alone, and fails a test.

use std::sync::LazyLock;

use http::Method;
use rustc_hash::FxHashMap;

use super::error::{ApiError, ErrorCode};
use crate::auth::Principal;
use crate::domain::identity::{Role, Scope};
use crate::domain::tenant::DEFAULT_TENANT;

/// What a caller must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing: no credentials are asked for.
    Open,
    /// A valid token of any kind.
    Anyone,
    /// This role or a higher one, and a token with this scope.
    Role(Role, Scope),
    /// About what one logs in with: a session, or a token with all scopes.
    Own,
    /// The same in `default`, the gateway owner's tenant, or the administrator's role: about the machine as a whole.
    Machine(Role, Scope),
}

const READ_RUNS: Need = Need::Role(Role::Viewer, Scope::RunsRead);
const WRITE_RUNS: Need = Need::Role(Role::User, Scope::RunsWrite);
const READ_SERVICES: Need = Need::Role(Role::Viewer, Scope::ServicesRead);
const OPERATE: Need = Need::Role(Role::Operator, Scope::ServicesWrite);
/// What services wrote: not for everyone, yet nothing is changed.
const INSPECT: Need = Need::Role(Role::Operator, Scope::ServicesRead);
/// Numbers of all planes, and names of services.
const WATCH_MACHINE: Need = Need::Machine(Role::Operator, Scope::ServicesRead);
const READ_LEDGER: Need = Need::Role(Role::Admin, Scope::LedgerRead);
/// Of their own tenant; administrators, of all.
const READ_AUDIT: Need = Need::Role(Role::TenantAdmin, Scope::LedgerRead);
/// What one logs in with: tokens, password, sessions.
const OWN_TOKENS: Need = Need::Own;
const MANAGE_USERS: Need = Need::Role(Role::TenantAdmin, Scope::All);
const MANAGE_GATEWAY: Need = Need::Role(Role::Admin, Scope::All);

/// Method, path and need. Paths of the gateway API stand without `/api/gateway`, and so hold for the dialect at
/// the root too.
pub const NEEDS: &[(&str, &str, Need)] = &[
    ("GET", "/health", Need::Open),
    ("GET", "/api/health", Need::Open),
    ("GET", "/livez", Need::Open),
    ("GET", "/readyz", Need::Open),
    ("GET", "/.well-known/jwks.json", Need::Open),
    ("GET", "/ping", Need::Anyone),
    ("GET", "/me", Need::Anyone),
    ("GET", "/metrics", WATCH_MACHINE),
    // Runs of the caller's plane.
    ("POST", "/runs/start", WRITE_RUNS),
    ("GET", "/runs", READ_RUNS),
    ("GET", "/runs/{run_id}", READ_RUNS),
    ("GET", "/runs/{run_id}/input_data", READ_RUNS),
    ("GET", "/runs/{run_id}/why", READ_RUNS),
    ("POST", "/runs/{run_id}/purge", WRITE_RUNS),
    ("GET", "/runs/{run_id}/output", READ_RUNS),
    ("GET", "/runs/{run_id}/output/content", READ_RUNS),
    ("GET", "/runs/{run_id}/ledger", READ_RUNS),
    ("GET", "/runs/{run_id}/ledger/stream", READ_RUNS),
    ("POST", "/runs/ledger/batch", READ_RUNS),
    ("GET", "/runs/{run_id}/checkpoint", READ_RUNS),
    ("PUT", "/runs/{run_id}/checkpoint", WRITE_RUNS),
    ("POST", "/commands", WRITE_RUNS),
    ("GET", "/commands/{command_id}", READ_RUNS),
    ("GET", "/plane/ledger/stream", READ_RUNS),
    ("POST", "/queue/submit", WRITE_RUNS),
    ("GET", "/queue/{job_id}", READ_RUNS),
    ("DELETE", "/queue/{job_id}", WRITE_RUNS),
    ("GET", "/queue/{job_id}/progress", READ_RUNS),
    ("POST", "/queue/{job_id}/progress", WRITE_RUNS),
    ("GET", "/preempt/check/{service}", READ_RUNS),
    ("POST", "/preempt/execute", WRITE_RUNS),
    ("POST", "/preempt/release/{service}", WRITE_RUNS),
    // Services, one's tenant's and the shared ones, and GPUs. `service_owner` says which of them one may change.
    ("GET", "/queue/stats", READ_SERVICES),
    ("GET", "/gpu", READ_SERVICES),
    ("GET", "/vram", READ_SERVICES),
    ("GET", "/gpu/samples", READ_SERVICES),
    ("GET", "/gpu/history", READ_SERVICES),
    ("POST", "/gpu/{uuid}/release", MANAGE_GATEWAY),
    ("GET", "/available/{service_type}", READ_SERVICES),
    ("GET", "/services", READ_SERVICES),
    ("GET", "/services/{name}", READ_SERVICES),
    ("GET", "/services/{name}/logs", INSPECT),
    ("POST", "/services/register", OPERATE),
    ("PUT", "/services/{name}", OPERATE),
    ("DELETE", "/services/{name}", OPERATE),
    ("POST", "/services/{name}/enable", OPERATE),
    ("POST", "/services/{name}/disable", OPERATE),
    ("POST", "/services/{name}/start", OPERATE),
    ("POST", "/services/{name}/stop", OPERATE),
    ("POST", "/services/{name}/restart", OPERATE),
    // The whole gateway.
    ("GET", "/containers", READ_LEDGER),
    ("GET", "/ledger", READ_LEDGER),
    ("GET", "/ledger/stream", READ_LEDGER),
    ("GET", "/ledger/verify", READ_LEDGER),
    ("GET", "/ledger/stats", READ_LEDGER),
    ("GET", "/ledger/export", READ_LEDGER),
    ("POST", "/admin/signing-keys/rotate", MANAGE_GATEWAY),
    ("GET", "/ledger/checkpoint", READ_LEDGER),
    ("GET", "/audit", READ_AUDIT),
    ("GET", "/audit/tail", READ_LEDGER),
    // People.
    ("POST", "/session/login", Need::Open),
    ("POST", "/session/logout", Need::Anyone),
    ("GET", "/sessions", OWN_TOKENS),
    ("DELETE", "/sessions/{session_id}", OWN_TOKENS),
    ("POST", "/me/password", OWN_TOKENS),
    ("POST", "/admin/users/{user_id}/password", MANAGE_USERS),
    ("GET", "/tokens", OWN_TOKENS),
    ("POST", "/tokens", OWN_TOKENS),
    ("DELETE", "/tokens/{token_id}", OWN_TOKENS),
    ("GET", "/admin/users", MANAGE_USERS),
    ("POST", "/admin/users", MANAGE_USERS),
    ("POST", "/admin/users/import", MANAGE_GATEWAY),
    ("GET", "/admin/users/{user_id}", MANAGE_USERS),
    ("PATCH", "/admin/users/{user_id}", MANAGE_USERS),
    ("DELETE", "/admin/users/{user_id}", MANAGE_USERS),
    ("GET", "/admin/tenants", MANAGE_USERS),
    ("POST", "/admin/tenants", MANAGE_GATEWAY),
    ("GET", "/admin/tenants/{tenant_id}", MANAGE_USERS),
    ("PATCH", "/admin/tenants/{tenant_id}", MANAGE_GATEWAY),
    ("GET", "/admin/tenants/{tenant_id}/notify", MANAGE_USERS),
    ("PUT", "/admin/tenants/{tenant_id}/notify", MANAGE_USERS),
    (
        "POST",
        "/admin/tenants/{tenant_id}/notify/test",
        MANAGE_USERS,
    ),
    ("GET", "/admin/runtime-reservations", MANAGE_GATEWAY),
    (
        "POST",
        "/admin/runtime-reservations/{runtime_id}/transfer",
        MANAGE_GATEWAY,
    ),
    (
        "POST",
        "/admin/runtime-reservations/{runtime_id}/purge",
        MANAGE_GATEWAY,
    ),
];

/// What a route needs; `path` is the route's pattern.
pub fn need(method: &Method, path: &str) -> Need {
    let path = path.strip_prefix("/api/gateway").unwrap_or(path);
    // A HEAD is answered by the GET.
    let method = match *method {
        Method::HEAD => "GET",
        ref other => other.as_str(),
    };
    let Some(methods) = BY_PATH.get(path) else {
        return MANAGE_GATEWAY;
    };
    let line = methods.iter().find(|(of, _)| *of == method);
    // A path of ours without this method is answered 405, whoever asks.
    line.map_or(Need::Anyone, |(_, need)| *need)
}

/// `NEEDS` by path, as every request asks for one.
static BY_PATH: LazyLock<FxHashMap<&str, Vec<(&str, Need)>>> = LazyLock::new(|| {
    let mut paths: FxHashMap<&str, Vec<(&str, Need)>> = FxHashMap::default();
    for (method, path, need) in NEEDS {
        paths.entry(path).or_default().push((method, *need));
    }
    paths
});

/// Whether a principal has what is needed.
pub fn grants(need: Need, principal: &Principal) -> bool {
    match need {
        Need::Open | Need::Anyone => true,
        Need::Own => principal.is_whole(),
        Need::Role(role, scope) | Need::Machine(role, scope) => {
            lacking(need, role, principal).is_none() && principal.has_scope(scope)
        }
    }
}

/// The role that a caller would have to have.
fn lacking(need: Need, role: Role, principal: &Principal) -> Option<Role> {
    let power = principal.power();
    if power < role {
        return Some(role);
    }
    let is_owners = power == Role::Admin || principal.user.tenant == DEFAULT_TENANT;
    (matches!(need, Need::Machine(..)) && !is_owners).then_some(Role::Admin)
}

/// Lets a caller pass, or says what it lacks (`contracts/run-gateway.md` section 2, row 9).
pub fn check(
    need: Need,
    principal: &Principal,
    method: &Method,
    path: &str,
) -> Result<(), ApiError> {
    if need == Need::Own && !principal.is_whole() {
        return Err(lacks_scope(Scope::All, method, path));
    }
    let (Need::Role(role, scope) | Need::Machine(role, scope)) = need else {
        return Ok(());
    };
    if let Some(role) = lacking(need, role, principal) {
        return Err(lacks_role(role)
            .with("resource_class", resource_class(path))
            .with("action", action(method)));
    }
    if !principal.has_scope(scope) {
        return Err(lacks_scope(scope, method, path));
    }
    Ok(())
}

fn lacks_scope(scope: Scope, method: &Method, path: &str) -> ApiError {
    let detail = format!("Token lacks the scope '{}'", scope.name());
    ApiError::new(ErrorCode::ScopeRequired, detail)
        .with("reason_code", "scope_required")
        .with("required_scope", scope.name())
        .with("resource_class", resource_class(path))
        .with("action", action(method))
}

/// 403 for want of a role. The contract knows one kind of administrator, and so do its clients.
pub fn lacks_role(role: Role) -> ApiError {
    let role = match role {
        Role::TenantAdmin => Role::Admin,
        role => role,
    };
    let words = match role {
        Role::Admin | Role::TenantAdmin => "Admin",
        Role::Operator => "Operator",
        Role::User => "User",
        Role::Viewer => "Viewer",
    };
    ApiError::new(
        ErrorCode::RoleRequired,
        format!("{words} principal required"),
    )
    .with("reason_code", format!("{}_required", role.name()))
    .with("required_role", role.name())
}

fn action(method: &Method) -> &'static str {
    match *method {
        Method::GET | Method::HEAD | Method::OPTIONS => "read",
        _ => "write",
    }
}

/// The first word of a route.
fn resource_class(path: &str) -> &str {
    let path = path.strip_prefix("/api/gateway").unwrap_or(path);
    path.split('/').find(|part| !part.is_empty()).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_says_what_it_needs_and_no_line_is_idle() {
        let api = serde_json::to_value(super::super::openapi()).unwrap();
        let mut used = std::collections::BTreeSet::new();
        for (path, item) in api["paths"].as_object().unwrap() {
            let short = path.strip_prefix("/api/gateway").unwrap_or(path);
            for method in item.as_object().unwrap().keys() {
                let method = method.to_uppercase();
                let line = NEEDS
                    .iter()
                    .position(|(of, pattern, _)| *of == method && *pattern == short);
                used.insert(line.unwrap_or_else(|| panic!("{method} {path} has no line")));
                let open = item[method.to_lowercase()]["security"].is_array();
                let need = need(&method.parse().unwrap(), path);
                assert_eq!(need == Need::Open, open, "{method} {path}");
            }
        }
        assert_eq!(used.len(), NEEDS.len(), "a line stands for no route");
    }

    #[test]
    fn an_unlisted_route_is_the_administrators() {
        assert_eq!(need(&Method::GET, "/api/gateway/new"), MANAGE_GATEWAY);
        assert_eq!(need(&Method::HEAD, "/services"), READ_SERVICES);
        assert_eq!(need(&Method::PATCH, "/services"), Need::Anyone);
    }
}
