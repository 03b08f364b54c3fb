//! Plain facts about queue and GPUs, as State has them between commits.

use std::collections::BTreeMap;

use smol_str::SmolStr;

use crate::domain::ids::ServiceName;
use crate::domain::machine::Quarantine;
use crate::domain::spec::{GpuFacts, Target};
use crate::domain::state::State;
use crate::domain::state::gpu::mib_on;

/// How much waits and runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    pub queued: u64,
    pub running: u64,
    /// Waiting jobs by service type; jobs that name only a service are under that service's type or name.
    pub by_type: BTreeMap<SmolStr, u64>,
    /// Waiting jobs by priority, 1 to 5, those with none left out.
    pub by_priority: BTreeMap<u8, u64>,
}

/// One GPU as the scheduler sees it, in MiB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuStatus {
    pub facts: GpuFacts,
    /// For instances, those starting and stopping included.
    pub reserved_mib: u64,
    /// Used by programs that are none of ours.
    pub foreign_mib: u64,
    /// Promised to services that wait for others to leave.
    pub held_mib: u64,
    pub reservations: Vec<(ServiceName, u64)>,
    /// Seen when the GPUs were last listed; of one that is gone only reservations and its quarantine are left.
    pub present: bool,
    /// Why it gets no new instances, if so.
    pub quarantine: Option<Quarantine>,
}

/// Of one tenant's jobs, or of all.
pub fn queue_stats(state: &State, tenant: Option<&SmolStr>) -> QueueStats {
    let mut stats = QueueStats::default();
    for (target, shape) in state.queue.shapes() {
        let mut waiting = 0;
        for (_, lane) in shape
            .lanes()
            .iter()
            .filter(|(lane, _)| tenant.is_none_or(|tenant| lane.tenant == *tenant))
        {
            waiting += u64::try_from(lane.waiting.len()).unwrap_or(u64::MAX);
            for (level, count) in (1u8..).zip(lane.by_priority) {
                if count > 0 {
                    *stats.by_priority.entry(level).or_default() += count;
                }
            }
        }
        if waiting > 0 {
            *stats
                .by_type
                .entry(type_of(state, target, tenant))
                .or_default() += waiting;
        }
        stats.queued += waiting;
    }
    stats.running = match tenant {
        Some(tenant) => {
            let account = state.accounts.tenant(tenant);
            account.map_or(0, |account| account.holding.held.places)
        }
        None => {
            let instances = state.services.values().filter_map(|s| s.instance.as_ref());
            let running: usize = instances.map(|instance| instance.active.len()).sum();
            u64::try_from(running).unwrap_or(u64::MAX)
        }
    };
    stats
}

/// A service that does not exist for the tenant has no type that it could be told.
fn type_of(state: &State, target: &Target, tenant: Option<&SmolStr>) -> SmolStr {
    match target {
        Target::Type(service_type) => service_type.clone(),
        Target::Container(_) => SmolStr::new_static("container"),
        Target::Service(name) => state
            .services
            .get(name)
            .filter(|service| tenant.is_none_or(|tenant| service.admits(tenant)))
            .map_or_else(|| name.clone(), |service| service.spec.service_type.clone()),
    }
}

pub fn gpu_status(state: &State) -> Vec<GpuStatus> {
    let mut all: Vec<GpuStatus> = state
        .gpus
        .iter()
        .map(|(uuid, gpu)| GpuStatus {
            facts: gpu.facts.clone(),
            reserved_mib: gpu.reserved_mib,
            foreign_mib: gpu.foreign_mib,
            held_mib: state
                .holds
                .values()
                .map(|hold| mib_on(&hold.grants, uuid))
                .sum(),
            reservations: state
                .services
                .keys()
                .map(|name| (name.clone(), state.reserved_by(name, uuid)))
                .filter(|(_, mib)| *mib > 0)
                .collect(),
            present: gpu.present,
            quarantine: gpu.quarantine.clone(),
        })
        .collect();
    all.sort_by_key(|gpu| (!gpu.present, gpu.facts.index));
    all
}
