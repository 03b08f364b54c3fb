//! `rungate config init` and what `rungate doctor` says of files and settings that leave a door open.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::Value;

use crate::rungate::{run, rungate};

#[test]
fn a_settings_file_is_written_once_and_can_be_used() {
    let home = tempfile::tempdir().unwrap();
    let (code, out, err) = run(rungate(home.path(), &["config", "init", "--json"]));
    assert_eq!(code, 0, "{err}");
    let told: Value = serde_json::from_str(&out).unwrap();
    let file = home.path().join(".config/rungate/rungate.toml");
    assert_eq!(told["file"], file.to_str().unwrap());
    assert_eq!(run(rungate(home.path(), &["config", "check"])).0, 0);
    std::fs::write(&file, "listen = \"127.0.0.1:9999\"\n").unwrap();
    let (code, _, err) = run(rungate(home.path(), &["config", "init"]));
    assert_eq!(code, 1);
    assert!(err.contains("exists, and is left as it is"), "{err}");
    let text = std::fs::read_to_string(&file).unwrap();
    assert_eq!(text, "listen = \"127.0.0.1:9999\"\n");
}

/// A finding of the doctor's, and its exit code.
fn finding(home: &Path, check: &str, env: &[(&str, &str)]) -> (i32, Value) {
    let mut command = rungate(home, &["doctor", "--json"]);
    command.envs(env.iter().copied());
    command.env("RUNGATE_LISTEN", "127.0.0.1:0");
    let (code, out, err) = run(command);
    let told: Value = serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{err}"));
    let findings = told["findings"].as_array().unwrap().iter();
    let mut found = findings.filter(|finding| finding["check"] == check);
    (code, found.next().expect("it was checked").clone())
}

#[test]
fn the_doctor_finds_what_others_can_read_or_change() {
    let home = tempfile::tempdir().unwrap();
    let chmod = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let auth = home.path().join(".local/state/rungate/auth");
    std::fs::create_dir_all(&auth).unwrap();
    chmod(auth.parent().unwrap(), 0o700);
    let key = auth.join("token-key");
    std::fs::write(&key, "x").unwrap();
    chmod(&key, 0o600);
    let (code, found) = finding(home.path(), "secrets", &[]);
    assert_eq!((code, &found["level"]), (0, &"ok".into()), "{found}");
    chmod(&key, 0o644);
    let (code, found) = finding(home.path(), "secrets", &[]);
    assert_eq!((code, &found["level"]), (1, &"wrong".into()), "{found}");
    let remedy = found["remedy"].as_str().unwrap();
    assert!(
        remedy.starts_with("chmod 600 ") && remedy.contains(key.to_str().unwrap()),
        "{remedy}"
    );
    chmod(&key, 0o600);

    let file = home.path().join("rungate.toml");
    std::fs::write(&file, "audit = \"required\"\n").unwrap();
    chmod(&file, 0o666);
    let config = [("RUNGATE_CONFIG", file.to_str().unwrap())];
    let (code, found) = finding(home.path(), "settings file", &config);
    assert_eq!((code, &found["level"]), (1, &"wrong".into()), "{found}");
    chmod(&file, 0o644);
    let (code, found) = finding(home.path(), "settings file", &config);
    assert_eq!((code, &found["level"]), (0, &"ok".into()), "{found}");
}

#[test]
fn the_doctor_warns_of_weak_settings_with_exit_code_0() {
    let home = tempfile::tempdir().unwrap();
    let (_, found) = finding(home.path(), "weak settings", &[]);
    assert_eq!(found["level"], "ok", "{found}");
    for (name, value, word) in [
        ("RUNGATE_AUDIT", "off", "audit"),
        ("RUNGATE_ALLOWED_ORIGINS", "https://*", "allowed_origins"),
        (
            "RUNGATE_CALLBACK_ALLOW_PRIVATE",
            "true",
            "callback_allow_private",
        ),
        ("RUNGATE_RATE_LIMIT_USER", "0", "rate_limit_user"),
        ("RUNGATE_RATE_LIMIT_ADDRESS", "0", "rate_limit_address"),
    ] {
        let (code, found) = finding(home.path(), "weak settings", &[(name, value)]);
        assert_eq!((code, &found["level"]), (0, &"warning".into()), "{found}");
        assert!(found["remedy"].as_str().unwrap().contains(word), "{found}");
    }
    let sso = [
        ("RUNGATE_SSO_ISSUER", "http://127.0.0.1:1"),
        ("RUNGATE_SSO_ALLOW_PRIVATE", "true"),
    ];
    let (_, found) = finding(home.path(), "weak settings", &sso);
    assert_eq!(found["level"], "warning", "{found}");
    // Behind a proxy on this machine it is as it should be.
    let proxies = [("RUNGATE_TRUSTED_PROXIES", "1")];
    let (_, found) = finding(home.path(), "weak settings", &proxies);
    assert_eq!(found["level"], "ok", "{found}");
    let mut command = rungate(home.path(), &["doctor", "--json"]);
    command.env("RUNGATE_LISTEN", "0.0.0.0:0").envs(proxies);
    let (_, out, _) = run(command);
    assert!(out.contains("(trusted_proxies)"), "{out}");
    // Of an engine it says whether one answers; who allows no images needs none.
    let nowhere = [("RUNGATE_DOCKER_HOST", "unix:///nowhere/docker.sock")];
    let (_, found) = finding(home.path(), "engine", &nowhere);
    let message = found["message"].as_str().unwrap();
    assert!(
        message.starts_with("no container engine was found at unix:///nowhere"),
        "{found}"
    );
    assert_eq!(found["level"], "ok");
    let wanted = [nowhere[0], ("RUNGATE_DOCKER_IMAGES", "a:*")];
    let (_, found) = finding(home.path(), "engine", &wanted);
    assert_eq!(found["level"], "warning", "{found}");
}
