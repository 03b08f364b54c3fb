//! The house rules that no compiler checks: who may use whom, how long a file may be, that each says what
//! it is for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Longest file.
const MAX_LINES: usize = 1_000;

/// Who may use whom (docs/architecture.md). A module that is missing here fails the test, so that nobody
/// adds one without saying where it stands.
const ARROWS: &[(&str, &[&str])] = &[
    ("domain", &[]),
    ("causes", &[]),
    ("clock", &["domain"]),
    ("glob", &[]),
    ("hex", &[]),
    ("private_file", &[]),
    ("random", &[]),
    ("ledger", &["domain", "hex"]),
    ("outbound", &[]),
    ("driver", &["causes", "clock", "domain", "glob", "outbound"]),
    ("gpu", &["clock", "domain"]),
    ("coordinator", &["clock", "domain", "ledger"]),
    (
        "executor",
        &[
            "clock",
            "domain",
            "driver",
            "gpu",
            "outbound",
            "private_file",
            "random",
        ],
    ),
    (
        "auth",
        &[
            "causes",
            "domain",
            "hex",
            "outbound",
            "private_file",
            "random",
        ],
    ),
    ("telemetry", &[]),
    (
        "api",
        &[
            "auth",
            "clock",
            "coordinator",
            "domain",
            "driver",
            "glob",
            "gpu",
            "ledger",
            "outbound",
            "telemetry",
        ],
    ),
    ("config", &["domain", "gpu", "outbound"]),
    ("worker", &[]),
    (
        "server",
        &[
            "api",
            "auth",
            "clock",
            "config",
            "coordinator",
            "domain",
            "driver",
            "executor",
            "gpu",
            "ledger",
            "outbound",
            "private_file",
            "telemetry",
        ],
    ),
    (
        "cli",
        &[
            "config",
            "domain",
            "gpu",
            "ledger",
            "server",
            "telemetry",
            "worker",
        ],
    ),
    ("main", &["cli"]),
    ("lib", &[]),
];

fn source_files(below: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(below).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(source_files(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The top module a source file belongs to.
fn module_of(path: &Path) -> String {
    let inside = path.strip_prefix(root().join("src")).unwrap();
    let first = inside
        .components()
        .next()
        .unwrap()
        .as_os_str()
        .to_string_lossy()
        .into_owned();
    first.trim_end_matches(".rs").to_owned()
}

/// Every `crate::name` in the code, comments left out.
fn used_modules(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        for part in code.split("crate::").skip(1) {
            let name: String = part
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect();
            found.push((number + 1, name));
        }
    }
    found
}

#[test]
fn modules_use_only_what_they_may() {
    let arrows: BTreeMap<_, _> = ARROWS.iter().copied().collect();
    let mut wrong = Vec::new();
    for path in source_files(&root().join("src")) {
        let from = module_of(&path);
        let Some(allowed) = arrows.get(from.as_str()) else {
            wrong.push(format!(
                "{}: module '{from}' has no line in ARROWS",
                path.display()
            ));
            continue;
        };
        for (line, to) in used_modules(&std::fs::read_to_string(&path).unwrap()) {
            let is_module = arrows.contains_key(to.as_str());
            if is_module && to != from && !allowed.contains(&to.as_str()) {
                wrong.push(format!(
                    "{}:{line}: {from} must not use {to}",
                    path.display()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_are_short_and_say_what_they_are_for() {
    let mut wrong = Vec::new();
    for folder in ["src", "tests", "benches"] {
        for path in source_files(&root().join(folder)) {
            let text = std::fs::read_to_string(&path).unwrap();
            let lines = text.lines().count();
            if lines > MAX_LINES {
                wrong.push(format!(
                    "{}: {lines} lines, at most {MAX_LINES}",
                    path.display()
                ));
            }
            if !text.starts_with("//!") {
                wrong.push(format!("{}: does not open with //!", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What strangers and operators may make the gateway call is checked in one place. The command line and the example
/// worker are clients of a gateway themselves.
#[test]
fn every_call_that_leaves_the_gateway_goes_through_outbound() {
    let clients = ["outbound", "cli", "worker"];
    let mut wrong = Vec::new();
    for path in source_files(&root().join("src")) {
        let text = std::fs::read_to_string(&path).unwrap();
        let makes_one = text.contains("reqwest::Client") || text.contains("reqwest::get");
        if makes_one && !clients.contains(&module_of(&path).as_str()) {
            wrong.push(path.display().to_string());
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Crates by name, with the versions that a lock file has.
fn locked(file: &str) -> BTreeMap<String, Vec<String>> {
    let text = std::fs::read_to_string(root().join(file)).unwrap();
    let value = |line: &str| line.split('"').nth(1).map(str::to_owned);
    let (mut crates, mut name) = (BTreeMap::<_, Vec<_>>::new(), None);
    for line in text.lines() {
        if line.starts_with("name = ") {
            name = value(line);
        } else if line.starts_with("version = ")
            && let (Some(name), Some(version)) = (name.take(), value(line))
        {
            crates.entry(name).or_default().push(version);
        }
    }
    crates
}

/// Else the fuzzers try other code than what is shipped, and build all of it themselves.
#[test]
fn the_fuzzers_use_the_crates_that_the_gateway_does() {
    let ours = locked("Cargo.lock");
    for (name, versions) in locked("fuzz/Cargo.lock") {
        let Some(known) = ours.get(&name) else {
            let is_fuzzing = ["arbitrary", "libfuzzer-sys", "rungate-fuzz"];
            assert!(is_fuzzing.contains(&name.as_str()), "{name} is new");
            continue;
        };
        for version in versions {
            assert!(known.contains(&version), "{name} {version}, not {known:?}");
        }
    }
}
