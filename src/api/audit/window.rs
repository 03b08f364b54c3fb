//! Counting refusals that are alike. The first of each kind is recorded at once; further ones within the window are
//! counted, and told by one record at its end. What is beyond the bounds is counted by status alone.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smol_str::SmolStr;

use crate::api::client::Client;
use crate::domain::audit::{AuditedWrite, Source};
use crate::domain::identity::UserKey;

/// How long refusals of a kind are counted before they are told.
pub const WINDOW: Duration = Duration::from_secs(10);

/// Kinds that are told apart within a window.
const MAX_KINDS: usize = 256;

/// Records that may be made at once, and each second in the long run: 300 bytes each, that is 100 MB a day of an
/// attack that never ends.
const BURST: f64 = 256.0;
const PER_SECOND: f64 = 4.0;

/// What is alike.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Kind {
    user: Option<UserKey>,
    /// The account that a login tried. Whoever is throttled tries any number of them: those are alike.
    tried: Option<UserKey>,
    network: Option<IpAddr>,
    method: SmolStr,
    route: SmolStr,
    status: u16,
}

/// Refusals of a kind since the one that was recorded.
struct Counted {
    /// The window's end.
    ends: Instant,
    /// The first that is only counted; its count grows.
    write: Option<AuditedWrite>,
}

/// Windows of all kinds, and how many records may still be made.
pub struct Windows {
    kinds: HashMap<Kind, Counted>,
    /// By status: what could not be told apart. Told at `others_end`.
    others: HashMap<u16, AuditedWrite>,
    others_end: Instant,
    allowance: f64,
    filled: Instant,
}

impl Windows {
    pub fn new(now: Instant) -> Windows {
        Windows {
            kinds: HashMap::new(),
            others: HashMap::new(),
            others_end: now,
            allowance: BURST,
            filled: now,
        }
    }

    /// The write, when it is to be recorded now; else it was counted.
    pub fn admit(&mut self, write: AuditedWrite, now: Instant) -> Option<AuditedWrite> {
        let kind = Kind::of(&write);
        if let Some(counted) = self.kinds.get_mut(&kind) {
            match &mut counted.write {
                Some(first) => first.count += write.count,
                None => counted.write = Some(write),
            }
            return None;
        }
        if self.kinds.len() >= MAX_KINDS || !self.spend(now) {
            self.count_among_others(write, now);
            return None;
        }
        let ends = now + WINDOW;
        self.kinds.insert(kind, Counted { ends, write: None });
        Some(write)
    }

    /// What is to be told of windows that have ended, or of `all`.
    pub fn ended(&mut self, now: Instant, all: bool) -> Vec<AuditedWrite> {
        let over = |counted: &Counted| all || counted.ends <= now;
        let ended: Vec<Counted> = self
            .kinds
            .extract_if(|_, counted| over(counted))
            .map(|(_, counted)| counted)
            .collect();
        let mut told = Vec::new();
        for write in ended.into_iter().filter_map(|counted| counted.write) {
            match self.spend(now) {
                true => told.push(write),
                false => self.count_among_others(write, now),
            }
        }
        // There are few statuses, and each is told once in a window.
        if all || self.others_end <= now {
            told.extend(self.others.drain().map(|(_, write)| write));
        }
        told.sort_by_key(|write| write.since);
        told
    }

    fn count_among_others(&mut self, write: AuditedWrite, now: Instant) {
        if self.others.is_empty() {
            self.others_end = now + WINDOW;
        }
        let other = self.others.entry(write.status);
        let count = write.count;
        let among = other.or_insert_with(|| AuditedWrite {
            source: Arc::new(Source {
                route: SmolStr::new_static("(many)"),
                ..Source::default()
            }),
            code: None,
            duration_us: 0,
            count: 0,
            ..write
        });
        among.count += count;
    }

    /// Whether one more record may be made.
    fn spend(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = now;
        self.allowance = (self.allowance + passed * PER_SECOND).min(BURST);
        if self.allowance < 1.0 {
            return false;
        }
        self.allowance -= 1.0;
        true
    }
}

impl Kind {
    fn of(write: &AuditedWrite) -> Kind {
        let Source {
            user,
            address,
            method,
            route,
            details,
            ..
        } = &*write.source;
        let is_https = false;
        let is_throttled = write.status == 429;
        Kind {
            user: user.clone(),
            tried: details.tried.clone().filter(|_| !is_throttled),
            network: address.map(|address| Client { address, is_https }.network()),
            method: method.clone(),
            route: route.clone(),
            status: write.status,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::time::Timestamp;

    fn write(address: u32, status: u16) -> AuditedWrite {
        AuditedWrite {
            source: Arc::new(Source {
                address: Some(IpAddr::from(address.to_be_bytes())),
                method: "POST".into(),
                route: "/commands".into(),
                ..Source::default()
            }),
            status,
            code: None,
            duration_us: 1,
            count: 1,
            since: Timestamp(1),
        }
    }

    #[test]
    fn the_first_is_recorded_and_the_rest_are_told_as_a_count() {
        let start = Instant::now();
        let mut windows = Windows::new(start);
        assert!(windows.admit(write(1, 401), start).is_some());
        for _ in 0..10 {
            assert!(windows.admit(write(1, 401), start).is_none());
        }
        assert!(windows.admit(write(1, 403), start).is_some());
        assert!(windows.admit(write(2, 401), start).is_some());
        assert_eq!(windows.ended(start, false), []);
        let told = windows.ended(start + WINDOW, false);
        assert_eq!(
            told.iter().map(|write| write.count).collect::<Vec<_>>(),
            [10]
        );
        assert!(windows.admit(write(1, 401), start + WINDOW).is_some());
    }

    #[test]
    fn a_flood_from_everywhere_makes_few_records_and_loses_no_count() {
        let start = Instant::now();
        let mut windows = Windows::new(start);
        let (mut records, mut counted, mut sent) = (0u64, 0, 0);
        let seconds = 600;
        for second in 0..seconds {
            let now = start + Duration::from_secs(second);
            for address in 0..1_000 {
                sent += 1;
                let address = address * 601 + u32::try_from(second).unwrap();
                if let Some(write) = windows.admit(write(address, 401), now) {
                    records += 1;
                    counted += write.count;
                }
            }
            for write in windows.ended(now, second + 1 == seconds) {
                records += 1;
                counted += write.count;
            }
        }
        assert_eq!(counted, sent);
        let most = BURST as u64 + (PER_SECOND as u64 + 1) * seconds;
        assert!(records <= most, "{records} of {sent}");
    }
}
