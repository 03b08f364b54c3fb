//! Whether the gateway lives and is ready, in the forms that clients and orchestrators ask for.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use http::StatusCode;
use serde_json::{Value, json};
use utoipa_axum::routes;

use super::guard::Caller;
use super::query::Query;
use super::routes::Routes;
use super::state::App;
use crate::clock::now;
use crate::coordinator::Handle;
use crate::ledger::Ledger;

/// How long the coordinator may take to answer before the gateway counts as not ready.
const READY_WAIT: Duration = Duration::from_secs(2);

/// How long what was found is told to further probes: anybody may ask as often as it likes.
const READY_FRESH: Duration = Duration::from_secs(1);

/// What the ledger and the coordinator say.
#[derive(Clone, Copy)]
struct Checks {
    reads: bool,
    decides: bool,
}

/// What was found by the last look, or will be: one look at a time, for all who ask meanwhile.
#[derive(Default)]
pub struct Readiness {
    last: Mutex<Option<Look>>,
}

struct Look {
    began: Instant,
    found: Shared<BoxFuture<'static, Checks>>,
}

impl Readiness {
    fn look(&self, app: &App) -> Shared<BoxFuture<'static, Checks>> {
        // Nothing panics while it is held.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some(look) if look.began.elapsed() < READY_FRESH => look.found.clone(),
            _ => {
                let found = check(app.ledger.clone(), app.handle.clone());
                let found = found.boxed().shared();
                *last = Some(Look {
                    began: Instant::now(),
                    found: found.clone(),
                });
                found
            }
        }
    }
}

async fn check(ledger: Ledger, handle: Handle) -> Checks {
    let decides = tokio::time::timeout(READY_WAIT, handle.queue_stats(None));
    Checks {
        // One entry of one table.
        reads: ledger.admits("default").is_ok(),
        decides: matches!(decides.await, Ok(Ok(_))),
    }
}

/// The open routes of this file, at the root.
pub fn open_router() -> Routes {
    Routes::default()
        .routes(routes!(api_health))
        .routes(routes!(livez))
        .routes(routes!(readyz))
}

/// The route of this file in both places of the GPU dialect.
pub fn dialect_router() -> Routes {
    Routes::default().routes(routes!(health))
}

/// The route of this file under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default().routes(routes!(ping))
}

/// Say that the gateway lives (GPU dialect).
#[utoipa::path(get, path = "/health", tag = "health", security(()), responses((status = 200, body = Object, example = json!({
    "status": "ok", "version": "0.1.0", "timestamp": "2026-11-21T02:00:00.000120+00:00"
}))))]
async fn health() -> Json<Value> {
    Json(json!({"status": "ok", "version": env!("CARGO_PKG_VERSION"), "timestamp": now()}))
}

/// Say that the gateway lives.
#[utoipa::path(get, path = "/api/health", tag = "health", security(()), responses((status = 200, body = Object, example = json!({
    "status": "healthy", "service": "rungate"
}))))]
async fn api_health() -> Json<Value> {
    Json(json!({"status": "healthy", "service": "rungate"}))
}

/// Say that the process lives; depends on nothing.
#[utoipa::path(get, path = "/livez", tag = "health", security(()), responses((status = 200, body = String, example = "ok")))]
async fn livez() -> &'static str {
    "ok\n"
}

/// Say whether the gateway takes work: 503 while it stops, cannot write, or has no room for more. What it found holds for a
/// second.
#[utoipa::path(get, path = "/readyz", tag = "health", security(()),
    params(("verbose" = Option<bool>, Query, description = "Each check on a line")),
    responses((status = 200, body = String, example = "ok"), (status = 503, body = String)))]
async fn readyz(State(app): State<App>, query: Query) -> Response {
    let verbose = query.boolean("verbose").unwrap_or(false);
    drop(query);
    let Checks { reads, decides } = app.readiness.look(&app).await;
    let checks = [
        ("serving", !app.stopping.is_cancelled()),
        ("ledger", reads),
        ("disk", !app.space.is_short()),
        ("coordinator", decides),
    ];
    let ready = checks.iter().all(|(_, good)| *good);
    let mut text = String::new();
    if verbose {
        for (name, good) in checks {
            text.push_str(if good { "[+] " } else { "[-] " });
            text.push_str(name);
            text.push('\n');
        }
    }
    if verbose && let Some(engine) = engine(&app) {
        text.push_str(&engine);
    }
    text.push_str(if ready { "ok\n" } else { "not ready\n" });
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, text).into_response()
}

/// The line of the container engine, if there shall be one. Work that needs none goes on without it.
fn engine(app: &App) -> Option<String> {
    let state = app.docker.is_wanted().then(|| app.docker.state())?;
    Some(match state.up {
        true => "[+] engine\n".to_owned(),
        false => format!("[ ] engine: {}\n", state.why_down()),
    })
}

/// Say that the gateway lives and the token is good.
#[utoipa::path(get, path = "/ping", tag = "health", responses((status = 200, body = Object, example = json!({
    "ok": true, "status": "healthy", "service": "rungate", "time": "2026-11-21T02:00:00.000120+00:00"
}))))]
async fn ping(_caller: Caller) -> Json<Value> {
    Json(json!({"ok": true, "status": "healthy", "service": "rungate", "time": now()}))
}
