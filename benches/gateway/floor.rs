//! The floor: the gateway's own HTTP listener and a handler that does nothing but insert the request's bytes
//! into a bare redb, in the same group commit and commit mode. What no gateway on this stack can beat.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded};
use redb::{Database, TableDefinition};
use rungate::api::listen::{ListenConfig, serve as listen};
use rungate::ledger::OpenOptions;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::Failure;

/// Where bytes are posted to.
pub const INSERT_PATH: &str = "/insert";
/// As the coordinator has them.
const INBOX: usize = 65_536;
const BATCH: usize = 4_096;

const TABLE: TableDefinition<u64, &[u8]> = TableDefinition::new("bytes");

type Insert = (Bytes, oneshot::Sender<u64>);

/// Serves until its input is closed; writes its address as the one line of its output.
pub fn serve(dir: &Path) -> Result<(), Failure> {
    let database = redb::Builder::new()
        .set_cache_size(OpenOptions::default().cache_bytes)
        .create(dir.join("floor.redb"))?;
    let (sender, receiver) = bounded(INBOX);
    std::thread::spawn(move || {
        if let Err(error) = commit_in_groups(&database, &receiver) {
            eprintln!("the floor ended: {error}");
            std::process::exit(1);
        }
    });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        writeln!(std::io::stdout(), "{}", listener.local_addr()?)?;
        let router = Router::new()
            .route(INSERT_PATH, post(insert))
            .with_state(Arc::new(sender));
        listen(
            listener,
            router,
            ListenConfig::default(),
            CancellationToken::new(),
        )
        .await;
        Ok(())
    })
}

async fn insert(State(sender): State<Arc<Sender<Insert>>>, body: Bytes) -> (StatusCode, String) {
    let (answer, place) = oneshot::channel();
    if sender.try_send((body, answer)).is_err() {
        return (StatusCode::SERVICE_UNAVAILABLE, String::new());
    }
    match place.await {
        Ok(place) => (StatusCode::OK, format!(r#"{{"place":{place}}}"#)),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, String::new()),
    }
}

fn commit_in_groups(database: &Database, receiver: &Receiver<Insert>) -> Result<(), redb::Error> {
    let mut place = 0;
    while let Ok(first) = receiver.recv() {
        let rest = receiver.try_iter().take(BATCH - 1);
        let inserts: Vec<Insert> = std::iter::once(first).chain(rest).collect();
        let mut transaction = database.begin_write()?;
        transaction.set_two_phase_commit(true);
        transaction.set_quick_repair(true);
        let mut table = transaction.open_table(TABLE)?;
        let from = place;
        for (bytes, _) in &inserts {
            place += 1;
            table.insert(place, &bytes[..])?;
        }
        drop(table);
        transaction.commit()?;
        for (index, (_, answer)) in inserts.into_iter().enumerate() {
            // A client that left does not want it any more.
            let _ = answer.send(from + 1 + index as u64);
        }
    }
    Ok(())
}
