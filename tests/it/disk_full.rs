//! The disk fills while the gateway works: it ends and says why, and with space again it goes on with everything
//! that it acknowledged.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use tempfile::TempDir;

use crate::startup::Tmpfs;
use crate::support::wait::until;
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
    let options = options.set("RUNGATE_MIN_FREE_BYTES", "0");
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

#[tokio::test]
async fn below_the_reserve_what_grows_is_refused_and_the_rest_goes_on() {
    let home = TempDir::new().unwrap();
    let data = home.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let disk = Tmpfs::mount(&data, "size=64m");
    let options = Options {
        data_dir: Some(data.clone()),
        ..Options::default()
    };
    let reserve = (24 << 20).to_string();
    let mut gateway = Gateway::start(options.set("RUNGATE_MIN_FREE_BYTES", &reserve)).await;

    let text = "x".repeat(200_000);
    let job = json!({"job": {"service_type": "none", "payload": {"text": text}}});
    let start = "/api/gateway/runs/start";
    let first = gateway.post(start, job.clone()).await.expect(200);
    let mut refused = None;
    for _ in 0..1_000 {
        let answer = gateway.post(start, job.clone()).await;
        if answer.status != 200 {
            refused = Some(answer);
            break;
        }
    }
    let refused = refused.expect("64 MiB hold no 200 MB").expect(507);
    assert_eq!(refused["code"], "disk_reserve");
    let readyz = gateway.bare(Method::GET, "/readyz?verbose=true").send();
    let readyz = readyz.await.unwrap();
    assert_eq!(readyz.status(), 503);
    assert!(readyz.text().await.unwrap().contains("[-] disk"));
    let metrics = gateway.get("/metrics").await.text;
    assert!(metrics.contains("rungate_disk_free_bytes"), "{metrics}");

    let run = first["run_id"].as_str().unwrap();
    gateway.command("c-1", run, "cancel", json!({})).await;
    let cancelled = gateway
        .get(&format!("/api/gateway/runs/{run}"))
        .await
        .expect(200);
    assert_eq!(cancelled["status"], "cancelled");

    disk.resize("512m");
    let is_ready = || async {
        let asked = gateway.bare(Method::GET, "/readyz").send().await;
        asked.unwrap().status() == 200
    };
    until("there is room again", is_ready).await;
    gateway.post(start, job).await.expect(200);
    assert!(gateway.stop().await.success());
}
