//! Server-sent events as a browser's EventSource reads them (html.spec.whatwg.org, section 9.2): fields,
//! comments, `retry`, and the last event id that survives a reconnection.

use futures_util::StreamExt;
use futures_util::stream::BoxStream;

/// One dispatched event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub id: String,
    pub name: String,
    pub data: String,
}

/// A connection to a stream, with its parser's state.
pub struct EventSource {
    body: BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    pending: Vec<u8>,
    /// As `Last-Event-ID` of the next connection would send it.
    pub last_id: String,
    /// Milliseconds, when the server has sent any.
    pub retry_ms: Option<u64>,
    pub comments: usize,
    /// Bytes that are still taken before the connection counts as cut; `None` takes all.
    pub budget: Option<usize>,
    /// As the last `id` field said: it becomes `last_id` with the event that it came with.
    id: String,
    name: String,
    data: String,
}

impl EventSource {
    /// Connects; `last_id` is sent as `Last-Event-ID` when it is not empty.
    pub async fn open(request: reqwest::RequestBuilder, last_id: &str) -> EventSource {
        let opened = EventSource::try_open(request, last_id).await;
        opened.expect("the gateway answers")
    }

    /// The same; `None` when nobody answers.
    pub async fn try_open(request: reqwest::RequestBuilder, last_id: &str) -> Option<EventSource> {
        let mut request = request.header("accept", "text/event-stream");
        if !last_id.is_empty() {
            request = request.header("last-event-id", last_id);
        }
        let response = request.send().await.ok()?;
        assert_eq!(response.status(), 200);
        let kind = response.headers()["content-type"]
            .to_str()
            .unwrap()
            .to_owned();
        assert!(kind.starts_with("text/event-stream"), "{kind}");
        Some(EventSource {
            body: response.bytes_stream().boxed(),
            pending: Vec::new(),
            last_id: last_id.to_owned(),
            retry_ms: None,
            comments: 0,
            budget: None,
            id: last_id.to_owned(),
            name: String::new(),
            data: String::new(),
        })
    }

    /// The next event, `None` when the server has closed the stream.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            while let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                let line = String::from_utf8(line).expect("streams are UTF-8");
                if let Some(event) = self.line(line.trim_end_matches(['\n', '\r'])) {
                    return Some(event);
                }
            }
            if self.budget == Some(0) {
                return None;
            }
            let chunk = self.body.next().await?.ok()?;
            let taken = self
                .budget
                .map_or(chunk.len(), |left| left.min(chunk.len()));
            self.pending.extend_from_slice(&chunk[..taken]);
            self.budget = self.budget.map(|left| left - taken);
        }
    }

    fn line(&mut self, line: &str) -> Option<Event> {
        if line.is_empty() {
            self.last_id.clone_from(&self.id);
            let data = std::mem::take(&mut self.data);
            let name = std::mem::take(&mut self.name);
            if data.is_empty() {
                return None;
            }
            return Some(Event {
                id: self.last_id.clone(),
                name: if name.is_empty() {
                    "message".to_owned()
                } else {
                    name
                },
                data: data.trim_end_matches('\n').to_owned(),
            });
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "" => self.comments += 1,
            "id" => self.id = value.to_owned(),
            "event" => self.name = value.to_owned(),
            "data" => {
                self.data.push_str(value);
                self.data.push('\n');
            }
            "retry" => self.retry_ms = value.parse().ok(),
            _ => {}
        }
        None
    }
}
