//! Other clients' ways to talk to a gateway: the script of `docs/examples`, and `rungate` itself, at both roots.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::support::scripted::Scripted;
use crate::support::{Gateway, Options, binary, worker_service};

/// A file of `docs/examples`.
pub fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("docs/examples")
        .join(name)
}

/// The script, at one of a gateway's roots.
struct Cli<'a> {
    gateway: &'a Gateway,
    root: &'static str,
}

impl Cli<'_> {
    async fn run(&self, args: &[&str], input: &str) -> (bool, String, String) {
        let mut child = Command::new("bash")
            .arg(example("gateway-cli.sh"))
            .args(args)
            .env("GATEWAY_URL", self.gateway.url(self.root))
            .env("GATEWAY_API_TOKEN", self.gateway.token())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // A command that reads nothing has closed it.
        let _ = stdin.write_all(input.as_bytes()).await;
        drop(stdin);
        let output = child.wait_with_output().await.unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (
            output.status.success(),
            text(output.stdout),
            text(output.stderr),
        )
    }

    /// The answer of a command that succeeds.
    async fn says(&self, args: &[&str]) -> Value {
        self.says_to(args, "").await
    }

    async fn says_to(&self, args: &[&str], input: &str) -> Value {
        let (done, out, err) = self.run(args, input).await;
        assert!(done, "{args:?} at '{}': {err}", self.root);
        serde_json::from_str(&out).unwrap_or_else(|_| panic!("{args:?}: {out}"))
    }

    /// What a command that fails complains of.
    async fn fails(&self, args: &[&str]) -> String {
        let (done, out, err) = self.run(args, "").await;
        assert!(!done && out.is_empty(), "{args:?}: {out}");
        assert_eq!(err.lines().count(), 1, "{args:?}: {err}");
        err
    }
}

const HOLD: &str = r#"{"hold": true}"#;

async fn every_command(root: &'static str) {
    let gateway = Gateway::start(Options::gpus("sim:24GiB")).await;
    let cli = Cli {
        gateway: &gateway,
        root,
    };
    services(&gateway, &cli).await;
    jobs(&gateway, &cli).await;
    preemption(&gateway, &cli).await;
    refusals(&cli).await;
}

async fn services(gateway: &Gateway, cli: &Cli<'_>) {
    let worker = json!({"vram_gb": 4});
    gateway
        .register(worker_service(gateway, "worker", "text", worker))
        .await;
    let named = ["register", "llm", "llm-box", "8001", "llm"];
    let more = [
        "--vram",
        "6.5",
        "--health",
        "/ready",
        "--progress-mode",
        "poll",
        "--description",
        "a \"model\"",
    ];
    let made = cli.says(&[&named[..], &more[..]].concat()).await;
    assert_eq!(made["container"], "llm-box");
    assert_eq!(
        (&made["port"], &made["vram_gb"]),
        (&json!(8001), &json!(6.5))
    );
    assert_eq!(made["health_endpoint"], "/ready");
    assert_eq!(made["progress_mode"], "poll");
    assert_eq!(made["progress_endpoint"], "/progress");
    assert_eq!(made["description"], "a \"model\"");
    assert_eq!(cli.says(&["disable", "llm"]).await["enabled"], false);
    assert_eq!(cli.says(&["enable", "llm"]).await["enabled"], true);
    assert_eq!(cli.says(&["service", "llm"]).await["type"], "llm");
    let all = cli.says(&["services"]).await;
    assert_eq!(all["services"].as_object().unwrap().len(), 2);
    assert_eq!(cli.says(&["unregister", "llm"]).await["deleted"], "llm");

    assert_eq!(cli.says(&["start", "worker"]).await["status"], "started");
    assert_eq!(
        cli.says(&["start", "worker"]).await["status"],
        "already_running"
    );
    let status = cli.says(&["status"]).await;
    assert_eq!(status["status"], "ok");
    assert_eq!(status["services_running"], json!(["worker"]));
    assert_eq!(cli.says(&["gpu"]).await["available"], true);
    let vram = cli.says(&["vram"]).await;
    assert_eq!(vram["total_mb"], 24 * 1024);
    assert_eq!(vram["allocated_services"][0]["service"], "worker");
    assert_eq!(cli.says(&["restart", "worker"]).await["healthy"], true);
    assert_eq!(cli.says(&["stop", "worker"]).await["status"], "stopped");
    assert_eq!(
        cli.says(&["stop", "worker"]).await["status"],
        "already_stopped"
    );
}

async fn jobs(gateway: &Gateway, cli: &Cli<'_>) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("job.json");
    std::fs::write(&file, r#"{"operation": "sleep", "ms": 10}"#).unwrap();
    let file = file.to_str().unwrap();
    let submitted = cli.says(&["submit", "text", file, "-p", "2"]).await;
    assert_eq!(submitted["position"], 1);
    let done = submitted["job_id"].as_str().unwrap().to_owned();
    gateway.run_becomes(&done, "completed").await;
    let job = cli.says(&["job", &done]).await;
    assert_eq!(
        (&job["status"], &job["priority"]),
        (&json!("completed"), &json!(2))
    );
    // Nobody takes this one.
    let waiting = cli.says_to(&["submit", "nothing", "-"], HOLD).await;
    let waiting = waiting["job_id"].as_str().unwrap();
    let progress = cli.says(&["progress", waiting]).await;
    assert_eq!(progress["status"], "queued");
    assert_eq!(cli.says(&["queue"]).await["by_type"]["nothing"], 1);
    assert_eq!(cli.says(&["cancel", waiting]).await["cancelled"], true);
    assert_eq!(cli.says(&["job", waiting]).await["status"], "cancelled");
}

async fn preemption(gateway: &Gateway, cli: &Cli<'_>) {
    let scripted = Scripted::start().await;
    gateway.register(scripted.service("one", "held")).await;
    let idle = cli.says(&["preempt", "check", "one"]).await;
    assert_eq!(idle["preemptable"], false);
    let submit = async |priority: &str| {
        let answer = cli
            .says_to(&["submit", "held", "-", "-p", priority], HOLD)
            .await;
        answer["job_id"].as_str().unwrap().to_owned()
    };
    let victim = submit("3").await;
    gateway.job_becomes(&victim, "running").await;
    let preemptor = submit("3").await;
    let check = cli.says(&["preempt", "check", "one"]).await;
    assert_eq!(check["active_job_id"], *victim);
    assert_eq!(check["highest_queued"]["job_id"], *preemptor);
    let answer = cli.says(&["preempt", "exec", "one", &preemptor]).await;
    assert_eq!(answer["preempted_job_id"], *victim);
    gateway.job_becomes(&preemptor, "running").await;
    gateway.job_becomes(&victim, "preempted").await;
    let released = cli.says(&["release", "one"]).await;
    assert_eq!(released["resumed_jobs"], json!([victim]));
    scripted.release();
    gateway.run_becomes(&victim, "completed").await;
}

async fn refusals(cli: &Cli<'_>) {
    assert!(
        cli.fails(&["service", "a/b"])
            .await
            .contains("404 Unknown service: a/b")
    );
    assert!(
        cli.fails(&["job", "x"])
            .await
            .contains("404 Job not found: x")
    );
    assert!(
        cli.fails(&["register", "x"])
            .await
            .contains("NAME CONTAINER PORT TYPE")
    );
    assert!(cli.fails(&["gpu", "x"]).await.contains("wrong arguments"));
    assert!(
        cli.fails(&["explode"])
            .await
            .contains("no command 'explode'")
    );
    let stranger = Command::new("bash")
        .arg(example("gateway-cli.sh"))
        .arg("gpu")
        .env("GATEWAY_URL", cli.gateway.url(cli.root))
        .env("GATEWAY_API_TOKEN", "wrong")
        .output()
        .await
        .unwrap();
    let said = String::from_utf8(stranger.stderr).unwrap();
    assert!(said.contains("gateway-cli: 401 "), "{said}");
}

#[tokio::test]
async fn every_command_of_the_script_works_at_the_root() {
    every_command("").await;
}

#[tokio::test]
async fn every_command_of_the_script_works_below_api_gateway() {
    every_command("/api/gateway/").await;
}

#[tokio::test]
async fn rungate_takes_either_root_for_its_gateway() {
    let gateway = Gateway::start(Options::default()).await;
    gateway
        .register(worker_service(&gateway, "worker", "text", json!({})))
        .await;
    for root in ["", "/", "/api/gateway", "/api/gateway/"] {
        let rungate = async |args: &[&str]| {
            let output = Command::new(binary())
                .args(["--json", "--url", &gateway.url(root)])
                .args(args)
                .env("RUNGATE_TOKEN", gateway.token())
                .output()
                .await
                .unwrap();
            let (out, err) = (
                output.stdout,
                String::from_utf8_lossy(&output.stderr).into_owned(),
            );
            assert!(output.status.success(), "{args:?} at '{root}': {err}");
            let out = String::from_utf8(out).unwrap();
            let lines = out.lines().map(|line| serde_json::from_str(line).unwrap());
            lines.collect::<Vec<Value>>()
        };
        rungate(&["health"]).await;
        let queue = rungate(&["queue"]).await;
        assert_eq!(queue[0]["total_running"], 0, "{queue:?}");
        let list = rungate(&["service", "list"]).await;
        assert!(list[0].to_string().contains("worker"), "{list:?}");
        let payload = r#"{"operation": "sleep", "ms": 1}"#;
        let start = [
            "run",
            "start",
            "--type",
            "text",
            "--payload",
            payload,
            "--watch",
        ];
        let followed = rungate(&start).await;
        assert!(followed.len() > 2, "{followed:?}");
        let runs = rungate(&["run", "list"]).await;
        assert!(runs[0].to_string().contains("completed"), "{runs:?}");
    }
}
