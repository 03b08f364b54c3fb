//! Waiting jobs in buckets by what they need, each in the order in which it will be served.
//!
//! Order: `queued_at + priority × ageing`, a key that never changes while a job waits, so that ageing
//! costs nothing: a job gains one level on all later ones by waiting `ageing_ms_per_level`.

use std::collections::BTreeMap;

use crate::domain::ids::RunId;
use crate::domain::spec::{Priority, Target};
use crate::domain::time::Timestamp;

/// A waiting job's place in its shape: smaller is served first, equal keys in order of creation.
pub type OrderKey = (i64, RunId);

/// A run list kept in order, with ranks. Chunks of at most `CHUNK` keep an insertion's memory move short
/// and a rank's sum over few chunks: at 1,000,000 entries both take about a microsecond.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OrderedRuns {
    chunks: Vec<Vec<OrderKey>>,
    len: usize,
}

/// Longest chunk: 32 KiB of keys, half of a usual first-level cache.
const CHUNK: usize = 1024;

impl OrderedRuns {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn first(&self) -> Option<OrderKey> {
        self.chunks.first().and_then(|chunk| chunk.first()).copied()
    }

    pub fn iter(&self) -> impl Iterator<Item = OrderKey> + '_ {
        self.chunks.iter().flatten().copied()
    }

    /// The chunk that holds `key` or would: the last one that does not start after it.
    fn chunk_of(&self, key: &OrderKey) -> usize {
        self.chunks
            .partition_point(|chunk| chunk[0] <= *key)
            .saturating_sub(1)
    }

    pub fn insert(&mut self, key: OrderKey) {
        if self.chunks.is_empty() {
            self.chunks.push(vec![key]);
            self.len = 1;
            return;
        }
        let at = self.chunk_of(&key);
        let chunk = &mut self.chunks[at];
        let Err(place) = chunk.binary_search(&key) else {
            return;
        };
        chunk.insert(place, key);
        self.len += 1;
        if chunk.len() > CHUNK {
            // Appending is the usual case: leave the full part full, and the new part room to grow.
            let split = if place + 1 == chunk.len() {
                CHUNK
            } else {
                CHUNK / 2
            };
            let tail = chunk.split_off(split);
            self.chunks.insert(at + 1, tail);
        }
    }

    pub fn remove(&mut self, key: &OrderKey) -> bool {
        if self.chunks.is_empty() {
            return false;
        }
        let at = self.chunk_of(key);
        let Ok(place) = self.chunks[at].binary_search(key) else {
            return false;
        };
        self.chunks[at].remove(place);
        self.len -= 1;
        if self.chunks[at].is_empty() {
            self.chunks.remove(at);
        }
        true
    }

    /// A whole list at once.
    fn from_sorted(keys: &[OrderKey]) -> OrderedRuns {
        OrderedRuns {
            chunks: keys.chunks(CHUNK).map(<[OrderKey]>::to_vec).collect(),
            len: keys.len(),
        }
    }

    /// How many are served before `key`.
    pub fn rank(&self, key: &OrderKey) -> usize {
        if self.chunks.is_empty() {
            return 0;
        }
        let at = self.chunk_of(key);
        let before: usize = self.chunks[..at].iter().map(Vec::len).sum();
        before + self.chunks[at].partition_point(|other| other < key)
    }
}

/// One shape: the jobs that need the same thing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    pub waiting: OrderedRuns,
    /// Jobs of this shape that will want a place later: paused, preempted, or backing off.
    pub held: u64,
    /// Waiting jobs by priority level, index 0 is priority 1.
    pub by_priority: [u64; 5],
    /// Worth trying: its chances have changed since it was last tried.
    open: bool,
    /// The job that was tried last; those before it have places promised. `None` when all have.
    tried: Option<OrderKey>,
    /// Parked because so many jobs have places on their way: one more opens it.
    enough_for: Option<usize>,
}

impl Shape {
    /// The level of the most urgent waiting job, index 0 is priority 1.
    pub fn most_urgent(&self) -> Option<usize> {
        self.by_priority.iter().position(|count| *count > 0)
    }
}

/// All waiting jobs.
#[derive(Clone, Debug, Default)]
pub struct Queue {
    shapes: BTreeMap<Target, Shape>,
    /// The open shapes by their first job's place.
    open: BTreeMap<OrderKey, Target>,
    /// Something changed that may matter to any shape: all are opened before the next one is looked for.
    open_all: bool,
    ageing_us_per_level: i64,
    waiting: u64,
}

impl Queue {
    pub fn new(ageing_ms_per_level: u64) -> Self {
        let us = i64::try_from(ageing_ms_per_level.saturating_mul(1_000)).unwrap_or(i64::MAX / 8);
        Queue {
            ageing_us_per_level: us,
            ..Queue::default()
        }
    }

    /// Where a job of this age and priority stands.
    pub fn key(&self, run: RunId, queued_at: Timestamp, priority: Priority) -> OrderKey {
        let levels = i64::from(priority.get() - 1);
        let key = queued_at
            .0
            .saturating_add(levels.saturating_mul(self.ageing_us_per_level));
        (key, run)
    }

    pub fn shape(&self, target: &Target) -> Option<&Shape> {
        self.shapes.get(target)
    }

    pub fn shapes(&self) -> impl Iterator<Item = (&Target, &Shape)> {
        self.shapes.iter()
    }

    /// Waiting jobs in all.
    pub fn len(&self) -> u64 {
        self.waiting
    }

    pub fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    /// Adds a waiting job. Its shape is tried again when the job comes before the one that was tried, or is
    /// one more than have places on their way.
    pub fn push(&mut self, target: &Target, key: OrderKey, priority: Priority) {
        self.change(target, |shape| {
            shape.waiting.insert(key);
            shape.by_priority[usize::from(priority.get() - 1)] += 1;
            let one_more = shape.enough_for.is_some_and(|n| shape.waiting.len() > n);
            one_more || shape.tried.is_none_or(|tried| key < tried)
        });
        self.waiting += 1;
    }

    /// Takes a waiting job out. The next of its shape is tried when it was the one that was tried.
    /// Puts many waiting jobs, in any order, into a shape that has none yet.
    pub fn fill(&mut self, target: &Target, jobs: &[(OrderKey, Priority)]) {
        let mut keys: Vec<OrderKey> = jobs.iter().map(|(key, _)| *key).collect();
        keys.sort_unstable();
        self.change(target, |shape| {
            for (_, priority) in jobs {
                shape.by_priority[usize::from(priority.get() - 1)] += 1;
            }
            shape.waiting = OrderedRuns::from_sorted(&keys);
            true
        });
        self.waiting += jobs.len() as u64;
    }

    pub fn take(&mut self, target: &Target, key: &OrderKey, priority: Priority) {
        let mut taken = false;
        self.change(target, |shape| {
            taken = shape.waiting.remove(key);
            if taken {
                shape.by_priority[usize::from(priority.get() - 1)] -= 1;
            }
            shape.tried.is_none_or(|tried| *key <= tried)
        });
        if taken {
            self.waiting -= 1;
        }
    }

    /// Counts a job of this shape that waits outside the queue.
    pub fn hold(&mut self, target: &Target) {
        self.change(target, |shape| {
            shape.held += 1;
            false
        });
    }

    pub fn unhold(&mut self, target: &Target) {
        self.change(target, |shape| {
            shape.held = shape.held.saturating_sub(1);
            false
        });
    }

    /// Changes one shape and keeps the order of open shapes true. `change` says whether to open it.
    fn change(&mut self, target: &Target, change: impl FnOnce(&mut Shape) -> bool) {
        if !self.shapes.contains_key(target) {
            self.shapes.insert(target.clone(), Shape::default());
        }
        let Some(shape) = self.shapes.get_mut(target) else {
            return;
        };
        let first = shape.waiting.first();
        let most_urgent = shape.most_urgent();
        let opens = change(shape);
        if shape.most_urgent() != most_urgent {
            // Who may push whom aside depends on it.
            self.open_all = true;
        }
        let was_open = shape.open;
        shape.open = (was_open || opens) && !shape.waiting.is_empty();
        let (now_open, now_first) = (shape.open, shape.waiting.first());
        if was_open && (!now_open || now_first != first) {
            first.map(|key| self.open.remove(&key));
        }
        if now_open && (!was_open || now_first != first) {
            now_first.map(|key| self.open.insert(key, target.clone()));
        }
        if shape.waiting.is_empty() && shape.held == 0 {
            self.shapes.remove(target);
        }
    }

    /// Parks a shape, of which `tried` was tried in vain, until something that matters to it changes;
    /// `enough_for` as many jobs have places on their way, so that one more is a reason to try again.
    pub fn park(&mut self, target: &Target, tried: Option<OrderKey>, enough_for: Option<usize>) {
        if let Some(shape) = self.shapes.get_mut(target) {
            shape.open = false;
            shape.tried = tried;
            shape.enough_for = enough_for;
            shape.waiting.first().map(|key| self.open.remove(&key));
        }
    }

    /// Lets a shape be tried again.
    pub fn unpark(&mut self, target: &Target) {
        if let Some(shape) = self.shapes.get_mut(target)
            && let Some(key) = shape.waiting.first()
            && !shape.open
        {
            shape.open = true;
            self.open.insert(key, target.clone());
        }
    }

    /// Lets every shape be tried again: memory, services or the order of urgency changed.
    pub fn unpark_all(&mut self) {
        self.open_all = true;
    }

    /// The open shape whose first job is served first.
    pub fn next_open(&mut self) -> Option<Target> {
        if std::mem::take(&mut self.open_all) {
            for (target, shape) in &mut self.shapes {
                if let Some(key) = shape.waiting.first()
                    && !shape.open
                {
                    shape.open = true;
                    self.open.insert(key, target.clone());
                }
            }
        }
        self.open
            .first_key_value()
            .map(|(_, target)| target.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use uuid::Uuid;

    fn key(n: i64) -> OrderKey {
        (n, RunId(Uuid::from_u128(u128::from(n.unsigned_abs()))))
    }

    #[test]
    fn ranks_agree_with_a_sorted_list_under_insertions_and_removals() {
        let mut runs = OrderedRuns::default();
        let mut model = BTreeSet::new();
        let mut x: u64 = 7;
        for step in 0..20_000 {
            x = x
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let k = key(i64::try_from(x >> 50).unwrap());
            if step % 3 == 2 {
                assert_eq!(runs.remove(&k), model.remove(&k));
            } else {
                runs.insert(k);
                model.insert(k);
            }
            assert_eq!(runs.len(), model.len());
            assert_eq!(runs.rank(&k), model.range(..k).count());
            assert_eq!(runs.first(), model.first().copied());
        }
        assert!(runs.iter().eq(model.iter().copied()));
    }

    #[test]
    fn a_long_wait_outweighs_a_level_of_priority() {
        let queue = Queue::new(60_000);
        let run = RunId(Uuid::nil());
        let old = queue.key(run, Timestamp::from_millis(0), Priority::new(4).unwrap());
        let soon = queue.key(
            run,
            Timestamp::from_millis(59_000),
            Priority::new(3).unwrap(),
        );
        let late = queue.key(
            run,
            Timestamp::from_millis(61_000),
            Priority::new(3).unwrap(),
        );
        assert!(soon < old && old < late);
    }
}
