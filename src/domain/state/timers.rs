//! Deadlines in order. An index over State, rebuilt when a snapshot is read: an entry says when to look,
//! the entity itself says whether anything is due.

use std::collections::{BTreeMap, BTreeSet};

use crate::domain::ids::{RunId, ServiceName};
use crate::domain::spec::Target;
use crate::domain::time::Timestamp;

/// What to look at when a deadline passes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TimerKey {
    /// A run's time to live, the end of its backoff, or of its stop.
    Job(RunId),
    /// A service's start-up limit, drain limit, restart or idle stop.
    Service(ServiceName),
    /// A blocked shape whose chances change with time alone.
    Shape(Target),
}

/// All deadlines, earliest first. Services and shapes have one entry each, so that looking at them often
/// leaves nothing behind.
#[derive(Clone, Debug, Default)]
pub struct Timers {
    /// Apart from the others: there may be a million.
    jobs: BTreeSet<(Timestamp, RunId)>,
    others: BTreeSet<(Timestamp, TimerKey)>,
    set: BTreeMap<TimerKey, Timestamp>,
}

impl Timers {
    pub fn arm_job(&mut self, at: Timestamp, run: RunId) {
        self.jobs.insert((at, run));
    }

    /// Many at once, in any order.
    pub fn arm_jobs(&mut self, due: Vec<(Timestamp, RunId)>) {
        self.jobs.append(&mut due.into_iter().collect());
    }

    pub fn disarm_job(&mut self, at: Timestamp, run: RunId) {
        self.jobs.remove(&(at, run));
    }

    /// The one entry of a service or shape: replaced, or taken away.
    pub fn set(&mut self, key: TimerKey, at: Option<Timestamp>) {
        let before = match at {
            Some(at) => self.set.insert(key.clone(), at),
            None => self.set.remove(&key),
        };
        if before == at {
            return;
        }
        if let Some(before) = before {
            self.others.remove(&(before, key.clone()));
        }
        if let Some(at) = at {
            self.others.insert((at, key));
        }
    }

    /// The earliest deadline.
    pub fn next(&self) -> Option<Timestamp> {
        let jobs = self.jobs.first().map(|(at, _)| *at);
        let others = self.others.first().map(|(at, _)| *at);
        jobs.into_iter().chain(others).min()
    }

    /// Takes the earliest entry that is due at `now`; of equal ones a job's.
    pub fn pop(&mut self, now: Timestamp) -> Option<TimerKey> {
        let next = self.next().filter(|at| *at <= now)?;
        if self.jobs.first().is_some_and(|(at, _)| *at == next) {
            return self.jobs.pop_first().map(|(_, run)| TimerKey::Job(run));
        }
        let (_, key) = self.others.pop_first()?;
        self.set.remove(&key);
        Some(key)
    }
}
