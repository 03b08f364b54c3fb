//! DNS rebinding: a page of a foreign site whose name leads here is told nothing, however it spells its name; and a
//! page of a foreign origin is told nothing whatever host it calls.

use reqwest::Method;
use serde_json::Value;

use crate::support::raw::{Reply, exchange};
use crate::support::{Gateway, Options, answer};

async fn gateway() -> Gateway {
    let options = Options::default()
        .set("RUNGATE_ALLOWED_HOSTS", "gate.example")
        .set("RUNGATE_ALLOWED_ORIGINS", "https://gate.example")
        // What is audited of refusals is told in `audit`; here they leave nothing.
        .set("RUNGATE_AUDIT", "off");
    Gateway::start(options).await
}

/// A request for `target` with these header lines, credentials included: a rebound page may well have them.
async fn ask(gateway: &Gateway, target: &str, lines: &[&str]) -> Reply {
    let lines = lines.join("\r\n");
    let token = gateway.token();
    let text = format!(
        "GET {target} HTTP/1.1\r\n{lines}\r\nauthorization: Bearer {token}\r\nconnection: close\r\n\r\n"
    );
    exchange(gateway.addr(), text.as_bytes()).await
}

#[tokio::test]
async fn a_request_under_a_foreign_name_is_refused_on_every_kind_of_route() {
    let gateway = gateway().await;
    let foreign = [
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "gate.example.evil.example",
        "evil.example#gate.example",
        "gate.example@evil.example",
        "evil.example:80@gate.example:80:80",
        "gate.example.",
        "localhost.",
        "xgate.example",
        "0.0.0.0",
        "[::]",
        "[::ffff:127.0.0.1]",
        "127.1",
        "2130706433",
        "10.0.0.1",
        "",
    ];
    for host in foreign {
        for target in [
            "/api/gateway/ping",
            "/services",
            "/health",
            "/openapi.json",
            "/docs/",
            "/nowhere",
        ] {
            let reply = ask(&gateway, target, &[&format!("host: {host}")]).await;
            assert_eq!(reply.status, 403, "{host} {target}");
            assert_eq!(reply.json()["code"], "host_not_allowed", "{host} {target}");
        }
    }
    // Two names, and a name in the target that is not the header's.
    let ours = "host: gate.example";
    for (target, lines) in [
        ("/api/gateway/ping", vec![ours, "host: evil.example"]),
        ("/api/gateway/ping", vec!["host: evil.example", ours]),
        ("/api/gateway/ping", vec![ours, ours]),
        ("http://evil.example/api/gateway/ping", vec![ours]),
        (
            "http://gate.example/api/gateway/ping",
            vec!["host: evil.example"],
        ),
        (
            "http://gate.example@evil.example/api/gateway/ping",
            vec![ours],
        ),
    ] {
        let reply = ask(&gateway, target, &lines).await;
        assert_eq!(reply.status, 403, "{target} {lines:?}");
    }
    let reply = ask(
        &gateway,
        "/api/gateway/ping",
        &["x-forwarded-host: gate.example"],
    )
    .await;
    assert_eq!(reply.status, 403, "no Host at all");
    let lines = [
        "host: evil.example",
        "x-forwarded-host: gate.example",
        "forwarded: host=gate.example",
    ];
    assert_eq!(ask(&gateway, "/api/gateway/ping", &lines).await.status, 403);
}

#[tokio::test]
async fn its_own_names_are_answered() {
    let gateway = gateway().await;
    let port = gateway.addr().port();
    for host in [
        "gate.example".to_owned(),
        "GATE.example:443".to_owned(),
        "localhost".to_owned(),
        format!("127.0.0.1:{port}"),
        format!("[::1]:{port}"),
    ] {
        let reply = ask(&gateway, "/api/gateway/ping", &[&format!("host: {host}")]).await;
        assert_eq!(reply.status, 200, "{host}");
    }
    let reply = ask(
        &gateway,
        "http://gate.example/api/gateway/ping",
        &["host: gate.example"],
    )
    .await;
    assert_eq!(reply.status, 200);
}

#[tokio::test]
async fn a_page_of_a_foreign_origin_is_refused_and_changes_nothing() {
    let gateway = gateway().await;
    let before = gateway.tail().await;
    for (origin, allowed) in [
        ("https://gate.example", true),
        ("HTTPS://gate.example", true),
        ("http://gate.example", false),
        ("https://gate.example:8443", false),
        ("https://gate.example.evil.example", false),
        ("https://evil.example", false),
        ("http://localhost:8080", false),
        ("null", false),
        ("", false),
        ("file://", false),
    ] {
        for method in [Method::GET, Method::POST] {
            let path = match method {
                Method::GET => "/api/gateway/ping",
                _ => "/api/gateway/runs/start",
            };
            let request = gateway
                .request(method.clone(), path)
                .header("origin", origin);
            let told = answer(request.json(&Value::Null)).await;
            if allowed {
                assert_ne!(told.status, 403, "{method} {origin}");
            } else {
                assert_eq!(told.status, 403, "{method} {origin}");
                assert_eq!(told.json["code"], "origin_not_allowed");
            }
            assert!(!told.headers.contains_key("access-control-allow-origin"));
        }
        let asked = gateway.bare(Method::OPTIONS, "/api/gateway/runs/start");
        let asked = asked
            .header("origin", origin)
            .header("access-control-request-method", "POST");
        let told = answer(asked).await;
        assert!(!told.status.is_success(), "{origin} {}", told.status);
    }
    assert_eq!(gateway.tail().await, before);
}
