//! What containers say, in their services' logs: each line once, whatever is cut off meanwhile.

use serde_json::json;

use super::engine::{Docked, PYTHON, docker, options, until_engine};

/// A long line, then one a millisecond, while it answers.
const TALKATIVE: &str = r#"
import http.server, itertools, threading, time
print("long " + "x" * 100000, flush=True)
def say():
    for n in itertools.count():
        print("line", n, flush=True)
        time.sleep(0.001)
threading.Thread(target=say, daemon=True).start()
http.server.HTTPServer(("", 8080), http.server.SimpleHTTPRequestHandler).serve_forever()
"#;

fn log(gateway: &Docked, service: &str) -> String {
    let path = gateway.data_dir().join(format!("logs/{service}.log"));
    std::fs::read_to_string(path).unwrap_or_default()
}

fn lines(log: &str) -> Vec<u64> {
    let numbers = log.lines().filter_map(|line| line.strip_prefix("line "));
    numbers.map(|number| number.parse().unwrap()).collect()
}

#[track_caller]
fn is_whole(lines: &[u64]) {
    let wrong = (lines[0]..).zip(lines).find(|(n, line)| n != *line);
    assert_eq!(wrong, None, "of {} lines", lines.len());
}

#[tokio::test]
async fn a_restarted_gateway_goes_on_with_the_very_next_line() {
    let mut gateway = Docked::start(options()).await;
    let script = json!(["python3", "-u", "-c", TALKATIVE]);
    let service = json!({"args": script, "health_endpoint": "/"});
    gateway.python("talk", service).await;
    let started = gateway.post("/services/talk/start", json!({})).await;
    started.expect(200);
    for _ in 0..4 {
        let before = lines(&log(&gateway, "talk")).len();
        until_engine("it is copied", || {
            lines(&log(&gateway, "talk")).len() > before + 300
        })
        .await;
        gateway.gateway.kill();
        gateway.gateway.launch().await;
    }
    let before = lines(&log(&gateway, "talk")).len();
    until_engine("it is copied on", || {
        lines(&log(&gateway, "talk")).len() > before + 300
    })
    .await;
    let stopped = gateway.post("/services/talk/stop", json!({})).await;
    stopped.expect(200);
    let log = log(&gateway, "talk");
    let copied = lines(&log);
    assert_eq!(copied[0], 0);
    is_whole(&copied);
    let long = format!("long {}", "x".repeat(100_000));
    assert_eq!(log.lines().filter(|line| **line == long).count(), 1);
}

#[tokio::test]
async fn of_an_adopted_container_only_what_it_says_from_then_on_is_copied() {
    let mut gateway = Docked::start(options()).await;
    let name = format!("ops-talk-{}", &gateway.ledger[..8]);
    docker(&[
        "run",
        "-d",
        "--name",
        &name,
        "-p",
        "127.0.0.1:18932:8080",
        PYTHON,
        "python3",
        "-u",
        "-c",
        TALKATIVE,
    ]);
    until_engine("it talks", || docker(&["logs", &name]).contains("line 500")).await;
    let service = json!({"name": "talk", "type": "talk", "container": name, "port": 18_932, "health_endpoint": "/", "grace_seconds": 0.5});
    gateway.register(service).await;
    let told = gateway.service("talk").await;
    assert_eq!(
        (&told["container_running"], &told["healthy"]),
        (&json!(true), &json!(false)),
        "it runs, though nobody started it here"
    );
    let listed = gateway.get("/services").await.expect(200);
    assert_eq!(listed["services"]["talk"]["container_running"], true);
    let started = gateway.post("/services/talk/start", json!({})).await;
    started.expect(200);
    let copied = || lines(&log(&gateway, "talk"));
    until_engine("it is copied", || copied().len() > 300).await;
    let first = copied()[0];
    assert!(first > 500, "line {first} was said before");
    gateway.gateway.kill();
    gateway.gateway.launch().await;
    let before = lines(&log(&gateway, "talk")).len();
    until_engine("it is copied on", || {
        lines(&log(&gateway, "talk")).len() > before + 300
    })
    .await;
    is_whole(&lines(&log(&gateway, "talk")));
    docker(&["stop", "-t", "0", &name]);
    gateway
        .service_becomes("talk", "/container_running", json!(false))
        .await;
    let removed = gateway.delete("/services/talk").await;
    removed.expect(200);
    docker(&["rm", "-f", &name]);
}
