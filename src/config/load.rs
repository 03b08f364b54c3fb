//! Gathers every setting's text from its highest-ranking source and refuses what cannot be meant: an
//! unknown key, a value out of bounds. A refusal names the setting, its origin and the remedy.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use etcetera::BaseStrategy;

use super::value::FromText;
use super::{Config, SETTINGS, Setting, setting};
use crate::domain::notify::is_ntfy_topic;

/// How alike two names must be (Jaro-Winkler, 0 to 1) for one to be offered in place of the other.
const NEAR_MISS: f64 = 0.8;

/// Largest configuration file read, in bytes: ours have about 2 KiB.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// `RUNGATE_…` names that are no settings of the gateway: what it gives to the services it starts.
const OTHER_NAMES: &[&str] = &[
    "RUNGATE_CONFIG",
    "RUNGATE_GATEWAY_URL",
    "RUNGATE_GENERATION",
    "RUNGATE_INSTANCE",
    "RUNGATE_JOB_TOKEN_FILE",
    "RUNGATE_SERVICE",
];

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Flag(&'static str),
    Environment(&'static str),
    File(PathBuf),
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Flag(flag) => write!(f, "flag {flag}"),
            Origin::Environment(name) => write!(f, "environment {name}"),
            Origin::File(path) => write!(f, "file {}", path.display()),
            Origin::Default => f.write_str("default"),
        }
    }
}

/// A value before it is parsed.
#[derive(Clone, Debug)]
pub(super) struct Raw {
    pub text: String,
    pub origin: Origin,
}

/// What to merge.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// `(key, flag, text)` of each flag that was given.
    pub flags: Vec<(&'static str, &'static str, String)>,
    pub environment: BTreeMap<String, String>,
    /// A file that must exist; without it the default one is read when it does.
    pub file: Option<PathBuf>,
}

impl Sources {
    /// This process's environment, and its flags.
    pub fn of_process(
        file: Option<PathBuf>,
        flags: Vec<(&'static str, &'static str, String)>,
    ) -> Self {
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        Self {
            flags,
            environment,
            file,
        }
    }
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration file {}: {source}; correct --config or remove it", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("the configuration file {} is no valid TOML: {problem}", path.display())]
    Syntax { path: PathBuf, problem: String },
    #[error("unknown setting '{key}' in {}{}; `rungate config show` lists all of them", path.display(), hint(.near))]
    UnknownKey {
        path: PathBuf,
        key: String,
        near: Option<&'static str>,
    },
    #[error("'{key}' in {} is a secret and is not read from a file; use {remedy}", path.display())]
    SecretInFile {
        path: PathBuf,
        key: &'static str,
        remedy: &'static str,
    },
    #[error("setting '{key}' ({origin}) must be {wanted}, not {given}")]
    BadValue {
        key: &'static str,
        origin: Origin,
        wanted: String,
        given: String,
    },
}

fn hint(near: &Option<&'static str>) -> String {
    near.map_or_else(String::new, |near| format!(", did you mean '{near}'?"))
}

impl Config {
    /// Merges flag > environment > file > default and parses every value.
    ///
    /// # Errors
    /// The first setting that is unknown, unreadable or out of bounds.
    pub fn load(sources: &Sources) -> Result<Config, ConfigError> {
        let mut config = Config::from_raw(&merge(sources)?)?;
        config.warnings = unknown_names(sources);
        check_ntfy(&config)?;
        Ok(config)
    }

    /// Every row with its value as text (a secret only as `(set)`) and its origin.
    ///
    /// # Errors
    /// As `load`.
    pub fn rows(sources: &Sources) -> Result<Vec<(&'static Setting, String, Origin)>, ConfigError> {
        let raw = merge(sources)?;
        Config::from_raw(&raw)?;
        let rows = SETTINGS.iter().filter_map(|row| {
            let Raw { text, origin } = raw.get(row.key)?.clone();
            let shown = match (row.secret, text.is_empty()) {
                (true, false) => "(set)".to_owned(),
                _ => text,
            };
            Some((row, shown, origin))
        });
        Ok(rows.collect())
    }
}

/// A topic that is turned on must be one.
fn check_ntfy(config: &Config) -> Result<(), ConfigError> {
    if !config.ntfy_enabled {
        return Ok(());
    }
    let bad = |key: &'static str, wanted: &str, given: &str| ConfigError::BadValue {
        key,
        origin: config.origins.get(key).cloned().unwrap_or(Origin::Default),
        wanted: wanted.to_owned(),
        given: format!("'{given}'"),
    };
    let topic = config.ntfy_topic.as_str();
    if !is_ntfy_topic(topic) {
        let wanted =
            "1 to 64 letters, digits, '-' or '_' while ntfy_enabled is true, and best a random one";
        return Err(bad("ntfy_topic", wanted, topic));
    }
    let url = config.ntfy_url.as_str();
    let is_server = url::Url::parse(url).is_ok_and(|url| {
        matches!(url.scheme(), "http" | "https")
            && url.username().is_empty()
            && url.password().is_none()
    });
    match is_server {
        true => Ok(()),
        false => Err(bad(
            "ntfy_url",
            "an http or https URL without a password",
            url,
        )),
    }
}

/// The text of every setting from its highest-ranking source.
fn merge(sources: &Sources) -> Result<BTreeMap<&'static str, Raw>, ConfigError> {
    let file = match &sources.file {
        Some(path) => Some(path.clone()),
        None => default_file().filter(|path| path.is_file()),
    };
    let mut raw: BTreeMap<&'static str, Raw> = SETTINGS
        .iter()
        .map(|setting| (setting.key, default_of(setting)))
        .collect();
    if let Some(path) = &file {
        raw.extend(read_file(path)?);
    }
    raw.extend(SETTINGS.iter().filter_map(|row| from_env(row, sources)));
    raw.extend(sources.flags.iter().map(|(key, flag, text)| {
        let origin = Origin::Flag(flag);
        let text = text.clone();
        (*key, Raw { text, origin })
    }));
    Ok(raw)
}

fn default_of(setting: &Setting) -> Raw {
    Raw {
        text: (setting.default)(),
        origin: Origin::Default,
    }
}

/// The setting's own variable, else the first alias that is set. An empty variable counts as not set.
fn from_env(row: &Setting, sources: &Sources) -> Option<(&'static str, Raw)> {
    let get = |name: &str| {
        sources
            .environment
            .get(name)
            .filter(|text| !text.is_empty())
    };
    let own = get(row.env).map(|text| (text.clone(), row.env));
    let (text, name) = own.or_else(|| {
        row.aliases.iter().find_map(|(name, factor)| {
            let text = get(name)?;
            // A text that is no number is left as it is: the parser says what is wrong with it.
            let scaled = match (factor, text.parse::<u64>()) {
                (1, _) | (_, Err(_)) => text.clone(),
                (factor, Ok(number)) => number.saturating_mul(*factor).to_string(),
            };
            Some((scaled, *name))
        })
    })?;
    let origin = Origin::Environment(name);
    Some((row.key, Raw { text, origin }))
}

fn read_file(path: &Path) -> Result<BTreeMap<&'static str, Raw>, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    };
    if std::fs::metadata(path).map_err(unreadable)?.len() > MAX_FILE_BYTES {
        return Err(unreadable(io::Error::other("it is larger than 1 MiB")));
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        let problem = error.to_string().trim_end().to_owned();
        let path = path.to_owned();
        ConfigError::Syntax { path, problem }
    })?;
    table
        .into_iter()
        .map(|(key, value)| file_value(path, key, &value))
        .collect()
}

fn file_value(
    path: &Path,
    key: String,
    value: &toml::Value,
) -> Result<(&'static str, Raw), ConfigError> {
    let Some(row) = setting(&key) else {
        let near = nearest(&key, SETTINGS.iter().map(|row| row.key));
        let path = path.to_owned();
        return Err(ConfigError::UnknownKey { path, key, near });
    };
    if row.secret {
        return Err(ConfigError::SecretInFile {
            path: path.to_owned(),
            key: row.key,
            remedy: "token_file = \"…\" or the environment",
        });
    }
    let origin = Origin::File(path.to_owned());
    let text = text_of(value).ok_or_else(|| ConfigError::BadValue {
        key: row.key,
        origin: origin.clone(),
        wanted: format!("one value ({})", row.kind),
        given: format!("a {}", value.type_str()),
    })?;
    Ok((row.key, Raw { text, origin }))
}

/// A scalar as text, a list of scalars separated by commas.
fn text_of(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Boolean(flag) => Some(flag.to_string()),
        toml::Value::Array(members) => {
            let texts: Option<Vec<String>> = members.iter().map(text_of).collect();
            texts.map(|texts| texts.join(","))
        }
        _ => None,
    }
}

pub(super) fn parse<T: FromText>(
    raw: &BTreeMap<&'static str, Raw>,
    key: &'static str,
) -> Result<T, ConfigError> {
    let row = setting(key).expect("the table's macro names only its own rows");
    let value = raw.get(key).expect("every row has at least its default");
    T::parse(&value.text, row.range).map_err(|wanted| ConfigError::BadValue {
        key,
        origin: value.origin.clone(),
        wanted,
        given: match row.secret {
            true => "what was given".to_owned(),
            false => format!("'{}'", value.text),
        },
    })
}

/// A variable that looks like a setting and is none is probably misspelt.
fn unknown_names(sources: &Sources) -> Vec<String> {
    let names = || SETTINGS.iter().map(|row| row.env);
    sources
        .environment
        .keys()
        .filter(|name| name.starts_with("RUNGATE_"))
        .filter(|name| !names().any(|known| known == name.as_str()))
        .filter(|name| !OTHER_NAMES.contains(&name.as_str()))
        .map(|name| {
            let near = nearest(name, names());
            format!("unknown environment variable {name}{}", hint(&near))
        })
        .collect()
}

fn nearest(name: &str, known: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    known
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(likeness, _)| *likeness >= NEAR_MISS)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// `$XDG_CONFIG_HOME/rungate/rungate.toml`; `None` without a home directory.
pub fn default_file() -> Option<PathBuf> {
    let base = etcetera::choose_base_strategy().ok()?;
    Some(base.config_dir().join("rungate").join("rungate.toml"))
}

/// `$XDG_STATE_HOME/rungate`, or a folder of the working directory for a user without a home.
pub(super) fn default_data_dir() -> String {
    let path = etcetera::choose_base_strategy()
        .ok()
        .and_then(|base| base.state_dir())
        .map_or_else(|| PathBuf::from("rungate-data"), |dir| dir.join("rungate"));
    path.display().to_string()
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
