//! Published ports for clients that connect to 127.0.0.1 or ::1 on the node itself.
//!
//! The kernel does not let packets with a loopback address leave the loopback interface, so the
//! rules cannot serve them. A listener per port connects to the same port of the node's underlay
//! address instead: the rules take that connection like any other, so it takes its turn in the
//! same round-robin. Datagrams go the same way (`datagrams`).

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use skep_runtime::TaskSet;
use skep_worker_core::mesh::PortKey;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::datagrams;
use super::hold::LoopbackListeners;

/// Loopback connections of all ports at once; more wait in the backlog.
const CONNECTIONS_MAX: usize = 4096;

/// How long a task may take to accept: three of the kernel's attempts (after 1, 3 and 7 s).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(8);

/// How long to wait before accepting again when no file descriptor is left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The loopback listeners of a node.
#[derive(Debug)]
pub(super) struct Loopback {
    underlay: Ipv4Addr,
    tasks: TaskSet,
    permits: Arc<Semaphore>,
    sessions: Arc<Semaphore>,
    served: BTreeMap<PortKey, CancellationToken>,
}

impl Loopback {
    pub(super) fn new(underlay: Ipv4Addr) -> Self {
        Self {
            underlay,
            tasks: TaskSet::new(),
            permits: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            sessions: Arc::new(Semaphore::new(datagrams::SESSIONS_MAX)),
            served: BTreeMap::new(),
        }
    }

    /// Serves a port.
    pub(super) fn serve(&mut self, key: PortKey, loopback: LoopbackListeners) {
        let token = CancellationToken::new();
        let target = SocketAddrV4::new(self.underlay, key.port);
        let failed = |error: io::Error| {
            tracing::warn!(port = %key, %error, "port is not served on loopback");
        };
        match loopback {
            LoopbackListeners::Streams(listeners) => {
                let listeners = listeners.into_iter().map(TcpListener::from_std);
                for listener in listeners.filter_map(|result| result.map_err(failed).ok()) {
                    let accept = accept(listener, target, self.permits.clone(), self.tasks.clone());
                    let token = token.clone();
                    self.tasks.spawn("mesh-loopback-accept", async move {
                        token.run_until_cancelled(accept).await;
                    });
                }
            }
            LoopbackListeners::None => {}
            LoopbackListeners::Datagrams(sockets) => {
                let sockets = sockets.into_iter().map(UdpSocket::from_std);
                for socket in sockets.filter_map(|result| result.map_err(failed).ok()) {
                    let relay = datagrams::relay(socket, target, self.sessions.clone());
                    let token = token.clone();
                    self.tasks.spawn("mesh-loopback-datagrams", async move {
                        token.run_until_cancelled(relay).await;
                    });
                }
            }
        }
        if let Some(earlier) = self.served.insert(key, token) {
            earlier.cancel();
        }
    }

    /// Stops accepting on a port; connections that are established go on.
    pub(super) fn withdraw(&mut self, key: PortKey) {
        if let Some(token) = self.served.remove(&key) {
            token.cancel();
        }
    }

    /// Serves no port any more; returns the tasks that did, to be shut down.
    pub(super) fn end(&mut self) -> TaskSet {
        self.served.clear();
        std::mem::take(&mut self.tasks)
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

async fn accept(
    listener: TcpListener,
    target: SocketAddrV4,
    permits: Arc<Semaphore>,
    tasks: TaskSet,
) {
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                tasks.spawn("mesh-loopback-connection", async move {
                    forward(client, target).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::debug!(%target, %error, "failed to accept on loopback");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn forward(mut client: TcpStream, target: SocketAddrV4) {
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(target)).await;
    let mut backend = match connected {
        Ok(Ok(backend)) => backend,
        Ok(Err(error)) => {
            tracing::debug!(%target, %error, "failed to connect for a loopback client");
            return refuse(client);
        }
        Err(_) => {
            tracing::debug!(%target, "no task accepted a loopback client's connection in time");
            return refuse(client);
        }
    };
    // Both ends are one machine or one network: nothing is gained by waiting to fill packets.
    for stream in [&client, &backend] {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "failed to send small packets at once");
        }
    }
    if let Err(error) = tokio::io::copy_bidirectional(&mut client, &mut backend).await {
        tracing::debug!(%target, %error, "a loopback client's connection broke");
        refuse(client);
    }
}

/// Closes with a reset, as the rules do for clients from elsewhere.
fn refuse(client: TcpStream) {
    if let Err(error) = client.set_zero_linger() {
        tracing::debug!(%error, "failed to reset a loopback client's connection");
    }
}
