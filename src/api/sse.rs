//! Server-sent events: a body that passes the ledger's rendered frames on without copying them.
//!
//! Frames: `retry:` first; `event: step` with the position as `id`; a comment as heartbeat; `event: gap` when the
//! asked position lies beyond the end, with the position it goes on from; `event: done` when the run has ended
//! and all was sent. Each follower costs its ring position, one chunk from disk and this future: under 16 KiB
//! with the connection's buffers.

use std::pin::pin;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde_json::json;
use tokio::time::Instant;

use super::authenticate::Watch;
use super::error::ApiError;
use super::limits::Place;
use super::query::Query;
use super::state::App;
use crate::domain::ids::{PlaneId, RunId};
use crate::ledger::Topic;

/// Where a stream begins and how it keeps itself alive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Resume {
    /// The position that the reader has already.
    pub after: u64,
    pub heartbeat: Duration,
}

impl Resume {
    /// From `name` (`after` or `after_seq`), `Last-Event-ID` and `heartbeat_s`.
    ///
    /// A browser reconnects to the same address, `after=0` and all, with `Last-Event-ID`: the larger counts.
    /// A `Last-Event-ID` that is no number counts as none, as the standard has it.
    pub fn read(query: &Query, headers: &HeaderMap, name: &str) -> Result<Resume, ApiError> {
        let after = query.int(name, 0..=u64::MAX, 0);
        let heartbeat = query.seconds("heartbeat_s", 0.1, 60.0, 5.0);
        query.finish()?;
        let last_event = headers
            .get("last-event-id")
            .and_then(|value| value.to_str().ok()?.trim().parse::<u64>().ok());
        Ok(Resume {
            after: after.max(last_event.unwrap_or(0)),
            heartbeat: Duration::from_secs_f64(heartbeat),
        })
    }
}

/// An answer that is a stream.
pub fn response(body: Body) -> Response {
    let mut response = body.into_response();
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    response
}

/// What a stream shows.
#[derive(Clone, Copy)]
pub enum Source {
    /// One run's records by cursor; ends with the run.
    Run { plane: PlaneId, run: RunId },
    /// A plane's, or the whole ledger's, by seq; never ends by itself.
    Ledger(Topic),
}

impl Source {
    fn topic(self) -> Topic {
        match self {
            Source::Run { plane, run } => Topic::Run { plane, run },
            Source::Ledger(topic) => topic,
        }
    }

    /// The last position there is now.
    fn tail(self, app: &App) -> Result<u64, ApiError> {
        match self {
            Source::Run { plane, run } => {
                let run = app.ledger.run(plane, run)?;
                Ok(run.map_or(0, |run| run.ledger_len))
            }
            Source::Ledger(_) => Ok(app.ledger.tail()),
        }
    }

    /// Whether the run has ended and everything up to its end was sent.
    fn end(self, app: &App, sent: u64) -> End {
        let Source::Run { plane, run } = self else {
            return End::Open;
        };
        match app.ledger.run(plane, run).ok().flatten() {
            Some(summary) if !summary.status.is_terminal() => End::Open,
            Some(summary) if sent >= summary.ledger_len => {
                let data = json!({"run_id": run.to_string(), "cursor": sent, "status": "terminal"});
                End::Reached(Bytes::from(format!("event: done\ndata: {data}\n\n")))
            }
            _ => End::Ahead,
        }
    }
}

/// How far a stream is from its end.
enum End {
    /// There is none in sight: look again when a record ends the run.
    Open,
    /// The run has ended, and records are still to be sent.
    Ahead,
    /// Nothing is left; the closing frame.
    Reached(Bytes),
}

const KEEP_ALIVE: Bytes = Bytes::from_static(b": keep-alive\n\n");

/// The stream of a source from a position on. It ends soon after its reader may read it no more.
pub fn stream(
    app: App,
    place: Place,
    source: Source,
    resume: Resume,
    mut watch: Watch,
) -> Result<Response, ApiError> {
    let tail = source.tail(&app)?;
    let retry = Bytes::from(format!("retry: {}\n\n", app.config.stream_retry_ms));
    let gap = (resume.after > tail).then(|| gap(resume.after, tail));
    let mut sent = resume.after.min(tail);
    let mut follower = app.ledger.follow(source.topic(), sent);
    let stopping = app.stopping.clone();
    let frames = async_stream::stream! {
        let _place = place;
        // Made once for all frames: the wait for a stop stays enlisted, and the timer stays armed.
        let mut stop = pin!(stopping.cancelled());
        let mut last_sent = Instant::now();
        let silent = watch.due_by(last_sent + resume.heartbeat);
        let mut silence = pin!(tokio::time::sleep_until(silent));
        yield retry.clone();
        if let Some(gap) = gap {
            yield gap;
        }
        // Looked at only around a record that ends the run, as it costs a read.
        let mut may_be_done = true;
        loop {
            if may_be_done {
                match source.end(&app, sent) {
                    End::Reached(done) => {
                        yield done;
                        break;
                    }
                    End::Ahead => {}
                    End::Open => may_be_done = false,
                }
            }
            tokio::select! {
                // First the stop: a reader with much to catch up with would else be sent it all.
                biased;
                () = stop.as_mut() => {
                    yield retry.clone();
                    break;
                }
                frame = follower.next() => match frame {
                    Ok(frame) => {
                        may_be_done |= frame.ends_run;
                        sent = follower.position();
                        last_sent = Instant::now();
                        if !watch.admits(last_sent) {
                            break;
                        }
                        yield frame.sse.clone();
                    }
                    Err(error) => {
                        tracing::error!(error = %error, "a stream could not be read on; its reader will reconnect");
                        yield retry.clone();
                        break;
                    }
                },
                () = silence.as_mut() => {
                    // A frame does not rearm it: that costs more than a look when it fires.
                    let now = Instant::now();
                    if !watch.admits(now) {
                        break;
                    }
                    if now.duration_since(last_sent) >= resume.heartbeat {
                        last_sent = now;
                        yield KEEP_ALIVE;
                    }
                    silence.as_mut().reset(watch.due_by(last_sent + resume.heartbeat));
                }
            }
        }
    };
    Ok(response(Body::from_stream(tokio_stream::StreamExt::map(
        frames,
        Ok::<_, std::convert::Infallible>,
    ))))
}

/// Tells that the reader knows more than there is, and moves its `id` back to the end.
fn gap(after: u64, tail: u64) -> Bytes {
    let data = json!({"reason": "after_is_beyond_the_end", "after": after, "resumed_after": tail});
    Bytes::from(format!("id: {tail}\nevent: gap\ndata: {data}\n\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resume(query: &str, last_event: Option<&str>) -> Result<Resume, ApiError> {
        let mut headers = HeaderMap::new();
        if let Some(id) = last_event {
            headers.insert("last-event-id", HeaderValue::from_str(id).unwrap());
        }
        Resume::read(&Query::parse(query), &headers, "after")
    }

    #[test]
    fn the_larger_of_both_positions_counts() {
        assert_eq!(resume("", None).unwrap().after, 0);
        assert_eq!(resume("after=0", Some("7")).unwrap().after, 7);
        assert_eq!(resume("after=9", Some("7")).unwrap().after, 9);
        assert_eq!(resume("after=2", Some("junk")).unwrap().after, 2);
        assert!(resume("after=-1", None).is_err());
        assert!(resume("heartbeat_s=0.1", None).is_err());
        assert_eq!(
            resume("heartbeat_s=0.2", None).unwrap().heartbeat,
            Duration::from_millis(200)
        );
    }
}
