//! `GET /metrics`: what was recorded, and gauges that are taken at the moment of asking, over all planes. For those
//! who run the machine: queue depths and service names are nobody else's business.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header;
use metrics::gauge;
use utoipa_axum::routes;

use super::error::ApiError;
use super::gpu::{look, watts};
use super::guard::Caller;
use super::routes::Routes;
use super::state::App;

const MIB: f64 = 1_048_576.0;

/// The route of this file, at the root.
pub fn router() -> Routes {
    Routes::default().routes(routes!(read))
}

/// Read the metrics, for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "health",
    responses((status = 200, body = String, content_type = "text/plain", example = "rungate_queue_depth 3\n")))]
async fn read(State(app): State<App>, _caller: Caller) -> Result<Response, ApiError> {
    take_gauges(&app).await?;
    let kind = [(
        header::CONTENT_TYPE,
        "text/plain; version=0.0.4; charset=utf-8",
    )];
    Ok((kind, app.metrics.render()).into_response())
}

async fn take_gauges(app: &App) -> Result<(), ApiError> {
    let stats = app.handle.queue_stats(None).await?;
    gauge!("rungate_queue_depth").set(stats.queued as f64);
    for (status, count) in app.scan(|ledger| ledger.runs_by_status()).await? {
        gauge!("rungate_runs", "status" => status.name()).set(count as f64);
    }
    gauge!("rungate_ledger_followers").set(app.ledger.followers() as f64);
    gauge!("rungate_ledger_seq").set(app.ledger.tail() as f64);
    for gpu in look(app).await? {
        let status = &gpu.status;
        let uuid = status.facts.uuid.to_string();
        gauge!("rungate_gpu_present", "gpu" => uuid.clone())
            .set(f64::from(u8::from(status.present)));
        gauge!("rungate_gpu_quarantined", "gpu" => uuid.clone())
            .set(f64::from(u8::from(status.quarantine.is_some())));
        gauge!("rungate_gpu_memory_bytes", "gpu" => uuid.clone())
            .set(status.facts.memory_mib as f64 * MIB);
        gauge!("rungate_gpu_reserved_bytes", "gpu" => uuid.clone())
            .set(status.reserved_mib as f64 * MIB);
        gauge!("rungate_gpu_foreign_bytes", "gpu" => uuid.clone())
            .set(status.foreign_mib as f64 * MIB);
        gauge!("rungate_gpu_used_bytes", "gpu" => uuid.clone()).set(gpu.used_mib() as f64 * MIB);
        let Some(reading) = gpu.reading() else {
            continue;
        };
        let measured = [
            (
                "rungate_gpu_utilization_percent",
                reading.utilization_pct.map(f64::from),
            ),
            (
                "rungate_gpu_temperature_celsius",
                reading.temperature_c.map(f64::from),
            ),
            ("rungate_gpu_power_watts", reading.power_mw.map(watts)),
        ];
        for (name, value) in measured {
            if let Some(value) = value {
                gauge!(name, "gpu" => uuid.clone()).set(value);
            }
        }
    }
    Ok(())
}
