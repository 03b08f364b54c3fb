//! An engine whose own disk is full.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use super::engine::{BUSYBOX, Docked};
use super::own::{OwnEngine, Setup};
use super::pulling::{PASSWORD, Registry, credentials};
use crate::support::wait::until;

/// Leaves no byte.
fn fill(path: &Path) {
    let mut file = std::fs::File::create(path).unwrap();
    for bytes in [1 << 20, 4 << 10, 1] {
        let piece = vec![1; bytes];
        while file.write_all(&piece).is_ok() {}
    }
}

/// The ends of a service's instances, as they were recorded.
async fn exits(gateway: &Docked, service: &str) -> Vec<Value> {
    let records = gateway.service_records(service).await;
    let exited = records
        .iter()
        .filter(|record| record["effect"]["type"] == "instance_exited");
    exited
        .map(|record| record["effect"]["payload"]["exit"].clone())
        .collect()
}

/// Starts a service, which fails for the disk.
async fn says_full(gateway: &Docked, service: &str) {
    let refused = gateway
        .post(&format!("/services/{service}/start"), json!({}))
        .await
        .expect(502);
    let detail = refused["detail"].as_str().unwrap();
    assert!(
        detail.contains("the container engine's disk is full")
            && detail.contains("free some space"),
        "{detail}"
    );
}

#[tokio::test]
async fn a_full_disk_of_the_engine_is_told_and_all_goes_on_when_it_has_room() {
    let setup = Setup {
        disk_mib: Some(600),
        ..Setup::default()
    };
    let engine = OwnEngine::with(7, setup).await;
    let registry = Arc::new(Registry::of(BUSYBOX));
    let port = registry.serve().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.json");
    std::fs::write(&file, credentials(port, PASSWORD)).unwrap();
    let options = engine
        .options()
        .set("RUNGATE_DOCKER_IMAGES", "rungate-test/*,127.0.0.1:*")
        .set("RUNGATE_DOCKER_PULL", "true")
        .set("RUNGATE_DOCKER_CREDENTIALS", file.to_str().unwrap())
        .set("RUNGATE_RESTART_BASE_MS", "1500");
    let gateway = Docked::start(options).await;
    gateway.python("py", json!({"vram_gb": 1})).await;
    let image = format!("127.0.0.1:{port}/pulled:1");
    let more = json!({"image": image, "vram_gb": 1, "grace_seconds": 0.5});
    gateway.python("pulled", more).await;
    let job =
        json!({"service_type": "py", "payload": {"op": "sleep", "ms": 3_000}, "max_attempts": 2});
    let run = gateway.start_job(job).await;
    gateway.run_becomes(&run, "running").await;
    // Its container dies, and no other one can be made.
    engine.docker(&["kill", &gateway.container_of("py").await]);
    until("it is removed", || async { engine.containers() == 0 }).await;
    let filler = engine.data().join("filler");
    fill(&filler);
    until("several starts have failed", || async {
        exits(&gateway, "py").await.len() > 3
    })
    .await;
    for exit in &exits(&gateway, "py").await[1..] {
        let why = exit["no_engine"].as_str().unwrap();
        assert!(why.contains("no space left on device"), "{why}");
    }
    says_full(&gateway, "py").await;
    says_full(&gateway, "pulled").await;
    let told = gateway.service("py").await;
    assert_eq!(
        (&told["crash_looped"], &told["deaths"]),
        (&json!(null), &json!(0)),
        "it is held against nobody"
    );
    assert_eq!(gateway.run(&run).await["job"]["state"], "queued");
    assert_eq!(engine.containers(), 0);
    let pulled = engine.docker(&["images", "-q", &image]);
    assert_eq!(pulled, "", "no half of an image");

    std::fs::remove_file(filler).unwrap();
    let done = gateway.run_becomes(&run, "completed").await;
    assert_eq!(done["job"]["attempt"], 2);
    let started = gateway.post("/services/pulled/start", json!({})).await;
    started.expect(200);
    for name in ["py", "pulled"] {
        let path = format!("/services/{name}/stop");
        gateway.post(&path, json!({})).await.expect(200);
    }
    until("no container is left", || async {
        engine.containers() == 0
    })
    .await;
    assert_eq!(gateway.get("/vram").await.expect(200)["reserved_mb"], 0);
}
