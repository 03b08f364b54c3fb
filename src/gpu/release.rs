//! Whether an instance's memory on a GPU is seen free, once its processes are gone.

use std::sync::Arc;

use super::attribution::Owner;
use super::reading::GpuReading;
use super::samples::Sample;
use crate::domain::ids::GpuUuid;

/// How many of an instance's last samples tell what was taken beside it.
const LAST: usize = 30;
/// MiB that may be taken besides: the driver's own share moves a little.
const SLACK_MIB: u64 = 256;

/// What a sample says of an instance's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Freed {
    Yes,
    /// One sentence for people.
    No(String),
}

/// Holds `now` against the samples before: none of the instance's processes is listed, and no more is taken that no
/// process accounts for than while it ran. A GPU that is gone holds nothing.
pub fn freed(history: &[Arc<Sample>], now: &Sample, gpu: &GpuUuid, owner: &Owner) -> Freed {
    let Some(reading) = find(now, gpu) else {
        return Freed::Yes;
    };
    if let Some(mib) = reading.held_by(owner) {
        return Freed::No(format!(
            "processes of service '{}' that have ended still hold {mib} MiB",
            owner.0
        ));
    }
    // Where memory is not told by process, nothing can be compared.
    if reading.processes.iter().any(|p| p.memory_mib.is_none()) {
        return Freed::Yes;
    }
    let ran = history.iter().rev().filter_map(|sample| {
        let before = find(sample, gpu)?;
        before.held_by(owner).map(|_| before.unlisted_mib())
    });
    let Some(beside) = ran.take(LAST).max() else {
        return Freed::Yes;
    };
    let unlisted = reading.unlisted_mib();
    if unlisted <= beside.saturating_add(SLACK_MIB) {
        return Freed::Yes;
    }
    Freed::No(format!(
        "{} MiB that service '{}' held are not free, and no process accounts for them",
        unlisted - beside,
        owner.0
    ))
}

fn find<'a>(sample: &'a Sample, gpu: &GpuUuid) -> Option<&'a GpuReading> {
    sample.gpus.iter().find(|r| r.facts.uuid == *gpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::Generation;
    use crate::gpu::samples::tests::{gpu, process, sample};

    fn owner() -> Owner {
        ("s".into(), Generation(1))
    }

    /// 500 MiB of the driver's, so much of ours, so much of a stranger's who is listed.
    fn at(taken: u64, ours: Option<u64>, stranger: u64) -> Sample {
        let mut one = gpu("g", 24_000, taken);
        if let Some(mib) = ours {
            let mut own = process(1, mib);
            own.owner = Some(owner());
            one.processes.push(own);
        }
        if stranger > 0 {
            one.processes.push(process(2, stranger));
        }
        sample(vec![one])
    }

    fn told(history: &[Sample], now: &Sample) -> Freed {
        let history: Vec<_> = history.iter().cloned().map(Arc::new).collect();
        freed(&history, now, &"g".into(), &owner())
    }

    #[test]
    fn what_is_listed_is_held() {
        let Freed::No(why) = told(&[], &at(8_500, Some(8_000), 0)) else {
            panic!("it is held");
        };
        assert!(why.contains("8000 MiB"), "{why}");
    }

    #[test]
    fn what_nobody_accounts_for_after_it_ended_is_held() {
        let ran = [at(8_500, Some(8_000), 0)];
        assert!(matches!(told(&ran, &at(8_500, None, 0)), Freed::No(_)));
        assert!(matches!(told(&ran, &at(4_500, None, 0)), Freed::No(_)));
        assert_eq!(told(&ran, &at(500, None, 0)), Freed::Yes);
        assert_eq!(told(&ran, &at(600, None, 0)), Freed::Yes);
    }

    #[test]
    fn what_strangers_took_meanwhile_is_theirs() {
        let ran = [at(8_500, Some(8_000), 0)];
        assert_eq!(told(&ran, &at(9_500, None, 9_000)), Freed::Yes);
        // It was there before, and nobody ever accounted for it.
        let ran = [at(12_500, Some(8_000), 0)];
        assert_eq!(told(&ran, &at(4_500, None, 0)), Freed::Yes);
    }

    #[test]
    fn without_a_memory_of_it_only_the_list_counts() {
        assert_eq!(told(&[], &at(8_500, None, 0)), Freed::Yes);
        let elsewhere = sample(vec![gpu("other", 24_000, 0)]);
        let ran = [at(8_500, Some(8_000), 0)];
        assert_eq!(told(&ran, &elsewhere), Freed::Yes, "the GPU is gone");
    }
}
