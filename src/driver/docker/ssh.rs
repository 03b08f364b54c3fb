//! An engine on another machine by ssh: the system's own `ssh` runs `docker system dial-stdio` there, as docker's own
//! client does. Keys, known hosts and jumps are in its configuration; it can ask nobody for a password.

use std::io;
use std::pin::Pin;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bollard::BollardRequest;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, BufReader, Join, ReadBuf};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use url::Url;

use super::connect::Asked;

/// Connections that are kept for the next calls: each is a process, and takes some round trips to be there.
pub const IDLE_CONNECTIONS: usize = 4;
/// How long one may take to be there. An engine that takes longer is told as stuck before.
const CONNECT_LIMIT: &str = "ConnectTimeout=30";
/// How long a connection is noticed to be dead: twice this.
const ALIVE: [&str; 2] = ["ServerAliveInterval=5", "ServerAliveCountMax=2"];
/// Of what ssh complains about, so much is told.
const COMPLAINT_MAX_CHARS: usize = 300;
const COMPLAINT_LOOKS: u32 = 20;
const COMPLAINT_LOOK: Duration = Duration::from_millis(25);

/// What ssh is run with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ssh {
    arguments: Vec<String>,
    /// The last line that it complained with.
    complaint: Complaint,
}

/// Shared by all processes of one address.
#[derive(Clone, Debug, Default)]
struct Complaint(Arc<Mutex<Option<String>>>);

impl PartialEq for Complaint {
    fn eq(&self, _: &Complaint) -> bool {
        true
    }
}
impl Eq for Complaint {}

impl Complaint {
    fn replace(&self, line: Option<String>) -> Option<String> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut kept, line)
    }

    /// What it says comes by another way than the end of the connection, and may be later.
    async fn soon(&self) -> Option<String> {
        for _ in 0..COMPLAINT_LOOKS {
            if let Some(line) = self.replace(None) {
                return Some(line);
            }
            tokio::time::sleep(COMPLAINT_LOOK).await;
        }
        None
    }
}

impl Ssh {
    /// From `ssh://[user@]host[:port][/path/of/the/socket]`.
    ///
    /// # Errors
    /// What of it cannot be used.
    pub fn parse(host: &str) -> Result<Ssh, String> {
        let url = Url::parse(host).map_err(|error| format!("it is no address: {error}"))?;
        if url.password().is_some() {
            return Err("it may have no password: let ssh in by a key".to_owned());
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err("nothing may follow its path".to_owned());
        }
        let name = url.host_str().filter(|name| !name.is_empty());
        let name = name.ok_or("it names no machine")?;
        let mut arguments: Vec<String> = vec!["-T".into(), "-o".into(), "BatchMode=yes".into()];
        for option in [CONNECT_LIMIT].into_iter().chain(ALIVE) {
            arguments.extend(["-o".to_owned(), option.to_owned()]);
        }
        if !url.username().is_empty() {
            arguments.extend(["-l".to_owned(), url.username().to_owned()]);
        }
        if let Some(port) = url.port() {
            arguments.extend(["-p".to_owned(), port.to_string()]);
        }
        arguments.extend(["--".to_owned(), name.trim_matches(['[', ']']).to_owned()]);
        arguments.push("docker".to_owned());
        if !matches!(url.path(), "" | "/") {
            // It goes through a shell over there.
            let path = url.path();
            if !path
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte))
            {
                return Err(format!("'{path}' is no path of a socket"));
            }
            arguments.extend(["--host".to_owned(), format!("unix://{path}")]);
        }
        arguments.extend(["system".to_owned(), "dial-stdio".to_owned()]);
        Ok(Ssh {
            arguments,
            complaint: Complaint::default(),
        })
    }

    fn dial(&self) -> io::Result<Dialled> {
        let mut child = Command::new("ssh")
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("ssh cannot be run: {error}")))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let (Some(stdin), Some(stdout)) = (stdin, stdout) else {
            return Err(io::Error::other("ssh has no input or output"));
        };
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(listen(stderr, self.complaint.clone()));
        }
        Ok(Dialled {
            io: tokio::io::join(stdout, stdin),
            _child: child,
        })
    }
}

/// Keeps the last line. Ends with the process.
async fn listen(stderr: ChildStderr, complaint: Complaint) {
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let line = line.trim();
        if !line.is_empty() {
            complaint.replace(Some(line.chars().take(COMPLAINT_MAX_CHARS).collect()));
        }
    }
}

/// The connections, each a process of its own.
pub fn transport(ssh: Ssh) -> impl Fn(BollardRequest) -> Asked + Send + Sync + 'static {
    let complaint = ssh.complaint.clone();
    let connector = tower::service_fn(move |_: http::Uri| -> BoxFuture<'static, _> {
        let dialled = ssh.dial().map(TokioIo::new);
        async move { dialled }.boxed()
    });
    let client = Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(IDLE_CONNECTIONS)
        .build(connector);
    move |request: BollardRequest| {
        let asked = client.request(request);
        let complaint = complaint.clone();
        async move {
            // What broke the connection is what ssh says, if it says something.
            let error = match asked.await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            Err(match complaint.soon().await {
                Some(line) => io::Error::other(format!("ssh: {line}")).into(),
                None => bollard::errors::Error::from(error),
            })
        }
        .boxed()
    }
}

/// A connection, which ends with its process.
struct Dialled {
    io: Join<ChildStdout, ChildStdin>,
    _child: Child,
}

impl Connection for Dialled {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl AsyncRead for Dialled {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Dialled {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end_of(host: &str) -> String {
        let arguments = Ssh::parse(host).unwrap().arguments.join(" ");
        let (_, end) = arguments.split_once("ServerAliveCountMax=2 ").unwrap();
        end.to_owned()
    }

    #[test]
    fn an_address_becomes_arguments() {
        for (host, expected) in [
            ("ssh://gpu1", "-- gpu1 docker system dial-stdio"),
            (
                "ssh://me@gpu1:2222",
                "-l me -p 2222 -- gpu1 docker system dial-stdio",
            ),
            (
                "ssh://me@[::1]/run/user/1000/docker.sock",
                "-l me -- ::1 docker --host unix:///run/user/1000/docker.sock system dial-stdio",
            ),
            // An option for ssh is none.
            (
                "ssh://-oProxyCommand=x",
                "-- -oProxyCommand=x docker system dial-stdio",
            ),
        ] {
            assert_eq!(end_of(host), expected);
        }
        for bad in ["ssh://", "ssh://a:b@c", "ssh://a/b?c", "ssh://a/$(b)"] {
            assert!(Ssh::parse(bad).is_err(), "{bad}");
        }
    }
}
