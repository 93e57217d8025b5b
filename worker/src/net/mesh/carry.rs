//! Carries bytes between two connections until both directions have ended, or one of the connections has broken.
//!
//! While the one end does not read, nothing is read of the other one, which may break meanwhile: that is waited for
//! besides, so that a connection without a client ends although its task does not read.

use std::future::Future;
use std::io;
use std::os::fd::AsRawFd as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};
use tokio::io::{
    AsyncRead, AsyncWrite, Interest, ReadBuf, copy_bidirectional, copy_bidirectional_with_sizes,
};
use tokio::net::TcpStream;

use super::passage::Carrier;
use super::tally::Counters;

/// What is read at once where one end is a way through another daemon: each piece is a message.
const PIECE_BYTES: usize = 16 << 10;

/// How long an end may take nothing of what the other one sent before it broke.
const LAST_BYTES: Duration = Duration::from_secs(1);

/// Between two connections of this kernel; what the client sends and is sent is counted.
pub(super) async fn between(
    client: &TcpStream,
    task: &TcpStream,
    counters: Option<&Counters>,
) -> io::Result<()> {
    let moved = AtomicU64::new(0);
    let (mut a, mut b) = (Shared::new(client, &moved), Shared::new(task, &moved));
    a.counters = counters;
    let copied = copy_bidirectional(&mut a, &mut b);
    let broken = async {
        tokio::select! {
            error = broken(client) => error,
            error = broken(task) => error,
        }
    };
    to_the_end(copied, broken, &moved).await
}

/// Between a connection and a way through another daemon.
pub(crate) async fn through(
    stream: &TcpStream,
    carrier: &mut (impl Carrier + ?Sized),
    counters: Option<&Counters>,
) -> io::Result<()> {
    let moved = AtomicU64::new(0);
    let mut shared = Shared::new(stream, &moved);
    shared.counters = counters;
    let of_carrier = carrier.broken();
    let broken = async {
        tokio::select! {
            error = broken(stream) => error,
            error = of_carrier => error,
        }
    };
    let copied = copy_bidirectional_with_sizes(&mut shared, carrier, PIECE_BYTES, PIECE_BYTES);
    to_the_end(copied, broken, &moved).await
}

/// What had come from an end that broke is still carried, as long as the other one takes it.
async fn to_the_end(
    copied: impl Future<Output = io::Result<(u64, u64)>>,
    broken: impl Future<Output = io::Error>,
    moved: &AtomicU64,
) -> io::Result<()> {
    let mut copied = std::pin::pin!(copied);
    let error = tokio::select! {
        biased;
        copied = &mut copied => return copied.map(drop),
        error = broken => error,
    };
    loop {
        let before = moved.load(Ordering::Relaxed);
        match tokio::time::timeout(LAST_BYTES, &mut copied).await {
            Ok(copied) => return copied.map(drop),
            Err(_) if moved.load(Ordering::Relaxed) == before => return Err(error),
            Err(_) => {}
        }
    }
}

/// Returns when the connection has broken. The kernel's word is left for who reads or writes.
async fn broken(stream: &TcpStream) -> io::Error {
    match stream.ready(Interest::ERROR).await {
        Ok(_) => io::ErrorKind::ConnectionReset.into(),
        Err(error) => error,
    }
}

/// A connection that is read and written while its errors are waited for, which counts what it moves.
struct Shared<'a> {
    stream: &'a TcpStream,
    moved: &'a AtomicU64,
    /// Of the client's connection.
    counters: Option<&'a Counters>,
}

impl<'a> Shared<'a> {
    fn new(stream: &'a TcpStream, moved: &'a AtomicU64) -> Self {
        Self { stream, moved, counters: None }
    }

    fn count(&self, n: usize) {
        self.moved.fetch_add(n as u64, Ordering::Relaxed);
    }
}

impl AsyncRead for Shared<'_> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(context))?;
            match self.stream.try_read(buffer.initialize_unfilled()) {
                Ok(n) => {
                    buffer.advance(n);
                    self.count(n);
                    if let Some(counters) = self.counters {
                        counters.count_received(n);
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Shared<'_> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_write_ready(context))?;
            match self.stream.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => {
                    let n = *written.as_ref().unwrap_or(&0);
                    self.count(n);
                    if let Some(counters) = self.counters {
                        counters.count_sent(n);
                    }
                    return Poll::Ready(written);
                }
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match shutdown(self.stream.as_raw_fd(), Shutdown::Write) {
            // Its other end has gone: what was sent is not waited for.
            Ok(()) | Err(nix::Error::ENOTCONN) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}
