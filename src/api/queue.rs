//! The GPU dialect's queue (`contracts/gpu-gateway.md` section 4): the same job runs under its names, with
//! payload, result and progress as JSON texts.

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use bytes::Bytes;
use http::HeaderMap;
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::body::{JsonBody, PathOf};
use super::checkpoint::attempt_of;
use super::error::{ApiError, ErrorCode, FieldError};
use super::examples;
use super::fields::Fields;
use super::guard::Caller;
use super::idempotency::{IdempotencyKey, replayed};
use super::job::{DIALECT_TTL_MS, JobRequest};
use super::routes::Routes;
use super::run_view::seconds;
use super::state::App;
use crate::domain::command::Command;
use crate::domain::ids::{RunId, Seq};
use crate::domain::spec::Target;
use crate::domain::time::Timestamp;
use crate::ledger::{RunStatus, RunSummary};

/// The routes of this file, at the root and under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(submit))
        .routes(routes!(stats))
        .routes(routes!(read, cancel))
        .routes(routes!(progress, push_progress))
}

/// The answer to a submission: the job is on disk.
#[derive(Serialize, ToSchema)]
pub struct Submitted {
    pub job_id: String,
    /// From 1.
    pub position: u64,
    /// Not estimated: always null.
    pub estimated_wait: Option<f64>,
}

/// Submit a job.
#[utoipa::path(
    post, path = "/queue/submit", tag = "queue",
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible characters")),
    request_body(content = JobRequest, example = json!({"service_type": "llm", "payload": {"prompt": "hello"}, "priority": 2})),
    responses(
        (status = 200, body = Submitted, example = json!({"job_id": "0199f3a2-7c1e-7d0a-9c55-6f0f0d1f2a3b", "position": 1, "estimated_wait": null})),
        (status = 400, description = "service_type is required; payload is required"),
        (status = 409, description = "The runtime has no user any more"),
    )
)]
async fn submit(
    State(app): State<App>,
    caller: Caller,
    key: IdempotencyKey,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let command = read_submission(&body.fields()?)?;
    let started = key
        .start(&app, &caller, "queue/submit", &body, command)
        .await?;
    let answer = Submitted {
        job_id: started.run.to_string(),
        position: started.position,
        estimated_wait: None,
    };
    Ok(replayed(Json(answer), started.duplicate))
}

pub(super) fn read_submission(fields: &Fields) -> Result<Command, ApiError> {
    let empty = |name: &str| fields.raw(name).is_none_or(|raw| raw.get() == "\"\"");
    if empty("service_type") && empty("service_name") {
        return Err(ApiError::missing_field(
            "service_type",
            "service_type is required",
        ));
    }
    if !fields.has("payload") {
        return Err(ApiError::missing_field("payload", "payload is required"));
    }
    let mut job = JobRequest::read(fields);
    fields.finish()?;
    job.ttl_seconds.get_or_insert(DIALECT_TTL_MS);
    job.into_command(None, Vec::new())
}

/// How much waits and runs.
#[derive(Serialize, ToSchema)]
pub struct Stats {
    pub total_queued: u64,
    pub total_running: u64,
    pub by_type: BTreeMap<String, u64>,
    /// `P1` to `P5`.
    pub by_priority: BTreeMap<String, u64>,
}

/// Count the queue: what the caller's tenant has there, for administrators of all tenants together.
#[utoipa::path(get, path = "/queue/stats", tag = "queue", responses((status = 200, body = Stats, example = json!({
    "total_queued": 3, "total_running": 1, "by_type": {"llm": 3}, "by_priority": {"P3": 3}
}))))]
async fn stats(State(app): State<App>, caller: Caller) -> Result<Json<Stats>, ApiError> {
    let tenant = caller.tenancy().tenant().cloned();
    let stats = app.handle.queue_stats(tenant).await?;
    Ok(Json(Stats {
        total_queued: stats.queued,
        total_running: stats.running,
        by_type: stats
            .by_type
            .into_iter()
            .map(|(name, n)| (name.to_string(), n))
            .collect(),
        by_priority: stats
            .by_priority
            .into_iter()
            .map(|(p, n)| (format!("P{p}"), n))
            .collect(),
    }))
}

/// A job in the dialect's form.
#[derive(Serialize, ToSchema)]
pub struct JobRecord {
    pub id: String,
    pub service_type: Option<String>,
    pub service_name: Option<String>,
    pub priority: u8,
    /// `queued`, `running`, `paused`, `completed`, `failed` or `cancelled`.
    pub status: &'static str,
    /// JSON as text; null when it was purged.
    pub payload: Option<String>,
    pub callback_url: Option<String>,
    /// JSON as text.
    pub result: Option<String>,
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    #[schema(value_type = Option<String>)]
    pub started_at: Option<Timestamp>,
    #[schema(value_type = Option<String>)]
    pub completed_at: Option<Timestamp>,
    #[schema(value_type = Option<String>)]
    pub paused_at: Option<Timestamp>,
    pub error: Option<String>,
    pub ttl_seconds: Option<f64>,
    pub attempts: u32,
    pub max_attempts: u32,
    pub paused_by_job_id: Option<String>,
    /// JSON as text: the last progress.
    pub progress_snapshot: Option<String>,
    pub preempt_count: u32,
    /// While queued.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<u64>,
}

/// The dialect's status of ours.
pub fn dialect_status(status: RunStatus) -> &'static str {
    match status {
        RunStatus::Queued | RunStatus::Backoff => "queued",
        RunStatus::Running | RunStatus::Stopping => "running",
        RunStatus::Paused | RunStatus::Preempted => "paused",
        RunStatus::Completed => "completed",
        RunStatus::Failed => "failed",
        RunStatus::Cancelled => "cancelled",
    }
}

/// 404 in the dialect's words.
pub fn job_not_found(id: &str) -> ApiError {
    ApiError::new(ErrorCode::RunNotFound, format!("Job not found: {id}"))
}

/// A job that the caller may see.
async fn seen_job(app: &App, caller: &Caller, id: &str) -> Result<RunSummary, ApiError> {
    let run: RunId = id.parse().map_err(|_| job_not_found(id))?;
    let found = app.find_run(caller, run).await?;
    found.ok_or_else(|| job_not_found(id))
}

/// A job of the caller's plane.
pub fn find_job(app: &App, caller: &Caller, id: &str) -> Result<RunSummary, ApiError> {
    let run: RunId = id.parse().map_err(|_| job_not_found(id))?;
    app.ledger
        .run(caller.plane(), run)?
        .ok_or_else(|| job_not_found(id))
}

fn text_at(app: &App, seq: Option<Seq>) -> Result<Option<String>, ApiError> {
    let bytes = match seq {
        Some(seq) => app.ledger.payload(seq)?,
        None => None,
    };
    Ok(bytes.and_then(|bytes: Bytes| String::from_utf8(bytes.to_vec()).ok()))
}

/// Read a job.
#[utoipa::path(get, path = "/queue/{job_id}", tag = "queue",
    responses((status = 200, body = JobRecord, example = json!(examples::job())), (status = 404, description = "Job not found: x")))]
async fn read(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
) -> Result<Json<JobRecord>, ApiError> {
    let run = seen_job(&app, &caller, &id).await?;
    let position = match run.status {
        RunStatus::Queued | RunStatus::Backoff => app
            .handle
            .why(run.plane, run.run)
            .await?
            .and_then(|why| why.position),
        _ => None,
    };
    let service_name = match &run.spec.target {
        Target::Service(service) => Some(service.to_string()),
        Target::Type(_) => run.service.as_ref().map(ToString::to_string),
        Target::Container(_) => None,
    };
    Ok(Json(JobRecord {
        id: run.run.to_string(),
        service_type: run.spec.service_type.as_ref().map(ToString::to_string),
        service_name,
        priority: run.spec.priority.get(),
        status: dialect_status(run.status),
        payload: text_at(&app, Some(run.payload))?,
        callback_url: run.spec.callback_url.as_ref().map(ToString::to_string),
        result: text_at(&app, run.result)?,
        created_at: run.created_at,
        started_at: run.started_at,
        completed_at: run.completed_at,
        paused_at: run.paused_at,
        error: run.error,
        ttl_seconds: run.spec.ttl_ms.map(seconds),
        attempts: run.attempt,
        max_attempts: run.spec.max_attempts,
        paused_by_job_id: run.preempted_by.map(|by| by.to_string()),
        progress_snapshot: text_at(&app, run.progress)?,
        preempt_count: run.preempt_count,
        position,
    }))
}

/// Cancel a job that waits.
///
/// A running one is 409 here; the `cancel` command cancels it.
#[utoipa::path(delete, path = "/queue/{job_id}", tag = "queue",
    responses((status = 200, body = Object, example = json!({"job_id": "0199f3a2-7c1e-7d0a-9c55-6f0f0d1f2a3b", "cancelled": true})),
        (status = 404, description = "Job not found: x"), (status = 409, description = "It runs, or has ended")))]
async fn cancel(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
) -> Result<Json<Value>, ApiError> {
    let RunSummary { plane, run, .. } = seen_job(&app, &caller, &id).await?;
    app.submit_in(plane, &caller, Command::CancelQueued { run })
        .await?;
    Ok(Json(json!({"job_id": run.to_string(), "cancelled": true})))
}

/// How far a job is.
#[derive(Serialize, ToSchema)]
pub struct Progress {
    pub job_id: String,
    pub status: &'static str,
    /// What the service last told.
    #[schema(value_type = Option<Object>)]
    pub progress: Option<Box<RawValue>>,
    pub preempt_count: u32,
}

/// Read a job's progress.
#[utoipa::path(get, path = "/queue/{job_id}/progress", tag = "queue",
    responses((status = 200, body = Progress, example = json!({
        "job_id": "0199f3a2-7c1e-7d0a-9c55-6f0f0d1f2a3b", "status": "running", "progress": {"percent": 40}, "preempt_count": 0
    })), (status = 404, description = "Job not found: x")))]
async fn progress(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
) -> Result<Json<Progress>, ApiError> {
    let run = seen_job(&app, &caller, &id).await?;
    let text = text_at(&app, run.progress)?;
    Ok(Json(Progress {
        job_id: run.run.to_string(),
        status: dialect_status(run.status),
        progress: text.and_then(|text| RawValue::from_string(text).ok()),
        preempt_count: run.preempt_count,
    }))
}

/// Push a running job's progress.
#[utoipa::path(post, path = "/queue/{job_id}/progress", tag = "queue",
    params(("X-Rungate-Attempt" = Option<u32>, Header, description = "Fences: another attempt's progress is 409")),
    request_body(content = Object, example = json!({"percent": 40, "step": "chunk 4 of 10"})),
    responses((status = 200, body = Object, example = json!({"ok": true})), (status = 409, description = "It is not running")))]
async fn push_progress(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let attempt = attempt_of(&caller.principal, &headers)?;
    if body.fields().is_err() {
        let loc = vec!["body".to_owned()];
        let fault = FieldError::new(loc, "dict_type", "Input should be a valid dictionary");
        return Err(ApiError::validation(vec![fault]));
    }
    let run = find_job(&app, &caller, &id)?.run;
    let body = body.bytes().clone();
    app.submit(&caller, Command::PushProgress { run, attempt, body })
        .await?;
    Ok(Json(json!({"ok": true})))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn submission(body: &str) -> Result<Command, ApiError> {
        read_submission(&Fields::of_body(body).unwrap())
    }

    #[test]
    fn the_dialects_words_for_what_is_missing() {
        let detail = |body| submission(body).unwrap_err().detail;
        assert_eq!(detail("{}"), "service_type is required");
        assert_eq!(
            detail(r#"{"service_type":"","payload":{}}"#),
            "service_type is required"
        );
        assert_eq!(detail(r#"{"service_type":"llm"}"#), "payload is required");
    }

    #[test]
    fn the_dialects_time_to_live_is_an_hour() {
        let ttl = |body| match submission(body) {
            Ok(Command::StartJob { spec, .. }) => spec.ttl_ms,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            ttl(r#"{"service_type":"llm","payload":{}}"#),
            Some(3_600_000)
        );
        assert_eq!(
            ttl(r#"{"service_type":"llm","payload":{},"ttl_seconds":60}"#),
            Some(60_000)
        );
    }
}
