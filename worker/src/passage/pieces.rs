//! Both directions of a call as one connection.
//!
//! Each end says how much the other one may send: its window first, then what was read of it. What comes is taken at
//! once, whoever reads it later, so that HTTP/2's own windows never stand full: the end of a call is noticed while
//! nobody reads, and no passage waits for another one's reader.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Buf as _, BytesMut};
use futures::future::BoxFuture;
use futures::{FutureExt as _, Stream};
use skep_proto::{ConnectTarget, Piece};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Streaming;

use super::windows::Window;
use crate::net::Carrier;

/// The bytes of one message at most.
const PIECE_BYTES: usize = 32 << 10;

/// What is between a connection and its call.
#[derive(Debug, Default)]
struct State {
    /// Whom the first piece names.
    target: Option<ConnectTarget>,
    window: usize,
    /// What the other end may still send.
    allowance: usize,
    /// What was read, and the other end has not been told of.
    read: usize,
    /// What it is told with the next piece.
    grant: usize,
    received: BytesMut,
    has_received_end: bool,
    /// What may be sent.
    credit: usize,
    unsent: BytesMut,
    end: End,
    /// Nobody reads or writes any more.
    is_left: bool,
    failure: Option<String>,
    reader: Option<Waker>,
    writer: Option<Waker>,
    sender: Option<Waker>,
}

/// The end of what is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum End {
    #[default]
    Open,
    Asked,
    Sent,
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

impl State {
    fn new(window: usize, credit: usize, target: Option<ConnectTarget>) -> Self {
        Self { target, window, allowance: window, grant: window, credit, ..Self::default() }
    }

    fn take(&mut self, piece: &Piece) -> Result<(), String> {
        let length = piece.data.len();
        if length > self.allowance {
            return Err(format!("the other node sent {length} bytes of {}", self.allowance));
        }
        self.allowance -= length;
        self.received.extend_from_slice(&piece.data);
        self.has_received_end |= piece.end;
        self.credit = self.credit.saturating_add(piece.credit as usize);
        wake(&mut self.reader);
        wake(&mut self.writer);
        Ok(())
    }

    fn read(&mut self, buffer: &mut ReadBuf<'_>, waker: &Waker) -> Poll<io::Result<()>> {
        if self.received.is_empty() {
            if self.has_received_end {
                return Poll::Ready(Ok(()));
            }
            if let Some(failure) = &self.failure {
                let reset = io::Error::new(io::ErrorKind::ConnectionReset, failure.clone());
                return Poll::Ready(Err(reset));
            }
            self.reader = Some(waker.clone());
            return Poll::Pending;
        }
        let length = self.received.len().min(buffer.remaining());
        buffer.put_slice(&self.received[..length]);
        self.received.advance(length);
        if self.received.is_empty() {
            self.received = BytesMut::new(); // Idle connections keep nothing.
        }
        self.read += length;
        if self.read * 2 >= self.window {
            self.allowance += self.read;
            self.grant += std::mem::take(&mut self.read);
            wake(&mut self.sender);
        }
        Poll::Ready(Ok(()))
    }

    fn write(&mut self, bytes: &[u8], waker: &Waker) -> Poll<io::Result<usize>> {
        if self.failure.is_some() || self.end != End::Open {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let room = self.credit.min(PIECE_BYTES.saturating_sub(self.unsent.len()));
        if room == 0 && !bytes.is_empty() {
            self.writer = Some(waker.clone());
            return Poll::Pending;
        }
        let length = bytes.len().min(room);
        self.unsent.extend_from_slice(&bytes[..length]);
        self.credit -= length;
        wake(&mut self.sender);
        Poll::Ready(Ok(length))
    }

    fn next_piece(&mut self, waker: &Waker) -> Poll<Option<Piece>> {
        let is_last = self.end == End::Asked;
        if self.target.is_some() || self.grant > 0 || !self.unsent.is_empty() || is_last {
            if is_last {
                self.end = End::Sent;
            }
            wake(&mut self.writer);
            let credit = u32::try_from(std::mem::take(&mut self.grant)).unwrap_or(u32::MAX);
            let data = self.unsent.split().freeze();
            return Poll::Ready(Some(Piece {
                target: self.target.take(),
                data,
                end: is_last,
                credit,
            }));
        }
        if self.is_left {
            return Poll::Ready(None);
        }
        self.sender = Some(waker.clone());
        Poll::Pending
    }

    /// The call has ended; whether that is news, and not the end of both directions.
    fn fail(&mut self, failure: &str) -> bool {
        let is_complete = self.has_received_end && self.end == End::Sent;
        if is_complete || self.failure.is_some() {
            return false;
        }
        self.failure = Some(failure.to_owned());
        wake(&mut self.reader);
        wake(&mut self.writer);
        true
    }
}

#[derive(Debug)]
struct Link {
    state: Mutex<State>,
    has_failed: CancellationToken,
}

impl Link {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, failure: &str) {
        if self.state().fail(failure) {
            self.has_failed.cancel();
        }
    }
}

/// The connection.
pub(super) struct Pieces {
    link: Arc<Link>,
    _receiving: DropGuard,
    _window: Window,
}

/// What is sent of it.
pub struct Outgoing(Arc<Link>);

/// What takes that which comes.
pub(super) struct Incoming {
    link: Arc<Link>,
    is_left: CancellationToken,
}

/// A connection of which the other end may send as much as the window has, and this one so many bytes.
pub(super) fn pieces(
    window: Window,
    credit: u32,
    target: Option<ConnectTarget>,
) -> (Pieces, Outgoing, Incoming) {
    let state = Mutex::new(State::new(window.bytes, credit as usize, target));
    let link = Arc::new(Link { state, has_failed: CancellationToken::new() });
    let is_left = CancellationToken::new();
    let receiving = is_left.clone().drop_guard();
    let pieces = Pieces { link: Arc::clone(&link), _receiving: receiving, _window: window };
    (pieces, Outgoing(Arc::clone(&link)), Incoming { link, is_left })
}

impl Incoming {
    /// Takes what comes until the call has ended or its connection was dropped.
    pub(super) async fn run(self, mut incoming: Streaming<Piece>) {
        let receive = async {
            loop {
                match incoming.message().await {
                    Ok(Some(piece)) => {
                        if let Err(failure) = self.link.state().take(&piece) {
                            return failure;
                        }
                    }
                    Ok(None) => return "the other node broke it".to_owned(),
                    Err(status) => return status.message().to_owned(),
                }
            }
        };
        if let Some(failure) = self.is_left.run_until_cancelled(receive).await {
            self.link.fail(&failure);
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.link.fail("this daemon takes nothing of it any more");
    }
}

impl Stream for Outgoing {
    type Item = Piece;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Piece>> {
        self.0.state().next_piece(context.waker())
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        let is_sent = self.0.state().end == End::Sent;
        // Whoever has its end may have gone; what it sent before that is still taken.
        if !is_sent {
            self.0.fail("the other node takes nothing of it any more");
        }
    }
}

impl fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outgoing").finish_non_exhaustive()
    }
}

impl Carrier for Pieces {
    fn broken(&self) -> BoxFuture<'static, io::Error> {
        let link = Arc::clone(&self.link);
        async move {
            link.has_failed.cancelled().await;
            let failure = link.state().failure.clone().unwrap_or_default();
            io::Error::new(io::ErrorKind::ConnectionReset, failure)
        }
        .boxed()
    }
}

impl Drop for Pieces {
    fn drop(&mut self) {
        let mut state = self.link.state();
        state.is_left = true;
        // Nobody reads it any more, and its room in the node's budget is somebody else's now.
        state.received = BytesMut::new();
        wake(&mut state.sender);
    }
}

impl fmt::Debug for Pieces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pieces").finish_non_exhaustive()
    }
}

impl AsyncRead for Pieces {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.link.state().read(buffer, context.waker())
    }
}

impl AsyncWrite for Pieces {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.link.state().write(bytes, context.waker())
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.link.state();
        if state.end == End::Open {
            state.end = End::Asked;
            wake(&mut state.sender);
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::task::ready;

    use super::*;

    fn piece(length: usize, credit: u32) -> Piece {
        Piece { data: vec![7; length].into(), credit, ..Piece::default() }
    }

    fn read(state: &mut State, length: usize) -> Poll<usize> {
        let mut space = vec![0; length];
        let mut buffer = ReadBuf::new(&mut space);
        ready!(state.read(&mut buffer, Waker::noop())).unwrap();
        Poll::Ready(buffer.filled().len())
    }

    #[test]
    fn nobody_sends_more_than_the_other_end_has_room_for() {
        let mut state = State::new(10, 0, None);
        let waker = Waker::noop();
        assert!(state.write(b"early", waker).is_pending(), "it has not been told how much");
        let Poll::Ready(Some(first)) = state.next_piece(waker) else { panic!("nothing is said") };
        assert_eq!(first, Piece { credit: 10, ..Piece::default() });
        state.take(&piece(0, 3)).unwrap();
        assert!(matches!(state.write(b"later", waker), Poll::Ready(Ok(3))));
        assert!(state.write(b"er", waker).is_pending());

        state.take(&piece(10, 0)).unwrap();
        assert_eq!(state.take(&piece(1, 0)).unwrap_err(), "the other node sent 1 bytes of 0");
        assert_eq!(read(&mut state, 4), Poll::Ready(4));
        let Poll::Ready(Some(sent)) = state.next_piece(waker) else { panic!("nothing is sent") };
        assert_eq!(
            (&sent.data[..], sent.credit),
            (&b"lat"[..], 0),
            "half a window is told at once"
        );
        assert_eq!(read(&mut state, 4), Poll::Ready(4));
        assert_eq!(
            state.next_piece(waker),
            Poll::Ready(Some(Piece { credit: 8, ..Piece::default() }))
        );
        state.take(&piece(8, 0)).unwrap();
        assert!(state.take(&piece(1, 0)).is_err());
    }

    #[test]
    fn a_call_is_complete_when_both_directions_have_ended() {
        for (is_sent, is_received, is_broken) in
            [(false, false, true), (true, false, true), (false, true, true), (true, true, false)]
        {
            let mut state = State::new(10, 10, None);
            state.end = if is_sent { End::Asked } else { End::Open };
            let _ = state.next_piece(Waker::noop());
            state.take(&Piece { end: is_received, ..piece(2, 0) }).unwrap();
            assert_eq!(state.fail("over"), is_broken, "{is_sent} {is_received}");
            assert_eq!(read(&mut state, 4), Poll::Ready(2), "what had come is read");
        }
    }
}
