//! The GPU dialect's queue over the same runs: its names, its texts, its refusals.

use serde_json::{Value, json};

use crate::support::scripted::Scripted;
use crate::support::wait::until;
use crate::support::{Gateway, Options, answer, worker_service};

#[tokio::test]
async fn a_submitted_job_is_read_in_the_dialects_words() {
    let gateway = Gateway::start(Options::default()).await;
    let scripted = Scripted::start().await;
    gateway.register(scripted.service("s", "s")).await;
    let submit = json!({"service_type": "s", "payload": {"hold": true, "n": 1.50}, "priority": 2});
    let submitted = gateway.post("/queue/submit", submit).await.expect(200);
    assert_eq!(submitted["position"], 1);
    assert_eq!(submitted["estimated_wait"], Value::Null);
    let id = submitted["job_id"].as_str().unwrap();
    gateway.job_becomes(id, "running").await;
    let job = gateway.get(&format!("/queue/{id}")).await.expect(200);
    assert_eq!(job["status"], "running");
    assert_eq!(
        (&job["priority"], &job["attempts"], &job["max_attempts"]),
        (&json!(2), &json!(1), &json!(3))
    );
    assert_eq!(job["ttl_seconds"], 3600.0);
    assert_eq!(job.get("position"), None);
    let text = job["payload"].as_str().expect("a JSON text");
    assert_eq!(
        serde_json::from_str::<Value>(text).unwrap(),
        json!({"hold": true, "n": 1.5})
    );
    assert_eq!(job["result"], Value::Null);
    // It runs: it cannot be cancelled here.
    let refused = gateway.delete(&format!("/queue/{id}")).await;
    assert_eq!(
        refused.expect(409)["detail"],
        "Cannot cancel a running job — use /preempt/execute to preempt it."
    );
    let waiting = gateway
        .post("/queue/submit", json!({"service_type": "s", "payload": {}}))
        .await;
    let waiting = waiting.expect(200);
    let second = waiting["job_id"].as_str().unwrap();
    let stats = gateway.get("/queue/stats").await.expect(200);
    assert_eq!(
        stats,
        json!({
            "total_queued": 1, "total_running": 1, "by_type": {"s": 1}, "by_priority": {"P3": 1}
        })
    );
    let read = gateway
        .get(&format!("/api/gateway/queue/{second}"))
        .await
        .expect(200);
    assert_eq!(
        (&read["status"], &read["position"]),
        (&json!("queued"), &json!(1))
    );
    let cancelled = gateway
        .delete(&format!("/queue/{second}"))
        .await
        .expect(200);
    assert_eq!(cancelled, json!({"job_id": second, "cancelled": true}));
    assert_eq!(
        gateway
            .delete(&format!("/queue/{second}"))
            .await
            .expect(409)["code"],
        "run_ended"
    );
    scripted.release();
    gateway.run_becomes(id, "completed").await;
    let done = gateway.get(&format!("/queue/{id}")).await.expect(200);
    let result = done["result"].as_str().expect("a JSON text");
    let result: Value = serde_json::from_str(result).unwrap();
    assert_eq!(result["echo"]["hold"], true);
    assert!(done["completed_at"].is_string() && done["started_at"].is_string());
    assert_eq!(
        gateway.delete(&format!("/queue/{id}")).await.expect(409)["code"],
        "run_ended"
    );
}

#[tokio::test]
async fn progress_is_taken_from_the_attempt_that_runs() {
    let gateway = Gateway::start(Options::default()).await;
    let scripted = Scripted::start().await;
    gateway.register(scripted.service("s", "s")).await;
    let run = gateway
        .start_job(json!({"service_type": "s", "payload": {"hold": true}}))
        .await;
    gateway.job_becomes(&run, "running").await;
    let path = format!("/queue/{run}/progress");
    let before = gateway.get(&path).await.expect(200);
    assert_eq!(
        before,
        json!({"job_id": run, "status": "running", "progress": null, "preempt_count": 0})
    );
    let pushed = gateway
        .post(&path, json!({"percent": 40, "step": "a"}))
        .await;
    assert_eq!(pushed.expect(200), json!({"ok": true}));
    let request = gateway
        .request(reqwest::Method::POST, &path)
        .header("x-rungate-attempt", "2");
    let stale = answer(request.json(&json!({"percent": 1}))).await;
    assert_eq!(stale.expect(409)["code"], "stale_attempt");
    let after = gateway.get(&path).await.expect(200);
    assert_eq!(after["progress"], json!({"percent": 40, "step": "a"}));
    let job = gateway.get(&format!("/queue/{run}")).await.expect(200);
    let snapshot: Value = serde_json::from_str(job["progress_snapshot"].as_str().unwrap()).unwrap();
    assert_eq!(snapshot["percent"], 40);
    scripted.release();
    gateway.run_becomes(&run, "completed").await;
    gateway
        .post(&path, json!({"percent": 100}))
        .await
        .expect(409);
}

#[tokio::test]
async fn jobs_of_one_service_run_one_at_a_time_in_order_of_priority_and_age() {
    let gateway = Gateway::start(Options::default()).await;
    let scripted = Scripted::start().await;
    gateway.register(scripted.service("s", "s")).await;
    let mut runs = Vec::new();
    for (n, priority) in [(0, 3), (1, 4), (2, 3), (3, 2), (4, 3), (5, 2)] {
        let job =
            json!({"service_type": "s", "payload": {"hold": true, "n": n}, "priority": priority});
        let run = gateway.start_job(job).await;
        if n == 0 {
            gateway.job_becomes(&run, "running").await;
        }
        runs.push(run);
    }
    assert_eq!(scripted.jobs().len(), 1);
    scripted.release();
    for run in &runs {
        gateway.run_becomes(run, "completed").await;
    }
    let order: Vec<u64> = scripted
        .jobs()
        .iter()
        .map(|job| job.json()["n"].as_u64().unwrap())
        .collect();
    assert_eq!(order, [0, 3, 5, 2, 4, 1]);
}

#[tokio::test]
async fn a_service_takes_as_many_at_once_as_it_says() {
    let gateway = Gateway::start(Options::default()).await;
    let scripted = Scripted::start().await;
    let mut service = scripted.service("s", "s");
    service["concurrency"] = json!(2);
    gateway.register(service).await;
    let mut runs = Vec::new();
    for _ in 0..3 {
        let job = json!({"service_type": "s", "payload": {"hold": true}});
        runs.push(gateway.start_job(job).await);
    }
    until("two run", || async { scripted.jobs().len() == 2 }).await;
    gateway.blocked_by(&runs[2], "concurrency").await;
    let service = gateway.service("s").await;
    assert_eq!(service["active_job_ids"].as_array().unwrap().len(), 2);
    assert_eq!(service["scheduler_status"], "busy");
    assert_eq!(
        gateway.get("/queue/stats").await.expect(200)["total_running"],
        2
    );
    assert_eq!(scripted.jobs().len(), 2);
    scripted.release();
    for run in &runs {
        gateway.run_becomes(run, "completed").await;
    }
}

#[tokio::test]
async fn two_services_of_a_type_share_its_jobs_and_a_named_one_gets_its_own() {
    let gateway = Gateway::start(Options::default()).await;
    let (one, two) = (Scripted::start().await, Scripted::start().await);
    gateway.register(one.service("one", "s")).await;
    gateway.register(two.service("two", "s")).await;
    let mut runs = Vec::new();
    for _ in 0..2 {
        let job = json!({"service_type": "s", "payload": {"hold": true}});
        runs.push(gateway.start_job(job).await);
    }
    until("each has one", || async {
        one.jobs().len() == 1 && two.jobs().len() == 1
    })
    .await;
    let named = json!({"service_name": "two", "payload": {"hold": true, "named": true}});
    let named = gateway.start_job(named).await;
    one.release();
    until("the first is free", || async {
        gateway.service("one").await["active_job_id"].is_null()
    })
    .await;
    assert_eq!(gateway.causes(&named).await, ["concurrency"]);
    two.release();
    gateway.run_becomes(&named, "completed").await;
    assert_eq!(gateway.run(&named).await["workflow_id"], "job:@two");
    assert_eq!(one.jobs().len(), 1);
    assert_eq!(two.jobs().len(), 2);
}

#[tokio::test]
async fn a_worker_that_dies_under_its_job_is_started_again_and_the_job_with_it() {
    let options = Options::default()
        .set("RUNGATE_RETRY_BASE_MS", "20")
        .set("RUNGATE_RESTART_BASE_MS", "50");
    let gateway = Gateway::start(options).await;
    let service = worker_service(&gateway, "stats", "text-stats", json!({}));
    gateway.register(service).await;
    let job = json!({"service_type": "text-stats", "payload": {"operation": "exit", "code": 3}, "max_attempts": 2});
    let run = gateway.start_job(job).await;
    let failed = gateway.run_becomes(&run, "failed").await;
    assert_eq!(failed["job"]["attempt"], 2);
    let exits: Vec<Value> = gateway
        .service_records("stats")
        .await
        .into_iter()
        .filter(|r| r["effect"]["type"] == "instance_exited")
        .map(|r| r["effect"]["payload"].clone())
        .collect();
    assert!(!exits.is_empty());
    assert!(
        exits
            .iter()
            .all(|exit| exit["expected"] == false && exit["exit"] == json!({"code": 3})),
        "{exits:?}"
    );
    let next = json!({"service_type": "text-stats", "payload": {"operation": "sleep", "ms": 1}});
    let next = gateway.start_job(next).await;
    gateway.run_becomes(&next, "completed").await;
}
