//! What `rungate doctor` tells of the container engine, and of this gateway's containers.

use serde_json::Value;

use super::super::Context;
use super::super::error::{CliError, Exit};
use super::super::output::{holder, table, text};
use super::Finding;
use crate::config::Config;
use crate::server::probe_engine;

/// Whether it answers. Who has no images allowed is taken to need none.
pub(super) async fn finding(config: &Config) -> Finding {
    let (host, engine) = probe_engine(config).await;
    let check = "engine";
    if engine.up {
        return Finding::ok(check, format!("the container engine at {host} answers"));
    }
    let why = engine.why_down().to_owned();
    match config.docker_images.is_empty() {
        true => Finding::ok(check, format!("{why}; services in containers need one")),
        false => Finding::warning(check, why, "start it, or set docker_host = \"none\""),
    }
}

/// Lists the containers that the running gateway has, and which of them are orphans; changes nothing.
pub(super) async fn containers(context: &Context) -> Result<Exit, CliError> {
    let answer = context.client()?.get("api/gateway/containers", &[]).await?;
    context.out.show(&answer, words)?;
    Ok(Exit::Success)
}

fn words(answer: &Value) -> String {
    let containers: Vec<&Value> = answer["containers"]
        .as_array()
        .into_iter()
        .flatten()
        .collect();
    if answer["engine"]["up"] == Value::Bool(false) {
        return text(&answer["engine"], "error");
    }
    if containers.is_empty() {
        return "no container of this gateway".to_owned();
    }
    let row = |container: &&Value| {
        let id: String = text(container, "id").chars().take(12).collect();
        let verdict = match container["orphan"] == Value::Bool(true) {
            true => "orphan: will be removed",
            false => "in use",
        };
        vec![
            id,
            text(container, "name"),
            holder(container),
            text(container, "state"),
            verdict.to_owned(),
        ]
    };
    let rows = containers.iter().map(row).collect();
    table(&["ID", "NAME", "SERVICE", "STATE", ""], rows)
}
