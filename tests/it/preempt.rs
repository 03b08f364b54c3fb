//! Preemption over HTTP with real workers: by command, by the dialect's route, by priority, and what becomes of the
//! one that gave way.

use serde_json::{Value, json};

use crate::support::scripted::Scripted;
use crate::support::wait::until;
use crate::support::{Gateway, Options, assert_in_order, worker_service};

/// A text, and a job that reads it slowly.
struct Slow {
    _dir: tempfile::TempDir,
    path: String,
}

impl Slow {
    fn new() -> Slow {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        std::fs::write(&path, "one two three four\n".repeat(100)).unwrap();
        let path = path.display().to_string();
        Slow { _dir: dir, path }
    }

    fn job(&self, of_type: &str, priority: u8) -> Value {
        let payload = json!({"files": [self.path], "chunk_bytes": 64, "delay_ms": 60});
        json!({"service_type": of_type, "payload": payload, "priority": priority})
    }
}

fn quick(of_type: &str, priority: u8) -> Value {
    json!({"service_type": of_type, "payload": {"operation": "sleep", "ms": 50}, "priority": priority})
}

fn sleeper(of_type: &str, priority: u8) -> Value {
    json!({"service_type": of_type, "payload": {"operation": "sleep", "ms": 600_000}, "priority": priority})
}

async fn with_worker(options: Options) -> Gateway {
    let gateway = Gateway::start(options).await;
    gateway
        .register(worker_service(&gateway, "w", "w", json!({})))
        .await;
    gateway
}

#[tokio::test]
async fn an_urgent_job_takes_the_place_of_another_which_then_goes_on_from_its_checkpoint() {
    let gateway = with_worker(Options::default().set("RUNGATE_MIN_RUNTIME_MS", "0")).await;
    let slow = Slow::new();
    let victim = gateway.start_job(slow.job("w", 5)).await;
    gateway.recorded(&victim, "job_progressed").await;
    let urgent = gateway.start_job(quick("w", 1)).await;
    let done = gateway.run_becomes(&urgent, "completed").await;
    assert_eq!(done["job"]["attempt"], 1);
    let preempted = gateway.recorded(&victim, "job_preempted").await;
    assert_eq!(preempted["effect"]["payload"]["by"], urgent);
    let ended = gateway.run_becomes(&victim, "completed").await;
    assert_eq!(ended["job"]["preempt_count"], 1);
    assert_eq!(ended["job"]["failures"], 0);
    assert_eq!(ended["output"]["statistics"]["words"], 400);
    assert!(ended["output"]["resumed_at_bytes"].as_u64().unwrap() > 0);
    let events = gateway.events(&victim).await;
    assert_in_order(
        &events,
        &[
            "job_dispatched",
            "job_stop_requested",
            "checkpoint_saved",
            "job_stopped",
            "job_preempted",
            "job_requeued",
            "job_dispatched",
            "job_completed",
        ],
    );
    // One process did both, one after the other: no two calls at once.
    assert_eq!(gateway.service("w").await["instance"]["generation"], 1);
    let order: Vec<(String, String)> = gateway
        .get("/api/gateway/ledger?limit=2000")
        .await
        .expect(200)["items"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|r| {
            ["job_dispatched", "job_stopped", "job_completed"]
                .contains(&r["effect"]["type"].as_str().unwrap())
        })
        .map(|r| {
            (
                r["effect"]["type"].as_str().unwrap().to_owned(),
                r["run_id"].as_str().unwrap().to_owned(),
            )
        })
        .collect();
    let expected = [
        ("job_dispatched", &victim),
        ("job_stopped", &victim),
        ("job_dispatched", &urgent),
        ("job_completed", &urgent),
        ("job_dispatched", &victim),
        ("job_completed", &victim),
    ];
    let expected: Vec<(String, String)> = expected.map(|(e, r)| (e.to_owned(), r.clone())).into();
    assert_eq!(order, expected);
}

#[tokio::test]
async fn a_small_difference_or_a_young_victim_preempts_nobody() {
    let gateway = with_worker(Options::default().set("RUNGATE_MIN_RUNTIME_MS", "600000")).await;
    let running = gateway.start_job(sleeper("w", 5)).await;
    gateway.job_becomes(&running, "running").await;
    let urgent = gateway.start_job(quick("w", 1)).await;
    gateway.blocked_by(&urgent, "concurrency").await;
    let near = gateway.start_job(quick("w", 4)).await;
    assert_eq!(gateway.run(&running).await["job"]["state"], "running");
    let check = gateway.get("/preempt/check/w").await.expect(200);
    assert_eq!(
        check,
        json!({
            "preemptable": true, "service": "w", "active_job_id": running, "scheduler_status": "busy",
            "running_job_priority": 5, "running_job_service_type": "w",
            "highest_queued": {"job_id": urgent, "priority": 1, "service_type": "w"},
        })
    );
    gateway.command("c", &running, "cancel", json!({})).await;
    gateway.run_becomes(&urgent, "completed").await;
    gateway.run_becomes(&near, "completed").await;
    let idle = gateway.get("/preempt/check/w").await.expect(200);
    assert_eq!(
        idle,
        json!({"preemptable": false, "reason": "service_not_busy", "service": "w"})
    );
}

#[tokio::test]
async fn a_preemption_by_hand_waits_for_its_preemptor_or_for_a_release() {
    let gateway = Gateway::start(Options::default()).await;
    let scripted = Scripted::start().await;
    let mut service = scripted.service("s", "s");
    service["grace_seconds"] = json!(0.2);
    gateway.register(service).await;
    let hold = |n: u64| json!({"service_type": "s", "payload": {"hold": true, "n": n}});
    let first = gateway.start_job(hold(1)).await;
    gateway.job_becomes(&first, "running").await;
    gateway
        .post(&format!("/queue/{first}/progress"), json!({"percent": 70}))
        .await
        .expect(200);
    let second = gateway.start_job(hold(2)).await;
    let body = json!({"service_name": "s", "preemptor_job_id": second});
    let answer = gateway.post("/preempt/execute", body).await.expect(200);
    assert_eq!(
        answer,
        json!({
            "preempted_job_id": first, "preemptor_job_id": second, "service": "s", "progress_saved": true,
        })
    );
    gateway.job_becomes(&second, "running").await;
    let paused = gateway.get(&format!("/queue/{first}")).await.expect(200);
    assert_eq!(
        (&paused["status"], &paused["preempt_count"]),
        (&json!("paused"), &json!(1))
    );
    assert_eq!(paused["paused_by_job_id"], second);
    let snapshot: Value =
        serde_json::from_str(paused["progress_snapshot"].as_str().unwrap()).unwrap();
    assert_eq!(snapshot["percent"], 70);
    let progress = gateway
        .get(&format!("/queue/{first}/progress"))
        .await
        .expect(200);
    assert_eq!(
        (&progress["status"], &progress["progress"]["percent"]),
        (&json!("paused"), &json!(70))
    );
    assert_eq!(gateway.causes(&first).await, ["preempted"]);
    assert_eq!(
        gateway.run(&first).await["waiting"]["details"]["preempted_by"],
        second
    );
    let released = gateway
        .post("/preempt/release/s", json!({}))
        .await
        .expect(200);
    assert_eq!(
        released,
        json!({"service": "s", "resumed_jobs": [first], "count": 1})
    );
    assert_eq!(gateway.run(&first).await["job"]["state"], "queued");
    let again = gateway
        .post("/preempt/release/s", json!({}))
        .await
        .expect(200);
    assert_eq!(again["count"], 0);
    scripted.release();
    gateway.run_becomes(&second, "completed").await;
    let done = gateway.run_becomes(&first, "completed").await;
    assert_eq!(
        (&done["job"]["attempt"], &done["job"]["preempt_count"]),
        (&json!(2), &json!(1))
    );
    let attempts: Vec<String> = scripted
        .jobs()
        .iter()
        .map(|job| job.header("x-rungate-attempt").to_owned())
        .collect();
    assert_eq!(attempts, ["1", "1", "2"]);
}

#[tokio::test]
async fn a_command_preempts_in_favour_of_whoever_is_next_or_nobody() {
    let gateway = with_worker(Options::default()).await;
    let alone = gateway.start_job(sleeper("w", 3)).await;
    gateway.job_becomes(&alone, "running").await;
    // Nobody waits: back to the queue, and on again.
    gateway.command("p1", &alone, "preempt", json!({})).await;
    until("a second attempt", || async {
        gateway.run(&alone).await["job"]["attempt"] == 2
    })
    .await;
    let requeued = gateway.recorded(&alone, "job_requeued").await;
    assert_eq!(requeued["effect"]["payload"]["cause"], "yielded");
    let next = gateway.start_job(quick("w", 3)).await;
    gateway.blocked_by(&next, "concurrency").await;
    gateway
        .command("p2", &alone, "preempt", json!({"by": next}))
        .await;
    assert_eq!(gateway.command_state("p2").await["state"], "applied");
    gateway.run_becomes(&next, "completed").await;
    until("a third attempt", || async {
        gateway.run(&alone).await["job"]["attempt"] == 3
    })
    .await;
    gateway.command("c", &alone, "cancel", json!({})).await;
    gateway.run_becomes(&alone, "cancelled").await;
}

#[tokio::test]
async fn an_urgent_job_of_another_service_gets_its_memory() {
    let options = Options::gpus("sim:24GiB").set("RUNGATE_MIN_RUNTIME_MS", "0");
    let gateway = Gateway::start(options).await;
    for name in ["a", "b"] {
        gateway
            .register(worker_service(&gateway, name, name, json!({"vram_gb": 16})))
            .await;
    }
    let slow = Slow::new();
    let victim = gateway.start_job(slow.job("a", 4)).await;
    gateway.recorded(&victim, "job_progressed").await;
    let urgent = gateway.start_job(quick("b", 1)).await;
    gateway.run_becomes(&urgent, "completed").await;
    let ended = gateway.run_becomes(&victim, "completed").await;
    assert_eq!(ended["output"]["statistics"]["words"], 400);
    assert!(ended["output"]["resumed_at_bytes"].as_u64().unwrap() > 0);
    assert_eq!(
        ended["job"]["generation"], 2,
        "its service was started anew"
    );
    // At no moment do both hold their memory.
    let page = gateway
        .get("/api/gateway/ledger?limit=2000")
        .await
        .expect(200);
    let mut held = std::collections::BTreeSet::new();
    for record in page["items"].as_array().unwrap() {
        let service = record["effect"]["payload"]["service"]
            .as_str()
            .unwrap_or("")
            .to_owned();
        match record["effect"]["type"].as_str().unwrap() {
            "instance_start_requested" => assert!(held.insert(service)),
            "instance_released" => assert!(held.remove(&service)),
            _ => {}
        }
        assert!(held.len() <= 1, "over-promised at seq {}", record["seq"]);
    }
    assert_in_order(
        &gateway.service_events("a").await,
        &[
            "instance_ready",
            "instance_stop_requested",
            "instance_exited",
            "instance_released",
            "instance_start_requested",
        ],
    );
}
