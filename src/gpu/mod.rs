//! GPUs as plain facts. Today they are simulated ones, as the setting `RUNGATE_GPUS` describes them; what is
//! done with them is the scheduler's business.

use smol_str::{SmolStr, format_smolstr};

use crate::domain::spec::{GpuFacts, GpuSource, SIMULATED_GPU};

/// More GPUs than any single machine has: a longer list is a mistake.
const GPUS_MAX: usize = 64;
/// One PiB in MiB: a larger GPU is a mistake, and sums of all stay far from overflow.
const MEMORY_MAX_MIB: u64 = 1 << 30;

/// Exists while NVIDIA's kernel module is loaded.
const DRIVER_VERSION_FILE: &str = "/proc/driver/nvidia/version";

/// The machine's GPUs, or why there are none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inventory {
    pub gpus: Vec<GpuFacts>,
    /// Why `gpus` is empty, as a sentence for people.
    pub reason: Option<String>,
}

/// A value of `RUNGATE_GPUS` that means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("setting 'gpus' is '{value}': {problem}; write it like sim:24GiB,24GiB")]
pub struct InventoryError {
    pub value: String,
    pub problem: String,
}

/// Lists the GPUs. `setting` is the value of `RUNGATE_GPUS`; `None` or an empty text asks the machine.
pub fn inventory(setting: Option<&str>) -> Result<Inventory, InventoryError> {
    let Some(value) = setting.map(str::trim).filter(|value| !value.is_empty()) else {
        return Ok(Inventory {
            gpus: Vec::new(),
            reason: Some(reason_for_none().into()),
        });
    };
    let error = |problem: String| InventoryError {
        value: value.into(),
        problem,
    };
    let Some(list) = value.strip_prefix("sim:") else {
        return Err(error("only simulated GPUs can be set".into()));
    };
    let sizes = list
        .split(',')
        .map(|size| memory_mib(size.trim()))
        .collect::<Result<Vec<u64>, String>>()
        .map_err(error)?;
    if sizes.len() > GPUS_MAX {
        return Err(error(format!(
            "{} GPUs are more than {GPUS_MAX}",
            sizes.len()
        )));
    }
    let gpus = (0..)
        .zip(sizes)
        .map(|(index, memory_mib)| simulated(index, memory_mib))
        .collect();
    Ok(Inventory { gpus, reason: None })
}

fn reason_for_none() -> &'static str {
    if std::path::Path::new(DRIVER_VERSION_FILE).exists() {
        "An NVIDIA driver is loaded, but this version of Rungate does not read its GPUs; RUNGATE_GPUS simulates some."
    } else {
        "No NVIDIA driver was found on this machine."
    }
}

fn simulated(index: u32, memory_mib: u64) -> GpuFacts {
    GpuFacts {
        uuid: format_smolstr!("{SIMULATED_GPU}{index}"),
        index,
        name: SmolStr::new_static("Simulated GPU"),
        memory_mib,
        source: GpuSource::Simulated,
    }
}

/// `24GiB` or `512MiB` in MiB.
fn memory_mib(size: &str) -> Result<u64, String> {
    let (digits, factor) = if let Some(digits) = size.strip_suffix("GiB") {
        (digits, 1024)
    } else if let Some(digits) = size.strip_suffix("MiB") {
        (digits, 1)
    } else {
        return Err(format!("'{size}' is not a size in GiB or MiB"));
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("'{size}' is not a whole number of GiB or MiB"));
    }
    let mib = digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(factor));
    match mib {
        Some(0) => Err("a GPU has more than no memory".into()),
        Some(mib) if mib <= MEMORY_MAX_MIB => Ok(mib),
        _ => Err(format!("'{size}' is too large")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simulated_gpus_are_listed_as_such() {
        let gpus = inventory(Some("sim:24GiB, 512MiB")).unwrap().gpus;
        let told: Vec<_> = gpus
            .iter()
            .map(|gpu| (gpu.uuid.as_str(), gpu.index, gpu.memory_mib))
            .collect();
        assert_eq!(told, [("SIM-0", 0, 24 * 1024), ("SIM-1", 1, 512)]);
        assert!(gpus.iter().all(|gpu| gpu.source == GpuSource::Simulated));
        assert!(gpus.iter().all(|gpu| gpu.name == "Simulated GPU"));
    }

    #[test]
    fn without_a_setting_the_reason_is_told() {
        for setting in [None, Some(""), Some("  ")] {
            let listed = inventory(setting).unwrap();
            assert!(listed.gpus.is_empty());
            assert!(listed.reason.unwrap().contains("NVIDIA driver"));
        }
    }

    #[test]
    fn a_bad_setting_is_one_sentence_that_names_it() {
        let many = format!("sim:{}", vec!["1GiB"; 65].join(","));
        let bad = [
            "24GiB",
            "sim:",
            "sim:24",
            "sim:24GB",
            "sim:-1GiB",
            "sim:+1GiB",
            "sim:1.5GiB",
            "sim:0GiB",
            "sim:24GiB,",
            "sim:99999999999999999999GiB",
            "sim:1048577GiB",
            "nvml:0",
            &many,
        ];
        for value in bad {
            let text = inventory(Some(value)).unwrap_err().to_string();
            assert!(
                text.starts_with(&format!("setting 'gpus' is '{value}': ")),
                "{text}"
            );
            assert!(!text.contains('\n'));
        }
    }
}
