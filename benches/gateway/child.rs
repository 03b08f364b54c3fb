//! Parts of the benchmark that run as a process of their own: the floor's server, and writers that end
//! without closing what they have open.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rungate::coordinator::recover;
use rungate::ledger::{Ledger, OpenOptions, Writer};

use crate::jobs::{self, History};
use crate::{Failure, floor};

/// The environment variable that makes this program one of its parts.
const PART: &str = "RUNGATE_BENCH_PART";
/// Records of one commit when a ledger is filled: the coordinator's largest batch, roughly.
const FILL_BATCH: u64 = 4_096;

/// Runs as a part when asked to; `None` when this is the benchmark itself.
pub fn run() -> Option<Result<(), Failure>> {
    let part = std::env::var(PART).ok()?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let dir = PathBuf::from(arguments.first().map_or("", String::as_str));
    let number = |n: usize| {
        arguments
            .get(n)
            .and_then(|text| text.parse().ok())
            .unwrap_or(0)
    };
    Some(match part.as_str() {
        "floor" => floor::serve(&dir),
        "fill" => fill(&dir, number(1), number(2)),
        "queue" => queue(&dir, number(1)),
        "crash" => crash(&dir, number(1)),
        other => Err(format!("no part is called {other}").into()),
    })
}

/// This program as one of its parts.
pub fn command(
    part: &str,
    arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> Result<Command, Failure> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env(PART, part).args(arguments).stdin(Stdio::null());
    Ok(command)
}

/// Runs a part to its end. Parts that end by `abort` are told by the `aborts` flag.
pub fn run_part(part: &str, dir: &Path, numbers: &[u64], aborts: bool) -> Result<(), Failure> {
    let mut command = command(part, [dir.as_os_str()])?;
    let numbers = numbers.iter().map(u64::to_string);
    let status = command.args(numbers).stderr(Stdio::inherit()).status()?;
    if status.success() != aborts {
        Ok(())
    } else {
        Err(format!("part {part} ended with {status}").into())
    }
}

/// `events` events of a plausible history, a snapshot of State after them, `suffix` events more; then ends
/// without closing the file.
fn fill(dir: &Path, events: u64, suffix: u64) -> Result<(), Failure> {
    let (ledger, mut writer) = Ledger::open(dir, &OpenOptions::default())?;
    let mut history = History::new();
    append(&mut writer, &mut history, events)?;
    let state = recover(&ledger, 600_000)?;
    writer.save_snapshot(state.seq, &state.to_snapshot()?)?;
    append(&mut writer, &mut history, suffix)?;
    std::process::abort()
}

fn append(writer: &mut Writer, history: &mut History, mut events: u64) -> Result<(), Failure> {
    while events > 0 {
        let size = events.min(FILL_BATCH);
        let mut batch = writer.begin()?;
        for record in history.by_ref().take(usize::try_from(size)?) {
            batch.append(&record)?;
        }
        batch.commit()?;
        events -= size;
    }
    Ok(())
}

/// `jobs` waiting jobs that nobody serves, and a snapshot of them.
fn queue(dir: &Path, jobs: u64) -> Result<(), Failure> {
    let (ledger, mut writer) = Ledger::open(dir, &OpenOptions::default())?;
    let mut n = 0;
    while n < jobs {
        let mut batch = writer.begin()?;
        for _ in 0..FILL_BATCH.min(jobs - n) {
            let at = jobs::START + n / 2;
            let event = jobs::queued(jobs::run_id(at, n), usize::try_from(n)?);
            batch.append(&jobs::record(at, event, jobs::payload(n)))?;
            n += 1;
        }
        batch.commit()?;
    }
    let state = recover(&ledger, 600_000)?;
    writer.save_snapshot(state.seq, &state.to_snapshot()?)?;
    Ok(())
}

/// Appends one batch of a few events to what is there, then ends without closing the file.
fn crash(dir: &Path, events: u64) -> Result<(), Failure> {
    let (ledger, mut writer) = Ledger::open(dir, &OpenOptions::default())?;
    let mut batch = writer.begin()?;
    for n in 0..events {
        let at = jobs::START + ledger.tail() + n;
        let event = jobs::queued(jobs::run_id(at, ledger.tail() + n), 0);
        batch.append(&jobs::record(at, event, jobs::payload(n)))?;
    }
    batch.commit()?;
    std::process::abort()
}
