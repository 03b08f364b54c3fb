//! How the GPUs were used: the last minutes from memory, minute by minute from the ledger. And a quarantined GPU's
//! return.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::{Value, json};
use smol_str::SmolStr;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::body::PathOf;
use super::error::ApiError;
use super::gpu::watts;
use super::guard::Caller;
use super::query::Query;
use super::routes::Routes;
use super::state::App;
use crate::domain::command::Command;
use crate::domain::machine::{GpuUse, Spread};
use crate::domain::time::Timestamp;
use crate::gpu::{GpuReading, Sample};

/// Most minutes of one answer: a day.
const MAX_MINUTES: u64 = 1_440;

/// The routes of this file, at the root and under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(samples))
        .routes(routes!(history))
        .routes(routes!(release))
}

/// Show the newest samples of the GPUs.
///
/// They are kept in memory, for ten minutes; of simulated GPUs there are none.
#[utoipa::path(get, path = "/gpu/samples", tag = "gpu",
    params(("seconds" = Option<u64>, Query, description = "How far back: 1 to 600; 60 when absent")),
    responses((status = 200, body = Object, example = json!({"samples": [{
        "at": "2026-11-21T02:00:00.000000+00:00",
        "gpus": [{"uuid": "GPU-5f6b", "memory_used_mb": 8192, "memory_free_mb": 16000, "gpu_utilization_pct": 87,
            "temperature_c": 61, "power_draw_w": 241.5, "clock_mhz": 1980, "memory_clock_mhz": 2619}]
    }]}))))]
async fn samples(
    State(app): State<App>,
    _caller: Caller,
    query: Query,
) -> Result<Json<Value>, ApiError> {
    let seconds = query.int("seconds", 1..=600, 60);
    query.finish()?;
    let samples = app.gpus.last(Duration::from_secs(seconds));
    let all: Vec<Value> = samples.iter().map(|sample| of_sample(sample)).collect();
    Ok(Json(json!({"samples": all})))
}

fn of_sample(sample: &Sample) -> Value {
    let gpu = |gpu: &GpuReading| {
        json!({
            "uuid": gpu.facts.uuid.as_str(),
            "memory_used_mb": gpu.used_mib,
            "memory_free_mb": gpu.free_mib,
            "gpu_utilization_pct": gpu.utilization_pct,
            "temperature_c": gpu.temperature_c,
            "power_draw_w": gpu.power_mw.map(watts),
            "clock_mhz": gpu.clock_mhz,
            "memory_clock_mhz": gpu.memory_clock_mhz,
        })
    };
    let gpus: Vec<Value> = sample.gpus.iter().map(gpu).collect();
    json!({"at": sample.at, "gpus": gpus})
}

/// Show how the GPUs were used, minute by minute.
///
/// Each row has the smallest, the mean and the largest value of its samples. The oldest come first; of more than
/// `limit`, the newest are told.
#[utoipa::path(get, path = "/gpu/history", tag = "gpu",
    params(
        ("after" = Option<String>, Query, description = "Rows that ended after this instant, RFC 3339"),
        ("before" = Option<String>, Query, description = "Rows that ended by this instant, RFC 3339"),
        ("limit" = Option<u64>, Query, description = "1 to 1440; 60 when absent"),
    ),
    responses((status = 200, body = Object, example = json!({"rows": [{
        "since": "2026-11-21T02:00:00.000000+00:00", "until": "2026-11-21T02:01:00.000000+00:00", "seq": 4711,
        "gpus": [{"uuid": "GPU-5f6b", "samples": 60, "memory_used_mb": {"min": 8192, "mean": 8192, "max": 8192},
            "gpu_utilization_pct": {"min": 0, "mean": 43, "max": 100}, "temperature_c": {"min": 40, "mean": 51, "max": 62},
            "power_draw_w": {"min": 70.1, "mean": 160.0, "max": 301.2}}]
    }]}))))]
async fn history(
    State(app): State<App>,
    _caller: Caller,
    query: Query,
) -> Result<Json<Value>, ApiError> {
    let (after, before, limit) = {
        let after = query.instant("after").unwrap_or(Timestamp(0));
        let before = query.instant("before").unwrap_or(Timestamp(i64::MAX));
        let limit = query.int("limit", 1..=MAX_MINUTES, 60);
        query.finish()?;
        (after, before, usize::try_from(limit).unwrap_or(usize::MAX))
    };
    let found = app
        .scan(move |ledger| ledger.gpu_use(after, before, limit))
        .await?;
    let rows: Vec<Value> = found
        .iter()
        .map(|row| {
            let gpus: Vec<Value> = row.gpus.iter().map(of_use).collect();
            json!({"since": row.since, "until": row.until, "seq": row.seq, "gpus": gpus})
        })
        .collect();
    Ok(Json(json!({"rows": rows})))
}

fn of_use(gpu: &GpuUse) -> Value {
    let power = gpu.power_mw.map(|spread: Spread| {
        json!({"min": watts(spread.min), "mean": watts(spread.mean), "max": watts(spread.max)})
    });
    json!({
        "uuid": gpu.gpu.as_str(),
        "samples": gpu.samples,
        "memory_used_mb": gpu.used_mib,
        "gpu_utilization_pct": gpu.utilization_pct,
        "temperature_c": gpu.temperature_c,
        "power_draw_w": power,
    })
}

/// A GPU that may be used.
#[derive(Serialize, ToSchema)]
pub struct Released {
    pub uuid: String,
    /// Always false.
    pub quarantined: bool,
}

/// End a GPU's quarantine.
///
/// It gets new instances again. One that is not quarantined stays as it is.
#[utoipa::path(post, path = "/gpu/{uuid}/release", tag = "gpu",
    responses((status = 200, body = Released, example = json!({"uuid": "GPU-5f6b", "quarantined": false}))))]
async fn release(
    State(app): State<App>,
    caller: Caller,
    PathOf(uuid): PathOf<String>,
) -> Result<Json<Released>, ApiError> {
    let gpu = SmolStr::new(&uuid);
    app.submit(&caller, Command::ReleaseGpu { gpu }).await?;
    Ok(Json(Released {
        uuid,
        quarantined: false,
    }))
}
