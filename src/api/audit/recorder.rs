//! Records of writes that left no other: refused ones, and those that had nothing left to do.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use smol_str::SmolStr;

use super::trail::Trail;
use super::window::Windows;
use crate::api::error::{ApiError, ErrorCode};
use crate::clock::now;
use crate::coordinator::{Handle, SubmitError};
use crate::domain::audit::{AuditMode, AuditedWrite};
use crate::domain::command::{Command, Origin};
use crate::domain::identity::UserKey;
use crate::domain::ids::PlaneId;
use crate::domain::tenant::Tenancy;

/// How often it is looked which windows have ended.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// The actor of requests that showed no valid credentials.
const NOBODY: &str = "nobody";

/// Records what leaves no record of its own.
pub struct Recorder {
    mode: AuditMode,
    handle: Handle,
    /// Those who are let in and those who are not are bounded apart: a flood from outside hides nobody inside.
    strangers: Mutex<Windows>,
    known: Mutex<Windows>,
}

impl Recorder {
    pub fn new(mode: AuditMode, handle: Handle) -> Recorder {
        let windows = || Mutex::new(Windows::new(Instant::now()));
        Recorder {
            mode,
            handle,
            strangers: windows(),
            known: windows(),
        }
    }

    /// Whether anything is audited.
    pub fn is_on(&self) -> bool {
        self.mode != AuditMode::Off
    }

    /// Whether a record tells of an answered write already: of one that failed, how it failed.
    pub fn is_settled(trail: &Trail, response: &Response) -> bool {
        trail.is_recorded() && response.status().as_u16() < 400
    }

    /// Records a write that the ledger knows nothing of otherwise, such as a login, as allowed: before it is done, so
    /// that it cannot be done unrecorded. Should it go wrong after all, that gets a record of its own.
    ///
    /// # Errors
    /// With `required`, when there can be no record: the write must not be done.
    pub async fn record_first(&self, trail: Option<&Trail>) -> Result<(), ApiError> {
        let Some(trail) = trail.filter(|trail| !trail.is_recorded()) else {
            return Ok(());
        };
        let write = audited(trail, StatusCode::OK, None);
        match self.record(write, trail.request_id(), true).await {
            Ok(()) => trail.note_recorded(),
            Err(error) if self.mode == AuditMode::Required => return Err(refusal(&error)),
            // It is tried again when the answer is settled.
            Err(_) => {}
        }
        Ok(())
    }

    /// Sees to it that an answered write is recorded: with success, before the answer. With `required` a refusal waits
    /// for its record too, and without one the answer becomes another refusal.
    pub async fn settle(&self, trail: &Trail, response: Response) -> Response {
        let (status, error) = (
            response.status(),
            response
                .extensions()
                .get::<ApiError>()
                .map(|error| error.code),
        );
        let has_failed = status.as_u16() >= 400;
        let write = audited(trail, status, error);
        let write = match has_failed {
            true => self.admit(write),
            // Nobody gets here who is not allowed to: told one by one.
            false => Some(write),
        };
        let Some(write) = write else {
            return response;
        };
        match self.record(write, trail.request_id(), !has_failed).await {
            Err(error) if self.mode == AuditMode::Required => refusal(&error).into_response(),
            Err(error) => {
                report(&error);
                response
            }
            Ok(()) => response,
        }
    }

    /// Tells what was counted, from time to time. Runs until dropped.
    pub async fn keep_telling(&self) {
        loop {
            tokio::time::sleep(TELL_EVERY).await;
            self.tell(false);
        }
    }

    /// Tells the counts of windows that have ended, or of `all`.
    pub fn tell(&self, all: bool) {
        let at = Instant::now();
        for windows in [&self.strangers, &self.known] {
            for write in lock(windows).ended(at, all) {
                let origin = origin(write.source.user.as_ref(), None);
                let command = Command::AuditWrite(Box::new(write));
                if let Err(error) = self.handle.tell(origin, command) {
                    report(&error);
                }
            }
        }
    }

    fn admit(&self, write: AuditedWrite) -> Option<AuditedWrite> {
        let windows = match write.source.user {
            Some(_) => &self.known,
            None => &self.strangers,
        };
        lock(windows).admit(write, Instant::now())
    }

    /// On disk when it returns, unless it is a refusal and `on`: those are not worth a wait.
    async fn record(
        &self,
        write: AuditedWrite,
        request_id: &SmolStr,
        is_allowed: bool,
    ) -> Result<(), SubmitError> {
        let origin = origin(write.source.user.as_ref(), Some(request_id));
        let command = Command::AuditWrite(Box::new(write));
        match is_allowed || self.mode == AuditMode::Required {
            true => self.handle.submit(origin, command).await.map(drop),
            false => self.handle.tell(origin, command),
        }
    }
}

fn audited(trail: &Trail, status: StatusCode, code: Option<ErrorCode>) -> AuditedWrite {
    AuditedWrite {
        source: trail.source(),
        status: status.as_u16(),
        code: code.map(|code| SmolStr::new_static(code.as_str())),
        duration_us: u64::try_from(trail.began().elapsed().as_micros()).unwrap_or(u64::MAX),
        count: 1,
        since: now(),
    }
}

/// Audit records belong to the gateway, not to a plane of those whom they are about.
fn origin(user: Option<&UserKey>, request_id: Option<&SmolStr>) -> Origin {
    Origin {
        plane: PlaneId::ROOT,
        actor: user.map_or(SmolStr::new_static(NOBODY), UserKey::actor),
        request_id: request_id.cloned(),
        tenancy: Tenancy::All,
        at: now(),
    }
}

fn lock(windows: &Mutex<Windows>) -> std::sync::MutexGuard<'_, Windows> {
    // Counts that a panic left half done are still counts.
    windows.lock().unwrap_or_else(PoisonError::into_inner)
}

fn report(error: &SubmitError) {
    metrics::counter!("rungate_audit_lost_total").increment(1);
    tracing::warn!(%error, "a write could not be recorded");
}

fn refusal(error: &SubmitError) -> ApiError {
    metrics::counter!("rungate_audit_lost_total").increment(1);
    tracing::error!(%error, "a write is refused: it cannot be recorded");
    ApiError::new(
        ErrorCode::AuditUnavailable,
        "The write cannot be recorded, and recording it is required; try again later",
    )
    .retry_after(5)
}
