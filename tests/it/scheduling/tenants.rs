//! Several tenants: the invariants hold with quotas and shares too, long-run shares come to what the weights say, and
//! nobody waits for another's long queue.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::Config;
use rungate::domain::command::{Command, Origin, Rejection};
use rungate::domain::decide::{MAX_SERVICES_OF_TENANT, decide};
use rungate::domain::engine::follow_up;
use rungate::domain::event::{Event, JobStopCause};
use rungate::domain::identity::{IdentityCommand, ProfileChange};
use rungate::domain::ids::{Generation, PlaneId, RunId};
use rungate::domain::settings::Settings;
use rungate::domain::spec::{JobSpec, Priority, ServiceSpec, Target};
use rungate::domain::state::State;
use rungate::domain::tenant::{QuotasChange, Tenancy, TenantChange, UserAllowanceChange};
use rungate::domain::time::Timestamp;
use smol_str::{SmolStr, format_smolstr};
use uuid::Uuid;

use super::bed::{payload, replay};
use super::ops::{Op, name, op, plain_spec, pressing_op, pressing_spec, spec};
use super::play::Play;
use super::properties::config;
use super::script::{create_user, user_key};

const USERS: [&str; 4] = ["a/ann", "a/abe", "b/bob", "c/cy"];
const TENANTS: [&str; 3] = ["a", "b", "c"];

/// What an administrator says now and then.
#[derive(Clone, Debug)]
enum Said {
    Tenant {
        tenant: usize,
        weight: u32,
        quotas: QuotasChange,
    },
    User {
        user: usize,
        quotas: QuotasChange,
    },
}

fn quotas() -> impl Strategy<Value = QuotasChange> {
    let limit = |high: u64| prop_oneof![2 => Just(None), 1 => Just(Some(None)), 2 => (0..high).prop_map(|n| Some(Some(n)))];
    (limit(6), limit(4), limit(3), limit(40)).prop_map(
        |(queued_runs, running_runs, gpus, vram_mib)| QuotasChange {
            queued_runs,
            running_runs,
            gpus,
            vram_mib,
        },
    )
}

fn said() -> impl Strategy<Value = Said> {
    let weight = prop_oneof![Just(1u32), Just(100), Just(1_000)];
    prop_oneof![
        (0..TENANTS.len(), weight, quotas()).prop_map(|(tenant, weight, quotas)| Said::Tenant {
            tenant,
            weight,
            quotas
        }),
        (0..USERS.len(), quotas()).prop_map(|(user, quotas)| Said::User { user, quotas }),
    ]
}

fn say(play: &mut Play, said: Said) {
    let command = match said {
        Said::Tenant {
            tenant,
            weight,
            quotas,
        } => {
            let tenant = SmolStr::new_static(TENANTS[tenant]);
            let create = !play.bed.state.people.tenants.contains_key(&tenant);
            let change = TenantChange {
                weight: Some(weight),
                quotas,
                ..TenantChange::default()
            };
            IdentityCommand::SetTenant {
                tenant,
                change,
                create,
            }
        }
        Said::User { user, quotas } => IdentityCommand::UpdateUser {
            key: user_key(USERS[user]),
            change: ProfileChange::default(),
            quotas,
            allowance: UserAllowanceChange::default(),
            rotate: None,
        },
    };
    play.submit(Command::Identity(Box::new(command)));
}

/// A gateway with users of several tenants, whose starts they take in turns. Of the services two are one tenant's alone.
fn several(specs: Vec<ServiceSpec>) -> Play {
    let mut play = Play::new();
    for user in USERS {
        let create = create_user(user_key(user));
        play.submit(Command::Identity(Box::new(create)));
        let plane = play.bed.state.people.users[&user_key(user)].plane;
        play.starters.push(plane);
    }
    play.owners = [(3, "a"), (4, "b")]
        .map(|(service, tenant)| (name(service), tenant.into()))
        .into();
    for spec in specs {
        play.register(spec);
    }
    play
}

/// Nobody has quotas any more, so that every job can end.
fn lift_all(play: &mut Play) {
    let none = QuotasChange {
        queued_runs: Some(None),
        running_runs: Some(None),
        gpus: Some(None),
        vram_mib: Some(None),
    };
    for tenant in 0..TENANTS.len() {
        let (weight, quotas) = (100, none);
        say(
            play,
            Said::Tenant {
                tenant,
                weight,
                quotas,
            },
        );
    }
    for user in 0..USERS.len() {
        say(play, Said::User { user, quotas: none });
    }
}

type Steps = Vec<(Op, Option<Said>)>;

fn steps(op: impl Strategy<Value = Op>, most: usize) -> impl Strategy<Value = Steps> {
    prop::collection::vec((op, prop::option::weighted(0.1, said())), 1..most)
}

fn perform(play: &mut Play, steps: Steps) {
    for (op, words) in steps {
        play.perform(op);
        if let Some(words) = words {
            say(play, words);
        }
    }
}

proptest! {
    #![proptest_config(Config { max_shrink_iters: 400, ..config() })]

    /// Invariants 3, 4, 6 and 7 at every event, no lost wake-up, quotas and turns kept, and every job ends when all goes
    /// well again.
    #[test]
    fn with_several_tenants_the_invariants_hold_and_every_job_ends(
        specs in prop::collection::vec(spec(), 1..5),
        steps in steps(op(), 120),
    ) {
        let mut play = several(specs);
        perform(&mut play, steps);
        lift_all(&mut play);
        play.finish();
    }

    /// The same where much waits for little room.
    #[test]
    fn with_several_tenants_under_pressure_the_invariants_hold(
        specs in prop::collection::vec(pressing_spec(), 2..6),
        steps in steps(pressing_op(), 150),
    ) {
        let mut play = several(specs);
        perform(&mut play, steps);
        lift_all(&mut play);
        play.finish();
    }

    /// Usage, its averages and what was served are in the snapshot, to the bit.
    #[test]
    fn with_several_tenants_a_snapshot_and_the_rest_equal_a_full_replay(
        specs in prop::collection::vec(spec(), 1..4),
        steps in steps(op(), 60),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut play = several(specs);
        perform(&mut play, steps);
        let bed = &play.bed;
        let (head, rest) = bed.log.split_at(cut.index(bed.log.len() + 1));
        let ageing = bed.settings.ageing_ms_per_level;
        let middle = replay(State::new(ageing), head);
        let read = State::from_snapshot(&middle.to_snapshot().unwrap(), ageing).unwrap();
        prop_assert_eq!(&read, &middle);
        prop_assert_eq!(&replay(read, rest), &bed.state);
    }
}

/// The pure core with one service and endless queues: no checks after each event, so that they may be long.
struct Machine {
    state: State,
    settings: Settings,
    now: Timestamp,
    next_run: u128,
    planes: Vec<PlaneId>,
    /// Whose each dispatch was, by number of the tenant, in order.
    dispatched: Vec<usize>,
    running: Vec<RunId>,
    /// Runs that were told to stop for others: whose they are, and whose the others.
    stopping: Vec<(RunId, (usize, usize))>,
    /// Microseconds of places that each tenant had.
    held_us: Vec<i64>,
}

impl Machine {
    fn new(places: u32, weights: &[u32]) -> Machine {
        let settings = Settings::default();
        let mut machine = Machine {
            state: State::new(settings.ageing_ms_per_level),
            settings,
            now: Timestamp(0),
            next_run: 0,
            planes: Vec::new(),
            dispatched: Vec::new(),
            running: Vec::new(),
            stopping: Vec::new(),
            held_us: vec![0; weights.len()],
        };
        for (number, weight) in weights.iter().enumerate() {
            let key = user_key(&format!("t{number}/u"));
            machine.identity(create_user(key.clone()));
            machine.identity(IdentityCommand::SetTenant {
                tenant: key.tenant.clone(),
                change: TenantChange {
                    weight: Some(*weight),
                    ..TenantChange::default()
                },
                create: true,
            });
            machine.planes.push(machine.state.people.users[&key].plane);
        }
        let spec = ServiceSpec {
            concurrency: places,
            ..plain_spec(0)
        };
        machine.submit(
            PlaneId::ROOT,
            Command::RegisterService {
                spec: Box::new(spec),
                tenant: None,
            },
        );
        machine.submit(
            PlaneId::ROOT,
            Command::StartService {
                service: "s0".into(),
            },
        );
        machine.submit(
            PlaneId::ROOT,
            Command::InstanceHealthy {
                service: "s0".into(),
                generation: Generation(1),
            },
        );
        machine
    }

    fn identity(&mut self, command: IdentityCommand) {
        self.submit(PlaneId::ROOT, Command::Identity(Box::new(command)));
    }

    fn submit(&mut self, plane: PlaneId, command: Command) {
        let origin = origin_of(plane, self.now);
        let decision = decide(&self.state, &self.settings, &origin, command, self.now).unwrap();
        for (event, _) in decision.events {
            self.apply(plane, event);
        }
        while let Some(events) = follow_up(&mut self.state, &self.settings, self.now) {
            for event in events {
                self.apply(PlaneId::ROOT, event);
            }
        }
    }

    fn apply(&mut self, plane: PlaneId, event: Event) {
        let job = event.run().and_then(|run| self.state.jobs.get(&run));
        let plane = job.map_or(plane, |job| job.plane);
        let seq = self.state.seq + 1;
        self.state.apply(seq, self.now, plane, &event);
        match event {
            Event::JobDispatched { run, .. } => {
                self.dispatched.push(self.tenant(plane));
                self.running.push(run);
            }
            Event::JobStopRequested {
                run,
                cause: JobStopCause::Preempt { by },
                ..
            } => {
                let by = self.tenant(self.state.jobs[&by].plane);
                self.stopping.push((run, (self.tenant(plane), by)));
            }
            _ => {}
        }
    }

    fn tenant(&self, plane: PlaneId) -> usize {
        self.planes.iter().position(|of| *of == plane).unwrap()
    }

    fn start(&mut self, tenant: usize) {
        self.start_urgent(tenant, 3);
    }

    fn start_urgent(&mut self, tenant: usize, priority: u8) {
        self.start_on(tenant, "t0", priority);
    }

    fn start_on(&mut self, tenant: usize, service_type: &str, priority: u8) {
        self.next_run += 1;
        let spec = JobSpec {
            target: Target::Type(service_type.into()),
            service_type: None,
            priority: Priority::new(priority).unwrap(),
            ttl_ms: None,
            max_attempts: 1,
            timeout_ms: 300_000,
            callback_url: None,
        };
        let command = Command::StartJob {
            run: RunId(Uuid::from_u128(self.next_run)),
            spec,
            session: None,
            labels: Vec::new(),
            container: None,
            payload: payload(),
        };
        self.submit(self.planes[tenant], command);
    }

    fn wait(&mut self, ms: u64) {
        let us = i64::try_from(ms * 1_000).unwrap();
        for run in &self.running {
            let plane = self.state.jobs[run].plane;
            let tenant = self.tenant(plane);
            self.held_us[tenant] += us;
        }
        self.now = self.now + ms;
    }

    /// The run that has run the longest, or the `index`th, ends.
    fn answer(&mut self, index: usize) {
        let run = self.running.remove(index % self.running.len());
        let command = Command::JobAnswered {
            run,
            attempt: self.state.jobs[&run].attempt,
            outcome: Ok(payload()),
        };
        self.submit(PlaneId::ROOT, command);
    }

    /// Those that were told to stop have stopped; answers each one's tenant, and the one of whom it made way for.
    fn stop(&mut self) -> Vec<(usize, usize)> {
        let stopping = std::mem::take(&mut self.stopping);
        for (run, _) in &stopping {
            self.running.retain(|running| running != run);
            // It may have ended by itself.
            let Some(attempt) = self.state.jobs.get(run).map(|job| job.attempt) else {
                continue;
            };
            let command = Command::JobStopDone {
                run: *run,
                attempt,
                confirmed: true,
            };
            self.submit(PlaneId::ROOT, command);
        }
        stopping.into_iter().map(|(_, tenants)| tenants).collect()
    }
}

fn origin_of(plane: PlaneId, at: Timestamp) -> Origin {
    Origin {
        plane,
        actor: SmolStr::new_static("test"),
        request_id: None,
        tenancy: Tenancy::All,
        at,
    }
}

proptest! {
    #![proptest_config(Config { cases: 8, max_shrink_iters: 20, ..config() })]

    /// Who always has something to do gets what its weight says, whatever its jobs' lengths: within 5 % of the machine after
    /// 4,000 runs.
    #[test]
    fn long_run_shares_come_to_the_weights(
        places in 1..5u32,
        weights in prop::collection::vec(prop_oneof![Just(50u32), Just(100), Just(200), Just(300)], 2..5),
        lengths in prop::collection::vec(1..4u64, 4),
        order in prop::collection::vec(any::<usize>(), 50),
    ) {
        let mut machine = Machine::new(places, &weights);
        for _ in 0..8 {
            for tenant in 0..weights.len() {
                machine.start(tenant);
            }
        }
        for step in 0..4_000 {
            let tenant = machine.dispatched[step];
            // A job's length depends on whose it is.
            machine.wait(lengths[tenant] * 1_000);
            machine.answer(order[step % order.len()]);
            machine.start(tenant);
        }
        let all: i64 = machine.held_us.iter().sum();
        let weight: u32 = weights.iter().sum();
        for (tenant, held) in machine.held_us.iter().enumerate() {
            let share = *held as f64 / all as f64;
            let due = f64::from(weights[tenant]) / f64::from(weight);
            prop_assert!((share - due).abs() < 0.05, "{tenant} got {share:.3}, not {due:.3}: {weights:?}");
        }
    }
}

/// Ten jobs of one tenant and ten thousand of another: after at most as many dispatches of the other as its own, and
/// one for each place, each of the ten is served, however long the other has been there alone.
#[test]
fn ten_jobs_do_not_wait_for_ten_thousand() {
    for places in [1, 4] {
        let mut machine = Machine::new(places, &[100, 100]);
        for _ in 0..10_000 {
            machine.start(0);
        }
        for _ in 0..2_000 {
            machine.wait(1_000);
            machine.answer(0);
        }
        for _ in 0..10 {
            machine.start(1);
        }
        let before = machine.dispatched.len();
        let mut served = BTreeMap::from([(0, 0), (1, 0)]);
        while served[&1] < 10 {
            machine.wait(1_000);
            machine.answer(0);
            served = BTreeMap::from([(0, 0), (1, 0)]);
            for tenant in &machine.dispatched[before..] {
                *served.get_mut(tenant).unwrap() += 1;
                let (theirs, ours) = (served[&0], served[&1]);
                assert!(
                    theirs <= ours + places as usize,
                    "{theirs} before the {ours}th of ours"
                );
            }
        }
    }
}

/// Jobs that no service takes cost no decision anything, however many kinds of them somebody thinks up.
#[test]
fn kinds_of_jobs_that_nobody_takes_are_not_looked_at() {
    let mut machine = Machine::new(1, &[100, 100]);
    for number in 0..10_000 {
        machine.start_on(
            number % 2,
            &format!("none-{}", number / 2),
            1 + (number % 5) as u8,
        );
    }
    for tenant in [0, 1, 0, 1] {
        machine.start(tenant);
    }
    for _ in 0..2 {
        let run = machine.running[0];
        let (attempt, outcome) = (1, Ok(payload()));
        let answered = Command::JobAnswered {
            run,
            attempt,
            outcome,
        };
        let (origin, now) = (origin_of(PlaneId::ROOT, machine.now), machine.now);
        let decision = decide(&machine.state, &machine.settings, &origin, answered, now).unwrap();
        let mut state = machine.state.clone();
        for (event, _) in decision.events {
            state.apply(state.seq + 1, now, PlaneId::ROOT, &event);
        }
        assert!(state.queue.open().len() <= 1, "{:?}", state.queue.open());
        machine.answer(0);
    }
    let late = ServiceSpec {
        service_type: "none-7".into(),
        ..plain_spec(1)
    };
    let spec = Box::new(late);
    machine.submit(
        PlaneId::ROOT,
        Command::RegisterService { spec, tenant: None },
    );
    assert!(
        machine.state.services["s1"].instance.is_some(),
        "it is started for those that wait"
    );
}

proptest! {
    #![proptest_config(Config { cases: 12, max_shrink_iters: 20, ..config() })]

    /// The same whatever priorities either gives its jobs: those of a flood let none of it go first, and nothing of the
    /// other tenant's is stopped for it.
    #[test]
    fn a_flood_of_urgent_jobs_goes_before_nobody_elses(
        places in 1..5u32,
        urgent in prop::collection::vec(prop_oneof![4 => Just(1u8), 1 => 1..6u8], 20),
        ours in prop::collection::vec(1..6u8, 10),
        alone in 0..300usize,
    ) {
        let mut machine = Machine::new(places, &[100, 100]);
        for number in 0..1_000 {
            machine.start_urgent(0, urgent[number % urgent.len()]);
        }
        for _ in 0..alone {
            machine.wait(1_000);
            machine.answer(0);
            machine.stop();
        }
        for priority in ours {
            machine.start_urgent(1, priority);
        }
        let (mut seen, mut served) = (machine.dispatched.len(), [0, 0]);
        while served[1] < 10 {
            machine.wait(1_000);
            machine.answer(0);
            prop_assert!(!machine.stop().contains(&(1, 0)), "ours made way for theirs");
            for tenant in &machine.dispatched[seen..] {
                served[*tenant] += 1;
                let [theirs, ours] = served;
                prop_assert!(theirs <= ours + places as usize, "{theirs} before the {ours}th of ours");
            }
            seen = machine.dispatched.len();
        }
    }
}

/// Between a look at a service and a command about it, the name may have come to be another's: the command itself is held
/// to whoever gives it.
#[test]
fn a_command_finds_only_the_services_of_whoever_gives_it() {
    let mut state = State::new(1);
    for service in 0..3 {
        let spec = Box::new(plain_spec(service));
        state.apply(
            1,
            Timestamp(0),
            PlaneId::ROOT,
            &Event::ServiceRegistered { spec },
        );
    }
    for (service, tenant) in [(1, "a"), (2, "b")] {
        let (service, tenant) = (name(service), tenant.into());
        let assigned = Event::ServiceAssigned { service, tenant };
        state.apply(2, Timestamp(0), PlaneId::ROOT, &assigned);
    }
    let by = |tenancy: &Tenancy, command: Command| {
        let origin = Origin {
            plane: PlaneId::ROOT,
            actor: SmolStr::new_static("test"),
            request_id: None,
            tenancy: tenancy.clone(),
            at: Timestamp(0),
        };
        let decided = decide(&state, &Settings::default(), &origin, command, Timestamp(0));
        decided.map_or_else(|rejection| rejection.code(), |_| "done")
    };
    let (none, shared) = ("service_not_found", "role_required");
    // Of the shared service, of a's and of b's: what becomes of operating, of changing and of looking.
    for (tenancy, operates, changes, looks) in [
        (Tenancy::All, ["done"; 3], ["done"; 3], ["done"; 3]),
        (
            Tenancy::Of("default".into()),
            ["done", none, none],
            [shared, none, none],
            ["done", none, none],
        ),
        (
            Tenancy::Of("a".into()),
            [shared, "done", none],
            [shared, "done", none],
            ["done", "done", none],
        ),
    ] {
        for number in 0..3u8 {
            let (n, service) = (usize::from(number), name(number));
            let drain = true;
            for command in [
                Command::StartService {
                    service: service.clone(),
                },
                Command::StopService {
                    service: service.clone(),
                    drain,
                },
                Command::RestartService {
                    service: service.clone(),
                    drain,
                },
                Command::EnableService {
                    service: service.clone(),
                },
                Command::DisableService {
                    service: service.clone(),
                },
            ] {
                assert_eq!(
                    by(&tenancy, command.clone()),
                    operates[n],
                    "{tenancy:?}: {command:?}"
                );
            }
            let mut spec = Box::new(plain_spec(number));
            spec.concurrency = 7;
            for command in [
                Command::UpdateService { spec: spec.clone() },
                Command::RemoveService {
                    service: service.clone(),
                },
            ] {
                assert_eq!(
                    by(&tenancy, command.clone()),
                    changes[n],
                    "{tenancy:?}: {command:?}"
                );
            }
            let look = Command::PreemptRelease { service };
            assert_eq!(
                by(&tenancy, look.clone()),
                looks[n],
                "{tenancy:?}: {look:?}"
            );
            let again = Command::RegisterService { spec, tenant: None };
            assert_eq!(by(&tenancy, again), "service_exists");
        }
    }
}

#[test]
fn a_tenants_operators_take_so_many_names_and_no_more() {
    let mut machine = Machine::new(1, &[1]);
    let mut by = |tenancy: Tenancy, command: Command| {
        let origin = Origin {
            plane: PlaneId::ROOT,
            actor: SmolStr::new_static("test"),
            request_id: None,
            tenancy,
            at: machine.now,
        };
        let decided = decide(
            &machine.state,
            &machine.settings,
            &origin,
            command,
            machine.now,
        )?;
        for (event, _) in decided.events {
            machine.apply(PlaneId::ROOT, event);
        }
        Ok::<(), Rejection>(())
    };
    let register = |n: usize, tenant: Option<&str>| {
        let name = format_smolstr!("own{n}");
        let spec = Box::new(ServiceSpec {
            name,
            ..plain_spec(0)
        });
        let tenant = tenant.map(SmolStr::new);
        Command::RegisterService { spec, tenant }
    };
    let own = || Tenancy::Of("a".into());
    for n in 0..MAX_SERVICES_OF_TENANT {
        by(own(), register(n, Some("a"))).unwrap();
    }
    let one_more = register(MAX_SERVICES_OF_TENANT, Some("a"));
    let service = SmolStr::new_static("own7");
    by(own(), Command::RemoveService { service }).unwrap();
    assert_eq!(by(own(), one_more).unwrap_err().code(), "too_many_services");
    by(own(), register(7, Some("a"))).unwrap();
    by(Tenancy::All, register(MAX_SERVICES_OF_TENANT, Some("a"))).unwrap();
}
