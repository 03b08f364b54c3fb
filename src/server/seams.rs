//! What the executor needs of coordinator and ledger, behind the executor's own traits.

use bytes::Bytes;
use futures_util::future::BoxFuture;
use smol_str::SmolStr;

use crate::clock::now;
use crate::coordinator::{Handle, SubmitError};
use crate::domain::command::{Command, Origin};
use crate::domain::ids::{PlaneId, RunId, Seq};
use crate::driver::{NotTaken, Sink};
use crate::executor::{CallbackBody, CallbackStatus, Source, SourceError};
use crate::ledger::{Ledger, RunStatus};

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
}
