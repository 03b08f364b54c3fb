//! Containers of images and containers that are there already: from start to removal, over HTTP.

use serde_json::{Value, json};

use super::engine::{BUSYBOX, Docked, docker, options, until_engine};
use crate::support::assert_in_order;

fn inspected(id: &str, format: &str) -> String {
    docker(&["inspect", "--format", format, id])
}

#[tokio::test]
async fn a_job_starts_a_container_of_an_image_and_its_service_removes_it() {
    let gateway = Docked::start(options()).await;
    gateway.python("py", json!({"vram_gb": 2, "env": {"A": "1"}, "memory": "64m", "cpus": 0.5, "user": "65534:65534"})).await;
    let done = gateway.runs("py", json!({"op": "echo", "n": 7})).await;
    assert_eq!(done["result"]["echo"]["n"], 7);
    assert_eq!(done["result"]["uid"], 65_534);
    let id = gateway.container_of("py").await;
    assert_eq!(gateway.containers(), std::slice::from_ref(&id));
    let told = gateway.service("py").await;
    assert_eq!(
        (
            &told["driver"],
            &told["container_running"],
            &told["healthy"]
        ),
        (&json!("image"), &json!(true), &json!(true))
    );
    assert_eq!(told["instance"]["container_status"], "running");
    let pid: u64 = inspected(&id, "{{.State.Pid}}").parse().unwrap();
    assert_eq!(told["instance"]["pid"], pid);
    let listed = gateway.get("/containers").await.expect(200);
    assert_eq!(
        (
            &listed["containers"][0]["id"],
            &listed["containers"][0]["orphan"]
        ),
        (&json!(id), &json!(false))
    );

    let hardened = inspected(&id, "{{json .HostConfig}}");
    let host: Value = serde_json::from_str(&hardened).unwrap();
    assert_eq!(host["CapDrop"], json!(["ALL"]));
    assert_eq!(host["SecurityOpt"], json!(["no-new-privileges"]));
    assert_eq!(
        (&host["ReadonlyRootfs"], &host["Privileged"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(
        (&host["Memory"], &host["NanoCpus"], &host["PidsLimit"]),
        (&json!(64 << 20), &json!(500_000_000), &json!(4_096))
    );
    assert_eq!(host["PortBindings"]["8080/tcp"][0]["HostIp"], "127.0.0.1");

    let stopped = gateway
        .post("/services/py/stop", json!({}))
        .await
        .expect(200);
    assert_eq!(
        (&stopped["status"], &stopped["drained"]),
        (&json!("stopped"), &json!(true))
    );
    gateway.no_containers_are_left().await;
    let events = gateway.service_events("py").await;
    assert_in_order(
        &events,
        &[
            "instance_start_requested",
            "container_changed",
            "instance_spawned",
            "container_changed",
            "instance_ready",
            "instance_stop_requested",
            "instance_signalled",
            "container_changed",
            "instance_exited",
            "instance_released",
        ],
    );
    let exited = gateway.service_records("py").await;
    let exit = exited
        .iter()
        .find(|record| record["effect"]["type"] == "instance_exited")
        .unwrap();
    assert_eq!(
        exit["effect"]["payload"]["exit"],
        json!({"code": 0}),
        "TERM was heard"
    );
}

#[tokio::test]
async fn what_a_container_writes_is_bounded_by_the_settings() {
    let gateway = Docked::start(options()).await;
    gateway.python("py", json!({})).await;
    let write = |path: &str| json!({"op": "write", "path": path});
    gateway.runs("py", write("/tmp/x")).await;
    let job =
        json!({"service_type": "py", "payload": write("/root-is-read-only"), "max_attempts": 1});
    let run = gateway.start_job(job).await;
    let failed = gateway.run_becomes(&run, "failed").await;
    assert!(
        failed["error"].to_string().contains("Read-only"),
        "{failed}"
    );
}

#[tokio::test]
async fn a_container_that_is_there_is_started_and_stopped_and_never_removed() {
    let gateway = Docked::start(options()).await;
    let name = format!("adopted-{}", &gateway.ledger[..8]);
    let missing = json!({"name": "old", "type": "old", "container": name, "port": 18_931, "grace_seconds": 0.5});
    gateway.register(missing).await;
    let refused = gateway
        .post("/services/old/start", json!({}))
        .await
        .expect(404);
    assert_eq!(refused["detail"]["error"], "container_not_found");
    assert!(refused["detail"]["hint"].is_string());

    docker(&[
        "create",
        "--name",
        &name,
        "-p",
        "127.0.0.1:18931:8080",
        BUSYBOX,
    ]);
    let started = gateway
        .post("/services/old/start", json!({}))
        .await
        .expect(200);
    assert_eq!(
        (&started["status"], &started["healthy"]),
        (&json!("started"), &json!(true))
    );
    let again = gateway
        .post("/services/old/start", json!({}))
        .await
        .expect(200);
    assert_eq!(again["status"], "already_running");
    let restarted = gateway
        .post("/services/old/restart", json!({}))
        .await
        .expect(200);
    assert_eq!(restarted["previous_status"], "running");
    gateway
        .post("/services/old/stop", json!({}))
        .await
        .expect(200);
    assert_eq!(inspected(&name, "{{.State.Running}}"), "false");
    let stopped = gateway
        .post("/services/old/stop", json!({}))
        .await
        .expect(200);
    assert_eq!(stopped["status"], "already_stopped");

    // It runs already when it is asked for: it is taken as it is.
    docker(&["start", &name]);
    let before = inspected(&name, "{{.State.StartedAt}}");
    gateway
        .post("/services/old/start", json!({}))
        .await
        .expect(200);
    assert_eq!(inspected(&name, "{{.State.StartedAt}}"), before);
    gateway.delete("/services/old").await.expect(200);
    until_engine("it is stopped", || {
        inspected(&name, "{{.State.Running}}") == "false"
    })
    .await;
    docker(&["rm", "-f", &name]);
}

#[tokio::test]
async fn what_a_container_says_is_in_its_services_log() {
    let gateway = Docked::start(options()).await;
    gateway.python("py", json!({})).await;
    gateway.runs("py", json!({"op": "say", "kib": 3})).await;
    let log = || async { gateway.get("/services/py/logs?tail=100").await.text };
    crate::support::wait::until("the log has all of it", || async {
        let log = log().await;
        log.contains("listening on 8080") && log.matches(&"x".repeat(1_023)).count() == 3
    })
    .await;
}

#[tokio::test]
async fn a_container_outlives_its_gateway_and_is_found_again() {
    let mut gateway = Docked::start(options()).await;
    gateway.python("py", json!({"vram_gb": 1})).await;
    gateway.runs("py", json!({"op": "echo"})).await;
    let id = gateway.container_of("py").await;
    gateway.gateway.kill();
    gateway.gateway.launch().await;
    gateway.engine_is_up().await;
    gateway.service_becomes("py", "/healthy", json!(true)).await;
    assert_eq!(gateway.container_of("py").await, id, "the same container");
    let done = gateway.runs("py", json!({"op": "echo"})).await;
    assert_eq!(done["result"]["generation"], "1");
    crate::support::wait::until("the log goes on", || async {
        gateway.runs("py", json!({"op": "say", "kib": 1})).await;
        gateway
            .get("/services/py/logs?tail=100")
            .await
            .text
            .contains("xxxx")
    })
    .await;
}

#[tokio::test]
async fn an_urgent_job_preempts_one_in_a_container() {
    let gateway = Docked::start(options().set("RUNGATE_MIN_RUNTIME_MS", "0")).await;
    gateway.python("big", json!({"vram_gb": 6})).await;
    gateway.python("bigger", json!({"vram_gb": 7})).await;
    gateway.python("also", json!({"vram_gb": 7})).await;
    let job = |of: &str, ms: u64, priority: u8| json!({"service_type": of, "payload": {"op": "sleep", "ms": ms}, "priority": priority});
    let first = gateway.start_job(job("big", 60_000, 5)).await;
    let second = gateway.start_job(job("bigger", 60_000, 4)).await;
    gateway.run_becomes(&first, "running").await;
    gateway.run_becomes(&second, "running").await;
    let urgent = gateway.start_job(job("also", 10, 1)).await;
    gateway.run_becomes(&urgent, "completed").await;
    let victim = gateway.recorded(&first, "job_preempted").await;
    assert_eq!(victim["effect"]["payload"]["by"], json!(urgent));
    gateway.run_becomes(&first, "running").await;
    for run in [first, second] {
        gateway.delete(&format!("/queue/{run}")).await;
        gateway
            .command(&format!("c-{run}"), &run, "cancel", json!({}))
            .await;
        gateway.run_becomes(&run, "cancelled").await;
    }
}
