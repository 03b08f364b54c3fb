//! Many services and jobs while containers, the engine and the gateway are killed at random. `CHAOS_SECONDS` makes it
//! longer, `CHAOS_SERVICES` and `CHAOS_JOBS` larger, `CHAOS_SEED` repeats one.

use std::time::{Duration, Instant};

use serde_json::json;

use super::engine::Docked;
use super::own::OwnEngine;
use crate::support::rng::Rng;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

#[tokio::test]
async fn whatever_is_killed_every_job_ends_right_and_nothing_leaks() {
    let seconds = number("CHAOS_SECONDS", 30);
    let (services, jobs) = (number("CHAOS_SERVICES", 6), number("CHAOS_JOBS", 60));
    let seed = Rng::seed("CHAOS_SEED");
    eprintln!("CHAOS_SEED={seed}");
    let mut rng = Rng::new(seed);
    let mut engine = OwnEngine::start(4, false).await;
    let options = engine
        .options()
        .set("RUNGATE_CRASH_LOOP_DEATHS", "1000")
        .set("RUNGATE_SWAP_MAX_WAIT_MS", "500");
    let mut gateway = Docked::start(options).await;
    for n in 0..services {
        gateway
            .python(
                &format!("s{n}"),
                json!({"vram_gb": 1 + n % 4, "grace_seconds": 1}),
            )
            .await;
    }
    let mut runs = Vec::new();
    for n in 0..jobs {
        let payload = json!({"op": "sleep", "ms": 50 + rng.below(400), "n": n});
        let job = json!({"service_type": format!("s{}", n % services), "payload": payload, "max_attempts": 100, "priority": 1 + n % 5});
        runs.push(gateway.start_job(job).await);
    }
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut killed = [0u32; 3];
    while Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(200 + rng.below(1_500))).await;
        match rng.below(12) {
            0 => {
                killed[2] += 1;
                engine.kill();
                tokio::time::sleep(Duration::from_millis(rng.below(1_000))).await;
                engine.spawn();
                engine.answers().await;
            }
            1 | 2 => {
                killed[1] += 1;
                gateway.gateway.kill();
                tokio::time::sleep(Duration::from_millis(rng.below(500))).await;
                gateway.gateway.launch().await;
            }
            _ => {
                let ids = engine.docker(&["ps", "-q", "--filter", "label=io.rungate.ledger"]);
                let ids: Vec<&str> = ids.lines().collect();
                if !ids.is_empty() {
                    killed[0] += 1;
                    let id = ids[usize::try_from(rng.below(ids.len() as u64)).unwrap()];
                    let how: &[&str] = if rng.below(2) == 0 {
                        &["kill", id]
                    } else {
                        &["rm", "-f", id]
                    };
                    // It may have ended by itself meanwhile.
                    let host = engine.host();
                    let _ = std::process::Command::new("docker")
                        .args(["-H", &host])
                        .args(how)
                        .output();
                }
            }
        }
    }
    eprintln!(
        "killed: {} containers, {} gateways, {} engines",
        killed[0], killed[1], killed[2]
    );
    gateway.engine_is_up().await;
    let deadline = Instant::now() + Duration::from_secs(seconds.max(120));
    for run in &runs {
        loop {
            let status = gateway.run(run).await["status"]
                .as_str()
                .unwrap()
                .to_owned();
            if status == "completed" {
                break;
            }
            assert!(
                status != "failed" && Instant::now() < deadline,
                "{run} is {status}: {:?}",
                gateway.causes(run).await
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // Exactly one end.
        let events = gateway.events(run).await;
        assert_eq!(
            events
                .iter()
                .filter(|event| *event == "job_completed")
                .count(),
            1
        );
    }
    for n in 0..services {
        gateway
            .post(&format!("/services/s{n}/stop"), json!({}))
            .await
            .expect(200);
    }
    crate::support::wait::until("no container is left", || async {
        engine.containers() == 0
    })
    .await;
    let vram = gateway.get("/vram").await.expect(200);
    assert_eq!(
        (&vram["reserved_mb"], &vram["used_mb"]),
        (&json!(0), &json!(0)),
        "no reservation is left"
    );
    let verified = gateway.get("/api/gateway/ledger/verify").await.expect(200);
    assert_eq!(verified["ok"], true, "{verified}");
}
