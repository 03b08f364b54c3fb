//! Checkpoints: the chain's head at a moment, signed with Ed25519, to be kept off this machine. Whoever can write the
//! ledger's file can rebuild its whole chain; it cannot make the new chain pass through an old head.

use std::fmt::Write;

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::domain::ids::Seq;
use crate::domain::time::Timestamp;

use super::error::ReadError;
use super::{Ledger, batch, record_codec, view};

/// The form of the line and of what is signed.
const VERSION: u8 = 1;

/// Bytes of a public key (RFC 8032 section 5.1.5).
pub const PUBLIC_KEY_BYTES: usize = 32;

/// A signed head, one line of JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The version of this form.
    pub checkpoint: u8,
    /// The ledger's instance id.
    pub ledger: Uuid,
    /// The last record's position; 0 when there is none.
    pub seq: Seq,
    /// Its hash, in hexadecimal.
    pub hash: String,
    /// When it was made, by the machine's clock.
    pub at: Timestamp,
    /// Tells keys apart.
    pub key_id: String,
    /// Ed25519 over [`Checkpoint::message`], in base64.
    pub signature: String,
}

/// Why a ledger is not the one that a checkpoint was made of.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    #[error("line {line} is no checkpoint of a ledger: {detail}")]
    Malformed { line: usize, detail: String },
    #[error(
        "the checkpoint of record {seq} was signed with key {found}, and the public key is {wanted}"
    )]
    OtherKey {
        seq: Seq,
        found: String,
        wanted: String,
    },
    #[error("the signature of the checkpoint of record {seq} does not fit it")]
    BadSignature { seq: Seq },
    #[error("the checkpoint of record {seq} is of another ledger, {found}")]
    OtherLedger { seq: Seq, found: Uuid },
    #[error("the ledger ends at record {tail}, before the checkpoint's {seq}: it was cut short")]
    CutShort { seq: Seq, tail: Seq },
    #[error("record {seq} is not the one that the checkpoint was made of: the chain was rewritten")]
    Rewritten { seq: Seq },
}

/// What signatures are checked with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublicKey([u8; PUBLIC_KEY_BYTES]);

impl PublicKey {
    pub fn new(bytes: [u8; PUBLIC_KEY_BYTES]) -> PublicKey {
        PublicKey(bytes)
    }

    /// From 64 hexadecimal digits.
    pub fn parse(text: &str) -> Option<PublicKey> {
        view::parse_hex(text.trim()).map(PublicKey)
    }

    /// As `parse` reads it.
    pub fn text(&self) -> String {
        view::hex(&self.0)
    }

    /// The first 16 hexadecimal digits of its blake3 hash.
    pub fn id(&self) -> String {
        view::hex(blake3::hash(&self.0).as_bytes())[..16].to_owned()
    }
}

impl Checkpoint {
    /// Of a ledger's head, with a signature by `sign`.
    pub fn make(
        ledger: &Ledger,
        at: Timestamp,
        key: &PublicKey,
        sign: impl FnOnce(&[u8]) -> Vec<u8>,
    ) -> Result<Checkpoint, ReadError> {
        let (seq, hash) = batch::tail(&*ledger.inner.store.snapshot()?)?;
        let mut made = Checkpoint {
            checkpoint: VERSION,
            ledger: ledger.instance_id(),
            seq,
            hash: view::hex(&hash),
            at,
            key_id: key.id(),
            signature: String::new(),
        };
        made.signature = STANDARD.encode(sign(&made.message()));
        Ok(made)
    }

    /// What is signed: each member on a line of its own, after a line that nothing else is signed with.
    pub fn message(&self) -> Vec<u8> {
        let mut text = format!("rungate ledger checkpoint {}\n", self.checkpoint);
        let Checkpoint {
            ledger,
            seq,
            hash,
            at,
            key_id,
            ..
        } = self;
        // Writing to a string does not fail.
        let _ = write!(text, "{ledger}\n{seq}\n{hash}\n{at}\n{key_id}\n");
        text.into_bytes()
    }

    /// The checkpoints of a file, one a line.
    pub fn read_all(text: &str) -> Result<Vec<Checkpoint>, CheckpointError> {
        let lines = text.lines().enumerate();
        let filled = lines.filter(|(_, line)| !line.trim().is_empty());
        let made = filled.map(|(index, line)| {
            let bad = |detail: String| CheckpointError::Malformed {
                line: index + 1,
                detail,
            };
            let made: Checkpoint = serde_json::from_str(line).map_err(|e| bad(e.to_string()))?;
            match made.checkpoint {
                VERSION => Ok(made),
                version => Err(bad(format!("its version {version} is not known"))),
            }
        });
        let made = made.collect::<Result<Vec<_>, _>>()?;
        if made.is_empty() {
            return Err(CheckpointError::Malformed {
                line: 1,
                detail: "there is none".to_owned(),
            });
        }
        Ok(made)
    }

    /// That it was signed with the key, and as it is.
    pub fn check_signature(&self, key: &PublicKey) -> Result<(), CheckpointError> {
        let seq = self.seq;
        if self.key_id != key.id() {
            return Err(CheckpointError::OtherKey {
                seq,
                found: self.key_id.clone(),
                wanted: key.id(),
            });
        }
        let signature = STANDARD.decode(&self.signature).unwrap_or_default();
        UnparsedPublicKey::new(&ED25519, key.0)
            .verify(&self.message(), &signature)
            .map_err(|_| CheckpointError::BadSignature { seq })
    }

    /// That a ledger with this id and tail, whose record at the checkpoint's place has this hash, went through it.
    pub fn check_ledger(
        &self,
        ledger: Uuid,
        tail: Seq,
        hash: Option<&str>,
    ) -> Result<(), CheckpointError> {
        let seq = self.seq;
        if self.ledger != ledger {
            let found = self.ledger;
            return Err(CheckpointError::OtherLedger { seq, found });
        }
        if seq > tail {
            return Err(CheckpointError::CutShort { seq, tail });
        }
        match hash {
            Some(hash) if hash == self.hash => Ok(()),
            _ => Err(CheckpointError::Rewritten { seq }),
        }
    }
}

impl Ledger {
    /// A record's hash in hexadecimal; before the first record stands the hash that the chain begins with.
    pub fn hash_at(&self, seq: Seq) -> Result<Option<String>, ReadError> {
        if seq == 0 {
            return Ok(Some(view::hex(&record_codec::GENESIS)));
        }
        let record = self.record(seq)?;
        Ok(record.map(|record| view::hex(&record.hash)))
    }

    /// That this ledger went through each of the checkpoints. Says nothing of the records between them: `verify` does.
    ///
    /// # Errors
    /// A read of the ledger, within it the first checkpoint that does not hold.
    pub fn check(
        &self,
        checkpoints: &[Checkpoint],
        key: &PublicKey,
    ) -> Result<Result<(), CheckpointError>, ReadError> {
        for made in checkpoints {
            let hash = self.hash_at(made.seq)?;
            let held = made
                .check_signature(key)
                .and_then(|()| made.check_ledger(self.instance_id(), self.tail(), hash.as_deref()));
            if held.is_err() {
                return Ok(held);
            }
        }
        Ok(Ok(()))
    }
}
