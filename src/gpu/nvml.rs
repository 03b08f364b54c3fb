//! NVIDIA's GPUs by its management library, which is loaded when it is asked for: without it, or without a driver,
//! there are none, and all else works.

use std::path::Path;

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{Clock, EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use nvml_wrapper::{Device, EventSet, Nvml};
use smol_str::{SmolStr, ToSmolStr};

use super::host;
use super::reading::{GpuReading, ProcessReading};
use crate::domain::ids::GpuUuid;
use crate::domain::spec::{GpuFacts, GpuSource};

/// Exists while NVIDIA's kernel module is loaded.
const DRIVER_VERSION_FILE: &str = "/proc/driver/nvidia/version";

const MIB: u64 = 1 << 20;

/// How often a list of processes is asked for that grew while it was told.
const LIST_TRIES: u32 = 3;

/// The library, loaded and ready.
pub fn open(library: &str) -> Result<Nvml, String> {
    let loaded = match library {
        "" => Nvml::init(),
        path => Nvml::builder().lib_path(path.as_ref()).init(),
    };
    loaded.map_err(|error| reason(library, &error))
}

/// What is read at once.
pub struct Read {
    pub gpus: Vec<GpuReading>,
    /// Some GPU did not answer.
    pub failed: bool,
}

/// The GPUs as they are listed, and a sentence for when there are none.
pub fn list(library: &str) -> Result<(Vec<GpuFacts>, &'static str), String> {
    let nvml = open(library)?;
    let read = read(&nvml, Path::new("/proc"));
    let why = match read.failed {
        true => {
            "The NVIDIA driver is loaded, but its GPUs do not answer; see what `nvidia-smi` says."
        }
        false => "The NVIDIA driver is loaded, and it tells of no GPU.",
    };
    Ok((read.gpus.into_iter().map(|gpu| gpu.facts).collect(), why))
}

fn reason(library: &str, error: &NvmlError) -> String {
    let is_loaded = Path::new(DRIVER_VERSION_FILE).exists();
    match (error, library) {
        (NvmlError::LibloadingError(_), "") if is_loaded => {
            "The NVIDIA driver is loaded, but its management library was not found; name it by the setting 'nvml_library'.".into()
        }
        (NvmlError::LibloadingError(_), "") => "No NVIDIA driver was found on this machine.".into(),
        (NvmlError::LibloadingError(_), path) => {
            format!("The NVIDIA driver's library '{path}' cannot be loaded; check the setting 'nvml_library'.")
        }
        (NvmlError::DriverNotLoaded, _) => "The NVIDIA driver is not loaded on this machine.".into(),
        (NvmlError::LibRmVersionMismatch, _) => {
            "The NVIDIA driver and its library are of different versions; restart the machine.".into()
        }
        (error, _) => format!("The NVIDIA driver does not answer: {error}."),
    }
}

/// All GPUs at this moment: those that are divided by their parts, the others as they are.
pub fn read(nvml: &Nvml, proc: &Path) -> Read {
    let (mut gpus, mut failed) = (Vec::new(), false);
    let Ok(count) = nvml.device_count() else {
        return Read { gpus, failed: true };
    };
    for index in 0..count {
        match read_device(nvml, index, proc) {
            Ok(found) => gpus.extend(found),
            Err(error) => {
                tracing::debug!(gpu.index = index, %error, "a GPU does not answer");
                failed = true;
            }
        }
    }
    Read { gpus, failed }
}

fn read_device(nvml: &Nvml, index: u32, proc: &Path) -> Result<Vec<GpuReading>, NvmlError> {
    let device = nvml.device_by_index(index)?;
    let is_divided = device.mig_mode().is_ok_and(|mode| mode.current == 1);
    if !is_divided {
        return Ok(vec![read_one(&device, index, proc)?]);
    }
    let uuid = device.uuid()?.to_smolstr();
    let mut parts = Vec::new();
    for part in 0..device.mig_device_count()? {
        // Slots without a part are not found.
        let Ok(part) = device.mig_device_by_index(part) else {
            continue;
        };
        let mut reading = read_one(&part, index, proc)?;
        reading.parent = Some(uuid.clone());
        reading.temperature_c = reading.temperature_c.or_else(|| temperature(&device));
        reading.power_mw = reading.power_mw.or_else(|| power_mw(&device));
        reading.ecc_uncorrected = reading.ecc_uncorrected.or_else(|| uncorrected(&device));
        parts.push(reading);
    }
    Ok(parts)
}

/// Memory is read before the processes: one that is listed was there when the memory was.
fn read_one(device: &Device<'_>, index: u32, proc: &Path) -> Result<GpuReading, NvmlError> {
    let uuid = device.uuid()?.to_smolstr();
    let memory = match device.memory_info() {
        Ok(memory) => Some(memory),
        Err(NvmlError::NotSupported) => None,
        Err(error) => return Err(error),
    };
    let processes = processes(device, proc)?;
    let listed: u64 = processes.iter().filter_map(|p| p.memory_mib).sum();
    let (total_mib, used_mib, free_mib) = match &memory {
        Some(memory) => (memory.total / MIB, memory.used / MIB, memory.free / MIB),
        None => {
            let host = host::memory(proc).ok_or(NvmlError::NotSupported)?;
            (host.total_mib, listed, host.available_mib)
        }
    };
    Ok(GpuReading {
        facts: GpuFacts {
            uuid,
            index,
            name: device.name()?.to_smolstr(),
            memory_mib: total_mib,
            source: GpuSource::Nvml,
        },
        parent: None,
        unified: memory.is_none(),
        used_mib,
        free_mib,
        utilization_pct: device.utilization_rates().ok().map(|rates| rates.gpu),
        temperature_c: temperature(device),
        power_mw: power_mw(device),
        clock_mhz: device.clock_info(Clock::Graphics).ok(),
        memory_clock_mhz: device.clock_info(Clock::Memory).ok(),
        ecc_uncorrected: uncorrected(device),
        processes,
    })
}

fn temperature(device: &Device<'_>) -> Option<u32> {
    device.temperature(TemperatureSensor::Gpu).ok()
}

fn power_mw(device: &Device<'_>) -> Option<u64> {
    device.power_usage().ok().map(u64::from)
}

fn uncorrected(device: &Device<'_>) -> Option<u64> {
    let errors = device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile);
    errors.ok()
}

/// Those that compute and those that draw; one that does both is one.
fn processes(device: &Device<'_>, proc: &Path) -> Result<Vec<ProcessReading>, NvmlError> {
    let computing = listed(|| device.running_compute_processes())?;
    let drawing = listed(|| device.running_graphics_processes())?;
    let mut all: Vec<ProcessReading> = Vec::new();
    let kinds = computing.into_iter().map(|info| (info, true));
    for (info, computes) in kinds.chain(drawing.into_iter().map(|info| (info, false))) {
        let memory_mib = match info.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes / MIB),
            UsedGpuMemory::Unavailable => None,
        };
        if let Some(known) = all.iter_mut().find(|known| known.pid == info.pid) {
            known.computes |= computes;
            known.draws |= !computes;
            known.memory_mib = known.memory_mib.max(memory_mib);
            continue;
        }
        all.push(ProcessReading {
            pid: info.pid,
            name: name_of(proc, info.pid),
            memory_mib,
            computes,
            draws: !computes,
            owner: None,
        });
    }
    Ok(all)
}

fn listed(
    ask: impl Fn() -> Result<Vec<ProcessInfo>, NvmlError>,
) -> Result<Vec<ProcessInfo>, NvmlError> {
    let mut tries = LIST_TRIES;
    loop {
        tries -= 1;
        match ask() {
            Err(NvmlError::InsufficientSize(_)) if tries > 0 => {}
            // All that is taken counts as strangers' then.
            Err(
                NvmlError::NotSupported
                | NvmlError::NoPermission
                | NvmlError::FailedToLoadSymbol(_),
            ) => return Ok(Vec::new()),
            outcome => return outcome,
        }
    }
}

/// The process's short name, empty when it is gone.
pub fn name_of(proc: &Path, pid: u32) -> SmolStr {
    let name = std::fs::read_to_string(proc.join(pid.to_string()).join("comm"));
    name.map_or(SmolStr::default(), |name| name.trim_end().to_smolstr())
}

/// Where the driver tells of errors, of all GPUs that can; `None` when none can.
pub fn events(nvml: &Nvml) -> Option<EventSet<'_>> {
    let wanted = EventTypes::CRITICAL_XID_ERROR;
    // A set to which one GPU could not be added is gone: so it is tried first which can.
    let able: Vec<Device<'_>> = (0..nvml.device_count().ok()?)
        .filter_map(|index| {
            let device = nvml.device_by_index(index).ok()?;
            let trial = device.register_events(wanted, nvml.create_event_set().ok()?);
            trial.ok().map(|_| device)
        })
        .collect();
    let set = (!able.is_empty()).then(|| nvml.create_event_set().ok())??;
    able.iter()
        .try_fold(set, |set, device| device.register_events(wanted, set).ok())
}

/// The next error that a driver reports within `timeout_ms`: of which GPU, and its number. A GPU that the error has
/// taken off the bus cannot say which it is. `Err` when nothing can be waited for just now.
pub fn next_xid(
    set: &EventSet<'_>,
    timeout_ms: u32,
) -> Result<Option<(Option<GpuUuid>, u64)>, NvmlError> {
    match set.wait(timeout_ms) {
        Ok(event) => {
            let xid = match event.event_data {
                Some(XidError::Value(number)) => number,
                Some(XidError::Unknown) => 999,
                None => return Ok(None),
            };
            let uuid = event.device.uuid().ok();
            Ok(Some((uuid.map(|uuid| uuid.to_smolstr()), xid)))
        }
        Err(NvmlError::Timeout) => Ok(None),
        Err(error) => Err(error),
    }
}
