//! Token buckets, one a key, in bounded memory: each key may ask `limit` times at once, and gets that many again over a
//! minute. Kept as the time at which a bucket will be full again (the generic cell rate algorithm, ITU-T I.371),
//! so that a full bucket is one that is not there.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustc_hash::FxBuildHasher;

/// What a limit is for. A bucket holds this much of requests, and fills in this time.
pub const WINDOW_S: u64 = 60;

const WINDOW_NS: u64 = WINDOW_S * NS_PER_S;
const NS_PER_S: u64 = 1_000_000_000;

/// Callers rarely wait for each other.
const SHARDS: usize = 32;

/// Buckets of a shard that are not full; those of all shards need about 2 MiB. Whoever comes when there are more shares
/// one bucket with its like, so that many addresses are no way around the limit.
const MAX_BUCKETS: usize = 2_048;

/// How often a shard looks for buckets that are full again, when it has no place left.
const SWEEP_NS: u64 = NS_PER_S / 10;

/// What is left in a bucket after a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// Requests that may still be made at once.
    pub remaining: u64,
    /// Seconds until the bucket is full, rounded up.
    pub full_in_s: u64,
    /// Seconds until the next request is let in; `None` when this one is.
    pub retry_after_s: Option<u32>,
}

/// All buckets of one limit.
pub struct Buckets {
    pace: Pace,
    began: Instant,
    /// Keyed by chance: nobody can choose whose bucket to share.
    hasher: RandomState,
    shards: Box<[Mutex<Shard>]>,
}

/// How fast a bucket fills.
#[derive(Clone, Copy)]
struct Pace {
    /// Nanoseconds after which a bucket holds one request more.
    interval_ns: u64,
    /// Nanoseconds in which an empty bucket fills.
    depth_ns: u64,
}

impl Pace {
    fn new(per_minute: u64) -> Pace {
        let interval_ns = (WINDOW_NS / per_minute.max(1)).max(1);
        Pace {
            interval_ns,
            depth_ns: interval_ns * per_minute.clamp(1, WINDOW_NS),
        }
    }
}

#[derive(Default)]
struct Shard {
    /// When each bucket will be full, in nanoseconds since the beginning. Keys are hashes already.
    full_at: HashMap<u64, u64, FxBuildHasher>,
    /// The shared bucket of those who have no place.
    rest_full_at: u64,
    swept_at: u64,
}

impl Buckets {
    /// `per_minute` is at least 1.
    pub fn new(per_minute: u64) -> Buckets {
        Buckets {
            pace: Pace::new(per_minute),
            began: Instant::now(),
            hasher: RandomState::new(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
        }
    }

    /// Whether `key`'s bucket is empty at `now`, so that the next request would be refused. Takes none.
    pub fn is_empty(&self, key: &impl Hash, now: Instant) -> bool {
        let now_ns = ns(now.saturating_duration_since(self.began));
        let key = self.hasher.hash_one(key);
        let full_at = self.shard(key).full_at(key);
        full_at.saturating_sub(now_ns) + self.pace.interval_ns > self.pace.depth_ns
    }

    fn shard(&self, key: u64) -> MutexGuard<'_, Shard> {
        let shard = &self.shards[key as usize % SHARDS];
        // Nothing panics while it is held.
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one request out of `key`'s bucket at `now`, unless it is empty.
    pub fn take(&self, key: &impl Hash, now: Instant) -> Level {
        self.take_at(self.pace, key, now)
    }

    /// The same of a bucket that has a limit of its own.
    pub fn take_of(&self, per_minute: u64, key: &impl Hash, now: Instant) -> Level {
        self.take_at(Pace::new(per_minute), key, now)
    }

    fn take_at(&self, pace: Pace, key: &impl Hash, now: Instant) -> Level {
        let now_ns = ns(now.saturating_duration_since(self.began));
        let key = self.hasher.hash_one(key);
        let mut shard = self.shard(key);
        let full_at = shard.bucket(key, now_ns);
        let mut fills_in = full_at.saturating_sub(now_ns) + pace.interval_ns;
        let retry_after_s = match fills_in.checked_sub(pace.depth_ns) {
            None | Some(0) => {
                *full_at = now_ns + fills_in;
                None
            }
            Some(wait_ns) => {
                fills_in -= pace.interval_ns;
                Some(u32::try_from(wait_ns.div_ceil(NS_PER_S)).unwrap_or(u32::MAX))
            }
        };
        Level {
            remaining: pace.depth_ns.saturating_sub(fills_in) / pace.interval_ns,
            full_in_s: fills_in.div_ceil(NS_PER_S),
            retry_after_s,
        }
    }
}

impl Shard {
    /// When a key's bucket will be full; in the past when it is.
    fn full_at(&self, key: u64) -> u64 {
        match self.full_at.get(&key) {
            Some(full_at) => *full_at,
            None if self.full_at.len() >= MAX_BUCKETS => self.rest_full_at,
            None => 0,
        }
    }

    /// Where it is kept when a key's bucket will be full.
    fn bucket(&mut self, key: u64, now_ns: u64) -> &mut u64 {
        let is_new = !self.full_at.contains_key(&key);
        if is_new && self.full_at.len() >= MAX_BUCKETS {
            if now_ns.saturating_sub(self.swept_at) >= SWEEP_NS {
                self.swept_at = now_ns;
                self.full_at.retain(|_, full_at| *full_at > now_ns);
            }
            if self.full_at.len() >= MAX_BUCKETS {
                return &mut self.rest_full_at;
            }
        }
        self.full_at.entry(key).or_insert(0)
    }
}

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(buckets: &Buckets, ms: u64) -> Instant {
        buckets.began + Duration::from_millis(ms)
    }

    #[test]
    fn a_bucket_lets_in_what_it_holds_and_then_one_an_interval() {
        let buckets = Buckets::new(60);
        for left in (0..60).rev() {
            let level = buckets.take(&"a", after(&buckets, 0));
            assert_eq!((level.remaining, level.retry_after_s), (left, None));
        }
        assert!(buckets.is_empty(&"a", after(&buckets, 999)));
        assert!(!buckets.is_empty(&"a", after(&buckets, 1_000)));
        assert!(!buckets.is_empty(&"b", after(&buckets, 0)));
        let level = buckets.take(&"a", after(&buckets, 0));
        assert_eq!(
            level,
            Level {
                remaining: 0,
                full_in_s: 60,
                retry_after_s: Some(1)
            }
        );
        assert_eq!(
            buckets.take(&"a", after(&buckets, 999)).retry_after_s,
            Some(1)
        );
        assert_eq!(
            buckets.take(&"a", after(&buckets, 1_000)).retry_after_s,
            None
        );
        assert_eq!(
            buckets.take(&"a", after(&buckets, 1_000)).retry_after_s,
            Some(1)
        );
        let level = buckets.take(&"a", after(&buckets, 61_000));
        assert_eq!((level.remaining, level.full_in_s), (59, 1));
    }

    #[test]
    fn a_slow_limit_says_when_to_come_back() {
        let buckets = Buckets::new(2);
        buckets.take(&1, after(&buckets, 0));
        buckets.take(&1, after(&buckets, 0));
        assert_eq!(
            buckets.take(&1, after(&buckets, 10_500)).retry_after_s,
            Some(20)
        );
    }

    #[test]
    fn keys_do_not_share_a_bucket() {
        let buckets = Buckets::new(1);
        for key in 0..100 {
            assert_eq!(buckets.take(&key, after(&buckets, 0)).retry_after_s, None);
            assert!(
                buckets
                    .take(&key, after(&buckets, 0))
                    .retry_after_s
                    .is_some()
            );
        }
    }

    #[test]
    fn any_number_of_keys_needs_bounded_memory_and_is_bounded() {
        let buckets = Buckets::new(1);
        let all = SHARDS * MAX_BUCKETS;
        let asks = 4 * all;
        let let_in = (0..asks)
            .filter(|key| {
                buckets
                    .take(key, after(&buckets, 0))
                    .retry_after_s
                    .is_none()
            })
            .count();
        assert!(let_in <= all + SHARDS, "{let_in}");
        let held = |buckets: &Buckets| -> usize {
            let shards = buckets.shards.iter();
            shards
                .map(|shard| shard.lock().unwrap().full_at.len())
                .sum()
        };
        assert_eq!(held(&buckets), all);
        // When they are full again they make room.
        for key in asks..asks + SHARDS * 8 {
            buckets.take(&key, after(&buckets, 61_000));
        }
        assert!(held(&buckets) <= SHARDS * 8 + MAX_BUCKETS);
    }
}
