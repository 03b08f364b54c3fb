//! Throttling of logins. After some failures each further one locks for twice as long as the one before. An attempt
//! counts as failed from its beginning, so that many at once gain nothing; failures are on disk before they are
//! answered. An account that does not exist is throttled like one that does.
//!
//! | attempt | counted by |
//! |---|---|
//! | a password, for an account | the account and the address. From an address where the account has logged in before, by the account *there*: whoever fails elsewhere locks nobody out of where he comes from |
//! | a token | the address: a token cannot be guessed, and needs no lock that others could close |
//! | the current password, by somebody who is in | what he came by, and all of the account who are in |

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::secret::TokenKey;
use super::store::{Change, LoginStore, StoreError, Table};
use crate::domain::identity::UserKey;
use crate::domain::time::Timestamp;

/// How many more failures a count has that many share: an address, behind which many people may sit, or all who are in
/// as one user.
const SHARED_FACTOR: u32 = 4;

/// Accounts and addresses that are remembered at most. Beyond it those go whose last failure is the longest ago.
const MAX_ENTRIES: usize = 100_000;

/// How many go at once, so that it happens seldom.
const EVICTED: usize = MAX_ENTRIES / 10;

/// How long an address stays familiar to an account after its last login from there, in milliseconds.
const FAMILIAR_MS: u64 = 90 * 86_400_000;

/// A login makes its address as familiar as before when the last one is not older than this, without a write.
const FAMILIAR_AGAIN_MS: u64 = 86_400_000;

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

/// Who tries what.
#[derive(Clone, Copy, Debug)]
pub enum Trying<'a> {
    /// A password for an account.
    Password {
        account: &'a UserKey,
        network: IpAddr,
    },
    Token {
        network: IpAddr,
    },
    /// The current password, by somebody who is in.
    Current {
        account: &'a UserKey,
        /// What it came by: tells the account's sessions and tokens apart.
        by: &'a [u8],
    },
}

/// Knows who failed how often, and who is at home where. Cloneable.
#[derive(Clone)]
pub struct Throttle {
    entries: Arc<Mutex<HashMap<Key, Failures>>>,
    familiar: Arc<Mutex<HashMap<Key, Timestamp>>>,
    store: LoginStore,
    key: TokenKey,
    rules: ThrottleRules,
}

/// An attempt that was let through. Dropped without a word it counts as failed.
pub struct Attempt {
    throttle: Throttle,
    counts: Vec<Count>,
}

/// What an attempt is counted by.
struct Count {
    key: Key,
    /// Failures before it is locked.
    attempts: u32,
    /// Whether a success proves that all failures were its own: else it only takes itself back, or whoever has an
    /// account of its own could go on guessing at others.
    is_cleared: bool,
}

impl Throttle {
    /// With the failures of a file.
    pub fn load(
        store: LoginStore,
        key: TokenKey,
        rules: ThrottleRules,
    ) -> Result<Throttle, StoreError> {
        Ok(Throttle {
            entries: Arc::new(Mutex::new(rows(&store, Table::Failures)?)),
            familiar: Arc::new(Mutex::new(rows(&store, Table::Familiar)?)),
            store,
            key,
            rules,
        })
    }

    /// Begins an attempt, or says how long to wait. Nothing else is to be done before.
    pub fn begin(&self, trying: Trying<'_>, now: Timestamp) -> Result<Attempt, Locked> {
        let counts = self.counts(trying, now);
        let mut entries = self.lock();
        let locked_ms = counts
            .iter()
            .filter_map(|count| Some(entries.get(&count.key)?.locked_until.millis_since(now)))
            // A longer lock than there is: the clock was set back.
            .filter(|locked_ms| (1..=self.rules.lockout_max_ms).contains(locked_ms));
        if let Some(retry_after_ms) = locked_ms.max() {
            return Err(Locked { retry_after_ms });
        }
        for count in &counts {
            self.count(&mut entries, count.key, count.attempts, now);
        }
        drop(entries);
        Ok(Attempt {
            throttle: self.clone(),
            counts,
        })
    }

    fn counts(&self, trying: Trying<'_>, now: Timestamp) -> Vec<Count> {
        let many = self.rules.attempts.saturating_mul(SHARED_FACTOR);
        let own = |key| Count {
            key,
            attempts: self.rules.attempts,
            is_cleared: true,
        };
        let shared = |text: String| Count {
            key: self.digest(text.as_bytes()),
            attempts: many,
            is_cleared: false,
        };
        let of_network = |network: IpAddr| shared(format!("network {network}"));
        match trying {
            Trying::Password { account, network } => {
                let there = self.there(account, network);
                let account = match self.is_familiar(&there, now) {
                    true => there,
                    false => self.digest(format!("account {account}").as_bytes()),
                };
                vec![own(account), of_network(network)]
            }
            Trying::Token { network } => vec![of_network(network)],
            Trying::Current { account, by } => {
                let by = [b"by ", by].concat();
                vec![
                    own(self.digest(&by)),
                    shared(format!("those in as {account}")),
                ]
            }
        }
    }

    /// An account at an address.
    fn there(&self, account: &UserKey, network: IpAddr) -> Key {
        self.digest(format!("home of {account} at {network}").as_bytes())
    }

    fn is_familiar(&self, there: &Key, now: Timestamp) -> bool {
        let last = self.familiar().get(there).copied();
        last.is_some_and(|last| now.millis_since(last) <= FAMILIAR_MS)
    }

    /// Notes that an account has logged in from an address.
    pub fn note_home(&self, account: &UserKey, network: IpAddr, now: Timestamp) {
        let there = self.there(account, network);
        let mut familiar = self.familiar();
        let last = familiar.get(&there).copied();
        if last.is_some_and(|last| now.millis_since(last) <= FAMILIAR_AGAIN_MS) {
            return;
        }
        let mut changes = Vec::new();
        if last.is_none() && familiar.len() >= MAX_ENTRIES {
            let mut by_age: Vec<(Timestamp, Key)> =
                familiar.iter().map(|(key, last)| (*last, *key)).collect();
            by_age.sort_unstable();
            for (_, key) in by_age.into_iter().take(EVICTED) {
                familiar.remove(&key);
                changes.push(change(Table::Familiar, &key, None::<&Timestamp>));
            }
        }
        familiar.insert(there, now);
        drop(familiar);
        changes.push(change(Table::Familiar, &there, Some(&now)));
        self.store.write_later(changes);
    }

    fn digest(&self, text: &[u8]) -> Key {
        self.key.digest(text)
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
        self.familiar().retain(|key, last| {
            let is_kept = now.millis_since(*last) <= FAMILIAR_MS;
            if !is_kept {
                gone.push(change(Table::Familiar, key, None::<&Timestamp>));
            }
            is_kept
        });
        if !gone.is_empty() {
            self.store.write_later(gone);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Failures>> {
        // Entries are independent of each other, so a panic elsewhere cannot have torn more than one count.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn familiar(&self) -> MutexGuard<'_, HashMap<Key, Timestamp>> {
        // The same.
        self.familiar.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be on disk of some entries.
    fn kept(&self, counts: &[Count]) -> Vec<Change> {
        let entries = self.lock();
        let kept = |count: &Count| change(Table::Failures, &count.key, entries.get(&count.key));
        counts.iter().map(kept).collect()
    }
}

fn rows<T: DeserializeOwned>(
    store: &LoginStore,
    table: Table,
) -> Result<HashMap<Key, T>, StoreError> {
    let rows = store.scan(table, &[])?;
    let row = |(key, bytes): (Vec<u8>, Vec<u8>)| {
        Some((key.try_into().ok()?, postcard::from_bytes(&bytes).ok()?))
    };
    Ok(rows.into_iter().filter_map(row).collect())
}

fn change<T: Serialize>(table: Table, key: &Key, value: Option<&T>) -> Change {
    Change {
        table,
        key: key.to_vec(),
        value: value.and_then(|value| postcard::to_stdvec(value).ok()),
    }
}

fn removal(key: &Key) -> Change {
    change(Table::Failures, key, None::<&Failures>)
}

impl Attempt {
    /// It failed: on disk when it returns.
    pub async fn failed(self) -> Result<(), StoreError> {
        let changes = self.throttle.kept(&self.counts);
        self.throttle.store.write(changes).await
    }

    /// It succeeded: whose own count it was begins anew; one that is shared only gets this attempt back.
    pub fn succeeded(self) {
        for count in &self.counts {
            match count.is_cleared {
                true => drop(self.throttle.lock().remove(&count.key)),
                false => self.throttle.uncount(&count.key, count.attempts),
            }
        }
        let changes = self.throttle.kept(&self.counts);
        self.throttle.store.write_later(changes);
    }

    /// It came to nothing, for reasons of ours.
    pub fn withdrawn(self) {
        for count in &self.counts {
            self.throttle.uncount(&count.key, count.attempts);
        }
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

    /// A password for an account.
    fn password(account: &UserKey, network: IpAddr) -> Trying<'_> {
        Trying::Password { account, network }
    }

    #[tokio::test]
    async fn locks_double_and_are_forgotten() {
        let data = tempfile::tempdir().unwrap();
        let throttle = throttle(&data);
        let ann = user("ann");
        let mut now = START;
        let mut waits = Vec::new();
        for from in 0..12 {
            match throttle.begin(password(&ann, address(from)), now) {
                Ok(attempt) => attempt.failed().await.unwrap(),
                Err(locked) => {
                    waits.push(locked.retry_after_ms);
                    now = now + locked.retry_after_ms;
                }
            }
        }
        assert_eq!(waits, [30_000, 60_000, 120_000, 240_000]);
        assert!(
            throttle
                .begin(password(&user("bob"), address(1)), now)
                .is_ok()
        );
        // As if nothing had been.
        now = now + 2_000_000;
        for from in 0..5 {
            throttle
                .begin(password(&ann, address(from)), now)
                .ok()
                .unwrap();
        }
        assert!(throttle.begin(password(&ann, address(0)), now).is_err());
    }

    #[tokio::test]
    async fn attempts_at_once_are_counted_at_once() {
        let data = tempfile::tempdir().unwrap();
        let throttle = throttle(&data);
        let begun: Vec<_> = (0..9)
            .filter_map(|_| {
                throttle
                    .begin(password(&user("ann"), address(1)), START)
                    .ok()
            })
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
                .begin(password(&user(&name), address(1)), START)
                .ok()
                .unwrap();
            attempt.failed().await.unwrap();
            if number == 18 {
                let own = throttle
                    .begin(password(&user("own"), address(1)), START)
                    .ok()
                    .unwrap();
                own.succeeded();
            }
        }
        assert!(
            throttle
                .begin(password(&user("own"), address(1)), START)
                .is_err()
        );
        assert!(
            throttle
                .begin(password(&user("own"), address(2)), START)
                .is_ok()
        );
    }

    #[tokio::test]
    async fn a_success_clears_its_account_and_a_withdrawal_only_itself() {
        let data = tempfile::tempdir().unwrap();
        let throttle = throttle(&data);
        let ann = user("ann");
        let begin = || throttle.begin(password(&ann, address(1)), START).ok();
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
        let begin = |now| throttle.begin(password(&user("ann"), address(1)), now).ok();
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
            let _ = throttle.begin(password(&account, from), START + number as u64);
        }
        assert!(throttle.lock().len() <= MAX_ENTRIES);
        for number in 0..=MAX_ENTRIES {
            let from = IpAddr::from((number as u32).to_be_bytes());
            throttle.note_home(&user("ann"), from, START + number as u64);
        }
        assert!(throttle.familiar().len() <= MAX_ENTRIES);
    }

    #[tokio::test]
    async fn who_fails_elsewhere_locks_nobody_out_of_where_he_comes_from() {
        let data = tempfile::tempdir().unwrap();
        let throttle = throttle(&data);
        let ann = user("ann");
        throttle.note_home(&ann, address(1), START);
        for _ in 0..5 {
            throttle
                .begin(password(&ann, address(9)), START)
                .ok()
                .unwrap();
        }
        assert!(throttle.begin(password(&ann, address(9)), START).is_err());
        assert!(throttle.begin(password(&ann, address(2)), START).is_err());
        let later = START + FAMILIAR_MS;
        for now in [START, later] {
            let home = throttle.begin(password(&ann, address(1)), now);
            home.ok().unwrap().succeeded();
        }
        // A success at home does not open the account for who guesses elsewhere.
        assert!(throttle.begin(password(&ann, address(9)), START).is_err());
        // At home there is a bound, too; and it is somebody's home for so long only.
        for _ in 0..5 {
            throttle
                .begin(password(&ann, address(1)), START)
                .ok()
                .unwrap();
        }
        assert!(throttle.begin(password(&ann, address(1)), START).is_err());
        throttle.sweep(later + 1);
        assert!(throttle.familiar().is_empty());
    }

    #[tokio::test]
    async fn tokens_are_counted_by_address_alone() {
        let data = tempfile::tempdir().unwrap();
        let throttle = throttle(&data);
        let ann = user("ann");
        let token = |last| Trying::Token {
            network: address(last),
        };
        for _ in 0..5 {
            throttle
                .begin(password(&ann, address(1)), START)
                .ok()
                .unwrap();
        }
        for _ in 0..15 {
            throttle.begin(token(1), START).ok().unwrap();
        }
        assert!(throttle.begin(token(1), START).is_err());
        assert!(throttle.begin(token(2), START).is_ok());
    }

    #[tokio::test]
    async fn who_is_in_is_counted_apart_from_who_is_not() {
        let data = tempfile::tempdir().unwrap();
        let throttle = throttle(&data);
        let ann = user("ann");
        let current = |by: &'static [u8]| Trying::Current { account: &ann, by };
        for _ in 0..5 {
            throttle
                .begin(password(&ann, address(1)), START)
                .ok()
                .unwrap();
        }
        for _ in 0..5 {
            throttle.begin(current(b"one"), START).ok().unwrap();
        }
        assert!(throttle.begin(current(b"one"), START).is_err());
        // Many sessions are no way to try ever more.
        let others: [&'static [u8]; 4] = [b"two", b"three", b"four", b"five"];
        let tries = others.iter().flat_map(|by| std::iter::repeat_n(*by, 5));
        let begun = tries.filter(|by| throttle.begin(current(by), START).is_ok());
        assert_eq!(begun.count(), 15);
    }
}
