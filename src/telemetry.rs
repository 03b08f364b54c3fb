//! Logs and metrics: how they are set up, and the names of the metrics that the HTTP side reports.
//! Each part records its own; what is counted here is described here once.

use std::sync::OnceLock;
use std::time::Duration;

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people, on standard error.
    #[default]
    Text,
    /// One JSON object a line, on standard error.
    Json,
}

/// Starts logging to standard error. `filter` is a `tracing` directive such as `info,rungate=debug`; one that
/// does not parse is replaced by `info`. A second call in one process changes nothing.
pub fn init_logging(filter: &str, format: LogFormat) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // It fails only when a subscriber is there already, as in tests: that one stays.
    let _ = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}

/// Upper bounds of durations in seconds: a commit takes about a millisecond, a start-up two minutes.
const SECONDS_BUCKETS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0, 60.0, 120.0,
];

/// Upper bounds of the number of records in a batch.
const RECORDS_BUCKETS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0,
];

/// How often the recorder folds what it was told into its histograms.
const UPKEEP_PERIOD: Duration = Duration::from_secs(5);

/// The process's one metrics recorder.
#[derive(Clone)]
pub struct Metrics {
    handle: PrometheusHandle,
}

impl Metrics {
    /// Installs the recorder at the first call; later ones get the same.
    pub fn install() -> Metrics {
        static INSTALLED: OnceLock<Metrics> = OnceLock::new();
        INSTALLED
            .get_or_init(|| {
                let recorder = builder().build_recorder();
                let handle = recorder.handle();
                // It fails only when another recorder is there already: ours then stays silent.
                if metrics::set_global_recorder(recorder).is_err() {
                    tracing::warn!("another metrics recorder is installed; /metrics stays empty");
                }
                describe();
                gauge!("rungate_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
                Metrics { handle }
            })
            .clone()
    }

    /// All metrics in Prometheus' text format.
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Keeps the recorder's memory bounded while nobody scrapes. Runs until dropped.
    pub async fn keep_up(self) {
        let mut every = tokio::time::interval(UPKEEP_PERIOD);
        loop {
            every.tick().await;
            self.handle.run_upkeep();
        }
    }
}

fn builder() -> PrometheusBuilder {
    let suffix = |text: &str| Matcher::Suffix(text.to_owned());
    PrometheusBuilder::new()
        .set_buckets_for_metric(suffix("_seconds"), SECONDS_BUCKETS)
        .and_then(|b| b.set_buckets_for_metric(suffix("_records"), RECORDS_BUCKETS))
        .expect("the bucket lists above are not empty")
}

fn describe() {
    describe_gauge!("rungate_build_info", "Always 1; the version is a label");
    describe_gauge!("rungate_queue_depth", "Job runs that wait");
    describe_gauge!("rungate_runs", "Runs by status");
    describe_gauge!("rungate_live_runs", "Runs that have not ended");
    describe_histogram!(
        "rungate_ledger_commit_seconds",
        Unit::Seconds,
        "One durable commit"
    );
    describe_histogram!("rungate_ledger_batch_records", "Records in one commit");
    describe_gauge!(
        "rungate_disk_free_bytes",
        Unit::Bytes,
        "Free space of the ledger's disk"
    );
    describe_gauge!("rungate_ledger_followers", "Open streams of the ledger");
    describe_gauge!(
        "rungate_ledger_seq",
        "Last committed position of the ledger"
    );
    describe_histogram!(
        "rungate_dispatch_seconds",
        Unit::Seconds,
        "From the committed decision to the call of the service"
    );
    describe_histogram!(
        "rungate_call_seconds",
        Unit::Seconds,
        "Calls of services by outcome"
    );
    describe_gpus();
    describe_histogram!(
        "rungate_http_request_seconds",
        Unit::Seconds,
        "From request to answer"
    );
    describe_counter!(
        "rungate_slow_hashes_total",
        "Slow hashes computed: of passwords and of imported tokens"
    );
    describe_counter!(
        "rungate_logins_total",
        "Logins with a browser, by outcome: right, wrong, throttled"
    );
    describe_counter!(
        "rungate_http_requests_total",
        "Requests by route, method and status"
    );
    describe_gauge!("rungate_http_connections", "Open connections");
    describe_counter!(
        "rungate_sso_key_fetches_total",
        "Fetches of the single sign-on issuer's keys by result"
    );
    describe_counter!(
        "rungate_audit_lost_total",
        "Refused writes that could not be recorded"
    );
}

fn describe_gpus() {
    describe_gauge!(
        "rungate_gpu_reserved_bytes",
        Unit::Bytes,
        "GPU memory reserved for instances"
    );
    describe_gauge!(
        "rungate_gpu_used_bytes",
        Unit::Bytes,
        "GPU memory in use, ours and others'"
    );
    describe_gauge!(
        "rungate_gpu_memory_bytes",
        Unit::Bytes,
        "GPU memory there is"
    );
    describe_gauge!(
        "rungate_gpu_foreign_bytes",
        Unit::Bytes,
        "GPU memory in use by what is none of ours"
    );
    describe_gauge!("rungate_gpu_present", "Whether the GPU is there");
    describe_gauge!(
        "rungate_gpu_quarantined",
        "Whether the GPU gets no new instances"
    );
    describe_gauge!(
        "rungate_gpu_utilization_percent",
        Unit::Percent,
        "How busy the GPU is"
    );
    describe_gauge!("rungate_gpu_temperature_celsius", "How warm the GPU is");
    describe_gauge!("rungate_gpu_power_watts", "What power the GPU draws");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_show_the_build() {
        let text = Metrics::install().render();
        assert!(text.contains("rungate_build_info{version="), "{text}");
    }
}
