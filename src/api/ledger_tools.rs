//! For the administrator: prove the running gateway's ledger, count it, and take it away as lines of JSON.

use std::io::{self, Write};
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use http::{HeaderValue, header};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use utoipa_axum::routes;

use super::error::ApiError;
use super::examples;
use super::guard::Caller;
use super::query::Query;
use super::routes::Routes;
use super::state::App;
use crate::clock::now;
use crate::ledger::TransferError;
use crate::ledger::checkpoint::{Checkpoint, PublicKey};

/// Bytes of one piece of an export.
const PIECE_BYTES: usize = 64 << 10;

/// Pieces on their way to a reader at most.
const PIECES: usize = 4;

/// How long a reader of an export may stand still: until then it holds a snapshot of the store, whose
/// space cannot be used again.
const STALL: Duration = Duration::from_secs(60);

/// The routes of this file, under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(verify))
        .routes(routes!(stats))
        .routes(routes!(checkpoint))
        .routes(routes!(export))
}

/// Prove the ledger: its hash chain, and that what is shown follows from it.
#[utoipa::path(get, path = "/ledger/verify", tag = "ledger", responses((status = 200, body = Object, example = json!({
    "ok": true, "records": 1204, "purged": 0, "runs": 96, "commands": 12, "services": 2, "tail_seq": 1204, "tail_hash": "9b1f…"
}))))]
async fn verify(State(app): State<App>, caller: Caller) -> Result<Json<Value>, ApiError> {
    let place = app.limits.stream(&caller.principal)?;
    let verified = app.scan_in(place, |ledger| Ok(ledger.verify(&mut |_| {})));
    Ok(Json(match verified.await? {
        Ok(verified) => {
            let mut answer = json!(verified);
            answer["ok"] = true.into();
            answer
        }
        Err(error) => {
            tracing::error!(%error, "the ledger failed its verification");
            json!({"ok": false, "error": error.to_string()})
        }
    }))
}

/// Count what the ledger holds.
#[utoipa::path(get, path = "/ledger/stats", tag = "ledger", responses((status = 200, body = Object, example = json!({
    "records": 1204, "events": {"job_queued": 96}, "runs": 96, "record_bytes": 310220, "tail_seq": 1204
}))))]
async fn stats(State(app): State<App>, caller: Caller) -> Result<Json<Value>, ApiError> {
    let place = app.limits.stream(&caller.principal)?;
    let stats = app.scan_in(place, |ledger| ledger.stats());
    Ok(Json(json!(stats.await?)))
}

/// Sign the ledger's head.
///
/// Keep it off this machine: `rungate ledger verify --checkpoint` shows with it that nothing before was changed.
#[utoipa::path(get, path = "/ledger/checkpoint", tag = "ledger", responses((status = 200, body = Object, example = json!({
    "checkpoint": 1, "ledger": "5a2f0f0e-6d2c-4d7e-9a53-0c7f1c0e9d11", "seq": 1204, "hash": "9b1f…",
    "at": "2026-11-21T02:00:00.000120+00:00", "key_id": "c0ffee0011223344", "signature": "ZmFrZQ…"
}))))]
async fn checkpoint(State(app): State<App>, _caller: Caller) -> Result<Json<Checkpoint>, ApiError> {
    let key = app.checkpoint_key.clone();
    let made = app.scan(move |ledger| {
        let public = PublicKey::new(key.public());
        Checkpoint::make(ledger, now(), &public, |message| key.sign(message))
    });
    Ok(Json(made.await?))
}

/// Export the ledger, one record a line.
///
/// `rungate ledger import` makes an equal ledger of it. An export that broke off ends without the chunked body's end.
#[utoipa::path(get, path = "/ledger/export", tag = "ledger",
    params(("after_seq" = Option<u64>, Query, description = "The last seq that is left out; 0 when absent")),
    responses((status = 200, description = "Newline-delimited JSON", content_type = "application/x-ndjson", body = String, example = json!(examples::EXPORT))))]
async fn export(
    State(app): State<App>,
    caller: Caller,
    query: Query,
) -> Result<Response, ApiError> {
    let after = query.int("after_seq", 0..=u64::MAX, 0);
    query.finish()?;
    drop(query);
    let place = app.limits.stream(&caller.principal)?;
    let (sender, receiver) = mpsc::channel(PIECES);
    let ledger = app.ledger.clone();
    let mut pieces = Pieces {
        buffer: BytesMut::with_capacity(PIECE_BYTES),
        sender: sender.clone(),
        stopping: app.stopping.clone(),
        runtime: tokio::runtime::Handle::current(),
    };
    tokio::task::spawn_blocking(move || {
        let _place = place;
        if let Err(error) = ledger.export(after, &mut pieces) {
            report(&error);
            // The reader learns by a body that breaks off; when it has left, nobody listens.
            let _ = sender.try_send(Err(io::Error::other("the export broke off")));
        }
    });
    let mut response =
        Body::from_stream(ReceiverStream::new(receiver).map(|piece| piece)).into_response();
    let kind = HeaderValue::from_static("application/x-ndjson");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}

fn report(error: &TransferError) {
    match error {
        // The reader left or stood still.
        TransferError::Write(error) => tracing::info!(%error, "an export was not read to its end"),
        error => tracing::error!(%error, "an export broke off"),
    }
}

/// Hands what is written to the connection, in pieces, at the reader's pace.
struct Pieces {
    buffer: BytesMut,
    sender: mpsc::Sender<io::Result<Bytes>>,
    stopping: CancellationToken,
    runtime: tokio::runtime::Handle,
}

impl Pieces {
    fn send(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let piece = self.buffer.split().freeze();
        let sent = async {
            tokio::select! {
                () = self.stopping.cancelled() => Err(io::Error::other("the gateway is stopping")),
                sent = self.sender.send_timeout(Ok(piece), STALL) => {
                    sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
                }
            }
        };
        self.runtime.block_on(sent)
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= PIECE_BYTES {
            self.send()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}
