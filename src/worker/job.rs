//! One job of the example worker: the request, the work in chunks, and how it ends.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::gateway::Link;
use super::give_way::Checkpoints;
use super::scan::Scan;

/// Files of one job, so that a payload cannot make it open without end.
const MAX_FILES: usize = 1_000;
/// The longest pause between chunks and the longest sleep, in milliseconds.
const MAX_PAUSE_MS: u64 = 3_600_000;
/// Progress is pushed at most this often: each push is a durable record.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);
/// Checkpoints are saved at most this often, for the same reason.
const CHECKPOINT_EVERY: Duration = Duration::from_millis(500);
/// Bytes per chunk where the request says nothing.
const DEFAULT_CHUNK_BYTES: usize = 64 << 10;

/// A job's payload.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "operation", rename_all = "snake_case")]
pub enum Operation {
    /// Text statistics over `files`.
    Stats {
        files: Vec<PathBuf>,
        chunk_bytes: Option<usize>,
        /// Milliseconds between chunks, so that a demonstration lasts.
        #[serde(default)]
        delay_ms: u64,
        /// Milliseconds that a checkpoint takes; then none is saved unasked.
        checkpoint_ms: Option<u64>,
    },
    /// Waits.
    Sleep { ms: u64 },
    /// Answers 500.
    Fail { message: Option<String> },
    /// Ends this process, as a crash would.
    Exit { code: i32 },
}

/// How a job ended.
#[derive(Debug)]
pub enum Outcome {
    Done(Value),
    /// Stopped at somebody's wish.
    Stopped,
    /// The request asks for what cannot be done.
    Invalid(String),
    Failed(String),
    /// The process was asked to end.
    Exit(i32),
}

impl Outcome {
    /// For the log.
    pub fn name(&self) -> &'static str {
        match self {
            Outcome::Done(_) => "done",
            Outcome::Stopped => "stopped",
            Outcome::Invalid(_) => "invalid",
            Outcome::Failed(_) => "failed",
            Outcome::Exit(_) => "exit",
        }
    }
}

impl Operation {
    /// From a request's body. `operation` may be left out and is then `stats`.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(mut body: Value) -> Result<Self, String> {
        if let Some(object) = body.as_object_mut() {
            object
                .entry("operation")
                .or_insert_with(|| Value::from("stats"));
        }
        let operation: Operation =
            serde_json::from_value(body).map_err(|error| error.to_string())?;
        match &operation {
            Operation::Stats { files, .. } if files.is_empty() => {
                Err("files: at least one is required".to_owned())
            }
            Operation::Stats { files, .. } if files.len() > MAX_FILES => {
                Err(format!("files: at most {MAX_FILES}"))
            }
            _ => Ok(operation),
        }
    }

    /// Does it, until it is done or `stop` is cancelled.
    pub async fn perform(
        self,
        link: &Link,
        stop: &CancellationToken,
        checkpoints: &Checkpoints,
    ) -> Outcome {
        match self {
            Operation::Stats {
                files,
                chunk_bytes,
                delay_ms,
                checkpoint_ms,
            } => {
                let pace = Pace {
                    chunk_bytes: chunk_bytes.unwrap_or(DEFAULT_CHUNK_BYTES),
                    delay: pause(delay_ms),
                    checkpoint: checkpoint_ms.map(pause),
                };
                scan(files, pace, link, stop, checkpoints).await
            }
            Operation::Sleep { ms } => tokio::select! {
                () = tokio::time::sleep(pause(ms)) => Outcome::Done(json!({"slept_ms": ms})),
                () = stop.cancelled() => Outcome::Stopped,
            },
            Operation::Fail { message } => {
                Outcome::Failed(message.unwrap_or_else(|| "asked to fail".to_owned()))
            }
            Operation::Exit { code } => Outcome::Exit(code),
        }
    }
}

fn pause(ms: u64) -> Duration {
    Duration::from_millis(ms.min(MAX_PAUSE_MS))
}

#[derive(Clone, Copy)]
struct Pace {
    chunk_bytes: usize,
    delay: Duration,
    /// What a checkpoint takes, where it is saved only when asked for.
    checkpoint: Option<Duration>,
}

async fn scan(
    files: Vec<PathBuf>,
    pace: Pace,
    link: &Link,
    stop: &CancellationToken,
    checkpoints: &Checkpoints,
) -> Outcome {
    let mut scan = match begin(files, link).await {
        Ok(scan) => scan,
        Err(text) => return Outcome::Invalid(text),
    };
    let resumed_at_bytes = scan.done_bytes();
    let mut reported: Option<Instant> = None;
    let mut saved = Instant::now();
    while !scan.is_done() {
        scan = match step(scan, pace.chunk_bytes).await {
            Ok(scan) => scan,
            Err(text) => return Outcome::Failed(text),
        };
        if reported.is_none_or(|at| at.elapsed() >= PROGRESS_EVERY) || scan.is_done() {
            report(&scan, link).await;
            reported = Some(Instant::now());
        }
        if let Some(number) = checkpoints.asked() {
            tokio::time::sleep(pace.checkpoint.unwrap_or_default()).await;
            save(&scan, link).await;
            checkpoints.saved(number);
        }
        if stop.is_cancelled() && !scan.is_done() {
            if pace.checkpoint.is_none() {
                save(&scan, link).await;
            }
            return Outcome::Stopped;
        }
        let unasked = pace.checkpoint.is_none();
        if unasked && saved.elapsed() >= CHECKPOINT_EVERY && !scan.is_done() {
            save(&scan, link).await;
            saved = Instant::now();
        }
        if !scan.is_done() {
            tokio::select! {
                () = tokio::time::sleep(pace.delay) => {}
                () = checkpoints.wanted() => {}
                () = stop.cancelled() => {}
            }
        }
    }
    Outcome::Done(json!({
        "statistics": scan.report(),
        "resumed_at_bytes": resumed_at_bytes,
    }))
}

/// Where the offered checkpoint left off, else at the beginning.
async fn begin(files: Vec<PathBuf>, link: &Link) -> Result<Scan, String> {
    let checkpoint = link.checkpoint().await.unwrap_or_else(|error| {
        // The work can be done from the start; it only takes longer.
        tracing::warn!(run.id = link.run(), %error, "the checkpoint cannot be read; starting over");
        None
    });
    let opened = tokio::task::spawn_blocking(move || match checkpoint {
        Some(bytes) => Scan::resume(&files, &bytes),
        None => Scan::new(&files),
    });
    match opened.await {
        Ok(scan) => scan.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// One chunk, off the threads that answer requests.
async fn step(mut scan: Scan, chunk_bytes: usize) -> Result<Scan, String> {
    let stepped = tokio::task::spawn_blocking(move || scan.step(chunk_bytes).map(|()| scan));
    match stepped.await {
        Ok(scan) => scan.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

async fn report(scan: &Scan, link: &Link) {
    let (done, total) = (scan.done_bytes(), scan.total_bytes());
    let percent = if total == 0 {
        100.0
    } else {
        done as f64 * 100.0 / total as f64
    };
    let progress = json!({
        "done": done,
        "total": total,
        "percent": (percent * 10.0).round() / 10.0,
        "unit": "bytes",
    });
    if let Err(error) = link.push_progress(&progress).await {
        tracing::debug!(run.id = link.run(), %error, "progress was not taken");
    }
}

async fn save(scan: &Scan, link: &Link) {
    if let Err(error) = link.save_checkpoint(scan.checkpoint()).await {
        tracing::warn!(run.id = link.run(), %error, "the checkpoint was not saved");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_left_out_is_stats() {
        let operation = Operation::parse(json!({"files": ["/x"]})).unwrap();
        assert!(matches!(operation, Operation::Stats { delay_ms: 0, .. }));
    }

    #[test]
    fn a_bad_request_is_told_what_is_wrong() {
        let error = Operation::parse(json!({"files": []})).unwrap_err();
        assert_eq!(error, "files: at least one is required");
        let error = Operation::parse(json!({"operation": "dance"})).unwrap_err();
        assert!(error.contains("dance"), "{error}");
        assert!(Operation::parse(json!(7)).is_err());
    }
}
