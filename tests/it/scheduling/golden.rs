//! Golden scripts: every file of `scripts/` is one rule of scheduling. Its commands are played, and what was decided
//! must be what the lines that begin with `|` say. `UPDATE_SCRIPTS=1` writes those lines anew.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::script::Script;

/// Fewer would mean that some were not found.
const AT_LEAST: usize = 40;

fn scripts() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/scripts");
    let files = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut scripts: Vec<PathBuf> = files
        .filter(|path| path.extension().is_some_and(|e| e == "txt"))
        .collect();
    scripts.sort();
    scripts
}

/// The script with the decisions that are made now.
fn play(text: &str) -> String {
    let mut script = Script::new();
    let mut played = String::new();
    for line in text.lines().filter(|line| !line.starts_with('|')) {
        let _ = writeln!(played, "{line}");
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        for told in script.play(line) {
            let _ = writeln!(played, "|{told}");
        }
    }
    played
}

#[test]
fn every_script_is_decided_as_it_says() {
    let scripts = scripts();
    assert!(scripts.len() >= AT_LEAST, "only {} scripts", scripts.len());
    let update = std::env::var_os("UPDATE_SCRIPTS").is_some();
    let mut wrong = String::new();
    for path in scripts {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let expected = std::fs::read_to_string(&path).unwrap();
        let played = std::panic::catch_unwind(|| play(&expected));
        let Ok(played) = played else {
            let _ = writeln!(wrong, "--- {name} broke");
            continue;
        };
        if update {
            std::fs::write(&path, &played).unwrap();
        } else if played != expected {
            let _ = writeln!(wrong, "--- {name}");
            let mut lines = expected.lines().zip(played.lines());
            if let Some((was, is)) = lines.find(|(was, is)| was != is) {
                let _ = writeln!(wrong, "expected {was}\n     got {is}");
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "UPDATE_SCRIPTS=1 accepts what is right of this:\n{wrong}"
    );
}
