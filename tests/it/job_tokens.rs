//! Job tokens: what the token of a dispatch and that of an instance are good for, for how long, and what becomes of
//! forged ones.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode};
use reqwest::Method;
use serde_json::{Value, json};

use crate::isolation::{call, user};
use crate::rungate::{run, rungate};
use crate::support::keys::Key;
use crate::support::scripted::Scripted;
use crate::support::wait::until;
use crate::support::{Answer, Gateway, Options, answer, worker_service};

const JWKS: &str = "/.well-known/jwks.json";

/// A gateway with a service that holds its jobs, and a user whose job it works on.
struct Held {
    gateway: Gateway,
    service: Scripted,
    ann: String,
    run: String,
}

impl Held {
    async fn start() -> Held {
        let gateway = Gateway::start(Options::default()).await;
        let service = Scripted::start().await;
        let mut held = service.service("held", "held");
        held["concurrency"] = json!(4);
        gateway.register(held).await;
        let ann = user(&gateway, json!({"user_id": "ann"})).await;
        let run = start(&gateway, &ann, json!({"hold": true}), "held").await;
        let held = Held {
            gateway,
            service,
            ann,
            run,
        };
        held.dispatched(1).await;
        held
    }

    /// The token of the nth call of the service, from 1.
    async fn dispatched(&self, nth: usize) -> String {
        until("it is dispatched", || async {
            self.service.jobs().len() >= nth
        })
        .await;
        let job = self.service.jobs().swap_remove(nth - 1);
        job.header("x-rungate-token").to_owned()
    }

    async fn progress(&self, token: &str) -> Answer {
        progress(&self.gateway, token, &self.run).await
    }

    async fn command(&self, kind: &str) {
        let body = json!({"command_id": kind, "run_id": self.run, "type": kind});
        let path = "/api/gateway/commands";
        let taken = call(&self.gateway, &self.ann, Method::POST, path, Some(body)).await;
        taken.expect(200);
    }

    async fn becomes(&self, state: &str) {
        becomes(&self.gateway, &self.ann, &self.run, state).await;
    }
}

async fn start(gateway: &Gateway, token: &str, payload: Value, service_type: &str) -> String {
    let body = json!({"job": {"service_type": service_type, "payload": payload}});
    let path = "/api/gateway/runs/start";
    let started = call(gateway, token, Method::POST, path, Some(body)).await;
    started.expect(200)["run_id"].as_str().unwrap().to_owned()
}

async fn becomes(gateway: &Gateway, token: &str, run: &str, state: &str) {
    let path = format!("/api/gateway/runs/{run}");
    until(state, || async {
        let read = call(gateway, token, Method::GET, &path, None).await;
        read.json["job"]["state"] == state
    })
    .await;
}

async fn progress(gateway: &Gateway, token: &str, run: &str) -> Answer {
    let path = format!("/queue/{run}/progress");
    call(
        gateway,
        token,
        Method::POST,
        &path,
        Some(json!({"percent": 1})),
    )
    .await
}

/// The claims of a token, as a service verifies it: with the public keys and nothing else.
async fn verified(gateway: &Gateway, token: &str) -> Value {
    let keys = answer(gateway.bare(Method::GET, JWKS)).await;
    assert_eq!(keys.headers["cache-control"], "public, max-age=300");
    let keys: JwkSet = serde_json::from_value(keys.expect(200)).unwrap();
    let header = jsonwebtoken::decode_header(token).unwrap();
    assert_eq!(header.typ.as_deref(), Some("rungate-job+jwt"));
    let jwk = keys.find(&header.kid.unwrap()).expect("its key is listed");
    let mut rules = Validation::new(Algorithm::EdDSA);
    rules.set_audience(&["rungate"]);
    decode::<Value>(token, &DecodingKey::from_jwk(jwk).unwrap(), &rules)
        .unwrap()
        .claims
}

#[tokio::test]
async fn a_dispatch_carries_a_token_for_its_own_run_only() {
    let held = Held::start().await;
    let (gateway, run) = (&held.gateway, &held.run);
    let token = held.dispatched(1).await;
    let claims = verified(gateway, &token).await;
    assert_eq!(
        (&claims["sub"], &claims["att"], &claims["svc"]),
        (&json!(run), &json!(1), &json!("held"))
    );
    let lasts = claims["exp"].as_u64().unwrap() - claims["iat"].as_u64().unwrap();
    assert!(
        (300..400).contains(&lasts),
        "the attempt's time limit and little more: {lasts}"
    );

    for path in [
        format!("/queue/{run}/progress"),
        format!("/api/gateway/queue/{run}/progress"),
    ] {
        call(
            gateway,
            &token,
            Method::POST,
            &path,
            Some(json!({"percent": 40})),
        )
        .await
        .expect(200);
    }
    let checkpoint = format!("/api/gateway/runs/{run}/checkpoint");
    let saved = gateway
        .bare(Method::PUT, &checkpoint)
        .bearer_auth(&token)
        .body("state");
    answer(saved).await.expect(200);
    let read = call(gateway, &token, Method::GET, &checkpoint, None).await;
    assert_eq!(read.text, "state");
    let input = format!("/api/gateway/runs/{run}/input_data");
    let input = call(gateway, &token, Method::GET, &input, None)
        .await
        .expect(200);
    assert_eq!(input["input_data"], json!({"hold": true}), "{input}");
    let stale = gateway
        .bare(Method::PUT, &checkpoint)
        .header("x-rungate-attempt", "7");
    let stale = answer(stale.bearer_auth(&token).body("state")).await;
    assert_eq!(stale.expect(409)["code"], "stale_attempt");

    // Its records name the service, and lie in the plane of the run's owner.
    let ledger = format!("/api/gateway/runs/{run}/ledger?limit=100");
    let records = call(gateway, &held.ann, Method::GET, &ledger, None)
        .await
        .expect(200);
    let pushed = records["items"].as_array().unwrap().iter();
    let actors: Vec<&Value> = pushed
        .filter(|r| r["effect"]["type"] == "job_progressed")
        .map(|r| &r["actor_id"])
        .collect();
    assert_eq!(actors, [&json!("service:held"); 2]);

    let denied = [
        ("GET", format!("/api/gateway/runs/{run}")),
        ("GET", format!("/api/gateway/runs/{run}/ledger")),
        ("GET", format!("/queue/{run}/progress")),
        ("DELETE", format!("/queue/{run}")),
        ("POST", format!("/api/gateway/runs/{run}/purge")),
        ("GET", "/api/gateway/me".to_owned()),
        ("GET", "/api/gateway/tokens".to_owned()),
        ("POST", "/api/gateway/commands".to_owned()),
        ("GET", "/services".to_owned()),
        ("PATCH", checkpoint.clone()),
    ];
    for (method, path) in denied {
        let method: Method = method.parse().unwrap();
        let refused = call(gateway, &token, method, &path, Some(json!({}))).await;
        assert_eq!(refused.expect(403)["reason_code"], "job_token", "{path}");
    }
    let other = start(gateway, &held.ann, json!({"hold": true}), "nobody").await;
    let unknown = uuid::Uuid::now_v7().to_string();
    for id in [other.as_str(), unknown.as_str(), "..", "%2e%2e"] {
        progress(gateway, &token, id).await.expect(404);
    }

    held.service.release();
    held.becomes("completed").await;
    let late = held.progress(&token).await;
    assert_eq!(late.expect(401)["code"], "unauthorized");
}

/// Pushes for another tenant's runs were told to the default tenant's administrator, and not to its own.
#[tokio::test]
async fn what_is_pushed_for_a_tenants_run_is_told_to_that_tenants_administrator() {
    let held = Held::start().await;
    let gateway = &held.gateway;
    let acme =
        |name: &str, role: &str| json!({"user_id": name, "tenant_id": "acme", "roles": [role]});
    let tara = user(gateway, acme("tara", "tenant_admin")).await;
    let tess = user(
        gateway,
        json!({"user_id": "tess", "roles": ["tenant_admin"]}),
    )
    .await;
    let zoe = user(gateway, acme("zoe", "user")).await;
    let run = start(gateway, &zoe, json!({"hold": true}), "held").await;
    let token = held.dispatched(2).await;
    progress(gateway, &token, &run).await.expect(200);
    let pushes = async |token: &str| {
        let path = "/api/gateway/audit?route=/queue/{job_id}/progress";
        let page = call(gateway, token, Method::GET, path, None).await;
        page.expect(200)["items"].clone()
    };
    let told = pushes(&tara).await;
    assert_eq!(told[0]["actor_id"], "acme/service:held", "{told}");
    assert_eq!(told[0]["run_id"], run.as_str());
    assert_eq!(pushes(&tess).await, json!([]));
}

#[tokio::test]
async fn a_token_dies_with_its_attempt() {
    let mut held = Held::start().await;
    let first = held.dispatched(1).await;
    held.progress(&first).await.expect(200);
    held.command("pause").await;
    held.becomes("paused").await;
    held.progress(&first).await.expect(401);
    held.command("resume").await;
    let second = held.dispatched(2).await;
    held.progress(&second).await.expect(200);
    held.progress(&first).await.expect(401);
    let path = format!("/queue/{}/progress", held.run);
    let request = held.gateway.bare(Method::POST, &path).bearer_auth(&second);
    let request = request.header("x-rungate-attempt", "1").json(&json!({}));
    answer(request).await.expect(409);

    held.gateway.kill();
    held.gateway.launch().await;
    let third = held.dispatched(3).await;
    held.progress(&third).await.expect(200);
    held.progress(&second).await.expect(401);
    held.gateway
        .get("/api/gateway/ledger/verify")
        .await
        .expect(200);
}

/// The gateway's own signing key, as only its user can read it.
fn own_key(data_dir: &Path) -> EncodingKey {
    let path = data_dir.join("auth/signing-keys");
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let der = STANDARD.decode(file["keys"][0]["pkcs8"].as_str().unwrap());
    EncodingKey::from_ed_der(&der.unwrap())
}

#[tokio::test]
async fn forged_tokens_are_refused() {
    let held = Held::start().await;
    let token = held.dispatched(1).await;
    held.progress(&token).await.expect(200);
    let claims = verified(&held.gateway, &token).await;
    let header = jsonwebtoken::decode_header(&token).unwrap();
    let key = own_key(&held.gateway.data_dir());
    let sign = |header: &Header, claims: &Value| encode(header, claims, &key).unwrap();
    held.progress(&sign(&header, &claims)).await.expect(200);

    let mut forged = Vec::new();
    let now = jsonwebtoken::get_current_timestamp();
    for (claim, wrong) in [
        (
            "iss",
            json!("urn:uuid:00000000-0000-0000-0000-000000000000"),
        ),
        ("aud", json!("another")),
        ("aud", json!(["rungate", "another"])),
        ("exp", json!(now - 60)),
        ("exp", Value::Null),
        ("nbf", json!(now + 60)),
        // Another attempt's, another run's, another plane's, another instance's.
        ("att", json!(2)),
        ("att", json!(0)),
        ("sub", json!(uuid::Uuid::now_v7().to_string())),
        ("pln", json!(0)),
        ("svc", json!("another")),
        ("gen", json!(99)),
    ] {
        let mut claims = claims.clone();
        claims[claim] = wrong;
        forged.push(sign(&header, &claims));
    }
    for kind in [
        None,
        Some("JWT"),
        Some("at+jwt"),
        Some("rungate-instance+jwt"),
    ] {
        let mut header = header.clone();
        header.typ = kind.map(str::to_owned);
        forged.push(sign(&header, &claims));
    }
    let mut critical = header.clone();
    critical.crit = Some(vec!["b64".to_owned()]);
    forged.push(sign(&critical, &claims));

    let parts: Vec<&str> = token.split('.').collect();
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let mut other = claims.clone();
    other["att"] = json!(2);
    forged.push(format!("{}.{}.{}", parts[0], part(&other), parts[2]));
    forged.push(format!("{}.{}.", parts[0], parts[1]));
    forged.push(format!("{token}.{}", parts[2]));
    for alg in ["none", "None", "HS256", "RS256"] {
        let header = json!({"alg": alg, "typ": header.typ, "kid": header.kid});
        forged.push(format!("{}.{}.", part(&header), parts[1]));
        forged.push(format!("{}.{}.{}", part(&header), parts[1], parts[2]));
    }
    // The public key as a shared secret.
    let jwks = held.gateway.get(JWKS).await.expect(200);
    let public = URL_SAFE_NO_PAD
        .decode(jwks["keys"][0]["x"].as_str().unwrap())
        .unwrap();
    for secret in [public, jwks["keys"][0].to_string().into_bytes()] {
        let mut header = header.clone();
        header.alg = Algorithm::HS256;
        forged.push(encode(&header, &claims, &EncodingKey::from_secret(&secret)).unwrap());
    }
    // Somebody else's key: under our id, brought along, and under ids that nobody has.
    let mut stranger = Key::new(header.kid.as_ref().unwrap(), Algorithm::EdDSA);
    forged.push(stranger.sign_as("rungate-job+jwt", &claims));
    let mut brought = header.clone();
    brought.jwk = Some(serde_json::from_value(stranger.jwk()).unwrap());
    forged.push(encode(&brought, &claims, &stranger.secret).unwrap());
    for n in 0..50 {
        stranger.kid = format!("made-up-{n}");
        forged.push(stranger.sign_as("rungate-job+jwt", &claims));
    }
    forged.push(format!("{token}{}", "A".repeat(9_000)));
    for token in &forged {
        assert_eq!(held.progress(token).await.status, 401, "{token}");
    }
    held.progress(&token).await.expect(200);
}

#[tokio::test]
async fn keys_are_rotated_by_hand_and_by_age() {
    let mut held = Held::start().await;
    let token = held.dispatched(1).await;
    let kid = |token: &str| jsonwebtoken::decode_header(token).unwrap().kid.unwrap();
    let (home, url) = (tempfile::tempdir().unwrap(), held.gateway.url(""));
    let admin = held.gateway.token().to_owned();
    let rotated = tokio::task::spawn_blocking(move || {
        let mut command = rungate(home.path(), &["token", "rotate-signing-key", "--json"]);
        command.env("RUNGATE_URL", url).env("RUNGATE_TOKEN", admin);
        run(command)
    });
    let (code, text, _) = rotated.await.unwrap();
    let new: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(code, 0);
    assert_ne!(new["kid"], kid(&token));
    held.progress(&token).await.expect(200);
    verified(&held.gateway, &token).await;
    start(&held.gateway, &held.ann, json!({"hold": true}), "held").await;
    let next = held.dispatched(2).await;
    assert_eq!(kid(&next), new["kid"]);
    let listed = held.gateway.get(JWKS).await.expect(200);
    assert_eq!(listed["keys"][0]["kid"], new["kid"]);
    assert_eq!(listed["keys"].as_array().unwrap().len(), 2);
    let rotate = "/api/gateway/admin/signing-keys/rotate";
    call(&held.gateway, &held.ann, Method::POST, rotate, None)
        .await
        .expect(403);

    held.gateway.stop().await;
    held.gateway.launch().await;
    let kept = held.gateway.get(JWKS).await.expect(200);
    assert_eq!(kept["keys"][0]["kid"], new["kid"]);

    let options = Options::default().set("RUNGATE_SIGNING_KEY_MAX_AGE_MS", "1");
    let young = Gateway::start(options).await;
    let first = young.get(JWKS).await.expect(200)["keys"][0]["kid"].clone();
    until("the key is renewed", || async {
        young.get(JWKS).await.expect(200)["keys"][0]["kid"] != first
    })
    .await;
}

/// The value of a variable of a running service.
fn variable(gateway: &Gateway, name: &str) -> String {
    let pid = gateway.services_alive()[0];
    let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    let text = String::from_utf8(environ).unwrap();
    let found = text
        .split('\0')
        .find_map(|pair| pair.strip_prefix(&format!("{name}=")));
    found.expect("it is set").to_owned()
}

#[tokio::test]
async fn a_worker_without_a_token_of_its_own_reports_for_every_user() {
    let mut gateway = Gateway::start(Options::default()).await;
    gateway
        .register(worker_service(
            &gateway,
            "w",
            "w",
            json!({"concurrency": 4}),
        ))
        .await;
    let ann = user(&gateway, json!({"user_id": "ann"})).await;
    let text = gateway.data_dir().join("text");
    std::fs::write(&text, "the quick brown fox\n".repeat(50)).unwrap();
    let slow = json!({"files": [text], "chunk_bytes": 64, "delay_ms": 100});
    let run = start(&gateway, &ann, slow, "w").await;
    let summary = format!("/api/gateway/runs/{run}");
    until("a checkpoint is saved", || async {
        let read = call(&gateway, &ann, Method::GET, &summary, None).await;
        read.json["job"]["has_checkpoint"] == true
    })
    .await;
    let told = call(
        &gateway,
        &ann,
        Method::GET,
        &format!("/queue/{run}/progress"),
        None,
    )
    .await;
    assert!(
        told.json["progress"]["percent"].is_number(),
        "{}",
        told.text
    );

    // The instance's own token: in a file of the gateway's user, and in no environment.
    let file = PathBuf::from(variable(&gateway, "RUNGATE_JOB_TOKEN_FILE"));
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&file), mode(file.parent().unwrap())), (0o600, 0o700));
    let token = std::fs::read_to_string(&file).unwrap().trim().to_owned();
    let pid = gateway.services_alive()[0];
    let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert!(!String::from_utf8_lossy(&environ).contains("eyJ"));
    let push = |token: &str, run: &str, attempt: Option<&str>| {
        let path = format!("/queue/{run}/progress");
        let request = gateway.bare(Method::POST, &path).bearer_auth(token);
        let request = request.json(&json!({"percent": 2}));
        answer(match attempt {
            Some(attempt) => request.header("x-rungate-attempt", attempt),
            None => request,
        })
    };
    push(&token, &run, Some("1")).await.expect(200);
    push(&token, &run, Some("2")).await.expect(409);
    push(&token, &run, None).await.expect(422);
    let input = format!("/api/gateway/runs/{run}/input_data");
    call(&gateway, &token, Method::GET, &input, None)
        .await
        .expect(200);
    let waiting = start(&gateway, &ann, json!({}), "nobody").await;
    push(&token, &waiting, Some("1")).await.expect(404);
    call(&gateway, &token, Method::GET, &summary, None)
        .await
        .expect(403);

    becomes(&gateway, &ann, &run, "completed").await;
    push(&token, &run, Some("1")).await.expect(404);
    gateway
        .post("/services/w/stop", json!({}))
        .await
        .expect(200);
    until("its token is gone", || async { !file.exists() }).await;
    push(&token, &run, Some("1")).await.expect(401);

    // The second part of a token begins with a brace, like the first.
    let export = gateway.get("/api/gateway/ledger/export").await.text;
    let payloads = export.lines().filter_map(|line| {
        let record: Value = serde_json::from_str(line).unwrap();
        let payload = STANDARD.decode(record["payload"].as_str()?).unwrap();
        Some(String::from_utf8_lossy(&payload).into_owned())
    });
    let payloads: Vec<String> = payloads.collect();
    assert!(payloads.iter().any(|payload| payload.contains("percent")));
    gateway.stop().await;
    let output = std::fs::read_to_string(gateway.data_dir().join("logs/w.log")).unwrap();
    for kept in payloads.iter().chain([&export, &gateway.log(), &output]) {
        assert!(!kept.contains(".eyJ"), "a token is kept: {kept}");
    }
}

#[tokio::test]
async fn an_instance_that_is_found_again_gets_a_fresh_token() {
    let mut gateway = Gateway::start(Options::default()).await;
    gateway
        .register(worker_service(&gateway, "w", "w", json!({})))
        .await;
    gateway
        .post("/services/w/start", json!({}))
        .await
        .expect(200);
    let file = variable(&gateway, "RUNGATE_JOB_TOKEN_FILE");
    let old = std::fs::read_to_string(&file).unwrap();
    gateway.kill();
    // As after a long while: what is there is of no use any more.
    std::fs::write(&file, "expired").unwrap();
    gateway.launch().await;
    until("its token is renewed", || async {
        std::fs::read_to_string(&file).is_ok_and(|text| text.starts_with("eyJ"))
    })
    .await;
    gateway.service_becomes("w", "/healthy", json!(true)).await;
    assert!(!old.is_empty());
}
