//! How large the measurements are: in full, or scaled down for a look in under a minute.

use std::time::Duration;

/// Sizes of all measurements.
#[derive(Clone, Debug)]
pub struct Scale {
    pub quick: bool,
    /// Rounds of each timed measurement; figures are their medians.
    pub rounds: usize,
    /// Clients that submit at once, one measurement each.
    pub clients: Vec<usize>,
    /// Rounds of submissions, and how long one lasts. Short ones by turns see the same host, whose speed changes
    /// from one second to the next.
    pub start_rounds: usize,
    pub round: Duration,
    /// Commands of one round.
    pub commands: usize,
    pub followers: usize,
    pub follow: Duration,
    /// Users, five tokens each; requests of one round with a token and without; how long bad logins come in.
    pub users: usize,
    pub asked: usize,
    pub flood: Duration,
    /// Events that are replayed, and that lie behind the snapshot of the restart.
    pub replay_events: u64,
    /// Waiting jobs: few, and many.
    pub queue_sizes: (usize, usize),
    /// Decisions timed per queue and round.
    pub decisions: usize,
}

impl Scale {
    pub fn full() -> Scale {
        Scale {
            quick: false,
            rounds: 5,
            clients: vec![1, 16, 64, 256],
            start_rounds: 20,
            round: Duration::from_secs(1),
            commands: 500,
            followers: 1_000,
            follow: Duration::from_secs(10),
            users: 10_000,
            asked: 5_000,
            flood: Duration::from_secs(30),
            replay_events: 5_000_000,
            queue_sizes: (10_000, 1_000_000),
            decisions: 20_000,
        }
    }

    pub fn quick() -> Scale {
        Scale {
            quick: true,
            rounds: 3,
            clients: vec![1, 16, 64, 256],
            start_rounds: 3,
            round: Duration::from_millis(700),
            commands: 300,
            followers: 1_000,
            follow: Duration::from_secs(2),
            users: 500,
            asked: 1_000,
            flood: Duration::from_secs(4),
            replay_events: 400_000,
            queue_sizes: (10_000, 100_000),
            decisions: 5_000,
        }
    }
}
