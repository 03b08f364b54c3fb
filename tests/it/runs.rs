//! Runs over HTTP, with real worker processes: start, follow to the result, list, read, why, checkpoints, callbacks.

use serde_json::{Value, json};

use crate::support::scripted::Scripted;
use crate::support::wait::until;
use crate::support::{Gateway, Options, answer, assert_in_order, worker_service};

/// A text of the test's own, and what the worker must count in it.
fn text_file(dir: &tempfile::TempDir, lines: usize) -> String {
    let path = dir.path().join("text");
    std::fs::write(&path, "to be or not to be\n".repeat(lines)).unwrap();
    path.display().to_string()
}

async fn with_worker(options: Options) -> Gateway {
    let gateway = Gateway::start(options).await;
    let service = worker_service(&gateway, "stats", "text-stats", json!({}));
    gateway.register(service).await;
    gateway
}

#[tokio::test]
async fn a_job_runs_to_its_result_and_each_step_is_recorded() {
    let gateway = with_worker(Options::default()).await;
    let dir = tempfile::tempdir().unwrap();
    let payload = json!({"operation": "stats", "files": [text_file(&dir, 50)]});
    let body = json!({
        "job": {"service_type": "text-stats", "payload": payload, "priority": 2},
        "session_id": "s-1", "labels": {"team": "search"},
    });
    let started = gateway.post("/api/gateway/runs/start", body).await;
    let started = started.expect(200);
    assert_eq!(started["position"], 1);
    let run = started["run_id"].as_str().unwrap();
    let done = gateway.run_becomes(run, "completed").await;
    assert_eq!(done["output"]["statistics"]["words"], 300);
    assert_eq!(done["session_id"], "s-1");
    assert_eq!(done["workflow_id"], "job:text-stats");
    assert_eq!(done["actor_id"], "gateway");
    assert_eq!(done["job"]["labels"], json!({"team": "search"}));
    assert_eq!(done["job"]["attempt"], 1);
    assert_eq!(done["job"]["service"], "stats");
    assert_eq!(done["paused"], false);
    assert_eq!(done["waiting"], Value::Null);

    let records = gateway.records(run).await;
    let events = gateway.events(run).await;
    assert_eq!(events.first().map(String::as_str), Some("job_queued"));
    assert_eq!(events.last().map(String::as_str), Some("job_completed"));
    assert_in_order(
        &events,
        &[
            "job_queued",
            "job_dispatched",
            "job_progressed",
            "job_completed",
        ],
    );
    for (index, record) in records.iter().enumerate() {
        assert_eq!(record["cursor"], index as u64 + 1);
        assert_eq!(record["run_id"], run);
        assert_eq!(record["session_id"], "s-1");
    }
    assert_eq!(done["ledger_len"], records.len() as u64);
    let last = records.last().unwrap();
    assert_eq!(last["result"]["completed"], true);
    assert_eq!(last["result"]["output"], done["output"]);
    let input = gateway
        .get(&format!("/api/gateway/runs/{run}/input_data"))
        .await;
    assert_eq!(input.expect(200)["input_data"], payload);
    assert_in_order(
        &gateway.service_events("stats").await,
        &[
            "instance_start_requested",
            "instance_spawned",
            "instance_ready",
            "job_dispatched",
        ],
    );
}

#[tokio::test]
async fn a_start_with_a_key_is_done_once() {
    let gateway = Gateway::start(Options::default().set("RUNGATE_AUDIT", "off")).await;
    let start = |key: &'static str, body: Value| {
        let request = gateway.request(reqwest::Method::POST, "/api/gateway/runs/start");
        answer(request.header("idempotency-key", key).json(&body))
    };
    let body = json!({"job": {"service_type": "t", "payload": {"a": 1, "b": [1.5, null]}}});
    let first = start("k1", body.clone()).await;
    assert!(!first.headers.contains_key("idempotency-replayed"));
    let first = first.expect(200);
    let tail = gateway.tail().await;
    let again = start("k1", body.clone()).await;
    assert_eq!(again.headers["idempotency-replayed"], "true");
    assert_eq!(again.expect(200), first);
    // The same body written otherwise.
    let request = gateway.request(reqwest::Method::POST, "/api/gateway/runs/start");
    let request = request
        .header("idempotency-key", "k1")
        .header("content-type", "application/json");
    let text = r#"{ "job": {"payload": {"b": [1.5, null], "a": 1}, "service_type": "t"} }"#;
    let again = answer(request.body(text)).await;
    assert_eq!(again.expect(200), first);
    let other = start(
        "k1",
        json!({"job": {"service_type": "t", "payload": {"a": 2}}}),
    )
    .await;
    assert_eq!(other.expect(422)["code"], "idempotency_key_reused");
    assert_eq!(gateway.tail().await, tail);
    let second = start("k2", body.clone()).await.expect(200);
    assert_ne!(second["run_id"], first["run_id"]);

    // The key outlives the process, and belongs to its route.
    let mut gateway = gateway;
    gateway.kill();
    gateway.launch().await;
    let request = gateway.request(reqwest::Method::POST, "/api/gateway/runs/start");
    let again = answer(request.header("idempotency-key", "k1").json(&body)).await;
    assert_eq!(again.expect(200), first);
    let request = gateway.request(reqwest::Method::POST, "/queue/submit");
    let job = json!({"service_type": "t", "payload": {}});
    let other = answer(request.header("idempotency-key", "k1").json(&job)).await;
    assert_ne!(other.expect(200)["job_id"], first["run_id"]);
}

/// Two bodies that differ only where a double has no digits left are two bodies.
#[tokio::test]
async fn a_key_tells_large_numbers_apart() {
    let gateway = Gateway::start(Options::default()).await;
    let start = |number: &str| {
        let request = gateway.request(reqwest::Method::POST, "/api/gateway/runs/start");
        let body = format!(r#"{{"job":{{"service_type":"t","payload":{number}}}}}"#);
        let request = request
            .header("idempotency-key", "k")
            .header("content-type", "application/json");
        answer(request.body(body))
    };
    start("123456789012345678901234567890").await.expect(200);
    start("123456789012345678901234567891").await.expect(422);
    start("123456789012345678901234567890").await.expect(200);
}

#[tokio::test]
async fn thirty_two_starts_at_once_under_one_key_are_one_run() {
    let gateway = Gateway::start(Options::default()).await;
    let body = json!({"job": {"service_type": "t", "payload": {}}});
    let starts = (0..32).map(|_| {
        let request = gateway.request(reqwest::Method::POST, "/api/gateway/runs/start");
        answer(request.header("idempotency-key", "same").json(&body))
    });
    let answers = futures_util::future::join_all(starts).await;
    let fresh = answers
        .iter()
        .filter(|a| !a.headers.contains_key("idempotency-replayed"));
    assert_eq!(fresh.count(), 1);
    let runs: std::collections::BTreeSet<String> = answers
        .into_iter()
        .map(|a| a.expect(200)["run_id"].to_string())
        .collect();
    assert_eq!(runs.len(), 1);
}

#[tokio::test]
async fn a_payload_reaches_its_service_byte_for_byte() {
    let gateway = Gateway::start(Options::default()).await;
    let scripted = Scripted::start().await;
    gateway.register(scripted.service("echo", "echo")).await;
    let payload = "{\"b\": 1.50,  \"a\":[ ], \"n\":123456789012345678901234567890, \"t\":\"\\u00e9 \\ud83d\\ude00 \u{2028}\"}";
    let request = gateway.request(reqwest::Method::POST, "/api/gateway/runs/start");
    let body = format!("{{\"job\":{{\"service_type\":\"echo\",\"payload\":{payload}}}}}");
    let started = answer(
        request
            .header("content-type", "application/json")
            .body(body),
    )
    .await;
    let run = started.expect(200)["run_id"].as_str().unwrap().to_owned();
    gateway.run_becomes(&run, "completed").await;
    let job = &scripted.jobs()[0];
    assert_eq!(String::from_utf8_lossy(&job.body), payload);
    assert_eq!(job.header("x-rungate-run-id"), run);
    assert_eq!(job.header("x-rungate-attempt"), "1");
    assert_eq!(job.header("content-type"), "application/json");
    assert_eq!(job.header("x-rungate-checkpoint"), "");
    assert!(
        !job.headers.contains_key("authorization"),
        "the token stays here"
    );
}

#[tokio::test]
async fn runs_are_listed_newest_first_in_pages_under_filters() {
    let gateway = Gateway::start(Options::default()).await;
    let mut runs = Vec::new();
    for index in 0..7 {
        let body = json!({
            "job": {"service_type": if index % 2 == 0 { "even" } else { "odd" }, "payload": {}},
            "session_id": format!("s{}", index % 3),
        });
        let started = gateway
            .post("/api/gateway/runs/start", body)
            .await
            .expect(200);
        runs.push(started["run_id"].as_str().unwrap().to_owned());
    }
    gateway.command("c", &runs[6], "cancel", json!({})).await;
    gateway
        .command("p", &runs[5], "pause", json!({"reason": "lunch"}))
        .await;
    let ids = |page: &Value| -> Vec<String> {
        let items = page["items"].as_array().unwrap();
        items
            .iter()
            .map(|run| run["run_id"].as_str().unwrap().to_owned())
            .collect()
    };
    let list = |query: &str| {
        let path = format!("/api/gateway/runs{query}");
        let gateway = &gateway;
        async move { gateway.get(&path).await.expect(200) }
    };
    let newest: Vec<String> = runs.iter().rev().cloned().collect();
    assert_eq!(ids(&list("").await), newest);
    let mut found = Vec::new();
    let mut after = String::new();
    loop {
        let page = list(&format!("?limit=2&after={after}")).await;
        found.extend(ids(&page));
        match page["next_cursor"].as_str() {
            Some(next) => after = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(found, newest);
    assert_eq!(ids(&list("?status=cancelled").await), [runs[6].clone()]);
    assert_eq!(ids(&list("?status=paused").await), [runs[5].clone()]);
    assert_eq!(ids(&list("?status=waiting").await), newest[1..]);
    assert_eq!(
        ids(&list("?session_id=s1").await),
        [runs[4].clone(), runs[1].clone()]
    );
    let odd = ids(&list("?workflow_id=job:odd&limit=2").await);
    assert_eq!(odd, [runs[5].clone(), runs[3].clone()]);
    let page = list("?include_ledger_len=false&include_metrics=true").await;
    assert_eq!(page["items"][0].get("ledger_len"), None);
    assert_eq!(page["items"][0]["metrics"]["llm_calls"], 0);
    // A page of one listing is none of another's.
    let page = list("?limit=2").await;
    let next = page["next_cursor"].as_str().unwrap();
    let path = format!("/api/gateway/runs?status=waiting&after={next}");
    assert_eq!(
        gateway.get(&path).await.expect(400)["code"],
        "invalid_cursor"
    );
    let linked = gateway.get("/api/gateway/runs?limit=2").await;
    let link = linked.headers["link"].to_str().unwrap().to_owned();
    assert!(
        link.contains("rel=\"next\"") && link.contains(next),
        "{link}"
    );
    let paused = gateway.run(&runs[5]).await;
    assert_eq!(paused["pause_reason"], "lunch");
    assert_eq!(paused["waiting"]["wait_key"], format!("pause:{}", runs[5]));
    assert_eq!(paused["paused"], true);
}

#[tokio::test]
async fn a_waiting_run_says_why() {
    let gateway = Gateway::start(Options::gpus("sim:24GiB")).await;
    let nobody = gateway
        .start_job(json!({"service_type": "nobody", "payload": {}}))
        .await;
    let behind = gateway
        .start_job(json!({"service_type": "nobody", "payload": {}}))
        .await;
    assert_eq!(gateway.causes(&nobody).await, ["no_service"]);
    assert_eq!(gateway.causes(&behind).await, ["queue", "no_service"]);
    let urgent = json!({"service_type": "nobody", "payload": {}, "priority": 1});
    let urgent = gateway.start_job(urgent).await;
    let path = format!("/api/gateway/runs/{behind}/why");
    let why = gateway.get(&path).await.expect(200);
    assert_eq!(why["state"], "queued");
    assert_eq!(why["position"], 3);
    assert_eq!(why["run_id"], behind);
    assert!(why["since"].as_str().unwrap().ends_with("+00:00"));
    assert!(
        gateway
            .causes(&nobody)
            .await
            .contains(&"higher_priority".to_owned())
    );
    assert_eq!(gateway.causes(&urgent).await, ["no_service"]);
    gateway.command("p", &urgent, "pause", json!({})).await;
    assert_eq!(gateway.causes(&urgent).await, ["paused"]);

    gateway
        .register(json!({"name": "c", "container": "c", "port": 9, "type": "boxed"}))
        .await;
    let boxed = gateway
        .start_job(json!({"service_type": "boxed", "payload": {}}))
        .await;
    assert_eq!(gateway.causes(&boxed).await, ["no_engine"]);
    gateway
        .post("/services/c/disable", json!({}))
        .await
        .expect(200);
    assert_eq!(gateway.causes(&boxed).await, ["service_disabled"]);

    let large = worker_service(&gateway, "large", "large", json!({"vram_gb": 48}));
    gateway.register(large).await;
    let large = gateway
        .start_job(json!({"service_type": "large", "payload": {}}))
        .await;
    assert_eq!(gateway.causes(&large).await, ["vram_impossible"]);

    let holder = worker_service(
        &gateway,
        "holder",
        "holder",
        json!({"vram_gb": 20, "concurrency": 1}),
    );
    gateway.register(holder).await;
    let sleep = |of_type: &str| json!({"service_type": of_type, "payload": {"operation": "sleep", "ms": 600_000}});
    let running = gateway.start_job(sleep("holder")).await;
    gateway.job_becomes(&running, "running").await;
    assert_eq!(gateway.causes(&running).await, Vec::<String>::new());
    let second = gateway.start_job(sleep("holder")).await;
    gateway.blocked_by(&second, "concurrency").await;
    let other = worker_service(&gateway, "other", "other", json!({"vram_gb": 8}));
    gateway.register(other).await;
    let starved = gateway.start_job(sleep("other")).await;
    gateway.blocked_by(&starved, "vram").await;

    let dead = json!({"name": "dead", "type": "dead", "command": ["/bin/false"]});
    gateway.register(dead).await;
    let ended = gateway
        .start_job(json!({"service_type": "nobody", "payload": {}}))
        .await;
    gateway.command("x", &ended, "cancel", json!({})).await;
    assert_eq!(gateway.causes(&ended).await, Vec::<String>::new());
}

#[tokio::test]
async fn a_job_that_waits_too_long_expires() {
    let gateway = Gateway::start(Options::default()).await;
    let job = json!({"service_type": "nobody", "payload": {}, "ttl_seconds": 0.2});
    let run = gateway.start_job(job).await;
    let failed = gateway.run_becomes(&run, "failed").await;
    assert_eq!(failed["error"], "expired");
    assert_eq!(failed["job"]["error_code"], "expired");
    assert_eq!(gateway.events(&run).await, ["job_queued", "job_failed"]);
    // It is kept, and can be tried again.
    gateway.get(&format!("/queue/{run}")).await.expect(200);
}

#[tokio::test]
async fn a_failed_attempt_is_tried_again_after_a_recorded_delay() {
    let options = Options::default()
        .set("RUNGATE_RETRY_BASE_MS", "80")
        .set("RUNGATE_RETRY_MAX_MS", "1000");
    let gateway = with_worker(options).await;
    let payload = json!({"operation": "fail", "message": "no luck"});
    let job = json!({"service_type": "text-stats", "payload": payload, "max_attempts": 3});
    let run = gateway.start_job(job).await;
    let failed = gateway.run_becomes(&run, "failed").await;
    assert!(
        failed["error"].as_str().unwrap().contains("no luck"),
        "{failed}"
    );
    assert_eq!(failed["job"]["failures"], 3);
    assert_eq!(failed["job"]["attempt"], 3);
    let records = gateway.records(&run).await;
    let attempts: Vec<&Value> = records
        .iter()
        .filter(|r| r["effect"]["type"] == "job_attempt_failed")
        .collect();
    assert_eq!(attempts.len(), 3);
    let dispatched: Vec<&str> = records
        .iter()
        .filter(|r| r["effect"]["type"] == "job_dispatched")
        .map(|r| r["at"].as_str().unwrap())
        .collect();
    for (index, attempt) in attempts.iter().enumerate() {
        let retry_at = attempt["effect"]["payload"]["retry_at"].as_str();
        match retry_at {
            Some(at) => assert!(at <= dispatched[index + 1], "tried before {at}"),
            None => assert_eq!(index, 2),
        }
    }
    let events = gateway.events(&run).await;
    assert_in_order(
        &events,
        &[
            "job_attempt_failed",
            "job_requeued",
            "job_dispatched",
            "job_attempt_failed",
            "job_failed",
        ],
    );
}

#[tokio::test]
async fn an_answer_that_never_comes_or_is_no_json_fails_the_attempt() {
    let gateway = Gateway::start(Options::default()).await;
    let scripted = Scripted::start().await;
    gateway.register(scripted.service("s", "s")).await;
    for (payload, code) in [
        (json!({"hold": true}), "timeout"),
        (json!({"text": "<html>"}), "bad_answer"),
        (json!({"status": 404}), "http_status"),
        (json!({"status": 302}), "http_status"),
    ] {
        let job = json!({"service_type": "s", "payload": payload, "max_attempts": 1, "timeout_seconds": 0.3});
        let run = gateway.start_job(job).await;
        let failed = gateway.run_becomes(&run, "failed").await;
        assert_eq!(failed["job"]["error_code"], code, "{payload} {failed}");
    }
}

#[tokio::test]
async fn a_purged_run_keeps_its_records_and_loses_its_payloads() {
    let gateway = with_worker(Options::default()).await;
    let job = json!({"service_type": "text-stats", "payload": {"operation": "sleep", "ms": 1, "secret": "s3cr3t"}});
    let run = gateway.start_job(job).await;
    gateway.run_becomes(&run, "completed").await;
    let before = gateway.records(&run).await;
    let path = format!("/api/gateway/runs/{run}/purge");
    gateway.post(&path, json!({})).await.expect(200);
    let after = gateway.records(&run).await;
    assert_eq!(after.len(), before.len() + 1);
    assert!(!json!(after).to_string().contains("s3cr3t"));
    for (old, new) in before.iter().zip(&after) {
        assert_eq!(old["record_hash"], new["record_hash"]);
    }
    let read = gateway
        .get(&format!("/api/gateway/runs/{run}/input_data"))
        .await;
    assert_eq!(read.expect(410)["code"], "purged");
    assert_eq!(gateway.run(&run).await["job"]["purged"], true);
    let dialect = gateway.get(&format!("/queue/{run}")).await.expect(200);
    assert_eq!(dialect["payload"], Value::Null);
    assert_eq!(
        gateway.get("/api/gateway/ledger/verify").await.expect(200)["ok"],
        true
    );
    gateway.command("r", &run, "retry", json!({})).await;
    assert_eq!(gateway.command_state("r").await["code"], "purged");
}

#[tokio::test]
async fn a_checkpoint_is_kept_as_it_came_and_fenced_by_its_attempt() {
    let gateway = Gateway::start(Options::default()).await;
    let scripted = Scripted::start().await;
    gateway.register(scripted.service("s", "s")).await;
    let run = gateway
        .start_job(json!({"service_type": "s", "payload": {"hold": true}}))
        .await;
    gateway.job_becomes(&run, "running").await;
    let path = format!("/api/gateway/runs/{run}/checkpoint");
    let save = |attempt: &'static str, body: Vec<u8>| {
        let request = gateway.request(reqwest::Method::PUT, &path);
        let request = request
            .header("x-rungate-attempt", attempt)
            .header("content-type", "text/html");
        answer(request.body(body))
    };
    save("1", b"<script>\0\xff".to_vec()).await.expect(200);
    assert_eq!(
        save("2", b"x".to_vec()).await.expect(409)["code"],
        "stale_attempt"
    );
    assert_eq!(
        save("1", vec![7; (1 << 20) + 1]).await.expect(413)["code"],
        "body_too_large"
    );
    let read = gateway
        .request(reqwest::Method::GET, &path)
        .send()
        .await
        .unwrap();
    assert_eq!(read.headers()["content-type"], "text/html");
    assert_eq!(read.headers()["content-disposition"], "attachment");
    assert_eq!(read.headers()["x-content-type-options"], "nosniff");
    assert_eq!(read.bytes().await.unwrap(), b"<script>\0\xff"[..]);
    save("1", vec![7; 1 << 20]).await.expect(200);
    scripted.release();
    gateway.run_becomes(&run, "completed").await;
    assert_eq!(
        save("1", b"late".to_vec()).await.expect(409)["code"],
        "run_ended"
    );
}

#[tokio::test]
async fn a_callback_is_signed_tried_again_and_recorded() {
    let options = Options::default()
        .set("RUNGATE_CALLBACK_ALLOW_PRIVATE", "true")
        .set("RUNGATE_CALLBACK_BASE_MS", "50");
    let gateway = Gateway::start(options).await;
    let scripted = Scripted::start().await;
    gateway.register(scripted.service("s", "s")).await;
    scripted.answer_callbacks(&[500, 503]);
    let url = scripted.url("/callback");
    let job = json!({"service_type": "s", "payload": {"a": 1}, "callback_url": url});
    let run = gateway.start_job(job).await;
    gateway.run_becomes(&run, "completed").await;
    until("three callbacks", || async {
        scripted.callbacks().len() == 3
    })
    .await;
    until("the delivery is recorded", || async {
        let records = gateway.records(&run).await;
        records.last().unwrap()["effect"]["payload"]["delivered"] == true
    })
    .await;
    let calls = scripted.callbacks();
    let body = calls[2].json();
    assert_eq!(body["job_id"], run);
    assert_eq!(body["status"], "completed");
    assert_eq!(body["result"], json!({"echo": {"a": 1}}));
    assert_eq!(body["error"], Value::Null);
    assert!(body["timestamp"].as_str().unwrap().ends_with("+00:00"));
    let secret = std::fs::read_to_string(gateway.data_dir().join("auth/webhook-secret")).unwrap();
    let secret = rungate::executor::Secret::parse(&secret).unwrap();
    for call in &calls {
        let id = call.header("webhook-id");
        assert_eq!(id, calls[0].header("webhook-id"), "the same message");
        let at: i64 = call.header("webhook-timestamp").parse().unwrap();
        assert_eq!(
            call.header("webhook-signature"),
            secret.sign(id, at, &call.body)
        );
        assert_eq!(call.header("ce-specversion"), "1.0");
        assert_eq!(call.header("ce-type"), "rungate.run.completed");
        assert_eq!(call.header("ce-subject"), run);
    }
    let records = gateway.records(&run).await;
    let tries: Vec<&Value> = records
        .iter()
        .filter(|r| r["effect"]["type"] == "callback_attempted")
        .map(|r| &r["effect"]["payload"])
        .collect();
    assert_eq!(tries.len(), 3);
    assert_eq!(
        (&tries[0]["status"], &tries[0]["number"]),
        (&json!(500), &json!(1))
    );
    assert!(tries[0]["next_at"].is_string());
    assert_eq!(
        (&tries[2]["status"], &tries[2]["next_at"]),
        (&json!(200), &Value::Null)
    );

    // How it failed, and that it was cancelled, are told too.
    let fails = json!({"service_type": "s", "payload": {"status": 500}, "max_attempts": 1, "callback_url": url});
    let failed = gateway.start_job(fails).await;
    let waits = json!({"service_type": "nobody", "payload": {}, "callback_url": url});
    let cancelled = gateway.start_job(waits).await;
    gateway
        .command("c", &cancelled, "cancel", json!({"reason": "enough"}))
        .await;
    until("both are told", || async {
        scripted.callbacks().len() == 5
    })
    .await;
    let told: Vec<Value> = scripted.callbacks()[3..]
        .iter()
        .map(|call| call.json())
        .collect();
    let of = |run: &str| told.iter().find(|body| body["job_id"] == run).unwrap();
    assert_eq!(of(&failed)["status"], "failed");
    assert!(of(&failed)["error"].is_string());
    assert_eq!(of(&cancelled)["status"], "cancelled");
}

#[tokio::test]
async fn a_callback_to_a_private_address_is_refused_and_recorded() {
    let gateway = Gateway::start(Options::default()).await;
    let scripted = Scripted::start().await;
    let port = scripted.addr.port();
    for url in [
        scripted.url("/callback"),
        format!("http://localhost:{port}/callback"),
        format!("http://2130706433:{port}/callback"),
        format!("http://0x7f.1:{port}/callback"),
        format!("http://0.0.0.0:{port}/callback"),
        format!("http://[::ffff:127.0.0.1]:{port}/callback"),
        format!("http://[::1]:{port}/callback"),
        "http://169.254.169.254/latest/meta-data/".to_owned(),
        "http://[fe80::1]/".to_owned(),
        "http://[fd00:ec2::254]/".to_owned(),
        "http://10.0.0.1/".to_owned(),
        "http://192.168.1.1/".to_owned(),
        "http://100.64.0.1/".to_owned(),
        "http://224.0.0.1/".to_owned(),
    ] {
        let job = json!({"service_type": "nobody", "payload": {}, "callback_url": url});
        let run = gateway.start_job(job).await;
        let id = format!("c-{run}");
        gateway.command(&id, &run, "cancel", json!({})).await;
        let record = gateway.recorded(&run, "callback_attempted").await;
        let tried = &record["effect"]["payload"];
        assert_eq!(tried["status"], Value::Null);
        assert_eq!(tried["delivered"], false);
        assert!(
            tried["error"].as_str().unwrap().contains("not called"),
            "{tried}"
        );
    }
    assert!(scripted.callbacks().is_empty());
}

#[tokio::test]
async fn progress_is_asked_for_where_the_service_wants_it() {
    let gateway = Gateway::start(Options::default()).await;
    let scripted = Scripted::start().await;
    let mut service = scripted.service("s", "s");
    service["progress_mode"] = json!("poll");
    service["progress_endpoint"] = json!("/progress");
    gateway.register(service).await;
    let run = gateway
        .start_job(json!({"service_type": "s", "payload": {"hold": true}}))
        .await;
    gateway.recorded(&run, "job_progressed").await;
    let progress = gateway
        .get(&format!("/queue/{run}/progress"))
        .await
        .expect(200);
    assert!(progress["progress"]["percent"].as_u64().unwrap() >= 1);
    assert!(scripted.polls() >= 1);
    scripted.release();
    gateway.run_becomes(&run, "completed").await;
}

/// Even where private addresses are allowed, those that hand out a cloud machine's credentials are not.
#[tokio::test]
async fn a_callback_never_reaches_a_metadata_address() {
    let options = Options::default().set("RUNGATE_CALLBACK_ALLOW_PRIVATE", "true");
    let gateway = Gateway::start(options).await;
    for host in [
        "169.254.169.254",
        "[fe80::1]",
        "[::ffff:169.254.169.254]",
        "[fd00:ec2::254]",
    ] {
        let url = format!("http://{host}/latest/meta-data/");
        let job = json!({"service_type": "nobody", "payload": {}, "callback_url": url});
        let run = gateway.start_job(job).await;
        let id = format!("c-{run}");
        gateway.command(&id, &run, "cancel", json!({})).await;
        let record = gateway.recorded(&run, "callback_attempted").await;
        let error = &record["effect"]["payload"]["error"];
        assert!(error.as_str().unwrap().contains("not "), "{url}: {error}");
        assert_eq!(record["effect"]["payload"]["status"], Value::Null);
    }
}
