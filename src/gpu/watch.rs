//! What is worth telling of a sample: which GPUs there are, memory that others use, what services were seen to use,
//! faults. Noise is not told.

use std::collections::BTreeMap;

use super::attribution::Owner;
use super::reading::GpuReading;
use super::samples::Sample;
use crate::domain::command::Command;
use crate::domain::ids::{GpuUuid, ServiceName};
use crate::domain::machine::{QuarantineCause, Seen};
use crate::domain::spec::GpuFacts;

/// A GPU counts as gone when it is missing in so many samples in a row.
const GONE_AFTER: u32 = 2;
/// MiB by which others' memory has to change to be told.
const FOREIGN_STEP_MIB: u64 = 64;
/// Where it is the whole system's, which never rests: a part of all of it.
const UNIFIED_STEP_PARTS: u64 = 64;
/// MiB that count as nothing where nothing was before.
const NOTHING_MIB: u64 = 16;
/// MiB in which a service's peak grows.
const PEAK_STEP_MIB: u64 = 64;

/// MiB of a GPU granted to an instance.
pub type Granted = (GpuUuid, Owner, u64);

/// What was told so far.
#[derive(Default)]
pub struct Watch {
    listed: Option<Vec<GpuFacts>>,
    /// In how many samples in a row a listed GPU was missing.
    missing: BTreeMap<GpuUuid, u32>,
    foreign: BTreeMap<GpuUuid, u64>,
    peaks: BTreeMap<ServiceName, u64>,
    /// Uncorrected memory errors.
    errors: BTreeMap<GpuUuid, u64>,
}

impl Watch {
    /// What to tell of a sample, in order. `grants` are those of the instances at that time.
    pub fn look(&mut self, sample: &Sample, grants: &[Granted]) -> Vec<Command> {
        let mut told: Vec<Command> = Vec::new();
        // Before a GPU is said to be gone, what was wrong with it.
        let faults = sample.faults.iter().cloned().map(|fault| Seen::Fault {
            gpu: fault.gpu,
            cause: fault.cause,
            detail: fault.detail,
        });
        told.extend(faults.map(Command::Seen));
        told.extend(self.list(sample));
        for gpu in &sample.gpus {
            told.extend(self.errors(gpu));
            told.extend(self.foreign(gpu, grants));
        }
        told.extend(self.peaks(sample, grants));
        told
    }

    fn list(&mut self, sample: &Sample) -> Option<Command> {
        let mut gpus: Vec<GpuFacts> = sample.gpus.iter().map(|gpu| gpu.facts.clone()).collect();
        let seen = |uuid: &GpuUuid| sample.gpus.iter().any(|gpu| gpu.facts.uuid == *uuid);
        self.missing.retain(|uuid, _| !seen(uuid));
        for known in self.listed.iter().flatten() {
            if seen(&known.uuid) {
                continue;
            }
            let count = self.missing.entry(known.uuid.clone()).or_default();
            *count += 1;
            if *count < GONE_AFTER {
                gpus.push(known.clone());
            } else {
                // When it comes back, all of it is told anew.
                self.foreign.remove(&known.uuid);
                self.errors.remove(&known.uuid);
            }
        }
        gpus.sort_by(|a, b| (a.index, &a.uuid).cmp(&(b.index, &b.uuid)));
        if self.listed.as_ref() == Some(&gpus) {
            return None;
        }
        self.listed = Some(gpus.clone());
        Some(Command::GpusListed { gpus })
    }

    /// Those that were there at the first look are history.
    fn errors(&mut self, gpu: &GpuReading) -> Option<Command> {
        let errors = gpu.ecc_uncorrected?;
        let uuid = &gpu.facts.uuid;
        let before = self.errors.insert(uuid.clone(), errors)?;
        (errors > before).then(|| {
            Command::Seen(Seen::Fault {
                gpu: uuid.clone(),
                cause: QuarantineCause::Ecc,
                detail: format!(
                    "{} errors of its memory could not be corrected",
                    errors - before
                ),
            })
        })
    }

    fn foreign(&mut self, gpu: &GpuReading, grants: &[Granted]) -> Option<Command> {
        let uuid = &gpu.facts.uuid;
        let mib = foreign_mib(gpu, grants);
        let step = match gpu.unified {
            true => gpu.facts.memory_mib / UNIFIED_STEP_PARTS,
            false => FOREIGN_STEP_MIB,
        };
        let is_news = match self.foreign.get(uuid) {
            None => true,
            Some(&0) => mib > NOTHING_MIB,
            Some(before) => mib.abs_diff(*before) > step || mib == 0,
        };
        is_news.then(|| {
            self.foreign.insert(uuid.clone(), mib);
            Command::GpuForeignMemory {
                gpu: uuid.clone(),
                mib,
            }
        })
    }

    /// More than was granted, on any one GPU. Who has a GPU for itself takes of it what it likes.
    fn peaks(&mut self, sample: &Sample, grants: &[Granted]) -> Vec<Command> {
        let mut told = Vec::new();
        for (uuid, owner, granted) in grants {
            let reading = sample.gpus.iter().find(|gpu| gpu.facts.uuid == *uuid);
            let Some((gpu, held)) = reading.and_then(|gpu| Some((gpu, gpu.held_by(owner)?))) else {
                continue;
            };
            if *granted >= gpu.facts.memory_mib || held <= *granted {
                continue;
            }
            let could_have = held.saturating_add(gpu.free_mib);
            let mib = held.next_multiple_of(PEAK_STEP_MIB).min(could_have);
            let service = &owner.0;
            if self.peaks.get(service).is_none_or(|before| mib > *before) {
                self.peaks.insert(service.clone(), mib);
                told.push(Command::ServiceMemorySeen {
                    service: service.clone(),
                    mib,
                });
            }
        }
        told
    }
}

/// MiB that no grant accounts for: what strangers and the driver take, and what instances take beyond their grants.
fn foreign_mib(gpu: &GpuReading, grants: &[Granted]) -> u64 {
    let ours = grants.iter().filter(|(uuid, ..)| *uuid == gpu.facts.uuid);
    let ours: u64 = ours
        .map(|(_, owner, granted)| {
            let untold = |p: &super::ProcessReading| {
                p.owner.as_ref() == Some(owner) && p.memory_mib.is_none()
            };
            match gpu.processes.iter().any(untold) {
                true => *granted,
                false => gpu.held_by(owner).unwrap_or(0).min(*granted),
            }
        })
        .sum();
    gpu.taken_mib().saturating_sub(ours)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::Generation;
    use crate::gpu::reading::Fault;
    use crate::gpu::samples::tests::{gpu, process, sample};

    fn owner() -> Owner {
        ("s".into(), Generation(3))
    }

    /// A GPU of which an instance of ours holds `ours`.
    fn shared(taken: u64, ours: u64) -> GpuReading {
        let mut one = gpu("g", 24_000, taken);
        let mut own = process(1, ours);
        own.owner = Some(owner());
        one.processes.push(own);
        one
    }

    fn granted(mib: u64) -> Vec<Granted> {
        vec![("g".into(), owner(), mib)]
    }

    fn foreign(told: &[Command]) -> Vec<u64> {
        let one = |command: &Command| match command {
            Command::GpuForeignMemory { mib, .. } => Some(*mib),
            _ => None,
        };
        told.iter().filter_map(one).collect()
    }

    #[test]
    fn others_memory_is_told_when_it_changes_by_more_than_noise() {
        let mut watch = Watch::default();
        let mut look = |taken| foreign(&watch.look(&sample(vec![gpu("g", 24_000, taken)]), &[]));
        assert_eq!(look(0), [0]);
        assert!(look(10).is_empty(), "as good as nothing");
        assert_eq!(look(500), [500]);
        assert!(look(560).is_empty() && look(440).is_empty());
        assert_eq!(look(565), [565]);
        assert_eq!(look(0), [0]);
    }

    #[test]
    fn what_is_granted_and_held_is_ours_and_what_is_beyond_is_not() {
        let told = |taken, ours, grants: &[Granted]| {
            foreign(&Watch::default().look(&sample(vec![shared(taken, ours)]), grants))
        };
        assert_eq!(told(8_500, 8_000, &granted(10_000)), [500]);
        assert_eq!(told(12_500, 12_000, &granted(10_000)), [2_500]);
        assert_eq!(
            told(8_500, 8_000, &[]),
            [8_500],
            "nothing was granted to it"
        );
        let other = vec![("g".into(), ("s".into(), Generation(4)), 10_000)];
        assert_eq!(told(8_500, 8_000, &other), [8_500], "an older life's");
    }

    #[test]
    fn a_peak_is_told_upwards_and_in_steps() {
        let mut watch = Watch::default();
        let mut look = |held| {
            let told = watch.look(&sample(vec![shared(held, held)]), &granted(1_000));
            let seen = told.into_iter().filter_map(|command| match command {
                Command::ServiceMemorySeen { mib, .. } => Some(mib),
                _ => None,
            });
            seen.collect::<Vec<_>>()
        };
        assert!(look(900).is_empty() && look(1_000).is_empty());
        assert_eq!(look(1_001), [1_024]);
        assert!(look(1_024).is_empty() && look(500).is_empty());
        assert_eq!(look(1_025), [1_088]);
        assert_eq!(look(23_999), [24_000], "never more than it could have");
    }

    #[test]
    fn a_gpu_is_gone_after_two_samples_and_listed_when_it_is_back() {
        let mut watch = Watch::default();
        let mut look = |names: &[&str]| {
            let gpus = names.iter().map(|name| gpu(name, 1_000, 0)).collect();
            let told = watch.look(&sample(gpus), &[]);
            told.into_iter().find_map(|command| match command {
                Command::GpusListed { gpus } => {
                    Some(gpus.iter().map(|g| g.uuid.to_string()).collect::<Vec<_>>())
                }
                _ => None,
            })
        };
        let names = |names: &[&str]| Some(names.iter().map(|n| (*n).to_owned()).collect());
        assert_eq!(look(&["a", "b"]), names(&["a", "b"]));
        assert_eq!(look(&["a"]), None);
        assert_eq!(look(&["a", "b"]), None, "it was away for a moment");
        assert_eq!(look(&["a"]), None);
        assert_eq!(look(&["a"]), names(&["a"]));
        assert_eq!(look(&["a", "b"]), names(&["a", "b"]));
    }

    #[test]
    fn errors_count_from_the_first_look_and_faults_come_first() {
        let mut watch = Watch::default();
        let mut look = |errors, faults| {
            let mut one = gpu("g", 1_000, 0);
            one.ecc_uncorrected = Some(errors);
            let mut sample = sample(vec![one]);
            sample.faults = faults;
            watch.look(&sample, &[])
        };
        let is_ecc = |command: &Command| {
            matches!(
                command,
                Command::Seen(Seen::Fault {
                    cause: QuarantineCause::Ecc,
                    ..
                })
            )
        };
        assert!(!look(7, Vec::new()).iter().any(is_ecc));
        assert!(!look(7, Vec::new()).iter().any(is_ecc));
        assert!(look(9, Vec::new()).iter().any(is_ecc));
        let fault = Fault {
            gpu: "g".into(),
            cause: QuarantineCause::Xid,
            detail: "d".into(),
        };
        assert!(matches!(
            look(9, vec![fault]).as_slice(),
            [Command::Seen(Seen::Fault { .. })]
        ));
    }
}
