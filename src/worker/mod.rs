//! The example service that ships with Rungate: real text statistics in chunks, with progress,
//! checkpoints, resumption and cancellation. `rungate worker` runs it; the demo and the tests use it.

mod gateway;
mod give_way;
mod job;
mod scan;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

pub use gateway::{Gateway, is_loopback};
pub use scan::{Report, scan_all};

use gateway::Headers;
use give_way::Checkpoints;
use job::{Operation, Outcome};

/// Jobs at once; the gateway keeps to the service's own `concurrency`, this is the wall behind it.
const MAX_JOBS: usize = 64;
/// Largest payload taken, in bytes.
const MAX_BODY_BYTES: usize = 1 << 20;
/// How long `/cancel` waits for the job to come to rest: a chunk and two calls to the gateway.
const CANCEL_WAIT: Duration = Duration::from_secs(15);
/// Longest run id taken from a header, in bytes.
const MAX_RUN_ID_BYTES: usize = 64;

/// A job in progress.
#[derive(Clone)]
struct Active {
    attempt: Option<String>,
    stop: CancellationToken,
    ended: CancellationToken,
    checkpoints: Checkpoints,
}

struct Shared {
    gateway: Gateway,
    jobs: Mutex<HashMap<String, Active>>,
    slots: Arc<Semaphore>,
    shutdown: CancellationToken,
    asleep: AtomicBool,
}

/// Serves on `address` until `shutdown`; jobs in progress save a last checkpoint first.
///
/// # Errors
/// The address is taken, or the listener fails.
pub async fn serve(
    address: SocketAddr,
    gateway: Gateway,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    let shared = Arc::new(Shared {
        gateway,
        jobs: Mutex::default(),
        slots: Arc::new(Semaphore::new(MAX_JOBS)),
        shutdown: shutdown.clone(),
        asleep: AtomicBool::new(false),
    });
    give_way::on_signal(&shared)?;
    let router = Router::new()
        .route("/health", get(health))
        .route("/process", post(process))
        .route("/cancel", post(cancel))
        .merge(give_way::router())
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(shared);
    let listener = TcpListener::bind(address).await?;
    tracing::info!(address = %listener.local_addr()?, "the worker listens");
    axum::serve(listener, router)
        .with_graceful_shutdown(shutdown.cancelled_owned())
        .await
}

async fn health() -> Response {
    axum::Json(json!({"status": "ok"})).into_response()
}

async fn process(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    body: axum::body::Bytes,
) -> Response {
    let Ok(slot) = Arc::clone(&shared.slots).try_acquire_owned() else {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "too many jobs");
    };
    if shared.asleep.load(Ordering::Acquire) {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "it sleeps");
    }
    let operation = serde_json::from_slice::<Value>(&body)
        .map_err(|error| error.to_string())
        .and_then(Operation::parse);
    let operation = match operation {
        Ok(operation) => operation,
        Err(text) => return refuse(StatusCode::UNPROCESSABLE_ENTITY, &text),
    };
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let run = header("x-rungate-run-id").unwrap_or("local").to_owned();
    if run.len() > MAX_RUN_ID_BYTES || !run.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    {
        return refuse(StatusCode::BAD_REQUEST, "X-Rungate-Run-Id is no run id");
    }
    let attempt = header("x-rungate-attempt").map(str::to_owned);
    let told = Headers {
        progress: header("x-rungate-progress"),
        checkpoint: header("x-rungate-checkpoint"),
        token: header("x-rungate-token"),
    };
    let link = shared.gateway.link(run.clone(), attempt.clone(), told);
    let active = Active {
        attempt,
        stop: shared.shutdown.child_token(),
        ended: CancellationToken::new(),
        checkpoints: Checkpoints::default(),
    };
    // A call that is dropped stops its job, which then still saves what it has: hence a task of its own.
    let _dropped = active.stop.clone().drop_guard();
    let task = tokio::spawn(async move {
        let _slot = slot;
        let _ended = active.ended.clone().drop_guard();
        supersede(&shared, &run, active.clone()).await;
        tracing::info!(run.id = run, run.attempt = active.attempt, "the job begins");
        let outcome = operation
            .perform(&link, &active.stop, &active.checkpoints)
            .await;
        forget(&shared, &run, &active);
        tracing::info!(run.id = run, outcome = outcome.name(), "the job is over");
        outcome
    });
    task.await.map_or_else(
        |error| refuse(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        answer,
    )
}

/// Enters a job; an earlier attempt of the same run comes to rest first.
async fn supersede(shared: &Shared, run: &str, active: Active) {
    let earlier = lock(shared).insert(run.to_owned(), active);
    if let Some(earlier) = earlier {
        earlier.stop.cancel();
        // Past the wait it goes on beside us, fenced off by its attempt's number.
        let _ = tokio::time::timeout(CANCEL_WAIT, earlier.ended.cancelled()).await;
    }
}

fn forget(shared: &Shared, run: &str, active: &Active) {
    let mut jobs = lock(shared);
    if jobs
        .get(run)
        .is_some_and(|job| job.attempt == active.attempt)
    {
        jobs.remove(run);
    }
}

fn lock(shared: &Shared) -> std::sync::MutexGuard<'_, HashMap<String, Active>> {
    shared.jobs.lock().unwrap_or_else(PoisonError::into_inner)
}

fn answer(outcome: Outcome) -> Response {
    match outcome {
        Outcome::Done(result) => axum::Json(result).into_response(),
        Outcome::Stopped => refuse(StatusCode::CONFLICT, "stopped"),
        Outcome::Invalid(text) => refuse(StatusCode::UNPROCESSABLE_ENTITY, &text),
        Outcome::Failed(text) => refuse(StatusCode::INTERNAL_SERVER_ERROR, &text),
        Outcome::Exit(code) => {
            tracing::warn!(exit.code = code, "a job asked this process to end");
            std::process::exit(code)
        }
    }
}

fn refuse(status: StatusCode, text: &str) -> Response {
    (status, axum::Json(json!({"error": text}))).into_response()
}

#[derive(Deserialize)]
struct Cancel {
    run_id: String,
    #[serde(default)]
    attempt: Value,
}

impl Cancel {
    /// The job that it is about, if that is here.
    fn find(&self, shared: &Shared) -> Option<Active> {
        let attempt = match &self.attempt {
            Value::Null => None,
            Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        };
        let job = lock(shared).get(&self.run_id).cloned();
        job.filter(|job| attempt.is_none() || attempt == job.attempt)
    }
}

/// Stops a job after its current chunk and answers once it is at rest. A job that is not here is.
async fn cancel(State(shared): State<Arc<Shared>>, body: axum::body::Bytes) -> Response {
    let request: Cancel = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(error) => return refuse(StatusCode::UNPROCESSABLE_ENTITY, &error.to_string()),
    };
    let Some(job) = request.find(&shared) else {
        return axum::Json(json!({"stopped": true, "known": false})).into_response();
    };
    job.stop.cancel();
    match tokio::time::timeout(CANCEL_WAIT, job.ended.cancelled()).await {
        Ok(()) => axum::Json(json!({"stopped": true, "known": true})).into_response(),
        Err(_) => refuse(StatusCode::GATEWAY_TIMEOUT, "the job has not come to rest"),
    }
}
