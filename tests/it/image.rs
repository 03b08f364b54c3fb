//! The container image and its compose files, on the machine's Docker engine: built from bases that are made here out of
//! this machine's files, as nothing is pulled; run as nobody in particular, without a writable root.
//!
//! No compiler runs in the container: the first base's `cargo` hands out the binary under test, once it has seen that
//! the sources which a compiler would need have come along. All else of the Dockerfile is done as it is for users.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::support::binary;
use crate::support::wait::until;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[track_caller]
fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| {
        panic!("{command:?}: {error}; tests/run installs and starts what these tests need")
    });
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{command:?}: {out}\n{err}");
    out
}

fn docker(args: &[&str]) -> Command {
    let mut command = Command::new("docker");
    command.args(args).env("DOCKER_BUILDKIT", "0");
    command
}

#[track_caller]
fn docker_says(args: &[&str]) -> String {
    succeeds(&mut docker(args))
}

/// `docker compose`, or its older command.
fn compose(project: &str, files: &[&str]) -> Command {
    let has_plugin = docker(&["compose", "version"]).output();
    let mut command = match has_plugin.is_ok_and(|output| output.status.success()) {
        true => docker(&["compose"]),
        false => Command::new("docker-compose"),
    };
    command.args(["-p", project]).current_dir(root());
    for file in files {
        command.args(["-f", &format!("docker/{file}")]);
    }
    command
}

/// A tree of files that becomes an image.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Tree {
        Tree(tempfile::tempdir().unwrap())
    }

    fn path(&self, inside: &str) -> PathBuf {
        let path = self.0.path().join(inside.trim_start_matches('/'));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    fn copy(&self, from: &str) {
        std::fs::copy(from, self.path(from)).unwrap_or_else(|error| panic!("{from}: {error}"));
    }

    /// What a program is linked with; nothing for a static one.
    fn copy_libraries(&self, program: &Path) {
        let linked = Command::new("ldd").arg(program).output().unwrap().stdout;
        let linked = String::from_utf8(linked).unwrap();
        let files = linked
            .split_whitespace()
            .filter(|word| word.starts_with('/'));
        files.for_each(|file| self.copy(file));
    }

    fn script(&self, inside: &str, text: &str) {
        use std::os::unix::fs::PermissionsExt;
        let path = self.path(inside);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// `docker import` of it, under this name.
    fn import(&self, name: &str) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut tar = Command::new("tar");
        tar.arg("-C")
            .arg(self.0.path())
            .args(["-cf"])
            .arg(file.path())
            .arg(".");
        succeeds(&mut tar);
        docker_says(&["import", file.path().to_str().unwrap(), name]);
    }
}

/// The libraries that the binary is linked with, and the certificates that its HTTP clients look for.
fn runtime_base(name: &str) {
    let tree = Tree::new();
    tree.copy_libraries(binary());
    let certificates = "/etc/ssl/certs/ca-certificates.crt";
    if Path::new(certificates).exists() {
        tree.copy(certificates);
    }
    tree.import(name);
}

/// What the sources take in at compile time, beside themselves.
fn included() -> Vec<String> {
    let mut grep = Command::new("grep");
    grep.args([
        "-rhoE",
        "include_(str|bytes)!\\(\"(\\.\\./)+[^\"]+\"",
        "src",
    ]);
    let found = succeeds(grep.current_dir(root()));
    let path = |line: &str| {
        line.rsplit("../")
            .next()
            .unwrap()
            .trim_end_matches('"')
            .to_owned()
    };
    let mut paths: Vec<String> = found.lines().map(path).collect();
    paths.retain(|path| root().join(path).exists());
    assert!(!paths.is_empty());
    paths
}

/// A shell, and a `cargo` that hands out the binary under test.
fn build_base(name: &str) {
    let tree = Tree::new();
    let busybox = Path::new("/bin/busybox");
    std::fs::copy(busybox, tree.path("bin/busybox")).expect("busybox; tests/run installs it");
    tree.copy_libraries(busybox);
    for applet in ["sh", "mkdir", "cp", "test"] {
        std::os::unix::fs::symlink("/bin/busybox", tree.path(&format!("bin/{applet}"))).unwrap();
    }
    let mut strip = Command::new("strip");
    strip.arg("-o").arg(tree.path("rungate")).arg(binary());
    succeeds(&mut strip);
    let needed = [
        "Cargo.toml",
        "Cargo.lock",
        "src/main.rs",
        "benches/gateway/main.rs",
    ];
    let needed = needed.map(str::to_owned).into_iter().chain(included());
    let checks: String = needed.map(|path| format!("test -f {path}\n")).collect();
    let script = format!(
        "#!/bin/sh\nset -ex\ntest \"$*\" = 'build --release --locked --bin rungate'\n{checks}\
         mkdir -p target/release\ncp /rungate target/release/rungate\n"
    );
    tree.script("bin/cargo", &script);
    tree.import(name);
}

/// The image, built once for all tests of a process.
fn image() -> &'static str {
    static IMAGE: OnceLock<String> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let id = std::process::id();
        let [image, build, runtime] =
            ["image", "build", "runtime"].map(|kind| format!("rungate-test-{kind}:{id}"));
        build_base(&build);
        runtime_base(&runtime);
        let mut command = docker(&[
            "build",
            "--force-rm",
            "-f",
            "docker/Dockerfile",
            "-t",
            &image,
        ]);
        command.args(["--build-arg", &format!("BUILD_IMAGE={build}")]);
        command.args(["--build-arg", &format!("RUNTIME_IMAGE={runtime}")]);
        succeeds(command.arg(".").current_dir(root()));
        // What the first part made has a name, too, so that it can be removed.
        let stage = format!("rungate-test-stage:{id}");
        let mut command = docker(&["build", "-f", "docker/Dockerfile", "--target", "build"]);
        command.args([
            "-t",
            &stage,
            "--build-arg",
            &format!("BUILD_IMAGE={build}"),
            ".",
        ]);
        succeeds(command.current_dir(root()));
        image
    })
}

/// Something of the engine's that ends with the test.
struct Ends(Vec<Vec<String>>);

impl Ends {
    fn new() -> Ends {
        // What this process built goes with its last test: nextest runs each in a process of its own.
        let id = std::process::id();
        let images = ["image", "stage", "build", "runtime"];
        let images = images.map(|kind| format!("rungate-test-{kind}:{id}"));
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let mut first: Vec<String> = words(&["rmi", "-f"]);
        first.extend(images);
        Ends(vec![first])
    }

    /// Before what was named earlier.
    fn with(&mut self, args: &[&str]) {
        self.0
            .insert(0, args.iter().map(|arg| (*arg).to_owned()).collect());
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        for args in &self.0 {
            let _: Option<Output> = Command::new("docker").args(args).output().ok();
        }
    }
}

async fn becomes_healthy(container: &str) {
    let health = || docker_says(&["inspect", "-f", "{{.State.Health.Status}}", container]);
    until("the container is healthy", || async {
        health() == "healthy"
    })
    .await;
}

fn run(name: &str, volume: &str) {
    let volume = format!("{volume}:/data");
    docker_says(&[
        "run",
        "-d",
        "--name",
        name,
        "--init",
        "--read-only",
        "--tmpfs",
        "/tmp",
        "--cap-drop",
        "ALL",
        "--security-opt",
        "no-new-privileges",
        "--publish",
        "127.0.0.1::8080",
        "--volume",
        &volume,
        "--health-interval",
        "1s",
        image(),
    ]);
}

/// A client command within the container, where the administrator's token is.
fn rungate(container: &str, args: &[&str]) -> Value {
    let args = [&["exec", container, "rungate", "--json"], args].concat();
    serde_json::from_str(&docker_says(&args)).unwrap()
}

#[tokio::test]
async fn the_image_runs_as_nobody_and_its_data_outlive_the_container() {
    let mut ends = Ends::new();
    let name = format!("rungate-test-{}", uuid::Uuid::new_v4().simple());
    let volume = format!("{name}-data");
    ends.with(&["volume", "rm", "-f", &volume]);
    ends.with(&["rm", "-f", "-v", &name]);
    let said: Value = serde_json::from_str(&docker_says(&["inspect", image()])).unwrap();
    let config = &said[0]["Config"];
    assert_eq!(config["User"], "10001:10001");
    assert_eq!(
        config["Healthcheck"]["Test"],
        json!(["CMD", "rungate", "health"])
    );
    assert!(config["Volumes"]["/data"].is_object(), "{config}");
    assert!(
        !config["Env"].to_string().to_lowercase().contains("token"),
        "{config}"
    );

    run(&name, &volume);
    becomes_healthy(&name).await;
    let users = docker_says(&["top", &name, "-eo", "pid,uid,args"]);
    let served = users.lines().find(|line| line.contains("rungate serve"));
    assert!(
        served.is_some_and(|line| line.split_whitespace().nth(1) == Some("10001")),
        "{users}"
    );
    let doctor = docker(&["exec", &name, "rungate", "doctor"])
        .output()
        .unwrap();
    let doctor = String::from_utf8(doctor.stdout).unwrap();
    assert!(doctor.contains("ok      ledger"), "{doctor}");
    assert!(!doctor.contains("others can look into"), "{doctor}");
    let port = docker_says(&["port", &name, "8080/tcp"]);
    let address = port.lines().next().unwrap();
    assert!(address.starts_with("127.0.0.1:"), "{port}");
    let health = reqwest::get(format!("http://{address}/health"))
        .await
        .unwrap();
    assert_eq!(health.json::<Value>().await.unwrap()["status"], "ok");
    let anonymous = reqwest::get(format!("http://{address}/gpu")).await.unwrap();
    assert_eq!(anonymous.status(), 401);
    let payload = r#"{"kept": "over the container's end"}"#;
    let started = rungate(
        &name,
        &["run", "start", "--type", "t", "--payload", payload],
    );
    let run_id = started["run_id"].as_str().unwrap().to_owned();

    docker_says(&["stop", "-t", "35", &name]);
    assert_eq!(
        docker_says(&["inspect", "-f", "{{.State.ExitCode}}", &name]),
        "0"
    );
    docker_says(&["rm", &name]);
    run(&name, &volume);
    becomes_healthy(&name).await;
    let shown = rungate(&name, &["run", "show", &run_id]);
    assert_eq!(shown["run_id"], *run_id);
    // A crash of the whole container, too.
    docker_says(&["kill", &name]);
    docker_says(&["start", &name]);
    becomes_healthy(&name).await;
    assert_eq!(rungate(&name, &["run", "show", &run_id])["run_id"], *run_id);
}

#[tokio::test]
async fn compose_brings_a_gateway_up_and_down() {
    let ends = Ends::new();
    let project = format!("rungate-test-{}", std::process::id());
    let port = crate::support::free_port().to_string();
    let image = image();
    let with = |files: &[&str], args: &[&str]| {
        let mut command = compose(&project, files);
        command.args(args);
        command
            .env("RUNGATE_IMAGE", image)
            .env("RUNGATE_PORT", &port);
        command
            .env("RUNGATE_GPUS", "sim:24GiB")
            .env("DOCKER_GID", "0");
        command
    };
    struct Down<F: Fn()>(F);
    impl<F: Fn()> Drop for Down<F> {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    let _down = Down(|| {
        for file in ["compose.yml", "compose.docker.yml"] {
            let _ = with(&[file], &["down", "-v", "-t", "35"]).output();
        }
    });
    let healthy = async |file: &'static str| {
        succeeds(&mut with(&[file], &["up", "-d", "--no-build"]));
        let container = succeeds(&mut with(&[file], &["ps", "-q", "rungate"]));
        becomes_healthy(&container).await;
        let url = format!("http://127.0.0.1:{port}/health");
        let health = reqwest::get(url)
            .await
            .unwrap()
            .json::<Value>()
            .await
            .unwrap();
        assert_eq!(health["status"], "ok");
        container
    };
    let container = healthy("compose.yml").await;
    let host: Value = serde_json::from_str(&docker_says(&["inspect", &container])).unwrap();
    let host = &host[0]["HostConfig"];
    assert_eq!(host["ReadonlyRootfs"], true);
    assert_eq!(host["CapDrop"], json!(["ALL"]));
    assert_eq!(host["PortBindings"]["8080/tcp"][0]["HostIp"], "127.0.0.1");
    let gpu = docker_says(&["exec", &container, "rungate", "--json", "gpu"]);
    assert!(gpu.contains("24576"), "{gpu}");
    succeeds(&mut with(&["compose.yml"], &["down", "-v", "-t", "35"]));
    // The other file shares the machine's network, and sees the engine.
    healthy("compose.docker.yml").await;
    succeeds(&mut with(
        &["compose.docker.yml"],
        &["down", "-v", "-t", "35"],
    ));
    // With NVIDIA's runtime alone can that one be brought up.
    let nvidia = with(&["compose.yml", "compose.nvidia.yml"], &["config"]);
    let nvidia = succeeds(&mut { nvidia });
    assert!(
        nvidia.contains("driver: nvidia") && nvidia.contains("count: all"),
        "{nvidia}"
    );
    drop(ends);
}
