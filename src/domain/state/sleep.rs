//! Instances that are put to sleep and woken: what stays reserved meanwhile, and what lies in host memory.

use serde::{Deserialize, Serialize};

use super::State;
use super::gpu::mib_on;
use super::service::{Instance, InstancePhase, Service};
use crate::domain::event::{Event, StartCause};
use crate::domain::ids::{GpuUuid, ServiceName};
use crate::domain::ladder::{Rung, Step};
use crate::domain::spec::Grant;
use crate::domain::time::Timestamp;

/// How an instance sleeps, and what it needs to wake.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Asleep {
    /// The step that it sleeps by.
    pub step: Step,
    pub since: Timestamp,
    /// What it held before, and needs again on the same GPUs.
    pub grants: Vec<Grant>,
    /// MiB of it that lie in host memory.
    pub host_mib: u64,
}

impl Instance {
    /// Whether it lives without its GPU memory, to be woken.
    pub fn is_asleep(&self) -> bool {
        self.phase == InstancePhase::Asleep
    }

    /// MiB that it has, or is about to have, in host memory.
    pub fn host_mib(&self) -> u64 {
        let coming = self
            .rung
            .as_ref()
            .filter(|rung| rung.step.fills_host())
            .map(|_| self.granted_mib());
        match &self.asleep {
            Some(asleep) => asleep.host_mib,
            None => coming.unwrap_or(0),
        }
    }

    /// MiB that it holds on all GPUs.
    pub fn granted_mib(&self) -> u64 {
        self.grants.iter().map(|grant| grant.mib).sum()
    }
}

impl Service {
    /// Its instance, if that sleeps.
    pub fn sleeping(&self) -> Option<&Asleep> {
        let instance = self.instance.as_ref().filter(|i| i.is_asleep())?;
        instance.asleep.as_ref()
    }
}

impl State {
    /// MiB that lie in host memory because instances sleep, those that end included until they are gone.
    pub fn sleeping_host_mib(&self) -> u64 {
        let instances = self.services.values().filter_map(|s| s.instance.as_ref());
        instances.map(Instance::host_mib).sum()
    }

    /// MiB of `gpu` that an instance of this service gives to what is held for the service itself: it sleeps, or is
    /// ended meanwhile.
    pub fn own_part_mib(&self, service: &ServiceName, gpu: &GpuUuid) -> u64 {
        let instance = self.services.get(service).and_then(|s| s.instance.as_ref());
        let own = instance.filter(|instance| instance.is_asleep() || instance.is_leaving());
        own.map_or(0, |instance| mib_on(&instance.grants, gpu))
    }

    /// MiB of `gpu` that a sleeping instance of this service still holds: they are its own when it wakes.
    pub fn remains_mib(&self, service: &ServiceName, gpu: &GpuUuid) -> u64 {
        let instance = self.services.get(service).and_then(|s| s.instance.as_ref());
        let asleep = instance.filter(|instance| instance.is_asleep());
        asleep.map_or(0, |instance| mib_on(&instance.grants, gpu))
    }

    /// Room in host memory may have come, or GPUs have gone: instances that may sleep, or do, are looked at.
    pub(super) fn look_at_leaving(&mut self) {
        let waits = |service: &&Service| {
            let may_sleep = service.spec.ladder.iter().any(Step::takes_memory);
            let instance = service.instance.as_ref();
            instance.is_some_and(|instance| may_sleep || instance.asleep.is_some())
        };
        let waiting = self.services.values().filter(waits);
        self.touched.extend(waiting.map(|s| s.spec.name.clone()));
    }

    /// Applies an event about a step of a ladder for an instance, its sleep or its waking.
    pub(super) fn step_instance(&mut self, at: Timestamp, event: &Event) {
        match event {
            Event::LadderStepBegan {
                service,
                generation,
                cause,
                number,
                step,
                deadline,
                ..
            } => {
                let rung = Rung::begun(*number, step, at, *deadline);
                let takes_memory = step.takes_memory();
                self.edit_instance(service, *generation, |instance| {
                    instance.rung = Some(rung);
                    if let Some(cause) = cause.clone().filter(|_| takes_memory) {
                        instance.phase = InstancePhase::Yielding { cause };
                        instance.since = at;
                    }
                });
                if let Some(cause) = cause.as_ref().filter(|_| takes_memory) {
                    self.keep_wanted(service, cause);
                    self.drop_promises_on(service);
                }
            }
            Event::LadderStepEnded {
                service,
                generation,
                ..
            } => {
                self.edit_instance(service, *generation, |instance| instance.rung = None);
                // What was to be moved to the host stays where it is, perhaps.
                self.look_at_leaving();
            }
            Event::InstanceSlept { .. } => self.fall_asleep(at, event),
            Event::InstanceWakeRequested { .. } => self.wake(at, event),
            _ => {}
        }
    }

    fn fall_asleep(&mut self, at: Timestamp, event: &Event) {
        let Event::InstanceSlept {
            service,
            generation,
            step,
            grants,
            host_mib,
        } = event
        else {
            return;
        };
        let mut before = None;
        self.edit_instance(service, *generation, |instance| {
            let had = std::mem::replace(&mut instance.grants, grants.clone());
            before = Some(had.clone());
            instance.asleep = Some(Asleep {
                step: step.clone(),
                since: at,
                grants: had,
                host_mib: *host_mib,
            });
            instance.phase = InstancePhase::Asleep;
            instance.since = at;
        });
        if let Some(before) = before {
            self.reserve(&before, grants);
        }
        self.look_at_absent();
        self.look_at_leaving();
    }

    fn wake(&mut self, at: Timestamp, event: &Event) {
        let Event::InstanceWakeRequested {
            service,
            generation,
            grants,
            cause,
            deadline,
        } = event
        else {
            return;
        };
        let mut before = None;
        self.edit_service(service, |entry| {
            let instance = entry.instance.as_mut();
            let Some(instance) = instance.filter(|i| i.generation == *generation) else {
                return;
            };
            before = Some(std::mem::replace(&mut instance.grants, grants.clone()));
            instance.phase = InstancePhase::Waking {
                deadline: *deadline,
            };
            instance.since = at;
            instance.cause = *cause;
            entry.wanted |= *cause == StartCause::Manual;
        });
        if let Some(before) = before {
            self.reserve(&before, grants);
        }
    }

    /// Some grants take the place of others.
    fn reserve(&mut self, before: &[Grant], after: &[Grant]) {
        for grant in before {
            if let Some(gpu) = self.gpus.get_mut(&grant.gpu) {
                gpu.reserved_mib = gpu.reserved_mib.saturating_sub(grant.mib);
            }
        }
        for grant in after {
            if let Some(gpu) = self.gpus.get_mut(&grant.gpu) {
                gpu.reserved_mib += grant.mib;
            }
        }
        self.forget_absent_gpus();
    }
}
