//! What appending does to the projections, and how lists, the inbox, replies, purges and snapshots read.

use rungate::domain::event::{CommandKind, Event};
use rungate::domain::ids::{Generation, PlaneId};
use rungate::ledger::{
    InboxState, Ledger, OpenOptions, RunFilter, RunStatus, Scope, Writer, record_json,
};
use tempfile::TempDir;

use crate::ledger_world::{START, append, job, queued, record, run_id, service, write_trace};

const ROOT: PlaneId = PlaneId::ROOT;

fn open() -> (TempDir, Ledger, Writer) {
    let directory = tempfile::tempdir().unwrap();
    let (ledger, writer) = Ledger::open(directory.path(), &OpenOptions::default()).unwrap();
    (directory, ledger, writer)
}

#[test]
fn a_run_is_summarised_through_its_life() {
    let (_directory, ledger, mut writer) = open();
    let run = run_id(1);
    let dispatched = |attempt| Event::JobDispatched {
        run,
        attempt,
        service: "svc".into(),
        generation: Generation(1),
        checkpoint: None,
    };
    let status = || ledger.run(ROOT, run).unwrap().unwrap().status;
    let registered = Event::ServiceRegistered {
        spec: Box::new(service("svc")),
    };
    append(
        &mut writer,
        [(registered, ""), (queued(run), "{}"), (dispatched(1), "")],
    );
    assert_eq!(status(), RunStatus::Running);
    assert_eq!(
        ledger.service("svc").unwrap().unwrap().active_runs,
        [(ROOT, run)]
    );
    let failed = Event::JobAttemptFailed {
        run,
        attempt: 1,
        code: "connect".into(),
        error: "refused".into(),
        retry_at: Some(START + 5),
    };
    append(&mut writer, [(failed, "")]);
    assert_eq!(status(), RunStatus::Backoff);
    assert!(
        ledger
            .service("svc")
            .unwrap()
            .unwrap()
            .active_runs
            .is_empty()
    );
    append(
        &mut writer,
        [
            (dispatched(2), ""),
            (Event::JobCompleted { run, attempt: 2 }, "[1]"),
        ],
    );
    let summary = ledger.run(ROOT, run).unwrap().unwrap();
    assert_eq!(summary.status, RunStatus::Completed);
    assert_eq!(
        (summary.attempt, summary.failures, summary.ledger_len),
        (2, 1, 5)
    );
    assert_eq!(summary.error, None);
    assert_eq!(
        ledger.payload(summary.result.unwrap()).unwrap().unwrap(),
        "[1]"
    );
    let cursors: Vec<_> = ledger
        .run_records(ROOT, run, 0, 100)
        .unwrap()
        .iter()
        .map(|r| r.cursor)
        .collect();
    assert_eq!(cursors, [1, 2, 3, 4, 5]);
    ledger.verify(&mut |_| {}).unwrap();
}

#[test]
fn a_batch_sees_its_own_writes_and_a_dropped_one_leaves_nothing() {
    let (_directory, ledger, mut writer) = open();
    let accepted = Event::CommandAccepted {
        command: "c".into(),
        run: Some(run_id(9)),
        run_text: run_id(9).to_string().into(),
        kind: CommandKind::Pause,
        client_id: None,
    };
    {
        let mut batch = writer.begin().unwrap();
        let appended = batch
            .append(&record(START, accepted.clone(), "{\"a\":1}"))
            .unwrap();
        assert_eq!(appended.cursor, 0, "an unknown run has no ledger");
        let entry = batch.inbox(ROOT, "c").unwrap().unwrap();
        assert_eq!(entry.state, InboxState::Accepted);
        assert_eq!(entry.payload_hash, *blake3::hash(b"{\"a\":1}").as_bytes());
        batch
            .put_idempotency(ROOT, "start", "k", [1; 32], b"reply")
            .unwrap();
        assert!(batch.idempotency(ROOT, "start", "k").unwrap().is_some());
        assert!(batch.idempotency(ROOT, "other", "k").unwrap().is_none());
    }
    assert_eq!(ledger.tail(), 0);
    assert!(ledger.command(ROOT, "c").unwrap().is_none());
    let mut batch = writer.begin().unwrap();
    batch.append(&record(START, accepted, "")).unwrap();
    let rejected = Event::CommandRejected {
        command: "c".into(),
        run: None,
        kind: CommandKind::Pause,
        code: "run_not_found".into(),
        reason: "no".into(),
    };
    batch.append(&record(START + 1, rejected, "")).unwrap();
    assert_eq!(batch.commit().unwrap(), 2);
    let entry = ledger.command(ROOT, "c").unwrap().unwrap();
    assert!(matches!(entry.state, InboxState::Rejected { .. }));
    assert_eq!((entry.seq, entry.decided_at), (1, Some(START + 1)));
    assert!(
        ledger.command(PlaneId(1), "c").unwrap().is_none(),
        "a foreign plane sees nothing"
    );
}

#[test]
fn lists_page_newest_first_by_time_status_and_session() {
    let (_directory, ledger, mut writer) = open();
    let mut batch = writer.begin().unwrap();
    for n in 0..500 {
        let session = (n % 5 == 0).then(|| "chat".into());
        let event = Event::JobQueued {
            run: run_id(n),
            spec: job(),
            session,
            labels: vec![],
            container: None,
        };
        batch.append(&record(START + n, event, "{}")).unwrap();
        if n % 3 == 0 {
            let event = Event::JobCancelled {
                run: run_id(n),
                reason: "r".into(),
            };
            batch.append(&record(START + n, event, "")).unwrap();
        }
    }
    batch.commit().unwrap();
    let all = |filter: &RunFilter| {
        let (mut found, mut before) = (Vec::new(), None);
        loop {
            let page = ledger.runs(ROOT, filter, before, 7).unwrap();
            found.extend(page.items.iter().map(|item| item.run));
            before = page.next;
            if before.is_none() {
                return found;
            }
        }
    };
    let expected = |keep: &dyn Fn(u64) -> bool| -> Vec<_> {
        (0..500).rev().filter(|n| keep(*n)).map(run_id).collect()
    };
    assert_eq!(all(&RunFilter::default()), expected(&|_| true));
    let cancelled = RunFilter {
        statuses: vec![RunStatus::Cancelled],
        ..RunFilter::default()
    };
    assert_eq!(all(&cancelled), expected(&|n| n % 3 == 0));
    let any = RunFilter {
        statuses: RunStatus::ALL.to_vec(),
        ..RunFilter::default()
    };
    assert_eq!(all(&any), expected(&|_| true));
    let chat = RunFilter {
        session: Some("chat".into()),
        ..cancelled
    };
    assert_eq!(all(&chat), expected(&|n| n % 15 == 0));
    let own = RunFilter {
        session: Some(run_id(7).to_string().into()),
        ..RunFilter::default()
    };
    assert_eq!(all(&own), [run_id(7)]);
    assert!(
        ledger
            .runs(PlaneId(1), &RunFilter::default(), None, 10)
            .unwrap()
            .items
            .is_empty()
    );
}

#[test]
fn a_purge_removes_the_payloads_and_tells_it_in_band() {
    let (_directory, ledger, mut writer) = open();
    let run = run_id(1);
    append(
        &mut writer,
        [
            (queued(run), "{\"secret\":\"hush\"}"),
            (queued(run_id(2)), "{\"other\":1}"),
            (Event::JobCompleted { run, attempt: 1 }, "{\"answer\":42}"),
        ],
    );
    let before: Vec<_> = ledger.records(Scope::All, 0, 10).unwrap();
    append(&mut writer, [(Event::RunPurged { run, records: 2 }, "")]);
    let after = ledger.records(Scope::All, 0, 10).unwrap();
    assert_eq!(before.len() + 1, after.len());
    for (old, new) in before.iter().zip(&after) {
        assert_eq!((old.seq, old.hash), (new.seq, new.hash));
        assert_eq!(new.purged, old.event.run() == Some(run));
    }
    assert_eq!(ledger.payload(1).unwrap(), None);
    assert_eq!(ledger.payload(2).unwrap().unwrap(), "{\"other\":1}");
    let json = record_json(&after[2], &Default::default());
    assert_eq!(json["purged"], true);
    assert_eq!(json["result"]["output"]["purged"], true);
    assert!(ledger.run(ROOT, run).unwrap().unwrap().purged);
    assert_eq!(ledger.verify(&mut |_| {}).unwrap().purged, 2);
}

#[test]
fn a_record_is_shown_in_the_contracts_shape() {
    let (_directory, ledger, mut writer) = open();
    let run = run_id(1);
    let dispatched = Event::JobDispatched {
        run,
        attempt: 1,
        service: "svc".into(),
        generation: Generation(1),
        checkpoint: None,
    };
    let saved = Event::CheckpointSaved {
        run,
        attempt: 1,
        content_type: "text/plain".into(),
        size_bytes: 2,
    };
    let big: &'static str = Box::leak(format!("\"{}\"", "z".repeat(300_000)).into_boxed_str());
    append(
        &mut writer,
        [
            (
                queued(run),
                "{ \"a b\" : [ 1.50, 1e400 ],\n \"q\\\"\" : \"x  y\" }",
            ),
            (dispatched, ""),
            (saved, "hi"),
            (Event::JobProgressed { run, attempt: 1 }, big),
            (Event::JobCompleted { run, attempt: 1 }, "{\"ok\":true}"),
        ],
    );
    let shown = ledger.run_records_json(ROOT, run, 0, 10).unwrap();
    let text = std::str::from_utf8(&shown[0].1).unwrap();
    assert!(
        text.contains(r#""payload":{"a b":[1.50,1e400],"q\"":"x  y"}"#),
        "{text}"
    );
    assert!(!text.contains('\n'));
    let json = |n: usize| serde_json::from_slice::<serde_json::Value>(&shown[n].1).unwrap();
    let (dispatched, completed) = (json(1), json(4));
    assert_eq!(dispatched["effect"]["type"], "job_dispatched");
    assert_eq!(dispatched["status"], "started");
    assert_eq!(dispatched["node_id"], "svc");
    assert_eq!(dispatched["step_id"], completed["step_id"]);
    assert_eq!(dispatched["session_id"], run.to_string());
    assert_eq!(completed["status"], "completed");
    assert_eq!(
        completed["result"],
        serde_json::json!({"completed": true, "output": {"ok": true}})
    );
    assert_eq!(completed["prev_hash"], json(3)["record_hash"]);
    let checkpoint = &json(2)["effect"]["payload"]["checkpoint"];
    assert_eq!(
        *checkpoint,
        serde_json::json!({"base64": "aGk=", "content_type": "text/plain"})
    );
    let progress = &json(3)["effect"]["payload"]["progress"];
    assert_eq!(
        *progress,
        serde_json::json!({"$seq": 4, "size_bytes": 300_002})
    );
}

#[test]
fn replay_shows_every_event_in_order() {
    let (_directory, ledger, mut writer) = open();
    write_trace(&mut writer, 5, 60, |_, _| {}).unwrap();
    let records = ledger.records(Scope::All, 0, usize::MAX).unwrap();
    let (mut next, tail) = (10, ledger.tail());
    let last = ledger
        .replay(10, |seq, at, plane, (event, _)| {
            next += 1;
            let record = &records[usize::try_from(seq).unwrap() - 1];
            assert_eq!(
                (seq, at, plane, &event),
                (next, record.at, record.plane, &record.event)
            );
        })
        .unwrap();
    assert_eq!((last, next), (tail, tail));
    assert_eq!(
        ledger
            .replay(tail, |_, _, _, _| panic!("nothing left"))
            .unwrap(),
        tail
    );
}

/// Flips a bit in every copy of a snapshot that is filled with one byte.
fn damage(directory: &std::path::Path, fill: u8) {
    let path = directory.join("ledger.redb");
    let mut bytes = std::fs::read(&path).unwrap();
    let (mut at, mut found) = (0, 0);
    while let Some(next) = bytes[at..]
        .windows(64)
        .position(|window| window == [fill; 64])
    {
        bytes[at + next + 32] ^= 1;
        at += next + 64;
        found += 1;
    }
    assert!(found > 0);
    std::fs::write(&path, bytes).unwrap();
}

#[test]
fn a_damaged_snapshot_falls_back_to_the_one_before() {
    let (directory, ledger, mut writer) = open();
    append(
        &mut writer,
        [
            (queued(run_id(1)), ""),
            (queued(run_id(2)), ""),
            (queued(run_id(3)), ""),
        ],
    );
    assert_eq!(ledger.load_snapshot().unwrap(), None);
    let image = |fill: u8| vec![fill; (2 << 20) + 77];
    for (seq, fill) in [(1, 0xA1), (2, 0xB2), (3, 0xC3)] {
        writer.save_snapshot(seq, &image(fill)).unwrap();
    }
    assert_eq!(ledger.load_snapshot().unwrap(), Some((3, image(0xC3))));
    drop((ledger, writer));
    let reopen = || Ledger::open(directory.path(), &OpenOptions::default()).unwrap();
    damage(directory.path(), 0xC3);
    let (ledger, writer) = reopen();
    assert_eq!(ledger.load_snapshot().unwrap(), Some((2, image(0xB2))));
    assert_eq!(ledger.verify(&mut |_| {}).unwrap().records, 3);
    drop((ledger, writer));
    damage(directory.path(), 0xB2);
    let (ledger, mut writer) = reopen();
    assert_eq!(ledger.load_snapshot().unwrap(), None, "only two are kept");
    writer.save_snapshot(3, b"again").unwrap();
    assert_eq!(
        ledger.load_snapshot().unwrap(),
        Some((3, b"again".to_vec()))
    );
}

#[test]
fn runs_are_counted_by_status_as_they_change() {
    let (_directory, ledger, mut writer) = open();
    let counted = || {
        let counts = ledger.runs_by_status().unwrap().into_iter();
        let counts = counts.filter(|(_, count)| *count > 0);
        counts
            .map(|(status, count)| (status.name(), count))
            .collect()
    };
    let scanned = || ledger.stats().unwrap().runs_by_status;
    write_trace(&mut writer, 5, 30, |_, _| {}).unwrap();
    assert_eq!(scanned(), counted(), "counted for the first time");
    write_trace(&mut writer, 6, 30, |_, _| {}).unwrap();
    assert_eq!(scanned(), counted(), "kept up");
    append(&mut writer, [(queued(run_id(9_999)), "{}")]);
    assert_eq!(scanned(), counted());
}

#[test]
fn idempotency_keys_are_forgotten_after_a_day_and_a_few_at_a_time() {
    let (_directory, _ledger, mut writer) = open();
    let day_ms = rungate::ledger::KEY_LIFE_MS;
    let (old, young) = (2_500, 100);
    let keep = |writer: &mut Writer, at, names: std::ops::Range<u64>| {
        let mut batch = writer.begin().unwrap();
        let event = queued(run_id(names.start));
        batch.append(&record(at, event, "{}")).unwrap();
        for name in names {
            let name = name.to_string();
            batch
                .put_idempotency(ROOT, "start", &name, [1; 32], b"r")
                .unwrap();
        }
        batch.commit().unwrap();
    };
    keep(&mut writer, START, 0..old);
    keep(&mut writer, START + 1_000, old..old + young);
    let kept = |writer: &mut Writer| {
        let batch = writer.begin().unwrap();
        let is_kept = |name: &u64| {
            let kept = batch.idempotency(ROOT, "start", &name.to_string()).unwrap();
            kept.is_some()
        };
        (0..old + young).filter(is_kept).count() as u64
    };
    let step = |writer: &mut Writer, now| {
        let mut batch = writer.begin().unwrap();
        let again = batch.expire_keys(now).unwrap();
        batch.commit().unwrap();
        again
    };
    step(&mut writer, START + day_ms);
    assert_eq!(kept(&mut writer), old + young, "a day is not over");
    let now = START + (day_ms + 1);
    let mut steps = 1;
    while step(&mut writer, now).is_zero() {
        steps += 1;
    }
    assert_eq!((steps, kept(&mut writer)), (3, young));
}

#[test]
fn a_run_that_names_another_runs_record_is_found() {
    let (directory, ledger, mut writer) = open();
    append(
        &mut writer,
        [(queued(run_id(1)), "{}"), (queued(run_id(2)), "{}")],
    );
    let seqs: Vec<u64> = (1..=2)
        .map(|n| ledger.run(ROOT, run_id(n)).unwrap().unwrap().payload)
        .collect();
    drop((ledger, writer));
    let swap = |from: u64, to: u64| {
        let database = redb::Database::open(directory.path().join("ledger.redb")).unwrap();
        let transaction = database.begin_write().unwrap();
        let runs = redb::TableDefinition::<&[u8], &[u8]>::new("runs");
        let mut table = transaction.open_table(runs).unwrap();
        let key = [&ROOT.0.to_be_bytes()[..], run_id(2).0.as_bytes()].concat();
        let kept = table.insert(&key[..], &to.to_be_bytes()[..]).unwrap();
        assert_eq!(kept.unwrap().value(), from.to_be_bytes());
        drop(table);
        transaction.commit().unwrap();
    };
    swap(seqs[1], seqs[0]);
    let (ledger, writer) = Ledger::open(directory.path(), &OpenOptions::default()).unwrap();
    ledger.verify(&mut |_| {}).unwrap_err();
    drop((ledger, writer));
    // One that queues nothing, as there is none.
    swap(seqs[0], 99);
    let (ledger, _writer) = Ledger::open(directory.path(), &OpenOptions::default()).unwrap();
    ledger.run(ROOT, run_id(2)).unwrap_err();
    ledger.verify(&mut |_| {}).unwrap_err();
}
