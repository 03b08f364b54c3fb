//! Whose a process is: an instance of ours, by its mark or by the container it is in. A process that has ended and
//! still holds memory belongs to whom it belonged.

use std::collections::HashMap;
use std::path::Path;

use super::reading::GpuReading;
use crate::domain::ids::{Generation, ServiceName};

/// One life of a service.
pub type Owner = (ServiceName, Generation);

/// Who knows whose a process is.
pub trait Owners: Send + 'static {
    /// The instance that a live process belongs to, by its environment.
    fn of_process(&self, pid: u32) -> Option<Owner>;

    /// The instance that a container belongs to; the id as the kernel's groups name it.
    fn of_container(&self, id: &str) -> Option<Owner>;
}

/// Remembers whose processes were.
#[derive(Default)]
pub struct Attribution {
    known: HashMap<u32, Owner>,
}

impl Attribution {
    /// Fills in the owners of all processes of one sample.
    pub fn attribute(&mut self, gpus: &mut [GpuReading], owners: &dyn Owners, proc: &Path) {
        let mut seen = HashMap::new();
        for process in gpus.iter_mut().flat_map(|gpu| &mut gpu.processes) {
            let owner = match proc.join(process.pid.to_string()).exists() {
                true => owners.of_process(process.pid).or_else(|| {
                    let groups = proc.join(process.pid.to_string()).join("cgroup");
                    let groups = std::fs::read_to_string(groups).ok()?;
                    owners.of_container(super::container_of(&groups)?)
                }),
                false => self.known.get(&process.pid).cloned(),
            };
            if let Some(owner) = &owner {
                seen.insert(process.pid, owner.clone());
            }
            process.owner = owner;
        }
        self.known = seen;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::samples::tests::{gpu, process};

    struct Known;

    impl Owners for Known {
        fn of_process(&self, pid: u32) -> Option<Owner> {
            (pid == 7).then(|| ("marked".into(), Generation(1)))
        }

        fn of_container(&self, id: &str) -> Option<Owner> {
            id.starts_with("abc")
                .then(|| ("contained".into(), Generation(2)))
        }
    }

    #[test]
    fn marks_come_first_then_containers_and_the_dead_keep_their_owner() {
        let proc = tempfile::tempdir().unwrap();
        let id = format!("abc{}", "0".repeat(61));
        for (pid, groups) in [
            ("7", "0::/user.slice\n".to_owned()),
            ("8", format!("0::/system.slice/docker-{id}.scope\n")),
            ("9", "0::/user.slice\n".to_owned()),
        ] {
            std::fs::create_dir(proc.path().join(pid)).unwrap();
            std::fs::write(proc.path().join(pid).join("cgroup"), groups).unwrap();
        }
        let mut attribution = Attribution::default();
        let mut look = || {
            let mut gpus = [gpu("a", 100, 0)];
            gpus[0].processes = [7, 8, 9].map(|pid| process(pid, 1)).to_vec();
            attribution.attribute(&mut gpus, &Known, proc.path());
            let [gpu] = gpus;
            let owners = gpu.processes.into_iter().map(|p| Some(p.owner?.0));
            owners.collect::<Vec<_>>()
        };
        let expected = [Some("marked".into()), Some("contained".into()), None];
        assert_eq!(look(), expected);
        std::fs::remove_dir_all(proc.path().join("7")).unwrap();
        assert_eq!(look(), expected, "the driver still lists it");
        std::fs::create_dir(proc.path().join("7")).unwrap();
        std::fs::remove_dir_all(proc.path().join("8")).unwrap();
        assert_eq!(look(), expected);
    }
}
