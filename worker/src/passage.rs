//! Connections to tasks of other nodes through their daemons: `Peer.Connect`, from both ends.
//!
//! One call is one connection. Its pieces wait for whoever reads them: a sender goes on when HTTP/2's windows
//! let it, so that neither end keeps more than those and one piece.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddrV4;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use futures::Stream as _;
use skep_proto::peer_client::PeerClient;
use skep_proto::{ConnectTarget, Piece};
use skep_runtime::TaskSet;
use skep_runtime::transport::{ChannelPool, Peer};
use skep_worker_core::mesh::Passage;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::PollSender;
use tonic::{Status, Streaming};

use crate::net::mesh::relay::{copy, prepare, refuse};
use crate::net::{Carrier, Passages};

/// Pieces of one direction that wait to be sent.
const PIECES: usize = 1;

/// Connections that other nodes have to this node's tasks at once, each a file descriptor; more are refused.
const CONNECTIONS_MAX: usize = 8192;

/// How long a task may take to accept: less than the caller waits, who then asks another one.
const ACCEPT_TIMEOUT: Duration = Duration::from_millis(1900);

/// How long the table that names a task may come to its own node after it came to the caller's.
const TABLE_WAIT: Duration = Duration::from_millis(300);

/// Where connections of other nodes may end, by task and port.
pub type OwnTargets = BTreeMap<(String, u16), SocketAddrV4>;

/// Reaches the tasks of other nodes through their daemons.
#[derive(Debug)]
pub struct Daemons {
    pool: ChannelPool,
}

impl Daemons {
    /// With channels of its own: bytes of clients do not wait with calls of nodes.
    pub fn new(pool: &ChannelPool) -> Self {
        Self { pool: pool.for_connections() }
    }
}

#[tonic::async_trait]
impl Passages for Daemons {
    async fn open(&self, passage: &Passage) -> io::Result<Box<dyn Carrier>> {
        let address = passage.daemon.to_string();
        let channel = self.pool.channel(&address, Peer::Node(passage.node_id));
        let (sender, pieces) = mpsc::channel(PIECES);
        let target =
            ConnectTarget { task_id: passage.task_id.clone(), port: passage.target_port.into() };
        let first = Piece { target: Some(target), ..Piece::default() };
        let _ = sender.try_send(first); // It is empty, and its other end is here.
        let mut client = PeerClient::new(channel);
        let answer = client.connect(ReceiverStream::new(pieces)).await;
        let answer = answer.map_err(|status| {
            io::Error::new(io::ErrorKind::ConnectionRefused, status.message().to_owned())
        })?;
        Ok(Box::new(Pieces::new(answer.into_inner(), sender)))
    }
}

/// Takes connections of other nodes to tasks of this one.
#[derive(Debug, Clone)]
pub struct Entrance {
    targets: watch::Receiver<Arc<OwnTargets>>,
    permits: Arc<Semaphore>,
}

impl Entrance {
    /// To these tasks, and to no others.
    pub fn new(targets: watch::Receiver<Arc<OwnTargets>>) -> Self {
        Self { targets, permits: Arc::new(Semaphore::new(CONNECTIONS_MAX)) }
    }

    /// Connects to the task that the first piece names; returns what it answers.
    pub async fn connect(
        &self,
        mut pieces: Streaming<Piece>,
        tasks: &TaskSet,
    ) -> Result<ReceiverStream<Piece>, Status> {
        let permit = self.permits.clone().try_acquire_owned();
        let permit =
            permit.map_err(|_| Status::resource_exhausted("too many connections to this node"))?;
        let connect = async {
            let first = pieces.message().await?.and_then(|piece| piece.target);
            let first = first.ok_or_else(|| Status::invalid_argument("no task is named"))?;
            let address = self.target(&first).await?;
            let stream = TcpStream::connect(address).await;
            stream.map_err(|error| {
                Status::unavailable(format!("task {} did not accept: {error}", first.task_id))
            })
        };
        let stream = tokio::time::timeout(ACCEPT_TIMEOUT, connect).await;
        let silent = |_| Status::unavailable("the task did not accept in time");
        let mut stream = stream.map_err(silent)??;
        prepare(&stream);
        let (sender, answer) = mpsc::channel(PIECES);
        tasks.spawn("connection of another node", async move {
            let mut caller = Pieces::new(pieces, sender);
            if let Err(error) = copy(&mut stream, &mut caller).await {
                tracing::debug!(%error, "a connection of another node broke");
                refuse(&stream);
            }
            drop(permit);
        });
        Ok(ReceiverStream::new(answer))
    }

    async fn target(&self, wanted: &ConnectTarget) -> Result<SocketAddrV4, Status> {
        let ConnectTarget { task_id, port } = wanted;
        let not_here = || {
            Status::not_found(format!(
                "no task {task_id} serves a published port by port {port} here"
            ))
        };
        let key = (task_id.clone(), u16::try_from(*port).map_err(|_| not_here())?);
        let mut targets = self.targets.clone();
        let named = targets.wait_for(|targets| targets.contains_key(&key));
        let named = tokio::time::timeout(TABLE_WAIT, named).await;
        let targets = named.ok().and_then(Result::ok).ok_or_else(not_here)?;
        targets.get(&key).copied().ok_or_else(not_here)
    }
}

/// Both directions of a call as one connection.
struct Pieces {
    incoming: Streaming<Piece>,
    /// What was taken of `incoming` and not read yet.
    rest: Bytes,
    is_at_end: bool,
    outgoing: PollSender<Piece>,
}

impl Pieces {
    fn new(incoming: Streaming<Piece>, outgoing: mpsc::Sender<Piece>) -> Self {
        let outgoing = PollSender::new(outgoing);
        Self { incoming, rest: Bytes::new(), is_at_end: false, outgoing }
    }

    fn poll_send(&mut self, context: &mut Context<'_>, piece: Piece) -> Poll<io::Result<()>> {
        // The other end is gone, or has broken the connection.
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        ready!(self.outgoing.poll_reserve(context)).map_err(gone)?;
        Poll::Ready(self.outgoing.send_item(piece).map_err(gone))
    }
}

impl fmt::Debug for Pieces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pieces").field("is_at_end", &self.is_at_end).finish_non_exhaustive()
    }
}

impl AsyncRead for Pieces {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() && !self.is_at_end {
            match ready!(Pin::new(&mut self.incoming).poll_next(context)) {
                Some(Ok(piece)) => {
                    self.rest = piece.data;
                    self.is_at_end = piece.end;
                }
                Some(Err(status)) => {
                    let message = status.message().to_owned();
                    return Poll::Ready(Err(io::Error::new(
                        io::ErrorKind::ConnectionReset,
                        message,
                    )));
                }
                // Without its last piece.
                None => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            }
        }
        let length = self.rest.len().min(buffer.remaining());
        buffer.put_slice(&self.rest[..length]);
        self.rest.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pieces {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        // Copied once there is room, not at each attempt.
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        ready!(self.outgoing.poll_reserve(context)).map_err(gone)?;
        let piece = Piece { data: Bytes::copy_from_slice(bytes), ..Piece::default() };
        ready!(self.poll_send(context, piece))?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.outgoing.is_closed() {
            return Poll::Ready(Ok(())); // It was sent.
        }
        ready!(self.poll_send(context, Piece { end: true, ..Piece::default() }))?;
        self.outgoing.close();
        Poll::Ready(Ok(()))
    }
}
