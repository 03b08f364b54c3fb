//! The disk fills while the gateway works: it ends and says why, and with space again it goes on with everything
//! that it acknowledged.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use tempfile::TempDir;

use crate::startup::Tmpfs;
use crate::support::{Gateway, Options};

#[tokio::test]
async fn a_disk_that_fills_ends_the_gateway_and_loses_nothing() {
    let home = TempDir::new().unwrap();
    let data = home.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let disk = Tmpfs::mount(&data, "size=24m");
    let options = Options {
        data_dir: Some(data.clone()),
        ..Options::default()
    };
    let mut gateway = Gateway::start(options).await;

    let text = "x".repeat(200_000);
    let mut acknowledged = Vec::new();
    for number in 0.. {
        assert!(number < 1_000, "24 MiB hold no 200 MB");
        let body =
            json!({"job": {"service_type": "none", "payload": {"number": number, "text": text}}});
        let request = gateway.request(Method::POST, "/api/gateway/runs/start");
        let sent = request.timeout(Duration::from_secs(20)).json(&body).send();
        let Ok(response) = sent.await else { break };
        if !response.status().is_success() {
            assert!(response.status().is_server_error(), "{response:?}");
            break;
        }
        let body: serde_json::Value = response.json().await.unwrap();
        acknowledged.push(body["run_id"].as_str().unwrap().to_owned());
    }
    let status = gateway.ended().await;
    assert!(!status.success() && status.code().is_some(), "{status}");
    let log = gateway.log();
    assert!(
        log.contains("disk is full") && log.contains("free some space"),
        "{log}"
    );

    disk.resize("512m");
    gateway.launch().await;
    assert!(acknowledged.len() > 5);
    for (number, run) in acknowledged.iter().enumerate() {
        let path = format!("/api/gateway/runs/{run}/input_data");
        let input = gateway.get(&path).await.expect(200).to_string();
        assert!(input.contains(&format!("\"number\":{number},")));
        assert!(input.len() > text.len());
    }
    gateway
        .start_job(json!({"service_type": "none", "payload": {}}))
        .await;
    assert!(gateway.stop().await.success());
}
