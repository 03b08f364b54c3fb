//! GPUs as plain facts: which there are, and what is measured of them. What is done with them is the scheduler's
//! business; nothing here knows of reservations, except as numbers handed in.
//!
//! `setting` what is asked for, `nvml` and `amd` and `host` the machine's answers, `reading` their common form, `sampler` asks
//! again and again, `samples` keeps the answers, `attribution` whose the processes are, `cgroup` which container, `watch` what is
//! worth telling, `usage` minutes summed up, `release` whether memory came free.

mod amd;
mod attribution;
mod cgroup;
mod host;
mod nvml;
mod reading;
mod release;
mod sampler;
mod samples;
mod setting;
mod usage;
mod watch;

use std::path::PathBuf;

pub use attribution::{Owner, Owners};
pub use cgroup::container_of;
pub use reading::{Fault, GpuReading, ProcessReading};
pub use release::{Freed, freed};
pub use sampler::{Sampler, start};
pub use samples::{Sample, Samples};
pub use setting::{InventoryError, Wanted, wanted};
pub use usage::Minutes;
pub use watch::Watch;

use crate::domain::spec::GpuFacts;

/// Where the machine's GPUs are asked for.
#[derive(Clone, Debug)]
pub struct Machine {
    /// NVIDIA's management library; empty finds it by its usual name.
    pub nvml_library: String,
    /// Where the kernel tells of its devices.
    pub sysfs: PathBuf,
    pub proc: PathBuf,
}

impl Machine {
    /// This one.
    pub fn here(nvml_library: &str) -> Machine {
        Machine {
            nvml_library: nvml_library.to_owned(),
            sysfs: PathBuf::from("/sys"),
            proc: PathBuf::from("/proc"),
        }
    }
}

/// The machine's GPUs, or why there are none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inventory {
    pub gpus: Vec<GpuFacts>,
    /// Why `gpus` is empty, as a sentence for people.
    pub reason: Option<String>,
    /// They are real, and may come and go.
    pub is_measured: bool,
}

/// Lists the GPUs. `setting` is the value of `RUNGATE_GPUS`.
pub fn inventory(setting: &str, machine: &Machine) -> Result<Inventory, InventoryError> {
    let none = |reason: String| Inventory {
        gpus: Vec::new(),
        reason: Some(reason),
        is_measured: false,
    };
    Ok(match wanted(setting)? {
        Wanted::None => none("The setting 'gpus' is 'none'.".into()),
        Wanted::Simulated(gpus) => Inventory {
            gpus,
            reason: None,
            is_measured: false,
        },
        Wanted::Machine => ask(machine),
    })
}

/// NVIDIA's and AMD's. What answers at all may have more later, so it is measured even when it has none now.
fn ask(machine: &Machine) -> Inventory {
    let (mut gpus, mut answers) = (Vec::new(), false);
    let reason = match nvml::list(&machine.nvml_library) {
        Ok((found, why)) => {
            answers = true;
            gpus.extend(found);
            why.to_owned()
        }
        Err(reason) => reason,
    };
    let first = u32::try_from(gpus.len()).unwrap_or(0);
    let found = amd::Amd::new(machine).read(first);
    answers |= !found.is_empty();
    gpus.extend(found.into_iter().map(|gpu| gpu.facts));
    Inventory {
        reason: gpus.is_empty().then_some(reason),
        gpus,
        is_measured: answers,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nowhere() -> Machine {
        Machine {
            nvml_library: "/nowhere/libnvidia-ml.so.1".into(),
            sysfs: "/nowhere".into(),
            proc: "/nowhere".into(),
        }
    }

    #[test]
    fn without_a_gpu_the_reason_is_one_sentence() {
        for setting in ["", "none"] {
            let listed = inventory(setting, &nowhere()).unwrap();
            assert!(listed.gpus.is_empty() && !listed.is_measured);
            let reason = listed.reason.unwrap();
            assert!(reason.ends_with('.') && !reason.contains('\n'), "{reason}");
        }
    }

    #[test]
    fn a_machine_is_not_asked_when_gpus_are_simulated() {
        let listed = inventory("sim:1GiB", &nowhere()).unwrap();
        assert_eq!(listed.gpus.len(), 1);
        assert_eq!(listed.reason, None);
    }
}
