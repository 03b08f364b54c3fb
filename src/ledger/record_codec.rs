//! A record as bytes, formats 1 to 3, and its place in the hash chain. Leaves keys and tables to others.
//!
//! ```text
//!   0  u16  format              72  [32] blake3 of the payload
//!   2  u8   flags (1 = purged)  104 [32] hash of the record
//!   3  u8   0                   136 u32  length of the event
//!   4  u32  plane               140 u32  length of the meta
//!   8  i64  at, microseconds    144 u32  length of the payload, also after a purge
//!  16  u64  cursor, 0 = no run  148 event, meta (postcard), payload
//!  24  [16] run, nil = none
//!  40  [32] hash of the record before
//! ```
//! Numbers are little-endian. `hash = blake3(prev_hash ‖ envelope ‖ blake3(payload))`, where the envelope
//! is seq and all the rest but the flags and the payload: a purge leaves every hash as it was. Format 2 has the
//! request that the record came of behind the meta, format 3 that request if there is one and more of it (`Details`).
//! Each record is written in the lowest format that holds it.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use smol_str::SmolStr;
use uuid::Uuid;

use std::sync::Arc;

use crate::domain::audit::{Asked, Details};
use crate::domain::event::Event;
use crate::domain::ids::{Cursor, PlaneId, RunId, Seq};
use crate::domain::record::{NewRecord, Record};
use crate::domain::time::Timestamp;

use super::error::ReadError;
use super::projection::run::Place;

/// Room for most events and summaries, so that writing them does not grow a buffer step by step.
const USUAL_BYTES: usize = 256;

/// The newest record format that this program writes; it reads all up to it.
pub const RECORD_FORMAT: u16 = 3;
/// The format of records that carry a request without details.
const FORMAT_ASKED: u16 = 2;
/// The format of records that carry no request.
const FORMAT_BARE: u16 = 1;
/// Bytes before the event.
pub const HEADER_BYTES: usize = 148;
const FLAG_PURGED: u8 = 1;

/// What versions may add at the end of an event, as bytes: in postcard a zero is none, zero, false and empty alike.
const ADDED_FIELDS_MAX_BYTES: usize = 64;

/// A blake3 hash.
pub type Hash = [u8; 32];

/// The hash before the first record.
pub const GENESIS: Hash = [0; 32];

/// Who caused a record; skipped on replay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    pub actor: SmolStr,
    pub request_id: Option<SmolStr>,
    /// From format 2 on.
    #[serde(skip)]
    pub asked: Option<Asked>,
    /// Of the request that it carries or, of an audited write, that it tells; from format 3 on.
    #[serde(skip)]
    pub details: Option<Details>,
}

impl Meta {
    /// Of a record that is about to be appended.
    pub fn of(record: &NewRecord) -> Meta {
        let source = match &record.event {
            Event::WriteAudited { write } => Some(&write.source),
            _ => record.asked.as_ref().map(|asked| &asked.source),
        };
        let details = source.map(|source| &source.details);
        Meta {
            actor: record.actor.clone(),
            request_id: record.request_id.clone(),
            asked: record.asked.clone(),
            details: details
                .filter(|details| **details != Details::default())
                .cloned(),
        }
    }

    /// Its bytes, and the record format that they make.
    pub fn to_bytes(&self) -> (u16, Vec<u8>) {
        let bytes = encode(self);
        match (&self.asked, &self.details) {
            (None, None) => (FORMAT_BARE, bytes),
            (Some(asked), None) => (FORMAT_ASKED, append(asked, bytes)),
            more => (RECORD_FORMAT, append(&more, bytes)),
        }
    }
}

/// A record's parts, borrowed from its bytes. Nothing is decoded yet.
#[derive(Clone, Copy, Debug)]
pub struct Raw<'a> {
    pub format: u16,
    pub purged: bool,
    pub plane: PlaneId,
    pub at: Timestamp,
    pub cursor: Cursor,
    pub run: Option<RunId>,
    pub prev_hash: Hash,
    pub payload_hash: Hash,
    pub hash: Hash,
    pub event: &'a [u8],
    pub meta: &'a [u8],
    /// Length of the payload as it was appended.
    pub payload_len: u32,
    /// Empty when purged.
    pub payload: &'a [u8],
}

impl<'a> Raw<'a> {
    /// Finds the parts.
    ///
    /// # Errors
    /// When the bytes are cut short or of an unknown format.
    pub fn parse(seq: Seq, bytes: &'a [u8]) -> Result<Raw<'a>, ReadError> {
        Self::split(bytes).map_err(|detail| ReadError::BadRecord {
            seq,
            detail: detail.to_owned(),
        })
    }

    fn split(bytes: &'a [u8]) -> Result<Raw<'a>, &'static str> {
        if bytes.len() < HEADER_BYTES {
            return Err("shorter than its header");
        }
        let (header, body) = bytes.split_at(HEADER_BYTES);
        let format = u16::from_le_bytes(array(header, 0));
        if format == 0 || format > RECORD_FORMAT {
            return Err("unknown record format");
        }
        if header[2] & !FLAG_PURGED != 0 || header[3] != 0 {
            return Err("unknown flags");
        }
        let purged = header[2] & FLAG_PURGED != 0;
        let run = Uuid::from_bytes(array(header, 24));
        let event_len = u32::from_le_bytes(array(header, 136)) as usize;
        let meta_len = u32::from_le_bytes(array(header, 140)) as usize;
        let payload_len = u32::from_le_bytes(array(header, 144));
        let kept = if purged { 0 } else { payload_len as usize };
        if event_len
            .checked_add(meta_len)
            .and_then(|n| n.checked_add(kept))
            != Some(body.len())
        {
            return Err("its lengths do not add up");
        }
        let (event, rest) = body.split_at(event_len);
        let (meta, payload) = rest.split_at(meta_len);
        Ok(Raw {
            format,
            purged,
            plane: PlaneId(u32::from_le_bytes(array(header, 4))),
            at: Timestamp(i64::from_le_bytes(array(header, 8))),
            cursor: u64::from_le_bytes(array(header, 16)),
            run: (!run.is_nil()).then_some(RunId(run)),
            prev_hash: array(header, 40),
            payload_hash: array(header, 72),
            hash: array(header, 104),
            event,
            meta,
            payload_len,
            payload,
        })
    }

    /// Where the event lies within the record's bytes, and the payload's length, without looking at anything else
    /// (replay).
    pub fn event_of(bytes: &'a [u8]) -> Option<(Timestamp, PlaneId, &'a [u8], u32)> {
        if bytes.len() < HEADER_BYTES || u16::from_le_bytes(array(bytes, 0)) > RECORD_FORMAT {
            return None;
        }
        let event_len = u32::from_le_bytes(array(bytes, 136)) as usize;
        let event = bytes.get(HEADER_BYTES..HEADER_BYTES.checked_add(event_len)?)?;
        let plane = PlaneId(u32::from_le_bytes(array(bytes, 4)));
        let at = Timestamp(i64::from_le_bytes(array(bytes, 8)));
        Some((at, plane, event, u32::from_le_bytes(array(bytes, 144))))
    }

    /// The hash that these parts give at `seq`.
    pub fn computed_hash(&self, seq: Seq) -> Hash {
        let run = self.run.map_or(Uuid::nil(), |run| run.0);
        let mut bytes = Vec::with_capacity(2 * HEADER_BYTES + self.event.len() + self.meta.len());
        bytes.extend_from_slice(&self.prev_hash);
        bytes.extend_from_slice(&seq.to_le_bytes());
        bytes.extend_from_slice(&self.format.to_le_bytes());
        bytes.extend_from_slice(&self.plane.0.to_le_bytes());
        bytes.extend_from_slice(&self.at.0.to_le_bytes());
        bytes.extend_from_slice(&self.cursor.to_le_bytes());
        bytes.extend_from_slice(run.as_bytes());
        bytes.extend_from_slice(&(self.event.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&(self.meta.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&u64::from(self.payload_len).to_le_bytes());
        bytes.extend_from_slice(self.event);
        bytes.extend_from_slice(self.meta);
        bytes.extend_from_slice(&self.payload_hash);
        *blake3::hash(&bytes).as_bytes()
    }

    /// The parts as they lie on disk.
    pub fn to_bytes(&self) -> Vec<u8> {
        let kept = if self.purged { &[][..] } else { self.payload };
        let mut bytes =
            Vec::with_capacity(HEADER_BYTES + self.event.len() + self.meta.len() + kept.len());
        bytes.extend_from_slice(&self.format.to_le_bytes());
        bytes.push(if self.purged { FLAG_PURGED } else { 0 });
        bytes.push(0);
        bytes.extend_from_slice(&self.plane.0.to_le_bytes());
        bytes.extend_from_slice(&self.at.0.to_le_bytes());
        bytes.extend_from_slice(&self.cursor.to_le_bytes());
        bytes.extend_from_slice(self.run.map_or(Uuid::nil(), |run| run.0).as_bytes());
        bytes.extend_from_slice(&self.prev_hash);
        bytes.extend_from_slice(&self.payload_hash);
        bytes.extend_from_slice(&self.hash);
        bytes.extend_from_slice(&length(self.event).to_le_bytes());
        bytes.extend_from_slice(&length(self.meta).to_le_bytes());
        bytes.extend_from_slice(&self.payload_len.to_le_bytes());
        bytes.extend_from_slice(self.event);
        bytes.extend_from_slice(self.meta);
        bytes.extend_from_slice(kept);
        bytes
    }

    /// Whether it may carry the request that it came of.
    pub fn has_request(&self) -> bool {
        self.format != FORMAT_BARE
    }

    /// What it contributes to its run's summary besides its event.
    pub fn place(&self, seq: Seq) -> Place {
        Place {
            seq,
            cursor: self.cursor,
            plane: self.plane,
            at: self.at,
            payload_len: self.payload_len,
        }
    }

    /// Decodes the event. Fields that later versions have added at its end, and these bytes lack, are none, zero or empty.
    pub fn decode_event(&self, seq: Seq) -> Result<Event, ReadError> {
        match postcard::from_bytes::<Event>(self.event) {
            Err(postcard::Error::DeserializeUnexpectedEnd) => {
                let mut longer = self.event.to_vec();
                longer.resize(self.event.len() + ADDED_FIELDS_MAX_BYTES, 0);
                let (event, rest) = postcard::take_from_bytes(&longer)
                    .map_err(|error| bad_record(seq, error.to_string()))?;
                match rest.len() < ADDED_FIELDS_MAX_BYTES {
                    true => Ok(event),
                    false => Err(bad_record(seq, "bytes after its end".into())),
                }
            }
            _ => decode(seq, self.event),
        }
    }

    /// Decodes who caused it.
    pub fn decode_meta(&self, seq: Seq) -> Result<Meta, ReadError> {
        type Who = (SmolStr, Option<SmolStr>);
        let ((actor, request_id), asked, details) = match self.format {
            FORMAT_BARE => (decode::<Who>(seq, self.meta)?, None, None),
            FORMAT_ASKED => {
                let (who, asked) = decode::<(Who, Asked)>(seq, self.meta)?;
                (who, Some(asked), None)
            }
            _ => {
                let (who, more) =
                    decode::<(Who, (Option<Asked>, Option<Details>))>(seq, self.meta)?;
                (who, more.0, more.1)
            }
        };
        Ok(Meta {
            actor,
            request_id,
            asked,
            details,
        })
    }

    /// Decodes all of it.
    pub fn decode(&self, seq: Seq) -> Result<Record, ReadError> {
        let mut meta = self.decode_meta(seq)?;
        let mut event = self.decode_event(seq)?;
        if let Some(details) = meta.details {
            let told = match &mut event {
                Event::WriteAudited { write } => Some(&mut write.source),
                _ => meta.asked.as_mut().map(|asked| &mut asked.source),
            };
            if let Some(source) = told {
                Arc::make_mut(source).details = details;
            }
        }
        Ok(Record {
            seq,
            cursor: self.cursor,
            plane: self.plane,
            at: self.at,
            actor: meta.actor,
            request_id: meta.request_id,
            asked: meta.asked,
            event,
            payload: Bytes::copy_from_slice(self.payload),
            purged: self.purged,
            prev_hash: self.prev_hash,
            hash: self.hash,
        })
    }
}

/// An event or a meta from its bytes, all of which must belong to it.
pub fn decode<T: serde::de::DeserializeOwned>(seq: Seq, bytes: &[u8]) -> Result<T, ReadError> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(bad_record(seq, "bytes after its end".into())),
        Err(error) => Err(bad_record(seq, error.to_string())),
    }
}

fn bad_record(seq: Seq, detail: String) -> ReadError {
    ReadError::BadRecord { seq, detail }
}

/// Postcard bytes of a value of ours.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    append(value, Vec::with_capacity(USUAL_BYTES))
}

/// The same behind other bytes.
fn append<T: Serialize>(value: &T, bytes: Vec<u8>) -> Vec<u8> {
    postcard::to_extend(value, bytes).expect("our types hold nothing that postcard cannot write")
}

fn array<const N: usize>(bytes: &[u8], start: usize) -> [u8; N] {
    let slice = &bytes[start..start + N];
    slice.try_into().expect("the slice has N bytes")
}

fn length(part: &[u8]) -> u32 {
    u32::try_from(part.len()).expect("a batch refuses payloads over 64 MiB, and events are smaller")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::spec::{GpuFacts, GpuSource};

    fn decoded(event: &[u8]) -> Result<Event, ReadError> {
        let raw = Raw {
            format: FORMAT_BARE,
            purged: false,
            plane: PlaneId::ROOT,
            at: Timestamp(0),
            cursor: 0,
            run: None,
            prev_hash: GENESIS,
            payload_hash: GENESIS,
            hash: GENESIS,
            event,
            meta: &[],
            payload_len: 0,
            payload: &[],
        };
        raw.decode_event(1)
    }

    #[test]
    fn an_event_that_lacks_its_last_fields_has_nothing_in_them() {
        // As an earlier version wrote it: without the ladder and the share of threads at its end.
        let older = "1803737663036c6c6d03737663903f072f6865616c7468008040000100000106776f726b657201014101620001\
                     0001072f63616e63656c008827e0d40300";
        let digits: Vec<u8> = older.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte =
            |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        let older: Vec<u8> = digits.chunks(2).map(byte).collect();
        let Event::ServiceRegistered { spec } = decoded(&older).unwrap() else {
            panic!("another event");
        };
        assert!(spec.ladder.is_empty() && spec.mps_percent.is_none());
        assert_eq!(spec.grace_ms, 5_000);
    }

    #[test]
    fn an_event_that_is_cut_off_further_up_is_refused() {
        let gpus = vec![GpuFacts {
            uuid: "SIM-0".into(),
            index: 0,
            name: "a name that is longer than all that may be added at an event's end, and then some more of it".into(),
            memory_mib: 1,
            source: GpuSource::Simulated,
        }];
        let whole = encode(&Event::GpusListed { gpus });
        assert!(decoded(&whole[..12]).is_err());
        assert!(
            decoded(&[whole.clone(), vec![0]].concat()).is_err(),
            "bytes after its end"
        );
        assert!(decoded(&whole).is_ok());
    }
}
