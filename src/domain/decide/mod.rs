//! `decide`: what a command comes to, given State and the time. Events, or a rejection that changes nothing.

mod gateway;
mod gpu;
mod inbox;
mod instance;
mod job;
mod ladder;
mod notify;
mod service;
mod tenant;
mod tick;
mod user;

use bytes::Bytes;

use super::command::{Command, Origin, Rejection, Reply};
use super::event::Event;
use super::settings::Settings;
use super::state::State;
use super::tenant::Tenancy;
use super::time::Timestamp;

/// Events to append, each with its payload, and the answer once they are on disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub events: Vec<(Event, Bytes)>,
    pub reply: Reply,
}

impl Decision {
    /// Events without payloads.
    fn of(events: Vec<Event>, reply: Reply) -> Decision {
        let events = events
            .into_iter()
            .map(|event| (event, Bytes::new()))
            .collect();
        Decision { events, reply }
    }

    fn done(events: Vec<Event>) -> Decision {
        Decision::of(events, Reply::Done)
    }

    fn with(event: Event, payload: Bytes, reply: Reply) -> Decision {
        Decision {
            events: vec![(event, payload)],
            reply,
        }
    }
}

/// What a decision may depend on.
pub struct Context<'a> {
    pub state: &'a State,
    /// Of whoever asks.
    pub tenancy: &'a Tenancy,
    pub settings: &'a Settings,
    pub now: Timestamp,
}

/// Decides one command.
pub fn decide(
    state: &State,
    settings: &Settings,
    origin: &Origin,
    command: Command,
    now: Timestamp,
) -> Result<Decision, Rejection> {
    let cx = Context {
        state,
        tenancy: &origin.tenancy,
        settings,
        now,
    };
    match command {
        Command::StartJob {
            run,
            spec,
            session,
            labels,
            container,
            payload,
        } => {
            let reply = cx.start_job(origin.plane, run, &spec, payload.len())?;
            let queued = Event::JobQueued {
                run,
                spec,
                session,
                labels,
                container,
            };
            Ok(Decision::with(queued, payload, reply))
        }
        Command::Inbox(command) => cx.inbox(origin.plane, command),
        Command::CancelQueued { run } => cx.cancel_queued(origin.plane, run),
        Command::PushProgress { run, attempt, body } => {
            cx.push_progress(origin.plane, run, attempt, body)
        }
        Command::SaveCheckpoint {
            run,
            attempt,
            content_type,
            body,
        } => cx.save_checkpoint(origin.plane, run, attempt, content_type, body),
        Command::PurgeRun { run } => cx.purge(origin.plane, run),
        Command::Identity(command) => Ok(cx.identity(*command)?),
        Command::AuditWrite(write) => {
            Ok(Decision::done(vec![Event::WriteAudited { write: *write }]))
        }
        Command::ProgressPolled {
            plane,
            run,
            attempt,
            body,
        } => cx.push_progress(plane, run, Some(attempt), body),
        Command::PreemptExecute { service, preemptor } => {
            cx.preempt_execute(origin.plane, &service, preemptor)
        }
        Command::PreemptRelease { service } => cx.preempt_release(origin.plane, &service),
        Command::RegisterService { spec, tenant } => cx.register_service(spec, tenant),
        Command::UpdateService { spec } => cx.update_service(spec),
        Command::EnableService { service } => cx.enable_service(service),
        Command::DisableService { service } => cx.disable_service(service),
        Command::RemoveService { service } => cx.remove_service(service),
        Command::StartService { service } => cx.start_service(&service),
        Command::StopService { service, drain } => cx.stop_service(&service, drain),
        Command::RestartService { service, drain } => cx.restart_service(&service, drain),
        of_gpu @ (Command::ReleaseGpu { .. } | Command::Seen(_)) => cx.of_gpu(of_gpu),
        of_gateway => Ok(cx.of_itself(of_gateway)),
    }
}

impl Context<'_> {
    /// What the gateway tells of itself, and what the executor tells of calls and instances.
    fn of_itself(&self, command: Command) -> Decision {
        match command {
            Command::GatewayStarted { epoch, version } => self.gateway_started(epoch, version),
            Command::GatewayStopped => self.gateway_stopped(),
            Command::Tick => Decision::done(Vec::new()),
            Command::JobAnswered {
                run,
                attempt,
                outcome,
            } => self.job_answered(run, attempt, outcome),
            Command::JobStopDone {
                run,
                attempt,
                confirmed,
            } => self.job_stop_done(run, attempt, confirmed),
            Command::CallbackTried {
                run,
                number,
                status,
                error,
            } => self.callback_tried(run, number, status, error),
            Command::NoticeTried(tried) => self.notice_tried(*tried),
            outcome => self.instance_outcome(outcome),
        }
    }
}

pub use service::MAX_SERVICES_OF_TENANT;
pub use tick::due;
