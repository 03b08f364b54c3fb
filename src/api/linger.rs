//! A refused request's body is read on for a while, so that its sender gets the answer: a connection closed with
//! unread bytes is reset, and the reset destroys the answer on its way (RFC 9112 section 9.6).

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use http::{Request, header};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;

/// How much more is read of a body that nobody wants.
const MAX_BYTES: usize = 8 << 20;

/// For how long in all.
const MAX_TIME: Duration = Duration::from_secs(5);

/// For how long nothing may come: whoever is still sending is not that slow.
const MAX_PAUSE: Duration = Duration::from_millis(500);

/// A body that is read to its end, within bounds, when it is dropped before.
struct Lingering {
    body: Body,
    is_read: bool,
}

/// Lets a request's body linger. One that is only sent once asked for (`Expect: 100-continue`) needs not.
pub fn linger(request: Request<Body>) -> Request<Body> {
    if request.body().is_end_stream() || request.headers().contains_key(header::EXPECT) {
        return request;
    }
    request.map(|body| {
        Body::new(Lingering {
            body,
            is_read: false,
        })
    })
}

impl HttpBody for Lingering {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        self.is_read |= matches!(frame, Poll::Ready(None | Some(Err(_))));
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        if self.is_read || self.body.is_end_stream() {
            return;
        }
        // Without a runtime the connection is gone as well.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let rest = std::mem::take(&mut self.body);
            runtime.spawn(tokio::time::timeout(MAX_TIME, discard(rest)));
        }
    }
}

async fn discard(mut body: Body) {
    let mut left = MAX_BYTES;
    while let Ok(Some(Ok(frame))) = tokio::time::timeout(MAX_PAUSE, body.frame()).await {
        let length = frame.data_ref().map_or(0, Bytes::len);
        match left.checked_sub(length) {
            Some(rest) => left = rest,
            None => return,
        }
    }
}
