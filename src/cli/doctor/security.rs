//! What `rungate doctor` finds to be unsafe: files that others can read or change, settings that leave a door open.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::{Finding, certificate};
use crate::config::{Config, Origin};
use crate::domain::audit::AuditMode;

/// How long before its end a certificate should have been renewed: common authorities' last 90 days or less, and are
/// renewed with a third of it to go.
const RENEWAL: Duration = Duration::from_secs(14 * 86_400);

/// All of it.
pub fn findings(config: &Config) -> Vec<Finding> {
    let mut findings = vec![secret_files(&config.data_dir)];
    findings.extend(settings_file(config));
    findings.extend(expiry(config));
    findings.extend(weak_settings(config));
    findings
}

/// Keys and secrets, and the ledger, which holds every payload.
fn secret_files(data_dir: &Path) -> Finding {
    let check = "secrets";
    let mut files: Vec<PathBuf> = vec![data_dir.join(crate::ledger::FILE_NAME)];
    let auth = std::fs::read_dir(data_dir.join("auth"));
    files.extend(auth.into_iter().flatten().flatten().map(|file| file.path()));
    // Public halves of keys may be read by everyone.
    files.retain(|file| file.extension().is_none_or(|ending| ending != "pub"));
    let others_read = |file: &&PathBuf| mode(file).is_some_and(|mode| mode & 0o077 != 0);
    let open: Vec<String> = files
        .iter()
        .filter(others_read)
        .map(|file| file.display().to_string())
        .collect();
    if open.is_empty() {
        return Finding::ok(check, "ledger, keys and tokens are their owner's only");
    }
    let open = open.join(" ");
    let remedy = format!("chmod 600 {open}, and make new secrets if somebody may have read them");
    Finding::wrong(check, format!("others can read {open}"), remedy)
}

/// Whoever can write the settings decides what the gateway does.
fn settings_file(config: &Config) -> Option<Finding> {
    let path = config.origins.values().find_map(|origin| match origin {
        Origin::File(path) => Some(path),
        _ => None,
    })?;
    let shown = path.display();
    Some(match mode(path)? & 0o022 {
        0 => Finding::ok("settings file", format!("others cannot change {shown}")),
        _ => Finding::wrong(
            "settings file",
            format!("others can change {shown}"),
            format!("chmod go-w {shown}"),
        ),
    })
}

fn mode(path: &Path) -> Option<u32> {
    Some(std::fs::metadata(path).ok()?.permissions().mode())
}

fn weak_settings(config: &Config) -> Vec<Finding> {
    let check = "weak settings";
    let mut found = Vec::new();
    let mut warn = |message: &str, remedy: &str| {
        found.push(Finding::warning(check, message, remedy));
    };
    if config.audit == AuditMode::Off {
        warn(
            "refused writes leave no trace",
            "audit = \"on\", or \"required\"",
        );
    }
    if config.callback_allow_private {
        warn(
            "callers may have the gateway call this machine and its private networks",
            "callback_allow_private = false, unless every caller may reach them anyway",
        );
    }
    if config.notify_allow_private {
        warn(
            "administrators of every tenant may have the gateway call this machine and its private networks",
            "notify_allow_private = false, and notify_allow_networks for the servers that are meant",
        );
    }
    if config.operators_may_run_commands {
        warn(
            "operators of every tenant may run programs as the gateway's user",
            "operators_may_run_commands = false, unless each of them may have a shell here",
        );
    }
    let is_open = |origin: &String| matches!(origin.as_str(), "*" | "http://*" | "https://*");
    if config.allowed_origins.iter().any(is_open) {
        warn(
            "pages of every site may call",
            "name the sites in allowed_origins, e.g. https://console.example",
        );
    }
    let is_any = |host: &String| host.contains('*');
    if config.allowed_hosts.iter().any(is_any) {
        warn(
            "allowed_hosts has a pattern, which matches nothing",
            "write each name out",
        );
    }
    if config.rate_limit_user == 0 || config.rate_limit_address == 0 {
        warn(
            "requests a minute are not limited, so one caller can keep the gateway busy",
            "leave rate_limit_user and rate_limit_address at their defaults, or set numbers",
        );
    }
    if config.sso_allow_private && !config.sso_issuer.is_empty() {
        warn(
            "the issuer of single sign-on may be at a private address and speak plain http: who is on the way there can sign in as anybody",
            "sso_allow_private = false, unless the issuer is on this machine",
        );
    }
    if config.trusted_proxies > 0 && !config.listen.ip().to_canonical().is_loopback() {
        warn(
            "whoever reaches the gateway past its proxies says itself which address it has (trusted_proxies)",
            "listen on 127.0.0.1 behind a proxy on this machine, or let only the proxies reach the port",
        );
    }
    if found.is_empty() {
        found.push(Finding::ok(check, "no setting leaves a door open"));
    }
    found
}

/// When the certificate that the settings name expires; whether it can be used at all is told elsewhere.
fn expiry(config: &Config) -> Option<Finding> {
    let (check, path) = ("certificate", config.tls_cert.as_ref()?);
    let shown = path.display();
    let remedy = "renew it, and send HUP to the gateway (`systemctl reload rungate`)";
    let left = certificate::expires_at(path)?.duration_since(SystemTime::now());
    let days = |left: Duration| left.as_secs() / 86_400;
    Some(match left {
        Err(_) => Finding::wrong(check, format!("{shown} has expired"), remedy),
        Ok(left) if left < RENEWAL => {
            let message = format!("{shown} expires in {} days", days(left));
            Finding::warning(check, message, remedy)
        }
        Ok(left) => Finding::ok(check, format!("{shown} is good for {} days", days(left))),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::Level;
    use super::*;

    #[test]
    fn a_secret_that_others_read_is_named() {
        let data = tempfile::tempdir().unwrap();
        let auth = data.path().join("auth");
        fs::create_dir(&auth).unwrap();
        for (name, mode) in [
            ("token-key", 0o600),
            ("signing-keys", 0o600),
            ("checkpoint-key.pub", 0o644),
        ] {
            fs::write(auth.join(name), "x").unwrap();
            fs::set_permissions(auth.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        assert_eq!(secret_files(data.path()).level, Level::Ok);
        for name in ["token-key", "signing-keys"] {
            let key = auth.join(name);
            fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
            let finding = secret_files(data.path());
            assert_eq!(finding.level, Level::Wrong);
            assert!(
                finding.message.ends_with(&format!("/auth/{name}")),
                "{finding:?}"
            );
            fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        }
    }
}
