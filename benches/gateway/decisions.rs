//! Deciding with few and with many waiting jobs: State and scheduler alone, no disk.

use std::time::Instant;

use bytes::Bytes;
use rungate::domain::command::{Command, Origin};
use rungate::domain::decide::decide;
use rungate::domain::effect::{Effect, implied};
use rungate::domain::event::Event;
use rungate::domain::ids::{PlaneId, RunId};
use rungate::domain::scheduler::step;
use rungate::domain::settings::Settings;
use rungate::domain::spec::JobSpec;
use rungate::domain::state::State;
use rungate::domain::tenant::Tenancy;
use rungate::domain::time::Timestamp;
use smol_str::SmolStr;

use crate::report::{Bar, Figure, percentile};
use crate::scale::Scale;
use crate::{Context, Failure, jobs};

const GROUP: &str = "scheduling decision";

/// Tenants of the second measurement, all of which wait for everything.
const TENANTS: u32 = 50;

/// All figures of this file.
pub fn measure(context: &mut Context, scale: &Scale) -> Result<(), Failure> {
    measure_with(context, scale, 1, "")?;
    measure_with(context, scale, TENANTS, ", 50 tenants")
}

fn measure_with(
    context: &mut Context,
    scale: &Scale,
    tenants: u32,
    whose: &str,
) -> Result<(), Failure> {
    let (few, many) = scale.queue_sizes;
    let mut worlds = [World::new(few, tenants), World::new(many, tenants)];
    let mut figures: [Samples; 2] = Default::default();
    // The first round warms both up and is not kept.
    for round in 0..=scale.rounds {
        for (world, samples) in worlds.iter_mut().zip(&mut figures) {
            let timed = world.round(scale.decisions);
            if round > 0 {
                samples.add(timed);
            }
        }
    }
    let [few_samples, many_samples] = figures;
    let pairs = [
        (
            "submit p50",
            &few_samples.submit_p50,
            &many_samples.submit_p50,
        ),
        (
            "submit p99",
            &few_samples.submit_p99,
            &many_samples.submit_p99,
        ),
        (
            "completion and next dispatch p50",
            &few_samples.next_p50,
            &many_samples.next_p50,
        ),
        (
            "completion and next dispatch p99",
            &few_samples.next_p99,
            &many_samples.next_p99,
        ),
    ];
    for (name, few_us, many_us) in pairs {
        let name = format!("{name}, {many} waiting{whose} (floor: {few})");
        let figure = Figure::of(GROUP, name, "µs", many_us).floor(many_us, few_us);
        context.add(figure.bar(Bar::AtMostRatio(3.0)));
    }
    let worst = format!("longest single decision, many waiting{whose}");
    context.add(Figure::of(GROUP, worst, "µs", &many_samples.worst));
    Ok(())
}

/// Per round: percentiles in µs.
#[derive(Default)]
struct Samples {
    submit_p50: Vec<f64>,
    submit_p99: Vec<f64>,
    next_p50: Vec<f64>,
    next_p99: Vec<f64>,
    worst: Vec<f64>,
}

impl Samples {
    fn add(&mut self, (mut submits, mut completions): (Vec<f64>, Vec<f64>)) {
        self.submit_p50.push(percentile(&mut submits, 0.5));
        self.submit_p99.push(percentile(&mut submits, 0.99));
        self.next_p50.push(percentile(&mut completions, 0.5));
        self.next_p99.push(percentile(&mut completions, 0.99));
        let worst = percentile(&mut submits, 1.0).max(percentile(&mut completions, 1.0));
        self.worst.push(worst);
    }
}

/// A State with its services up and busy, and a number of waiting jobs.
struct World {
    state: State,
    settings: Settings,
    origin: Origin,
    now: Timestamp,
    n: u64,
    /// Each with one plane, from 0.
    tenants: u32,
    /// What the last job that left the queue asked for.
    served: Option<JobSpec>,
    /// Running jobs, the longest first.
    running: std::collections::VecDeque<RunId>,
}

impl World {
    fn new(waiting: usize, tenants: u32) -> World {
        let settings = Settings::default();
        let mut world = World {
            state: State::new(settings.ageing_ms_per_level),
            settings,
            origin: Origin {
                plane: PlaneId::ROOT,
                actor: SmolStr::new_static("admin"),
                request_id: None,
                tenancy: Tenancy::All,
                at: jobs::START,
            },
            now: jobs::START,
            n: 0,
            tenants,
            served: None,
            running: std::collections::VecDeque::new(),
        };
        let opened = (1..tenants).map(|n| Event::PlaneOpened {
            plane: PlaneId(n),
            tenant: format!("tenant-{n}").into(),
            runtime: SmolStr::new_static("r"),
        });
        for event in jobs::prelude().into_iter().chain(opened) {
            world.apply(PlaneId::ROOT, &event);
        }
        while world.state.queue.len() < waiting as u64 {
            let command = world.next_job();
            world.perform(command);
        }
        world
    }

    fn next_job(&mut self) -> Command {
        self.n += 1;
        self.now = Timestamp(self.now.0 + 137);
        let n = usize::try_from(self.n).unwrap_or(0);
        Command::StartJob {
            run: jobs::run_id(self.now, self.n),
            // Of the kind that was served last, so that the mix of what waits stays as it is.
            spec: self.served.take().unwrap_or_else(|| jobs::job(n)),
            session: None,
            labels: Vec::new(),
            container: None,
            payload: jobs::payload(self.n),
        }
    }

    fn next_completion(&mut self) -> Command {
        self.now = Timestamp(self.now.0 + 137);
        let run = self.running.pop_front().expect("all places are taken");
        Command::JobAnswered {
            run,
            attempt: 1,
            outcome: Ok(Bytes::from_static(b"{\"words\":1}")),
        }
    }

    fn apply(&mut self, plane: PlaneId, event: &Event) -> Option<Effect> {
        let seq = self.state.seq + 1;
        self.state.apply(seq, self.now, plane, event);
        implied(&self.state, event)
    }

    /// What the coordinator does with a command, without the disk.
    fn perform(&mut self, command: Command) {
        let decision = decide(&self.state, &self.settings, &self.origin, command, self.now)
            .expect("made-up commands are legal");
        let turn = self.n % u64::from(self.tenants);
        let plane = PlaneId(u32::try_from(turn).unwrap_or(0));
        for (event, _) in decision.events {
            self.apply(plane, &event);
        }
        while let Some(events) = step(&mut self.state, &self.settings, self.now) {
            for event in events {
                self.apply(PlaneId::ROOT, &event);
                if let Event::JobDispatched { run, .. } = event {
                    self.running.push_back(run);
                    self.served = self.state.jobs.get(&run).map(|job| job.spec.clone());
                }
            }
        }
    }

    /// Submissions and completions in turn, so that as many wait after as before; µs of each.
    fn round(&mut self, decisions: usize) -> (Vec<f64>, Vec<f64>) {
        let (mut submits, mut completions) = (Vec::new(), Vec::new());
        for _ in 0..decisions {
            let command = self.next_job();
            submits.push(self.timed(command));
            let command = self.next_completion();
            completions.push(self.timed(command));
        }
        (submits, completions)
    }

    fn timed(&mut self, command: Command) -> f64 {
        let started = Instant::now();
        self.perform(command);
        started.elapsed().as_secs_f64() * 1e6
    }
}
