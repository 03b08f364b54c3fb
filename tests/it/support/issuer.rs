//! An OpenID Connect issuer inside the test: discovery, a key set that can be rotated, and counts of what it was
//! asked.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};

use super::keys::Key;

#[derive(Default)]
struct Inner {
    url: String,
    keys: Mutex<Vec<Value>>,
    asked: AtomicUsize,
    discovered: AtomicUsize,
    away: AtomicBool,
    lies: AtomicBool,
}

/// It listens until the test ends.
#[derive(Clone)]
pub struct Issuer {
    inner: Arc<Inner>,
}

impl Issuer {
    pub async fn start(keys: &[&Key]) -> Issuer {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr: SocketAddr = listener.local_addr().unwrap();
        let inner = Arc::new(Inner {
            url: format!("http://{addr}"),
            ..Inner::default()
        });
        let issuer = Issuer { inner };
        issuer.publish(keys);
        let router = Router::new()
            .route("/.well-known/openid-configuration", get(discover))
            .route("/keys", get(jwks))
            .with_state(issuer.inner.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        issuer
    }

    pub fn url(&self) -> &str {
        &self.inner.url
    }

    /// Its key set from now on.
    pub fn publish(&self, keys: &[&Key]) {
        let keys = keys.iter().map(|key| key.jwk()).collect();
        *self.inner.keys.lock().unwrap() = keys;
    }

    /// Answers 503 from now on, or no longer.
    pub fn set_away(&self, away: bool) {
        self.inner.away.store(away, Ordering::SeqCst);
    }

    /// Its discovery document is about somebody else from now on.
    pub fn lie(&self) {
        self.inner.lies.store(true, Ordering::SeqCst);
    }

    /// Questions for its keys so far.
    pub fn asked(&self) -> usize {
        self.inner.asked.load(Ordering::SeqCst)
    }

    /// Questions for its discovery document so far.
    pub fn discovered(&self) -> usize {
        self.inner.discovered.load(Ordering::SeqCst)
    }

    /// Claims of a good token for a subject.
    pub fn claims(&self, subject: &str) -> Value {
        let now = jsonwebtoken::get_current_timestamp();
        json!({"iss": self.url(), "aud": "rungate-test", "sub": subject, "iat": now, "exp": now + 600})
    }
}

async fn discover(State(inner): State<Arc<Inner>>) -> Response {
    inner.discovered.fetch_add(1, Ordering::SeqCst);
    if inner.away.load(Ordering::SeqCst) {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let issuer = match inner.lies.load(Ordering::SeqCst) {
        true => "https://elsewhere.example",
        false => &inner.url,
    };
    let document = json!({"issuer": issuer, "jwks_uri": format!("{}/keys", inner.url)});
    axum::Json(document).into_response()
}

async fn jwks(State(inner): State<Arc<Inner>>) -> Response {
    inner.asked.fetch_add(1, Ordering::SeqCst);
    if inner.away.load(Ordering::SeqCst) {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let keys = inner.keys.lock().unwrap().clone();
    axum::Json(json!({ "keys": keys })).into_response()
}
