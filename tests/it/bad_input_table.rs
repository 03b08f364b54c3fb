//! The table of `bad_input`: one row for each fault of each route.

/// What the rows refer to.
pub struct Fixture {
    /// A run that waits for ever.
    pub queued: String,
    /// A cancelled one.
    pub ended: String,
    /// A cancelled one whose payloads were purged.
    pub purged: String,
}

impl Fixture {
    /// A template's path, its parameters filled with what is there.
    pub fn fill(&self, template: &str) -> String {
        template
            .replace("{run_id}", &self.queued)
            .replace("{job_id}", &self.queued)
            .replace("{name}", "plain")
            .replace("{service}", "plain")
            .replace("{command_id}", "used")
            .replace("{service_type}", "t")
            .replace("{user_id}", "nobody")
            .replace("{token_id}", "tok_0")
            .replace("{session_id}", "ses_0")
            .replace("{runtime_id}", "nothing")
            .replace("{tenant_id}", "nobody")
    }
}

/// One request and what it must come to.
#[derive(Clone, Debug)]
pub struct Case {
    /// As the document names it: the method it stands under, and the template.
    pub route: String,
    pub method: String,
    pub path: String,
    pub headers: Vec<(String, Vec<u8>)>,
    pub body: Option<Vec<u8>>,
    pub host: bool,
    pub token: bool,
    pub status: u16,
    pub code: &'static str,
    pub about: String,
}

impl Case {
    pub fn new(method: &str, template: &str, path: &str) -> Case {
        Case {
            route: format!("{method} {template}"),
            method: method.to_owned(),
            path: path.to_owned(),
            headers: Vec::new(),
            body: None,
            host: true,
            token: true,
            status: 0,
            code: "",
            about: String::new(),
        }
    }

    /// A request of another method than the route's.
    pub fn by(mut self, method: &str) -> Case {
        self.method = method.to_owned();
        self
    }

    pub fn header(mut self, name: &str, value: &str) -> Case {
        self.about = format!("{name}: {}", &value[..value.len().min(30)]);
        self.headers
            .push((name.to_owned(), value.as_bytes().to_vec()));
        self
    }

    pub fn bytes(mut self, body: &[u8]) -> Case {
        let shown = String::from_utf8_lossy(body);
        self.about = shown.chars().take(120).collect();
        self.body = Some(body.to_vec());
        self
    }

    pub fn json(self, body: &str) -> Case {
        let mut case = self.bytes(body.as_bytes());
        case.headers
            .push(("content-type".to_owned(), b"application/json".to_vec()));
        case
    }

    pub fn without_host(mut self) -> Case {
        self.host = false;
        self
    }

    pub fn without_token(mut self) -> Case {
        self.token = false;
        self
    }

    pub fn fails(mut self, status: u16, code: &'static str) -> Case {
        (self.status, self.code) = (status, code);
        self
    }

    /// The same under `/api/gateway`.
    fn nested(&self) -> Case {
        let mut case = self.clone();
        let (method, template) = self.route.split_once(' ').expect("a method and a template");
        case.route = format!("{method} /api/gateway{template}");
        case.path = format!("/api/gateway{}", self.path);
        case
    }
}

const NO_RUN: &str = "0199f3a2-7c1e-7d0a-9c55-6f0f0d1f2a3b";
const INVALID: (u16, &str) = (422, "validation_failed");

/// All rows; those of the GPU dialect twice.
pub fn table(fixture: &Fixture) -> Vec<Case> {
    let mut rows = Vec::new();
    rows.extend(starts());
    rows.extend(run_reads(fixture));
    rows.extend(ledgers(fixture));
    rows.extend(checkpoints(fixture));
    rows.extend(commands(fixture));
    rows.extend(open_routes());
    rows.extend(crate::bad_input_users::rows());
    rows.extend(crate::bad_input_logins::rows());
    let mut dialect = Vec::new();
    dialect.extend(registrations());
    dialect.extend(service_routes());
    dialect.extend(queue(fixture));
    dialect.extend(preemption(fixture));
    rows.extend(dialect.iter().map(Case::nested));
    rows.extend(dialect);
    rows
}

/// What any JSON body may be wrong with.
pub fn bodies(method: &str, template: &str, path: &str) -> Vec<Case> {
    let case = || Case::new(method, template, path);
    let json = || case().header("content-type", "application/json");
    let deep = format!("{}{}", "[".repeat(65), "]".repeat(65));
    let deeper = format!("{{\"a\":{}{}}}", "[".repeat(30_000), "]".repeat(30_000));
    vec![
        case().json("").fails(INVALID.0, INVALID.1),
        case().json("{").fails(400, "invalid_json"),
        case().json("{}}").fails(400, "invalid_json"),
        case().json("{'a':1}").fails(400, "invalid_json"),
        case().json("{\"a\":NaN}").fails(400, "invalid_json"),
        case().json("{\"a\":1e999}").fails(400, "invalid_json"),
        case().json("{\"a\":\"\u{1}\"}").fails(400, "invalid_json"),
        case().json("\u{feff}{}").fails(400, "invalid_json"),
        case()
            .json("{\"a\":\"\\ud800\"}")
            .fails(400, "invalid_json"),
        json().bytes(b"{\"a\":\"\0\"}").fails(400, "invalid_json"),
        json()
            .bytes(b"{\"a\":\"\xff\xfe\"}")
            .fails(400, "invalid_utf8"),
        case()
            .json("{\"a\":1,\"a\":2}")
            .fails(400, "duplicate_member"),
        case()
            .json("{\"a\":{\"b\":1,\"\\u0062\":2}}")
            .fails(400, "duplicate_member"),
        case().json(&deep).fails(400, "json_too_deep"),
        case().json(&deeper).fails(400, "json_too_deep"),
        case().json("[]").fails(INVALID.0, INVALID.1),
        case().json("\"text\"").fails(INVALID.0, INVALID.1),
        case().json("null").fails(INVALID.0, INVALID.1),
        case()
            .bytes(b"a=1")
            .header("content-type", "application/x-www-form-urlencoded")
            .fails(415, "unsupported_media_type"),
        case()
            .bytes(b"{}")
            .header("content-type", "text/plain")
            .fails(415, "unsupported_media_type"),
        case()
            .bytes(b"{}")
            .header("content-type", "multipart/form-data; boundary=x")
            .fails(415, "unsupported_media_type"),
        case()
            .bytes(b"{}")
            .header("content-encoding", "gzip")
            .fails(415, "unsupported_media_type"),
        json()
            .bytes(b"")
            .header("content-length", "1048577")
            .fails(413, "body_too_large"),
        json()
            .bytes(b"")
            .header("content-length", "99999999999999")
            .fails(413, "body_too_large"),
        json()
            .bytes(&chunked(1_100_000))
            .header("transfer-encoding", "chunked")
            .fails(413, "body_too_large"),
    ]
}

/// A chunked body of that many bytes; its declared length is left out by the header's presence.
fn chunked(length: usize) -> Vec<u8> {
    let mut body = format!("{length:x}\r\n").into_bytes();
    body.resize(body.len() + length, b' ');
    body.extend_from_slice(b"\r\n0\r\n\r\n");
    body
}

fn starts() -> Vec<Case> {
    let path = "/api/gateway/runs/start";
    let start = || Case::new("POST", path, path);
    let mut rows = bodies("POST", path, path);
    rows.extend([
        start().json("{}").fails(400, "nothing_to_start"),
        start()
            .json(r#"{"job":null}"#)
            .fails(400, "nothing_to_start"),
        start()
            .json(r#"{"bundle_id":"x"}"#)
            .fails(404, "bundle_not_found"),
        start()
            .json(r#"{"flow_id":"../../etc/passwd"}"#)
            .fails(404, "bundle_not_found"),
        start()
            .json(r#"{"flow_id":"b@1:f"}"#)
            .fails(404, "bundle_not_found"),
        start()
            .json(r#"{"bundle_id":7}"#)
            .fails(INVALID.0, INVALID.1),
        start()
            .json(r#"{"bundle_id":"x","input_data":[]}"#)
            .fails(INVALID.0, INVALID.1),
    ]);
    let long = "x".repeat(201);
    let labels: Vec<String> = (0..33).map(|n| format!("\"l{n}\":\"x\"")).collect();
    for whole in [
        r#"{"job":[]}"#.to_owned(),
        r#"{"job":"x"}"#.to_owned(),
        format!(r#"{{"job":{{"service_type":"t","payload":1}},"session_id":"{long}"}}"#),
        r#"{"job":{"service_type":"t","payload":1},"session_id":""}"#.to_owned(),
        r#"{"job":{"service_type":"t","payload":1},"session_id":"a\u0000b"}"#.to_owned(),
        r#"{"job":{"service_type":"t","payload":1},"session_id":7}"#.to_owned(),
        r#"{"job":{"service_type":"t","payload":1},"labels":[]}"#.to_owned(),
        r#"{"job":{"service_type":"t","payload":1},"labels":{"a":1}}"#.to_owned(),
        r#"{"job":{"service_type":"t","payload":1},"labels":{"":"x"}}"#.to_owned(),
        r#"{"job":{"service_type":"t","payload":1},"labels":{"a":"\u0000"}}"#.to_owned(),
        format!(
            r#"{{"job":{{"service_type":"t","payload":1}},"labels":{{{}}}}}"#,
            labels.join(",")
        ),
    ] {
        rows.push(start().json(&whole).fails(INVALID.0, INVALID.1));
    }
    for container in [
        "[]",
        "{}",
        r#"{"image":""}"#,
        r#"{"image":"a b"}"#,
        r#"{"image":"a","gpu":1}"#,
        r#"{"image":"a","gpus":-1}"#,
        r#"{"image":"a","vram_gb":1e9}"#,
        r#"{"image":"a","args":"x"}"#,
        r#"{"image":"a","args":["\u0000"]}"#,
        r#"{"image":"a","volumes":["/"]}"#,
        r#"{"image":"a","timeout_seconds":0}"#,
        r#"{"image":"a","checkpoint_signal":"SIGKILL"}"#,
        r#"{"image":"a","checkpoint_seconds":1}"#,
    ] {
        let whole = format!(r#"{{"job":{{"container":{container}}}}}"#);
        rows.push(start().json(&whole).fails(INVALID.0, INVALID.1));
    }
    let both = r#"{"job":{"container":{"image":"a"},"service_type":"t"}}"#;
    let no_engine = r#"{"job":{"container":{"image":"a"}}}"#;
    rows.extend([
        start().json(both).fails(INVALID.0, INVALID.1),
        start().json(no_engine).fails(503, "no_engine"),
    ]);
    for job in [
        "{}",
        r#"{"payload":1}"#,
        r#"{"service_type":"t"}"#,
        r#"{"service_type":"t","payload":null}"#,
        r#"{"service_type":"","payload":1}"#,
        r#"{"service_type":7,"payload":1}"#,
        r#"{"service_type":"a\u0000","payload":1}"#,
        r#"{"service_name":["x"],"payload":1}"#,
        r#"{"service_type":"t","payload":1,"priority":0}"#,
        r#"{"service_type":"t","payload":1,"priority":6}"#,
        r#"{"service_type":"t","payload":1,"priority":"1"}"#,
        r#"{"service_type":"t","payload":1,"priority":1.5}"#,
        r#"{"service_type":"t","payload":1,"priority":true}"#,
        r#"{"service_type":"t","payload":1,"ttl_seconds":-1}"#,
        r#"{"service_type":"t","payload":1,"ttl_seconds":1e12}"#,
        r#"{"service_type":"t","payload":1,"ttl_seconds":"1"}"#,
        r#"{"service_type":"t","payload":1,"max_attempts":0}"#,
        r#"{"service_type":"t","payload":1,"max_attempts":101}"#,
        r#"{"service_type":"t","payload":1,"timeout_seconds":0}"#,
        r#"{"service_type":"t","payload":1,"timeout_seconds":1e300}"#,
        r#"{"service_type":"t","payload":1,"callback_url":"file:///etc/passwd"}"#,
        r#"{"service_type":"t","payload":1,"callback_url":"http://"}"#,
        r#"{"service_type":"t","payload":1,"callback_url":"http://user:secret@host/"}"#,
        r#"{"service_type":"t","payload":1,"callback_url":"javascript:alert(1)"}"#,
        r#"{"service_type":"t","payload":1,"callback_url":7}"#,
    ] {
        rows.push(
            start()
                .json(&format!("{{\"job\":{job}}}"))
                .fails(INVALID.0, INVALID.1),
        );
    }
    let sound = r#"{"job":{"service_type":"nobody","payload":{"a":2}}}"#;
    let keyed = |key: &str| start().json(sound).header("idempotency-key", key);
    let too_long = "k".repeat(256);
    rows.extend([
        keyed("").fails(400, "idempotency_key_invalid"),
        keyed("a b").fails(400, "idempotency_key_invalid"),
        keyed("\u{e9}").fails(400, "idempotency_key_invalid"),
        keyed(&too_long).fails(400, "idempotency_key_invalid"),
        keyed("a")
            .header("idempotency-key", "b")
            .fails(400, "idempotency_key_invalid"),
        keyed("used").fails(422, "idempotency_key_reused"),
        start().by("GET").fails(405, "method_not_allowed"),
        start()
            .by("PUT")
            .json(sound)
            .fails(405, "method_not_allowed"),
    ]);
    rows
}

fn run_reads(fixture: &Fixture) -> Vec<Case> {
    let list = |query: &str| {
        let path = format!("/api/gateway/runs{query}");
        Case::new("GET", "/api/gateway/runs", &path)
    };
    let mut rows = Vec::new();
    let long = format!("?session_id={}", "x".repeat(513));
    for query in [
        "?limit=0",
        "?limit=501",
        "?limit=-1",
        "?limit=x",
        "?limit=1.5",
        "?limit=",
        "?limit=99999999999999999999999",
        "?limit=1&limit=0",
        "?root_only=maybe",
        "?include_ledger_len=2",
        "?include_metrics=%00",
        "?session_id=a%00b",
        "?workflow_id=%0a",
        long.as_str(),
    ] {
        rows.push(list(query).fails(INVALID.0, INVALID.1));
    }
    rows.extend([
        list("?status=sleeping").fails(400, "invalid_status"),
        list("?status=Running").fails(400, "invalid_status"),
        list("?after=x").fails(400, "invalid_cursor"),
        list("?after=..%2F..").fails(400, "invalid_cursor"),
        list("?after=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA").fails(400, "invalid_cursor"),
        list("").by("DELETE").fails(405, "method_not_allowed"),
        list("/").fails(404, "not_found"),
    ]);
    for (template, bad) in [
        ("/api/gateway/runs/{run_id}", "nope"),
        ("/api/gateway/runs/{run_id}", NO_RUN),
        (
            "/api/gateway/runs/{run_id}",
            "00000000-0000-0000-0000-000000000000",
        ),
        ("/api/gateway/runs/{run_id}/input_data", NO_RUN),
        ("/api/gateway/runs/{run_id}/why", NO_RUN),
        ("/api/gateway/runs/{run_id}/output", NO_RUN),
        ("/api/gateway/runs/{run_id}/output/content", "nope"),
        ("/api/gateway/runs/{run_id}/why", "%F0%9F%92%A9"),
    ] {
        let path = template.replace("{run_id}", bad);
        rows.push(Case::new("GET", template, &path).fails(404, "run_not_found"));
    }
    let output = "/api/gateway/runs/{run_id}/output";
    for bad in ["?tail=-1", "?tail=10001", "?tail=x", "?follow=2"] {
        let path = fixture.fill(output) + bad;
        rows.push(Case::new("GET", output, &path).fails(INVALID.0, INVALID.1));
    }
    let content = "/api/gateway/runs/{run_id}/output/content";
    for template in [output, content] {
        let path = fixture.fill(template);
        rows.push(Case::new("GET", template, &path).fails(409, "no_output"));
    }
    let purge = "/api/gateway/runs/{run_id}/purge";
    let purged = format!("/api/gateway/runs/{}/input_data", fixture.purged);
    rows.extend([
        Case::new("POST", purge, &purge.replace("{run_id}", NO_RUN)).fails(404, "run_not_found"),
        Case::new("POST", purge, &fixture.fill(purge)).fails(409, "run_not_ended"),
        Case::new("POST", purge, &fixture.fill(purge))
            .by("GET")
            .fails(405, "method_not_allowed"),
        Case::new("GET", "/api/gateway/runs/{run_id}/input_data", &purged).fails(410, "purged"),
    ]);
    rows
}

fn ledgers(fixture: &Fixture) -> Vec<Case> {
    let mut rows = Vec::new();
    let queries = |name: &'static str| {
        ["-1", "x", "18446744073709551616", "1e3", "0x10"].map(move |bad| format!("?{name}={bad}"))
    };
    for (template, name) in [
        ("/api/gateway/runs/{run_id}/ledger", "after"),
        ("/api/gateway/ledger", "after_seq"),
        ("/api/gateway/ledger/export", "after_seq"),
        ("/api/gateway/runs/{run_id}/ledger/stream", "after"),
        ("/api/gateway/ledger/stream", "after_seq"),
        ("/api/gateway/plane/ledger/stream", "after_seq"),
    ] {
        let path = fixture.fill(template);
        for query in queries(name) {
            let case = Case::new("GET", template, &format!("{path}{query}"));
            rows.push(case.fails(INVALID.0, INVALID.1));
        }
        if template.ends_with("/stream") {
            for bad in ["0.1", "60.1", "-1", "nan", "inf", "x", ""] {
                let case = Case::new("GET", template, &format!("{path}?heartbeat_s={bad}"));
                rows.push(case.fails(INVALID.0, INVALID.1));
            }
        } else if !template.ends_with("export") {
            for bad in ["0", "2001", "-1", "x", "9223372036854775808"] {
                let case = Case::new("GET", template, &format!("{path}?limit={bad}"));
                rows.push(case.fails(INVALID.0, INVALID.1));
            }
        }
        rows.push(
            Case::new("GET", template, &path)
                .by("POST")
                .fails(405, "method_not_allowed"),
        );
        if template.contains("{run_id}") {
            let path = template.replace("{run_id}", NO_RUN);
            rows.push(Case::new("GET", template, &path).fails(404, "run_not_found"));
        }
    }
    let audit = "/api/gateway/audit";
    for query in [
        "?limit=0",
        "?limit=501",
        "?limit=x",
        "?outcome=maybe",
        "?since=yesterday",
        "?until=7",
        "?actor=%00",
    ] {
        let case = Case::new("GET", audit, &format!("{audit}{query}"));
        rows.push(case.fails(INVALID.0, INVALID.1));
    }
    let case = Case::new("GET", audit, &format!("{audit}?after=x"));
    rows.push(case.fails(400, "invalid_cursor"));
    let tail = "/api/gateway/audit/tail";
    for query in ["?max_bytes=1023", "?max_bytes=400001", "?max_bytes=x"] {
        let case = Case::new("GET", tail, &format!("{tail}{query}"));
        rows.push(case.fails(INVALID.0, INVALID.1));
    }
    for path in [
        "/api/gateway/ledger/verify",
        "/api/gateway/ledger/stats",
        "/api/gateway/ledger/checkpoint",
    ] {
        rows.push(
            Case::new("GET", path, path)
                .by("DELETE")
                .fails(405, "method_not_allowed"),
        );
    }
    let batch = "/api/gateway/runs/ledger/batch";
    rows.extend(bodies("POST", batch, batch));
    let many = vec![format!("{{\"run_id\":\"{NO_RUN}\"}}"); 201].join(",");
    for body in [
        "{}".to_owned(),
        r#"{"runs":null}"#.to_owned(),
        r#"{"runs":{}}"#.to_owned(),
        r#"{"runs":["x"]}"#.to_owned(),
        r#"{"runs":[{}]}"#.to_owned(),
        r#"{"runs":[{"run_id":7}]}"#.to_owned(),
        r#"{"runs":[{"run_id":"a\u0000"}]}"#.to_owned(),
        r#"{"runs":[{"run_id":"x","after":-1}]}"#.to_owned(),
        r#"{"runs":[],"limit":0}"#.to_owned(),
        r#"{"runs":[],"limit":2001}"#.to_owned(),
        format!("{{\"runs\":[{many}]}}"),
    ] {
        rows.push(
            Case::new("POST", batch, batch)
                .json(&body)
                .fails(INVALID.0, INVALID.1),
        );
    }
    rows
}

fn checkpoints(fixture: &Fixture) -> Vec<Case> {
    let template = "/api/gateway/runs/{run_id}/checkpoint";
    let of = |run: &str| template.replace("{run_id}", run);
    let put = |run: &str| Case::new("PUT", template, &of(run)).bytes(b"{}");
    let get = |run: &str| Case::new("GET", template, &of(run));
    vec![
        get(NO_RUN).fails(404, "run_not_found"),
        get(&fixture.queued).fails(404, "checkpoint_not_found"),
        get(&fixture.queued)
            .by("POST")
            .fails(405, "method_not_allowed"),
        put(NO_RUN).fails(404, "run_not_found"),
        put("%2e%2e").fails(404, "run_not_found"),
        put(&fixture.queued).fails(409, "not_running"),
        put(&fixture.ended).fails(409, "run_ended"),
        put(&fixture.queued)
            .header("x-rungate-attempt", "x")
            .fails(INVALID.0, INVALID.1),
        put(&fixture.queued)
            .header("x-rungate-attempt", "-1")
            .fails(INVALID.0, INVALID.1),
        put(&fixture.queued)
            .header("x-rungate-attempt", "4294967296")
            .fails(INVALID.0, INVALID.1),
        put(&fixture.queued)
            .bytes(b"")
            .header("content-length", "1048577")
            .fails(413, "body_too_large"),
        put(&fixture.queued)
            .bytes(&chunked(1_100_000))
            .header("transfer-encoding", "chunked")
            .fails(413, "body_too_large"),
    ]
}

fn commands(fixture: &Fixture) -> Vec<Case> {
    let path = "/api/gateway/commands";
    let post = || Case::new("POST", path, path);
    let mut rows = bodies("POST", path, path);
    let run = &fixture.queued;
    let long = "c".repeat(201);
    for body in [
        "{}".to_owned(),
        format!(r#"{{"run_id":"{run}","type":"pause"}}"#),
        r#"{"command_id":"n","type":"pause"}"#.to_owned(),
        format!(r#"{{"command_id":"n","run_id":"{run}"}}"#),
        format!(r#"{{"command_id":null,"run_id":"{run}","type":"pause"}}"#),
        format!(r#"{{"command_id":7,"run_id":"{run}","type":"pause"}}"#),
        format!(r#"{{"command_id":"{long}","run_id":"{run}","type":"pause"}}"#),
        format!(r#"{{"command_id":"a\u0000b","run_id":"{run}","type":"pause"}}"#),
        r#"{"command_id":"n","run_id":"","type":"pause"}"#.to_owned(),
        format!(r#"{{"command_id":"n","run_id":"{long}","type":"pause"}}"#),
        r#"{"command_id":"n","run_id":["x"],"type":"pause"}"#.to_owned(),
        format!(r#"{{"command_id":"n","run_id":"{run}","type":7}}"#),
        format!(r#"{{"command_id":"n","run_id":"{run}","type":"pause","payload":[]}}"#),
        format!(r#"{{"command_id":"n","run_id":"{run}","type":"pause","payload":"x"}}"#),
        format!(r#"{{"command_id":"n","run_id":"{run}","type":"pause","payload":{{"reason":7}}}}"#),
        format!(
            r#"{{"command_id":"n","run_id":"{run}","type":"cancel","payload":{{"reason":"\u0000"}}}}"#
        ),
        format!(
            r#"{{"command_id":"n","run_id":"{run}","type":"pause","payload":{{"reason":"{}"}}}}"#,
            "r".repeat(2_001)
        ),
        format!(r#"{{"command_id":"n","run_id":"{run}","type":"set_priority"}}"#),
        format!(r#"{{"command_id":"n","run_id":"{run}","type":"set_priority","payload":{{}}}}"#),
        format!(
            r#"{{"command_id":"n","run_id":"{run}","type":"set_priority","payload":{{"priority":0}}}}"#
        ),
        format!(
            r#"{{"command_id":"n","run_id":"{run}","type":"set_priority","payload":{{"priority":"1"}}}}"#
        ),
        format!(r#"{{"command_id":"n","run_id":"{run}","type":"preempt","payload":{{"by":"x"}}}}"#),
        format!(r#"{{"command_id":"n","run_id":"{run}","type":"preempt","payload":{{"by":7}}}}"#),
        format!(r#"{{"command_id":"n","run_id":"{run}","type":"pause","client_id":7}}"#),
        format!(r#"{{"command_id":"n","run_id":"{run}","type":"pause","ts":7}}"#),
    ] {
        rows.push(post().json(&body).fails(INVALID.0, INVALID.1));
    }
    for kind in [
        "",
        "zap",
        "PAUSE",
        "emit_event",
        "update_schedule",
        "pause ",
    ] {
        let body = format!(r#"{{"command_id":"n","run_id":"{run}","type":"{kind}"}}"#);
        rows.push(post().json(&body).fails(400, "command_type_unknown"));
    }
    let reused = format!(r#"{{"command_id":"used","run_id":"{run}","type":"pause"}}"#);
    let of = "/api/gateway/commands/{command_id}";
    let get = |id: &str| Case::new("GET", of, &of.replace("{command_id}", id));
    rows.extend([
        post().json(&reused).fails(409, "command_reused"),
        post().by("GET").fails(405, "method_not_allowed"),
        get("unknown").fails(404, "command_not_found"),
        get("%00").fails(404, "command_not_found"),
        get(&"c".repeat(3_000)).fails(404, "command_not_found"),
        get("used").by("DELETE").fails(405, "method_not_allowed"),
    ]);
    rows
}

fn open_routes() -> Vec<Case> {
    let mut rows = Vec::new();
    for path in [
        "/health",
        "/api/health",
        "/api/gateway/health",
        "/livez",
        "/readyz",
        "/.well-known/jwks.json",
        "/metrics",
        "/api/gateway/ping",
    ] {
        rows.push(
            Case::new("GET", path, path)
                .by("POST")
                .bytes(b"x")
                .fails(405, "method_not_allowed"),
        );
    }
    let nowhere = |path: &str| Case::new("GET", path, path).fails(404, "not_found");
    rows.extend(
        [
            "/",
            "/nope",
            "/api",
            "/api/gateway",
            "/docs/../Cargo.toml",
            "/docs/%2e%2e%2fCargo.toml",
            "/docs/%00",
            "/docs/nope.js",
            "//livez/x",
            "/api/gateway/../livez",
            "/api/gateway/livez",
            "/.git/config",
            "/%2e%2e/%2e%2e/etc/passwd",
            "/favicon.ico",
        ]
        .map(nowhere),
    );
    rows
}

fn registrations() -> Vec<Case> {
    let path = "/services/register";
    let post = || Case::new("POST", path, path);
    let mut rows = bodies("POST", path, path);
    for (body, code) in [
        ("{}", "missing_field"),
        (
            r#"{"name":"","type":"t","container":"c","port":1}"#,
            "missing_field",
        ),
        (r#"{"name":"n","container":"c","port":1}"#, "missing_field"),
        (r#"{"name":"n","type":"t","port":1}"#, "missing_field"),
        (
            r#"{"name":"n","type":"t","container":"c"}"#,
            "missing_field",
        ),
    ] {
        rows.push(post().json(body).fails(400, code));
    }
    rows.push(
        post()
            .json(r#"{"name":"plain","type":"t","container":"c","port":1}"#)
            .fails(409, "service_exists"),
    );
    let long = format!(r#""name":"{}""#, "n".repeat(64));
    let argv = format!(r#""command":[{}]"#, vec!["\"a\""; 1_000].join(","));
    let wrong = [
        r#""name":7"#,
        r#""name":"..""#,
        r#""name":"../../x""#,
        r#""name":"a/b""#,
        r#""name":"a%2fb""#,
        r#""name":".x""#,
        r#""name":"a\u0000b""#,
        r#""name":"a\nb""#,
        r#""name":"é""#,
        r#""name":" a""#,
        long.as_str(),
        r#""type":7"#,
        r#""type":"a\u0000""#,
        r#""container":"../x""#,
        r#""container":7"#,
        r#""port":-1"#,
        r#""port":65536"#,
        r#""port":"80""#,
        r#""port":1.5"#,
        r#""health_endpoint":"health""#,
        r#""health_endpoint":"http://evil/""#,
        r#""health_endpoint":"//evil/""#,
        r#""health_endpoint":"/../x""#,
        r#""health_endpoint":"/a b""#,
        r#""vram_gb":-1"#,
        r#""vram_gb":"4""#,
        r#""vram_gb":1e300"#,
        r#""mps_percent":0"#,
        r#""mps_percent":101"#,
        r#""ladder":{}"#,
        r#""ladder":["stop"]"#,
        r#""ladder":[{"step":"dance"}]"#,
        r#""ladder":[{"step":"stop"},{"step":"drain"}]"#,
        r#""ladder":[{"step":"checkpoint","signal":"SIGKILL"}]"#,
        r#""ladder":[{"step":"checkpoint","path":"//evil/"}]"#,
        r#""ladder":[{"step":"sleep","seconds":1e300}]"#,
        r#""progress_mode":"x""#,
        r#""progress_mode":7"#,
        r#""progress_endpoint":"x""#,
        r#""command":"ls""#,
        r#""command":[]"#,
        r#""command":[7]"#,
        r#""command":[""]"#,
        r#""command":["a\u0000"]"#,
        argv.as_str(),
        r#""env":[]"#,
        r#""env":{"A":7}"#,
        r#""env":{"A=B":"x"}"#,
        r#""env":{"A":"\u0000"}"#,
        r#""working_dir":"x""#,
        r#""working_dir":"/a/../b""#,
        r#""url":"http://x/""#,
        r#""gpus":-1"#,
        r#""gpus":1000"#,
        r#""concurrency":0"#,
        r#""concurrency":1e9"#,
        r#""dispatch_path":"x""#,
        r#""cancel_path":"//x""#,
        r#""idle_timeout_seconds":-1"#,
        r#""grace_seconds":1e9"#,
        r#""startup_timeout_seconds":0"#,
        r#""min_runtime_seconds":"1""#,
        r#""description":7"#,
        r#""description":"\u0000""#,
    ];
    for member in wrong {
        let key = member.split(':').next().expect("a name");
        let base = [
            r#""name":"new""#,
            r#""type":"t""#,
            r#""command":["/bin/true"]"#,
        ];
        let mut kept: Vec<&str> = base
            .into_iter()
            .filter(|m| !m.starts_with(&format!("{key}:")))
            .collect();
        kept.push(member);
        let body = format!("{{{}}}", kept.join(","));
        rows.push(post().json(&body).fails(INVALID.0, INVALID.1));
    }
    rows.push(
        post()
            .json(r#"{"name":"n","type":"t","url":"ftp://x/"}"#)
            .fails(INVALID.0, INVALID.1),
    );
    rows.push(
        post()
            .json(r#"{"name":"n","type":"t","url":"http://a:b@x/"}"#)
            .fails(INVALID.0, INVALID.1),
    );
    rows
}

fn service_routes() -> Vec<Case> {
    let mut rows = Vec::new();
    for query in ["?enabled=maybe", "?type=%00"] {
        let path = format!("/services{query}");
        rows.push(Case::new("GET", "/services", &path).fails(INVALID.0, INVALID.1));
    }
    let unknown = |method: &str, template: &str| {
        let path = template.replace("{name}", "unknown");
        Case::new(method, template, &path).fails(404, "service_not_found")
    };
    rows.extend([
        unknown("GET", "/services/{name}"),
        unknown("DELETE", "/services/{name}"),
        unknown("PUT", "/services/{name}").json("{}"),
        unknown("POST", "/services/{name}/enable"),
        unknown("POST", "/services/{name}/disable"),
        unknown("POST", "/services/{name}/start"),
        unknown("POST", "/services/{name}/stop"),
        unknown("POST", "/services/{name}/restart"),
        unknown("GET", "/services/{name}/logs"),
        unknown("GET", "/services/{name}/logs")
            .by("POST")
            .fails(405, "method_not_allowed"),
    ]);
    rows.extend(bodies("PUT", "/services/{name}", "/services/plain"));
    for body in [
        r#"{"name":"other"}"#,
        r#"{"port":0}"#,
        r#"{"vram_gb":-1}"#,
        r#"{"env":{"A":"1"}}"#,
        r#"{"type":""}"#,
        r#"{"type":null,"port":"x"}"#,
        r#"{"command":["x"],"url":"http://x/"}"#,
    ] {
        rows.push(
            Case::new("PUT", "/services/{name}", "/services/plain")
                .json(body)
                .fails(INVALID.0, INVALID.1),
        );
    }
    for (template, query, method) in [
        ("/services/{name}/stop", "?drain=maybe", "POST"),
        ("/services/{name}/restart", "?drain=7", "POST"),
        ("/services/{name}/logs", "?tail=-1", "GET"),
        ("/services/{name}/logs", "?tail=10001", "GET"),
        ("/services/{name}/logs", "?tail=x", "GET"),
        ("/services/{name}/logs", "?follow=x", "GET"),
    ] {
        let path = format!("{}{query}", template.replace("{name}", "plain"));
        rows.push(Case::new(method, template, &path).fails(INVALID.0, INVALID.1));
    }
    for template in ["/services/{name}/start", "/services/{name}/restart"] {
        let path = template.replace("{name}", "plain");
        rows.push(Case::new("POST", template, &path).fails(503, "no_engine"));
    }
    let release = "/gpu/{uuid}/release";
    rows.extend([
        Case::new("POST", release, "/gpu/nope/release").fails(404, "gpu_not_found"),
        Case::new("POST", release, "/gpu/%ff/release").fails(404, "not_found"),
        Case::new("GET", "/gpu/samples", "/gpu/samples?seconds=0").fails(INVALID.0, INVALID.1),
        Case::new("GET", "/gpu/samples", "/gpu/samples?seconds=601").fails(INVALID.0, INVALID.1),
        Case::new("GET", "/gpu/history", "/gpu/history?after=yesterday")
            .fails(INVALID.0, INVALID.1),
        Case::new("GET", "/gpu/history", "/gpu/history?limit=1441").fails(INVALID.0, INVALID.1),
    ]);
    for path in ["/gpu", "/vram", "/containers", "/queue/stats"] {
        rows.push(
            Case::new("GET", path, path)
                .by("PUT")
                .bytes(b"x")
                .fails(405, "method_not_allowed"),
        );
    }
    rows.push(
        Case::new("GET", "/available/{service_type}", "/available/%ff").fails(404, "not_found"),
    );
    rows.push(Case::new("GET", "/available/{service_type}", "/available/").fails(404, "not_found"));
    rows
}

fn queue(fixture: &Fixture) -> Vec<Case> {
    let path = "/queue/submit";
    let post = || Case::new("POST", path, path);
    let mut rows = bodies("POST", path, path);
    rows.extend([
        post().json("{}").fails(400, "missing_field"),
        post()
            .json(r#"{"service_type":"","payload":{}}"#)
            .fails(400, "missing_field"),
        post()
            .json(r#"{"service_type":"t"}"#)
            .fails(400, "missing_field"),
        post()
            .json(r#"{"service_type":"t","payload":null}"#)
            .fails(400, "missing_field"),
        post()
            .json(r#"{"service_type":7,"payload":{}}"#)
            .fails(INVALID.0, INVALID.1),
        post()
            .json(r#"{"service_type":"t","payload":{},"priority":9}"#)
            .fails(INVALID.0, INVALID.1),
        post()
            .json(r#"{"service_type":"t","payload":{},"callback_url":"x"}"#)
            .fails(INVALID.0, INVALID.1),
        post()
            .json(r#"{"service_type":"t","payload":{},"ttl_seconds":-5}"#)
            .fails(INVALID.0, INVALID.1),
        post()
            .json(r#"{"service_type":"t","payload":{}}"#)
            .header("idempotency-key", "a b")
            .fails(400, "idempotency_key_invalid"),
        post().by("PUT").fails(405, "method_not_allowed"),
    ]);
    let of = |method: &str, template: &str, id: &str| {
        Case::new(method, template, &template.replace("{job_id}", id))
    };
    let progress = "/queue/{job_id}/progress";
    for id in ["x", NO_RUN, "%00"] {
        rows.extend([
            of("GET", "/queue/{job_id}", id).fails(404, "run_not_found"),
            of("DELETE", "/queue/{job_id}", id).fails(404, "run_not_found"),
            of("GET", progress, id).fails(404, "run_not_found"),
            of("POST", progress, id)
                .json("{}")
                .fails(404, "run_not_found"),
        ]);
    }
    rows.extend([
        of("DELETE", "/queue/{job_id}", &fixture.ended).fails(409, "run_ended"),
        of("POST", progress, &fixture.queued)
            .json("{}")
            .fails(409, "not_running"),
        of("POST", progress, &fixture.ended)
            .json("{}")
            .fails(409, "run_ended"),
        of("POST", progress, &fixture.queued)
            .json("{}")
            .header("x-rungate-attempt", "first")
            .fails(INVALID.0, INVALID.1),
    ]);
    rows.extend(bodies(
        "POST",
        progress,
        &progress.replace("{job_id}", &fixture.queued),
    ));
    rows
}

fn preemption(fixture: &Fixture) -> Vec<Case> {
    let path = "/preempt/execute";
    let post = || Case::new("POST", path, path);
    let mut rows = bodies("POST", path, path);
    let body = |service: &str, run: &str| {
        format!(r#"{{"service_name":"{service}","preemptor_job_id":"{run}"}}"#)
    };
    rows.extend([
        Case::new("GET", "/preempt/check/{service}", "/preempt/check/unknown")
            .fails(404, "service_not_found"),
        Case::new(
            "POST",
            "/preempt/release/{service}",
            "/preempt/release/unknown",
        )
        .fails(404, "service_not_found"),
        post().json("{}").fails(400, "missing_field"),
        post()
            .json(r#"{"service_name":"plain"}"#)
            .fails(400, "missing_field"),
        post()
            .json(r#"{"preemptor_job_id":"x"}"#)
            .fails(400, "missing_field"),
        post()
            .json(r#"{"service_name":7,"preemptor_job_id":"x"}"#)
            .fails(INVALID.0, INVALID.1),
        post()
            .json(r#"{"service_name":"a\u0000","preemptor_job_id":"x"}"#)
            .fails(INVALID.0, INVALID.1),
        post()
            .json(&body("unknown", &fixture.queued))
            .fails(404, "service_not_found"),
        post().json(&body("plain", "x")).fails(404, "run_not_found"),
        post()
            .json(&body("plain", NO_RUN))
            .fails(404, "run_not_found"),
        post()
            .json(&body("plain", &fixture.ended))
            .fails(409, "run_ended"),
        post()
            .json(&body("plain", &fixture.queued))
            .fails(409, "no_active_job"),
        post().by("GET").fails(405, "method_not_allowed"),
    ]);
    rows
}
