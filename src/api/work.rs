//! What a token for work is good for: pushing progress and checkpoints of the attempt that it was made for, reading
//! that run's input and checkpoint, and nothing else. It dies with the attempt: what is committed counts.

use http::{HeaderMap, Method};
use smol_str::SmolStr;

use super::checkpoint::given_attempt;
use super::error::{ApiError, ErrorCode, FieldError};
use super::queue::job_not_found;
use super::state::App;
use crate::auth::jwt::work::Work;
use crate::auth::{Principal, Signed, service_user};
use crate::domain::ids::{Attempt, PlaneId, RunId};
use crate::ledger::{InstancePhase, RunSummary};

/// The routes, without `/api/gateway`; the place in each is the run's id.
pub const ROUTES: &[(&str, &str)] = &[
    ("GET", "/runs/{run_id}/input_data"),
    ("GET", "/runs/{run_id}/checkpoint"),
    ("PUT", "/runs/{run_id}/checkpoint"),
    ("POST", "/queue/{job_id}/progress"),
];

/// Who shows a genuine token for work; `None` when that is over.
pub fn principal(app: &App, work: Work, digest: &[u8; 32]) -> Result<Option<Principal>, ApiError> {
    let (tenant, plane) = match &work {
        Work::Attempt {
            plane,
            run,
            attempt,
            ..
        } => match app.ledger.run(*plane, *run)? {
            Some(run) if run.attempt == *attempt && is_done_by(&run, &work) => {
                (app.ledger.tenant_of(*plane)?, *plane)
            }
            _ => return Ok(None),
        },
        Work::Instance {
            service,
            generation,
        } => {
            let view = app.ledger.service(service)?;
            let instance = view.and_then(|view| view.instance);
            let lives = instance.is_some_and(|instance| {
                instance.generation == *generation && instance.phase != InstancePhase::Exited
            });
            if !lives {
                return Ok(None);
            }
            // Which plane it works in, and for whom, is known with the run (`admit`).
            (SmolStr::new_static("default"), PlaneId::ROOT)
        }
    };
    Ok(Some(Principal::of_work(work, (tenant, plane), digest)))
}

/// Whether the run's current attempt runs where the token was given.
fn is_done_by(run: &RunSummary, work: &Work) -> bool {
    let (Work::Attempt {
        service,
        generation,
        ..
    }
    | Work::Instance {
        service,
        generation,
    }) = work;
    run.status.is_on_service()
        && run.service.as_ref() == Some(service)
        && run.generation == Some(*generation)
}

/// Lets a token for work pass to its run, and everyone else to what follows.
///
/// # Errors
/// 403 on other routes; 404 for other runs, in the words of those that do not exist.
pub fn admit(
    app: &App,
    principal: Principal,
    (method, route): (&Method, &str),
    path: &str,
    headers: &HeaderMap,
) -> Result<Principal, ApiError> {
    let Some(Signed::Work(work)) = &principal.signed else {
        return Ok(principal);
    };
    let short = route.strip_prefix("/api/gateway").unwrap_or(route);
    // A HEAD is answered by the GET.
    let verb = match *method {
        Method::HEAD => "GET",
        ref other => other.as_str(),
    };
    if !ROUTES.contains(&(verb, short)) {
        let detail = "A job token is good for progress, checkpoint and input of its own run only";
        return Err(
            ApiError::new(ErrorCode::ScopeRequired, detail).with("reason_code", "job_token")
        );
    }
    let id = run_in(route, path).unwrap_or_default();
    let not_found = || match short.starts_with("/queue/") {
        true => job_not_found(id),
        false => ApiError::run_not_found(id),
    };
    let asked: RunId = id.parse().map_err(|_| not_found())?;
    match work {
        Work::Attempt { run, .. } if *run == asked => Ok(principal),
        Work::Attempt { .. } => Err(not_found()),
        Work::Instance { service, .. } => {
            let view = app.ledger.service(service)?;
            let mut active = view.into_iter().flat_map(|view| view.active_runs);
            let plane = active
                .find(|(_, run)| *run == asked)
                .map(|(plane, _)| plane);
            let run = match plane {
                Some(plane) => app.ledger.run(plane, asked)?,
                None => None,
            };
            let run = run
                .filter(|run| is_done_by(run, work))
                .ok_or_else(not_found)?;
            let tenant = app.ledger.tenant_of(run.plane)?;
            narrowed(principal, (tenant, &run), (verb, headers))
        }
    }
}

/// An instance's token for the one request: it must say which attempt it writes for, since the instance may still
/// work on an earlier one.
fn narrowed(
    mut principal: Principal,
    (tenant, run): (SmolStr, &RunSummary),
    (verb, headers): (&str, &HeaderMap),
) -> Result<Principal, ApiError> {
    let given = given_attempt(headers)?;
    if given.is_none() && verb != "GET" {
        let loc = vec!["header".to_owned(), "x-rungate-attempt".to_owned()];
        let message = "Field required with the token of an instance";
        let fault = FieldError::new(loc, "missing", message);
        return Err(ApiError::validation(vec![fault]));
    }
    if let Some(Signed::Work(Work::Instance {
        service,
        generation,
    })) = principal.signed.take()
    {
        principal.user = service_user(tenant, &service);
        principal.actor = principal.user.actor();
        principal.plane = run.plane;
        principal.signed = Some(Signed::Work(Work::Attempt {
            plane: run.plane,
            run: run.run,
            attempt: given.unwrap_or(run.attempt),
            service,
            generation,
        }));
    }
    Ok(principal)
}

/// The run and the attempt that a caller's token is for; others have none.
pub fn attempt_of(principal: &Principal) -> Option<(RunId, Attempt)> {
    match &principal.signed {
        Some(Signed::Work(Work::Attempt { run, attempt, .. })) => Some((*run, *attempt)),
        _ => None,
    }
}

/// What stands in a path where its pattern has a place.
fn run_in<'a>(route: &str, path: &'a str) -> Option<&'a str> {
    let place = route.split('/').position(|part| part.starts_with('{'))?;
    path.split('/').nth(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_run_is_taken_from_the_path() {
        let route = "/api/gateway/runs/{run_id}/checkpoint";
        assert_eq!(run_in(route, "/api/gateway/runs/7/checkpoint"), Some("7"));
        assert_eq!(
            run_in("/queue/{job_id}/progress", "/queue/8/progress"),
            Some("8")
        );
        assert_eq!(run_in("/runs", "/runs"), None);
    }

    #[test]
    fn every_route_is_one_of_ours() {
        for (method, path) in ROUTES {
            let listed = super::super::access::NEEDS.iter();
            let mut same = listed.filter(|(of, pattern, _)| of == method && pattern == path);
            assert!(same.next().is_some(), "{method} {path}");
        }
    }
}
