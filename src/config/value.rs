//! How a setting's text becomes a value. Every source (flag, environment, file) is text first, so that
//! there is one parser and one wording of what is wrong.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use secrecy::{ExposeSecret, SecretString};

use crate::domain::audit::AuditMode;
use crate::outbound::Network;

/// A kind of value. `parse` answers the reason in words that fit "… must be {reason}".
pub trait FromText: Sized {
    /// The kind in words, e.g. `a number of milliseconds`.
    const KIND: &'static str;
    const SECRET: bool = false;
    fn parse(text: &str, range: (u64, u64)) -> Result<Self, String>;
}

impl FromText for SocketAddr {
    const KIND: &'static str = "address:port";
    fn parse(text: &str, _: (u64, u64)) -> Result<Self, String> {
        text.trim()
            .parse()
            .map_err(|_| "an IP address and port such as 127.0.0.1:8080 or [::1]:8080".to_owned())
    }
}

impl FromText for IpAddr {
    const KIND: &'static str = "address";
    fn parse(text: &str, _: (u64, u64)) -> Result<Self, String> {
        let wanted = "an IP address such as 127.0.0.1 or ::1";
        text.trim().parse().map_err(|_| wanted.to_owned())
    }
}

impl FromText for u64 {
    const KIND: &'static str = "number";
    fn parse(text: &str, (low, high): (u64, u64)) -> Result<Self, String> {
        let wanted = || match high {
            u64::MAX => format!("a whole number of at least {low}"),
            _ => format!("a whole number from {low} to {high}"),
        };
        let number: u64 = text.trim().parse().map_err(|_| wanted())?;
        if (low..=high).contains(&number) {
            Ok(number)
        } else {
            Err(wanted())
        }
    }
}

impl FromText for bool {
    const KIND: &'static str = "true or false";
    fn parse(text: &str, _: (u64, u64)) -> Result<Self, String> {
        match text.trim().to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Ok(true),
            "false" | "0" | "no" | "off" => Ok(false),
            _ => Err("true or false".to_owned()),
        }
    }
}

impl FromText for String {
    const KIND: &'static str = "text";
    fn parse(text: &str, _: (u64, u64)) -> Result<Self, String> {
        Ok(text.trim().to_owned())
    }
}

impl FromText for Option<PathBuf> {
    const KIND: &'static str = "path";
    fn parse(text: &str, _: (u64, u64)) -> Result<Self, String> {
        Ok((!text.is_empty()).then(|| PathBuf::from(text)))
    }
}

impl FromText for PathBuf {
    const KIND: &'static str = "path";
    fn parse(text: &str, _: (u64, u64)) -> Result<Self, String> {
        if text.is_empty() {
            return Err("the path of a directory".to_owned());
        }
        Ok(PathBuf::from(text))
    }
}

/// Separated by commas; empty members are dropped.
impl FromText for Vec<String> {
    const KIND: &'static str = "list";
    fn parse(text: &str, _: (u64, u64)) -> Result<Self, String> {
        Ok(text
            .split(',')
            .map(str::trim)
            .filter(|member| !member.is_empty())
            .map(str::to_owned)
            .collect())
    }
}

/// How the log is written to stderr.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One line of words for each event.
    Text,
    /// One JSON object for each event.
    Json,
}

impl FromText for Vec<Network> {
    const KIND: &'static str = "list of networks";
    fn parse(text: &str, _: (u64, u64)) -> Result<Self, String> {
        let members = text
            .split(',')
            .map(str::trim)
            .filter(|text| !text.is_empty());
        let networks: Result<_, _> = members.map(str::parse).collect();
        networks.map_err(|_| "networks such as 100.64.0.0/10 or fd00::/8".to_owned())
    }
}

impl FromText for LogFormat {
    const KIND: &'static str = "text or json";
    fn parse(text: &str, _: (u64, u64)) -> Result<Self, String> {
        match text.trim() {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            _ => Err("text or json".to_owned()),
        }
    }
}

impl FromText for AuditMode {
    const KIND: &'static str = "on, required or off";
    fn parse(text: &str, _: (u64, u64)) -> Result<Self, String> {
        match text.trim() {
            "off" | "false" => Ok(AuditMode::Off),
            "on" | "true" => Ok(AuditMode::On),
            "required" => Ok(AuditMode::Required),
            _ => Err("on, required or off".to_owned()),
        }
    }
}

/// A value that is never printed, not even by `Debug`, and is wiped from memory when it is dropped.
#[derive(Clone, Debug)]
pub struct Secret(SecretString);

impl Secret {
    /// The value itself, `None` when it is empty.
    pub fn reveal(&self) -> Option<&str> {
        let text = self.0.expose_secret();
        (!text.is_empty()).then_some(text)
    }
}

impl FromText for Secret {
    const KIND: &'static str = "secret";
    const SECRET: bool = true;
    fn parse(text: &str, _: (u64, u64)) -> Result<Self, String> {
        let text = text.trim();
        if text.bytes().all(|b| b.is_ascii_graphic()) {
            Ok(Secret(SecretString::from(text)))
        } else {
            Err("printable ASCII without spaces".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_out_of_range_is_told_its_range() {
        assert_eq!(
            u64::parse("0", (1, 10)),
            Err("a whole number from 1 to 10".to_owned())
        );
        assert_eq!(u64::parse("10", (1, 10)), Ok(10));
    }

    #[test]
    fn a_secret_is_not_in_its_debug_text() {
        let secret = Secret::parse("hunter2", (0, 0)).unwrap();
        assert!(!format!("{secret:?}").contains("hunter2"));
        assert_eq!(secret.reveal(), Some("hunter2"));
    }
}
