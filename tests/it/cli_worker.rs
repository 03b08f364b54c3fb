//! The example worker as a process: statistics, progress, checkpoints, cancellation. The gateway's two
//! endpoints that it calls are stood in for, so that what it sends can be looked at.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::routing::{post, put};
use serde_json::{Value, json};

use crate::rungate::rungate;

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(20);
const RUN: &str = "0198c0de-0000-7000-8000-000000000001";

#[derive(Default)]
struct Seen {
    progress: Vec<Value>,
    checkpoint: Option<Vec<u8>>,
    authorization: Option<String>,
    attempt: Option<String>,
}

type Shared = Arc<Mutex<Seen>>;

async fn progress(State(seen): State<Shared>, body: axum::Json<Value>) -> &'static str {
    seen.lock().unwrap().progress.push(body.0);
    "{}"
}

async fn save(State(seen): State<Shared>, headers: HeaderMap, body: Bytes) -> &'static str {
    let header = |name: &str| Some(headers.get(name)?.to_str().ok()?.to_owned());
    let mut seen = seen.lock().unwrap();
    seen.authorization = header("authorization");
    seen.attempt = header("x-rungate-attempt");
    seen.checkpoint = Some(body.to_vec());
    "{}"
}

async fn load(State(seen): State<Shared>) -> Vec<u8> {
    seen.lock().unwrap().checkpoint.clone().unwrap_or_default()
}

async fn stand_in() -> (SocketAddr, Shared) {
    let seen = Shared::default();
    let router = Router::new()
        .route("/queue/{run}/progress", post(progress))
        .route("/api/gateway/runs/{run}/checkpoint", put(save).get(load))
        .with_state(Arc::clone(&seen));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    (address, seen)
}

/// A worker, ended with its test.
struct Worker {
    child: Child,
    url: String,
    http: reqwest::Client,
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Worker {
    async fn start(home: &Path, gateway: SocketAddr) -> Self {
        let token = home.join("token");
        std::fs::write(&token, "secret\n").unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let child = rungate(home, &["worker"])
            .env("PORT", port.to_string())
            .env("RUNGATE_GATEWAY_URL", format!("http://{gateway}"))
            .env("RUNGATE_TOKEN_FILE", token)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let worker = Self {
            child,
            url: format!("http://127.0.0.1:{port}"),
            http: reqwest::Client::builder().no_proxy().build().unwrap(),
        };
        let health = format!("{}/health", worker.url);
        let healthy = async {
            while worker.http.get(&health).send().await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let healthy = tokio::time::timeout(PATIENCE, healthy).await;
        healthy.expect("the worker is up");
        worker
    }

    fn process(&self, attempt: u32, body: &Value) -> reqwest::RequestBuilder {
        self.http
            .post(format!("{}/process", self.url))
            .header("x-rungate-run-id", RUN)
            .header("x-rungate-attempt", attempt.to_string())
            .timeout(PATIENCE)
            .json(body)
    }
}

fn text(home: &Path) -> String {
    let path = home.join("text");
    let line = "the quick brown fox jumps over the lazy dog\n";
    std::fs::write(&path, line.repeat(100)).unwrap();
    path.display().to_string()
}

async fn until(mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, wait).await;
    waited.expect("it happens in time");
}

#[tokio::test]
async fn a_cancelled_job_saves_a_checkpoint_and_its_next_attempt_goes_on_from_there() {
    let home = tempfile::tempdir().unwrap();
    let (gateway, seen) = stand_in().await;
    let worker = Worker::start(home.path(), gateway).await;
    let file = text(home.path());
    let slow = json!({"files": [file], "chunk_bytes": 64, "delay_ms": 200});
    let call = tokio::spawn(worker.process(1, &slow).send());
    until(|| !seen.lock().unwrap().progress.is_empty()).await;
    let cancel = json!({"run_id": RUN, "attempt": 1, "reason": "preempt"});
    let url = format!("{}/cancel", worker.url);
    let answer = worker.http.post(url).json(&cancel).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(answer, json!({"stopped": true, "known": true}));
    assert_eq!(call.await.unwrap().unwrap().status(), 409);
    {
        let seen = seen.lock().unwrap();
        assert!(seen.checkpoint.is_some());
        assert_eq!(seen.authorization.as_deref(), Some("Bearer secret"));
        assert_eq!(seen.attempt.as_deref(), Some("1"));
    }
    // The host of the link is ignored: the worker talks to its own gateway only.
    let link = format!("http://evil.example/api/gateway/runs/{RUN}/checkpoint");
    let request = worker.process(2, &json!({"files": [file]}));
    let request = request.header("x-rungate-checkpoint", link);
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let result: Value = answer.json().await.unwrap();
    assert!(result["resumed_at_bytes"].as_u64().unwrap() > 0, "{result}");
    assert_eq!(result["statistics"]["lines"], 100);
    assert_eq!(result["statistics"]["words"], 900);
    assert_eq!(result["statistics"]["top_words"][0], json!(["the", 200]));
    let last = seen.lock().unwrap().progress.last().cloned().unwrap();
    assert_eq!(last["percent"], 100.0);
}

#[tokio::test]
async fn a_dropped_call_stops_its_job_and_saves_what_there_is() {
    let home = tempfile::tempdir().unwrap();
    let (gateway, seen) = stand_in().await;
    let worker = Worker::start(home.path(), gateway).await;
    let file = text(home.path());
    let slow = json!({"files": [file], "chunk_bytes": 16, "delay_ms": 60_000});
    let call = tokio::spawn(worker.process(1, &slow).send());
    until(|| !seen.lock().unwrap().progress.is_empty()).await;
    call.abort();
    until(|| seen.lock().unwrap().checkpoint.is_some()).await;
}

#[tokio::test]
async fn failures_on_request_and_bad_requests_have_their_status() {
    let home = tempfile::tempdir().unwrap();
    let (gateway, _) = stand_in().await;
    let mut worker = Worker::start(home.path(), gateway).await;
    let cases = [
        (json!({"operation": "sleep", "ms": 1}), 200),
        (json!({"operation": "fail"}), 500),
        (json!({"operation": "dance"}), 422),
        (json!({"files": []}), 422),
        (json!({"files": ["/nonexistent"]}), 422),
    ];
    for (body, status) in cases {
        let answer = worker.process(1, &body).send().await.unwrap();
        assert_eq!(answer.status(), status, "{body}");
    }
    let exit = json!({"operation": "exit", "code": 7});
    assert!(worker.process(1, &exit).send().await.is_err());
    let mut ended = None;
    until(|| {
        ended = worker.child.try_wait().unwrap();
        ended.is_some()
    })
    .await;
    assert_eq!(ended.unwrap().code(), Some(7));
}
