//! Following: every record after a position, in order, without gap or repeat. A follower joins the live
//! ring first, reads from disk up to the tail, then takes live frames; when it falls behind it reads
//! from disk again.
//!
//! Memory: a follower holds its ring position and at most one chunk from disk (16 records or 8 KiB of
//! payload, whichever is met first, though always one record); live frames are shared by all.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::domain::ids::{Cursor, Seq};
use crate::domain::record::Record;

use super::error::ReadError;
use super::hub::{Live, Topic};
use super::read::{self, Chunk};
use super::{Ledger, Scope, view};

/// What a follower reads from disk at once.
const DISK_CHUNK: Chunk = Chunk {
    records: 16,
    payload_bytes: 8 << 10,
};

/// A record as a stream shows it, rendered once and shared by all who follow it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub seq: Seq,
    /// 0 when the record belongs to no run.
    pub cursor: Cursor,
    /// The record as `docs` and design section 6 show it; part of `sse`.
    pub json: Bytes,
    /// A whole `text/event-stream` frame. Its `id` is the cursor on a run's stream, else the seq.
    pub sse: Bytes,
    /// It ended its run. A `retry` may bring the run back.
    pub ends_run: bool,
}

impl Frame {
    pub(super) fn new(topic: Topic, record: &Record, json: &[u8]) -> Frame {
        let (name, position) = match topic {
            Topic::Run { .. } => ("cursor", record.cursor),
            Topic::Plane(_) | Topic::All => ("seq", record.seq),
        };
        let head =
            format!("id: {position}\nevent: step\ndata: {{\"{name}\":{position},\"record\":");
        let mut sse = Vec::with_capacity(head.len() + json.len() + 3);
        sse.extend_from_slice(head.as_bytes());
        sse.extend_from_slice(json);
        sse.extend_from_slice(b"}\n\n");
        let sse = Bytes::from(sse);
        Frame {
            seq: record.seq,
            cursor: record.cursor,
            json: sse.slice(head.len()..head.len() + json.len()),
            sse,
            ends_run: record.event.ends_run(),
        }
    }

    fn position(&self, topic: Topic) -> u64 {
        match topic {
            Topic::Run { .. } => self.cursor,
            Topic::Plane(_) | Topic::All => self.seq,
        }
    }
}

/// Reads a topic from a position on, for ever.
pub struct Follower {
    ledger: Ledger,
    topic: Topic,
    /// The position of the last frame given out.
    after: u64,
    /// Up to where the disk was read; ahead of `after` where other planes' records lie between.
    examined: u64,
    /// Frames read from disk and not yet given out.
    ready: VecDeque<Arc<Frame>>,
    /// There may be frames on disk that the ring will not bring.
    behind: bool,
    /// `None` only while dropping.
    ring: Option<broadcast::Receiver<Live>>,
}

impl Follower {
    pub(super) fn new(ledger: Ledger, topic: Topic, after: u64) -> Follower {
        let ring = Some(ledger.inner.hub.subscribe(topic));
        Follower {
            ledger,
            topic,
            after,
            examined: after,
            ready: VecDeque::new(),
            behind: true,
            ring,
        }
    }

    /// The next record's frame; waits for one. May be dropped and called again without loss.
    ///
    /// # Errors
    /// When the disk cannot be read; `Closed` when the ledger goes away.
    pub async fn next(&mut self) -> Result<Arc<Frame>, ReadError> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                self.after = frame.position(self.topic);
                self.examined = self.examined.max(self.after);
                return Ok(frame);
            }
            if self.behind {
                self.read_disk().await?;
                continue;
            }
            let ring = self.ring.as_mut().ok_or(ReadError::Closed)?;
            match ring.recv().await {
                Ok(Live::Frame(frame)) => self.take_live(frame),
                Ok(Live::Gap) | Err(RecvError::Lagged(_)) => self.behind = true,
                Err(RecvError::Closed) => return Err(ReadError::Closed),
            }
        }
    }

    /// The position after which it goes on.
    pub fn position(&self) -> u64 {
        self.after
    }

    fn take_live(&mut self, frame: Arc<Frame>) {
        let position = frame.position(self.topic);
        if position <= self.examined {
            return;
        }
        // Runs and the whole ledger count without holes, so a hole is something missed. A plane's
        // seqs have holes; there the ring tells of every loss.
        let has_holes = matches!(self.topic, Topic::Plane(_));
        if has_holes || position == self.examined + 1 {
            self.ready.push_back(frame);
        } else {
            self.behind = true;
        }
    }

    async fn read_disk(&mut self) -> Result<(), ReadError> {
        let turn = self.ledger.inner.hub.disk_readers.acquire().await;
        let _turn = turn.map_err(|_| ReadError::Closed)?;
        let (ledger, topic, after) = (self.ledger.clone(), self.topic, self.examined);
        let read = tokio::task::spawn_blocking(move || frames(&ledger, topic, after, DISK_CHUNK));
        let (frames, examined) = read.await.map_err(|_| ReadError::Closed)??;
        self.behind = examined > self.examined;
        self.examined = examined;
        self.ready.extend(frames);
        Ok(())
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        if let Some(ring) = self.ring.take() {
            self.ledger.inner.hub.unsubscribe(self.topic, ring);
        }
    }
}

/// A chunk of a topic's frames from disk, and the position up to which it looked.
fn frames(
    ledger: &Ledger,
    topic: Topic,
    after: u64,
    chunk: Chunk,
) -> Result<(Vec<Arc<Frame>>, u64), ReadError> {
    let snapshot = ledger.inner.store.snapshot()?;
    let (records, examined) = match topic {
        Topic::Run { plane, run } => {
            let records = read::run_records(&*snapshot, plane, run, after, chunk)?;
            let last = records.last().map_or(after, |record| record.cursor);
            (records, last)
        }
        Topic::Plane(plane) => read::records(&*snapshot, Scope::Plane(plane), after, chunk)?,
        Topic::All => read::records(&*snapshot, Scope::All, after, chunk)?,
    };
    let mut contexts = view::Contexts::new(&*snapshot);
    let mut frames = Vec::with_capacity(records.len());
    for record in &records {
        let json = view::json(record, &contexts.of(record)?);
        frames.push(Arc::new(Frame::new(topic, record, &json)));
    }
    Ok((frames, examined))
}
