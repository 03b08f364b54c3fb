//! The ledger over HTTP: pages, batches, the chain that they show, proof, counts and export.

use serde_json::{Value, json};

use crate::support::scripted::Scripted;
use crate::support::{Gateway, Options};

async fn with_history() -> (Gateway, Vec<String>) {
    let gateway = Gateway::start(Options::default()).await;
    let scripted = Scripted::start().await;
    gateway.register(scripted.service("s", "s")).await;
    let mut runs = Vec::new();
    for n in 0..5 {
        let run = gateway
            .start_job(json!({"service_type": "s", "payload": {"n": n}}))
            .await;
        gateway.run_becomes(&run, "completed").await;
        runs.push(run);
    }
    (gateway, runs)
}

#[tokio::test]
async fn the_whole_ledger_is_read_in_pages_that_chain() {
    let (gateway, _) = with_history().await;
    let tail = gateway.tail().await;
    let (mut after, mut records) = (0, Vec::new());
    loop {
        let path = format!("/api/gateway/ledger?after_seq={after}&limit=7");
        let page = gateway.get(&path).await.expect(200);
        let items = page["items"].as_array().unwrap().clone();
        assert!(items.len() <= 7);
        let next = page["next_after"].as_u64().unwrap();
        if items.is_empty() {
            assert_eq!(next, after, "the same as before when there is none");
            break;
        }
        after = next;
        records.extend(items);
    }
    assert_eq!(records.len() as u64, tail);
    for (index, record) in records.iter().enumerate() {
        assert_eq!(record["seq"], index as u64 + 1);
    }
    for pair in records.windows(2) {
        assert_eq!(pair[1]["prev_hash"], pair[0]["record_hash"]);
        assert!(
            pair[1]["at"].as_str() >= pair[0]["at"].as_str(),
            "time does not go back"
        );
    }
    let beyond = gateway
        .get("/api/gateway/ledger?after_seq=18446744073709551615")
        .await
        .expect(200);
    assert_eq!(beyond["items"], json!([]));
}

#[tokio::test]
async fn a_record_has_the_members_of_the_contract() {
    let (gateway, runs) = with_history().await;
    for record in gateway.records(&runs[0]).await {
        let names: Vec<&String> = record.as_object().unwrap().keys().collect();
        assert_eq!(
            names,
            [
                "actor_id",
                "at",
                "attempt",
                "cursor",
                "effect",
                "ended_at",
                "error",
                "idempotency_key",
                "node_id",
                "prev_hash",
                "purged",
                "record_hash",
                "request_id",
                "result",
                "run_id",
                "seq",
                "session_id",
                "signature",
                "started_at",
                "status",
                "step_id",
            ]
        );
        assert!(
            ["started", "completed", "waiting", "failed", "cancelled"]
                .contains(&record["status"].as_str().unwrap())
        );
        assert_eq!(record["record_hash"].as_str().unwrap().len(), 64);
        assert!(record["effect"]["type"].is_string() && record["effect"]["payload"].is_object());
        let at = record["at"].as_str().unwrap();
        assert!(
            at.len() == "2026-11-21T02:00:00.000120+00:00".len() && at.ends_with("+00:00"),
            "{at}"
        );
    }
}

#[tokio::test]
async fn a_batch_reads_several_runs_and_leaves_out_unknown_ones() {
    let (gateway, runs) = with_history().await;
    let unknown = "0199f3a2-7c1e-7d0a-9c55-6f0f0d1f2a3b";
    let body = json!({"runs": [
        {"run_id": runs[0]}, {"run_id": runs[1], "after": 2}, {"run_id": unknown}, {"run_id": "../x"},
    ], "limit": 2});
    let answer = gateway
        .post("/api/gateway/runs/ledger/batch", body)
        .await
        .expect(200);
    let pages = answer["runs"].as_object().unwrap();
    assert_eq!(pages.len(), 2);
    let cursors = |run: &String| -> Vec<u64> {
        let items = pages[run]["items"].as_array().unwrap();
        items
            .iter()
            .map(|r| r["cursor"].as_u64().unwrap())
            .collect()
    };
    assert_eq!(cursors(&runs[0]), [1, 2]);
    assert_eq!(pages[&runs[0]]["next_after"], 2);
    assert_eq!(cursors(&runs[1]), [3]);
    assert_eq!(pages[&runs[1]]["next_after"], 3);
    let empty = gateway
        .post("/api/gateway/runs/ledger/batch", json!({"runs": []}))
        .await
        .expect(200);
    assert_eq!(empty, json!({"runs": {}}));
}

#[tokio::test]
async fn the_running_ledger_is_proved_counted_and_taken_away() {
    let (gateway, runs) = with_history().await;
    let verified = gateway.get("/api/gateway/ledger/verify").await.expect(200);
    assert_eq!(verified["ok"], true);
    assert_eq!(verified["runs"], 5);
    let stats = gateway.get("/api/gateway/ledger/stats").await.expect(200);
    assert_eq!(stats["events"]["job_completed"], 5);
    assert_eq!(stats["runs_by_status"]["completed"], 5);
    assert_eq!(stats["records"], stats["tail_seq"]);
    assert_eq!(verified["tail_hash"], stats["tail_hash"]);
    let export = gateway.get("/api/gateway/ledger/export").await;
    assert_eq!(export.headers["content-type"], "application/x-ndjson");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("export.ndjson");
    std::fs::write(&file, &export.text).unwrap();
    let copy = dir.path().join("copy");
    let arguments = [
        "ledger",
        "import",
        file.to_str().unwrap(),
        "--data-dir",
        copy.to_str().unwrap(),
    ];
    let (code, out, err) = crate::rungate::run(crate::rungate::rungate(dir.path(), &arguments));
    assert_eq!(code, 0, "{out}{err}");
    let arguments = [
        "ledger",
        "stats",
        "--data-dir",
        copy.to_str().unwrap(),
        "--json",
    ];
    let (code, out, err) = crate::rungate::run(crate::rungate::rungate(dir.path(), &arguments));
    assert_eq!(code, 0, "{out}{err}");
    let copied: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(copied["tail_hash"], stats["tail_hash"], "an equal ledger");
    let tail = stats["tail_seq"].as_u64().unwrap();
    let rest = gateway
        .get(&format!(
            "/api/gateway/ledger/export?after_seq={}",
            tail - 1
        ))
        .await;
    assert!(rest.text.lines().count() >= 1);
    assert!(runs.iter().all(|run| export.text.contains(run.as_str())));
}

#[tokio::test]
async fn a_large_payload_is_shown_by_its_seq() {
    let gateway = Gateway::start(Options::default()).await;
    let large = "x".repeat(600 << 10);
    let run = gateway
        .start_job(json!({"service_type": "nobody", "payload": {"text": large}}))
        .await;
    let record = &gateway.records(&run).await[0];
    let shown = &record["effect"]["payload"]["payload"];
    assert_eq!(shown["$seq"], record["seq"]);
    assert!(shown["size_bytes"].as_u64().unwrap() > 600 << 10);
    let input = gateway
        .get(&format!("/api/gateway/runs/{run}/input_data"))
        .await
        .expect(200);
    assert_eq!(
        input["input_data"]["text"].as_str().unwrap().len(),
        large.len()
    );
}
