//! The output of services: bounded, readable from its end, followed across a cut.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use futures_util::{Stream, StreamExt};
use rungate::domain::ids::ServiceName;
use rungate::driver::{LogLine, Logs};

use crate::world::{PATIENCE, World, service, until};

async fn next(
    stream: &mut (impl Stream<Item = Result<LogLine, rungate::driver::LogError>> + Unpin),
) -> LogLine {
    tokio::time::timeout(PATIENCE, stream.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap()
}

fn line(text: impl Into<String>) -> LogLine {
    LogLine::Text(text.into())
}

fn append(dir: &Path, text: &str) {
    let mut file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(dir.join("worker.log"))
        .unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

#[tokio::test]
async fn a_services_output_is_read_and_followed_while_the_gateway_changes() {
    let mut world = World::new();
    let base = world.started(world.worker(""), 1).await;
    let logs = world.driver.logs().clone();
    until("its first line", || {
        fs::read_to_string(world.dir.path().join("logs/worker.log"))
            .is_ok_and(|text| text.ends_with('\n'))
    })
    .await;
    assert_eq!(logs.tail(&service(), 10).await.unwrap(), ["ready"]);
    let mode = fs::metadata(world.dir.path().join("logs/worker.log"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut following = Box::pin(logs.follow(&service(), 10));
    assert_eq!(next(&mut following).await, line("ready"));
    let client = reqwest::Client::new();
    client
        .post(format!("{base}/say"))
        .body("one")
        .send()
        .await
        .unwrap();
    assert_eq!(next(&mut following).await, line("one"));
    world.restart().await;
    client
        .post(format!("{base}/say"))
        .body("two")
        .send()
        .await
        .unwrap();
    assert_eq!(
        next(&mut following).await,
        line("two"),
        "it outlives the gateway"
    );
    logs.cut_large(1);
    client
        .post(format!("{base}/say"))
        .body("three")
        .send()
        .await
        .unwrap();
    assert_eq!(
        next(&mut following).await,
        line("three"),
        "it goes on writing to the same file"
    );
    world.stop(1, 20_000);
    world.recorder.released(1).await;
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_cut_log_is_followed_without_a_gap() {
    let dir = tempfile::tempdir().unwrap();
    let logs = Logs::new(dir.path().into());
    append(dir.path(), "0\n");
    let mut following = Box::pin(logs.follow(&service(), 1));
    assert_eq!(next(&mut following).await, line("0"));
    for round in 0..20 {
        append(dir.path(), &format!("{round} before\n{round} half"));
        if round % 2 == 0 {
            logs.cut_large(10);
        }
        append(dir.path(), " after\n");
        assert_eq!(next(&mut following).await, line(format!("{round} before")));
        assert_eq!(
            next(&mut following).await,
            line(format!("{round} half after"))
        );
    }
}

#[tokio::test]
async fn a_log_stays_within_its_bound_and_its_end_is_read_across_the_cut() {
    let dir = tempfile::tempdir().unwrap();
    let logs = Logs::new(dir.path().into());
    append(dir.path(), "first\n");
    let mut following = Box::pin(logs.follow(&service(), 1));
    assert_eq!(next(&mut following).await, line("first"));
    for number in 0..1_000 {
        append(dir.path(), &format!("line {number}\n"));
        logs.cut_large(100);
    }
    for name in ["worker.log", "worker.log.1"] {
        assert!(
            fs::metadata(dir.path().join(name)).unwrap().len() <= 220,
            "{name}"
        );
    }
    let last = logs.tail(&service(), 12).await.unwrap();
    let expected: Vec<String> = (988..1_000)
        .map(|number| format!("line {number}"))
        .collect();
    assert_eq!(last, expected);
    assert!(matches!(next(&mut following).await, LogLine::Dropped { bytes } if bytes > 8_000));
}

#[tokio::test]
async fn odd_logs_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let logs = Logs::new(dir.path().into());
    assert!(
        logs.tail(&service(), 5).await.unwrap().is_empty(),
        "none was ever written"
    );
    fs::write(dir.path().join("worker.log"), b"caf\xe9\r\n\nunfinished").unwrap();
    assert_eq!(
        logs.tail(&service(), 5).await.unwrap(),
        ["caf\u{fffd}", "", "unfinished"]
    );
    fs::write(dir.path().join("worker.log"), vec![b'x'; 200_000]).unwrap();
    let pieces = logs.tail(&service(), 5).await.unwrap();
    assert_eq!(pieces.iter().map(String::len).sum::<usize>(), 200_000);
    for name in ["../../etc/passwd", "", ".hidden", "a/b", "a\0b"] {
        let error = logs.tail(&ServiceName::new(name), 5).await.unwrap_err();
        assert!(
            error.to_string().ends_with("is no service's name"),
            "{error}"
        );
    }
}
