//! Engines that are reached as docker's own client reaches them: by TLS, and by ssh.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::json;
use tempfile::TempDir;

use super::engine::Docked;
use super::own::{OwnEngine, Setup, run};
use crate::support::wait::until;
use crate::support::{Gateway, Options, free_port};
use crate::tls::Authority;

/// A service is started, works, tells, and is removed: calls, streams and long answers.
async fn works(gateway: &Docked, engine: &OwnEngine) {
    gateway.python("py", json!({"vram_gb": 1})).await;
    let done = gateway.runs("py", json!({"op": "say", "kib": 100})).await;
    assert_eq!(done["result"]["said_kib"], 100);
    until("its output is copied", || async {
        let log = gateway.get("/services/py/logs?tail=1000").await.text;
        log.matches(&"x".repeat(1_023)).count() == 100
    })
    .await;
    let id = gateway.container_of("py").await;
    engine.docker(&["kill", &id]);
    until("its end was seen by the engine's events", || async {
        gateway.service("py").await["instance"]["container_id"] != json!(id)
    })
    .await;
    let stopped = gateway.post("/services/py/stop", json!({})).await;
    stopped.expect(200);
    until("no container is left", || async {
        engine.containers() == 0
    })
    .await;
}

/// As docker's own client is told of an engine.
fn told(engine: &OwnEngine, variables: &[(&str, &str)]) -> Options {
    let mut options = engine.options().set("RUNGATE_DOCKER_HOST", "");
    for (name, value) in variables {
        options = options.set(name, value);
    }
    options
}

/// Waits until a gateway says so of its engine.
async fn complains(options: Options, of: &str) {
    let gateway = Gateway::start(options).await;
    until(of, || async {
        let told = gateway.get("/containers").await.expect(200);
        assert_eq!(told["engine"]["up"], false, "{told}");
        told["engine"]["error"].to_string().contains(of)
    })
    .await;
}

/// A folder with a client's certificate, and the authority that the engine must be of.
fn client_files(of: &Authority, engines: &Authority) -> TempDir {
    let dir = TempDir::new().unwrap();
    of.issue(&dir.path().join("cert.pem"), &dir.path().join("key.pem"));
    std::fs::write(dir.path().join("ca.pem"), engines.pem()).unwrap();
    dir
}

#[tokio::test]
async fn an_engine_behind_tls_is_used_where_both_sides_know_each_other() {
    let (authority, other) = (Authority::new(), Authority::new());
    let files = client_files(&authority, &authority);
    let address = format!("tcp://127.0.0.1:{}", free_port());
    let file = |name: &str| files.path().join(name).display().to_string();
    let (ca, cert, key) = (file("ca.pem"), file("cert.pem"), file("key.pem"));
    let arguments = [
        "-H",
        &address,
        "--tlsverify",
        "--tlscacert",
        &ca,
        "--tlscert",
        &cert,
        "--tlskey",
        &key,
    ];
    let setup = Setup {
        arguments: arguments.map(str::to_owned).into(),
        ..Setup::default()
    };
    let engine = OwnEngine::with(8, setup).await;
    let variables = |dir: &Path| {
        let folder = dir.display().to_string();
        let host = ("DOCKER_HOST", address.as_str());
        told(
            &engine,
            &[
                host,
                ("DOCKER_TLS_VERIFY", "1"),
                ("DOCKER_CERT_PATH", &folder),
            ],
        )
    };
    let gateway = Docked::start(variables(files.path())).await;
    works(&gateway, &engine).await;
    drop(gateway);
    let stranger = client_files(&other, &authority);
    complains(variables(stranger.path()), "BadCertificate").await;
    let impostor = client_files(&authority, &other);
    complains(variables(impostor.path()), "invalid peer certificate").await;
    complains(
        variables(Path::new("/nowhere")),
        "cannot read /nowhere/ca.pem",
    )
    .await;
    // Not even asked without TLS.
    complains(
        told(&engine, &[("DOCKER_HOST", &address)]),
        "does not answer",
    )
    .await;
}

/// An ssh server that lets in a key of the test's own, and a client that uses it.
struct Sshd {
    dir: TempDir,
    port: u16,
    server: Child,
}

impl Sshd {
    fn start() -> Sshd {
        let (dir, port) = (TempDir::new().unwrap(), free_port());
        let path = |name: &str| dir.path().join(name).display().to_string();
        for key in ["host", "user"] {
            run(
                "ssh-keygen",
                &["-q", "-t", "ed25519", "-N", "", "-f", &path(key)],
            );
        }
        std::fs::copy(path("user.pub"), path("allowed")).unwrap();
        let host = std::fs::read_to_string(path("host.pub")).unwrap();
        std::fs::write(path("known"), format!("[127.0.0.1]:{port} {host}")).unwrap();
        let environment = std::env::var("PATH").unwrap();
        let server = format!(
            "ListenAddress 127.0.0.1:{port}\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\nPidFile none\n\
             PasswordAuthentication no\nPermitRootLogin prohibit-password\nSetEnv PATH={environment}\n",
            path("host"),
            path("allowed")
        );
        std::fs::write(path("sshd_config"), server).unwrap();
        // It looks for its files in the user's own folder, whatever HOME says.
        let client = format!(
            "Host *\nIdentityFile {}\nIdentitiesOnly yes\nUserKnownHostsFile {}\n",
            path("user"),
            path("known")
        );
        std::fs::write(path("config"), client).unwrap();
        let wrapper = PathBuf::from(path("ssh"));
        std::fs::write(
            &wrapper,
            format!(
                "#!/bin/sh\nexec /usr/bin/ssh -F {} \"$@\"\n",
                path("config")
            ),
        )
        .unwrap();
        std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::create_dir_all("/run/sshd").unwrap();
        let log = std::fs::File::create(path("log")).unwrap();
        let server = Command::new("/usr/sbin/sshd")
            .args(["-D", "-e", "-f", &path("sshd_config")])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("openssh-server is installed: tests/run does it");
        Sshd { dir, port, server }
    }

    fn path(&self) -> String {
        let rest = std::env::var("PATH").unwrap();
        format!("{}:{rest}", self.dir.path().display())
    }

    /// The clients that run, by their ids.
    fn clients(&self) -> Vec<i32> {
        let file = self.dir.path().join("config").display().to_string();
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let is_ours = |id: &i32| {
            let command = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            let mut arguments = command.split(|byte| *byte == 0);
            arguments.any(|argument| argument == file.as_bytes())
        };
        ids.filter(is_ours).collect()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.path().join("log"));
            eprintln!("--- the ssh server's log\n{}", log.unwrap_or_default());
        }
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

#[tokio::test]
async fn an_engine_of_another_machine_is_used_by_ssh() {
    let engine = OwnEngine::start(9, false).await;
    let sshd = Sshd::start();
    let user = run("id", &["-un"]);
    let socket = engine.path("docker.sock").display().to_string();
    let host = format!("ssh://{user}@127.0.0.1:{}{socket}", sshd.port);
    let path = sshd.path();
    let mut gateway =
        Docked::start(told(&engine, &[("DOCKER_HOST", &host), ("PATH", &path)])).await;
    works(&gateway, &engine).await;
    // All connections break: they are made again, and nothing is lost.
    let broken = sshd.clients();
    assert!(!broken.is_empty());
    for id in broken {
        let id = rustix::process::Pid::from_raw(id).unwrap();
        let _ = rustix::process::kill_process(id, rustix::process::Signal::KILL);
    }
    let done = gateway.runs("py", json!({"op": "echo"})).await;
    assert!(done["result"]["echo"].is_object());
    // Who may not in is told why.
    std::fs::remove_file(sshd.dir.path().join("allowed")).unwrap();
    let variables = [("DOCKER_HOST", host.as_str()), ("PATH", &path)];
    complains(told(&engine, &variables), "Permission denied").await;
    gateway.gateway.kill();
    until("no client is left", || async { sshd.clients().is_empty() }).await;
    gateway.gateway.launch().await;
}
