//! Purges: hidden at once, removed a share at a time, over crashes too, and the chain stays whole.

use std::io::Cursor;

use futures_util::future::join_all;
use reqwest::Method;
use rungate::coordinator::recover;
use rungate::domain::event::{CommandKind, Event};
use rungate::domain::ids::PlaneId;
use rungate::domain::record::NewRecord;
use rungate::domain::state::State;
use rungate::ledger::transfer::import;
use rungate::ledger::{Ledger, OpenOptions, RunFilter, Scope, Writer};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::isolation::call;
use crate::ledger_world::{START, queued, record, run_id};
use crate::support::wait::until;
use crate::support::{Gateway, Options};

const ROOT: PlaneId = PlaneId::ROOT;
const ANN: PlaneId = PlaneId(1);
const SECRET: &str = "{\"secret\":\"payload-canary-91b4\"}";

fn open(directory: &TempDir) -> (Ledger, Writer) {
    Ledger::open(directory.path(), &OpenOptions::default()).unwrap()
}

fn write(writer: &mut Writer, records: impl IntoIterator<Item = NewRecord>) {
    let mut batch = writer.begin().unwrap();
    for record in records {
        batch.append(&record).unwrap();
    }
    batch.commit().unwrap();
}

/// One share of what is left; `false` when nothing was.
fn purge_on(writer: &mut Writer) -> bool {
    let mut batch = writer.begin().unwrap();
    batch.purge_on().unwrap();
    batch.commit().unwrap();
    writer.is_purging()
}

fn export(ledger: &Ledger) -> Vec<u8> {
    let mut text = Vec::new();
    ledger.export(0, &mut text).unwrap();
    text
}

fn purged(ledger: &Ledger) -> u64 {
    ledger.verify(&mut |_| {}).unwrap().purged
}

/// That an import of an export is an equal ledger.
fn assert_moves(ledger: &Ledger, export: &[u8]) {
    let to = tempfile::tempdir().unwrap();
    import(&mut Cursor::new(export), to.path(), &OpenOptions::default()).unwrap();
    let copy = Ledger::open_read_only(to.path(), &OpenOptions::default()).unwrap();
    let all = |ledger: &Ledger| ledger.records(Scope::All, 0, usize::MAX).unwrap();
    assert_eq!(all(&copy), all(ledger));
    copy.verify(&mut |_| {}).unwrap();
    assert_eq!(self::export(&copy), export);
}

#[test]
fn a_large_run_is_hidden_at_once_and_removed_over_restarts() {
    let directory = tempfile::tempdir().unwrap();
    let (ledger, mut writer) = open(&directory);
    let run = run_id(1);
    let progressed = || Event::JobProgressed { run, attempt: 1 };
    let events = std::iter::once(queued(run))
        .chain(std::iter::repeat_with(progressed).take(2_498))
        .chain([Event::JobCompleted { run, attempt: 1 }]);
    write(
        &mut writer,
        events.map(|event| record(START, event, SECRET)),
    );
    write(&mut writer, [record(START, queued(run_id(2)), SECRET)]);
    let before = ledger.records(Scope::All, 0, usize::MAX).unwrap();
    let event = Event::RunPurged {
        run,
        records: 2_500,
    };
    write(&mut writer, [record(START, event, "")]);

    let hidden = ledger.records(Scope::All, 0, usize::MAX).unwrap();
    assert_eq!(hidden.iter().filter(|record| record.purged).count(), 2_500);
    assert!(
        hidden
            .iter()
            .zip(&before)
            .all(|(new, old)| new.hash == old.hash)
    );
    let own = ledger.run_records(ROOT, run, 0, usize::MAX).unwrap();
    assert!(own.iter().all(|record| record.payload.is_empty()));
    assert_eq!(ledger.payload(2_500).unwrap(), None);
    assert_eq!(ledger.payload(2_501).unwrap().unwrap(), SECRET);
    let first_export = export(&ledger);
    let done = purged(&ledger);
    assert!((1..2_500).contains(&done), "a share of it: {done}");

    drop((ledger, writer));
    let (ledger, mut writer) = open(&directory);
    let mut rounds = 0;
    while purge_on(&mut writer) {
        rounds += 1;
        assert!(purged(&ledger) > done);
    }
    assert!(rounds >= 2, "{rounds}");
    assert_eq!(purged(&ledger), 2_500);
    assert_eq!(ledger.records(Scope::All, 0, usize::MAX).unwrap(), hidden);
    assert!(
        export(&ledger) == first_export,
        "hidden and removed are exported alike"
    );
    assert_moves(&ledger, &first_export);
}

#[test]
fn a_purged_plane_leaves_its_records_without_payloads_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let (ledger, mut writer) = open(&directory);
    let of = |plane, event, payload| NewRecord {
        plane,
        ..record(START, event, payload)
    };
    let opened = |plane: PlaneId, runtime: &str| Event::PlaneOpened {
        plane,
        tenant: "default".into(),
        runtime: runtime.into(),
    };
    let runs = 2_100;
    let job = |n| match queued(run_id(n)) {
        Event::JobQueued { run, spec, .. } => Event::JobQueued {
            run,
            spec,
            session: (n % 2 == 0).then(|| "s".into()),
            labels: vec![],
            container: None,
        },
        other => other,
    };
    let ended = |n| Event::JobCompleted {
        run: run_id(n),
        attempt: 1,
    };
    let asked = Event::CommandAccepted {
        command: "c".into(),
        run: None,
        run_text: "nope".into(),
        kind: CommandKind::Pause,
        client_id: None,
    };
    let planes = [opened(ROOT, "default"), opened(ANN, "ann")];
    write(&mut writer, planes.map(|event| of(ROOT, event, "")));
    let plane = |n| if n % 100 == 0 { ROOT } else { ANN };
    write(
        &mut writer,
        (1..=runs).map(|n| of(plane(n), job(n), SECRET)),
    );
    write(
        &mut writer,
        (1..=runs).map(|n| of(plane(n), ended(n), SECRET)),
    );
    let mut batch = writer.begin().unwrap();
    batch.append(&of(ANN, asked, SECRET)).unwrap();
    batch
        .put_idempotency(ANN, "start", "k", [1; 32], b"reply")
        .unwrap();
    batch.commit().unwrap();
    write(
        &mut writer,
        [of(ROOT, Event::PlanePurged { plane: ANN }, "")],
    );

    let mut left = ledger.purge_left(ANN).unwrap().unwrap();
    assert_eq!((left.runs, left.records), (2_079, 4_158));
    let first_export = export(&ledger);
    let hidden = ledger.records(Scope::Plane(ANN), 0, usize::MAX).unwrap();
    assert!(hidden.iter().all(|record| record.payload.is_empty()));
    let mut rounds = 0;
    let (mut ledger, mut writer) = (ledger, writer);
    let counted = |ledger: &Ledger| -> u64 {
        let counts = ledger.runs_by_status().unwrap();
        counts.iter().map(|(_, count)| count).sum()
    };
    let mut before = counted(&ledger);
    while purge_on(&mut writer) {
        assert!(counted(&ledger) <= before);
        assert_eq!(counted(&ledger), ledger.stats().unwrap().runs);
        drop((ledger, writer));
        (ledger, writer) = open(&directory);
        before = counted(&ledger);
        ledger.verify(&mut |_| {}).unwrap();
        if let Some(now) = ledger.purge_left(ANN).unwrap() {
            assert!(now.runs <= left.runs && now.records <= left.records);
            left = now;
        }
        rounds += 1;
    }
    assert!(rounds > 5, "{rounds}");
    assert_eq!(ledger.purge_left(ANN).unwrap(), None);
    let list = |plane| {
        ledger
            .runs(plane, &RunFilter::default(), None, 500)
            .unwrap()
    };
    assert_eq!(list(ANN).items.len(), 0);
    assert_eq!(list(ROOT).items.len(), 21);
    assert_eq!(ledger.command(ANN, "c").unwrap(), None);
    assert_eq!(ledger.planes().unwrap().len(), 1);
    let batch = writer.begin().unwrap();
    assert_eq!(batch.idempotency(ANN, "start", "k").unwrap(), None);
    drop(batch);
    assert_eq!(purged(&ledger), 4_159);
    assert!(
        export(&ledger) == first_export,
        "hidden and removed are exported alike"
    );
    assert_moves(&ledger, &first_export);
}

const RESERVATIONS: &str = "/api/gateway/admin/runtime-reservations";

/// The one reservation there is.
async fn reservation(gateway: &Gateway) -> Value {
    let list = gateway.get(RESERVATIONS).await.expect(200);
    list["runtime_reservations"][0].clone()
}

#[tokio::test]
async fn a_purge_that_was_killed_goes_on_by_itself() {
    let mut gateway = Gateway::start(Options::default()).await;
    let users = "/api/gateway/admin/users";
    // An administrator's requests are not counted.
    let ann = json!({"user_id": "ann", "roles": ["admin"]});
    let made = gateway.post(users, ann.clone()).await.expect(200);
    let token = made["token"].as_str().unwrap().to_owned();
    let start = || async {
        let body = json!({"job": {"service_type": "t", "payload": {"x": SECRET}}});
        let path = "/api/gateway/runs/start";
        let started = call(&gateway, &token, Method::POST, path, Some(body)).await;
        started.expect(200);
    };
    let runs = 3_000;
    for _ in 0..runs / 100 {
        join_all(std::iter::repeat_with(start).take(100)).await;
    }
    gateway.delete(&format!("{users}/ann")).await.expect(200);

    let purge = format!("{RESERVATIONS}/ann/purge");
    let confirm = json!({"confirm_runtime_id": "ann"});
    let asked = gateway.request(Method::POST, &purge).json(&confirm).send();
    let asked = tokio::spawn(asked);
    until("a part of it is removed", || async {
        reservation(&gateway).await["runs_left"]
            .as_u64()
            .is_some_and(|left| left < runs)
    })
    .await;
    gateway.kill();
    let _ = asked.await;
    gateway.launch().await;
    until("the runtime is forgotten", || async {
        reservation(&gateway).await == Value::Null
    })
    .await;
    let again = gateway.post(&purge, confirm).await.expect(404);
    assert_eq!(again["code"], "runtime_not_found");
    let export = gateway.get("/api/gateway/ledger/export").await.text;
    for line in export.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let of_ann = line["plane"] == 1 && line["payload_size_bytes"] != 0;
        assert_eq!(line["purged"] == true, of_ann, "{line}");
    }
    // The next of that name has another plane.
    let next = gateway.post(users, ann).await.expect(200);
    let token = next["token"].as_str().unwrap();
    let path = "/api/gateway/runs";
    let list = call(&gateway, token, Method::GET, path, None)
        .await
        .expect(200);
    assert_eq!(list["items"], json!([]));
    gateway.stop().await;

    let (ledger, _writer) = Ledger::open(&gateway.data_dir(), &OpenOptions::default()).unwrap();
    ledger.verify(&mut |_| {}).unwrap();
    assert_eq!(ledger.stats().unwrap().runs, 0);
    let mut replayed = State::new(0);
    let fold = |seq, at, plane, (event, payload_bytes): (Event, u64)| {
        replayed.fold(seq, at, plane, (&event, payload_bytes));
    };
    ledger.replay(0, fold).unwrap();
    assert!(recover(&ledger, 0).unwrap() == replayed);
    assert!(replayed.planes.keys().eq(&[ROOT, PlaneId(2)]));
}
