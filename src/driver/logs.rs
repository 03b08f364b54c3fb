//! The output of services: written by the services themselves to one file each, kept bounded here, and read
//! from its end or followed. A service's file is `<name>.log`, and what was cut from it `<name>.log.1`.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::Stream;
use smol_str::{SmolStr, ToSmolStr};

use super::blocking;
use crate::domain::ids::{PlaneId, RunId, ServiceName};
use crate::domain::scheduler::container::{name_of, run_of};

/// A log is cut beyond this size. Of what was cut, up to twice as much is kept.
pub const LOG_MAX_BYTES: u64 = 8 << 20;
/// How often sizes are looked at: a log grows by what is written meanwhile.
const CUT_EVERY: Duration = Duration::from_secs(2);
/// How often a follower looks for more. The file is not ours, so nothing wakes us.
const FOLLOW_EVERY: Duration = Duration::from_millis(150);
/// Most bytes read at once.
const CHUNK_BYTES: u64 = 256 << 10;
/// A longer line comes in pieces.
const LINE_MAX_BYTES: usize = 64 << 10;

/// Why a log cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("'{0}' is no service's name")]
    BadName(ServiceName),
    #[error("cannot use the log file {path}")]
    File { path: String, source: io::Error },
}

/// What a follower sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogLine {
    /// One line without its end; bytes that are no UTF-8 are replaced.
    Text(String),
    /// This many bytes were cut before the follower came to them.
    Dropped { bytes: u64 },
}

/// Cloneable handle on all logs.
#[derive(Clone, Debug)]
pub struct Logs {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    /// Bytes cut from each log since this process started. A position in a log counts from that start too, so that
    /// a follower finds its place after a cut. Held while files are read or cut, never across an await.
    cut: Mutex<HashMap<SmolStr, u64>>,
}

impl Logs {
    /// Logs in `dir`, which exists.
    pub fn new(dir: PathBuf) -> Self {
        Self {
            inner: Arc::new(Inner {
                dir,
                cut: Mutex::default(),
            }),
        }
    }

    /// The last `lines` lines, oldest first; none when nothing was ever written.
    pub async fn tail(&self, service: &ServiceName, lines: usize) -> Result<Vec<String>, LogError> {
        let (inner, service) = (self.inner.clone(), service.clone());
        blocking(move || inner.tail(&service, lines))
            .await
            .map(|(lines, rest, _)| {
                lines
                    .into_iter()
                    .chain((!rest.is_empty()).then(|| text(&rest)))
                    .collect()
            })
    }

    /// The last `lines` lines and then each new one, for ever. Ends only with an error, or by being dropped.
    pub fn follow(
        &self,
        service: &ServiceName,
        lines: usize,
    ) -> impl Stream<Item = Result<LogLine, LogError>> + Send + 'static {
        let (inner, service) = (self.inner.clone(), service.clone());
        async_stream::try_stream! {
            let (first, looked) = (inner.clone(), service.clone());
            let (last, mut partial, mut position) = blocking(move || first.tail(&looked, lines)).await?;
            for line in last {
                yield LogLine::Text(line);
            }
            loop {
                let (reader, looked) = (inner.clone(), service.clone());
                let read = blocking(move || reader.read(&looked, position)).await?;
                if read.dropped > 0 {
                    yield LogLine::Dropped { bytes: read.dropped };
                }
                position = read.position;
                if read.bytes.is_empty() {
                    tokio::time::sleep(FOLLOW_EVERY).await;
                    continue;
                }
                partial.extend_from_slice(&read.bytes);
                for line in take_lines(&mut partial) {
                    yield LogLine::Text(line);
                }
            }
        }
    }

    /// All that is kept of a log: what was cut from it, and then it.
    pub async fn kept(&self, service: &ServiceName) -> Result<Vec<u8>, LogError> {
        let (inner, service) = (self.inner.clone(), service.clone());
        blocking(move || {
            let _cut = inner.lock();
            let mut kept = Vec::new();
            for extension in ["log.1", "log"] {
                let mut file = Opened::open(inner.path(&service, extension)?)?;
                kept.append(&mut file.read(0, file.len)?);
            }
            Ok(kept)
        })
        .await
    }

    /// The jobs with containers of their own whose output is there.
    pub async fn jobs(&self) -> Result<Vec<(PlaneId, RunId)>, LogError> {
        let inner = self.inner.clone();
        blocking(move || {
            let entries = fs::read_dir(&inner.dir).map_err(|source| inner.unusable(source))?;
            let job = |entry: io::Result<fs::DirEntry>| {
                let name = entry.ok()?.file_name();
                run_of(name.to_str()?.strip_suffix(".log")?)
            };
            Ok(entries.filter_map(job).collect())
        })
        .await
    }

    /// Removes the output of a job that had containers of its own.
    pub async fn forget_job(&self, plane: PlaneId, run: RunId) -> Result<(), LogError> {
        let inner = self.inner.clone();
        blocking(move || {
            let name = name_of(plane, run);
            inner.lock().remove(&name);
            // The log last: as long as it is there, the others are looked for again.
            for extension in ["log.position", "log.part", "log.1", "log"] {
                match fs::remove_file(inner.path(&name, extension)?) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(inner.unusable(error));
                    }
                    _ => {}
                }
            }
            Ok(())
        })
        .await
    }

    /// Where a log ends now. Blocks.
    pub(super) fn end(&self, service: &ServiceName) -> Result<u64, LogError> {
        Ok(self.inner.tail(service, 0)?.2)
    }

    /// The last `lines` lines of what was written after `position`, as far as it is read at once.
    pub(super) async fn tail_from(
        &self,
        service: &ServiceName,
        position: u64,
        lines: usize,
    ) -> Result<Vec<String>, LogError> {
        let (inner, service) = (self.inner.clone(), service.clone());
        let read = blocking(move || {
            let (_, _, end) = inner.tail(&service, 0)?;
            inner.read(&service, position.max(end.saturating_sub(CHUNK_BYTES)))
        });
        let mut bytes = read.await?.bytes;
        let mut whole = take_lines(&mut bytes);
        whole.extend((!bytes.is_empty()).then(|| text(&bytes)));
        whole.drain(..whole.len().saturating_sub(lines));
        Ok(whole)
    }

    /// Ends the last line of a log, if it has no end. Blocks.
    pub(super) fn end_line(&self, service: &ServiceName) -> Result<(), LogError> {
        let _cut = self.inner.lock();
        let mut file = Opened::open(self.inner.path(service, "log")?)?;
        let last = file.read(file.len.saturating_sub(1), 1)?;
        if !matches!(last.as_slice(), [] | [b'\n']) {
            use std::io::Write;
            let mut log = self.open(service)?;
            log.write_all(b"\n")
                .map_err(|source| self.inner.unusable(source))?;
        }
        Ok(())
    }

    /// Opened so that each write goes to the end, even after a cut; readable by the gateway's user only.
    pub(super) fn open(&self, service: &ServiceName) -> Result<File, LogError> {
        self.inner
            .open(service, "log", OpenOptions::new().append(true))
    }

    /// Where it is kept how far a log follows what is written elsewhere.
    pub(super) fn open_position(&self, service: &ServiceName) -> Result<File, LogError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).truncate(false);
        self.inner.open(service, "log.position", &mut options)
    }

    /// Cuts every log that has grown too large, for ever.
    pub(super) async fn keep_bounded(self) {
        loop {
            tokio::time::sleep(CUT_EVERY).await;
            let logs = self.clone();
            blocking(move || logs.cut_large(LOG_MAX_BYTES)).await;
        }
    }

    /// Cuts what is larger than `max_bytes`. The service goes on writing to the same file, so it is copied and emptied,
    /// not renamed; what is written in the instant between the two is lost.
    pub fn cut_large(&self, max_bytes: u64) {
        let Ok(entries) = fs::read_dir(&self.inner.dir) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let service = name.to_str().and_then(|name| name.strip_suffix(".log"));
            let large = entry.metadata().is_ok_and(|file| file.len() > max_bytes);
            if let Some(service) = service.filter(|_| large)
                && let Err(error) = self.inner.cut(&service.to_smolstr(), max_bytes)
            {
                tracing::warn!(service.name = service, %error, "a log could not be cut");
            }
        }
    }
}

/// A piece of a log.
struct Piece {
    bytes: Vec<u8>,
    /// Where to go on.
    position: u64,
    dropped: u64,
}

impl Inner {
    fn path(&self, service: &ServiceName, extension: &str) -> Result<PathBuf, LogError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
        if service.is_empty() || service.starts_with('.') || !service.bytes().all(plain) {
            return Err(LogError::BadName(service.clone()));
        }
        Ok(self.dir.join(format!("{service}.{extension}")))
    }

    /// Made when it is not there.
    fn open(
        &self,
        service: &ServiceName,
        extension: &str,
        options: &mut OpenOptions,
    ) -> Result<File, LogError> {
        let path = self.path(service, extension)?;
        let open = options.create(true).mode(0o600).open(&path);
        open.map_err(|source| LogError::File {
            path: path.display().to_string(),
            source,
        })
    }

    fn unusable(&self, source: io::Error) -> LogError {
        LogError::File {
            path: self.dir.display().to_string(),
            source,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SmolStr, u64>> {
        // A panic while reading leaves the numbers as they were.
        self.cut.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last whole lines, the unfinished one after them, and the position behind that.
    fn tail(
        &self,
        service: &ServiceName,
        lines: usize,
    ) -> Result<(Vec<String>, Vec<u8>, u64), LogError> {
        let cut = self.lock();
        let base = cut.get(service).copied().unwrap_or(0);
        let path = self.path(service, "log")?;
        let mut file = Opened::open(path)?;
        let mut bytes = file.read(file.len.saturating_sub(CHUNK_BYTES), CHUNK_BYTES)?;
        let end = file.len.saturating_sub(CHUNK_BYTES) + bytes.len() as u64;
        let enough = |bytes: &[u8]| bytes.iter().filter(|&&byte| byte == b'\n').count() > lines;
        if !enough(&bytes) && file.len > CHUNK_BYTES {
            bytes = file.read(0, end)?;
        }
        if !enough(&bytes) {
            let mut older = Opened::open(self.path(service, "log.1")?)?;
            let mut all = older.read(0, older.len)?;
            all.append(&mut bytes);
            bytes = all;
        }
        let mut whole = take_lines(&mut bytes);
        whole.drain(..whole.len().saturating_sub(lines));
        Ok((whole, bytes, base + end))
    }

    fn read(&self, service: &ServiceName, position: u64) -> Result<Piece, LogError> {
        let cut = self.lock();
        let base = cut.get(service).copied().unwrap_or(0);
        if position < base {
            let mut older = Opened::open(self.path(service, "log.1")?)?;
            let behind = base - position;
            let dropped = behind.saturating_sub(older.len);
            let bytes = older.read(older.len - (behind - dropped), CHUNK_BYTES)?;
            let position = if bytes.is_empty() {
                base
            } else {
                position + dropped + bytes.len() as u64
            };
            return Ok(Piece {
                bytes,
                position,
                dropped,
            });
        }
        let mut file = Opened::open(self.path(service, "log")?)?;
        // Shorter than we know it: somebody else emptied it, so it is read from its start.
        let offset = if position - base > file.len {
            0
        } else {
            position - base
        };
        let bytes = file.read(offset, CHUNK_BYTES)?;
        let position = base + offset + bytes.len() as u64;
        Ok(Piece {
            bytes,
            position,
            dropped: 0,
        })
    }

    fn cut(&self, service: &ServiceName, max_bytes: u64) -> Result<(), LogError> {
        let mut cut = self.lock();
        let path = self.path(service, "log")?;
        let (part, older) = (
            self.path(service, "log.part")?,
            self.path(service, "log.1")?,
        );
        let copy_and_empty = || -> io::Result<u64> {
            let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
            let kept_from = file.metadata()?.len().saturating_sub(2 * max_bytes);
            let from = file.seek(SeekFrom::Start(kept_from))?;
            let mut copy = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&part)?;
            // Bounded, or a fast writer would be chased for ever.
            let copied = io::copy(&mut (&mut file).take(3 * max_bytes), &mut copy)?;
            fs::rename(&part, &older)?;
            file.set_len(0)?;
            Ok(from + copied)
        };
        let bytes = copy_and_empty().map_err(|source| LogError::File {
            path: path.display().to_string(),
            source,
        })?;
        *cut.entry(service.clone()).or_default() += bytes;
        Ok(())
    }
}

/// A file that may not exist, which is the same as an empty one.
struct Opened {
    path: PathBuf,
    file: Option<File>,
    len: u64,
}

impl Opened {
    fn open(path: PathBuf) -> Result<Opened, LogError> {
        let opened = match File::open(&path) {
            Ok(file) => file.metadata().map(|metadata| (Some(file), metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok((None, 0)),
            Err(error) => Err(error),
        };
        match opened {
            Ok((file, len)) => Ok(Opened { path, file, len }),
            Err(source) => Err(LogError::File {
                path: path.display().to_string(),
                source,
            }),
        }
    }

    /// Up to `max` bytes from `offset`, and none beyond the length seen at opening.
    fn read(&mut self, offset: u64, max: u64) -> Result<Vec<u8>, LogError> {
        let mut bytes = Vec::new();
        let Some(file) = &mut self.file else {
            return Ok(bytes);
        };
        let max = max.min(self.len.saturating_sub(offset));
        let read = file
            .seek(SeekFrom::Start(offset))
            .and_then(|_| file.take(max).read_to_end(&mut bytes));
        match read {
            Ok(_) => Ok(bytes),
            Err(source) => Err(LogError::File {
                path: self.path.display().to_string(),
                source,
            }),
        }
    }
}

/// Takes the whole lines, and pieces of a line that is too long, off the front of `bytes`.
fn take_lines(bytes: &mut Vec<u8>) -> Vec<String> {
    let mut lines = Vec::new();
    let mut start = 0;
    loop {
        let rest = &bytes[start..];
        let window = &rest[..rest.len().min(LINE_MAX_BYTES)];
        match window.iter().position(|&byte| byte == b'\n') {
            Some(end) => {
                lines.push(text(&window[..end]));
                start += end + 1;
            }
            None if rest.len() > LINE_MAX_BYTES => {
                lines.push(text(window));
                start += window.len();
            }
            None => break,
        }
    }
    bytes.drain(..start);
    lines
}

fn text(line: &[u8]) -> String {
    String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(line)).into_owned()
}
