//! The machine's GPUs: sampling them, telling the coordinator what changes, and saying when an instance's memory has
//! come free.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;
use uuid::Uuid;

use crate::config::Config;
use crate::coordinator::{Handle, SubmitError};
use crate::domain::command::Command;
use crate::domain::ids::{Generation, GpuUuid, ServiceName};
use crate::driver::{ContainerOwners, Meter, Outcomes, StillHeld, Tasks, Unmetered, mark_of};
use crate::gpu::{
    self, Freed, GpuReading, Machine, Minutes, Owner, Owners, Sample, Sampler, Samples, Watch,
};

/// Between two looks at whether memory has come free.
const PAUSE: Duration = Duration::from_millis(100);

/// How far back samples are kept.
const KEPT: Duration = Duration::from_secs(600);

/// What measures the GPUs, if there are any to be measured.
pub struct Gpus {
    pub samples: Samples,
    /// To be told which containers instances live in.
    pub containers: ContainerOwners,
    config: Config,
    is_measured: bool,
    /// Before the first sample.
    since: std::time::Instant,
    /// Samples as long as it lives.
    _sampler: Option<Sampler>,
}

impl Gpus {
    /// Begins to sample if `is_measured`.
    pub fn start(config: &Config, is_measured: bool, ledger: Uuid) -> std::io::Result<Gpus> {
        let since = std::time::Instant::now();
        let every = Duration::from_millis(config.gpu_sample_ms);
        let capacity = KEPT.as_millis() / every.as_millis().max(1);
        let samples = Samples::new(usize::try_from(capacity).unwrap_or(usize::MAX));
        let machine = Machine::here(&config.nvml_library);
        let containers = ContainerOwners::default();
        let owners = Box::new(Marks {
            ledger,
            containers: containers.clone(),
        });
        let sampler = is_measured
            .then(|| gpu::start(machine, every, owners, samples.clone()))
            .transpose()?;
        Ok(Gpus {
            samples,
            containers,
            config: config.clone(),
            is_measured,
            since,
            _sampler: sampler,
        })
    }

    /// What tells the driver how much instances hold.
    pub fn meter(&self, handle: &Handle) -> Arc<dyn Meter> {
        if !self.is_measured {
            return Arc::new(Unmetered);
        }
        Arc::new(Measured {
            samples: self.samples.clone(),
            handle: handle.clone(),
            wait: Duration::from_millis(self.config.gpu_release_wait_ms),
        })
    }

    /// Tells the coordinator of each sample what is worth telling.
    pub fn watch(&self, handle: &Handle, outcomes: Outcomes, tasks: &Tasks) {
        if !self.is_measured {
            return;
        }
        let watching = watch(
            self.samples.clone(),
            handle.clone(),
            outcomes,
            (self.since, Minutes::new(self.config.gpu_history_ms)),
        );
        tasks.spawn("GPU watch", watching);
    }
}

async fn watch(
    samples: Samples,
    handle: Handle,
    outcomes: Outcomes,
    (mut last, mut minutes): (std::time::Instant, Minutes),
) {
    let mut watch = Watch::default();
    loop {
        let missed = samples.all_after(last).await;
        // A coordinator that has too much to do is asked again.
        let Ok(grants) = handle.ask(|state, _, _| grants(state)).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        for sample in missed {
            last = sample.began;
            for told in watch.look(&sample, &grants) {
                outcomes.report(told).await;
            }
            if let Some(sum) = minutes.add(&sample) {
                outcomes.report(Command::Seen(sum)).await;
            }
        }
    }
}

/// All grants of all instances.
fn grants(state: &crate::domain::state::State) -> Vec<(GpuUuid, Owner, u64)> {
    let mut all = Vec::new();
    for (name, service) in &state.services {
        if let Some(instance) = &service.instance {
            let owner = (name.clone(), instance.generation);
            let own = instance.grants.iter();
            all.extend(own.map(|grant| (grant.gpu.clone(), owner.clone(), grant.mib)));
        }
    }
    all
}

/// Whose processes are, by the marks in their environments.
struct Marks {
    ledger: Uuid,
    containers: ContainerOwners,
}

impl Owners for Marks {
    fn of_process(&self, pid: u32) -> Option<Owner> {
        let mark = mark_of(pid).filter(|mark| mark.ledger == self.ledger)?;
        Some((mark.service, mark.generation))
    }

    /// Those whose environment cannot be read, and those that were there before.
    fn of_container(&self, id: &str) -> Option<Owner> {
        self.containers.of(id)
    }
}

/// What the samples say of instances.
struct Measured {
    samples: Samples,
    handle: Handle,
    /// How long memory may stay taken.
    wait: Duration,
}

impl Meter for Measured {
    fn held_mib(
        &self,
        service: &ServiceName,
        generation: Generation,
        gpu: &GpuUuid,
    ) -> Option<u64> {
        let newest = self.samples.newest()?;
        let reading = newest.gpus.iter().find(|r| r.facts.uuid == *gpu)?;
        held_on(reading, &(service.clone(), generation))
    }

    fn next_sample(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.samples.soon().await;
        })
    }

    fn freed(
        &self,
        service: &ServiceName,
        generation: Generation,
    ) -> BoxFuture<'_, Vec<StillHeld>> {
        let owner = (service.clone(), generation);
        Box::pin(async move { self.wait_until_free(&owner).await })
    }

    fn stuck(
        &self,
        service: &ServiceName,
        generation: Generation,
    ) -> BoxFuture<'_, Vec<StillHeld>> {
        let owner = (service.clone(), generation);
        Box::pin(async move {
            tokio::time::sleep(self.wait).await;
            let gpus = self.gpus_of(&owner).await.into_iter();
            let told = |gpu| StillHeld {
                gpu,
                detail: format!("service '{}' was killed and does not end", owner.0),
            };
            gpus.map(told).collect()
        })
    }
}

impl Measured {
    /// The GPUs on which an instance has memory.
    async fn gpus_of(&self, owner: &Owner) -> Vec<GpuUuid> {
        loop {
            let wanted = owner.clone();
            let asked = self.handle.ask(move |state, _, _| {
                let all = grants(state).into_iter();
                let own = all.filter(|(_, owner, _)| *owner == wanted);
                own.map(|(gpu, ..)| gpu).collect::<Vec<GpuUuid>>()
            });
            match asked.await {
                // A coordinator that has too much to do is asked again.
                Err(SubmitError::Overloaded) => tokio::time::sleep(PAUSE).await,
                // Nobody answers any more when the gateway stops; a restarted one waits anew.
                asked => return asked.unwrap_or_default(),
            }
        }
    }

    async fn wait_until_free(&self, owner: &Owner) -> Vec<StillHeld> {
        let gpus = self.gpus_of(owner).await;
        if gpus.is_empty() {
            return Vec::new();
        }
        let history = self.samples.all();
        let deadline = Instant::now() + self.wait;
        let mut held: Vec<StillHeld> = gpus
            .iter()
            .map(|gpu| StillHeld {
                gpu: gpu.clone(),
                detail: "the driver told nothing of it any more".to_owned(),
            })
            .collect();
        loop {
            let Ok(sample) = tokio::time::timeout_at(deadline, self.samples.soon()).await else {
                tracing::warn!(service.name = %owner.0, "GPU memory of an ended instance is not free");
                return held;
            };
            held = still_held(&history, &sample, &gpus, owner);
            if held.is_empty() {
                return held;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// MiB that an instance holds on a GPU; `None` where memory is not told by process.
fn held_on(reading: &GpuReading, owner: &Owner) -> Option<u64> {
    let mut may_be_its = reading
        .processes
        .iter()
        .filter(|process| process.owner.as_ref().is_none_or(|of| of == owner));
    match may_be_its.all(|process| process.memory_mib.is_some()) {
        true => Some(reading.held_by(owner).unwrap_or(0)),
        false => None,
    }
}

fn still_held(
    history: &[Arc<Sample>],
    sample: &Sample,
    gpus: &[GpuUuid],
    owner: &Owner,
) -> Vec<StillHeld> {
    let look = |gpu: &GpuUuid| match gpu::freed(history, sample, gpu, owner) {
        Freed::Yes => None,
        Freed::No(detail) => Some(StillHeld {
            gpu: gpu.clone(),
            detail,
        }),
    };
    gpus.iter().filter_map(look).collect()
}

#[cfg(test)]
mod tests {
    use smol_str::SmolStr;

    use super::*;
    use crate::domain::spec::{GpuFacts, GpuSource};
    use crate::gpu::ProcessReading;

    fn owner() -> Owner {
        ("s".into(), Generation(1))
    }

    fn process(memory_mib: Option<u64>, owner: Option<Owner>) -> ProcessReading {
        ProcessReading {
            pid: 1,
            name: SmolStr::default(),
            memory_mib,
            computes: true,
            draws: false,
            owner,
        }
    }

    fn reading(processes: Vec<ProcessReading>) -> GpuReading {
        GpuReading {
            facts: GpuFacts {
                uuid: "g".into(),
                index: 0,
                name: SmolStr::default(),
                memory_mib: 24_000,
                source: GpuSource::Simulated,
            },
            parent: None,
            unified: false,
            used_mib: 0,
            free_mib: 0,
            utilization_pct: None,
            temperature_c: None,
            power_mw: None,
            clock_mhz: None,
            memory_clock_mhz: None,
            ecc_uncorrected: None,
            processes,
        }
    }

    #[test]
    fn memory_that_is_not_told_by_process_is_not_taken_for_none() {
        let (own, other) = (Some(owner()), Some(("t".into(), Generation(1))));
        let held = |processes| held_on(&reading(processes), &owner());
        assert_eq!(held(vec![process(Some(700), own.clone())]), Some(700));
        assert_eq!(held(Vec::new()), Some(0));
        assert_eq!(held(vec![process(None, own)]), None);
        assert_eq!(held(vec![process(None, None)]), None, "it may be its");
        assert_eq!(held(vec![process(None, other)]), Some(0));
    }
}
