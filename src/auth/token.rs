//! The form of a token: `rgt_<type>_<43 base62 characters><CRC-32 in 6 base62 characters>`. The prefix and
//! the checksum let scanners of leaked secrets find it without asking anyone.

use uuid::Uuid;

const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// Random characters of a token: 43 of base62 are 256 bits.
const RANDOM_LEN: usize = 43;

/// Characters of the checksum: 62^6 > 2^32.
const CHECKSUM_LEN: usize = 6;

/// A fresh token of the given type, e.g. `admin`.
pub fn generate(kind: &str) -> String {
    let mut token = format!("rgt_{kind}_{}", random_text());
    let checksum = checksum_text(&token);
    token.push_str(&checksum);
    token
}

/// Whether a text has the form of a token of that type and its checksum agrees. Says nothing of whether
/// it is accepted.
pub fn is_well_formed(token: &str, kind: &str) -> bool {
    let Some(rest) = token
        .strip_prefix("rgt_")
        .and_then(|rest| rest.strip_prefix(kind))
        .and_then(|rest| rest.strip_prefix('_'))
    else {
        return false;
    };
    let alphabetic = rest.bytes().all(|byte| ALPHABET.contains(&byte));
    if !alphabetic || rest.len() != RANDOM_LEN + CHECKSUM_LEN {
        return false;
    }
    let (body, checksum) = token.split_at(token.len() - CHECKSUM_LEN);
    checksum_text(body) == checksum
}

/// Base62 without bias: bytes of 248 and more, the largest multiple of 62 that fits, are passed over.
fn random_text() -> String {
    let mut hasher = blake3::Hasher::new();
    // Four version 4 UUIDs carry 488 bits of the operating system's randomness.
    for _ in 0..4 {
        hasher.update(Uuid::new_v4().as_bytes());
    }
    let mut stream = hasher.finalize_xof();
    let mut text = String::with_capacity(RANDOM_LEN);
    while text.len() < RANDOM_LEN {
        let mut byte = [0u8; 1];
        stream.fill(&mut byte);
        if byte[0] < 248 {
            text.push(char::from(ALPHABET[usize::from(byte[0] % 62)]));
        }
    }
    text
}

fn checksum_text(body: &str) -> String {
    let mut value = crc32(body.as_bytes());
    let mut digits = [0u8; CHECKSUM_LEN];
    for digit in digits.iter_mut().rev() {
        *digit = ALPHABET[(value % 62) as usize];
        value /= 62;
    }
    digits.iter().map(|&byte| char::from(byte)).collect()
}

/// CRC-32 as in IEEE 802.3, bit by bit: it runs once per token.
fn crc32(bytes: &[u8]) -> u32 {
    let crc = bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 }
        })
    });
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32_is_the_standard_one() {
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
    }

    #[test]
    fn a_fresh_token_is_well_formed_and_a_changed_one_is_not() {
        let token = generate("admin");
        assert_eq!(token.len(), "rgt_admin_".len() + 49);
        assert!(is_well_formed(&token, "admin"));
        assert!(!is_well_formed(&token, "user"));
        let changed = token.replacen(token.chars().nth(12).unwrap(), "-", 1);
        assert!(!is_well_formed(&changed, "admin"));
        assert_ne!(token, generate("admin"));
    }
}
