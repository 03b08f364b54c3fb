//! What every answer tells browsers: of every route, to whoever asks, whatever becomes of it.

use std::collections::BTreeMap;

use reqwest::Method;
use reqwest::header::HeaderMap;
use serde_json::json;

use crate::support::{Gateway, Options, answer};

/// What no answer lacks. A route with other headers than these stands in `OTHERS`.
const EVERYWHERE: &[(&str, &str)] = &[
    ("cache-control", "no-store"),
    (
        "content-security-policy",
        "default-src 'none'; frame-ancestors 'none'",
    ),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    ("referrer-policy", "no-referrer"),
    ("x-content-type-options", "nosniff"),
];

/// The one answer that may be kept.
const JWKS: &str = "/.well-known/jwks.json";

/// Headers of an answer that say nothing to browsers about what it may do there.
const PLAIN: &[&str] = &[
    "allow",
    "connection",
    "content-length",
    "content-type",
    "date",
    "link",
    "location",
    "ratelimit",
    "ratelimit-policy",
    "retry-after",
    "set-cookie",
    "transfer-encoding",
    "www-authenticate",
    "x-accel-buffering",
    "x-request-id",
    "x-rungate-attempt",
];

/// The headers that are neither plain nor the request's own.
fn told(headers: &HeaderMap) -> BTreeMap<String, String> {
    let text = |value: &reqwest::header::HeaderValue| value.to_str().unwrap().to_owned();
    headers
        .iter()
        .filter(|(name, _)| !PLAIN.contains(&name.as_str()))
        .map(|(name, value)| (name.to_string(), text(value)))
        .collect()
}

fn expected() -> BTreeMap<String, String> {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    EVERYWHERE.iter().map(owned).collect()
}

#[tokio::test]
async fn every_route_tells_browsers_the_same() {
    let gateway = Gateway::start(Options::default()).await;
    let api = gateway.get("/openapi.json").await.expect(200);
    let mut seen = 0;
    let mut wrong = Vec::new();
    for (path, item) in api["paths"].as_object().unwrap() {
        let target = path.replace(['{', '}'], "");
        for method in item.as_object().unwrap().keys() {
            let method: Method = method.to_uppercase().parse().unwrap();
            for request in [
                gateway.request(method.clone(), &target),
                gateway.bare(method.clone(), &target),
            ] {
                // A stream's body is not waited for.
                let request = match method {
                    Method::GET | Method::DELETE => request,
                    _ => request.json(&json!({})),
                };
                let response = request.send().await.unwrap();
                assert!(
                    response.headers().contains_key("x-request-id"),
                    "{method} {path}"
                );
                let mut found = told(response.headers());
                if path == JWKS {
                    // Keys are for everyone, and asked for often.
                    let kept = found.insert("cache-control".to_owned(), "no-store".to_owned());
                    assert_eq!(kept.as_deref(), Some("public, max-age=300"));
                }
                if found != expected() {
                    wrong.push(format!("{method} {path} {}: {found:?}", response.status()));
                }
                seen += 1;
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen > 150, "{seen}");
}

#[tokio::test]
async fn so_do_answers_that_come_from_no_route() {
    let gateway = Gateway::start(Options::default()).await;
    let every = |request: reqwest::RequestBuilder| async { answer(request).await };
    for (request, status) in [
        (gateway.request(Method::GET, "/nowhere"), 404),
        (gateway.bare(Method::GET, "/nowhere"), 401),
        (gateway.request(Method::DELETE, "/gpu"), 405),
        (gateway.request(Method::OPTIONS, "/gpu"), 405),
        (gateway.request(Method::HEAD, "/gpu"), 200),
        (
            gateway
                .bare(Method::GET, "/gpu")
                .header("host", "evil.example"),
            403,
        ),
        (
            gateway
                .request(Method::GET, "/gpu")
                .header("origin", "https://evil.example"),
            403,
        ),
    ] {
        let answer = every(request).await;
        assert_eq!(answer.status, status);
        assert_eq!(told(&answer.headers), expected(), "{status}");
    }
    // The page of the document runs scripts and styles of ours, and nothing else.
    let page = answer(gateway.bare(Method::GET, "/docs/")).await;
    let policy = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
                  connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let mut of_page = expected();
    of_page.insert("content-security-policy".to_owned(), policy.to_owned());
    assert_eq!(told(&page.headers), of_page);
    let document = answer(gateway.bare(Method::GET, "/openapi.json")).await;
    assert_eq!(told(&document.headers), expected());
}

/// Only a browser that came by https may be told to come by nothing else; who says so must be trusted.
#[tokio::test]
async fn behind_a_trusted_proxy_https_is_remembered() {
    let name = "strict-transport-security";
    for (trusted, proto, remembered) in [
        ("0", "https", false),
        ("1", "https", true),
        ("1", "http", false),
    ] {
        let gateway =
            Gateway::start(Options::default().set("RUNGATE_TRUSTED_PROXIES", trusted)).await;
        let request = gateway.bare(Method::GET, "/health");
        let told = answer(request.header("x-forwarded-proto", proto)).await;
        assert_eq!(
            told.headers.contains_key(name),
            remembered,
            "{trusted} {proto}"
        );
    }
}
