//! A run's ledger: read a page, several runs at once, and follow (`contracts/run-gateway.md` sections 6.4
//! to 6.6).

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::authenticate::Watch;
use super::body::{JsonBody, PathOf};
use super::error::ApiError;
use super::examples;
use super::fields::{Fields, TextRule};
use super::guard::Caller;
use super::job::MAX_ID_CHARS;
use super::query::Query;
use super::routes::Routes;
use super::sse::{self, Resume, Source};
use super::state::App;
use crate::domain::ids::{Cursor, PlaneId, RunId};
use crate::ledger::{Ledger, ReadError, RunSummary};

/// Most runs of one batch.
const MAX_BATCH_RUNS: usize = 200;

/// Most records of one page.
pub const MAX_PAGE: u64 = 2_000;

/// The routes of this file, under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(read))
        .routes(routes!(batch))
        .routes(routes!(stream))
}

/// A page of records.
#[derive(Serialize, ToSchema)]
pub struct RecordPage {
    /// Records in order (design section 6).
    #[schema(value_type = Vec<Object>)]
    pub items: Vec<Box<RawValue>>,
    /// Give it as `after` (`after_seq`) for the next page; the same as before when there is none yet.
    pub next_after: u64,
}

/// The rendered records of a read, and where the next one goes on.
pub fn page(records: Vec<(u64, Vec<u8>)>, after: u64) -> RecordPage {
    let next_after = records.last().map_or(after, |(position, _)| *position);
    let texts = records
        .into_iter()
        .filter_map(|(_, json)| String::from_utf8(json).ok());
    RecordPage {
        items: texts
            .filter_map(|text| RawValue::from_string(text).ok())
            .collect(),
        next_after,
    }
}

/// Read a run's ledger.
#[utoipa::path(
    get, path = "/runs/{run_id}/ledger", tag = "ledger",
    params(
        ("after" = Option<u64>, Query, description = "The last cursor that was read; 0 when absent"),
        ("limit" = Option<u64>, Query, description = "1 to 2000; 200 when absent"),
    ),
    responses((status = 200, body = RecordPage, example = json!(examples::page())), (status = 404, description = "Run 'x' not found"))
)]
async fn read(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
    query: Query,
) -> Result<Json<RecordPage>, ApiError> {
    let (after, limit) = {
        let after = query.int("after", 0..=u64::MAX, 0);
        let limit = query.int("limit", 1..=MAX_PAGE, 200);
        query.finish()?;
        (after, limit as usize)
    };
    let run = app.run(&caller, &id).await?;
    let plane = run.plane;
    let records = app
        .scan(move |ledger| ledger.run_records_json(plane, run.run, after, limit))
        .await?;
    Ok(Json(page(records, after)))
}

/// Several runs at once.
#[derive(Serialize, ToSchema)]
pub struct BatchRequest {
    /// At most 200.
    pub runs: Vec<BatchRun>,
    /// Records of each run, 1 to 2000; 200 when absent.
    pub limit: Option<u64>,
}

/// One of a batch.
#[derive(Serialize, ToSchema)]
pub struct BatchRun {
    pub run_id: String,
    #[serde(default)]
    pub after: u64,
}

/// Pages by run id; unknown runs are left out.
#[derive(Serialize, ToSchema)]
pub struct BatchPages {
    pub runs: BTreeMap<String, RecordPage>,
}

impl BatchRequest {
    fn read(fields: &Fields) -> Result<BatchRequest, ApiError> {
        if !fields.has("runs") {
            fields.missing("runs");
        }
        let limit = fields.int("limit", 1..=MAX_PAGE);
        let runs = fields.objects("runs", MAX_BATCH_RUNS).unwrap_or_default();
        let runs = runs.iter().map(|run| BatchRun {
            run_id: run.required_text("run_id", TextRule::name(MAX_ID_CHARS)),
            after: run.int("after", 0..=u64::MAX).unwrap_or(0),
        });
        let runs = runs.collect();
        fields.finish()?;
        Ok(BatchRequest { runs, limit })
    }
}

/// Most bytes of records that one batch answers with; runs beyond get a page without items.
const MAX_BATCH_BYTES: usize = 16 << 20;

/// Read the ledgers of several runs.
#[utoipa::path(
    post, path = "/runs/ledger/batch", tag = "ledger",
    request_body(content = BatchRequest, example = json!({"runs": [{"run_id": "0199f3a2-7c1e-7d0a-9c55-6f0f0d1f2a3b", "after": 0}], "limit": 200})),
    responses((status = 200, body = BatchPages, example = json!(examples::batch())))
)]
async fn batch(
    State(app): State<App>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<BatchPages>, ApiError> {
    let request = BatchRequest::read(&body.fields()?)?;
    let plane = caller.plane();
    let principal = &caller.principal;
    let tenant = principal
        .sees_tenant()
        .then(|| principal.user.tenant.clone());
    let runs = app
        .scan(move |ledger| read_batch(ledger, plane, tenant.as_deref(), &request))
        .await?;
    Ok(Json(BatchPages { runs }))
}

fn read_batch(
    ledger: &Ledger,
    own: PlaneId,
    tenant: Option<&str>,
    request: &BatchRequest,
) -> Result<BTreeMap<String, RecordPage>, ReadError> {
    let limit = request.limit.unwrap_or(200) as usize;
    let mut left = MAX_BATCH_BYTES;
    let mut pages = BTreeMap::new();
    for asked in &request.runs {
        let Ok(run) = asked.run_id.parse::<RunId>() else {
            continue;
        };
        let found = match (ledger.run(own, run)?, tenant) {
            (None, Some(tenant)) => ledger.run_of_tenant(tenant, run)?,
            (found, _) => found,
        };
        let Some(RunSummary { plane, .. }) = found else {
            continue;
        };
        let records: Vec<(Cursor, Vec<u8>)> = match left {
            0 => Vec::new(),
            _ => ledger.run_records_json(plane, run, asked.after, limit)?,
        };
        let bytes: usize = records.iter().map(|(_, json)| json.len()).sum();
        left = left.saturating_sub(bytes);
        pages.insert(asked.run_id.clone(), page(records, asked.after));
    }
    Ok(pages)
}

/// Follow a run's ledger.
///
/// `event: step` carries `{"cursor", "record"}`; `event: done` closes the stream of an ended run. Both `after` and
/// `Last-Event-ID` resume without gap or repeat.
#[utoipa::path(
    get, path = "/runs/{run_id}/ledger/stream", tag = "ledger",
    params(
        ("after" = Option<u64>, Query, description = "The last cursor that was read"),
        ("heartbeat_s" = Option<f64>, Query, description = "Seconds of silence before a comment: over 0.1 to 60; 5 when absent"),
        ("Last-Event-ID" = Option<u64>, Header, description = "As browsers send it; the larger of both counts"),
    ),
    responses((status = 200, description = "Server-sent events", content_type = "text/event-stream", body = String, example = json!(examples::RUN_STREAM)))
)]
async fn stream(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
    query: Query,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let resume = Resume::read(&query, &headers, "after")?;
    drop(query);
    let RunSummary { plane, run, .. } = app.run(&caller, &id).await?;
    let place = app.limits.stream(&caller.principal)?;
    let source = Source::Run { plane, run };
    let watch = Watch::new(&app, &caller);
    sse::stream(app, place, source, resume, watch)
}
