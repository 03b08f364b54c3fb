//! A run's checkpoint: what a service leaves so that a later attempt goes on from there. Any bytes, any
//! content type, up to 1 MiB.

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde::Serialize;
use smol_str::SmolStr;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::body::{PathOf, read_body};
use super::error::{ApiError, ErrorCode, FieldError};
use super::examples;
use super::guard::Caller;
use super::routes::Routes;
use super::state::App;
use super::work;
use crate::auth::Principal;
use crate::domain::command::{Command, Rejection};
use crate::domain::event::Event;
use crate::domain::ids::Attempt;

/// The attempt that a service works on: as it was given at the dispatch.
const ATTEMPT: HeaderName = HeaderName::from_static("x-rungate-attempt");

/// Longest content type that is kept.
const MAX_CONTENT_TYPE_BYTES: usize = 200;

/// The routes of this file, under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default().routes(routes!(read, save))
}

/// A checkpoint was kept.
#[derive(Serialize, ToSchema)]
pub struct Saved {
    pub ok: bool,
    pub run_id: String,
    pub size_bytes: u64,
}

/// The attempt that a pusher works on: as its token says, else as it does itself.
///
/// # Errors
/// 409 when a token for one attempt is shown for another.
pub fn attempt_of(principal: &Principal, headers: &HeaderMap) -> Result<Option<Attempt>, ApiError> {
    let given = given_attempt(headers)?;
    match (work::attempt_of(principal), given) {
        (Some((run, current)), Some(given)) if given != current => {
            let stale = Rejection::StaleAttempt {
                run,
                given,
                current,
            };
            Err(stale.into())
        }
        (own, given) => Ok(own.map(|(_, attempt)| attempt).or(given)),
    }
}

/// The attempt that a pusher says it works on.
pub fn given_attempt(headers: &HeaderMap) -> Result<Option<Attempt>, ApiError> {
    let Some(value) = headers.get(&ATTEMPT) else {
        return Ok(None);
    };
    let text = value.to_str().unwrap_or_default();
    match text.parse() {
        Ok(attempt) => Ok(Some(attempt)),
        Err(_) => {
            let loc = vec!["header".to_owned(), ATTEMPT.as_str().to_owned()];
            let message = "Input should be a valid integer, unable to parse string as an integer";
            let fault = FieldError::new(loc, "int_parsing", message).input(text.into());
            Err(ApiError::validation(vec![fault]))
        }
    }
}

/// Save a checkpoint of the running attempt.
#[utoipa::path(
    put, path = "/runs/{run_id}/checkpoint", tag = "runs",
    params(("X-Rungate-Attempt" = Option<u32>, Header, description = "Fences: another attempt's checkpoint is 409")),
    request_body(content = Vec<u8>, content_type = "application/octet-stream", description = "Up to 1 MiB"),
    responses(
        (status = 200, body = Saved, example = json!(examples::saved())),
        (status = 409, description = "The run is not running, or the attempt is over"),
    )
)]
async fn save(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
    headers: HeaderMap,
    request: Request,
) -> Result<Json<Saved>, ApiError> {
    let attempt = attempt_of(&caller.principal, &headers)?;
    let run = app.own_run(&caller, &id)?.run;
    let content_type = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .filter(|text| text.len() <= MAX_CONTENT_TYPE_BYTES)
        .map_or(
            SmolStr::new_static("application/octet-stream"),
            SmolStr::new,
        );
    let body = read_body(request, &app, app.config.max_checkpoint_bytes).await?;
    let size_bytes = body.len() as u64;
    let command = Command::SaveCheckpoint {
        run,
        attempt,
        content_type,
        body,
    };
    app.submit(&caller, command).await?;
    Ok(Json(Saved {
        ok: true,
        run_id: run.to_string(),
        size_bytes,
    }))
}

/// Read a run's last checkpoint.
#[utoipa::path(
    get, path = "/runs/{run_id}/checkpoint", tag = "runs",
    responses(
        (status = 200, description = "Its bytes, under its content type", body = Vec<u8>, content_type = "application/octet-stream", example = json!("any bytes")),
        (status = 404, description = "The run has none"),
        (status = 410, description = "It was purged"),
    )
)]
async fn read(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
) -> Result<Response, ApiError> {
    let run = app.run(&caller, &id).await?;
    let none = || {
        ApiError::new(
            ErrorCode::CheckpointNotFound,
            format!("Run '{id}' has no checkpoint"),
        )
    };
    let record = app
        .ledger
        .record(run.checkpoint.ok_or_else(none)?)?
        .ok_or_else(none)?;
    if record.purged {
        return Err(ApiError::new(
            ErrorCode::Purged,
            format!("The payloads of run '{id}' were purged"),
        ));
    }
    let Event::CheckpointSaved {
        content_type,
        attempt,
        ..
    } = record.event
    else {
        return Err(none());
    };
    let mut response = record.payload.into_response();
    let headers = response.headers_mut();
    let kind = HeaderValue::from_str(&content_type)
        .unwrap_or(HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(ATTEMPT, attempt.into());
    // A service's bytes are data, never a page of ours.
    headers.insert(
        header::CONTENT_DISPOSITION,
        HeaderValue::from_static("attachment"),
    );
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::jwt::work::Work;
    use crate::domain::ids::{Generation, PlaneId, RunId};

    /// While its body was under way, the header of a token's bearer let it write for the attempt after its own.
    #[test]
    fn a_token_speaks_for_its_own_attempt_only() {
        let work = Work::Attempt {
            plane: PlaneId(1),
            run: RunId(uuid::Uuid::nil()),
            attempt: 1,
            service: "s".into(),
            generation: Generation(1),
        };
        let principal = Principal::of_work(work, ("acme".into(), PlaneId(1)), &[0; 32]);
        let of = |given: &'static str| {
            let value = HeaderValue::from_static(given);
            attempt_of(&principal, &HeaderMap::from_iter([(ATTEMPT, value)]))
        };
        assert_eq!(of("1"), Ok(Some(1)));
        assert_eq!(attempt_of(&principal, &HeaderMap::new()), Ok(Some(1)));
        let stale = of("2").unwrap_err();
        assert_eq!(stale.code, ErrorCode::StaleAttempt);
    }
}
