//! Pulling an image from a registry of the test's own, which lets in only who knows its password.

use std::collections::HashMap;
use std::process::Command;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::engine::{BUSYBOX, Docked, docker, options};

pub const PASSWORD: &str = "s3cret-of-the-registry";
const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// What it has, by digest, and what it was asked without the password.
pub struct Registry {
    blobs: HashMap<String, Vec<u8>>,
    manifest: Vec<u8>,
    refused: Mutex<u32>,
}

fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn shell(command: &str) -> Vec<u8> {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

impl Registry {
    /// Of an image that the engine has.
    pub fn of(image: &str) -> Registry {
        let dir = tempfile::tempdir().unwrap();
        let saved = dir.path().join("image.tar").display().to_string();
        docker(&["save", "-o", &saved, image]);
        let index: serde_json::Value =
            serde_json::from_slice(&shell(&format!("tar -xOf {saved} manifest.json"))).unwrap();
        let config = shell(&format!(
            "tar -xOf {saved} {}",
            index[0]["Config"].as_str().unwrap()
        ));
        let layer = shell(&format!(
            "tar -xOf {saved} {} | gzip -n",
            index[0]["Layers"][0].as_str().unwrap()
        ));
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": "application/vnd.docker.container.image.v1+json", "size": config.len(), "digest": digest(&config)},
            "layers": [{"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", "size": layer.len(), "digest": digest(&layer)}],
        });
        Registry {
            blobs: [(digest(&config), config), (digest(&layer), layer)].into(),
            manifest: serde_json::to_vec(&manifest).unwrap(),
            refused: Mutex::new(0),
        }
    }

    /// Its port on 127.0.0.1.
    pub async fn serve(self: Arc<Self>) -> u16 {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let router = Router::new()
            .route("/v2/", get(root))
            .route("/v2/{*path}", get(object))
            .with_state(self);
        tokio::spawn(async move { axum::serve(listener, router).await });
        port
    }

    fn admits(&self, headers: &HeaderMap) -> bool {
        let wanted = format!("Basic {}", STANDARD.encode(format!("puller:{PASSWORD}")));
        let good = headers
            .get(header::AUTHORIZATION)
            .is_some_and(|value| *value == wanted);
        if !good {
            *self.refused.lock().unwrap() += 1;
        }
        good
    }
}

fn unauthorized() -> Response {
    let challenge = HeaderValue::from_static("Basic realm=\"test\"");
    (
        StatusCode::UNAUTHORIZED,
        [(header::WWW_AUTHENTICATE, challenge)],
    )
        .into_response()
}

async fn root(State(registry): State<Arc<Registry>>, headers: HeaderMap) -> Response {
    match registry.admits(&headers) {
        true => "{}".into_response(),
        false => unauthorized(),
    }
}

async fn object(
    State(registry): State<Arc<Registry>>,
    Path(path): Path<String>,
    headers: HeaderMap,
) -> Response {
    if !registry.admits(&headers) {
        return unauthorized();
    }
    let wanted = path.rsplit('/').next().unwrap();
    if path.contains("/manifests/") {
        let hash = HeaderValue::from_str(&digest(&registry.manifest)).unwrap();
        let kind = HeaderValue::from_static(MANIFEST);
        return (
            [
                (header::CONTENT_TYPE, kind),
                (
                    header::HeaderName::from_static("docker-content-digest"),
                    hash,
                ),
            ],
            registry.manifest.clone(),
        )
            .into_response();
    }
    match registry.blobs.get(wanted) {
        Some(blob) => blob.clone().into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

/// A file that lets in who has the right password.
pub fn credentials(port: u16, password: &str) -> String {
    let pair = STANDARD.encode(format!("puller:{password}"));
    json!({"auths": {format!("127.0.0.1:{port}"): {"auth": pair}}}).to_string()
}

#[tokio::test]
async fn an_allowed_image_is_pulled_with_credentials_and_never_silently() {
    let registry = Arc::new(Registry::of(BUSYBOX));
    let port = registry.clone().serve().await;
    let image = format!("127.0.0.1:{port}/pulled:1");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.json");
    let service = |name: &str| json!({"name": name, "type": name, "image": image, "health_endpoint": "/health", "grace_seconds": 0.5});
    let allowed = options()
        .set("RUNGATE_DOCKER_IMAGES", "127.0.0.1:*/pulled:*")
        .set("RUNGATE_DOCKER_PULL", "true")
        .set("RUNGATE_CRASH_LOOP_DEATHS", "1")
        .set("RUNGATE_DOCKER_CREDENTIALS", &file.display().to_string());
    // With another's password it is refused, and said so.
    std::fs::write(&file, credentials(port, "wrong")).unwrap();
    let gateway = Docked::start(allowed).await;
    gateway.register(service("a")).await;
    let refused = gateway
        .post("/services/a/start", json!({}))
        .await
        .expect(502);
    let detail = refused["detail"].as_str().unwrap();
    assert!(detail.contains("could not be pulled"), "{detail}");
    assert!(*registry.refused.lock().unwrap() > 0);

    std::fs::write(&file, credentials(port, PASSWORD)).unwrap();
    gateway.register(service("b")).await;
    let started = gateway
        .post("/services/b/start", json!({}))
        .await
        .expect(200);
    assert_eq!(started["healthy"], true);
    assert!(
        gateway.log().contains("pulling an image"),
        "{}",
        gateway.log()
    );
    let told = gateway.get("/services/b/logs").await.text;
    assert!(
        told.contains("pulling") && told.contains(&image),
        "its log tells of the pull: {told}"
    );
    // What opens the registry is nowhere to be read.
    for text in [
        gateway.log(),
        told,
        gateway.get("/api/gateway/ledger").await.text,
    ] {
        assert!(!text.contains("s3cret"), "{text}");
    }
    gateway
        .post("/services/b/stop", json!({}))
        .await
        .expect(200);
    gateway.no_containers_are_left().await;
    docker(&["rmi", &image]);
}
