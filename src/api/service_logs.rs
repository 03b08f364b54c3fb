//! What a service wrote to its output: the last lines, and each new one as it comes.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::authenticate::Watch;
use super::body::PathOf;
use super::error::ApiError;
use super::guard::Caller;
use super::log_stream::{self, unreadable};
use super::query::Query;
use super::routes::Routes;
use super::service_owner::find_owned;
use super::state::App;

/// The route of this file, at the root and under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default().routes(routes!(read))
}

/// The last lines of a service's output.
#[derive(Serialize, ToSchema)]
pub struct LogLines {
    pub service: String,
    /// Oldest first.
    pub lines: Vec<String>,
}

/// Read a service's output.
///
/// With `follow` it is a stream: `event: line` carries `{"line"}`, `event: gap` `{"dropped_bytes"}` when the log was cut
/// faster than it was read.
#[utoipa::path(get, path = "/services/{name}/logs", tag = "services",
    params(
        ("tail" = Option<u64>, Query, description = "Last lines, up to 10000; 200 when absent"),
        ("follow" = Option<bool>, Query, description = "Stay, as server-sent events"),
    ),
    responses((status = 200, content(
            (LogLines = "application/json", example = json!({"service": "stats", "lines": ["listening on 127.0.0.1:40123"]})),
            (String = "text/event-stream"))),
        (status = 404, description = "Unknown service: x")))]
async fn read(
    State(app): State<App>,
    caller: Caller,
    PathOf(name): PathOf<String>,
    query: Query,
) -> Result<Response, ApiError> {
    let (tail, follow) = log_stream::wanted(&query)?;
    drop(query);
    let service = find_owned(&app, &caller, &name)?.spec.name;
    if follow {
        let place = app.limits.stream(&caller.principal)?;
        let watch = Watch::new(&app, &caller);
        return Ok(log_stream::stream(app, place, &service, tail, watch, None));
    }
    let lines = app
        .logs
        .tail(&service, tail)
        .await
        .map_err(|error| unreadable(&error))?;
    Ok(Json(LogLines {
        service: name,
        lines,
    })
    .into_response())
}
