//! How far a container's output was copied: kept beside the log, so that a gateway that was killed goes on with the very
//! next piece. The engine stamps each piece; those of the last two seconds are counted, as stamps may be equal or out of order.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;

use smol_str::{SmolStr, ToSmolStr};

/// Every piece begins with the engine's time in RFC 3339 with nine digits of a second, then a space.
const TIME_CHARS: usize = 30;
/// As many as were said up to `last`, however many these are.
const ALL: u64 = u64::MAX;
/// Fields of a fixed width: it is overwritten in one write.
const RECORD_BYTES: usize = 64 + 1 + 20 + 1 + 20 + 1 + 20 + 1 + TIME_CHARS + 1 + 20 + 1;

/// A line, or a part of one that is too long for the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    time: SmolStr,
    second: i64,
    text: Vec<u8>,
}

impl Piece {
    /// As the engine sends it; `None` without a time.
    pub fn of(bytes: &[u8]) -> Option<Piece> {
        let time = std::str::from_utf8(bytes.get(..TIME_CHARS)?).ok()?;
        let stamp: jiff::Timestamp = time.parse().ok()?;
        Some(Piece {
            time: time.to_smolstr(),
            second: stamp.as_second(),
            text: bytes.get(TIME_CHARS + 1..)?.to_vec(),
        })
    }
}

/// What was copied of one container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Position {
    container: SmolStr,
    /// The last second, since the epoch, of which pieces were copied.
    second: i64,
    /// So many of that second.
    pieces: u64,
    /// So many of the second before: some may come late.
    pieces_before: u64,
    /// The latest time of a piece.
    last: SmolStr,
    /// The log's length behind the last one.
    log_bytes: u64,
}

impl Position {
    fn record(&self) -> String {
        let Position {
            container,
            second,
            pieces,
            pieces_before,
            last,
            log_bytes,
        } = self;
        let last = if last.is_empty() { "-" } else { last };
        format!(
            "{container:<64} {second:>20} {pieces:>20} {pieces_before:>20} {last:>TIME_CHARS$} {log_bytes:>20}\n"
        )
    }

    fn parse(record: &str) -> Option<Position> {
        let whole = record.len() == RECORD_BYTES && record.ends_with('\n');
        let mut fields = record.split_ascii_whitespace().filter(|_| whole);
        Some(Position {
            container: fields.next()?.into(),
            second: fields.next()?.parse().ok()?,
            pieces: fields.next()?.parse().ok()?,
            pieces_before: fields.next()?.parse().ok()?,
            last: fields.next()?.trim_start_matches('-').into(),
            log_bytes: fields.next()?.parse().ok()?,
        })
    }
}

/// A log that a container's output is copied into.
pub struct Copied {
    log: File,
    kept: File,
    position: Position,
    /// Pieces that the engine sends once more.
    again: u64,
    /// Bytes of the log that the position does not know of.
    beyond: u64,
    unwritten: Vec<u8>,
}

impl Copied {
    /// From a container's start on, or after the last piece that it had said `before`.
    pub fn after(before: Option<Piece>, container: &SmolStr, log: File, kept: File) -> Copied {
        let position = match before {
            None => Position::default(),
            Some(before) => Position {
                second: before.second,
                pieces: ALL,
                last: before.time,
                ..Position::default()
            },
        };
        let position = Position {
            container: container.clone(),
            ..position
        };
        Copied {
            log,
            kept,
            position,
            again: 0,
            beyond: 0,
            unwritten: Vec::new(),
        }
    }

    /// Goes on where an earlier process was with this container. Otherwise the files come back.
    pub fn resume(container: &SmolStr, log: File, mut kept: File) -> Result<Copied, (File, File)> {
        let mut record = String::new();
        let read = kept.read_to_string(&mut record);
        let position = read.ok().and_then(|_| Position::parse(&record));
        match position.filter(|position| position.container == *container) {
            Some(position) => {
                let bytes = log.metadata().map_or(0, |file| file.len());
                Ok(Copied {
                    beyond: bytes.saturating_sub(position.log_bytes),
                    log,
                    kept,
                    position,
                    again: 0,
                    unwritten: Vec::new(),
                })
            }
            None => Err((log, kept)),
        }
    }

    /// Grows with each piece.
    pub fn progress(&self) -> (i64, u64, u64) {
        let Position {
            second,
            pieces,
            pieces_before,
            ..
        } = self.position;
        (second, pieces, pieces_before)
    }

    /// From which second on the engine is asked.
    pub fn since_s(&self) -> i64 {
        (self.position.second - 1).max(0)
    }

    /// The engine is asked anew: what was said from that second on comes once more.
    pub fn begin_again(&mut self) {
        let Position {
            pieces,
            pieces_before,
            ..
        } = self.position;
        self.again = pieces.saturating_add(pieces_before);
    }

    /// Takes what the engine sends, unless it was copied before.
    pub fn take(&mut self, bytes: &[u8]) {
        let Some(piece) = Piece::of(bytes) else {
            return;
        };
        if self.again > 0 {
            // The engine may have thrown some of them away.
            if piece.time <= self.position.last {
                self.again -= 1;
                return;
            }
            self.again = 0;
        }
        let position = &mut self.position;
        if piece.second > position.second {
            position.pieces_before = match piece.second - position.second {
                1 => position.pieces,
                _ => 0,
            };
            (position.second, position.pieces) = (piece.second, 1);
        } else if piece.second == position.second {
            position.pieces = position.pieces.saturating_add(1);
        } else if piece.second + 1 == position.second {
            position.pieces_before = position.pieces_before.saturating_add(1);
        }
        if piece.time > position.last {
            position.last = piece.time;
        }
        // It was written by a process that was killed before it said so.
        let bytes = piece.text.len() as u64;
        if bytes <= self.beyond {
            self.beyond -= bytes;
            return;
        }
        self.beyond = 0;
        self.unwritten.extend(piece.text);
    }

    /// Writes what was taken, then how far that is. Blocks.
    pub fn write(&mut self) -> io::Result<()> {
        let text = std::mem::take(&mut self.unwritten);
        self.log.write_all(&text)?;
        if self.beyond == 0 {
            self.position.log_bytes = self.log.metadata()?.len();
        }
        self.kept.write_all_at(self.position.record().as_bytes(), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(dir: &tempfile::TempDir, name: &str) -> File {
        let mut options = File::options();
        options.read(true).create(true);
        match name {
            "log" => options.append(true),
            _ => options.write(true).truncate(false),
        };
        options.open(dir.path().join(name)).unwrap()
    }

    fn log(dir: &tempfile::TempDir) -> String {
        std::fs::read_to_string(dir.path().join("log")).unwrap()
    }

    fn said(second: u8, nanos: u32, text: &str) -> Vec<u8> {
        format!("2026-01-01T00:00:{second:02}.{nanos:09}Z {text}\n").into_bytes()
    }

    /// What the engine sends when it is asked from a second on.
    fn from(all: &[Vec<u8>], second: i64) -> impl Iterator<Item = &Vec<u8>> {
        let late = move |piece: &&Vec<u8>| Piece::of(piece).unwrap().second >= second;
        all.iter().filter(late)
    }

    #[test]
    fn however_often_it_is_cut_off_each_piece_is_copied_once() {
        // Equal times, times out of order, and a second's end among them.
        let all = [
            said(1, 5, "a"),
            said(1, 5, "b"),
            said(1, 4, "c"),
            said(2, 0, "d"),
            said(1, 999, "e"),
            said(2, 0, "f"),
            said(3, 1, "g"),
        ];
        for cut in 0..=all.len() {
            // Killed after the write of the position, or between the two writes.
            for told in [true, false] {
                let dir = tempfile::tempdir().unwrap();
                let id = SmolStr::from("c".repeat(64));
                let mut copied = Copied::after(None, &id, file(&dir, "log"), file(&dir, "kept"));
                copied.write().unwrap();
                for (n, piece) in all[..cut].iter().enumerate() {
                    copied.take(piece);
                    if told || n + 1 < cut {
                        copied.write().unwrap();
                    } else {
                        copied.log.write_all(&copied.unwritten).unwrap();
                    }
                }
                drop(copied);
                let resumed = Copied::resume(&id, file(&dir, "log"), file(&dir, "kept"));
                let mut copied = resumed.unwrap_or_else(|_| panic!("it is kept"));
                copied.begin_again();
                for piece in from(&all, copied.since_s()) {
                    copied.take(piece);
                }
                copied.write().unwrap();
                assert_eq!(log(&dir), "a\nb\nc\nd\ne\nf\ng\n", "{cut} {told}");
                let other = Copied::resume(&"d".into(), file(&dir, "log"), file(&dir, "kept"));
                assert!(other.is_err(), "another container's place is not ours");
            }
        }
    }

    #[test]
    fn what_was_said_before_it_was_adopted_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let before = Piece::of(&said(1, 5, "old"));
        let mut copied = Copied::after(before, &"c".into(), file(&dir, "log"), file(&dir, "kept"));
        assert!(copied.since_s() < Piece::of(&said(1, 0, "")).unwrap().second);
        copied.begin_again();
        for piece in [said(1, 3, "older"), said(1, 5, "old"), said(1, 6, "new")] {
            copied.take(&piece);
        }
        copied.take(b"no time");
        copied.write().unwrap();
        assert_eq!(log(&dir), "new\n");
    }
}
