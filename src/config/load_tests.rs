//! Precedence, near-miss hints and refusals of the settings.

use super::*;

fn sources(file: Option<&Path>, env: &[(&str, &str)]) -> Sources {
    Sources {
        flags: Vec::new(),
        environment: env
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
        // A path that does not exist would be refused, and the default one is the machine's.
        file: Some(file.map_or_else(|| PathBuf::from("/dev/null"), Path::to_owned)),
    }
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

#[test]
fn a_flag_beats_the_environment_beats_the_file_beats_the_default() {
    let file = file("listen = \"127.0.0.1:1\"\ndrain_ms = 7\ncache_mib = 3\n");
    let env = [("RUNGATE_LISTEN", "127.0.0.1:2"), ("RUNGATE_DRAIN_MS", "8")];
    let mut sources = sources(Some(file.path()), &env);
    sources
        .flags
        .push(("listen", "--listen", "127.0.0.1:3".to_owned()));
    let config = Config::load(&sources).unwrap();
    assert_eq!(config.listen.port(), 3);
    assert_eq!(config.origins["listen"], Origin::Flag("--listen"));
    assert_eq!(config.drain_ms, 8);
    assert_eq!(
        config.origins["drain_ms"],
        Origin::Environment("RUNGATE_DRAIN_MS")
    );
    assert_eq!(config.cache_mib, 3);
    assert_eq!(
        config.origins["cache_mib"],
        Origin::File(file.path().to_owned())
    );
    assert_eq!(config.origins["max_streams"], Origin::Default);
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_one() {
    let file = file("lisen = \"127.0.0.1:1\"");
    let error = Config::load(&sources(Some(file.path()), &[])).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("'lisen'") && text.contains("did you mean 'listen'?"),
        "{text}"
    );
}

#[test]
fn a_misspelt_variable_is_warned_about() {
    let config = Config::load(&sources(None, &[("RUNGATE_LISTNE", "x")])).unwrap();
    assert_eq!(
        config.warnings,
        ["unknown environment variable RUNGATE_LISTNE, did you mean 'RUNGATE_LISTEN'?"]
    );
}

#[test]
fn the_peers_names_are_read_in_its_units_and_ours_win() {
    let env = [("IDLE_TIMEOUT_SECONDS", "2"), ("PREEMPT_PRIORITY_GAP", "4")];
    let config = Config::load(&sources(None, &env)).unwrap();
    assert_eq!(config.scheduling().idle_timeout_ms, 2_000);
    assert_eq!(config.scheduling().preempt_priority_gap, 4);
    let env = [
        ("IDLE_TIMEOUT_SECONDS", "2"),
        ("RUNGATE_IDLE_TIMEOUT_MS", "5"),
    ];
    assert_eq!(
        Config::load(&sources(None, &env)).unwrap().idle_timeout_ms,
        5
    );
}

#[test]
fn a_bad_value_names_the_setting_its_origin_and_what_is_wanted() {
    let env = [("RUNGATE_PREEMPT_PRIORITY_GAP", "9")];
    let error = Config::load(&sources(None, &env)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "setting 'preempt_priority_gap' (environment RUNGATE_PREEMPT_PRIORITY_GAP) must be \
         a whole number from 1 to 5, not '9'"
    );
}

#[test]
fn a_secret_is_neither_read_from_a_file_nor_shown() {
    let file = file("token = \"hunter2\"");
    let error = Config::load(&sources(Some(file.path()), &[])).unwrap_err();
    assert!(!error.to_string().contains("hunter2"));
    let rows = Config::rows(&sources(None, &[("RUNGATE_TOKEN", "hunter2")])).unwrap();
    let (_, shown, _) = rows.iter().find(|(row, ..)| row.key == "token").unwrap();
    assert_eq!(shown, "(set)");
}

#[test]
fn lists_are_toml_arrays_or_commas() {
    let file = file("allowed_hosts = [\"a\", \"b\"]");
    let config = Config::load(&sources(Some(file.path()), &[])).unwrap();
    assert_eq!(config.allowed_hosts, ["a", "b"]);
    let env = [("RUNGATE_ALLOWED_HOSTS", "c, d,")];
    let config = Config::load(&sources(None, &env)).unwrap();
    assert_eq!(config.allowed_hosts, ["c", "d"]);
}

#[test]
fn the_defaults_of_scheduling_are_the_domains() {
    let config = Config::load(&sources(None, &[])).unwrap();
    assert_eq!(
        config.scheduling(),
        crate::domain::settings::Settings::default()
    );
}
