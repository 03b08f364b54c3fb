//! What every handler shares, and the ways to ask: commands to the coordinator, reads of the ledger.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::audit::{Recorder, Trail};
use super::config::ApiConfig;
use super::error::ApiError;
use super::guard::{Caller, HostRules};
use super::health::Readiness;
use super::limits::Limits;
use super::slow::SlowHashes;
use crate::auth::Authenticator;
use crate::auth::checkpoint_key::CheckpointKey;
use crate::auth::logins::Logins;
use crate::auth::ntfy_token::NtfyTokens;
use crate::coordinator::{Answered, Handle, Once, SubmitError};
use crate::domain::command::{Command, Origin, Reply};
use crate::domain::ids::{PlaneId, RunId};
use crate::driver::{Docker, Logs};
use crate::gpu::Samples;
use crate::ledger::{Ledger, ReadError, RunSummary, Space};
use crate::telemetry::Metrics;

/// What the HTTP side is made of; filled by the server.
pub struct Parts {
    pub config: ApiConfig,
    pub handle: Handle,
    pub ledger: Ledger,
    /// Of the ledger's disk.
    pub space: Space,
    pub auth: Authenticator,
    pub checkpoint_key: CheckpointKey,
    pub logins: Logins,
    pub ntfy_tokens: NtfyTokens,
    pub metrics: Metrics,
    /// The services' output.
    pub logs: Logs,
    pub docker: Docker,
    /// What was measured of the GPUs lately.
    pub gpus: Samples,
    /// Cancelled when the gateway begins to stop: streams end, `/readyz` says so.
    pub stopping: CancellationToken,
}

/// Shared by all handlers.
#[derive(Clone)]
pub struct App(Arc<Inner>);

/// Held by [`App`]; public only for its dereference.
pub struct Inner {
    pub config: ApiConfig,
    pub handle: Handle,
    pub ledger: Ledger,
    pub space: Space,
    pub auth: Authenticator,
    pub checkpoint_key: CheckpointKey,
    pub audit: Recorder,
    pub logins: Logins,
    pub ntfy_tokens: NtfyTokens,
    pub metrics: Metrics,
    pub logs: Logs,
    pub docker: Docker,
    pub gpus: Samples,
    pub stopping: CancellationToken,
    pub hosts: HostRules,
    pub limits: Limits,
    pub readiness: Readiness,
    /// Passwords and imported tokens.
    pub slow_hashes: SlowHashes,
    /// Signs list cursors; of this ledger, so that cursors outlive a restart.
    pub cursor_key: [u8; 32],
}

impl std::ops::Deref for App {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl App {
    /// Puts the parts together.
    pub fn new(parts: Parts) -> App {
        let cursor_key = blake3::derive_key(
            "rungate 2026-11 list cursor",
            parts.ledger.instance_id().as_bytes(),
        );
        App(Arc::new(Inner {
            hosts: HostRules::new(&parts.config),
            limits: Limits::new(&parts.config),
            readiness: Readiness::default(),
            slow_hashes: SlowHashes::new(),
            cursor_key,
            audit: Recorder::new(parts.config.audit, parts.handle.clone()),
            config: parts.config,
            handle: parts.handle,
            ledger: parts.ledger,
            space: parts.space,
            auth: parts.auth,
            checkpoint_key: parts.checkpoint_key,
            logins: parts.logins,
            ntfy_tokens: parts.ntfy_tokens,
            metrics: parts.metrics,
            logs: parts.logs,
            docker: parts.docker,
            gpus: parts.gpus,
            stopping: parts.stopping,
        }))
    }

    /// Asks the coordinator on behalf of a caller; answered when it is on disk.
    pub fn submit<'a>(
        &self,
        caller: &'a Caller,
        command: Command,
    ) -> impl Future<Output = Result<Reply, ApiError>> + use<'a> {
        let answered = self.put(caller, command, None);
        async move { Ok(answered.await?) }
    }

    /// The same, under an Idempotency-Key if there is one. The first record that comes of a request carries it for
    /// the audit.
    pub fn put<'a>(
        &self,
        caller: &'a Caller,
        command: Command,
        once: Option<Once>,
    ) -> impl Future<Output = Result<Reply, SubmitError>> + use<'a> {
        self.put_as(caller.origin(), caller, command, once)
    }

    /// Submits at once; the future waits for the answer.
    fn put_as<'a>(
        &self,
        origin: Origin,
        caller: &'a Caller,
        command: Command,
        once: Option<Once>,
    ) -> impl Future<Output = Result<Reply, SubmitError>> + use<'a> {
        let source = caller.trail.as_ref().and_then(Trail::to_carry);
        let answered = self.handle.put(origin, command, once, source);
        async move {
            let Answered { reply, recorded } = answered.await?;
            if let (true, Some(trail)) = (recorded, &caller.trail) {
                trail.note_recorded();
            }
            Ok(reply)
        }
    }

    /// A read that may visit many entries, away from the threads that serve connections. So many go on at once, those
    /// included whose callers have left.
    pub async fn scan<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Ledger) -> Result<T, ReadError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let place = self.limits.scan().await;
        self.scan_in(place, read).await
    }

    /// The same, for one that visits the whole ledger: it holds the caller's place among the streams to its end, and
    /// none that short reads wait for.
    pub async fn scan_in<T: Send + 'static>(
        &self,
        place: impl Send + 'static,
        read: impl FnOnce(&Ledger) -> Result<T, ReadError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let ledger = self.ledger.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let _place = place;
            read(&ledger)
        });
        match reading.await {
            Ok(read) => Ok(read?),
            Err(error) => {
                tracing::error!(error = %error, "a read of the ledger did not end");
                Err(ApiError::internal())
            }
        }
    }

    /// The same, about something of another plane that the caller may steer.
    pub async fn submit_in(
        &self,
        plane: PlaneId,
        caller: &Caller,
        command: Command,
    ) -> Result<Reply, ApiError> {
        let origin = Origin {
            plane,
            ..caller.origin()
        };
        Ok(self.put_as(origin, caller, command, None).await?)
    }

    /// A run of the caller's own plane by the id in the path; anything else is 404.
    pub fn own_run(&self, caller: &Caller, id: &str) -> Result<RunSummary, ApiError> {
        let run = parse_run(id)?;
        self.ledger
            .run(caller.plane(), run)?
            .ok_or_else(|| ApiError::run_not_found(id))
    }

    /// A run that the caller may see, by the id in the path; anything else is 404.
    pub async fn run(&self, caller: &Caller, id: &str) -> Result<RunSummary, ApiError> {
        self.find_run(caller, parse_run(id)?)
            .await?
            .ok_or_else(|| ApiError::run_not_found(id))
    }

    /// A run of the caller's plane or, for those who see their whole tenant, of any plane of it.
    pub async fn find_run(
        &self,
        caller: &Caller,
        run: RunId,
    ) -> Result<Option<RunSummary>, ApiError> {
        let own = self.ledger.run(caller.plane(), run)?;
        if own.is_some() || !caller.principal.sees_tenant() {
            return Ok(own);
        }
        let tenant = caller.principal.user.tenant.clone();
        self.scan(move |ledger| ledger.run_of_tenant(&tenant, run))
            .await
    }
}

/// A run id; what is none names no run.
pub fn parse_run(id: &str) -> Result<RunId, ApiError> {
    id.parse().map_err(|_| ApiError::run_not_found(id))
}
