//! The programs of `docs/examples` at work: the pipeline on a real image, from job to job; and the adapter for ComfyUI.
//! ComfyUI itself is not here: a stand-in of the five routes that the adapter uses answers as ComfyUI's API does
//! (`/system_stats`, `/prompt`, `/queue`, `/history/{id}`, `/interrupt`), and keeps what it was asked.

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use axum::extract::{Path as PathOf, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use crate::clients::example;
use crate::support::wait::until;
use crate::support::{Gateway, Options};
use crate::world::PYTHON;

fn python(script: &str, args: &[&str]) -> String {
    let output = Command::new(&*PYTHON)
        .args(["-c", script])
        .args(args)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).unwrap()
}

/// A process service of one of the examples.
fn service(name: &str, of_type: &str, file: &str, env: Value) -> Value {
    json!({"name": name, "type": of_type, "command": [&*PYTHON, "-u", example(file)], "env": env, "port": 0})
}

/// Writes a PNG of 16 × 12: a two-coloured square on a background that is not quite even. Its rows have all of PNG's
/// filters in turn.
const DRAW: &str = r#"
import struct, sys, zlib
w, h = 16, 12
def pixel(x, y):
    if 5 <= x < 11 and 4 <= y < 8:
        return (180, 60, 40) if x < 8 else (90, 20, 30)
    return (200 + (x + y) % 3, 210, 220 - y % 2)
def paeth(a, b, c):
    p = a + b - c
    return min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
rows = [bytes(v for x in range(w) for v in pixel(x, y)) for y in range(h)]
out, above = b"", bytes(3 * w)
for y, row in enumerate(rows):
    line = bytearray([y % 5])
    for i, v in enumerate(row):
        a, b, c = (row[i-3] if i > 2 else 0), above[i], (above[i-3] if i > 2 else 0)
        line.append((v - (0, a, b, (a + b) // 2, paeth(a, b, c))[y % 5]) & 255)
    out, above = out + line, row
def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
open(sys.argv[1], "wb").write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(out)) + chunk(b"IEND", b""))
"#;

/// The pixels of a PNG whose rows are RGBA without filters, as JSON.
const READ: &str = r#"
import json, struct, sys, zlib
data = open(sys.argv[1], "rb").read()
w, h, depth, colour = struct.unpack(">IIBB", data[16:26])
assert (depth, colour) == (8, 6)
length, = struct.unpack(">I", data[33:37])
raw = zlib.decompress(data[41:41 + length])
rows = [raw[y * (4 * w + 1):(y + 1) * (4 * w + 1)] for y in range(h)]
assert all(row[0] == 0 for row in rows)
print(json.dumps({"width": w, "height": h, "rows": [[list(row[1 + 4 * x:5 + 4 * x]) for x in range(w)] for row in rows]}))
"#;

fn pixels(path: &Path) -> Value {
    serde_json::from_str(&python(READ, &[path.to_str().unwrap()])).unwrap()
}

async fn with_image_services(folder: &Path) -> Gateway {
    let gateway = Gateway::start(Options::default()).await;
    for name in ["background-removal", "upscale", "colour"] {
        let env = json!({"IMAGES": folder});
        gateway
            .register(service(name, name, "image_worker.py", env))
            .await;
    }
    gateway
}

fn pipeline(gateway: &Gateway, args: &[&str]) -> tokio::process::Command {
    let mut command = tokio::process::Command::new(&*PYTHON);
    command
        .arg(example("pipeline.py"))
        .args(args)
        .env("GATEWAY_URL", gateway.url(""))
        .env("GATEWAY_API_TOKEN", gateway.token());
    command
}

#[tokio::test]
async fn the_pipeline_hands_an_image_from_job_to_job() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().canonicalize().unwrap();
    python(DRAW, &[folder.join("photo.png").to_str().unwrap()]);
    let gateway = with_image_services(&folder).await;
    let output = pipeline(&gateway, &["photo.png", "--key", "holiday"])
        .output()
        .await
        .unwrap();
    let followed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{followed}\n{}", gateway.log());
    assert!(followed.matches("job_completed").count() == 3, "{followed}");
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        result,
        json!({"image": "holiday-3.png", "width": 32, "height": 24})
    );

    // All but the square is gone, whatever its exact shade.
    let cut = pixels(&folder.join("holiday-1.png"));
    let opaque = |image: &Value| -> Vec<Value> {
        let rows = image["rows"].as_array().unwrap().iter();
        let all = rows.flat_map(|row| row.as_array().unwrap().clone());
        all.filter(|pixel| pixel[3] == 255).collect()
    };
    assert_eq!(opaque(&cut).len(), 6 * 4);
    assert_eq!(cut["rows"][4][5], json!([180, 60, 40, 255]));
    assert_eq!(cut["rows"][7][10], json!([90, 20, 30, 255]));
    // Four pixels for one; at the edge half transparent, without a trace of the background's colour.
    let large = pixels(&folder.join("holiday-2.png"));
    assert_eq!(large["rows"][0][0][3], 0);
    assert_eq!(large["rows"][10][12], json!([180, 60, 40, 255]));
    let edge = &large["rows"][10][9];
    assert_eq!(edge, &json!([180, 60, 40, 64]));
    // The darkest and the brightest value of each channel are at the ends of its range.
    let corrected = opaque(&pixels(&folder.join("holiday-3.png")));
    for channel in 0..3 {
        let values = corrected
            .iter()
            .map(|pixel| pixel[channel].as_u64().unwrap());
        let values: Vec<u64> = values.collect();
        assert!(
            values.contains(&255) && values.contains(&0),
            "{channel}: {values:?}"
        );
    }
    // The same key is the same pipeline: nothing is done again.
    let before = gateway.get("/api/gateway/runs?limit=50").await.expect(200);
    let again = pipeline(&gateway, &["photo.png", "--key", "holiday"])
        .output()
        .await
        .unwrap();
    assert_eq!(
        serde_json::from_slice::<Value>(&again.stdout).unwrap(),
        result
    );
    let after = gateway.get("/api/gateway/runs?limit=50").await.expect(200);
    assert_eq!(before["items"].as_array().unwrap().len(), 3);
    assert_eq!(after["items"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn the_pipeline_ends_with_the_reason_of_the_job_that_failed() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().canonicalize().unwrap();
    std::fs::write(folder.join("photo.png"), "no image at all").unwrap();
    std::fs::write(dir.path().parent().unwrap().join("outside.png"), "").unwrap();
    let gateway = with_image_services(&folder).await;
    for (name, reason) in [
        ("photo.png", "it is no PNG"),
        ("../outside.png", "must be the name of a .png file"),
        ("none.png", "No such file"),
    ] {
        let body = json!({"service_type": "upscale", "max_attempts": 1, "payload": {"image": name, "output": "o.png"}});
        let run = gateway.start_job(body).await;
        let ended = gateway.run_becomes(&run, "failed").await;
        assert!(ended["error"].to_string().contains(reason), "{ended}");
    }
}

/// What the stand-in was asked, and how far its one prompt is.
#[derive(Default)]
struct Comfy {
    prompts: Vec<Value>,
    interrupted: Vec<Value>,
    /// Questions for the history until the prompt has ended.
    left: u32,
}

type Shared = Arc<Mutex<Comfy>>;

/// A stand-in of ComfyUI's API.
async fn comfyui() -> (String, Shared) {
    let comfy = Shared::default();
    let router = Router::new()
        .route(
            "/system_stats",
            get(|| async { Json(json!({"system": {}})) }),
        )
        .route("/prompt", post(prompt))
        .route("/queue", get(queue).post(|| async { StatusCode::OK }))
        .route("/history/{id}", get(history))
        .route("/interrupt", post(interrupt))
        .with_state(comfy.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    (url, comfy)
}

async fn prompt(State(comfy): State<Shared>, Json(asked): Json<Value>) -> Response {
    if asked["prompt"].get("9").is_none() {
        let problem = json!({"error": {"message": "Prompt outputs failed validation"},
            "node_errors": {"3": {"errors": [{"message": "Value not in list", "details": "ckpt_name"}]}}});
        return (StatusCode::BAD_REQUEST, Json(problem)).into_response();
    }
    let mut comfy = comfy.lock().unwrap();
    comfy.prompts.push(asked);
    comfy.left = 3;
    Json(json!({"prompt_id": "p1", "number": 1, "node_errors": {}})).into_response()
}

async fn queue(State(comfy): State<Shared>) -> Json<Value> {
    let comfy = comfy.lock().unwrap();
    let running = comfy
        .prompts
        .last()
        .filter(|_| comfy.left > 0 && comfy.interrupted.is_empty());
    let item =
        |asked: &Value| json!([1, "p1", asked["prompt"], {"client_id": asked["client_id"]}, ["9"]]);
    let running: Vec<Value> = running.map(item).into_iter().collect();
    Json(json!({"queue_running": running, "queue_pending": []}))
}

async fn history(State(comfy): State<Shared>, PathOf(id): PathOf<String>) -> Json<Value> {
    let mut comfy = comfy.lock().unwrap();
    let workflow = comfy.prompts.last().unwrap()["prompt"].clone();
    if workflow["9"]["inputs"]["endless"] == true {
        return Json(json!({}));
    }
    comfy.left = comfy.left.saturating_sub(1);
    if comfy.left > 0 {
        return Json(json!({}));
    }
    if workflow["9"]["inputs"]["explodes"] == true {
        let message =
            json!(["execution_error", {"exception_message": "out of memory\n", "node_id": "9"}]);
        return Json(
            json!({ id: {"outputs": {}, "status": {"status_str": "error", "completed": false, "messages": [message]}}}),
        );
    }
    let image = json!({"filename": "ComfyUI_00001_.png", "subfolder": "", "type": "output"});
    Json(
        json!({ id: {"outputs": {"9": {"images": [image]}}, "status": {"status_str": "success", "completed": true, "messages": []}}}),
    )
}

async fn interrupt(State(comfy): State<Shared>, Json(asked): Json<Value>) {
    comfy.lock().unwrap().interrupted.push(asked);
}

fn workflow(inputs: Value) -> Value {
    json!({"service_type": "image-generation", "max_attempts": 1,
        "payload": {"workflow": {"9": {"class_type": "SaveImage", "inputs": inputs}}}})
}

async fn with_adapter() -> (Gateway, String, Shared) {
    let (url, comfy) = comfyui().await;
    let gateway = Gateway::start(Options::default()).await;
    let env = json!({"COMFYUI_URL": url, "POLL_S": "0.05"});
    let mut adapter = service("comfyui", "image-generation", "comfyui_adapter.py", env);
    adapter["cancel_path"] = "/cancel".into();
    gateway.register(adapter).await;
    (gateway, url, comfy)
}

#[tokio::test]
async fn the_comfyui_adapter_follows_a_workflow_to_its_images() {
    let (gateway, url, comfy) = with_adapter().await;
    let run = gateway.start_job(workflow(json!({"seed": 7}))).await;
    let ended = gateway.run_becomes(&run, "completed").await;
    let image = &ended["output"]["images"][0];
    assert_eq!(image["node"], "9");
    assert_eq!(image["filename"], "ComfyUI_00001_.png");
    assert_eq!(
        image["url"],
        format!("{url}/view?filename=ComfyUI_00001_.png&subfolder=&type=output")
    );
    let asked = comfy.lock().unwrap().prompts[0].clone();
    assert_eq!(asked["client_id"], *run);
    assert_eq!(asked["prompt"]["9"]["inputs"]["seed"], 7);
    let progress = gateway.recorded(&run, "job_progressed").await;
    assert_eq!(
        progress["effect"]["payload"]["progress"]["state"],
        "running"
    );
}

#[tokio::test]
async fn the_comfyui_adapter_says_why_a_workflow_failed() {
    let (gateway, _, _comfy) = with_adapter().await;
    let run = gateway.start_job(workflow(json!({"explodes": true}))).await;
    let ended = gateway.run_becomes(&run, "failed").await;
    assert!(
        ended["error"].to_string().contains("out of memory"),
        "{ended}"
    );
    let mut unsound = workflow(json!({}));
    unsound["payload"]["workflow"] =
        json!({"3": {"class_type": "CheckpointLoaderSimple", "inputs": {}}});
    let run = gateway.start_job(unsound).await;
    let ended = gateway.run_becomes(&run, "failed").await;
    let error = ended["error"].to_string();
    assert!(
        error.contains("node 3: Value not in list ckpt_name"),
        "{error}"
    );
    let mut empty = workflow(json!({}));
    empty["payload"] = json!({"prompt": "a cat"});
    let run = gateway.start_job(empty).await;
    let ended = gateway.run_becomes(&run, "failed").await;
    assert!(
        ended["error"].to_string().contains("needs a 'workflow'"),
        "{ended}"
    );
}

#[tokio::test]
async fn a_cancelled_run_interrupts_comfyui() {
    let (gateway, _, comfy) = with_adapter().await;
    let run = gateway.start_job(workflow(json!({"endless": true}))).await;
    gateway.recorded(&run, "job_progressed").await;
    gateway.command("stop", &run, "cancel", json!({})).await;
    gateway.run_becomes(&run, "cancelled").await;
    until("it is interrupted", || async {
        !comfy.lock().unwrap().interrupted.is_empty()
    })
    .await;
    assert_eq!(
        comfy.lock().unwrap().interrupted,
        [json!({"prompt_id": "p1"})]
    );
    let stopped = gateway.recorded(&run, "job_stopped").await;
    assert_eq!(stopped["effect"]["payload"]["confirmed"], true);
}
