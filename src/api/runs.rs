//! Runs: start, list, read, and why one waits.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, header};
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use smol_str::SmolStr;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::access::lacks_role;
use super::body::{JsonBody, PathOf};
use super::cursor;
use super::error::{ApiError, ErrorCode};
use super::examples;
use super::fields::{Fields, TextRule};
use super::guard::Caller;
use super::idempotency::{IdempotencyKey, replayed};
use super::job::{JobRequest, MAX_ID_CHARS, read_labels};
use super::job_container;
use super::query::Query;
use super::routes::Routes;
use super::run_view::{RunView, statuses_named, workflow_id};
use super::state::App;
use crate::domain::command::{Command, Reply};
use crate::domain::identity::{Role, Runtime};
use crate::domain::ids::{PlaneId, RunId};
use crate::domain::spec::Target;
use crate::domain::time::Timestamp;
use crate::ledger::{Ledger, ReadError, RunFilter, RunPage, RunSummary};

/// The routes of this file, under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(start))
        .routes(routes!(list))
        .routes(routes!(read))
        .routes(routes!(input_data))
        .routes(routes!(why))
        .routes(routes!(purge))
}

/// A start.
#[derive(Serialize, ToSchema)]
pub struct StartRequest {
    pub job: JobRequest,
    /// Groups runs; the run's own id when absent.
    pub session_id: Option<String>,
    /// Up to 32 names and texts of the caller's choice.
    #[schema(value_type = Option<Object>)]
    pub labels: Option<Value>,
}

/// A start's answer: the run is on disk.
#[derive(Serialize, ToSchema)]
pub struct Started {
    pub run_id: String,
    /// Its place in its queue, from 1, at the moment it was queued.
    pub position: u64,
}

/// Start a run.
///
/// The answer means that it is on disk. With `Idempotency-Key` a repeated request gets the first answer again.
#[utoipa::path(
    post, path = "/runs/start", tag = "runs",
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible characters")),
    request_body(content = StartRequest, example = json!({
        "job": {"service_type": "text-stats", "payload": {"text": "to be or not to be"}, "priority": 3},
        "labels": {"team": "search"}
    })),
    responses(
        (status = 200, body = Started, example = json!({"run_id": "0199f3a2-7c1e-7d0a-9c55-6f0f0d1f2a3b", "position": 1})),
        (status = 403, description = "The gateway's settings do not allow such a container"),
        (status = 404, description = "No such bundle"),
        (status = 409, description = "The runtime has no user any more, or the container engine cannot give GPUs"),
        (status = 503, description = "No container engine"),
    )
)]
async fn start(
    State(app): State<App>,
    caller: Caller,
    key: IdempotencyKey,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let command = read_start(&body.fields()?)?;
    if let Command::StartJob { spec, payload, .. } = &command
        && let Target::Container(needs) = spec.target
    {
        job_container::check(&app, payload, needs).await?;
    }
    let started = key
        .start(&app, &caller, "runs/start", &body, command)
        .await?;
    let answer = Started {
        run_id: started.run.to_string(),
        position: started.position,
    };
    Ok(replayed(Json(answer), started.duplicate))
}

/// The coordinator answered a command with another command's reply: a fault of ours.
pub fn unexpected(reply: &Reply) -> ApiError {
    tracing::error!(?reply, "the coordinator's reply does not fit the command");
    ApiError::internal()
}

pub(super) fn read_start(fields: &Fields) -> Result<Command, ApiError> {
    let id = TextRule::name(MAX_ID_CHARS);
    let session = fields.text("session_id", id).map(SmolStr::from);
    if !fields.has("job") {
        return Err(refuse_flow(fields));
    }
    let labels = read_labels(fields);
    let job = fields.object("job").map(|job| JobRequest::read_own(&job));
    fields.finish()?;
    match job {
        Some(job) => job.into_command(session, labels),
        None => Err(ApiError::internal()),
    }
}

/// A start without `job`: no bundle is known here, so whatever it names is not found.
fn refuse_flow(fields: &Fields) -> ApiError {
    let id = TextRule {
        min: 0,
        max: MAX_ID_CHARS,
        plain: true,
    };
    let bundle = fields.text("bundle_id", id);
    let flow = fields.text("flow_id", id);
    fields.object("input_data");
    if let Err(error) = fields.finish() {
        return error;
    }
    let given = |text: &String| !text.is_empty();
    match (bundle.filter(given), flow.filter(given)) {
        (Some(bundle), _) => bundle_not_found(&bundle),
        (None, Some(flow)) => match flow.split_once(':') {
            Some((bundle, _)) => {
                bundle_not_found(bundle.split_once('@').map_or(bundle, |(name, _)| name))
            }
            None => ApiError::new(
                ErrorCode::BundleNotFound,
                format!("Workflow '{flow}' not found"),
            ),
        },
        (None, None) => ApiError::new(
            ErrorCode::NothingToStart,
            "flow_id is required (or provide bundle_id to start a bundle entrypoint); \
             to start a job, send {\"job\": {\"service_type\": \"…\", \"payload\": {…}}}",
        ),
    }
}

fn bundle_not_found(bundle: &str) -> ApiError {
    ApiError::new(
        ErrorCode::BundleNotFound,
        format!("Bundle '{bundle}' not found"),
    )
}

/// A page of runs.
#[derive(Serialize, ToSchema)]
pub struct RunList {
    pub items: Vec<RunView>,
    /// Give it as `after` for the next page; absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// What a listing asks for.
pub(super) struct Listing {
    limit: usize,
    /// Runs of all planes of the tenant.
    tenant_wide: bool,
    filter: RunFilter,
    include_ledger_len: bool,
    include_metrics: bool,
    workflow: Option<String>,
    /// The filters as text: what a cursor is bound to.
    bound_to: String,
    after: Option<String>,
}

/// List runs, newest first.
#[utoipa::path(
    get, path = "/runs", tag = "runs",
    params(
        ("limit" = Option<u64>, Query, description = "1 to 500; 50 when absent"),
        ("status" = Option<String>, Query, description = "running, waiting, completed, failed, cancelled; or a job's state"),
        ("session_id" = Option<String>, Query),
        ("workflow_id" = Option<String>, Query, description = "`job:<type>` or `job:@<service>`"),
        ("root_only" = Option<bool>, Query, description = "Job runs have no parents: all are roots"),
        ("include_ledger_len" = Option<bool>, Query),
        ("include_metrics" = Option<bool>, Query),
        ("scope" = Option<String>, Query, description = "`own`, or `tenant` for all runs of the tenant; operators and higher"),
        ("after" = Option<String>, Query, description = "`next_cursor` of the page before"),
    ),
    responses((status = 200, description = "With `Link: rel=next` when there is more", body = RunList, example = json!(examples::runs())),
        (status = 400, description = "The cursor is not one of this listing"))
)]
async fn list(State(app): State<App>, caller: Caller, query: Query) -> Result<Response, ApiError> {
    let listing = read_listing(&query)?;
    let before = match &listing.after {
        Some(after) => Some(cursor::decode(&app.cursor_key, &listing.bound_to, after)?),
        None => None,
    };
    let (plane, limit) = (caller.plane(), listing.limit);
    let (filter, workflow) = (listing.filter, listing.workflow);
    let runtimes = match listing.tenant_wide {
        true => runtimes_of_tenant(&app, &caller).await?,
        false => BTreeMap::from([(plane, None)]),
    };
    let planes: Vec<PlaneId> = runtimes.keys().copied().collect();
    let page = app
        .scan(move |ledger| read_page(ledger, &planes, &filter, workflow.as_deref(), before, limit))
        .await?;
    let show = |run: &RunSummary| RunView {
        runtime_id: runtimes.get(&run.plane).cloned().flatten(),
        ledger_len: listing.include_ledger_len.then_some(run.ledger_len),
        metrics: listing.include_metrics.then(|| metrics_of(run)),
        ..RunView::of(run)
    };
    let items = page.items.iter().map(show).collect();
    let next_cursor = page
        .next
        .map(|last| cursor::encode(&app.cursor_key, &listing.bound_to, last));
    let link = next_cursor
        .as_ref()
        .map(|next| link_to_next(&listing.bound_to, limit, next));
    let mut response = Json(RunList { items, next_cursor }).into_response();
    if let Some(link) = link.and_then(|link| HeaderValue::from_str(&link).ok()) {
        response.headers_mut().insert(header::LINK, link);
    }
    Ok(response)
}

/// The planes of the caller's tenant and how their runtimes are called.
async fn runtimes_of_tenant(
    app: &App,
    caller: &Caller,
) -> Result<BTreeMap<PlaneId, Option<String>>, ApiError> {
    if !caller.principal.sees_tenant() {
        return Err(lacks_role(Role::Operator)
            .with("resource_class", "runs")
            .with("action", "read"));
    }
    let tenant = caller.principal.user.tenant.clone();
    let runtimes = app.scan(move |ledger| ledger.runtimes_of(&tenant)).await?;
    let named = |runtime: Runtime| (runtime.plane, Some(runtime.key.runtime.to_string()));
    Ok(runtimes.into_iter().map(named).collect())
}

pub(super) fn read_listing(query: &Query) -> Result<Listing, ApiError> {
    let limit = query.int("limit", 1..=500, 50) as usize;
    let session = query.text("session_id").map(SmolStr::new);
    let workflow = query.text("workflow_id").map(str::to_owned);
    let status = query.text("status").map(str::to_owned);
    let include_ledger_len = query.boolean("include_ledger_len").unwrap_or(true);
    let include_metrics = query.boolean("include_metrics").unwrap_or(false);
    for flag in ["root_only", "include_drafts"] {
        query.boolean(flag);
    }
    let after = query.text("after").map(str::to_owned);
    let scope = query.one_of("scope", &["own", "tenant"]);
    query.finish()?;
    let statuses = match &status {
        None => Vec::new(),
        Some(name) => statuses_named(name).ok_or_else(|| {
            ApiError::new(
                ErrorCode::InvalidStatus,
                format!("Invalid status '{name}'; one of running, waiting, completed, failed, cancelled, queued, backoff, stopping, paused, preempted"),
            )
        })?,
    };
    let mut bound_to = url::form_urlencoded::Serializer::new(String::new());
    let filters = [
        ("status", status.as_deref()),
        ("session_id", session.as_deref()),
        ("workflow_id", workflow.as_deref()),
        ("scope", scope.filter(|scope| *scope == "tenant")),
    ];
    for (name, value) in filters {
        if let Some(value) = value {
            bound_to.append_pair(name, value);
        }
    }
    Ok(Listing {
        limit,
        tenant_wide: scope == Some("tenant"),
        filter: RunFilter {
            statuses,
            session,
            ..RunFilter::default()
        },
        workflow,
        include_ledger_len,
        include_metrics,
        bound_to: bound_to.finish(),
        after,
    })
}

/// Most pages that one request reads through for the few runs of a workflow; the caller goes on from there.
const MAX_PAGES: usize = 20;

/// A page of the runs that pass the filter and belong to `workflow`, if one is asked for.
fn read_page(
    ledger: &Ledger,
    planes: &[PlaneId],
    filter: &RunFilter,
    workflow: Option<&str>,
    mut before: Option<RunId>,
    limit: usize,
) -> Result<RunPage, ReadError> {
    let mut page = RunPage::default();
    for _ in 0..MAX_PAGES {
        let found = ledger.runs_of(planes, filter, before, limit)?;
        page.next = found.next;
        let mut runs = found.items.into_iter().peekable();
        while let Some(run) = runs.next() {
            if workflow.is_some_and(|workflow| workflow != workflow_id(&run.spec.target)) {
                continue;
            }
            let id = run.run;
            page.items.push(run);
            if page.items.len() == limit {
                // The next page goes on where this one was cut, not where the read ended.
                page.next = (runs.peek().is_some() || found.next.is_some()).then_some(id);
                return Ok(page);
            }
        }
        before = page.next;
        if before.is_none() || workflow.is_none() {
            break;
        }
    }
    Ok(page)
}

fn link_to_next(filters: &str, limit: usize, next: &str) -> String {
    let join = if filters.is_empty() { "" } else { "&" };
    format!("</api/gateway/runs?{filters}{join}limit={limit}&after={next}>; rel=\"next\"")
}

fn metrics_of(run: &RunSummary) -> Value {
    json!({"steps": run.ledger_len, "llm_calls": 0, "tool_calls": 0, "tokens_total": 0})
}

/// Read a run.
#[utoipa::path(
    get, path = "/runs/{run_id}", tag = "runs",
    responses((status = 200, body = RunView, example = json!(examples::run())), (status = 404, description = "Run 'x' not found"))
)]
async fn read(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
) -> Result<Json<RunView>, ApiError> {
    let run = app.run(&caller, &id).await?;
    Ok(Json(RunView::with_output(&app, &run)?))
}

/// What a run was started with.
#[derive(Serialize, ToSchema)]
pub struct InputData {
    pub run_id: String,
    pub workflow_id: String,
    pub bundle_id: Option<String>,
    pub flow_id: Option<String>,
    pub pin_ids: Vec<String>,
    /// The job's payload, as it was given.
    #[schema(value_type = Object)]
    pub input_data: Option<Box<RawValue>>,
    #[schema(value_type = Option<Object>)]
    pub workspace: Option<Value>,
}

/// Read what a run was started with.
#[utoipa::path(
    get, path = "/runs/{run_id}/input_data", tag = "runs",
    responses((status = 200, body = InputData, example = json!(examples::input_data())), (status = 410, description = "It was purged"))
)]
async fn input_data(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
) -> Result<Json<InputData>, ApiError> {
    let run = app.run(&caller, &id).await?;
    if run.purged {
        return Err(ApiError::new(
            ErrorCode::Purged,
            format!("The payloads of run '{id}' were purged"),
        ));
    }
    let payload = app.ledger.payload(run.payload)?;
    Ok(Json(InputData {
        run_id: run.run.to_string(),
        workflow_id: workflow_id(&run.spec.target),
        bundle_id: None,
        flow_id: None,
        pin_ids: Vec::new(),
        input_data: payload.and_then(|bytes| serde_json::from_slice(&bytes).ok()),
        workspace: None,
    }))
}

/// Why a run is where it is.
#[derive(Serialize, ToSchema)]
pub struct WhyView {
    pub run_id: String,
    /// The job's state.
    pub state: String,
    /// What keeps it from running; empty when nothing does.
    pub blocking: Vec<BlockingView>,
    /// Its place among its tenant's runs that want the same, from 1.
    pub position: Option<u64>,
    #[schema(value_type = String)]
    pub since: Timestamp,
}

/// One cause of waiting.
#[derive(Serialize, ToSchema)]
pub struct BlockingView {
    /// `vram`, `service_unhealthy`, `concurrency`, `paused`, `higher_priority`, `fair_share`, `quota`, `no_service`, …
    pub cause: String,
    /// The same for people, with what would unblock it.
    pub detail: String,
}

/// Say why a run waits.
#[utoipa::path(
    get, path = "/runs/{run_id}/why", tag = "runs",
    responses((status = 200, body = WhyView, example = json!({
        "run_id": "0199f3a2-7c1e-7d0a-9c55-6f0f0d1f2a3b", "state": "queued", "position": 3,
        "blocking": [{"cause": "vram", "detail": "needs 16384 MiB on one GPU, 8192 MiB are free"}],
        "since": "2026-11-21T02:00:00.000120+00:00"
    })))
)]
async fn why(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
) -> Result<Json<WhyView>, ApiError> {
    let run = app.run(&caller, &id).await?;
    let why = app.handle.why(run.plane, run.run).await?;
    let run_id = run.run.to_string();
    Ok(Json(match why {
        Some(why) => WhyView {
            run_id,
            state: why.state.to_owned(),
            blocking: why
                .blocking
                .into_iter()
                .map(|b| BlockingView {
                    cause: b.cause.to_owned(),
                    detail: b.detail,
                })
                .collect(),
            position: why.position,
            since: why.since,
        },
        None => WhyView {
            run_id,
            state: run.status.name().to_owned(),
            blocking: Vec::new(),
            position: None,
            since: run.updated_at,
        },
    }))
}

/// A purge's answer.
#[derive(Serialize, ToSchema)]
pub struct Purged {
    pub run_id: String,
    pub purged: bool,
}

/// Remove the payloads of an ended run.
///
/// Its records stay, and the ledger's chain stays whole.
#[utoipa::path(
    post, path = "/runs/{run_id}/purge", tag = "runs",
    responses((status = 200, body = Purged, example = json!(examples::purged())), (status = 409, description = "The run has not ended"))
)]
async fn purge(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
) -> Result<Json<Purged>, ApiError> {
    let run = app.own_run(&caller, &id)?.run;
    app.submit(&caller, Command::PurgeRun { run }).await?;
    Ok(Json(Purged {
        run_id: run.to_string(),
        purged: true,
    }))
}
