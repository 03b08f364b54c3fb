//! From commits to live followers: a bounded queue to one publishing thread, which renders each record
//! once and puts it into the ring of each topic that somebody follows. A commit never waits for it:
//! what does not fit is dropped and told as a gap, and followers read it from disk.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Semaphore, broadcast, watch};

use crate::domain::ids::{PlaneId, RunId, Seq};
use crate::domain::record::Record;

use super::follow::Frame;
use super::view;

/// Frames that a topic's ring keeps: what a follower may fall behind before it reads from disk. A ring
/// thus holds at most 128 × 64 KiB.
const RING_FRAMES: usize = 128;
/// A larger record is not put into rings; followers read it from disk.
const MAX_RING_PAYLOAD_BYTES: usize = 64 << 10;
/// Batches on their way to the publisher.
const QUEUED_BATCHES: usize = 64;
/// Payload bytes on their way to the publisher.
const MAX_QUEUED_BYTES: usize = 8 << 20;
/// Followers that read from disk at the same moment; the others wait their turn.
const DISK_READERS: usize = 4;

/// What is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Topic {
    /// One run's records, by cursor.
    Run { plane: PlaneId, run: RunId },
    /// A plane's records, by seq.
    Plane(PlaneId),
    /// The whole ledger, by seq.
    All,
}

/// A committed record on its way to followers.
pub(super) struct Published {
    pub record: Record,
    /// What its frames show beside it.
    pub context: view::Context,
}

impl Published {
    fn topics(&self) -> [Option<Topic>; 3] {
        let plane = self.record.plane;
        let run = self.record.event.run().filter(|_| self.record.cursor > 0);
        let run = run.map(|run| Topic::Run { plane, run });
        [run, Some(Topic::Plane(plane)), Some(Topic::All)]
    }
}

/// What a ring carries.
#[derive(Clone)]
pub(super) enum Live {
    Frame(Arc<Frame>),
    /// Something was left out: read from disk.
    Gap,
}

type Rings = Arc<Mutex<HashMap<Topic, broadcast::Sender<Live>>>>;

/// Followers and how to reach them.
pub(super) struct Hub {
    tail: watch::Sender<Seq>,
    rings: Rings,
    queue: SyncSender<Vec<Published>>,
    missed: Arc<AtomicBool>,
    queued_bytes: Arc<AtomicUsize>,
    followers: AtomicUsize,
    pub disk_readers: Semaphore,
}

impl Hub {
    /// Starts the publishing thread; it ends when the hub is dropped.
    pub fn start(tail: Seq) -> std::io::Result<Hub> {
        let (queue, incoming) = sync_channel(QUEUED_BATCHES);
        let hub = Hub {
            tail: watch::Sender::new(tail),
            rings: Rings::default(),
            queue,
            missed: Arc::default(),
            queued_bytes: Arc::default(),
            followers: AtomicUsize::new(0),
            disk_readers: Semaphore::new(DISK_READERS),
        };
        let publisher = Publisher {
            incoming,
            rings: hub.rings.clone(),
            missed: hub.missed.clone(),
            queued_bytes: hub.queued_bytes.clone(),
        };
        std::thread::Builder::new()
            .name("ledger-publish".into())
            .spawn(move || publisher.run())?;
        Ok(hub)
    }

    pub fn tail(&self) -> Seq {
        *self.tail.borrow()
    }

    pub fn watch(&self) -> watch::Receiver<Seq> {
        self.tail.subscribe()
    }

    pub fn followers(&self) -> usize {
        self.followers.load(Ordering::Relaxed)
    }

    /// Whether anybody follows anything.
    pub fn is_followed(&self) -> bool {
        !lock(&self.rings).is_empty()
    }

    /// Shows committed records: the new tail to all who watch it, the records to those who follow them. `None` when
    /// nobody followed as they were made: who has come since reads them from disk.
    pub fn publish(&self, tail: Seq, records: Option<Vec<Published>>) {
        self.tail.send_replace(tail);
        let Some(mut records) = records else {
            if self.is_followed() {
                self.miss();
            }
            return;
        };
        {
            let rings = lock(&self.rings);
            if rings.is_empty() {
                return;
            }
            records.retain(|published| {
                let mut topics = published.topics().into_iter().flatten();
                topics.any(|topic| rings.contains_key(&topic))
            });
        }
        if records.is_empty() {
            return;
        }
        let large = |published: &Published| published.record.payload.len() > MAX_RING_PAYLOAD_BYTES;
        let bytes = records
            .iter()
            .map(|published| published.record.payload.len())
            .sum();
        let queued = self.queued_bytes.load(Ordering::Relaxed);
        if records.iter().any(large) || queued + bytes > MAX_QUEUED_BYTES {
            return self.miss();
        }
        self.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        if let Err(TrySendError::Full(_)) = self.queue.try_send(records) {
            self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.miss();
        }
    }

    /// Tells the publisher that followers must look on disk. The flag is set before the wake-up is
    /// tried: should the queue be full, the publisher takes something later and sees it then.
    fn miss(&self) {
        self.missed.store(true, Ordering::SeqCst);
        let _ = self.queue.try_send(Vec::new());
    }

    /// Joins a topic's ring.
    pub fn subscribe(&self, topic: Topic) -> broadcast::Receiver<Live> {
        let followers = self.followers.fetch_add(1, Ordering::Relaxed) + 1;
        metrics::gauge!("rungate_ledger_followers").set(followers as f64);
        let mut rings = lock(&self.rings);
        let ring = rings
            .entry(topic)
            .or_insert_with(|| broadcast::Sender::new(RING_FRAMES));
        ring.subscribe()
    }

    /// Leaves it, and drops the ring when nobody is left.
    pub fn unsubscribe(&self, topic: Topic, receiver: broadcast::Receiver<Live>) {
        drop(receiver);
        let mut rings = lock(&self.rings);
        if rings
            .get(&topic)
            .is_some_and(|ring| ring.receiver_count() == 0)
        {
            rings.remove(&topic);
        }
        drop(rings);
        let followers = self.followers.fetch_sub(1, Ordering::Relaxed) - 1;
        metrics::gauge!("rungate_ledger_followers").set(followers as f64);
    }
}

/// The publishing thread.
struct Publisher {
    incoming: Receiver<Vec<Published>>,
    rings: Rings,
    missed: Arc<AtomicBool>,
    queued_bytes: Arc<AtomicUsize>,
}

impl Publisher {
    fn run(self) {
        while let Ok(records) = self.incoming.recv() {
            // Before the records: those that were missed come earlier in the ledger.
            if self.missed.swap(false, Ordering::SeqCst) {
                for ring in lock(&self.rings).values() {
                    let _ = ring.send(Live::Gap);
                }
            }
            for published in records {
                self.publish(&published);
                let bytes = published.record.payload.len();
                self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            }
        }
    }

    fn publish(&self, published: &Published) {
        let topics = published.topics();
        let rings: Vec<_> = {
            let rings = lock(&self.rings);
            let followed = |topic: Topic| Some((topic, rings.get(&topic)?.clone()));
            topics.into_iter().flatten().filter_map(followed).collect()
        };
        if rings.is_empty() {
            return;
        }
        let json = view::json(&published.record, &published.context);
        for (topic, ring) in rings {
            let frame = Frame::new(topic, &published.record, &json);
            // Nobody listening any more is no failure.
            let _ = ring.send(Live::Frame(Arc::new(frame)));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The map is whole after each single operation on it, so a panic elsewhere cannot have torn it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
