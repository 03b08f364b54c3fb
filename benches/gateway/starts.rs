//! Durable starts: how many a second, and how long one takes, against the floor.

use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Runtime;

use crate::client::{Load, load};
use crate::report::{Bar, Figure};
use crate::scale::Scale;
use crate::servers::{Process, START_PATH};
use crate::{Context, Failure, floor, jobs, machine};

const GROUP: &str = "durable starts";

/// All figures of this file.
pub fn measure(context: &mut Context, scale: &Scale) -> Result<(), Failure> {
    for &clients in &scale.clients {
        let (gateway, floor) = rounds(context, scale, clients)?;
        let pick =
            |rounds: &[Round], of: fn(&Round) -> f64| rounds.iter().map(of).collect::<Vec<_>>();
        let of_both = |of: fn(&Round) -> f64| (pick(&gateway, of), pick(&floor, of));
        let who = if clients == 1 {
            "1 client".to_owned()
        } else {
            format!("{clients} clients")
        };
        let (ours, floors) = of_both(|round| round.load.per_s);
        let figure = Figure::of(GROUP, format!("starts, {who}"), "1/s", &ours);
        context.add(figure.floor(&ours, &floors).bar(Bar::AtLeastRatio(0.6)));
        let (ours, floors) = of_both(|round| round.load.p50_us);
        let figure = Figure::of(GROUP, format!("p50, {who}"), "µs", &ours).floor(&ours, &floors);
        let bar = if clients == 1 {
            Bar::AtMostRatio(1.5)
        } else {
            Bar::None
        };
        context.add(figure.bar(bar));
        let (ours, floors) = of_both(|round| round.load.p99_us);
        let figure = Figure::of(GROUP, format!("p99, {who}"), "µs", &ours);
        context.add(figure.floor(&ours, &floors));
        let (ours, floors) = of_both(|round| round.processor_us);
        let figure = Figure::of(
            GROUP,
            format!("server's processor time a start, {who}"),
            "µs",
            &ours,
        );
        context.add(figure.floor(&ours, &floors));
    }
    Ok(())
}

/// One round on one server.
struct Round {
    load: Load,
    processor_us: f64,
}

/// Rounds of the gateway and of the floor in turn, both on fresh files.
fn rounds(
    context: &Context,
    scale: &Scale,
    clients: usize,
) -> Result<(Vec<Round>, Vec<Round>), Failure> {
    let floor_process = Process::floor(&context.dir(&format!("floor-{clients}"))?)?;
    let gateway_process = Process::gateway(&context.dir(&format!("starts-{clients}"))?)?;
    let runtime = Context::clients()?;
    let (mut gateway, mut floor) = (Vec::new(), Vec::new());
    // The first round warms both up and is not kept.
    for round in 0..=scale.start_rounds {
        let time = if round == 0 {
            scale.round / 4
        } else {
            scale.round
        };
        let floor_load = timed(&runtime, &floor_process, floor::INSERT_PATH, clients, time)?;
        let gateway_load = timed(&runtime, &gateway_process, START_PATH, clients, time)?;
        if round > 0 {
            floor.push(floor_load);
            gateway.push(gateway_load);
        }
    }
    Ok((gateway, floor))
}

/// A round of load on one server, with the processor time that it took there.
fn timed(
    runtime: &Runtime,
    process: &Process,
    path: &'static str,
    clients: usize,
    time: Duration,
) -> Result<Round, Failure> {
    let before = machine::processor_s(process.pid())?;
    let load = runtime.block_on(load(&process.server, path, clients, time, body))?;
    let used_s = machine::processor_s(process.pid())? - before;
    let processor_us = used_s * 1e6 / load.requests;
    Ok(Round { load, processor_us })
}

/// A start's body, about 320 bytes.
pub fn body(n: u64) -> Bytes {
    let payload = jobs::payload(n);
    let payload = std::str::from_utf8(&payload).expect("it was a string");
    let kind = jobs::type_name(usize::try_from(n).unwrap_or(0));
    Bytes::from(format!(
        r#"{{"job":{{"service_type":"{kind}","payload":{payload},"priority":3,"ttl_seconds":86400}}}}"#
    ))
}
