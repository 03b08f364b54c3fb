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
mod snapshots;

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use tokio::sync::mpsc::UnboundedSender;

use self::clock::Clock;
pub use self::handle::{Answered, Handle, Once, SubmitError};
use self::handle::{INBOX, Message};
pub use self::recovery::RecoverError;
pub use self::snapshots::SnapshotRules;
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

/// What a coordinator is made of.
pub struct Parts {
    pub writer: Writer,
    /// From `recover`.
    pub state: State,
    pub settings: Settings,
    /// Gets the effects of each commit, in order. The executor bounds what it has in hand by the
    /// instances and calls that the scheduler allows, so the channel needs no bound of its own.
    pub effects: UnboundedSender<Vec<Effect>>,
    pub snapshots: SnapshotRules,
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
    snapshots: SnapshotRules,
    space: Space,
    /// Seq of the newest snapshot.
    snapshot_at: u64,
    /// When the last record was appended.
    last_work: Instant,
    /// When to go on forgetting Idempotency-Keys.
    keys_due: Instant,
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
            snapshots: parts.snapshots,
            space: parts.space,
            last_work: Instant::now(),
            keys_due: Instant::now(),
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
            let rest = self.inbox.try_iter().take(BATCH - 1);
            let messages: Vec<Message> = first.into_iter().chain(rest).collect();
            let before = self.state.seq;
            let only_measured = handle::only_measured(&messages);
            if !self.work(messages)? {
                return self.finish();
            }
            // What appended nothing (a probe, say) is no work, and neither is what comes each minute in any case.
            if self.state.seq > before && !only_measured {
                self.last_work = Instant::now();
            }
            self.snapshot_when_due()?;
        }
    }

    /// How long to wait for a message: until the next deadline, or not at all while something is to be purged.
    fn patience(&mut self) -> Duration {
        if self.writer.is_purging() && !self.quiet {
            return Duration::ZERO;
        }
        let Some(due) = self.state.timers.next().filter(|_| !self.quiet) else {
            return NAP;
        };
        let us = (due - self.clock.now()).max(0);
        Duration::from_micros(us.unsigned_abs()).min(NAP)
    }

    fn snapshot_when_due(&mut self) -> Result<(), CommitError> {
        let records = self.state.seq - self.snapshot_at;
        let jobs = self.state.jobs.len();
        match self.snapshots.due(records, jobs, self.last_work) {
            true => self.snapshot(),
            false => Ok(()),
        }
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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use smol_str::SmolStr;

    use super::*;
    use crate::domain::audit::{AuditedWrite, Details, Source};
    use crate::domain::command::{Command, Origin, Rejection};
    use crate::domain::event::Event;
    use crate::domain::ids::PlaneId;
    use crate::domain::machine::Seen;
    use crate::domain::record::NewRecord;
    use crate::domain::tenant::Tenancy;
    use crate::domain::time::Timestamp;
    use crate::ledger::{Ledger, OpenOptions};

    /// A coordinator over a new ledger.
    fn start_with(snapshots: SnapshotRules) -> (tempfile::TempDir, Ledger, Handle) {
        let data = tempfile::tempdir().unwrap();
        let (ledger, writer) = Ledger::open(data.path(), &OpenOptions::default()).unwrap();
        let handle = start_on(writer, snapshots);
        (data, ledger, handle)
    }

    fn start_on(writer: Writer, snapshots: SnapshotRules) -> Handle {
        let (effects, _) = tokio::sync::mpsc::unbounded_channel();
        let parts = Parts {
            writer,
            state: State::new(0),
            settings: Settings::default(),
            effects,
            snapshots,
            space: Space::new(Path::new("/"), 0),
        };
        start(parts).unwrap().handle
    }

    fn origin(at: Timestamp) -> Origin {
        Origin {
            plane: PlaneId::ROOT,
            actor: SmolStr::default(),
            request_id: None,
            tenancy: Tenancy::All,
            at,
        }
    }

    /// Appends one record.
    async fn append(handle: &Handle) {
        let source = Arc::new(Source {
            user: None,
            token: None,
            address: None,
            method: SmolStr::default(),
            route: SmolStr::default(),
            path: None,
            query: Vec::new(),
            details: Details::default(),
        });
        let at = crate::clock::now();
        let write = AuditedWrite {
            source,
            status: 403,
            code: None,
            duration_us: 0,
            count: 1,
            since: at,
        };
        let origin = origin(at);
        let command = Command::AuditWrite(Box::new(write));
        handle.submit(origin, command).await.unwrap();
    }

    async fn snapshot_comes(ledger: &Ledger, meanwhile: impl AsyncFn()) {
        let come = async {
            while ledger.load_snapshot().unwrap().is_none() {
                meanwhile().await;
            }
        };
        let patience = Duration::from_secs(60);
        tokio::time::timeout(patience, come)
            .await
            .expect("a snapshot");
    }

    #[tokio::test]
    async fn old_idempotency_keys_are_forgotten_by_and_by() {
        let data = tempfile::tempdir().unwrap();
        let (_ledger, mut writer) = Ledger::open(data.path(), &OpenOptions::default()).unwrap();
        let at = Timestamp::from_millis(1_700_000_000_000);
        let mut batch = writer.begin().unwrap();
        let record = NewRecord {
            plane: PlaneId::ROOT,
            at,
            actor: SmolStr::default(),
            request_id: None,
            asked: None,
            event: Event::GatewayStopped { epoch: 1 },
            payload: bytes::Bytes::new(),
        };
        batch.append(&record).unwrap();
        let kept = batch.put_idempotency(PlaneId::ROOT, "start", "key", [1; 32], b"");
        kept.unwrap();
        batch.commit().unwrap();
        let handle = start_on(writer, SnapshotRules::after(Duration::from_secs(1)));
        let origin = origin(at);
        let started = Command::GatewayStarted {
            epoch: 1,
            version: SmolStr::default(),
        };
        handle.submit(origin.clone(), started).await.unwrap();
        let again = async || {
            let once = Once {
                route: "start",
                key: "key".into(),
                body_hash: [2; 32],
            };
            let tick = handle.put(origin.clone(), Command::Tick, Some(once), None);
            tick.await
        };
        let forgotten = async {
            while let Err(refused) = again().await {
                assert_eq!(refused, SubmitError::Rejected(Rejection::KeyReused));
            }
        };
        let patience = Duration::from_secs(60);
        tokio::time::timeout(patience, forgotten).await.unwrap();
    }

    #[tokio::test]
    async fn questions_do_not_keep_a_snapshot_from_being_written() {
        let (_data, ledger, handle) = start_with(SnapshotRules {
            idle: Duration::from_millis(100),
            idle_records: 1,
            busy_records: u64::MAX,
        });
        append(&handle).await;
        snapshot_comes(&ledger, async || handle.ask(|_, _, _| ()).await.unwrap()).await;
    }

    #[tokio::test]
    async fn what_is_measured_each_minute_does_not_keep_a_snapshot_from_being_written() {
        let (_data, ledger, handle) = start_with(SnapshotRules {
            idle: Duration::from_millis(200),
            idle_records: 1,
            busy_records: u64::MAX,
        });
        append(&handle).await;
        snapshot_comes(&ledger, async || {
            let since = crate::clock::now();
            let sum = Seen::Use {
                since,
                gpus: Vec::new(),
            };
            let submitted = handle.submit(origin(since), Command::Seen(sum));
            submitted.await.unwrap();
        })
        .await;
    }

    #[tokio::test]
    async fn a_gateway_that_is_never_quiet_writes_snapshots() {
        let (_data, ledger, handle) = start_with(SnapshotRules {
            idle: Duration::from_secs(3_600),
            idle_records: 1,
            busy_records: 10,
        });
        snapshot_comes(&ledger, async || append(&handle).await).await;
        assert!(ledger.load_snapshot().unwrap().unwrap().0 >= 10);
    }
}
