//! An engine that dies, hangs and comes back: one of the test's own, with a bridge of its own, beside the machine's.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;

use super::engine::{Docked, PYTHON, options};
use crate::support::Options;
use crate::support::wait::until;

/// An engine of the test's own.
pub struct OwnEngine {
    dir: TempDir,
    bridge: String,
    live_restore: bool,
    daemon: Option<Child>,
    /// On its own, as the system's is: one that the engine starts dies with it, and haunts it where nobody reaps it.
    containerd: Option<Child>,
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

impl OwnEngine {
    /// `number` tells its bridge and its network from those of other tests.
    pub async fn start(number: u8, live_restore: bool) -> OwnEngine {
        // Its sockets need a short path.
        let dir = tempfile::Builder::new()
            .prefix("rg-engine")
            .tempdir_in("/tmp")
            .unwrap();
        let bridge = format!("rgtest{number}");
        let _ = Command::new("ip").args(["link", "del", &bridge]).output();
        run("ip", &["link", "add", &bridge, "type", "bridge"]);
        run(
            "ip",
            &[
                "addr",
                "add",
                &format!("10.213.{number}.1/24"),
                "dev",
                &bridge,
            ],
        );
        run("ip", &["link", "set", &bridge, "up"]);
        let mut engine = OwnEngine {
            dir,
            bridge,
            live_restore,
            daemon: None,
            containerd: None,
        };
        engine.spawn_containerd();
        engine.spawn();
        engine.answers().await;
        let image = run(
            "docker",
            &["image", "inspect", "--format", "{{.Id}}", PYTHON],
        );
        let load = format!(
            "docker save {PYTHON} | docker -H {} load && docker -H {} image inspect {image}",
            engine.host(),
            engine.host()
        );
        run("sh", &["-c", &load]);
        engine
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("docker.sock")
    }

    pub fn host(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    fn spawn_containerd(&mut self) {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let log = std::fs::File::create(self.dir.path().join("containerd.log")).unwrap();
        let (root, state, address) = (path("croot"), path("cstate"), path("containerd.sock"));
        let child = Command::new("containerd")
            .args(["--root", &root, "--state", &state, "--address", &address])
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        self.containerd = Some(child.expect("containerd is installed: tests/run does it"));
    }

    pub fn spawn(&mut self) {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"))
            .unwrap();
        let mut command = Command::new("dockerd");
        command.args([
            "-H",
            &self.host(),
            "--data-root",
            &path("data"),
            "--exec-root",
            &path("exec"),
            "--pidfile",
            &path("pid"),
        ]);
        command.args([
            "--bridge",
            &self.bridge,
            "--iptables=false",
            "--ip6tables=false",
            "--ip-masq=false",
        ]);
        command.args(["--containerd", &path("containerd.sock")]);
        if self.live_restore {
            command.arg("--live-restore");
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        self.daemon = Some(child.expect("dockerd is installed: tests/run does it"));
    }

    pub async fn answers(&self) {
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        loop {
            let asked = Command::new("docker")
                .args(["-H", &self.host(), "info"])
                .output()
                .unwrap();
            if asked.status.success() {
                return;
            }
            let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            assert!(
                std::time::Instant::now() < deadline,
                "the engine does not start: {log}"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// As by kill -9.
    pub fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
            let _ = std::fs::remove_file(self.dir.path().join("pid"));
        }
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = self.daemon.as_ref().unwrap().id();
        let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub fn docker(&self, arguments: &[&str]) -> String {
        let host = self.host();
        let all: Vec<&str> = ["-H", &host]
            .into_iter()
            .chain(arguments.iter().copied())
            .collect();
        run("docker", &all)
    }

    pub fn options(&self) -> Options {
        options().set("RUNGATE_DOCKER_HOST", &self.host())
    }

    /// Containers that bear a gateway's label.
    pub fn containers(&self) -> usize {
        self.docker(&["ps", "-aq", "--filter", "label=io.rungate.ledger"])
            .lines()
            .count()
    }
}

impl Drop for OwnEngine {
    fn drop(&mut self) {
        if self.daemon.is_none() {
            self.spawn();
        }
        let host = self.host();
        let end = format!(
            "for i in 1 2 3 4 5 6 7 8 9; do docker -H {host} info >/dev/null 2>&1 && break; sleep 1; done; docker -H {host} ps -aq | xargs -r docker -H {host} rm -f"
        );
        let _ = Command::new("sh").args(["-c", &end]).output();
        if let Some(mut daemon) = self.daemon.take() {
            // In good order, so that its containerd and mounts go with it.
            let pid = daemon.id().to_string();
            let _ = Command::new("kill").arg(&pid).output();
            let _ = daemon.wait();
        }
        if let Some(mut containerd) = self.containerd.take() {
            let _ = containerd.kill();
            let _ = containerd.wait();
        }
        // Networks of its containers stay mounted, and the directory could not be removed.
        let below = format!("{}/", self.dir.path().display());
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
        let places = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        for place in places.filter(|place| place.starts_with(&below)) {
            let _ = Command::new("umount").args(["-l", place]).output();
        }
        let _ = Command::new("ip")
            .args(["link", "del", &self.bridge])
            .output();
    }
}

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
