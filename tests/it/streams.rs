//! Streams as a browser reads them: reconnected at any point they show every record once and in order; they beat,
//! they end with their run or with the gateway, and a slow reader costs nobody else anything.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::scripted::Scripted;
use crate::support::sse::{Event, EventSource};
use crate::support::wait::until;
use crate::support::{Gateway, Options};

/// Connections that are cut.
const DISCONNECTS: usize = 1_000;

/// Points of cutting that are the same in each run of the test.
struct Points(u64);

impl Points {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) as usize % bound
    }
}

/// A gateway with a job that runs until it is released.
async fn with_running_job() -> (Gateway, Scripted, String) {
    let gateway = Gateway::start(Options::default()).await;
    let scripted = Scripted::start().await;
    gateway.register(scripted.service("s", "s")).await;
    let run = gateway
        .start_job(json!({"service_type": "s", "payload": {"hold": true}}))
        .await;
    gateway.job_becomes(&run, "running").await;
    (gateway, scripted, run)
}

async fn push(gateway: &Gateway, run: &str, progress: Value) {
    gateway
        .post(&format!("/queue/{run}/progress"), progress)
        .await
        .expect(200);
}

fn record(event: &Event) -> Value {
    let data: Value = serde_json::from_str(&event.data).expect("JSON");
    data["record"].clone()
}

async fn open(gateway: &Gateway, path: &str, last_id: &str) -> EventSource {
    EventSource::open(gateway.request(Method::GET, path), last_id).await
}

#[tokio::test]
async fn a_thousand_cut_connections_lose_and_repeat_nothing() {
    let (gateway, scripted, run) = with_running_job().await;
    let stream = format!("/api/gateway/runs/{run}/ledger/stream?after=0");
    let ended = Arc::new(AtomicBool::new(false));
    let appending = async {
        let mut number = 0;
        while !ended.load(Ordering::SeqCst) {
            number += 1;
            push(
                &gateway,
                &run,
                json!({"n": number, "text": "x".repeat(number % 700)}),
            )
            .await;
        }
        scripted.release();
    };
    let reading = async {
        let (mut points, mut last_id, mut seen) = (Points(7), String::new(), Vec::new());
        for _ in 0..DISCONNECTS {
            let mut source = open(&gateway, &stream, &last_id).await;
            // Anywhere: before the first byte, within an id, within the data, between two events.
            source.budget = Some(points.below(4_000));
            while let Some(event) = source.next().await {
                assert_eq!(event.name, "step");
                seen.push(event);
            }
            last_id.clone_from(&source.last_id);
        }
        ended.store(true, Ordering::SeqCst);
        let mut source = open(&gateway, &stream, &last_id).await;
        while let Some(event) = source.next().await {
            seen.push(event);
        }
        seen
    };
    let (seen, ()) = tokio::join!(reading, appending);
    let (done, steps) = seen.split_last().expect("events");
    assert_eq!(done.name, "done");
    let ids: Vec<u64> = steps.iter().map(|step| step.id.parse().unwrap()).collect();
    assert!(ids.len() > 100, "{}", ids.len());
    assert_eq!(ids, (1..=ids.len() as u64).collect::<Vec<_>>());
    // What was streamed is what can be read.
    let mut read: Vec<Value> = Vec::new();
    loop {
        let path = format!(
            "/api/gateway/runs/{run}/ledger?after={}&limit=2000",
            read.len()
        );
        let page = gateway.get(&path).await.expect(200);
        let items = page["items"].as_array().unwrap().clone();
        if items.is_empty() {
            break;
        }
        read.extend(items);
    }
    assert_eq!(steps.iter().map(record).collect::<Vec<_>>(), read);
}

#[tokio::test]
async fn the_gateways_stream_survives_cuts_too() {
    let (gateway, scripted, run) = with_running_job().await;
    let (mut points, mut last_id, mut seqs) = (Points(3), String::new(), Vec::new());
    for round in 0..100 {
        push(&gateway, &run, json!({"round": round})).await;
        let path = if round % 2 == 0 {
            "/api/gateway/ledger/stream"
        } else {
            "/api/gateway/plane/ledger/stream"
        };
        // The plane's stream has not the gateway's own records: only from here on are both the same.
        let mut source = open(&gateway, path, &last_id).await;
        source.budget = Some(points.below(3_000));
        while let Some(event) = source.next().await {
            seqs.push((
                event.id.parse::<u64>().unwrap(),
                record(&event)["seq"].as_u64().unwrap(),
            ));
            if event.id.parse::<u64>().unwrap() == gateway.tail().await {
                break;
            }
        }
        last_id.clone_from(&source.last_id);
    }
    scripted.release();
    assert!(seqs.iter().all(|(id, seq)| id == seq));
    assert!(
        seqs.windows(2).all(|pair| pair[1].0 > pair[0].0),
        "{seqs:?}"
    );
    let tail = gateway.tail().await;
    let mut whole = open(&gateway, "/api/gateway/ledger/stream", "").await;
    for seq in 1..=tail {
        let event = whole.next().await.expect("it goes on");
        assert_eq!(event.id, seq.to_string());
    }
}

#[tokio::test]
async fn a_stream_ends_with_its_run() {
    let (gateway, scripted, run) = with_running_job().await;
    let path = format!("/api/gateway/runs/{run}/ledger/stream");
    let mut source = open(&gateway, &path, "").await;
    assert_eq!(source.next().await.unwrap().name, "step");
    assert_eq!(source.retry_ms, Some(1_000));
    scripted.release();
    let mut last = None;
    while let Some(event) = source.next().await {
        last = Some(event);
    }
    let last = last.unwrap();
    let len = gateway.run(&run).await["ledger_len"].clone();
    assert_eq!(last.name, "done");
    let data: Value = serde_json::from_str(&last.data).unwrap();
    assert_eq!(
        data,
        json!({"run_id": run, "cursor": len, "status": "terminal"})
    );
    // `done` has no id of its own: a reconnection asks for what it had, and is told again.
    assert_eq!(source.last_id, len.to_string());
    let mut again = open(&gateway, &path, &source.last_id).await;
    assert_eq!(again.next().await.unwrap().name, "done");
    assert_eq!(again.next().await, None);
    // A retried run goes on behind its end.
    gateway.command("r", &run, "retry", json!({})).await;
    gateway.run_becomes(&run, "completed").await;
    let mut again = open(&gateway, &path, &source.last_id).await;
    let next = again.next().await.unwrap();
    assert_eq!(next.id, (len.as_u64().unwrap() + 1).to_string());
}

#[tokio::test]
async fn silence_is_filled_with_comments() {
    let gateway = Gateway::start(Options::default()).await;
    let run = gateway
        .start_job(json!({"service_type": "nobody", "payload": {}}))
        .await;
    let path = format!("/api/gateway/runs/{run}/ledger/stream?heartbeat_s=0.15");
    let mut source = open(&gateway, &path, "").await;
    assert_eq!(source.next().await.unwrap().id, "1");
    let wait = tokio::time::sleep(std::time::Duration::from_secs(20));
    tokio::pin!(wait);
    // `next` gives events only: the comments are counted on the way, until the cancellation comes.
    let cancel = async {
        let since = std::time::Instant::now();
        until("some heartbeats' time has gone by", || async {
            since.elapsed().as_millis() > 600
        })
        .await;
        gateway.command("c", &run, "cancel", json!({})).await;
    };
    let read = async {
        loop {
            tokio::select! {
                event = source.next() => match event {
                    Some(event) if event.name == "done" => return,
                    Some(_) => {}
                    None => panic!("it ended without done"),
                },
                () = &mut wait => panic!("it never ended"),
            }
        }
    };
    tokio::join!(cancel, read);
    assert!(source.comments >= 2, "{}", source.comments);
}

#[tokio::test]
async fn a_position_beyond_the_end_is_told_and_one_that_is_none_is_passed_over() {
    let (gateway, scripted, run) = with_running_job().await;
    let path = format!("/api/gateway/runs/{run}/ledger/stream");
    let len = gateway.run(&run).await["ledger_len"].as_u64().unwrap();
    for beyond in [len + 1, 1_000_000, u64::MAX] {
        let mut source = open(&gateway, &format!("{path}?after={beyond}"), "").await;
        let gap = source.next().await.unwrap();
        assert_eq!(gap.name, "gap");
        assert!(
            gap.data.contains(&beyond.to_string()) && gap.data.contains(&len.to_string()),
            "{}",
            gap.data
        );
        drop(source);
    }
    let mut source = open(&gateway, &path, &u64::MAX.to_string()).await;
    assert_eq!(source.next().await.unwrap().name, "gap");
    push(&gateway, &run, json!({"n": 1})).await;
    assert_eq!(source.next().await.unwrap().id, (len + 1).to_string());
    for junk in ["junk", "-1", "1.5", "99999999999999999999", "0x1", "\u{e9}"] {
        let mut source = open(&gateway, &path, junk).await;
        assert_eq!(source.next().await.unwrap().id, "1", "{junk}");
    }
    // The larger of both positions counts: a browser sends its first address again.
    let mut source = open(&gateway, &format!("{path}?after=1"), "2").await;
    assert_eq!(source.next().await.unwrap().id, "3");
    scripted.release();
}

#[tokio::test]
async fn purged_records_are_told_as_purged() {
    let gateway = Gateway::start(Options::default()).await;
    let run = gateway
        .start_job(json!({"service_type": "nobody", "payload": {"secret": "s3cr3t"}}))
        .await;
    gateway.command("c", &run, "cancel", json!({})).await;
    gateway
        .post(&format!("/api/gateway/runs/{run}/purge"), json!({}))
        .await
        .expect(200);
    let mut source = open(
        &gateway,
        &format!("/api/gateway/runs/{run}/ledger/stream"),
        "",
    )
    .await;
    let first = source.next().await.unwrap();
    assert_eq!(record(&first)["purged"], true);
    assert!(!first.data.contains("s3cr3t"));
    let mut names = Vec::new();
    while let Some(event) = source.next().await {
        names.push(event.name);
    }
    assert_eq!(names.last().map(String::as_str), Some("done"));
}

#[tokio::test]
async fn streams_end_in_good_order_with_the_gateway_and_go_on_with_the_next() {
    let (mut gateway, _scripted, run) = with_running_job().await;
    let path = format!("/api/gateway/runs/{run}/ledger/stream");
    let mut of_run = open(&gateway, &path, "").await;
    let mut of_all = open(&gateway, "/api/gateway/ledger/stream", "").await;
    let mut of_log = open(&gateway, "/services/s/logs?follow=true", "").await;
    let first = of_run.next().await.unwrap();
    of_all.next().await.unwrap();
    gateway.command("c", &run, "cancel", json!({})).await;
    let run = gateway
        .start_job(json!({"service_type": "nobody", "payload": {}}))
        .await;
    let path = format!("/api/gateway/runs/{run}/ledger/stream");
    let mut waiting = open(&gateway, &path, "").await;
    waiting.next().await.unwrap();
    let drain = async {
        while of_run.next().await.is_some() {}
        while of_all.next().await.is_some() {}
        while waiting.next().await.is_some() {}
        assert_eq!(of_log.next().await, None);
    };
    let (status, ()) = tokio::join!(gateway.stop(), drain);
    assert!(status.success());
    assert_eq!(first.id, "1");
    assert_eq!(waiting.retry_ms, Some(1_000));
    gateway.launch().await;
    let mut again = open(&gateway, &path, &waiting.last_id).await;
    gateway.command("c2", &run, "cancel", json!({})).await;
    let next = again.next().await.unwrap();
    assert_eq!(next.id, "2", "no gap across the restart");
    let seen: u64 = of_all.last_id.parse().unwrap();
    let mut again = open(&gateway, "/api/gateway/ledger/stream", &of_all.last_id).await;
    assert_eq!(again.next().await.unwrap().id, (seen + 1).to_string());
}

/// Resident memory of the gateway's process in KiB.
fn resident_kib(gateway: &Gateway) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.pid())).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .expect("a size");
    line.split_whitespace()
        .nth(1)
        .and_then(|kib| kib.parse().ok())
        .expect("a number")
}

#[tokio::test]
async fn readers_that_stand_still_cost_little_and_miss_nothing() {
    const READERS: usize = 8;
    const RECORDS: usize = 400;
    const RECORD_BYTES: usize = 50_000;
    let (gateway, scripted, run) = with_running_job().await;
    push(&gateway, &run, json!({"warm": "x".repeat(RECORD_BYTES)})).await;
    let request = format!(
        "GET /api/gateway/runs/{run}/ledger/stream HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\n\r\n",
        gateway.addr(),
        gateway.token(),
    );
    let mut readers = Vec::new();
    for _ in 0..READERS {
        let mut stream = tokio::net::TcpStream::connect(gateway.addr())
            .await
            .unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        // The answer has begun; from now on nothing is taken.
        let mut first = [0; 64];
        stream.read_exact(&mut first).await.unwrap();
        readers.push(stream);
    }
    let before = resident_kib(&gateway);
    for batch in 0..RECORDS / 16 {
        let pushes = (0..16).map(|n| {
            let progress = json!({"n": batch * 16 + n, "text": "y".repeat(RECORD_BYTES)});
            push(&gateway, &run, progress)
        });
        futures_util::future::join_all(pushes).await;
    }
    let grown = resident_kib(&gateway).saturating_sub(before);
    // Kept for each reader it would be 160 MB.
    assert!(
        grown < 100 << 10,
        "{grown} KiB for {READERS} readers that stand still"
    );
    scripted.release();
    gateway.run_becomes(&run, "completed").await;
    let len = gateway.run(&run).await["ledger_len"].as_u64().unwrap();
    let mut text = Vec::new();
    readers[0].read_to_end(&mut text).await.ok();
    let text = String::from_utf8_lossy(&text);
    let ids: Vec<u64> = text
        .lines()
        .filter_map(|line| line.strip_prefix("id: ")?.trim().parse().ok())
        .collect();
    assert!(ids.windows(2).all(|pair| pair[1] == pair[0] + 1));
    assert_eq!(ids.last(), Some(&len));
    drop(readers);
    until("nobody follows any more", || async {
        let metrics = gateway.get("/metrics").await.text;
        metrics
            .lines()
            .any(|line| line == "rungate_ledger_followers 0")
    })
    .await;
}

#[tokio::test]
async fn there_is_a_bound_on_streams_and_leaving_makes_room() {
    let gateway = Gateway::start(Options::default().set("RUNGATE_MAX_STREAMS", "2")).await;
    let path = "/api/gateway/ledger/stream";
    let one = open(&gateway, path, "").await;
    let _two = open(&gateway, path, "").await;
    let refused = gateway.get(path).await;
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(refused.expect(429)["code"], "too_many_streams");
    drop(one);
    until("there is room again", || async {
        let again = gateway.request(Method::GET, path).send().await.unwrap();
        again.status() == 200
    })
    .await;
}

#[tokio::test]
async fn two_hundred_followers_get_each_record() {
    let (gateway, scripted, run) = with_running_job().await;
    let path = format!("/api/gateway/runs/{run}/ledger/stream");
    let len = gateway.run(&run).await["ledger_len"].as_u64().unwrap();
    let follow = |gateway: &Gateway| {
        let request = gateway.request(Method::GET, &path);
        async move {
            let mut source = EventSource::open(request, &len.to_string()).await;
            let mut ids = Vec::new();
            while let Some(event) = source.next().await {
                ids.push((event.name, event.id));
            }
            ids
        }
    };
    let followers: Vec<_> = (0..200).map(|_| tokio::spawn(follow(&gateway))).collect();
    for n in 0..20 {
        push(&gateway, &run, json!({"n": n})).await;
    }
    scripted.release();
    let mut all = Vec::new();
    for follower in followers {
        all.push(follower.await.unwrap());
    }
    assert!(all.iter().all(|ids| *ids == all[0]));
    assert_eq!(
        all[0].len(),
        22,
        "20 steps of progress, the completion, done"
    );
}
