//! GPUs and their memory (`contracts/gpu-gateway.md` sections 2 and 6): the dialect's one-GPU form, filled from
//! the first, and all of them beside it. What is measured comes from the newest sample; of simulated GPUs nothing is,
//! and what is reserved counts as used.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};
use utoipa_axum::routes;

use super::body::PathOf;
use super::error::ApiError;
use super::guard::Caller;
use super::routes::Routes;
use super::service_owner::sees;
use super::services::{gib, is_healthy, is_running, source_name};
use super::state::App;
use crate::coordinator::GpuStatus;
use crate::domain::identity::Role;
use crate::domain::ids::ServiceName;
use crate::domain::scheduler::container::run_of;
use crate::domain::tenant::DEFAULT_TENANT;
use crate::domain::time::Timestamp;
use crate::gpu::{GpuReading, ProcessReading, Sample};
use crate::ledger::ServiceView;

/// The routes of this file, at the root and under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(gpu))
        .routes(routes!(vram))
        .routes(routes!(available))
}

/// A GPU as the scheduler and as the newest sample have it.
pub struct Look {
    pub status: GpuStatus,
    sample: Option<Arc<Sample>>,
}

/// All GPUs, those that are gone last.
pub async fn look(app: &App) -> Result<Vec<Look>, ApiError> {
    let sample = app.gpus.newest();
    let with_sample = |status| Look {
        status,
        sample: sample.clone(),
    };
    let all = app.handle.gpu_status().await?.into_iter();
    Ok(all.map(with_sample).collect())
}

impl Look {
    /// What was measured last, if anything is.
    pub fn reading(&self) -> Option<&GpuReading> {
        let gpus = self.sample.iter().flat_map(|sample| &sample.gpus);
        let uuid = &self.status.facts.uuid;
        gpus.filter(|_| self.status.present)
            .find(|reading| reading.facts.uuid == *uuid)
    }

    /// MiB in use: as measured, or what our instances hold and others were seen to use, at most all there is.
    pub fn used_mib(&self) -> u64 {
        let gpu = &self.status;
        let taken = || (gpu.reserved_mib + gpu.foreign_mib).min(gpu.facts.memory_mib);
        self.reading()
            .map_or_else(taken, |reading| reading.used_mib)
    }

    /// MiB that a program could have.
    fn free_mib(&self) -> u64 {
        let rest = || self.status.facts.memory_mib - self.used_mib();
        self.reading().map_or_else(rest, |reading| reading.free_mib)
    }

    /// MiB that a new instance could have.
    fn available_mib(&self) -> u64 {
        let gpu = &self.status;
        let taken = gpu.reserved_mib + gpu.foreign_mib + gpu.held_mib;
        match gpu.quarantine {
            Some(_) => 0,
            None => gpu.facts.memory_mib.saturating_sub(taken),
        }
    }

    /// When it was measured last.
    fn sampled_at(&self) -> Option<Timestamp> {
        self.reading()?;
        self.sample.as_ref().map(|sample| sample.at)
    }

    fn health(&self) -> &'static str {
        match (&self.status.quarantine, self.status.present) {
            (_, false) => "lost",
            (Some(_), true) => "quarantined",
            (None, true) => "ok",
        }
    }
}

/// A part of a whole in per cent, with one decimal.
fn percent(part: u64, whole: u64) -> Value {
    match whole {
        0 => Value::Null,
        _ => json!((part as f64 * 1_000.0 / whole as f64).round() / 10.0),
    }
}

fn describe(look: &Look, services: &HashMap<&str, &ServiceView>, strangers: bool) -> Value {
    let (gpu, reading) = (&look.status, look.reading());
    let used = look.used_mib();
    let total = gpu.facts.memory_mib;
    let reservations: Vec<Value> = gpu
        .reservations
        .iter()
        .filter(|(service, _)| services.contains_key(service.as_str()))
        .map(|(holder, mib)| {
            let (service, run) = named(holder);
            json!({"service": service, "run_id": run, "memory_mb": mib})
        })
        .collect();
    let processes = match reading {
        Some(reading) => measured(reading, services, strangers),
        None => processes(gpu, services),
    };
    let quarantine = gpu.quarantine.as_ref().map(|quarantine| {
        json!({
            "cause": quarantine.cause.name(),
            "detail": quarantine.detail,
            "since": quarantine.since,
        })
    });
    json!({
        "uuid": gpu.facts.uuid.as_str(),
        "index": gpu.facts.index,
        "name": gpu.facts.name.as_str(),
        "source": source_name(gpu.facts.source),
        "parent_uuid": reading.and_then(|r| r.parent.as_ref()).map(|uuid| uuid.as_str()),
        "sampled_at": look.sampled_at(),
        "health": look.health(),
        "quarantine": quarantine,
        "unified_memory": reading.is_some_and(|r| r.unified),
        "memory_total_mb": total,
        "memory_used_mb": used,
        "memory_free_mb": look.free_mib(),
        "memory_reserved_mb": gpu.reserved_mib,
        "memory_foreign_mb": gpu.foreign_mib,
        "memory_held_mb": gpu.held_mib,
        "memory_utilization_pct": percent(used, total),
        "gpu_utilization_pct": reading.and_then(|r| r.utilization_pct),
        "temperature_c": reading.and_then(|r| r.temperature_c),
        "power_draw_w": reading.and_then(|r| r.power_mw).map(watts),
        "clock_mhz": reading.and_then(|r| r.clock_mhz),
        "memory_clock_mhz": reading.and_then(|r| r.memory_clock_mhz),
        "ecc_uncorrected": reading.and_then(|r| r.ecc_uncorrected),
        "processes": processes,
        "reservations": reservations,
    })
}

/// Watts with one decimal.
pub fn watts(milliwatts: u64) -> f64 {
    (milliwatts as f64 / 100.0).round() / 10.0
}

/// Whether a caller is told of the processes that are none of ours: those who run the machine are.
fn sees_strangers(caller: &Caller) -> bool {
    let tenancy = caller.tenancy();
    tenancy
        .tenant()
        .is_none_or(|tenant| *tenant == DEFAULT_TENANT)
}

/// The processes that were seen on a GPU: of these services, and strangers.
fn measured(
    reading: &GpuReading,
    services: &HashMap<&str, &ServiceView>,
    strangers: bool,
) -> Vec<Value> {
    let told = reading
        .processes
        .iter()
        .filter(|process| match &process.owner {
            Some((service, _)) => services.contains_key(service.as_str()),
            None => strangers,
        });
    let entry = |process: &ProcessReading| {
        let owner = process.owner.as_ref();
        let (service, run) = owner.map_or((None, None), |(name, _)| named(name));
        json!({
            "pid": process.pid,
            "type": process.kind(),
            "name": process.name.as_str(),
            "memory_mb": process.memory_mib.unwrap_or(0),
            "service": service,
            "run_id": run,
        })
    };
    told.map(entry).collect()
}

/// The processes of these services that hold memory of a GPU, where none are seen.
fn processes(gpu: &GpuStatus, services: &HashMap<&str, &ServiceView>) -> Vec<Value> {
    let entry = |(service, mib): &(ServiceName, u64)| {
        let instance = services.get(service.as_str())?.instance.as_ref()?;
        let process = instance.process.as_ref()?;
        let (service, run) = named(service);
        Some(json!({
            "pid": process.pid, "type": "C", "name": service.or(run.as_deref()), "memory_mb": mib,
            "service": service, "run_id": run,
        }))
    };
    gpu.reservations.iter().filter_map(entry).collect()
}

/// The service that holds memory, or the run whose own container does.
fn named(holder: &ServiceName) -> (Option<&str>, Option<String>) {
    match run_of(holder) {
        Some((_, run)) => (None, Some(run.to_string())),
        None => (Some(holder.as_str()), None),
    }
}

/// Who holds memory, as far as the caller is told: its services, and its runs with containers of their own. Of the memory
/// of others it is told how much, not whose.
async fn holders(app: &App, caller: &Caller) -> Result<Vec<ServiceView>, ApiError> {
    let all = caller.principal.power() == Role::Admin;
    let mut views = app.scan(|ledger| ledger.services()).await?;
    views.retain(|view| match run_of(&view.spec.name) {
        Some((plane, _)) => all || plane == caller.plane(),
        None => sees(caller, view),
    });
    Ok(views)
}

/// The services that exist for a caller.
async fn seen(app: &App, caller: &Caller) -> Result<Vec<ServiceView>, ApiError> {
    let mut views = app.scan(|ledger| ledger.services()).await?;
    views.retain(|view| sees(caller, view));
    Ok(views)
}

fn by_name(views: &[ServiceView]) -> HashMap<&str, &ServiceView> {
    views
        .iter()
        .map(|view| (view.spec.name.as_str(), view))
        .collect()
}

/// Show the GPUs.
#[utoipa::path(get, path = "/gpu", tag = "gpu", responses((status = 200, body = Object, example = json!({
    "available": true, "gpu_name": "Simulated GPU", "gpu_utilization_pct": null, "memory_used_mb": 8192,
    "memory_total_mb": 24576, "memory_free_mb": 16384, "memory_utilization_pct": 33.3, "temperature_c": null,
    "power_draw_w": null, "unified_memory": false, "processes": [], "source": "simulated", "gpus": []
}))))]
async fn gpu(State(app): State<App>, caller: Caller) -> Result<Json<Value>, ApiError> {
    let all = look(&app).await?;
    let views = holders(&app, &caller).await?;
    let (services, strangers) = (by_name(&views), sees_strangers(&caller));
    let gpus: Vec<Value> = all
        .iter()
        .map(|gpu| describe(gpu, &services, strangers))
        .collect();
    let is_there = all.first().is_some_and(|gpu| gpu.status.present);
    let Some(first) = gpus.first().filter(|_| is_there) else {
        let mut answer = without_gpu(app.config.no_gpu_reason.as_deref());
        answer["gpus"] = gpus.into();
        return Ok(Json(answer));
    };
    let mut answer = Map::new();
    answer.insert("available".into(), true.into());
    answer.insert("gpu_name".into(), first["name"].clone());
    for member in [
        "gpu_utilization_pct",
        "memory_used_mb",
        "memory_total_mb",
        "memory_free_mb",
        "memory_utilization_pct",
        "temperature_c",
        "power_draw_w",
        "processes",
        "source",
        "unified_memory",
    ] {
        answer.insert(member.into(), first[member].clone());
    }
    answer.insert("gpus".into(), gpus.into());
    Ok(Json(Value::Object(answer)))
}

fn without_gpu(reason: Option<&str>) -> Value {
    json!({
        "available": false,
        "error": reason.unwrap_or("No GPU was found"),
        "gpu_name": null,
        "gpu_utilization_pct": null,
        "memory_used_mb": null,
        "memory_total_mb": null,
        "memory_free_mb": null,
        "memory_utilization_pct": null,
        "temperature_c": null,
        "power_draw_w": null,
        "unified_memory": false,
        "processes": [],
        "gpus": [],
    })
}

/// Show GPU memory: used, reserved, and what a new instance could have.
///
/// `available_for_new_mb` leaves out what is reserved and not yet used, and what is held for a preemptor.
#[utoipa::path(get, path = "/vram", tag = "gpu", responses((status = 200, body = Object, example = json!({
    "total_mb": 24576, "used_mb": 8192, "free_mb": 16384, "reserved_mb": 8192, "available_for_new_mb": 16384,
    "allocated_services": [{"service": "stats", "vram_gb": 8.0, "vram_mb": 8192, "container_running": true}]
}))))]
async fn vram(State(app): State<App>, caller: Caller) -> Result<Json<Value>, ApiError> {
    let all = look(&app).await?;
    let views = seen(&app, &caller).await?;
    let present = || all.iter().filter(|gpu| gpu.status.present);
    let sum = |of: fn(&Look) -> u64| present().map(of).sum::<u64>();
    let allocated: Vec<Value> = views
        .iter()
        .filter_map(|view| {
            let grants = &view.instance.as_ref()?.grants;
            let mib: u64 = grants.iter().map(|grant| grant.mib).sum();
            (mib > 0).then(|| {
                json!({
                    "service": view.spec.name.as_str(),
                    "vram_gb": gib(mib),
                    "vram_mb": mib,
                    "container_running": is_running(view),
                })
            })
        })
        .collect();
    Ok(Json(json!({
        "total_mb": sum(|gpu| gpu.status.facts.memory_mib),
        "used_mb": sum(Look::used_mib),
        "free_mb": sum(Look::free_mib),
        "allocated_services": allocated,
        "reserved_mb": sum(|gpu| gpu.status.reserved_mib),
        "available_for_new_mb": sum(Look::available_mib),
    })))
}

/// How much of the GPUs is in use from which on the dialect advises to queue, in per cent.
const FULL_PERCENT: u64 = 90;

/// Say whether work of a type is best done here, queued, or elsewhere.
#[utoipa::path(get, path = "/available/{service_type}", tag = "gpu", responses((status = 200, body = Object, example = json!({
    "available": true, "service": "stats", "recommendation": "use_local", "gpu_memory_free_mb": 16384,
    "gpu_utilization_pct": null, "healthy_services": ["stats"], "queue_depth": 0
}))))]
async fn available(
    State(app): State<App>,
    caller: Caller,
    PathOf(wanted): PathOf<String>,
) -> Result<Json<Value>, ApiError> {
    let mut all = look(&app).await?;
    all.retain(|gpu| gpu.status.present);
    let tenant = caller.tenancy().tenant().cloned();
    let stats = app.handle.queue_stats(tenant).await?;
    let views = seen(&app, &caller).await?;
    let offers: Vec<&ServiceView> = views
        .iter()
        .filter(|view| view.enabled && view.spec.service_type == wanted.as_str())
        .collect();
    let total: u64 = all.iter().map(|gpu| gpu.status.facts.memory_mib).sum();
    let used: u64 = all.iter().map(Look::used_mib).sum();
    // Of several GPUs the one that does the least.
    let busy = all
        .iter()
        .filter_map(|gpu| gpu.reading()?.utilization_pct)
        .min();
    let is_full = used * 100 > total * FULL_PERCENT
        || busy.is_some_and(|percent| u64::from(percent) > FULL_PERCENT);
    let depth = stats.by_type.get(wanted.as_str()).copied().unwrap_or(0);
    let mut answer = advise(&offers, depth, is_full);
    answer["gpu_memory_free_mb"] = if all.is_empty() {
        Value::Null
    } else {
        json!(all.iter().map(Look::free_mib).sum::<u64>())
    };
    answer["gpu_utilization_pct"] = json!(busy);
    Ok(Json(answer))
}

/// The advice of `contracts/gpu-gateway.md` section 6, by services of one type.
fn advise(offers: &[&ServiceView], queue_depth: u64, gpu_full: bool) -> Value {
    let name = |view: &&ServiceView| view.spec.name.to_string();
    let registered: Vec<String> = offers.iter().map(name).collect();
    let healthy: Vec<&ServiceView> = offers
        .iter()
        .copied()
        .filter(|view| is_healthy(view))
        .collect();
    let room = |view: &&&ServiceView| view.active_runs.len() < view.spec.concurrency as usize;
    if healthy.is_empty() {
        let busy = offers.iter().find(|view| !view.active_runs.is_empty());
        let (reason, recommendation) = match (offers.first(), busy) {
            (None, _) => ("no_enabled_service", "use_cloud"),
            (Some(_), Some(_)) => ("no_healthy_service", "queue"),
            (Some(_), None) => ("no_healthy_service", "use_cloud"),
        };
        return json!({
            "available": false,
            "service": busy.or(offers.first()).map(name),
            "recommendation": recommendation,
            "services_registered": registered,
            "reason": reason,
            "queue_depth": queue_depth,
        });
    }
    let free = healthy.iter().find(room);
    let recommendation = if free.is_some() && !gpu_full {
        "use_local"
    } else {
        "queue"
    };
    json!({
        "available": true,
        "service": free.or(healthy.first()).map(name),
        "recommendation": recommendation,
        "services_registered": registered,
        "healthy_services": healthy.iter().map(name).collect::<Vec<_>>(),
        "queue_depth": queue_depth,
    })
}
