//! Slow hashes: few at a time and not many in line, so that the rest of the processor is for requests.

use std::sync::Arc;
use std::time::Duration;

use metrics::counter;
use tokio::sync::Semaphore;

use super::error::{ApiError, ErrorCode};

/// Computed at once: each takes a core for tens of milliseconds, and a password's 19 MiB.
const AT_ONCE: usize = 2;

/// Computed and waiting at most.
const IN_LINE: usize = 64;

/// How long a request waits for its turn.
const WAIT: Duration = Duration::from_secs(2);

/// Where slow hashes are computed.
pub struct SlowHashes {
    turns: Arc<Semaphore>,
    line: Semaphore,
}

impl SlowHashes {
    pub fn new() -> SlowHashes {
        SlowHashes {
            turns: Arc::new(Semaphore::new(AT_ONCE)),
            line: Semaphore::new(IN_LINE),
        }
    }

    /// Does the work off the runtime when its turn has come; 429 when that would take too long.
    pub async fn compute<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let _place = self.line.try_acquire().map_err(|_| busy())?;
        let turn = tokio::time::timeout(WAIT, Arc::clone(&self.turns).acquire_owned());
        let turn = turn.await.map_err(|_| busy())?.map_err(|_| busy())?;
        let computed = tokio::task::spawn_blocking(move || {
            // Held by the work, not by its request, which may go away.
            let _turn = turn;
            counter!("rungate_slow_hashes_total").increment(1);
            work()
        });
        computed.await.map_err(|error| {
            tracing::error!(%error, "a slow hash was not computed");
            ApiError::internal()
        })
    }
}

fn busy() -> ApiError {
    ApiError::new(
        ErrorCode::TooManyRequests,
        "Too Many Requests (token and password checks)",
    )
    .retry_after(1)
}
