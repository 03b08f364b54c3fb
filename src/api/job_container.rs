//! The container of a job, as callers describe it: the members of an image (`image_spec`) and how the job runs. It is kept
//! as the job's payload, byte for byte, and read again when an attempt begins.

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::containers::check_image;
use super::error::{ApiError, ErrorCode};
use super::fields::{Fields, TextRule};
use super::image_spec;
use super::job::MAX_TIMEOUT_S;
use super::ladder::MAX_STEP_S;
use super::service_spec::{DEFAULT_GRACE_MS, read_gpus, read_vram_mib};
use super::state::App;
use crate::domain::container::{ImageSpec, JobContainer};
use crate::domain::ladder::{Ask, Step};
use crate::domain::spec::Needs;

/// A day: what trains takes longer than what answers.
const DEFAULT_TIMEOUT_MS: u64 = 86_400_000;
const DEFAULT_CHECKPOINT_MS: u64 = 30_000;
/// Needs are rounded up to this, so that they are few: jobs that need the same wait in one line.
const NEEDS_STEP_MIB: u64 = 256;
/// Longest text that is looked at as a signal's name.
const MAX_SIGNAL_CHARS: usize = 16;
const SIGNALS: [&str; 4] = ["SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"];
/// Besides those of an image that say what it is made of.
const MEMBERS: [&str; 8] = [
    "image",
    "env",
    "gpus",
    "vram_gb",
    "timeout_seconds",
    "grace_seconds",
    "checkpoint_signal",
    "checkpoint_seconds",
];
/// Of an image's, what a job has not: it listens nowhere.
const PORT_MEMBER: &str = "container_port";

/// A container that is made for one job, run to its end and removed.
#[derive(Serialize, ToSchema)]
pub struct ContainerRequest {
    /// One that the gateway's settings allow (`docker_images`).
    pub image: String,
    /// What the image's entry point gets; absent takes the image's own.
    pub args: Option<Vec<String>>,
    #[schema(value_type = Option<Object>)]
    pub env: Option<Value>,
    /// `SOURCE:TARGET`, with `:ro` behind it when nothing may be written; below folders that the settings allow.
    pub volumes: Option<Vec<String>>,
    /// Whole GPUs for itself; absent or 0 shares one by `vram_gb`.
    pub gpus: Option<u32>,
    /// GPU memory that it needs, rounded up to a quarter of a GiB.
    pub vram_gb: Option<f64>,
    /// Seconds that one attempt may take, from the decision to start it; a day when absent.
    pub timeout_seconds: Option<f64>,
    /// Seconds between TERM and KILL; 10 when absent.
    pub grace_seconds: Option<f64>,
    /// Asks it to save its work to `RUNGATE_CHECKPOINT_DIR` before it is stopped: `SIGUSR1`, `SIGUSR2`, `SIGINT` or `SIGHUP`.
    pub checkpoint_signal: Option<String>,
    /// Seconds that it gets for that, unless it ends before; 30 when absent.
    pub checkpoint_seconds: Option<f64>,
    /// Of `/dev/shm`, such as `1g`.
    pub shm_size: Option<String>,
    /// `private` or `host`.
    pub ipc: Option<String>,
    #[schema(value_type = Option<Object>)]
    pub ulimits: Option<Value>,
    pub cpus: Option<f64>,
    /// Such as `16g`.
    pub memory: Option<String>,
    /// `user`, or `user:group`.
    pub user: Option<String>,
    pub networks: Option<Vec<String>>,
}

/// What was asked for, parsed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ContainerJob {
    pub image: ImageSpec,
    pub needs: Needs,
    pub stopping: JobContainer,
    pub timeout_ms: u64,
}

impl ContainerJob {
    /// Reads it; faults are recorded in `fields`.
    pub fn read(fields: &Fields) -> ContainerJob {
        let of_image = image_spec::MEMBERS.into_iter();
        let of_image = of_image.filter(|name| *name != PORT_MEMBER);
        let members: Vec<&str> = MEMBERS.into_iter().chain(of_image).collect();
        fields.forbid_others(&members);
        if !fields.has("image") {
            fields.missing("image");
        }
        let mut image = ImageSpec::default();
        image_spec::apply(fields, None, &mut image);
        // It listens nowhere.
        image.port = 0;
        let vram_mib = read_vram_mib(fields).unwrap_or(0);
        let seconds = |name, default| {
            let given = fields.seconds_as_ms(name, 0.0..=MAX_STEP_S);
            given.unwrap_or(default)
        };
        let grace_ms = seconds("grace_seconds", DEFAULT_GRACE_MS);
        let ms = seconds("checkpoint_seconds", DEFAULT_CHECKPOINT_MS);
        let ask = read_signal(fields).map(|signal| Ask::Signal(signal.into()));
        if ask.is_none() && fields.has("checkpoint_seconds") {
            let message = "Value error, checkpoint_seconds goes with checkpoint_signal only";
            fields.fault("checkpoint_seconds", "value_error", message);
        }
        let timeout_ms = fields.seconds_as_ms("timeout_seconds", 0.001..=MAX_TIMEOUT_S);
        ContainerJob {
            image,
            needs: Needs {
                vram_mib: vram_mib.next_multiple_of(NEEDS_STEP_MIB),
                gpus: read_gpus(fields).unwrap_or(0),
            },
            stopping: JobContainer::new(ask.map(|ask| Step::Checkpoint { ask, ms }), grace_ms),
            timeout_ms: timeout_ms.unwrap_or(DEFAULT_TIMEOUT_MS),
        }
    }
}

fn read_signal(fields: &Fields) -> Option<String> {
    let signal = fields.text("checkpoint_signal", TextRule::name(MAX_SIGNAL_CHARS))?;
    if !SIGNALS.contains(&signal.as_str()) {
        let message = format!("Input should be one of {}", SIGNALS.join(", "));
        fields.fault("checkpoint_signal", "literal_error", message);
        return None;
    }
    Some(signal)
}

/// Reads a payload again that was accepted before.
///
/// # Errors
/// A sentence: a newer gateway wrote it, perhaps.
pub fn image_of(payload: &[u8]) -> Result<ImageSpec, String> {
    let unreadable = || "the job's payload does not describe a container".to_owned();
    let text = std::str::from_utf8(payload).map_err(|_| unreadable())?;
    let fields = Fields::of_body(text).map_err(|_| unreadable())?;
    let job = ContainerJob::read(&fields);
    fields.finish().map_err(|_| unreadable())?;
    Ok(job.image)
}

/// Whether such a container may be made here, before the job is queued.
///
/// # Errors
/// 403 for what the operator's settings do not allow; 409 when it needs a GPU that the engine cannot give; 503 when this
/// gateway has no engine.
pub async fn check(app: &App, payload: &[u8], needs: Needs) -> Result<(), ApiError> {
    let image = image_of(payload).map_err(|why| {
        tracing::error!(error = why, "a job that was read cannot be read again");
        ApiError::internal()
    })?;
    if !app.docker.is_wanted() {
        let refused = ApiError::new(ErrorCode::NoEngine, "Docker not available");
        return Err(refused.with("hint", app.docker.state().why_down()));
    }
    let needs_gpu = needs.vram_mib > 0 || needs.gpus > 0;
    check_image(app, &image, needs_gpu, &["body", "job", "container"]).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> Result<ContainerJob, usize> {
        let fields = Fields::of_body(body).unwrap();
        let job = ContainerJob::read(&fields);
        fields.finish().map_err(|error| error.errors.len())?;
        Ok(job)
    }

    #[test]
    fn what_is_not_said_has_its_default() {
        let job = read(r#"{"image":"busybox"}"#).unwrap();
        assert_eq!(job.needs, Needs::default());
        assert_eq!(
            (job.timeout_ms, job.stopping.grace_ms),
            (86_400_000, 10_000)
        );
        assert_eq!(job.stopping.ladder, []);
        assert_eq!(image_of(br#"{"image":"busybox"}"#), Ok(job.image));
    }

    #[test]
    fn a_checkpoint_comes_before_the_stop() {
        let job = read(
            r#"{"image":"a","vram_gb":1.1,"gpus":2,"checkpoint_signal":"SIGUSR1","checkpoint_seconds":5,"grace_seconds":1}"#,
        )
        .unwrap();
        assert_eq!((job.needs.vram_mib, job.needs.gpus), (1_280, 2));
        let ask = Ask::Signal("SIGUSR1".into());
        let checkpoint = Step::Checkpoint { ask, ms: 5_000 };
        assert_eq!(job.stopping.ladder, [checkpoint, Step::Stop { ms: 1_000 }]);
    }

    #[test]
    fn every_member_is_bounded() {
        for wrong in [
            r#""imag":"x""#,
            r#""vram_gb":-1"#,
            r#""gpus":65"#,
            r#""checkpoint_signal":"SIGKILL""#,
            r#""checkpoint_seconds":5"#,
            r#""grace_seconds":-1"#,
            r#""timeout_seconds":0"#,
            r#""container_port":80"#,
            r#""args":"x""#,
        ] {
            assert_eq!(
                read(&format!(r#"{{"image":"a",{wrong}}}"#)),
                Err(1),
                "{wrong}"
            );
        }
        assert_eq!(read("{}"), Err(1));
    }
}
