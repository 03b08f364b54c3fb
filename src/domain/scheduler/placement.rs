//! Where an instance fits now: whole GPUs or an amount of memory on one, best fit, all or none.

use crate::domain::ids::{GpuUuid, ServiceName};
use crate::domain::spec::Grant;
use crate::domain::state::State;
use crate::domain::state::service::Service;

/// GPUs for an instance of `service` out of what is available now; `None` when it does not fit.
/// Empty when it needs none. The service's own hold counts as available.
pub fn fit(state: &State, service: &Service) -> Option<Vec<Grant>> {
    if !service.spec.needs_gpu() {
        return Some(Vec::new());
    }
    let own = &service.spec.name;
    if service.spec.gpus == 0 {
        fit_one(state, own, service.need_mib())
    } else {
        fit_whole(state, own, service.spec.gpus, service.need_mib())
    }
}

/// Best fit: the GPU with the least room left over, then the lowest index.
fn fit_one(state: &State, own: &ServiceName, need_mib: u64) -> Option<Vec<Grant>> {
    let (_, _, gpu) = state
        .gpus
        .iter()
        .map(|(uuid, gpu)| {
            (
                state.available_mib_besides(uuid, Some(own)),
                gpu.facts.index,
                uuid,
            )
        })
        .filter(|(available, ..)| *available > 0 && *available >= need_mib)
        .min()?;
    let gpu = gpu.clone();
    Some(vec![Grant { gpu, mib: need_mib }])
}

/// `count` GPUs of at least `need_mib` with nothing of ours on them, the smallest first. Each is granted with
/// all of its memory.
fn fit_whole(state: &State, own: &ServiceName, count: u32, need_mib: u64) -> Option<Vec<Grant>> {
    let mut empty: Vec<(u64, u32, &GpuUuid, u64)> = state
        .gpus
        .iter()
        .filter(|(uuid, gpu)| {
            let whole = gpu.usable_mib();
            whole > 0
                && whole >= need_mib
                && gpu.reserved_mib == 0
                && state.available_mib_besides(uuid, Some(own)) == whole
        })
        .map(|(uuid, gpu)| {
            (
                gpu.usable_mib(),
                gpu.facts.index,
                uuid,
                gpu.facts.memory_mib,
            )
        })
        .collect();
    empty.sort_unstable();
    let count = usize::try_from(count).ok()?;
    (empty.len() >= count).then(|| {
        empty[..count]
            .iter()
            .map(|(_, _, gpu, mib)| Grant {
                gpu: (*gpu).clone(),
                mib: *mib,
            })
            .collect()
    })
}

/// Whether it could ever fit: on this machine's GPUs with all of ours gone.
pub fn could_fit(state: &State, service: &Service) -> bool {
    if !service.spec.needs_gpu() {
        return true;
    }
    let need = service.need_mib();
    let enough = state
        .gpus
        .values()
        .filter(|gpu| gpu.usable_mib() > 0 && gpu.usable_mib() >= need)
        .count();
    enough >= usize::try_from(service.spec.gpus.max(1)).unwrap_or(usize::MAX)
}
