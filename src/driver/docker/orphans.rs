//! Containers that bear our ledger's label and that nobody answers for: what a crash between making one and its record
//! left behind, or what an engine that hung kept. Another gateway's are never touched.

use std::collections::HashSet;
use std::time::Duration;

use bollard::models::ContainerSummary;
use bollard::query_parameters::{ListContainersOptions, StopContainerOptions};
use smol_str::SmolStr;

use super::engine::{CHANGE, Docker, DockerError, LOOK};
use super::recipe::{LABEL_GENERATION, LABEL_LEDGER, LABEL_SERVICE};
use crate::domain::ids::{Generation, ServiceName};

/// Younger ones are left alone: whoever makes them may be about to say so.
const CREATION_GRACE: Duration = Duration::from_secs(15);
/// Between TERM and KILL; an orphan's own grace is not known any more.
const GRACE_S: i32 = 10;

/// A container that bears our ledger's label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    pub id: SmolStr,
    pub name: String,
    pub service: ServiceName,
    pub generation: Generation,
    /// Seconds since the epoch.
    pub created_at: i64,
    pub state: String,
}

impl Kept {
    fn of(found: ContainerSummary) -> Option<Kept> {
        let labels = found.labels?;
        Some(Kept {
            id: found.id?.into(),
            name: found.names?.first()?.trim_start_matches('/').to_owned(),
            service: labels.get(LABEL_SERVICE)?.as_str().into(),
            generation: Generation(labels.get(LABEL_GENERATION)?.parse().ok()?),
            created_at: found.created.unwrap_or_default(),
            state: found
                .state
                .map(|state| state.to_string())
                .unwrap_or_default(),
        })
    }

    /// Whether its maker has had time to say so.
    pub fn is_grown(&self) -> bool {
        let now_s = crate::clock::now().0.div_euclid(1_000_000);
        now_s - self.created_at >= CREATION_GRACE.as_secs().cast_signed()
    }
}

impl Docker {
    /// All containers that bear these labels, whether they run or not.
    pub(super) async fn labelled(
        &self,
        labels: &[(&str, String)],
    ) -> Result<Vec<ContainerSummary>, DockerError> {
        let label = |(label, value): &(&str, String)| format!("{label}={value}");
        let labels = labels.iter().map(label).collect();
        let options = ListContainersOptions {
            all: true,
            filters: Some([("label".to_owned(), labels)].into()),
            ..ListContainersOptions::default()
        };
        self.listed(options, LOOK).await
    }

    pub(super) async fn listed(
        &self,
        options: ListContainersOptions,
        limit: Duration,
    ) -> Result<Vec<ContainerSummary>, DockerError> {
        self.call("list containers", limit, |client| async move {
            client.list_containers(Some(options)).await
        })
        .await
    }

    /// All containers of this ledger.
    ///
    /// # Errors
    /// The engine does not answer.
    pub async fn kept(&self) -> Result<Vec<Kept>, DockerError> {
        let ledger = self.inner.ledger.hyphenated().to_string();
        let found = self.labelled(&[(LABEL_LEDGER, ledger)]).await?;
        Ok(found.into_iter().filter_map(Kept::of).collect())
    }

    /// Stops and removes those that `is_live` does not know.
    pub async fn sweep(
        &self,
        is_live: impl Fn(&ServiceName, Generation) -> bool,
    ) -> Result<(), DockerError> {
        let mut done = HashSet::new();
        for orphan in self.kept().await? {
            let is_orphan = orphan.is_grown() && !is_live(&orphan.service, orphan.generation);
            if !is_orphan || !done.insert(orphan.id.clone()) {
                continue;
            }
            tracing::warn!(
                service.name = %orphan.service, instance.generation = orphan.generation.0, container.id = %orphan.id,
                "removing an orphaned container"
            );
            let options = StopContainerOptions {
                signal: None,
                t: Some(GRACE_S),
            };
            let id = orphan.id.clone();
            let stopped = self
                .call("stop a container", CHANGE, |client| async move {
                    client.stop_container(&id, Some(options)).await
                })
                .await;
            if let Err(error @ DockerError::Down(_)) = stopped {
                return Err(error);
            }
            // The next sweep tries again.
            let _ = self.remove(&orphan.id).await;
        }
        Ok(())
    }
}
