//! A service as callers describe it: the contract's fields (`contracts/gpu-gateway.md` section 3) and ours,
//! each checked and bounded, a new one or changes to one that is there.

use super::error::ApiError;
use super::fields::{Fields, TextRule};
use super::image_spec;
use super::job::{MAX_NAME_CHARS, read_url};
use super::ladder;
use crate::domain::spec::{ProgressMode, ServiceSpec, Worker};

/// Longest service name, so that it fits file names with an ending.
const MAX_SERVICE_NAME_CHARS: usize = 63;
const NAME_PATTERN: &str = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$";
const MAX_DESCRIPTION_CHARS: usize = 2_000;
/// Where a service that wants to be asked for progress is asked, if it says nothing else.
const PROGRESS_ENDPOINT: &str = "/progress";
const MAX_PATH_CHARS: usize = 1_024;
pub const MAX_ARGUMENTS: usize = 256;
pub const MAX_ARGUMENT_CHARS: usize = 4_096;
const MAX_VARIABLES: usize = 128;
const MAX_VARIABLE_NAME_CHARS: usize = 128;
const MAX_VARIABLE_CHARS: usize = 32_768;
/// 16 TiB: more than any machine's GPUs have.
const MAX_VRAM_GIB: f64 = 16_384.0;
/// More GPUs than one host has.
const MAX_GPUS: u64 = 64;
const MAX_CONCURRENCY: u64 = 1_024;
pub const DEFAULT_GRACE_MS: u64 = 10_000;
const DEFAULT_STARTUP_MS: u64 = 120_000;
const DAY_S: f64 = 86_400.0;

/// Whether a text may name a service; all others name none, path tricks among them.
pub fn is_service_name(text: &str) -> bool {
    let starts_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    starts_well && text.len() <= MAX_SERVICE_NAME_CHARS && text.chars().all(plain)
}

/// A new service.
pub fn read_new(fields: &Fields) -> Result<ServiceSpec, ApiError> {
    let runs_elsewhere = fields.has("url");
    let runs_here = fields.has("command") || fields.has("image");
    let mut needed = vec!["name", "type"];
    if !runs_elsewhere && !runs_here {
        needed.extend(["container", "port"]);
    }
    for name in needed {
        if fields.raw(name).is_none_or(|raw| raw.get() == "\"\"") {
            return Err(ApiError::missing_field(
                name,
                format!("'{name}' is required"),
            ));
        }
    }
    let name = fields.required_text("name", TextRule::name(MAX_NAME_CHARS));
    if !name.is_empty() && !is_service_name(&name) {
        let message = format!("String should match pattern '{NAME_PATTERN}'");
        fields.fault("name", "string_pattern_mismatch", message);
    }
    let mut spec = ServiceSpec {
        container: name.clone(),
        name: name.into(),
        service_type: "".into(),
        port: 0,
        health_endpoint: "/health".to_owned(),
        description: String::new(),
        vram_mib: 0,
        gpus: 0,
        progress_mode: ProgressMode::Stateless,
        progress_endpoint: None,
        worker: Worker::Container,
        concurrency: 1,
        dispatch_path: None,
        cancel_path: None,
        idle_timeout_ms: None,
        grace_ms: DEFAULT_GRACE_MS,
        startup_timeout_ms: DEFAULT_STARTUP_MS,
        min_runtime_ms: None,
        ladder: Vec::new(),
        mps_percent: None,
    };
    apply(fields, &mut spec);
    fields.finish()?;
    Ok(spec)
}

/// Changes to a service that is there: members that are absent stay; null unsets what may be unset.
pub fn read_changes(fields: &Fields, current: &ServiceSpec) -> Result<ServiceSpec, ApiError> {
    let mut spec = current.clone();
    if let Some(name) = fields.text("name", TextRule::name(MAX_NAME_CHARS))
        && name != current.name
    {
        fields.fault(
            "name",
            "value_error",
            "Value error, a service's name cannot change",
        );
    }
    apply(fields, &mut spec);
    fields.finish()?;
    Ok(spec)
}

fn apply(fields: &Fields, spec: &mut ServiceSpec) {
    apply_worker(fields, spec);
    apply_contract(fields, spec);
    apply_ours(fields, spec);
}

fn apply_contract(fields: &Fields, spec: &mut ServiceSpec) {
    if let Some(text) = fields.text("type", TextRule::name(MAX_NAME_CHARS)) {
        spec.service_type = text.into();
    }
    if let Some(text) = fields.text("container", TextRule::name(MAX_NAME_CHARS)) {
        if !is_service_name(&text) {
            let message = format!("String should match pattern '{NAME_PATTERN}'");
            fields.fault("container", "string_pattern_mismatch", message);
        }
        spec.container = text;
    }
    let lowest_port = if matches!(spec.worker, Worker::Container) {
        1
    } else {
        0
    };
    if let Some(port) = fields.int("port", lowest_port..=65_535) {
        spec.port = port as u16;
    }
    if let Some(path) = read_path(fields, "health_endpoint") {
        spec.health_endpoint = path;
    }
    if let Some(text) = fields.text("description", TextRule::prose(MAX_DESCRIPTION_CHARS)) {
        spec.description = text;
    }
    if let Some(mib) = read_vram_mib(fields) {
        spec.vram_mib = mib;
    }
    match fields
        .text("progress_mode", TextRule::name(MAX_NAME_CHARS))
        .as_deref()
    {
        None => {}
        Some("stateless") => spec.progress_mode = ProgressMode::Stateless,
        Some("queue") => spec.progress_mode = ProgressMode::Queue,
        Some("poll") => spec.progress_mode = ProgressMode::Poll,
        Some(_) => {
            let message = "Input should be 'stateless', 'queue' or 'poll'";
            fields.fault("progress_mode", "literal_error", message);
        }
    }
    apply_optional_path(fields, "progress_endpoint", &mut spec.progress_endpoint);
    if spec.progress_mode == ProgressMode::Poll && spec.progress_endpoint.is_none() {
        spec.progress_endpoint = Some(PROGRESS_ENDPOINT.into());
    }
}

fn apply_ours(fields: &Fields, spec: &mut ServiceSpec) {
    if let Some(gpus) = read_gpus(fields) {
        spec.gpus = gpus;
    }
    if let Some(concurrency) = fields.int("concurrency", 1..=MAX_CONCURRENCY) {
        spec.concurrency = concurrency as u32;
    }
    apply_optional_path(fields, "dispatch_path", &mut spec.dispatch_path);
    apply_optional_path(fields, "cancel_path", &mut spec.cancel_path);
    if fields.is_null("idle_timeout_seconds") {
        spec.idle_timeout_ms = None;
    }
    if let Some(ms) = fields.seconds_as_ms("idle_timeout_seconds", 0.0..=30.0 * DAY_S) {
        spec.idle_timeout_ms = Some(ms);
    }
    if let Some(ms) = fields.seconds_as_ms("grace_seconds", 0.0..=600.0) {
        spec.grace_ms = ms;
    }
    if let Some(ms) = fields.seconds_as_ms("startup_timeout_seconds", 0.1..=3_600.0) {
        spec.startup_timeout_ms = ms;
    }
    if fields.is_null("min_runtime_seconds") {
        spec.min_runtime_ms = None;
    }
    if let Some(ms) = fields.seconds_as_ms("min_runtime_seconds", 0.0..=DAY_S) {
        spec.min_runtime_ms = Some(ms);
    }
    ladder::apply(fields, spec);
}

/// How it comes to life: `command` with `env` and `working_dir`, `image` with what goes with it, `url`, or none of them for a
/// container that is there.
fn apply_worker(fields: &Fields, spec: &mut ServiceSpec) {
    if fields.has("url") && fields.has("command") {
        let message = "Value error, url and command exclude each other: it runs elsewhere or here";
        fields.fault("url", "value_error", message);
        return;
    }
    if fields.has("image") && (fields.has("command") || fields.has("url")) {
        let message = "Value error, image excludes command and url: it is a container of Rungate's own; the image's \
                       entry point gets args";
        fields.fault("image", "value_error", message);
        return;
    }
    if let Some(url) = read_url(fields, "url") {
        if spec.port == 0 {
            let parsed = url::Url::parse(&url).ok();
            spec.port = parsed
                .and_then(|url| url.port_or_known_default())
                .unwrap_or(0);
        }
        spec.worker = Worker::External { url };
        return;
    }
    let becomes_process = fields.has("command");
    if fields.has("image") || (matches!(spec.worker, Worker::Image(_)) && !becomes_process) {
        apply_image(fields, spec);
        return;
    }
    only_with(fields, &image_spec::MEMBERS, "image");
    let command = read_command(fields);
    let env = read_env(fields);
    let working_dir = read_working_dir(fields);
    match (&mut spec.worker, command) {
        (worker, Some(command)) => {
            let (old_env, old_dir) = match worker {
                Worker::Process {
                    env, working_dir, ..
                } => (std::mem::take(env), working_dir.take()),
                _ => (Vec::new(), None),
            };
            let keep_dir = !fields.is_null("working_dir");
            *worker = Worker::Process {
                command,
                env: env.unwrap_or(old_env),
                working_dir: working_dir.or(old_dir.filter(|_| keep_dir)),
            };
        }
        (
            Worker::Process {
                env: old_env,
                working_dir: old_dir,
                ..
            },
            None,
        ) => {
            if let Some(env) = env {
                *old_env = env;
            }
            if working_dir.is_some() || fields.is_null("working_dir") {
                *old_dir = working_dir;
            }
        }
        (_, None) => {
            only_with(fields, &["env", "working_dir"], "command");
        }
    }
}

fn apply_image(fields: &Fields, spec: &mut ServiceSpec) {
    only_with(fields, &["working_dir"], "command");
    let mut image = match std::mem::replace(&mut spec.worker, Worker::Container) {
        Worker::Image(image) => image,
        _ => Box::default(),
    };
    let port = fields.int("port", 0..=65_535).map(|port| port as u16);
    image_spec::apply(fields, port, &mut image);
    spec.worker = Worker::Image(image);
}

/// Faults those of the members that are there, as they go with another that is not.
fn only_with(fields: &Fields, members: &[&str], with: &str) {
    for name in members {
        if fields.has(name) {
            let message = format!("Value error, {name} goes with {with} only");
            fields.fault(name, "value_error", message);
        }
    }
}

fn read_command(fields: &Fields) -> Option<Vec<String>> {
    let argv = fields.texts(
        "command",
        MAX_ARGUMENTS,
        TextRule::prose(MAX_ARGUMENT_CHARS),
    )?;
    if argv.first().is_none_or(String::is_empty) {
        let message = "Value error, command is a list of texts, the program first";
        fields.fault("command", "value_error", message);
        return None;
    }
    Some(argv)
}

/// GPU memory in MiB, rounded up.
pub fn read_vram_mib(fields: &Fields) -> Option<u64> {
    let gib = fields.float("vram_gb", 0.0..=MAX_VRAM_GIB)?;
    Some((gib * 1_024.0).ceil() as u64)
}

/// Whole GPUs.
pub fn read_gpus(fields: &Fields) -> Option<u32> {
    fields.int("gpus", 0..=MAX_GPUS).map(|gpus| gpus as u32)
}

/// Environment variables.
pub fn read_env(fields: &Fields) -> Option<Vec<(String, String)>> {
    let env = fields.text_map(
        "env",
        MAX_VARIABLES,
        TextRule::name(MAX_VARIABLE_NAME_CHARS),
        TextRule::prose(MAX_VARIABLE_CHARS),
    )?;
    for (name, _) in &env {
        let starts_well = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        if !starts_well || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            let message = "String should match pattern '^[A-Za-z_][A-Za-z0-9_]*$'";
            fields.fault("env", "string_pattern_mismatch", message);
        }
    }
    Some(env)
}

fn read_working_dir(fields: &Fields) -> Option<String> {
    let text = fields.text("working_dir", TextRule::name(MAX_ARGUMENT_CHARS))?;
    if !text.starts_with('/') || text.split('/').any(|part| part == "..") {
        let message = "Value error, working_dir is an absolute path without '..'";
        fields.fault("working_dir", "value_error", message);
        return None;
    }
    Some(text)
}

fn apply_optional_path(fields: &Fields, name: &str, slot: &mut Option<String>) {
    if fields.is_null(name) {
        *slot = None;
    }
    if let Some(path) = read_path(fields, name) {
        *slot = Some(path);
    }
}

/// A path on the service: begins with one '/', has no white space, no '..', no fragment.
pub(super) fn read_path(fields: &Fields, name: &str) -> Option<String> {
    let text = fields.text(name, TextRule::name(MAX_PATH_CHARS))?;
    let before_query = text.split('?').next().unwrap_or_default();
    let sound = text.starts_with('/')
        && !text.starts_with("//")
        && text.is_ascii()
        && !text.contains([' ', '#', '\\'])
        && !before_query.split('/').any(|part| part == "..");
    if !sound {
        let message =
            "Value error, it is a path that starts with '/' and has no white space, '#' or '..'";
        fields.fault(name, "value_error", message);
        return None;
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> Result<ServiceSpec, ApiError> {
        read_new(&Fields::of_body(body).unwrap())
    }

    #[test]
    fn a_process_service_is_read_whole() {
        let spec = read(
            r#"{"name":"stats","type":"text-stats","port":0,"command":["/bin/worker","--x"],"env":{"A":"1"},
                "working_dir":"/tmp","vram_gb":0.5,"gpus":0,"concurrency":2,"grace_seconds":2.5,
                "startup_timeout_seconds":5,"min_runtime_seconds":1,"idle_timeout_seconds":60,
                "dispatch_path":"/work","cancel_path":"/cancel","progress_mode":"queue"}"#,
        )
        .unwrap();
        assert_eq!(
            (spec.vram_mib, spec.grace_ms, spec.concurrency),
            (512, 2_500, 2)
        );
        assert_eq!(spec.dispatch_path(), "/work");
        assert_eq!(spec.container, "stats");
    }

    #[test]
    fn what_is_missing_is_named_as_in_the_contract() {
        let detail = |body| read(body).unwrap_err().detail;
        assert_eq!(detail("{}"), "'name' is required");
        assert_eq!(
            detail(r#"{"name":"a","type":"t"}"#),
            "'container' is required"
        );
        assert_eq!(
            detail(r#"{"name":"a","type":"t","container":"c"}"#),
            "'port' is required"
        );
    }

    #[test]
    fn every_field_is_checked() {
        for wrong in [
            r#""name":"../x""#,
            r#""name":"a/b""#,
            r#""name":".hidden""#,
            r#""port":65536"#,
            r#""port":-1"#,
            r#""vram_gb":-1"#,
            r#""vram_gb":1e9"#,
            r#""vram_gb":"4""#,
            r#""health_endpoint":"health""#,
            r#""health_endpoint":"//evil/health""#,
            r#""dispatch_path":"/a/../b""#,
            r#""command":[]"#,
            r#""command":[""]"#,
            r#""command":"/bin/true""#,
            r#""command":["/bin/true","a\u0000b"]"#,
            r#""env":{"A=B":"1"}"#,
            r#""env":{"A":1}"#,
            r#""working_dir":"x""#,
            r#""working_dir":"/a/../b""#,
            r#""concurrency":0"#,
            r#""gpus":65"#,
            r#""progress_mode":"zap""#,
            r#""grace_seconds":601"#,
            r#""url":"http://x/""#,
        ] {
            let key = wrong.split(':').next().unwrap();
            let base = [
                r#""name":"a""#,
                r#""type":"t""#,
                r#""command":["/bin/true"]"#,
            ];
            let kept: Vec<_> = base
                .iter()
                .filter(|m| !m.starts_with(&format!("{key}:")))
                .copied()
                .collect();
            let body = format!("{{{},{wrong}}}", kept.join(","));
            let error = read(&body)
                .err()
                .unwrap_or_else(|| panic!("accepted {wrong}"));
            assert_eq!(error.code.as_str(), "validation_failed", "{wrong}");
        }
    }

    #[test]
    fn changes_keep_what_they_do_not_name() {
        let old = read(
            r#"{"name":"a","type":"t","command":["/bin/true"],"env":{"A":"1"},"cancel_path":"/c"}"#,
        )
        .unwrap();
        let fields =
            Fields::of_body(r#"{"vram_gb":2,"cancel_path":null,"command":["/bin/false"]}"#)
                .unwrap();
        let new = read_changes(&fields, &old).unwrap();
        assert_eq!((new.vram_mib, new.cancel_path.as_deref()), (2_048, None));
        assert_eq!(
            new.worker,
            Worker::Process {
                command: vec!["/bin/false".into()],
                env: vec![("A".into(), "1".into())],
                working_dir: None
            }
        );
    }
}
