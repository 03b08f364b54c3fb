//! When a snapshot of State is worth its time: the coordinator does nothing else while it writes one.

use std::time::{Duration, Instant};

/// Records that make a snapshot worthwhile in a quiet moment: a hundredth of a second of replay.
const IDLE_RECORDS: u64 = 10_000;

/// Records after which a gateway that is never quiet writes one all the same: about a second of replay.
const BUSY_RECORDS: u64 = 1_000_000;

/// How many records a busy gateway appends for each live run before it writes them all down again. A million waiting
/// runs make a snapshot of 70 MiB, which takes about a third of a second; so many records take a hundred times as long.
const RECORDS_PER_JOB: u64 = 4;

/// When to write a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotRules {
    /// How long no record was appended.
    pub idle: Duration,
    /// Records since the last snapshot that make one worthwhile then.
    pub idle_records: u64,
    /// Records since the last snapshot after which it is written without waiting for that, unless State is so large
    /// that it would be written too often.
    pub busy_records: u64,
}

impl SnapshotRules {
    /// The gateway's own, with `idle` as configured.
    pub fn after(idle: Duration) -> SnapshotRules {
        SnapshotRules {
            idle,
            idle_records: IDLE_RECORDS,
            busy_records: BUSY_RECORDS,
        }
    }

    /// Whether one is due, `records` after the last one, with `jobs` live and the last record appended at `last_work`.
    pub(super) fn due(&self, records: u64, jobs: usize, last_work: Instant) -> bool {
        if records < self.idle_records.min(self.busy_records) {
            return false;
        }
        let large = RECORDS_PER_JOB.saturating_mul(jobs as u64);
        records >= self.busy_records.max(large)
            || (records >= self.idle_records && last_work.elapsed() >= self.idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_gateway_writes_snapshots_too_but_seldom_when_they_are_large() {
        let rules = SnapshotRules::after(Duration::from_secs(3_600));
        let due = |records, jobs| rules.due(records, jobs, Instant::now());
        assert!(!due(999_999, 0));
        assert!(due(1_000_000, 0));
        assert!(due(1_000_000, 250_000));
        assert!(!due(3_999_999, 1_000_000));
        assert!(due(4_000_000, 1_000_000));
    }

    #[test]
    fn a_quiet_gateway_writes_one_when_it_has_something_to_write() {
        let rules = SnapshotRules::after(Duration::ZERO);
        assert!(!rules.due(9_999, 0, Instant::now()));
        assert!(rules.due(10_000, 1_000_000, Instant::now()));
    }
}
