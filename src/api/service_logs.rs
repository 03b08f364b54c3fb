//! What a service wrote to its output: the last lines, and each new one as it comes.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::StreamExt;
use serde::Serialize;
use serde_json::json;
use tokio::time::Instant;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::authenticate::Watch;
use super::body::PathOf;
use super::error::ApiError;
use super::guard::Caller;
use super::limits::Place;
use super::query::Query;
use super::routes::Routes;
use super::service_owner::find_owned;
use super::sse;
use super::state::App;
use crate::domain::ids::ServiceName;
use crate::driver::{LogError, LogLine};

/// Most lines that are told at once.
const MAX_TAIL: u64 = 10_000;

/// Silence after which a comment is sent.
const HEARTBEAT: std::time::Duration = std::time::Duration::from_secs(5);

/// The route of this file, at the root and under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default().routes(routes!(read))
}

/// The last lines of a service's output.
#[derive(Serialize, ToSchema)]
pub struct LogLines {
    pub service: String,
    /// Oldest first.
    pub lines: Vec<String>,
}

/// Read a service's output.
///
/// With `follow` it is a stream: `event: line` carries `{"line"}`, `event: gap` `{"dropped_bytes"}` when the log was cut
/// faster than it was read.
#[utoipa::path(get, path = "/services/{name}/logs", tag = "services",
    params(
        ("tail" = Option<u64>, Query, description = "Last lines, up to 10000; 200 when absent"),
        ("follow" = Option<bool>, Query, description = "Stay, as server-sent events"),
    ),
    responses((status = 200, content(
            (LogLines = "application/json", example = json!({"service": "stats", "lines": ["listening on 127.0.0.1:40123"]})),
            (String = "text/event-stream"))),
        (status = 404, description = "Unknown service: x")))]
async fn read(
    State(app): State<App>,
    caller: Caller,
    PathOf(name): PathOf<String>,
    query: Query,
) -> Result<Response, ApiError> {
    let (tail, follow) = {
        let tail = query.int("tail", 0..=MAX_TAIL, 200) as usize;
        let follow = query.boolean("follow").unwrap_or(false);
        query.finish()?;
        (tail, follow)
    };
    drop(query);
    let service = find_owned(&app, &caller, &name)?.spec.name;
    if follow {
        let place = app.limits.stream(&caller.principal)?;
        let watch = Watch::new(&app, &caller);
        return Ok(stream(app, place, &service, tail, watch));
    }
    let lines = app
        .logs
        .tail(&service, tail)
        .await
        .map_err(|error| unreadable(&error))?;
    Ok(Json(LogLines {
        service: name,
        lines,
    })
    .into_response())
}

fn unreadable(error: &LogError) -> ApiError {
    tracing::error!(%error, source = ?std::error::Error::source(error), "a service's log could not be read");
    ApiError::internal()
}

fn stream(
    app: App,
    place: Place,
    service: &ServiceName,
    tail: usize,
    mut watch: Watch,
) -> Response {
    let lines = app.logs.follow(service, tail);
    let stopping = app.stopping.clone();
    let retry = Bytes::from(format!("retry: {}\n\n", app.config.stream_retry_ms));
    let frames = async_stream::stream! {
        let _place = place;
        let mut lines = std::pin::pin!(lines);
        yield Ok::<_, std::convert::Infallible>(retry.clone());
        let mut last_sent = Instant::now();
        while watch.admits(Instant::now()) {
            let line = tokio::select! {
                biased;
                () = stopping.cancelled() => break,
                line = lines.next() => line,
                () = tokio::time::sleep_until(watch.due_by(last_sent + HEARTBEAT)) => {
                    if last_sent.elapsed() >= HEARTBEAT {
                        last_sent = Instant::now();
                        yield Ok(Bytes::from_static(b": keep-alive\n\n"));
                    }
                    continue;
                }
            };
            last_sent = Instant::now();
            match line {
                Some(Ok(line)) => yield Ok(frame(&line)),
                Some(Err(error)) => {
                    unreadable(&error);
                    break;
                }
                None => break,
            }
        }
        yield Ok(retry);
    };
    sse::response(Body::from_stream(frames))
}

fn frame(line: &LogLine) -> Bytes {
    let (event, data) = match line {
        LogLine::Text(text) => ("line", json!({"line": text})),
        LogLine::Dropped { bytes } => ("gap", json!({"dropped_bytes": bytes})),
    };
    Bytes::from(format!("event: {event}\ndata: {data}\n\n"))
}
