//! The client commands against answers that are fixed here: how each is shown, and its exit code.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::Value;

use crate::rungate::{run, rungate};

type Answers = Arc<BTreeMap<&'static str, (u16, &'static str)>>;

async fn answer(State(answers): State<Answers>, request: Request) -> Response {
    let asked = format!("{} {}", request.method(), request.uri());
    let Some((status, body)) = answers.get(asked.as_str()) else {
        return (StatusCode::IM_A_TEAPOT, format!("not expected: {asked}")).into_response();
    };
    let status = StatusCode::from_u16(*status).unwrap();
    (status, [(header::CONTENT_TYPE, "application/json")], *body).into_response()
}

/// Runs the binary against a server that gives `(request, status, body)`.
async fn against(
    answers: &[(&'static str, u16, &'static str)],
    words: &'static str,
) -> (i32, String, String) {
    let answers = answers
        .iter()
        .map(|(asked, status, body)| (*asked, (*status, *body)));
    let answers = Answers::new(answers.collect());
    serve(Router::new().fallback(answer).with_state(answers), words).await
}

async fn serve(router: Router, words: &'static str) -> (i32, String, String) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    let ran = tokio::task::spawn_blocking(move || {
        let home = tempfile::tempdir().unwrap();
        let arguments: Vec<&str> = words.split(' ').collect();
        let mut command = rungate(home.path(), &arguments);
        command.env("RUNGATE_URL", url).env("RUNGATE_TOKEN", "t");
        run(command)
    });
    ran.await.unwrap()
}

#[tokio::test]
async fn refusals_are_one_sentence_and_their_exit_code() {
    let cases = [
        (
            404,
            r#"{"detail":"Run 'x' not found","code":"run_not_found","request_id":"q1"}"#,
            3,
            "Run 'x' not found (request q1)",
        ),
        (
            401,
            r#"{"detail":"Invalid or missing API token"}"#,
            4,
            "Invalid or missing API token; set RUNGATE_TOKEN_FILE to the file that holds your token",
        ),
        (
            503,
            r#"{"detail":"The gateway is stopping"}"#,
            1,
            "The gateway is stopping",
        ),
    ];
    for (status, body, code, sentence) in cases {
        let answers = [("GET /api/gateway/runs/x", status, body)];
        let (got, out, err) = against(&answers, "run show x").await;
        assert_eq!((got, out.as_str()), (code, ""));
        assert_eq!(err, format!("rungate: {sentence}\n"));
    }
}

#[tokio::test]
async fn a_list_is_a_table_for_people_and_one_document_for_programs() {
    const PAGE: &str = r#"{"items":[{"run_id":"r1","status":"waiting",
        "created_at":"2025-11-21T02:00:00.000120+00:00","error":null,
        "job":{"state":"queued","priority":3,"service_type":"llm","attempt":0}}]}"#;
    let answers = [("GET /api/gateway/runs?limit=50", 200, PAGE)];
    let (code, out, _) = against(&answers, "run list").await;
    assert_eq!(code, 0);
    let words = |line: &str| {
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let lines: Vec<Vec<String>> = out.lines().map(words).collect();
    assert_eq!(
        lines[0].join(" "),
        "RUN STATUS PRIORITY SERVICE ATTEMPT CREATED ERROR"
    );
    assert_eq!(lines[1].join(" "), "r1 queued 3 llm 0 2025-11-21 02:00:00");
    let (code, out, _) = against(&answers, "run list --json").await;
    let document: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &document["items"][0]["run_id"]), (0, &"r1".into()));
}

#[tokio::test]
async fn a_rejected_command_is_a_failure_with_its_reason() {
    const REJECTED: &str = r#"{"command_id":"c","run_id":"r","type":"pause","state":"rejected",
        "code":"run_ended","reason":"it has ended"}"#;
    const ACCEPTED: &str = r#"{"accepted":true,"duplicate":false,"seq":7}"#;
    let answers = [
        ("POST /api/gateway/commands", 200, ACCEPTED),
        ("GET /api/gateway/commands/c", 200, REJECTED),
    ];
    let (code, out, _) = against(&answers, "run pause r --command-id c").await;
    assert_eq!(
        (code, out.trim()),
        (1, "pause of run r: rejected: it has ended")
    );
}

#[tokio::test]
async fn a_watch_reconnects_where_it_broke_off_and_fails_with_its_run() {
    static CALLS: AtomicU32 = AtomicU32::new(0);
    async fn stream(request: Request) -> Response {
        let last = request.headers().get("last-event-id").cloned();
        let frame = |n: u32| {
            let data = format!(r#"{{"cursor":{n},"record":{{"effect":{{"type":"e{n}"}}}}}}"#);
            format!("id: {n}\nevent: step\ndata: {data}\n\n")
        };
        let body = match CALLS.fetch_add(1, Ordering::SeqCst) {
            0 => format!("retry: 1\n\n{}id: 2\nevent: st", frame(1)),
            1 => return StatusCode::SERVICE_UNAVAILABLE.into_response(),
            // What was asked first must not count any more.
            _ if last.is_none_or(|id| id != "1") || request.uri().query().is_some() => {
                return StatusCode::BAD_REQUEST.into_response();
            }
            _ => format!("{}{}event: done\ndata: {{}}\n\n", frame(2), frame(3)),
        };
        ([(header::CONTENT_TYPE, "text/event-stream")], body).into_response()
    }
    let router = Router::new()
        .route("/api/gateway/runs/r/ledger/stream", get(stream))
        .route(
            "/api/gateway/runs/r",
            get(async || r#"{"status":"failed","error":"boom"}"#),
        );
    let (code, out, err) = serve(router, "run watch r --json").await;
    let cursor = |line: &str| serde_json::from_str::<Value>(line).unwrap()["cursor"].as_u64();
    let seen: Vec<Option<u64>> = out.lines().map(cursor).collect();
    assert_eq!(seen, [Some(1), Some(2), Some(3)]);
    assert_eq!((code, err.as_str()), (1, "rungate: the run failed: boom\n"));
}
