//! Slow hashes: few at a time and not many in line, so that the rest of the processor is for requests.

use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;

use metrics::counter;
use tokio::sync::{Semaphore, oneshot};

use super::error::{ApiError, ErrorCode};

/// Computed and waiting at most.
const IN_LINE: usize = 64;

/// Linux's nice value of what may always wait; it counts for one thread, not for the process.
const LEAST_PRIORITY: i32 = 19;

/// How long a request waits for its turn.
const WAIT: Duration = Duration::from_secs(2);

/// Where slow hashes are computed.
pub struct SlowHashes {
    turns: Arc<Semaphore>,
    line: Semaphore,
}

impl SlowHashes {
    /// On half of the cores: each takes one for tens of milliseconds, and a password's 19 MiB.
    pub fn new() -> SlowHashes {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        SlowHashes::with_turns((cores / 2).max(1))
    }

    fn with_turns(turns: usize) -> SlowHashes {
        SlowHashes {
            turns: Arc::new(Semaphore::new(turns)),
            line: Semaphore::new(IN_LINE),
        }
    }

    /// Does the work on a thread of its own when its turn has come; 429 when that would take too long.
    pub async fn compute<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let _place = self.line.try_acquire().map_err(|_| busy())?;
        let turn = tokio::time::timeout(WAIT, Arc::clone(&self.turns).acquire_owned());
        let turn = turn.await.map_err(|_| busy())?.map_err(|_| busy())?;
        let (answer, computed) = oneshot::channel();
        let thread = std::thread::Builder::new().name("slow-hash".to_owned());
        let begun = thread.spawn(move || {
            // Held by the work, not by its request, which may go away.
            let _turn = turn;
            yield_to_requests();
            counter!("rungate_slow_hashes_total").increment(1);
            // A request that went away does not want it any more.
            let _ = answer.send(work());
        });
        begun.map_err(|error| not_computed(&error))?;
        computed.await.map_err(|error| not_computed(&error))
    }
}

/// Gives this thread the processor time that nobody else wants. It can never take that back, so it is a thread of its
/// own: those of the runtime's pool do other work too.
fn yield_to_requests() {
    if let Err(error) = rustix::process::nice(LEAST_PRIORITY) {
        tracing::debug!(%error, "a slow hash is computed at the usual priority");
    }
}

fn not_computed(error: &dyn std::error::Error) -> ApiError {
    tracing::error!(%error, "a slow hash was not computed");
    ApiError::internal()
}

fn busy() -> ApiError {
    ApiError::new(
        ErrorCode::TooManyRequests,
        "Too Many Requests (token and password checks)",
    )
    .retry_after(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[tokio::test]
    async fn as_many_are_computed_at_once_as_there_are_turns_and_no_more_wait_than_fit_in_line() {
        const TURNS: usize = 2;
        let hashes = Arc::new(SlowHashes::with_turns(TURNS));
        let (began, begun) = mpsc::channel();
        let begin = || {
            let (hashes, began) = (Arc::clone(&hashes), began.clone());
            let (end, ended) = mpsc::channel::<()>();
            let compute = async move {
                let work = move || {
                    began.send(()).unwrap();
                    let _ = ended.recv();
                };
                hashes.compute(work).await
            };
            (tokio::spawn(compute), end)
        };
        let mut asked: Vec<_> = (0..IN_LINE).map(|_| begin()).collect();
        while hashes.line.available_permits() > 0 || hashes.turns.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let refused = begin().0.await.unwrap().unwrap_err();
        assert_eq!(refused.code, ErrorCode::TooManyRequests);
        let begun = tokio::task::spawn_blocking(move || {
            for _ in 0..TURNS {
                begun.recv().unwrap();
            }
            begun
        });
        let begun = begun.await.unwrap();
        assert!(begun.try_recv().is_err(), "a third was begun");
        // A request that goes away leaves its turn with the work.
        let (first, end) = asked.remove(0);
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        assert_eq!(hashes.turns.available_permits(), 0);
        drop(end);
        drop(asked);
    }
}
