//! How the example service gives way: checkpoints on a signal or on request, and sleep. It has no GPU memory, so that
//! its sleep is the protocol alone.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::{Cancel, Shared, lock, refuse};

/// How long `/checkpoint` waits at most.
const CHECKPOINT_WAIT: Duration = Duration::from_secs(60);

/// Checkpoints of one job: how many were asked for, and how many of them are saved.
#[derive(Clone, Debug, Default)]
pub struct Checkpoints {
    asked: Arc<watch::Sender<u64>>,
    saved: Arc<watch::Sender<u64>>,
}

impl Checkpoints {
    /// Asks for one; its number.
    fn ask(&self) -> u64 {
        self.asked.send_modify(|asked| *asked += 1);
        *self.asked.borrow()
    }

    /// The last one asked for, if it is not saved.
    pub fn asked(&self) -> Option<u64> {
        let (asked, saved) = (*self.asked.borrow(), *self.saved.borrow());
        (asked > saved).then_some(asked)
    }

    /// It is saved, and all before it.
    pub fn saved(&self, number: u64) {
        self.saved.send_replace(number);
    }

    /// Returns when one is wanted.
    pub async fn wanted(&self) {
        let saved = *self.saved.borrow();
        let mut asked = self.asked.subscribe();
        // Its sender lives as long as this.
        let _ = asked.wait_for(|asked| *asked > saved).await;
    }

    async fn wait(&self, number: u64) {
        let mut saved = self.saved.subscribe();
        let _ = saved.wait_for(|saved| *saved >= number).await;
    }
}

/// Asks every job for a checkpoint at each SIGUSR1.
pub(super) fn on_signal(shared: &Arc<Shared>) -> std::io::Result<()> {
    let mut signals = signal(SignalKind::user_defined1())?;
    let shared = Arc::downgrade(shared);
    tokio::spawn(async move {
        while signals.recv().await.is_some() {
            let Some(shared) = shared.upgrade() else {
                return;
            };
            for job in lock(&shared).values() {
                job.checkpoints.ask();
            }
        }
    });
    Ok(())
}

pub(super) fn router() -> Router<Arc<Shared>> {
    Router::new()
        .route("/checkpoint", post(checkpoint))
        .route("/sleep", post(sleep))
        .route("/wake_up", post(wake_up))
        .route("/is_sleeping", get(is_sleeping))
}

/// Answers when the job's checkpoint is saved.
async fn checkpoint(State(shared): State<Arc<Shared>>, body: axum::body::Bytes) -> Response {
    let request: Cancel = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(error) => return refuse(StatusCode::UNPROCESSABLE_ENTITY, &error.to_string()),
    };
    let Some(job) = request.find(&shared) else {
        return refuse(StatusCode::NOT_FOUND, "no such job is here");
    };
    let number = job.checkpoints.ask();
    let saved = tokio::time::timeout(CHECKPOINT_WAIT, async {
        tokio::select! {
            () = job.checkpoints.wait(number) => true,
            () = job.ended.cancelled() => false,
        }
    });
    match saved.await {
        Ok(true) => axum::Json(json!({"saved": true})).into_response(),
        Ok(false) => refuse(StatusCode::CONFLICT, "the job ended meanwhile"),
        Err(_) => refuse(StatusCode::GATEWAY_TIMEOUT, "the job saves nothing"),
    }
}

async fn sleep(State(shared): State<Arc<Shared>>) -> Response {
    if !lock(&shared).is_empty() {
        return refuse(StatusCode::CONFLICT, "jobs are here");
    }
    shared.asleep.store(true, Ordering::Release);
    is_sleeping(State(shared)).await
}

async fn wake_up(State(shared): State<Arc<Shared>>) -> Response {
    shared.asleep.store(false, Ordering::Release);
    is_sleeping(State(shared)).await
}

async fn is_sleeping(State(shared): State<Arc<Shared>>) -> Response {
    let asleep = shared.asleep.load(Ordering::Acquire);
    axum::Json(json!({"is_sleeping": asleep})).into_response()
}
