//! A made-up but plausible history: services that are up, and runs that are queued, dispatched, progressed
//! and completed, many of them in flight at the same time.

use bytes::Bytes;
use rungate::domain::event::{Event, StartCause};
use rungate::domain::ids::{Generation, PlaneId, RunId};
use rungate::domain::record::NewRecord;
use rungate::domain::spec::{
    GpuFacts, GpuSource, Grant, JobSpec, Priority, ProgressMode, ServiceSpec, Target, Worker,
};
use rungate::domain::time::Timestamp;
use smol_str::{SmolStr, format_smolstr};

/// Service types, each with one service; jobs name the type.
pub const TYPES: usize = 16;
/// Places of each service: enough that a completion always finds its successor a place on the same one.
pub const CONCURRENCY: u32 = 8;
/// 2026-01-01T00:00:00Z, from which made-up time runs.
pub const START: Timestamp = Timestamp::from_millis(1_767_225_600_000);

/// A run id as the gateway makes them, at a given time.
pub fn run_id(at: Timestamp, n: u64) -> RunId {
    let ms = u64::try_from(at.0 / 1_000).expect("made-up time is after 1970");
    // Any spread of bits will do; SplitMix64 (Steele, Lea, Flood 2014).
    let mut z = n.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&(z ^ (z >> 31)).to_le_bytes());
    // The gateway's ids of one millisecond count up.
    bytes[0] = (n >> 8) as u8;
    bytes[1] = n as u8;
    RunId(uuid::Builder::from_unix_timestamp_millis(ms, &bytes).into_uuid())
}

pub fn type_name(n: usize) -> SmolStr {
    format_smolstr!("type-{:02}", n % TYPES)
}

fn service_name(n: usize) -> SmolStr {
    format_smolstr!("worker-{:02}", n % TYPES)
}

/// A job of the `n`th kind.
pub fn job(n: usize) -> JobSpec {
    JobSpec {
        target: Target::Type(type_name(n)),
        service_type: Some(type_name(n)),
        priority: Priority::new(1 + (n / TYPES % 5) as u8).unwrap_or_default(),
        ttl_ms: None,
        max_attempts: 3,
        timeout_ms: 600_000,
        callback_url: None,
    }
}

/// The JSON of a job's payload, about 200 bytes.
pub fn payload(n: u64) -> Bytes {
    Bytes::from(format!(
        r#"{{"document":"reports/2026/{n:08}.txt","language":"en","chunk_size_chars":4096,"options":{{"lowercase":true,"stop_words":false,"top_n":50}},"note":"count the words of this document and list the most frequent ones"}}"#
    ))
}

fn progress(n: u64) -> Bytes {
    Bytes::from(format!(
        r#"{{"fraction":0.5,"done":{n},"total":1000,"message":"chunk {n} of 1000"}}"#
    ))
}

fn result(n: u64) -> Bytes {
    Bytes::from(format!(
        r#"{{"words":{n},"unique":1234,"top":[["the",120],["of",80]]}}"#
    ))
}

fn service(n: usize) -> ServiceSpec {
    ServiceSpec {
        name: service_name(n),
        service_type: type_name(n),
        container: String::new(),
        port: 0,
        health_endpoint: "/health".to_owned(),
        description: "made up for a measurement".to_owned(),
        vram_mib: 1_024,
        gpus: 0,
        progress_mode: ProgressMode::Queue,
        progress_endpoint: None,
        worker: Worker::Process {
            command: vec!["/bin/true".to_owned()],
            env: Vec::new(),
            working_dir: None,
        },
        concurrency: CONCURRENCY,
        dispatch_path: None,
        cancel_path: None,
        idle_timeout_ms: None,
        grace_ms: 5_000,
        startup_timeout_ms: 60_000,
        min_runtime_ms: None,
        ladder: Vec::new(),
        mps_percent: None,
    }
}

/// What a gateway has recorded when its services are up and no job was submitted yet.
pub fn prelude() -> Vec<Event> {
    let gpu = SmolStr::new_static("SIM-0");
    let mut events = vec![
        Event::PlaneOpened {
            plane: PlaneId::ROOT,
            tenant: SmolStr::new_static("default"),
            runtime: SmolStr::new_static("admin"),
        },
        Event::GpusListed {
            gpus: vec![GpuFacts {
                uuid: gpu.clone(),
                index: 0,
                name: SmolStr::new_static("Simulated 24 GiB"),
                memory_mib: 24_576,
                source: GpuSource::Simulated,
            }],
        },
    ];
    for n in 0..TYPES {
        let (service_name, generation) = (service_name(n), Generation(1));
        events.push(Event::ServiceRegistered {
            spec: Box::new(service(n)),
        });
        events.push(Event::InstanceStartRequested {
            service: service_name.clone(),
            generation,
            grants: vec![Grant {
                gpu: gpu.clone(),
                mib: 1_024,
            }],
            cause: StartCause::Manual,
            deadline: START + 60_000,
        });
        events.push(Event::InstanceReady {
            service: service_name,
            generation,
            startup_ms: 900,
        });
    }
    events
}

/// The submission of the `n`th run.
pub fn queued(run: RunId, n: usize) -> Event {
    Event::JobQueued {
        run,
        spec: job(n),
        session: None,
        labels: Vec::new(),
        container: None,
    }
}

/// The start of its first attempt.
pub fn dispatched(run: RunId, n: usize) -> Event {
    Event::JobDispatched {
        run,
        attempt: 1,
        service: service_name(n),
        generation: Generation(1),
        checkpoint: None,
    }
}

/// Events of one run in a history.
pub const EVENTS_PER_RUN: u64 = 4;
/// Runs that wait, and runs that work, at any moment of a history.
const WAITING: u64 = 64;
const WORKING: u64 = 64;

/// A history without end: a run is queued, one that waited is dispatched, one that works tells its
/// progress, and one that has worked completes.
pub struct History {
    n: u64,
    now: Timestamp,
    pending: std::vec::IntoIter<(Event, Bytes)>,
}

impl History {
    pub fn new() -> History {
        let prelude: Vec<_> = prelude()
            .into_iter()
            .map(|event| (event, Bytes::new()))
            .collect();
        History {
            n: 0,
            now: START,
            pending: prelude.into_iter(),
        }
    }

    fn run_at(n: u64) -> RunId {
        run_id(Timestamp(START.0 + i64::try_from(n).unwrap_or(0) * 500), n)
    }

    fn round(&mut self) {
        let n = self.n;
        self.n += 1;
        self.now = Timestamp(self.now.0 + 500);
        let index = |n: u64| usize::try_from(n).unwrap_or(0);
        let mut events = vec![(queued(Self::run_at(n), index(n)), payload(n))];
        if let Some(old) = n.checked_sub(WAITING) {
            events.push((dispatched(Self::run_at(old), index(old)), Bytes::new()));
        }
        if let Some(old) = n.checked_sub(WAITING + WORKING / 2) {
            let run = Self::run_at(old);
            events.push((Event::JobProgressed { run, attempt: 1 }, progress(old)));
        }
        if let Some(old) = n.checked_sub(WAITING + WORKING) {
            let run = Self::run_at(old);
            events.push((Event::JobCompleted { run, attempt: 1 }, result(old)));
        }
        self.pending = events.into_iter();
    }
}

impl Iterator for History {
    type Item = NewRecord;

    fn next(&mut self) -> Option<NewRecord> {
        loop {
            if let Some((event, payload)) = self.pending.next() {
                return Some(record(self.now, event, payload));
            }
            self.round();
        }
    }
}

/// An event as the coordinator appends it.
pub fn record(at: Timestamp, event: Event, payload: Bytes) -> NewRecord {
    let client = matches!(event, Event::JobQueued { .. });
    NewRecord {
        plane: PlaneId::ROOT,
        at,
        actor: SmolStr::new_static(if client { "admin" } else { "executor" }),
        request_id: client.then(|| SmolStr::new_static("01JH8Z3V6W3P9Q4N5T7X2K1M0B")),
        asked: None,
        event,
        payload,
    }
}
