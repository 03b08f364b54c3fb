//! Callbacks: tells the submitter's URL how a run ended. The body is the contract's (`contracts/gpu-gateway.md`
//! section 4); CloudEvents go as headers (binary mode), so that its members stay at the top. One try each;
//! when to try again is the coordinator's to say.

use std::sync::Arc;

use reqwest::header::CONTENT_TYPE;
use serde::Serialize;
use serde_json::value::RawValue;
use smol_str::SmolStr;

use super::Inner;
use crate::clock::now;
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

/// One try and its report, when it is due.
pub(super) async fn send(inner: Arc<Inner>, asked: Try) {
    let Try {
        plane,
        run,
        number,
        url,
        ..
    } = asked;
    let tried = attempt(&inner, plane, run, &url).await;
    let (status, error) = match tried {
        Ok(status @ 200..=299) => (Some(status), None),
        Ok(status @ 300..=399) => (
            Some(status),
            Some(format!("it answered {status}; redirects are not followed")),
        ),
        Ok(status) => (Some(status), Some(format!("it answered {status}"))),
        Err(error) => (None, Some(error)),
    };
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
    let id = body.id();
    let timestamp_s = now().0.div_euclid(1_000_000);
    let request = request
        .header(CONTENT_TYPE, "application/json")
        .header(
            "webhook-signature",
            inner.options.secret.sign(&id, timestamp_s, &json),
        )
        .header("webhook-timestamp", timestamp_s)
        .header("webhook-id", &id)
        .header("ce-specversion", "1.0")
        .header("ce-id", &id)
        .header("ce-type", body.status.event_type())
        .header(
            "ce-source",
            format!("urn:uuid:{}", inner.options.ledger.hyphenated()),
        )
        .header("ce-subject", run.to_string())
        .header("ce-time", body.timestamp.to_string());
    match request.body(json).send().await {
        Ok(response) => Ok(response.status().as_u16()),
        Err(error) => Err(match refusal(&error) {
            Some(refused) => not_called(refused),
            None => error_text(error),
        }),
    }
}

fn not_called(refused: &Refused) -> String {
    format!("it is not called: {refused}")
}
