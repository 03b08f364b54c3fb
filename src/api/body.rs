//! Bodies and paths as handlers take them: bounded in size and time, of the right content type, and
//! refused with the same errors everywhere.

use std::pin::pin;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, MatchedPath, Path, Request};
use bytes::Bytes;
use futures_util::future::poll_immediate;
use http::request::Parts;
use http::{HeaderMap, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use super::authenticate::readmit;
use super::error::{ApiError, ErrorCode, FieldError};
use super::fields::Fields;
use super::guard::Caller;
use super::json;
use super::state::App;

/// A JSON body: checked as a whole, kept as it came.
pub struct JsonBody {
    bytes: Bytes,
}

impl JsonBody {
    /// Its members, to be read one by one.
    pub fn fields(&self) -> Result<Fields<'_>, ApiError> {
        Fields::of_body(self.text()?)
    }

    /// As it came.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    fn text(&self) -> Result<&str, ApiError> {
        // Checked when it was read; the error can only say so again.
        std::str::from_utf8(&self.bytes)
            .map_err(|_| ApiError::new(ErrorCode::InvalidUtf8, "The body is not UTF-8"))
    }

    /// blake3 of the body in a canonical form, so that the same request written differently is the same.
    pub fn canonical_hash(&self) -> [u8; 32] {
        *blake3::hash(&json::canonical(&self.bytes)).as_bytes()
    }
}

impl FromRequest<App> for JsonBody {
    type Rejection = ApiError;
    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        check_content_type(request.headers(), may_be_another_sites(&request))?;
        let limit = limit(&request, app.config.max_body_bytes);
        let bytes = read_body(request, app, limit).await?;
        if bytes.is_empty() {
            let missing = FieldError::new(vec!["body".to_owned()], "missing", "Field required");
            return Err(ApiError::validation(vec![missing]));
        }
        json::check(&bytes)?;
        Ok(JsonBody { bytes })
    }
}

/// Routes whose bodies hold what callers bring along, or lists: up to `max_body_bytes`.
const LARGE_BODIES: &[&str] = &[
    "/admin/users/import",
    "/commands",
    "/queue/submit",
    "/queue/{job_id}/progress",
    "/runs/ledger/batch",
    "/runs/start",
    "/services/register",
    "/services/{name}",
];

/// Largest body of all other routes, which hold a few names and numbers.
const SMALL_BODY_BYTES: usize = 64 << 10;

/// Largest body that a request may have.
fn limit(request: &Request, max_bytes: usize) -> usize {
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or("", MatchedPath::as_str);
    match LARGE_BODIES.contains(&route.strip_prefix("/api/gateway").unwrap_or(route)) {
        true => max_bytes,
        false => max_bytes.min(SMALL_BODY_BYTES),
    }
}

/// Whether a page of another site could have had a browser send this: a login, or what comes by a browser's session.
fn may_be_another_sites(request: &Request) -> bool {
    let caller = request.extensions().get::<Caller>();
    caller.is_none_or(|caller| caller.principal.session.is_some())
}

/// A body is JSON and not compressed. Existing clients may leave it unsaid; where it counts, it is said: what a page
/// sends elsewhere without asking first has another type or none (Fetch, "CORS-safelisted request-header").
fn check_content_type(headers: &HeaderMap, is_to_be_said: bool) -> Result<(), ApiError> {
    let encoding = headers.get(header::CONTENT_ENCODING);
    if encoding.is_some_and(|encoding| encoding != "identity") {
        return Err(ApiError::new(
            ErrorCode::UnsupportedMediaType,
            "Compressed bodies are not accepted; send it without Content-Encoding",
        ));
    }
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return match is_to_be_said {
            true => Err(ApiError::new(
                ErrorCode::UnsupportedMediaType,
                "There is no Content-Type; send application/json",
            )),
            false => Ok(()),
        };
    };
    let text = value.to_str().unwrap_or_default();
    let essence = text
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    if essence == "application/json" || essence.ends_with("+json") {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::UnsupportedMediaType,
        format!("Content-Type '{essence}' is not accepted; send application/json"),
    ))
}

/// A body that takes longer had to be awaited; others came with their heads, just after the caller was let in.
const AWAITED: Duration = Duration::from_millis(1);

/// All of a body, at most `limit` bytes, within the time that a body may take. Of a caller that took its time it is
/// looked again whether it is still let in.
pub fn read_body(
    request: Request,
    app: &App,
    limit: usize,
) -> impl Future<Output = Result<Bytes, ApiError>> {
    let declared = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let excess = declared.filter(|length| *length > limit as u64);
    let (parts, body) = request.into_parts();
    let body = Limited::new(body, limit);
    async move {
        if let Some(length) = excess {
            return Err(too_large(&length.to_string(), limit));
        }
        let began = Instant::now();
        let bytes = collect(body, app, limit).await?;
        if let Some(caller) = parts.extensions.get::<Caller>()
            && began.elapsed() > AWAITED
        {
            readmit(app, caller, parts.uri.path())?;
        }
        Ok(bytes)
    }
}

async fn collect(body: Limited<Body>, app: &App, limit: usize) -> Result<Bytes, ApiError> {
    let mut body = pin!(body.collect());
    // Most bodies came with their heads, and need no timer.
    let collected = match poll_immediate(&mut body).await {
        Some(collected) => Ok(collected),
        None => tokio::time::timeout(app.config.body_timeout, body).await,
    };
    match collected {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            Err(too_large(&format!("over {limit}"), limit))
        }
        Ok(Err(_)) => Err(ApiError::new(
            ErrorCode::InvalidJson,
            "The body ended before it was complete",
        )),
        Err(_) => Err(ApiError::new(
            ErrorCode::BodyTimeout,
            format!(
                "The body did not arrive within {} s",
                app.config.body_timeout.as_secs()
            ),
        )),
    }
}

fn too_large(size: &str, limit: usize) -> ApiError {
    ApiError::new(
        ErrorCode::BodyTooLarge,
        format!("Payload Too Large ({size} bytes > {limit} bytes)"),
    )
}

/// Parameters of the path; one that is not UTF-8 names nothing.
pub struct PathOf<T>(pub T);

impl<T: DeserializeOwned + Send> FromRequestParts<App> for PathOf<T> {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        match Path::<T>::from_request_parts(parts, app).await {
            Ok(Path(value)) => Ok(PathOf(value)),
            Err(_) => Err(ApiError::new(ErrorCode::NotFound, "Not Found")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_with_large_bodies_are_routes_with_bodies() {
        let api = serde_json::to_value(super::super::openapi()).unwrap();
        for route in LARGE_BODIES {
            let item = &api["paths"][format!("/api/gateway{route}")];
            let mut operations = item.as_object().into_iter().flat_map(|item| item.values());
            assert!(
                operations.any(|operation| operation["requestBody"].is_object()),
                "{route}"
            );
        }
    }
}
