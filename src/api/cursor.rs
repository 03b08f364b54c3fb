//! Cursors of listings: opaque to the caller, bound to the filters they were made under, so that one cannot
//! be carried to another listing.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::error::{ApiError, ErrorCode};
use crate::domain::ids::{RunId, Seq};

/// Bytes of the signature that a cursor carries: a forged one only finds another place in the caller's own
/// listing, so 128 bits are plenty.
const TAG_BYTES: usize = 16;

/// The place after `last`, in the listing that `filters` describes.
pub fn encode(key: &[u8; 32], filters: &str, last: RunId) -> String {
    let mut bytes = last.0.as_bytes().to_vec();
    bytes.extend_from_slice(&tag(key, filters, last));
    URL_SAFE_NO_PAD.encode(bytes)
}

/// The place that a cursor names; 400 when it was made for other filters, or not by us.
pub fn decode(key: &[u8; 32], filters: &str, cursor: &str) -> Result<RunId, ApiError> {
    parse(key, filters, cursor).ok_or_else(|| {
        ApiError::new(
            ErrorCode::InvalidCursor,
            "after is not a cursor of this listing; start again without it, or with the same filters",
        )
    })
}

/// The place after record `last`.
pub fn encode_seq(key: &[u8; 32], filters: &str, last: Seq) -> String {
    encode(key, filters, RunId(Uuid::from_u128(last.into())))
}

/// The record that a cursor of `encode_seq` names.
pub fn decode_seq(key: &[u8; 32], filters: &str, cursor: &str) -> Result<Seq, ApiError> {
    let RunId(place) = decode(key, filters, cursor)?;
    // Larger ones are none of ours, and would show nothing.
    Ok(Seq::try_from(place.as_u128()).unwrap_or_default())
}

fn parse(key: &[u8; 32], filters: &str, cursor: &str) -> Option<RunId> {
    let bytes = URL_SAFE_NO_PAD.decode(cursor).ok()?;
    let (id, given) = bytes.split_at_checked(16)?;
    let last = RunId(Uuid::from_slice(id).ok()?);
    bool::from(given.ct_eq(&tag(key, filters, last))).then_some(last)
}

fn tag(key: &[u8; 32], filters: &str, last: RunId) -> [u8; TAG_BYTES] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(last.0.as_bytes()).update(filters.as_bytes());
    let mut tag = [0; TAG_BYTES];
    hasher.finalize_xof().fill(&mut tag);
    tag
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_holds_for_its_filters_only() {
        let (key, run) = ([7; 32], RunId(Uuid::now_v7()));
        let cursor = encode(&key, "status=queued", run);
        assert_eq!(decode(&key, "status=queued", &cursor).unwrap(), run);
        for (filters, cursor) in [
            ("", cursor.as_str()),
            ("status=queued", "x"),
            ("status=queued", ""),
        ] {
            assert_eq!(
                decode(&key, filters, cursor).unwrap_err().code,
                ErrorCode::InvalidCursor
            );
        }
        assert!(decode(&[8; 32], "status=queued", &cursor).is_err());
    }
}
