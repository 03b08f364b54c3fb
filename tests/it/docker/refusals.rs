//! What may not be, or cannot: the right error, and nothing left behind.

use serde_json::json;

use super::engine::{Docked, PYTHON, docker, options};
use crate::support::{Gateway, Options};

#[tokio::test]
async fn what_the_settings_do_not_allow_is_refused_by_name() {
    let gateway = Docked::start(options()).await;
    for (member, value, setting) in [
        ("image", json!("debian:12"), "docker_images"),
        ("volumes", json!(["/:/host"]), "docker_volumes"),
        ("volumes", json!(["/etc:/etc:ro"]), "docker_volumes"),
        ("volumes", json!(["secrets:/in"]), "docker_volumes"),
        ("networks", json!(["host"]), "docker_networks"),
        ("ipc", json!("host"), "docker_host_ipc"),
        ("memory", json!("257m"), "docker_memory_max_mib"),
    ] {
        let mut service = json!({"name": "x", "type": "x", "image": PYTHON});
        service[member] = value.clone();
        let refused = gateway
            .post("/services/register", service)
            .await
            .expect(403);
        assert_eq!(refused["code"], "container_forbidden", "{member} {value}");
        assert_eq!(refused["errors"][0]["field"], member);
        assert!(
            refused["detail"].as_str().unwrap().contains(setting),
            "{refused}"
        );
    }
    for (member, value) in [
        ("image", json!("-v")),
        ("image", json!("a b")),
        ("volumes", json!(["/etc"])),
        ("volumes", json!(["/srv/../etc:/in"])),
        ("volumes", json!(["/srv:/"])),
        ("memory", json!("lots")),
        ("memory", json!(0)),
        ("shm_size", json!(-1)),
        ("cpus", json!(0)),
        ("ulimits", json!({"nofile": {"soft": 2, "hard": 1}})),
        ("ulimits", json!({"magic": 1})),
        ("user", json!("root;rm")),
        ("ipc", json!("shareable")),
        ("container_port", json!(0)),
        ("command", json!(["x"])),
        ("working_dir", json!("/tmp")),
    ] {
        let mut service = json!({"name": "x", "type": "x", "image": PYTHON});
        service[member] = value.clone();
        let refused = gateway
            .post("/services/register", service)
            .await
            .expect(422);
        assert_eq!(refused["code"], "validation_failed", "{member} {value}");
    }
    gateway.get("/services/x").await.expect(404);
    assert!(gateway.containers().is_empty());
}

/// Starts a service that must fail, and tells why it did.
async fn fails_to_start(gateway: &Docked, name: &str) -> String {
    let refused = gateway
        .post(&format!("/services/{name}/start"), json!({}))
        .await
        .expect(502);
    assert_eq!(refused["code"], "start_failed");
    refused["detail"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_start_that_fails_says_why_and_leaves_no_container() {
    let gateway = Docked::start(options().set("RUNGATE_CRASH_LOOP_DEATHS", "1")).await;
    gateway.python("absent", json!({"image": "absent:1"})).await;
    let why = fails_to_start(&gateway, "absent").await;
    assert!(
        why.contains("there is no image 'absent:1'") && why.contains("docker pull"),
        "{why}"
    );

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    gateway.python("port", json!({"port": port})).await;
    let why = fails_to_start(&gateway, "port").await;
    assert!(why.contains(&port.to_string()), "{why}");

    gateway
        .python("quits", json!({"env": {"EXIT_AT_ONCE": "3"}}))
        .await;
    let why = fails_to_start(&gateway, "quits").await;
    assert!(why.contains("exit code 3"), "{why}");
    assert!(
        gateway
            .get("/services/quits/logs")
            .await
            .text
            .contains("not today")
    );

    gateway
        .python(
            "sick",
            json!({"env": {"HEALTH": "never"}, "startup_timeout_seconds": 4}),
        )
        .await;
    let why = fails_to_start(&gateway, "sick").await;
    assert!(why.contains("503") && why.contains("4000 ms"), "{why}");

    gateway
        .python("program", json!({"args": ["/no/such/program"]}))
        .await;
    let why = fails_to_start(&gateway, "program").await;
    assert!(
        why.contains("no such file") || why.contains("127") || why.contains("failed"),
        "{why}"
    );
    gateway.no_containers_are_left().await;
}

#[tokio::test]
async fn how_a_container_ended_is_told_apart() {
    let gateway = Docked::start(options().set("RUNGATE_CRASH_LOOP_DEATHS", "1")).await;
    for (name, payload, exit, error) in [
        (
            "code",
            json!({"op": "crash", "code": 7}),
            json!({"code": 7}),
            "exit code 7",
        ),
        (
            "signal",
            json!({"op": "signal", "signal": 6}),
            json!({"signal": 6}),
            "signal 6",
        ),
        (
            "memory",
            json!({"op": "allocate", "mib": 512}),
            json!("out_of_memory"),
            "memory limit",
        ),
    ] {
        gateway.python(name, json!({"memory": "64m"})).await;
        let job = json!({"service_type": name, "payload": payload, "max_attempts": 1});
        let run = gateway.start_job(job).await;
        let failed = gateway.run_becomes(&run, "failed").await;
        gateway.service_becomes(name, "/deaths", json!(1)).await;
        let records = gateway.service_records(name).await;
        let exited = records
            .iter()
            .find(|record| record["effect"]["type"] == "instance_exited")
            .unwrap();
        assert_eq!(exited["effect"]["payload"]["exit"], exit, "{failed}");
        assert!(failed["error"].to_string().contains(error), "{failed}");
    }
    gateway.no_containers_are_left().await;
}

#[tokio::test]
async fn without_an_engine_it_says_so_and_all_else_works() {
    let gateway = Gateway::start(
        Options::default()
            .set("RUNGATE_DOCKER_HOST", "unix:///nowhere/docker.sock")
            .set("RUNGATE_DOCKER_IMAGES", "*"),
    )
    .await;
    gateway
        .register(json!({"name": "py", "type": "py", "image": PYTHON}))
        .await;
    gateway
        .register(json!({"name": "old", "type": "old", "container": "old", "port": 1}))
        .await;
    for name in ["py", "old"] {
        let refused = gateway
            .post(&format!("/services/{name}/start"), json!({}))
            .await
            .expect(503);
        assert_eq!(
            (&refused["detail"], &refused["code"]),
            (&json!("Docker not available"), &json!("no_engine"))
        );
    }
    crate::support::wait::until("the reason is known", || async {
        let refused = gateway
            .post("/services/py/start", json!({}))
            .await
            .expect(503);
        let hint = refused["hint"].as_str().unwrap().to_owned();
        hint.contains("/nowhere/docker.sock") && hint.contains("docker_host")
    })
    .await;
    let run = gateway
        .start_job(json!({"service_type": "py", "payload": {}}))
        .await;
    gateway.blocked_by(&run, "no_engine").await;
    let ready = gateway.get("/readyz?verbose=true").await;
    assert_eq!(ready.status, 200);
    assert!(
        ready
            .text
            .contains("[ ] engine: no container engine was found"),
        "{}",
        ready.text
    );
}

#[tokio::test]
async fn a_gibibyte_of_output_stays_bounded() {
    let gateway = Docked::start(options()).await;
    gateway.python("py", json!({})).await;
    let done = gateway
        .runs("py", json!({"op": "say", "kib": 1 << 20}))
        .await;
    assert_eq!(done["result"]["said_kib"], 1 << 20);
    let log = gateway.data_dir().join("logs");
    let kept: u64 = std::fs::read_dir(&log)
        .unwrap()
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum();
    assert!(kept < 128 << 20, "{kept} bytes of logs are kept");
    let id = gateway.container_of("py").await;
    let options = docker(&[
        "inspect",
        "--format",
        "{{json .HostConfig.LogConfig.Config}}",
        &id,
    ]);
    assert!(options.contains("max-size"), "{options}");
}
