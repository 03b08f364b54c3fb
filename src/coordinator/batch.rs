//! One batch: decide each message, let time and the scheduler add theirs, commit, then answer.

use std::time::Instant;

use bytes::Bytes;
use smol_str::SmolStr;
use tokio::sync::oneshot;

use super::Coordinator;
use super::handle::{Answered, Message, Once, Submission};
use crate::domain::audit::Asked;
use crate::domain::command::{Command, EndedJob, InboxCommand, Origin, Rejection, Reply};
use crate::domain::decide::decide;
use crate::domain::effect::{Effect, at_start, implied};
use crate::domain::engine::follow_up;
use crate::domain::event::Event;
use crate::domain::ids::{PlaneId, RunId};
use crate::domain::record::NewRecord;
use crate::domain::settings::Settings;
use crate::domain::state::State;
use crate::domain::time::Timestamp;
use crate::ledger::{Batch, CommitError, RunSummary, Space};

type Answer = (
    oneshot::Sender<Result<Answered, Rejection>>,
    Result<Answered, Rejection>,
);

/// What a record takes besides its payload, with its part of the indexes; rather more than less.
const RECORD_BYTES: usize = 1 << 10;

/// A batch under way.
struct Work<'a> {
    batch: Batch<'a>,
    state: &'a mut State,
    settings: &'a Settings,
    space: &'a Space,
    now: Timestamp,
    /// The request that is worked on, until a record carries it.
    asked: Option<Asked>,
    effects: Vec<Effect>,
}

impl Coordinator {
    /// Decides, commits, answers. `false` when a stop was among the messages.
    pub(super) fn work(&mut self, messages: Vec<Message>) -> Result<bool, CommitError> {
        // Time never runs backwards in the ledger, whatever the clock does.
        let now = self.clock.now();
        let mut answers: Vec<Answer> = Vec::with_capacity(messages.len());
        let mut questions = Vec::new();
        let mut go_on = true;
        let mut work = Work {
            batch: self.writer.begin()?,
            state: &mut self.state,
            settings: &self.settings,
            space: &self.space,
            now,
            asked: None,
            effects: Vec::new(),
        };
        for message in messages {
            match message {
                Message::Submit(submission) => {
                    if matches!(submission.command, Command::GatewayStarted { .. }) {
                        self.quiet = false;
                    }
                    answers.push(work.take(*submission)?);
                }
                Message::Ask(question) => questions.push(question),
                Message::Quiet => self.quiet = true,
                Message::Stop => go_on = false,
            }
        }
        if !self.quiet {
            work.follow_up()?;
            if work.batch.is_purging() {
                work.purge_on()?;
            }
            if self.keys_due <= Instant::now() {
                self.keys_due = Instant::now() + work.batch.expire_keys(now)?;
            }
        }
        let Work {
            batch, mut effects, ..
        } = work;
        if batch.has_changes() {
            batch.commit()?;
        }
        // Everything below happens after the sync.
        if !effects.is_empty() {
            self.clock.to_wall(&mut effects);
            // Nobody performs effects any more when the executor is gone: the gateway is stopping.
            let _ = self.effects.send(effects);
        }
        for (sender, reply) in answers {
            // A caller that left learns the outcome from its command id or key.
            let _ = sender.send(reply);
        }
        for question in questions {
            question(&self.state, &self.settings, now);
        }
        self.measure();
        Ok(go_on)
    }

    fn measure(&self) {
        metrics::gauge!("rungate_queue_depth").set(self.state.queue.len() as f64);
        metrics::gauge!("rungate_live_runs").set(self.state.jobs.len() as f64);
    }
}

impl Work<'_> {
    /// One submission, and what to answer once it is on disk.
    fn take(&mut self, submission: Submission) -> Result<Answer, CommitError> {
        let Submission {
            origin,
            command,
            once,
            source,
            answer,
        } = submission;
        let before = self.batch.len();
        self.asked = source.map(|source| Asked {
            source,
            duration_us: (self.now - origin.at).max(0).unsigned_abs(),
        });
        let reply = self.submit(&origin, command, once)?;
        // What time and the scheduler make of it later is not what was asked.
        self.asked = None;
        let recorded = self.batch.len() > before;
        Ok((answer, reply.map(|reply| Answered { reply, recorded })))
    }

    /// One command. A rejection changes nothing; an error ends the coordinator.
    fn submit(
        &mut self,
        origin: &Origin,
        mut command: Command,
        once: Option<Once>,
    ) -> Result<Result<Reply, Rejection>, CommitError> {
        let plane = origin.plane;
        if let Some(once) = &once
            && let Some(answered) = self.replayed(plane, once)?
        {
            return Ok(answered);
        }
        if command.grows() && self.space.is_short() {
            return Ok(Err(Rejection::DiskReserve {
                free_mib: self.space.free_bytes() >> 20,
                reserve_mib: self.space.reserve_bytes() >> 20,
            }));
        }
        if let Command::Inbox(inbox) = &mut command
            && let Some(answered) = self.prepare_inbox(plane, inbox)?
        {
            return Ok(answered);
        }
        let purged = match &command {
            Command::PurgeRun { run } => match self.batch.run(plane, *run)? {
                Some(summary) => Some((summary.ledger_len, summary.payload_bytes)),
                None => return Ok(Err(not_found(*run))),
            },
            _ => None,
        };
        let started = matches!(command, Command::GatewayStarted { .. });
        let decision = match decide(self.state, self.settings, origin, command, self.now) {
            Ok(decision) => decision,
            Err(rejection) => return Ok(Err(self.explain(plane, rejection)?)),
        };
        let mut reply = decision.reply;
        for (mut event, payload) in decision.events {
            match (&mut event, purged) {
                (Event::RunPurged { records, .. }, Some((len, _))) => *records = len,
                (Event::PayloadsPurged { .. }, Some((_, 0))) => continue,
                (Event::PayloadsPurged { bytes, .. }, Some((_, sum))) => *bytes = sum,
                _ => {}
            }
            let accepted = matches!(event, Event::CommandAccepted { .. });
            let seq = self.append(
                plane,
                &origin.actor,
                origin.request_id.as_ref(),
                event,
                payload,
            )?;
            if let (true, Reply::Inbox { seq: place, .. }) = (accepted, &mut reply) {
                *place = seq;
            }
        }
        if started {
            // What there is to tell is all among those.
            self.effects
                .retain(|effect| !matches!(effect, Effect::SendNotice(_)));
            self.effects.extend(at_start(self.state));
        }
        if let (Some(once), Reply::Started { run, position, .. }) = (once, &reply) {
            let kept = postcard::to_stdvec(&(run, position)).unwrap_or_default();
            self.batch
                .put_idempotency(plane, once.route, &once.key, once.body_hash, &kept)?;
        }
        Ok(Ok(reply))
    }

    /// The reply to an earlier request with the same key.
    fn replayed(
        &self,
        plane: PlaneId,
        once: &Once,
    ) -> Result<Option<Result<Reply, Rejection>>, CommitError> {
        let Some(stored) = self.batch.idempotency(plane, once.route, &once.key)? else {
            return Ok(None);
        };
        if stored.body_hash != once.body_hash {
            return Ok(Some(Err(Rejection::KeyReused)));
        }
        let kept: Option<(RunId, u64)> = postcard::from_bytes(&stored.reply).ok();
        Ok(kept.map(|(run, position)| {
            Ok(Reply::Started {
                run,
                position,
                duplicate: true,
            })
        }))
    }

    /// A command id that was used before is answered from the inbox; else what the store knows of an
    /// ended run is added.
    fn prepare_inbox(
        &self,
        plane: PlaneId,
        inbox: &mut InboxCommand,
    ) -> Result<Option<Result<Reply, Rejection>>, CommitError> {
        if let Some(entry) = self.batch.inbox(plane, &inbox.command)? {
            let same = entry.kind == inbox.action.kind()
                && entry.run_text == inbox.run_text
                && entry.payload_hash == *blake3::hash(&inbox.payload).as_bytes();
            return Ok(Some(if same {
                Ok(Reply::Inbox {
                    seq: entry.seq,
                    duplicate: true,
                })
            } else {
                Err(Rejection::CommandReused(inbox.command.clone()))
            }));
        }
        if let Some(run) = inbox.run
            && self.state.job(plane, run).is_none()
        {
            inbox.ended = match self.batch.run(plane, run)? {
                Some(summary) => Some(Box::new(self.ended(summary)?)),
                None => None,
            };
        }
        Ok(None)
    }

    /// What `retry` needs of an ended run.
    fn ended(&self, summary: RunSummary) -> Result<EndedJob, CommitError> {
        Ok(EndedJob {
            status: summary.status.name(),
            container: self.batch.container_of(&summary)?,
            spec: summary.spec,
            session: summary.session,
            payload: summary.payload,
            attempt: summary.attempt,
            checkpoint: summary.checkpoint,
            preempt_count: summary.preempt_count,
            purged: summary.purged,
        })
    }

    /// A run that State does not hold may have ended: that is another answer than an unknown one.
    fn explain(&self, plane: PlaneId, rejection: Rejection) -> Result<Rejection, CommitError> {
        let Rejection::RunNotFound(text) = &rejection else {
            return Ok(rejection);
        };
        let Ok(run) = text.parse::<RunId>() else {
            return Ok(rejection);
        };
        Ok(match self.batch.run(plane, run)? {
            Some(summary) => Rejection::RunEnded(run, summary.status.name()),
            None => rejection,
        })
    }

    /// What passing time and the scheduler make of it.
    fn follow_up(&mut self) -> Result<(), CommitError> {
        let actor = SmolStr::new_static("scheduler");
        while let Some(events) = follow_up(self.state, self.settings, self.now) {
            self.append_all(&actor, events)?;
        }
        Ok(())
    }

    /// Goes on with purges. A runtime of which all is removed is free again.
    fn purge_on(&mut self) -> Result<(), CommitError> {
        if !self.batch.purge_on()? {
            return Ok(());
        }
        let mut released = Vec::new();
        for runtime in self.state.people.purging() {
            let plane = runtime.plane;
            if !self.state.is_open(plane) && !self.batch.is_plane_purging(plane)? {
                released.push(Event::RuntimeReleased {
                    key: runtime.key.clone(),
                });
            }
        }
        self.append_all(&SmolStr::new_static("gateway"), released)
    }

    fn append_all(&mut self, actor: &SmolStr, events: Vec<Event>) -> Result<(), CommitError> {
        for event in events {
            self.append(PlaneId::ROOT, actor, None, event, Bytes::new())?;
        }
        Ok(())
    }

    /// An event about a run belongs to the run's plane, whoever reports it.
    fn plane_of(&self, event: &Event) -> Option<PlaneId> {
        let run = event.run()?;
        let job = self.state.jobs.get(&run).map(|job| job.plane);
        let callback = || {
            self.state
                .callbacks
                .get(&run)
                .map(|callback| callback.plane)
        };
        self.state.plane_of_notice(event).or(job).or_else(callback)
    }

    /// Appends one event, applies it, and notes what it implies.
    fn append(
        &mut self,
        plane: PlaneId,
        actor: &SmolStr,
        request_id: Option<&SmolStr>,
        event: Event,
        payload: Bytes,
    ) -> Result<u64, CommitError> {
        let plane = self.plane_of(&event).unwrap_or(plane);
        let payload_bytes = payload.len();
        self.space.spend(payload_bytes + RECORD_BYTES);
        let record = NewRecord {
            plane,
            at: self.now,
            actor: actor.clone(),
            request_id: request_id.cloned(),
            asked: self.asked.take(),
            event,
            payload,
        };
        let appended = self.batch.append(&record)?;
        let folded = (&record.event, payload_bytes as u64);
        self.state.fold(appended.seq, self.now, plane, folded);
        self.effects.extend(implied(self.state, &record.event));
        self.effects.extend(self.state.begun_notices());
        Ok(appended.seq)
    }
}

fn not_found(run: RunId) -> Rejection {
    Rejection::RunNotFound(SmolStr::new(run.to_string()))
}
