//! What was measured, beside its floor and its bar: as a table for people and as JSON for programs.

use std::fmt::Write as _;

use serde::Serialize;

/// What a figure must meet. `…Ratio` bars are on the figure divided by its floor.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bar {
    AtLeast(f64),
    AtMost(f64),
    AtLeastRatio(f64),
    AtMostRatio(f64),
    /// Shown for information.
    None,
}

/// One measured number.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    pub group: &'static str,
    pub name: String,
    pub unit: &'static str,
    /// The median over the rounds.
    pub value: f64,
    /// The least and the most of the rounds.
    pub spread: (f64, f64),
    /// The same, measured on the floor in the same run.
    pub floor: Option<f64>,
    pub ratio: Option<f64>,
    pub bar: Bar,
    /// `None` without a bar.
    pub pass: Option<bool>,
}

impl Figure {
    /// A figure from its rounds.
    pub fn of(
        group: &'static str,
        name: impl Into<String>,
        unit: &'static str,
        rounds: &[f64],
    ) -> Figure {
        let least = rounds.iter().copied().fold(f64::INFINITY, f64::min);
        let most = rounds.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Figure {
            group,
            name: name.into(),
            unit,
            value: median(rounds),
            spread: (least, most),
            floor: None,
            ratio: None,
            bar: Bar::None,
            pass: None,
        }
    }

    /// With the floor's rounds. The ratio is the median of the rounds' ratios: a round of the floor and one
    /// of the figure are neighbours in time and share the machine's mood.
    pub fn floor(mut self, rounds: &[f64], floors: &[f64]) -> Figure {
        let ratios: Vec<f64> = rounds.iter().zip(floors).map(|(a, b)| a / b).collect();
        self.floor = Some(median(floors));
        self.ratio = Some(median(&ratios));
        self
    }

    /// With what it must meet.
    pub fn bar(mut self, bar: Bar) -> Figure {
        self.bar = bar;
        self.pass = match (bar, self.ratio) {
            (Bar::AtLeast(least), _) => Some(self.value >= least),
            (Bar::AtMost(most), _) => Some(self.value <= most),
            (Bar::AtLeastRatio(least), Some(ratio)) => Some(ratio >= least),
            (Bar::AtMostRatio(most), Some(ratio)) => Some(ratio <= most),
            _ => None,
        };
        self
    }
}

/// The middle one, or the mean of the two in the middle.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// The value below which the share `p` of the sorted samples lies (nearest rank).
pub fn percentile(samples: &mut [f64], p: f64) -> f64 {
    if samples.is_empty() {
        return f64::NAN;
    }
    samples.sort_by(f64::total_cmp);
    let rank = (p * samples.len() as f64).ceil() as usize;
    samples[rank.clamp(1, samples.len()) - 1]
}

/// A whole run of the benchmark.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Sizes were scaled down.
    pub quick: bool,
    pub machine: Machine,
    pub figures: Vec<Figure>,
    /// What was made smaller, left out, or should be known when reading the figures.
    pub notes: Vec<String>,
    pub took_s: f64,
}

/// What it ran on.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub kernel: String,
    /// Median of a 4 KiB write and its `fdatasync`, in µs.
    pub fdatasync_us: f64,
    /// Others' share of the processors before the first round, 0 to 1.
    pub busy: f64,
}

impl Report {
    /// Whether every figure with a bar meets it.
    pub fn passed(&self) -> bool {
        self.figures.iter().all(|figure| figure.pass != Some(false))
    }

    /// The table.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let m = &self.machine;
        let _ = writeln!(
            out,
            "{} × {}, Linux {}, fdatasync {:.0} µs, {:.0} % busy with other work at the start{}",
            m.cores,
            m.cpu,
            m.kernel,
            m.fdatasync_us,
            m.busy * 100.0,
            if self.quick {
                "; QUICK: sizes scaled down"
            } else {
                ""
            }
        );
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        table.set_header([
            "figure",
            "median",
            "least … most",
            "unit",
            "floor",
            "ratio",
            "bar",
            "",
        ]);
        let mut group = "";
        for figure in &self.figures {
            if figure.group != group {
                group = figure.group;
                table.add_row([format!("── {group}")]);
            }
            table.add_row(row(figure));
        }
        for index in [1, 4, 5] {
            if let Some(column) = table.column_mut(index) {
                column.set_cell_alignment(comfy_table::CellAlignment::Right);
            }
        }
        let _ = writeln!(out, "{table}");
        for note in &self.notes {
            let _ = writeln!(out, "· {note}");
        }
        let _ = writeln!(out, "took {:.0} s", self.took_s);
        out
    }
}

fn row(figure: &Figure) -> [String; 8] {
    let bar = match figure.bar {
        Bar::AtLeast(x) => format!("≥ {}", number(x)),
        Bar::AtMost(x) => format!("≤ {}", number(x)),
        Bar::AtLeastRatio(x) => format!("≥ {x} × floor"),
        Bar::AtMostRatio(x) => format!("≤ {x} × floor"),
        Bar::None => String::new(),
    };
    let verdict = match figure.pass {
        Some(true) => "pass",
        Some(false) => "FAIL",
        None => "",
    };
    [
        figure.name.clone(),
        number(figure.value),
        format!("{} … {}", number(figure.spread.0), number(figure.spread.1)),
        figure.unit.to_owned(),
        figure.floor.map(number).unwrap_or_default(),
        figure.ratio.map(|r| format!("{r:.2}")).unwrap_or_default(),
        bar,
        verdict.to_owned(),
    ]
}

/// Three significant digits, thousands grouped.
fn number(value: f64) -> String {
    if !value.is_finite() {
        return "–".to_owned();
    }
    if value.abs() < 100.0 {
        let digits = if value.abs() < 10.0 { 2 } else { 1 };
        return format!("{value:.digits$}");
    }
    let whole = format!("{value:.0}");
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 {
            grouped.push(' ');
        }
        grouped.push(digit);
    }
    grouped
}
