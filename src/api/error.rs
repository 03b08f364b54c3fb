//! What callers see when something is refused: RFC 9457 problem details whose `detail` is what the
//! contracts have there. One code per cause; the code owns the HTTP status and the title.

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Map, Value, json};

use super::redact::without_secrets;
use crate::auth::store::StoreError;
use crate::coordinator::SubmitError;
use crate::domain::command::Rejection;
use crate::domain::identity::IdentityRejection;
use crate::ledger::ReadError;

/// Declares the codes once: variant, wire name, status, title.
macro_rules! error_codes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $status:ident, $title:literal;)*) => {
        /// Every cause of a refusal, alphabetical. Stable: clients branch on its name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ErrorCode { $($(#[$doc])* $variant,)* }

        impl ErrorCode {
            /// All codes, in order.
            pub const ALL: &'static [ErrorCode] = &[$(ErrorCode::$variant,)*];

            /// The `code` member.
            pub fn as_str(self) -> &'static str {
                match self { $(ErrorCode::$variant => $name,)* }
            }

            /// The HTTP status that goes with it.
            pub fn status(self) -> StatusCode {
                match self { $(ErrorCode::$variant => StatusCode::$status,)* }
            }

            /// The `title` member: the same for every occurrence.
            pub fn title(self) -> &'static str {
                match self { $(ErrorCode::$variant => $title,)* }
            }
        }
    };
}

error_codes! {
    AlreadyPaused = "already_paused", CONFLICT, "The run is already paused";
    AlreadyStopping = "already_stopping", CONFLICT, "The run is already being stopped";
    AuditUnavailable = "audit_unavailable", SERVICE_UNAVAILABLE, "The write cannot be recorded";
    BodyTimeout = "body_timeout", REQUEST_TIMEOUT, "The body did not arrive in time";
    BodyTooLarge = "body_too_large", PAYLOAD_TOO_LARGE, "The body is too large";
    BundleNotFound = "bundle_not_found", NOT_FOUND, "No such bundle";
    CancelWhileRunning = "cancel_while_running", CONFLICT, "The job is running";
    CheckpointNotFound = "checkpoint_not_found", NOT_FOUND, "The run has no checkpoint";
    CommandNotFound = "command_not_found", NOT_FOUND, "No such command";
    CommandReused = "command_reused", CONFLICT, "The command id was used with another body";
    CommandTypeUnknown = "command_type_unknown", BAD_REQUEST, "No such type of command";
    ConfirmationRequired = "confirmation_required", BAD_REQUEST, "The confirmation does not fit";
    ContainerForbidden = "container_forbidden", FORBIDDEN, "The gateway's settings do not allow such a container";
    ContainerNotFound = "container_not_found", NOT_FOUND, "No such container";
    CrossSite = "cross_site", FORBIDDEN, "The request comes from another site";
    CsrfRequired = "csrf_required", FORBIDDEN, "The session's CSRF token is missing or wrong";
    DiskReserve = "disk_reserve", INSUFFICIENT_STORAGE, "The gateway's disk is nearly full";
    DuplicateMember = "duplicate_member", BAD_REQUEST, "An object has a member twice";
    GpuNotFound = "gpu_not_found", NOT_FOUND, "No such GPU";
    GpuRuntimeMissing = "gpu_runtime_missing", CONFLICT, "The container engine cannot give GPUs";
    HostNotAllowed = "host_not_allowed", FORBIDDEN, "The Host header is not one of ours";
    HttpsRequired = "https_required", FORBIDDEN, "Sessions need https";
    IdempotencyKeyInvalid = "idempotency_key_invalid", BAD_REQUEST, "The Idempotency-Key is malformed";
    IdempotencyKeyReused = "idempotency_key_reused", UNPROCESSABLE_ENTITY, "The Idempotency-Key was used with another body";
    InsufficientVram = "insufficient_vram", CONFLICT, "Not enough GPU memory is free";
    Internal = "internal", INTERNAL_SERVER_ERROR, "The gateway failed";
    InvalidCursor = "invalid_cursor", BAD_REQUEST, "The cursor is not one of this listing";
    InvalidJson = "invalid_json", BAD_REQUEST, "The body is not JSON";
    InvalidStatus = "invalid_status", BAD_REQUEST, "No such status";
    InvalidUtf8 = "invalid_utf8", BAD_REQUEST, "The body is not UTF-8";
    IssuerUnavailable = "issuer_unavailable", SERVICE_UNAVAILABLE, "The single sign-on issuer does not answer";
    JsonTooDeep = "json_too_deep", BAD_REQUEST, "The JSON is nested too deep";
    LoginFailed = "login_failed", UNAUTHORIZED, "The login failed";
    LoginThrottled = "login_throttled", TOO_MANY_REQUESTS, "Too many failed logins";
    MethodNotAllowed = "method_not_allowed", METHOD_NOT_ALLOWED, "The path has no such method";
    MissingField = "missing_field", BAD_REQUEST, "A required field is missing";
    NoActiveJob = "no_active_job", CONFLICT, "The service has no active job";
    NoEngine = "no_engine", SERVICE_UNAVAILABLE, "No container engine";
    NoOutput = "no_output", CONFLICT, "The run has no container of its own";
    NotFound = "not_found", NOT_FOUND, "No such path";
    NotPaused = "not_paused", CONFLICT, "The run is not paused";
    NotQueued = "not_queued", CONFLICT, "The run is not queued";
    NotRunning = "not_running", CONFLICT, "The run is not running";
    NothingToStart = "nothing_to_start", BAD_REQUEST, "The request names nothing to start";
    NothingToTest = "nothing_to_test", CONFLICT, "The tenant has no channel of notifications";
    OriginNotAllowed = "origin_not_allowed", FORBIDDEN, "The origin is not allowed";
    Overloaded = "overloaded", SERVICE_UNAVAILABLE, "Too much work is waiting to be recorded";
    PasswordStale = "password_stale", CONFLICT, "The password was changed meanwhile";
    PasswordWrong = "password_wrong", FORBIDDEN, "The current password or token is wrong";
    Purged = "purged", GONE, "The run's payloads were purged";
    QuotaExceeded = "quota_exceeded", TOO_MANY_REQUESTS, "A quota is used up";
    RateLimited = "rate_limited", TOO_MANY_REQUESTS, "Too many requests a minute";
    ReauthenticationRequired = "reauthentication_required", FORBIDDEN, "The login is too long ago";
    RoleRequired = "role_required", FORBIDDEN, "Another role is needed";
    RunEnded = "run_ended", CONFLICT, "The run has ended";
    RunNotEnded = "run_not_ended", CONFLICT, "The run has not ended";
    RunNotFound = "run_not_found", NOT_FOUND, "No such run";
    RunsEnding = "runs_ending", CONFLICT, "Some runs have not ended yet";
    RuntimeHeld = "runtime_held", BAD_REQUEST, "The user has the runtime already";
    RuntimeInUse = "runtime_in_use", CONFLICT, "The runtime belongs to a user";
    RuntimeLeft = "runtime_left", CONFLICT, "The runtime has no user any more";
    RuntimeNotFound = "runtime_not_found", NOT_FOUND, "No such reservation";
    RuntimePurging = "runtime_purging", BAD_REQUEST, "The runtime is being purged";
    RuntimeTaken = "runtime_taken", BAD_REQUEST, "The runtime is in use or reserved";
    ScopeRequired = "scope_required", FORBIDDEN, "The token lacks a scope";
    ServiceDisabled = "service_disabled", CONFLICT, "The service is disabled";
    ServiceExists = "service_exists", CONFLICT, "The service exists already";
    ServiceHasActiveJobs = "service_has_active_jobs", CONFLICT, "The service has active jobs";
    ServiceNotFound = "service_not_found", NOT_FOUND, "No such service";
    ServiceStopping = "service_stopping", CONFLICT, "The service is stopping";
    SessionNotFound = "session_not_found", NOT_FOUND, "No such session";
    StaleAttempt = "stale_attempt", CONFLICT, "The attempt is over";
    StartFailed = "start_failed", BAD_GATEWAY, "The service ended before it was healthy";
    Stopping = "stopping", SERVICE_UNAVAILABLE, "The gateway is stopping";
    TenantExists = "tenant_exists", BAD_REQUEST, "The tenant exists already";
    TenantNotFound = "tenant_not_found", NOT_FOUND, "No such tenant";
    TenantProtected = "tenant_protected", BAD_REQUEST, "The default tenant stays enabled";
    TokenExists = "token_exists", CONFLICT, "The token exists already";
    TokenNotFound = "token_not_found", NOT_FOUND, "No such token";
    TokenTaken = "token_taken", CONFLICT, "The token is in use already";
    TooManyRequests = "too_many_requests", TOO_MANY_REQUESTS, "Too many requests at once";
    TooManyServices = "too_many_services", CONFLICT, "The tenant has too many services";
    TooManyStreams = "too_many_streams", TOO_MANY_REQUESTS, "Too many streams at once";
    TooManyTenants = "too_many_tenants", CONFLICT, "There are too many tenants";
    TooManyTokens = "too_many_tokens", CONFLICT, "The user has too many tokens";
    TooManyUsers = "too_many_users", CONFLICT, "There are too many users";
    Unauthorized = "unauthorized", UNAUTHORIZED, "No valid credentials";
    UnsupportedMediaType = "unsupported_media_type", UNSUPPORTED_MEDIA_TYPE, "The content type is not accepted";
    UserExists = "user_exists", BAD_REQUEST, "The user exists already";
    UserNotFound = "user_not_found", NOT_FOUND, "No such user";
    UserProtected = "user_protected", BAD_REQUEST, "The first administrator cannot be changed";
    ValidationFailed = "validation_failed", UNPROCESSABLE_ENTITY, "Some fields are wrong";
    WrongService = "wrong_service", CONFLICT, "The run cannot run there";
}

/// One wrong field, as both shapes of it need.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    /// Where: `body`, `query` or `path`, then names.
    pub loc: Vec<String>,
    /// The validator's name of the fault, e.g. `missing`, `int_type`, `less_than_equal`.
    pub kind: &'static str,
    pub message: String,
    /// The offending value, when it is short enough to be told back.
    pub input: Option<Value>,
    /// The bound that was crossed.
    pub context: Option<Value>,
}

/// Longest text of an offending value that is told back.
const MAX_ECHO_BYTES: usize = 200;

impl FieldError {
    /// A fault at `loc`; `input` is dropped when it is long.
    pub fn new(loc: Vec<String>, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            loc,
            kind,
            message: message.into(),
            input: None,
            context: None,
        }
    }

    /// With the offending value, its secrets left out.
    pub fn input(mut self, value: Value) -> Self {
        let name = self.loc.last().map_or("", String::as_str);
        let value = match self.kind {
            // The value is what the member is missing in.
            "missing" => without_secrets("", value),
            _ => without_secrets(name, value),
        };
        self.input = (value.to_string().len() <= MAX_ECHO_BYTES).then_some(value);
        self
    }

    /// With the bound that was crossed.
    pub fn context(mut self, context: Value) -> Self {
        self.context = Some(context);
        self
    }

    /// The contract's form (an entry of `detail`).
    fn contract(&self) -> Value {
        let mut entry = json!({"type": self.kind, "loc": self.loc, "msg": self.message});
        if let Some(input) = &self.input {
            entry["input"] = input.clone();
        }
        if let Some(context) = &self.context {
            entry["ctx"] = context.clone();
        }
        entry
    }

    /// Our form (an entry of `errors`).
    fn ours(&self) -> Value {
        let field = self.loc.get(1..).unwrap_or_default().join(".");
        json!({"field": field, "message": self.message, "code": self.kind})
    }
}

/// A refusal on its way to the caller. The guard gives it its request id and path.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    pub code: ErrorCode,
    /// The contract's `detail`: a text, an object, or the list of wrong fields.
    pub detail: Value,
    pub errors: Vec<FieldError>,
    /// Members beside `detail` that the contracts have.
    pub extra: Map<String, Value>,
    pub retry_after_s: Option<u32>,
}

impl ApiError {
    /// With `detail` as the caller reads it.
    pub fn new(code: ErrorCode, detail: impl Into<Value>) -> Self {
        Self {
            code,
            detail: detail.into(),
            errors: Vec::new(),
            extra: Map::new(),
            retry_after_s: None,
        }
    }

    /// 422 for wrong fields, in the order they were found.
    pub fn validation(errors: Vec<FieldError>) -> Self {
        let detail = errors.iter().map(FieldError::contract).collect::<Vec<_>>();
        Self {
            errors,
            ..Self::new(ErrorCode::ValidationFailed, detail)
        }
    }

    /// 400 with a text and the one field it is about (the GPU dialect's form).
    pub fn missing_field(name: &str, detail: impl Into<Value>) -> Self {
        let loc = vec!["body".to_owned(), name.to_owned()];
        Self {
            errors: vec![FieldError::new(loc, "missing", "Field required")],
            ..Self::new(ErrorCode::MissingField, detail)
        }
    }

    /// 404 for a run, whoever it belongs to.
    pub fn run_not_found(run: &str) -> Self {
        Self::new(ErrorCode::RunNotFound, format!("Run '{run}' not found"))
    }

    /// 500: what went wrong is in the log, under the request's id.
    pub fn internal() -> Self {
        Self::new(
            ErrorCode::Internal,
            "Internal error; the gateway's log has the cause under this request_id",
        )
    }

    /// With a member beside `detail`.
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.extra.insert(name.to_owned(), value.into());
        self
    }

    /// With a `Retry-After` in seconds.
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }

    /// The whole body, for the request `request_id` at `path`.
    pub fn problem(&self, request_id: &str, path: &str) -> Value {
        let mut body = self.extra.clone();
        let code = self.code.as_str();
        body.insert("type".into(), format!("urn:rungate:error:{code}").into());
        body.insert("title".into(), self.code.title().into());
        body.insert("status".into(), self.code.status().as_u16().into());
        body.insert("detail".into(), self.detail.clone());
        body.insert("instance".into(), path.into());
        body.insert("code".into(), code.into());
        body.insert("request_id".into(), request_id.into());
        if !self.errors.is_empty() {
            let errors = self.errors.iter().map(FieldError::ours).collect();
            body.insert("errors".into(), Value::Array(errors));
        }
        Value::Object(body)
    }

    /// The finished answer.
    pub fn render(&self, request_id: &str, path: &str) -> Response {
        let body = self.problem(request_id, path).to_string();
        let mut response = (self.code.status(), body).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if self.code.status() == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

/// Leaves the body to the guard, which knows the request's id and path.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.code.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Rejected(rejection) => rejection.into(),
            SubmitError::Overloaded => ApiError::new(
                ErrorCode::Overloaded,
                "Too many commands are waiting to be written; try again in a second",
            )
            .retry_after(1),
            SubmitError::Stopped => {
                ApiError::new(ErrorCode::Stopping, "The gateway is stopping").retry_after(5)
            }
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        tracing::error!(error = %error, "logins could not be read or written");
        ApiError::internal()
    }
}

impl From<ReadError> for ApiError {
    fn from(error: ReadError) -> Self {
        tracing::error!(error = %error, "a read of the ledger failed");
        ApiError::internal()
    }
}

/// When it is worth asking again after a quota was used up: runs end in seconds to hours.
const QUOTA_RETRY_S: u32 = 10;

/// When it is worth asking again after the disk had no room: somebody has to see to it.
const DISK_RETRY_S: u32 = 60;

impl From<Rejection> for ApiError {
    fn from(rejection: Rejection) -> Self {
        let detail = match &rejection {
            Rejection::InsufficientVram {
                required_mib,
                available_mib,
                ..
            } => json!({
                "error": "insufficient_vram",
                "required_mb": required_mib,
                "available_mb": available_mib,
            }),
            Rejection::ServiceHasActiveJobs(_) => json!({
                "error": "service_has_active_jobs",
                "hint": "Cancel its jobs or wait for them, then try again",
            }),
            Rejection::NoActiveJob(service) => {
                json!({"error": "no_active_job", "service": service.as_str()})
            }
            Rejection::NoEngine { .. } => "Docker not available".into(),
            other => other.to_string().into(),
        };
        let error = ApiError::new(rejection_code(&rejection), detail);
        match rejection {
            Rejection::Stopping => error.retry_after(5),
            Rejection::ServiceShared(_) => error
                .with("reason_code", "admin_required")
                .with("required_role", "admin")
                .with("resource_class", "services")
                .with("action", "write"),
            Rejection::DiskReserve { .. } => error.retry_after(DISK_RETRY_S),
            Rejection::QuotaExceeded(hit)
            | Rejection::Identity(IdentityRejection::QuotaExceeded(hit)) => error
                .with("quota", hit.quota)
                .with("limit", hit.limit)
                .with("used", hit.used)
                .retry_after(QUOTA_RETRY_S),
            Rejection::NoEngine { .. } => error.with("hint", rejection.to_string()),
            _ => error,
        }
    }
}

/// The code of a rejection; both have the same wire name, which a test holds.
fn rejection_code(rejection: &Rejection) -> ErrorCode {
    match rejection {
        Rejection::RunNotFound(_) => ErrorCode::RunNotFound,
        Rejection::RunEnded(..) => ErrorCode::RunEnded,
        Rejection::RunNotEnded(_) => ErrorCode::RunNotEnded,
        Rejection::AlreadyPaused(_) => ErrorCode::AlreadyPaused,
        Rejection::NotPaused(_) => ErrorCode::NotPaused,
        Rejection::NotRunning(_) => ErrorCode::NotRunning,
        Rejection::NotQueued(_) => ErrorCode::NotQueued,
        Rejection::AlreadyStopping(_) => ErrorCode::AlreadyStopping,
        Rejection::CancelWhileRunning(_) => ErrorCode::CancelWhileRunning,
        Rejection::StaleAttempt { .. } => ErrorCode::StaleAttempt,
        Rejection::Purged(_) => ErrorCode::Purged,
        Rejection::ServiceExists(_) | Rejection::ServiceNameTaken(_) => ErrorCode::ServiceExists,
        Rejection::TooManyServices(_) => ErrorCode::TooManyServices,
        Rejection::ServiceNotFound(_) => ErrorCode::ServiceNotFound,
        Rejection::ServiceShared(_) => ErrorCode::RoleRequired,
        Rejection::ServiceHasActiveJobs(_) => ErrorCode::ServiceHasActiveJobs,
        Rejection::ServiceDisabled(_) => ErrorCode::ServiceDisabled,
        Rejection::NoEngine { .. } => ErrorCode::NoEngine,
        Rejection::ServiceStopping(_) => ErrorCode::ServiceStopping,
        Rejection::InsufficientVram { .. } => ErrorCode::InsufficientVram,
        Rejection::NoActiveJob(_) => ErrorCode::NoActiveJob,
        Rejection::GpuNotFound(_) => ErrorCode::GpuNotFound,
        Rejection::WrongService { .. } => ErrorCode::WrongService,
        Rejection::CommandReused(_) => ErrorCode::CommandReused,
        Rejection::KeyReused => ErrorCode::IdempotencyKeyReused,
        Rejection::Stopping => ErrorCode::Stopping,
        Rejection::DiskReserve { .. } => ErrorCode::DiskReserve,
        Rejection::QuotaExceeded(_) => ErrorCode::QuotaExceeded,
        Rejection::Identity(rejection) => identity_code(rejection),
    }
}

fn identity_code(rejection: &IdentityRejection) -> ErrorCode {
    match rejection {
        IdentityRejection::UserExists(_) => ErrorCode::UserExists,
        IdentityRejection::UserNotFound => ErrorCode::UserNotFound,
        IdentityRejection::UserProtected => ErrorCode::UserProtected,
        IdentityRejection::TooManyUsers(_) => ErrorCode::TooManyUsers,
        IdentityRejection::QuotaExceeded(_) => ErrorCode::QuotaExceeded,
        IdentityRejection::RuntimeTaken(_) => ErrorCode::RuntimeTaken,
        IdentityRejection::RuntimeNotFound => ErrorCode::RuntimeNotFound,
        IdentityRejection::RuntimeInUse(_) => ErrorCode::RuntimeInUse,
        IdentityRejection::RuntimeLeft(_) => ErrorCode::RuntimeLeft,
        IdentityRejection::RuntimeHeld(_) => ErrorCode::RuntimeHeld,
        IdentityRejection::RuntimePurging(_) => ErrorCode::RuntimePurging,
        IdentityRejection::RunsEnding { .. } => ErrorCode::RunsEnding,
        IdentityRejection::TokenNotFound => ErrorCode::TokenNotFound,
        IdentityRejection::TokenExists(_) => ErrorCode::TokenExists,
        IdentityRejection::TokenTaken => ErrorCode::TokenTaken,
        IdentityRejection::TooManyTokens(_) => ErrorCode::TooManyTokens,
        IdentityRejection::PasswordStale => ErrorCode::PasswordStale,
        IdentityRejection::TenantExists(_) => ErrorCode::TenantExists,
        IdentityRejection::NothingToTest(_) => ErrorCode::NothingToTest,
        IdentityRejection::TenantNotFound => ErrorCode::TenantNotFound,
        IdentityRejection::TenantProtected => ErrorCode::TenantProtected,
        IdentityRejection::TooManyTenants(_) => ErrorCode::TooManyTenants,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::RunId;

    #[test]
    fn codes_are_alphabetical_and_named_as_their_variants() {
        let names: Vec<_> = ErrorCode::ALL.iter().map(|c| c.as_str()).collect();
        let variants: Vec<_> = ErrorCode::ALL.iter().map(|c| format!("{c:?}")).collect();
        assert!(variants.is_sorted(), "{variants:?}");
        for (variant, name) in variants.iter().zip(names) {
            assert_eq!(variant.to_lowercase(), name.replace('_', ""));
        }
    }

    #[test]
    fn a_rejection_keeps_its_code() {
        let run = RunId(uuid::Uuid::nil());
        for rejection in [
            Rejection::KeyReused,
            Rejection::Purged(run),
            Rejection::StaleAttempt {
                run,
                given: 1,
                current: 2,
            },
            Rejection::CommandReused("c".into()),
            Rejection::NoEngine {
                service: "s".into(),
                why: "w".into(),
            },
            Rejection::ServiceShared("s".into()),
            Rejection::TooManyServices("t".into()),
            IdentityRejection::UserNotFound.into(),
            IdentityRejection::RunsEnding { runs: 1 }.into(),
            IdentityRejection::TokenExists("t".into()).into(),
            IdentityRejection::PasswordStale.into(),
            IdentityRejection::TenantNotFound.into(),
        ] {
            let code = rejection.code();
            assert_eq!(ApiError::from(rejection).code.as_str(), code);
        }
    }

    #[test]
    fn wrong_fields_show_in_both_shapes() {
        let error = FieldError::new(
            vec!["query".into(), "limit".into()],
            "less_than_equal",
            "Input should be less than or equal to 2000",
        )
        .input("100000".into())
        .context(json!({"le": 2000}));
        let problem = ApiError::validation(vec![error]).problem("r1", "/x");
        assert_eq!(
            problem["detail"],
            json!([{"type": "less_than_equal", "loc": ["query", "limit"],
                "msg": "Input should be less than or equal to 2000", "input": "100000", "ctx": {"le": 2000}}])
        );
        assert_eq!(problem["errors"][0]["field"], "limit");
        assert_eq!(problem["status"], 422);
        assert_eq!(problem["request_id"], "r1");
    }
}
