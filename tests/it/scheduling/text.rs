//! Events in plain words, for golden text. Runs go by the names that the script gave them.

use std::collections::BTreeMap;

use rungate::domain::effect::Effect;
use rungate::domain::event::{Event, Exit, JobStopCause, RequeueCause, StartCause, StopCause};
use rungate::domain::ids::RunId;
use rungate::domain::ladder::StepOutcome;
use rungate::domain::spec::{Grant, Needs, Target};
use rungate::domain::time::Timestamp;

/// Names of runs.
pub type Names = BTreeMap<RunId, String>;

/// `83.5s`: seconds since the script began, without needless zeros.
pub fn time(at: Timestamp) -> String {
    let ms = at.0 / 1_000;
    let text = format!("{}.{:03}", ms / 1_000, ms % 1_000);
    format!("{}s", text.trim_end_matches('0').trim_end_matches('.'))
}

/// Run ids in free text become names.
pub fn with_names(names: &Names, text: &str) -> String {
    names.iter().fold(text.to_owned(), |text, (run, name)| {
        text.replace(&run.to_string(), name)
    })
}

fn grants(grants: &[Grant]) -> String {
    if grants.is_empty() {
        return "no GPU".to_owned();
    }
    let parts: Vec<String> = grants
        .iter()
        .map(|g| format!("{}:{}", g.gpu, mib(g.mib)))
        .collect();
    parts.join("+")
}

/// `16GiB` or `300MiB`.
pub fn mib(mib: u64) -> String {
    if mib.is_multiple_of(1024) {
        format!("{}GiB", mib / 1024)
    } else {
        format!("{mib}MiB")
    }
}

/// One line, or nothing for what a reader of scripts does not need.
pub fn event(names: &Names, event: &Event) -> Option<String> {
    let name = |run: &RunId| {
        names
            .get(run)
            .cloned()
            .unwrap_or_else(|| format!("r{}", run.0.as_u128()))
    };
    let of_command = || command(names, &name, event);
    of_command()
        .or_else(|| attempt(&name, event))
        .or_else(|| job(&name, event))
        .or_else(|| service(event))
        .or_else(|| ladder(&name, event))
        .or_else(|| instance(event))
        .or_else(|| memory(&name, event))
}

/// How a run is called.
type Name<'a> = &'a dyn Fn(&RunId) -> String;

fn command(names: &Names, name: Name, event: &Event) -> Option<String> {
    Some(match event {
        Event::CommandAccepted { .. }
        | Event::CommandApplied { .. }
        | Event::PlaneOpened { .. } => return None,
        Event::CommandRejected {
            run, kind, reason, ..
        } => {
            let run = run.as_ref().map_or_else(|| "?".to_owned(), name);
            format!(
                "{run}: {} refused: {}",
                format!("{kind:?}").to_lowercase(),
                with_names(names, reason)
            )
        }
        Event::GatewayStarted { epoch, .. } => format!("gateway {epoch} started"),
        Event::GatewayStopped { epoch } => format!("gateway {epoch} stopped"),
        _ => return None,
    })
}

/// What becomes of a run's attempts.
fn attempt(name: Name, event: &Event) -> Option<String> {
    Some(match event {
        Event::JobQueued { run, spec, .. } => {
            let target = match &spec.target {
                Target::Type(of) => format!("type {of}"),
                Target::Service(of) => format!("service {of}"),
                Target::Container(Needs { vram_mib, gpus: 0 }) => {
                    format!("a container with {vram_mib} MiB")
                }
                Target::Container(Needs { gpus, .. }) => format!("a container with {gpus} GPUs"),
            };
            format!(
                "{}: queued for {target}, priority {}",
                name(run),
                spec.priority.get()
            )
        }
        Event::JobDispatched {
            run,
            attempt,
            service,
            generation,
            checkpoint,
        } => {
            let offer =
                checkpoint.map_or(String::new(), |_| ", offering its checkpoint".to_owned());
            format!(
                "{}: attempt {attempt} on {service}#{generation}{offer}",
                name(run)
            )
        }
        Event::JobProgressed { run, .. } => format!("{}: progress", name(run)),
        Event::CheckpointSaved { run, .. } => format!("{}: checkpoint saved", name(run)),
        Event::JobStopRequested {
            run,
            cause,
            deadline,
            ..
        } => {
            format!(
                "{}: stop {}, by {}",
                name(run),
                stop_of_job(cause, &name),
                time(*deadline)
            )
        }
        Event::JobStopped {
            run,
            confirmed: true,
            ..
        } => format!("{}: call ended", name(run)),
        Event::JobStopped { run, .. } => format!("{}: call ended, unconfirmed", name(run)),
        _ => return None,
    })
}

/// What becomes of a run.
fn job(name: Name, event: &Event) -> Option<String> {
    Some(match event {
        Event::JobPaused { run, .. } => format!("{}: paused", name(run)),
        Event::JobResumed { run } => format!("{}: resumed", name(run)),
        Event::JobPreempted { run, by, .. } => format!("{}: preempted by {}", name(run), name(by)),
        Event::JobRequeued { run, cause } => {
            format!("{}: queued again, {}", name(run), requeue(*cause))
        }
        Event::JobPriorityChanged { run, priority } => {
            format!("{}: priority {}", name(run), priority.get())
        }
        Event::JobAttemptFailed {
            run,
            attempt,
            code,
            retry_at,
            ..
        } => match retry_at {
            Some(at) => format!(
                "{}: attempt {attempt} failed ({code}), again at {}",
                name(run),
                time(*at)
            ),
            None => format!("{}: attempt {attempt} failed ({code}), the last", name(run)),
        },
        Event::JobCompleted { run, .. } => format!("{}: completed", name(run)),
        Event::JobFailed { run, code, .. } => format!("{}: failed ({code})", name(run)),
        Event::JobCancelled { run, .. } => format!("{}: cancelled", name(run)),
        Event::JobRevived { run, .. } => format!("{}: queued anew", name(run)),
        Event::JobOutcomeStale {
            run,
            attempt,
            outcome,
        } => {
            format!(
                "{}: stale outcome of attempt {attempt} ({outcome})",
                name(run)
            )
        }
        Event::CallbackAttempted {
            run,
            number,
            delivered,
            next_at,
            ..
        } => {
            let what = match (delivered, next_at) {
                (true, _) => "delivered".to_owned(),
                (false, Some(at)) => format!("failed, again at {}", time(*at)),
                (false, None) => "failed, given up".to_owned(),
            };
            format!("{}: callback {number} {what}", name(run))
        }
        Event::RunPurged { run, .. } => format!("{}: purged", name(run)),
        _ => return None,
    })
}

fn service(event: &Event) -> Option<String> {
    Some(match event {
        Event::ServiceRegistered { spec } => format!("{}: registered", spec.name),
        Event::ServiceAssigned { service, tenant } => format!("{service}: assigned to {tenant}"),
        Event::ServiceUpdated { spec } => format!("{}: updated", spec.name),
        Event::ServiceEnabled { service } => format!("{service}: enabled"),
        Event::ServiceDisabled { service } => format!("{service}: disabled"),
        Event::ServiceRemoved { service } => format!("{service}: removed"),
        Event::ServiceCrashLooped {
            service, deaths, ..
        } => format!("{service}: given up after {deaths} deaths"),
        Event::ServicePeakLearned { service, mib: seen } => {
            format!("{service}: seen to use {}", mib(*seen))
        }
        Event::ServiceNeedRaised {
            service, mib: need, ..
        } => format!("{service}: needs {} from now on", mib(*need)),
        _ => return None,
    })
}

/// Steps of ladders, sleep and waking.
fn ladder(name: Name, event: &Event) -> Option<String> {
    let whose = |service: &str, generation: &dyn std::fmt::Display, run: &Option<RunId>| match run {
        Some(run) => name(run),
        None => format!("{service}#{generation}"),
    };
    Some(match event {
        Event::LadderStepBegan {
            service,
            generation,
            run,
            cause,
            number,
            step,
            deadline,
            ..
        } => {
            let cause = cause.as_ref().map_or(String::new(), |cause| {
                format!(", {}", stop_of_instance(cause))
            });
            format!(
                "{}: step {number} {} begins{cause}, by {}",
                whose(service, generation, run),
                step.name(),
                time(*deadline)
            )
        }
        Event::LadderStepEnded {
            service,
            generation,
            run,
            number,
            step,
            outcome,
            took_ms,
            freed_mib,
            ..
        } => {
            let outcome = match outcome {
                StepOutcome::Done => "done",
                StepOutcome::Failed => "failed",
                StepOutcome::TimedOut => "took too long",
                StepOutcome::Skipped => "skipped",
                StepOutcome::Interrupted => "interrupted",
            };
            let freed = match freed_mib {
                0 => String::new(),
                freed => format!(", {} freed", mib(*freed)),
            };
            format!(
                "{}: step {number} {step} {outcome} after {took_ms} ms{freed}",
                whose(service, generation, run)
            )
        }
        Event::InstanceSlept {
            service,
            generation,
            grants: held,
            host_mib,
            ..
        } => format!(
            "{service}#{generation}: sleeps, holding {}, {} on the host",
            grants(held),
            mib(*host_mib)
        ),
        Event::InstanceWakeRequested {
            service,
            generation,
            grants: got,
            cause,
            deadline,
        } => format!(
            "{service}#{generation}: wake {} on {}, by {}",
            start_cause(*cause),
            grants(got),
            time(*deadline)
        ),
        _ => return None,
    })
}

fn start_cause(cause: StartCause) -> &'static str {
    match cause {
        StartCause::Scheduler => "for a job",
        StartCause::Manual => "by hand",
        StartCause::Restart => "again",
    }
}

fn instance(event: &Event) -> Option<String> {
    let (service, generation) = event.instance()?;
    let what = match event {
        Event::InstanceStartRequested {
            grants: got,
            cause,
            deadline,
            ..
        } => {
            let cause = start_cause(*cause);
            format!(
                "start {cause} on {}, healthy by {}",
                grants(got),
                time(*deadline)
            )
        }
        Event::InstanceSpawned { .. } => "spawned".to_owned(),
        Event::InstanceReady { .. } => "ready".to_owned(),
        Event::InstanceAdopted { .. } => "adopted".to_owned(),
        Event::InstanceUnhealthy { error, .. } => format!("unhealthy: {error}"),
        Event::InstanceDraining {
            cause, deadline, ..
        } => {
            let by = deadline.map_or(String::new(), |at| format!(", by {}", time(at)));
            format!("drain, {}{by}", stop_of_instance(cause))
        }
        Event::InstanceStopRequested { cause, kill_at, .. } => {
            format!(
                "stop, {}, kill at {}",
                stop_of_instance(cause),
                time(*kill_at)
            )
        }
        Event::InstanceSignalled { signal, .. } => format!("sent {signal}"),
        Event::InstanceExited {
            exit,
            expected,
            retry_at,
            ..
        } => {
            let expected = if *expected { "" } else { ", unexpected" };
            let retry = retry_at.map_or(String::new(), |at| format!(", again from {}", time(at)));
            format!("exited ({}){expected}{retry}", exit_of(exit))
        }
        Event::InstanceReleased { .. } => "memory free".to_owned(),
        _ => return None,
    };
    Some(format!("{service}#{generation}: {what}"))
}

fn memory(name: Name, event: &Event) -> Option<String> {
    Some(match event {
        Event::RoomHeld {
            service,
            run,
            grants: got,
            victims,
        } => {
            let victims: Vec<&str> = victims.iter().map(|v| v.as_str()).collect();
            format!(
                "room for {service} on {} held for {}, from {}",
                grants(got),
                name(run),
                victims.join(" and ")
            )
        }
        Event::RoomReleased { service } => format!("room for {service} is held no longer"),
        Event::GpusListed { gpus } => {
            let all: Vec<String> = gpus
                .iter()
                .map(|g| format!("{}:{}", g.uuid, mib(g.memory_mib)))
                .collect();
            format!("GPUs: {}", all.join(" "))
        }
        Event::GpuQuarantined { gpu, .. } => format!("{gpu} is quarantined"),
        Event::GpuQuarantineLifted { gpu } => format!("{gpu} is released"),
        Event::GpuForeignMemoryChanged { gpu, mib: used } => {
            format!("{gpu}: others use {}", mib(*used))
        }
        _ => return None,
    })
}

fn stop_of_job(cause: &JobStopCause, name: Name) -> String {
    match cause {
        JobStopCause::Pause { .. } => "to pause".to_owned(),
        JobStopCause::Cancel { .. } => "to cancel".to_owned(),
        JobStopCause::Preempt { by } => format!("in favour of {}", name(by)),
        JobStopCause::Yield => "to queue again".to_owned(),
        JobStopCause::InstanceStopping => "as its instance stops".to_owned(),
        JobStopCause::TimedOut => "as its time is over".to_owned(),
    }
}

fn stop_of_instance(cause: &StopCause) -> String {
    match cause {
        StopCause::Manual => "by hand".to_owned(),
        StopCause::Restart => "to restart".to_owned(),
        StopCause::Idle => "idle".to_owned(),
        StopCause::Room { service } => format!("to make room for {service}"),
        StopCause::Unhealthy => "unhealthy".to_owned(),
        StopCause::StartupTimeout => "start-up time over".to_owned(),
        StopCause::Disabled => "disabled".to_owned(),
        StopCause::Removed => "removed".to_owned(),
        StopCause::Job => "with its job".to_owned(),
    }
}

fn requeue(cause: RequeueCause) -> &'static str {
    match cause {
        RequeueCause::BackoffOver => "backoff over",
        RequeueCause::PreemptorEnded => "its preemptor is done",
        RequeueCause::Released => "released",
        RequeueCause::InstanceStopped => "its instance stopped",
        RequeueCause::Yielded => "it yielded",
    }
}

fn exit_of(exit: &Exit) -> String {
    match exit {
        Exit::Code(code) => format!("code {code}"),
        Exit::Signal(signal) => format!("signal {signal}"),
        Exit::Unknown => "unknown".to_owned(),
        Exit::NotStarted(error) => format!("not started: {error}"),
        Exit::OutOfMemory => "out of memory".to_owned(),
        Exit::NoEngine(error) => format!("no engine: {error}"),
    }
}

/// What the executor is told to do.
pub fn effect(names: &Names, effect: &Effect) -> String {
    let name = |run: &RunId| names.get(run).cloned().unwrap_or_default();
    match effect {
        Effect::Dispatch(call) => {
            let offer = call.checkpoint.map_or("", |_| " with its checkpoint");
            let (service, generation, attempt) = (&call.service, call.generation, call.attempt);
            format!(
                "call {service}#{generation} for {}, attempt {attempt}{offer}",
                name(&call.run)
            )
        }
        Effect::StartJob { spec, job, .. } => {
            let (generation, attempt) = (job.generation, job.attempt);
            let run = name(&job.run);
            format!(
                "run {}#{generation} for {run}, attempt {attempt}",
                spec.name
            )
        }
        Effect::StopCall {
            run,
            attempt,
            reason,
            deadline,
            ..
        } => {
            format!(
                "end {}'s call {attempt} ({reason}) by {}",
                name(run),
                time(*deadline)
            )
        }
        Effect::SendNotice(notice) => format!("tell {} of record {}", notice.tenant, notice.of),
        Effect::SendCallback {
            run,
            number,
            not_before,
            ..
        } => {
            format!(
                "call back for {}, number {number}, from {}",
                name(run),
                time(*not_before)
            )
        }
        Effect::StartInstance {
            spec, generation, ..
        } => format!("start {}#{generation}", spec.name),
        Effect::StopInstance {
            service,
            generation,
            kill_at,
        } => {
            format!("stop {service}#{generation}, kill at {}", time(*kill_at))
        }
        Effect::FindInstance {
            spec,
            generation,
            stop_at,
            asleep,
            ..
        } => {
            let what = match (stop_at, asleep) {
                (Some(_), _) => "find and stop",
                (None, true) => "find, asleep,",
                (None, false) => "find",
            };
            format!("{what} {}#{generation}", spec.name)
        }
        Effect::SweepOrphans { live } => format!("stop orphans, {} are none", live.len()),
        Effect::WatchRelease {
            service,
            generation,
            ..
        } => format!("watch {service}#{generation}'s memory"),
        Effect::AskCheckpoint(ask) => format!(
            "ask {}#{} for a checkpoint of {}, attempt {}",
            ask.service,
            ask.generation,
            name(&ask.run),
            ask.attempt
        ),
        Effect::TakeMemory(take) => format!(
            "take {} of {}#{} by {}",
            grants(&take.grants),
            take.service,
            take.generation,
            take.step.name()
        ),
        Effect::WakeInstance(wake) => format!(
            "wake {}#{} from {}",
            wake.service,
            wake.generation,
            wake.step.name()
        ),
    }
}
