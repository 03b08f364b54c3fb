//! A container that is made of an image, as callers describe it: each member checked and bounded. What the operator
//! of this gateway allows of it is the driver's to say (`driver::ContainerRules`).

use std::collections::BTreeMap;

use serde::Deserialize;

use super::fields::{Fields, TextRule};
use super::service_spec::{MAX_ARGUMENT_CHARS, MAX_ARGUMENTS, read_env};
use crate::domain::container::{ImageSpec, Ipc, Ulimit, Volume};

/// The members that go with `image` only, besides `env`.
pub const MEMBERS: [&str; 10] = [
    "args",
    "volumes",
    "shm_size",
    "ipc",
    "ulimits",
    "cpus",
    "memory",
    "user",
    "networks",
    "container_port",
];

/// The port that a container listens on unless it is said; it is told as `PORT`.
const DEFAULT_PORT: u16 = 8080;
const MAX_IMAGE_CHARS: usize = 512;
const MAX_VOLUMES: usize = 64;
const MAX_VOLUME_CHARS: usize = 4_096;
const MAX_NETWORKS: usize = 16;
const MAX_NAME_CHARS: usize = 128;
/// A larger size is a mistake: 1 PiB in MiB.
const MAX_MIB: u64 = 1 << 30;
/// As docker names them; what is not here bounds nothing that a service needs more of.
const ULIMITS: [&str; 15] = [
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// Changes `spec` by what the members say; null unsets what may be unset.
pub fn apply(fields: &Fields, host_port: Option<u16>, spec: &mut ImageSpec) {
    if let Some(image) = fields.text("image", TextRule::name(MAX_IMAGE_CHARS)) {
        if is_reference(&image) {
            spec.image = image;
        } else {
            let message = "Value error, image is a reference such as name:tag, host/name@sha256:… or an image's id";
            fields.fault("image", "value_error", message);
        }
    }
    let rule = TextRule::prose(MAX_ARGUMENT_CHARS);
    if let Some(args) = fields.texts("args", MAX_ARGUMENTS, rule) {
        spec.args = args;
    }
    if let Some(env) = read_env(fields) {
        spec.env = env;
    }
    if let Some(volumes) = fields.texts("volumes", MAX_VOLUMES, TextRule::name(MAX_VOLUME_CHARS)) {
        spec.volumes = volumes
            .iter()
            .filter_map(|text| read_volume(fields, text))
            .collect();
    }
    apply_size(fields, "shm_size", &mut spec.shm_mib);
    apply_size(fields, "memory", &mut spec.memory_mib);
    match fields
        .text("ipc", TextRule::name(MAX_NAME_CHARS))
        .as_deref()
    {
        None => {}
        Some("private") => spec.ipc = Ipc::Private,
        Some("host") => spec.ipc = Ipc::Host,
        Some(_) => fields.fault(
            "ipc",
            "literal_error",
            "Input should be 'private' or 'host'",
        ),
    }
    if let Some(ulimits) = read_ulimits(fields) {
        spec.ulimits = ulimits;
    }
    if fields.is_null("cpus") {
        spec.cpus_milli = None;
    }
    if let Some(cpus) = fields.float("cpus", 0.01..=4_096.0) {
        spec.cpus_milli = Some((cpus * 1_000.0).round() as u64);
    }
    if fields.is_null("user") {
        spec.user = None;
    }
    if let Some(user) = fields.text("user", TextRule::name(MAX_NAME_CHARS)) {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':');
        if user.is_empty() || !user.chars().all(plain) {
            let message = "Value error, user is a name or a number, or user:group";
            fields.fault("user", "value_error", message);
        }
        spec.user = Some(user);
    }
    if let Some(networks) = fields.texts("networks", MAX_NETWORKS, TextRule::name(MAX_NAME_CHARS)) {
        spec.networks = networks;
    }
    if let Some(port) = fields.int("container_port", 1..=65_535) {
        spec.port = port as u16;
    } else if spec.port == 0 {
        spec.port = host_port.filter(|port| *port > 0).unwrap_or(DEFAULT_PORT);
    }
}

/// A name with an optional registry, tag or digest; the engine knows the rest.
fn is_reference(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/:@".contains(c);
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(plain)
        && !text.split('/').any(|part| part.is_empty() || part == "..")
}

/// `SOURCE:TARGET`, with `:ro` behind it when nothing may be written.
fn read_volume(fields: &Fields, text: &str) -> Option<Volume> {
    let mut parts = text.split(':');
    let (source, target) = (
        parts.next().unwrap_or_default(),
        parts.next().unwrap_or_default(),
    );
    let mode = parts.next();
    let is_sound = |path: &str| path.starts_with('/') && !path.split('/').any(|part| part == "..");
    let is_name = |name: &str| {
        name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
    };
    let well = (is_sound(source) || is_name(source))
        && is_sound(target)
        && target != "/"
        && matches!(mode, None | Some("ro" | "rw"))
        && parts.next().is_none();
    if !well {
        let message = format!(
            "Value error, '{text}' is no volume: it is written as SOURCE:TARGET or SOURCE:TARGET:ro, where SOURCE is an \
             absolute path or a volume's name and TARGET an absolute path"
        );
        fields.fault("volumes", "value_error", message);
        return None;
    }
    Some(Volume {
        source: source.to_owned(),
        target: target.to_owned(),
        read_only: mode == Some("ro"),
    })
}

fn apply_size(fields: &Fields, name: &str, slot: &mut Option<u64>) {
    if fields.is_null(name) {
        *slot = None;
        return;
    }
    let Some(raw) = fields.raw(name) else {
        return;
    };
    match read_size(raw.get()) {
        Some(mib) => *slot = Some(mib),
        None => {
            let message = "Value error, it is a number of bytes, or a text such as '512m' or '16g'";
            fields.fault(name, "value_error", message);
        }
    }
}

/// Bytes as a number, or a text with one of docker's units; in MiB, rounded up, 1 at least.
fn read_size(json: &str) -> Option<u64> {
    let text = json.trim_matches('"').to_ascii_lowercase();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor: u64 = match &text[digits.len()..] {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => return None,
    };
    let bytes = digits.parse::<u64>().ok()?.checked_mul(factor)?;
    let mib = bytes.div_ceil(1 << 20);
    (1..=MAX_MIB).contains(&mib).then_some(mib)
}

/// One bound for both, or each.
#[derive(Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum UlimitValue {
    Both(i64),
    Each { soft: i64, hard: i64 },
}

fn read_ulimits(fields: &Fields) -> Option<Vec<Ulimit>> {
    let raw = fields.raw("ulimits")?;
    let Ok(named) = serde_json::from_str::<BTreeMap<String, UlimitValue>>(raw.get()) else {
        let message = "Value error, ulimits is an object such as {\"nofile\": 65536} or {\"memlock\": {\"soft\": -1, \"hard\": -1}}";
        fields.fault("ulimits", "value_error", message);
        return None;
    };
    let mut ulimits = Vec::new();
    for (name, value) in named {
        let (soft, hard) = match value {
            UlimitValue::Both(both) => (both, both),
            UlimitValue::Each { soft, hard } => (soft, hard),
        };
        let known = ULIMITS.contains(&name.as_str());
        let sound = soft >= -1 && hard >= -1 && (hard == -1 || (soft != -1 && soft <= hard));
        if !known || !sound {
            let message = format!(
                "Value error, '{name}' is no ulimit with a soft bound of at most its hard one; -1 is none"
            );
            fields.fault("ulimits", "value_error", message);
            return None;
        }
        ulimits.push(Ulimit { name, soft, hard });
    }
    Some(ulimits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_docker_writes_them() {
        for (json, mib) in [
            ("1048576", Some(1)),
            ("1048577", Some(2)),
            ("\"64m\"", Some(64)),
            ("\"16G\"", Some(16 << 10)),
            ("\"2GiB\"", Some(2 << 10)),
            ("0", None),
            ("-1", None),
            ("\"\"", None),
            ("\"12q\"", None),
            ("1.5", None),
            ("\"99999999999999999999g\"", None),
        ] {
            assert_eq!(read_size(json), mib, "{json}");
        }
    }

    #[test]
    fn references_are_told_from_tricks() {
        for good in [
            "busybox",
            "ghcr.io/a/b:v1.2",
            "localhost:5000/x@sha256:ab12",
        ] {
            assert!(is_reference(good), "{good}");
        }
        for bad in ["", "-v", "a b", "a//b", "../x", "a/../b", "a;b", "ä"] {
            assert!(!is_reference(bad), "{bad}");
        }
    }
}
