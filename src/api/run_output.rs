//! What the containers of a job wrote: the last lines, each new one as it comes, or all that is kept.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::authenticate::Watch;
use super::body::PathOf;
use super::error::{ApiError, ErrorCode};
use super::guard::Caller;
use super::log_stream::{self, unreadable};
use super::query::Query;
use super::routes::Routes;
use super::state::App;
use crate::domain::scheduler::container::name_of;
use crate::domain::spec::Target;
use crate::ledger::RunSummary;

/// The routes of this file, under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(read))
        .routes(routes!(download))
}

/// The last lines of what a job's containers wrote.
#[derive(Serialize, ToSchema)]
pub struct OutputLines {
    pub run_id: String,
    /// Oldest first, those of all attempts.
    pub lines: Vec<String>,
}

/// Read what a job's containers wrote.
///
/// With `follow` it is a stream: `event: line` carries `{"line"}`, `event: gap` `{"dropped_bytes"}` when it was cut faster than
/// it was read, and `event: done` ends it when the run has ended.
#[utoipa::path(get, path = "/runs/{run_id}/output", tag = "runs",
    params(
        ("tail" = Option<u64>, Query, description = "Last lines, up to 10000; 200 when absent"),
        ("follow" = Option<bool>, Query, description = "Stay, as server-sent events"),
    ),
    responses((status = 200, content(
            (OutputLines = "application/json", example = json!({"run_id": "0199f3a2-7c1e-7d0a-9c55-6f0f0d1f2a3b", "lines": ["epoch 1 of 10"]})),
            (String = "text/event-stream"))),
        (status = 404, description = "Run 'x' not found"),
        (status = 409, description = "It has no container of its own"),
        (status = 410, description = "It was purged")))]
async fn read(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
    query: Query,
) -> Result<Response, ApiError> {
    let (tail, follow) = log_stream::wanted(&query)?;
    drop(query);
    let run = with_container(&app, &caller, &id).await?;
    let name = name_of(run.plane, run.run);
    if follow {
        let place = app.limits.stream(&caller.principal)?;
        let watch = Watch::new(&app, &caller);
        let of = Some((run.plane, run.run));
        return Ok(log_stream::stream(app, place, &name, tail, watch, of));
    }
    let lines = app.logs.tail(&name, tail).await;
    Ok(Json(OutputLines {
        run_id: id,
        lines: lines.map_err(|error| unreadable(&error))?,
    })
    .into_response())
}

/// Download all that is kept of what a job's containers wrote.
///
/// That is everything up to 8 MiB, and of more the end: 8 MiB at least.
#[utoipa::path(get, path = "/runs/{run_id}/output/content", tag = "runs",
    responses((status = 200, body = String, content_type = "text/plain", example = json!("epoch 1 of 10\n")),
        (status = 404, description = "Run 'x' not found"),
        (status = 409, description = "It has no container of its own"),
        (status = 410, description = "It was purged")))]
async fn download(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
) -> Result<Response, ApiError> {
    let run = with_container(&app, &caller, &id).await?;
    let kept = app.logs.kept(&name_of(run.plane, run.run)).await;
    let kept = kept.map_err(|error| unreadable(&error))?;
    let headers = [
        (header::CONTENT_TYPE, "text/plain; charset=utf-8".to_owned()),
        (
            header::CONTENT_DISPOSITION,
            format!("attachment; filename=\"{}.txt\"", run.run),
        ),
    ];
    Ok((headers, Body::from(kept)).into_response())
}

async fn with_container(app: &App, caller: &Caller, id: &str) -> Result<RunSummary, ApiError> {
    let run = app.run(caller, id).await?;
    if !matches!(run.spec.target, Target::Container(_)) {
        let message = format!(
            "Run '{id}' has no container of its own; what a service writes is at /services/{{name}}/logs"
        );
        return Err(ApiError::new(ErrorCode::NoOutput, message));
    }
    match run.purged {
        true => Err(ApiError::new(
            ErrorCode::Purged,
            format!("What run '{id}' wrote was purged"),
        )),
        false => Ok(run),
    }
}
