//! Asks the machine again and again, on a thread of its own: a driver that hangs holds up nothing else.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nvml_wrapper::{EventSet, Nvml};

use super::amd::Amd;
use super::attribution::{Attribution, Owners};
use super::reading::Fault;
use super::samples::{Sample, Samples};
use super::{Machine, nvml};
use crate::clock::now;
use crate::domain::ids::GpuUuid;
use crate::domain::machine::QuarantineCause;

/// Errors that applications cause: the GPU is as good as before.
const XIDS_OF_APPLICATIONS: [u64; 6] = [13, 31, 43, 45, 68, 109];

/// How soon and how late the library is opened anew while a GPU is missing: only then a GPU that has come back is seen.
const REOPEN_FIRST: Duration = Duration::from_secs(5);
const REOPEN_MAX: Duration = Duration::from_secs(300);

/// How long a stop, or the wish for a sample, may go unnoticed.
const NAP: Duration = Duration::from_millis(50);

/// Ends the sampling when dropped.
pub struct Sampler {
    stop: Arc<AtomicBool>,
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Begins to take a sample each `every`.
pub fn start(
    machine: Machine,
    every: Duration,
    owners: Box<dyn Owners>,
    samples: Samples,
) -> io::Result<Sampler> {
    let stop = Arc::new(AtomicBool::new(false));
    let mut work = Work {
        machine,
        every,
        owners,
        samples,
        stop: stop.clone(),
        attribution: Attribution::default(),
        faults: Vec::new(),
        unnamed: None,
        known: BTreeSet::new(),
        patience: REOPEN_FIRST,
        due: Instant::now(),
    };
    let named = thread::Builder::new().name("gpu-sampler".into());
    named.spawn(move || work.run())?;
    Ok(Sampler { stop })
}

struct Work {
    machine: Machine,
    every: Duration,
    owners: Box<dyn Owners>,
    samples: Samples,
    stop: Arc<AtomicBool>,
    attribution: Attribution,
    /// Since the last sample.
    faults: Vec<Fault>,
    /// An error of a GPU that could not say which it is.
    unnamed: Option<u64>,
    /// Every GPU seen so far.
    known: BTreeSet<GpuUuid>,
    /// How long a missing GPU is waited for before the library is opened anew.
    patience: Duration,
    /// When the next sample is.
    due: Instant,
}

impl Work {
    fn run(&mut self) {
        while !self.stopped() {
            let nvml = nvml::open(&self.machine.nvml_library).ok();
            let events = nvml.as_ref().and_then(nvml::events);
            self.session(nvml.as_ref(), events.as_ref());
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Samples until the library is to be opened anew.
    fn session(&mut self, nvml: Option<&Nvml>, events: Option<&EventSet<'_>>) {
        let began = Instant::now();
        while !self.stopped() {
            let is_whole = self.sample(nvml);
            if is_whole {
                self.patience = REOPEN_FIRST;
            } else if began.elapsed() >= self.patience {
                self.patience = (self.patience * 2).min(REOPEN_MAX);
                return;
            }
            let now = Instant::now();
            if self.due <= now {
                self.due = (self.due + self.every).max(now);
            }
            self.listen(events);
        }
    }

    /// Takes one sample. `false` when a GPU is missing.
    fn sample(&mut self, nvml: Option<&Nvml>) -> bool {
        let (began, at) = (Instant::now(), now());
        let proc = self.machine.proc.clone();
        let read = nvml.map(|nvml| nvml::read(nvml, &proc));
        let (mut gpus, failed) = read.map_or((Vec::new(), false), |read| (read.gpus, read.failed));
        let first = u32::try_from(gpus.len()).unwrap_or(0);
        gpus.extend(Amd::new(&self.machine).read(first));
        self.attribution.attribute(&mut gpus, &*self.owners, &proc);
        let seen: BTreeSet<GpuUuid> = gpus.iter().map(|gpu| gpu.facts.uuid.clone()).collect();
        let is_whole = !failed && self.known.is_subset(&seen);
        if let (Some(xid), Some(before)) = (self.unnamed.take(), self.samples.newest()) {
            let gone = before.gpus.iter().map(|gpu| &gpu.facts.uuid);
            for gpu in gone.filter(|uuid| !seen.contains(*uuid)) {
                self.hear(gpu, xid);
            }
        }
        self.known.extend(seen);
        self.samples.push(Sample {
            began,
            at,
            gpus,
            faults: std::mem::take(&mut self.faults),
        });
        is_whole
    }

    /// Takes in what the driver reports until the next sample is due or wanted.
    fn listen(&mut self, events: Option<&EventSet<'_>>) {
        loop {
            let left = self.due.saturating_duration_since(Instant::now());
            if left.is_zero() || self.stopped() || self.samples.take_wanted() {
                return;
            }
            let nap = left.min(NAP);
            let heard = events.map(|set| {
                let ms = u32::try_from(nap.as_millis()).unwrap_or(u32::MAX);
                nvml::next_xid(set, ms.max(1))
            });
            match heard {
                Some(Ok(Some((Some(gpu), xid)))) => self.hear(&gpu, xid),
                // Whoever is missing at the next look.
                Some(Ok(Some((None, xid)))) => self.unnamed = Some(xid),
                Some(Ok(None)) => {}
                // It cannot be waited there: the time passes all the same.
                Some(Err(_)) | None => thread::sleep(nap),
            }
        }
    }

    /// An error of a GPU that is divided is one of all its parts.
    fn hear(&mut self, gpu: &GpuUuid, xid: u64) {
        if XIDS_OF_APPLICATIONS.contains(&xid) {
            tracing::info!(gpu = %gpu, xid, "an application caused an error on a GPU");
            return;
        }
        tracing::warn!(gpu = %gpu, xid, "a GPU reported an error");
        let newest = self.samples.newest();
        let parts = newest.iter().flat_map(|sample| &sample.gpus);
        let mut struck: Vec<GpuUuid> = parts
            .filter(|part| part.parent.as_ref() == Some(gpu))
            .map(|part| part.facts.uuid.clone())
            .collect();
        if struck.is_empty() {
            struck.push(gpu.clone());
        }
        self.faults.extend(struck.into_iter().map(|gpu| Fault {
            gpu,
            cause: QuarantineCause::Xid,
            detail: format!("the driver reported XID {xid}"),
        }));
    }
}
