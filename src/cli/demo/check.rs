//! The demo's verdict: what was submitted against what the ledger says and what the texts hold.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::jobs::{Job, Plan};
use crate::cli::client::Client;
use crate::cli::error::CliError;
use crate::cli::output::text;
use crate::cli::watch;
use crate::worker::scan_all;

/// Records asked for in one page.
const PAGE: u64 = 1_000;

/// What was found.
#[derive(Debug, Default, Serialize)]
pub struct Outcome {
    pub submitted: usize,
    pub completed: usize,
    pub preempted: usize,
    /// Completed runs that went on from a checkpoint.
    pub resumed: usize,
    pub checkpoints: usize,
    pub records: usize,
    /// Sentences; empty when all is well.
    pub faults: Vec<String>,
}

/// What the ledger says of one run.
#[derive(Debug, Default)]
struct Told {
    queued: usize,
    completed: usize,
    preempted: usize,
    bad_ends: usize,
    output: Option<Value>,
}

/// Reads the whole ledger and judges; `names` maps run ids to the jobs' names.
///
/// # Errors
/// The gateway does not answer. What is wrong with the runs is in `faults`.
pub async fn check(
    client: &Client,
    plan: &Plan,
    names: &BTreeMap<String, String>,
) -> Result<Outcome, CliError> {
    let records = read_all(client).await?;
    let mut outcome = Outcome {
        submitted: plan.jobs.len(),
        records: records.len(),
        ..Outcome::default()
    };
    let told = sort(&records, names, &mut outcome);
    for job in &plan.jobs {
        judge(job, told.get(&job.name), &mut outcome);
    }
    if outcome.preempted == 0 {
        outcome
            .faults
            .push("the urgent job preempted nothing".to_owned());
    }
    match client.get("api/gateway/ledger/verify", &[]).await {
        Ok(answer) if answer.get("ok") != Some(&Value::Bool(false)) => {}
        Ok(answer) => outcome
            .faults
            .push(format!("the ledger is damaged: {answer}")),
        Err(error) => outcome
            .faults
            .push(format!("the ledger was not verified: {error}")),
    }
    Ok(outcome)
}

async fn read_all(client: &Client) -> Result<Vec<Value>, CliError> {
    let mut records: Vec<Value> = Vec::new();
    loop {
        let after = records
            .last()
            .and_then(|record| record.get("seq"))
            .and_then(Value::as_u64)
            .unwrap_or(0);
        let query = [
            ("after_seq", after.to_string()),
            ("limit", PAGE.to_string()),
        ];
        let mut page = client.get("api/gateway/ledger", &query).await?;
        match page.get_mut("items").map(Value::take) {
            Some(Value::Array(items)) if items.is_empty() => return Ok(records),
            Some(Value::Array(items)) => records.extend(items),
            _ => return Err(CliError::Answer("it has no items".to_owned())),
        }
    }
}

fn sort(
    records: &[Value],
    names: &BTreeMap<String, String>,
    outcome: &mut Outcome,
) -> BTreeMap<String, Told> {
    let mut told: BTreeMap<String, Told> = BTreeMap::new();
    for record in records {
        let kind = watch::kind(record);
        outcome.checkpoints += usize::from(kind == "checkpoint_saved");
        let run = text(record, "run_id");
        if run.is_empty() {
            continue;
        }
        let Some(name) = names.get(&run) else {
            outcome
                .faults
                .push(format!("run {run} is in the ledger and was not submitted"));
            continue;
        };
        let told = told.entry(name.clone()).or_default();
        match kind.as_str() {
            "job_queued" => told.queued += 1,
            "job_preempted" => told.preempted += 1,
            "job_failed" | "job_cancelled" => told.bad_ends += 1,
            "job_completed" => {
                told.completed += 1;
                told.output = record
                    .get("result")
                    .map(|result| match result.get("output") {
                        Some(output) => output.clone(),
                        None => result.clone(),
                    });
            }
            _ => {}
        }
    }
    told
}

fn judge(job: &Job, told: Option<&Told>, outcome: &mut Outcome) {
    let name = &job.name;
    let Some(told) = told else {
        outcome.faults.push(format!("{name} was lost"));
        return;
    };
    let mut fault = |text: String| outcome.faults.push(format!("{name} {text}"));
    if told.queued != 1 {
        fault(format!("was queued {} times", told.queued));
    }
    if told.completed != 1 || told.bad_ends != 0 {
        fault(format!(
            "completed {} times, failed {} times",
            told.completed, told.bad_ends
        ));
    }
    let output = told.output.as_ref();
    let expected = scan_all(&job.files)
        .ok()
        .and_then(|r| serde_json::to_value(r).ok());
    if output.and_then(|output| output.get("statistics")) != expected.as_ref() {
        fault("counted other than a direct computation does".to_owned());
    }
    let resumed_at = output.and_then(|output| output.get("resumed_at_bytes"));
    outcome.completed += usize::from(told.completed == 1);
    outcome.preempted += told.preempted;
    outcome.resumed += usize::from(resumed_at.and_then(Value::as_u64) > Some(0));
}

impl Outcome {
    /// For people.
    pub fn words(&self, elapsed_ms: u64) -> String {
        let seconds = elapsed_ms as f64 / 1_000.0;
        let mut lines = vec![
            String::new(),
            format!(
                "{} jobs submitted, {} completed in {seconds:.1} s",
                self.submitted, self.completed
            ),
            format!(
                "{} preempted for the urgent one, {} resumed from a checkpoint ({} saved)",
                self.preempted, self.resumed, self.checkpoints
            ),
        ];
        if self.faults.is_empty() {
            lines.push(
                "every result equals a direct computation; nothing was lost or done twice"
                    .to_owned(),
            );
            lines.push(format!(
                "ledger: {} records, hash chain verified",
                self.records
            ));
        }
        lines.extend(self.faults.iter().map(|fault| format!("FAULT: {fault}")));
        lines.join("\n")
    }
}
