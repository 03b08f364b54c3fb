//! A service and a receiver of callbacks inside the test: it keeps what it was sent and answers as it is told.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::sync::Notify;

/// One request as it came.
#[derive(Clone, Debug)]
pub struct Received {
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

impl Received {
    pub fn header(&self, name: &str) -> &str {
        let value = self.headers.get(name);
        value.and_then(|value| value.to_str().ok()).unwrap_or("")
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }
}

#[derive(Default)]
struct Inner {
    unhealthy: AtomicBool,
    probes: AtomicU64,
    progress: AtomicU64,
    jobs: Mutex<Vec<Received>>,
    cancels: Mutex<Vec<Received>>,
    callbacks: Mutex<Vec<Received>>,
    /// Statuses of the next callbacks; 200 when there are none left.
    statuses: Mutex<VecDeque<u16>>,
    released: AtomicBool,
    release: Notify,
}

/// It listens until the test ends.
#[derive(Clone)]
pub struct Scripted {
    pub addr: SocketAddr,
    inner: Arc<Inner>,
}

impl Scripted {
    pub async fn start() -> Scripted {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let scripted = Scripted {
            addr: listener.local_addr().unwrap(),
            inner: Arc::default(),
        };
        let router = Router::new()
            .route("/health", get(health))
            .route("/process", post(process))
            .route("/cancel", post(cancel))
            .route("/progress", get(progress))
            .route("/callback", post(callback))
            .with_state(scripted.inner.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        scripted
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    /// A registration of it as an external service.
    pub fn service(&self, name: &str, service_type: &str) -> Value {
        json!({"name": name, "type": service_type, "url": self.url(""), "cancel_path": "/cancel"})
    }

    pub fn set_healthy(&self, healthy: bool) {
        self.inner.unhealthy.store(!healthy, Ordering::SeqCst);
    }

    /// Lets jobs that hold (`{"hold": true}`) go on, now and later.
    pub fn release(&self) {
        self.inner.released.store(true, Ordering::SeqCst);
        self.inner.release.notify_waiters();
    }

    pub fn answer_callbacks(&self, statuses: &[u16]) {
        self.inner.statuses.lock().unwrap().extend(statuses);
    }

    pub fn jobs(&self) -> Vec<Received> {
        self.inner.jobs.lock().unwrap().clone()
    }

    pub fn cancels(&self) -> Vec<Received> {
        self.inner.cancels.lock().unwrap().clone()
    }

    pub fn callbacks(&self) -> Vec<Received> {
        self.inner.callbacks.lock().unwrap().clone()
    }

    /// Questions for progress so far.
    pub fn polls(&self) -> u64 {
        self.inner.progress.load(Ordering::SeqCst)
    }
}

async fn health(State(inner): State<Arc<Inner>>) -> StatusCode {
    inner.probes.fetch_add(1, Ordering::SeqCst);
    if inner.unhealthy.load(Ordering::SeqCst) {
        StatusCode::SERVICE_UNAVAILABLE
    } else {
        StatusCode::OK
    }
}

/// `{"hold": true}` answers once released, `{"status": n}` with that status, `{"text": t}` with that text as it is,
/// anything else with an echo.
async fn process(State(inner): State<Arc<Inner>>, headers: HeaderMap, body: Bytes) -> Response {
    let received = Received {
        headers,
        body: body.to_vec(),
    };
    let asked = received.json();
    inner.jobs.lock().unwrap().push(received);
    if asked["hold"] == true {
        let mut released = std::pin::pin!(inner.release.notified());
        released.as_mut().enable();
        if !inner.released.load(Ordering::SeqCst) {
            released.await;
        }
    }
    if let Some(text) = asked["text"].as_str() {
        return text.to_owned().into_response();
    }
    let status = asked["status"].as_u64().and_then(|n| u16::try_from(n).ok());
    let status = status.and_then(|n| StatusCode::from_u16(n).ok());
    (
        status.unwrap_or(StatusCode::OK),
        axum::Json(json!({"echo": asked})),
    )
        .into_response()
}

async fn cancel(State(inner): State<Arc<Inner>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let body = body.to_vec();
    let mut cancels = inner.cancels.lock().unwrap();
    cancels.push(Received { headers, body });
    StatusCode::OK
}

async fn progress(State(inner): State<Arc<Inner>>) -> Response {
    let asked = inner.progress.fetch_add(1, Ordering::SeqCst) + 1;
    axum::Json(json!({"percent": asked})).into_response()
}

async fn callback(State(inner): State<Arc<Inner>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let body = body.to_vec();
    let mut callbacks = inner.callbacks.lock().unwrap();
    callbacks.push(Received { headers, body });
    let status = inner.statuses.lock().unwrap().pop_front().unwrap_or(200);
    StatusCode::from_u16(status).unwrap()
}
