//! What services and the containers of jobs write, as it comes: one stream for both.

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::StreamExt;
use serde_json::json;
use tokio::time::Instant;

use super::authenticate::Watch;
use super::error::ApiError;
use super::limits::Place;
use super::query::Query;
use super::sse;
use super::state::App;
use crate::domain::ids::{PlaneId, RunId, ServiceName};
use crate::driver::{LogError, LogLine};

/// Most lines that are told at once.
pub const MAX_TAIL: u64 = 10_000;

/// Silence after which a comment is sent.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Silence after which it is looked whether a run has ended; all that it wrote is read after another.
const LOOK_AFTER: Duration = Duration::from_millis(400);

/// How many of the last lines are wanted, and whether the caller stays.
pub fn wanted(query: &Query) -> Result<(usize, bool), ApiError> {
    let tail = query.int("tail", 0..=MAX_TAIL, 200) as usize;
    let follow = query.boolean("follow").unwrap_or(false);
    query.finish()?;
    Ok((tail, follow))
}

pub fn unreadable(error: &LogError) -> ApiError {
    tracing::error!(%error, source = ?std::error::Error::source(error), "a log could not be read");
    ApiError::internal()
}

/// The last lines of a log and each new one; to the end of the run, if it is one's.
pub fn stream(
    app: App,
    place: Place,
    service: &ServiceName,
    tail: usize,
    mut watch: Watch,
    run: Option<(PlaneId, RunId)>,
) -> Response {
    let lines = app.logs.follow(service, tail);
    let stopping = app.stopping.clone();
    let retry = Bytes::from(format!("retry: {}\n\n", app.config.stream_retry_ms));
    let frames = async_stream::stream! {
        let _place = place;
        let mut lines = std::pin::pin!(lines);
        yield Ok::<_, std::convert::Infallible>(retry.clone());
        let (mut last_sent, mut is_over) = (Instant::now(), false);
        while watch.admits(Instant::now()) {
            let mut pause = last_sent + HEARTBEAT;
            if run.is_some() {
                pause = pause.min(Instant::now() + LOOK_AFTER);
            }
            let line = tokio::select! {
                biased;
                () = stopping.cancelled() => break,
                line = lines.next() => line,
                () = tokio::time::sleep_until(watch.due_by(pause)) => {
                    // What was written just before the end is read by the next time.
                    if let Some((_, id)) = run.filter(|_| is_over) {
                        yield Ok(done(id));
                        return;
                    }
                    if let Some(run) = run {
                        is_over = has_ended(&app, run).await;
                    }
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

/// Whether a run has ended, or is not known any more.
async fn has_ended(app: &App, (plane, run): (PlaneId, RunId)) -> bool {
    let found = app.scan(move |ledger| ledger.run(plane, run)).await;
    found.is_ok_and(|run| run.is_none_or(|run| run.status.is_terminal()))
}

fn done(run: RunId) -> Bytes {
    let data = json!({"run_id": run.to_string()});
    Bytes::from(format!("event: done\ndata: {data}\n\n"))
}

fn frame(line: &LogLine) -> Bytes {
    let (event, data) = match line {
        LogLine::Text(text) => ("line", json!({"line": text})),
        LogLine::Dropped { bytes } => ("gap", json!({"dropped_bytes": bytes})),
    };
    Bytes::from(format!("event: {event}\ndata: {data}\n\n"))
}
