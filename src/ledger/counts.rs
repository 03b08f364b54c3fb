//! How many runs stand in each status, over all planes: counted when it is first asked, and kept up by each commit.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Ledger;
use super::error::{ReadError, StoreError};
use super::listing;
use super::projection::run::RunStatus;

/// What a commit changes in the number of runs of each status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moves([i64; RunStatus::ALL.len()]);

impl Moves {
    /// A run's status changes; `None` where it does not exist.
    pub fn count(&mut self, before: Option<RunStatus>, after: Option<RunStatus>) {
        for (status, by) in [(before, -1), (after, 1)] {
            if let Some(status) = status {
                self.0[usize::from(status.number())] += by;
            }
        }
    }

    fn plus(self, other: Moves, sign: i64) -> Moves {
        Moves(std::array::from_fn(|i| self.0[i] + sign * other.0[i]))
    }
}

/// The counts of an open ledger.
#[derive(Default)]
pub(super) struct StatusCounts(Mutex<Counts>);

#[derive(Default)]
struct Counts {
    /// Since the ledger was opened.
    moved: Moves,
    /// As they were then, once somebody has asked.
    opened: Option<Moves>,
}

impl StatusCounts {
    /// Commits, and counts what it moves: nobody sees one without the other.
    pub fn commit(
        &self,
        moves: Moves,
        commit: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        if moves == Moves::default() {
            return commit();
        }
        let mut counts = self.lock();
        commit()?;
        counts.moved = counts.moved.plus(moves, 1);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        // Each change is a single assignment, so a panic elsewhere cannot have torn it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ledger {
    /// How many runs stand in each status, over all planes. The first question goes through all runs.
    pub fn runs_by_status(&self) -> Result<Vec<(RunStatus, u64)>, ReadError> {
        let (opened, moved, snapshot) = {
            let counts = self.inner.counts.lock();
            let snapshot = match counts.opened {
                Some(_) => None,
                None => Some(self.inner.store.snapshot()?),
            };
            (counts.opened, counts.moved, snapshot)
        };
        let now = match (opened, snapshot) {
            (Some(opened), _) => opened.plus(moved, 1),
            (None, Some(snapshot)) => {
                let mut now = Moves::default();
                for (status, count) in listing::count_by_status(&*snapshot)? {
                    now.0[usize::from(status.number())] = count.cast_signed();
                }
                self.inner.counts.lock().opened = Some(now.plus(moved, -1));
                now
            }
            (None, None) => Moves::default(),
        };
        let counts = now.0.map(|count| u64::try_from(count).unwrap_or(0));
        Ok(RunStatus::ALL.into_iter().zip(counts).collect())
    }
}
