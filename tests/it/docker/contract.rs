//! Sections 3 to 6 of the GPU contract (`contracts/gpu-gateway.md`) over HTTP, with services in containers: one made of an
//! image, and one that is there already.

use serde_json::{Value, json};

use super::engine::{Docked, PYTHON, docker, options};
use crate::support::scripted::Scripted;
use crate::support::wait::until;
use crate::support::{Options, free_port};

const SCRIPT: &str = include_str!("../../docker/contract.py");

/// A gateway, and a container that somebody else made, which reaches the gateway by the machine's own network.
struct Contract {
    gateway: Docked,
    container: String,
    port: u16,
}

impl std::ops::Deref for Contract {
    type Target = Docked;
    fn deref(&self) -> &Docked {
        &self.gateway
    }
}

impl Drop for Contract {
    fn drop(&mut self) {
        docker(&["rm", "-f", &self.container]);
    }
}

impl Contract {
    async fn start(options: Options) -> Contract {
        let gateway = Docked::start(options).await;
        let (container, port) = (
            format!("ops-contract-{}", &gateway.ledger[..8]),
            free_port(),
        );
        let environment = format!("PORT={port}");
        docker(&[
            "create",
            "--name",
            &container,
            "--network",
            "host",
            "-e",
            &environment,
            PYTHON,
            "python3",
            "-u",
            "-c",
            SCRIPT,
        ]);
        Contract {
            gateway,
            container,
            port,
        }
    }

    /// Registers the service `img` of an image.
    async fn image(&self, more: Value) -> Value {
        let mut members = json!({"type": "t", "args": ["python3", "-u", "-c", SCRIPT]});
        let some = more.as_object().unwrap().clone();
        members.as_object_mut().unwrap().extend(some);
        self.python("img", members).await
    }

    /// Registers the service `old` in the container that is there.
    async fn adopted(&self, more: Value) -> Value {
        let mut service = json!({
            "name": "old", "container": self.container, "port": self.port, "type": "t", "grace_seconds": 1,
            "cancel_path": "/cancel", "dispatch_path": "/process",
        });
        let some = more.as_object().unwrap().clone();
        service.as_object_mut().unwrap().extend(some);
        self.register(service).await
    }

    async fn posted(&self, path: &str, status: u16) -> Value {
        self.post(path, json!({})).await.expect(status)
    }

    async fn got(&self, path: &str) -> Value {
        self.get(path).await.expect(200)
    }

    async fn submit(&self, job: Value) -> String {
        let answer = self.post("/queue/submit", job).await.expect(200);
        answer["job_id"].as_str().unwrap().to_owned()
    }

    /// Waits until a job of the dialect has a status; the job.
    async fn job_is(&self, id: &str, status: &str) -> Value {
        let (path, what) = (format!("/queue/{id}"), format!("job {id} is {status}"));
        until(&what, || async {
            self.got(&path).await["status"] == status
        })
        .await;
        self.got(&path).await
    }

    /// Waits until a job has told of so many steps.
    async fn has_done(&self, id: &str, steps: u64) {
        let path = format!("/queue/{id}/progress");
        until("it has told of its steps", || async {
            self.got(&path).await["progress"]["step"].as_u64() >= Some(steps)
        })
        .await;
    }
}

/// A job in steps, which saves and tells each.
fn steps(n: u64, priority: u8) -> Value {
    json!({"service_type": "t", "payload": {"op": "steps", "n": n, "ms": 30, "push": true}, "priority": priority})
}

fn text(of: &Value) -> Value {
    serde_json::from_str(of.as_str().expect("a JSON text")).unwrap()
}

#[tokio::test]
async fn the_registry_has_services_in_containers() {
    let gateway = Contract::start(options()).await;
    let made = gateway
        .adopted(json!({"vram_gb": 1.5, "description": "there", "progress_mode": "poll", "progress_endpoint": "/progress"}))
        .await;
    for (member, value) in [
        ("container", json!(gateway.container)),
        ("port", json!(gateway.port)),
        ("health_endpoint", json!("/health")),
        ("vram_gb", json!(1.5)),
        ("progress_mode", json!("poll")),
        ("enabled", json!(true)),
        ("container_running", json!(false)),
        ("scheduler_status", json!("idle")),
    ] {
        assert_eq!(made[member], value, "{member}");
    }
    gateway.image(json!({"type": "u"})).await;
    let twice = json!({"name": "old", "container": "c", "port": 1, "type": "t"});
    let refused = gateway.post("/services/register", twice).await.expect(409);
    assert_eq!(refused["detail"], "Service 'old' already exists");
    let disabled = gateway.posted("/services/img/disable", 200).await;
    assert_eq!(disabled["enabled"], false);
    for (filter, expected) in [
        ("", json!(["img", "old"])),
        ("?type=t", json!(["old"])),
        ("?enabled=false", json!(["img"])),
        ("?type=t&enabled=false", json!([])),
    ] {
        let listed = gateway.got(&format!("/services{filter}")).await;
        let names: Vec<&String> = listed["services"].as_object().unwrap().keys().collect();
        assert_eq!(json!(names), expected, "{filter}");
    }
    let refused = gateway.posted("/services/img/start", 409).await;
    assert_eq!(refused["code"], "service_disabled");
    gateway.posted("/services/img/enable", 200).await;
    let changes = json!({"description": "changed", "vram_gb": 2});
    let changed = gateway.put("/services/old", changes).await.expect(200);
    assert_eq!(
        (
            &changed["description"],
            &changed["vram_gb"],
            &changed["port"]
        ),
        (&json!("changed"), &json!(2.0), &json!(gateway.port))
    );
    let job = json!({"service_type": "t", "payload": {"op": "steps", "n": 40, "ms": 25}});
    let job = gateway.submit(job).await;
    gateway.job_is(&job, "running").await;
    let refused = gateway.delete("/services/old").await.expect(409);
    assert_eq!(refused["detail"]["error"], "service_has_active_jobs");
    assert!(refused["detail"]["hint"].is_string());
    gateway.job_is(&job, "completed").await;
    for name in ["old", "img"] {
        let deleted = gateway.delete(&format!("/services/{name}")).await;
        assert_eq!(deleted.expect(200), json!({"deleted": name}));
        let path = format!("/services/{name}");
        until("it is gone", || async {
            gateway.get(&path).await.status == 404
        })
        .await;
    }
    docker(&["inspect", &gateway.container]);
}

#[tokio::test]
async fn services_in_containers_are_started_stopped_and_restarted() {
    let gateway = Contract::start(options()).await;
    gateway.image(json!({"vram_gb": 6})).await;
    gateway.adopted(json!({"vram_gb": 6})).await;
    let ask = async |name: &str, what: &str| {
        gateway
            .posted(&format!("/services/{name}/{what}"), 200)
            .await
    };
    for name in ["img", "old"] {
        let started = ask(name, "start").await;
        assert_eq!(
            (&started["service"], &started["status"], &started["healthy"]),
            (&json!(name), &json!("started"), &json!(true))
        );
        assert!(started["startup_time_s"].as_f64().unwrap() > 0.0);
        let again = json!({"service": name, "status": "already_running", "healthy": true});
        assert_eq!(ask(name, "start").await, again);
        let told = gateway.service(name).await;
        assert_eq!(told["container_running"], true);
    }
    // Each has a GPU nearly for itself.
    let third = json!({"name": "third", "vram_gb": 7, "type": "x", "image": PYTHON});
    gateway.register(third).await;
    let refused = gateway.posted("/services/third/start", 409).await;
    let detail = &refused["detail"];
    assert_eq!(detail["error"], "insufficient_vram");
    assert_eq!(detail["required_mb"], 7 * 1_024);
    assert_eq!(detail["running_vram_mb"], 12 * 1_024);
    assert!(detail["available_mb"].as_u64().unwrap() < 7 * 1_024);
    assert_eq!(detail["running_services"].as_array().unwrap().len(), 2);
    for name in ["img", "old"] {
        let restarted = ask(name, "restart").await;
        assert_eq!(
            (&restarted["previous_status"], &restarted["status"]),
            (&json!("running"), &json!("started"))
        );
        let payload = json!({"op": "steps", "n": 30, "ms": 20});
        let job = json!({"service_type": "t", "service_name": name, "payload": payload});
        let job = gateway.submit(job).await;
        gateway.job_is(&job, "running").await;
        let stopped = ask(name, "stop?drain=true").await;
        assert_eq!(
            stopped,
            json!({"service": name, "status": "stopped", "drained": true})
        );
        gateway.job_is(&job, "completed").await;
        let again = json!({"service": name, "status": "already_stopped"});
        assert_eq!(ask(name, "stop").await, again);
        let restarted = ask(name, "restart").await;
        assert_eq!(restarted["previous_status"], "stopped");
        ask(name, "stop?drain=false").await;
    }
    docker(&["rm", "-f", &gateway.container]);
    let refused = gateway.posted("/services/old/start", 404).await;
    assert_eq!(refused["detail"]["error"], "container_not_found");
    assert!(refused["detail"]["hint"].is_string());
    gateway.no_containers_are_left().await;
    assert_eq!(gateway.got("/vram").await["reserved_mb"], 0);
}

#[tokio::test]
async fn jobs_are_queued_told_of_and_called_back() {
    let callbacks = Scripted::start().await;
    let options = options().set("RUNGATE_CALLBACK_ALLOW_PRIVATE", "true");
    let gateway = Contract::start(options).await;
    gateway.adopted(json!({})).await;
    let first = gateway.submit(steps(2_000, 3)).await;
    gateway.has_done(&first, 2).await;
    let told = gateway.got(&format!("/queue/{first}/progress")).await;
    assert_eq!(
        (&told["job_id"], &told["status"]),
        (&json!(first), &json!("running"))
    );
    let called = json!({"service_type": "t", "payload": {"op": "echo"}, "callback_url": callbacks.url("/callback"), "priority": 2});
    let answer = gateway.post("/queue/submit", called).await.expect(200);
    assert_eq!(answer["position"], 1);
    let second = answer["job_id"].as_str().unwrap().to_owned();
    let fails = json!({"service_type": "t", "payload": {"op": "fail"}, "callback_url": callbacks.url("/callback")});
    let third = gateway.submit(fails).await;
    let short = json!({"service_type": "t", "payload": {"op": "echo"}, "ttl_seconds": 1});
    let expires = gateway.submit(short).await;
    let stats = gateway.got("/queue/stats").await;
    assert_eq!(
        stats,
        json!({"total_queued": 3, "total_running": 1, "by_type": {"t": 3}, "by_priority": {"P2": 1, "P3": 2}})
    );
    let expired = gateway.job_is(&expires, "failed").await;
    assert_eq!(expired["error"], "expired");
    let unwanted = gateway.submit(steps(1, 5)).await;
    assert_eq!(
        gateway.got(&format!("/queue/{unwanted}")).await["position"],
        3
    );
    let cancelled = gateway.delete(&format!("/queue/{unwanted}")).await;
    assert_eq!(cancelled.expect(200)["job_id"], json!(unwanted));
    gateway.job_is(&unwanted, "cancelled").await;
    let refused = gateway.delete(&format!("/queue/{first}")).await.expect(409);
    assert!(
        refused["detail"]
            .as_str()
            .unwrap()
            .contains("/preempt/execute")
    );
    gateway.command("c", &first, "cancel", json!({})).await;
    gateway.job_is(&first, "cancelled").await;
    let done = gateway.job_is(&second, "completed").await;
    assert_eq!(text(&done["result"])["echo"]["op"], "echo");
    assert_eq!(
        (&done["attempts"], &done["service_name"]),
        (&json!(1), &json!("old"))
    );
    let failed = gateway.job_is(&third, "failed").await;
    assert_eq!(failed["attempts"], failed["max_attempts"]);
    let late = gateway
        .post(&format!("/queue/{second}/progress"), json!({}))
        .await;
    late.expect(409);
    until("both callbacks came", || async {
        callbacks.callbacks().len() == 2
    })
    .await;
    let bodies: Vec<Value> = callbacks.callbacks().iter().map(|one| one.json()).collect();
    assert_eq!(
        (&bodies[0]["job_id"], &bodies[0]["status"]),
        (&json!(second), &json!("completed"))
    );
    assert_eq!(
        (&bodies[1]["job_id"], &bodies[1]["status"]),
        (&json!(third), &json!("failed"))
    );
    assert!(
        bodies[1]["error"].to_string().contains("500"),
        "{}",
        bodies[1]
    );
}

#[tokio::test]
async fn progress_of_a_container_is_asked_for_where_it_wants_that() {
    let gateway = Contract::start(options()).await;
    let polled = json!({"progress_mode": "poll", "progress_endpoint": "/progress"});
    gateway.image(polled).await;
    let payload = json!({"op": "steps", "n": 1_000, "ms": 20});
    let job = gateway
        .submit(json!({"service_type": "t", "payload": payload}))
        .await;
    gateway.recorded(&job, "job_progressed").await;
    let told = gateway.got(&format!("/queue/{job}/progress")).await;
    assert!(told["progress"]["percent"].is_u64(), "{told}");
    gateway.command("c", &job, "cancel", json!({})).await;
    gateway.job_is(&job, "cancelled").await;
}

#[tokio::test]
async fn a_victim_in_a_container_goes_on_from_its_snapshot() {
    let options = options().set("RUNGATE_MIN_RUNTIME_MS", "0");
    let gateway = Contract::start(options).await;
    gateway.adopted(json!({})).await;
    let idle = gateway.got("/preempt/check/old").await;
    assert_eq!(
        idle,
        json!({"preemptable": false, "reason": "service_not_busy", "service": "old"})
    );
    let execute = async |job: &str, status: u16| {
        let body = json!({"service_name": "old", "preemptor_job_id": job});
        gateway.post("/preempt/execute", body).await.expect(status)
    };
    gateway.posted("/preempt/release/nobody", 404).await;
    let victim = gateway.submit(steps(60, 3)).await;
    gateway.has_done(&victim, 5).await;
    execute(&victim, 409).await;
    // Of nearly the same urgency: it waits unless it is asked for by hand.
    let waiting = gateway.submit(steps(40, 2)).await;
    let check = gateway.got("/preempt/check/old").await;
    assert_eq!(
        check,
        json!({
            "preemptable": true, "service": "old", "active_job_id": victim, "scheduler_status": "busy",
            "running_job_priority": 3, "running_job_service_type": "t",
            "highest_queued": {"job_id": waiting, "priority": 2, "service_type": "t"},
        })
    );
    let done = execute(&waiting, 200).await;
    assert_eq!(
        done,
        json!({"preempted_job_id": victim, "preemptor_job_id": waiting, "service": "old", "progress_saved": true})
    );
    let paused = gateway.job_is(&victim, "paused").await;
    assert_eq!(
        (&paused["paused_by_job_id"], &paused["preempt_count"]),
        (&json!(waiting), &json!(1))
    );
    let step = text(&paused["progress_snapshot"])["step"].as_u64().unwrap();
    assert!(step >= 5);
    gateway.job_is(&waiting, "running").await;
    let released = gateway.posted("/preempt/release/old", 200).await;
    assert_eq!(
        released,
        json!({"service": "old", "resumed_jobs": [victim], "count": 1})
    );
    // Urgent enough to take the place by itself.
    gateway.has_done(&waiting, 3).await;
    let urgent = gateway
        .submit(json!({"service_type": "t", "payload": {"op": "echo"}, "priority": 1}))
        .await;
    gateway.job_is(&urgent, "completed").await;
    gateway.job_is(&waiting, "completed").await;
    let ended = gateway.job_is(&victim, "completed").await;
    let result = text(&ended["result"]);
    assert!(result["first"].as_u64().unwrap() >= step, "{result}");
    assert_eq!(result["most_at_once"], 1, "never two calls at once");
    until("nothing runs", || async {
        gateway.service("old").await["active_job_id"].is_null()
    })
    .await;
    let unknown = execute("x", 404).await;
    assert!(unknown["detail"].is_string());
}

#[tokio::test]
async fn idle_containers_are_stopped_and_advice_is_given() {
    let gateway = Contract::start(options()).await;
    let advice = async || gateway.got("/available/t").await["recommendation"].clone();
    assert_eq!(advice().await, "use_cloud", "no service");
    let soon = json!({"idle_timeout_seconds": 0.5, "vram_gb": 7});
    gateway.image(soon.clone()).await;
    assert_eq!(advice().await, "use_cloud", "none is healthy");
    let payload = json!({"op": "steps", "n": 40, "ms": 25});
    let job = json!({"service_type": "t", "payload": payload});
    let first = gateway.submit(job.clone()).await;
    gateway.job_is(&first, "running").await;
    assert_eq!(advice().await, "queue", "it is busy");
    gateway.job_is(&first, "completed").await;
    // The scheduler started it, so it stops it; with its container goes its memory.
    gateway
        .service_becomes("img", "/instance", json!(null))
        .await;
    gateway.no_containers_are_left().await;
    assert_eq!(gateway.got("/vram").await["reserved_mb"], 0);
    gateway.posted("/services/img/start", 200).await;
    let told = gateway.got("/available/t").await;
    assert_eq!(
        (
            &told["available"],
            &told["recommendation"],
            &told["service"]
        ),
        (&json!(true), &json!("use_local"), &json!("img"))
    );
    assert_eq!(told["healthy_services"], json!(["img"]));
    gateway.delete("/services/img").await.expect(200);
    // One of others' is stopped and not removed; one without GPU memory is left running.
    gateway.adopted(soon).await;
    gateway
        .python("zero", json!({"idle_timeout_seconds": 0.5}))
        .await;
    for of_type in ["zero", "t"] {
        let job = json!({"service_type": of_type, "payload": {"op": "echo"}});
        let job = gateway.submit(job).await;
        gateway.job_is(&job, "completed").await;
    }
    gateway
        .service_becomes("old", "/instance", json!(null))
        .await;
    let running = docker(&[
        "inspect",
        "--format",
        "{{.State.Running}}",
        &gateway.container,
    ]);
    assert_eq!(running, "false");
    assert_eq!(gateway.service("zero").await["healthy"], true);
    for (name, vram_gb) in [("full", 8), ("fuller", 7)] {
        gateway.python(name, json!({"vram_gb": vram_gb})).await;
        gateway
            .posted(&format!("/services/{name}/start"), 200)
            .await;
    }
    let told = gateway.got("/available/zero").await;
    assert_eq!(told["recommendation"], "queue", "the GPUs are full: {told}");
}
