//! Ladders over HTTP with the real binary and real processes: checkpoints before a job gives way, sleep and waking,
//! steps that fail, and a gateway that is killed on the way.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::wait::until;
use crate::support::{Gateway, Options, assert_in_order, worker_service};
use crate::world::PYTHON;

/// A text that is read slowly.
fn text(dir: &Path) -> String {
    let path = dir.join("text");
    std::fs::write(&path, "one two three four\n".repeat(100)).unwrap();
    path.display().to_string()
}

fn quick(of_type: &str, priority: u8) -> Value {
    json!({"service_type": of_type, "payload": {"operation": "sleep", "ms": 20}, "priority": priority})
}

fn long(of_type: &str) -> Value {
    json!({"service_type": of_type, "payload": {"operation": "sleep", "ms": 600_000}})
}

/// When the first record of an event was written, in microseconds.
fn at(records: &[Value], event: &str) -> i64 {
    let found = records.iter().find(|r| r["effect"]["type"] == event);
    let text = found.unwrap()["at"].as_str().unwrap();
    text.parse::<jiff::Timestamp>().unwrap().as_microsecond()
}

/// The ends of a ladder's steps among some records: step and outcome.
fn ends(records: &[Value]) -> Vec<(String, String)> {
    let ended = records
        .iter()
        .filter(|r| r["effect"]["type"] == "ladder_step_ended");
    let word = |r: &Value, key: &str| r["effect"]["payload"][key].as_str().unwrap().to_owned();
    ended
        .map(|r| (word(r, "step"), word(r, "outcome")))
        .collect()
}

fn pairs(all: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = |(a, b): &(&str, &str)| ((*a).to_owned(), (*b).to_owned());
    all.iter().map(owned).collect()
}

async fn an_urgent_job_waits_for_the_checkpoint(ask: Value) {
    let gateway = Gateway::start(Options::default().set("RUNGATE_MIN_RUNTIME_MS", "0")).await;
    let mut step = json!({"step": "checkpoint", "seconds": 20});
    step.as_object_mut()
        .unwrap()
        .extend(ask.as_object().unwrap().clone());
    let ladder = json!({"ladder": [step, {"step": "stop", "seconds": 5}]});
    gateway
        .register(worker_service(&gateway, "w", "w", ladder))
        .await;
    let dir = tempfile::tempdir().unwrap();
    // A checkpoint takes a second, and none is saved unasked.
    let payload = json!({"files": [text(dir.path())], "chunk_bytes": 64, "delay_ms": 40, "checkpoint_ms": 1_000});
    let victim = gateway
        .start_job(json!({"service_type": "w", "payload": payload, "priority": 5}))
        .await;
    gateway.recorded(&victim, "job_progressed").await;
    let urgent = gateway.start_job(quick("w", 1)).await;
    gateway.run_becomes(&urgent, "completed").await;
    let records = gateway.records(&urgent).await;
    let waited_ms = (at(&records, "job_dispatched") - at(&records, "job_queued")) / 1_000;
    println!(
        "from the urgent job's submit to its dispatch, with a checkpoint of 1 s: {waited_ms} ms"
    );
    let ended = gateway.run_becomes(&victim, "completed").await;
    assert!(ended["output"]["resumed_at_bytes"].as_u64().unwrap() > 0);
    assert_eq!(ended["output"]["statistics"]["words"], 400);
    assert_eq!(ended["job"]["failures"], 0);
    let records = gateway.records(&victim).await;
    assert_in_order(
        &gateway.events(&victim).await,
        &[
            "job_dispatched",
            "job_stop_requested",
            "ladder_step_began",
            "checkpoint_saved",
            "ladder_step_ended",
            "ladder_step_began",
            "ladder_step_ended",
            "job_stopped",
            "job_preempted",
            "job_requeued",
            "job_dispatched",
            "job_completed",
        ],
    );
    assert_eq!(
        ends(&records),
        pairs(&[("checkpoint", "done"), ("stop", "done")])
    );
    let first = records
        .iter()
        .find(|r| r["effect"]["type"] == "ladder_step_ended")
        .unwrap();
    let took_ms = first["effect"]["payload"]["took_ms"].as_u64().unwrap();
    assert!(took_ms >= 1_000, "the checkpoint took {took_ms} ms");
    // The urgent job went there when the other had given way.
    let seq = |records: &[Value], event: &str| {
        let found = records.iter().find(|r| r["effect"]["type"] == event);
        found.unwrap()["seq"].as_u64().unwrap()
    };
    let urgent_records = gateway.records(&urgent).await;
    assert!(seq(&records, "job_stopped") < seq(&urgent_records, "job_dispatched"));
}

#[tokio::test]
async fn an_urgent_job_waits_for_the_checkpoint_that_a_signal_asks_for() {
    an_urgent_job_waits_for_the_checkpoint(json!({"signal": "SIGUSR1"})).await;
}

#[tokio::test]
async fn an_urgent_job_waits_for_the_checkpoint_that_a_request_asks_for() {
    an_urgent_job_waits_for_the_checkpoint(json!({"path": "/checkpoint"})).await;
}

/// A gateway with one GPU where idle services soon leave.
async fn with_gpu(more: &[(&str, &str)]) -> Gateway {
    let mut options = Options::gpus("sim:24GiB").set("RUNGATE_IDLE_TIMEOUT_MS", "200");
    for (name, value) in more {
        options = options.set(name, value);
    }
    Gateway::start(options).await
}

async fn reserved_mb(gateway: &Gateway) -> u64 {
    let gpu = gateway.get("/gpu").await.expect(200);
    gpu["gpus"][0]["memory_reserved_mb"].as_u64().unwrap()
}

#[tokio::test]
async fn an_idle_service_sleeps_and_is_woken_by_its_next_job_or_by_hand() {
    let gateway = with_gpu(&[]).await;
    let members = json!({"vram_gb": 16, "ladder": [{"step": "sleep", "seconds": 20}]});
    gateway
        .register(worker_service(&gateway, "w", "w", members))
        .await;
    let first = gateway.start_job(quick("w", 3)).await;
    gateway.run_becomes(&first, "completed").await;
    gateway
        .service_becomes("w", "/instance/phase", json!("sleeping"))
        .await;
    let asleep = gateway.service("w").await;
    assert_eq!(asleep["scheduler_status"], "idle");
    assert_eq!(asleep["healthy"], false);
    assert_eq!(asleep["container_running"], true);
    assert_eq!(asleep["instance"]["gpus"], json!([]));
    assert_eq!(asleep["instance"]["host_memory_mb"], 16_384);
    assert_eq!(reserved_mb(&gateway).await, 0);
    // Its memory goes to another, for which it waits then.
    let members = json!({"vram_gb": 20, "idle_timeout_seconds": 3_600});
    gateway
        .register(worker_service(&gateway, "other", "other", members))
        .await;
    let busy = gateway.start_job(long("other")).await;
    gateway.job_becomes(&busy, "running").await;
    let second = gateway.start_job(quick("w", 3)).await;
    gateway.blocked_by(&second, "sleeping").await;
    gateway.command("c", &busy, "cancel", json!({})).await;
    gateway.run_becomes(&second, "completed").await;
    let awake = gateway.service("w").await;
    assert_eq!(awake["instance"]["pid"], asleep["instance"]["pid"]);
    assert_eq!(awake["instance"]["generation"], 1);
    gateway
        .service_becomes("w", "/instance/phase", json!("sleeping"))
        .await;
    assert_in_order(
        &gateway.service_events("w").await,
        &[
            "instance_ready",
            "ladder_step_began",
            "ladder_step_ended",
            "instance_slept",
            "instance_wake_requested",
            "instance_ready",
            "ladder_step_began",
            "instance_slept",
        ],
    );
    let started = gateway
        .post("/services/w/start", json!({}))
        .await
        .expect(200);
    assert_eq!(started["status"], "started");
    assert_eq!(started["healthy"], true);
    // Whoever started it by hand keeps it up, and awake.
    let kept = gateway.service("w").await;
    assert_eq!(kept["instance"]["phase"], "ready");
    assert_eq!(kept["instance"]["pid"], asleep["instance"]["pid"]);
    let stopped = gateway
        .post("/services/w/stop", json!({}))
        .await
        .expect(200);
    assert_eq!(stopped["status"], "stopped");
    assert_eq!(reserved_mb(&gateway).await, 0);
}

/// A service in Python that answers `/sleep` as the file `sleep` beside it says: with that status; never while there is
/// none.
const MOODY: &str = r#"
import http.server, os, pathlib, time
mood = pathlib.Path(__file__).with_name("sleep")
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass
    def answer(self, status):
        self.send_response(status)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
    def do_GET(self):
        self.answer(200)
    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path == "/sleep":
            while not mood.exists():
                time.sleep(0.01)
            return self.answer(int(mood.read_text()))
        self.answer(200)
class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *args):
        pass
Server(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"#;

fn moody(dir: &Path) -> Value {
    let script = dir.join("moody.py");
    std::fs::write(&script, MOODY).unwrap();
    let sleep = json!({"step": "sleep", "path": "/sleep", "wake_path": "/wake", "seconds": 60});
    json!({
        "name": "m", "type": "m", "port": 0, "command": [&*PYTHON, script.display().to_string()],
        "vram_gb": 16,
        "ladder": [sleep, {"step": "stop", "seconds": 5}],
    })
}

fn mood(dir: &Path, status: u16) {
    std::fs::write(dir.join("mood"), status.to_string()).unwrap();
    std::fs::rename(dir.join("mood"), dir.join("sleep")).unwrap();
}

#[tokio::test]
async fn a_sleep_that_fails_leads_to_a_stop() {
    let gateway = with_gpu(&[]).await;
    let dir = tempfile::tempdir().unwrap();
    mood(dir.path(), 500);
    gateway.register(moody(dir.path())).await;
    let run = gateway.start_job(quick("m", 3)).await;
    gateway.run_becomes(&run, "completed").await;
    gateway.service_becomes("m", "/instance", Value::Null).await;
    let records = gateway.service_records("m").await;
    assert_eq!(
        ends(&records),
        pairs(&[("sleep", "failed"), ("stop", "done")])
    );
    let failed = records
        .iter()
        .find(|r| r["effect"]["type"] == "ladder_step_ended")
        .unwrap();
    let payload = &failed["effect"]["payload"];
    assert_eq!(payload["error"], "POST /sleep answered 500");
    assert_eq!(payload["freed_mib"], 0);
    assert_in_order(
        &gateway.service_events("m").await,
        &[
            "ladder_step_began",
            "ladder_step_ended",
            "instance_stop_requested",
            "ladder_step_began",
            "instance_exited",
            "ladder_step_ended",
            "instance_released",
        ],
    );
    assert_eq!(reserved_mb(&gateway).await, 0);
}

#[tokio::test]
async fn a_gateway_killed_on_the_way_begins_the_step_anew_and_finds_a_sleeper_asleep() {
    let mut gateway = with_gpu(&[]).await;
    let dir = tempfile::tempdir().unwrap();
    gateway.register(moody(dir.path())).await;
    let run = gateway.start_job(quick("m", 3)).await;
    gateway.run_becomes(&run, "completed").await;
    gateway
        .service_becomes("m", "/instance/phase", json!("yielding"))
        .await;
    let pid = gateway.service("m").await["instance"]["pid"].clone();
    gateway.kill();
    mood(dir.path(), 200);
    gateway.launch().await;
    gateway
        .service_becomes("m", "/instance/phase", json!("sleeping"))
        .await;
    let records = gateway.service_records("m").await;
    assert_eq!(
        ends(&records),
        pairs(&[("sleep", "interrupted"), ("sleep", "done")])
    );
    gateway.kill();
    gateway.launch().await;
    until("it is found", || async {
        let events = gateway.service_events("m").await;
        let slept = events.iter().position(|name| name == "instance_slept");
        events[slept.unwrap()..]
            .iter()
            .any(|name| name == "instance_adopted")
    })
    .await;
    let found = gateway.service("m").await;
    assert_eq!(found["instance"]["phase"], "sleeping");
    assert_eq!(found["instance"]["pid"], pid);
    assert_eq!(reserved_mb(&gateway).await, 0);
    let next = gateway.start_job(quick("m", 3)).await;
    gateway.run_becomes(&next, "completed").await;
    assert_eq!(gateway.service("m").await["instance"]["pid"], pid);
}

/// In the place of the vendor's program: keeps what it was asked, and what state each process would be in.
const CUDA_CHECKPOINT: &str = r#"#!/bin/sh
dir=$(dirname "$0")
case "$1 $2" in
    "--get-state --pid") cat "$dir/state.$3" 2>/dev/null || echo running; exit ;;
    "--action lock") state=locked ;;
    "--action checkpoint") [ -e "$dir/refuses" ] && echo "out of memory" >&2 && exit 1; state=checkpointed ;;
    "--action restore") state=locked ;;
    "--action unlock") state=running ;;
    *) exit 1 ;;
esac
echo "$2 $4" >> "$dir/calls"
echo $state > "$dir/state.$4"
"#;

pub fn cuda_checkpoint(dir: &Path) -> String {
    let program = dir.join("cuda-checkpoint");
    std::fs::write(&program, CUDA_CHECKPOINT).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    program.display().to_string()
}

#[tokio::test]
async fn the_vendors_program_takes_memory_and_gives_it_back_process_by_process() {
    let dir = tempfile::tempdir().unwrap();
    let program = cuda_checkpoint(dir.path());
    let gateway = with_gpu(&[("RUNGATE_CUDA_CHECKPOINT", &program)]).await;
    let members = json!({"vram_gb": 16, "ladder": [{"step": "cuda-checkpoint", "seconds": 20}]});
    gateway
        .register(worker_service(&gateway, "w", "w", members))
        .await;
    let first = gateway.start_job(quick("w", 3)).await;
    gateway.run_becomes(&first, "completed").await;
    gateway
        .service_becomes("w", "/instance/phase", json!("sleeping"))
        .await;
    let pid = gateway.service("w").await["instance"]["pid"].clone();
    let second = gateway.start_job(quick("w", 3)).await;
    gateway.run_becomes(&second, "completed").await;
    let calls = std::fs::read_to_string(dir.path().join("calls")).unwrap();
    let calls: Vec<&str> = calls.lines().take(4).collect();
    let expected =
        ["lock", "checkpoint", "restore", "unlock"].map(|action| format!("{action} {pid}"));
    assert_eq!(calls, expected);
}

/// A gateway that was killed may have left a process half way, or all the way, which its record does not tell.
#[tokio::test]
async fn processes_that_are_where_they_are_to_be_count_as_done() {
    let dir = tempfile::tempdir().unwrap();
    let program = cuda_checkpoint(dir.path());
    let gateway = with_gpu(&[("RUNGATE_CUDA_CHECKPOINT", &program)]).await;
    let members = json!({"vram_gb": 16, "ladder": [{"step": "cuda-checkpoint", "seconds": 20}]});
    gateway
        .register(worker_service(&gateway, "w", "w", members))
        .await;
    let long = json!({"service_type": "w", "payload": {"operation": "sleep", "ms": 2_000}});
    let first = gateway.start_job(long.clone()).await;
    gateway.run_becomes(&first, "running").await;
    let pid = gateway.service("w").await["instance"]["pid"].clone();
    let state = dir.path().join(format!("state.{pid}"));
    let rounds = [
        ("locked", "running", vec!["checkpoint"]),
        ("checkpointed", "locked", vec!["unlock"]),
    ];
    for (before_sleep, before_waking, expected) in rounds {
        std::fs::write(&state, before_sleep).unwrap();
        gateway
            .service_becomes("w", "/instance/phase", json!("sleeping"))
            .await;
        std::fs::write(&state, before_waking).unwrap();
        let next = gateway.start_job(long.clone()).await;
        gateway.run_becomes(&next, "running").await;
        let calls = dir.path().join("calls");
        let said = std::fs::read_to_string(&calls).unwrap();
        let expected: Vec<String> = expected.iter().map(|a| format!("{a} {pid}")).collect();
        assert_eq!(said.lines().collect::<Vec<_>>(), expected);
        std::fs::remove_file(&calls).unwrap();
    }
    assert_eq!(gateway.service("w").await["instance"]["pid"], pid);
}

#[tokio::test]
async fn a_process_whose_memory_cannot_be_taken_is_unlocked_again_and_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let program = cuda_checkpoint(dir.path());
    std::fs::write(dir.path().join("refuses"), "").unwrap();
    let gateway = with_gpu(&[("RUNGATE_CUDA_CHECKPOINT", &program)]).await;
    let members = json!({"vram_gb": 16, "ladder": [{"step": "cuda-checkpoint", "seconds": 20}]});
    gateway
        .register(worker_service(&gateway, "w", "w", members))
        .await;
    let first = gateway.start_job(quick("w", 3)).await;
    gateway.run_becomes(&first, "completed").await;
    gateway.service_becomes("w", "/instance", Value::Null).await;
    let calls = std::fs::read_to_string(dir.path().join("calls")).unwrap();
    let actions: Vec<&str> = calls
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(actions, ["lock", "unlock"]);
    let records = gateway.service_records("w").await;
    let steps = [("cuda-checkpoint", "failed"), ("stop", "done")];
    assert_eq!(ends(&records), pairs(&steps));
}

#[tokio::test]
async fn without_the_vendors_program_its_step_is_skipped() {
    let gateway = with_gpu(&[("RUNGATE_CUDA_CHECKPOINT", "/nowhere/cuda-checkpoint")]).await;
    let members = json!({"vram_gb": 16, "ladder": [{"step": "cuda-checkpoint", "seconds": 20}]});
    gateway
        .register(worker_service(&gateway, "w", "w", members))
        .await;
    let first = gateway.start_job(quick("w", 3)).await;
    gateway.run_becomes(&first, "completed").await;
    gateway.service_becomes("w", "/instance", Value::Null).await;
    let records = gateway.service_records("w").await;
    assert_eq!(
        ends(&records),
        pairs(&[("cuda-checkpoint", "skipped"), ("stop", "done")])
    );
}

#[tokio::test]
async fn services_share_a_gpu_under_mps_as_long_as_the_sum_fits() {
    let gateway = Gateway::start(Options::gpus("sim:24GiB")).await;
    let dir = tempfile::tempdir().unwrap();
    for (name, vram_gb, percent) in [("a", 8, 40), ("b", 12, 60), ("c", 5, 10)] {
        let file = dir.path().join(name);
        let run = format!("env > {} && exec \"$0\" worker", file.display());
        let members = json!({
            "command": ["sh", "-c", run, crate::support::binary()], "vram_gb": vram_gb, "mps_percent": percent,
        });
        gateway
            .register(worker_service(&gateway, name, name, members))
            .await;
    }
    for name in ["a", "b"] {
        let path = format!("/services/{name}/start");
        gateway.post(&path, json!({})).await.expect(200);
    }
    let variables = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    let has = |name: &str, line: &str| variables(name).lines().any(|found| found == line);
    assert!(has("a", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=40"));
    assert!(has("a", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=0=8192M"));
    assert!(has("b", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=60"));
    assert!(has("b", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=0=12288M"));
    assert_eq!(reserved_mb(&gateway).await, 20 * 1_024);
    let refused = gateway
        .post("/services/c/start", json!({}))
        .await
        .expect(409);
    assert_eq!(refused["detail"]["error"], "insufficient_vram");
}
