//! When each token was last used, to the minute: kept in memory, written to a file of its own now and then.
//! It is a hint for people who tidy up their tokens, so it is neither an event nor worth a sync per request;
//! a crash loses the last minutes of it.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::domain::identity::TokenKey;
use crate::domain::time::Timestamp;

use crate::private_file;

/// How much later a use must be to count as a newer one.
const RESOLUTION_MS: u64 = 60_000;

/// Tokens of which it is kept at most; those that were used longest ago are forgotten first.
const MAX_KEPT: usize = 250_000;

/// Largest file that is read back: `MAX_KEPT` tokens of the longest names fit.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Cloneable.
#[derive(Clone)]
pub struct Uses {
    inner: Arc<Mutex<Inner>>,
    path: Option<PathBuf>,
}

#[derive(Default)]
struct Inner {
    last: HashMap<TokenKey, Timestamp>,
    changed: bool,
}

impl Inner {
    /// Forgets the oldest beyond `most`.
    fn keep_newest(&mut self, most: usize) {
        let surplus = self.last.len().saturating_sub(most);
        if surplus == 0 {
            return;
        }
        let mut times: Vec<Timestamp> = self.last.values().copied().collect();
        let (_, last_forgotten, _) = times.select_nth_unstable(surplus - 1);
        let last_forgotten = *last_forgotten;
        self.last.retain(|_, at| *at > last_forgotten);
    }
}

impl Uses {
    /// Reads `<data>/auth/token-uses`; what cannot be read counts as never.
    pub fn load(data_dir: &std::path::Path) -> Uses {
        let path = data_dir.join("auth").join("token-uses");
        let small = std::fs::metadata(&path).is_ok_and(|file| file.len() <= MAX_FILE_BYTES);
        let bytes = small.then(|| std::fs::read(&path).ok()).flatten();
        let pairs: Vec<(TokenKey, Timestamp)> = bytes
            .and_then(|bytes| postcard::from_bytes(&bytes).ok())
            .unwrap_or_default();
        let inner = Inner {
            last: pairs.into_iter().collect(),
            changed: false,
        };
        Uses {
            inner: Arc::new(Mutex::new(inner)),
            path: Some(path),
        }
    }

    /// Kept in memory only.
    pub fn forgotten() -> Uses {
        Uses {
            inner: Arc::default(),
            path: None,
        }
    }

    /// Notes a use, if the last one noted is a while ago.
    pub fn note(&self, token: &TokenKey, at: Timestamp) {
        let mut inner = self.lock();
        if let Some(last) = inner.last.get_mut(token) {
            if at.millis_since(*last) < RESOLUTION_MS {
                return;
            }
            *last = at;
        } else {
            inner.last.insert(token.clone(), at);
        }
        inner.changed = true;
    }

    pub fn last(&self, token: &TokenKey) -> Option<Timestamp> {
        self.lock().last.get(token).copied()
    }

    /// The token is gone.
    pub fn forget(&self, token: &TokenKey) {
        let mut inner = self.lock();
        inner.changed |= inner.last.remove(token).is_some();
    }

    /// Writes what has changed since the last time. Blocks on the disk.
    pub fn save(&self) -> io::Result<()> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        let pairs: Vec<(TokenKey, Timestamp)> = {
            let mut inner = self.lock();
            if !std::mem::take(&mut inner.changed) {
                return Ok(());
            }
            inner.keep_newest(MAX_KEPT);
            inner
                .last
                .iter()
                .map(|(key, at)| (key.clone(), *at))
                .collect()
        };
        let bytes = postcard::to_stdvec(&pairs).map_err(io::Error::other)?;
        private_file::write(path, &bytes)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change is a single operation, so a panic elsewhere cannot have torn it.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::identity::UserKey;

    /// Rotations left the tokens that they ended behind, until the file was too long to be read.
    #[test]
    fn what_was_used_longest_ago_is_forgotten() {
        let mut inner = Inner::default();
        let token = |n: i64| TokenKey {
            owner: UserKey::first_admin(),
            token: n.to_string().into(),
        };
        inner.last = (0..10).map(|n| (token(n), Timestamp(n))).collect();
        inner.keep_newest(10);
        assert_eq!(inner.last.len(), 10);
        inner.keep_newest(3);
        let mut kept: Vec<Timestamp> = inner.last.into_values().collect();
        kept.sort_unstable();
        assert_eq!(kept, [Timestamp(7), Timestamp(8), Timestamp(9)]);
        // A name and a tenant have 64 characters, a hash that is added to a name 17, and an id of a token 20.
        let longest = 64 + 64 + 17 + 20 + 16;
        assert!(MAX_KEPT as u64 * longest < MAX_FILE_BYTES);
    }

    #[test]
    fn a_use_is_noted_once_a_minute_and_kept() {
        let data = tempfile::tempdir().unwrap();
        let uses = Uses::load(data.path());
        let token = TokenKey {
            owner: UserKey::first_admin(),
            token: "t".into(),
        };
        let first = Timestamp::from_millis(1_000_000);
        uses.note(&token, first);
        uses.note(&token, first + 59_999);
        assert_eq!(uses.last(&token), Some(first));
        uses.note(&token, first + 60_000);
        uses.save().unwrap();
        assert_eq!(Uses::load(data.path()).last(&token), Some(first + 60_000));
        uses.forget(&token);
        assert_eq!(uses.last(&token), None);
    }
}
