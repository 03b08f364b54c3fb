//! Many services and jobs, some in containers of their own, while containers, the engine and the gateway are killed at random. `CHAOS_SECONDS` makes it
//! longer, `CHAOS_SERVICES` and `CHAOS_JOBS` larger, `CHAOS_SEED` repeats one.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::engine::{Docked, PYTHON};
use super::own::OwnEngine;
use crate::support::rng::Rng;
use crate::support::wait::until;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

/// A call of a service, or each fourth time a container of its own.
fn job(n: u64, services: u64, ms: u64) -> Value {
    let mut job = json!({"max_attempts": 100, "priority": 1 + n % 5});
    if n % 4 == 3 {
        let script = format!("sleep 0.{ms:03}");
        let container = json!({"image": PYTHON, "args": ["sh", "-c", script], "vram_gb": n % 3, "memory": "64m"});
        job["container"] = container;
    } else {
        job["service_type"] = json!(format!("s{}", n % services));
        job["payload"] = json!({"op": "sleep", "ms": ms, "n": n});
    }
    job
}

/// Starts jobs until there were so many.
async fn submit(gateway: &Docked, rng: &mut Rng, runs: &mut Vec<String>, due: u64, services: u64) {
    while (runs.len() as u64) < due {
        let n = runs.len() as u64;
        let ms = 50 + rng.below(400);
        runs.push(gateway.start_job(job(n, services, ms)).await);
    }
}

/// Each run completes, and has one end.
async fn all_end_right(gateway: &Docked, runs: &[String], within: Duration) {
    let deadline = Instant::now() + within;
    let mut attempts = Vec::new();
    for run in runs {
        let ended = loop {
            let told = gateway.run(run).await;
            let status = told["status"].as_str().unwrap();
            if status == "completed" {
                break told;
            }
            assert!(
                status != "failed" && Instant::now() < deadline,
                "{run} is {status}: {:?}",
                gateway.causes(run).await
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        attempts.push(ended["job"]["attempt"].as_u64().unwrap());
        let events = gateway.events(run).await;
        let ends = events.iter().filter(|event| *event == "job_completed");
        assert_eq!(ends.count(), 1);
    }
    let again = attempts.iter().filter(|attempt| **attempt > 1).count();
    let most = attempts.iter().max();
    eprintln!(
        "{again} runs of {} took more than one attempt, at most {most:?}",
        runs.len()
    );
}

/// The containers of instances, as the services show them.
async fn told(gateway: &Docked) -> BTreeSet<String> {
    let services = gateway.get("/services").await.expect(200);
    let services = services["services"].as_object().unwrap().values();
    let ids = services.filter_map(|service| service["instance"]["container_id"].as_str());
    ids.map(str::to_owned).collect()
}

/// The containers that the engine has of any gateway.
fn engines(engine: &OwnEngine) -> BTreeSet<String> {
    let filter = "label=io.rungate.ledger";
    let ids = engine.docker(&["ps", "-aq", "--no-trunc", "--filter", filter]);
    ids.lines().map(str::to_owned).collect()
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
    let (begin, end) = (Instant::now(), Duration::from_secs(seconds));
    let mut killed = [0u32; 3];
    while begin.elapsed() < end {
        // They come for as long as things are killed.
        let share = begin.elapsed().as_secs_f64() / end.as_secs_f64();
        let due = jobs.min((jobs as f64 * share * 1.1) as u64 + 1);
        submit(&gateway, &mut rng, &mut runs, due, services).await;
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
    submit(&gateway, &mut rng, &mut runs, jobs, services).await;
    let open = gateway.get("/queue/stats").await.expect(200);
    eprintln!("when it ended: {open}");
    all_end_right(&gateway, &runs, Duration::from_secs(seconds.max(120))).await;
    until("ledger, projection and engine say the same", || async {
        told(&gateway).await == engines(&engine)
    })
    .await;
    for n in 0..services {
        gateway
            .post(&format!("/services/s{n}/stop"), json!({}))
            .await
            .expect(200);
    }
    until("no container is left", || async {
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
