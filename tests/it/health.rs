//! Health, metrics, and the documents: what a machine and a person look at first.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::raw::exchange;
use crate::support::scripted::Scripted;
use crate::support::{Gateway, Options, answer};

#[tokio::test]
async fn health_needs_no_token_and_probes_any_name() {
    let gateway = Gateway::start(Options::default()).await;
    let open = |path: &str| answer(gateway.bare(Method::GET, path));
    let health = open("/health").await.expect(200);
    assert_eq!(health["status"], "ok");
    assert_eq!(health["version"], env!("CARGO_PKG_VERSION"));
    assert!(health["timestamp"].as_str().unwrap().ends_with("+00:00"));
    let health = open("/api/health").await.expect(200);
    assert_eq!(health, json!({"status": "healthy", "service": "rungate"}));
    assert_eq!(open("/livez").await.text, "ok\n");
    assert_eq!(open("/readyz").await.text, "ok\n");
    let verbose = open("/readyz?verbose=true").await.text;
    assert_eq!(
        verbose,
        "[+] serving\n[+] ledger\n[+] disk\n[+] coordinator\nok\n"
    );
    for path in ["/livez", "/readyz"] {
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: 10.1.2.3:9\r\nconnection: close\r\n\r\n");
        assert_eq!(
            exchange(gateway.addr(), request.as_bytes()).await.status,
            200
        );
    }
    let ping = gateway.get("/api/gateway/ping").await.expect(200);
    assert_eq!(
        (&ping["ok"], &ping["status"]),
        (&json!(true), &json!("healthy"))
    );
}

#[tokio::test]
async fn an_answer_carries_the_callers_request_id_when_it_is_sane() {
    let gateway = Gateway::start(Options::default()).await;
    let ask = |id: &str| {
        answer(
            gateway
                .bare(Method::GET, "/health")
                .header("x-request-id", id),
        )
    };
    assert_eq!(ask("mine-1").await.headers["x-request-id"], "mine-1");
    for bad in ["", "a b", "\u{e9}", &"x".repeat(129)] {
        let given = ask(bad).await.headers["x-request-id"].clone();
        assert_eq!(given.len(), 22, "{bad}");
    }
    // It is in the records that come of the request.
    let request = gateway
        .request(Method::POST, "/api/gateway/runs/start")
        .header("x-request-id", "mine-2");
    let started = answer(request.json(&json!({"job": {"service_type": "t", "payload": 1}}))).await;
    let run = started.expect(200)["run_id"].as_str().unwrap().to_owned();
    let first = gateway.records(&run).await[0].clone();
    assert_eq!(
        (&first["request_id"], &first["actor_id"]),
        (&json!("mine-2"), &json!("admin"))
    );
}

/// The value of a sample, by the beginning of its line.
fn sample(metrics: &str, beginning: &str) -> Option<f64> {
    let line = metrics.lines().find(|line| line.starts_with(beginning))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let gateway = Gateway::start(Options::gpus("sim:24GiB")).await;
    let scripted = Scripted::start().await;
    gateway.register(scripted.service("s", "s")).await;
    for _ in 0..3 {
        let run = gateway
            .start_job(json!({"service_type": "s", "payload": {}}))
            .await;
        gateway.run_becomes(&run, "completed").await;
    }
    let holder = crate::support::worker_service(&gateway, "h", "h", json!({"vram_gb": 6}));
    gateway.register(holder).await;
    gateway
        .post("/services/h/start", json!({}))
        .await
        .expect(200);
    gateway
        .start_job(json!({"service_type": "nobody", "payload": {}}))
        .await;
    let held = gateway
        .start_job(json!({"service_type": "s", "payload": {"hold": true}}))
        .await;
    gateway.job_becomes(&held, "running").await;
    let stream = gateway
        .request(Method::GET, "/api/gateway/ledger/stream")
        .send()
        .await
        .unwrap();
    let patched = gateway.request(Method::PATCH, "/api/gateway/admin/users/nobody");
    answer(patched.json(&json!({}))).await.expect(404);
    let answer = gateway.get("/metrics").await;
    assert!(
        answer.headers["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/plain; version=0.0.4")
    );
    let metrics = answer.text;
    let gib = 1_073_741_824.0;
    for (beginning, value) in [
        ("rungate_queue_depth ", 1.0),
        ("rungate_runs{status=\"completed\"} ", 3.0),
        ("rungate_runs{status=\"running\"} ", 1.0),
        ("rungate_runs{status=\"queued\"} ", 1.0),
        ("rungate_ledger_followers ", 1.0),
        ("rungate_dispatch_seconds_count", 4.0),
        ("rungate_gpu_reserved_bytes{", 6.0 * gib),
        ("rungate_gpu_used_bytes{", 6.0 * gib),
        ("rungate_gpu_memory_bytes{", 24.0 * gib),
        ("rungate_build_info{", 1.0),
    ] {
        assert_eq!(
            sample(&metrics, beginning),
            Some(value),
            "{beginning}\n{metrics}"
        );
    }
    let tail = sample(&metrics, "rungate_ledger_seq ").unwrap();
    assert_eq!(tail, gateway.tail().await as f64);
    let commits = sample(&metrics, "rungate_ledger_commit_seconds_count").unwrap();
    assert!((1.0..=tail).contains(&commits), "{commits}");
    assert_eq!(
        sample(&metrics, "rungate_ledger_batch_records_sum"),
        Some(tail)
    );
    let patches = "rungate_http_requests_total{route=\"/api/gateway/admin/users/{user_id}\",method=\"PATCH\",status=\"404\"}";
    assert_eq!(sample(&metrics, patches), Some(1.0), "{metrics}");
    let starts = "rungate_http_requests_total{route=\"/api/gateway/runs/start\",method=\"POST\",status=\"200\"}";
    assert_eq!(sample(&metrics, starts), Some(5.0), "{metrics}");
    assert!(sample(&metrics, "rungate_http_request_seconds_count").is_some());
    assert!(sample(&metrics, "rungate_call_seconds_count").unwrap() >= 3.0);
    // Ids are no labels: else each run would be a series for ever.
    assert!(!metrics.contains(&held));
    for name in [
        "rungate_queue_depth",
        "rungate_ledger_commit_seconds",
        "rungate_http_requests_total",
    ] {
        assert!(metrics.contains(&format!("# HELP {name} ")), "{name}");
        assert!(metrics.contains(&format!("# TYPE {name} ")), "{name}");
    }
    drop(stream);
    scripted.release();
    // What ended counts as ended, what is over is back to nothing.
    gateway.run_becomes(&held, "completed").await;
    let metrics = gateway.get("/metrics").await.text;
    assert_eq!(
        sample(&metrics, "rungate_runs{status=\"running\"} ").unwrap_or(0.0),
        0.0
    );
    assert_eq!(
        sample(&metrics, "rungate_runs{status=\"completed\"} "),
        Some(4.0)
    );
}

/// Whether an operation shows what goes in or comes out.
fn has_example(operation: &Value) -> bool {
    let shown = |content: &Value| {
        let kinds = content.as_object().into_iter().flatten();
        kinds
            .into_iter()
            .any(|(_, media)| !media["example"].is_null() || !media["examples"].is_null())
    };
    shown(&operation["requestBody"]["content"]) || shown(&operation["responses"]["200"]["content"])
}

#[tokio::test]
async fn the_document_is_whole() {
    let gateway = Gateway::start(Options::default()).await;
    let document = answer(gateway.bare(Method::GET, "/openapi.json")).await;
    assert_eq!(document.headers["content-type"], "application/json");
    let api = document.expect(200);
    assert_eq!(api["openapi"], "3.1.0");
    assert!(api["info"]["title"].is_string() && api["info"]["version"].is_string());
    let (mut bare, mut operations) = (Vec::new(), 0);
    for (path, item) in api["paths"].as_object().unwrap() {
        assert!(path.starts_with('/'));
        for (method, operation) in item.as_object().unwrap() {
            operations += 1;
            let at = format!("{method} {path}");
            assert!(
                operation["summary"].as_str().is_some_and(|s| !s.is_empty()),
                "{at}"
            );
            assert!(operation["operationId"].is_string(), "{at}");
            for (status, response) in operation["responses"].as_object().unwrap() {
                assert!(response["description"].is_string(), "{at} {status}");
            }
            if !has_example(operation) {
                bare.push(at);
            }
        }
    }
    assert!(operations > 60, "{operations}");
    assert!(bare.is_empty(), "no example: {bare:#?}");
    // Every reference leads somewhere.
    let text = api.to_string();
    for reference in text.split("\"$ref\":\"#").skip(1) {
        let pointer = reference.split('"').next().unwrap();
        assert!(api.pointer(pointer).is_some(), "{pointer}");
    }
}

/// The names in an object and in the objects inside it, but not in what callers fill themselves.
fn shape(value: &Value) -> Vec<String> {
    let mut names = Vec::new();
    for (name, inner) in value.as_object().into_iter().flatten() {
        names.push(name.clone());
        if !["labels", "output", "effect", "input_data", "waiting"].contains(&name.as_str()) {
            names.extend(
                shape(inner)
                    .into_iter()
                    .map(|inside| format!("{name}.{inside}")),
            );
        }
    }
    names.sort();
    names
}

#[tokio::test]
async fn examples_look_like_the_answers() {
    let gateway = Gateway::start(Options::gpus("sim:24GiB")).await;
    let worker = crate::support::worker_service(&gateway, "w", "w", json!({"vram_gb": 1}));
    gateway.register(worker).await;
    gateway
        .post("/services/w/start", json!({}))
        .await
        .expect(200);
    let job = json!({"service_type": "w", "payload": {"operation": "sleep", "ms": 1}});
    let run = gateway.start_job(job).await;
    gateway.run_becomes(&run, "completed").await;
    let queued = gateway
        .start_job(json!({"service_type": "nobody", "payload": {}}))
        .await;
    gateway.command("c", &queued, "pause", json!({})).await;
    gateway.command("c2", &queued, "resume", json!({})).await;
    let api = gateway.get("/openapi.json").await.expect(200);
    for (template, path) in [
        (
            "/api/gateway/runs/{run_id}",
            format!("/api/gateway/runs/{run}"),
        ),
        (
            "/api/gateway/runs/{run_id}/input_data",
            format!("/api/gateway/runs/{run}/input_data"),
        ),
        (
            "/api/gateway/runs/{run_id}/why",
            format!("/api/gateway/runs/{queued}/why"),
        ),
        (
            "/api/gateway/commands/{command_id}",
            "/api/gateway/commands/c".to_owned(),
        ),
        (
            "/api/gateway/runs/{run_id}/ledger",
            format!("/api/gateway/runs/{run}/ledger?limit=1"),
        ),
        ("/api/gateway/runs", "/api/gateway/runs?limit=1".to_owned()),
        ("/services/{name}", "/services/w".to_owned()),
        ("/queue/{job_id}", format!("/queue/{queued}")),
        ("/queue/{job_id}/progress", format!("/queue/{run}/progress")),
        ("/gpu", "/gpu".to_owned()),
        ("/vram", "/vram".to_owned()),
        ("/health", "/health".to_owned()),
        ("/api/health", "/api/health".to_owned()),
        ("/api/gateway/ping", "/api/gateway/ping".to_owned()),
        ("/preempt/check/{service}", "/preempt/check/w".to_owned()),
        ("/services/{name}/logs", "/services/w/logs".to_owned()),
    ] {
        let content = &api["paths"][template]["get"]["responses"]["200"]["content"];
        let example = &content["application/json"]["example"];
        let actual = gateway.get(&path).await.expect(200);
        let (mut wanted, found) = (shape(example), shape(&actual));
        if template.starts_with("/preempt/check") {
            // Nothing runs: the answer is the other one.
            wanted.retain(|name| ["preemptable", "service"].contains(&name.as_str()));
            assert!(wanted.iter().all(|name| found.contains(name)), "{found:?}");
            continue;
        }
        if template.ends_with("progress") {
            wanted.retain(|name| !name.contains('.'));
        }
        assert_eq!(wanted, found, "{template}");
        let items = |value: &Value| value["items"].as_array().map(|items| shape(&items[0]));
        assert_eq!(items(example), items(&actual), "{template}");
    }
}

#[tokio::test]
async fn the_documents_reader_needs_nobody_else() {
    let gateway = Gateway::start(Options::default()).await;
    let open = |path: &str| answer(gateway.bare(Method::GET, path));
    let page = open("/docs").await;
    assert_eq!(page.status, 200);
    let policy = page.headers["content-security-policy"]
        .to_str()
        .unwrap()
        .to_owned();
    assert!(
        policy.contains("default-src 'none'") && policy.contains("script-src 'self'"),
        "{policy}"
    );
    assert!(
        page.headers["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/html")
    );
    let mut files = Vec::new();
    for attribute in ["src=\"", "href=\""] {
        for part in page.text.split(attribute).skip(1) {
            files.push(part.split('"').next().unwrap().to_owned());
        }
    }
    assert!(files.len() >= 3, "{files:?}");
    for file in files {
        assert!(!file.contains("//"), "{file} is elsewhere");
        let path = format!("/docs/{}", file.trim_start_matches("./"));
        let loaded = open(&path).await;
        assert_eq!(loaded.status, 200, "{path}");
        assert_eq!(loaded.headers["x-content-type-options"], "nosniff");
        if path.ends_with(".js") {
            assert!(
                loaded.headers["content-type"]
                    .to_str()
                    .unwrap()
                    .contains("javascript"),
                "{path}"
            );
        }
    }
    // Scripts in the page itself are what the policy forbids.
    assert!(!page.text.contains("<script>"), "{}", page.text);
    let script = open("/docs/swagger-initializer.js").await.text;
    assert!(script.contains("/openapi.json"), "{script}");
}
