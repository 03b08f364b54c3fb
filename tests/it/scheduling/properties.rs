//! Properties under random commands, outcomes (stale, repeated, reordered), jumps of time and restarts.
//!
//! Each case checks `invariants` after every event and whenever the scheduler rests. `PROPTEST_CASES=20000 cargo
//! test --test it scheduling::properties` looks harder than the default, which is sized for every day.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};
use rungate::domain::event::{Event, JobStopCause};
use rungate::domain::ids::RunId;
use rungate::domain::scheduler::container::run_of;
use rungate::domain::spec::ServiceSpec;
use rungate::domain::state::State;

use super::bed::replay;
use super::ops::{TYPES, op, plain_spec, pressing_op, pressing_spec, spec};
use super::play::Play;

/// Cases of each property, unless `PROPTEST_CASES` says otherwise: about ten seconds each on one core.
const CASES: u32 = 250;

pub fn config() -> Config {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(CASES);
    Config {
        cases,
        max_shrink_iters: 20_000,
        failure_persistence: None,
        ..Config::default()
    }
}

proptest! {
    #![proptest_config(config())]

    /// Invariants 3, 4, 6 and 7 at every event, no lost wake-up, and every job ends when all goes well again.
    #[test]
    fn whatever_happens_the_invariants_hold_and_every_job_ends(
        specs in prop::collection::vec(spec(), 1..5),
        ops in prop::collection::vec(op(), 1..120),
    ) {
        let mut play = Play::new();
        for spec in specs {
            play.register(spec);
        }
        for op in ops {
            play.perform(op);
        }
        play.finish();
    }

    /// The same where much waits for little room, so that instances are evicted and jobs preempted.
    #[test]
    fn under_pressure_the_invariants_hold_and_every_job_ends(
        specs in prop::collection::vec(pressing_spec(), 2..6),
        ops in prop::collection::vec(pressing_op(), 1..150),
    ) {
        let mut play = Play::new();
        for spec in specs {
            play.register(spec);
        }
        for op in ops {
            play.perform(op);
        }
        play.finish();
    }

    /// Snapshot and suffix equal a full replay, wherever the snapshot was taken.
    #[test]
    fn a_snapshot_anywhere_and_the_rest_equal_a_full_replay(
        specs in prop::collection::vec(spec(), 1..4),
        ops in prop::collection::vec(op(), 1..60),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut play = Play::new();
        for spec in specs {
            play.register(spec);
        }
        for op in ops {
            play.perform(op);
        }
        let bed = &play.bed;
        let (head, rest) = bed.log.split_at(cut.index(bed.log.len() + 1));
        let ageing = bed.settings.ageing_ms_per_level;
        let middle = replay(State::new(ageing), head);
        let bytes = middle.to_snapshot().unwrap();
        let read = State::from_snapshot(&bytes, ageing).unwrap();
        prop_assert_eq!(&read, &middle);
        prop_assert_eq!(&replay(read, rest), &bed.state);
        prop_assert_eq!(&bed.replayed(), &bed.state);
    }
}

/// What is random reaches what it is there for: instances fall asleep by each kind of step, fail to, and wake; containers
/// of jobs make room and have it made for them.
#[test]
fn sleep_waking_and_containers_are_among_what_happens() {
    let mut runner = TestRunner::deterministic();
    let mut counts = BTreeMap::new();
    for _ in 0..60 {
        let specs = prop::collection::vec(pressing_spec(), 2..6).new_tree(&mut runner);
        let any_op = prop_oneof![pressing_op(), op()];
        let ops = prop::collection::vec(any_op, 100..150).new_tree(&mut runner);
        let mut play = Play::new();
        for spec in specs.unwrap().current() {
            play.register(spec);
        }
        for op in ops.unwrap().current() {
            play.perform(op);
        }
        play.finish();
        for entry in &play.bed.log {
            let what = match &entry.event {
                Event::InstanceSlept { step, .. } => format!("asleep by {}", step.name()),
                Event::InstanceWakeRequested { .. } => "waking".to_owned(),
                Event::LadderStepEnded { step, outcome, .. } => format!("{step} {outcome:?}"),
                Event::JobPreempted { service, .. } if run_of(service).is_some() => {
                    "container preempted".to_owned()
                }
                Event::RoomHeld { service, .. } if run_of(service).is_some() => {
                    "room for a container".to_owned()
                }
                Event::JobStopRequested {
                    cause: JobStopCause::TimedOut,
                    ..
                } => "container timed out".to_owned(),
                _ => continue,
            };
            *counts.entry(what).or_insert(0) += 1;
        }
    }
    println!("{counts:#?}");
    for wanted in [
        "asleep by sleep",
        "asleep by cuda-checkpoint",
        "waking",
        "sleep Failed",
        "sleep Skipped",
        "sleep Interrupted",
        "checkpoint Done",
        "checkpoint TimedOut",
        "drain Done",
        "stop Done",
        "container preempted",
        "container timed out",
        "room for a container",
    ] {
        assert!(counts.contains_key(wanted), "no {wanted} in {counts:#?}");
    }
}

/// Cases of the properties whose histories are long.
fn few() -> Config {
    let all = config();
    Config {
        cases: (all.cases / 5).max(1),
        ..all
    }
}

/// One service with one place, and nobody who interferes.
fn one_service(places: u32) -> ServiceSpec {
    ServiceSpec {
        concurrency: places,
        min_runtime_ms: None,
        ..plain_spec(0)
    }
}

proptest! {
    #![proptest_config(few())]

    /// However many urgent jobs keep coming, a job of the least urgency ends: it is served within its ageing and
    /// what was before it then, and is not preempted for ever by those behind it.
    #[test]
    fn nobody_starves_under_a_steady_supply_of_urgent_jobs(
        places in 1..4u32,
        priority in 2..6u8,
        steps in prop::collection::vec((1..4u64, 1..3u8, 500..4_000u64), 400),
    ) {
        let mut play = Play::new();
        play.register(one_service(places));
        play.start(0, 1, false, 1, false);
        play.help();
        let patient = play.start(0, priority, false, 1, false);
        let asked = play.bed.now;
        let mut ended = None;
        for (jobs, urgency, ms) in steps {
            for _ in 0..jobs {
                // Steadily more than there are places for.
                play.start(0, urgency, false, 1, false);
            }
            play.help();
            play.answer_oldest(places as usize);
            play.wait(ms);
            if play.bed.state.jobs.contains_key(&patient) {
                continue;
            }
            ended = Some(play.bed.now);
            break;
        }
        let levels = u64::from(priority) - 1;
        let ageing_ms = play.bed.settings.ageing_ms_per_level * levels;
        let waited_ms = ended.map(|at| at.millis_since(asked));
        // Whatever was queued within its ageing may go first, each for two steps at most.
        prop_assert!(waited_ms.is_some_and(|ms| ms <= ageing_ms * 9), "waited {waited_ms:?} ms at {priority}");
    }

    /// Where nothing fails and nobody interferes, whoever is evicted is evicted for a run that starts.
    #[test]
    fn nobody_is_evicted_without_the_preemptors_start(
        specs in prop::collection::vec(pressing_spec(), 2..6),
        steps in prop::collection::vec((0..TYPES, prop_oneof![Just(1u8), Just(3), Just(5)], 0..3_000u64, any::<bool>()), 1..80),
    ) {
        let mut play = Play::new();
        for spec in specs {
            play.register(ServiceSpec { startup_timeout_ms: 3_600_000, ..spec });
        }
        play.bed.watch.benign = true;
        for (target, priority, ms, answers) in steps {
            play.start(target, priority, false, 1, false);
            play.help();
            if answers {
                play.answer_oldest(1);
            }
            play.wait(ms);
        }
        play.finish();
    }

    /// Two jobs that want the same, submitted at the same moment: the more urgent is dispatched first, whatever
    /// else happens, unless somebody holds it back.
    #[test]
    fn the_more_urgent_of_two_equals_starts_first(
        specs in prop::collection::vec(pressing_spec(), 1..5),
        before in prop::collection::vec(pressing_op(), 0..60),
        target in 0..TYPES,
        after in prop::collection::vec(prop_oneof![3 => Just(None), 1 => (0..2_000u64).prop_map(Some)], 0..60),
    ) {
        let mut play = Play::new();
        for spec in specs {
            play.register(spec);
        }
        for op in before {
            play.perform(op);
        }
        play.paused_scheduler(true);
        let low = play.start(target, 4, false, 1, false);
        let high = play.start(target, 2, false, 1, false);
        play.paused_scheduler(false);
        for step in after {
            play.help();
            match step {
                None => play.answer_oldest(1),
                Some(ms) => play.wait(ms),
            }
        }
        let starts: Vec<RunId> = play.bed.log.iter().filter_map(|entry| match &entry.event {
            Event::JobDispatched { run, .. } if *run == low || *run == high => Some(*run),
            _ => None,
        }).collect();
        prop_assert!(starts.first().is_none_or(|run| *run == high), "{}", play.bed.story());
    }
}
