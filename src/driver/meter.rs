//! What is measured of instances' GPU memory: the seam to `gpu`, which looks at the GPUs.

use futures_util::future::BoxFuture;

use crate::domain::command::Command;
use crate::domain::ids::{Generation, GpuUuid, ServiceName};
use crate::domain::machine::{QuarantineCause, Seen};

/// A GPU on which an instance's memory was not seen free in time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StillHeld {
    pub gpu: GpuUuid,
    /// One sentence for people.
    pub detail: String,
}

impl StillHeld {
    /// What is reported of it.
    pub(super) fn into_outcome(self) -> Command {
        Command::Seen(Seen::Fault {
            gpu: self.gpu,
            cause: QuarantineCause::MemoryHeld,
            detail: self.detail,
        })
    }
}

/// Tells how much GPU memory instances really hold, by the newest sample.
pub trait Meter: Send + Sync + 'static {
    /// MiB that the processes of an instance hold on one GPU; `None` where that cannot be measured, as on simulated GPUs.
    fn held_mib(&self, service: &ServiceName, generation: Generation, gpu: &GpuUuid)
    -> Option<u64>;

    /// Returns when a sample was taken that began after this call.
    fn next_sample(&self) -> BoxFuture<'_, ()>;

    /// Returns when all GPU memory of an instance whose processes are gone was seen free, or when it has been waited
    /// for long enough: then with the GPUs on which it was not.
    fn freed(&self, service: &ServiceName, generation: Generation)
    -> BoxFuture<'_, Vec<StillHeld>>;

    /// Returns when processes that were killed have had long enough to end, with the GPUs that their instance has; never
    /// where GPUs are not measured.
    fn stuck(&self, _: &ServiceName, _: Generation) -> BoxFuture<'_, Vec<StillHeld>> {
        Box::pin(std::future::pending())
    }
}

/// Awaits an end. When `stuck` comes before it, what that gives is told meanwhile.
pub(super) async fn until_ended(
    ending: impl Future<Output = ()>,
    stuck: impl Future<Output = Vec<StillHeld>>,
    told: impl Fn(StillHeld),
) {
    let mut ending = std::pin::pin!(ending);
    tokio::select! {
        biased;
        () = &mut ending => return,
        held = stuck => held.into_iter().for_each(told),
    }
    ending.await;
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

    fn freed(&self, _: &ServiceName, _: Generation) -> BoxFuture<'_, Vec<StillHeld>> {
        Box::pin(std::future::ready(Vec::new()))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use tokio::sync::oneshot;

    use super::*;

    fn held() -> StillHeld {
        StillHeld {
            gpu: "g".into(),
            detail: "it does not end".to_owned(),
        }
    }

    #[tokio::test]
    async fn an_end_that_takes_too_long_is_told_and_still_awaited() {
        let seen = RefCell::new(Vec::new());
        let (end, ending) = oneshot::channel::<()>();
        let ending = async { drop(ending.await) };
        let stuck = std::future::ready(vec![held()]);
        let waiting = until_ended(ending, stuck, |held| seen.borrow_mut().push(held));
        let ends = async {
            tokio::task::yield_now().await;
            assert_eq!(*seen.borrow(), [held()], "told before its end");
            end.send(()).unwrap();
        };
        tokio::join!(waiting, ends);
        assert_eq!(seen.borrow().len(), 1);
    }

    #[tokio::test]
    async fn an_end_in_time_is_not_told_of() {
        let stuck = std::future::ready(vec![held()]);
        let told = |held| panic!("{held:?}");
        until_ended(std::future::ready(()), stuck, told).await;
    }
}
