//! Addresses of services, and what went wrong when calling them. The clients are `outbound`'s.

use std::error::Error;

/// `base` and `path` joined by exactly one slash.
pub fn join(base: &str, path: &str) -> String {
    format!(
        "{}/{}",
        base.trim_end_matches('/'),
        path.trim_start_matches('/')
    )
}

/// The innermost cause of an HTTP error, which is what tells people something: `Connection refused (os error 111)`.
pub fn error_text(error: reqwest::Error) -> String {
    if error.is_timeout() {
        return "no answer in time".into();
    }
    let error = error.without_url();
    let mut cause: &dyn Error = &error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
