//! How much callers may ask: each user by itself, whoever shows no credentials by its address, and administrators not
//! at all unless told otherwise.

use std::net::IpAddr;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::support::browser::LOGIN;
use crate::support::raw::exchange;
use crate::support::scripted::Scripted;
use crate::support::wait::until;
use crate::support::{Answer, Gateway, Options, answer};

const PING: &str = "/api/gateway/ping";

async fn gateway(settings: &[(&str, &str)]) -> Gateway {
    let with = |options: Options, (name, value): &(&str, &str)| options.set(name, value);
    Gateway::start(settings.iter().fold(Options::default(), with)).await
}

async fn user(gateway: &Gateway, name: &str) -> String {
    let made = gateway
        .post("/api/gateway/admin/users", json!({"user_id": name}))
        .await;
    made.expect(200)["token"].as_str().unwrap().to_owned()
}

async fn ping(gateway: &Gateway, token: &str) -> Answer {
    answer(gateway.bare(Method::GET, PING).bearer_auth(token)).await
}

#[tokio::test]
async fn a_users_requests_a_minute_are_limited_and_told() {
    let gateway = gateway(&[("RUNGATE_RATE_LIMIT_USER", "3")]).await;
    let (ann, bob) = (user(&gateway, "ann").await, user(&gateway, "bob").await);
    for left in [2, 1, 0] {
        let answer = ping(&gateway, &ann).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.headers["ratelimit-policy"], "\"user\";q=3;w=60");
        let told = answer.headers["ratelimit"].to_str().unwrap().to_owned();
        assert!(told.starts_with(&format!("\"user\";r={left};t=")), "{told}");
        assert!(!answer.headers.contains_key("retry-after"));
    }
    let refused = ping(&gateway, &ann).await;
    assert_eq!(refused.headers["ratelimit-policy"], "\"user\";q=3;w=60");
    let told = refused.headers["ratelimit"].to_str().unwrap();
    assert!(told.starts_with("\"user\";r=0;t="), "{told}");
    let wait: u64 = refused.headers["retry-after"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1..=20).contains(&wait), "{wait}");
    let problem = refused.expect(429);
    assert_eq!(problem["code"], "rate_limited");
    assert_eq!(problem["detail"], "Too Many Requests (rate limit)");
    assert_eq!(problem["violated-policies"], json!(["user"]));

    // Another token of the same user is no way around it; another user and the administrator are not held up.
    let path = "/api/gateway/admin/users/ann";
    let rotated = gateway
        .request(Method::PATCH, path)
        .json(&json!({"rotate_token": true}));
    let rotated = answer(rotated).await.expect(200);
    let again = rotated["token"].as_str().unwrap();
    assert_eq!(ping(&gateway, again).await.status, 429);
    assert_eq!(ping(&gateway, &bob).await.status, 200);
    for _ in 0..10 {
        let answer = gateway.get(PING).await;
        assert_eq!(answer.status, 200);
        assert!(!answer.headers.contains_key("ratelimit"));
    }
}

#[tokio::test]
async fn administrators_are_limited_when_a_setting_says_so() {
    let settings = [
        ("RUNGATE_RATE_LIMIT_USER", "2"),
        ("RUNGATE_LIMIT_ADMINS", "true"),
    ];
    let gateway = gateway(&settings).await;
    let mut statuses = Vec::new();
    for _ in 0..3 {
        statuses.push(gateway.get(PING).await.status.as_u16());
    }
    assert_eq!(statuses, [200, 200, 429]);
}

#[tokio::test]
async fn whoever_shows_no_credentials_is_limited_by_its_address() {
    let settings = [
        ("RUNGATE_RATE_LIMIT_ADDRESS", "3"),
        ("RUNGATE_TRUSTED_PROXIES", "1"),
    ];
    let gateway = gateway(&settings).await;
    let from = async |forwarded: &str, token: &str| {
        let request = gateway.bare(Method::GET, PING).bearer_auth(token);
        answer(request.header("x-forwarded-for", forwarded)).await
    };
    // The first hop is what the client says itself: it changes nothing.
    for (first, status) in [
        ("7.7.7.1", 401),
        ("7.7.7.2", 401),
        ("7.7.7.3", 401),
        ("7.7.7.4", 429),
    ] {
        let told = from(&format!("{first}, 5.5.5.5"), "wrong").await;
        assert_eq!(told.status, status, "{first}");
        assert_eq!(told.headers["ratelimit-policy"], "\"address\";q=3;w=60");
    }
    assert_eq!(from("5.5.5.5", "wrong").await.status, 429);
    assert_eq!(from("5.5.5.6", "wrong").await.status, 401);
    // Whatever bytes a client writes before it.
    for bytes in [&b"\xe9\xff, 5.5.5.5"[..], b"5.5.5.5"] {
        let request = gateway.bare(Method::GET, PING);
        let value = reqwest::header::HeaderValue::from_bytes(bytes).unwrap();
        let told = answer(request.header("x-forwarded-for", value)).await;
        assert_eq!(told.status, 429, "{bytes:?}");
    }
    // Of IPv6, a /64 is one customer.
    for (address, status) in [
        ("2001:db8:1:2::1", 401),
        ("2001:db8:1:2::2", 401),
        ("[2001:db8:1:2:3::]:4", 401),
    ] {
        assert_eq!(from(address, "wrong").await.status, status, "{address}");
    }
    assert_eq!(from("2001:db8:1:2:ffff::", "wrong").await.status, 429);
    assert_eq!(from("2001:db8:1:3::", "wrong").await.status, 401);
    // Good credentials count, whatever others at the address do; probes are not counted.
    assert_eq!(from("5.5.5.5", gateway.token()).await.status, 200);
    let open = |path: &str| {
        gateway
            .bare(Method::GET, path)
            .header("x-forwarded-for", "5.5.5.5")
    };
    assert_eq!(answer(open("/livez")).await.status, 200);
    assert_eq!(answer(open("/health")).await.status, 429);
}

#[tokio::test]
async fn without_trusted_proxies_forwarded_addresses_mean_nothing() {
    let gateway = gateway(&[("RUNGATE_RATE_LIMIT_ADDRESS", "2")]).await;
    let mut statuses = Vec::new();
    for forwarded in ["5.5.5.1", "5.5.5.2", "5.5.5.3"] {
        let request = gateway.bare(Method::GET, PING);
        let told = answer(request.header("x-forwarded-for", forwarded)).await;
        statuses.push(told.status.as_u16());
    }
    assert_eq!(statuses, [401, 401, 429]);
}

/// A request whose body never comes.
async fn open_request(gateway: &Gateway, token: &str) -> TcpStream {
    let authorization = format!("authorization: Bearer {token}\r\n");
    open_post(gateway, "/api/gateway/commands", &authorization).await
}

async fn open_post(gateway: &Gateway, path: &str, lines: &str) -> TcpStream {
    let mut stream = TcpStream::connect(gateway.addr()).await.unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {}\r\n{lines}content-type: application/json\r\n\
         content-length: 100\r\n\r\n{{",
        gateway.addr()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

/// A connection from another address of this machine.
async fn connect_from(address: &str, gateway: &Gateway) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket
        .bind(format!("{address}:0").parse().unwrap())
        .unwrap();
    socket.connect(gateway.addr()).await.unwrap()
}

/// Four logins whose bodies never ended kept everybody out, the administrator too.
#[tokio::test]
async fn slow_logins_take_no_turn_from_who_is_known() {
    let gateway = gateway(&[("RUNGATE_MAX_REQUESTS", "4")]).await;
    let login = |client: reqwest::Client| {
        let body = json!({"user_id": "ann", "password": "x"});
        answer(client.post(gateway.url(LOGIN)).json(&body))
    };
    let mut open = Vec::new();
    // Who comes in before they do is told of the password instead, or that there were too many wrong ones.
    loop {
        open.push(open_post(&gateway, LOGIN, "").await);
        let refused = login(reqwest::Client::new()).await;
        if refused.json["detail"] == "Too Many Requests (concurrency limit of this address)" {
            break;
        }
        assert!(
            open.len() < 100,
            "the address has a turn left: {}",
            refused.text
        );
    }
    for _ in 0..5 {
        assert_eq!(gateway.get(PING).await.status, 200);
    }
    let elsewhere = reqwest::Client::builder().local_address(IpAddr::from([127, 0, 0, 2]));
    login(elsewhere.build().unwrap()).await.expect(401);
}

/// Silent connections of one address took every place, each for 15 s.
#[tokio::test]
async fn one_address_cannot_take_every_connection() {
    let gateway = gateway(&[("RUNGATE_MAX_CONNECTIONS", "16")]).await;
    let mut silent = Vec::new();
    for _ in 0..32 {
        silent.push(connect_from("127.0.0.2", &gateway).await);
    }
    let ask = format!("GET {PING} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    let reply = tokio::time::timeout(
        Duration::from_secs(10),
        exchange(gateway.addr(), ask.as_bytes()),
    );
    assert_eq!(reply.await.expect("it is accepted").status, 401);
    // What is over a quarter is closed at once; the rest is kept.
    let mut kept = 0;
    for stream in &mut silent {
        let read = stream.read_u8();
        kept += usize::from(
            tokio::time::timeout(Duration::from_millis(50), read)
                .await
                .is_err(),
        );
    }
    assert_eq!(kept, 4);
    let metrics = gateway.get("/metrics").await.text;
    assert!(
        metrics.contains("rungate_http_connections_refused_total 28"),
        "{metrics}"
    );
}

/// Where a proxy brings everybody, the proxy's address is nobody's.
#[tokio::test]
async fn a_trusted_proxy_has_as_many_connections_as_there_are() {
    let settings = [
        ("RUNGATE_MAX_CONNECTIONS", "16"),
        ("RUNGATE_TRUSTED_PROXIES", "1"),
    ];
    let gateway = gateway(&settings).await;
    let mut open = Vec::new();
    for _ in 0..12 {
        open.push(TcpStream::connect(gateway.addr()).await.unwrap());
    }
    for stream in &mut open {
        let ask = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n";
        stream.write_all(ask).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'H');
    }
}

/// Answers that nobody took were in memory without end: a turn was given back when the answer was ready.
#[tokio::test]
async fn an_answer_that_is_not_taken_keeps_its_turn() {
    let gateway = gateway(&[("RUNGATE_MAX_REQUESTS_PER_USER", "2")]).await;
    let ann = user(&gateway, "ann").await;
    // Larger ones are not in an answer.
    let payload = json!("x".repeat(250_000));
    let mut runs = Vec::new();
    for _ in 0..64 {
        let job = json!({"service_type": "nobody", "payload": payload});
        let request = gateway.bare(Method::POST, "/api/gateway/runs/start");
        let started = answer(request.bearer_auth(&ann).json(&json!({"job": job}))).await;
        runs.push(json!({"run_id": started.expect(200)["run_id"]}));
    }
    let body = json!({"runs": runs, "limit": 2_000}).to_string();
    let ask = format!(
        "POST /api/gateway/runs/ledger/batch HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {ann}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let mut unread = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(gateway.addr()).await.unwrap();
        stream.write_all(ask.as_bytes()).await.unwrap();
        // The answer has begun.
        assert_eq!(stream.read_u8().await.unwrap(), b'H');
        unread.push(stream);
    }
    for _ in 0..10 {
        let refused = ping(&gateway, &ann).await.expect(429);
        assert_eq!(refused["code"], "too_many_requests");
    }
    let mut first = unread.remove(0);
    let mut taken = Vec::new();
    first.read_to_end(&mut taken).await.unwrap();
    assert!(taken.len() > 8 << 20, "{}", taken.len());
    until("one turn is free again", || async {
        ping(&gateway, &ann).await.status == 200
    })
    .await;
    // The other is free when its reader has left.
    let _open = open_request(&gateway, &ann).await;
    drop(unread);
    until("the other is, too", || async {
        ping(&gateway, &ann).await.status == 200
    })
    .await;
}

#[tokio::test]
async fn a_request_under_a_foreign_name_is_counted_by_its_address() {
    let gateway = gateway(&[("RUNGATE_RATE_LIMIT_ADDRESS", "2")]).await;
    let mut statuses = Vec::new();
    for _ in 0..3 {
        let request = gateway.request(Method::GET, PING);
        let told = answer(request.header("host", "evil.example")).await;
        statuses.push(told.status.as_u16());
    }
    assert_eq!(statuses, [403, 403, 429]);
}

#[tokio::test]
async fn one_user_cannot_take_every_turn() {
    let gateway = gateway(&[("RUNGATE_MAX_REQUESTS_PER_USER", "2")]).await;
    let (ann, bob) = (user(&gateway, "ann").await, user(&gateway, "bob").await);
    let open = [
        open_request(&gateway, &ann).await,
        open_request(&gateway, &ann).await,
    ];
    until("ann has no turn left", || async {
        ping(&gateway, &ann).await.status == 429
    })
    .await;
    let refused = ping(&gateway, &ann).await;
    assert_eq!(refused.headers["retry-after"], "1");
    let problem = refused.expect(429);
    assert_eq!(problem["code"], "too_many_requests");
    assert_eq!(
        problem["detail"],
        "Too Many Requests (concurrency limit of this user)"
    );
    assert_eq!(ping(&gateway, &bob).await.status, 200);
    drop(open);
    until("ann's turns are free again", || async {
        ping(&gateway, &ann).await.status == 200
    })
    .await;
}

#[tokio::test]
async fn one_user_cannot_take_every_stream() {
    let gateway = gateway(&[("RUNGATE_MAX_STREAMS_PER_USER", "1")]).await;
    let (ann, bob) = (user(&gateway, "ann").await, user(&gateway, "bob").await);
    let open = async |token: &str| {
        let path = "/api/gateway/plane/ledger/stream?heartbeat_s=0.2";
        let request = gateway.bare(Method::GET, path).bearer_auth(token);
        request.send().await.unwrap()
    };
    let first = open(&ann).await;
    assert_eq!(first.status(), 200);
    let refused = open(&ann).await;
    assert_eq!(refused.status(), 429);
    let problem: Value = refused.json().await.unwrap();
    assert_eq!(problem["code"], "too_many_streams");
    assert_eq!(open(&bob).await.status(), 200);
    for _ in 0..3 {
        assert_eq!(open(gateway.token()).await.status(), 200);
    }
    drop(first);
    until("ann's stream is free again", || async {
        open(&ann).await.status() == 200
    })
    .await;
}

/// A service that takes minutes to start held one turn of all for as long.
#[tokio::test]
async fn waiting_for_a_service_takes_no_turn_from_others() {
    let gateway = gateway(&[("RUNGATE_MAX_REQUESTS", "1")]).await;
    let scripted = Scripted::start().await;
    scripted.set_healthy(false);
    gateway.register(scripted.service("slow", "t")).await;
    let start = gateway.request(Method::POST, "/services/slow/start");
    let start = tokio::spawn(answer(start));
    gateway
        .service_becomes("slow", "/instance/generation", json!(1))
        .await;
    for _ in 0..20 {
        assert_eq!(gateway.get(PING).await.status, 200);
    }
    assert!(!start.is_finished());
    scripted.set_healthy(true);
    let started = start.await.unwrap().expect(200);
    assert_eq!(started["healthy"], true);
}

#[tokio::test]
async fn a_body_is_as_large_as_its_route_needs() {
    let gateway = gateway(&[]).await;
    let large = json!({"name": "x".repeat(100_000)});
    for (path, expected) in [
        ("/api/gateway/tokens", 413),
        ("/api/gateway/admin/users", 413),
        ("/preempt/execute", 413),
        ("/api/gateway/commands", 422),
        ("/api/gateway/runs/start", 400),
    ] {
        let answer = gateway.post(path, large.clone()).await;
        assert_eq!(answer.status, expected, "{path}: {}", answer.text);
    }
    let payload = json!({"service_type": "t", "payload": {"x": "x".repeat(500_000)}});
    gateway.start_job(payload).await;
}
