//! How a command ends: the exit codes, and the one sentence that says what went wrong and what to do.

use std::io;
use std::process::ExitCode;

use serde_json::Value;

use crate::config::ConfigError;

/// The exit codes, as `rungate --help` documents them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It was done.
    Success = 0,
    /// It was not done, or a watched run did not complete.
    Failure = 1,
    /// The command line or the settings cannot be meant.
    Usage = 2,
    /// The run, service, command or path does not exist.
    NotFound = 3,
    /// No valid token, or not allowed.
    Denied = 4,
    /// No gateway answers.
    Unreachable = 5,
    /// Interrupted by Ctrl-C.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// A refusal by the gateway (`application/problem+json`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub status: u16,
    pub code: Option<String>,
    pub detail: String,
    pub request_id: Option<String>,
}

/// Why a command did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error("{0}")]
    Config(#[from] ConfigError),
    #[error("{0}")]
    Usage(String),
    #[error("{}", .0.sentence())]
    Problem(Problem),
    #[error(
        "no gateway answers at {url} ({reason}); start one with `rungate serve`, or set RUNGATE_URL"
    )]
    Unreachable { url: String, reason: String },
    #[error(
        "the gateway's answer is not understood ({0}); is RUNGATE_URL a Rungate gateway of this version?"
    )]
    Answer(String),
    /// What was asked for turned out badly; the text says how.
    #[error("{0}")]
    Failed(String),
    #[error("cannot {what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("cannot write the output: {0}")]
    Output(io::Error),
    #[error("interrupted")]
    Interrupted,
}

impl CliError {
    /// For `map_err`: an I/O failure while doing `what`, e.g. `read the file x`.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> CliError {
        let what = what.into();
        move |source| CliError::Io { what, source }
    }

    pub fn exit(&self) -> Exit {
        match self {
            CliError::Config(_) | CliError::Usage(_) => Exit::Usage,
            CliError::Problem(problem) => match problem.status {
                401 | 403 => Exit::Denied,
                404 => Exit::NotFound,
                _ => Exit::Failure,
            },
            CliError::Unreachable { .. } => Exit::Unreachable,
            // The reader has what it wanted (`| head`).
            CliError::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => Exit::Success,
            CliError::Interrupted => Exit::Interrupted,
            CliError::Answer(_)
            | CliError::Failed(_)
            | CliError::Io { .. }
            | CliError::Output(_) => Exit::Failure,
        }
    }
}

impl Problem {
    /// From an answer's body; a body that is no problem document is told by its status alone.
    pub fn from_answer(status: u16, body: &[u8]) -> Self {
        let value: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
        let text = |name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
        let mut detail = match value.get("detail") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Object(object)) => object_sentence(object),
            _ => text("title").unwrap_or_else(|| format!("the gateway answered {status}")),
        };
        let faults = value.get("errors").or_else(|| value.get("detail"));
        let faults: Vec<String> = faults
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(fault_sentence)
            .collect();
        if !faults.is_empty() {
            detail = format!("{}: {}", detail.trim_end_matches('.'), faults.join("; "));
        }
        Self {
            status,
            code: text("code"),
            detail,
            request_id: text("request_id"),
        }
    }

    fn sentence(&self) -> String {
        let remedy = match self.status {
            401 => "; set RUNGATE_TOKEN_FILE to the file that holds your token",
            _ => "",
        };
        match &self.request_id {
            Some(id) => format!("{}{remedy} (request {id})", self.detail),
            None => format!("{}{remedy}", self.detail),
        }
    }
}

/// `{"error":"insufficient_vram","required_mb":…}` as `insufficient_vram (required_mb 1)`.
fn object_sentence(object: &serde_json::Map<String, Value>) -> String {
    let name = object.get("error").and_then(Value::as_str);
    let facts: Vec<String> = object
        .iter()
        .filter(|(key, _)| key.as_str() != "error")
        .map(|(key, value)| match value.as_str() {
            Some(text) => format!("{key} {text}"),
            None => format!("{key} {value}"),
        })
        .collect();
    let name = name.unwrap_or("refused");
    match facts.is_empty() {
        true => name.to_owned(),
        false => format!("{name} ({})", facts.join(", ")),
    }
}

/// One member of `errors[]`: where, then what. Knows both `field`/`message` and `loc`/`msg`.
fn fault_sentence(fault: &Value) -> Option<String> {
    let message = ["message", "msg", "detail"]
        .iter()
        .find_map(|name| fault.get(name).and_then(Value::as_str))?;
    let place = match fault.get("loc").and_then(Value::as_array) {
        Some(parts) => {
            let parts = parts.iter().skip(1).map(|part| match part.as_str() {
                Some(text) => text.to_owned(),
                None => part.to_string(),
            });
            Some(parts.collect::<Vec<_>>().join("."))
        }
        None => ["field", "pointer", "path"]
            .iter()
            .find_map(|name| fault.get(name).and_then(Value::as_str).map(str::to_owned)),
    };
    Some(match place.filter(|place| !place.is_empty()) {
        Some(place) => format!("{place}: {message}"),
        None => message.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_one_sentence_with_its_faults_and_its_request() {
        let body = br#"{"title":"Some fields are wrong","detail":"Validation failed","code":"validation_failed",
            "errors":[{"loc":["body","job","priority"],"msg":"must be 1 to 5"}],"request_id":"r1"}"#;
        let problem = Problem::from_answer(422, body);
        assert_eq!(
            CliError::Problem(problem).to_string(),
            "Validation failed: job.priority: must be 1 to 5 (request r1)"
        );
    }

    #[test]
    fn a_detail_that_is_a_list_of_faults_is_read_too() {
        let body =
            br#"{"detail":[{"loc":["body","type"],"msg":"Field required","type":"missing"}]}"#;
        let problem = Problem::from_answer(422, body);
        assert_eq!(
            problem.detail,
            "the gateway answered 422: type: Field required"
        );
    }

    #[test]
    fn a_detail_that_is_an_object_is_told_in_words() {
        let body = br#"{"detail":{"error":"insufficient_vram","required_mb":16384}}"#;
        let problem = Problem::from_answer(409, body);
        assert_eq!(problem.detail, "insufficient_vram (required_mb 16384)");
    }

    #[test]
    fn every_kind_of_refusal_has_its_exit_code() {
        let exit = |status| CliError::Problem(Problem::from_answer(status, b"")).exit();
        assert_eq!(exit(401), Exit::Denied);
        assert_eq!(exit(403), Exit::Denied);
        assert_eq!(exit(404), Exit::NotFound);
        assert_eq!(exit(409), Exit::Failure);
        let pipe = io::Error::from(io::ErrorKind::BrokenPipe);
        assert_eq!(CliError::Output(pipe).exit(), Exit::Success);
    }
}
