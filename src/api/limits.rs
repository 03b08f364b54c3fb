//! How much callers may ask of the gateway: requests a minute, requests at once, streams at once; each user by
//! itself, all together, and whoever shows no valid credentials by its address. Those have turns of their own, so that
//! they never take one from who is known. Administrators are held to the common bounds only, unless a setting says
//! otherwise.
//!
//! Told as `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers-10) and `Retry-After`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::buckets::{Buckets, Level, WINDOW_S};
use super::client::Client;
use super::config::ApiConfig;
use super::error::{ApiError, ErrorCode};
use super::shares::{Share, Shares};
use crate::auth::Principal;
use crate::domain::identity::Role;

const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// The policy that counts each user.
const USER: &str = "user";

/// How long a request waits for its turn before it is told 429 (`contracts/run-gateway.md` section 2).
const TURN_WAIT: Duration = Duration::from_millis(10);

/// Requests that wait for a service to start or stop, minutes perhaps. They are counted apart, so that they take no
/// turn from the short ones; each looks at every commit.
const MAX_WAITING: usize = 256;

/// Reads of many entries at once. Each has a thread and up to some MiB, and goes on when its caller has left.
const MAX_SCANS: usize = 32;

/// The most of a common bound that one may have, where no setting says it.
pub fn quarter(of: usize) -> u32 {
    u32::try_from(of / 4).unwrap_or(u32::MAX).max(1)
}

/// What the settings allow.
#[derive(Clone, Debug)]
pub struct LimitConfig {
    /// Requests a minute of each user; 0 for any number.
    pub user_per_minute: u64,
    /// Requests a minute, from one address, that show no valid credentials; 0 for any number.
    pub address_per_minute: u64,
    /// Requests worked on at once; more wait up to 10 ms and are then told 429.
    pub requests: usize,
    /// Those of one user.
    pub requests_per_user: u32,
    /// Those from one address that show no credentials; a quarter of `requests` at most.
    pub requests_per_address: u32,
    /// Open streams; each costs a connection and under 16 KiB.
    pub streams: usize,
    /// Those of one user.
    pub streams_per_user: u32,
    /// Whether the limits of a user hold for administrators too.
    pub are_admins_limited: bool,
}

impl Default for LimitConfig {
    fn default() -> Self {
        Self {
            user_per_minute: 60_000,
            address_per_minute: 6_000,
            requests: 1_024,
            requests_per_user: 256,
            requests_per_address: 16,
            streams: 2_048,
            streams_per_user: 512,
            are_admins_limited: false,
        }
    }
}

/// Counts who asks what.
pub struct Limits {
    users: Option<Rate>,
    /// Of users with a rate of their own.
    own: Buckets,
    /// Of tenants with a rate, all users together.
    tenants: Buckets,
    addresses: Option<Rate>,
    are_admins_limited: bool,
    /// Of those who are known.
    requests: Bound,
    /// Of those who show no credentials, on routes that ask for none.
    open: Bound,
    waiting: Bound,
    streams: Bound,
    scans: Arc<Semaphore>,
}

/// A bound on what goes on at once: of all together, and of each.
struct Bound {
    common: Arc<Semaphore>,
    each: Arc<Shares>,
}

/// One rate limit.
struct Rate {
    name: &'static str,
    per_minute: u64,
    policy: HeaderValue,
    buckets: Buckets,
}

/// How a caller stands with its rate limit.
pub struct Standing {
    name: &'static str,
    policy: HeaderValue,
    level: Level,
}

/// A place within a bound: a request's turn, or one among the open streams. Free again when dropped.
pub struct Place {
    _common: OwnedSemaphorePermit,
    _own: Option<Share>,
}

impl Bound {
    fn new(common: usize, each: u32) -> Bound {
        Bound {
            common: Arc::new(Semaphore::new(common.min(Semaphore::MAX_PERMITS))),
            each: Shares::new(each),
        }
    }
}

impl Limits {
    pub fn new(config: &ApiConfig) -> Limits {
        let config = &config.limits;
        Limits {
            users: Rate::new(USER, config.user_per_minute),
            own: Buckets::new(1),
            tenants: Buckets::new(1),
            addresses: Rate::new("address", config.address_per_minute),
            are_admins_limited: config.are_admins_limited,
            requests: Bound::new(config.requests, config.requests_per_user),
            open: Bound::new(
                config.requests,
                config.requests_per_address.min(quarter(config.requests)),
            ),
            waiting: Bound::new(MAX_WAITING, quarter(MAX_WAITING)),
            streams: Bound::new(config.streams, config.streams_per_user),
            scans: Arc::new(Semaphore::new(MAX_SCANS)),
        }
    }

    /// Counts a request of a user; `None` when it is not limited.
    pub fn of_user(&self, principal: &Principal, now: Instant) -> Option<Standing> {
        if !self.holds_for(principal) {
            return None;
        }
        // Whoever says it of a user may be its tenant's administrator: it cannot be more than the settings allow.
        let most = self.users.as_ref().map_or(u64::MAX, |rate| rate.per_minute);
        if let Some(own) = principal.requests_per_minute.filter(|own| *own < most) {
            return Some(Standing {
                name: USER,
                policy: policy(USER, own),
                level: self.own.take_of(own, &principal.user, now),
            });
        }
        let rate = self.users.as_ref()?;
        Some(rate.take(rate.buckets.take(&principal.user, now)))
    }

    /// Counts a request of a tenant that may ask so often, by a user whom limits hold for.
    ///
    /// # Errors
    /// 429 when its users together have used the rate up.
    pub fn of_tenant(
        &self,
        principal: &Principal,
        per_minute: u64,
        now: Instant,
    ) -> Result<(), ApiError> {
        let level = self
            .tenants
            .take_of(per_minute, &principal.user.tenant, now);
        refusal("tenant", level)
    }

    /// Counts a request without valid credentials; `None` when it is not limited.
    pub fn of_address(&self, client: Client, now: Instant) -> Option<Standing> {
        let rate = self.addresses.as_ref()?;
        Some(rate.take(rate.buckets.take(&client.network(), now)))
    }

    /// Whether requests of an address without valid credentials are refused by now.
    pub fn is_used_up(&self, client: Client, now: Instant) -> bool {
        let rate = self.addresses.as_ref();
        rate.is_some_and(|rate| rate.buckets.is_empty(&client.network(), now))
    }

    /// A turn for a request, or 429.
    ///
    /// # Errors
    /// The caller, or all callers together, have too many requests open.
    pub async fn turn(
        &self,
        caller: Option<&Principal>,
        client: Client,
        method: &Method,
        route: Option<&str>,
    ) -> Result<Place, ApiError> {
        let too_many = |why| too_many(ErrorCode::TooManyRequests, why);
        let (bound, own) = match caller {
            None => {
                let own = self.open.each.take(&client.network());
                let own = own.ok_or_else(|| too_many("concurrency limit of this address"))?;
                (&self.open, Some(own))
            }
            Some(caller) => {
                let bound = match route.is_some_and(|route| waits(method, route)) {
                    true => &self.waiting,
                    false => &self.requests,
                };
                let own = self.share(bound, caller);
                (
                    bound,
                    own.ok_or_else(|| too_many("concurrency limit of this user"))?,
                )
            }
        };
        let common = match Arc::clone(&bound.common).try_acquire_owned() {
            Ok(place) => place,
            // A timer is armed only by those who have to wait.
            Err(_) => {
                let place = Arc::clone(&bound.common).acquire_owned();
                match tokio::time::timeout(TURN_WAIT, place).await {
                    Ok(Ok(place)) => place,
                    _ => return Err(too_many("concurrency limit")),
                }
            }
        };
        Ok(Place {
            _common: common,
            _own: own,
        })
    }

    /// A place for a stream, or 429.
    ///
    /// # Errors
    /// The caller, or all callers together, have too many streams open.
    pub fn stream(&self, caller: &Principal) -> Result<Place, ApiError> {
        let too_many = |why| too_many(ErrorCode::TooManyStreams, why);
        let own = self
            .share(&self.streams, caller)
            .ok_or_else(|| too_many("concurrency limit of this user"))?;
        let common = Arc::clone(&self.streams.common).try_acquire_owned();
        Ok(Place {
            _common: common.map_err(|_| too_many("concurrency limit"))?,
            _own: own,
        })
    }

    /// A place for a read of many entries, once there is one. The read holds it, not its request, which may go away.
    pub async fn scan(&self) -> Option<OwnedSemaphorePermit> {
        // It is never closed.
        Arc::clone(&self.scans).acquire_owned().await.ok()
    }

    /// The caller's own share, which those have who are limited; `None` when it is used up.
    fn share(&self, of: &Bound, caller: &Principal) -> Option<Option<Share>> {
        match self.holds_for(caller) {
            true => of.each.take(&caller.user).map(Some),
            false => Some(None),
        }
    }

    /// Whether limits of users and tenants hold for a caller.
    pub fn holds_for(&self, principal: &Principal) -> bool {
        self.are_admins_limited || principal.power() < Role::Admin
    }
}

impl Rate {
    fn new(name: &'static str, per_minute: u64) -> Option<Rate> {
        (per_minute > 0).then(|| Rate {
            name,
            per_minute,
            policy: policy(name, per_minute),
            buckets: Buckets::new(per_minute),
        })
    }

    fn take(&self, level: Level) -> Standing {
        Standing {
            name: self.name,
            policy: self.policy.clone(),
            level,
        }
    }
}

fn policy(name: &str, per_minute: u64) -> HeaderValue {
    let policy = format!("\"{name}\";q={per_minute};w={WINDOW_S}");
    HeaderValue::try_from(policy).expect("names and numbers are visible ASCII")
}

impl Standing {
    /// # Errors
    /// 429 when the limit is used up.
    pub fn check(&self) -> Result<(), ApiError> {
        refusal(self.name, self.level)
    }

    /// Tells it in an answer's headers.
    pub fn tell(&self, headers: &mut HeaderMap) {
        let Standing { name, level, .. } = self;
        let (left, full_in_s) = (level.remaining, level.full_in_s);
        if let Ok(value) = HeaderValue::try_from(format!("\"{name}\";r={left};t={full_in_s}")) {
            headers.insert(RATE_LIMIT, value);
        }
        headers.insert(RATE_LIMIT_POLICY, self.policy.clone());
    }
}

fn refusal(name: &'static str, level: Level) -> Result<(), ApiError> {
    let Some(seconds) = level.retry_after_s else {
        return Ok(());
    };
    let detail = "Too Many Requests (rate limit)";
    // The member is the draft's, of its problem type `quota-exceeded`.
    Err(ApiError::new(ErrorCode::RateLimited, detail)
        .with("violated-policies", vec![name])
        .retry_after(seconds))
}

/// Whether a route's answer waits for a service.
fn waits(method: &Method, route: &str) -> bool {
    match route.strip_prefix("/api/gateway").unwrap_or(route) {
        "/services/{name}/start" | "/services/{name}/stop" | "/services/{name}/restart" => true,
        "/services/{name}" => *method == Method::DELETE,
        _ => false,
    }
}

fn too_many(code: ErrorCode, why: &str) -> ApiError {
    ApiError::new(code, format!("Too Many Requests ({why})")).retry_after(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_routes_that_wait_are_routes_of_ours() {
        let api = serde_json::to_value(super::super::openapi()).unwrap();
        let mut waiting = 0;
        for (path, item) in api["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys() {
                let method = method.to_uppercase().parse().unwrap();
                waiting += usize::from(waits(&method, path));
            }
        }
        assert_eq!(waiting, 8, "four, at the root and under /api/gateway");
    }
}
