//! Reading how the GPUs were used, minute by minute.

use std::ops::{Bound, ControlFlow};

use crate::domain::event::Event;
use crate::domain::ids::Seq;
use crate::domain::machine::GpuUse;
use crate::domain::time::Timestamp;

use super::error::ReadError;
use super::store::{Direction, Table};
use super::{Ledger, keys, read};

/// One sum of the samples of all GPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuUseView {
    pub seq: Seq,
    pub since: Timestamp,
    /// When it was summed.
    pub until: Timestamp,
    pub gpus: Vec<GpuUse>,
}

impl Ledger {
    /// The newest `limit` sums that were made after `after` and up to `before`, oldest first.
    pub fn gpu_use(
        &self,
        after: Timestamp,
        before: Timestamp,
        limit: usize,
    ) -> Result<Vec<GpuUseView>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        let (from, to) = (keys::instant(after), keys::instant(before));
        if from >= to {
            return Ok(Vec::new());
        }
        let bounds = (Bound::Excluded(&from[..]), Bound::Included(&to[..]));
        let mut seqs = Vec::new();
        snapshot.scan(Table::GpuUse, bounds, Direction::Down, &mut |_, value| {
            seqs.extend(keys::parse_seq(value));
            match seqs.len() < limit {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        })?;
        let mut found = Vec::with_capacity(seqs.len());
        for seq in seqs.into_iter().rev() {
            let record = read::record(&*snapshot, seq)?;
            if let Some((until, Event::GpuUseSummed { since, gpus })) =
                record.map(|record| (record.at, record.event))
            {
                found.push(GpuUseView {
                    seq,
                    since,
                    until,
                    gpus,
                });
            }
        }
        Ok(found)
    }
}
