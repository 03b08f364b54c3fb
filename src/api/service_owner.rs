//! Whose services callers reach: what exists for them, what they may change, and what a new one may be.

use smol_str::SmolStr;

use super::error::{ApiError, ErrorCode, FieldError};
use super::fields::Fields;
use super::guard::Caller;
use super::state::App;
use super::users::id;
use crate::domain::command::Rejection;
use crate::domain::ids::ServiceName;
use crate::domain::spec::{ServiceSpec, Worker};
use crate::domain::tenant::Tenancy;
use crate::ledger::ServiceView;

/// Members that say what program runs here, and how.
const PROGRAM: [&str; 3] = ["command", "env", "working_dir"];

/// Whether a service exists for a caller. That of a job with a container of its own does for nobody.
pub fn sees(caller: &Caller, view: &ServiceView) -> bool {
    !view.spec.worker.is_job() && caller.tenancy().sees(view.tenant.as_ref())
}

/// A service by the name in the path; one of another tenant is as good as none.
pub fn find(app: &App, caller: &Caller, name: &str) -> Result<ServiceView, ApiError> {
    let view = app.ledger.service(name)?;
    view.filter(|view| sees(caller, view)).ok_or_else(|| {
        ApiError::new(
            ErrorCode::ServiceNotFound,
            format!("Unknown service: {name}"),
        )
    })
}

/// The same, if it is the caller's tenant's own; of a shared one what it wrote is the administrator's.
pub fn find_owned(app: &App, caller: &Caller, name: &str) -> Result<ServiceView, ApiError> {
    let view = find(app, caller, name)?;
    match caller.tenancy().owns(view.tenant.as_ref()) {
        true => Ok(view),
        false => {
            let refused = Rejection::ServiceShared(ServiceName::from(name));
            Err(ApiError::from(refused).with("action", "read"))
        }
    }
}

/// The tenant of a new service: the administrator's choice, for others their own.
pub fn owner(caller: &Caller, fields: &Fields) -> Result<Option<SmolStr>, ApiError> {
    let named = id(fields, "tenant");
    match caller.tenancy() {
        Tenancy::All => Ok(named),
        Tenancy::Of(own) if named.as_ref().is_none_or(|named| *named == own) => Ok(Some(own)),
        Tenancy::Of(own) => Err(refused(
            "tenant",
            format!("A service of yours is one of tenant '{own}'; leave 'tenant' out"),
        )),
    }
}

/// Whether a caller may say what program is run: it runs as the gateway's user, who can read all that the gateway has.
///
/// A container of an image is nobody's program here: what it may be, the gateway's settings say. One that is there
/// already is somebody's.
pub fn check_program(
    app: &App,
    caller: &Caller,
    fields: &Fields,
    current: Option<&ServiceSpec>,
) -> Result<(), ApiError> {
    if caller.tenancy() == Tenancy::All || app.config.operators_may_run_commands {
        return Ok(());
    }
    let is_there = |name: &&&str| fields.has(name) || fields.is_null(name);
    let is_image = current.is_some_and(|spec| matches!(spec.worker, Worker::Image(_)));
    if fields.has("image") || (is_image && !fields.has("command")) {
        return Ok(());
    }
    let is_container = match current {
        Some(spec) => matches!(spec.worker, Worker::Container),
        None => !fields.has("command") && !fields.has("url"),
    };
    if is_container && fields.has("container") {
        return Err(refused(
            "container",
            "'container' names a container that is there already, which may be anybody's: an administrator may \
             register it for your tenant, or set operators_may_run_commands; an 'image' makes one of your own"
                .to_owned(),
        ));
    }
    match PROGRAM.iter().find(is_there) {
        None => Ok(()),
        Some(name) => Err(refused(
            name,
            format!(
                "'{name}' is about a program that runs as the gateway's user: an administrator may register it for \
                 your tenant, or set operators_may_run_commands; services that run elsewhere have a 'url'"
            ),
        )),
    }
}

/// 403 for a member that is the administrator's to say.
fn refused(name: &str, detail: String) -> ApiError {
    let loc = vec!["body".to_owned(), name.to_owned()];
    let mut error = ApiError::new(ErrorCode::RoleRequired, detail.clone())
        .with("reason_code", "admin_required")
        .with("required_role", "admin")
        .with("resource_class", "services")
        .with("action", "write");
    error.errors = vec![FieldError::new(loc, "admin_required", detail)];
    error
}
