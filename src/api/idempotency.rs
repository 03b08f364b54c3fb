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
use super::state::App;
use crate::coordinator::Once;
use crate::domain::command::{Command, Reply};

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

impl IdempotencyKey {
    /// Submits a start, once if there is a key. `route` names the operation that the key belongs to.
    pub async fn submit(
        self,
        app: &App,
        caller: &Caller,
        route: &'static str,
        body: &JsonBody,
        command: Command,
    ) -> Result<Reply, ApiError> {
        let Some(key) = self.0 else {
            return app.submit(caller, command).await;
        };
        let body_hash = body.canonical_hash();
        let once = Once {
            route,
            key,
            body_hash,
        };
        Ok(app
            .handle
            .submit_once(caller.origin(), command, once)
            .await?)
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
