//! Reading the ledger back: all events from disk, a restart behind a snapshot, and what a run takes on disk.

use std::path::Path;
use std::time::Instant;

use rungate::coordinator::recover;
use rungate::domain::state::State;
use rungate::ledger::{FILE_NAME, Ledger, OpenOptions};

use crate::machine::{disk_bytes, forget_cached};
use crate::report::{Bar, Figure};
use crate::scale::Scale;
use crate::{Context, Failure, child, jobs};

const GROUP: &str = "replay and restart";
/// As the gateway's setting has it.
const AGEING_MS: u64 = 600_000;
/// Events after the snapshot: what a gateway that is never idle for long has.
const SUFFIX: u64 = 20_000;

/// All figures of this file.
pub fn measure(context: &mut Context, scale: &Scale) -> Result<(), Failure> {
    let dir = context.dir("replay")?;
    let filled = Instant::now();
    child::run_part("fill", &dir, &[scale.replay_events, SUFFIX], true)?;
    let took = filled.elapsed().as_secs_f64();
    let events = (scale.replay_events + SUFFIX) as f64;
    context.note(format!(
        "the history of {events:.0} events was written in {took:.1} s ({:.0} events/s) in batches of 4 096",
        events / took
    ));
    restarts(context, scale, &dir)?;
    replays(context, scale, &dir)?;
    sizes(context, scale, &dir)?;
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

fn replays(context: &mut Context, scale: &Scale, dir: &Path) -> Result<(), Failure> {
    let (ledger, _writer) = Ledger::open(dir, &OpenOptions::default())?;
    let events = ledger.tail() as f64;
    let mut cold = Vec::new();
    let mut warm = Vec::new();
    for _ in 0..scale.rounds.min(3) {
        forget_cached(&dir.join(FILE_NAME))?;
        cold.push(events / replay(&ledger)?);
        warm.push(events / replay(&ledger)?);
    }
    let bar = Bar::AtLeast(1e6);
    context.add(Figure::of(GROUP, "replay into State, file cached", "events/s", &warm).bar(bar));
    context.add(Figure::of(
        GROUP,
        "the same, cache dropped before",
        "events/s",
        &cold,
    ));
    let mut decode = Vec::new();
    for _ in 0..scale.rounds.min(3) {
        let started = Instant::now();
        ledger.replay(0, |_, _, _, (event, _)| drop(std::hint::black_box(event)))?;
        decode.push(events / started.elapsed().as_secs_f64());
    }
    context.add(Figure::of(GROUP, "decoding alone", "events/s", &decode));
    Ok(())
}

/// Seconds that a replay of everything takes.
fn replay(ledger: &Ledger) -> Result<f64, Failure> {
    let started = Instant::now();
    let mut state = State::new(AGEING_MS);
    ledger.replay(0, |seq, at, plane, (event, payload_bytes)| {
        state.fold(seq, at, plane, (&event, payload_bytes));
    })?;
    std::hint::black_box(&state);
    Ok(started.elapsed().as_secs_f64())
}

fn restarts(context: &mut Context, scale: &Scale, dir: &Path) -> Result<(), Failure> {
    let mut unclean = Vec::new();
    let mut clean = Vec::new();
    for round in 0..scale.rounds {
        if round > 0 {
            child::run_part("crash", dir, &[100], true)?;
        }
        unclean.push(restart(dir)?);
        clean.push(restart(dir)?);
    }
    let millions = scale.replay_events as f64 / 1e6;
    let name = |how: &str| format!("restart behind a snapshot of {millions} M events, {how}");
    let bar = Bar::AtMost(2.0);
    context.add(Figure::of(GROUP, name("closed well"), "s", &clean).bar(bar));
    context.add(Figure::of(GROUP, name("after kill"), "s", &unclean).bar(bar));
    Ok(())
}

/// Seconds from nothing to a State that can decide; closes the ledger in good order.
fn restart(dir: &Path) -> Result<f64, Failure> {
    forget_cached(&dir.join(FILE_NAME))?;
    let started = Instant::now();
    let (ledger, writer) = Ledger::open(dir, &OpenOptions::default())?;
    let state = recover(&ledger, AGEING_MS)?;
    let took = started.elapsed().as_secs_f64();
    if state.seq != ledger.tail() {
        return Err("the restart missed events".into());
    }
    drop(writer);
    Ok(took)
}

fn sizes(context: &mut Context, scale: &Scale, dir: &Path) -> Result<(), Failure> {
    let runs = scale.replay_events as f64 / jobs::EVENTS_PER_RUN as f64;
    let file = disk_bytes(&dir.join(FILE_NAME))? as f64;
    let name = "on disk for a run of four records, with its indexes";
    context.add(Figure::of(GROUP, name, "bytes", &[file / runs]));
    Ok(())
}
