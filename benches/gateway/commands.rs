//! From a command's POST to its `command_applied` frame at a follower, against the floor's POST.

use std::time::Instant;

use bytes::Bytes;
use serde_json::Value;

use crate::client::Connection;
use crate::followers::Stream;
use crate::report::{Bar, Figure, percentile};
use crate::scale::Scale;
use crate::servers::{COMMANDS_PATH, Process, START_PATH};
use crate::{Context, Failure, floor, starts};

const GROUP: &str = "commands";

/// All figures of this file.
pub fn measure(context: &mut Context, scale: &Scale) -> Result<(), Failure> {
    let floor_process = Process::floor(&context.dir("commands-floor")?)?;
    let gateway_process = Process::gateway(&context.dir("commands")?)?;
    let runtime = Context::clients()?;
    let mut ours: [Vec<f64>; 2] = Default::default();
    let mut floors: [Vec<f64>; 2] = Default::default();
    runtime.block_on(async {
        let mut floor = floor_process.server.connect().await?;
        let mut gateway = gateway_process.server.connect().await?;
        let answer = gateway.post(START_PATH, starts::body(1)).await?;
        let answer: Value = serde_json::from_slice(&answer)?;
        let run = answer["run_id"]
            .as_str()
            .ok_or("a start without a run_id")?;
        let mut stream = Stream::open(&gateway_process.server, run, 0).await?;
        for round in 0..=scale.rounds {
            let mut posts = floor_round(&mut floor, run, round, scale.commands).await?;
            let mut frames =
                round_trips(&mut gateway, &mut stream, run, round, scale.commands).await?;
            if round > 0 {
                for (index, p) in [0.5, 0.99].into_iter().enumerate() {
                    floors[index].push(percentile(&mut posts, p));
                    ours[index].push(percentile(&mut frames, p));
                }
            }
        }
        Ok::<(), Failure>(())
    })?;
    let name = |p: &str| format!("POST to command_applied frame, {p}");
    let p50 = Figure::of(GROUP, name("p50"), "µs", &ours[0]).floor(&ours[0], &floors[0]);
    context.add(p50.bar(Bar::AtMostRatio(3.0)));
    let p99 = Figure::of(GROUP, name("p99"), "µs", &ours[1]).floor(&ours[1], &floors[1]);
    context.add(p99);
    Ok(())
}

fn body(run: &str, id: &str, n: usize) -> Bytes {
    let priority = 1 + n % 5;
    Bytes::from(format!(
        r#"{{"command_id":"{id}","run_id":"{run}","type":"set_priority","payload":{{"priority":{priority}}},"client_id":"bench"}}"#
    ))
}

async fn floor_round(
    floor: &mut Connection,
    run: &str,
    round: usize,
    commands: usize,
) -> Result<Vec<f64>, Failure> {
    let mut times = Vec::with_capacity(commands);
    for n in 0..commands {
        let id = format!("command-{round}-{n}");
        let sent = Instant::now();
        floor.post(floor::INSERT_PATH, body(run, &id, n)).await?;
        times.push(sent.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}

async fn round_trips(
    gateway: &mut Connection,
    stream: &mut Stream,
    run: &str,
    round: usize,
    commands: usize,
) -> Result<Vec<f64>, Failure> {
    let mut times = Vec::with_capacity(commands);
    for n in 0..commands {
        let id = format!("command-{round}-{n}");
        let sent = Instant::now();
        let seen = async {
            loop {
                let frame = stream.next().await?;
                if frame.contains("\"command_applied\"") && frame.contains(&id) {
                    return Ok::<Instant, Failure>(Instant::now());
                }
            }
        };
        let (posted, seen) = tokio::join!(gateway.post(COMMANDS_PATH, body(run, &id, n)), seen);
        posted?;
        times.push((seen? - sent).as_secs_f64() * 1e6);
    }
    Ok(times)
}
