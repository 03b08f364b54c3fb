//! Requests that another site's page makes in the name of who is logged in: a write that comes by a session shows the
//! session's CSRF token, which no other page can read, and does not come from another site. The latter holds for logins
//! too, or a page could log its visitor in as somebody else.

use http::{HeaderMap, HeaderName, Method, header};

use super::error::{ApiError, ErrorCode};
use super::state::App;
use crate::auth::Principal;

/// Where the token is shown (`contracts/run-gateway.md` section 2, row 8).
const CSRF_HEADER: HeaderName = HeaderName::from_static("x-abstractgateway-csrf");

/// What a browser says of where a request comes from (W3C Fetch Metadata); scripts cannot set it.
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Lets a request of a session pass, or says what it lacks. Reads change nothing and pass.
pub fn check(
    app: &App,
    principal: &Principal,
    method: &Method,
    headers: &HeaderMap,
) -> Result<(), ApiError> {
    let Some(live) = &principal.session else {
        return Ok(());
    };
    if method.is_safe() {
        return Ok(());
    }
    check_site(headers)?;
    let shown = headers.get(CSRF_HEADER).and_then(|text| text.to_str().ok());
    let sessions = &app.logins.sessions;
    match shown.is_some_and(|shown| sessions.is_csrf(&live.session.csrf, shown)) {
        true => Ok(()),
        false => Err(ApiError::new(
            ErrorCode::CsrfRequired,
            "Gateway browser session CSRF token missing or invalid",
        )
        .with("reason_code", "csrf_required")),
    }
}

/// That no other site's page sends this. The guard has checked `Origin` against the allow-list; here counts what the
/// browser says of it: another site never may, and another origin of this site only when its `Origin` was allowed.
pub fn check_site(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(site) = headers.get(SEC_FETCH_SITE) else {
        // No browser, or one from before 2023.
        return Ok(());
    };
    let passes = match site.as_bytes() {
        b"same-origin" | b"none" => true,
        b"same-site" => headers.contains_key(header::ORIGIN),
        _ => false,
    };
    match passes {
        true => Ok(()),
        false => Err(ApiError::new(
            ErrorCode::CrossSite,
            "Forbidden (the request comes from another site's page)",
        )
        .with("reason_code", "cross_site")),
    }
}
