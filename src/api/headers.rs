//! The headers that every answer has, whoever asked for what: what browsers must not do with it.
//! Source: OWASP ASVS 5.0 section 3.4.

use std::sync::LazyLock;

use http::{HeaderMap, HeaderName, HeaderValue, header};

/// Answers are data: nothing of them is run, framed or sniffed at, nor read by pages of other origins. A page of ours
/// brings its own policy.
const ALL: [(HeaderName, HeaderValue); 6] = [
    (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
    (
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'"),
    ),
    (
        HeaderName::from_static("cross-origin-opener-policy"),
        HeaderValue::from_static("same-origin"),
    ),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        HeaderValue::from_static("same-origin"),
    ),
    (
        header::REFERRER_POLICY,
        HeaderValue::from_static("no-referrer"),
    ),
    (
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    ),
];

/// A year: browsers that came by https once come by nothing else.
const TRANSPORT_SECURITY: HeaderValue = HeaderValue::from_static("max-age=31536000");

/// They as a map, which is copied for less than it takes to put each of them into another.
static PREPARED: LazyLock<HeaderMap> = LazyLock::new(|| ALL.into_iter().collect());

/// Adds what an answer does not have yet.
pub fn harden(headers: &mut HeaderMap, is_https: bool) {
    let own = std::mem::replace(headers, PREPARED.clone());
    headers.extend(own);
    if is_https {
        headers.insert(header::STRICT_TRANSPORT_SECURITY, TRANSPORT_SECURITY);
    }
}
