//! A large answer holds its request's turn for as long as it is in memory: whoever asks for many and takes none gets no
//! further turn. Small ones do not, so that they cost nothing; streams have places of their own.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, HttpBody};
use axum::response::Response;
use bytes::Bytes;
use http_body::{Frame, SizeHint};

use super::limits::Place;

/// The smallest answer that is large: about what a connection has of buffers in any case.
const LARGE_BYTES: u64 = 64 << 10;

/// An answer that gives `turn` back when it was sent, or at once when it is small.
pub fn until_sent(response: Response, turn: Place) -> Response {
    match response.body().size_hint().exact() {
        Some(bytes) if bytes > LARGE_BYTES => response.map(|body| {
            let turn = Arc::new(turn);
            Body::new(Held { body, turn })
        }),
        _ => response,
    }
}

struct Held {
    body: Body,
    turn: Arc<Place>,
}

/// A piece of the answer. The connection drops the body as soon as it has the last piece, and the piece when it is
/// sent: it is the pieces that hold the turn.
struct Piece {
    bytes: Bytes,
    _turn: Arc<Place>,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        frame.map_ok(|frame| {
            frame.map_data(|bytes| {
                let _turn = Arc::clone(&self.turn);
                Bytes::from_owner(Piece { bytes, _turn })
            })
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
