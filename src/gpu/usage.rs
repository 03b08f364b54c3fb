//! Samples summed up: the smallest, the mean and the largest value of a while.

use std::collections::BTreeMap;

use super::reading::GpuReading;
use super::samples::Sample;
use crate::domain::ids::GpuUuid;
use crate::domain::machine::{GpuUse, Seen, Spread};
use crate::domain::time::Timestamp;

/// One value of many samples.
#[derive(Clone, Copy, Debug, Default)]
struct Values {
    count: u64,
    sum: u64,
    min: u64,
    max: u64,
}

impl Values {
    fn add(&mut self, value: Option<u64>) {
        let Some(value) = value else { return };
        self.min = match self.count {
            0 => value,
            _ => self.min.min(value),
        };
        self.max = self.max.max(value);
        self.sum = self.sum.saturating_add(value);
        self.count += 1;
    }

    fn spread(self) -> Option<Spread> {
        let mean = self.sum.checked_div(self.count)?;
        Some(Spread {
            min: self.min,
            mean,
            max: self.max,
        })
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    samples: u32,
    used: Values,
    utilization: Values,
    temperature: Values,
    power: Values,
}

impl Sums {
    fn add(&mut self, gpu: &GpuReading) {
        self.samples = self.samples.saturating_add(1);
        self.used.add(Some(gpu.used_mib));
        self.utilization.add(gpu.utilization_pct.map(u64::from));
        self.temperature.add(gpu.temperature_c.map(u64::from));
        self.power.add(gpu.power_mw);
    }
}

/// Sums up samples until a while is over.
pub struct Minutes {
    length_ms: u64,
    since: Option<Timestamp>,
    sums: BTreeMap<GpuUuid, Sums>,
}

impl Minutes {
    /// Of so many milliseconds each.
    pub fn new(length_ms: u64) -> Minutes {
        Minutes {
            length_ms,
            since: None,
            sums: BTreeMap::new(),
        }
    }

    /// Adds a sample; what the while before it came to, when it was over.
    pub fn add(&mut self, sample: &Sample) -> Option<Seen> {
        let since = *self.since.get_or_insert(sample.at);
        let done = (sample.at.millis_since(since) >= self.length_ms).then(|| {
            self.since = Some(sample.at);
            let sums = std::mem::take(&mut self.sums);
            let gpus: Vec<GpuUse> = sums.into_iter().map(|(gpu, sums)| of(gpu, sums)).collect();
            gpus
        });
        for gpu in &sample.gpus {
            self.sums
                .entry(gpu.facts.uuid.clone())
                .or_default()
                .add(gpu);
        }
        // While there is no GPU there is nothing to tell.
        let gpus = done.filter(|gpus| !gpus.is_empty())?;
        Some(Seen::Use { since, gpus })
    }
}

fn of(gpu: GpuUuid, sums: Sums) -> GpuUse {
    GpuUse {
        gpu,
        samples: sums.samples,
        used_mib: sums.used.spread(),
        utilization_pct: sums.utilization.spread(),
        temperature_c: sums.temperature.spread(),
        power_mw: sums.power.spread(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::samples::tests::{gpu, sample};

    fn at(ms: i64, used: Option<u64>) -> Sample {
        let mut sample = sample(used.map(|used| gpu("g", 100, used)).into_iter().collect());
        sample.at = Timestamp::from_millis(ms);
        sample
    }

    #[test]
    fn a_while_is_told_by_the_first_sample_after_it() {
        let mut minutes = Minutes::new(60_000);
        assert_eq!(minutes.add(&at(500, Some(10))), None);
        assert_eq!(minutes.add(&at(30_000, Some(20))), None);
        assert_eq!(minutes.add(&at(60_499, Some(60))), None);
        let Some(Seen::Use { since, gpus }) = minutes.add(&at(60_500, Some(99))) else {
            panic!("it is over");
        };
        assert_eq!(since, Timestamp::from_millis(500));
        let [one] = gpus.as_slice() else {
            panic!("{gpus:?}");
        };
        let spread = |min, mean, max| Some(Spread { min, mean, max });
        assert_eq!((one.samples, one.used_mib), (3, spread(10, 30, 60)));
        assert_eq!(one.utilization_pct, spread(50, 50, 50));
        assert_eq!(one.temperature_c, None);
        assert_eq!(minutes.add(&at(90_000, Some(1))), None);
        let Some(Seen::Use { gpus, .. }) = minutes.add(&at(130_000, None)) else {
            panic!("it is over");
        };
        assert_eq!(gpus[0].used_mib, spread(1, 50, 99));
    }

    #[test]
    fn without_gpus_nothing_is_told() {
        let mut minutes = Minutes::new(1_000);
        for second in 0..10 {
            assert_eq!(minutes.add(&at(second * 1_000, None)), None);
        }
    }
}
