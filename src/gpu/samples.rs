//! The newest samples, in memory, and a way to wait for the next.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::reading::{Fault, GpuReading};
use crate::domain::time::Timestamp;

/// All GPUs at one moment.
#[derive(Clone, Debug)]
pub struct Sample {
    /// When it began to be taken.
    pub began: Instant,
    pub at: Timestamp,
    pub gpus: Vec<GpuReading>,
    /// What was reported since the sample before.
    pub faults: Vec<Fault>,
}

/// Cloneable handle on the newest samples.
#[derive(Clone)]
pub struct Samples {
    inner: Arc<Inner>,
}

struct Inner {
    capacity: usize,
    ring: Mutex<VecDeque<Arc<Sample>>>,
    newest: watch::Sender<Option<Arc<Sample>>>,
    /// Somebody does not want to wait until the next is due.
    wanted: AtomicBool,
}

impl Samples {
    /// Keeps at most `capacity`.
    pub fn new(capacity: usize) -> Samples {
        Samples {
            inner: Arc::new(Inner {
                capacity: capacity.max(1),
                ring: Mutex::default(),
                newest: watch::Sender::new(None),
                wanted: AtomicBool::new(false),
            }),
        }
    }

    pub(super) fn push(&self, sample: Sample) {
        let sample = Arc::new(sample);
        {
            let mut ring = self.ring();
            if ring.len() >= self.inner.capacity {
                ring.pop_front();
            }
            ring.push_back(sample.clone());
        }
        self.inner.newest.send_replace(Some(sample));
    }

    /// `None` before the first, and where nothing is sampled.
    pub fn newest(&self) -> Option<Arc<Sample>> {
        self.inner.newest.borrow().clone()
    }

    /// The kept ones, oldest first.
    pub fn all(&self) -> Vec<Arc<Sample>> {
        self.ring().iter().cloned().collect()
    }

    /// Those of the last `span`, oldest first.
    pub fn last(&self, span: Duration) -> Vec<Arc<Sample>> {
        let ring = self.ring();
        let recent = ring.iter().filter(|sample| sample.began.elapsed() <= span);
        recent.cloned().collect()
    }

    /// Those that began after `moment`, oldest first, as soon as there is one.
    pub async fn all_after(&self, moment: Instant) -> Vec<Arc<Sample>> {
        self.after(moment).await;
        let ring = self.ring();
        let later = ring.iter().filter(|sample| sample.began > moment);
        later.cloned().collect()
    }

    /// A sample that began after `moment`: the newest, as soon as there is one.
    pub async fn after(&self, moment: Instant) -> Arc<Sample> {
        let mut newest = self.inner.newest.subscribe();
        let later = |sample: &Option<Arc<Sample>>| {
            sample.as_ref().is_some_and(|sample| sample.began > moment)
        };
        let found = newest.wait_for(later).await.ok().and_then(|s| s.clone());
        match found {
            Some(sample) => sample,
            // The sender lies in the handle, which is borrowed here: it cannot be gone.
            None => std::future::pending().await,
        }
    }

    /// A sample that begins from now on, taken as soon as can be.
    pub async fn soon(&self) -> Arc<Sample> {
        let moment = Instant::now();
        self.inner.wanted.store(true, Ordering::Relaxed);
        self.after(moment).await
    }

    /// Whether one is wanted now, which it then is no more.
    pub(super) fn take_wanted(&self) -> bool {
        self.inner.wanted.swap(false, Ordering::Relaxed)
    }

    fn ring(&self) -> MutexGuard<'_, VecDeque<Arc<Sample>>> {
        self.inner
            .ring
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::domain::spec::{GpuFacts, GpuSource};
    use crate::gpu::reading::ProcessReading;

    /// A GPU with so much memory, so much of it taken by whom nobody knows.
    pub fn gpu(uuid: &str, memory_mib: u64, taken_mib: u64) -> GpuReading {
        GpuReading {
            facts: GpuFacts {
                uuid: uuid.into(),
                index: 0,
                name: "GPU".into(),
                memory_mib,
                source: GpuSource::Nvml,
            },
            parent: None,
            unified: false,
            used_mib: taken_mib,
            free_mib: memory_mib - taken_mib,
            utilization_pct: Some(50),
            temperature_c: None,
            power_mw: None,
            clock_mhz: None,
            memory_clock_mhz: None,
            ecc_uncorrected: Some(0),
            processes: Vec::new(),
        }
    }

    pub fn process(pid: u32, memory_mib: u64) -> ProcessReading {
        ProcessReading {
            pid,
            name: "p".into(),
            memory_mib: Some(memory_mib),
            computes: true,
            draws: false,
            owner: None,
        }
    }

    pub fn sample(gpus: Vec<GpuReading>) -> Sample {
        Sample {
            began: Instant::now(),
            at: Timestamp(0),
            gpus,
            faults: Vec::new(),
        }
    }

    #[tokio::test]
    async fn a_sample_that_had_begun_before_is_not_waited_for() {
        let samples = Samples::new(2);
        let early = sample(Vec::new());
        let moment = Instant::now();
        let waiting = samples.clone();
        let found = tokio::spawn(async move { waiting.after(moment).await });
        samples.push(early);
        tokio::task::yield_now().await;
        assert!(!found.is_finished());
        samples.push(sample(vec![gpu("a", 1, 0)]));
        assert_eq!(found.await.unwrap().gpus.len(), 1);
    }

    #[test]
    fn the_oldest_make_room() {
        let samples = Samples::new(2);
        for memory in 1..=3 {
            samples.push(sample(vec![gpu("a", memory, 0)]));
        }
        let kept = samples.all();
        let kept: Vec<u64> = kept.iter().map(|s| s.gpus[0].facts.memory_mib).collect();
        assert_eq!(kept, [2, 3]);
        assert_eq!(samples.last(Duration::from_secs(60)).len(), 2);
    }

    #[tokio::test]
    async fn whoever_was_slow_sees_what_it_missed() {
        let samples = Samples::new(5);
        samples.push(sample(Vec::new()));
        let moment = Instant::now();
        for memory in 1..=3 {
            samples.push(sample(vec![gpu("a", memory, 0)]));
        }
        let missed = samples.all_after(moment).await;
        assert_eq!(missed.len(), 3);
        assert_eq!(missed[0].gpus[0].facts.memory_mib, 1);
    }
}
