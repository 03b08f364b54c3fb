//! Replies that are kept under Idempotency-Keys are forgotten after a day. No index tells how old they are: a walk
//! through all of them, a step at a time, costs a start nothing.

use std::ops::{Bound, ControlFlow};
use std::time::Duration;

use crate::domain::ids::Seq;
use crate::domain::time::Timestamp;

use super::batch::{Batch, StoredReply};
use super::error::{CommitError, ReadError};
use super::read;
use super::store::{Direction, Table};

/// How long a reply is kept at least.
pub const KEY_LIFE_MS: u64 = 24 * 60 * 60 * 1_000;

/// Replies that one step looks at: some thousandths of a second.
const STEP_ROWS: usize = 4_096;
/// Replies that one step removes.
const STEP_REMOVED: usize = 1_000;

/// Between two steps of a walk, and between two walks.
const STEP_EVERY: Duration = Duration::from_secs(1);
const WALK_EVERY: Duration = Duration::from_secs(60);

/// How far the walk is.
#[derive(Default)]
pub(super) struct KeyWalk {
    /// The last key looked at; empty at the beginning.
    after: Vec<u8>,
    /// Replies to requests that were recorded before this are old.
    before: Seq,
}

impl Batch<'_> {
    /// Removes some of the replies that are older than `KEY_LIFE_MS`. Answers when to come again.
    pub fn expire_keys(&mut self, now: Timestamp) -> Result<Duration, CommitError> {
        if self.writer.keys.after.is_empty() {
            let life_us = KEY_LIFE_MS.cast_signed() * 1_000;
            let oldest = Timestamp(now.0.saturating_sub(life_us));
            let tail = self.writer.next_seq - 1;
            self.writer.keys.before = read::first_at(&*self.snapshot, tail, oldest)?;
        }
        let KeyWalk { after, before } = std::mem::take(&mut self.writer.keys);
        let (mut examined, mut old, mut last) = (0, Vec::new(), None);
        let bounds = (Bound::Excluded(&after[..]), Bound::Unbounded);
        let visit = |key: &[u8], bytes: &[u8]| {
            let reply: StoredReply = read::entry(Table::Idempotency, bytes)?;
            if reply.seq < before {
                old.push(key.to_vec());
            }
            examined += 1;
            if examined < STEP_ROWS && old.len() < STEP_REMOVED {
                return Ok::<_, ReadError>(ControlFlow::Continue(()));
            }
            last = Some(key.to_vec());
            Ok(ControlFlow::Break(()))
        };
        read::walk_range(
            &*self.snapshot,
            Table::Idempotency,
            bounds,
            Direction::Up,
            visit,
        )?;
        let is_full = old.len() >= STEP_REMOVED;
        for key in old {
            self.writes.remove(Table::Idempotency, key);
        }
        let Some(after) = last else {
            return Ok(WALK_EVERY);
        };
        self.writer.keys = KeyWalk { after, before };
        Ok(match is_full {
            true => Duration::ZERO,
            false => STEP_EVERY,
        })
    }
}
