//! What is measured of instances' GPU memory: the seam to `gpu`, which looks at the GPUs.

use futures_util::future::BoxFuture;

use crate::domain::ids::{Generation, GpuUuid, ServiceName};

/// Tells how much GPU memory instances really hold, by the newest sample.
pub trait Meter: Send + Sync + 'static {
    /// MiB that the processes of an instance hold on one GPU; `None` where that cannot be measured, as on simulated GPUs.
    fn held_mib(&self, service: &ServiceName, generation: Generation, gpu: &GpuUuid)
    -> Option<u64>;

    /// Returns when a sample was taken that began after this call.
    fn next_sample(&self) -> BoxFuture<'_, ()>;
}

/// Measures nothing: what ends is taken to have given its memory back.
pub struct Unmetered;

impl Meter for Unmetered {
    fn held_mib(&self, _: &ServiceName, _: Generation, _: &GpuUuid) -> Option<u64> {
        None
    }

    fn next_sample(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }
}
