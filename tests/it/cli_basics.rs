//! The command line without a gateway: help, settings, completions, exit codes.

use std::net::TcpListener;

use crate::rungate::{run, rungate};

#[test]
fn help_names_every_noun_and_the_exit_codes() {
    let home = tempfile::tempdir().unwrap();
    let (code, help, _) = run(rungate(home.path(), &["--help"]));
    assert_eq!(code, 0);
    let nouns = [
        "serve",
        "demo",
        "doctor",
        "run",
        "service",
        "gpu",
        "queue",
        "command",
        "ledger",
        "config",
        "health",
        "worker",
        "completions",
    ];
    for noun in nouns {
        assert!(
            help.contains(&format!("\n  {noun} ")),
            "{noun} is not in:\n{help}"
        );
    }
    for text in ["Exit codes:", "RUNGATE_URL", "NO_COLOR", "Examples:"] {
        assert!(help.contains(text), "{text} is not in:\n{help}");
    }
}

#[test]
fn every_verb_explains_itself() {
    let home = tempfile::tempdir().unwrap();
    let verbs = [
        (
            "run",
            "start list show watch pause resume cancel preempt retry why set-priority",
        ),
        (
            "service",
            "register list show start stop restart enable disable remove logs",
        ),
        ("ledger", "follow verify export import stats"),
        ("config", "show check"),
        ("command", "show"),
    ];
    for (noun, verbs) in verbs {
        for verb in verbs.split(' ') {
            let (code, help, _) = run(rungate(home.path(), &[noun, verb, "--help"]));
            assert_eq!(code, 0, "{noun} {verb}");
            assert!(help.contains("Usage:"), "{noun} {verb}");
        }
    }
}

#[test]
fn a_misspelt_verb_is_a_usage_error_with_a_hint() {
    let home = tempfile::tempdir().unwrap();
    let (code, out, err) = run(rungate(home.path(), &["service", "regster"]));
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(err.contains("register"), "{err}");
}

#[test]
fn settings_show_their_origin() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join(".config/rungate");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("rungate.toml"), "cache_mib = 3\ndrain_ms = 4\n").unwrap();
    let mut command = rungate(home.path(), &["config", "show", "--json"]);
    command
        .env("RUNGATE_DRAIN_MS", "5")
        .env("RUNGATE_TOKEN", "hunter2");
    let (code, out, _) = run(command);
    assert_eq!(code, 0);
    assert!(!out.contains("hunter2"));
    let shown: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(shown["drain_ms"]["value"], "5");
    assert_eq!(shown["drain_ms"]["origin"], "environment RUNGATE_DRAIN_MS");
    assert_eq!(shown["cache_mib"]["value"], "3");
    let origin = shown["cache_mib"]["origin"].as_str().unwrap();
    assert!(origin.ends_with("/rungate.toml"), "{origin}");
    assert_eq!(shown["listen"]["origin"], "default");
    let state = home.path().join(".local/state/rungate");
    assert_eq!(shown["data_dir"]["value"], state.display().to_string());
}

#[test]
fn an_unknown_setting_is_a_usage_error_with_a_hint() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("x.toml");
    std::fs::write(&file, "data_dri = \"/x\"\n").unwrap();
    let mut command = rungate(home.path(), &["config", "check"]);
    command.env("RUNGATE_CONFIG", &file);
    let (code, out, err) = run(command);
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(
        err.contains("'data_dri'") && err.contains("did you mean 'data_dir'?"),
        "{err}"
    );
    let mut command = rungate(home.path(), &["doctor", "--json"]);
    command.env("RUNGATE_CONFIG", &file);
    let (code, out, _) = run(command);
    assert_eq!(code, 1);
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["findings"][0]["level"], "wrong");
}

#[test]
fn the_documentation_lists_every_setting_with_its_default() {
    let page = include_str!("../../docs/configuration.md");
    for setting in rungate::config::SETTINGS {
        let default = match (setting.key, (setting.default)()) {
            // It depends on the user.
            ("data_dir", _) => "`~/.local/state/rungate`".to_owned(),
            (_, text) if text.is_empty() => "none".to_owned(),
            (_, text) => format!("`{text}`"),
        };
        let (key, env, about) = (setting.key, setting.env, setting.about);
        let row = format!("| `{key}` | `{env}` | {default} | {about} |");
        assert!(
            page.contains(&row),
            "docs/configuration.md has no row\n{row}"
        );
    }
}

#[test]
fn completions_are_made_for_every_shell() {
    let home = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let (code, out, _) = run(rungate(home.path(), &["completions", shell]));
        assert_eq!(code, 0);
        assert!(out.contains("set-priority"), "{shell}");
    }
}

/// A port that nobody listens on: bound, and let go.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

#[test]
fn without_a_gateway_the_exit_code_is_5_and_the_remedy_is_told() {
    let home = tempfile::tempdir().unwrap();
    let url = format!("http://127.0.0.1:{}", free_port());
    for words in [
        "run list",
        "health",
        "run watch x",
        "ledger stats",
        "gpu",
        "service list",
    ] {
        let arguments: Vec<&str> = words.split(' ').collect();
        let mut command = rungate(home.path(), &arguments);
        command.env("RUNGATE_URL", &url);
        let (code, out, err) = run(command);
        assert_eq!((code, out.as_str()), (5, ""), "{words}: {err}");
        assert!(err.contains("rungate serve"), "{err}");
    }
}

#[test]
fn what_cannot_be_meant_is_a_usage_error() {
    let home = tempfile::tempdir().unwrap();
    let cases: &[&[&str]] = &[
        &[],
        &["run", "start"],
        &["run", "start", "--type", "x", "--payload", "{"],
        &["run", "set-priority", "r", "6"],
        &["run", "list", "--url", "ftp://x"],
        &["ledger", "import", "x"],
        &["serve", "--listen", "nonsense"],
        &[
            "service",
            "register",
            "x",
            "--type",
            "t",
            "--external",
            "http://x",
            "--",
            "true",
        ],
    ];
    for case in cases {
        let (code, out, _) = run(rungate(home.path(), case));
        assert_eq!((code, out.as_str()), (2, ""), "{case:?}");
    }
}

#[test]
fn a_ledger_that_is_not_there_is_told_in_one_sentence() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("none");
    let dir = dir.to_str().unwrap();
    for verb in ["verify", "export", "stats"] {
        let (code, out, err) = run(rungate(home.path(), &["ledger", verb, "--data-dir", dir]));
        assert_eq!((code, out.as_str()), (1, ""));
        assert!(err.contains("there is no ledger at"), "{err}");
        assert_eq!(err.lines().count(), 1, "{err}");
    }
}

#[test]
fn doctor_finds_a_machine_in_order_and_a_port_that_is_taken() {
    let home = tempfile::tempdir().unwrap();
    let mut command = rungate(home.path(), &["doctor", "--json"]);
    command.env("RUNGATE_LISTEN", "127.0.0.1:0");
    let (code, out, err) = run(command);
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &report["ok"]), (0, &true.into()), "{out}{err}");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = rungate(home.path(), &["doctor"]);
    command.env("RUNGATE_LISTEN", taken.local_addr().unwrap().to_string());
    let (code, out, _) = run(command);
    assert_eq!(code, 1);
    assert!(
        out.contains("is taken by something that is no gateway"),
        "{out}"
    );
}

#[test]
fn a_closed_pipe_ends_a_command_quietly() {
    let home = tempfile::tempdir().unwrap();
    let binary = env!("CARGO_BIN_EXE_rungate");
    let script = format!("{binary} config show --about | head -1; echo ${{PIPESTATUS[0]}} >&2");
    let mut command = std::process::Command::new("bash");
    command
        .args(["-c", &script])
        .env_clear()
        .env("HOME", home.path());
    command.env("PATH", std::env::var_os("PATH").unwrap());
    let (_, _, err) = run(command);
    assert_eq!(err.trim(), "0");
}
