//! A service that is always healthy and never answers a job, so that a run stays running.

use std::net::SocketAddr;

use axum::Router;
use axum::routing::{get, post};

use crate::Failure;

/// Serves on a free port for as long as the runtime lives.
pub async fn serve() -> Result<SocketAddr, Failure> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let addr = listener.local_addr()?;
    let router = Router::new()
        .route("/health", get(|| async { "{}" }))
        .route("/process", post(std::future::pending::<()>));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(addr)
}
