//! Text statistics over files, a chunk at a time. The state between two chunks can be saved and given
//! back, and the report does not depend on where the chunks or the interruptions fell.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Format of a checkpoint; another one is not resumed from.
const VERSION: u32 = 1;
/// Words told apart. With `MAX_WORD_BYTES` it keeps a checkpoint under the gateway's 1 MiB.
const MAX_DISTINCT: usize = 16_384;
/// Bytes of a word that are kept; what follows does not tell it from another.
const MAX_WORD_BYTES: usize = 40;
/// Words listed in a report.
const TOP_WORDS: usize = 10;
/// Chunks hold at least one character of the longest encoding, with room.
const CHUNK_BYTES: std::ops::RangeInclusive<usize> = 16..=4 << 20;

/// What was counted. Equal for equal files, however they were read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub bytes: u64,
    pub lines: u64,
    pub words: u64,
    /// Different words, after lower-casing; at most 16,384 are told apart.
    pub distinct_words: u64,
    /// The most common words with their counts, at most ten.
    pub top_words: Vec<(String, u64)>,
    pub longest_line_bytes: u64,
    /// Counts of the letters a to z, case ignored.
    pub letters: BTreeMap<char, u64>,
}

/// A scan between two chunks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Scan {
    version: u32,
    /// The files with their sizes when the scan began: a checkpoint of other files is not resumed from.
    files: Vec<(PathBuf, u64)>,
    /// Index of the current file and the position in it.
    file: usize,
    offset: u64,
    bytes: u64,
    lines: u64,
    words: u64,
    longest_line_bytes: u64,
    letters: [u64; 26],
    distinct: BTreeMap<String, u64>,
    /// The word and the line that the last chunk broke off in.
    word: String,
    line_bytes: u64,
}

impl Scan {
    /// At the beginning of `files`.
    ///
    /// # Errors
    /// A file that is missing or no regular file; the text names it.
    pub fn new(files: &[PathBuf]) -> io::Result<Self> {
        let sized = files.iter().map(|path| size_of(path));
        Ok(Self {
            version: VERSION,
            files: sized.collect::<io::Result<_>>()?,
            file: 0,
            offset: 0,
            bytes: 0,
            lines: 0,
            words: 0,
            longest_line_bytes: 0,
            letters: [0; 26],
            distinct: BTreeMap::new(),
            word: String::new(),
            line_bytes: 0,
        })
    }

    /// Where `checkpoint` left off; at the beginning when it is of other files or another format.
    ///
    /// # Errors
    /// As `new`.
    pub fn resume(files: &[PathBuf], checkpoint: &[u8]) -> io::Result<Self> {
        let fresh = Self::new(files)?;
        let saved: Option<Scan> = serde_json::from_slice(checkpoint).ok();
        Ok(saved
            .filter(|saved| saved.version == VERSION && saved.files == fresh.files)
            .filter(|saved| saved.file <= saved.files.len())
            .unwrap_or(fresh))
    }

    /// All that `resume` needs, at most 1 MiB.
    pub fn checkpoint(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a scan has text keys only, which JSON can hold")
    }

    pub fn done_bytes(&self) -> u64 {
        self.bytes
    }

    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|(_, size)| size).sum()
    }

    pub fn is_done(&self) -> bool {
        self.file >= self.files.len()
    }

    /// Counts the next chunk of at most `chunk_bytes`, held to 16 B to 4 MiB. Does nothing at the end.
    ///
    /// # Errors
    /// A file that cannot be read, or became shorter.
    pub fn step(&mut self, chunk_bytes: usize) -> io::Result<()> {
        let Some((path, size)) = self.files.get(self.file).cloned() else {
            return Ok(());
        };
        let chunk_bytes = chunk_bytes.clamp(*CHUNK_BYTES.start(), *CHUNK_BYTES.end());
        let left = size.saturating_sub(self.offset);
        let want = left.min(chunk_bytes as u64);
        let mut chunk = read_at(&path, self.offset, want)?;
        let is_last = want == left;
        if !is_last {
            chunk.truncate(whole_characters(&chunk));
        }
        self.offset += chunk.len() as u64;
        self.bytes += chunk.len() as u64;
        self.count_lines(&chunk);
        for character in String::from_utf8_lossy(&chunk).chars() {
            self.count_character(character);
        }
        if is_last {
            self.end_word();
            self.end_line();
            self.file += 1;
            self.offset = 0;
        }
        Ok(())
    }

    /// What was counted so far.
    pub fn report(&self) -> Report {
        let mut top: Vec<(String, u64)> = self
            .distinct
            .iter()
            .map(|(word, count)| (word.clone(), *count))
            .collect();
        top.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        top.truncate(TOP_WORDS);
        Report {
            bytes: self.bytes,
            lines: self.lines,
            words: self.words,
            distinct_words: self.distinct.len() as u64,
            top_words: top,
            longest_line_bytes: self.longest_line_bytes,
            letters: ('a'..='z').zip(self.letters).collect(),
        }
    }

    fn count_lines(&mut self, chunk: &[u8]) {
        for part in chunk.split_inclusive(|byte| *byte == b'\n') {
            self.line_bytes += part.len() as u64;
            if part.ends_with(b"\n") {
                self.end_line();
            }
        }
    }

    fn end_line(&mut self) {
        if self.line_bytes > 0 {
            self.lines += 1;
            self.longest_line_bytes = self.longest_line_bytes.max(self.line_bytes);
            self.line_bytes = 0;
        }
    }

    fn count_character(&mut self, character: char) {
        if !character.is_alphanumeric() {
            return self.end_word();
        }
        for lower in character.to_lowercase() {
            if lower.is_ascii_lowercase() {
                self.letters[usize::from(lower as u8 - b'a')] += 1;
            }
            if self.word.len() + lower.len_utf8() <= MAX_WORD_BYTES {
                self.word.push(lower);
            }
        }
    }

    fn end_word(&mut self) {
        if self.word.is_empty() {
            return;
        }
        self.words += 1;
        let word = std::mem::take(&mut self.word);
        if let Some(count) = self.distinct.get_mut(&word) {
            *count += 1;
        } else if self.distinct.len() < MAX_DISTINCT {
            self.distinct.insert(word, 1);
        }
    }
}

/// The report of `files` in one go, without chunks or checkpoints.
///
/// # Errors
/// As `Scan::new` and `Scan::step`.
pub fn scan_all(files: &[PathBuf]) -> io::Result<Report> {
    let mut scan = Scan::new(files)?;
    while !scan.is_done() {
        scan.step(*CHUNK_BYTES.end())?;
    }
    Ok(scan.report())
}

fn size_of(path: &Path) -> io::Result<(PathBuf, u64)> {
    let named = |error: io::Error| named(path, &error);
    let metadata = std::fs::metadata(path).map_err(named)?;
    if !metadata.is_file() {
        return Err(io::Error::other(format!(
            "{}: not a regular file",
            path.display()
        )));
    }
    Ok((path.to_owned(), metadata.len()))
}

fn read_at(path: &Path, offset: u64, length: u64) -> io::Result<Vec<u8>> {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(offset))?;
        let mut chunk = Vec::new();
        file.take(length).read_to_end(&mut chunk)?;
        Ok(chunk)
    };
    let chunk = read().map_err(|error| named(path, &error))?;
    if (chunk.len() as u64) < length {
        let text = format!("{}: became shorter while it was read", path.display());
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
    }
    Ok(chunk)
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Length of `chunk` without a UTF-8 sequence that it breaks off in.
fn whole_characters(chunk: &[u8]) -> usize {
    for back in 1..=chunk.len().min(3) {
        let at = chunk.len() - back;
        let needs = match chunk[at] {
            0x80..=0xBF => continue,
            0xC0..=0xDF => 2,
            0xE0..=0xEF => 3,
            0xF0..=0xFF => 4,
            _ => 1,
        };
        return if needs > back { at } else { chunk.len() };
    }
    chunk.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn files(contents: &[Vec<u8>]) -> (tempfile::TempDir, Vec<PathBuf>) {
        let dir = tempfile::tempdir().unwrap();
        let paths = contents.iter().enumerate().map(|(index, content)| {
            let path = dir.path().join(index.to_string());
            std::fs::write(&path, content).unwrap();
            path
        });
        let paths = paths.collect();
        (dir, paths)
    }

    #[test]
    fn it_counts_what_is_there() {
        let text = "The cat saw the dog.\nThe end";
        let (_dir, paths) = files(&[text.as_bytes().to_vec()]);
        let report = scan_all(&paths).unwrap();
        assert_eq!((report.lines, report.words), (2, 7));
        assert_eq!(report.bytes, text.len() as u64);
        assert_eq!(report.distinct_words, 5);
        assert_eq!(report.top_words[0], ("the".to_owned(), 3));
        assert_eq!(report.longest_line_bytes, 21);
        assert_eq!(report.letters[&'t'], 4);
    }

    #[test]
    fn a_checkpoint_of_other_files_is_not_resumed_from() {
        let (_dir, paths) = files(&[b"one two three four five six".to_vec()]);
        let mut scan = Scan::new(&paths).unwrap();
        scan.step(16).unwrap();
        let saved = scan.checkpoint();
        assert_eq!(Scan::resume(&paths, &saved).unwrap().done_bytes(), 16);
        let (_dir, others) = files(&[b"one two three four five seven".to_vec()]);
        assert_eq!(Scan::resume(&others, &saved).unwrap().done_bytes(), 0);
        assert_eq!(Scan::resume(&paths, b"junk").unwrap().done_bytes(), 0);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Scan::new(&[PathBuf::from("/nonexistent/x")]).unwrap_err();
        assert!(error.to_string().starts_with("/nonexistent/x: "));
    }

    proptest! {
        #[test]
        fn the_report_does_not_depend_on_chunks_or_interruptions(
            texts in prop::collection::vec("[a-zA-Z é漢🦀\n.]{0,80}", 1..4),
            noise in prop::collection::vec(any::<u8>(), 0..60),
            chunk in 16usize..50,
        ) {
            let mut contents: Vec<Vec<u8>> = texts.into_iter().map(String::into_bytes).collect();
            contents.push(noise);
            let (_dir, paths) = files(&contents);
            let mut scan = Scan::new(&paths).unwrap();
            while !scan.is_done() {
                scan.step(chunk).unwrap();
                scan = Scan::resume(&paths, &scan.checkpoint()).unwrap();
            }
            prop_assert_eq!(scan.report(), scan_all(&paths).unwrap());
        }
    }
}
