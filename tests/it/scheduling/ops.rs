//! Random commands, outcomes and events of the world, and random services.

use proptest::prelude::*;
use rungate::domain::ids::ServiceName;
use rungate::domain::ladder::{Ask, SleepCall, Step};
use rungate::domain::spec::{ProgressMode, ServiceSpec, Worker};
use smol_str::format_smolstr;

/// One thing that happens. Numbers pick among what there is.
#[derive(Clone, Debug)]
pub enum Op {
    Start {
        target: u8,
        priority: u8,
        ttl: bool,
        attempts: u32,
        callback: bool,
    },
    Act {
        run: usize,
        action: u8,
    },
    CancelQueued(usize),
    Checkpoint(usize),
    Register(Box<ServiceSpec>),
    Service {
        service: u8,
        action: u8,
    },
    Execute {
        service: u8,
        run: usize,
    },
    Release {
        service: u8,
    },
    GoOn {
        index: usize,
        good: bool,
    },
    /// Everything but calls goes on, once: services come and go at once while jobs run long.
    AllButCalls,
    Again(usize),
    Wait(u64),
    Foreign {
        gpu: u8,
        mib: u64,
    },
    /// A GPU is quarantined, or released.
    Fault {
        gpu: u8,
        good: bool,
    },
    /// A service's instance ran out of GPU memory.
    Starved {
        service: u8,
    },
    List {
        mask: u8,
    },
    Peak {
        service: u8,
        mib: u64,
    },
    /// The container engine comes and goes.
    Engine {
        up: bool,
    },
    Crash,
    Shutdown,
    Snapshot,
}

pub const SERVICES: u8 = 5;
pub const TYPES: u8 = 3;
/// From here on a target is a container of the job's own.
pub const CONTAINERS: u8 = TYPES + 2;
const TARGETS: u8 = CONTAINERS + 4;
/// Sizes of the GPUs that can be there.
pub const GPUS: [u64; 3] = [24, 24, 16];

pub fn name(service: u8) -> ServiceName {
    format_smolstr!("s{}", service % SERVICES)
}

fn process() -> Worker {
    Worker::Process {
        command: vec!["x".to_owned()],
        env: Vec::new(),
        working_dir: None,
    }
}

/// Service `s0`, `s1`, … of type `t0`, with one place and no GPU.
pub fn plain_spec(service: u8) -> ServiceSpec {
    ServiceSpec {
        name: name(service),
        service_type: "t0".into(),
        container: String::new(),
        port: 0,
        health_endpoint: "/health".to_owned(),
        description: String::new(),
        vram_mib: 0,
        gpus: 0,
        progress_mode: ProgressMode::Stateless,
        progress_endpoint: None,
        worker: process(),
        concurrency: 1,
        dispatch_path: None,
        cancel_path: None,
        idle_timeout_ms: None,
        grace_ms: 3_000,
        startup_timeout_ms: 20_000,
        min_runtime_ms: None,
        ladder: Vec::new(),
        mps_percent: None,
    }
}

/// None for half of the services; else some of the steps, in the order that they may have.
fn ladder() -> impl Strategy<Value = Vec<Step>> {
    let sleep = |level| Step::Sleep {
        call: SleepCall {
            level,
            path: String::new(),
            wake_path: String::new(),
            is_sleeping_path: None,
        },
        ms: 3_000,
    };
    let ask = Ask::Path(String::new());
    let all = vec![
        Step::Drain { ms: 2_000 },
        Step::Checkpoint { ask, ms: 1_000 },
        sleep(1),
        sleep(2),
        Step::CudaCheckpoint { ms: 2_000 },
        Step::Stop { ms: 2_000 },
        Step::Kill,
    ];
    let steps = prop::sample::subsequence(all, 0..=7);
    prop_oneof![Just(Vec::new()), steps]
}

pub fn spec() -> impl Strategy<Value = ServiceSpec> {
    (
        (
            0..SERVICES,
            0..TYPES,
            prop_oneof![Just(0), Just(6), Just(10), Just(16), Just(24)],
        ),
        (
            prop_oneof![8 => Just(0u32), 1 => Just(1), 1 => Just(2)],
            1..4u32,
            prop::option::of(0..8_000u64),
        ),
        (
            prop::bool::weighted(0.05),
            prop::option::of(Just(5_000u64)),
            ladder(),
        ),
    )
        .prop_map(
            |(
                (service, of, vram_mib),
                (gpus, concurrency, min_runtime_ms),
                (container, idle_timeout_ms, ladder),
            )| {
                ServiceSpec {
                    service_type: format_smolstr!("t{of}"),
                    vram_mib,
                    gpus,
                    worker: if container {
                        Worker::Container
                    } else {
                        process()
                    },
                    concurrency,
                    idle_timeout_ms,
                    min_runtime_ms,
                    ladder,
                    ..plain_spec(service)
                }
            },
        )
}

pub fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => (0..TARGETS, 1..6u8, any::<bool>(), 1..3u32, prop::bool::weighted(0.1)).prop_map(
            |(target, priority, ttl, attempts, callback)| Op::Start { target, priority, ttl, attempts, callback }
        ),
        8 => (any::<usize>(), 0..9u8).prop_map(|(run, action)| Op::Act { run, action }),
        1 => any::<usize>().prop_map(Op::CancelQueued),
        1 => any::<usize>().prop_map(Op::Checkpoint),
        3 => spec().prop_map(|spec| Op::Register(Box::new(spec))),
        3 => (0..SERVICES, 0..9u8).prop_map(|(service, action)| Op::Service { service, action }),
        1 => (0..SERVICES, any::<usize>()).prop_map(|(service, run)| Op::Execute { service, run }),
        1 => (0..SERVICES).prop_map(|service| Op::Release { service }),
        24 => (any::<usize>(), prop::bool::weighted(0.8)).prop_map(|(index, good)| Op::GoOn { index, good }),
        2 => any::<usize>().prop_map(Op::Again),
        8 => prop_oneof![Just(1u64), Just(400), Just(1_000), Just(5_000), Just(30_000), Just(600_000)]
            .prop_map(Op::Wait),
        1 => (0..3u8, prop_oneof![Just(0u64), Just(4), Just(20)]).prop_map(|(gpu, mib)| Op::Foreign { gpu, mib }),
        1 => (0..3u8, any::<bool>()).prop_map(|(gpu, good)| Op::Fault { gpu, good }),
        1 => (0..SERVICES).prop_map(|service| Op::Starved { service }),
        1 => (1..8u8).prop_map(|mask| Op::List { mask }),
        1 => (0..SERVICES, 1..24u64).prop_map(|(service, mib)| Op::Peak { service, mib }),
        1 => prop::bool::weighted(0.7).prop_map(|up| Op::Engine { up }),
        1 => Just(Op::Crash),
        1 => Just(Op::Shutdown),
        2 => Just(Op::Snapshot),
    ]
}

/// Much to do and little room: services that fill GPUs, urgent and idle work, long calls.
pub fn pressing_op() -> impl Strategy<Value = Op> {
    let priority = prop_oneof![3 => Just(1u8), 1 => Just(3), 3 => Just(5)];
    prop_oneof![
        16 => (0..TARGETS, priority, prop::bool::weighted(0.1), 1..3u32).prop_map(
            |(target, priority, ttl, attempts)| Op::Start { target, priority, ttl, attempts, callback: false }
        ),
        16 => Just(Op::AllButCalls),
        6 => (any::<usize>(), prop::bool::weighted(0.9)).prop_map(|(index, good)| Op::GoOn { index, good }),
        10 => prop_oneof![Just(400u64), Just(1_000), Just(3_000), Just(20_000)].prop_map(Op::Wait),
        3 => (any::<usize>(), 0..9u8).prop_map(|(run, action)| Op::Act { run, action }),
        1 => (0..SERVICES, any::<usize>()).prop_map(|(service, run)| Op::Execute { service, run }),
        1 => prop_oneof![
            1 => (0..3u8, prop_oneof![Just(0u64), Just(4), Just(20)])
                .prop_map(|(gpu, mib)| Op::Foreign { gpu, mib }),
            1 => (0..3u8, any::<bool>()).prop_map(|(gpu, good)| Op::Fault { gpu, good }),
            1 => (1..8u8).prop_map(|mask| Op::List { mask }),
            1 => (0..SERVICES, 1..24u64).prop_map(|(service, mib)| Op::Peak { service, mib }),
            1 => (0..SERVICES, 0..9u8).prop_map(|(service, action)| Op::Service { service, action }),
            1 => spec().prop_map(|spec| Op::Register(Box::new(spec))),
            1 => Just(Op::Crash),
        ],
        1 => Just(Op::Snapshot),
    ]
}

pub fn pressing_spec() -> impl Strategy<Value = ServiceSpec> {
    (spec(), prop_oneof![Just(10u64), Just(16), Just(24)]).prop_map(|(spec, vram_mib)| {
        ServiceSpec {
            vram_mib,
            worker: process(),
            ..spec
        }
    })
}
