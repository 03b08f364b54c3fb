//! The fast path of a restart: events in order, without payloads and meta. Readers take turns at blocks of
//! records and decode ahead, while the caller folds.

use std::ops::{Bound, ControlFlow};
use std::sync::mpsc::{Receiver, sync_channel};

use crate::domain::event::Event;
use crate::domain::ids::{PlaneId, Seq};
use crate::domain::time::Timestamp;

use super::error::ReadError;
use super::record_codec::{self, Raw};
use super::store::{Direction, Snapshot, Table};
use super::{Ledger, batch, keys};

/// Records of a block: enough to make its hand-over cheap, few enough to stay in the caches.
const BLOCK_RECORDS: u64 = 1_024;
/// Blocks that each reader decodes ahead of the caller.
const BLOCKS_AHEAD: usize = 4;
/// Threads that read: two keep ahead of any fold, and more would only compete with it.
const READERS: u64 = 2;

/// An event, and how long its record's payload is or was before a purge.
pub type Replayed = (Event, u64);

type Block = Vec<(Seq, Timestamp, PlaneId, Replayed)>;

impl Ledger {
    /// Shows every event after `after`, in order; answers the last one's seq.
    pub fn replay(
        &self,
        after: Seq,
        mut f: impl FnMut(Seq, Timestamp, PlaneId, Replayed),
    ) -> Result<Seq, ReadError> {
        let (tail, _) = batch::tail(&*self.inner.store.snapshot()?)?;
        std::thread::scope(|scope| {
            let start = |reader| {
                let (sender, receiver) = sync_channel(BLOCKS_AHEAD);
                scope.spawn(move || {
                    for block in (reader..).step_by(READERS as usize) {
                        let Some((first, last)) = bounds(after, tail, block) else {
                            return;
                        };
                        // The caller may have stopped at an error.
                        if sender.send(self.block(first, last)).is_err() {
                            return;
                        }
                    }
                });
                receiver
            };
            let readers: Vec<Receiver<_>> = (0..READERS).map(start).collect();
            for receiver in readers.iter().cycle() {
                // A reader that has no further block hangs up, and the others have none either.
                let Ok(block) = receiver.recv() else { break };
                for (seq, at, plane, event) in block? {
                    f(seq, at, plane, event);
                }
            }
            Ok(tail.max(after))
        })
    }

    fn block(&self, first: Seq, last: Seq) -> Result<Block, ReadError> {
        // Records are never removed, so a later snapshot shows the same ones.
        let snapshot = self.inner.store.snapshot()?;
        let mut block = Block::with_capacity(BLOCK_RECORDS as usize);
        let failure = scan(&*snapshot, first, last, &mut block)?;
        if let Some(error) = failure {
            return Err(error);
        }
        let next = first + block.len() as u64;
        if next <= last {
            return Err(bad(next, "it is missing"));
        }
        Ok(block)
    }
}

/// The first and last seq of a block.
fn bounds(after: Seq, tail: Seq, block: u64) -> Option<(Seq, Seq)> {
    let first = after + 1 + block * BLOCK_RECORDS;
    (first <= tail).then(|| (first, tail.min(first + BLOCK_RECORDS - 1)))
}

fn scan(
    snapshot: &dyn Snapshot,
    first: Seq,
    last: Seq,
    block: &mut Block,
) -> Result<Option<ReadError>, ReadError> {
    let mut failure = None;
    let (from, to) = (keys::seq(first), keys::seq(last));
    let bounds = (Bound::Included(&from[..]), Bound::Included(&to[..]));
    snapshot.scan(Table::Events, bounds, Direction::Up, &mut |key, value| {
        let expected = first + block.len() as u64;
        match decode_one(expected, keys::parse_seq(key), value) {
            Ok(event) => {
                block.push(event);
                ControlFlow::Continue(())
            }
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        }
    })?;
    Ok(failure)
}

fn decode_one(
    expected: Seq,
    seq: Option<Seq>,
    bytes: &[u8],
) -> Result<(Seq, Timestamp, PlaneId, Replayed), ReadError> {
    if seq != Some(expected) {
        return Err(bad(expected, "it is missing"));
    }
    let cut_short = || bad(expected, "cut short");
    let (at, plane, event, payload_len) = Raw::event_of(bytes).ok_or_else(cut_short)?;
    let event = record_codec::decode(expected, event)?;
    Ok((expected, at, plane, (event, u64::from(payload_len))))
}

fn bad(seq: Seq, detail: &str) -> ReadError {
    ReadError::BadRecord {
        seq,
        detail: detail.to_owned(),
    }
}
