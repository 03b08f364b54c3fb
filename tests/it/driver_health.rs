//! Health: in start-up, of a live instance, and of a service that runs elsewhere.

use rungate::domain::command::Command;
use rungate::domain::event::Exit;
use rungate::domain::ids::Generation;

use crate::world::{World, external, is_healthy, process, service, soon};

fn is_unhealthy(outcome: &Command) -> Option<String> {
    match outcome {
        Command::InstanceUnhealthy { error, .. } => Some(error.clone()),
        _ => None,
    }
}

#[tokio::test]
async fn a_start_that_takes_too_long_is_told_and_left_to_be_stopped() {
    let world = World::new();
    let mut spec = process(&["sleep", "1000"]);
    spec.startup_timeout_ms = 200;
    world.driver.start(spec, Generation(1), Vec::new());
    let error = world.recorder.first(is_unhealthy).await;
    assert!(
        error.starts_with("it was not healthy within 200 ms of its start: GET http://127.0.0.1:"),
        "{error}"
    );
    assert!(error.contains("Connection refused"), "{error}");
    world.stop(1, 20_000);
    world.recorder.released(1).await;
    assert_eq!(
        world.recorder.story(1),
        ["spawned", "unhealthy", "TERM", "exited", "released"]
    );
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_live_instance_that_fails_three_probes_is_unhealthy_until_it_recovers() {
    let world = World::new();
    let base = world.started(world.worker(""), 1).await;
    let client = reqwest::Client::new();
    client.post(format!("{base}/sick")).send().await.unwrap();
    let error = world.recorder.first(is_unhealthy).await;
    assert!(
        error.contains("3 health probes in a row failed") && error.ends_with("answered 503"),
        "{error}"
    );
    client.post(format!("{base}/well")).send().await.unwrap();
    world.recorder.nth(2, is_healthy).await;
    world.stop(1, 20_000);
    world.recorder.released(1).await;
    let story = world.recorder.story(1);
    assert_eq!(
        story,
        [
            "spawned",
            "healthy",
            "unhealthy",
            "healthy",
            "TERM",
            "exited",
            "released"
        ]
    );
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_service_that_runs_elsewhere_is_probed_and_never_touched() {
    let mut world = World::new();
    let base = world.started(world.worker(""), 1).await;
    let elsewhere = external(&format!("{base}/"));

    let other = World::new();
    assert_eq!(other.started(elsewhere.clone(), 1).await, base);
    other.stop(1, 20_000);
    assert_eq!(other.recorder.released(1).await, Exit::Unknown);
    assert_eq!(other.recorder.story(1), ["healthy", "exited", "released"]);

    world.restart().await;
    world
        .driver
        .find(elsewhere, Generation(5), None, None, None);
    world
        .recorder
        .first(|outcome| matches!(outcome, Command::InstanceAdopted { .. }).then_some(()))
        .await;
    world.stop(5, 20_000);
    world.recorder.released(5).await;
    assert_eq!(
        rungate::driver::marked_by(world.ledger).len(),
        1,
        "the process itself runs on"
    );
    world.driver.stop(&service(), Generation(1), soon(20_000));
    world.recorder.released(1).await;
    world.assert_nothing_left();
}
