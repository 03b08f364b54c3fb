//! Which containers run now, whoever started them.

use std::collections::HashSet;
use std::time::Duration;

use bollard::query_parameters::ListContainersOptions;

use super::engine::{Docker, DockerError};

/// Somebody waits for an answer that says more than this.
const LIMIT: Duration = Duration::from_secs(1);
/// Of an id, in the short form that the engine's own commands print.
const SHORT_ID_CHARS: usize = 12;

/// The names and ids of containers that run.
#[derive(Debug, Default)]
pub struct Running {
    names: HashSet<String>,
    ids: Vec<String>,
}

impl Running {
    /// By name, id, or the beginning of an id.
    pub fn has(&self, container: &str) -> bool {
        let is_id = |id: &String| container.len() >= SHORT_ID_CHARS && id.starts_with(container);
        self.names.contains(container) || self.ids.iter().any(is_id)
    }
}

impl Docker {
    /// All that run.
    ///
    /// # Errors
    /// The engine does not answer within a second.
    pub async fn running(&self) -> Result<Running, DockerError> {
        let options = ListContainersOptions::default();
        let mut running = Running::default();
        for found in self.listed(options, LIMIT).await? {
            let names = found.names.unwrap_or_default().into_iter();
            running
                .names
                .extend(names.map(|name| name.trim_start_matches('/').to_owned()));
            running.ids.extend(found.id);
        }
        Ok(running)
    }
}
