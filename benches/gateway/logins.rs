//! What it costs to know who calls, among many users; and what a flood of bad logins does to everybody else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::{Method, StatusCode};
use serde_json::Value;
use tokio::sync::Mutex;

use crate::client::Server;
use crate::report::{Bar, Figure, percentile};
use crate::scale::Scale;
use crate::servers::{Process, START_PATH};
use crate::{Context, Failure, starts};

const GROUP: &str = "logins";
const USERS_PATH: &str = "/api/gateway/admin/users";
const TOKENS_PATH: &str = "/api/gateway/tokens";
const LOGIN_PATH: &str = "/api/gateway/session/login";
/// Needs a token, and does nothing else.
const CLOSED_PATH: &str = "/api/gateway/ping";
/// Needs none, and answers about as much.
const OPEN_PATH: &str = "/api/health";
const TOKENS_OF_EACH: usize = 5;
/// Connections that make users.
const MAKERS: usize = 64;
/// Connections that the flood comes by: most logins wait for a while.
const FLOODERS: u32 = 512;
const BAD_LOGINS_PER_S: u32 = 1_000;
/// Connections of those who are disturbed, and how often each asks.
const OTHERS: u64 = 4;
const ASK_EVERY: Duration = Duration::from_millis(5);

/// All figures of this file.
pub fn measure(context: &mut Context, scale: &Scale) -> Result<(), Failure> {
    let settings = [
        // Each bad login comes from an address of its own: none is turned away for its address.
        ("RUNGATE_TRUSTED_PROXIES", "1"),
        ("RUNGATE_RATE_LIMIT_ADDRESS", "0"),
        ("RUNGATE_RATE_LIMIT_USER", "0"),
    ];
    let gateway = Process::gateway_with(&context.dir("logins")?, &settings)?;
    let runtime = Context::clients()?;
    let tokens = runtime.block_on(make_users(&gateway.server, scale.users))?;
    context.note(format!(
        "logins: {} users with {TOKENS_OF_EACH} tokens each",
        scale.users
    ));
    runtime.block_on(authentication(context, scale, &gateway.server, &tokens))?;
    runtime.block_on(flood(context, scale, &gateway.server))
}

/// Users with their tokens, made over HTTP.
async fn make_users(server: &Server, users: usize) -> Result<Vec<String>, Failure> {
    let all = Arc::new(Mutex::new(Vec::with_capacity(users * TOKENS_OF_EACH)));
    let mut makers = Vec::new();
    for maker in 0..MAKERS {
        let (server, all) = (server.clone(), Arc::clone(&all));
        makers.push(tokio::spawn(async move {
            let mut admin = server.connect().await?;
            let mut user = server.connect().await?;
            for n in (maker..users).step_by(MAKERS) {
                let body = format!(r#"{{"user_id":"user-{n}","roles":["user"]}}"#);
                let mut tokens = vec![token_in(&admin.post(USERS_PATH, body.into()).await?)?];
                user.show(&tokens[0]);
                for k in 1..TOKENS_OF_EACH {
                    let body = format!(r#"{{"name":"token-{k}"}}"#);
                    tokens.push(token_in(&user.post(TOKENS_PATH, body.into()).await?)?);
                }
                all.lock().await.extend(tokens);
            }
            Ok::<(), Failure>(())
        }));
    }
    for maker in makers {
        maker.await??;
    }
    let mut all = all.lock().await;
    Ok(std::mem::take(&mut all))
}

fn token_in(answer: &[u8]) -> Result<String, Failure> {
    let answer: Value = serde_json::from_slice(answer)?;
    let token = answer["token"].as_str();
    Ok(token.ok_or("an answer without the new token")?.to_owned())
}

/// The same connection asks by turns where a token is needed, each time with another one, and where none is.
async fn authentication(
    context: &mut Context,
    scale: &Scale,
    server: &Server,
    tokens: &[String],
) -> Result<(), Failure> {
    let mut connection = server.connect().await?;
    let (mut closed_us, mut open_us) = (Vec::new(), Vec::new());
    for round in 0..=scale.rounds {
        let (mut closed, mut open) = (Vec::new(), Vec::new());
        for n in 0..scale.asked {
            // 7,919 is prime: all tokens get their turn, neighbours far apart.
            connection.show(&tokens[(round * scale.asked + n) * 7_919 % tokens.len()]);
            for (path, times) in [(CLOSED_PATH, &mut closed), (OPEN_PATH, &mut open)] {
                let sent = Instant::now();
                let (status, _) = connection.send(Method::GET, path, Bytes::new()).await?;
                times.push(sent.elapsed().as_secs_f64() * 1e6);
                if status != StatusCode::OK {
                    return Err(format!("GET {path}: {status}").into());
                }
            }
        }
        if round > 0 {
            closed_us.push(percentile(&mut closed, 0.5));
            open_us.push(percentile(&mut open, 0.5));
        }
    }
    let added: Vec<f64> = closed_us.iter().zip(&open_us).map(|(c, o)| c - o).collect();
    let with = Figure::of(GROUP, "a request with a token, p50", "µs", &closed_us);
    context.add(with.floor(&closed_us, &open_us));
    let added = Figure::of(GROUP, "authentication adds, p50", "µs", &added);
    context.add(added.bar(Bar::AtMost(20.0)));
    Ok(())
}

/// Others start runs and read them, first undisturbed, then while the flood comes in.
async fn flood(context: &mut Context, scale: &Scale, server: &Server) -> Result<(), Failure> {
    let mut before = others(server, scale.flood / 2).await?;
    let ends = Instant::now() + scale.flood;
    let flooders: Vec<_> = (0..FLOODERS)
        .map(|n| tokio::spawn(flooder(server.clone(), n, ends)))
        .collect();
    let mut during = others(server, scale.flood).await?;
    let mut refused = 0;
    for flooder in flooders {
        refused += flooder.await??;
    }
    let per_s = f64::from(refused) / scale.flood.as_secs_f64();
    context.add(Figure::of(GROUP, "bad logins refused", "1/s", &[per_s]));
    let whose = ["a start", "a read"];
    for (what, (before, during)) in whose.into_iter().zip(before.iter_mut().zip(&mut during)) {
        for (name, p, bar) in [
            ("p50", 0.5, Bar::None),
            ("p99", 0.99, Bar::AtMostRatio(2.0)),
        ] {
            let (floor, ours) = ([percentile(before, p)], [percentile(during, p)]);
            let name = format!("{what} during the flood, {name}");
            context.add(
                Figure::of(GROUP, name, "µs", &ours)
                    .floor(&ours, &floor)
                    .bar(bar),
            );
        }
    }
    Ok(())
}

/// Tries a password at a steady pace; how often it was refused.
async fn flooder(server: Server, n: u32, ends: Instant) -> Result<u32, Failure> {
    let mut connection = server.connect().await?;
    let pace = Duration::from_secs(1) * FLOODERS / BAD_LOGINS_PER_S;
    let mut next = Instant::now() + pace * n / FLOODERS;
    let mut refused = 0;
    for attempt in 0_u32.. {
        tokio::time::sleep_until(next.into()).await;
        if Instant::now() >= ends {
            break;
        }
        // Those who had to wait do not make up for it at once.
        next = (next + pace).max(Instant::now());
        let [_, b, c, d] = (attempt * FLOODERS + n).to_be_bytes();
        connection.come_from(&format!("10.{b}.{c}.{d}"));
        let user = (attempt * FLOODERS + n) % 20_000;
        let body = format!(r#"{{"user_id":"user-{user}","password":"not the password"}}"#);
        let (status, _) = connection
            .send(Method::POST, LOGIN_PATH, body.into())
            .await?;
        if status.is_success() {
            return Err("a login without the password".into());
        }
        refused += 1;
    }
    Ok(refused)
}

/// Times of starts and of reads, in microseconds, at a pace that leaves the gateway idle for the most part.
async fn others(server: &Server, time: Duration) -> Result<[Vec<f64>; 2], Failure> {
    let ends = Instant::now() + time;
    let mut tasks = Vec::new();
    for n in 0..OTHERS {
        let mut connection = server.connect().await?;
        tasks.push(tokio::spawn(async move {
            let mut times: [Vec<f64>; 2] = Default::default();
            let mut tick = tokio::time::interval(ASK_EVERY);
            while Instant::now() < ends {
                tick.tick().await;
                let sent = Instant::now();
                let answer = connection.post(START_PATH, starts::body(n)).await?;
                times[0].push(sent.elapsed().as_secs_f64() * 1e6);
                let answer: Value = serde_json::from_slice(&answer)?;
                let run = answer["run_id"].as_str().unwrap_or_default();
                let path = format!("/api/gateway/runs/{run}");
                let sent = Instant::now();
                let (status, _) = connection.send(Method::GET, &path, Bytes::new()).await?;
                times[1].push(sent.elapsed().as_secs_f64() * 1e6);
                if status != StatusCode::OK {
                    return Err(format!("GET {path}: {status}").into());
                }
            }
            Ok::<_, Failure>(times)
        }));
    }
    let mut all: [Vec<f64>; 2] = Default::default();
    for task in tasks {
        for (all, own) in all.iter_mut().zip(task.await??) {
            all.extend(own);
        }
    }
    Ok(all)
}
