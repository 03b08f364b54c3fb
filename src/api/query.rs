//! Parameters of the query string, read one by one with the faults told as the contract's validator does.

use std::cell::RefCell;
use std::ops::RangeInclusive;

use axum::extract::FromRequestParts;
use http::request::Parts;
use serde_json::json;

use super::error::{ApiError, FieldError};
use super::state::App;
use crate::domain::time::Timestamp;

/// Longest text of a parameter: names, ids and cursors are all shorter.
const MAX_TEXT_CHARS: usize = 512;

/// A parsed query string. The last of several equal names counts.
pub struct Query {
    pairs: Vec<(String, String)>,
    faults: RefCell<Vec<FieldError>>,
}

impl FromRequestParts<App> for Query {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, ApiError> {
        Ok(Query::parse(parts.uri.query().unwrap_or_default()))
    }
}

impl Query {
    /// Of the text after `?`.
    pub fn parse(text: &str) -> Query {
        Query {
            pairs: url::form_urlencoded::parse(text.as_bytes())
                .into_owned()
                .collect(),
            faults: RefCell::default(),
        }
    }

    /// Ends the reading: the faults, if there were any.
    pub fn finish(&self) -> Result<(), ApiError> {
        let faults = self.faults.take();
        if faults.is_empty() {
            Ok(())
        } else {
            Err(ApiError::validation(faults))
        }
    }

    fn get(&self, name: &str) -> Option<&str> {
        let pair = self.pairs.iter().rev().find(|(key, _)| key == name);
        pair.map(|(_, value)| value.as_str())
    }

    /// A text that is not empty.
    pub fn text(&self, name: &str) -> Option<&str> {
        let text = self.get(name).filter(|text| !text.is_empty())?;
        if text.chars().count() > MAX_TEXT_CHARS {
            let message = format!("String should have at most {MAX_TEXT_CHARS} characters");
            self.fault(name, "string_too_long", message, text);
            return None;
        }
        if text.contains(char::is_control) {
            let message = "String should not contain control characters".to_owned();
            self.fault(name, "string_pattern_mismatch", message, text);
            return None;
        }
        Some(text)
    }

    /// A whole number within `range`, or the default when it is not there.
    pub fn int(&self, name: &str, range: RangeInclusive<u64>, default: u64) -> u64 {
        let Some(text) = self.get(name) else {
            return default;
        };
        let Ok(number) = text.trim().parse::<i128>() else {
            let message =
                "Input should be a valid integer, unable to parse string as an integer".to_owned();
            self.fault(name, "int_parsing", message, text);
            return default;
        };
        if number < i128::from(*range.start()) {
            self.below(name, text, *range.start());
        } else if number > i128::from(*range.end()) {
            self.above(name, text, *range.end());
        }
        u64::try_from(number).unwrap_or(default)
    }

    /// Seconds in `(min, max]`, or the default when it is not there.
    pub fn seconds(&self, name: &str, min: f64, max: f64, default: f64) -> f64 {
        let Some(text) = self.get(name) else {
            return default;
        };
        match text.trim().parse::<f64>() {
            Ok(number) if number.is_finite() && number > min && number <= max => number,
            Ok(number) if number <= min => {
                let message = format!("Input should be greater than {min}");
                self.fault_with(name, "greater_than", message, text, json!({"gt": min}));
                default
            }
            Ok(number) if number > max => {
                let message = format!("Input should be less than or equal to {max}");
                self.fault_with(name, "less_than_equal", message, text, json!({"le": max}));
                default
            }
            _ => {
                let message =
                    "Input should be a valid number, unable to parse string as a number".to_owned();
                self.fault(name, "float_parsing", message, text);
                default
            }
        }
    }

    /// One of some words.
    pub fn one_of(&self, name: &str, words: &[&str]) -> Option<&str> {
        let text = self.get(name)?;
        if words.contains(&text) {
            return Some(text);
        }
        let message = format!("Input should be one of {}", words.join(", "));
        self.fault(name, "enum", message, text);
        None
    }

    /// `true`/`false` in the spellings the contract's validator knows; the bare name is true.
    pub fn boolean(&self, name: &str) -> Option<bool> {
        let text = self.get(name)?;
        match text.to_ascii_lowercase().as_str() {
            "" | "true" | "1" | "yes" | "on" | "t" | "y" => Some(true),
            "false" | "0" | "no" | "off" | "f" | "n" => Some(false),
            _ => {
                let message =
                    "Input should be a valid boolean, unable to interpret input".to_owned();
                self.fault(name, "bool_parsing", message, text);
                None
            }
        }
    }

    /// An instant in RFC 3339. A `+` that was not escaped has become a space.
    pub fn instant(&self, name: &str) -> Option<Timestamp> {
        let text = self.text(name)?;
        match text.replace(' ', "+").parse::<jiff::Timestamp>() {
            Ok(instant) => Some(Timestamp(instant.as_microsecond())),
            Err(_) => {
                let message = "Input should be a valid datetime, such as 2026-11-21T02:00:00Z";
                self.fault(name, "datetime_parsing", message.to_owned(), text);
                None
            }
        }
    }

    /// A fault that the caller found.
    pub fn add_fault(&self, fault: FieldError) {
        self.faults.borrow_mut().push(fault);
    }

    fn below(&self, name: &str, text: &str, bound: u64) {
        let message = format!("Input should be greater than or equal to {bound}");
        self.fault_with(
            name,
            "greater_than_equal",
            message,
            text,
            json!({"ge": bound}),
        );
    }

    fn above(&self, name: &str, text: &str, bound: u64) {
        let message = format!("Input should be less than or equal to {bound}");
        self.fault_with(name, "less_than_equal", message, text, json!({"le": bound}));
    }

    fn fault(&self, name: &str, kind: &'static str, message: String, input: &str) {
        let loc = vec!["query".to_owned(), name.to_owned()];
        let fault = FieldError::new(loc, kind, message).input(input.into());
        self.faults.borrow_mut().push(fault);
    }

    fn fault_with(
        &self,
        name: &str,
        kind: &'static str,
        message: String,
        input: &str,
        context: serde_json::Value,
    ) {
        self.fault(name, kind, message, input);
        let mut faults = self.faults.borrow_mut();
        if let Some(last) = faults.pop() {
            faults.push(last.context(context));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_read_as_in_the_contract() {
        let query = Query::parse("limit=100000&after=-1");
        query.int("limit", 1..=2000, 200);
        query.int("after", 0..=u64::MAX, 0);
        assert_eq!(
            query.finish().unwrap_err().detail,
            json!([
                {"type": "less_than_equal", "loc": ["query", "limit"],
                 "msg": "Input should be less than or equal to 2000", "input": "100000", "ctx": {"le": 2000}},
                {"type": "greater_than_equal", "loc": ["query", "after"],
                 "msg": "Input should be greater than or equal to 0", "input": "-1", "ctx": {"ge": 0}},
            ])
        );
    }

    #[test]
    fn each_kind_has_its_bounds() {
        let query = Query::parse("h=0.1&n=nan&b=maybe&i=1e3&t=%00");
        query.seconds("h", 0.1, 60.0, 5.0);
        query.seconds("n", 0.1, 60.0, 5.0);
        query.boolean("b");
        query.int("i", 0..=9, 0);
        query.text("t");
        let errors = query.finish().unwrap_err().errors;
        let kinds: Vec<_> = errors.iter().map(|e| e.kind).collect();
        let expected = [
            "greater_than",
            "float_parsing",
            "bool_parsing",
            "int_parsing",
            "string_pattern_mismatch",
        ];
        assert_eq!(kinds, expected);
    }
}
