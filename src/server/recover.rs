//! Recovery of the first administrator, from the machine's shell with the gateway stopped: a new token, and an end to all
//! that somebody may have made with the old one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use smol_str::SmolStr;

use super::ServeError;
use crate::auth::bootstrap;
use crate::coordinator::{self, SnapshotRules};
use crate::domain::command::{Command, Origin};
use crate::domain::identity::IdentityCommand;
use crate::domain::ids::PlaneId;
use crate::domain::settings::Settings;
use crate::domain::tenant::Tenancy;
use crate::ledger::{Ledger, OpenError, OpenOptions, Space};

/// As records name who recovers.
const ACTOR: &str = "recover-admin";

/// Ends all tokens and sessions of the first administrator, then writes a new token for it, whose path it answers. Cut
/// off in between, the old one still counts: recover again.
///
/// # Errors
/// A gateway runs, there is no ledger, or the files cannot be written.
pub async fn recover_admin(data_dir: &Path) -> Result<PathBuf, ServeError> {
    let options = OpenOptions::default();
    match Ledger::open_read_only(data_dir, &options) {
        // A ledger left by a crash is not locked by anyone.
        Ok(_) | Err(OpenError::NeedsRecovery { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let (ledger, writer) = Ledger::open(data_dir, &options)?;
    let settings = Settings::default();
    let state = coordinator::recover(&ledger, settings.ageing_ms_per_level)?;
    // Nothing is begun before a gateway says that it has started, so nobody performs effects.
    let (effects, _unperformed) = tokio::sync::mpsc::unbounded_channel();
    let running = coordinator::start(coordinator::Parts {
        writer,
        state,
        settings,
        effects,
        snapshots: SnapshotRules::after(Duration::MAX),
        space: Space::new(data_dir, 0),
    })
    .map_err(ServeError::Thread)?;
    let origin = Origin {
        plane: PlaneId::ROOT,
        actor: SmolStr::new_static(ACTOR),
        request_id: None,
        tenancy: Tenancy::All,
        at: crate::clock::now(),
    };
    let revoke = Command::Identity(Box::new(IdentityCommand::RecoverFirstAdmin));
    let revoked = running.handle.submit(origin, revoke).await;
    running.handle.stop().await;
    match running.thread.join() {
        Ok(ended) => ended?,
        Err(_) => return Err(ServeError::CoordinatorGone),
    }
    revoked.map_err(|_| ServeError::CoordinatorGone)?;
    Ok(bootstrap::replace(data_dir)?.path)
}
