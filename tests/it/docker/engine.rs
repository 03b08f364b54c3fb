//! The engine of the machine, by its own command line: what the gateway says of it is compared with this.

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::wait::until;
use crate::support::{Gateway, Options};

pub const PYTHON: &str = "rungate-test/python:1";
pub const BUSYBOX: &str = "rungate-test/busybox:1";

/// Runs `docker`, which must succeed.
#[track_caller]
pub fn docker(arguments: &[&str]) -> String {
    let output = Command::new("docker")
        .args(arguments)
        .output()
        .expect("docker is installed: tests/run does it");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "docker {arguments:?}: {said}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A gateway that uses the engine; its containers go when it does.
pub struct Docked {
    pub gateway: Gateway,
    /// Its ledger's id, as its containers bear it.
    pub ledger: String,
}

impl std::ops::Deref for Docked {
    type Target = Gateway;
    fn deref(&self) -> &Gateway {
        &self.gateway
    }
}

pub fn options() -> Options {
    docker(&["image", "inspect", PYTHON, BUSYBOX, "--format", "there"]);
    Options::gpus("sim:8GiB,8GiB")
        .set("RUNGATE_DOCKER_HOST", "unix:///var/run/docker.sock")
        .set("RUNGATE_DOCKER_IMAGES", "rungate-test/*,absent:*")
        .set("RUNGATE_DOCKER_MEMORY_MAX_MIB", "256")
        .set("RUNGATE_PROBE_INTERVAL_MS", "200")
        .set("RUNGATE_RESTART_BASE_MS", "50")
        .set("RUNGATE_RETRY_BASE_MS", "50")
}

impl Docked {
    pub async fn start(options: Options) -> Docked {
        let gateway = Gateway::start(options).await;
        let head = gateway
            .get("/api/gateway/ledger/checkpoint")
            .await
            .expect(200);
        let ledger = head["ledger"].as_str().expect("an id").to_owned();
        let docked = Docked { gateway, ledger };
        docked.engine_is_up().await;
        docked
    }

    pub async fn engine_is_up(&self) {
        until("the engine answers", || async {
            self.gateway.get("/containers").await.expect(200)["engine"]["up"] == true
        })
        .await;
    }

    /// All containers of this gateway that the engine has.
    pub fn containers(&self) -> Vec<String> {
        let filter = format!("label=io.rungate.ledger={}", self.ledger);
        let ids = docker(&["ps", "-aq", "--no-trunc", "--filter", &filter]);
        ids.lines().map(str::to_owned).collect()
    }

    /// Checkpoint folders of its jobs that the engine has.
    pub fn volumes(&self) -> Vec<String> {
        let filter = format!("label=io.rungate.ledger={}", self.ledger);
        let names = docker(&["volume", "ls", "-q", "--filter", &filter]);
        names.lines().map(str::to_owned).collect()
    }

    pub async fn no_containers_are_left(&self) {
        until("no container is left", || async {
            self.containers().is_empty()
        })
        .await;
    }

    /// A Python service.
    pub async fn python(&self, name: &str, more: Value) -> Value {
        let mut service = json!({
            "name": name, "type": name, "image": PYTHON, "health_endpoint": "/health", "grace_seconds": 2,
            "startup_timeout_seconds": 30, "dispatch_path": "/process", "cancel_path": "/cancel",
        });
        for (member, value) in more.as_object().unwrap() {
            service[member] = value.clone();
        }
        self.gateway.register(service).await
    }

    /// Runs a job to its end.
    pub async fn runs(&self, service: &str, payload: Value) -> Value {
        let run = self
            .gateway
            .start_job(json!({"service_type": service, "payload": payload}))
            .await;
        self.gateway.run_becomes(&run, "completed").await;
        let job = self.gateway.get(&format!("/queue/{run}")).await.expect(200);
        let result = job["result"].as_str().expect("a JSON text");
        json!({"result": serde_json::from_str::<Value>(result).unwrap()})
    }

    pub async fn container_of(&self, service: &str) -> String {
        let told = self.gateway.service(service).await;
        told["instance"]["container_id"]
            .as_str()
            .unwrap_or_else(|| panic!("no container: {told}"))
            .to_owned()
    }
}

impl Drop for Docked {
    fn drop(&mut self) {
        self.gateway.kill();
        for id in self.containers() {
            // The gateway may have been about to remove it.
            let _ = Command::new("docker").args(["rm", "-f", &id]).output();
        }
        for volume in self.volumes() {
            docker(&["volume", "rm", "-f", &volume]);
        }
    }
}

/// Until a condition of the engine holds, which is asked by a blocking program.
pub async fn until_engine(what: &str, holds: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
