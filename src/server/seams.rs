//! What executor and driver need of coordinator, ledger and credentials, behind their own traits.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use smol_str::SmolStr;

use crate::auth::jwt::work::{Work, WorkTokens};
use crate::auth::ntfy_token::NtfyTokens;
use crate::clock::now;
use crate::coordinator::{Handle, SubmitError};
use crate::domain::command::{Command, Origin};
use crate::domain::ids::{Generation, PlaneId, RunId, Seq, ServiceName};
use crate::domain::notify::Notify;
use crate::domain::scheduler::container::run_of;
use crate::domain::tenant::Tenancy;
use crate::driver::{Credentials, NotTaken, Sink};
use crate::executor::{
    CallbackBody, CallbackStatus, JobToken, NoticeFacts, NtfyToken, RunEnd, Source, SourceError,
};
use crate::ledger::{Ledger, RunStatus};
use crate::private_file;

/// Outcomes go to the coordinator in the executor's name.
pub struct ToCoordinator(pub Handle);

impl Sink for ToCoordinator {
    fn submit(&self, outcome: Command) -> BoxFuture<'_, Result<(), NotTaken>> {
        Box::pin(async move {
            let origin = Origin {
                // An outcome about a run is recorded in that run's plane.
                plane: PlaneId::ROOT,
                actor: SmolStr::new_static("executor"),
                request_id: None,
                tenancy: Tenancy::All,
                at: now(),
            };
            match self.0.submit(origin, outcome).await {
                Ok(_) | Err(SubmitError::Rejected(_)) => Ok(()),
                Err(SubmitError::Overloaded) => Err(NotTaken::Overloaded),
                Err(SubmitError::Stopped) => Err(NotTaken::Stopped),
            }
        })
    }
}

/// Payloads and outcomes come from the ledger.
pub struct LedgerSource(pub Ledger);

impl Source for LedgerSource {
    fn payload(&self, seq: Seq) -> Result<Option<Bytes>, SourceError> {
        Ok(self.0.payload(seq)?)
    }

    fn callback_body(
        &self,
        plane: PlaneId,
        run: RunId,
    ) -> Result<Option<CallbackBody>, SourceError> {
        let Some(summary) = self.0.run(plane, run)? else {
            return Ok(None);
        };
        let status = match summary.status {
            RunStatus::Completed => CallbackStatus::Completed,
            RunStatus::Failed => CallbackStatus::Failed,
            RunStatus::Cancelled => CallbackStatus::Cancelled,
            _ => return Ok(None),
        };
        let result = match summary.result {
            Some(seq) => self.0.payload(seq)?,
            None => None,
        };
        let ended_at = summary.completed_at.unwrap_or(summary.updated_at);
        let error = summary.error;
        Ok(Some(CallbackBody::new(
            run,
            status,
            result.as_deref(),
            error,
            ended_at,
        )))
    }

    fn notify(&self, tenant: &str) -> Result<Notify, SourceError> {
        let tenant = self.0.tenant(tenant)?;
        Ok(tenant.map(|tenant| tenant.notify).unwrap_or_default())
    }

    fn run_end(&self, plane: PlaneId, run: RunId) -> Result<RunEnd, SourceError> {
        Ok(match self.0.run(plane, run)? {
            None => RunEnd::Gone,
            Some(run) if run.purged => RunEnd::Gone,
            Some(run) if run.status.is_terminal() => RunEnd::Ended {
                at: run.completed_at.unwrap_or(run.updated_at),
                failed: run.status == RunStatus::Failed,
            },
            Some(_) => RunEnd::Live,
        })
    }

    fn notice_facts(&self, plane: PlaneId, run: RunId) -> Result<Option<NoticeFacts>, SourceError> {
        let run = self.0.run(plane, run)?;
        Ok(run.map(|run| NoticeFacts {
            service_type: run.spec.service_type,
            // That of a job with a container of its own is a name of ours.
            service: run.service.filter(|name| run_of(name).is_none()),
            error: run.error,
        }))
    }
}

/// The access tokens of ntfy topics.
pub fn ntfy_token(tokens: NtfyTokens) -> NtfyToken {
    Arc::new(move |tenant, url| match tokens.get(tenant, url) {
        Ok(token) => token,
        Err(error) => {
            tracing::error!(tenant, %error, "the access token of a tenant's ntfy topic cannot be read");
            None
        }
    })
}

/// The tokens of dispatches.
pub fn job_token(tokens: WorkTokens) -> JobToken {
    Arc::new(move |dispatch, lasting| {
        let work = Work::Attempt {
            plane: dispatch.plane,
            run: dispatch.run,
            attempt: dispatch.attempt,
            service: dispatch.service.clone(),
            generation: dispatch.generation,
        };
        match tokens.issue(&work, lasting, now()) {
            Ok(token) => Some(token),
            Err(error) => {
                tracing::error!(run.id = %dispatch.run, %error, "a job token could not be signed");
                None
            }
        }
    })
}

/// How long an instance's token lasts, and how often it is renewed: a gateway that is down for a while leaves one
/// that is still good, or has been renewed when it is back.
const INSTANCE_LASTING: Duration = Duration::from_secs(3_600);
const INSTANCE_RENEWAL: Duration = Duration::from_secs(1_200);

/// The tokens of instances, in `<data>/auth/instances/`.
pub struct InstanceTokens {
    tokens: WorkTokens,
    folder: PathBuf,
}

impl InstanceTokens {
    pub fn new(tokens: WorkTokens, data_dir: &Path) -> Self {
        // A service may have another working directory.
        let data_dir = std::path::absolute(data_dir).unwrap_or_else(|_| data_dir.to_owned());
        let folder = data_dir.join("auth").join("instances");
        Self { tokens, folder }
    }

    /// Service names are file names: they have no slash, and begin with a letter or a digit.
    fn path(&self, service: &ServiceName, generation: Generation) -> PathBuf {
        self.folder.join(format!("{service}.{generation}"))
    }
}

impl Credentials for InstanceTokens {
    fn renew_every(&self) -> Duration {
        INSTANCE_RENEWAL
    }

    fn write(&self, service: &ServiceName, generation: Generation) -> io::Result<PathBuf> {
        let work = Work::Instance {
            service: service.clone(),
            generation,
        };
        let token = self.tokens.issue(&work, INSTANCE_LASTING, now());
        let token = token.map_err(io::Error::other)?;
        let path = self.path(service, generation);
        private_file::write(&path, format!("{token}\n").as_bytes())?;
        Ok(path)
    }

    fn remove(&self, service: &ServiceName, generation: Generation) {
        let path = self.path(service, generation);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(file.path = %path.display(), %error, "a token file could not be removed");
            }
            _ => {}
        }
    }
}
