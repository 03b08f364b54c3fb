//! An engine whose own disk is full: its fault, and nobody else's. Tries are made further and further apart.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// As every system says it.
const SAID: &str = "no space left on device";
/// Between the first failure and the next try, doubled by each further one.
const FIRST: Duration = Duration::from_secs(1);
const LAST: Duration = Duration::from_secs(10);

/// Whether an engine's refusal is about its disk.
pub fn is_full(message: &str) -> bool {
    message.contains(SAID)
}

/// When it may be tried again.
#[derive(Debug, Default)]
pub struct Space(Mutex<Option<(Instant, Duration)>>);

impl Space {
    /// It was full.
    pub fn failed(&self, now: Instant) {
        let mut next = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *next = Some(match *next {
            // Several at once are one try.
            Some((at, pause)) if now < at => (at, pause),
            Some((_, pause)) => {
                let pause = (pause * 2).min(LAST);
                (now + pause, pause)
            }
            None => (now + FIRST, FIRST),
        });
    }

    /// There was enough.
    pub fn found(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// When the next try may be made; `None` for now.
    pub fn next_try(&self) -> Option<Instant> {
        let next = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        next.map(|(at, _)| at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_get_rarer_until_one_succeeds() {
        let (space, start) = (Space::default(), Instant::now());
        assert_eq!(space.next_try(), None);
        let mut now = start;
        for seconds in [1, 2, 4, 8, 10, 10] {
            space.failed(now);
            // Beside it.
            space.failed(now);
            let next = space.next_try().unwrap();
            assert_eq!(next - now, Duration::from_secs(seconds));
            now = next;
        }
        space.found();
        assert_eq!(space.next_try(), None);
    }
}
