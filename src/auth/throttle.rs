//! Throttling of logins, per account and per address. After some failures each further one locks for twice as long as
//! the one before. An attempt counts as failed from its beginning, so that many at once gain nothing; failures are on
//! disk before they are answered. An account that does not exist is throttled like one that does.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::secret::TokenKey;
use super::store::{Change, LoginStore, StoreError, Table};
use crate::domain::identity::UserKey;
use crate::domain::time::Timestamp;

/// How many more failures an address has than an account: many people may sit behind one.
const ADDRESS_FACTOR: u32 = 4;

/// Accounts and addresses that are remembered at most. Beyond it those go whose last failure is the longest ago.
const MAX_ENTRIES: usize = 100_000;

/// How many go at once, so that it happens seldom.
const EVICTED: usize = MAX_ENTRIES / 10;

/// When logins are refused.
#[derive(Clone, Copy, Debug)]
pub struct ThrottleRules {
    /// Failures of an account before it is locked.
    pub attempts: u32,
    /// The first lock, in milliseconds.
    pub lockout_ms: u64,
    /// The longest; and how long after its last failure everything is forgotten.
    pub lockout_max_ms: u64,
}

impl Default for ThrottleRules {
    fn default() -> Self {
        Self {
            attempts: 5,
            lockout_ms: 30_000,
            lockout_max_ms: 900_000,
        }
    }
}

/// Keyed hash of an account or an address: what people type in the wrong place is not kept.
type Key = [u8; 32];

/// What is kept of failures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Failures {
    count: u32,
    last: Timestamp,
    locked_until: Timestamp,
}

/// How long to wait, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Locked {
    pub retry_after_ms: u64,
}

/// Knows who failed how often. Cloneable.
#[derive(Clone)]
pub struct Throttle {
    entries: Arc<Mutex<HashMap<Key, Failures>>>,
    store: LoginStore,
    key: TokenKey,
    rules: ThrottleRules,
}

/// An attempt that was let through. Dropped without a word it counts as failed.
pub struct Attempt {
    throttle: Throttle,
    account: Key,
    network: Key,
}

impl Throttle {
    /// With the failures of a file.
    pub fn load(
        store: LoginStore,
        key: TokenKey,
        rules: ThrottleRules,
    ) -> Result<Throttle, StoreError> {
        let rows = store.scan(Table::Failures, &[])?;
        let row = |(key, bytes): (Vec<u8>, Vec<u8>)| {
            Some((key.try_into().ok()?, postcard::from_bytes(&bytes).ok()?))
        };
        Ok(Throttle {
            entries: Arc::new(Mutex::new(rows.into_iter().filter_map(row).collect())),
            store,
            key,
            rules,
        })
    }

    /// Begins an attempt on an account from a network, or says how long to wait. Nothing else is to be done before.
    pub fn begin(
        &self,
        account: &UserKey,
        network: IpAddr,
        now: Timestamp,
    ) -> Result<Attempt, Locked> {
        let account = self.digest(&format!("account {account}"));
        let network = self.digest(&format!("network {network}"));
        let mut entries = self.lock();
        let locked_ms = [&account, &network]
            .into_iter()
            .filter_map(|key| Some(entries.get(key)?.locked_until.millis_since(now)))
            // A longer lock than there is: the clock was set back.
            .filter(|locked_ms| (1..=self.rules.lockout_max_ms).contains(locked_ms));
        if let Some(retry_after_ms) = locked_ms.max() {
            return Err(Locked { retry_after_ms });
        }
        self.count(&mut entries, account, self.rules.attempts, now);
        self.count(&mut entries, network, self.address_attempts(), now);
        drop(entries);
        Ok(Attempt {
            throttle: self.clone(),
            account,
            network,
        })
    }

    fn digest(&self, text: &str) -> Key {
        self.key.digest(text.as_bytes())
    }

    fn count(&self, entries: &mut HashMap<Key, Failures>, key: Key, attempts: u32, now: Timestamp) {
        if entries.len() >= MAX_ENTRIES && !entries.contains_key(&key) {
            self.evict(entries, now);
        }
        let entry = entries.entry(key).or_default();
        if self.is_forgotten(entry, now) {
            *entry = Failures::default();
        }
        entry.count = entry.count.saturating_add(1);
        entry.last = now;
        if entry.count >= attempts {
            let doubled = (entry.count - attempts).min(30);
            let lock_ms = self.rules.lockout_ms.saturating_mul(1 << doubled);
            entry.locked_until = now + lock_ms.min(self.rules.lockout_max_ms);
        }
    }

    fn address_attempts(&self) -> u32 {
        self.rules.attempts.saturating_mul(ADDRESS_FACTOR)
    }

    /// Takes one attempt back, and the lock that it led to.
    fn uncount(&self, key: &Key, attempts: u32) {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(key) else {
            return;
        };
        entry.count = entry.count.saturating_sub(1);
        if entry.count < attempts {
            entry.locked_until = Timestamp::default();
        }
        if entry.count == 0 {
            entries.remove(key);
        }
    }

    fn is_forgotten(&self, entry: &Failures, now: Timestamp) -> bool {
        entry.locked_until <= now && now.millis_since(entry.last) > self.rules.lockout_max_ms
    }

    /// Makes room: what is forgotten goes first.
    fn evict(&self, entries: &mut HashMap<Key, Failures>, now: Timestamp) {
        let mut by_age: Vec<(bool, Timestamp, Key)> = entries
            .iter()
            .map(|(key, entry)| (!self.is_forgotten(entry, now), entry.last, *key))
            .collect();
        by_age.sort_unstable();
        let gone: Vec<Key> = by_age
            .into_iter()
            .take(EVICTED)
            .map(|(_, _, key)| key)
            .collect();
        for key in &gone {
            entries.remove(key);
        }
        self.store.write_later(gone.iter().map(removal).collect());
    }

    /// Removes what is forgotten.
    pub fn sweep(&self, now: Timestamp) {
        let mut gone = Vec::new();
        self.lock().retain(|key, entry| {
            let is_forgotten = self.is_forgotten(entry, now);
            if is_forgotten {
                gone.push(removal(key));
            }
            !is_forgotten
        });
        if !gone.is_empty() {
            self.store.write_later(gone);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Failures>> {
        // Entries are independent of each other, so a panic elsewhere cannot have torn more than one count.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be on disk of an entry.
    fn kept(&self, key: &Key) -> Change {
        match self.lock().get(key) {
            Some(entry) => Change {
                table: Table::Failures,
                key: key.to_vec(),
                value: postcard::to_stdvec(entry).ok(),
            },
            None => removal(key),
        }
    }
}

fn removal(key: &Key) -> Change {
    Change {
        table: Table::Failures,
        key: key.to_vec(),
        value: None,
    }
}

impl Attempt {
    /// It failed: on disk when it returns.
    pub async fn failed(self) -> Result<(), StoreError> {
        let Attempt {
            throttle,
            account,
            network,
        } = self;
        let changes = vec![throttle.kept(&account), throttle.kept(&network)];
        throttle.store.write(changes).await
    }

    /// It succeeded: the account begins anew. The address only gets this attempt back, or whoever has an account of
    /// its own could go on guessing at others.
    pub fn succeeded(self) {
        let Attempt {
            throttle,
            account,
            network,
        } = self;
        throttle.lock().remove(&account);
        throttle.uncount(&network, throttle.address_attempts());
        let changes = vec![throttle.kept(&account), throttle.kept(&network)];
        throttle.store.write_later(changes);
    }

    /// It came to nothing, for reasons of ours.
    pub fn withdrawn(self) {
        let throttle = &self.throttle;
        throttle.uncount(&self.account, throttle.rules.attempts);
        throttle.uncount(&self.network, throttle.address_attempts());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Timestamp = Timestamp::from_millis(1_800_000_000_000);

    fn user(name: &str) -> UserKey {
        UserKey {
            tenant: "default".into(),
            user: name.into(),
        }
    }

    fn throttle(data: &tempfile::TempDir) -> Throttle {
        let store = LoginStore::open(data.path()).unwrap();
        Throttle::load(store, TokenKey::random(), ThrottleRules::default()).unwrap()
    }

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[tokio::test]
    async fn locks_double_and_are_forgotten() {
        let data = tempfile::tempdir().unwrap();
        let throttle = throttle(&data);
        let ann = user("ann");
        let mut now = START;
        let mut waits = Vec::new();
        for from in 0..12 {
            match throttle.begin(&ann, address(from), now) {
                Ok(attempt) => attempt.failed().await.unwrap(),
                Err(locked) => {
                    waits.push(locked.retry_after_ms);
                    now = now + locked.retry_after_ms;
                }
            }
        }
        assert_eq!(waits, [30_000, 60_000, 120_000, 240_000]);
        assert!(throttle.begin(&user("bob"), address(1), now).is_ok());
        // As if nothing had been.
        now = now + 2_000_000;
        for from in 0..5 {
            throttle.begin(&ann, address(from), now).ok().unwrap();
        }
        assert!(throttle.begin(&ann, address(0), now).is_err());
    }

    #[tokio::test]
    async fn attempts_at_once_are_counted_at_once() {
        let data = tempfile::tempdir().unwrap();
        let throttle = throttle(&data);
        let begun: Vec<_> = (0..9)
            .filter_map(|_| throttle.begin(&user("ann"), address(1), START).ok())
            .collect();
        assert_eq!(begun.len(), 5);
    }

    #[tokio::test]
    async fn an_address_is_locked_whatever_accounts_it_tries_and_a_success_does_not_clear_it() {
        let data = tempfile::tempdir().unwrap();
        let throttle = throttle(&data);
        for number in 0..20 {
            let name = format!("user{number}");
            let attempt = throttle
                .begin(&user(&name), address(1), START)
                .ok()
                .unwrap();
            attempt.failed().await.unwrap();
            if number == 18 {
                let own = throttle
                    .begin(&user("own"), address(1), START)
                    .ok()
                    .unwrap();
                own.succeeded();
            }
        }
        assert!(throttle.begin(&user("own"), address(1), START).is_err());
        assert!(throttle.begin(&user("own"), address(2), START).is_ok());
    }

    #[tokio::test]
    async fn a_success_clears_its_account_and_a_withdrawal_only_itself() {
        let data = tempfile::tempdir().unwrap();
        let throttle = throttle(&data);
        let ann = user("ann");
        let begin = || throttle.begin(&ann, address(1), START).ok();
        for _ in 0..4 {
            begin().unwrap().failed().await.unwrap();
        }
        begin().unwrap().withdrawn();
        begin().unwrap().succeeded();
        for _ in 0..5 {
            begin().unwrap();
        }
        assert!(begin().is_none());
    }

    #[tokio::test]
    async fn a_clock_that_is_set_back_locks_nobody_out() {
        let data = tempfile::tempdir().unwrap();
        let throttle = throttle(&data);
        let begin = |now| throttle.begin(&user("ann"), address(1), now).ok();
        for _ in 0..5 {
            begin(START).unwrap();
        }
        assert!(begin(START).is_none());
        assert!(begin(Timestamp(START.0 - 86_400_000_000)).is_some());
    }

    #[tokio::test]
    async fn only_so_many_are_remembered() {
        let data = tempfile::tempdir().unwrap();
        let throttle = throttle(&data);
        for number in 0..MAX_ENTRIES {
            let account = user(&number.to_string());
            let from = IpAddr::from((number as u32).to_be_bytes());
            let _ = throttle.begin(&account, from, START + number as u64);
        }
        assert!(throttle.lock().len() <= MAX_ENTRIES);
    }
}
