//! Waiting for conditions, never for times.

use std::time::{Duration, Instant};

/// Longest wait for anything: far more than it takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Asks until the answer is yes; fails the test when it never is.
#[track_caller]
pub fn until<'a, F, Fut>(what: &'a str, mut holds: F) -> impl Future<Output = ()> + use<'a, F, Fut>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let caller = std::panic::Location::caller();
    async move {
        let start = Instant::now();
        while !holds().await {
            assert!(
                start.elapsed() < PATIENCE,
                "never came true: {what} (at {caller})"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
