//! An engine of a test's own, with a bridge of its own, beside the machine's: it may be killed, filled and misled.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::engine::{PYTHON, options};
use crate::support::Options;

/// How it differs from a plain one.
#[derive(Default)]
pub struct Setup {
    pub live_restore: bool,
    /// Further arguments.
    pub arguments: Vec<String>,
    /// MiB of a file system of its own, in memory, for all that it keeps.
    pub disk_mib: Option<u32>,
}

/// An engine of the test's own.
pub struct OwnEngine {
    dir: TempDir,
    bridge: String,
    setup: Setup,
    daemon: Option<Child>,
    /// On its own, as the system's is: one that the engine starts dies with it, and haunts it where nobody reaps it.
    containerd: Option<Child>,
}

/// Runs a program, which must succeed; what it says.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

impl OwnEngine {
    /// `number` tells its bridge and its network from those of other tests.
    pub async fn start(number: u8, live_restore: bool) -> OwnEngine {
        let setup = Setup {
            live_restore,
            ..Setup::default()
        };
        OwnEngine::with(number, setup).await
    }

    pub async fn with(number: u8, setup: Setup) -> OwnEngine {
        // Its sockets need a short path.
        let dir = tempfile::Builder::new()
            .prefix("rg-engine")
            .tempdir_in("/tmp")
            .unwrap();
        let bridge = format!("rgtest{number}");
        let address = format!("10.213.{number}.1/24");
        let _ = Command::new("ip").args(["link", "del", &bridge]).output();
        run("ip", &["link", "add", &bridge, "type", "bridge"]);
        run("ip", &["addr", "add", &address, "dev", &bridge]);
        run("ip", &["link", "set", &bridge, "up"]);
        let mut engine = OwnEngine {
            dir,
            bridge,
            setup,
            daemon: None,
            containerd: None,
        };
        std::fs::create_dir(engine.data()).unwrap();
        if let Some(mib) = engine.setup.disk_mib {
            let size = format!("size={mib}m");
            let data = engine.data().display().to_string();
            run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", &data]);
        }
        engine.configure(&json!({}));
        engine.spawn_containerd();
        engine.spawn();
        engine.answers().await;
        engine.load(PYTHON);
        engine
    }

    /// Copies an image of the machine's engine.
    fn load(&self, image: &str) {
        let id = run(
            "docker",
            &["image", "inspect", "--format", "{{.Id}}", image],
        );
        let host = self.host();
        let load = format!(
            "docker save {image} | docker -H {host} load && docker -H {host} image inspect {id}"
        );
        run("sh", &["-c", &load]);
    }

    /// Its configuration file, which it reads when it is spawned; the machine's does not count.
    pub fn configure(&self, configuration: &Value) {
        std::fs::write(self.path("daemon.json"), configuration.to_string()).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where it keeps images and containers.
    pub fn data(&self) -> PathBuf {
        self.path("data")
    }

    pub fn host(&self) -> String {
        format!("unix://{}", self.path("docker.sock").display())
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn spawn_containerd(&mut self) {
        let log = std::fs::File::create(self.path("containerd.log")).unwrap();
        let (root, state) = (self.text("croot"), self.text("cstate"));
        let address = self.text("containerd.sock");
        let child = Command::new("containerd")
            .args(["--root", &root, "--state", &state, "--address", &address])
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        self.containerd = Some(child.expect("containerd is installed: tests/run does it"));
    }

    pub fn spawn(&mut self) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .unwrap();
        let mut command = Command::new("dockerd");
        command
            .args(["--config-file", &self.text("daemon.json")])
            .args(["-H", &self.host()])
            .args(["--data-root", &self.text("data")])
            .args(["--exec-root", &self.text("exec")])
            .args(["--pidfile", &self.text("pid")])
            .args(["--bridge", &self.bridge])
            .args(["--iptables=false", "--ip6tables=false", "--ip-masq=false"])
            .args(["--containerd", &self.text("containerd.sock")])
            .args(&self.setup.arguments);
        if self.setup.live_restore {
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
            let log = std::fs::read_to_string(self.path("log")).unwrap_or_default();
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
            let _ = std::fs::remove_file(self.path("pid"));
        }
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
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
