//! All routes in one place: the GPU dialect at the root and under `/api/gateway`, the rest under
//! `/api/gateway`, and the guard around everything.

use axum::Router;
use axum::middleware::from_fn_with_state;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use super::error::{ApiError, ErrorCode};
use super::guard::guard;
use super::routes::Routes;
use super::state::App;
use super::{
    audit, checkpoint, commands, containers, docs, gpu, gpu_use, health, ledger, ledger_tools,
    metrics, notify, passwords, preempt, queue, run_ledger, run_output, runs, runtimes,
    service_control, service_logs, services, session, sessions, signing_keys, tenants, tokens,
    users,
};

/// The GPU dialect: the same handlers in both places.
fn dialect() -> Routes {
    Routes::default()
        .merge(health::dialect_router())
        .merge(gpu::router())
        .merge(gpu_use::router())
        .merge(services::router())
        .merge(service_control::router())
        .merge(containers::router())
        .merge(service_logs::router())
        .merge(queue::router())
        .merge(preempt::router())
}

fn gateway() -> Routes {
    Routes::default()
        .merge(health::router())
        .merge(runs::router())
        .merge(run_ledger::router())
        .merge(run_output::router())
        .merge(checkpoint::router())
        .merge(commands::router())
        .merge(ledger::router())
        .merge(ledger_tools::router())
        .merge(audit::router())
        .merge(session::router())
        .merge(sessions::router())
        .merge(passwords::router())
        .merge(tokens::router())
        .merge(users::router())
        .merge(tenants::router())
        .merge(notify::router())
        .merge(runtimes::router())
        .merge(signing_keys::router())
        .merge(dialect())
}

fn parts() -> (Router<App>, OpenApi) {
    let root = Routes::default()
        .merge(health::open_router())
        .merge(signing_keys::open_router())
        .merge(metrics::router())
        .merge(dialect());
    let outline = OpenApiRouter::with_openapi(docs::outline());
    let router = gateway().below("/api/gateway", root.below("", outline));
    let (router, api) = router.split_for_parts();
    (router, docs::complete(api))
}

/// The OpenAPI document.
pub fn openapi() -> OpenApi {
    parts().1
}

/// Everything that is served.
pub fn router(app: App) -> Router {
    let (routes, api) = parts();
    routes
        .merge(docs::router(&api))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(app.clone(), guard))
        .with_state(app)
}

async fn not_found() -> ApiError {
    ApiError::new(ErrorCode::NotFound, "Not Found")
}

async fn method_not_allowed() -> ApiError {
    ApiError::new(ErrorCode::MethodNotAllowed, "Method Not Allowed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn the_document_describes_every_route() {
        let api: Value = serde_json::to_value(openapi()).unwrap();
        assert_eq!(api["openapi"], "3.1.0");
        assert_eq!(
            api["components"]["securitySchemes"]["gatewayBearerAuth"]["scheme"],
            "bearer"
        );
        let mut ids = std::collections::BTreeSet::new();
        for (path, item) in api["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                let at = format!("{method} {path}");
                assert!(operation["summary"].is_string(), "{at} has no summary");
                let told = |name: &str| {
                    let parameters = operation["parameters"].as_array().into_iter().flatten();
                    parameters
                        .filter(|p| p["in"] == "path")
                        .any(|p| p["name"] == name)
                };
                for name in path.split('/').filter_map(|part| part.strip_prefix('{')) {
                    assert!(
                        told(name.trim_end_matches('}')),
                        "{at} does not tell {name}"
                    );
                }
                assert!(operation["responses"]["200"].is_object(), "{at} has no 200");
                assert!(operation["responses"]["500"].is_object(), "{at} has no 500");
                assert!(
                    ids.insert(operation["operationId"].to_string()),
                    "{at}'s id is taken"
                );
            }
        }
        for path in [
            "/queue/submit",
            "/api/gateway/queue/submit",
            "/api/gateway/runs/{run_id}/ledger/stream",
        ] {
            assert!(api["paths"][path].is_object(), "{path}");
        }
    }
}
