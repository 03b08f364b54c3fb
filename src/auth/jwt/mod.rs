//! JSON Web Tokens that are shown as Bearer (RFC 7519, hardened by RFC 8725): told from other tokens by their
//! form, and read only as far as is needed to know which key may verify them.
//!
//! | file | holds |
//! |---|---|
//! | `signing` | the gateway's own keys, and their rotation |
//! | `work` | tokens for one attempt of a run, and for one instance of a service |

pub mod signing;
pub mod work;

use jsonwebtoken::{Header, decode_header};

/// Longest token that is looked at: issuers that list groups in theirs need some KiB.
pub const MAX_BYTES: usize = 8 << 10;

/// Longest key id that is looked up.
const MAX_KID_BYTES: usize = 256;

/// Difference between clocks that is forgiven, in seconds.
pub const LEEWAY_S: u64 = 5;

/// Whether a token has the form of a JWT: the base64 of `{"`, and three parts. None of ours begins so.
pub fn has_form(token: &[u8]) -> bool {
    token.starts_with(b"eyJ") && token.iter().filter(|byte| **byte == b'.').count() == 2
}

/// A token's header, if it is one that may be gone by: a key id, a type, and nothing that we would have to
/// understand and do not (`crit`, RFC 7515 section 4.1.11). `alg` is one of the signing algorithms, since `none` is
/// no member of the type. Keys that a token brings along (`jwk`, `jku`, `x5u`, `x5c`) are never looked at.
pub fn header(token: &[u8]) -> Option<Header> {
    if token.len() > MAX_BYTES {
        return None;
    }
    let header = decode_header(token).ok()?;
    let sound = header.crit.is_none()
        && header.typ.is_some()
        && header
            .kid
            .as_ref()
            .is_some_and(|kid| kid.len() <= MAX_KID_BYTES);
    sound.then_some(header)
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;

    use super::*;

    fn token(header: &str) -> String {
        format!("{}.e30.AA", URL_SAFE_NO_PAD.encode(header))
    }

    #[test]
    fn only_a_sound_header_is_gone_by() {
        let good = token(r#"{"alg":"EdDSA","typ":"a","kid":"k","jwk":{"kty":"oct","k":"AA"}}"#);
        assert!(has_form(good.as_bytes()));
        assert!(header(good.as_bytes()).is_some());
        for bad in [
            r#"{"alg":"none","typ":"a","kid":"k"}"#,
            r#"{"alg":"EdDSA","typ":"a"}"#,
            r#"{"alg":"EdDSA","kid":"k"}"#,
            r#"{"alg":"EdDSA","typ":"a","kid":"k","crit":["b64"],"b64":false}"#,
            r#"{"alg":["EdDSA"],"typ":"a","kid":"k"}"#,
            r#"{"alg":"EdDSA","alg":"HS256","typ":"a","kid":"k"}"#,
            "{",
        ] {
            assert!(header(token(bad).as_bytes()).is_none(), "{bad}");
        }
        let long = format!("{good}{}", "A".repeat(MAX_BYTES));
        assert!(header(long.as_bytes()).is_none());
        for other in ["rgt_user_x", "agw_x.y.z", "eyJ.x", "eyJ.a.b.c"] {
            assert!(!has_form(other.as_bytes()), "{other}");
        }
    }
}
