//! Notifications: tells a tenant's channels of its runs, by a text to an ntfy topic or by signed JSON to a URL. One try
//! each; when to try again is the coordinator's to say. ntfy's headers: docs.ntfy.sh/publish.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::RequestBuilder;
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use smol_str::SmolStr;

use super::Inner;
use super::callback::{answered, not_called, told};
use super::owed::Due;
use super::webhook::CloudEvent;
use crate::domain::command::{Command, NoticeTried};
use crate::domain::effect::SendNotice;
use crate::domain::notify::{Destination, Notice};
use crate::domain::time::Timestamp;
use crate::driver::join;

/// Characters of a service type in a title, and of an error in a text.
const TITLE_CHARS: usize = 80;
const ERROR_CHARS: usize = 300;

/// The access token of a tenant's topic at this server, if one was given. Reads a file.
pub type NtfyToken = Arc<dyn Fn(&str, &str) -> Option<SecretString> + Send + Sync>;

/// What is told of a run, besides what has happened: nothing of its payload and its result.
#[derive(Clone, Debug, Default)]
pub struct NoticeFacts {
    pub service_type: Option<SmolStr>,
    /// Where it ran last.
    pub service: Option<SmolStr>,
    /// Of one that has failed.
    pub error: Option<String>,
}

impl Due for Box<SendNotice> {
    const NAME: &'static str = "notification";

    fn tenant(&self) -> &SmolStr {
        &self.tenant
    }

    fn not_before(&self) -> Timestamp {
        self.not_before
    }

    async fn send(self, inner: Arc<Inner>) {
        let tried = match attempt(&inner, &self).await {
            Ok(Some(status)) => Ok(status),
            // Where it should go was changed meanwhile: it is on its way there, or not wanted any more.
            Ok(None) => return,
            Err(error) => Err(error),
        };
        let (status, error) = told(tried);
        let tried = NoticeTried {
            channel: self.destination.channel(),
            tenant: self.tenant,
            of: self.of,
            number: self.number,
            status,
            error,
        };
        inner
            .outcomes
            .report(Command::NoticeTried(Box::new(tried)))
            .await;
    }
}

/// What the ledger and the token's file say at the time of sending.
struct Found {
    facts: NoticeFacts,
    token: Option<SecretString>,
}

/// The answer's status, or why there is none; `None` when it is not to be sent there any more.
async fn attempt(inner: &Arc<Inner>, notice: &SendNotice) -> Result<Option<u16>, String> {
    let Some(found) = look_up(inner, notice).await? else {
        return Ok(None);
    };
    let request = match &notice.destination {
        Destination::Ntfy { url, topic } => {
            let url = join(url, topic);
            let request = inner.notice_client.post(&url);
            ntfy(request.map_err(|error| not_called(&error))?, notice, &found)
        }
        Destination::Webhook { url } => {
            let request = inner.notice_client.post(url);
            let request = request.map_err(|error| not_called(&error))?;
            webhook(inner, request, notice, &found.facts)
        }
    };
    answered(request).await.map(Some)
}

async fn look_up(inner: &Arc<Inner>, notice: &SendNotice) -> Result<Option<Found>, String> {
    let (plane, run, tenant) = (notice.plane, notice.run, notice.tenant.clone());
    let destination = notice.destination.clone();
    let token_of = inner.options.ntfy_token.clone();
    let found = inner.read(move |source| {
        let now = source.notify(&tenant)?.destination(destination.channel());
        if now.as_ref() != Some(&destination) {
            return Ok(None);
        }
        let facts = match run {
            Some(run) => source.notice_facts(plane, run)?,
            None => None,
        };
        let token = match &destination {
            Destination::Ntfy { url, .. } => token_of(&tenant, url),
            Destination::Webhook { .. } => None,
        };
        let facts = facts.unwrap_or_default();
        Ok(Some(Found { facts, token }))
    });
    let unread = |error| format!("what there is to tell cannot be read: {error}");
    found.await.map_err(unread)
}

fn ntfy(request: RequestBuilder, notice: &SendNotice, found: &Found) -> RequestBuilder {
    let request = request
        .header("Title", header_text(&title(notice.notice, &found.facts)))
        .header("Priority", priority(notice.notice))
        .header("Tags", tags(notice.notice))
        .body(text(notice, &found.facts));
    match &found.token {
        Some(token) => request.bearer_auth(token.expose_secret()),
        None => request,
    }
}

/// ntfy's scale: 1 to 5, of which 3 is usual.
fn priority(notice: Notice) -> &'static str {
    match notice {
        Notice::Failed => "4",
        Notice::Completed | Notice::Cancelled | Notice::Preempted | Notice::Test => "3",
        Notice::Resumed => "2",
    }
}

/// Names of emoji, which ntfy shows before the title.
fn tags(notice: Notice) -> &'static str {
    match notice {
        Notice::Completed => "white_check_mark",
        Notice::Failed => "x",
        Notice::Cancelled => "no_entry_sign",
        Notice::Preempted => "pause_button",
        Notice::Resumed => "arrow_forward",
        Notice::Test => "bell",
    }
}

/// Up to `max` characters, without control characters: types and errors are written by strangers.
fn plain(text: &str, max: usize) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    let mut plain: String = text.chars().take(max).map(clean).collect();
    if text.chars().nth(max).is_some() {
        plain.push('…');
    }
    plain
}

fn title(notice: Notice, facts: &NoticeFacts) -> String {
    let what = match notice {
        Notice::Test => return "Test of notifications".to_owned(),
        notice => notice.name(),
    };
    match &facts.service_type {
        Some(kind) => format!("{} job {what}", plain(kind, TITLE_CHARS)),
        None => format!("Job {what}"),
    }
}

/// A header's value: printable ASCII as it is, else an encoded word (RFC 2047), which ntfy decodes.
fn header_text(text: &str) -> String {
    match text.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        true => text.to_owned(),
        false => format!("=?UTF-8?B?{}?=", STANDARD.encode(text)),
    }
}

fn text(notice: &SendNotice, facts: &NoticeFacts) -> String {
    let Some(run) = notice.run else {
        let tenant = &notice.tenant;
        return format!("Notifications of tenant {tenant} arrive here.");
    };
    let place = match &facts.service {
        Some(service) => format!(" on {service}"),
        None => String::new(),
    };
    let error = match &facts.error {
        Some(error) => format!(": {}", plain(error, ERROR_CHARS)),
        None => ".".to_owned(),
    };
    match notice.notice {
        Notice::Completed => format!("Job {run} has completed{place}."),
        Notice::Failed => format!("Job {run} has failed{place}{error}"),
        Notice::Cancelled => format!("Job {run} was cancelled."),
        Notice::Preempted => {
            format!("Job {run} makes room{place} for a more urgent one; it goes on later.")
        }
        Notice::Resumed => format!("Job {run} is back in the queue."),
        Notice::Test => format!("Job {run}."),
    }
}

fn webhook(
    inner: &Inner,
    request: RequestBuilder,
    notice: &SendNotice,
    facts: &NoticeFacts,
) -> RequestBuilder {
    let failed = (notice.notice == Notice::Failed).then_some(&facts.error);
    let body = json!({
        "event": notice.notice.name(),
        "job_id": notice.run.map(|run| run.to_string()),
        "tenant_id": notice.tenant,
        "service_type": facts.service_type,
        "service_name": facts.service,
        "error": failed,
        "timestamp": notice.at,
    });
    let json = body.to_string().into_bytes();
    let event = CloudEvent {
        id: format!("evt_{}_{}", inner.options.ledger.simple(), notice.of),
        kind: event_type(notice.notice),
        subject: notice.run,
        time: notice.at,
    };
    event.signed(&inner.options, request, &json).body(json)
}

fn event_type(notice: Notice) -> &'static str {
    match notice {
        Notice::Completed => "rungate.run.completed",
        Notice::Failed => "rungate.run.failed",
        Notice::Cancelled => "rungate.run.cancelled",
        Notice::Preempted => "rungate.run.preempted",
        Notice::Resumed => "rungate.run.resumed",
        Notice::Test => "rungate.test",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_title_breaks_out_of_its_header() {
        let facts = |kind: &str| NoticeFacts {
            service_type: Some(kind.into()),
            ..NoticeFacts::default()
        };
        let of = |kind: &str| header_text(&title(Notice::Failed, &facts(kind)));
        assert_eq!(of("llm"), "llm job failed");
        assert_eq!(of("a\r\nX-Evil: 1"), "a  X-Evil: 1 job failed");
        let encoded = of("Über\u{85}x");
        let word = encoded
            .strip_prefix("=?UTF-8?B?")
            .and_then(|word| word.strip_suffix("?="));
        let bytes = STANDARD.decode(word.unwrap()).unwrap();
        assert_eq!(String::from_utf8(bytes).unwrap(), "Über x job failed");
        assert!(of(&"x".repeat(200)).len() < 200);
        assert_eq!(
            title(Notice::Completed, &NoticeFacts::default()),
            "Job completed"
        );
    }
}
