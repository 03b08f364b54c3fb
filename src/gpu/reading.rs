//! What is read of one GPU at one moment, wherever it was read. `None` stands for what it does not tell.

use smol_str::SmolStr;

use super::attribution::Owner;
use crate::domain::ids::GpuUuid;
use crate::domain::machine::QuarantineCause;
use crate::domain::spec::GpuFacts;

/// One GPU at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuReading {
    pub facts: GpuFacts,
    /// The GPU that it is a part of.
    pub parent: Option<GpuUuid>,
    /// It has no memory of its own: what is told is the system's.
    pub unified: bool,
    /// MiB that programs use.
    pub used_mib: u64,
    /// MiB that a program could still have. Less than the rest where the driver keeps some for itself.
    pub free_mib: u64,
    pub utilization_pct: Option<u32>,
    pub temperature_c: Option<u32>,
    pub power_mw: Option<u64>,
    pub clock_mhz: Option<u32>,
    pub memory_clock_mhz: Option<u32>,
    /// Uncorrected memory errors since the driver was loaded.
    pub ecc_uncorrected: Option<u64>,
    pub processes: Vec<ProcessReading>,
}

/// A process that uses a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessReading {
    pub pid: u32,
    pub name: SmolStr,
    /// `None` where the driver does not tell.
    pub memory_mib: Option<u64>,
    /// It computes, or draws, or both.
    pub computes: bool,
    pub draws: bool,
    /// Whose it is, when it is ours.
    pub owner: Option<Owner>,
}

impl ProcessReading {
    /// `C`, `G` or `C+G`, as the vendor's tool shows it.
    pub fn kind(&self) -> &'static str {
        match (self.computes, self.draws) {
            (true, true) => "C+G",
            (false, true) => "G",
            _ => "C",
        }
    }
}

impl GpuReading {
    /// MiB that nobody can have: used, or kept by the driver.
    pub fn taken_mib(&self) -> u64 {
        self.facts.memory_mib.saturating_sub(self.free_mib)
    }

    /// MiB that the listed processes hold.
    pub fn listed_mib(&self) -> u64 {
        self.processes.iter().filter_map(|p| p.memory_mib).sum()
    }

    /// MiB that are taken and that no listed process accounts for.
    pub fn unlisted_mib(&self) -> u64 {
        match self.unified {
            true => 0,
            false => self.taken_mib().saturating_sub(self.listed_mib()),
        }
    }

    /// MiB that an instance's processes hold; `None` when it has none here.
    pub fn held_by(&self, owner: &Owner) -> Option<u64> {
        let own = || {
            let processes = self.processes.iter();
            processes.filter(|process| process.owner.as_ref() == Some(owner))
        };
        own().next()?;
        Some(own().filter_map(|process| process.memory_mib).sum())
    }
}

/// A reason to put a GPU in quarantine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub gpu: GpuUuid,
    pub cause: QuarantineCause,
    pub detail: String,
}
