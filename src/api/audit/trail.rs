//! What the audit keeps of one request, and whether a record carries it already.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use axum::extract::{FromRequestParts, MatchedPath, Request};
use http::request::Parts;
use http::{HeaderMap, HeaderName, Method, Uri, header};
use smol_str::SmolStr;

use crate::api::access::{Need, need};
use crate::api::client::{self, Client};
use crate::auth::Principal;
use crate::domain::audit::{Details, Source};
use crate::domain::identity::{Scope, UserKey};

/// The route of a path that is none of ours.
const UNMATCHED: &str = "unmatched";

/// Most characters of a path, and of a header, that are kept.
const MAX_PATH_CHARS: usize = 200;
const MAX_HEADER_CHARS: usize = 120;

/// Most parameters of a query string whose names are kept, and most characters of each.
const MAX_PARAMETERS: usize = 50;
const MAX_NAME_CHARS: usize = 64;

/// What secrets begin with. One may stand in a path or a header by mistake.
const SECRET_PREFIXES: &[&str] = &["rgt_", "agw_", "agws_", "agcsrf_", "whsec_", "sk-", "eyJ"];

/// What of a request the audit looks at.
#[derive(Clone, Copy)]
pub struct Seen<'a> {
    pub method: &'a Method,
    pub uri: &'a Uri,
    pub route: Option<&'a MatchedPath>,
    pub headers: &'a HeaderMap,
    pub client: Client,
}

impl Seen<'_> {
    /// As records show it, sent by nobody who is known yet.
    pub fn source(&self) -> Source {
        let address = self.client.address;
        let path = self.uri.path();
        let route = self.route.map_or(UNMATCHED, MatchedPath::as_str);
        let length = self.headers.get(header::CONTENT_LENGTH);
        Source {
            user: None,
            token: None,
            address: (!address.is_unspecified()).then_some(address),
            method: SmolStr::new(self.method.as_str()),
            route: SmolStr::new(route),
            path: (path != route).then(|| plain_path(path)),
            query: parameter_names(self.uri.query()),
            details: Details {
                origin: plain_header(self.headers, header::ORIGIN),
                user_agent: plain_header(self.headers, header::USER_AGENT),
                bytes_in: length.and_then(|length| length.to_str().ok()?.parse().ok()),
                ..Details::default()
            },
        }
    }
}

/// A request that asks for a write. Clones are of the same request, and know of it what any of them is told.
#[derive(Clone, Debug)]
pub struct Trail(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    request_id: SmolStr,
    began: Instant,
    source: Mutex<Arc<Source>>,
    recorded: AtomicBool,
}

impl Trail {
    /// Of a request that nobody is known to have sent yet; `None` when it asks for no write.
    pub fn begin(request: &Request, request_id: &SmolStr, began: Instant) -> Option<Trail> {
        let route = request.extensions().get::<MatchedPath>();
        if !is_write(request.method(), route) {
            return None;
        }
        let seen = Seen {
            method: request.method(),
            uri: request.uri(),
            route,
            headers: request.headers(),
            client: client::found(request.extensions()),
        };
        Some(Trail(Arc::new(Inner {
            request_id: request_id.clone(),
            began,
            source: Mutex::new(Arc::new(seen.source())),
            recorded: AtomicBool::new(false),
        })))
    }

    /// Notes who sent it.
    pub fn known(&self, principal: &Principal) {
        self.proven(&principal.user, Some(&principal.fingerprint));
    }

    /// Notes who has proven to have sent it, and by which token if it was one.
    pub fn proven(&self, user: &UserKey, fingerprint: Option<&str>) {
        let mut kept = self.kept();
        let source = Arc::make_mut(&mut kept);
        source.user = Some(user.clone());
        source.token = fingerprint.map(SmolStr::new);
    }

    /// Notes the token that was shown and not accepted.
    pub fn shown(&self, fingerprint: Option<String>) {
        let mut kept = self.kept();
        if kept.user.is_none() {
            Arc::make_mut(&mut kept).token = fingerprint.map(SmolStr::from);
        }
    }

    /// Notes which account is logged in to, before that is known to be right.
    pub fn tried(&self, account: &UserKey) {
        Arc::make_mut(&mut self.kept()).details.tried = Some(account.clone());
    }

    /// Notes which tenant the write is about.
    pub fn about(&self, tenant: &SmolStr) {
        let mut kept = self.kept();
        let is_own = kept
            .user
            .as_ref()
            .is_some_and(|user| user.tenant == *tenant);
        Arc::make_mut(&mut kept).details.about = (!is_own).then(|| tenant.clone());
    }

    /// For the record of a change; `None` when one carries it already.
    pub fn to_carry(&self) -> Option<Arc<Source>> {
        (!self.is_recorded()).then(|| self.source())
    }

    /// A record carries it.
    pub fn note_recorded(&self) {
        self.0.recorded.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_recorded(&self) -> bool {
        self.0.recorded.load(Ordering::Relaxed)
    }

    /// What is known of it by now.
    pub fn source(&self) -> Arc<Source> {
        self.kept().clone()
    }

    /// The request's id.
    pub fn request_id(&self) -> &SmolStr {
        &self.0.request_id
    }

    pub(super) fn began(&self) -> Instant {
        self.0.began
    }

    fn kept(&self) -> MutexGuard<'_, Arc<Source>> {
        // Each change is a single assignment, so a panic elsewhere cannot have torn it.
        self.0.source.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// For routes that ask for no credentials, where nothing is audited or not; a `Caller` has its trail itself.
pub struct MaybeTrail(pub Option<Trail>);

impl<S: Sync> FromRequestParts<S> for MaybeTrail {
    type Rejection = std::convert::Infallible;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        Ok(MaybeTrail(parts.extensions.get().cloned()))
    }
}

/// By its method; a POST that only reads, as its route's scope says, is none.
fn is_write(method: &Method, route: Option<&MatchedPath>) -> bool {
    if !matches!(
        *method,
        Method::POST | Method::PUT | Method::PATCH | Method::DELETE
    ) {
        return false;
    }
    let needs = route.map(|route| need(method, route.as_str()));
    !matches!(
        needs,
        Some(Need::Role(
            _,
            Scope::RunsRead | Scope::ServicesRead | Scope::LedgerRead
        ))
    )
}

fn looks_secret(part: &str) -> bool {
    let starts = |prefix: &&str| part.starts_with(*prefix) && part.len() > prefix.len() + 8;
    SECRET_PREFIXES.iter().any(starts)
}

/// A header that tells of the caller's program, when it is plain text without what looks like a secret.
fn plain_header(headers: &HeaderMap, name: HeaderName) -> Option<SmolStr> {
    let text = headers.get(name)?.to_str().ok()?;
    let is_sign = |c: char| !c.is_ascii_alphanumeric() && !matches!(c, '_' | '-');
    if text.split(is_sign).any(looks_secret) {
        return Some(SmolStr::new_static("<redacted>"));
    }
    Some(text.chars().take(MAX_HEADER_CHARS).collect())
}

/// A path without what looks like a secret, and not longer than a path of ours.
fn plain_path(path: &str) -> SmolStr {
    let parts = path.split('/').map(|part| match looks_secret(part) {
        true => "<redacted>",
        false => part,
    });
    let text = parts.collect::<Vec<_>>().join("/");
    text.chars().take(MAX_PATH_CHARS).collect()
}

/// The names without their values; a part without `=` may be a value, and is not told.
fn parameter_names(query: Option<&str>) -> Vec<SmolStr> {
    let parts = query.unwrap_or_default().split('&');
    let names = parts.filter_map(|part| part.split_once('='));
    names
        .map(|(name, _)| name.chars().take(MAX_NAME_CHARS).collect())
        .take(MAX_PARAMETERS)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    fn begin(method: &str, uri: &str) -> Option<Trail> {
        let request = Request::builder().method(method).uri(uri);
        let request = request
            .header("user-agent", "curl/8.5.0 (rgt_user_0123456789)")
            .header("origin", "https://gpu.example")
            .header("content-length", "7");
        let request = request.body(Body::empty()).unwrap();
        Trail::begin(&request, &"r".into(), Instant::now())
    }

    #[test]
    fn a_trail_has_names_and_no_values() {
        let trail = begin("POST", "/x/rgt_user_0123456789/y?drain=hunter2&b=&hunter2").unwrap();
        let source = trail.source();
        assert_eq!(source.path.as_deref(), Some("/x/<redacted>/y"));
        assert_eq!(source.query, ["drain", "b"]);
        assert_eq!(source.route, UNMATCHED);
        let details = &source.details;
        assert_eq!(details.user_agent.as_deref(), Some("<redacted>"));
        assert_eq!(details.origin.as_deref(), Some("https://gpu.example"));
        assert_eq!(details.bytes_in, Some(7));
        assert!(!format!("{source:?}").contains("hunter2"));
    }

    #[test]
    fn reads_leave_no_trail() {
        for method in ["GET", "HEAD", "OPTIONS", "TRACE"] {
            assert!(begin(method, "/x").is_none(), "{method}");
        }
        for method in ["POST", "PUT", "PATCH", "DELETE"] {
            assert!(begin(method, "/x").is_some(), "{method}");
        }
    }
}
