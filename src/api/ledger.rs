//! The ledger as a whole: pages and streams by seq, of the caller's plane and, for the administrator, of the
//! gateway.

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;
use utoipa_axum::routes;

use super::authenticate::Watch;
use super::error::ApiError;
use super::examples;
use super::guard::Caller;
use super::query::Query;
use super::routes::Routes;
use super::run_ledger::{MAX_PAGE, RecordPage, page};
use super::sse::{self, Resume, Source};
use super::state::App;
use crate::ledger::{Scope, Topic};

/// The routes of this file, under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(read))
        .routes(routes!(stream))
        .routes(routes!(plane_stream))
}

/// Read the gateway's ledger.
#[utoipa::path(
    get, path = "/ledger", tag = "ledger",
    params(
        ("after_seq" = Option<u64>, Query, description = "The last seq that was read; 0 when absent"),
        ("limit" = Option<u64>, Query, description = "1 to 2000; 200 when absent"),
    ),
    responses((status = 200, body = RecordPage, example = json!(examples::page())))
)]
async fn read(
    State(app): State<App>,
    _caller: Caller,
    query: Query,
) -> Result<Json<RecordPage>, ApiError> {
    let (after, limit) = {
        let after = query.int("after_seq", 0..=u64::MAX, 0);
        let limit = query.int("limit", 1..=MAX_PAGE, 200);
        query.finish()?;
        (after, limit as usize)
    };
    let records = app
        .scan(move |ledger| ledger.records_json(Scope::All, after, limit))
        .await?;
    Ok(Json(page(records, after)))
}

/// Follow the gateway's ledger.
///
/// `event: step` carries `{"seq", "record"}`; the stream never ends by itself.
#[utoipa::path(
    get, path = "/ledger/stream", tag = "ledger",
    params(
        ("after_seq" = Option<u64>, Query, description = "The last seq that was read"),
        ("heartbeat_s" = Option<f64>, Query, description = "Over 0.1 to 60; 5 when absent"),
        ("Last-Event-ID" = Option<u64>, Header, description = "The larger of both counts"),
    ),
    responses((status = 200, description = "Server-sent events", content_type = "text/event-stream", body = String, example = json!(examples::GATEWAY_STREAM)))
)]
async fn stream(
    State(app): State<App>,
    caller: Caller,
    query: Query,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    follow(app, &caller, &query, &headers, Topic::All)
}

/// Follow the caller's plane.
#[utoipa::path(
    get, path = "/plane/ledger/stream", tag = "ledger",
    params(
        ("after_seq" = Option<u64>, Query, description = "The last seq that was read"),
        ("heartbeat_s" = Option<f64>, Query, description = "Over 0.1 to 60; 5 when absent"),
        ("Last-Event-ID" = Option<u64>, Header, description = "The larger of both counts"),
    ),
    responses((status = 200, description = "Server-sent events", content_type = "text/event-stream", body = String, example = json!(examples::GATEWAY_STREAM)))
)]
async fn plane_stream(
    State(app): State<App>,
    caller: Caller,
    query: Query,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let topic = Topic::Plane(caller.plane());
    follow(app, &caller, &query, &headers, topic)
}

fn follow(
    app: App,
    caller: &Caller,
    query: &Query,
    headers: &HeaderMap,
    topic: Topic,
) -> Result<Response, ApiError> {
    let resume = Resume::read(query, headers, "after_seq")?;
    let place = app.limits.stream(&caller.principal)?;
    let watch = Watch::new(&app, caller);
    sse::stream(app, place, Source::Ledger(topic), resume, watch)
}
