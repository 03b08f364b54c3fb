//! Reading the audit: a page at a time with filters, and its end as lines of JSON, as the contract has it.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::{Map, Value, json};
use smol_str::SmolStr;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::api::cursor;
use crate::api::error::{ApiError, FieldError};
use crate::api::guard::Caller;
use crate::api::query::Query;
use crate::api::routes::Routes;
use crate::api::state::App;
use crate::domain::audit::Outcome;
use crate::domain::identity::Role;
use crate::domain::time::Timestamp;
use crate::ledger::{AuditEntry, AuditFilter, Ledger, ReadError};

/// Most entries of a page.
const MAX_PAGE: u64 = 500;

/// Entries that the tail reads at a time, and reads at most.
const TAIL_PAGE: usize = 200;
const TAIL_PAGES: usize = 20;

/// The routes of this file, under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(list))
        .routes(routes!(tail))
}

/// A write that somebody asked for.
#[derive(Serialize, ToSchema)]
pub struct AuditView {
    /// Its record's place in the ledger.
    pub seq: u64,
    #[schema(value_type = String)]
    pub at: Timestamp,
    pub request_id: Option<String>,
    /// `nobody` when no valid credentials were shown.
    pub actor_id: String,
    pub user_id: Option<String>,
    pub tenant_id: Option<String>,
    /// The account that a login tried, right or wrong.
    pub tried_user_id: Option<String>,
    pub tried_tenant_id: Option<String>,
    /// The tenant that the write is about, where it is another than `tenant_id`: its administrators see it.
    pub about_tenant_id: Option<String>,
    /// Of the token that was shown, accepted or not: tells tokens apart, and nothing else.
    pub token_fingerprint: Option<String>,
    pub address: Option<String>,
    pub method: String,
    /// The route's pattern; `unmatched` for a path that is none, `(many)` for a flood that was not told apart.
    pub route: String,
    pub path: String,
    /// The names of the query string's parameters.
    pub query: Vec<String>,
    /// The `Origin` header.
    pub origin: Option<String>,
    pub user_agent: Option<String>,
    /// Length of the body, as it was declared.
    pub bytes_in: Option<u64>,
    /// The answer's; 200 where `event` tells what came of it.
    pub status: u16,
    /// `allowed`, `denied` (401, 403, 429) or `failed`.
    pub outcome: &'static str,
    /// The error's code.
    pub code: Option<String>,
    /// To the decision when it brought something about, else to the answer.
    pub duration_ms: f64,
    /// How many requests it stands for, which were alike in user, network, route and status.
    pub count: u64,
    /// When the first of them was answered.
    #[schema(value_type = String)]
    pub since: Timestamp,
    /// What it brought about.
    pub event: Option<String>,
    pub run_id: Option<String>,
}

impl AuditView {
    fn of(entry: AuditEntry) -> AuditView {
        let text = |text: &SmolStr| text.to_string();
        let source = &entry.source;
        let details = &source.details;
        let tried = details.tried.as_ref();
        AuditView {
            seq: entry.seq,
            at: entry.at,
            request_id: entry.request_id.as_ref().map(text),
            actor_id: text(&entry.actor),
            user_id: source.user.as_ref().map(|user| text(&user.user)),
            tenant_id: source.user.as_ref().map(|user| text(&user.tenant)),
            tried_user_id: tried.map(|tried| text(&tried.user)),
            tried_tenant_id: tried.map(|tried| text(&tried.tenant)),
            about_tenant_id: details.about.as_ref().map(text),
            token_fingerprint: source.token.as_ref().map(text),
            address: source.address.map(|address| address.to_string()),
            method: text(&source.method),
            route: text(&source.route),
            path: text(source.path.as_ref().unwrap_or(&source.route)),
            query: source.query.iter().map(text).collect(),
            origin: details.origin.as_ref().map(text),
            user_agent: details.user_agent.as_ref().map(text),
            bytes_in: details.bytes_in,
            status: entry.status,
            outcome: Outcome::of(entry.status).name(),
            code: entry.code.as_ref().map(text),
            duration_ms: entry.duration_us as f64 / 1_000.0,
            count: entry.count,
            since: entry.since,
            event: entry.event,
            run_id: entry.run.map(|run| run.to_string()),
        }
    }

    /// The contract's line (`contracts/run-gateway.md` section 2), and how many requests it stands for.
    fn contract_line(&self) -> String {
        let query: Vec<String> = self
            .query
            .iter()
            .map(|k| format!("{k}=<redacted>"))
            .collect();
        json!({
            "ts": self.at,
            "request_id": self.request_id,
            "ip": self.address,
            "method": self.method,
            "path": self.path,
            "query": query.join("&"),
            "status": self.status,
            "duration_ms": self.duration_ms,
            "auth_required": true,
            "auth_token_fp": self.token_fingerprint,
            "principal_user_id": self.user_id,
            "principal_tenant_id": self.tenant_id,
            "origin": self.origin,
            "user_agent": self.user_agent,
            "bytes_in": self.bytes_in,
            "headers": Map::new(),
            "error": self.code,
            "count": self.count,
        })
        .to_string()
    }
}

/// A page of writes.
#[derive(Serialize, ToSchema)]
pub struct AuditList {
    pub items: Vec<AuditView>,
    /// Give it as `after` for the next page; absent at the end. A page may be short, even empty, and have one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// List who asked for which write, newest first.
///
/// A tenant's administrator sees its tenant; the gateway's sees all, and those who showed no valid credentials.
#[utoipa::path(
    get, path = "/audit", tag = "audit",
    params(
        ("actor" = Option<String>, Query, description = "As records name it: `alice`, `acme/alice`, `nobody`"),
        ("tenant" = Option<String>, Query),
        ("route" = Option<String>, Query, description = "A route's pattern, such as `/queue/{job_id}`"),
        ("outcome" = Option<String>, Query, description = "allowed, denied (401, 403, 429) or failed"),
        ("since" = Option<String>, Query, description = "At or after, RFC 3339"),
        ("until" = Option<String>, Query, description = "Before, RFC 3339"),
        ("after" = Option<String>, Query, description = "`next_cursor` of the page before"),
        ("limit" = Option<u64>, Query, description = "1 to 500; 100 when absent"),
    ),
    responses((status = 200, body = AuditList, example = json!({"items": [{
        "seq": 40, "at": "2026-11-21T02:00:00.000120+00:00", "request_id": "7f1c…", "actor_id": "alice", "user_id": "alice",
        "tenant_id": "default", "tried_user_id": null, "tried_tenant_id": null, "about_tenant_id": null,
        "token_fingerprint": "75e9c0c51212", "address": "192.0.2.7", "method": "POST",
        "route": "/services/register", "path": "/services/register", "query": [], "origin": null,
        "user_agent": "curl/8.5.0", "bytes_in": 312, "status": 403, "outcome": "denied",
        "code": "role_required", "duration_ms": 0.2, "count": 1, "since": "2026-11-21T02:00:00.000120+00:00",
        "event": null, "run_id": null}], "next_cursor": "AAAA…"})),
        (status = 400, description = "The cursor is not one of this listing"))
)]
async fn list(
    State(app): State<App>,
    caller: Caller,
    query: Query,
) -> Result<Json<AuditList>, ApiError> {
    let limit = query.int("limit", 1..=MAX_PAGE, 100) as usize;
    let (filter, bound_to) = read_filter(&query, &caller);
    let after = query.text("after").map(str::to_owned);
    query.finish()?;
    drop(query);
    let before = match &after {
        Some(after) => Some(cursor::decode_seq(&app.cursor_key, &bound_to, after)?),
        None => None,
    };
    let page = app
        .scan(move |ledger| ledger.audit(&filter, before, limit))
        .await?;
    let next = page.next;
    Ok(Json(AuditList {
        items: page.items.into_iter().map(AuditView::of).collect(),
        next_cursor: next.map(|seq| cursor::encode_seq(&app.cursor_key, &bound_to, seq)),
    }))
}

/// The filter, and the same as text: what a cursor is bound to.
fn read_filter(query: &Query, caller: &Caller) -> (AuditFilter, String) {
    let text = |name| query.text(name).map(SmolStr::new);
    let outcome = query.text("outcome").and_then(|name| {
        let outcome = Outcome::from_name(name);
        if outcome.is_none() {
            let loc = vec!["query".to_owned(), "outcome".to_owned()];
            let message = "Input should be 'allowed', 'denied' or 'failed'";
            query.add_fault(FieldError::new(loc, "enum", message).input(name.into()));
        }
        outcome
    });
    let own = caller.principal.user.tenant.clone();
    let sees_all = caller.principal.power() == Role::Admin;
    let asked = text("tenant");
    let filter = AuditFilter {
        actor: text("actor"),
        // Another tenant's writes are nobody's to a tenant's administrator: no name is empty.
        tenant: match (sees_all, asked) {
            (true, asked) => asked,
            (false, Some(asked)) if asked != own => Some(SmolStr::default()),
            (false, _) => Some(own),
        },
        route: text("route"),
        outcome,
        since: query.instant("since"),
        until: query.instant("until"),
    };
    let bound_to = format!("audit {filter:?}");
    (filter, bound_to)
}

/// The end of the audit as lines of JSON, oldest first.
#[utoipa::path(
    get, path = "/audit/tail", tag = "audit",
    params(("max_bytes" = Option<u64>, Query, description = "1024 to 400000; 80000 when absent")),
    responses((status = 200, body = Object, example = json!({"ok": true, "bytes": 0, "truncated": false, "content": ""})))
)]
async fn tail(
    State(app): State<App>,
    _caller: Caller,
    query: Query,
) -> Result<Json<Value>, ApiError> {
    let max_bytes = query.int("max_bytes", 1_024..=400_000, 80_000) as usize;
    query.finish()?;
    drop(query);
    let (mut lines, truncated) = app.scan(move |ledger| read_tail(ledger, max_bytes)).await?;
    lines.reverse();
    let content = lines.concat();
    Ok(Json(json!({
        "ok": true,
        "bytes": content.len(),
        "truncated": truncated,
        "content": content,
    })))
}

/// The newest lines that fit, newest first, and whether there are more.
fn read_tail(ledger: &Ledger, max_bytes: usize) -> Result<(Vec<String>, bool), ReadError> {
    let (mut lines, mut bytes, mut before) = (Vec::new(), 0, None);
    for _ in 0..TAIL_PAGES {
        let page = ledger.audit(&AuditFilter::default(), before, TAIL_PAGE)?;
        for entry in page.items {
            let line = format!("{}\n", AuditView::of(entry).contract_line());
            bytes += line.len();
            if bytes > max_bytes {
                return Ok((lines, true));
            }
            lines.push(line);
        }
        before = page.next;
        if before.is_none() {
            return Ok((lines, false));
        }
    }
    Ok((lines, true))
}
