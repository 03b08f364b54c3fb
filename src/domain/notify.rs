//! Who is told of runs beside their submitters: a tenant's ntfy topic and its webhook. Off until its administrators
//! say where to.

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::event::{Event, RequeueCause};

/// A way to tell a tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Channel {
    /// A text for people, to a topic of an ntfy server.
    Ntfy,
    /// JSON for programs, signed.
    Webhook,
}

impl Channel {
    pub const ALL: [Channel; 2] = [Channel::Ntfy, Channel::Webhook];

    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Channel::Ntfy => "ntfy",
            Channel::Webhook => "webhook",
        }
    }

    /// Notices that may wait; of more it is not told.
    pub fn max_waiting(self) -> usize {
        match self {
            Channel::Ntfy => 1_000,
            Channel::Webhook => 10_000,
        }
    }

    /// Milliseconds after which a notice has no use any more, whatever the settings say.
    pub fn max_age_ms(self) -> u64 {
        match self {
            // Nobody wants to be woken for yesterday's jobs.
            Channel::Ntfy => 3_600_000,
            Channel::Webhook => u64::MAX,
        }
    }
}

/// What is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Notice {
    Completed,
    Failed,
    Cancelled,
    /// Stopped in favour of a more urgent run.
    Preempted,
    /// Back in the queue, after it was preempted or paused.
    Resumed,
    /// Somebody tries the channel.
    Test,
}

impl Notice {
    /// Those that a channel may be asked for.
    pub const OF_RUNS: [Notice; 5] = [
        Notice::Completed,
        Notice::Failed,
        Notice::Cancelled,
        Notice::Preempted,
        Notice::Resumed,
    ];

    /// What ntfy is told where nothing is chosen (`contracts/gpu-gateway.md` section 4).
    pub const OF_NTFY: [Notice; 4] = [
        Notice::Completed,
        Notice::Failed,
        Notice::Preempted,
        Notice::Resumed,
    ];

    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Notice::Completed => "completed",
            Notice::Failed => "failed",
            Notice::Cancelled => "cancelled",
            Notice::Preempted => "preempted",
            Notice::Resumed => "resumed",
            Notice::Test => "test",
        }
    }

    /// What an event about a run gives to tell, if anything.
    pub fn of(event: &Event) -> Option<Notice> {
        match event {
            Event::JobCompleted { .. } => Some(Notice::Completed),
            Event::JobFailed { .. } => Some(Notice::Failed),
            Event::JobCancelled { .. } => Some(Notice::Cancelled),
            Event::JobPreempted { .. } => Some(Notice::Preempted),
            Event::JobResumed { .. }
            | Event::JobRequeued {
                cause: RequeueCause::PreemptorEnded | RequeueCause::Released,
                ..
            } => Some(Notice::Resumed),
            _ => None,
        }
    }
}

/// A topic of an ntfy server. Its access token is in no ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ntfy {
    /// The server, without the topic.
    pub url: SmolStr,
    pub topic: SmolStr,
    pub events: Vec<Notice>,
    /// The gateway's settings say so, and take it back.
    pub by_settings: bool,
}

/// Whether ntfy takes it for a topic.
pub fn is_ntfy_topic(topic: &str) -> bool {
    let is_of_topic = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    (1..=64).contains(&topic.len()) && topic.chars().all(is_of_topic)
}

/// A URL that gets signed JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Webhook {
    pub url: SmolStr,
    pub events: Vec<Notice>,
}

/// Where a tenant is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notify {
    pub ntfy: Option<Ntfy>,
    pub webhook: Option<Webhook>,
}

/// Where one notice goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    Ntfy { url: SmolStr, topic: SmolStr },
    Webhook { url: SmolStr },
}

impl Destination {
    /// The channel that leads there.
    pub fn channel(&self) -> Channel {
        match self {
            Destination::Ntfy { .. } => Channel::Ntfy,
            Destination::Webhook { .. } => Channel::Webhook,
        }
    }
}

impl Notify {
    /// What a channel is told; `None` where it is off.
    pub fn events(&self, channel: Channel) -> Option<&[Notice]> {
        match channel {
            Channel::Ntfy => self.ntfy.as_ref().map(|ntfy| ntfy.events.as_slice()),
            Channel::Webhook => self.webhook.as_ref().map(|hook| hook.events.as_slice()),
        }
    }

    /// Where a channel leads; `None` where it is off.
    pub fn destination(&self, channel: Channel) -> Option<Destination> {
        match channel {
            Channel::Ntfy => self.ntfy.as_ref().map(|ntfy| Destination::Ntfy {
                url: ntfy.url.clone(),
                topic: ntfy.topic.clone(),
            }),
            Channel::Webhook => self.webhook.as_ref().map(|hook| Destination::Webhook {
                url: hook.url.clone(),
            }),
        }
    }
}

/// What is to become of it: `None` leaves a channel as it is, `Some(None)` turns it off.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NotifyChange {
    pub ntfy: Option<Option<Ntfy>>,
    pub webhook: Option<Option<Webhook>>,
}

impl NotifyChange {
    /// The whole with the changes made.
    pub fn of(self, old: Notify) -> Notify {
        Notify {
            ntfy: self.ntfy.unwrap_or(old.ntfy),
            webhook: self.webhook.unwrap_or(old.webhook),
        }
    }
}
