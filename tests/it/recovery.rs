//! A gateway that died and came back: its services' processes, the calls that were open, stops and callbacks that
//! were under way; and how it leaves in good order.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use reqwest::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::rng::Rng;
use crate::support::sse::EventSource;
use crate::support::wait::until;
use crate::support::{Gateway, Options, worker_service};

fn options() -> Options {
    Options::gpus("sim:24GiB")
        .set("RUNGATE_RETRY_BASE_MS", "10")
        .set("RUNGATE_RESTART_BASE_MS", "20")
        .set("RUNGATE_PROBE_INTERVAL_MS", "200")
}

async fn with_worker(options: Options, more: Value) -> Gateway {
    let gateway = Gateway::start(options).await;
    let body = worker_service(&gateway, "worker", "text", more);
    gateway.post("/services/register", body).await.expect(200);
    gateway
}

/// A job of some seconds with checkpoints.
fn long_job() -> Value {
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/LICENSE");
    json!({"service_type": "text", "max_attempts": 5,
        "payload": {"files": [text], "chunk_bytes": 128, "delay_ms": 40}})
}

/// The names of a run's records so far.
async fn story(gateway: &Gateway, run: &str) -> Vec<String> {
    let body = gateway
        .get(&format!("/api/gateway/runs/{run}/ledger?limit=1000"))
        .await
        .expect(200);
    effects(&body)
}

/// The names of all records so far.
async fn history(gateway: &Gateway) -> Vec<String> {
    let body = gateway.get("/api/gateway/ledger?limit=1000").await;
    effects(&body.expect(200))
}

fn effects(body: &Value) -> Vec<String> {
    let items = body["items"].as_array().expect("items");
    let name = |item: &Value| item["effect"]["type"].as_str().unwrap_or("").to_owned();
    items.iter().map(name).collect()
}

async fn tells(gateway: &Gateway, run: &str, effect: &str) {
    let what = format!("{run} tells {effect}");
    until(&what, || async {
        story(gateway, run).await.iter().any(|name| name == effect)
    })
    .await;
}

fn count(story: &[String], effect: &str) -> usize {
    story.iter().filter(|name| *name == effect).count()
}

/// What a service's process bears.
fn mark_of(pid: u32) -> String {
    let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    let text = String::from_utf8(environ).unwrap();
    let mark = text
        .split('\0')
        .find_map(|pair| pair.strip_prefix("RUNGATE_INSTANCE="));
    mark.unwrap().to_owned()
}

fn is_alive(pid: u32) -> bool {
    std::fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environ| !environ.is_empty())
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

#[tokio::test]
async fn a_healthy_process_is_adopted_and_the_job_goes_on_from_its_checkpoint() {
    let mut gateway = with_worker(options(), json!({"vram_gb": 4})).await;
    let run = gateway.start_job(long_job()).await;
    tells(&gateway, &run, "checkpoint_saved").await;
    let before = gateway.services_alive();
    gateway.kill();
    assert_eq!(gateway.services_alive(), before, "it outlives the gateway");
    gateway.launch().await;
    gateway.run_becomes(&run, "completed").await;
    assert_eq!(gateway.services_alive(), before, "the same process serves");
    let told = story(&gateway, &run).await;
    assert_eq!(count(&told, "job_dispatched"), 2, "{told:?}");
    let all = history(&gateway).await;
    assert_eq!(count(&all, "instance_adopted"), 1);
    assert_eq!(count(&all, "instance_spawned"), 1);
    let records = gateway
        .get(&format!("/api/gateway/runs/{run}/ledger?limit=1000"))
        .await;
    let text = records.text;
    assert!(text.contains("resumed_at_bytes") && !text.contains("\"resumed_at_bytes\":0"));
}

#[tokio::test]
async fn what_died_with_the_gateway_is_started_anew() {
    let mut gateway = with_worker(options(), json!({"vram_gb": 4})).await;
    let run = gateway.start_job(long_job()).await;
    tells(&gateway, &run, "job_dispatched").await;
    let before = gateway.services_alive();
    gateway.kill();
    for pid in &before {
        kill(*pid);
    }
    gateway.launch().await;
    gateway.run_becomes(&run, "completed").await;
    assert_ne!(gateway.services_alive(), before);
    let all = history(&gateway).await;
    assert_eq!(count(&all, "instance_adopted"), 0);
    assert_eq!(count(&all, "instance_spawned"), 2);
}

#[tokio::test]
async fn an_orphan_is_stopped_and_a_strangers_process_is_not() {
    let mut gateway = with_worker(options(), json!({})).await;
    let run = gateway.start_job(long_job()).await;
    tells(&gateway, &run, "job_dispatched").await;
    let mark = mark_of(gateway.services_alive()[0]);
    let (ledger, _) = mark.split_once('/').unwrap();
    let sleeper = |mark: String| {
        let mut command = Command::new("sleep");
        command.arg("1000").env("RUNGATE_INSTANCE", mark);
        command.process_group(0).stdin(Stdio::null());
        command.spawn().unwrap()
    };
    let mut orphan = sleeper(format!("{ledger}/removed/3"));
    let mut stranger = sleeper(format!("{}/removed/3", uuid::Uuid::new_v4()));
    gateway.kill();
    gateway.launch().await;
    until("the orphan is stopped", || {
        let ended = orphan.try_wait().unwrap().is_some();
        async move { ended }
    })
    .await;
    gateway.run_becomes(&run, "completed").await;
    assert!(stranger.try_wait().unwrap().is_none());
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[tokio::test]
async fn a_stop_under_way_goes_on() {
    let mut gateway = Gateway::start(options()).await;
    let script = "import http.server, os, signal\n\
        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n\
        class H(http.server.BaseHTTPRequestHandler):\n\
        \tdef do_GET(self):\n\t\tself.send_response(200); self.end_headers()\n\
        http.server.HTTPServer(('127.0.0.1', int(os.environ['PORT'])), H).serve_forever()\n";
    let more = json!({"command": ["python3", "-c", script], "grace_seconds": 3});
    let body = worker_service(&gateway, "stubborn", "stubborn", more);
    gateway.post("/services/register", body).await.expect(200);
    let start = gateway
        .request(Method::POST, "/services/stubborn/start")
        .send();
    let starting = tokio::spawn(start);
    until("it is ready", || async {
        count(&history(&gateway).await, "instance_ready") == 1
    })
    .await;
    let _ = starting.await;
    let before = gateway.services_alive();
    let stop = gateway
        .request(Method::POST, "/services/stubborn/stop")
        .send();
    let stopping = tokio::spawn(stop);
    until("TERM was sent", || async {
        count(&history(&gateway).await, "instance_signalled") == 1
    })
    .await;
    gateway.kill();
    let _ = stopping.await;
    assert_eq!(gateway.services_alive(), before, "it ignores TERM");
    gateway.launch().await;
    until("it is released", || async {
        count(&history(&gateway).await, "instance_released") == 1
    })
    .await;
    assert!(!before.iter().any(|pid| is_alive(*pid)));
    assert_eq!(count(&history(&gateway).await, "instance_adopted"), 0);
}

#[tokio::test]
async fn a_death_between_spawn_and_record_leaves_one_process() {
    let mut gateway = with_worker(options(), json!({})).await;
    let seed = Rng::seed("CRASH_SEED");
    eprintln!("CRASH_SEED={seed}");
    let mut rng = Rng::new(seed);
    for _ in 0..25 {
        let start = gateway
            .request(Method::POST, "/services/worker/start")
            .send();
        let starting = tokio::spawn(start);
        // The random moment is what is tested.
        tokio::time::sleep(std::time::Duration::from_micros(rng.below(60_000))).await;
        gateway.kill();
        let _ = starting.await;
        gateway.launch().await;
        let alive = gateway.services_alive();
        assert!(alive.len() <= 1, "{alive:?}");
        // Now and then from nothing again.
        if rng.below(3) == 0 {
            for pid in alive {
                kill(pid);
            }
        }
    }
    let run = gateway
        .start_job(json!({"service_type": "text", "payload": {"operation": "sleep", "ms": 1}}))
        .await;
    gateway.run_becomes(&run, "completed").await;
    let alive = gateway.services_alive();
    assert_eq!(alive.len(), 1, "{alive:?}");
    gateway.delete("/services/worker").await;
    until("nothing is left", || async {
        gateway.services_alive().is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_callback_is_tried_on_after_a_restart() {
    let options = options()
        .set("RUNGATE_CALLBACK_ALLOW_PRIVATE", "true")
        .set("RUNGATE_CALLBACK_BASE_MS", "100")
        .set("RUNGATE_CALLBACK_MAX_DELAY_MS", "100");
    let mut gateway = with_worker(options, json!({})).await;
    let reserved = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = reserved.local_addr().unwrap();
    drop(reserved);
    let job = json!({"service_type": "text", "payload": {"operation": "sleep", "ms": 1},
        "callback_url": format!("http://{addr}/done")});
    let run = gateway.start_job(job).await;
    tells(&gateway, &run, "callback_attempted").await;
    gateway.kill();
    gateway.launch().await;
    let listener = tokio::net::TcpListener::bind(addr).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut request = Vec::new();
    while !String::from_utf8_lossy(&request).contains(&run) {
        let mut chunk = [0; 4_096];
        let len = stream.read(&mut chunk).await.unwrap();
        assert!(len > 0, "a whole request");
        request.extend_from_slice(&chunk[..len]);
    }
    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    stream.write_all(answer).await.unwrap();
    until("it is delivered", || async {
        let path = format!("/api/gateway/runs/{run}/ledger?limit=1000");
        gateway.get(&path).await.text.contains("\"delivered\":true")
    })
    .await;
}

#[tokio::test]
async fn a_stop_lets_calls_end_closes_streams_and_leaves_a_snapshot() {
    let mut gateway = with_worker(options(), json!({})).await;
    let run = gateway.start_job(long_job()).await;
    let waiting = gateway
        .start_job(json!({"service_type": "none", "payload": {}}))
        .await;
    tells(&gateway, &run, "job_dispatched").await;
    let stream = gateway.request(Method::GET, "/api/gateway/ledger/stream");
    let mut stream = EventSource::open(stream, "").await;
    assert!(stream.next().await.is_some());
    gateway.signal(Signal::TERM);
    until("it is not ready any more", || async {
        let asked = gateway.bare(Method::GET, "/readyz").send().await;
        asked.is_ok_and(|answer| answer.status() == 503)
    })
    .await;
    stream.retry_ms = None;
    while stream.next().await.is_some() {}
    assert!(stream.retry_ms.is_some(), "told when to come again");
    assert!(gateway.ended().await.success());

    let data = gateway.data_dir();
    let (ledger, writer) = rungate::ledger::Ledger::open(&data, &Default::default()).unwrap();
    let (seq, _) = ledger.load_snapshot().unwrap().expect("a snapshot");
    assert_eq!(seq, ledger.tail());
    drop((ledger, writer));

    gateway.launch().await;
    let summary = gateway.run(&run).await;
    assert_eq!(summary["status"], "completed", "its call was let end");
    let told = story(&gateway, &run).await;
    assert_eq!(count(&told, "job_dispatched"), 1);
    assert!(
        count(&told, "checkpoint_saved") > 0,
        "progress was taken to the end"
    );
    assert_ne!(gateway.run(&waiting).await["status"], "failed");
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    let mut gateway = with_worker(options(), json!({})).await;
    let run = gateway
        .start_job(
            json!({"service_type": "text", "payload": {"operation": "sleep", "ms": 600_000}}),
        )
        .await;
    tells(&gateway, &run, "job_dispatched").await;
    gateway.signal(Signal::TERM);
    until("it is stopping", || async {
        gateway.log().contains("a second signal stops at once")
    })
    .await;
    let asked = Instant::now();
    gateway.signal(Signal::TERM);
    let status = gateway.ended().await;
    assert!(!status.success() && status.code().is_some(), "{status}");
    assert!(asked.elapsed() < std::time::Duration::from_secs(10));
    gateway.launch().await;
    tells(&gateway, &run, "job_attempt_failed").await;
}
