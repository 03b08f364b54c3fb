//! The file of logins: opening it, and keeping it small.

use std::time::Duration;

use tokio::runtime::Handle;

use super::{ServeError, patiently};
use crate::api::{App, session_counts};
use crate::auth::logins::{Logins, LoginsError};
use crate::auth::secret::TokenKey;
use crate::auth::session::SessionRules;
use crate::auth::store::OpenError;
use crate::auth::throttle::ThrottleRules;
use crate::clock::now;
use crate::config::Config;

/// How often last uses are written down: that much of them a crash may lose.
const USES_EVERY: Duration = Duration::from_secs(60);

/// How many times as seldom what is over is removed: it reads all sessions.
const SWEEP_EVERY: u32 = 10;

/// Opens it, waiting a while for a predecessor that has just been killed.
pub(super) async fn open(config: &Config, key: &TokenKey) -> Result<Logins, ServeError> {
    let locked = |error: &ServeError| {
        matches!(
            error,
            ServeError::Logins(LoginsError::Open(OpenError::Locked { .. }))
        )
    };
    patiently(locked, || {
        let opened = Logins::open(
            &config.data_dir,
            key,
            session_rules(config),
            throttle_rules(config),
        );
        Ok(opened?)
    })
    .await
}

fn session_rules(config: &Config) -> SessionRules {
    SessionRules {
        idle_ms: config.session_idle_ms,
        ttl_ms: config.session_ttl_ms,
        remember_idle_ms: config.session_remember_idle_ms,
        remember_ttl_ms: config.session_remember_ttl_ms,
        max_per_user: usize::try_from(config.max_sessions).unwrap_or(usize::MAX),
    }
}

fn throttle_rules(config: &Config) -> ThrottleRules {
    ThrottleRules {
        attempts: u32::try_from(config.login_attempts).unwrap_or(u32::MAX),
        lockout_ms: config.login_lockout_ms,
        lockout_max_ms: config.login_lockout_max_ms,
    }
}

/// Writes down last uses, and removes what is over. Runs until dropped.
pub(super) async fn keep_up(app: App) {
    loop {
        sweep(&app).await;
        for _ in 0..SWEEP_EVERY {
            tokio::time::sleep(USES_EVERY).await;
            app.logins.sessions.save_uses().await;
        }
    }
}

/// Off the runtime's threads: it reads all sessions, and what each of them stands on.
async fn sweep(app: &App) {
    let (app, runtime) = (app.clone(), Handle::current());
    let swept = tokio::task::spawn_blocking(move || runtime.block_on(sweep_all(&app)));
    if let Err(error) = swept.await {
        tracing::error!(%error, "the sweep of sessions did not end");
    }
}

async fn sweep_all(app: &App) {
    let at = now();
    app.logins.throttle.sweep(at);
    let counts = |session: &_| session_counts(app, session, at);
    match app.logins.sessions.sweep(counts, at).await {
        Ok(0) => {}
        Ok(count) => tracing::debug!(sessions = count, "sessions that are over were removed"),
        Err(error) => tracing::warn!(%error, "sessions that are over could not be removed"),
    }
}
