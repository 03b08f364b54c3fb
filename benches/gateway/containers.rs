//! Services in containers: from a job's submit to its container's receiving the call, and what a cold start adds to
//! `docker start`; and what a job with a container of its own adds to `docker run`. Needs an engine and the images of `tests/docker/images`; without them this group says so and is left out.

use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde_json::{Value, json};

use crate::client::Connection;
use crate::report::{Bar, Figure};
use crate::scale::Scale;
use crate::servers::{Process, START_PATH};
use crate::{Context, Failure};

const GROUP: &str = "containers";
const IMAGE: &str = "rungate-test/python:1";
const REGISTER_PATH: &str = "/services/register";
/// Jobs of one round: three are slower than its p99, so that one slow sync of the disk does not make it.
const JOBS: usize = 400;
/// How long one thing may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// All figures of this file.
pub fn measure(context: &mut Context, scale: &Scale) -> Result<(), Failure> {
    if docker(&["image", "inspect", IMAGE]).is_err() {
        context.note(format!(
            "containers: no engine with {IMAGE}; start one and run tests/docker/images"
        ));
        return Ok(());
    }
    let settings = [
        ("RUNGATE_DOCKER_HOST", ""),
        ("RUNGATE_DOCKER_IMAGES", IMAGE),
    ];
    let process = Process::gateway_with(&context.dir("containers")?, &settings)?;
    let runtime = Context::clients()?;
    let figures = runtime.block_on(rounds(&process, scale.rounds))?;
    for figure in figures {
        context.add(figure);
    }
    Ok(())
}

async fn rounds(process: &Process, rounds: usize) -> Result<Vec<Figure>, Failure> {
    let mut gateway = process.server.connect().await?;
    let service = json!({"name": "s", "type": "s", "image": IMAGE, "dispatch_path": "/process", "grace_seconds": 1});
    gateway
        .post(REGISTER_PATH, Bytes::from(service.to_string()))
        .await?;
    let floor = Floor::create()?;
    let (mut cold, mut floors, mut p99) = (Vec::new(), Vec::new(), Vec::new());
    let (mut runs, mut jobs, mut direct) = (Vec::new(), Vec::new(), Vec::new());
    // The first is not counted: everything is cold.
    for round in 0..=rounds {
        let (floor_ms, direct_ms) = floor.start().await?;
        // The one of the last round was closed meanwhile, as nothing was asked.
        gateway = process.server.connect().await?;
        let began = Instant::now();
        gateway
            .post("/services/s/start", Bytes::from_static(b"{}"))
            .await?;
        let cold_ms = began.elapsed().as_secs_f64() * 1e3;
        let mut waits = Vec::with_capacity(JOBS);
        for _ in 0..JOBS {
            waits.push(received_after_ms(&mut gateway).await?);
        }
        waits.sort_by(f64::total_cmp);
        gateway
            .post("/services/s/stop", Bytes::from_static(b"{}"))
            .await?;
        let run_ms = run_ms()?;
        let job_ms = job_ms(&mut gateway).await?;
        if round > 0 {
            runs.push(run_ms);
            jobs.push(job_ms - run_ms);
            floors.push(floor_ms);
            cold.push(cold_ms - floor_ms);
            p99.push(waits[JOBS * 99 / 100]);
            direct.push(direct_ms);
        }
    }
    let started = Figure::of(
        GROUP,
        "`docker start` to the first good health answer",
        "ms",
        &floors,
    );
    let added = Figure::of(GROUP, "a cold start adds to that", "ms", &cold).bar(Bar::AtMost(150.0));
    let warm = Figure::of(
        GROUP,
        "submit to its container's receiving the call, warm, p99",
        "ms",
        &p99,
    );
    let called = "a call of the same program without a gateway, to its receiving it, p99";
    let called = Figure::of(GROUP, called, "ms", &direct);
    let run = Figure::of(GROUP, "`docker run --rm` of `true`", "ms", &runs);
    let job = "a job in a container of its own, submit to completed, adds to that";
    let job = Figure::of(GROUP, job, "ms", &jobs);
    let warm = warm.bar(Bar::AtMost(5.0));
    Ok(vec![started, added, called, warm, run, job])
}

/// From the submit of one job to what its worker says of when the call came, by the same clock.
async fn received_after_ms(gateway: &mut Connection) -> Result<f64, Failure> {
    let sent = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
    let job = json!({"service_type": "s", "payload": {"op": "echo"}});
    let result = result_of(gateway, job).await?;
    let received = result["received_at"].as_f64().ok_or("no received_at")?;
    Ok((received - sent) * 1e3)
}

/// The same program by the engine's own command line, which waits for its end and removes the container.
fn run_ms() -> Result<f64, Failure> {
    let began = Instant::now();
    docker(&["run", "--rm", "--init", IMAGE, "true"])?;
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

/// From a job's submit until it is seen to have completed.
async fn job_ms(gateway: &mut Connection) -> Result<f64, Failure> {
    let began = Instant::now();
    let job = json!({"container": {"image": IMAGE, "args": ["true"]}});
    result_of(gateway, job).await?;
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

/// Starts a job and waits for its result.
async fn result_of(gateway: &mut Connection, job: Value) -> Result<Value, Failure> {
    let job = json!({"job": job});
    let answer = gateway
        .post(START_PATH, Bytes::from(job.to_string()))
        .await?;
    let answer: Value = serde_json::from_slice(&answer)?;
    let run = answer["run_id"]
        .as_str()
        .ok_or("a start without a run_id")?
        .to_owned();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let job = gateway.get(&format!("/queue/{run}")).await?;
        let job: Value = serde_json::from_slice(&job)?;
        if let Some(result) = job["result"].as_str() {
            return Ok(serde_json::from_str(result)?);
        }
        if Instant::now() > deadline {
            return Err("a job did not end".into());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn docker(arguments: &[&str]) -> Result<String, Failure> {
    let output = Command::new("docker").args(arguments).output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// The same image in a container that is made already.
struct Floor {
    container: String,
    port: u16,
}

impl Floor {
    fn create() -> Result<Floor, Failure> {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?
            .local_addr()?
            .port();
        let publish = format!("127.0.0.1:{port}:8080");
        let container = docker(&["create", "--init", "-p", &publish, IMAGE])?;
        Ok(Floor { container, port })
    }

    /// Starts it, waits for its health, calls it and stops it again: how long the first two took, and the calls' p99, in
    /// milliseconds.
    async fn start(&self) -> Result<(f64, f64), Failure> {
        let began = Instant::now();
        docker(&["start", &self.container])?;
        let url = format!("http://127.0.0.1:{}/health", self.port);
        while reqwest::get(&url).await.is_err() {
            if began.elapsed() > PATIENCE {
                return Err("the floor's container is not healthy".into());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let took = began.elapsed().as_secs_f64() * 1e3;
        let client = reqwest::Client::new();
        let url = format!("http://127.0.0.1:{}/process", self.port);
        let mut waits = Vec::with_capacity(JOBS);
        for _ in 0..JOBS {
            let sent = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
            let call = client.post(&url).json(&json!({"op": "echo"}));
            let result: Value = call.send().await?.json().await?;
            let received = result["received_at"].as_f64().ok_or("no received_at")?;
            waits.push((received - sent) * 1e3);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        waits.sort_by(f64::total_cmp);
        docker(&["kill", &self.container])?;
        docker(&["wait", &self.container])?;
        Ok((took, waits[JOBS * 99 / 100]))
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        let _ = docker(&["rm", "-f", &self.container]);
    }
}
