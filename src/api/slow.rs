//! Slow hashes: few at a time and not many in line, so that the rest of the processor is for requests.

use std::num::NonZero;
use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::counter;
use thread_priority::{
    NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy,
    set_thread_priority_and_policy, thread_native_id,
};
use tokio::sync::{Semaphore, oneshot};

use super::error::{ApiError, ErrorCode};

/// Computed and waiting at most.
const IN_LINE: usize = 64;

/// Computed and waiting that are a flood: fewer are people who log in.
const FLOOD: usize = 4;

/// How many times as long as each hash took none is computed on its core, in a flood. Of any scheduling class, the kernel
/// now and then lets a thread run on until its next tick, 4 ms perhaps, while others wait: this keeps such waits out
/// of the slowest hundredth of requests.
const REST: u32 = 4;

/// The longest rest: a hash that was starved by other work needs none to be seldom.
const MAX_REST: Duration = Duration::from_millis(250);

/// Linux's nice value of what may always wait; it counts for one thread, not for the process.
const LEAST_PRIORITY: i32 = 19;

/// How long a request waits for its turn.
const WAIT: Duration = Duration::from_secs(2);

/// Where slow hashes are computed.
pub struct SlowHashes {
    turns: Arc<Semaphore>,
    line: Semaphore,
}

impl SlowHashes {
    /// On half of the cores: each takes one for tens of milliseconds, and a password's 19 MiB.
    pub fn new() -> SlowHashes {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        SlowHashes::with_turns((cores / 2).max(1))
    }

    fn with_turns(turns: usize) -> SlowHashes {
        SlowHashes {
            turns: Arc::new(Semaphore::new(turns)),
            line: Semaphore::new(IN_LINE),
        }
    }

    /// Whether there is a place in line: else nothing needs to be prepared.
    ///
    /// # Errors
    /// 429 when there is none.
    pub fn check(&self) -> Result<(), ApiError> {
        match self.line.available_permits() {
            0 => Err(busy()),
            _ => Ok(()),
        }
    }

    /// Does the work on a thread of its own when its turn has come; 429 when that would take too long.
    pub async fn compute<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let _place = self.line.try_acquire().map_err(|_| busy())?;
        let turn = tokio::time::timeout(WAIT, Arc::clone(&self.turns).acquire_owned());
        let turn = turn.await.map_err(|_| busy())?.map_err(|_| busy())?;
        let (answer, computed) = oneshot::channel();
        let yielding = Yielding::of(IN_LINE - self.line.available_permits());
        let thread = std::thread::Builder::new().name("slow-hash".to_owned());
        let begun = thread.spawn(move || {
            // Held by the work, not by its request, which may go away.
            let _turn = turn;
            yielding.begin();
            counter!("rungate_slow_hashes_total").increment(1);
            let began = Instant::now();
            // A request that went away does not want it any more.
            let _ = answer.send(work());
            yielding.rest(began.elapsed());
        });
        begun.map_err(|error| not_computed(&error))?;
        computed.await.map_err(|error| not_computed(&error))
    }
}

/// How a thread leaves the processor to requests. It can never take that back, so it is a thread of its own: those of
/// the runtime's pool do other work too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Yielding {
    /// It has its small share of a busy processor, for up to some milliseconds at a time while a request waits.
    Nice,
    /// It has what nobody else wants (Linux's SCHED_IDLE, sched(7)), and rests afterwards.
    Idle,
}

impl Yielding {
    /// With so many in line. A lone login gets on while the machine is busy; a flood gets nothing from anybody.
    fn of(in_line: usize) -> Yielding {
        match in_line > FLOOD {
            true => Yielding::Idle,
            false => Yielding::Nice,
        }
    }

    /// After work that took so long. Its turn is still taken.
    fn rest(self, took: Duration) {
        if self == Yielding::Idle {
            std::thread::sleep((took * REST).min(MAX_REST));
        }
    }

    /// For this thread, for good.
    fn begin(self) {
        let is_idle = match self {
            Yielding::Nice => false,
            Yielding::Idle => set_idle(),
        };
        if is_idle {
            return;
        }
        if let Err(error) = rustix::process::nice(LEAST_PRIORITY) {
            tracing::debug!(%error, "a slow hash is computed at the usual priority");
        }
    }
}

fn set_idle() -> bool {
    let policy = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
    let set = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, policy);
    if let Err(error) = &set {
        tracing::debug!(%error, "a slow hash is computed at the least priority instead of when idle");
    }
    set.is_ok()
}

fn not_computed(error: &dyn std::error::Error) -> ApiError {
    tracing::error!(%error, "a slow hash was not computed");
    ApiError::internal()
}

fn busy() -> ApiError {
    ApiError::new(
        ErrorCode::TooManyRequests,
        "Too Many Requests (token and password checks)",
    )
    .retry_after(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[tokio::test]
    async fn as_many_are_computed_at_once_as_there_are_turns_and_no_more_wait_than_fit_in_line() {
        const TURNS: usize = 2;
        let hashes = Arc::new(SlowHashes::with_turns(TURNS));
        let (began, begun) = mpsc::channel();
        let begin = || {
            let (hashes, began) = (Arc::clone(&hashes), began.clone());
            let (end, ended) = mpsc::channel::<()>();
            let compute = async move {
                let work = move || {
                    began.send(()).unwrap();
                    let _ = ended.recv();
                };
                hashes.compute(work).await
            };
            (tokio::spawn(compute), end)
        };
        let mut asked: Vec<_> = (0..IN_LINE).map(|_| begin()).collect();
        while hashes.line.available_permits() > 0 || hashes.turns.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let refused = begin().0.await.unwrap().unwrap_err();
        assert_eq!(refused.code, ErrorCode::TooManyRequests);
        let begun = tokio::task::spawn_blocking(move || {
            for _ in 0..TURNS {
                begun.recv().unwrap();
            }
            begun
        });
        let begun = begun.await.unwrap();
        assert!(begun.try_recv().is_err(), "a third was begun");
        // A request that goes away leaves its turn with the work.
        let (first, end) = asked.remove(0);
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        assert_eq!(hashes.turns.available_permits(), 0);
        drop(end);
        drop(asked);
    }

    #[test]
    fn a_flood_gets_what_nobody_else_wants_and_a_few_logins_do_not() {
        let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
        let policy_in = |in_line| {
            let thread = std::thread::spawn(move || {
                Yielding::of(in_line).begin();
                thread_priority::thread_schedule_policy().unwrap()
            });
            thread.join().unwrap()
        };
        assert_ne!(policy_in(1), idle);
        assert_ne!(policy_in(FLOOD), idle);
        assert_eq!(policy_in(FLOOD + 1), idle);
        let took = Duration::from_millis(20);
        let rested = |yielding: Yielding| {
            let began = Instant::now();
            yielding.rest(took);
            began.elapsed()
        };
        assert!(rested(Yielding::Nice) < took * REST);
        assert!(rested(Yielding::Idle) >= took * REST);
    }
}
