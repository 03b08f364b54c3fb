//! Callbacks: tells the submitter's URL how a run ended. The body is the contract's (`contracts/gpu-gateway.md`
//! section 4); CloudEvents go as headers (binary mode), so that its members stay at the top. One try each;
//! when to try again is the coordinator's to say.

use std::sync::Arc;

use serde::Serialize;
use serde_json::value::RawValue;
use smol_str::SmolStr;

use super::Inner;
use super::owed::Due;
use super::webhook::CloudEvent;
use crate::domain::command::Command;
use crate::domain::ids::{PlaneId, RunId};
use crate::domain::time::Timestamp;
use crate::driver::error_text;
use crate::outbound::{Refused, refusal};

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CallbackStatus {
    Completed,
    Failed,
    Cancelled,
}

impl CallbackStatus {
    fn event_type(self) -> &'static str {
        match self {
            CallbackStatus::Completed => "rungate.run.completed",
            CallbackStatus::Failed => "rungate.run.failed",
            CallbackStatus::Cancelled => "rungate.run.cancelled",
        }
    }
}

/// What is posted.
#[derive(Clone, Debug, Serialize)]
pub struct CallbackBody {
    pub job_id: RunId,
    pub status: CallbackStatus,
    pub result: Option<Box<RawValue>>,
    pub error: Option<String>,
    /// When the run ended: with the run it names this end, whatever the number of tries.
    pub timestamp: Timestamp,
}

impl CallbackBody {
    /// `result` is JSON as the ledger holds it.
    pub fn new(
        run: RunId,
        status: CallbackStatus,
        result: Option<&[u8]>,
        error: Option<String>,
        timestamp: Timestamp,
    ) -> CallbackBody {
        let result = result.and_then(|json| serde_json::from_slice(json).ok());
        CallbackBody {
            job_id: run,
            status,
            result,
            error,
            timestamp,
        }
    }

    /// The same at each try, another when a retried run ends again.
    fn id(&self) -> String {
        format!("msg_{}_{}", self.job_id.0.simple(), self.timestamp.0)
    }
}

/// One try to deliver, as it was decided.
pub(super) struct Try {
    pub plane: PlaneId,
    /// Whose plane it is.
    pub tenant: SmolStr,
    pub run: RunId,
    /// Counts from 1.
    pub number: u32,
    pub url: SmolStr,
    pub not_before: Timestamp,
}

impl Due for Try {
    const NAME: &'static str = "callback";

    fn tenant(&self) -> &SmolStr {
        &self.tenant
    }

    fn not_before(&self) -> Timestamp {
        self.not_before
    }

    async fn send(self, inner: Arc<Inner>) {
        let Try {
            plane,
            run,
            number,
            url,
            ..
        } = self;
        let (status, error) = told(attempt(&inner, plane, run, &url).await);
        inner
            .outcomes
            .report(Command::CallbackTried {
                run,
                number,
                status,
                error,
            })
            .await;
    }
}

/// An answer's status, and what is wrong with it or with asking, for the record.
pub(super) fn told(tried: Result<u16, String>) -> (Option<u16>, Option<String>) {
    match tried {
        Ok(status @ 200..=299) => (Some(status), None),
        Ok(status @ 300..=399) => (
            Some(status),
            Some(format!("it answered {status}; redirects are not followed")),
        ),
        Ok(status) => (Some(status), Some(format!("it answered {status}"))),
        Err(error) => (None, Some(error)),
    }
}

/// The answer's status, or why there is none.
async fn attempt(inner: &Arc<Inner>, plane: PlaneId, run: RunId, url: &str) -> Result<u16, String> {
    let request = inner
        .callback_client
        .post(url)
        .map_err(|refused| not_called(&refused))?;
    let body = inner
        .read(move |source| source.callback_body(plane, run))
        .await
        .map_err(|error| format!("the run's outcome cannot be read: {error}"))?
        .ok_or("the run's outcome is not known any more")?;
    let json = serde_json::to_vec(&body).map_err(|error| error.to_string())?;
    let event = CloudEvent {
        id: body.id(),
        kind: body.status.event_type(),
        subject: Some(run),
        time: body.timestamp,
    };
    let request = event.signed(&inner.options, request, &json);
    answered(request.body(json)).await
}

/// The answer's status, or why there is none.
pub(super) async fn answered(request: reqwest::RequestBuilder) -> Result<u16, String> {
    match request.send().await {
        Ok(response) => Ok(response.status().as_u16()),
        Err(error) => Err(match refusal(&error) {
            Some(refused) => not_called(refused),
            None => error_text(error),
        }),
    }
}

pub(super) fn not_called(refused: &Refused) -> String {
    format!("it is not called: {refused}")
}
