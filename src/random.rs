//! Random bytes for keys, salts and secrets.

use uuid::Uuid;

/// `N` bytes of at least 256 bits of the operating system's randomness, or of all their own when they are fewer.
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut hasher = blake3::Hasher::new();
    // Four version 4 UUIDs carry 488 random bits.
    for _ in 0..4 {
        hasher.update(Uuid::new_v4().as_bytes());
    }
    let mut bytes = [0; N];
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}
