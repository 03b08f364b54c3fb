//! A job as callers ask for it, in our form and in the GPU dialect's: read, bounded, and turned into the
//! command that queues it.

use bytes::Bytes;
use serde::Serialize;
use smol_str::SmolStr;
use utoipa::ToSchema;
use uuid::Uuid;

use super::error::ApiError;
use super::fields::{Fields, TextRule};
use super::job_container::{ContainerJob, ContainerRequest};
use crate::domain::command::Command;
use crate::domain::ids::RunId;
use crate::domain::scheduler::container::NAME_PREFIX;
use crate::domain::spec::{JobSpec, Priority, Target};

/// Longest name of a type or a service.
pub const MAX_NAME_CHARS: usize = 100;
/// Longest session id and the like: they are keys of indexes.
pub const MAX_ID_CHARS: usize = 200;
/// Longest URL that browsers and proxies agree on, nearly.
pub const MAX_URL_CHARS: usize = 2_048;
const MAX_LABELS: usize = 32;
const MAX_LABEL_KEY_CHARS: usize = 63;
const MAX_LABEL_CHARS: usize = 255;
/// A year: longer waits are mistakes of the unit.
const MAX_TTL_S: f64 = 31_536_000.0;
/// A week: one attempt that runs longer should be several jobs with checkpoints.
pub const MAX_TIMEOUT_S: f64 = 604_800.0;
const MAX_ATTEMPTS: u64 = 100;
const DEFAULT_ATTEMPTS: u32 = 3;
/// The contract's (`contracts/gpu-gateway.md` section 4).
const DEFAULT_TIMEOUT_MS: u64 = 300_000;
/// The dialect's time to live when the caller gives none.
pub const DIALECT_TTL_MS: u64 = 3_600_000;

/// A job, as `job` of a start. One of `service_type`, `service_name` and `container` is needed.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct JobRequest {
    /// Any enabled service of this type takes it.
    pub service_type: Option<String>,
    /// This service takes it and no other.
    pub service_name: Option<String>,
    /// It gets a container of its own, which runs to its end.
    #[schema(value_type = Option<ContainerRequest>)]
    pub container: Option<Box<ContainerJob>>,
    /// Posted to the service, byte for byte as given. Not of a container's.
    #[schema(value_type = Object)]
    pub payload: String,
    /// 1 (most urgent) to 5; 3 when absent.
    #[schema(minimum = 1, maximum = 5)]
    pub priority: Option<u8>,
    /// Seconds that it may wait for its first dispatch; absent waits for ever (`/queue/submit`: 3600).
    #[schema(value_type = Option<f64>)]
    pub ttl_seconds: Option<u64>,
    /// Failed attempts after which it fails; 3 when absent.
    pub max_attempts: Option<u32>,
    /// Where the outcome is posted.
    pub callback_url: Option<String>,
    /// Seconds that one attempt may take; 300 when absent. Of a container it is said there.
    #[schema(value_type = Option<f64>)]
    pub timeout_seconds: Option<u64>,
}

impl JobRequest {
    /// Reads it; faults are recorded in `fields`. Durations become milliseconds.
    pub fn read(fields: &Fields) -> JobRequest {
        let name = TextRule::name(MAX_NAME_CHARS);
        let service_name = fields.text("service_name", name);
        if service_name
            .as_ref()
            .is_some_and(|name| name.starts_with(NAME_PREFIX))
        {
            let message = "Value error, no service has such a name";
            fields.fault("service_name", "value_error", message);
        }
        JobRequest {
            service_type: fields.text("service_type", name),
            service_name,
            container: None,
            payload: fields
                .raw("payload")
                .map_or_else(String::new, |raw| raw.get().to_owned()),
            priority: fields.int("priority", 1..=5).map(|priority| priority as u8),
            ttl_seconds: fields.seconds_as_ms("ttl_seconds", 0.0..=MAX_TTL_S),
            max_attempts: fields
                .int("max_attempts", 1..=MAX_ATTEMPTS)
                .map(|n| n as u32),
            callback_url: read_url(fields, "callback_url"),
            timeout_seconds: fields.seconds_as_ms("timeout_seconds", 0.001..=MAX_TIMEOUT_S),
        }
    }

    /// Reads our own form, which may describe a container too and says what is needed of it.
    pub fn read_own(fields: &Fields) -> JobRequest {
        let Some(container) = fields.object("container") else {
            JobRequest::require(fields);
            return JobRequest::read(fields);
        };
        for name in ["service_type", "service_name", "payload", "timeout_seconds"] {
            if fields.has(name) {
                let message = format!("Value error, {name} does not go with container");
                fields.fault(name, "value_error", message);
            }
        }
        let container_job = ContainerJob::read(&container);
        let raw = fields.raw("container");
        JobRequest {
            payload: raw.map_or_else(String::new, |raw| raw.get().to_owned()),
            timeout_seconds: Some(container_job.timeout_ms),
            container: Some(Box::new(container_job)),
            ..JobRequest::read(fields)
        }
    }

    fn require(fields: &Fields) {
        if !fields.has("service_type") && !fields.has("service_name") {
            fields.missing("service_type");
        }
        if !fields.has("payload") {
            fields.missing("payload");
        }
    }

    /// The command that queues it; it was read without faults.
    pub fn into_command(
        self,
        session: Option<SmolStr>,
        labels: Labels,
    ) -> Result<Command, ApiError> {
        let service_type = self.service_type.map(SmolStr::from);
        let target = match (&self.container, self.service_name, &service_type) {
            (Some(container), ..) => Target::Container(container.needs),
            (None, Some(service), _) => Target::Service(service.into()),
            (None, None, Some(of_type)) => Target::Type(of_type.clone()),
            (None, None, None) => {
                return Err(ApiError::missing_field(
                    "service_type",
                    "service_type is required",
                ));
            }
        };
        Ok(Command::StartJob {
            run: RunId(Uuid::now_v7()),
            spec: JobSpec {
                target,
                service_type,
                priority: self.priority.and_then(Priority::new).unwrap_or_default(),
                ttl_ms: self.ttl_seconds,
                max_attempts: self.max_attempts.unwrap_or(DEFAULT_ATTEMPTS),
                timeout_ms: self.timeout_seconds.unwrap_or(DEFAULT_TIMEOUT_MS),
                callback_url: self.callback_url.map(SmolStr::from),
            },
            session,
            labels,
            container: self.container.map(|container| Box::new(container.stopping)),
            payload: Bytes::from(self.payload),
        })
    }
}

/// Labels in the order of their names.
pub type Labels = Vec<(SmolStr, SmolStr)>;

/// The `labels` member of a start.
pub fn read_labels(fields: &Fields) -> Labels {
    let pairs = fields.text_map(
        "labels",
        MAX_LABELS,
        TextRule::name(MAX_LABEL_KEY_CHARS),
        TextRule {
            min: 0,
            max: MAX_LABEL_CHARS,
            plain: true,
        },
    );
    let pairs = pairs.unwrap_or_default().into_iter();
    pairs
        .map(|(key, value)| (key.into(), value.into()))
        .collect()
}

/// An `http` or `https` address.
pub fn read_url(fields: &Fields, name: &str) -> Option<String> {
    let text = fields.text(name, TextRule::name(MAX_URL_CHARS))?;
    match url::Url::parse(&text) {
        Ok(url) if !matches!(url.scheme(), "http" | "https") => {
            fields.fault(name, "url_scheme", "URL scheme should be 'http' or 'https'");
            None
        }
        Ok(url) if url.host_str().is_none_or(str::is_empty) => {
            fields.fault(
                name,
                "url_parsing",
                "Input should be a valid URL, it has no host",
            );
            None
        }
        Ok(url) if !url.username().is_empty() || url.password().is_some() => {
            let message = "URL should hold no user name or password: it is shown to every reader";
            fields.fault(name, "value_error", message);
            None
        }
        Ok(_) => Some(text),
        Err(error) => {
            let message = format!("Input should be a valid URL, {error}");
            fields.fault(name, "url_parsing", message);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(body: &str) -> Result<Command, ApiError> {
        let fields = Fields::of_body(body)?;
        let job = JobRequest::read_own(&fields);
        fields.finish()?;
        job.into_command(None, Vec::new())
    }

    #[test]
    fn a_payload_keeps_its_bytes() {
        let body = r#"{"service_type":"llm","payload":{"b": 1.50, "a":[ ]},"ttl_seconds":1.5}"#;
        let Ok(Command::StartJob { spec, payload, .. }) = command(body) else {
            panic!("refused")
        };
        assert_eq!(payload, r#"{"b": 1.50, "a":[ ]}"#);
        assert_eq!(spec.ttl_ms, Some(1_500));
        assert_eq!(spec.target, Target::Type("llm".into()));
        assert_eq!(
            (spec.max_attempts, spec.timeout_ms, spec.priority.get()),
            (3, 300_000, 3)
        );
    }

    #[test]
    fn every_field_is_bounded() {
        for wrong in [
            r#""priority":0"#,
            r#""priority":6"#,
            r#""priority":"3""#,
            r#""ttl_seconds":-1"#,
            r#""max_attempts":0"#,
            r#""timeout_seconds":0"#,
            r#""callback_url":"ftp://x/""#,
            r#""callback_url":"http://u:p@x/""#,
            r#""callback_url":"nonsense""#,
            r#""service_name":"a\u0000b""#,
            r#""service_name":"_job.0.x""#,
        ] {
            let error = command(&format!(r#"{{"service_type":"t","payload":1,{wrong}}}"#)).err();
            assert_eq!(error.unwrap().errors.len(), 1, "{wrong}");
        }
        assert_eq!(command("{}").err().unwrap().errors.len(), 2);
    }
}
