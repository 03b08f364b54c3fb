//! Server-sent events: the parser, and a follower that reconnects where it broke off, so that what it
//! yields has no gap and no repeat.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};

use super::client::Client;
use super::error::CliError;

/// Longest line taken: a record with the largest payload, and room.
const MAX_LINE_BYTES: usize = 8 << 20;
/// Wait before reconnecting until the gateway says otherwise.
const DEFAULT_RETRY: Duration = Duration::from_secs(1);
/// Longest wait that is taken from a gateway's `retry:`.
const MAX_RETRY: Duration = Duration::from_secs(30);
/// Reconnections in a row without a frame after which the gateway is taken for gone.
const MAX_RECONNECTS: u32 = 60;

/// One event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    pub id: Option<String>,
    pub event: String,
    pub data: String,
}

/// Takes bytes, gives frames (the event stream format of the HTML standard).
#[derive(Debug, Default)]
struct Parser {
    buffer: Vec<u8>,
    frame: Frame,
    has_data: bool,
    retry: Option<Duration>,
}

impl Parser {
    /// Adds bytes; the frames that they complete go to `frames`. False when a line is too long.
    fn feed(&mut self, bytes: &[u8], frames: &mut Vec<Frame>) -> bool {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.buffer.extend_from_slice(part);
            if self.buffer.len() > MAX_LINE_BYTES {
                return false;
            }
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.buffer);
                let line = String::from_utf8_lossy(&line);
                self.line(line.trim_end_matches(['\n', '\r']), frames);
            }
        }
        true
    }

    fn line(&mut self, line: &str, frames: &mut Vec<Frame>) {
        if line.is_empty() {
            let frame = std::mem::take(&mut self.frame);
            if std::mem::take(&mut self.has_data) {
                frames.push(frame);
            }
            return;
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" => self.frame.id = Some(value.to_owned()),
            "event" => value.clone_into(&mut self.frame.event),
            "retry" => self.retry = value.parse().ok().map(Duration::from_millis),
            "data" => {
                if std::mem::replace(&mut self.has_data, true) {
                    self.frame.data.push('\n');
                }
                self.frame.data.push_str(value);
            }
            _ => {}
        }
    }
}

type Body = std::pin::Pin<Box<dyn Stream<Item = reqwest::Result<Bytes>> + Send>>;

/// Follows one stream across disconnections.
pub struct Follow {
    client: Client,
    path: String,
    query: Vec<(&'static str, String)>,
    last_id: Option<String>,
    retry: Duration,
    failures: u32,
    body: Option<Body>,
    parser: Parser,
    ready: std::collections::VecDeque<Frame>,
    done: bool,
}

impl Follow {
    /// Follows `path`; the first request carries `query`, later ones resume by `Last-Event-ID`.
    pub fn new(client: &Client, path: String, query: Vec<(&'static str, String)>) -> Self {
        Self {
            client: client.clone(),
            path,
            query,
            last_id: None,
            retry: DEFAULT_RETRY,
            failures: 0,
            body: None,
            parser: Parser::default(),
            ready: std::collections::VecDeque::new(),
            done: false,
        }
    }

    /// The next frame; `None` after the stream's own end (`event: done`).
    ///
    /// # Errors
    /// The stream does not exist or is not allowed; the gateway stays away.
    pub async fn next(&mut self) -> Result<Option<Frame>, CliError> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                self.failures = 0;
                if frame.id.is_some() {
                    self.last_id.clone_from(&frame.id);
                }
                self.done = frame.event == "done";
                return Ok(Some(frame));
            }
            if self.done {
                return Ok(None);
            }
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> Result<(), CliError> {
        let Some(body) = &mut self.body else {
            return self.connect().await;
        };
        match body.next().await {
            Some(Ok(bytes)) => {
                let mut frames = Vec::new();
                if !self.parser.feed(&bytes, &mut frames) {
                    return Err(CliError::Answer("a line of the stream is too long".into()));
                }
                self.ready.extend(frames);
                if let Some(retry) = self.parser.retry {
                    self.retry = retry.min(MAX_RETRY);
                }
                Ok(())
            }
            // The gateway closed, or the connection broke: both are resumed.
            Some(Err(_)) | None => {
                self.body = None;
                self.wait(None).await
            }
        }
    }

    async fn connect(&mut self) -> Result<(), CliError> {
        self.parser = Parser::default();
        let query: Vec<(&str, String)> = match &self.last_id {
            // `Last-Event-ID` says where to go on; what the first request asked for must not.
            Some(_) => without_position(&self.query),
            None => self.query.clone(),
        };
        let opened = self
            .client
            .open(&self.path, &query, self.last_id.as_deref())
            .await;
        match opened {
            Ok(answer) => {
                self.body = Some(Box::pin(answer.bytes_stream()));
                Ok(())
            }
            Err(CliError::Problem(problem)) if problem.status < 500 && problem.status != 429 => {
                Err(CliError::Problem(problem))
            }
            // The very first connection tells at once that there is no gateway.
            Err(error) if self.last_id.is_none() && self.failures == 0 => Err(error),
            Err(error) => self.wait(Some(error)).await,
        }
    }

    async fn wait(&mut self, error: Option<CliError>) -> Result<(), CliError> {
        self.failures += 1;
        if self.failures > MAX_RECONNECTS {
            return Err(error.unwrap_or_else(|| {
                CliError::Failed("the stream breaks off again and again".to_owned())
            }));
        }
        tokio::time::sleep(self.retry).await;
        Ok(())
    }
}

fn without_position(query: &[(&'static str, String)]) -> Vec<(&'static str, String)> {
    let keeps = |(name, _): &&(&'static str, String)| !matches!(*name, "after" | "after_seq");
    query.iter().filter(keeps).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(chunks: &[&str]) -> (Vec<Frame>, Parser) {
        let mut parser = Parser::default();
        let mut frames = Vec::new();
        for chunk in chunks {
            assert!(parser.feed(chunk.as_bytes(), &mut frames));
        }
        (frames, parser)
    }

    #[test]
    fn frames_are_read_whatever_the_chunks() {
        let text = "retry: 50\n\nid: 3\nevent: step\ndata: {\"a\":\ndata: 1}\n\n: keep-alive\n\nid:4\r\nda";
        let whole = frames(&[text, "ta:x\r\n\r\n"]).0;
        let letters: Vec<String> = text.chars().map(String::from).collect();
        let mut letters: Vec<&str> = letters.iter().map(String::as_str).collect();
        letters.push("ta:x\n\n");
        let (single, parser) = frames(&letters);
        assert_eq!(whole, single);
        assert_eq!(whole.len(), 2);
        assert_eq!(whole[0].id.as_deref(), Some("3"));
        assert_eq!(whole[0].data, "{\"a\":\n1}");
        assert_eq!((whole[1].event.as_str(), whole[1].data.as_str()), ("", "x"));
        assert_eq!(parser.retry, Some(Duration::from_millis(50)));
    }

    #[test]
    fn a_frame_without_data_is_none() {
        assert_eq!(frames(&["id: 9\nevent: step\n\n"]).0, []);
    }

    #[test]
    fn a_reconnection_keeps_filters_and_drops_positions() {
        let query = [("after", "7".to_owned()), ("heartbeat_s", "5".to_owned())];
        assert_eq!(without_position(&query), [("heartbeat_s", "5".to_owned())]);
    }
}
