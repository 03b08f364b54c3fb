//! Engines that die, hang and come back: ones of the tests' own, beside the machine's.

use std::time::Duration;

use serde_json::json;

use super::engine::Docked;
use super::own::{OwnEngine, run};
use crate::support::wait::until;

#[tokio::test]
async fn an_engine_that_is_killed_costs_an_attempt_and_leaves_nothing() {
    let mut engine = OwnEngine::start(1, false).await;
    let gateway = Docked::start(engine.options()).await;
    gateway.python("py", json!({"vram_gb": 1})).await;
    let job = json!({"service_type": "py", "payload": {"op": "sleep", "ms": 2_000}});
    let run = gateway.start_job(job).await;
    gateway.run_becomes(&run, "running").await;
    engine.kill();
    until("the gateway sees it", || async {
        gateway.get("/containers").await.expect(200)["engine"]["up"] == false
    })
    .await;
    let ready = gateway.get("/readyz?verbose=true").await;
    assert_eq!(ready.status, 200, "other work goes on");
    assert!(ready.text.contains("[ ] engine"), "{}", ready.text);
    engine.spawn();
    engine.answers().await;
    gateway.run_becomes(&run, "completed").await;
    gateway
        .post("/services/py/stop", json!({}))
        .await
        .expect(200);
    until("no container is left", || async {
        engine.containers() == 0
    })
    .await;
    let vram = gateway.get("/vram").await.expect(200);
    assert_eq!(vram["reserved_mb"], 0);
}

#[tokio::test]
async fn with_live_restore_a_container_outlives_its_engine_and_its_end_is_seen_later() {
    let mut engine = OwnEngine::start(2, true).await;
    let gateway = Docked::start(engine.options()).await;
    gateway.python("py", json!({"vram_gb": 1})).await;
    gateway.runs("py", json!({"op": "echo"})).await;
    let before = gateway.container_of("py").await;
    let pid = gateway.service("py").await["instance"]["pid"]
        .as_u64()
        .unwrap();
    engine.kill();
    // It ends while no engine looks: no event will tell.
    run("kill", &["-9", &pid.to_string()]);
    engine.spawn();
    engine.answers().await;
    until("its end was seen and another is there", || async {
        let told = gateway.service("py").await;
        let id = &told["instance"]["container_id"];
        told["instance"].is_null() || (id.is_string() && *id != json!(before))
    })
    .await;
    let done = gateway.runs("py", json!({"op": "echo"})).await;
    assert_eq!(done["result"]["generation"], "2");
    assert_eq!(engine.containers(), 1);
}

#[tokio::test]
async fn an_engine_that_hangs_is_told_and_holds_nothing_else_up() {
    let engine = OwnEngine::start(3, false).await;
    let gateway = Docked::start(engine.options()).await;
    gateway.python("py", json!({})).await;
    gateway
        .register(crate::support::worker_service(
            &gateway,
            "local",
            "local",
            json!({}),
        ))
        .await;
    engine.signal(rustix::process::Signal::STOP);
    until("it is told", || async {
        let ready = gateway.get("/readyz?verbose=true").await;
        ready.text.contains("does not answer; is it stuck?")
    })
    .await;
    let run = gateway
        .start_job(json!({"service_type": "py", "payload": {"op": "echo"}}))
        .await;
    gateway.blocked_by(&run, "no_engine").await;
    let local = gateway
        .start_job(json!({"service_type": "local", "payload": {"operation": "sleep", "ms": 1}}))
        .await;
    gateway.run_becomes(&local, "completed").await;
    engine.signal(rustix::process::Signal::CONT);
    gateway.run_becomes(&run, "completed").await;
}

#[tokio::test]
async fn a_kill_that_the_engine_did_not_take_is_sent_again() {
    let mut engine = OwnEngine::start(17, true).await;
    let gateway = Docked::start(engine.options()).await;
    let stubborn = json!({"vram_gb": 1, "grace_seconds": 4, "env": {"IGNORE_TERM": "1"}});
    gateway.python("py", stubborn).await;
    gateway.runs("py", json!({"op": "echo"})).await;
    // It is answered when the service has stopped.
    let stop = gateway.post("/services/py/stop", json!({}));
    let _ = tokio::time::timeout(Duration::from_millis(500), stop).await;
    until("the engine took TERM", || async {
        let events = gateway.service_events("py").await;
        events.contains(&"instance_signalled".to_owned())
    })
    .await;
    // KILL is due meanwhile, and lost with the engine.
    engine.signal(rustix::process::Signal::STOP);
    tokio::time::sleep(Duration::from_secs(5)).await;
    engine.kill();
    engine.spawn();
    engine.answers().await;
    gateway
        .service_becomes("py", "/instance", json!(null))
        .await;
    assert_eq!(engine.containers(), 0);
    let vram = gateway.get("/vram").await.expect(200);
    assert_eq!(vram["reserved_mb"], 0);
}
