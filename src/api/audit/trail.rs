//! What the audit keeps of one request, and whether a record carries it already.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::extract::{MatchedPath, Request};
use http::Method;
use smol_str::SmolStr;

use crate::api::access::{Need, need};
use crate::api::client;
use crate::auth::Principal;
use crate::domain::audit::Source;
use crate::domain::identity::Scope;

/// The route of a path that is none of ours.
const UNMATCHED: &str = "unmatched";

/// Most characters of a path that are kept.
const MAX_PATH_CHARS: usize = 200;

/// Most parameters of a query string whose names are kept, and most characters of each.
const MAX_PARAMETERS: usize = 50;
const MAX_NAME_CHARS: usize = 64;

/// What secrets begin with. One may stand in a path by mistake.
const SECRET_PREFIXES: &[&str] = &["rgt_", "agw_", "agws_", "agcsrf_", "whsec_", "sk-", "eyJ"];

/// A request that asks for a write. Clones are of the same request.
#[derive(Clone, Debug)]
pub struct Trail {
    source: Arc<Source>,
    recorded: Arc<AtomicBool>,
}

impl Trail {
    /// Of a request that nobody is known to have sent yet; `None` when it asks for no write.
    pub fn begin(request: &Request) -> Option<Trail> {
        let route = request.extensions().get::<MatchedPath>();
        if !is_write(request.method(), route) {
            return None;
        }
        let address = client::address(request.extensions());
        let path = request.uri().path();
        let route = route.map_or(UNMATCHED, MatchedPath::as_str);
        let source = Source {
            user: None,
            token: None,
            address: (!address.is_unspecified()).then_some(address),
            method: SmolStr::new(request.method().as_str()),
            route: SmolStr::new(route),
            path: (path != route).then(|| plain_path(path)),
            query: parameter_names(request.uri().query()),
        };
        Some(Trail {
            source: Arc::new(source),
            recorded: Arc::default(),
        })
    }

    /// Notes who sent it.
    pub fn known(&mut self, principal: &Principal) {
        let source = Arc::make_mut(&mut self.source);
        source.user = Some(principal.user.clone());
        source.token = Some(SmolStr::new(&principal.fingerprint));
    }

    /// Notes the token that was shown and not accepted.
    pub fn shown(&mut self, fingerprint: Option<String>) {
        if self.source.user.is_none() {
            Arc::make_mut(&mut self.source).token = fingerprint.map(SmolStr::from);
        }
    }

    /// For the record of a change; `None` when one carries it already.
    pub fn to_carry(&self) -> Option<Arc<Source>> {
        (!self.is_recorded()).then(|| self.source.clone())
    }

    /// A record carries it.
    pub fn note_recorded(&self) {
        self.recorded.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_recorded(&self) -> bool {
        self.recorded.load(Ordering::Relaxed)
    }

    pub(super) fn source(&self) -> &Arc<Source> {
        &self.source
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

/// A path without what looks like a secret, and not longer than a path of ours.
fn plain_path(path: &str) -> SmolStr {
    let looks_secret = |part: &str| {
        let starts = |prefix: &&str| part.starts_with(*prefix) && part.len() > prefix.len() + 8;
        SECRET_PREFIXES.iter().any(starts)
    };
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
        Trail::begin(&request.body(Body::empty()).unwrap())
    }

    #[test]
    fn a_trail_has_names_and_no_values() {
        let trail = begin("POST", "/x/rgt_user_0123456789/y?drain=hunter2&b=&hunter2").unwrap();
        let source = trail.source();
        assert_eq!(source.path.as_deref(), Some("/x/<redacted>/y"));
        assert_eq!(source.query, ["drain", "b"]);
        assert_eq!(source.route, UNMATCHED);
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
