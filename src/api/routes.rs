//! Routes as each file hands them over: with their descriptions, and not yet below any path.

use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};

use super::state::App;

/// Some routes.
#[derive(Clone, Default)]
pub struct Routes(Vec<UtoipaMethodRouter<App>>);

impl Routes {
    /// Adds what `routes!` makes of handlers of one path.
    pub fn routes(mut self, routes: UtoipaMethodRouter<App>) -> Routes {
        self.0.push(routes);
        self
    }

    /// Adds another file's.
    pub fn merge(mut self, others: Routes) -> Routes {
        self.0.extend(others.0);
        self
    }

    /// Serves them below a path. Each is registered by its full path: a nested router takes the path of every request
    /// apart once more, which costs as much as the look-up itself.
    pub fn below(self, prefix: &str, router: OpenApiRouter<App>) -> OpenApiRouter<App> {
        self.0
            .into_iter()
            .fold(router, |router, (schemas, mut paths, methods)| {
                let of_this_path = std::mem::take(&mut paths.paths);
                let full = |(path, item)| (format!("{prefix}{path}"), item);
                paths.paths = of_this_path.into_iter().map(full).collect();
                router.routes((schemas, paths, methods))
            })
    }
}
