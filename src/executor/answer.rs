//! What a service's answer means: a result, or a failure with its code.

use bytes::{Bytes, BytesMut};
use reqwest::Response;
use serde_json::value::RawValue;
use smol_str::SmolStr;

use crate::domain::command::{JobFailure, OUT_OF_MEMORY};
use crate::driver::{answers_out_of_memory, error_text};
use crate::outbound::{Refused, refusal};

/// A larger answer is a failure: it would be kept in the ledger and read whole.
pub const ANSWER_MAX_BYTES: usize = 16 << 20;
/// How much of a failed call's answer is kept, for people.
const ERROR_MAX_BYTES: usize = 2 << 10;

pub(super) fn failure(code: &'static str, error: impl Into<String>) -> JobFailure {
    JobFailure {
        code: SmolStr::new_static(code),
        error: error.into(),
    }
}

/// The failure of a call that was not made.
pub(super) fn not_called(refused: &Refused) -> JobFailure {
    failure("not_called", format!("it is not called: {refused}"))
}

/// The failure of a call that got no whole answer.
pub(super) fn broken(error: reqwest::Error) -> JobFailure {
    if let Some(refused) = refusal(&error) {
        return not_called(refused);
    }
    let code = if error.is_connect() {
        "connect"
    } else if error.is_timeout() {
        "timeout"
    } else {
        "interrupted"
    };
    failure(code, error_text(error))
}

/// The result as JSON, if the answer is one.
pub(super) async fn result_of(response: Response) -> Result<Bytes, JobFailure> {
    let status = response.status().as_u16();
    if status >= 400 {
        let said = excerpt(response).await;
        let code = match answers_out_of_memory(&said) {
            true => OUT_OF_MEMORY,
            false => "http_status",
        };
        return Err(failure(
            code,
            format!("the service answered {status}: {said}"),
        ));
    }
    // A redirect is not followed, and its body is no result.
    if status >= 300 {
        return Err(failure(
            "http_status",
            format!("the service answered {status}, a redirect"),
        ));
    }
    let body = bounded(response, ANSWER_MAX_BYTES).await?;
    match serde_json::from_slice::<&RawValue>(&body) {
        Ok(_) => Ok(body),
        Err(error) => Err(failure(
            "bad_answer",
            format!("the service's answer is no JSON: {error}"),
        )),
    }
}

/// The whole body, or `answer_too_large`.
pub(super) async fn bounded(mut response: Response, max_bytes: usize) -> Result<Bytes, JobFailure> {
    let too_large = || {
        failure(
            "answer_too_large",
            format!("the service's answer is larger than {max_bytes} bytes"),
        )
    };
    let announced = response
        .content_length()
        .map(|length| usize::try_from(length).unwrap_or(usize::MAX));
    if announced.is_some_and(|length| length > max_bytes) {
        return Err(too_large());
    }
    let mut body = BytesMut::with_capacity(announced.unwrap_or(0));
    while let Some(chunk) = response.chunk().await.map_err(broken)? {
        if body.len() + chunk.len() > max_bytes {
            return Err(too_large());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}

/// The beginning of an error's body as text.
async fn excerpt(mut response: Response) -> String {
    let mut body = Vec::new();
    while body.len() < ERROR_MAX_BYTES {
        match response.chunk().await {
            Ok(Some(chunk)) => {
                body.extend_from_slice(&chunk[..chunk.len().min(ERROR_MAX_BYTES - body.len())])
            }
            Ok(None) | Err(_) => break,
        }
    }
    String::from_utf8_lossy(&body).trim().to_owned()
}
