//! The setting `RUNGATE_GPUS`: simulated GPUs, none at all, or those that the machine has.

use smol_str::{SmolStr, format_smolstr};

use crate::domain::spec::{GpuFacts, GpuSource, SIMULATED_GPU};

/// More GPUs than any single machine has: a longer list is a mistake.
const GPUS_MAX: usize = 64;
/// One PiB in MiB: a larger GPU is a mistake, and sums of all stay far from overflow.
const MEMORY_MAX_MIB: u64 = 1 << 30;

/// What the setting asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The machine's own.
    Machine,
    /// None, whatever the machine has.
    None,
    Simulated(Vec<GpuFacts>),
}

/// A value of `RUNGATE_GPUS` that means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "setting 'gpus' is '{value}': {problem}; write it like sim:24GiB,24GiB, or `none`, or leave it empty"
)]
pub struct InventoryError {
    pub value: String,
    pub problem: String,
}

/// What a value of `RUNGATE_GPUS` asks for.
pub fn wanted(value: &str) -> Result<Wanted, InventoryError> {
    let value = value.trim();
    if value.is_empty() {
        return Ok(Wanted::Machine);
    }
    if value == "none" {
        return Ok(Wanted::None);
    }
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
    Ok(Wanted::Simulated(gpus))
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
        let Wanted::Simulated(gpus) = wanted("sim:24GiB, 512MiB").unwrap() else {
            panic!("they are simulated");
        };
        let told: Vec<_> = gpus
            .iter()
            .map(|gpu| (gpu.uuid.as_str(), gpu.index, gpu.memory_mib))
            .collect();
        assert_eq!(told, [("SIM-0", 0, 24 * 1024), ("SIM-1", 1, 512)]);
        assert!(gpus.iter().all(|gpu| gpu.source == GpuSource::Simulated));
        assert!(gpus.iter().all(|gpu| gpu.name == "Simulated GPU"));
    }

    #[test]
    fn an_empty_setting_asks_the_machine_and_none_does_not() {
        for setting in ["", "  "] {
            assert_eq!(wanted(setting), Ok(Wanted::Machine));
        }
        assert_eq!(wanted("none"), Ok(Wanted::None));
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
            let text = wanted(value).unwrap_err().to_string();
            assert!(
                text.starts_with(&format!("setting 'gpus' is '{value}': ")),
                "{text}"
            );
            assert!(!text.contains('\n'));
        }
    }
}
