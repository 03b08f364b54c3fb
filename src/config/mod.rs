//! The gateway's settings: one table that names, documents, bounds and defaults each of them, and the
//! merge flag > environment > file > default that remembers where every value came from.
//!
//! Leaves to others what a value is used for.

mod load;
mod table;
mod value;

pub use load::{ConfigError, Origin, Sources, default_file};
pub use table::{Config, SETTINGS};
pub use value::{FromText, LogFormat, Secret};

/// One row of the table, as `config show`, `--help` and the documentation print it.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Key in the file, e.g. `listen`.
    pub key: &'static str,
    /// Environment variable, e.g. `RUNGATE_LISTEN`.
    pub env: &'static str,
    /// Environment names of the peer gateway that mean the same, each with the factor to our unit.
    pub aliases: &'static [(&'static str, u64)],
    /// What it means, with its unit.
    pub about: &'static str,
    /// Smallest and largest value of a number; ignored for other kinds.
    pub range: (u64, u64),
    /// Never shown, and never read from the file.
    pub secret: bool,
    /// The kind of value, in words.
    pub kind: &'static str,
    pub default: fn() -> String,
}

/// The setting named `key`.
pub fn setting(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}
