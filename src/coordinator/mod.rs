//! The single writer: one thread that owns State, decides what has arrived, writes all of it in one
//! transaction, syncs once, and only then answers and lets effects go. The one lock of the gateway.
//!
//! **Invariant**: nothing leaves this thread (reply, effect, frame) before the commit that holds it has
//! returned. When a commit fails the thread ends, every waiting caller is told `Stopped`, and the process
//! must end: State is ahead of the disk.

mod batch;
mod clock;
mod handle;
mod recovery;

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use tokio::sync::mpsc::UnboundedSender;

use self::clock::Clock;
pub use self::handle::{Answered, Handle, Once, SubmitError};
use self::handle::{INBOX, Message};
pub use self::recovery::RecoverError;
use crate::domain::effect::Effect;
pub use crate::domain::scheduler::status::{GpuStatus, QueueStats};
pub use crate::domain::scheduler::why::{Blocking, Why};
use crate::domain::settings::Settings;
use crate::domain::state::State;
use crate::ledger::{CommitError, Space, Writer};

/// Messages decided in one batch at most: beyond it the first caller would wait for too long.
const BATCH: usize = 4_096;

/// Longest sleep without work, so that a clock set forward is noticed.
const NAP: Duration = Duration::from_secs(1);

/// Records since the last snapshot that make a new one worthwhile: a hundredth of a second of replay.
const SNAPSHOT_RECORDS: u64 = 10_000;

/// What a coordinator is made of.
pub struct Parts {
    pub writer: Writer,
    /// From `recover`.
    pub state: State,
    pub settings: Settings,
    /// Gets the effects of each commit, in order. The executor bounds what it has in hand by the
    /// instances and calls that the scheduler allows, so the channel needs no bound of its own.
    pub effects: UnboundedSender<Vec<Effect>>,
    /// Silence after which a snapshot is written.
    pub snapshot_idle: Duration,
    /// Of the ledger's disk.
    pub space: Space,
}

/// The running coordinator.
pub struct Running {
    pub handle: Handle,
    /// Ends with the reason when a commit failed.
    pub thread: std::thread::JoinHandle<Result<(), CommitError>>,
}

/// Starts the coordinator's thread.
pub fn start(parts: Parts) -> std::io::Result<Running> {
    let (sender, receiver) = bounded(INBOX);
    let thread = std::thread::Builder::new()
        .name("coordinator".to_owned())
        .spawn(move || Coordinator::new(parts, receiver).run())?;
    Ok(Running {
        handle: Handle { inbox: sender },
        thread,
    })
}

struct Coordinator {
    writer: Writer,
    state: State,
    settings: Settings,
    effects: UnboundedSender<Vec<Effect>>,
    inbox: Receiver<Message>,
    snapshot_idle: Duration,
    space: Space,
    /// Seq of the newest snapshot.
    snapshot_at: u64,
    last_work: Instant,
    clock: Clock,
    /// Nothing new is begun: `GatewayStarted` has not told yet what a restart left open, or the gateway is
    /// stopping.
    quiet: bool,
}

impl Coordinator {
    fn new(parts: Parts, inbox: Receiver<Message>) -> Coordinator {
        Coordinator {
            snapshot_at: parts.state.seq,
            clock: Clock::new(parts.state.now),
            writer: parts.writer,
            state: parts.state,
            settings: parts.settings,
            effects: parts.effects,
            inbox,
            snapshot_idle: parts.snapshot_idle,
            space: parts.space,
            last_work: Instant::now(),
            quiet: true,
        }
    }

    fn run(mut self) -> Result<(), CommitError> {
        loop {
            let patience = self.patience();
            let first = match self.inbox.recv_timeout(patience) {
                Ok(message) => Some(message),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return self.finish(),
            };
            let idle = first.is_none();
            let rest = self.inbox.try_iter().take(BATCH - 1);
            let messages: Vec<Message> = first.into_iter().chain(rest).collect();
            if !self.work(messages)? {
                return self.finish();
            }
            if idle {
                self.snapshot_when_idle()?;
            } else {
                self.last_work = Instant::now();
            }
        }
    }

    /// How long to wait for a message: until the next deadline.
    fn patience(&mut self) -> Duration {
        let Some(due) = self.state.timers.next().filter(|_| !self.quiet) else {
            return NAP;
        };
        let us = (due - self.clock.now()).max(0);
        Duration::from_micros(us.unsigned_abs()).min(NAP)
    }

    fn snapshot_when_idle(&mut self) -> Result<(), CommitError> {
        let enough = self.state.seq - self.snapshot_at >= SNAPSHOT_RECORDS;
        if enough && self.last_work.elapsed() >= self.snapshot_idle {
            self.snapshot()?;
        }
        Ok(())
    }

    fn snapshot(&mut self) -> Result<(), CommitError> {
        if self.state.seq == self.snapshot_at {
            return Ok(());
        }
        match self.state.to_snapshot() {
            Ok(bytes) => {
                self.writer.save_snapshot(self.state.seq, &bytes)?;
                self.snapshot_at = self.state.seq;
                tracing::debug!(
                    ledger.seq = self.state.seq,
                    size_bytes = bytes.len(),
                    "snapshot written"
                );
            }
            // State is plain data: this cannot happen, and the ledger has all without it.
            Err(error) => tracing::error!(%error, "no snapshot could be made"),
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(), CommitError> {
        self.snapshot()
    }
}

pub use self::recovery::recover;
