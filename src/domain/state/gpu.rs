//! GPUs, their reservations, and room held for a service while others leave.

use serde::{Deserialize, Serialize};

use super::State;
use super::service::Service;
use crate::domain::event::Event;
use crate::domain::ids::{GpuUuid, RunId, ServiceName};
use crate::domain::machine::Quarantine;
use crate::domain::spec::{GpuFacts, Grant};
use crate::domain::time::Timestamp;

/// One GPU. **Invariant**: `reserved_mib` is the sum of the grants of all instances on it, those starting
/// and stopping included, and never more than the GPU has. A whole GPU is granted with all of its memory, so that
/// nothing else fits there even when others' use of it ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    pub facts: GpuFacts,
    pub reserved_mib: u64,
    /// Memory that no instance of ours accounts for.
    pub foreign_mib: u64,
    /// Seen when the GPUs were last listed.
    pub present: bool,
    /// Why it gets no new instances, if so.
    pub quarantine: Option<Quarantine>,
}

/// Room promised to a service: when the victims are gone it starts there, and nobody else gets it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hold {
    /// For this waiting run; when it waits no more, the hold ends.
    pub run: RunId,
    pub grants: Vec<Grant>,
    pub victims: Vec<ServiceName>,
}

impl Gpu {
    /// What instances may use at most; nothing of one that is gone or quarantined, so that nothing is started there.
    pub fn usable_mib(&self) -> u64 {
        if self.present && self.quarantine.is_none() {
            self.facts.memory_mib.saturating_sub(self.foreign_mib)
        } else {
            0
        }
    }
}

impl State {
    /// MiB of `gpu` that a new instance may get: what is free less what is held for others and will not
    /// come from their victims.
    pub fn available_mib(&self, gpu: &GpuUuid) -> u64 {
        self.available_mib_besides(gpu, None)
    }

    /// The same, one service's own hold left out.
    pub fn available_mib_besides(&self, gpu: &GpuUuid, own: Option<&ServiceName>) -> u64 {
        u64::try_from(self.balance_mib(gpu, own)).unwrap_or(0)
    }

    /// MiB of `gpu` that are free less what is held, one service's own hold left out, and what it holds asleep counted as
    /// free. Negative when others took
    /// memory that instances of ours were given: so much has to leave before anything is free.
    pub fn balance_mib(&self, gpu: &GpuUuid, own: Option<&ServiceName>) -> i64 {
        let Some(entry) = self.gpus.get(gpu) else {
            return 0;
        };
        let held: u64 = self
            .holds
            .iter()
            .filter(|(name, _)| Some(*name) != own)
            .map(|(name, hold)| {
                let there = self.coming_mib(hold, gpu) + self.own_part_mib(name, gpu);
                mib_on(&hold.grants, gpu).saturating_sub(there)
            })
            .sum();
        let remains = own.map_or(0, |own| self.remains_mib(own, gpu));
        signed(entry.usable_mib()) + signed(remains) - signed(entry.reserved_mib) - signed(held)
    }

    /// MiB of `gpu` that a hold's victims will give back: those that are leaving.
    pub fn coming_mib(&self, hold: &Hold, gpu: &GpuUuid) -> u64 {
        hold.victims
            .iter()
            .filter_map(|name| self.services.get(name)?.instance.as_ref())
            .filter(|instance| instance.is_leaving())
            .map(|instance| mib_on(&instance.grants, gpu))
            .sum()
    }

    /// MiB that an instance of `service` needs now. What was learned once, or raised to, is not asked of GPUs that can give
    /// less by now; what was declared is.
    pub fn need_mib(&self, service: &Service) -> u64 {
        let largest = self.gpus.values().map(Gpu::usable_mib).max().unwrap_or(0);
        let learned = service.learned_mib.unwrap_or(0).min(largest);
        service.spec.vram_mib.max(learned)
    }

    /// MiB of `gpu` reserved for the instance of a service.
    pub fn reserved_by(&self, service: &ServiceName, gpu: &GpuUuid) -> u64 {
        self.services
            .get(service)
            .and_then(|s| s.instance.as_ref())
            .map_or(0, |instance| mib_on(&instance.grants, gpu))
    }

    pub(super) fn apply_gpu(&mut self, at: Timestamp, event: &Event) {
        match event {
            Event::RoomHeld {
                service,
                run,
                grants,
                victims,
            } => {
                let hold = Hold {
                    run: *run,
                    grants: grants.clone(),
                    victims: victims.clone(),
                };
                self.holds.insert(service.clone(), hold);
            }
            Event::RoomReleased { service } => {
                self.holds.remove(service);
                self.touched.insert(service.clone());
            }
            Event::GpusListed { gpus } => self.list_gpus(gpus),
            Event::GpuForeignMemoryChanged { gpu, mib } => {
                if let Some(gpu) = self.gpus.get_mut(gpu) {
                    gpu.foreign_mib = *mib;
                }
            }
            Event::GpuQuarantined { gpu, cause, detail } => {
                if let Some(gpu) = self.gpus.get_mut(gpu) {
                    gpu.quarantine = Some(Quarantine {
                        cause: *cause,
                        detail: detail.clone(),
                        since: at,
                    });
                }
            }
            Event::GpuQuarantineLifted { gpu } => {
                if let Some(gpu) = self.gpus.get_mut(gpu) {
                    gpu.quarantine = None;
                }
                self.forget_absent_gpus();
            }
            _ => {}
        }
        self.queue.unpark_all();
        self.look_at_absent();
        self.look_at_leaving();
    }

    fn list_gpus(&mut self, listed: &[GpuFacts]) {
        for gpu in self.gpus.values_mut() {
            gpu.present = false;
        }
        for facts in listed {
            let entry = self.gpus.entry(facts.uuid.clone()).or_insert_with(|| Gpu {
                facts: facts.clone(),
                reserved_mib: 0,
                foreign_mib: 0,
                present: true,
                quarantine: None,
            });
            entry.facts = facts.clone();
            entry.present = true;
        }
        self.forget_absent_gpus();
    }

    /// Of a GPU that is gone only what still matters is kept: reservations, and that it was not to be trusted.
    pub(super) fn forget_absent_gpus(&mut self) {
        self.gpus
            .retain(|_, gpu| gpu.present || gpu.reserved_mib > 0 || gpu.quarantine.is_some());
    }
}

/// Memory sizes are far below 2⁶³ MiB.
pub fn signed(mib: u64) -> i64 {
    i64::try_from(mib).unwrap_or(i64::MAX / 4)
}

/// MiB of `gpu` among `grants`.
pub fn mib_on(grants: &[Grant], gpu: &GpuUuid) -> u64 {
    grants.iter().filter(|g| g.gpu == *gpu).map(|g| g.mib).sum()
}
