//! A gateway that died and came back: instances are adopted or stopped, and orphans are swept, none of others.

use rungate::domain::command::Command;
use rungate::domain::effect::ProcessIdentity;
use rungate::domain::event::Exit;
use rungate::domain::ids::Generation;
use rungate::driver::marked_by;
use uuid::Uuid;

use crate::world::{
    PYTHON, World, abandoned, is_healthy, is_spawned, process, service, soon, until,
};

fn identity(outcome: &Command) -> Option<ProcessIdentity> {
    match outcome {
        Command::InstanceSpawned {
            pid,
            start_ticks,
            boot_id,
            port,
            ..
        } => Some(ProcessIdentity {
            pid: *pid,
            start_ticks: *start_ticks,
            boot_id: boot_id.clone(),
            port: *port,
        }),
        _ => None,
    }
}

fn is_adopted(outcome: &Command) -> Option<u32> {
    match outcome {
        Command::InstanceAdopted { pid, .. } => Some(*pid),
        _ => None,
    }
}

#[tokio::test]
async fn a_recorded_process_is_adopted() {
    let mut world = World::new();
    let base = world.started(world.worker(""), 1).await;
    let known = world.recorder.first(identity).await;
    world.restart().await;
    world.driver.find(
        world.worker(""),
        Generation(1),
        Some(known.clone()),
        None,
        None,
    );
    assert_eq!(world.recorder.first(is_adopted).await, known.pid);
    assert_eq!(
        world
            .driver
            .endpoint(&service(), Generation(1))
            .unwrap()
            .base_url,
        base
    );
    world.stop(1, 20_000);
    world.recorder.released(1).await;
    assert_eq!(
        world.recorder.story(1),
        ["adopted", "TERM", "exited", "released"]
    );
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_process_whose_spawn_was_not_recorded_is_found_by_its_mark() {
    let world = World::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let script = world.dir.path().join("worker.py").display().to_string();
    let mark = world.mark(4).text();
    abandoned(
        &[&PYTHON, &script],
        &[
            ("PORT", &port.to_string()),
            ("RUNGATE_INSTANCE", &mark),
            ("WORKER", "has-children"),
        ],
    );
    // The worker, a child in its group, and one that leads a group of its own.
    let leaders = || {
        let marked = marked_by(world.ledger);
        let leading = marked
            .iter()
            .filter(|found| found.stat.process_group == found.pid);
        (marked.len(), leading.count())
    };
    until("the processes", || leaders() == (3, 2)).await;
    let marked = marked_by(world.ledger);
    let oldest = marked
        .iter()
        .filter(|found| found.stat.process_group == found.pid)
        .min_by_key(|found| (found.stat.start_ticks, found.pid))
        .unwrap()
        .pid;
    world
        .driver
        .find(world.worker(""), Generation(4), None, None, None);
    let pid = world.recorder.first(is_adopted).await;
    assert_eq!(pid, oldest);
    assert_eq!(world.recorder.first(is_spawned).await, (pid, port));
    world.stop(4, 20_000);
    assert_eq!(
        world.recorder.released(4).await,
        Exit::Unknown,
        "it was not our child"
    );
    assert_eq!(
        world.recorder.story(4),
        ["spawned", "adopted", "TERM", "exited", "released"]
    );
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_found_process_that_is_not_healthy_in_time_is_stopped() {
    let mut world = World::new();
    let mut spec = process(&["sleep", "1000"]);
    spec.startup_timeout_ms = 100;
    world.driver.start(spec.clone(), Generation(1), Vec::new());
    let known = world.recorder.first(identity).await;
    world.restart().await;
    world
        .driver
        .find(spec, Generation(1), Some(known), None, None);
    world.recorder.released(1).await;
    assert_eq!(world.recorder.story(1), ["TERM", "exited", "released"]);
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_stop_goes_on_after_the_gateways_death() {
    let mut world = World::new();
    world.started(world.worker("ignores-term"), 1).await;
    let known = world.recorder.first(identity).await;
    world.stop(1, 3_600_000);
    world.restart().await;
    world.driver.find(
        world.worker(""),
        Generation(1),
        Some(known),
        None,
        Some(soon(50)),
    );
    world.recorder.released(1).await;
    assert_eq!(
        world.recorder.story(1),
        ["TERM", "KILL", "exited", "released"]
    );
    world.assert_nothing_left();
}

#[tokio::test]
async fn what_died_meanwhile_is_told_and_a_reused_pid_is_not_it() {
    let mut world = World::new();
    world.started(world.worker(""), 1).await;
    let known = world.recorder.first(identity).await;
    world.restart().await;
    let after_reboot = ProcessIdentity {
        boot_id: "another".into(),
        ..known.clone()
    };
    let reused = ProcessIdentity {
        start_ticks: known.start_ticks + 1,
        ..known
    };
    for (generation, known) in [(2, Some(after_reboot)), (3, Some(reused)), (4, None)] {
        world
            .driver
            .find(world.worker(""), Generation(generation), known, None, None);
        assert_eq!(world.recorder.released(generation).await, Exit::Unknown);
        assert_eq!(world.recorder.story(generation), ["exited", "released"]);
    }
    assert_eq!(marked_by(world.ledger).len(), 1, "it was not touched");
    world.stop(1, 20_000);
    world.recorder.released(1).await;
    assert_eq!(
        world.recorder.story(1),
        ["TERM", "exited", "released"],
        "a stop finds what it never saw"
    );
    world.assert_nothing_left();
}

#[tokio::test]
async fn orphans_are_swept_and_nobody_else() {
    let mut world = World::new();
    world.started(world.worker(""), 1).await;
    world
        .driver
        .start(world.worker("has-children"), Generation(2), Vec::new());
    world.recorder.nth(2, is_healthy).await;
    until("four processes", || marked_by(world.ledger).len() == 4).await;
    let other = World::new();
    other.started(other.worker(""), 2).await;
    world.restart().await;
    world
        .driver
        .start(world.worker(""), Generation(3), Vec::new());
    world.driver.sweep_orphans(vec![(service(), Generation(1))]);
    let left = || {
        let mut left: Vec<u64> = marked_by(world.ledger)
            .iter()
            .map(|process| process.mark.generation.0)
            .collect();
        left.sort_unstable();
        left
    };
    until("the sweep", || left() == [1, 3]).await;
    world.recorder.first(is_healthy).await;
    assert_eq!(
        marked_by(other.ledger).len(),
        1,
        "another gateway's process"
    );
    for generation in [1, 3] {
        world.stop(generation, 20_000);
        world.recorder.released(generation).await;
    }
    other.stop(2, 20_000);
    other.recorder.released(2).await;
    world.assert_nothing_left();
    other.assert_nothing_left();
}

#[tokio::test]
async fn a_release_is_told_once_nothing_bears_the_mark() {
    let world = World::new();
    let mark = world.mark(1).text();
    abandoned(&["sleep", "1000"], &[("RUNGATE_INSTANCE", &mark)]);
    abandoned(
        &["sleep", "1000"],
        &[("RUNGATE_INSTANCE", &format!("{}/worker/1", Uuid::nil()))],
    );
    let strangers = || marked_by(Uuid::nil());
    until("both", || {
        marked_by(world.ledger).len() == 1 && strangers().len() == 1
    })
    .await;
    world.driver.watch_release(&service(), Generation(1));
    until("the release", || world.recorder.story(1) == ["released"]).await;
    world.assert_nothing_left();
    assert_eq!(strangers().len(), 1);
    let _ = rustix::process::kill_process(
        crate::world::pid(strangers()[0].pid),
        rustix::process::Signal::KILL,
    );
}
