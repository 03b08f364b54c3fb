//! From an urgent job's submit to its service's receiving the call, where another has to save a checkpoint of a second
//! first.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::client::Connection;
use crate::report::{Bar, Figure};
use crate::scale::Scale;
use crate::servers::{COMMANDS_PATH, Process, START_PATH};
use crate::{Context, Failure};

const GROUP: &str = "preemption";
/// What the service takes to save a checkpoint.
const CHECKPOINT: Duration = Duration::from_secs(1);
/// How long a call may take to arrive.
const PATIENCE: Duration = Duration::from_secs(60);
const REGISTER_PATH: &str = "/services/register";

/// All figures of this file.
pub fn measure(context: &mut Context, scale: &Scale) -> Result<(), Failure> {
    let settings = [("RUNGATE_MIN_RUNTIME_MS", "0")];
    let process = Process::gateway_with(&context.dir("preemption")?, &settings)?;
    let runtime = Context::clients()?;
    let waits_ms = runtime.block_on(rounds(&process, scale.rounds))?;
    let name = "urgent submit to its call, after a checkpoint of 1 s";
    let figure = Figure::of(GROUP, name, "ms", &waits_ms);
    context.add(figure.bar(Bar::AtMost(1_500.0)));
    Ok(())
}

/// A service whose calls are told, and end at once when they are urgent, else never.
#[derive(Default)]
struct Service {
    held: Notify,
    urgent: Notify,
}

async fn process(State(service): State<Arc<Service>>, body: Bytes) -> &'static str {
    if body.windows(4).any(|part| part == b"hold") {
        service.held.notify_one();
        std::future::pending::<()>().await;
    }
    service.urgent.notify_one();
    "{}"
}

async fn checkpoint() -> StatusCode {
    tokio::time::sleep(CHECKPOINT).await;
    StatusCode::NO_CONTENT
}

async fn rounds(process_: &Process, rounds: usize) -> Result<Vec<f64>, Failure> {
    let service = Arc::new(Service::default());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let router = Router::new()
        .route("/health", get(|| async { "{}" }))
        .route("/process", post(process))
        .route("/cancel", post(|| async { "{}" }))
        .route("/checkpoint", post(checkpoint))
        .with_state(service.clone());
    tokio::spawn(async move { axum::serve(listener, router).await });
    let mut gateway = process_.server.connect().await?;
    let ladder = json!([{"step": "checkpoint", "path": "/checkpoint", "seconds": 10}, {"step": "stop", "seconds": 5}]);
    let registered =
        json!({"name": "s", "type": "s", "url": url, "cancel_path": "/cancel", "ladder": ladder});
    gateway
        .post(REGISTER_PATH, Bytes::from(registered.to_string()))
        .await?;
    let mut waits_ms = Vec::new();
    // The first is not counted: everything is cold.
    for round in 0..=rounds {
        let victim = start(&mut gateway, "hold", 5).await?;
        tokio::time::timeout(PATIENCE, service.held.notified()).await?;
        let sent = Instant::now();
        start(&mut gateway, "urgent", 1).await?;
        tokio::time::timeout(PATIENCE, service.urgent.notified()).await?;
        if round > 0 {
            waits_ms.push(sent.elapsed().as_secs_f64() * 1e3);
        }
        // It goes on, and is not wanted any more.
        tokio::time::timeout(PATIENCE, service.held.notified()).await?;
        let cancel = json!({"command_id": format!("c{round}"), "run_id": victim, "type": "cancel", "payload": {}});
        gateway
            .post(COMMANDS_PATH, Bytes::from(cancel.to_string()))
            .await?;
    }
    Ok(waits_ms)
}

async fn start(gateway: &mut Connection, word: &str, priority: u8) -> Result<String, Failure> {
    let job =
        json!({"job": {"service_type": "s", "payload": {"word": word}, "priority": priority}});
    let answer = gateway
        .post(START_PATH, Bytes::from(job.to_string()))
        .await?;
    let answer: Value = serde_json::from_slice(&answer)?;
    let run = answer["run_id"].as_str();
    Ok(run.ok_or("a start without a run_id")?.to_owned())
}
