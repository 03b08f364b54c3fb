//! What an error tells back of a request, without what its names say is a secret.

use serde_json::Value;

/// What stands in place of a secret.
const REDACTED: &str = "<redacted>";

/// Parts of names of members that hold secrets.
const SECRET_NAMES: &[&str] = &[
    "password",
    "passwd",
    "secret",
    "token",
    "api_key",
    "apikey",
    "authorization",
    "credential",
    "cookie",
];

/// Whether a member of this name holds a secret.
pub fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    SECRET_NAMES.iter().any(|part| name.contains(part))
}

/// The value of a member called `name`, its secrets and those below it left out.
pub fn without_secrets(name: &str, value: Value) -> Value {
    match value {
        Value::Null | Value::Bool(_) => value,
        _ if is_secret(name) => REDACTED.into(),
        Value::Object(members) => {
            let plain = |(name, value): (String, Value)| {
                let value = without_secrets(&name, value);
                (name, value)
            };
            Value::Object(members.into_iter().map(plain).collect())
        }
        Value::Array(members) => {
            let plain = |value| without_secrets(name, value);
            Value::Array(members.into_iter().map(plain).collect())
        }
        Value::Number(_) | Value::String(_) => value,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn secrets_are_left_out_at_any_depth() {
        let body = json!({"job": {"new_Password": "x", "n": 1}, "list": [{"token": 7}], "a": "b",
            "rotate_token": true, "tokens": ["x"]});
        assert_eq!(
            without_secrets("", body),
            json!({"job": {"new_Password": REDACTED, "n": 1}, "list": [{"token": REDACTED}], "a": "b",
                "rotate_token": true, "tokens": REDACTED})
        );
        assert_eq!(without_secrets("token", json!("x")), REDACTED);
    }
}
