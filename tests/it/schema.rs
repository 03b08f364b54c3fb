//! The OpenAPI document against the running server: whatever a generated request is, the answer is one that the
//! document describes, and none is a fault of the server. `SCHEMATHESIS` names the tool; `tests/run` installs it.

use std::process::Stdio;

use reqwest::Method;
use serde_json::json;

use crate::support::{Gateway, Options};

const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance";

/// Left to `streams.rs` and `services.rs`: streams and followed logs do not end, and starts of made-up services wait
/// for their health.
const EXCLUDED: &str = r"/stream$|/logs$|\{name\}/(start|restart)$";

/// Runs the tool as the holder of a token.
async fn conforms(gateway: &Gateway, token: &str) {
    let tool = std::env::var("SCHEMATHESIS").expect(
        "SCHEMATHESIS names the tool (tests/run installs it, pip install schemathesis does)",
    );
    let folder = tempfile::tempdir().unwrap();
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/schemathesis.toml");
    let output = tokio::process::Command::new(tool)
        .args([
            "--config-file",
            config,
            "run",
            &gateway.url("/openapi.json"),
        ])
        .args(["--header", &format!("Authorization: Bearer {token}")])
        .args(["--max-examples", "8", "--checks", CHECKS, "--no-color"])
        .args(["--phases", "examples,coverage,fuzzing"])
        .args(["--exclude-path-regex", EXCLUDED])
        .args(["--generation-database", ":memory:"])
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .output()
        .await
        .expect("SCHEMATHESIS can be started");
    let report = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{report}\n{errors}");
    assert!(report.contains("Tested: "), "{report}");
}

/// A gateway with a service, a run, and a user of that role; the user's token.
async fn with_user(role: &str) -> (Gateway, String) {
    let gateway = Gateway::start(Options::gpus("sim:24GiB")).await;
    let service = json!({"name": "plain", "container": "plain", "port": 9, "type": "t"});
    gateway.register(service).await;
    gateway
        .start_job(json!({"service_type": "nobody", "payload": {"a": 1}}))
        .await;
    let user = json!({"user_id": "someone", "roles": [role]});
    let answer = gateway.post("/api/gateway/admin/users", user).await;
    let token = answer.expect(200)["token"].as_str().unwrap().to_owned();
    let me = gateway.bare(Method::GET, "/api/gateway/me");
    let me = me.bearer_auth(&token).send().await.unwrap();
    assert_eq!(me.status(), 200);
    (gateway, token)
}

#[tokio::test]
async fn every_answer_to_the_administrator_is_described() {
    let (gateway, _) = with_user("user").await;
    conforms(&gateway, gateway.token()).await;
}

#[tokio::test]
async fn every_answer_to_a_user_is_described() {
    let (gateway, token) = with_user("user").await;
    conforms(&gateway, &token).await;
}

#[tokio::test]
async fn every_answer_to_a_viewer_is_described() {
    let (gateway, token) = with_user("viewer").await;
    conforms(&gateway, &token).await;
}
