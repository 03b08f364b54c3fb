//! Where tenants are told of their runs: ntfy topics and webhooks, for the administrators of each. An access token goes
//! into a file of its own and is never shown.

use axum::Json;
use axum::extract::State;
use secrecy::SecretString;
use serde::Serialize;
use smol_str::SmolStr;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::body::{JsonBody, PathOf};
use super::error::ApiError;
use super::fields::{Fields, TextRule};
use super::guard::Caller;
use super::job::read_url;
use super::routes::Routes;
use super::state::App;
use super::tenants::find;
use super::users::{named_values, submit};
use crate::domain::identity::{IdentityCommand, sanitised};
use crate::domain::notify::{Channel, Notice, Notify, NotifyChange, Ntfy, Webhook, is_ntfy_topic};
use crate::domain::state::notices::{LastTry, Line};
use crate::domain::time::Timestamp;

/// Where a topic is that is said to be nowhere.
const NTFY_URL: &str = "https://ntfy.sh";

/// Longest access token.
const MAX_TOKEN_BYTES: usize = 256;

/// The routes of this file, under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(read, change))
        .routes(routes!(test))
}

/// How a channel is doing.
#[derive(Serialize, ToSchema)]
pub struct Delivery {
    /// Notices that are not delivered yet.
    pub waiting: u64,
    /// Things of which the channel was not told: too many waited, or they waited for too long.
    pub skipped: u64,
    /// Times in a row that it could not be told; 0 while all is well.
    pub failures: u32,
    /// While there are failures: the next try.
    #[schema(value_type = Option<String>)]
    pub next_try_at: Option<Timestamp>,
    pub last: Option<LastTryView>,
}

/// What came of the last try.
#[derive(Serialize, ToSchema)]
pub struct LastTryView {
    #[schema(value_type = String)]
    pub at: Timestamp,
    pub delivered: bool,
    /// The status of the answer.
    pub status: Option<u16>,
    pub error: Option<String>,
}

impl From<LastTry> for LastTryView {
    fn from(last: LastTry) -> Self {
        LastTryView {
            at: last.at,
            delivered: last.is_delivered,
            status: last.status,
            error: last.error,
        }
    }
}

impl From<Line> for Delivery {
    fn from(line: Line) -> Self {
        Delivery {
            waiting: line.waiting.len() as u64,
            skipped: line.skipped,
            failures: line.failures,
            next_try_at: (line.failures > 0).then_some(line.pause_until),
            last: line.last.map(LastTryView::from),
        }
    }
}

/// A topic of an ntfy server.
#[derive(Serialize, ToSchema)]
pub struct NtfyView {
    pub url: String,
    pub topic: String,
    /// What it is told.
    #[schema(value_type = Vec<String>)]
    pub events: Vec<Notice>,
    /// Whether an access token is shown to the server.
    pub has_token: bool,
    /// Whether the gateway's settings say so, which hold again from its next start.
    pub by_settings: bool,
    pub delivery: Delivery,
}

/// A URL that gets signed JSON.
#[derive(Serialize, ToSchema)]
pub struct WebhookView {
    pub url: String,
    #[schema(value_type = Vec<String>)]
    pub events: Vec<Notice>,
    pub delivery: Delivery,
}

/// Where a tenant is told of its runs; a channel that is null is off.
#[derive(Serialize, ToSchema)]
pub struct NotifyView {
    pub tenant_id: String,
    pub ntfy: Option<NtfyView>,
    pub webhook: Option<WebhookView>,
}

async fn view(app: &App, tenant: SmolStr) -> Result<NotifyView, ApiError> {
    let (of, tokens) = (tenant.clone(), app.ntfy_tokens.clone());
    let (notify, has_token) = app
        .scan(move |ledger| {
            let known = ledger.tenant(&of)?;
            let notify = known.map(|known| known.notify).unwrap_or_default();
            let ntfy = notify.ntfy.as_ref();
            let has_token =
                ntfy.is_some_and(|ntfy| matches!(tokens.get(&of, &ntfy.url), Ok(Some(_))));
            Ok((notify, has_token))
        })
        .await?;
    let of = tenant.clone();
    let lines = app.handle.ask(move |state, _, _| {
        Channel::ALL.map(|channel| state.notices.lines.get(&(of.clone(), channel)).cloned())
    });
    let [ntfy_line, webhook_line] = lines.await?;
    let Notify { ntfy, webhook } = notify;
    Ok(NotifyView {
        tenant_id: tenant.to_string(),
        ntfy: ntfy.map(|ntfy| NtfyView {
            url: ntfy.url.to_string(),
            topic: ntfy.topic.to_string(),
            events: ntfy.events,
            has_token,
            by_settings: ntfy.by_settings,
            delivery: ntfy_line.unwrap_or_default().into(),
        }),
        webhook: webhook.map(|webhook| WebhookView {
            url: webhook.url.to_string(),
            events: webhook.events,
            delivery: webhook_line.unwrap_or_default().into(),
        }),
    })
}

/// Read where a tenant is told of its runs, and how that goes.
#[utoipa::path(get, path = "/admin/tenants/{tenant_id}/notify", tag = "users",
    responses((status = 200, body = NotifyView, example = json!({"tenant_id": "acme",
        "ntfy": {"url": "https://ntfy.sh", "topic": "acme-gpu-7Qm2x9Lb4T", "events": ["completed", "failed", "preempted", "resumed"], "has_token": false, "by_settings": false,
            "delivery": {"waiting": 0, "skipped": 0, "failures": 0, "next_try_at": null, "last": {"at": "2026-11-21T02:00:00.000120+00:00", "delivered": true, "status": 200, "error": null}}},
        "webhook": null})), (status = 404, description = "Tenant not found")))]
async fn read(
    State(app): State<App>,
    caller: Caller,
    PathOf(tenant): PathOf<String>,
) -> Result<Json<NotifyView>, ApiError> {
    let tenant = sanitised(&tenant);
    find(&app, &caller, &tenant).await?;
    Ok(Json(view(&app, tenant).await?))
}

/// What becomes of the access token.
enum TokenChange {
    /// It stays, as long as the server does.
    Keep,
    Put(SecretString),
    Remove,
}

fn read_ntfy(fields: &Fields) -> (Ntfy, TokenChange) {
    fields.forbid_others(&["url", "topic", "events", "token"]);
    let url = read_url(fields, "url").unwrap_or_else(|| NTFY_URL.to_owned());
    if url.contains(['?', '#']) {
        let message = "URL should be of the server alone, without a query";
        fields.fault("url", "value_error", message);
    }
    let topic = fields.required_text("topic", TextRule::name(64));
    if !topic.is_empty() && !is_ntfy_topic(&topic) {
        let message = "Topic should have letters, digits, '-' and '_' only";
        fields.fault("topic", "string_pattern_mismatch", message);
    }
    let events = read_events(fields).unwrap_or_else(|| Notice::OF_NTFY.to_vec());
    let ntfy = Ntfy {
        url: url.trim_end_matches('/').into(),
        topic: topic.into(),
        events,
        by_settings: false,
    };
    (ntfy, read_token(fields))
}

fn read_token(fields: &Fields) -> TokenChange {
    if fields.is_null("token") {
        return TokenChange::Remove;
    }
    let Some(token) = fields.secret("token", MAX_TOKEN_BYTES) else {
        return TokenChange::Keep;
    };
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        let message = "Token should have visible ASCII characters only";
        fields.fault("token", "string_pattern_mismatch", message);
    }
    TokenChange::Put(token.into())
}

fn read_events(fields: &Fields) -> Option<Vec<Notice>> {
    let of = |name: &str| Notice::OF_RUNS.into_iter().find(|n| n.name() == name);
    named_values(fields, "events", of)
}

fn read_webhook(fields: &Fields) -> Webhook {
    fields.forbid_others(&["url", "events"]);
    if !fields.has("url") {
        fields.missing("url");
    }
    Webhook {
        url: read_url(fields, "url").unwrap_or_default().into(),
        events: read_events(fields).unwrap_or_else(|| Notice::OF_RUNS.to_vec()),
    }
}

/// A channel as it is to be: absent stays, null is off.
fn channel<T>(fields: &Fields, name: &str, read: impl FnOnce(&Fields) -> T) -> Option<Option<T>> {
    match fields.is_null(name) {
        true => Some(None),
        false => fields.object(name).map(|fields| Some(read(&fields))),
    }
}

/// Say where a tenant is told of its runs. A channel that is absent stays as it is; one that is null is turned off.
///
/// An access token is kept in a file of the gateway's user, for this server alone: with another server it is forgotten.
#[utoipa::path(put, path = "/admin/tenants/{tenant_id}/notify", tag = "users",
    request_body(content = Object, example = json!({"ntfy": {"url": "https://ntfy.sh", "topic": "acme-gpu-7Qm2x9Lb4T", "events": ["failed"]}, "webhook": {"url": "https://example.org/runs"}})),
    responses((status = 200, body = NotifyView, example = json!({"tenant_id": "acme",
        "ntfy": {"url": "https://ntfy.sh", "topic": "acme-gpu-7Qm2x9Lb4T", "events": ["failed"], "has_token": false, "by_settings": false,
            "delivery": {"waiting": 0, "skipped": 0, "failures": 0, "next_try_at": null, "last": null}},
        "webhook": {"url": "https://example.org/runs", "events": ["completed", "failed", "cancelled", "preempted", "resumed"],
            "delivery": {"waiting": 0, "skipped": 0, "failures": 0, "next_try_at": null, "last": null}}})),
        (status = 404, description = "Tenant not found")))]
async fn change(
    State(app): State<App>,
    caller: Caller,
    PathOf(tenant): PathOf<String>,
    body: JsonBody,
) -> Result<Json<NotifyView>, ApiError> {
    let tenant = sanitised(&tenant);
    let (ntfy, webhook) = {
        let fields = body.fields()?;
        fields.forbid_others(&["ntfy", "webhook"]);
        let read = (
            channel(&fields, "ntfy", read_ntfy),
            channel(&fields, "webhook", read_webhook),
        );
        fields.finish()?;
        read
    };
    find(&app, &caller, &tenant).await?;
    caller.about(&tenant);
    let (ntfy, token) = match ntfy {
        Some(Some((ntfy, token))) => (Some(Some(ntfy)), token),
        Some(None) => (Some(None), TokenChange::Remove),
        None => (None, TokenChange::Keep),
    };
    let url = ntfy.iter().flatten().map(|ntfy| ntfy.url.clone()).next();
    set_token(&app, &caller, &tenant, url, token).await?;
    let change = NotifyChange { ntfy, webhook };
    let command = IdentityCommand::SetNotify {
        tenant: tenant.clone(),
        change,
    };
    submit(&app, &caller, command).await?;
    Ok(Json(view(&app, tenant).await?))
}

/// Keeps a new token before anything is sent with it; forgets one that is for nothing any more.
async fn set_token(
    app: &App,
    caller: &Caller,
    tenant: &SmolStr,
    url: Option<SmolStr>,
    token: TokenChange,
) -> Result<(), ApiError> {
    if !matches!(token, TokenChange::Keep) {
        // What is in no ledger is recorded before it is done.
        app.audit.record_first(caller.trail.as_ref()).await?;
    }
    let (tokens, tenant) = (app.ntfy_tokens.clone(), tenant.clone());
    let setting = tokio::task::spawn_blocking(move || match (token, url) {
        (TokenChange::Put(token), Some(url)) => tokens.put(&tenant, &url, &token),
        (TokenChange::Keep, Some(url)) if tokens.get(&tenant, &url)?.is_none() => {
            tokens.remove(&tenant)
        }
        (TokenChange::Keep, _) => Ok(()),
        (TokenChange::Remove | TokenChange::Put(_), _) => tokens.remove(&tenant),
    });
    let failed = |error: &dyn std::fmt::Display| {
        tracing::error!(%error, "the access token of an ntfy topic could not be kept");
        ApiError::internal()
    };
    let set = setting.await.map_err(|error| failed(&error))?;
    set.map_err(|error| failed(&error))
}

/// The channels that were sent a test.
#[derive(Serialize, ToSchema)]
pub struct TestAnswer {
    pub channels: Vec<&'static str>,
}

/// Send a test to each of a tenant's channels. What came of it is in the channels' `delivery`.
#[utoipa::path(post, path = "/admin/tenants/{tenant_id}/notify/test", tag = "users",
    responses((status = 200, body = TestAnswer, example = json!({"channels": ["ntfy"]})), (status = 404, description = "Tenant not found"),
        (status = 409, description = "Tenant 't' has no channel of notifications; set one first")))]
async fn test(
    State(app): State<App>,
    caller: Caller,
    PathOf(tenant): PathOf<String>,
) -> Result<Json<TestAnswer>, ApiError> {
    let tenant = sanitised(&tenant);
    find(&app, &caller, &tenant).await?;
    caller.about(&tenant);
    let command = IdentityCommand::TestNotify {
        tenant: tenant.clone(),
    };
    submit(&app, &caller, command).await?;
    let known = app.scan(move |ledger| ledger.tenant(&tenant)).await?;
    let notify = known.map(|known| known.notify).unwrap_or_default();
    let on = Channel::ALL.into_iter();
    let on = on.filter(|channel| notify.events(*channel).is_some());
    let channels = on.map(Channel::name).collect();
    Ok(Json(TestAnswer { channels }))
}
