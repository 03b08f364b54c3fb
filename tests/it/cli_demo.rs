//! `rungate demo` from beginning to end on the real binary: the verdict, the texts given, and that it
//! leaves neither processes nor files behind.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::Value;

use crate::rungate::{run, rungate};

/// Processes whose environment names `dir`: the demo's services have it in theirs.
fn processes_of(dir: &Path) -> usize {
    let dir = dir.display().to_string();
    let environments = std::fs::read_dir("/proc").unwrap().flatten();
    environments
        .filter_map(|entry| std::fs::read(entry.path().join("environ")).ok())
        .filter(|environment| String::from_utf8_lossy(environment).contains(&dir))
        .count()
}

fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).unwrap().next().is_none()
}

#[test]
fn the_demo_loses_nothing_and_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let mut command = rungate(home.path(), &["demo", "--json"]);
    command.env("TMPDIR", temporary.path());
    let (code, out, err) = run(command);
    let verdict: Value = serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{err}"));
    assert_eq!((code, &verdict["ok"]), (0, &true.into()), "{verdict}{err}");
    assert_eq!(verdict["completed"], verdict["submitted"]);
    assert!(verdict["preempted"].as_u64() >= Some(1), "{verdict}");
    assert!(verdict["resumed"].as_u64() >= Some(1), "{verdict}");
    assert!(verdict["elapsed_ms"].as_u64() < Some(30_000), "{verdict}");
    assert!(is_empty(temporary.path()));
    assert_eq!(processes_of(temporary.path()), 0);
}

#[test]
fn an_interrupted_demo_leaves_nothing_either() {
    // Ctrl-C, and a terminal that is closed.
    interrupt_demo(Signal::INT);
    interrupt_demo(Signal::HUP);
}

fn interrupt_demo(signal: Signal) {
    let home = tempfile::tempdir().unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let text = home.path().join("text");
    std::fs::write(&text, "a few words\n").unwrap();
    let mut child = rungate(home.path(), &["demo", text.to_str().unwrap()])
        .env("TMPDIR", temporary.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let begun = lines.any(|line| line.unwrap().contains("attempt 1 runs on"));
    assert!(begun, "a job runs");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, signal).unwrap();
    // Its output is read to the end, so that it is not stopped by a closed pipe.
    for _ in lines {}
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(is_empty(temporary.path()));
    assert_eq!(processes_of(temporary.path()), 0);
}
