//! What an instance proves with that it is one: a token in a file that only the gateway's user reads. Renewed while
//! the instance lives, gone when it is. Who makes such tokens is outside.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use super::{Shared, blocking};
use crate::domain::ids::{Generation, ServiceName};

/// The variable that names the file. The token itself is in no environment: those are inherited, and shown.
pub(super) const VARIABLE: &str = "RUNGATE_JOB_TOKEN_FILE";

/// Makes and keeps the tokens of instances. `write` and `remove` block on the disk.
pub trait Credentials: Send + Sync + 'static {
    /// How often a token is made anew; it lasts longer.
    fn renew_every(&self) -> Duration;
    /// Writes a fresh token, over an earlier one; where it lies.
    ///
    /// # Errors
    /// The file cannot be written.
    fn write(&self, service: &ServiceName, generation: Generation) -> io::Result<PathBuf>;
    /// The instance is gone.
    fn remove(&self, service: &ServiceName, generation: Generation);
}

impl Shared {
    /// Ticks when a token is to be made anew: at once for an instance that was found again.
    pub(super) fn renewals(&self, is_fresh: bool) -> Interval {
        let every = self.credentials.renew_every();
        let first = if is_fresh { every } else { Duration::ZERO };
        let mut ticks = interval_at(Instant::now() + first, every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    }

    /// Makes an instance's token anew. One that cannot be written is tried again at the next tick; the old one is
    /// good for a while yet.
    pub(super) async fn renew(&self, service: &ServiceName, generation: Generation) {
        let (credentials, name) = (self.credentials.clone(), service.clone());
        let written = blocking(move || credentials.write(&name, generation)).await;
        if let Err(error) = written {
            tracing::error!(
                service.name = %service, instance.generation = generation.0, %error,
                "the token of an instance could not be renewed"
            );
        }
    }

    pub(super) async fn revoke(&self, service: &ServiceName, generation: Generation) {
        let (credentials, name) = (self.credentials.clone(), service.clone());
        blocking(move || credentials.remove(&name, generation)).await;
    }
}
