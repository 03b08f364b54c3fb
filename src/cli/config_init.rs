//! `rungate config init`: a settings file in which everything is said and nothing is set.

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::error::{CliError, Exit};
use super::output::Out;
use crate::config::{SETTINGS, Setting, default_file};

/// Writes the file that `--config` names, or the default one; never over one that is there.
///
/// # Errors
/// It is there already, or cannot be written.
pub fn perform(out: Out, file: Option<PathBuf>) -> Result<Exit, CliError> {
    let path = file.or_else(default_file).ok_or_else(|| {
        CliError::Usage("there is no home directory: name the file with --config".to_owned())
    })?;
    write_new(&path)?;
    let answer = json!({"file": path.display().to_string()});
    out.show(&answer, |_| {
        format!(
            "{} has every setting with its default, commented out",
            path.display()
        )
    })?;
    Ok(Exit::Success)
}

fn write_new(path: &Path) -> Result<(), CliError> {
    let what = || format!("create {}", path.display());
    if let Some(folder) = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
    {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(CliError::io(what()))?;
    }
    let mut file = match std::fs::File::create_new(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let text = format!(
                "{} exists, and is left as it is; name another file with --config",
                path.display()
            );
            return Err(CliError::Failed(text));
        }
        file => file.map_err(CliError::io(what()))?,
    };
    file.write_all(text().as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(CliError::io(what()))
}

/// The file's text.
fn text() -> String {
    let mut text = String::from(
        "# Settings of rungate. A flag and the environment go before this file; what stands here commented out is\n\
         # the default. `rungate config show` tells every value with its origin, `rungate config check` whether all\n\
         # can be used.\n",
    );
    for setting in SETTINGS.iter().filter(|setting| !setting.secret) {
        let Setting {
            key, env, about, ..
        } = setting;
        // Writing to a string does not fail.
        let _ = write!(text, "\n# {about} [{env}]\n# {key} = {}\n", value(setting));
    }
    text
}

/// The default, as TOML has it.
fn value(setting: &Setting) -> String {
    let default = (setting.default)();
    match setting.kind {
        "number" | "true or false" => default,
        "list" => {
            let members = default.split(',').filter(|member| !member.is_empty());
            let quoted: Vec<String> = members.map(quoted).collect();
            format!("[{}]", quoted.join(", "))
        }
        _ => quoted(&default),
    }
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Sources};

    #[test]
    fn the_file_can_be_used_as_it_is_and_with_every_line_uncommented() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/rungate.toml");
        write_new(&path).unwrap();
        let sources = Sources {
            file: Some(path.clone()),
            ..Sources::default()
        };
        Config::load(&sources).unwrap();
        let settings: Vec<&str> = SETTINGS
            .iter()
            .filter(|setting| !setting.secret)
            .map(|setting| setting.key)
            .collect();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines = text.lines().filter_map(|line| line.strip_prefix("# "));
        let of_a_setting = |line: &&str| {
            settings
                .iter()
                .any(|key| line.starts_with(&format!("{key} = ")))
        };
        let all: Vec<&str> = lines.filter(of_a_setting).collect();
        assert_eq!(all.len(), settings.len());
        std::fs::write(&path, all.join("\n")).unwrap();
        let config = Config::load(&sources).unwrap();
        assert!(config.warnings.is_empty());
    }

    #[test]
    fn a_file_that_is_there_is_left_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "mine").unwrap();
        assert!(write_new(file.path()).is_err());
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "mine");
    }
}
