//! What the operator of this gateway allows of containers. Users choose within it; nothing that they write weakens it.

use std::path::{Component, Path, PathBuf};

use crate::domain::container::{ImageSpec, Ipc, Volume};
use crate::glob::glob;

/// What is allowed of containers that are made of images.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerRules {
    /// Patterns (`*`) of images; none allows no image.
    pub images: Vec<String>,
    /// Folders of the host below which may be mounted, and names of volumes.
    pub volumes: Vec<String>,
    /// Networks besides the default bridge.
    pub networks: Vec<String>,
    /// Whether the host's shared memory may be seen.
    pub host_ipc: bool,
    /// Whether the root file system may be written to.
    pub writable_root: bool,
    /// Capabilities that are not taken away.
    pub capabilities: Vec<String>,
    pub pids_max: u64,
    /// MiB that one may have at most, and has when it names none.
    pub memory_max_mib: u64,
    /// Whether an image that is not there is pulled.
    pub pull: bool,
}

/// A member of a service that this gateway does not allow.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Forbidden {
    /// Its name in the request.
    pub member: &'static str,
    pub message: String,
}

impl ContainerRules {
    /// Whether a container may be made so.
    ///
    /// # Errors
    /// The first member that may not be, with the setting that would allow it.
    pub fn check(&self, spec: &ImageSpec) -> Result<(), Forbidden> {
        let forbidden = |member, message| Err(Forbidden { member, message });
        if !self
            .images
            .iter()
            .any(|pattern| matches(pattern, &spec.image))
        {
            let image = &spec.image;
            return forbidden(
                "image",
                format!(
                    "image '{image}' is not allowed here; an administrator may add it to docker_images"
                ),
            );
        }
        for volume in &spec.volumes {
            if self.folder_of(volume).is_none() {
                let source = &volume.source;
                return forbidden(
                    "volumes",
                    format!(
                        "'{source}' may not be mounted here; an administrator may add it, or a folder above it, to docker_volumes"
                    ),
                );
            }
        }
        let mut networks = spec.networks.iter();
        if let Some(network) = networks
            .find(|&name| name != "bridge" && name != "none" && !self.networks.contains(name))
        {
            return forbidden(
                "networks",
                format!(
                    "network '{network}' is not allowed here; an administrator may add it to docker_networks"
                ),
            );
        }
        if spec.ipc == Ipc::Host && !self.host_ipc {
            let message = "the host's shared memory may not be seen here; an administrator may set docker_host_ipc";
            return forbidden("ipc", message.to_owned());
        }
        match spec.memory_mib {
            Some(mib) if mib > self.memory_max_mib => forbidden(
                "memory",
                format!(
                    "{mib} MiB are more than the {} MiB of docker_memory_max_mib",
                    self.memory_max_mib
                ),
            ),
            _ => Ok(()),
        }
    }

    /// The allowed folder or volume that a volume is of.
    fn folder_of(&self, volume: &Volume) -> Option<&str> {
        let is_path = volume.source.starts_with('/');
        self.volumes
            .iter()
            .map(String::as_str)
            .find(|allowed| match is_path {
                true => {
                    allowed.starts_with('/')
                        && is_below(Path::new(&volume.source), Path::new(allowed))
                }
                false => *allowed == volume.source,
            })
    }

    /// Where a folder of this machine really is, links followed, if that is allowed too.
    ///
    /// # Errors
    /// It is not there, or a link leads out of what is allowed.
    pub fn resolve(&self, volume: &Volume) -> Result<PathBuf, Forbidden> {
        let forbidden = |message| Forbidden {
            member: "volumes",
            message,
        };
        let source = &volume.source;
        let real = Path::new(source)
            .canonicalize()
            .map_err(|error| forbidden(format!("'{source}' cannot be mounted: {error}")))?;
        let allowed = self
            .volumes
            .iter()
            .filter_map(|allowed| Path::new(allowed).canonicalize().ok());
        match allowed.into_iter().any(|folder| is_below(&real, &folder)) {
            true => Ok(real),
            false => Err(forbidden(format!(
                "'{source}' leads to a place that may not be mounted here; an administrator may add it to docker_volumes"
            ))),
        }
    }
}

/// Whether a path is a folder or below it, by its text: `..` is nowhere.
fn is_below(path: &Path, folder: &Path) -> bool {
    let plain = |path: &Path| {
        path.components()
            .all(|part| !matches!(part, Component::ParentDir))
    };
    plain(path) && path.starts_with(folder)
}

/// A pattern's `*` stands for any text. A question mark is no part of a reference: a pattern with one allows nothing.
fn matches(pattern: &str, image: &str) -> bool {
    !pattern.contains('?') && glob(pattern, image)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> ContainerRules {
        ContainerRules {
            images: vec!["busybox:*".into(), "ghcr.io/ours/*".into()],
            volumes: vec!["/srv/models".into(), "cache".into()],
            memory_max_mib: 100,
            ..ContainerRules::default()
        }
    }

    fn faulty(edit: impl FnOnce(&mut ImageSpec)) -> Option<&'static str> {
        let mut spec = ImageSpec {
            image: "busybox:1".into(),
            ..ImageSpec::default()
        };
        edit(&mut spec);
        rules().check(&spec).err().map(|forbidden| forbidden.member)
    }

    fn volume(source: &str) -> Volume {
        Volume {
            source: source.into(),
            target: "/in".into(),
            read_only: true,
        }
    }

    #[test]
    fn only_what_is_allowed_passes() {
        assert_eq!(faulty(|_| ()), None);
        assert_eq!(faulty(|spec| spec.image = "evil".into()), Some("image"));
        assert_eq!(
            faulty(|spec| spec.image = "xbusybox:1".into()),
            Some("image")
        );
        assert_eq!(faulty(|spec| spec.image = "ghcr.io/ours/a:b".into()), None);
        assert_eq!(faulty(|spec| spec.ipc = Ipc::Host), Some("ipc"));
        assert_eq!(faulty(|spec| spec.memory_mib = Some(101)), Some("memory"));
        assert_eq!(
            faulty(|spec| spec.networks = vec!["host".into()]),
            Some("networks")
        );
        for (source, expected) in [
            ("/", Some("volumes")),
            ("/srv", Some("volumes")),
            ("/srv/modelsx", Some("volumes")),
            ("/srv/models/../../etc", Some("volumes")),
            ("/srv/models", None),
            ("/srv/models/a", None),
            ("cache", None),
            ("cache2", Some("volumes")),
        ] {
            assert_eq!(
                faulty(|spec| spec.volumes = vec![volume(source)]),
                expected,
                "{source}"
            );
        }
    }

    #[test]
    fn a_link_that_leads_out_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let allowed = dir.path().join("allowed");
        std::fs::create_dir_all(allowed.join("in")).unwrap();
        std::os::unix::fs::symlink("/etc", allowed.join("out")).unwrap();
        let rules = ContainerRules {
            volumes: vec![allowed.display().to_string()],
            ..ContainerRules::default()
        };
        let at = |name: &str| volume(&allowed.join(name).display().to_string());
        assert!(rules.resolve(&at("in")).is_ok());
        assert!(rules.resolve(&at("out")).is_err());
        assert!(rules.resolve(&at("absent")).is_err());
    }
}
