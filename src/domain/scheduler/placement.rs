//! Where an instance fits now: whole GPUs or an amount of memory on one, best fit, all or none.

use crate::domain::ids::{GpuUuid, ServiceName};
use crate::domain::spec::Grant;
use crate::domain::state::State;
use crate::domain::state::gpu::{Gpu, signed};
use crate::domain::state::service::Service;
use crate::domain::state::sleep::Asleep;

/// GPUs for an instance of `service` out of what is available now; `None` when it does not fit.
/// Empty when it needs none. The service's own hold counts as available.
pub fn fit(state: &State, service: &Service) -> Option<Vec<Grant>> {
    match service.sleeping() {
        Some(asleep) => fit_again(state, service, asleep),
        None if !service.spec.needs_gpu() => Some(Vec::new()),
        None => fit_anew(state, service),
    }
}

fn fit_anew(state: &State, service: &Service) -> Option<Vec<Grant>> {
    let own = &service.spec.name;
    if service.spec.gpus == 0 {
        fit_one(state, own, state.need_mib(service))
    } else {
        fit_whole(state, own, service.spec.gpus, state.need_mib(service))
    }
}

/// What a sleeping instance needs again: the GPUs that it had, with what it is known to need by now.
pub fn grants_again(state: &State, service: &Service, asleep: &Asleep) -> Vec<Grant> {
    let again = |grant: &Grant| Grant {
        gpu: grant.gpu.clone(),
        mib: match service.spec.gpus {
            0 => grant.mib.max(state.need_mib(service)),
            _ => grant.mib,
        },
    };
    asleep.grants.iter().map(again).collect()
}

fn fit_again(state: &State, service: &Service, asleep: &Asleep) -> Option<Vec<Grant>> {
    let own = &service.spec.name;
    let grants = grants_again(state, service, asleep);
    let fits = |grant: &Grant| {
        let Some(gpu) = state.gpus.get(&grant.gpu) else {
            return false;
        };
        let (whole, remains) = (gpu.usable_mib(), state.remains_mib(own, &grant.gpu));
        let available = state.available_mib_besides(&grant.gpu, Some(own));
        match service.spec.gpus {
            0 => available > 0 && available >= grant.mib,
            _ => whole > 0 && gpu.reserved_mib == remains && available == whole,
        }
    };
    grants.iter().all(fits).then_some(grants)
}

/// Whether the GPUs that a sleeping instance had are there, and may be used.
pub fn has_its_gpus(state: &State, asleep: &Asleep) -> bool {
    let gpus = asleep.grants.iter().map(|grant| state.gpus.get(&grant.gpu));
    gpus.into_iter()
        .all(|gpu| gpu.is_some_and(|gpu| gpu.present && gpu.quarantine.is_none()))
}

/// Whether a sleeping instance can have its memory again when all others have left: its GPUs are there.
pub fn could_wake(state: &State, service: &Service, asleep: &Asleep) -> bool {
    let there = |grant: &Grant| {
        let usable = state.gpus.get(&grant.gpu).map_or(0, Gpu::usable_mib);
        let need = match service.spec.gpus {
            0 => grant.mib,
            _ => state.need_mib(service),
        };
        usable > 0 && usable >= need
    };
    grants_again(state, service, asleep).iter().all(there)
}

/// Whether a sleeping service would fit if it were started anew, what it still holds not being counted on.
pub fn fit_elsewhere(state: &State, service: &Service) -> bool {
    if !service.spec.needs_gpu() {
        return true;
    }
    let need = state.need_mib(service);
    let own = &service.spec.name;
    let free = |uuid: &GpuUuid| {
        let available = state.balance_mib(uuid, Some(own)) - signed(state.remains_mib(own, uuid));
        u64::try_from(available).unwrap_or(0)
    };
    let fitting = state.gpus.iter().filter(|(uuid, gpu)| {
        let (free, whole) = (free(uuid), gpu.usable_mib());
        match service.spec.gpus {
            0 => free > 0 && free >= need,
            _ => whole > 0 && whole >= need && gpu.reserved_mib == 0 && free == whole,
        }
    });
    fitting.count() >= usize::try_from(service.spec.gpus.max(1)).unwrap_or(usize::MAX)
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
    let need = state.need_mib(service);
    let enough = state
        .gpus
        .values()
        .filter(|gpu| gpu.usable_mib() > 0 && gpu.usable_mib() >= need)
        .count();
    enough >= usize::try_from(service.spec.gpus.max(1)).unwrap_or(usize::MAX)
}
