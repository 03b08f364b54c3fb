//! How much one caller does at once: a count for each that does something now, and for nobody else.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustc_hash::FxBuildHasher;

/// Callers rarely wait for each other.
const SHARDS: usize = 32;

/// The counts of one bound. As many are kept as there are callers at work, which other bounds hold.
pub struct Shares {
    max: u32,
    hasher: RandomState,
    shards: Box<[Mutex<HashMap<u64, u32, FxBuildHasher>>]>,
}

/// One thing that a caller does; ends when dropped.
pub struct Share {
    shares: Arc<Shares>,
    key: u64,
}

impl Shares {
    /// At most `max` at once for each caller.
    pub fn new(max: u32) -> Arc<Shares> {
        Arc::new(Shares {
            max,
            hasher: RandomState::new(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
        })
    }

    /// One more for `caller`; `None` when it has all that it may have.
    pub fn take(self: &Arc<Shares>, caller: &impl Hash) -> Option<Share> {
        let key = self.hasher.hash_one(caller);
        {
            let mut counts = self.counts(key);
            let count = counts.entry(key).or_insert(0);
            if *count >= self.max {
                return None;
            }
            *count += 1;
        }
        let shares = Arc::clone(self);
        Some(Share { shares, key })
    }

    fn counts(&self, key: u64) -> MutexGuard<'_, HashMap<u64, u32, FxBuildHasher>> {
        let shard = &self.shards[key as usize % SHARDS];
        // Nothing panics while it is held.
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut counts = self.shares.counts(self.key);
        if let Some(count) = counts.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_caller_has_its_own_count_and_what_ends_leaves_nothing() {
        let shares = Shares::new(2);
        let (first, _second) = (shares.take(&"a").unwrap(), shares.take(&"a").unwrap());
        assert!(shares.take(&"a").is_none());
        assert!(shares.take(&"b").is_some());
        drop(first);
        let again = shares.take(&"a").unwrap();
        assert!(shares.take(&"a").is_none());
        drop((again, _second));
        assert!(shares.shards.iter().all(|s| s.lock().unwrap().is_empty()));
    }
}
