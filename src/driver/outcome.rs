//! Where outcomes go: the seam to the coordinator. An outcome is offered again until it is taken, so
//! that an overloaded coordinator slows the world down and loses nothing.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};

use super::Tasks;
use crate::domain::command::Command;

/// First pause before an outcome is offered again.
const RETRY_FIRST: Duration = Duration::from_millis(5);
/// Longest pause: short against every grace period, long enough not to add to the load.
const RETRY_MAX: Duration = Duration::from_millis(500);

/// Takes outcomes; the coordinator's handle with the actor `executor`.
pub trait Sink: Send + Sync + 'static {
    /// Resolves when the outcome is decided and on disk. A rejected (stale) outcome counts as taken.
    fn submit(&self, outcome: Command) -> BoxFuture<'_, Result<(), NotTaken>>;
}

/// Why an outcome was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    #[error("the coordinator is overloaded")]
    Overloaded,
    /// No outcome is taken any more; a restarted gateway finds out anew.
    #[error("the coordinator has stopped")]
    Stopped,
}

/// Cloneable way to report outcomes.
#[derive(Clone)]
pub struct Outcomes {
    sink: Arc<dyn Sink>,
}

impl Outcomes {
    pub fn new(sink: Arc<dyn Sink>) -> Self {
        Self { sink }
    }

    /// Returns when `outcome` was taken, however long that takes, or when the coordinator has stopped: tells whether it was.
    pub async fn report(&self, outcome: Command) -> bool {
        let mut pause = RETRY_FIRST;
        loop {
            match self.sink.submit(outcome.clone()).await {
                Ok(()) => return true,
                Err(NotTaken::Stopped) => {
                    tracing::debug!("an outcome came after the coordinator had stopped");
                    return false;
                }
                Err(NotTaken::Overloaded) => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RETRY_MAX);
                }
            }
        }
    }

    /// A queue that reports in order and never makes its owner wait: an instance's KILL must not be late
    /// because a commit is. Unbounded, for an instance has a handful of outcomes and then one for each
    /// change of its health, which probing itself slows down.
    pub(super) fn in_order(&self, tasks: &Tasks) -> InOrder {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let outcomes = self.clone();
        tasks.spawn("instance outcomes", async move {
            let mut all_taken = true;
            while let Some(report) = receiver.recv().await {
                match report {
                    Report::Outcome(outcome) => all_taken &= outcomes.report(*outcome).await,
                    // Whoever asked may not wait any more.
                    Report::Taken(asked) => drop(asked.send(all_taken)),
                }
            }
        });
        InOrder { sender }
    }
}

/// What is sent to who reports in order.
enum Report {
    Outcome(Box<Command>),
    /// Asks whether all outcomes before were taken.
    Taken(oneshot::Sender<bool>),
}

/// Reports outcomes one after the other.
pub(super) struct InOrder {
    sender: mpsc::UnboundedSender<Report>,
}

impl InOrder {
    pub(super) fn report(&self, outcome: Command) {
        // The receiver lives as long as its task set; a stopped set takes no outcomes any more.
        let _ = self.sender.send(Report::Outcome(Box::new(outcome)));
    }

    /// Returns when all that was reported is on disk; `false` when it never will be, as the coordinator has stopped.
    pub(super) async fn taken(&self) -> bool {
        let (asked, answer) = oneshot::channel();
        self.sender.send(Report::Taken(asked)).is_ok() && answer.await.unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    struct BusyAtFirst(AtomicU32);

    impl Sink for BusyAtFirst {
        fn submit(&self, _: Command) -> BoxFuture<'_, Result<(), NotTaken>> {
            let tries = self.0.fetch_add(1, Ordering::Relaxed);
            Box::pin(async move {
                if tries < 3 {
                    Err(NotTaken::Overloaded)
                } else {
                    Ok(())
                }
            })
        }
    }

    #[tokio::test]
    async fn an_outcome_is_offered_until_it_is_taken() {
        let sink = Arc::new(BusyAtFirst(AtomicU32::new(0)));
        Outcomes::new(sink.clone()).report(Command::Tick).await;
        assert_eq!(sink.0.load(Ordering::Relaxed), 4);
    }
}
