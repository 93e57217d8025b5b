//! The accepting side: TLS on the one port, and the unix socket.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use skep_common::limits::QUEUE_LENGTH;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::Tls;
use super::tls::{check_unexpired, subject_of};
use crate::access::{AccessLayer, Caller};
use crate::gate::Gate;
use crate::{TaskSet, clock};

/// A peer that does not finish its handshake within this time is dropped: it holds a task, no more. Thousands of nodes
/// that come back at once have theirs at the same time.
const HANDSHAKE_DEADLINE: std::time::Duration = std::time::Duration::from_secs(15);
/// A peer that was silent for so long is probed. Peers probe as well, mostly sooner; the nodes of a large swarm do so as
/// seldom as they send heartbeats.
const KEEP_ALIVE_INTERVAL: std::time::Duration = skep_common::limits::HEARTBEAT_PERIOD_LARGE;
/// Who does not answer by then has gone, and holds some memory meanwhile, no more: whether a node lives is decided
/// elsewhere. A daemon to which thousands of nodes come at once is late itself with what they answered long ago.
const KEEP_ALIVE_DEADLINE: std::time::Duration = std::time::Duration::from_secs(15);
/// Window of one stream: what may be on its way in a call, or in a client's connection that nodes relay.
pub(super) const STREAM_WINDOW_BYTES: u32 = 128 << 10;
/// Streams of one peer at once, each a call or a client's connection; more wait at the peer. These are more than the
/// connections that a node takes of others, which it refuses beyond that instead of letting them wait.
const STREAMS_MAX: u32 = 16_384;
/// Window of all streams of one peer, which is what a peer can have this process hold: nothing stands in it for long,
/// since calls are read as they come and relayed connections have windows of their own.
pub(super) const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;

/// Why a socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Another program holds the address, or the directory does not exist.
    #[error("failed to listen on {address}")]
    Listen {
        /// Address or path.
        address: String,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// Another daemon answers there.
    #[error("a skep daemon already listens on {0}")]
    AlreadyServed(PathBuf),
    /// The server stopped.
    #[error("the server stopped")]
    Serve(#[from] tonic::transport::Error),
}

/// A connection with its caller.
pub(crate) struct Connection<S> {
    pub(crate) stream: S,
    pub(crate) caller: Caller,
    /// Whether the caller may not go on.
    pub(crate) end: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl<S> Connected for Connection<S> {
    type ConnectInfo = Caller;
    fn connect_info(&self) -> Caller {
        self.caller
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // A connection is read all the time, so that this is looked at whatever it is used for.
        if self.end.as_mut().poll(context).is_ready() {
            self.end = Box::pin(std::future::ready(()));
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Serves `routes` over TLS to whom `gate` lets in, until the task set is cancelled.
///
/// Handshakes run beside each other: a stalled peer holds up nobody. A peer whose certificate is of
/// another swarm does not get past its handshake.
pub async fn serve_tls(
    listener: TcpListener,
    tls: Tls,
    gate: Gate,
    routes: Routes,
    tasks: &TaskSet,
) -> Result<(), ServeError> {
    let layer = AccessLayer::new(gate.clone());
    let (connections, incoming) = mpsc::channel(QUEUE_LENGTH);
    let acceptor_tasks = tasks.clone();
    tasks.spawn("tls acceptor", async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (tls, connections) = (tls.clone(), connections.clone());
                    let handshake = handshake(stream, tls, gate.clone());
                    acceptor_tasks.spawn("tls handshake", async move {
                        match tokio::time::timeout(HANDSHAKE_DEADLINE, handshake).await {
                            Ok(Ok(connection)) => {
                                // The server has ended when this fails: nobody is left to serve.
                                let _ = connections.send(Ok::<_, io::Error>(connection)).await;
                            }
                            Ok(Err(error)) => {
                                tracing::debug!(%error, "a peer failed its handshake")
                            }
                            Err(_) => tracing::debug!("a peer did not finish its handshake"),
                        }
                    });
                }
                Err(error) => {
                    // Out of file descriptors, mostly: the next one may do better.
                    tracing::warn!(%error, "failed to accept a connection");
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
            }
        }
    });
    let shutdown = tasks.token().cancelled_owned();
    server(layer, routes)
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), shutdown)
        .await?;
    Ok(())
}

pub(crate) fn server(
    layer: AccessLayer,
    routes: Routes,
) -> tonic::transport::server::Router<
    tower::layer::util::Stack<AccessLayer, tower::layer::util::Identity>,
> {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(STREAMS_MAX)
        // After a stall many connections may have been given up before they were accepted; a peer with a
        // certificate means no harm by it, and all of its other connections would end with the connection.
        .http2_max_pending_accept_reset_streams(usize::try_from(STREAMS_MAX).ok())
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_DEADLINE))
        .layer(layer)
        .add_routes(routes)
}

async fn handshake(
    stream: TcpStream,
    tls: Tls,
    gate: Gate,
) -> io::Result<Connection<tokio_rustls::server::TlsStream<TcpStream>>> {
    stream.set_nodelay(true)?;
    let stream = TlsAcceptor::from(tls.server()).accept(stream).await?;
    let caller = match subject_of(stream.get_ref().1.peer_certificates())? {
        None => Caller::Anonymous,
        Some(subject) => {
            if subject.cluster_id != tls.subject().cluster_id {
                return Err(io::Error::other("the certificate is of another swarm"));
            }
            check_unexpired(&subject, clock::now())?;
            Caller::Node(subject.node_id, subject.role)
        }
    };
    Ok(Connection { stream, caller, end: Box::pin(gate.end_of(caller)) })
}

/// Takes the unix socket at `path`: mode 0600, so that only its owner (root) can connect.
pub async fn bind_unix(path: &Path) -> Result<UnixListener, ServeError> {
    let listen_error = |source| ServeError::Listen { address: path.display().to_string(), source };
    if UnixStream::connect(path).await.is_ok() {
        return Err(ServeError::AlreadyServed(path.to_owned()));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(listen_error(error)),
        _ => {} // A socket that nobody serves is left over from a daemon that was killed.
    }
    let listener = UnixListener::bind(path).map_err(listen_error)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(listen_error)?;
    Ok(listener)
}

/// Serves `routes` on a unix socket until the task set is cancelled.
pub async fn serve_unix(
    listener: UnixListener,
    routes: Routes,
    tasks: &TaskSet,
) -> Result<(), ServeError> {
    let connection = |stream: UnixStream| {
        let peer = stream.peer_cred().ok();
        let (uid, pid) = (peer.map(|peer| peer.uid()), peer.and_then(|peer| peer.pid()));
        let end = Box::pin(std::future::pending());
        Connection { stream, caller: Caller::Local { uid, pid }, end }
    };
    let incoming = UnixListenerStream::new(listener).map(move |stream| stream.map(connection));
    let shutdown = tasks.token().cancelled_owned();
    server(AccessLayer::default(), routes).serve_with_incoming_shutdown(incoming, shutdown).await?;
    Ok(())
}
