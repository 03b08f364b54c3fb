//! What every request passes first: its id, the Host and Origin allow-lists, credentials, and the bound on
//! work at once; and what every answer gets: its id, the finished problem body, a count.

use std::cell::RefCell;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};
use metrics::{Counter, Histogram};
use rustc_hash::FxHashMap;
use smol_str::SmolStr;
use uuid::Uuid;

use super::access::{Need, check, need};
use super::audit::{Recorder, Seen, Trail};
use super::authenticate::{Asking, authenticate};
use super::client::Client;
use super::config::ApiConfig;
use super::csrf;
use super::error::{ApiError, ErrorCode};
use super::headers::harden;
use super::held;
use super::limits::{Place, Standing};
use super::linger::linger;
use super::state::App;
use super::work;
use crate::auth::Principal;
use crate::clock::now;
use crate::domain::command::Origin;
use crate::domain::identity::Role;
use crate::domain::ids::PlaneId;
use crate::domain::tenant::Tenancy;
use crate::domain::time::Timestamp;
use crate::glob::glob;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest request id that is taken over from the caller: it goes into every record.
const MAX_REQUEST_ID_BYTES: usize = 128;

/// Who is calling and under which request.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Shared: each handler is given the caller.
    pub principal: Arc<Principal>,
    pub request_id: SmolStr,
    pub at: Timestamp,
    /// Whence it calls (see `client`).
    pub address: IpAddr,
    /// What the audit keeps of the request, when it asks for a write.
    pub trail: Option<Trail>,
    /// What it was let in to.
    pub need: Need,
}

impl Caller {
    /// As commands carry it.
    pub fn origin(&self) -> Origin {
        Origin {
            plane: self.principal.plane,
            actor: self.principal.actor.clone(),
            request_id: Some(self.request_id.clone()),
            tenancy: self.tenancy(),
            at: self.at,
        }
    }

    /// Notes for the audit which tenant a write is about. Only of one that the caller may write to: its administrators
    /// see it.
    pub fn about(&self, tenant: &SmolStr) {
        if let Some(trail) = &self.trail {
            trail.about(tenant);
        }
    }

    /// Whose services it may be about.
    pub fn tenancy(&self) -> Tenancy {
        match self.principal.power() {
            Role::Admin => Tenancy::All,
            _ => Tenancy::Of(self.principal.user.tenant.clone()),
        }
    }

    /// The only plane that the caller sees.
    pub fn plane(&self) -> PlaneId {
        self.principal.plane
    }
}

/// The guard put it there; a route outside the guard has none.
impl FromRequestParts<App> for Caller {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, ApiError> {
        let caller = parts.extensions.get::<Caller>().cloned();
        caller.ok_or_else(|| unauthorized(parts.uri.path()))
    }
}

/// Which hosts and origins are ours.
pub struct HostRules {
    hosts: Vec<String>,
    origins: Vec<String>,
}

impl HostRules {
    /// From the settings.
    pub fn new(config: &ApiConfig) -> Self {
        let lower = |texts: &[String]| texts.iter().map(|t| t.to_ascii_lowercase()).collect();
        Self {
            hosts: lower(&config.allowed_hosts),
            origins: lower(&config.allowed_origins),
        }
    }

    fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
        let mut hosts = headers.get_all(header::HOST).iter();
        let host = hosts.next().and_then(|host| host.to_str().ok());
        // Of two hosts, who is in front of us may have gone by the other (RFC 9112 section 3.2); the target's own
        // counts before the header's, and is ours no less.
        let target = uri.authority().map(http::uri::Authority::as_str);
        let is_ours = |host: &str| {
            let name = without_port(host);
            self.hosts.iter().any(|own| own.eq_ignore_ascii_case(name))
        };
        if hosts.next().is_some() || !host.is_some_and(is_ours) || !target.is_none_or(is_ours) {
            return Err(ApiError::new(
                ErrorCode::HostNotAllowed,
                format!(
                    "Host '{}' is not allowed; reach the gateway under one of its names, or add this one to allowed_hosts",
                    target.or(host).unwrap_or_default()
                ),
            ));
        }
        let Some(origin) = headers.get(header::ORIGIN) else {
            return Ok(());
        };
        let origin = origin.to_str().unwrap_or_default().to_ascii_lowercase();
        if self.origins.iter().any(|pattern| glob(pattern, &origin)) {
            Ok(())
        } else {
            Err(ApiError::new(
                ErrorCode::OriginNotAllowed,
                "Forbidden (origin not allowed)",
            ))
        }
    }
}

/// The name that a request is addressed to, in lower case.
pub(super) fn host_name(headers: &HeaderMap) -> Option<String> {
    let host = headers.get(header::HOST)?.to_str().ok()?;
    Some(without_port(host).to_ascii_lowercase())
}

/// The name of a `Host` header; an IPv6 address keeps its brackets.
fn without_port(host: &str) -> &str {
    match host.rfind(':') {
        Some(colon) if !host[colon..].contains(']') => &host[..colon],
        _ => host,
    }
}

/// How far a path is open.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    /// Probes: no credentials, and any Host, since orchestrators call by address.
    Probe,
    /// No credentials.
    Open,
    Token,
}

fn access(path: &str) -> Access {
    match path {
        "/livez" | "/readyz" => Access::Probe,
        "/health" | "/api/health" | "/openapi.json" | "/docs" | "/.well-known/jwks.json" => {
            Access::Open
        }
        "/api/gateway/health" | "/api/gateway/session/login" => Access::Open,
        _ if path.starts_with("/docs/") => Access::Open,
        _ => Access::Token,
    }
}

/// 401, in the words of the contract that the path is of.
pub(super) fn unauthorized(path: &str) -> ApiError {
    let detail = if path.starts_with("/api/") {
        "Unauthorized"
    } else {
        "Invalid or missing API token"
    };
    ApiError::new(ErrorCode::Unauthorized, detail)
}

/// A request as it came in.
struct Arrival {
    at: Instant,
    request_id: SmolStr,
    client: Client,
    /// How its caller stands with its rate limit, once that is known.
    standing: Option<Standing>,
    /// What the audit keeps of it.
    trail: Option<Trail>,
}

impl Arrival {
    /// Notes how the caller stands, which the answer will tell; 429 when its limit is used up.
    fn count(&mut self, standing: Option<Standing>) -> Result<(), ApiError> {
        self.standing = standing;
        self.standing.as_ref().map_or(Ok(()), Standing::check)
    }
}

/// The outermost layer of the router.
pub async fn guard(State(app): State<App>, request: Request, next: Next) -> Response {
    let mut request = linger(request);
    let mut arrival = Arrival {
        at: Instant::now(),
        request_id: request_id(request.headers()),
        client: Client::of(
            request.extensions(),
            request.headers(),
            app.config.trusted_proxies,
        ),
        standing: None,
        trail: None,
    };
    request.extensions_mut().insert(arrival.client);
    arrival.trail = match app.audit.is_on() {
        true => Trail::begin(&request, &arrival.request_id, arrival.at),
        false => None,
    };
    let path = request.uri().path().to_owned();
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let (response, turn) = match admit(&app, &mut request, &mut arrival).await {
        Ok(turn) => (next.run(request).await, turn),
        Err(error) => {
            if let Some(trail) = &arrival.trail {
                trail.shown(app.auth.fingerprint(request.headers()));
            }
            (axum::response::IntoResponse::into_response(error), None)
        }
    };
    let response = match &arrival.trail {
        Some(trail) if !Recorder::is_settled(trail, &response) => {
            // On the heap, as most answers are settled: every request would carry the room for it.
            Box::pin(app.audit.settle(trail, response)).await
        }
        _ => response,
    };
    let response = finish(response, &arrival, &path);
    count(&method, route.as_ref(), &response, arrival.at);
    match turn {
        Some(turn) => held::until_sent(response, turn),
        None => response,
    }
}

/// Lets a request in, or says why not. The turn bounds the work at once; held until there is an answer, and as long as
/// a large one is in memory. Probes need none.
async fn admit(
    app: &App,
    request: &mut Request,
    arrival: &mut Arrival,
) -> Result<Option<Place>, ApiError> {
    let access = access(request.uri().path());
    if access == Access::Probe {
        return Ok(None);
    }
    if let Err(foreign) = app.hosts.check(request.uri(), request.headers()) {
        arrival.count(app.limits.of_address(arrival.client, arrival.at))?;
        return Err(foreign);
    }
    let (method, route) = (
        request.method().clone(),
        request.extensions().get::<MatchedPath>().cloned(),
    );
    let route = route.as_ref().map(MatchedPath::as_str);
    // A path that is none of ours is 404 to everyone who is known.
    let need = route.map(|route| need(&method, route));
    if access == Access::Token {
        let need = need.unwrap_or(Need::Anyone);
        let seen = Seen {
            method: &method,
            uri: request.uri(),
            route: request.extensions().get(),
            headers: request.headers(),
            client: arrival.client,
        };
        let caller = identify(app, seen, need, arrival).await?;
        let signed = caller.principal.signed.is_some();
        let of_own_site = csrf::check(app, &caller.principal, &method, request.headers());
        request.extensions_mut().insert(caller);
        of_own_site?;
        if let (true, Some(route)) = (signed, route) {
            admit_work(app, request, &method, route)?;
        }
    } else {
        arrival.count(app.limits.of_address(arrival.client, arrival.at))?;
        if let Some(trail) = &arrival.trail {
            request.extensions_mut().insert(trail.clone());
        }
    }
    let caller = request.extensions().get::<Caller>();
    let principal = caller.map(|caller| &*caller.principal);
    if let (Some(principal), Some(need), Some(route)) = (principal, need, route) {
        check(need, principal, &method, route)?;
    }
    let turn = app.limits.turn(principal, arrival.client, &method, route);
    turn.await.map(Some)
}

/// Lets the work of a run in to what it may do, as the plane that the run is in.
fn admit_work(
    app: &App,
    request: &mut Request,
    method: &Method,
    route: &str,
) -> Result<(), ApiError> {
    let Some(principal) = request
        .extensions()
        .get::<Caller>()
        .map(|c| Principal::clone(&c.principal))
    else {
        return Ok(());
    };
    let (path, headers) = (request.uri().path(), request.headers());
    let admitted = work::admit(app, principal, (method, route), path, headers)?;
    if let Some(caller) = request.extensions_mut().get_mut::<Caller>() {
        if let Some(trail) = &caller.trail {
            trail.known(&admitted);
        }
        caller.principal = Arc::new(admitted);
    }
    Ok(())
}

/// Who sent a request. Whoever it is, is counted: users by themselves, all others by their address. Of an address that
/// has used up its limit no signatures are checked, which is work, unless it is this machine's own: services here show
/// signed tokens, and whoever else is here finds easier ways to take the processor.
async fn identify(
    app: &App,
    seen: Seen<'_>,
    need: Need,
    arrival: &mut Arrival,
) -> Result<Caller, ApiError> {
    let at = now();
    let (client, here) = (arrival.client, arrival.client.address.is_loopback());
    if !here && app.auth.is_signed(seen.headers) && app.limits.is_used_up(client, arrival.at) {
        arrival.count(app.limits.of_address(client, arrival.at))?;
    }
    let asking = Asking {
        request_id: Some(&arrival.request_id),
        at,
        source: &|| app.audit.is_on().then(|| seen.source()),
    };
    let Some(principal) = authenticate(app, arrival.client, seen.headers, &asking).await? else {
        arrival.count(app.limits.of_address(arrival.client, arrival.at))?;
        return Err(unauthorized(seen.uri.path()));
    };
    if let Some(trail) = &arrival.trail {
        trail.known(&principal);
    }
    arrival.count(app.limits.of_user(&principal, arrival.at))?;
    if app.limits.holds_for(&principal) {
        let tenant = &principal.user.tenant;
        if let Some(rate) = app.ledger.requests_per_minute(tenant)? {
            app.limits.of_tenant(&principal, rate, arrival.at)?;
        }
    }
    Ok(Caller {
        principal: Arc::new(principal),
        request_id: arrival.request_id.clone(),
        at,
        address: arrival.client.address,
        trail: arrival.trail.clone(),
        need,
    })
}

/// The caller's request id when it is short and printable, else a new one.
fn request_id(headers: &HeaderMap) -> SmolStr {
    headers
        .get(REQUEST_ID)
        .and_then(|value| value.to_str().ok())
        .filter(|text| (1..=MAX_REQUEST_ID_BYTES).contains(&text.len()))
        .filter(|text| text.bytes().all(|byte| byte.is_ascii_graphic()))
        .map_or_else(new_request_id, SmolStr::new)
}

/// 22 hex digits: as many as a `SmolStr` holds without the heap, and enough to tell requests apart.
fn new_request_id() -> SmolStr {
    let mut buffer = Uuid::encode_buffer();
    let digits = Uuid::new_v4().simple().encode_lower(&mut buffer);
    SmolStr::new(&digits[..22])
}

/// Gives an error its body, and every answer the headers that all have.
fn finish(mut response: Response, arrival: &Arrival, path: &str) -> Response {
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        let kept = std::mem::take(response.headers_mut());
        response = error.render(&arrival.request_id, path);
        if let Some(allow) = kept.get(header::ALLOW) {
            response.headers_mut().insert(header::ALLOW, allow.clone());
        }
    }
    let headers = response.headers_mut();
    harden(headers, arrival.client.is_https);
    if let Some(standing) = &arrival.standing {
        standing.tell(headers);
    }
    if let Ok(value) = HeaderValue::from_str(&arrival.request_id) {
        headers.insert(REQUEST_ID, value);
    }
    response
}

/// The metrics of one route's answers, by method and status.
type RouteCounts = FxHashMap<(Method, u16), (Counter, Histogram)>;

thread_local! {
    /// What this thread counts with: as many as there are routes, methods and statuses. Looking them up in the
    /// recorder costs more than counting.
    static COUNTS: RefCell<FxHashMap<String, RouteCounts>> = RefCell::default();
}

fn count(method: &Method, route: Option<&MatchedPath>, response: &Response, started: Instant) {
    let route = route.map_or("unmatched", |route| route.as_str());
    let method = match *method {
        Method::GET | Method::POST | Method::PUT | Method::PATCH | Method::DELETE => method.clone(),
        // A caller may make up methods: they are counted as one.
        _ => Method::OPTIONS,
    };
    let kind = (method, response.status().as_u16());
    let seconds = started.elapsed().as_secs_f64();
    COUNTS.with_borrow_mut(|counts| {
        if !counts.contains_key(route) {
            counts.insert(route.to_owned(), RouteCounts::default());
        }
        let Some(of_route) = counts.get_mut(route) else {
            return;
        };
        let (requests, durations) = of_route
            .entry(kind)
            .or_insert_with_key(|(method, status)| counters(route, method, *status));
        requests.increment(1);
        durations.record(seconds);
    });
}

fn counters(route: &str, method: &Method, status: u16) -> (Counter, Histogram) {
    let method = match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        _ => "other",
    };
    let requests = metrics::counter!("rungate_http_requests_total",
        "route" => route.to_owned(), "method" => method, "status" => status.to_string());
    let durations = metrics::histogram!("rungate_http_request_seconds",
        "route" => route.to_owned(), "method" => method);
    (requests, durations)
}
