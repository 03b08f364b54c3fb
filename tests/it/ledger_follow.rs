//! Following: no gap, no repeat, whatever the follower and the writer do.

use std::sync::Arc;

use rungate::domain::event::Event;
use rungate::domain::ids::PlaneId;
use rungate::ledger::{Frame, Ledger, OpenOptions, Topic, Writer};
use tempfile::TempDir;

use crate::ledger_world::{Rng, START, Trace, append, queued, record, run_id};

const ROOT: PlaneId = PlaneId::ROOT;

fn open() -> (TempDir, Ledger, Writer) {
    let directory = tempfile::tempdir().unwrap();
    let (ledger, writer) = Ledger::open(directory.path(), &OpenOptions::default()).unwrap();
    (directory, ledger, writer)
}

fn progress(writer: &mut Writer, count: u64) {
    let mut batch = writer.begin().unwrap();
    for _ in 0..count {
        let event = Event::JobProgressed {
            run: run_id(1),
            attempt: 1,
        };
        batch.append(&record(START, event, "{\"p\":1}")).unwrap();
    }
    batch.commit().unwrap();
}

/// Writes on a thread of its own until the ledger has `target` records.
fn write_on(mut writer: Writer, target: u64) -> std::thread::JoinHandle<Writer> {
    std::thread::spawn(move || {
        let mut rng = Rng(3);
        let mut tail = 0;
        while tail < target {
            let mut batch = writer.begin().unwrap();
            for _ in 0..1 + rng.below(20) {
                let event = Event::JobProgressed {
                    run: run_id(1),
                    attempt: 1,
                };
                let payload = if rng.chance(2) {
                    "z".repeat(70_000)
                } else {
                    "{}".to_owned()
                };
                batch.append(&record(START, event, &payload)).unwrap();
            }
            tail = batch.commit().unwrap();
        }
        writer
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_forced_disconnects_leave_no_gap_and_no_repeat() {
    let (_directory, ledger, mut writer) = open();
    append(&mut writer, [(queued(run_id(1)), "{}")]);
    let target = 4_000;
    let thread = write_on(writer, target);
    let seed = 42;
    let mut rng = Rng(seed);
    let topic = Topic::Run {
        plane: ROOT,
        run: run_id(1),
    };
    let (mut cursor, mut disconnects) = (0, 0);
    while cursor < target {
        let mut follower = ledger.follow(topic, cursor);
        let most = 1 + rng.below(2 * target / 1_000);
        for _ in 0..most {
            let frame = follower.next().await.unwrap();
            cursor += 1;
            assert_eq!(
                frame.cursor, cursor,
                "seed {seed}, disconnect {disconnects}"
            );
            if cursor >= target {
                break;
            }
        }
        disconnects += 1;
    }
    assert!(disconnects >= 600, "{disconnects}");
    // The rest at random cursors of what is there now.
    while disconnects < 1_000 {
        let after = rng.below(target - 1);
        let mut follower = ledger.follow(topic, after);
        for expected in after + 1..=(after + 3).min(target) {
            assert_eq!(
                follower.next().await.unwrap().cursor,
                expected,
                "seed {seed}"
            );
        }
        disconnects += 1;
    }
    thread.join().unwrap();
    assert_eq!(ledger.followers(), 0);
}

#[tokio::test]
async fn who_comes_while_a_batch_is_made_misses_nothing_of_it() {
    let (_directory, ledger, mut writer) = open();
    append(&mut writer, [(queued(run_id(1)), "{}")]);
    let topic = Topic::Run {
        plane: ROOT,
        run: run_id(1),
    };
    // Nobody follows as the batch is begun, so its records are kept for nobody.
    let mut batch = writer.begin().unwrap();
    let event = Event::JobProgressed {
        run: run_id(1),
        attempt: 1,
    };
    batch.append(&record(START, event, "{}")).unwrap();
    let mut follower = ledger.follow(topic, 0);
    assert_eq!(follower.next().await.unwrap().cursor, 1);
    // It has read what is on disk, and waits by now.
    let waits = tokio::time::timeout(std::time::Duration::from_millis(50), follower.next());
    assert!(waits.await.is_err());
    batch.commit().unwrap();
    let patience = std::time::Duration::from_secs(30);
    let next = tokio::time::timeout(patience, follower.next()).await;
    assert_eq!(next.unwrap().unwrap().cursor, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_follower_goes_to_disk_and_misses_nothing() {
    let (_directory, ledger, mut writer) = open();
    append(&mut writer, [(queued(run_id(1)), "{}")]);
    let topics = [
        Topic::Run {
            plane: ROOT,
            run: run_id(1),
        },
        Topic::Plane(ROOT),
        Topic::All,
    ];
    let mut followers: Vec<_> = topics.map(|topic| ledger.follow(topic, 0)).into();
    for follower in &mut followers {
        assert_eq!(follower.next().await.unwrap().seq, 1);
    }
    // Far more than a ring holds, in batches beyond the publisher's queue.
    for _ in 0..40 {
        progress(&mut writer, 50);
    }
    for follower in &mut followers {
        for expected in 2..=2_001 {
            assert_eq!(follower.next().await.unwrap().seq, expected);
        }
    }
    progress(&mut writer, 1);
    for follower in &mut followers {
        assert_eq!(follower.next().await.unwrap().seq, 2_002);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_too_large_for_the_ring_arrives_from_disk() {
    let (_directory, ledger, mut writer) = open();
    append(&mut writer, [(queued(run_id(1)), "{}")]);
    let mut follower = ledger.follow(Topic::Plane(ROOT), 1);
    let waiting = tokio::spawn(async move {
        let first = follower.next().await.unwrap();
        let second = follower.next().await.unwrap();
        (first.seq, second.seq)
    });
    let large: &'static str = Box::leak(format!("\"{}\"", "z".repeat(200_000)).into_boxed_str());
    let event = || Event::JobProgressed {
        run: run_id(1),
        attempt: 1,
    };
    append(&mut writer, [(event(), large), (event(), "{}")]);
    assert_eq!(waiting.await.unwrap(), (2, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_of_a_plane_sees_that_plane_only() {
    let (_directory, ledger, mut writer) = open();
    let mut follower = ledger.follow(Topic::Plane(PlaneId(1)), 0);
    let mut batch = writer.begin().unwrap();
    for n in 0..600 {
        let mut queued = record(START, queued(run_id(n)), "{}");
        queued.plane = PlaneId(u32::try_from(n % 3).unwrap());
        batch.append(&queued).unwrap();
    }
    batch.commit().unwrap();
    for n in 0..200 {
        assert_eq!(follower.next().await.unwrap().seq, 3 * n + 2);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_are_rendered_once_and_shared() {
    let (_directory, ledger, mut writer) = open();
    append(&mut writer, [(queued(run_id(1)), "{}")]);
    let topic = Topic::Run {
        plane: ROOT,
        run: run_id(1),
    };
    let mut tasks = Vec::new();
    let (ready, mut is_ready) = tokio::sync::mpsc::unbounded_channel();
    for _ in 0..50 {
        let (mut follower, ready) = (ledger.follow(topic, 0), ready.clone());
        tasks.push(tokio::spawn(async move {
            follower.next().await.unwrap();
            // The end of the disk is seen by polling once more; only then is it on the ring.
            let next = follower.next();
            tokio::pin!(next);
            let _ = futures_util::FutureExt::now_or_never(&mut next);
            ready.send(()).unwrap();
            next.await.unwrap()
        }));
    }
    for _ in 0..50 {
        is_ready.recv().await.unwrap();
    }
    append(
        &mut writer,
        [(
            Event::JobCompleted {
                run: run_id(1),
                attempt: 1,
            },
            "{\"ok\":1}",
        )],
    );
    let mut frames: Vec<Arc<Frame>> = Vec::new();
    for task in tasks {
        frames.push(task.await.unwrap());
    }
    let text = std::str::from_utf8(&frames[0].sse).unwrap();
    assert!(text.starts_with("id: 2\nevent: step\ndata: {\"cursor\":2,\"record\":{\"cursor\":2,"));
    assert!(
        text.ends_with("}}\n\n") && text.lines().count() == 4,
        "{text}"
    );
    assert!(
        frames
            .iter()
            .all(|frame| frame.ends_run && frame.sse == frames[0].sse)
    );
    let end = frames[0].json.as_ptr_range();
    assert!(
        frames[0].sse.as_ptr_range().contains(&end.start),
        "json is a part of sse"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_the_whole_ledger_equals_its_records() {
    let (_directory, ledger, mut writer) = open();
    let mut follower = ledger.follow(Topic::All, 0);
    let mut writing = tokio::task::spawn_blocking(move || {
        let mut trace = Trace::new(8);
        let mut tail = 0;
        for _ in 0..200 {
            let mut batch = writer.begin().unwrap();
            for record in trace.batch() {
                batch.append(&record).unwrap();
            }
            tail = batch.commit().unwrap();
        }
        tail
    });
    let (mut seen, mut tail) = (Vec::new(), None);
    while tail.is_none_or(|tail| (seen.len() as u64) < tail) {
        tokio::select! {
            frame = follower.next() => seen.push(frame.unwrap().json.clone()),
            written = &mut writing, if tail.is_none() => tail = Some(written.unwrap()),
        }
    }
    assert_eq!(Some(seen.len() as u64), tail);
    for (index, json) in seen.iter().enumerate() {
        let record: serde_json::Value = serde_json::from_slice(json).unwrap();
        assert_eq!(record["seq"], index as u64 + 1);
    }
}
