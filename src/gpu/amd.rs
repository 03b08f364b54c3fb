//! AMD's GPUs, as the kernel's amdgpu driver tells of them in sysfs.

use std::fs;
use std::path::{Path, PathBuf};

use smol_str::{SmolStr, ToSmolStr, format_smolstr};

use super::Machine;
use super::nvml::name_of;
use super::reading::{GpuReading, ProcessReading};
use crate::domain::spec::{GpuFacts, GpuSource};

const MIB: u64 = 1 << 20;

/// Reads below `class/drm` and `class/kfd`.
pub struct Amd {
    sysfs: PathBuf,
    proc: PathBuf,
}

impl Amd {
    pub fn new(machine: &Machine) -> Amd {
        Amd {
            sysfs: machine.sysfs.clone(),
            proc: machine.proc.clone(),
        }
    }

    /// All of them at this moment, numbered from `first`.
    pub fn read(&self, first: u32) -> Vec<GpuReading> {
        let mut cards: Vec<(u32, PathBuf)> = entries(&self.sysfs.join("class/drm"))
            .filter_map(|path| {
                // Outputs are named `card0-DP-1`.
                let number = name(&path)?.strip_prefix("card")?.parse().ok()?;
                Some((number, path.join("device")))
            })
            .collect();
        cards.sort_unstable();
        let readings = cards
            .into_iter()
            .filter_map(|(_, device)| self.card(&device));
        let numbered = (first..).zip(readings).map(|(index, mut reading)| {
            reading.facts.index = index;
            reading
        });
        numbered.collect()
    }

    /// `None` for another driver's card.
    fn card(&self, device: &Path) -> Option<GpuReading> {
        let total = number(&device.join("mem_info_vram_total"))?;
        let used = number(&device.join("mem_info_vram_used"))?;
        let hwmon = entries(&device.join("hwmon")).min();
        let sensor = |file: &str| number(&hwmon.as_ref()?.join(file));
        let unique_id = text(&device.join("unique_id"));
        // The runtime's own names: `GPU-` and 16 hexadecimal digits.
        let uuid = match &unique_id {
            Some(id) => format_smolstr!("GPU-{}", id.trim_start_matches("0x")),
            None => format_smolstr!("AMD-{}", bus_address(device)?),
        };
        let product = text(&device.join("product_name"));
        let microwatts = sensor("power1_average").or_else(|| sensor("power1_input"));
        Some(GpuReading {
            facts: GpuFacts {
                uuid,
                index: 0,
                name: product.unwrap_or_else(|| SmolStr::new_static("AMD GPU")),
                memory_mib: total / MIB,
                source: GpuSource::Amdgpu,
            },
            parent: None,
            unified: false,
            used_mib: used / MIB,
            free_mib: total.saturating_sub(used) / MIB,
            utilization_pct: small(number(&device.join("gpu_busy_percent"))),
            temperature_c: small(sensor("temp1_input").map(|milli| milli / 1_000)),
            power_mw: microwatts.map(|micro| micro / 1_000),
            clock_mhz: small(sensor("freq1_input").map(|hz| hz / 1_000_000)),
            memory_clock_mhz: small(sensor("freq2_input").map(|hz| hz / 1_000_000)),
            ecc_uncorrected: uncorrected(&device.join("ras/umc_err_count")),
            processes: unique_id.map_or_else(Vec::new, |id| self.processes(&id)),
        })
    }

    /// Those that compute there, as the kernel's compute driver lists them.
    fn processes(&self, unique_id: &str) -> Vec<ProcessReading> {
        let kfd = self.sysfs.join("class/kfd/kfd");
        let wanted = u64::from_str_radix(unique_id.trim_start_matches("0x"), 16).ok();
        let node = entries(&kfd.join("topology/nodes")).find(|node| {
            let own = property(&node.join("properties"), "unique_id");
            own.is_some() && own == wanted
        });
        let Some(gpu_id) = node.and_then(|node| number(&node.join("gpu_id"))) else {
            return Vec::new();
        };
        let mut all: Vec<ProcessReading> = entries(&kfd.join("proc"))
            .filter_map(|process| {
                let pid = name(&process)?.parse().ok()?;
                let bytes = number(&process.join(format!("vram_{gpu_id}")))?;
                (bytes > 0).then(|| ProcessReading {
                    pid,
                    name: name_of(&self.proc, pid),
                    memory_mib: Some(bytes / MIB),
                    computes: true,
                    draws: false,
                    owner: None,
                })
            })
            .collect();
        all.sort_unstable_by_key(|process| process.pid);
        all
    }
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let read = fs::read_dir(dir).into_iter().flatten();
    read.filter_map(|entry| Some(entry.ok()?.path()))
}

fn name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

/// A file's text without the white space around it; `None` when there is none.
fn text(path: &Path) -> Option<SmolStr> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_smolstr())
}

fn number(path: &Path) -> Option<u64> {
    text(path)?.parse().ok()
}

fn small(number: Option<u64>) -> Option<u32> {
    u32::try_from(number?).ok()
}

/// A value in a file of lines `name value`.
fn property(path: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    line.trim().parse().ok()
}

/// The count after `ue:`.
fn uncorrected(path: &Path) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("ue:"))?;
    line.trim().parse().ok()
}

/// `PCI_SLOT_NAME` of its `uevent`.
fn bus_address(device: &Path) -> Option<SmolStr> {
    let text = fs::read_to_string(device.join("uevent")).ok()?;
    let slot = text
        .lines()
        .find_map(|line| line.strip_prefix("PCI_SLOT_NAME="))?;
    Some(slot.trim().to_smolstr())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, file: &str, text: &str) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn machine(root: &Path) -> Machine {
        Machine {
            nvml_library: String::new(),
            sysfs: root.join("sys"),
            proc: root.join("proc"),
        }
    }

    /// Two cards of AMD's, one of somebody else's, an output, and two processes.
    fn made() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let card = |file: &str, text: &str| {
            write(root, &format!("sys/class/drm/card1/device/{file}"), text)
        };
        card("mem_info_vram_total", "25753026560\n");
        card("mem_info_vram_used", "1073741824\n");
        card("gpu_busy_percent", "37\n");
        card("unique_id", "1a2b3c4d5e6f7081\n");
        card("product_name", "AMD Instinct MI300X\n");
        card("hwmon/hwmon4/temp1_input", "51000\n");
        card("hwmon/hwmon4/power1_average", "123000000\n");
        card("hwmon/hwmon4/freq1_input", "1700000000\n");
        card("hwmon/hwmon4/freq2_input", "900000000\n");
        card("ras/umc_err_count", "ue: 2\nce: 5\n");
        let plain = |file: &str, text: &str| {
            write(root, &format!("sys/class/drm/card10/device/{file}"), text)
        };
        plain("mem_info_vram_total", "536870912\n");
        plain("mem_info_vram_used", "0\n");
        plain("uevent", "DRIVER=amdgpu\nPCI_SLOT_NAME=0000:0b:00.0\n");
        write(root, "sys/class/drm/card0/device/vendor", "0x10de\n");
        write(root, "sys/class/drm/card1-DP-1/status", "connected\n");
        write(
            root,
            "sys/class/kfd/kfd/topology/nodes/0/properties",
            "cpu_cores_count 16\nunique_id 0\n",
        );
        write(
            root,
            "sys/class/kfd/kfd/topology/nodes/1/properties",
            "simd_count 304\nunique_id 1885667171979194497\n",
        );
        write(root, "sys/class/kfd/kfd/topology/nodes/1/gpu_id", "51234\n");
        write(root, "sys/class/kfd/kfd/proc/77/vram_51234", "536870912\n");
        write(root, "sys/class/kfd/kfd/proc/78/vram_51234", "0\n");
        write(root, "sys/class/kfd/kfd/proc/79/vram_9", "536870912\n");
        write(root, "proc/77/comm", "python3\n");
        dir
    }

    #[test]
    fn all_of_amdgpu_are_read_and_no_others() {
        let dir = made();
        let gpus = Amd::new(&machine(dir.path())).read(3);
        let [one, two] = gpus.as_slice() else {
            panic!("{gpus:?}");
        };
        assert_eq!(one.facts.uuid, "GPU-1a2b3c4d5e6f7081");
        assert_eq!((one.facts.index, one.facts.memory_mib), (3, 24_560));
        assert_eq!(one.facts.name, "AMD Instinct MI300X");
        assert_eq!((one.used_mib, one.free_mib), (1_024, 23_536));
        assert_eq!(
            (one.utilization_pct, one.temperature_c),
            (Some(37), Some(51))
        );
        assert_eq!((one.power_mw, one.clock_mhz), (Some(123_000), Some(1_700)));
        assert_eq!(
            (one.memory_clock_mhz, one.ecc_uncorrected),
            (Some(900), Some(2))
        );
        let [process] = one.processes.as_slice() else {
            panic!("{:?}", one.processes);
        };
        assert_eq!((process.pid, process.memory_mib), (77, Some(512)));
        assert_eq!(process.name, "python3");
        assert_eq!(two.facts.uuid, "AMD-0000:0b:00.0");
        assert_eq!((two.facts.index, two.temperature_c), (4, None));
    }

    #[test]
    fn a_machine_without_any_has_none() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Amd::new(&machine(dir.path())).read(0).is_empty());
    }
}
