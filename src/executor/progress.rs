//! Asks a service for its progress while a call to it is open, where the service wants to be asked.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::value::RawValue;
use tokio::time::MissedTickBehavior;

use super::{Inner, answer};
use crate::domain::command::Command;
use crate::domain::effect::Dispatch;
use crate::domain::spec::ProgressMode;
use crate::driver::{Endpoint, join};

/// Progress is a few numbers for people; each change of it is kept in the ledger.
const PROGRESS_MAX_BYTES: usize = 64 << 10;

/// Asks until it is dropped. Reports only what is new.
pub(super) async fn poll(inner: &Arc<Inner>, endpoint: &Endpoint, dispatch: &Dispatch) {
    let path = match (
        &endpoint.spec.progress_mode,
        &endpoint.spec.progress_endpoint,
    ) {
        (ProgressMode::Poll, Some(path)) => path,
        _ => return std::future::pending().await,
    };
    let url = join(&endpoint.base_url, path);
    let mut ticks = tokio::time::interval(inner.options.progress_every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    let mut last = Bytes::new();
    loop {
        ticks.tick().await;
        match ask(inner, &url, dispatch).await {
            Ok(body) if body != last => {
                last = body.clone();
                let (plane, run, attempt) = (dispatch.plane, dispatch.run, dispatch.attempt);
                inner
                    .outcomes
                    .report(Command::ProgressPolled {
                        plane,
                        run,
                        attempt,
                        body,
                    })
                    .await;
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(run.id = %dispatch.run, error, "a service did not tell its progress")
            }
        }
    }
}

/// One answer, which must be a JSON object.
async fn ask(inner: &Inner, url: &str, dispatch: &Dispatch) -> Result<Bytes, String> {
    let request = inner
        .call_client
        .get(url)
        .map_err(|refused| answer::not_called(&refused).error)?
        .header("x-rungate-run-id", dispatch.run.to_string())
        .header("x-rungate-attempt", dispatch.attempt)
        .timeout(inner.options.progress_every);
    let response = request
        .send()
        .await
        .map_err(|error| answer::broken(error).error)?;
    if !response.status().is_success() {
        return Err(format!("status {}", response.status().as_u16()));
    }
    let body = answer::bounded(response, PROGRESS_MAX_BYTES)
        .await
        .map_err(|failure| failure.error)?;
    let json: &RawValue = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
    if !json.get().starts_with('{') {
        return Err("no JSON object".into());
    }
    Ok(body)
}
