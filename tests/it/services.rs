//! Services over HTTP, with real processes: the registry, starting and stopping, health, crashes, logs.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::scripted::Scripted;
use crate::support::sse::EventSource;
use crate::support::wait::until;
use crate::support::{Gateway, Options, assert_in_order, worker_service};

fn alive(pid: u64) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[tokio::test]
async fn the_registry_keeps_what_it_is_told() {
    let mut gateway = Gateway::start(Options::default()).await;
    let service = json!({
        "name": "a", "container": "box-a", "port": 9000, "type": "llm", "description": "d", "vram_gb": 1.5,
        "health_endpoint": "/healthz", "progress_mode": "poll", "progress_endpoint": "/progress",
    });
    let registered = gateway.register(service.clone()).await;
    for (member, value) in service.as_object().unwrap() {
        assert_eq!(&registered[member], value, "{member}");
    }
    assert_eq!(registered["enabled"], true);
    assert!(registered["created_at"].is_string());
    let refused = gateway
        .post("/services/register", service)
        .await
        .expect(409);
    assert_eq!(refused["detail"], "Service 'a' already exists");
    let process =
        json!({"name": "b", "type": "t", "command": ["/bin/true"], "env": {"SECRET": "hunter2"}});
    gateway.register(process).await;
    let listed = gateway.get("/services?type=llm").await;
    assert!(!listed.text.contains("hunter2"));
    assert_eq!(listed.expect(200)["services"].as_object().unwrap().len(), 1);
    let all = gateway.get("/api/gateway/services").await;
    assert!(!all.text.contains("hunter2"), "values of env are secrets");
    let disabled = gateway
        .post("/services/b/disable", json!({}))
        .await
        .expect(200);
    assert_eq!(disabled["enabled"], false);
    let listed = gateway.get("/services?enabled=true").await.expect(200);
    assert_eq!(
        listed["services"]
            .as_object()
            .unwrap()
            .keys()
            .collect::<Vec<_>>(),
        ["a"]
    );
    let changed = gateway
        .put(
            "/services/a",
            json!({"vram_gb": 4, "progress_mode": "stateless"}),
        )
        .await;
    let changed = changed.expect(200);
    assert_eq!(
        (&changed["vram_gb"], &changed["description"]),
        (&json!(4.0), &json!("d"))
    );
    gateway.kill();
    gateway.launch().await;
    assert_eq!(gateway.service("a").await["vram_gb"], 4.0);
    assert_eq!(gateway.service("b").await["enabled"], false);
    assert_eq!(
        gateway.delete("/services/a").await.expect(200),
        json!({"deleted": "a"})
    );
    gateway.get("/services/a").await.expect(404);
    gateway.delete("/services/a").await.expect(404);
    let records = gateway.get("/api/gateway/ledger?limit=2000").await;
    assert!(
        !records.text.contains("hunter2"),
        "nor are they in the ledger's view"
    );
}

#[tokio::test]
async fn a_service_is_started_stopped_and_restarted_by_hand() {
    let gateway = Gateway::start(Options::default()).await;
    gateway
        .register(worker_service(&gateway, "w", "w", json!({})))
        .await;
    let stopped = gateway
        .post("/services/w/stop", json!({}))
        .await
        .expect(200);
    assert_eq!(stopped["status"], "already_stopped");
    let started = gateway
        .post("/services/w/start", json!({}))
        .await
        .expect(200);
    assert_eq!(
        (&started["service"], &started["status"], &started["healthy"]),
        (&json!("w"), &json!("started"), &json!(true))
    );
    assert!(started["startup_time_s"].is_f64());
    let service = gateway.service("w").await;
    assert_eq!(
        (&service["container_running"], &service["healthy"]),
        (&json!(true), &json!(true))
    );
    let pid = service["instance"]["pid"].as_u64().unwrap();
    assert!(alive(pid));
    assert_eq!(service["port"], service["instance"]["port"]);
    let again = gateway
        .post("/services/w/start", json!({}))
        .await
        .expect(200);
    assert_eq!(again["status"], "already_running");
    assert_eq!(again["healthy"], true);
    let restarted = gateway
        .post("/services/w/restart", json!({}))
        .await
        .expect(200);
    assert_eq!(
        (
            &restarted["status"],
            &restarted["previous_status"],
            &restarted["drained"]
        ),
        (&json!("started"), &json!("running"), &json!(true))
    );
    let second = gateway.service("w").await;
    assert_eq!(second["instance"]["generation"], 2);
    assert!(!alive(pid));
    let refused = gateway.post("/services/w/start", json!({})).await;
    assert_eq!(refused.expect(200)["status"], "already_running");
    let stopped = gateway
        .post("/services/w/stop?drain=false", json!({}))
        .await
        .expect(200);
    assert_eq!(
        (&stopped["status"], &stopped["drained"]),
        (&json!("stopped"), &json!(false))
    );
    until("no process is left", || async {
        gateway.services_alive().is_empty()
    })
    .await;
    let restarted = gateway
        .post("/services/w/restart", json!({}))
        .await
        .expect(200);
    assert_eq!(restarted["previous_status"], "stopped");
    assert_in_order(
        &gateway.service_events("w").await,
        &[
            "instance_start_requested",
            "instance_spawned",
            "instance_ready",
            "instance_stop_requested",
            "instance_signalled",
            "instance_exited",
            "instance_released",
            "instance_start_requested",
        ],
    );
    let removed = gateway.delete("/services/w").await.expect(200);
    assert_eq!(removed["deleted"], "w");
    until("it is gone", || async {
        gateway.get("/services/w").await.status == 404
    })
    .await;
    until("its process too", || async {
        gateway.services_alive().is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_drained_stop_lets_its_job_end_and_an_undrained_one_sends_it_back() {
    let gateway = Gateway::start(Options::default()).await;
    gateway
        .register(worker_service(&gateway, "w", "w", json!({})))
        .await;
    let sleep = |ms: u64| json!({"service_type": "w", "payload": {"operation": "sleep", "ms": ms}});
    let run = gateway.start_job(sleep(700)).await;
    gateway.job_becomes(&run, "running").await;
    assert_eq!(
        gateway.delete("/services/w").await.expect(409)["detail"]["error"],
        "service_has_active_jobs"
    );
    let stopped = gateway
        .post("/services/w/stop", json!({}))
        .await
        .expect(200);
    assert_eq!(
        (&stopped["status"], &stopped["drained"]),
        (&json!("stopped"), &json!(true))
    );
    assert_eq!(gateway.run(&run).await["status"], "completed");
    let long = gateway.start_job(sleep(600_000)).await;
    gateway.job_becomes(&long, "running").await;
    gateway
        .post("/services/w/disable", json!({}))
        .await
        .expect(200);
    let stopped = gateway
        .post("/services/w/stop?drain=false", json!({}))
        .await
        .expect(200);
    assert_eq!(stopped["drained"], false);
    let queued = gateway.job_becomes(&long, "queued").await;
    assert_eq!(queued["job"]["failures"], 0, "it is not its fault");
    assert_eq!(gateway.causes(&long).await, ["service_disabled"]);
    assert_eq!(
        gateway
            .post("/services/w/start", json!({}))
            .await
            .expect(409)["code"],
        "service_disabled"
    );
    gateway
        .post("/services/w/enable", json!({}))
        .await
        .expect(200);
    gateway.job_becomes(&long, "running").await;
}

#[tokio::test]
async fn a_command_that_ends_at_once_is_given_up_and_says_so() {
    let options = Options::default()
        .set("RUNGATE_RESTART_BASE_MS", "20")
        .set("RUNGATE_CRASH_LOOP_DEATHS", "3");
    let gateway = Gateway::start(options).await;
    gateway
        .register(json!({"name": "dead", "type": "dead", "command": ["/bin/false"]}))
        .await;
    gateway
        .register(json!({"name": "none", "type": "none", "command": ["/no/such/program"]}))
        .await;
    for (name, trace) in [("dead", "code"), ("none", "no/such/program")] {
        let run = gateway
            .start_job(json!({"service_type": name, "payload": {}}))
            .await;
        gateway.blocked_by(&run, "crash_loop").await;
        let service = gateway.service(name).await;
        assert!(service["crash_looped"].is_string(), "{service}");
        assert_eq!(service["deaths"], 3);
        let events = gateway.service_events(name).await;
        let starts = events
            .iter()
            .filter(|event| *event == "instance_start_requested")
            .count();
        assert_eq!(starts, 3, "no busy loop");
        assert_in_order(&events, &["instance_exited", "service_crash_looped"]);
        let records = gateway.service_records(name).await;
        assert!(json!(records).to_string().contains(trace), "{trace}");
        // The job waits on, and a start by hand tries once more.
        assert_eq!(gateway.run(&run).await["job"]["state"], "queued");
        let started = gateway
            .post(&format!("/services/{name}/start"), json!({}))
            .await;
        assert_eq!(started.expect(502)["code"], "start_failed");
        assert_eq!(gateway.run(&run).await["job"]["state"], "queued");
        until("it is given up again", || async {
            gateway.service(name).await["crash_looped"].is_string()
        })
        .await;
    }
    // Mended, it serves.
    let mended = worker_service(&gateway, "dead", "dead", json!({}));
    let changes =
        json!({"command": mended["command"], "env": mended["env"], "dispatch_path": "/process"});
    gateway.put("/services/dead", changes).await.expect(200);
    let job = json!({"service_type": "dead", "payload": {"operation": "sleep", "ms": 1}});
    let run = gateway.start_job(job).await;
    gateway.run_becomes(&run, "completed").await;
}

#[tokio::test]
async fn a_service_that_is_never_healthy_is_stopped_and_the_start_says_so() {
    let options = Options::default().set("RUNGATE_CRASH_LOOP_DEATHS", "1");
    let gateway = Gateway::start(options).await;
    let service = json!({
        "name": "deaf", "type": "deaf", "command": ["/bin/sleep", "600"], "startup_timeout_seconds": 0.5,
        "grace_seconds": 1,
    });
    gateway.register(service).await;
    let started = gateway.post("/services/deaf/start", json!({})).await;
    let failed = started.expect(502);
    assert_eq!(failed["code"], "start_failed");
    assert_in_order(
        &gateway.service_events("deaf").await,
        &["instance_spawned", "instance_unhealthy"],
    );
    until("its process is gone", || async {
        gateway.services_alive().is_empty()
    })
    .await;
    let wrong = worker_service(
        &gateway,
        "wrong",
        "wrong",
        json!({"health_endpoint": "/nope", "startup_timeout_seconds": 0.5}),
    );
    gateway.register(wrong).await;
    gateway
        .post("/services/wrong/start", json!({}))
        .await
        .expect(502);
    let records = json!(gateway.service_records("wrong").await).to_string();
    assert!(records.contains("404"), "it says what the probe saw");
}

#[tokio::test]
async fn an_instance_that_falls_ill_is_drained_and_started_again() {
    let options = Options::default()
        .set("RUNGATE_PROBE_INTERVAL_MS", "100")
        .set("RUNGATE_RESTART_BASE_MS", "50");
    let gateway = Gateway::start(options).await;
    gateway
        .register(worker_service(
            &gateway,
            "w",
            "w",
            json!({"grace_seconds": 1}),
        ))
        .await;
    gateway
        .post("/services/w/start", json!({}))
        .await
        .expect(200);
    let pid = gateway.service("w").await["instance"]["pid"]
        .as_u64()
        .unwrap();
    // It stands still, so that probes are not answered and TERM is not heard.
    let process = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(process, Signal::STOP).unwrap();
    until("a second life", || async {
        let service = gateway.service("w").await;
        service["instance"]["generation"] == 2 && service["healthy"] == true
    })
    .await;
    assert!(!alive(pid));
    let records = gateway.service_records("w").await;
    let events: Vec<String> = records
        .iter()
        .map(|r| r["effect"]["type"].as_str().unwrap().to_owned())
        .collect();
    assert_in_order(
        &events,
        &[
            "instance_ready",
            "instance_unhealthy",
            "instance_stop_requested",
            "instance_signalled",
            "instance_exited",
            "instance_released",
            "instance_start_requested",
            "instance_ready",
        ],
    );
    let signals: Vec<&Value> = records
        .iter()
        .filter(|r| r["effect"]["type"] == "instance_signalled")
        .map(|r| &r["effect"]["payload"]["signal"])
        .collect();
    assert_eq!(signals, ["TERM", "KILL"]);
}

#[tokio::test]
async fn an_external_service_is_called_and_probed_but_never_owned() {
    let gateway = Gateway::start(Options::default().set("RUNGATE_PROBE_INTERVAL_MS", "100")).await;
    let scripted = Scripted::start().await;
    gateway.register(scripted.service("far", "far")).await;
    let started = gateway
        .post("/services/far/start", json!({}))
        .await
        .expect(200);
    assert_eq!(started["healthy"], true);
    let service = gateway.service("far").await;
    assert_eq!(
        (&service["driver"], &service["instance"]["pid"]),
        (&json!("external"), &Value::Null)
    );
    let run = gateway
        .start_job(json!({"service_type": "far", "payload": {"a": 1}}))
        .await;
    gateway.run_becomes(&run, "completed").await;
    scripted.set_healthy(false);
    gateway
        .service_becomes("far", "/healthy", json!(false))
        .await;
    let waiting = gateway
        .start_job(json!({"service_type": "far", "payload": {"a": 2}}))
        .await;
    assert_ne!(gateway.causes(&waiting).await, Vec::<String>::new());
    scripted.set_healthy(true);
    gateway.run_becomes(&waiting, "completed").await;
    let stopped = gateway
        .post("/services/far/stop", json!({}))
        .await
        .expect(200);
    assert_eq!(stopped["status"], "stopped");
}

#[tokio::test]
async fn a_port_that_is_taken_is_told() {
    let options = Options::default().set("RUNGATE_CRASH_LOOP_DEATHS", "1");
    let gateway = Gateway::start(options).await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    gateway
        .register(worker_service(&gateway, "w", "w", json!({"port": port})))
        .await;
    let failed = gateway
        .post("/services/w/start", json!({}))
        .await
        .expect(502);
    let text = json!(gateway.service_records("w").await).to_string();
    assert!(text.contains(&format!("port {port}")), "{text}");
    assert_eq!(failed["code"], "start_failed");
    assert!(
        failed["detail"]
            .as_str()
            .unwrap()
            .contains(&format!("port {port}")),
        "{failed}"
    );
    drop(taken);
    // What is left of the failed start is waited for.
    gateway
        .post("/services/w/start", json!({}))
        .await
        .expect(200);
    assert_eq!(gateway.service("w").await["port"], port);
}

#[tokio::test]
async fn a_services_output_is_read_and_followed() {
    let gateway = Gateway::start(Options::default()).await;
    let script = "i=0; while [ $i -lt 5 ]; do echo line-$i; i=$((i+1)); done; echo oops >&2; read -r x < \"$FIFO\"; echo after; exec sleep 600";
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let service = json!({
        "name": "loud", "type": "loud", "command": ["/bin/sh", "-c", script], "env": {"FIFO": fifo},
        "startup_timeout_seconds": 60, "grace_seconds": 1,
    });
    gateway.register(service).await;
    let gateway_ref = &gateway;
    // Starting waits for a health that never comes: it goes on by itself.
    let starting = tokio::spawn(
        gateway
            .request(reqwest::Method::POST, "/services/loud/start")
            .send(),
    );
    let lines = || async {
        let logs = gateway_ref.get("/services/loud/logs").await.expect(200);
        let lines = logs["lines"].as_array().unwrap().clone();
        lines
            .iter()
            .map(|l| l.as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    until("six lines", || async { lines().await.len() == 6 }).await;
    assert_eq!(
        lines().await,
        ["line-0", "line-1", "line-2", "line-3", "line-4", "oops"]
    );
    let tail = gateway.get("/services/loud/logs?tail=2").await.expect(200);
    assert_eq!(tail["lines"], json!(["line-4", "oops"]));
    assert_eq!(
        gateway.get("/services/loud/logs?tail=0").await.expect(200)["lines"],
        json!([])
    );
    let request = gateway.request(
        reqwest::Method::GET,
        "/services/loud/logs?tail=1&follow=true",
    );
    let mut stream = EventSource::open(request, "").await;
    let first = stream.next().await.unwrap();
    assert_eq!(
        (first.name.as_str(), first.data.as_str()),
        ("line", r#"{"line":"oops"}"#)
    );
    std::fs::write(&fifo, "go\n").unwrap();
    assert_eq!(stream.next().await.unwrap().data, r#"{"line":"after"}"#);
    starting.abort();
}

#[tokio::test]
async fn a_service_that_nobody_needs_is_stopped_unless_a_person_started_it() {
    let gateway = Gateway::start(Options::gpus("sim:24GiB")).await;
    let more = json!({"vram_gb": 4, "idle_timeout_seconds": 0.3});
    gateway
        .register(worker_service(&gateway, "auto", "auto", more.clone()))
        .await;
    gateway
        .register(worker_service(&gateway, "manual", "manual", more))
        .await;
    gateway
        .post("/services/manual/start", json!({}))
        .await
        .expect(200);
    for of_type in ["auto", "manual"] {
        let job = json!({"service_type": of_type, "payload": {"operation": "sleep", "ms": 1}});
        let run = gateway.start_job(job).await;
        gateway.run_becomes(&run, "completed").await;
    }
    gateway
        .service_becomes("auto", "/instance", Value::Null)
        .await;
    let stop = gateway.service_records("auto").await;
    let stop = stop
        .iter()
        .find(|r| r["effect"]["type"] == "instance_stop_requested")
        .unwrap();
    assert_eq!(stop["effect"]["payload"]["cause"], "idle");
    assert_eq!(gateway.service("manual").await["healthy"], true);
    let vram = gateway.get("/vram").await.expect(200);
    assert_eq!(vram["reserved_mb"], 4096);
}

#[tokio::test]
async fn a_restarted_gateway_finds_its_processes_again() {
    let mut gateway = Gateway::start(Options::default()).await;
    gateway
        .register(worker_service(&gateway, "w", "w", json!({})))
        .await;
    gateway
        .post("/services/w/start", json!({}))
        .await
        .expect(200);
    let pid = gateway.service("w").await["instance"]["pid"].clone();
    let job = json!({"service_type": "w", "payload": {"operation": "sleep", "ms": 600_000}});
    let run = gateway.start_job(job).await;
    gateway.job_becomes(&run, "running").await;
    gateway.kill();
    gateway.launch().await;
    gateway.service_becomes("w", "/healthy", json!(true)).await;
    assert_eq!(gateway.service("w").await["instance"]["pid"], pid);
    assert_eq!(gateway.services_alive().len(), 1);
    until("it is adopted", || async {
        let events = gateway.service_events("w").await;
        events.iter().any(|event| event == "instance_adopted")
    })
    .await;
    until("it is tried again", || async {
        gateway.run(&run).await["job"]["attempt"] == 2
    })
    .await;
    gateway.command("c", &run, "cancel", json!({})).await;
    gateway.run_becomes(&run, "cancelled").await;
    let status = gateway.stop().await;
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn a_service_that_is_pulled_about_never_runs_twice() {
    let options = Options::gpus("sim:24GiB").set("RUNGATE_CRASH_LOOP_DEATHS", "1000");
    let gateway = Gateway::start(options).await;
    gateway
        .register(worker_service(&gateway, "w", "w", json!({"vram_gb": 16})))
        .await;
    let verbs = [
        "start",
        "restart",
        "stop?drain=false",
        "start",
        "disable",
        "enable",
        "restart?drain=false",
        "stop",
    ];
    let pulls = (0..24).map(|n: usize| {
        let gateway = &gateway;
        let path = format!("/services/w/{}", verbs[n * 5 % verbs.len()]);
        async move { (path.clone(), gateway.post(&path, json!({})).await) }
    });
    let jobs = (0..4).map(|_| {
        let job = json!({"service_type": "w", "payload": {"operation": "sleep", "ms": 20}});
        gateway.start_job(job)
    });
    let (answers, runs) = tokio::join!(
        futures_util::future::join_all(pulls),
        futures_util::future::join_all(jobs),
    );
    for (path, answer) in answers {
        let code = answer.json["code"].as_str().unwrap_or("");
        let sound = answer.status == 200
            || ["service_stopping", "service_disabled", "start_failed"].contains(&code);
        assert!(sound, "{path}: {} {}", answer.status, answer.text);
    }
    gateway
        .post("/services/w/enable", json!({}))
        .await
        .expect(200);
    for run in &runs {
        gateway.run_becomes(run, "completed").await;
    }
    let mut live = false;
    for record in gateway.service_records("w").await {
        match record["effect"]["type"].as_str().unwrap() {
            "instance_start_requested" => assert!(!std::mem::replace(&mut live, true), "{record}"),
            "instance_released" => assert!(std::mem::replace(&mut live, false), "{record}"),
            _ => {}
        }
    }
    gateway
        .post("/services/w/disable", json!({}))
        .await
        .expect(200);
    until("nothing is left", || async {
        gateway.services_alive().is_empty()
    })
    .await;
    assert_eq!(
        gateway.get("/api/gateway/ledger/verify").await.expect(200)["ok"],
        true
    );
}

#[tokio::test]
async fn a_service_is_removed_at_any_moment_of_its_life() {
    let gateway = Gateway::start(Options::default()).await;
    for round in 0..20 {
        gateway
            .register(json!({"name": "brief", "type": "brief", "command": ["/bin/false"]}))
            .await;
        let request = gateway.request(reqwest::Method::POST, "/services/brief/start");
        let starting = tokio::spawn(request.send());
        // From round to round it is caught a little later: before it exists, while it lives, while it is buried.
        for _ in 0..round / 2 {
            gateway.service("brief").await;
        }
        let removed = gateway.delete("/services/brief").await;
        assert_eq!(removed.status, 200, "{round}: {}", removed.text);
        until("it is gone", || async {
            gateway.get("/services/brief").await.status == 404
        })
        .await;
        starting.abort();
    }
}
