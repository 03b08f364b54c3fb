//! TLS in the binary: who is served, what HUP does, and what is refused at the start.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use reqwest::Method;
use rustix::process::Signal;
use tempfile::TempDir;

use crate::rungate::{run, rungate};
use crate::support::browser::Browser;
use crate::support::raw::exchange;
use crate::support::sse::EventSource;
use crate::support::wait::until;
use crate::support::{Gateway, Options, answer, client};

/// A certificate authority of its own.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap());
        Authority(issuer.unwrap())
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// Writes a certificate for this machine's names, and its key.
    pub fn issue(&self, cert: &Path, key: &Path) {
        let names = ["localhost", "127.0.0.1"].map(str::to_owned);
        let own = KeyPair::generate().unwrap();
        let params = CertificateParams::new(names.to_vec()).unwrap();
        let signed = params.signed_by(&own, &self.0).unwrap();
        fs::write(cert, signed.pem()).unwrap();
        write_key(key, &own.serialize_pem());
    }
}

fn write_key(path: &Path, pem: &str) {
    fs::write(path, pem).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// The files of a certificate and its key.
struct Files {
    dir: TempDir,
}

impl Files {
    fn new() -> Files {
        let dir = TempDir::new().unwrap();
        Files { dir }
    }

    fn cert(&self) -> PathBuf {
        self.dir.path().join("gate.pem")
    }

    fn key(&self) -> PathBuf {
        self.dir.path().join("gate.key")
    }

    async fn gateway(&self, authority: &Authority) -> Gateway {
        authority.issue(&self.cert(), &self.key());
        let options = Options {
            authority: Some(authority.pem()),
            ..Options::default()
        };
        let options = options
            .set("RUNGATE_TLS_CERT", self.cert().to_str().unwrap())
            .set("RUNGATE_TLS_KEY", self.key().to_str().unwrap());
        Gateway::start(options).await
    }
}

#[tokio::test]
async fn a_gateway_with_a_certificate_speaks_tls_and_nothing_else() {
    let (authority, files) = (Authority::new(), Files::new());
    let gateway = files.gateway(&authority).await;
    let ping = gateway.get("/api/gateway/ping").await;
    assert_eq!(ping.status, 200);
    let remembered = &ping.headers["strict-transport-security"];
    assert_eq!(remembered, "max-age=31536000");

    // A page of its own may call it; a page of another's may not.
    for (origin, status) in [
        (gateway.url(""), 200),
        ("https://localhost".to_owned(), 200),
        ("https://evil.example".to_owned(), 403),
    ] {
        let request = gateway.request(Method::GET, "/api/gateway/ping");
        let asked = answer(request.header("origin", &origin)).await;
        assert_eq!(asked.status, status, "{origin}");
    }

    let url = gateway.url("/livez");
    assert!(
        client(Some(&Authority::new().pem()))
            .get(&url)
            .send()
            .await
            .is_err()
    );
    let plain = client(None).get(url.replace("https", "http"));
    assert!(plain.send().await.is_err());
    assert_eq!(gateway.get("/livez").await.status, 200);

    let log = gateway.log();
    assert!(
        log.contains("Rungate listens on https://127.0.0.1:"),
        "{log}"
    );
}

#[tokio::test]
async fn who_logs_in_over_tls_gets_cookies_for_tls_alone() {
    let files = Files::new();
    let gateway = files.gateway(&Authority::new()).await;
    let browser = Browser::by_token(&gateway, "admin", gateway.token()).await;
    let is_bound = |line: &String| {
        line.starts_with("__Host-rungate_") && line.ends_with("; SameSite=Lax; Secure; Path=/")
    };
    assert!(browser.lines.iter().all(is_bound), "{:?}", browser.lines);
    assert_eq!(browser.status(&gateway).await, 200);
}

#[tokio::test]
async fn the_command_line_reaches_it_with_the_authoritys_certificate() {
    let (authority, files) = (Authority::new(), Files::new());
    let gateway = files.gateway(&authority).await;
    let ca = files.dir.path().join("ca.pem");
    fs::write(&ca, authority.pem()).unwrap();
    let (ca, home) = (ca.to_str().unwrap(), TempDir::new().unwrap());
    let url = gateway.url("");
    let (code, out, error) = run(rungate(
        home.path(),
        &["health", "--url", &url, "--ca-cert", ca],
    ));
    assert_eq!((code, out.trim()), (0, "ok"), "{error}");

    let mut command = rungate(home.path(), &["service", "list", "--url", &url]);
    let token = gateway.token_path();
    command
        .env("RUNGATE_CA_CERT", ca)
        .env("RUNGATE_TOKEN_FILE", token);
    assert_eq!(run(command).0, 0);

    let (code, _, error) = run(rungate(home.path(), &["health", "--url", &url]));
    assert_eq!(code, 5, "{error}");
    let key = files.key();
    let no_cert = ["health", "--url", &url, "--ca-cert", key.to_str().unwrap()];
    let (code, _, error) = run(rungate(home.path(), &no_cert));
    assert!(
        code != 0 && error.contains("holds none in PEM form"),
        "{error}"
    );
}

#[tokio::test]
async fn a_hangup_changes_the_certificate_and_no_connection() {
    let (first, second, files) = (Authority::new(), Authority::new(), Files::new());
    let gateway = files.gateway(&first).await;
    let path = "/api/gateway/ledger/stream?heartbeat_s=0.2";
    let mut stream = EventSource::open(gateway.request(Method::GET, path), "").await;
    let trusts = async |authority: &Authority| {
        let asked = client(Some(&authority.pem())).get(gateway.url("/livez"));
        asked.send().await.is_ok()
    };

    // What cannot be used changes nothing.
    fs::write(files.cert(), "no certificate").unwrap();
    gateway.signal(Signal::HUP);
    until("the bad file is told", || async {
        gateway.log().contains("stays as it was")
    })
    .await;
    assert!(gateway.log().contains("holds no certificate"));
    assert!(trusts(&first).await);
    first.issue(&files.cert(), &files.key());
    write_key(&files.key(), &KeyPair::generate().unwrap().serialize_pem());
    gateway.signal(Signal::HUP);
    until("a key of another certificate is told", || async {
        gateway.log().contains("cannot be used together")
    })
    .await;
    assert!(trusts(&first).await);

    second.issue(&files.cert(), &files.key());
    gateway.signal(Signal::HUP);
    until("the new certificate is shown", || trusts(&second)).await;
    assert!(!trusts(&first).await);

    let run = {
        let body = serde_json::json!({"job": {"service_type": "t", "payload": {}}});
        let request = client(Some(&second.pem())).post(gateway.url("/api/gateway/runs/start"));
        let started = answer(request.bearer_auth(gateway.token()).json(&body)).await;
        started.expect(200)["run_id"].as_str().unwrap().to_owned()
    };
    loop {
        let event = stream.next().await.expect("the stream goes on");
        if event.data.contains(&run) {
            break;
        }
    }
}

/// HUP ended a gateway that had no certificate.
#[tokio::test]
async fn a_hangup_without_a_certificate_changes_nothing() {
    let gateway = Gateway::start(Options::default()).await;
    gateway.signal(Signal::HUP);
    until("it is told", || async {
        gateway.log().contains("nothing is read again")
    })
    .await;
    assert_eq!(gateway.get("/api/gateway/ping").await.status, 200);
}

#[test]
fn what_is_wrong_with_the_files_is_told_in_a_sentence() {
    let files = Files::new();
    let (cert, key) = (files.cert(), files.key());
    Authority::new().issue(&cert, &key);
    let dir = files.dir.path();
    let exposed = dir.join("exposed.key");
    fs::copy(&key, &exposed).unwrap();
    fs::set_permissions(&exposed, fs::Permissions::from_mode(0o644)).unwrap();
    let foreign = dir.join("foreign.key");
    write_key(&foreign, &KeyPair::generate().unwrap().serialize_pem());
    let missing = dir.join("missing");
    let with = |cert: &Path, key: &Path, words: &[&str]| {
        let (cert, key) = (cert.to_str().unwrap(), key.to_str().unwrap());
        refuses(&["--tls-cert", cert, "--tls-key", key], words);
    };
    with(
        &missing,
        &key,
        &["cannot read", "missing", "--tls-cert", "No such file"],
    );
    with(&cert, &missing, &["cannot read", "missing", "--tls-key"]);
    with(&key, &key, &["gate.key holds no certificate"]);
    with(
        &cert,
        &cert,
        &["gate.pem", "can be read or written by others"],
    );
    let closed = dir.join("closed.pem");
    write_key(&closed, &fs::read_to_string(&cert).unwrap());
    with(&cert, &closed, &["closed.pem holds no private key"]);
    with(&cert, &exposed, &["exposed.key", "chmod 600"]);
    with(
        &cert,
        &foreign,
        &["gate.pem", "foreign.key", "cannot be used together"],
    );
    let half = ["--tls-cert", cert.to_str().unwrap()];
    refuses(&half, &["tls_cert is set and tls_key is not"]);
}

#[test]
fn the_doctor_finds_what_would_keep_it_from_starting() {
    let home = TempDir::new().unwrap();
    let finding = |settings: &[(&str, &str)]| {
        let mut command = rungate(home.path(), &["doctor", "--json"]);
        command.envs(settings.iter().copied());
        let report: serde_json::Value = serde_json::from_str(&run(command).1).unwrap();
        let findings = report["findings"].as_array().unwrap().iter();
        let level = |finding: &serde_json::Value| finding["level"].as_str().unwrap().to_owned();
        findings
            .filter(|finding| finding["check"] == "transport")
            .map(level)
            .next()
    };
    assert_eq!(finding(&[]), None);
    let everywhere = ("RUNGATE_LISTEN", "0.0.0.0:0");
    assert_eq!(finding(&[everywhere]).as_deref(), Some("wrong"));
    let insecure = ("RUNGATE_INSECURE_HTTP", "true");
    assert_eq!(finding(&[everywhere, insecure]).as_deref(), Some("warning"));
    let half = ("RUNGATE_TLS_CERT", "/nowhere");
    assert_eq!(finding(&[half]).as_deref(), Some("wrong"));
}

#[test]
fn the_doctor_tells_when_the_certificate_expires() {
    let (home, files) = (TempDir::new().unwrap(), Files::new());
    let level = |days: i64| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.not_after = time::OffsetDateTime::now_utc() + time::Duration::days(days);
        let signed = params.self_signed(&key).unwrap();
        fs::write(files.cert(), signed.pem()).unwrap();
        write_key(&files.key(), &key.serialize_pem());
        let mut command = rungate(home.path(), &["doctor", "--json"]);
        command.env("RUNGATE_TLS_CERT", files.cert());
        command.env("RUNGATE_TLS_KEY", files.key());
        let report: serde_json::Value = serde_json::from_str(&run(command).1).unwrap();
        let mut findings = report["findings"].as_array().unwrap().iter();
        let found = findings.find(|finding| finding["check"] == "certificate");
        found.unwrap()["level"].as_str().unwrap().to_owned()
    };
    for (days, expected) in [(-1, "wrong"), (13, "warning"), (60, "ok")] {
        assert_eq!(level(days), expected, "{days}");
    }
}

/// `serve` with these flags ends with one line that holds all of `words`, and makes nothing.
#[track_caller]
fn refuses(flags: &[&str], words: &[&str]) {
    let home = TempDir::new().unwrap();
    let data = home.path().join("data");
    let data_dir = ["serve", "--data-dir", data.to_str().unwrap()];
    let (code, _, message) = run(rungate(home.path(), &[&data_dir, flags].concat()));
    assert_ne!(code, 0);
    assert_eq!(message.trim_end().lines().count(), 1, "{message}");
    for word in words {
        assert!(message.contains(word), "'{word}' is not in: {message}");
    }
    assert!(!data.exists());
}

#[test]
fn plain_http_is_not_spoken_to_other_machines_unless_told_to() {
    for listen in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
        let words = ["--tls-cert", "--insecure-http", listen];
        refuses(&["--listen", listen], &words);
    }
    let home = TempDir::new().unwrap();
    let data = home.path().join("data");
    let data = ["--data-dir", data.to_str().unwrap()];
    let flags = ["serve", "--listen", "0.0.0.0:0", "--insecure-http"];
    let mut command = rungate(home.path(), &[&flags[..], &data].concat());
    let mut gateway = command.stderr(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(gateway.stderr.take().unwrap()).lines();
    let told = lines
        .map_while(Result::ok)
        .find(|line| line.contains("unencrypted"));
    gateway.kill().unwrap();
    gateway.wait().unwrap();
    assert!(told.is_some());
}

#[tokio::test]
async fn a_client_that_never_agrees_on_tls_holds_nobody_up() {
    let (authority, files) = (Authority::new(), Files::new());
    let gateway = files.gateway(&authority).await;
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(
            tokio::net::TcpStream::connect(gateway.addr())
                .await
                .unwrap(),
        );
    }
    assert_eq!(gateway.get("/livez").await.status, 200);
    // Plain http gets no answer that could be taken for the gateway's.
    let asked = tokio::spawn({
        let addr = gateway.addr();
        async move { exchange(addr, b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await }
    });
    assert!(asked.await.is_err());
}
