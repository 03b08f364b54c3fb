//! JSON as it is accepted: UTF-8, no member twice, nesting bounded, and the members of the top object
//! kept as the bytes they came in, so that a job's payload is passed on unchanged.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use super::error::{ApiError, ErrorCode};

/// Levels of nesting that are accepted, payloads included: deeper JSON is an attack or a mistake.
pub const MAX_JSON_DEPTH: usize = 64;

/// The members of an object in the order of their names, each as the bytes it came in.
#[derive(Default)]
pub struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> Members<'a> {
    pub fn get(&self, name: &str) -> Option<&'a RawValue> {
        // Objects with many members are read as maps, not by name.
        let member = self.iter().find(|(of, _)| *of == name)?;
        Some(member.1)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &'a RawValue)> {
        self.0.iter().map(|(name, raw)| (&**name, *raw))
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MembersVisitor)
    }
}

struct MembersVisitor;

impl<'de> Visitor<'de> for MembersVisitor {
    type Value = Members<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
        let mut members = Vec::new();
        while let Some((Name(name), raw)) = map.next_entry()? {
            members.push((name, raw));
        }
        members.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        Ok(Members(members))
    }
}

/// Checks all of `bytes` and tells it as text.
pub fn check(bytes: &[u8]) -> Result<&str, ApiError> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        ApiError::new(
            ErrorCode::InvalidUtf8,
            format!("The body is not UTF-8 (byte {})", error.valid_up_to()),
        )
    })?;
    let fault = Cell::new(None);
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let walk = Walk {
        depth: 0,
        fault: &fault,
    };
    let walked = walk
        .deserialize(&mut deserializer)
        .and_then(|()| deserializer.end());
    match walked {
        Ok(()) => Ok(text),
        Err(error) => Err(refusal(&error, fault.take())),
    }
}

/// Checked JSON with members sorted, without white space, texts in their shortest form. Numbers stay as they were
/// written: as doubles, large ones that differ would be the same.
pub fn canonical(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    match serde_json::from_slice::<&RawValue>(bytes) {
        Ok(raw) => write_canonical(raw.get(), &mut out),
        Err(_) => out.extend_from_slice(bytes),
    }
    out
}

/// As deep as `check` lets it be.
fn write_canonical(text: &str, out: &mut Vec<u8>) {
    match text.as_bytes().first() {
        Some(b'{') => {
            let members: BTreeMap<String, &RawValue> =
                serde_json::from_str(text).unwrap_or_default();
            out.push(b'{');
            for (name, value) in members {
                out.extend_from_slice(Value::from(name).to_string().as_bytes());
                out.push(b':');
                write_canonical(value.get(), out);
                out.push(b',');
            }
            out.push(b'}');
        }
        Some(b'[') => {
            let items: Vec<&RawValue> = serde_json::from_str(text).unwrap_or_default();
            out.push(b'[');
            for item in items {
                write_canonical(item.get(), out);
                out.push(b',');
            }
            out.push(b']');
        }
        Some(b'"') => {
            let value: Value = serde_json::from_str(text).unwrap_or_default();
            out.extend_from_slice(value.to_string().as_bytes());
        }
        _ => out.extend_from_slice(text.as_bytes()),
    }
}

fn refusal(error: &serde_json::Error, fault: Option<Fault>) -> ApiError {
    let code = match fault {
        Some(Fault::TooDeep) => ErrorCode::JsonTooDeep,
        Some(Fault::Duplicate) => ErrorCode::DuplicateMember,
        None => ErrorCode::InvalidJson,
    };
    ApiError::new(code, format!("JSON decode error: {error}"))
}

/// What the walk itself refuses.
#[derive(Clone, Copy)]
enum Fault {
    TooDeep,
    Duplicate,
}

/// Visits every value once and keeps none.
#[derive(Clone, Copy)]
struct Walk<'a> {
    depth: usize,
    fault: &'a Cell<Option<Fault>>,
}

impl Walk<'_> {
    fn deeper<E: serde::de::Error>(self) -> Result<Self, E> {
        if self.depth >= MAX_JSON_DEPTH {
            self.fault.set(Some(Fault::TooDeep));
            return Err(E::custom(format_args!(
                "nested deeper than {MAX_JSON_DEPTH} levels"
            )));
        }
        Ok(Walk {
            depth: self.depth + 1,
            ..self
        })
    }
}

/// A member's name, borrowed from the text unless it has escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

/// The names of an object's members: few are compared one by one, as most objects have few; more are hashed.
#[derive(Default)]
struct Names<'a> {
    few: Vec<Cow<'a, str>>,
    rest: HashSet<Cow<'a, str>>,
}

impl<'a> Names<'a> {
    const FEW: usize = 16;

    fn has(&self, name: &str) -> bool {
        self.few.iter().any(|seen| seen == name) || self.rest.contains(name)
    }

    fn add(&mut self, name: Cow<'a, str>) {
        if self.few.len() < Self::FEW {
            self.few.push(name);
        } else {
            self.rest.insert(name);
        }
    }
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }
    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }
    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }
    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }
    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }
    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let inner = self.deeper()?;
        while seq.next_element_seed(inner)?.is_some() {}
        Ok(())
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let inner = self.deeper()?;
        let mut seen = Names::default();
        while let Some(Name(name)) = map.next_key()? {
            if seen.has(&name) {
                self.fault.set(Some(Fault::Duplicate));
                return Err(A::Error::custom(format_args!("duplicate member {name:?}")));
            }
            seen.add(name);
            map.next_value_seed(inner)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(bytes: &[u8]) -> Option<&'static str> {
        check(bytes).err().map(|error| error.code.as_str())
    }

    #[test]
    fn sound_json_passes() {
        assert_eq!(
            code(br#"{"a":[1,2.5,null,true,"x",{"a":{}}],"b":-7}"#),
            None
        );
        let deepest = format!("{}{}", "[".repeat(64), "]".repeat(64));
        assert_eq!(code(deepest.as_bytes()), None);
    }

    #[test]
    fn the_canonical_form_keeps_numbers_and_drops_the_rest() {
        let same = |a: &str, b: &str| canonical(a.as_bytes()) == canonical(b.as_bytes());
        assert!(same(
            r#" {"b":[1, {"d":"\u00e9","c":null}],"a":true} "#,
            r#"{"a":true,"b":[1,{"c":null,"d":"é"}]}"#
        ));
        for (a, b) in [
            ("[1,2]", "[2,1]"),
            ("12345678901234567890123", "12345678901234567890124"),
            (r#"{"a":"1"}"#, r#"{"a":1}"#),
            ("[[1],2]", "[1,[2]]"),
        ] {
            assert!(!same(a, b), "{a} {b}");
        }
    }

    #[test]
    fn each_fault_has_its_code() {
        assert_eq!(
            code(b"{\"a\":1,\"b\":{\"x\":1,\"x\":2}}"),
            Some("duplicate_member")
        );
        let too_deep = format!("{}{}", "[".repeat(65), "]".repeat(65));
        assert_eq!(code(too_deep.as_bytes()), Some("json_too_deep"));
        assert_eq!(code("[".repeat(100_000).as_bytes()), Some("json_too_deep"));
        assert_eq!(code(b"\xff\xfe"), Some("invalid_utf8"));
        for bad in [
            "",
            "{",
            "{}x",
            "{a:1}",
            "NaN",
            "1e999",
            "\"\\ud800\"",
            "{\"a\":}",
        ] {
            assert_eq!(code(bad.as_bytes()), Some("invalid_json"), "{bad}");
        }
    }
}
