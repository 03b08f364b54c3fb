//! GPUs in containers: an engine that can give none, and one that says it can and then refuses.

use serde_json::{Value, json};

use super::engine::{Docked, PYTHON};
use super::own::OwnEngine;
use crate::support::Options;
use crate::support::double::{Double, Gpu};

/// A gateway that sees a GPU of the library's, with that engine.
fn options(engine: &OwnEngine, double: &Double) -> Options {
    let (mut options, gpus) = (engine.options(), double.options());
    options.gpus = gpus.gpus;
    options.env.extend(gpus.env);
    options.set("RUNGATE_CRASH_LOOP_DEATHS", "1")
}

fn service(name: &str, vram_gb: u64) -> Value {
    json!({"name": name, "type": name, "image": PYTHON, "vram_gb": vram_gb, "health_endpoint": "/health", "grace_seconds": 1})
}

#[tokio::test]
async fn without_the_vendors_runtime_a_service_that_needs_a_gpu_is_refused_at_once() {
    let engine = OwnEngine::start(5, false).await;
    let double = Double::new([Gpu::new("GPU-a", 8_192)]);
    let gateway = Docked::start(options(&engine, &double)).await;
    let refused = gateway.post("/services/register", service("gpu", 2)).await;
    let refused = refused.expect(409);
    assert_eq!(refused["code"], "gpu_runtime_missing");
    let detail = refused["detail"].as_str().unwrap();
    assert!(
        detail.contains("NVIDIA Container Toolkit") && detail.contains("CDI"),
        "{detail}"
    );
    gateway.get("/services/gpu").await.expect(404);
    let told = gateway.service_events("gpu").await;
    assert_eq!(told, [""; 0], "nothing of it was written");
    // One that needs none may be, and may not become one that does.
    gateway.register(service("plain", 0)).await;
    let more = json!({"vram_gb": 2});
    let refused = gateway.put("/services/plain", more).await.expect(409);
    assert_eq!(refused["code"], "gpu_runtime_missing");
    assert_eq!(gateway.service("plain").await["vram_gb"], 0.0);
    let started = gateway.post("/services/plain/start", json!({})).await;
    assert_eq!(started.expect(200)["healthy"], true);
    let stopped = gateway.post("/services/plain/stop", json!({})).await;
    stopped.expect(200);
    assert_eq!(engine.containers(), 0);
    assert_eq!(gateway.get("/vram").await.expect(200)["reserved_mb"], 0);
}

#[tokio::test]
async fn a_device_request_that_the_engine_refuses_fails_the_start_and_leaves_nothing() {
    let mut engine = OwnEngine::start(6, false).await;
    // A runtime of that name, and no driver of devices behind it.
    engine.kill();
    engine.configure(&json!({"runtimes": {"nvidia": {"path": "runc"}}}));
    engine.spawn();
    engine.answers().await;
    let double = Double::new([Gpu::new("GPU-a", 8_192)]);
    let gateway = Docked::start(options(&engine, &double)).await;
    gateway.register(service("gpu", 2)).await;
    let refused = gateway.post("/services/gpu/start", json!({})).await;
    let refused = refused.expect(502);
    assert_eq!(refused["code"], "start_failed");
    let detail = refused["detail"].as_str().unwrap();
    assert!(
        detail.contains("could not select device driver"),
        "{detail}"
    );
    assert_eq!(engine.containers(), 0);
    let vram = gateway.get("/vram").await.expect(200);
    assert_eq!(vram["reserved_mb"], 0, "{vram}");
}
