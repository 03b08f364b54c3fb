//! Plain facts about queue and GPUs, as State has them between commits.

use std::collections::BTreeMap;

use smol_str::SmolStr;

use crate::domain::ids::ServiceName;
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
}

pub fn queue_stats(state: &State) -> QueueStats {
    let mut stats = QueueStats {
        queued: state.queue.len(),
        ..QueueStats::default()
    };
    for (target, shape) in state.queue.shapes() {
        let waiting = shape.len();
        if waiting > 0 {
            let name = type_of(state, target);
            *stats.by_type.entry(name).or_default() += u64::try_from(waiting).unwrap_or(u64::MAX);
        }
        for (level, count) in (1u8..).zip(shape.by_priority) {
            if count > 0 {
                *stats.by_priority.entry(level).or_default() += count;
            }
        }
    }
    let active = |service: &crate::domain::state::service::Service| {
        service
            .instance
            .as_ref()
            .map_or(0, |instance| instance.active.len())
    };
    let running: usize = state.services.values().map(active).sum();
    stats.running = u64::try_from(running).unwrap_or(u64::MAX);
    stats
}

fn type_of(state: &State, target: &Target) -> SmolStr {
    match target {
        Target::Type(service_type) => service_type.clone(),
        Target::Service(name) => state
            .services
            .get(name)
            .map_or_else(|| name.clone(), |service| service.spec.service_type.clone()),
    }
}

pub fn gpu_status(state: &State) -> Vec<GpuStatus> {
    let mut all: Vec<GpuStatus> = state
        .gpus
        .iter()
        .filter(|(_, gpu)| gpu.present)
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
        })
        .collect();
    all.sort_by_key(|gpu| gpu.facts.index);
    all
}
