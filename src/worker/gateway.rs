//! What the worker tells and asks its gateway: progress, checkpoints. Tokens go to that gateway only.

use std::time::Duration;

use bytes::Bytes;
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use url::Url;

/// A gateway that does not answer must not hold up the work: progress is worth this much waiting.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// The largest checkpoint that the gateway keeps, in bytes.
const MAX_CHECKPOINT_BYTES: u64 = 1 << 20;

/// The way back to the gateway that started this worker.
#[derive(Clone, Debug)]
pub struct Gateway {
    http: reqwest::Client,
    base: Option<Url>,
    token: Option<SecretString>,
}

/// One job's side of the conversation: which run, which attempt, and the links it was given.
#[derive(Clone, Debug)]
pub struct Link {
    gateway: Gateway,
    run: String,
    attempt: Option<String>,
    /// The dispatch's own, else the worker's.
    token: Option<SecretString>,
    progress: Option<Url>,
    save: Option<Url>,
    checkpoint: Option<Url>,
}

/// What a dispatch says in its headers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Headers<'a> {
    pub progress: Option<&'a str>,
    pub checkpoint: Option<&'a str>,
    /// Good for this attempt only.
    pub token: Option<&'a str>,
}

/// Why a call to the gateway came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error("the gateway does not answer")]
    Unreachable(#[source] reqwest::Error),
    #[error("the gateway answered {0}")]
    Refused(u16),
    #[error("the checkpoint is larger than {MAX_CHECKPOINT_BYTES} bytes")]
    TooLarge,
}

impl Gateway {
    /// `base` as `http://host:port`; without it only links to this machine are followed. `roots` are trusted instead of
    /// the system's certificates when there are any.
    ///
    /// # Errors
    /// The HTTP client cannot be made.
    pub fn new(
        base: Option<Url>,
        token: Option<SecretString>,
        roots: Vec<reqwest::Certificate>,
    ) -> Result<Self, reqwest::Error> {
        let builder = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(CALL_TIMEOUT);
        let builder = match roots.is_empty() {
            true => builder,
            false => builder.tls_certs_only(roots),
        };
        Ok(Self {
            http: builder.build()?,
            base,
            token,
        })
    }

    /// The conversation about one attempt. Whatever host the links of a dispatch name, they are followed on the
    /// configured gateway only. Its token is preferred to the worker's own, which can do more than is needed.
    pub fn link(&self, run: String, attempt: Option<String>, headers: Headers<'_>) -> Link {
        let progress = headers.progress.and_then(|text| self.follow(text));
        let base = self.base.clone().or_else(|| progress.clone());
        let own = |path: String| base.as_ref().and_then(|base| base.join(&path).ok());
        Link {
            save: own(format!("/api/gateway/runs/{run}/checkpoint")),
            progress: progress.or_else(|| own(format!("/queue/{run}/progress"))),
            checkpoint: headers.checkpoint.and_then(|text| self.follow(text)),
            token: headers.token.map_or_else(
                || self.token.clone(),
                |token| Some(SecretString::from(token)),
            ),
            gateway: self.clone(),
            run,
            attempt,
        }
    }

    /// `text` as an address of our gateway.
    fn follow(&self, text: &str) -> Option<Url> {
        match &self.base {
            Some(base) => {
                // Only the path is taken from a full URL.
                let path = Url::parse(text).map_or_else(
                    |_| text.to_owned(),
                    |url| url[url::Position::BeforePath..].to_owned(),
                );
                let joined = base.join(&path).ok()?;
                (joined.origin() == base.origin()).then_some(joined)
            }
            None => Url::parse(text).ok().filter(is_loopback),
        }
    }
}

impl Link {
    pub fn run(&self) -> &str {
        &self.run
    }

    /// Pushes a progress object. Does nothing without a gateway.
    ///
    /// # Errors
    /// The gateway is away, or refuses because the attempt is over.
    pub async fn push_progress(&self, progress: &Value) -> Result<(), CallError> {
        let Some(url) = self.progress.clone() else {
            return Ok(());
        };
        self.send(self.gateway.http.post(url).json(progress))
            .await?;
        Ok(())
    }

    /// Saves a checkpoint. Does nothing without a gateway.
    ///
    /// # Errors
    /// The gateway is away, or refuses because the attempt is over.
    pub async fn save_checkpoint(&self, body: Vec<u8>) -> Result<(), CallError> {
        let Some(url) = self.save.clone() else {
            return Ok(());
        };
        let request = self
            .gateway
            .http
            .put(url)
            .header("content-type", "application/json")
            .body(body);
        self.send(request).await?;
        Ok(())
    }

    /// The checkpoint that was offered, `None` when there was none.
    ///
    /// # Errors
    /// It was offered and cannot be had.
    pub async fn checkpoint(&self) -> Result<Option<Bytes>, CallError> {
        let Some(url) = self.checkpoint.clone() else {
            return Ok(None);
        };
        let answer = self.send(self.gateway.http.get(url)).await?;
        if answer.content_length().unwrap_or(0) > MAX_CHECKPOINT_BYTES {
            return Err(CallError::TooLarge);
        }
        Ok(Some(answer.bytes().await.map_err(CallError::Unreachable)?))
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<reqwest::Response, CallError> {
        let mut request = request;
        if let Some(token) = &self.token {
            request = request.bearer_auth(token.expose_secret());
        }
        if let Some(attempt) = &self.attempt {
            request = request.header("x-rungate-attempt", attempt);
        }
        let answer = request.send().await.map_err(CallError::Unreachable)?;
        match answer.status() {
            status if status.is_success() => Ok(answer),
            status => Err(CallError::Refused(status.as_u16())),
        }
    }
}

/// Whether `url` leads to this machine.
pub fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_to_another_host_is_followed_on_our_gateway_only() {
        let base = Url::parse("http://127.0.0.1:9000").unwrap();
        let gateway = Gateway::new(Some(base), None, Vec::new()).unwrap();
        let progress = "http://evil.example/queue/7/progress";
        let headers = Headers {
            progress: Some(progress),
            ..Headers::default()
        };
        let link = gateway.link("7".to_owned(), None, headers);
        let url = link.progress.unwrap();
        assert_eq!(url.as_str(), "http://127.0.0.1:9000/queue/7/progress");
        let url = link.save.unwrap();
        assert_eq!(url.path(), "/api/gateway/runs/7/checkpoint");
        assert_eq!(gateway.follow("//evil.example/x"), None);
    }

    #[test]
    fn the_token_of_a_dispatch_is_preferred_to_the_workers_own() {
        let gateway = Gateway::new(None, Some("own".into()), Vec::new()).unwrap();
        let token = |token| {
            let headers = Headers {
                token,
                ..Headers::default()
            };
            let link = gateway.link("7".to_owned(), None, headers);
            link.token.unwrap().expose_secret().to_owned()
        };
        assert_eq!(token(Some("of the job")), "of the job");
        assert_eq!(token(None), "own");
    }

    #[test]
    fn without_a_gateway_only_this_machine_is_talked_to() {
        let gateway = Gateway::new(None, None, Vec::new()).unwrap();
        assert_eq!(gateway.follow("http://evil.example/x"), None);
        assert!(gateway.follow("http://127.0.0.1:1/x").is_some());
    }
}
