//! The demo on a terminal: a bar for the GPU, one for the queue, one for each run. Elsewhere: a line
//! for each event.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::board::{Board, Row};
use crate::cli::error::CliError;
use crate::cli::output::Out;

/// MiB of the demo's only GPU.
const GPU_MIB: u64 = 24 << 10;

pub struct Screen {
    out: Out,
    live: Option<Live>,
}

struct Live {
    all: MultiProgress,
    gpu: ProgressBar,
    queue: ProgressBar,
    runs: Vec<ProgressBar>,
}

impl Screen {
    pub fn new(out: Out) -> Self {
        let live = out.is_live().then(Live::new);
        Self { out, live }
    }

    /// Shows the board; `line` is what has just happened.
    ///
    /// # Errors
    /// As `Out::line`.
    pub fn show(&mut self, board: &Board, line: Option<&str>) -> Result<(), CliError> {
        match (&mut self.live, line) {
            (Some(live), _) => live.show(board),
            (None, Some(line)) if !self.out.json => self.out.line(line)?,
            (None, _) => {}
        }
        Ok(())
    }

    /// Leaves the last picture standing.
    pub fn finish(&mut self) {
        if let Some(live) = &self.live {
            for bar in live.runs.iter().chain([&live.gpu, &live.queue]) {
                bar.abandon();
            }
        }
    }
}

impl Live {
    fn new() -> Self {
        let all = MultiProgress::new();
        let gpu = all.add(ProgressBar::new(GPU_MIB));
        gpu.set_style(style("GPU          {bar:30.yellow} {msg}"));
        let queue = all.add(ProgressBar::new(0));
        queue.set_style(style("queue        {msg}"));
        Self {
            all,
            gpu,
            queue,
            runs: Vec::new(),
        }
    }

    fn show(&mut self, board: &Board) {
        let loaded: Vec<String> = board
            .services
            .iter()
            .filter(|(_, phase)| !matches!(**phase, "stopped" | "exited"))
            .map(|(service, phase)| format!("{service} {phase}"))
            .collect();
        let reserved = board.reserved_mib();
        self.gpu.set_position(reserved);
        self.gpu.set_message(format!(
            "{} of {} GiB reserved  {}",
            reserved >> 10,
            GPU_MIB >> 10,
            loaded.join(", ")
        ));
        self.queue.set_message(format!(
            "{} waiting, {} running, {} done",
            board.count(&["queued", "preempted", "backoff"]),
            board.count(&["running", "stopping"]),
            board.ended()
        ));
        for (index, (_, row)) in board.rows.iter().enumerate() {
            let bar = match self.runs.get(index) {
                Some(bar) => bar.clone(),
                None => self.add(row),
            };
            // Between 0 and 100: the cast only drops the fraction.
            bar.set_position(row.percent.clamp(0.0, 100.0) as u64);
            bar.set_message(row.state);
        }
    }

    fn add(&mut self, row: &Row) -> ProgressBar {
        let bar = self.all.add(ProgressBar::new(100));
        bar.set_style(style("{prefix:<12} {bar:30.cyan} {pos:>3} %  {msg}"));
        bar.set_prefix(format!("{} P{}", row.name, row.priority));
        self.runs.push(bar.clone());
        bar
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
