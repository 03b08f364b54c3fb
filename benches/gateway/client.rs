//! The client of every HTTP measurement, the floor's and the gateway's alike: kept-alive connections that
//! post and wait, each from its own task.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::Failure;
use crate::report::percentile;

/// Whom to call.
#[derive(Clone)]
pub struct Server {
    pub addr: SocketAddr,
    /// Sent as Bearer, by both sides so that requests are alike.
    pub token: String,
}

/// One connection.
pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
    host: String,
    authorization: String,
    /// What a proxy in front says of the client's address.
    forwarded_for: Option<String>,
}

impl Server {
    pub async fn connect(&self) -> Result<Connection, Failure> {
        let stream = TcpStream::connect(self.addr).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        // Ends when the sender is dropped.
        tokio::spawn(connection);
        Ok(Connection {
            sender,
            host: self.addr.to_string(),
            authorization: format!("Bearer {}", self.token),
            forwarded_for: None,
        })
    }
}

impl Connection {
    /// Shows this token from now on.
    pub fn show(&mut self, token: &str) {
        self.authorization = format!("Bearer {token}");
    }

    /// Comes from this address from now on, as a trusted proxy would say.
    pub fn come_from(&mut self, address: &str) {
        self.forwarded_for = Some(address.to_owned());
    }

    /// Sends one request and takes all of the answer.
    pub async fn send(
        &mut self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), Failure> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.host)
            .header("authorization", &self.authorization)
            .header("content-type", "application/json");
        if let Some(address) = &self.forwarded_for {
            request = request.header("x-forwarded-for", address);
        }
        self.sender.ready().await?;
        let response = self
            .sender
            .send_request(request.body(Full::new(body))?)
            .await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        Ok((status, body))
    }

    /// Gets JSON; anything but success is a failure with the answer's text.
    pub async fn get(&mut self, path: &str) -> Result<Bytes, Failure> {
        let (status, answer) = self.send(Method::GET, path, Bytes::new()).await?;
        if status.is_success() {
            Ok(answer)
        } else {
            Err(format!("GET {path}: {status} {}", String::from_utf8_lossy(&answer)).into())
        }
    }

    /// Posts JSON; anything but success is a failure with the answer's text.
    pub async fn post(&mut self, path: &str, body: Bytes) -> Result<Bytes, Failure> {
        let (status, answer) = self.send(Method::POST, path, body).await?;
        if status.is_success() {
            Ok(answer)
        } else {
            Err(format!("POST {path}: {status} {}", String::from_utf8_lossy(&answer)).into())
        }
    }
}

/// What a round of load came to.
pub struct Load {
    pub requests: f64,
    pub per_s: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

/// `clients` connections that post bodies one after the other for `time`.
pub async fn load(
    server: &Server,
    path: &'static str,
    clients: usize,
    time: Duration,
    body: fn(u64) -> Bytes,
) -> Result<Load, Failure> {
    let mut connections = Vec::new();
    for _ in 0..clients {
        connections.push(server.connect().await?);
    }
    let started = Instant::now();
    let tasks: Vec<_> = connections
        .into_iter()
        .enumerate()
        .map(|(n, connection)| {
            tokio::spawn(client(connection, path, n as u64, started + time, body))
        })
        .collect();
    let mut latencies = Vec::new();
    for task in tasks {
        latencies.extend(task.await??);
    }
    let took = started.elapsed().as_secs_f64();
    Ok(Load {
        requests: latencies.len() as f64,
        per_s: latencies.len() as f64 / took,
        p50_us: percentile(&mut latencies, 0.5),
        p99_us: percentile(&mut latencies, 0.99),
    })
}

async fn client(
    mut connection: Connection,
    path: &str,
    client: u64,
    until: Instant,
    body: fn(u64) -> Bytes,
) -> Result<Vec<f64>, Failure> {
    let mut latencies = Vec::new();
    let mut n = client * 1_000_000;
    while Instant::now() < until {
        let sent = Instant::now();
        connection.post(path, body(n)).await?;
        latencies.push(sent.elapsed().as_secs_f64() * 1e6);
        n += 1;
    }
    Ok(latencies)
}
