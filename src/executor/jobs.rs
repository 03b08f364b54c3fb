//! Jobs with containers of their own: what such a container is made of is read from the job's payload, and what the job
//! leaves behind is removed when nobody needs it any more.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::calls::job_token;
use super::{Inner, SourceError};
use crate::clock::now;
use crate::domain::container::ImageSpec;
use crate::domain::effect::Dispatch;
use crate::domain::ids::{PlaneId, RunId};
use crate::domain::spec::{Grant, ServiceSpec};
use crate::domain::time::Timestamp;
use crate::driver::{DockerError, JobParts};

/// Between looks for what ended jobs have left behind; the first comes when the engine has had time to answer.
const LOOK_EVERY: Duration = Duration::from_secs(60);
const FIRST_LOOK: Duration = Duration::from_secs(2);

/// Where a run stands, for who keeps something of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunEnd {
    /// It has not ended.
    Live,
    Ended {
        at: Timestamp,
        /// It may be tried again by hand, and go on from its checkpoint.
        failed: bool,
    },
    /// Its payloads were removed, or all of it.
    Gone,
}

/// Makes the container of one attempt.
pub(super) fn run(inner: &Arc<Inner>, spec: ServiceSpec, grants: Vec<Grant>, job: Dispatch) {
    let inner = inner.clone();
    inner
        .clone()
        .tasks
        .spawn("making of a job's container", async move {
            match making(&inner, &spec, &job).await {
                Ok(making) => inner.driver.run_job(spec, job.generation, grants, making),
                Err(why) => inner.driver.refuse(&job.service, job.generation, why),
            }
        });
}

async fn making(
    inner: &Arc<Inner>,
    spec: &ServiceSpec,
    job: &Dispatch,
) -> Result<(Box<ImageSpec>, JobParts), String> {
    let seq = job.payload;
    let payload = match inner.read(move |source| source.payload(seq)).await {
        Ok(Some(payload)) => payload,
        Ok(None) => return Err("the job's payload was purged".to_owned()),
        Err(error) => return Err(format!("the job's payload cannot be read: {error}")),
    };
    let image = (inner.options.read_container)(&payload)?;
    let gateway = inner.options.gateway_for(spec).to_owned();
    let mut env = vec![
        ("RUNGATE_RUN_ID".to_owned(), job.run.to_string()),
        ("RUNGATE_ATTEMPT".to_owned(), job.attempt.to_string()),
        ("RUNGATE_URL".to_owned(), gateway),
    ];
    let token = job_token(inner, spec, job);
    env.extend(token.map(|token| ("RUNGATE_TOKEN".to_owned(), token)));
    let parts = JobParts {
        plane: job.plane,
        run: job.run,
        env,
    };
    Ok((Box::new(image), parts))
}

/// Removes what ended jobs have left behind, for as long as there is an executor.
pub(super) async fn clear(inner: Weak<Inner>) {
    let mut pause = FIRST_LOOK;
    loop {
        tokio::time::sleep(pause).await;
        pause = LOOK_EVERY;
        let Some(inner) = inner.upgrade() else {
            return;
        };
        if let Err(error) = clear_once(&inner).await {
            tracing::warn!(error, "what jobs have left behind could not be looked at");
        }
    }
}

async fn clear_once(inner: &Arc<Inner>) -> Result<(), SourceError> {
    for (plane, run) in inner.driver.logs().jobs().await? {
        if !is_kept(inner, plane, run, |_| true).await? {
            inner.driver.logs().forget_job(plane, run).await?;
        }
    }
    let docker = inner.driver.docker();
    if !docker.state().up {
        return Ok(());
    }
    for checkpoint in docker.checkpoints().await? {
        // The work of the others is done.
        let kept = is_kept(inner, checkpoint.plane, checkpoint.run, |failed| failed).await?;
        if kept {
            continue;
        }
        match docker.remove_checkpoint(&checkpoint).await {
            Ok(()) | Err(DockerError::NotFound(_)) => {}
            // Its last container may be on its way out.
            Err(error) => {
                tracing::debug!(run.id = %checkpoint.run, %error, "a checkpoint folder stays")
            }
        }
    }
    Ok(())
}

/// Whether something of a run is still needed: while it lives, and for some time after it if `wanted` of whether it failed.
async fn is_kept(
    inner: &Arc<Inner>,
    plane: PlaneId,
    run: RunId,
    wanted: impl Fn(bool) -> bool,
) -> Result<bool, SourceError> {
    let kept = inner.options.jobs_kept;
    Ok(
        match inner.read(move |source| source.run_end(plane, run)).await? {
            RunEnd::Live => true,
            RunEnd::Ended { at, failed } => {
                let kept_ms = u64::try_from(kept.as_millis()).unwrap_or(u64::MAX);
                wanted(failed) && now().millis_since(at) < kept_ms
            }
            RunEnd::Gone => false,
        },
    )
}
