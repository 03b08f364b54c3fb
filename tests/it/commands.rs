//! Commands over HTTP, on real runs: accepted once, applied or rejected with a reason, and what they bring about.

use serde_json::{Value, json};

use crate::support::scripted::Scripted;
use crate::support::{Gateway, Options, assert_in_order, worker_service};

async fn with_worker() -> Gateway {
    let gateway = Gateway::start(Options::default()).await;
    let service = worker_service(&gateway, "stats", "text-stats", json!({}));
    gateway.register(service).await;
    gateway
}

fn sleep() -> Value {
    json!({"service_type": "text-stats", "payload": {"operation": "sleep", "ms": 600_000}})
}

#[tokio::test]
async fn a_command_is_accepted_once_under_its_id() {
    let mut gateway = Gateway::start(Options::default().set("RUNGATE_AUDIT", "off")).await;
    let run = gateway
        .start_job(json!({"service_type": "nobody", "payload": {}}))
        .await;
    let first = gateway
        .command("c-1", &run, "pause", json!({"reason": "x"}))
        .await;
    assert_eq!(
        (&first["accepted"], &first["duplicate"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(first["command_id"], "c-1");
    let tail = gateway.tail().await;
    let again = gateway
        .command("c-1", &run, "pause", json!({"reason": "x"}))
        .await;
    assert_eq!(
        (&again["accepted"], &again["duplicate"]),
        (&json!(false), &json!(true))
    );
    assert_eq!(again["seq"], first["seq"]);
    for other in [
        json!({"command_id": "c-1", "run_id": run, "type": "pause", "payload": {"reason": "y"}}),
        json!({"command_id": "c-1", "run_id": run, "type": "resume", "payload": {"reason": "x"}}),
        json!({"command_id": "c-1", "run_id": "other", "type": "pause", "payload": {"reason": "x"}}),
    ] {
        let refused = gateway.post("/api/gateway/commands", other).await;
        assert_eq!(refused.expect(409)["code"], "command_reused");
    }
    assert_eq!(gateway.tail().await, tail);
    gateway.kill();
    gateway.launch().await;
    let again = gateway
        .command("c-1", &run, "pause", json!({"reason": "x"}))
        .await;
    assert_eq!(
        (&again["duplicate"], &again["seq"]),
        (&json!(true), &first["seq"])
    );
    let state = gateway.command_state("c-1").await;
    assert_eq!(state["state"], "applied");
    assert_eq!(state["seq"], first["seq"]);
    assert_eq!(state["type"], "pause");
    assert!(state["accepted_at"].is_string() && state["decided_at"].is_string());
    assert_in_order(
        &gateway.events(&run).await,
        &[
            "job_queued",
            "command_accepted",
            "job_paused",
            "command_applied",
        ],
    );
    // An empty id gets a new one, each time.
    let one = gateway.command("", &run, "resume", json!({})).await;
    let two = gateway.command("", &run, "resume", json!({})).await;
    assert_ne!(one["command_id"], two["command_id"]);
    let second = two["command_id"].as_str().unwrap();
    assert_eq!(gateway.command_state(second).await["code"], "not_paused");
}

#[tokio::test]
async fn an_unknown_run_is_accepted_and_then_rejected() {
    let gateway = Gateway::start(Options::default()).await;
    for (id, run) in [
        ("a", "0199f3a2-7c1e-7d0a-9c55-6f0f0d1f2a3b"),
        ("b", "no run at all"),
        ("c", "../../etc/passwd"),
    ] {
        let answer = gateway.command(id, run, "cancel", json!({})).await;
        assert_eq!(answer["accepted"], true);
        let state = gateway.command_state(id).await;
        assert_eq!(
            (&state["state"], &state["code"]),
            (&json!("rejected"), &json!("run_not_found"))
        );
        assert_eq!(state["run_id"], run);
        assert!(state["reason"].as_str().unwrap().contains(run));
    }
    // An id with a slash is read by its encoded form.
    gateway.command("a/b c", "x", "cancel", json!({})).await;
    let path = "/api/gateway/commands/a%2Fb%20c";
    assert_eq!(gateway.get(path).await.expect(200)["command_id"], "a/b c");
}

#[tokio::test]
async fn what_is_illegal_is_rejected_with_its_reason() {
    let gateway = Gateway::start(Options::default()).await;
    let scripted = Scripted::start().await;
    gateway.register(scripted.service("s", "s")).await;
    let queued = gateway
        .start_job(json!({"service_type": "nobody", "payload": {}}))
        .await;
    let running = gateway
        .start_job(json!({"service_type": "s", "payload": {"hold": true}}))
        .await;
    gateway.job_becomes(&running, "running").await;
    let ended = gateway
        .start_job(json!({"service_type": "nobody", "payload": {}}))
        .await;
    gateway.command("end", &ended, "cancel", json!({})).await;
    let paused = gateway
        .start_job(json!({"service_type": "nobody", "payload": {}}))
        .await;
    gateway.command("hold", &paused, "pause", json!({})).await;
    let unknown = "0199f3a2-7c1e-7d0a-9c55-6f0f0d1f2a3b";
    for (run, kind, payload, code) in [
        (&queued, "resume", json!({}), "not_paused"),
        (&queued, "retry", json!({}), "run_not_ended"),
        (&queued, "preempt", json!({}), "not_running"),
        (&running, "resume", json!({}), "not_paused"),
        (&running, "retry", json!({}), "run_not_ended"),
        (&running, "preempt", json!({"by": unknown}), "not_queued"),
        (&running, "preempt", json!({"by": ended}), "not_queued"),
        (&running, "preempt", json!({"by": running}), "not_queued"),
        (&running, "preempt", json!({"by": queued}), "wrong_service"),
        (&paused, "pause", json!({}), "already_paused"),
        (&ended, "pause", json!({}), "run_ended"),
        (&ended, "resume", json!({}), "run_ended"),
        (&ended, "cancel", json!({}), "run_ended"),
        (&ended, "preempt", json!({}), "run_ended"),
        (&ended, "set_priority", json!({"priority": 1}), "run_ended"),
    ] {
        let answer = gateway.command("", run, kind, payload.clone()).await;
        let state = gateway
            .command_state(answer["command_id"].as_str().unwrap())
            .await;
        assert_eq!(state["state"], "rejected", "{kind} {payload}");
        assert_eq!(state["code"], code, "{kind} {payload}: {state}");
        assert!(!state["reason"].as_str().unwrap().is_empty());
    }
    assert_eq!(gateway.run(&running).await["job"]["state"], "running");
    scripted.release();
}

#[tokio::test]
async fn a_paused_run_frees_its_place_and_goes_on_from_its_checkpoint() {
    let gateway = with_worker().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text");
    std::fs::write(&path, "the quick brown fox\n".repeat(200)).unwrap();
    let stats = |delay_ms: u64| {
        json!({"service_type": "text-stats", "payload":
            {"files": [path.display().to_string()], "chunk_bytes": 64, "delay_ms": delay_ms}})
    };
    let whole = gateway.start_job(stats(0)).await;
    let whole = gateway.run_becomes(&whole, "completed").await;

    let run = gateway.start_job(stats(100)).await;
    gateway.recorded(&run, "job_progressed").await;
    gateway
        .command("pause", &run, "pause", json!({"reason": "tea"}))
        .await;
    let paused = gateway.job_becomes(&run, "paused").await;
    assert_eq!(paused["paused"], true);
    assert_eq!(paused["status"], "waiting");
    assert_eq!(paused["pause_reason"], "tea");
    assert_eq!(paused["job"]["has_checkpoint"], true);
    // Its place is free: another job runs now.
    let other = gateway.start_job(stats(0)).await;
    gateway.run_becomes(&other, "completed").await;
    assert_eq!(gateway.run(&run).await["job"]["state"], "paused");

    // What makes it slow is its own payload: raising the priority does not, so it is let run to its end.
    gateway.command("resume", &run, "resume", json!({})).await;
    let records = gateway.recorded(&run, "job_resumed").await;
    assert!(records["seq"].is_u64());
    let done = gateway.run_becomes(&run, "completed").await;
    assert_eq!(done["output"]["statistics"], whole["output"]["statistics"]);
    assert!(done["output"]["resumed_at_bytes"].as_u64().unwrap() > 0);
    assert_eq!(done["job"]["attempt"], 2);
    assert!(done["resumed_at"].is_string());
    assert_in_order(
        &gateway.events(&run).await,
        &[
            "job_dispatched",
            "job_stop_requested",
            "checkpoint_saved",
            "job_stopped",
            "job_paused",
            "job_resumed",
            "job_dispatched",
            "job_completed",
        ],
    );
    let dispatched: Vec<Value> = gateway
        .records(&run)
        .await
        .into_iter()
        .filter(|r| r["effect"]["type"] == "job_dispatched")
        .collect();
    assert_eq!(
        dispatched[0]["effect"]["payload"]["checkpoint"],
        Value::Null
    );
    assert!(dispatched[1]["effect"]["payload"]["checkpoint"].is_u64());
}

#[tokio::test]
async fn a_running_run_is_cancelled_at_its_service() {
    let gateway = with_worker().await;
    let run = gateway.start_job(sleep()).await;
    gateway.job_becomes(&run, "running").await;
    gateway
        .command("c", &run, "cancel", json!({"reason": "enough"}))
        .await;
    let ended = gateway.run_becomes(&run, "cancelled").await;
    assert_eq!(ended["error"], "enough");
    let stopped = gateway.recorded(&run, "job_stopped").await;
    assert_eq!(stopped["effect"]["payload"]["confirmed"], true);
    assert_in_order(
        &gateway.events(&run).await,
        &["job_stop_requested", "job_stopped", "job_cancelled"],
    );
    // Again is too late, and says so.
    gateway.command("c2", &run, "cancel", json!({})).await;
    assert_eq!(gateway.command_state("c2").await["code"], "run_ended");
    // The service lives on and takes the next.
    let next = json!({"service_type": "text-stats", "payload": {"operation": "sleep", "ms": 1}});
    let next = gateway.start_job(next).await;
    gateway.run_becomes(&next, "completed").await;
}

#[tokio::test]
async fn the_service_is_told_which_attempt_to_stop_and_a_late_answer_changes_nothing() {
    let gateway = Gateway::start(Options::default()).await;
    let scripted = Scripted::start().await;
    let mut service = scripted.service("s", "s");
    service["grace_seconds"] = json!(0.2);
    gateway.register(service).await;
    let run = gateway
        .start_job(json!({"service_type": "s", "payload": {"hold": true}}))
        .await;
    gateway.job_becomes(&run, "running").await;
    gateway.command("c", &run, "cancel", json!({})).await;
    gateway.run_becomes(&run, "cancelled").await;
    let asked = scripted.cancels()[0].json();
    assert_eq!(
        (&asked["run_id"], &asked["attempt"]),
        (&json!(run), &json!(1))
    );
    assert_eq!(asked["reason"], "cancel");
    assert!(asked["grace_ms"].as_u64().unwrap() <= 200);
    scripted.release();
    let progress = gateway
        .post(&format!("/queue/{run}/progress"), json!({"late": true}))
        .await;
    assert_eq!(progress.expect(409)["code"], "run_ended");
    assert_eq!(gateway.run(&run).await["status"], "cancelled");
    assert_eq!(
        gateway.events(&run).await.last().map(String::as_str),
        Some("job_cancelled")
    );
}

#[tokio::test]
async fn a_queued_run_is_cancelled_at_once() {
    let gateway = Gateway::start(Options::default()).await;
    let run = gateway
        .start_job(json!({"service_type": "nobody", "payload": {}}))
        .await;
    gateway.command("c", &run, "cancel", json!({})).await;
    let ended = gateway.run(&run).await;
    assert_eq!(
        (&ended["status"], &ended["error"]),
        (&json!("cancelled"), &json!("Cancelled"))
    );
    assert_in_order(
        &gateway.events(&run).await,
        &["job_queued", "command_accepted", "job_cancelled"],
    );
    let stats = gateway.get("/queue/stats").await.expect(200);
    assert_eq!(stats["total_queued"], 0);
}

#[tokio::test]
async fn an_ended_run_is_tried_again_as_a_new_attempt() {
    let gateway = with_worker().await;
    let job =
        json!({"service_type": "text-stats", "payload": {"operation": "fail"}, "max_attempts": 1});
    let run = gateway.start_job(job).await;
    gateway.run_becomes(&run, "failed").await;
    gateway.command("r", &run, "retry", json!({})).await;
    assert_eq!(gateway.command_state("r").await["state"], "applied");
    let failed = gateway.run_becomes(&run, "failed").await;
    crate::support::wait::until("a second attempt", || async {
        gateway.run(&run).await["job"]["attempt"] == 2
    })
    .await;
    assert_eq!(failed["run_id"], run);
    gateway.run_becomes(&run, "failed").await;
    assert_in_order(
        &gateway.events(&run).await,
        &[
            "job_failed",
            "command_accepted",
            "job_revived",
            "command_applied",
            "job_dispatched",
            "job_failed",
        ],
    );
    // A cancelled and a completed one too.
    let waiting = gateway
        .start_job(json!({"service_type": "nobody", "payload": {}}))
        .await;
    gateway.command("c", &waiting, "cancel", json!({})).await;
    gateway.command("r2", &waiting, "retry", json!({})).await;
    let revived = gateway.run(&waiting).await;
    assert_eq!(
        (&revived["job"]["state"], &revived["error"]),
        (&json!("queued"), &Value::Null)
    );
    assert_eq!(
        gateway.get("/api/gateway/ledger/verify").await.expect(200)["ok"],
        true
    );
}

#[tokio::test]
async fn a_new_priority_changes_who_is_next() {
    let gateway = Gateway::start(Options::default()).await;
    let scripted = Scripted::start().await;
    gateway.register(scripted.service("s", "s")).await;
    let job =
        |n: u64| json!({"service_type": "s", "payload": {"hold": true, "n": n}, "priority": 4});
    let first = gateway.start_job(job(1)).await;
    gateway.job_becomes(&first, "running").await;
    let second = gateway.start_job(job(2)).await;
    let third = gateway.start_job(job(3)).await;
    gateway
        .command("p", &third, "set_priority", json!({"priority": 3}))
        .await;
    assert_eq!(gateway.run(&third).await["job"]["priority"], 3);
    assert_eq!(
        gateway.get(&format!("/queue/{third}")).await.expect(200)["position"],
        1
    );
    assert_eq!(
        gateway.get(&format!("/queue/{second}")).await.expect(200)["position"],
        2
    );
    scripted.release();
    gateway.run_becomes(&second, "completed").await;
    gateway.run_becomes(&third, "completed").await;
    let order: Vec<u64> = scripted
        .jobs()
        .iter()
        .map(|job| job.json()["n"].as_u64().unwrap())
        .collect();
    assert_eq!(order, [1, 3, 2]);
}

#[tokio::test]
async fn a_pause_before_the_stop_is_through_can_be_taken_back() {
    let gateway = with_worker().await;
    let run = gateway.start_job(sleep()).await;
    gateway.job_becomes(&run, "running").await;
    // One after the other, without waiting for what they bring about.
    for (id, kind) in [
        ("1", "pause"),
        ("2", "resume"),
        ("3", "pause"),
        ("4", "pause"),
        ("5", "resume"),
    ] {
        gateway.command(id, &run, kind, json!({})).await;
    }
    gateway.job_becomes(&run, "running").await;
    assert_eq!(gateway.command_state("4").await["code"], "already_paused");
    gateway.command("6", &run, "cancel", json!({})).await;
    gateway.run_becomes(&run, "cancelled").await;
    assert_eq!(
        gateway.get("/api/gateway/ledger/verify").await.expect(200)["ok"],
        true
    );
}

#[tokio::test]
async fn commands_from_many_clients_at_once_are_each_decided_once() {
    let gateway = Gateway::start(Options::default()).await;
    let run = gateway
        .start_job(json!({"service_type": "nobody", "payload": {}}))
        .await;
    let sends = (0..64).map(|n| {
        let (gateway, run) = (&gateway, &run);
        let kind = if n % 2 == 0 { "pause" } else { "resume" };
        async move {
            gateway
                .command(&format!("c{}", n / 2 * 2 + n % 2), run, kind, json!({}))
                .await
        }
    });
    let answers = futures_util::future::join_all(sends).await;
    let seqs: std::collections::BTreeSet<u64> =
        answers.iter().map(|a| a["seq"].as_u64().unwrap()).collect();
    assert_eq!(seqs.len(), 64);
    let events = gateway.events(&run).await;
    let count = |name: &str| events.iter().filter(|event| *event == name).count();
    assert_eq!(count("command_accepted"), 64);
    assert_eq!(count("command_applied") + count("command_rejected"), 64);
    let changes = count("job_paused") as i64 - count("job_resumed") as i64;
    let paused = gateway.run(&run).await["paused"] == true;
    assert_eq!(changes, i64::from(paused));
}
