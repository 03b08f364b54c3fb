//! What tenants are still to be told: a line for each channel that is on. A receiver that does not take what it is
//! told is tried with one notice at a time, later and later, so that an outage costs few records whatever runs end
//! in it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::State;
use crate::domain::effect::{Effect, SendNotice};
use crate::domain::event::Event;
use crate::domain::ids::{PlaneId, RunId, Seq};
use crate::domain::notify::{Channel, Notice, Notify};
use crate::domain::time::Timestamp;

/// Notices of a line that are on their way at once, first tries and later ones apart: what a receiver takes badly
/// does not hold up the rest.
const AT_ONCE: usize = 8;

/// One thing to tell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Told {
    /// Whose run it is about.
    pub plane: PlaneId,
    /// `None` for a test.
    pub run: Option<RunId>,
    pub notice: Notice,
    /// When it happened.
    pub at: Timestamp,
    /// Tries so far.
    pub number: u32,
    pub not_before: Timestamp,
}

/// What came of the last try.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastTry {
    pub at: Timestamp,
    pub of: Seq,
    pub status: Option<u16>,
    pub error: Option<String>,
    pub is_delivered: bool,
}

/// One channel of a tenant.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// By the record that each tells of.
    pub waiting: BTreeMap<Seq, Told>,
    /// Those of which a try is decided, and its outcome not known yet.
    pub sending: BTreeSet<Seq>,
    /// Times in a row that nothing was delivered, bursts counted once; 0 while all is well.
    pub failures: u32,
    /// While there are failures: when it is tried again.
    pub pause_until: Timestamp,
    /// Of how many things it was not told, as too many waited or they waited for too long.
    pub skipped: u64,
    pub last: Option<LastTry>,
}

impl Line {
    /// Decides which tries may be made now; those that were not decided before.
    fn begin(&mut self) -> Vec<Seq> {
        let begun = match self.failures {
            0 => {
                let mut begun = self.next(|told| told.number == 0);
                begun.extend(self.next(|told| told.number > 0));
                begun
            }
            _ => self.probe().into_iter().collect(),
        };
        self.sending.extend(&begun);
        begun
    }

    /// The oldest of these that may be sent beside those that are.
    fn next(&self, of: impl Fn(&Told) -> bool) -> Vec<Seq> {
        let sending = self.sending.iter();
        let sending = sending.filter(|seq| self.waiting.get(*seq).is_some_and(&of));
        let room = AT_ONCE.saturating_sub(sending.count());
        let idle = self.waiting.iter();
        let idle = idle.filter(|(seq, told)| of(told) && !self.sending.contains(*seq));
        idle.take(room).map(|(seq, _)| *seq).collect()
    }

    /// One try when the pause is over, with what was tried least: a notice that alone is refused does not look like a
    /// receiver that is gone.
    fn probe(&mut self) -> Option<Seq> {
        let pause_until = self.pause_until;
        let mut sending = self.sending.iter();
        let is_soon = |told: &Told| told.not_before <= pause_until;
        if sending.any(|seq| self.waiting.get(seq).is_some_and(is_soon)) {
            return None;
        }
        let idle = self.waiting.iter_mut();
        let idle = idle.filter(|(seq, _)| !self.sending.contains(*seq));
        let (seq, told) = idle.min_by_key(|(seq, told)| (told.number, **seq))?;
        told.not_before = told.not_before.max(pause_until);
        Some(*seq)
    }

    fn remove(&mut self, of: Seq) {
        self.waiting.remove(&of);
        self.sending.remove(&of);
    }

    /// Forgets what does not pass; answers how many.
    fn retain(&mut self, keep: impl Fn(Seq, &Told) -> bool) -> u64 {
        let before = self.waiting.len();
        self.waiting.retain(|seq, told| keep(*seq, told));
        let waiting = &self.waiting;
        self.sending.retain(|seq| waiting.contains_key(seq));
        (before - self.waiting.len()) as u64
    }
}

/// The lines of all tenants.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Notices {
    pub lines: BTreeMap<(SmolStr, Channel), Line>,
    /// Tries that the last event let begin: what it implies. Not part of a snapshot.
    #[serde(skip)]
    begun: Vec<(SmolStr, Channel, Seq)>,
}

impl State {
    /// Applies an event as far as somebody is to be told of it.
    pub(super) fn apply_notices(&mut self, seq: Seq, at: Timestamp, plane: PlaneId, event: &Event) {
        self.notices.begun.clear();
        match event {
            Event::TenantNotifyChanged { tenant, notify } => self.set_lines(tenant, notify),
            Event::NotificationTestAsked { tenant } => {
                let told = Told::new(PlaneId::ROOT, None, Notice::Test, at);
                for channel in Channel::ALL {
                    self.try_out((tenant.clone(), channel), seq, told.clone());
                }
            }
            Event::NotificationAttempted { .. } => self.apply_attempt(at, event),
            Event::PlanePurged { plane } => {
                // There is nothing left to tell of.
                for line in self.notices.lines.values_mut() {
                    line.retain(|_, told| told.plane != *plane);
                }
            }
            _ => self.tell_of(seq, at, plane, event),
        }
    }

    fn tell_of(&mut self, seq: Seq, at: Timestamp, plane: PlaneId, event: &Event) {
        if self.notices.lines.is_empty() {
            return;
        }
        let Some((notice, run)) = Notice::of(event).zip(event.run()) else {
            return;
        };
        let tenant = self.tenant_of(plane).clone();
        for channel in Channel::ALL {
            let notify = self.people.notify_of(&tenant);
            let events = notify.and_then(|notify| notify.events(channel));
            if events.is_some_and(|events| events.contains(&notice)) {
                let told = Told::new(plane, Some(run), notice, at);
                self.tell(tenant.clone(), channel, seq, told);
            }
        }
    }

    fn tell(&mut self, tenant: SmolStr, channel: Channel, seq: Seq, told: Told) {
        let key = (tenant, channel);
        let Some(line) = self.notices.lines.get_mut(&key) else {
            return;
        };
        if line.waiting.len() >= channel.max_waiting() {
            line.skipped += 1;
            return;
        }
        line.waiting.insert(seq, told);
        self.begin_tries(&key);
    }

    /// A test goes at once, even where a pause is made: whoever asks for it has just put something right.
    fn try_out(&mut self, key: (SmolStr, Channel), seq: Seq, told: Told) {
        if let Some(line) = self.notices.lines.get_mut(&key)
            && line.waiting.len() < key.1.max_waiting()
        {
            line.waiting.insert(seq, told);
            line.sending.insert(seq);
            self.notices.begun.push((key.0, key.1, seq));
        }
    }

    fn begin_tries(&mut self, key: &(SmolStr, Channel)) {
        if let Some(line) = self.notices.lines.get_mut(key) {
            let begun = line.begin().into_iter();
            let begun = begun.map(|seq| (key.0.clone(), key.1, seq));
            self.notices.begun.extend(begun);
        }
    }

    /// Turns channels on and off. What waits goes where the new one leads, at once.
    fn set_lines(&mut self, tenant: &SmolStr, notify: &Notify) {
        for channel in Channel::ALL {
            let key = (tenant.clone(), channel);
            if notify.events(channel).is_none() {
                self.notices.lines.remove(&key);
                continue;
            }
            let line = self.notices.lines.entry(key.clone()).or_default();
            line.failures = 0;
            line.sending.clear();
            for told in line.waiting.values_mut() {
                told.not_before = Timestamp(0);
            }
            self.begin_tries(&key);
        }
    }

    fn apply_attempt(&mut self, at: Timestamp, event: &Event) {
        let Event::NotificationAttempted {
            tenant,
            channel,
            of,
            number,
            status,
            error,
            delivered,
            next_at,
            pause_until,
            given_up_to,
            ..
        } = event
        else {
            return;
        };
        let key = (tenant.clone(), *channel);
        let Some(line) = self.notices.lines.get_mut(&key) else {
            return;
        };
        line.last = Some(LastTry {
            at,
            of: *of,
            status: *status,
            error: error.clone(),
            is_delivered: *delivered,
        });
        if *delivered {
            line.remove(*of);
            line.failures = 0;
        } else {
            // Tries that had begun before the first failure say nothing new.
            if line.failures == 0 || at >= line.pause_until {
                line.failures = line.failures.saturating_add(1);
                line.pause_until = *pause_until;
            }
            line.sending.remove(of);
            if let Some(told) = line.waiting.get_mut(of) {
                told.number = *number;
                told.not_before = *next_at;
            }
            if let Some(to) = given_up_to {
                line.skipped += line.retain(|seq, _| seq > *to);
            }
        }
        self.begin_tries(&key);
    }

    /// Whose plane a notice is about, if it waits.
    pub fn plane_of_notice(&self, event: &Event) -> Option<PlaneId> {
        let Event::NotificationAttempted {
            tenant,
            channel,
            of,
            ..
        } = event
        else {
            return None;
        };
        let line = self.notices.lines.get(&(tenant.clone(), *channel))?;
        Some(line.waiting.get(of)?.plane)
    }

    /// The tries that the last event implies.
    pub fn begun_notices(&self) -> Vec<Effect> {
        let begun = self.notices.begun.iter();
        let effects = begun.filter_map(|(tenant, channel, seq)| {
            let line = self.notices.lines.get(&(tenant.clone(), *channel))?;
            self.send_notice(tenant, *channel, *seq, line.waiting.get(seq)?)
        });
        effects.collect()
    }

    /// The tries that were decided and have no outcome yet: a new process makes them again.
    pub fn open_notices(&self) -> Vec<Effect> {
        let mut open = Vec::new();
        for ((tenant, channel), line) in &self.notices.lines {
            open.extend(line.sending.iter().filter_map(|seq| {
                self.send_notice(tenant, *channel, *seq, line.waiting.get(seq)?)
            }));
        }
        open
    }

    fn send_notice(
        &self,
        tenant: &SmolStr,
        channel: Channel,
        of: Seq,
        told: &Told,
    ) -> Option<Effect> {
        let destination = self.people.notify_of(tenant)?.destination(channel)?;
        Some(Effect::SendNotice(Box::new(SendNotice {
            tenant: tenant.clone(),
            destination,
            of,
            plane: told.plane,
            run: told.run,
            notice: told.notice,
            at: told.at,
            number: told.number + 1,
            not_before: told.not_before,
        })))
    }
}

impl Told {
    fn new(plane: PlaneId, run: Option<RunId>, notice: Notice, at: Timestamp) -> Told {
        Told {
            plane,
            run,
            notice,
            at,
            number: 0,
            not_before: Timestamp(0),
        }
    }
}
