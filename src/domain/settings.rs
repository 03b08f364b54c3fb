//! The numbers that scheduling and retrying go by. They steer decisions only: what was decided is in
//! the events, so that a replay under other settings gives the same state.

use smol_str::SmolStr;

use super::state::account::DEFAULT_HALF_LIFE_MS;

/// Limits and delays of `decide` and `plan`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Levels by which a job must be more urgent to preempt another.
    pub preempt_priority_gap: u8,
    /// Milliseconds an attempt runs before it may be preempted, where the service sets none.
    pub min_runtime_ms: u64,
    /// Milliseconds of waiting that count as one level of priority.
    pub ageing_ms_per_level: u64,
    /// Milliseconds after which what a tenant used counts half as much in the fair share.
    pub share_half_life_ms: u64,
    /// Milliseconds that a job may wait for its service to be loaded while others keep the memory busy.
    pub swap_max_wait_ms: u64,
    /// Milliseconds without work after which an instance that the scheduler started is stopped.
    pub idle_timeout_ms: u64,
    /// Milliseconds that a stop waits for running jobs when asked to drain.
    pub drain_ms: u64,
    /// First delay of a failed attempt's retry; doubles each time, with jitter.
    pub retry_base_ms: u64,
    pub retry_max_ms: u64,
    /// First delay before a dead instance is started again; doubles with each death in a row.
    pub restart_base_ms: u64,
    pub restart_max_ms: u64,
    /// Deaths in a row after which a service is left alone.
    pub crash_loop_deaths: u32,
    /// Milliseconds alive after which an instance's earlier deaths are forgotten.
    pub crash_loop_reset_ms: u64,
    /// First delay of a failed callback; doubles up to `callback_max_delay_ms`.
    pub callback_base_ms: u64,
    pub callback_max_delay_ms: u64,
    /// Milliseconds after which a callback is given up.
    pub callback_give_up_ms: u64,
    /// Server and topic of the default tenant's notifications.
    pub ntfy: Option<(SmolStr, SmolStr)>,
    /// MiB of GPU memory that sleeping instances may keep in host memory, all together.
    pub sleep_host_max_mib: u64,
    /// Containers of jobs that there may be at once.
    pub job_containers_max: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            preempt_priority_gap: 2,
            min_runtime_ms: 1_000,
            ageing_ms_per_level: 10 * 60_000,
            share_half_life_ms: DEFAULT_HALF_LIFE_MS,
            swap_max_wait_ms: 60_000,
            idle_timeout_ms: 300_000,
            drain_ms: 30_000,
            retry_base_ms: 1_000,
            retry_max_ms: 60_000,
            restart_base_ms: 500,
            restart_max_ms: 60_000,
            crash_loop_deaths: 5,
            crash_loop_reset_ms: 60_000,
            callback_base_ms: 5_000,
            callback_max_delay_ms: 3_600_000,
            callback_give_up_ms: 24 * 3_600_000,
            ntfy: None,
            sleep_host_max_mib: 32_768,
            job_containers_max: 16,
        }
    }
}
