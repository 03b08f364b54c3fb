//! `GET /metrics`: what was recorded, and gauges that are taken at the moment of asking, over all planes. For those
//! who run the machine: queue depths and service names are nobody else's business.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header;
use metrics::gauge;
use utoipa_axum::routes;

use super::error::ApiError;
use super::gpu::used_mib;
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
    for gpu in app.handle.gpu_status().await? {
        let uuid = gpu.facts.uuid.to_string();
        gauge!("rungate_gpu_memory_bytes", "gpu" => uuid.clone())
            .set(gpu.facts.memory_mib as f64 * MIB);
        gauge!("rungate_gpu_reserved_bytes", "gpu" => uuid.clone())
            .set(gpu.reserved_mib as f64 * MIB);
        gauge!("rungate_gpu_used_bytes", "gpu" => uuid).set(used_mib(&gpu) as f64 * MIB);
    }
    Ok(())
}
