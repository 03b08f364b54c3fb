//! Reads the members of a JSON object one by one and collects every fault, in the words of the
//! contract's validator (`contracts/run-gateway.md` section 1), before anything is done.

use std::cell::RefCell;
use std::ops::RangeInclusive;
use std::rc::Rc;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::error::{ApiError, FieldError};
use super::json::Members;

/// The faults found so far, shared by an object and those inside it.
type Faults = Rc<RefCell<Vec<FieldError>>>;

/// A JSON object being read.
pub struct Fields<'a> {
    members: Members<'a>,
    loc: Vec<String>,
    faults: Faults,
}

/// How long a text may be, in characters, and whether control characters may be in it.
#[derive(Clone, Copy)]
pub struct TextRule {
    pub min: usize,
    pub max: usize,
    /// An identifier or a name: no control characters, NUL among them.
    pub plain: bool,
}

impl TextRule {
    /// 1 to `max` characters, none a control character.
    pub const fn name(max: usize) -> Self {
        Self {
            min: 1,
            max,
            plain: true,
        }
    }

    /// Up to `max` characters of any kind but NUL.
    pub const fn prose(max: usize) -> Self {
        Self {
            min: 0,
            max,
            plain: false,
        }
    }
}

impl<'a> Fields<'a> {
    /// Of a whole body that was checked before.
    pub fn of_body(text: &'a str) -> Result<Fields<'a>, ApiError> {
        let loc = vec!["body".to_owned()];
        match serde_json::from_str(text) {
            Ok(members) => Ok(Fields {
                members,
                loc,
                faults: Faults::default(),
            }),
            Err(_) => Err(ApiError::validation(vec![FieldError::new(
                loc,
                "model_attributes_type",
                "Input should be a valid dictionary or object to extract fields from",
            )])),
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

    /// Records a fault for every member that is none of `names`.
    pub fn forbid_others(&self, names: &[&str]) {
        let others = self
            .members
            .iter()
            .filter(|(name, _)| !names.contains(name));
        for (name, _) in others {
            self.fault(name, "extra_forbidden", "Extra inputs are not permitted");
        }
    }

    /// True or false, if it is there.
    pub fn boolean(&self, name: &str) -> Option<bool> {
        let value = self.value(name)?;
        if !value.is_boolean() {
            let message = "Input should be a valid boolean";
            self.wrong(name, "bool_type", message, value);
            return None;
        }
        value.as_bool()
    }

    /// Whether a member is there and not null.
    pub fn has(&self, name: &str) -> bool {
        self.raw(name).is_some()
    }

    /// A member as it came; null counts as absent.
    pub fn raw(&self, name: &str) -> Option<&'a RawValue> {
        self.members.get(name).filter(|raw| raw.get() != "null")
    }

    /// Whether a member is there and says null.
    pub fn is_null(&self, name: &str) -> bool {
        self.members.get(name).is_some() && !self.has(name)
    }

    /// Records a fault of a member.
    pub fn fault(&self, name: &str, kind: &'static str, message: impl Into<String>) {
        self.record(FieldError::new(self.at(name), kind, message));
    }

    /// Records that a required member is missing.
    pub fn missing(&self, name: &str) {
        let whole: serde_json::Map<String, Value> = self
            .members
            .iter()
            .filter_map(|(key, raw)| Some((key.to_owned(), serde_json::from_str(raw.get()).ok()?)))
            .collect();
        self.record(
            FieldError::new(self.at(name), "missing", "Field required").input(Value::Object(whole)),
        );
    }

    /// A required text; empty when it is missing or wrong, with the fault recorded.
    pub fn required_text(&self, name: &str, rule: TextRule) -> String {
        if !self.has(name) {
            self.missing(name);
        }
        self.text(name, rule).unwrap_or_default()
    }

    /// A text, if there is one.
    pub fn text(&self, name: &str, rule: TextRule) -> Option<String> {
        let value = self.value(name)?;
        match &value {
            Value::String(text) => self.check_text(|| self.at(name), text, rule),
            _ => {
                self.wrong(name, "string_type", "Input should be a valid string", value);
                None
            }
        }
    }

    /// A text that no fault may tell back: a token, a password. Up to `max` bytes; not empty.
    pub fn secret(&self, name: &str, max: usize) -> Option<String> {
        match self.value(name)? {
            Value::String(text) if (1..=max).contains(&text.len()) => Some(text),
            _ => {
                let message = format!("Input should be a text of 1 to {max} bytes");
                self.fault(name, "string_type", message);
                None
            }
        }
    }

    /// `loc` is asked for only when there is a fault.
    fn check_text(
        &self,
        loc: impl FnOnce() -> Vec<String>,
        text: &str,
        rule: TextRule,
    ) -> Option<String> {
        let length = text.chars().count();
        let forbidden = |c: char| c == '\0' || (rule.plain && c.is_control());
        let fault = if length < rule.min {
            let message = format!("String should have at least {} character", rule.min);
            FieldError::new(loc(), "string_too_short", message)
                .context(json!({"min_length": rule.min}))
        } else if length > rule.max {
            let message = format!("String should have at most {} characters", rule.max);
            FieldError::new(loc(), "string_too_long", message)
                .context(json!({"max_length": rule.max}))
        } else if text.contains(forbidden) {
            let message = "String should not contain control characters";
            FieldError::new(loc(), "string_pattern_mismatch", message)
        } else {
            return Some(text.to_owned());
        };
        self.record(fault.input(text.into()));
        None
    }

    /// A whole number within `range`, if there is one.
    pub fn int(&self, name: &str, range: RangeInclusive<u64>) -> Option<u64> {
        let value = self.value(name)?;
        let number = match &value {
            Value::Number(number) => number
                .as_i64()
                .map(i128::from)
                .or_else(|| number.as_u64().map(i128::from))
                .or_else(|| whole(number.as_f64()?)),
            _ => {
                self.wrong(name, "int_type", "Input should be a valid integer", value);
                return None;
            }
        };
        let Some(number) = number else {
            let message = "Input should be a valid integer, got a number with a fractional part";
            self.wrong(name, "int_from_float", message, value);
            return None;
        };
        if number < i128::from(*range.start()) {
            self.below(name, json!(range.start()), value);
            None
        } else if number > i128::from(*range.end()) {
            self.above(name, json!(range.end()), value);
            None
        } else {
            u64::try_from(number).ok()
        }
    }

    /// A finite number within `range`, if there is one.
    pub fn float(&self, name: &str, range: RangeInclusive<f64>) -> Option<f64> {
        let value = self.value(name)?;
        let Some(number) = value.as_f64() else {
            self.wrong(name, "float_type", "Input should be a valid number", value);
            return None;
        };
        if number < *range.start() {
            self.below(name, json!(range.start()), value);
            None
        } else if number > *range.end() {
            self.above(name, json!(range.end()), value);
            None
        } else {
            Some(number)
        }
    }

    /// Seconds, as a whole or a broken number, told in milliseconds.
    pub fn seconds_as_ms(&self, name: &str, range: RangeInclusive<f64>) -> Option<u64> {
        // The range's end bounds it far below u64's.
        self.float(name, range)
            .map(|s| (s * 1_000.0).round() as u64)
    }

    /// An object inside, if it is there.
    pub fn object(&self, name: &str) -> Option<Fields<'a>> {
        let raw = self.raw(name)?;
        match serde_json::from_str(raw.get()) {
            Ok(members) => Some(Fields {
                members,
                loc: self.at(name),
                faults: Rc::clone(&self.faults),
            }),
            Err(_) => {
                let value = self.value(name).unwrap_or_default();
                self.wrong(
                    name,
                    "dict_type",
                    "Input should be a valid dictionary",
                    value,
                );
                None
            }
        }
    }

    /// An array of objects, at most `max` of them.
    pub fn objects(&self, name: &str, max: usize) -> Option<Vec<Fields<'a>>> {
        let items: Vec<&RawValue> = self.array(name, max)?;
        let mut objects = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            let mut loc = self.at(name);
            loc.push(index.to_string());
            match serde_json::from_str(item.get()) {
                Ok(members) => objects.push(Fields {
                    members,
                    loc,
                    faults: Rc::clone(&self.faults),
                }),
                Err(_) => self.record(
                    FieldError::new(loc, "dict_type", "Input should be a valid dictionary")
                        .input(value_of(item)),
                ),
            }
        }
        Some(objects)
    }

    /// An array of texts, each by `rule`, at most `max` of them.
    pub fn texts(&self, name: &str, max: usize, rule: TextRule) -> Option<Vec<String>> {
        let items: Vec<Value> = self.array(name, max)?;
        let mut texts = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            let loc = || {
                let mut loc = self.at(name);
                loc.push(index.to_string());
                loc
            };
            match item {
                Value::String(text) => texts.extend(self.check_text(loc, &text, rule)),
                other => self.record(
                    FieldError::new(loc(), "string_type", "Input should be a valid string")
                        .input(other),
                ),
            }
        }
        Some(texts)
    }

    /// An object of texts, at most `max` members, names and texts by their rules.
    pub fn text_map(
        &self,
        name: &str,
        max: usize,
        key_rule: TextRule,
        rule: TextRule,
    ) -> Option<Vec<(String, String)>> {
        let inner = self.object(name)?;
        if inner.members.len() > max {
            let message = format!(
                "Dictionary should have at most {max} items after validation, not {}",
                inner.members.len()
            );
            self.fault(name, "too_long", message);
            return None;
        }
        let mut pairs = Vec::with_capacity(inner.members.len());
        for (key, raw) in inner.members.iter() {
            let key_fits = inner.check_text(|| inner.at(key), key, key_rule);
            match (key_fits, value_of(raw)) {
                (Some(key), Value::String(text)) => {
                    if let Some(text) = inner.check_text(|| inner.at(&key), &text, rule) {
                        pairs.push((key, text));
                    }
                }
                (Some(key), value) => {
                    inner.wrong(&key, "string_type", "Input should be a valid string", value);
                }
                (None, _) => {}
            }
        }
        Some(pairs)
    }

    fn array<T: Deserialize<'a>>(&self, name: &str, max: usize) -> Option<Vec<T>> {
        let raw = self.raw(name)?;
        let Ok(items) = serde_json::from_str::<Vec<T>>(raw.get()) else {
            let message = "Input should be a valid list";
            self.wrong(name, "list_type", message, value_of(raw));
            return None;
        };
        if items.len() > max {
            let message = format!(
                "List should have at most {max} items after validation, not {}",
                items.len()
            );
            self.fault(name, "too_long", message);
            return None;
        }
        Some(items)
    }

    fn value(&self, name: &str) -> Option<Value> {
        Some(value_of(self.raw(name)?))
    }

    fn at(&self, name: &str) -> Vec<String> {
        let mut loc = self.loc.clone();
        loc.push(name.to_owned());
        loc
    }

    fn record(&self, fault: FieldError) {
        self.faults.borrow_mut().push(fault);
    }

    fn wrong(&self, name: &str, kind: &'static str, message: &str, value: Value) {
        self.record(FieldError::new(self.at(name), kind, message).input(value));
    }

    fn below(&self, name: &str, bound: Value, value: Value) {
        let message = format!("Input should be greater than or equal to {bound}");
        self.record(
            FieldError::new(self.at(name), "greater_than_equal", message)
                .input(value)
                .context(json!({"ge": bound})),
        );
    }

    fn above(&self, name: &str, bound: Value, value: Value) {
        let message = format!("Input should be less than or equal to {bound}");
        self.record(
            FieldError::new(self.at(name), "less_than_equal", message)
                .input(value)
                .context(json!({"le": bound})),
        );
    }
}

/// A member's value: the body was checked as a whole, so it parses.
fn value_of(raw: &RawValue) -> Value {
    serde_json::from_str(raw.get()).unwrap_or_default()
}

/// A float that is a whole number, as the contract's validator takes it.
fn whole(number: f64) -> Option<i128> {
    (number.fract() == 0.0 && number.abs() < 1e18).then_some(number as i128)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detail(body: &str, read: impl FnOnce(&Fields)) -> Value {
        let fields = Fields::of_body(body).unwrap();
        read(&fields);
        fields.finish().unwrap_err().detail
    }

    #[test]
    fn a_missing_field_reads_as_in_the_contract() {
        let detail = detail(r#"{"run_id":"r","type":"pause"}"#, |f| {
            f.required_text("command_id", TextRule::name(200));
        });
        assert_eq!(
            detail,
            json!([{"type": "missing", "loc": ["body", "command_id"], "msg": "Field required",
                "input": {"run_id": "r", "type": "pause"}}])
        );
    }

    #[test]
    fn a_wrong_object_reads_as_in_the_contract() {
        let detail = detail(r#"{"input_data":"x"}"#, |f| {
            f.object("input_data");
        });
        assert_eq!(
            detail,
            json!([{"type": "dict_type", "loc": ["body", "input_data"],
                "msg": "Input should be a valid dictionary", "input": "x"}])
        );
    }

    #[test]
    fn numbers_are_bounded_and_whole() {
        let fields = Fields::of_body(r#"{"a":3,"b":2.5,"c":-1,"d":9,"e":"3","f":2.0}"#).unwrap();
        assert_eq!(fields.int("a", 1..=5), Some(3));
        assert_eq!(fields.int("f", 1..=5), Some(2));
        for name in ["b", "c", "d", "e"] {
            assert_eq!(fields.int(name, 1..=5), None, "{name}");
        }
        let kinds: Vec<_> = fields
            .finish()
            .unwrap_err()
            .errors
            .iter()
            .map(|e| e.kind)
            .collect();
        let expected = [
            "int_from_float",
            "greater_than_equal",
            "less_than_equal",
            "int_type",
        ];
        assert_eq!(kinds, expected);
    }

    #[test]
    fn names_refuse_nul_and_length() {
        let long = "x".repeat(9);
        let body = format!(r#"{{"a":"x\u0000y","b":"{long}","c":""}}"#);
        let fields = Fields::of_body(&body).unwrap();
        for name in ["a", "b", "c"] {
            assert_eq!(fields.text(name, TextRule::name(8)), None, "{name}");
        }
        assert_eq!(fields.finish().unwrap_err().errors.len(), 3);
    }
}
