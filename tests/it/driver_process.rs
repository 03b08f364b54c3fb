//! Processes: what they are started with, and how they end.

use std::collections::BTreeMap;

use rungate::domain::event::Exit;
use rungate::domain::ids::Generation;
use rungate::domain::spec::{Grant, Worker};
use rungate::driver::marked_by;

use crate::world::{World, is_healthy, is_spawned, process, service, until};

#[tokio::test]
async fn a_service_is_started_probed_and_stopped() {
    let world = World::new();
    let base = world.started(world.worker(""), 1).await;
    assert_eq!(marked_by(world.ledger).len(), 1);
    assert!(base.starts_with("http://127.0.0.1:"));
    world.stop(1, 20_000);
    assert_eq!(world.recorder.released(1).await, Exit::Signal(15));
    assert_eq!(
        world.recorder.story(1),
        ["spawned", "healthy", "TERM", "exited", "released"]
    );
    assert!(world.driver.endpoint(&service(), Generation(1)).is_none());
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_service_gets_its_own_environment_and_no_more() {
    let world = World::new();
    let grants = vec![
        Grant {
            gpu: "SIM-0".into(),
            mib: 1,
        },
        Grant {
            gpu: "SIM-1".into(),
            mib: 1,
        },
    ];
    world
        .driver
        .start(world.worker("plain"), Generation(7), grants);
    world.recorder.first(is_healthy).await;
    let (_, port) = world.recorder.first(is_spawned).await;
    let answer = reqwest::get(format!("http://127.0.0.1:{port}/env"))
        .await
        .unwrap();
    let seen: BTreeMap<String, String> = answer.json().await.unwrap();
    assert_eq!(seen["PORT"], port.to_string());
    assert_eq!(seen["CUDA_VISIBLE_DEVICES"], "SIM-0,SIM-1");
    assert_eq!(seen["RUNGATE_SERVICE"], "worker");
    assert_eq!(seen["RUNGATE_GENERATION"], "7");
    assert_eq!(seen["RUNGATE_INSTANCE"], world.mark(7).text());
    assert_eq!(seen["WORKER"], "plain");
    // Cargo sets dozens of variables for the test itself.
    assert!(
        seen.keys().all(|name| !name.starts_with("CARGO")),
        "{:?}",
        seen.keys()
    );
    world.stop(7, 20_000);
    world.recorder.released(7).await;
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_process_that_ignores_term_is_killed() {
    let world = World::new();
    world.started(world.worker("ignores-term"), 1).await;
    world.stop(1, 200);
    assert_eq!(world.recorder.released(1).await, Exit::Signal(9));
    assert_eq!(
        world.recorder.story(1),
        ["spawned", "healthy", "TERM", "KILL", "exited", "released"]
    );
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_later_stop_brings_the_kill_forward() {
    let world = World::new();
    world.started(world.worker("ignores-term"), 1).await;
    world.stop(1, 3_600_000);
    world.stop(1, 100);
    assert_eq!(world.recorder.released(1).await, Exit::Signal(9));
}

#[tokio::test]
async fn descendants_end_with_the_service_even_in_a_session_of_their_own() {
    let world = World::new();
    world.started(world.worker("has-children"), 1).await;
    until("three processes", || marked_by(world.ledger).len() == 3).await;
    world.stop(1, 20_000);
    world.recorder.released(1).await;
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_crash_is_seen_with_its_code_and_its_children_are_killed() {
    let world = World::new();
    let base = world.started(world.worker("has-children"), 1).await;
    until("three processes", || marked_by(world.ledger).len() == 3).await;
    let _ = reqwest::Client::new()
        .post(format!("{base}/crash"))
        .send()
        .await;
    assert_eq!(world.recorder.released(1).await, Exit::Code(3));
    assert_eq!(
        world.recorder.story(1),
        ["spawned", "healthy", "KILL", "exited", "released"]
    );
    world.assert_nothing_left();
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let world = World::new();
    let mut lost = process(&["sleep", "1"]);
    if let Worker::Process { working_dir, .. } = &mut lost.worker {
        *working_dir = Some("/no/such/place".into());
    }
    let busy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut shut_out = process(&["sleep", "1"]);
    shut_out.port = busy.local_addr().unwrap().port();
    let cases = [
        (
            process(&["/no/such/program"]),
            "cannot start '/no/such/program': No such file or directory",
        ),
        (process(&[]), "its command is empty"),
        (lost, "its working directory /no/such/place does not exist"),
        (shut_out, "cannot be used: Address already in use"),
    ];
    for (generation, (spec, expected)) in (1..).zip(cases) {
        world.driver.start(spec, Generation(generation), Vec::new());
        let exit = world.recorder.released(generation).await;
        assert!(
            matches!(&exit, Exit::NotStarted(why) if why.contains(expected)),
            "{exit:?}"
        );
        assert_eq!(world.recorder.story(generation), ["exited", "released"]);
    }
}

#[tokio::test]
async fn a_stop_overtakes_a_start() {
    let world = World::new();
    for generation in 1..=10 {
        world
            .driver
            .start(world.worker(""), Generation(generation), Vec::new());
        world.stop(generation, 20_000);
        world.recorder.released(generation).await;
        let story = world.recorder.story(generation).join(" ");
        assert!(
            ["exited released", "spawned TERM exited released"].contains(&story.as_str()),
            "{story}"
        );
    }
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_generation_is_started_once() {
    let world = World::new();
    world
        .driver
        .start(world.worker(""), Generation(1), Vec::new());
    world
        .driver
        .start(world.worker(""), Generation(1), Vec::new());
    world.recorder.first(is_healthy).await;
    assert_eq!(marked_by(world.ledger).len(), 1);
    world.stop(1, 20_000);
    world.recorder.released(1).await;
    world.stop(1, 20_000);
    world.tasks.stop().await;
    assert_eq!(
        world.recorder.story(1),
        ["spawned", "healthy", "TERM", "exited", "released"]
    );
    world.assert_nothing_left();
}

#[tokio::test]
async fn two_generations_do_not_share_a_port() {
    let world = World::new();
    let mut ports: Vec<u16> = Vec::new();
    for generation in 1..=5 {
        world.driver.start(
            process(&["sleep", "1000"]),
            Generation(generation),
            Vec::new(),
        );
        ports.push(world.recorder.nth(generation as usize, is_spawned).await.1);
    }
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 5);
    for generation in 1..=5 {
        world.stop(generation, 20_000);
        world.recorder.released(generation).await;
    }
    world.assert_nothing_left();
}
