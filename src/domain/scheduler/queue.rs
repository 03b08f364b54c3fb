//! Waiting jobs in buckets by what they need; in each of these a lane for each tenant, in the order in which its
//! jobs will be served. `fair` says whose turn it is.
//!
//! Order in a lane: `queued_at + priority × ageing`, a key that never changes while a job waits, so that ageing
//! costs nothing: a job gains one level on all later ones by waiting `ageing_ms_per_level`.

use std::collections::{BTreeMap, BTreeSet};

use smol_str::SmolStr;

use crate::domain::ids::{PlaneId, RunId};
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

/// Runs in order.
pub type RunsIter<'a> = std::iter::Copied<std::iter::Flatten<std::slice::Iter<'a, Vec<OrderKey>>>>;

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

    pub fn iter(&self) -> RunsIter<'_> {
        self.chunks.iter().flatten().copied()
    }

    /// The chunk that holds `key` or would: the last one that does not start after it. Most keys are appended, so the
    /// last of all is looked at first.
    fn chunk_of(&self, key: &OrderKey) -> usize {
        if self.chunks.last().is_some_and(|last| last[0] <= *key) {
            return self.chunks.len() - 1;
        }
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
        let (before, after) = self.chunks.split_at(at);
        let sum = |chunks: &[Vec<OrderKey>]| chunks.iter().map(Vec::len).sum::<usize>();
        // Whichever is nearer.
        let before = match before.len() < after.len() {
            true => sum(before),
            false => self.len - sum(after),
        };
        before + self.chunks[at].partition_point(|other| other < key)
    }
}

/// Whose jobs a lane holds: a tenant's, without those of users that have quotas of their own, who wait apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneKey {
    pub tenant: SmolStr,
    /// The plane of a user with quotas of its own.
    pub user: Option<PlaneId>,
}

/// Jobs of one shape and one tenant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lane {
    pub waiting: OrderedRuns,
    /// Waiting jobs by priority level, index 0 is priority 1.
    pub by_priority: [u64; 5],
}

impl Lane {
    /// The level of the most urgent waiting job, index 0 is priority 1.
    pub fn most_urgent(&self) -> Option<usize> {
        self.by_priority.iter().position(|count| *count > 0)
    }
}

/// One shape: the jobs that need the same thing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Those with waiting jobs.
    lanes: BTreeMap<LaneKey, Lane>,
    waiting: usize,
    /// Jobs of this shape that will want a place later: paused, preempted, or backing off; by tenant, of those with any.
    held: BTreeMap<SmolStr, u64>,
    /// Waiting jobs by priority level, index 0 is priority 1.
    pub by_priority: [u64; 5],
    parking: Parking,
}

/// Why a shape is parked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parking {
    /// The job that was tried last; those before it have places promised. `None` when all have.
    pub tried: Option<OrderKey>,
    /// So many jobs have places on their way: one more opens it.
    pub enough_for: Option<usize>,
    /// It may get going when tenants' shares change.
    pub by_share: bool,
    /// No service takes such jobs: only one that comes opens it.
    pub unserved: bool,
}

impl Shape {
    /// The level of the most urgent waiting job, index 0 is priority 1.
    pub fn most_urgent(&self) -> Option<usize> {
        self.by_priority.iter().position(|count| *count > 0)
    }

    /// Waiting jobs in all lanes.
    pub fn len(&self) -> usize {
        self.waiting
    }

    pub fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    pub fn lanes(&self) -> &BTreeMap<LaneKey, Lane> {
        &self.lanes
    }

    pub fn lane(&self, key: &LaneKey) -> Option<&Lane> {
        self.lanes.get(key)
    }

    /// Whether any job of a tenant waits here.
    pub fn awaits(&self, tenant: &SmolStr) -> bool {
        let first = LaneKey {
            tenant: tenant.clone(),
            user: None,
        };
        let next = self.lanes.range(first..).next();
        next.is_some_and(|(key, _)| key.tenant == *tenant)
    }

    /// Whether any job of a tenant waits here, or will want a place later.
    pub fn wants(&self, tenant: &SmolStr) -> bool {
        self.awaits(tenant) || self.held.contains_key(tenant)
    }

    /// Of all lanes' first jobs the one with the smallest key.
    pub fn first(&self) -> Option<OrderKey> {
        let firsts = self.lanes.values().filter_map(|lane| lane.waiting.first());
        firsts.min()
    }

    /// Whether jobs of several lanes wait, so that whose turn it is changes with what their tenants use.
    pub fn is_contested(&self) -> bool {
        self.lanes.len() > 1
    }

    fn lane_mut(&mut self, key: &LaneKey) -> &mut Lane {
        if !self.lanes.contains_key(key) {
            self.lanes.insert(key.clone(), Lane::default());
        }
        self.lanes.entry(key.clone()).or_default()
    }
}

/// All waiting jobs.
#[derive(Clone, Debug, Default)]
pub struct Queue {
    shapes: BTreeMap<Target, Shape>,
    /// Shapes worth trying: their chances have changed since they were last tried.
    open: BTreeSet<Target>,
    /// Shapes with waiting jobs that some service may take. Anybody can think up any number of others, which must not
    /// cost a decision anything.
    served: BTreeSet<Target>,
    /// Those in which several lanes wait.
    contested: BTreeSet<Target>,
    /// Shapes parked until shares change, perhaps opened since.
    by_share: BTreeSet<Target>,
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

    /// Adds a waiting job. Its shape is tried again when the job comes before the one that was tried, or may, or is
    /// one more than have places on their way.
    pub fn push(&mut self, target: &Target, lane: &LaneKey, key: OrderKey, priority: Priority) {
        self.change(target, Some(lane), |shape| {
            let list = shape.lane_mut(lane);
            list.waiting.insert(key);
            list.by_priority[usize::from(priority.get() - 1)] += 1;
            shape.by_priority[usize::from(priority.get() - 1)] += 1;
            shape.waiting += 1;
            let one_more = shape.parking.enough_for.is_some_and(|n| shape.waiting > n);
            one_more || shape.is_contested() || shape.parking.tried.is_none_or(|tried| key < tried)
        });
        self.waiting += 1;
    }

    /// Puts many waiting jobs, in any order, into a lane that has none yet.
    pub fn fill(&mut self, target: &Target, lane: &LaneKey, jobs: &[(OrderKey, Priority)]) {
        let mut keys: Vec<OrderKey> = jobs.iter().map(|(key, _)| *key).collect();
        keys.sort_unstable();
        self.change(target, Some(lane), |shape| {
            for (_, priority) in jobs {
                shape.by_priority[usize::from(priority.get() - 1)] += 1;
                shape.lane_mut(lane).by_priority[usize::from(priority.get() - 1)] += 1;
            }
            shape.lane_mut(lane).waiting = OrderedRuns::from_sorted(&keys);
            shape.waiting += keys.len();
            true
        });
        self.waiting += jobs.len() as u64;
    }

    /// Takes a waiting job out. The next of its shape is tried when it was the one that was tried, or may be.
    pub fn take(&mut self, target: &Target, lane: &LaneKey, key: &OrderKey, priority: Priority) {
        let mut taken = false;
        self.change(target, Some(lane), |shape| {
            let contested = shape.is_contested();
            let list = shape.lane_mut(lane);
            taken = list.waiting.remove(key);
            if taken {
                list.by_priority[usize::from(priority.get() - 1)] -= 1;
            }
            if list.waiting.is_empty() {
                shape.lanes.remove(lane);
            }
            if taken {
                shape.by_priority[usize::from(priority.get() - 1)] -= 1;
                shape.waiting -= 1;
            }
            contested || shape.parking.tried.is_none_or(|tried| *key <= tried)
        });
        if taken {
            self.waiting -= 1;
        }
    }

    /// Counts a job of this shape that waits outside the queue.
    pub fn hold(&mut self, target: &Target, tenant: &SmolStr) {
        self.change(target, None, |shape| {
            *shape.held.entry(tenant.clone()).or_default() += 1;
            false
        });
    }

    pub fn unhold(&mut self, target: &Target, tenant: &SmolStr) {
        self.change(target, None, |shape| {
            if let Some(held) = shape.held.get_mut(tenant) {
                *held -= 1;
                if *held == 0 {
                    shape.held.remove(tenant);
                }
            }
            false
        });
    }

    /// Changes one shape, and one lane of it. `change` says whether to open it.
    fn change(
        &mut self,
        target: &Target,
        lane: Option<&LaneKey>,
        change: impl FnOnce(&mut Shape) -> bool,
    ) {
        if !self.shapes.contains_key(target) {
            self.shapes.insert(target.clone(), Shape::default());
        }
        let Some(shape) = self.shapes.get_mut(target) else {
            return;
        };
        let most_urgent = |shape: &Shape| {
            let lane = lane.and_then(|key| shape.lane(key));
            (shape.most_urgent(), lane.and_then(Lane::most_urgent))
        };
        let before = most_urgent(shape);
        let opens = change(shape);
        if most_urgent(shape) != before {
            // Who may push whom aside depends on it.
            self.open_all = true;
        }
        let is_served = !shape.is_empty() && !shape.parking.unserved;
        put(&mut self.served, target, is_served);
        put(
            &mut self.contested,
            target,
            is_served && shape.is_contested(),
        );
        if !is_served {
            self.open.remove(target);
            self.by_share.remove(target);
        } else if opens && !self.open.contains(target) {
            self.open.insert(target.clone());
        }
        if shape.is_empty() && shape.held.is_empty() {
            self.shapes.remove(target);
        }
    }

    /// Parks a shape that was tried in vain, until something that matters to it changes.
    pub fn park(&mut self, target: &Target, parking: Parking) {
        if let Some(shape) = self.shapes.get_mut(target) {
            self.open.remove(target);
            shape.parking = parking;
            put(&mut self.by_share, target, parking.by_share);
            if parking.unserved {
                self.served.remove(target);
                self.contested.remove(target);
            }
        }
    }

    /// A service came that takes such jobs, or may.
    pub fn serve(&mut self, target: &Target) {
        if let Some(shape) = self.shapes.get_mut(target) {
            shape.parking.unserved = false;
            put(&mut self.served, target, !shape.is_empty());
            put(&mut self.contested, target, shape.is_contested());
        }
        self.unpark(target);
    }

    /// Lets a shape be tried again.
    pub fn unpark(&mut self, target: &Target) {
        if self.served.contains(target) && !self.open.contains(target) {
            self.open.insert(target.clone());
        }
    }

    /// Lets every shape be tried again: memory, services or the order of urgency changed.
    pub fn unpark_all(&mut self) {
        self.open_all = true;
    }

    /// Lets the shapes be tried again to which it matters what tenants have used: it may be another's turn now.
    pub fn unpark_shared(&mut self) {
        self.open.extend(self.contested.iter().cloned());
        self.open.extend(self.by_share.iter().cloned());
    }

    /// The shapes worth trying, by name; `fair` puts them in order.
    pub fn open(&mut self) -> &BTreeSet<Target> {
        if std::mem::take(&mut self.open_all) {
            self.open.clone_from(&self.served);
        }
        &self.open
    }
}

/// Puts a target into a set, or takes it out.
fn put(set: &mut BTreeSet<Target>, target: &Target, is_in: bool) {
    match is_in {
        true if !set.contains(target) => {
            set.insert(target.clone());
        }
        true => {}
        false => {
            set.remove(target);
        }
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
