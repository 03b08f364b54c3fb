//! The `Idempotency-Key` header (draft-ietf-httpapi-idempotency-key-header-06): the same key and body get the
//! first answer again, with `Idempotency-Replayed: true`; another body under the key is 422.

use axum::extract::FromRequestParts;
use axum::response::{IntoResponse, Response};
use http::request::Parts;
use http::{HeaderName, HeaderValue};
use smol_str::SmolStr;

use super::body::JsonBody;
use super::error::{ApiError, ErrorCode};
use super::guard::Caller;
use super::runs::unexpected;
use super::state::App;
use crate::coordinator::Once;
use crate::domain::command::{Command, Reply};
use crate::domain::ids::RunId;

const HEADER: &str = "idempotency-key";

/// Longest key: it is kept with every start.
const MAX_KEY_BYTES: usize = 255;

/// The key of a request, if it has one.
pub struct IdempotencyKey(Option<SmolStr>);

impl FromRequestParts<App> for IdempotencyKey {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, ApiError> {
        let mut values = parts.headers.get_all(HEADER).iter();
        let Some(value) = values.next() else {
            return Ok(IdempotencyKey(None));
        };
        let text = value.to_str().unwrap_or_default();
        let visible = text.bytes().all(|byte| byte.is_ascii_graphic());
        if values.next().is_some() || !visible || !(1..=MAX_KEY_BYTES).contains(&text.len()) {
            return Err(ApiError::new(
                ErrorCode::IdempotencyKeyInvalid,
                format!(
                    "Idempotency-Key must be one header of 1 to {MAX_KEY_BYTES} visible characters"
                ),
            ));
        }
        Ok(IdempotencyKey(Some(SmolStr::new(text))))
    }
}

/// A run that was started, now or by an earlier request under the same key.
pub struct StartedRun {
    pub run: RunId,
    /// Its place in its queue, from 1, at the moment it was queued.
    pub position: u64,
    pub duplicate: bool,
}

impl IdempotencyKey {
    /// Starts a run, once if there is a key. `route` names the operation that the key belongs to.
    pub async fn start(
        self,
        app: &App,
        caller: &Caller,
        route: &'static str,
        body: &JsonBody,
        command: Command,
    ) -> Result<StartedRun, ApiError> {
        let reply = match self.0 {
            None => app.submit(caller, command).await?,
            Some(key) => {
                let once = Once {
                    route,
                    key,
                    body_hash: body.canonical_hash(),
                };
                app.put(caller, command, Some(once)).await?
            }
        };
        match reply {
            Reply::Started {
                run,
                position,
                duplicate,
            } => Ok(StartedRun {
                run,
                position,
                duplicate,
            }),
            reply => Err(unexpected(&reply)),
        }
    }
}

/// An answer, marked when it is an earlier one again.
pub fn replayed(answer: impl IntoResponse, duplicate: bool) -> Response {
    let mut response = answer.into_response();
    if duplicate {
        response.headers_mut().insert(
            HeaderName::from_static("idempotency-replayed"),
            HeaderValue::from_static("true"),
        );
    }
    response
}
