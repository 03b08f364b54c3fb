//! Containers that are killed, removed, paused, renamed or restarted behind the gateway's back.

use serde_json::json;

use super::engine::{BUSYBOX, Docked, docker, options, until_engine};
use crate::support::wait::until;

async fn statuses(gateway: &Docked, service: &str) -> Vec<String> {
    let records = gateway.service_records(service).await;
    let changed = records
        .iter()
        .filter(|record| record["effect"]["type"] == "container_changed");
    changed
        .map(|record| {
            record["effect"]["payload"]["container"]["status"]
                .as_str()
                .unwrap()
                .to_owned()
        })
        .collect()
}

#[tokio::test]
async fn a_killed_container_is_replaced_and_its_job_tried_again() {
    let gateway = Docked::start(options()).await;
    gateway.python("py", json!({"vram_gb": 1})).await;
    let job = json!({"service_type": "py", "payload": {"op": "sleep", "ms": 3_000}});
    let run = gateway.start_job(job).await;
    gateway.run_becomes(&run, "running").await;
    let first = gateway.container_of("py").await;
    docker(&["kill", &first]);
    gateway.run_becomes(&run, "completed").await;
    let records = gateway.service_records("py").await;
    let exits: Vec<_> = records
        .iter()
        .filter(|record| record["effect"]["type"] == "instance_exited")
        .collect();
    assert_eq!(
        exits.len(),
        1,
        "the engine's event and our look are one end"
    );
    assert_eq!(exits[0]["effect"]["payload"]["exit"], json!({"signal": 9}));
    assert_ne!(gateway.container_of("py").await, first);
    assert_eq!(gateway.containers().len(), 1);
}

#[tokio::test]
async fn a_container_removed_by_others_is_seen_to_be_gone() {
    let gateway = Docked::start(options()).await;
    gateway.python("py", json!({"vram_gb": 1})).await;
    gateway
        .post("/services/py/start", json!({}))
        .await
        .expect(200);
    let first = gateway.container_of("py").await;
    docker(&["rm", "-f", &first]);
    until("another one is there", || async {
        let told = gateway.service("py").await;
        told["healthy"] == json!(true) && told["instance"]["container_id"] != json!(first)
    })
    .await;
    let vram = gateway.get("/vram").await.expect(200);
    assert_eq!(
        vram["reserved_mb"], 1_024,
        "nothing is held for what is gone"
    );
}

#[tokio::test]
async fn pausing_and_renaming_are_told_once_each() {
    let gateway = Docked::start(options().set("RUNGATE_PROBE_INTERVAL_MS", "60000")).await;
    gateway.python("py", json!({})).await;
    gateway.runs("py", json!({"op": "echo"})).await;
    let id = gateway.container_of("py").await;
    docker(&["pause", &id]);
    gateway
        .service_becomes("py", "/instance/container_status", json!("paused"))
        .await;
    docker(&["unpause", &id]);
    gateway
        .service_becomes("py", "/instance/container_status", json!("running"))
        .await;
    let renamed = format!("renamed-{}", &gateway.ledger[..8]);
    docker(&["rename", &id, &renamed]);
    gateway
        .service_becomes("py", "/instance/container_name", json!(renamed))
        .await;
    // Events of no consequence, and each look at all containers, change nothing.
    docker(&["exec", &id, "true"]);
    gateway.runs("py", json!({"op": "echo"})).await;
    assert_eq!(
        statuses(&gateway, "py").await,
        ["created", "running", "paused", "running", "running"]
    );
}

#[tokio::test]
async fn a_paused_container_is_stopped_all_the_same() {
    let gateway = Docked::start(options()).await;
    gateway.python("py", json!({"vram_gb": 1})).await;
    gateway.runs("py", json!({"op": "echo"})).await;
    let id = gateway.container_of("py").await;
    docker(&["pause", &id]);
    gateway
        .post("/services/py/stop", json!({}))
        .await
        .expect(200);
    gateway.no_containers_are_left().await;
    assert_eq!(gateway.get("/vram").await.expect(200)["reserved_mb"], 0);
}

#[tokio::test]
async fn one_that_does_not_hear_term_is_killed_after_its_grace() {
    let gateway = Docked::start(options()).await;
    gateway
        .python(
            "deaf",
            json!({"env": {"IGNORE_TERM": "1"}, "grace_seconds": 0.5}),
        )
        .await;
    gateway.runs("deaf", json!({"op": "echo"})).await;
    gateway
        .post("/services/deaf/stop", json!({}))
        .await
        .expect(200);
    let records = gateway.service_records("deaf").await;
    let signals: Vec<_> = records
        .iter()
        .filter(|record| record["effect"]["type"] == "instance_signalled")
        .map(|record| record["effect"]["payload"]["signal"].as_str().unwrap())
        .collect();
    assert_eq!(signals, ["TERM", "KILL"]);
}

#[tokio::test]
async fn orphans_of_this_gateway_are_removed_and_others_left_alone() {
    let mut gateway = Docked::start(options()).await;
    let ours = format!("io.rungate.ledger={}", gateway.ledger);
    let label = |service: &str, generation: u64| {
        [
            format!("io.rungate.service={service}"),
            format!("io.rungate.generation={generation}"),
        ]
    };
    let run = |owner: &str, service: &str| {
        let [service, generation] = label(service, 9);
        docker(&[
            "run",
            "-d",
            "--label",
            owner,
            "--label",
            &service,
            "--label",
            &generation,
            BUSYBOX,
        ])
    };
    let orphan = run(&ours, "gone");
    let foreign = run(
        "io.rungate.ledger=0199a7c2-0000-7000-8000-000000000000",
        "gone",
    );
    let listed = gateway.get("/containers").await.expect(200);
    assert_eq!(
        (
            &listed["containers"][0]["id"],
            &listed["containers"][0]["orphan"]
        ),
        (&json!(orphan), &json!(true))
    );
    assert_eq!(
        listed["containers"].as_array().unwrap().len(),
        1,
        "another gateway's is not ours to list"
    );
    // Past the grace that whoever makes a container has, a start of the gateway finds it.
    let created = std::time::Instant::now();
    until_engine("the grace is over", || created.elapsed().as_secs() >= 16).await;
    gateway.gateway.kill();
    gateway.gateway.launch().await;
    gateway.no_containers_are_left().await;
    assert_eq!(
        docker(&["inspect", "--format", "{{.State.Running}}", &foreign]),
        "true"
    );
    docker(&["rm", "-f", &foreign]);
}

#[tokio::test]
async fn doctor_lists_containers_and_orphans_without_touching_them() {
    let gateway = Docked::start(options()).await;
    gateway.python("py", json!({})).await;
    gateway.runs("py", json!({"op": "echo"})).await;
    let ledger = format!("io.rungate.ledger={}", gateway.ledger);
    let orphan = docker(&[
        "run",
        "-d",
        "--label",
        &ledger,
        "--label",
        "io.rungate.service=gone",
        "--label",
        "io.rungate.generation=1",
        BUSYBOX,
    ]);
    let output = std::process::Command::new(crate::support::binary())
        .args(["doctor", "--containers"])
        .env("RUNGATE_URL", gateway.url(""))
        .env("RUNGATE_TOKEN", gateway.token())
        .output()
        .unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let line = |id: &str| {
        told.lines()
            .find(|line| line.contains(&id[..12]))
            .unwrap_or_default()
            .to_owned()
    };
    assert!(line(&orphan).contains("orphan"), "{told}");
    assert!(
        line(&gateway.container_of("py").await).contains("in use"),
        "{told}"
    );
    assert_eq!(
        docker(&["inspect", "--format", "{{.State.Running}}", &orphan]),
        "true"
    );
}

#[tokio::test]
async fn the_memory_of_a_paused_container_is_not_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let program = crate::ladder::cuda_checkpoint(dir.path());
    let options = options()
        .set("RUNGATE_CUDA_CHECKPOINT", &program)
        .set("RUNGATE_PROBE_INTERVAL_MS", "60000")
        .set("RUNGATE_IDLE_TIMEOUT_MS", "4000");
    let gateway = Docked::start(options).await;
    let ladder = json!([{"step": "cuda-checkpoint", "seconds": 20}]);
    gateway
        .python("py", json!({"vram_gb": 1, "ladder": ladder}))
        .await;
    gateway.runs("py", json!({"op": "echo"})).await;
    docker(&["pause", &gateway.container_of("py").await]);
    gateway
        .service_becomes("py", "/instance", json!(null))
        .await;
    let records = gateway.service_records("py").await;
    let ended = records
        .iter()
        .find(|record| record["effect"]["type"] == "ladder_step_ended");
    let ended = &ended.expect("a step")["effect"]["payload"];
    assert_eq!(
        (&ended["step"], &ended["outcome"]),
        (&json!("cuda-checkpoint"), &json!("failed"))
    );
    let error = ended["error"].as_str().unwrap();
    assert!(
        error.contains("frozen") && error.contains("paused"),
        "{error}"
    );
    assert!(
        !dir.path().join("calls").exists(),
        "the program was not run"
    );
    gateway.no_containers_are_left().await;
}
