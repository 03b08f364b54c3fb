//! Everything that logging in with a browser needs: passwords, sessions, and who failed how often.

use std::path::Path;

use super::password::Passwords;
use super::secret::TokenKey;
use super::session::{SessionRules, Sessions};
use super::store::{LoginStore, OpenError, StoreError};
use super::throttle::{Throttle, ThrottleRules};

/// Why there is none of it.
#[derive(Debug, thiserror::Error)]
pub enum LoginsError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Read(#[from] StoreError),
}

/// Cloneable.
#[derive(Clone)]
pub struct Logins {
    pub passwords: Passwords,
    pub sessions: Sessions,
    pub throttle: Throttle,
}

impl Logins {
    /// Opens the file of logins.
    pub fn open(
        data_dir: &Path,
        key: &TokenKey,
        sessions: SessionRules,
        throttle: ThrottleRules,
    ) -> Result<Logins, LoginsError> {
        let store = LoginStore::open(data_dir)?;
        Ok(Logins {
            passwords: Passwords::new(key),
            sessions: Sessions::load(store.clone(), key.clone(), sessions)?,
            throttle: Throttle::load(store, key.clone(), throttle)?,
        })
    }
}
