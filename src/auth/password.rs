//! Passwords: argon2id with OWASP's parameters, peppered with a key that lies beside the ledger, so that the ledger
//! or an export alone is no use to a guesser. Takes tens of milliseconds and 19 MiB, so it is done off the runtime
//! and few at a time.

use std::sync::Arc;

use argon2::password_hash::PasswordVerifier;
use argon2::{Algorithm, Argon2, Params, PasswordHasher, Version};

use super::secret::TokenKey;
use crate::domain::identity::PasswordHash;
use crate::random;

/// Fewest characters of a password: there is no list of common ones to refuse.
pub const MIN_CHARS: usize = 12;

/// Most: enough for any sentence.
pub const MAX_CHARS: usize = 256;

/// OWASP's minimum for argon2id (Password Storage Cheat Sheet): 19 MiB, two passes, one lane.
const MEMORY_KIB: u32 = 19_456;
const PASSES: u32 = 2;
const LANES: u32 = 1;

/// Of NIST SP 800-132.
const SALT_BYTES: usize = 16;

/// What is kept where no user is: no password has it, and to find that out costs as much as with any other.
const NOBODY: &str = "$argon2id$v=19$m=19456,t=2,p=1$bm9ib2R5J3Mgc2FsdC4uLg$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// What a password turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Right {
        /// Its hash has older parameters than a new one would have.
        is_outdated: bool,
    },
    Wrong,
}

/// Why there is no hash: a bug, since the parameters are constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a password could not be hashed")]
pub struct HashError;

/// Hashes and checks passwords.
#[derive(Clone)]
pub struct Passwords {
    pepper: Arc<[u8; 32]>,
}

impl Passwords {
    /// With a pepper derived from the gateway's token key.
    pub fn new(key: &TokenKey) -> Passwords {
        let pepper = key.derive("rungate 2026-11 password pepper");
        Passwords {
            pepper: Arc::new(pepper),
        }
    }

    fn argon2(&self) -> Result<Argon2<'_>, HashError> {
        let params = Params::new(MEMORY_KIB, PASSES, LANES, None).map_err(|_| HashError)?;
        let (algorithm, version) = (Algorithm::Argon2id, Version::V0x13);
        Argon2::new_with_secret(&*self.pepper, algorithm, version, params).map_err(|_| HashError)
    }

    /// What is kept of a password.
    pub fn hash(&self, password: &str) -> Result<PasswordHash, HashError> {
        let salt = random::bytes::<SALT_BYTES>();
        let hashed = self.argon2()?;
        let hashed = hashed.hash_password_with_salt(password.as_bytes(), &salt);
        Ok(PasswordHash(hashed.map_err(|_| HashError)?.to_string()))
    }

    /// A hash with older parameters.
    #[cfg(test)]
    pub fn hash_weakly(&self, password: &str) -> PasswordHash {
        let params = Params::new(64, 1, 1, None).unwrap();
        let argon2 =
            Argon2::new_with_secret(&*self.pepper, Algorithm::Argon2id, Version::V0x13, params);
        let hashed = argon2.unwrap();
        let hashed = hashed.hash_password_with_salt(password.as_bytes(), &[7; SALT_BYTES]);
        PasswordHash(hashed.unwrap().to_string())
    }

    /// Whether a password is the one that was kept. Without one the same work is done, and it is wrong.
    pub fn check(&self, password: &str, kept: Option<&PasswordHash>) -> Verdict {
        let phc = kept.map_or(NOBODY, |kept| kept.0.as_str());
        let Ok(argon2) = self.argon2() else {
            return Verdict::Wrong;
        };
        let is_right = argon2.verify_password(password.as_bytes(), phc).is_ok();
        match is_right && kept.is_some() {
            true => Verdict::Right {
                is_outdated: is_outdated(phc),
            },
            false => Verdict::Wrong,
        }
    }
}

fn is_outdated(phc: &str) -> bool {
    let now = format!("$argon2id$v=19$m={MEMORY_KIB},t={PASSES},p={LANES}$");
    !phc.starts_with(&now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn argon2id_is_the_standard_one() {
        // RFC 9106 section 5.3.
        let params = argon2::ParamsBuilder::new()
            .m_cost(32)
            .t_cost(3)
            .p_cost(4)
            .data(argon2::AssociatedData::new(&[4; 12]).unwrap())
            .build()
            .unwrap();
        let secret = [3; 8];
        let argon2 = Argon2::new_with_secret(&secret, Algorithm::Argon2id, Version::V0x13, params);
        let mut tag = [0; 32];
        argon2
            .unwrap()
            .hash_password_into(&[1; 32], &[2; 16], &mut tag)
            .unwrap();
        let expected = [
            0x0d, 0x64, 0x0d, 0xf5, 0x8d, 0x78, 0x76, 0x6c, 0x08, 0xc0, 0x37, 0xa3, 0x4a, 0x8b,
            0x53, 0xc9, 0xd0, 0x1e, 0xf0, 0x45, 0x2d, 0x75, 0xb6, 0x5e, 0xb5, 0x25, 0x20, 0xe9,
            0x6b, 0x01, 0xe6, 0x59,
        ];
        assert_eq!(tag, expected);
    }

    #[test]
    fn a_hash_fits_its_password_under_its_pepper_only() {
        let key = TokenKey::random();
        let passwords = Passwords::new(&key);
        let kept = passwords.hash("correct horse battery").unwrap();
        assert!(
            kept.0.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"),
            "{}",
            kept.0
        );
        let right = Verdict::Right { is_outdated: false };
        assert_eq!(passwords.check("correct horse battery", Some(&kept)), right);
        assert_eq!(
            passwords.check("correct horse batterz", Some(&kept)),
            Verdict::Wrong
        );
        let other = Passwords::new(&TokenKey::random());
        assert_eq!(
            other.check("correct horse battery", Some(&kept)),
            Verdict::Wrong
        );
        assert!(!format!("{kept:?}").contains("argon2id"));
    }

    #[test]
    fn nobody_has_a_password_and_costs_the_same_work() {
        let parsed = argon2::PasswordHash::new(NOBODY).unwrap();
        let params = Params::try_from(&parsed).unwrap();
        let cost = (params.m_cost(), params.t_cost(), params.p_cost());
        assert_eq!(cost, (MEMORY_KIB, PASSES, LANES));
        assert!(!is_outdated(NOBODY));
        let passwords = Passwords::new(&TokenKey::random());
        assert_eq!(passwords.check("", None), Verdict::Wrong);
    }

    #[test]
    fn a_weaker_hash_is_outdated() {
        let passwords = Passwords::new(&TokenKey::random());
        let weak = passwords.hash_weakly("p");
        let outdated = Verdict::Right { is_outdated: true };
        assert_eq!(passwords.check("p", Some(&weak)), outdated);
    }
}
