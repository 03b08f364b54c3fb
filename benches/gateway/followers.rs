//! Many followers of one run: how soon each sees an event, and what each costs.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rungate::domain::time::Timestamp;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::client::{Connection, Server};
use crate::report::{Bar, Figure, percentile};
use crate::scale::Scale;
use crate::servers::{Process, START_PATH};
use crate::{Context, Failure, stub};

const GROUP: &str = "followers";
const EVENTS_PER_S: u32 = 100;

/// All figures of this file.
pub fn measure(context: &mut Context, scale: &Scale) -> Result<(), Failure> {
    let process = Process::gateway(&context.dir("followers")?)?;
    let runtime = Context::clients()?;
    let followed = runtime.block_on(follow(&process, scale))?;
    let Followed {
        mut latencies_ms,
        idle_bytes,
        loaded_bytes,
        frames,
        late_events,
    } = followed;
    let count = scale.followers;
    let seconds = scale.follow.as_secs_f64();
    let name = format!("append to frame, {count} followers, {EVENTS_PER_S} events/s, p99");
    let p99 = Figure::of(GROUP, name, "ms", &[percentile(&mut latencies_ms, 0.99)]);
    context.add(p99.bar(Bar::AtMost(20.0)));
    let p50 = percentile(&mut latencies_ms, 0.5);
    context.add(Figure::of(GROUP, "the same, p50", "ms", &[p50]));
    let rate = frames as f64 / seconds;
    context.add(Figure::of(GROUP, "frames delivered", "1/s", &[rate]));
    let kib = |bytes: u64| bytes as f64 / count as f64 / 1024.0;
    let idle = Figure::of(
        GROUP,
        "memory a follower, waiting",
        "KiB",
        &[kib(idle_bytes)],
    );
    context.add(idle.bar(Bar::AtMost(16.0)));
    let loaded = Figure::of(
        GROUP,
        "memory a follower, after the load",
        "KiB",
        &[kib(loaded_bytes)],
    );
    context.add(loaded.bar(Bar::AtMost(16.0)));
    if late_events > 0 {
        context.note(format!(
            "followers: {late_events} events were sent late, the machine was too busy"
        ));
    }
    Ok(())
}

struct Followed {
    latencies_ms: Vec<f64>,
    idle_bytes: u64,
    loaded_bytes: u64,
    frames: usize,
    late_events: usize,
}

async fn follow(process: &Process, scale: &Scale) -> Result<Followed, Failure> {
    let mut pusher = process.server.connect().await?;
    let run = running_job(&mut pusher).await?;
    // Warm up what is not a follower's: the threads, the pusher's connection, the code.
    push(&mut pusher, &run, 200).await?;
    let mut warm = Vec::new();
    for _ in 0..8 {
        warm.push(Stream::open(&process.server, &run, u64::MAX >> 1).await?);
    }
    drop(warm);
    settle().await;
    let (before, _) = process.memory()?;
    let position = ledger_len(&mut pusher, &run).await?;
    let mut streams = Vec::new();
    for _ in 0..scale.followers {
        streams.push(Stream::open(&process.server, &run, position).await?);
    }
    settle().await;
    let (connected, _) = process.memory()?;
    let total = (scale.follow.as_secs_f64() * f64::from(EVENTS_PER_S)) as usize;
    let readers: Vec<_> = streams
        .into_iter()
        .map(|stream| tokio::spawn(stream.latencies(total)))
        .collect();
    let late_events = push(&mut pusher, &run, total).await?;
    let mut latencies_ms = Vec::new();
    let mut open = Vec::new();
    for reader in readers {
        let (times, stream) = tokio::time::timeout(Duration::from_secs(30), reader).await???;
        latencies_ms.extend(times);
        open.push(stream);
    }
    settle().await;
    let (loaded, _) = process.memory()?;
    drop(open);
    Ok(Followed {
        frames: latencies_ms.len(),
        latencies_ms,
        idle_bytes: connected.saturating_sub(before),
        loaded_bytes: loaded.saturating_sub(before),
        late_events,
    })
}

/// Long enough for the server's buffers to be handed back.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(500)).await;
}

/// Registers the stub as a service and brings a job onto it; its run.
async fn running_job(connection: &mut Connection) -> Result<String, Failure> {
    let stub = stub::serve().await?;
    let service = json!({"name": "stub", "type": "stub", "url": format!("http://{stub}"), "health_endpoint": "/health"});
    connection
        .post("/services/register", Bytes::from(service.to_string()))
        .await?;
    let job = json!({"job": {"service_type": "stub", "payload": {"wait": true}}});
    let answer = connection
        .post(START_PATH, Bytes::from(job.to_string()))
        .await?;
    let answer: Value = serde_json::from_slice(&answer)?;
    let run = answer["run_id"]
        .as_str()
        .ok_or("a start without a run_id")?
        .to_owned();
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(20) {
        // Refused until the job runs.
        if push(connection, &run, 1).await.is_ok() {
            return Ok(run);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err("the job did not come to run".into())
}

/// Pushes progress at the rate; tells how many were sent over half a period late.
async fn push(connection: &mut Connection, run: &str, count: usize) -> Result<usize, Failure> {
    let path = format!("/queue/{run}/progress");
    let period = Duration::from_secs(1) / EVENTS_PER_S;
    let mut ticks = tokio::time::interval(period);
    let mut late = 0;
    for n in 0..count {
        let due = ticks.tick().await;
        if due.elapsed() > period / 2 {
            late += 1;
        }
        let body = format!(r#"{{"fraction":0.5,"done":{n},"message":"chunk {n}"}}"#);
        connection.post(&path, Bytes::from(body)).await?;
    }
    Ok(late)
}

/// The run's last cursor.
async fn ledger_len(connection: &mut Connection, run: &str) -> Result<u64, Failure> {
    let mut after = 0;
    loop {
        let path = format!("/api/gateway/runs/{run}/ledger?after={after}&limit=2000");
        let (_, answer) = connection
            .send(hyper::Method::GET, &path, Bytes::new())
            .await?;
        let answer: Value = serde_json::from_slice(&answer)?;
        let next = answer["next_after"]
            .as_u64()
            .ok_or("a page without next_after")?;
        if next == after {
            return Ok(after);
        }
        after = next;
    }
}

/// A follower of a run over a bare socket: it costs the client little.
pub struct Stream {
    socket: TcpStream,
    buffer: Vec<u8>,
}

impl Stream {
    /// Asks for the stream and takes the header and the first frame.
    pub async fn open(server: &Server, run: &str, after: u64) -> Result<Stream, Failure> {
        let mut socket = TcpStream::connect(server.addr).await?;
        let request = format!(
            "GET /api/gateway/runs/{run}/ledger/stream?after={after}&heartbeat_s=60 HTTP/1.1\r\n\
             host: {}\r\nauthorization: Bearer {}\r\naccept: text/event-stream\r\n\r\n",
            server.addr, server.token
        );
        socket.write_all(request.as_bytes()).await?;
        let mut stream = Stream {
            socket,
            buffer: Vec::new(),
        };
        let first = stream.next().await?;
        if first.starts_with("HTTP/1.1 200") {
            Ok(stream)
        } else {
            Err(first.into())
        }
    }

    /// The next frame; the header counts into the first. Chunk lengths are left where they stand: they are
    /// no part of the fields that are looked for.
    pub async fn next(&mut self) -> Result<String, Failure> {
        loop {
            if let Some(end) = find(&self.buffer, b"\n\n") {
                let frame: Vec<u8> = self.buffer.drain(..end + 2).collect();
                return Ok(String::from_utf8_lossy(&frame).into_owned());
            }
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> Result<(), Failure> {
        self.buffer.reserve(4096);
        match self.socket.read_buf(&mut self.buffer).await? {
            0 => Err("a stream was closed".into()),
            _ => Ok(()),
        }
    }

    /// Takes `frames` steps; for each the milliseconds since its record's `at`, which is taken before its
    /// commit begins.
    async fn latencies(mut self, frames: usize) -> Result<(Vec<f64>, Stream), Failure> {
        let mut times = Vec::with_capacity(frames);
        while times.len() < frames {
            self.fill().await?;
            let arrived = now();
            while let Some(end) = find(&self.buffer, b"\n\n") {
                if let Some(at) = appended_at(&self.buffer[..end]) {
                    times.push((arrived - at) as f64 / 1e3);
                }
                self.buffer.drain(..end + 2);
            }
        }
        Ok((times, self))
    }
}

fn now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(0)
}

/// The record's `at` in µs; `None` when the frame is no step.
fn appended_at(frame: &[u8]) -> Option<i64> {
    let start = find(frame, b"\"at\":")? + 5;
    let end = start
        + frame[start..]
            .iter()
            .skip(1)
            .position(|byte| *byte == b'"')?
        + 2;
    let at: Timestamp = serde_json::from_slice(frame.get(start..end)?).ok()?;
    Some(at.0)
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    let mut from = 0;
    // The first byte is searched for by the fast search of the standard library.
    while let Some(at) = bytes[from..].iter().position(|byte| *byte == wanted[0]) {
        let at = from + at;
        if bytes[at..].starts_with(wanted) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}
