//! Notifications: where tenants are told of their runs, and when what was not taken is told again.

use smol_str::SmolStr;

use super::job::backoff_ms;
use super::user::Decided;
use super::{Context, Decision};
use crate::domain::command::NoticeTried;
use crate::domain::event::Event;
use crate::domain::identity::IdentityRejection;
use crate::domain::notify::{Channel, Notify, NotifyChange, Ntfy};
use crate::domain::state::notices::Line;
use crate::domain::tenant::{DEFAULT_TENANT, TenantProfile};

impl Context<'_> {
    fn notify_of(&self, tenant: &str) -> Notify {
        let notify = self.state.people.notify_of(tenant);
        notify.cloned().unwrap_or_default()
    }

    /// Says where a tenant is told. One that only exists through its users becomes a tenant of its own.
    pub(super) fn set_notify(&self, tenant: SmolStr, change: NotifyChange) -> Decided {
        let people = &self.state.people;
        let known = people.tenants.contains_key(&tenant);
        let has_users = || tenant == DEFAULT_TENANT || people.users_of(&tenant).next().is_some();
        if !known && !has_users() {
            return Err(IdentityRejection::TenantNotFound);
        }
        let old = self.notify_of(&tenant);
        let notify = change.of(old.clone());
        if notify == old {
            return Ok(Vec::new());
        }
        let mut events = Vec::new();
        if !known {
            self.room_for_tenant()?;
            let profile = TenantProfile::plain(&tenant);
            events.push(Event::TenantCreated {
                tenant: tenant.clone(),
                profile,
            });
        }
        events.push(Event::TenantNotifyChanged { tenant, notify });
        Ok(events)
    }

    /// A test of each channel that is on.
    pub(super) fn test_notify(&self, tenant: SmolStr) -> Decided {
        let notify = self.notify_of(&tenant);
        match Channel::ALL.iter().any(|c| notify.events(*c).is_some()) {
            true => Ok(vec![Event::NotificationTestAsked { tenant }]),
            false => Err(IdentityRejection::NothingToTest(tenant)),
        }
    }

    /// The default tenant's topic, where the settings name one or named one before.
    pub(super) fn notify_by_settings(&self) -> Vec<Event> {
        let kept = self.notify_of(&DEFAULT_TENANT).ntfy;
        let wanted = self.settings.ntfy.as_ref().map(|(url, topic)| Ntfy {
            url: url.clone(),
            topic: topic.clone(),
            // What it is told may be chosen by its administrators.
            events: match &kept {
                Some(kept) => kept.events.clone(),
                None => crate::domain::notify::Notice::OF_NTFY.to_vec(),
            },
            by_settings: true,
        });
        let ntfy = match (wanted, kept) {
            (None, Some(kept)) if kept.by_settings => None,
            (None, _) => return Vec::new(),
            (wanted, _) => wanted,
        };
        let change = NotifyChange {
            ntfy: Some(ntfy),
            webhook: None,
        };
        // The default tenant is always there.
        self.set_notify(DEFAULT_TENANT.clone(), change)
            .unwrap_or_default()
    }

    /// What came of a try. One that is not waited for any more changes nothing.
    pub(super) fn notice_tried(&self, tried: NoticeTried) -> Decision {
        let NoticeTried {
            tenant,
            channel,
            of,
            number,
            status,
            error,
        } = tried;
        let line = self.state.notices.lines.get(&(tenant.clone(), channel));
        let told = line.and_then(|line| line.waiting.get(&of).map(|told| (line, told)));
        let Some((line, told)) = told.filter(|(_, told)| told.number < number) else {
            return Decision::done(Vec::new());
        };
        let delivered = status.is_some_and(|status| (200..300).contains(&status));
        let again = |n| {
            let settings = self.settings;
            let max_ms = settings.callback_max_delay_ms;
            self.now + backoff_ms(settings.callback_base_ms, max_ms, n)
        };
        let event = Event::NotificationAttempted {
            run: told.run,
            tenant,
            channel,
            of,
            number,
            status,
            error,
            delivered,
            next_at: again(number),
            pause_until: again(line.failures.saturating_add(1)),
            given_up_to: match delivered {
                true => None,
                false => self.too_old(channel, line),
            },
        };
        Decision::done(vec![event])
    }

    /// The last of those that have waited for too long.
    fn too_old(&self, channel: Channel, line: &Line) -> Option<u64> {
        let max_age_ms = channel.max_age_ms().min(self.settings.callback_give_up_ms);
        let waiting = line.waiting.iter();
        let old = waiting.take_while(|(_, told)| told.at + max_age_ms <= self.now);
        old.last().map(|(seq, _)| *seq)
    }
}
