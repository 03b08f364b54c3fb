//! The machine's GPUs: sampling them, telling the coordinator what changes, and saying when an instance's memory has
//! come free.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;
use uuid::Uuid;

use crate::config::Config;
use crate::coordinator::Handle;
use crate::domain::command::Command;
use crate::domain::ids::{Generation, GpuUuid, ServiceName};
use crate::driver::{ContainerOwners, Meter, Outcomes, StillHeld, Tasks, Unmetered, mark_of};
use crate::gpu::{self, Freed, Machine, Minutes, Owner, Owners, Sample, Sampler, Samples, Watch};

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
        let held = reading.held_by(&(service.clone(), generation));
        Some(held.unwrap_or(0))
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
        let wanted = owner.clone();
        let asked = self.handle.ask(move |state, _, _| {
            let all = grants(state).into_iter();
            let own = all.filter(|(_, owner, _)| *owner == wanted);
            own.map(|(gpu, ..)| gpu).collect::<Vec<GpuUuid>>()
        });
        // Nobody answers any more when the gateway stops; a restarted one waits anew.
        asked.await.unwrap_or_default()
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
