//! The one place that spawns: every task of driver and executor has a name, is counted, and has its
//! panic logged. Dropping a task cancels what it waits for; it never kills a service.

use std::future::Future;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Cloneable handle on a set of tasks that end together.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    cancelled: CancellationToken,
}

impl Tasks {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `task` until it ends or the set is stopped. A panic is logged with the task's name and goes no further.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let cancelled = self.cancelled.clone();
        self.tracker.spawn(async move {
            let guarded = AssertUnwindSafe(cancelled.run_until_cancelled(task)).catch_unwind();
            match guarded.await {
                Ok(Some(())) => tracing::trace!(task.name = name, "task ended"),
                Ok(None) => tracing::trace!(task.name = name, "task cancelled"),
                // What it said was logged where it happened.
                Err(_) => tracing::error!(task.name = name, "task panicked"),
            }
        });
    }

    /// Tasks that have not ended.
    pub fn len(&self) -> usize {
        self.tracker.len()
    }

    /// Whether every task has ended.
    pub fn is_empty(&self) -> bool {
        self.tracker.is_empty()
    }

    /// Drops every task where it stands and waits until all are gone. Services that run go on running.
    pub async fn stop(&self) {
        self.cancelled.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_ends_its_own_task_only() {
        let tasks = Tasks::new();
        let (sender, receiver) = tokio::sync::oneshot::channel();
        tasks.spawn("panics", async { panic!("on purpose") });
        tasks.spawn("goes on", async {
            let _ = sender.send(());
        });
        receiver.await.unwrap();
        tasks.stop().await;
        assert!(tasks.is_empty());
    }

    #[tokio::test]
    async fn stop_drops_what_would_wait_for_ever() {
        let tasks = Tasks::new();
        tasks.spawn("waits", std::future::pending());
        tasks.stop().await;
        assert!(tasks.is_empty());
    }
}
