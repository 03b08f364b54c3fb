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
    /// The instance that a process belongs to, by its environment; `None` when it has ended.
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
            let pid = process.pid;
            let owner = owners.of_process(pid).or_else(|| {
                let groups = proc.join(pid.to_string()).join("cgroup");
                let groups = std::fs::read_to_string(groups).ok()?;
                owners.of_container(super::container_of(&groups)?)
            });
            // One that is ending has no environment any more, and one that has ended may still be listed.
            let owner = owner.or_else(|| self.known.get(&pid).cloned());
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

    /// All have ended.
    struct Gone;

    impl Owners for Gone {
        fn of_process(&self, _: u32) -> Option<Owner> {
            None
        }

        fn of_container(&self, _: &str) -> Option<Owner> {
            None
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
        let mut look = |owners: &dyn Owners, pids: &[u32]| {
            let mut gpus = [gpu("a", 100, 0)];
            gpus[0].processes = pids.iter().map(|pid| process(*pid, 1)).collect();
            attribution.attribute(&mut gpus, owners, proc.path());
            let [gpu] = gpus;
            let owners = gpu.processes.into_iter().map(|p| Some(p.owner?.0));
            owners.collect::<Vec<_>>()
        };
        let expected = [Some("marked".into()), Some("contained".into()), None];
        assert_eq!(look(&Known, &[7, 8, 9]), expected);
        std::fs::remove_dir_all(proc.path().join("8")).unwrap();
        assert_eq!(
            look(&Gone, &[7, 8, 9]),
            expected,
            "the driver lists them still"
        );
        assert_eq!(look(&Gone, &[9]), [None]);
        let strangers = [None, None, None];
        assert_eq!(
            look(&Gone, &[7, 8, 9]),
            strangers,
            "the numbers are others' now"
        );
    }
}
