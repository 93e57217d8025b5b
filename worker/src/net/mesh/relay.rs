//! Connections to published ports that go through the daemon.
//!
//! Clients that connect to 127.0.0.1 or ::1 on the node itself: the kernel does not let packets with a
//! loopback address leave the loopback interface, so the rules cannot serve them. A listener per port
//! connects to the same port of the node's underlay address instead: the rules take that connection like
//! any other, so it takes its turn in the same round-robin. Datagrams go the same way (`datagrams`).
//!
//! Clients of ports that the kernel does not balance, since their tasks are sent a header: one listener on
//! all of the node's addresses gives each connection to the next healthy task (`upstream`).

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use skep_runtime::TaskSet;
use skep_worker_core::mesh::{PortKey, Relay};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::datagrams;
use super::hold::Listeners;
use super::upstream::{Balance, Upstream};

/// Loopback connections of all ports at once; more wait in the backlog.
const CONNECTIONS_MAX: usize = 4096;

/// Connections of one port that the daemon balances, each two file descriptors; more wait in the backlog.
const BALANCED_MAX: usize = 8192;

/// A client that vanished without a word is noticed after about two minutes: its place is another's.
const PROBE_AFTER_SECONDS: u32 = 60;
const PROBE_EVERY_SECONDS: u32 = 15;
const PROBES: u32 = 4;

/// How long to wait before accepting again when no file descriptor is left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The listeners of a node.
#[derive(Debug)]
pub(super) struct Relays {
    underlay: Ipv4Addr,
    tasks: TaskSet,
    permits: Arc<Semaphore>,
    sessions: Arc<Semaphore>,
    served: BTreeMap<PortKey, Served>,
    balances: BTreeMap<PortKey, Arc<Balance>>,
}

#[derive(Debug)]
struct Served {
    token: CancellationToken,
    listening: Vec<JoinHandle<()>>,
}

impl Relays {
    pub(super) fn new(underlay: Ipv4Addr) -> Self {
        Self {
            underlay,
            tasks: TaskSet::new(),
            permits: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            sessions: Arc::new(Semaphore::new(datagrams::SESSIONS_MAX)),
            served: BTreeMap::new(),
            balances: BTreeMap::new(),
        }
    }

    /// Serves a port.
    pub(super) fn serve(&mut self, key: PortKey, listeners: Listeners) {
        let target = SocketAddrV4::new(self.underlay, key.port);
        let served = match listeners {
            Listeners::None => {
                self.accepting(key, Vec::new(), Upstream::Rules(target), &self.permits)
            }
            Listeners::Streams(listeners) => {
                self.accepting(key, listeners, Upstream::Rules(target), &self.permits)
            }
            Listeners::Everyone(listeners) => {
                let balance = self.balances.entry(key).or_default().clone();
                let permits = Arc::new(Semaphore::new(BALANCED_MAX));
                self.accepting(key, listeners, Upstream::Tasks(balance), &permits)
            }
            Listeners::Datagrams(sockets) => self.relaying(key, sockets, target),
        };
        if let Some(earlier) = self.served.insert(key, served) {
            earlier.token.cancel();
        }
    }

    fn accepting(
        &self,
        key: PortKey,
        listeners: Vec<std::net::TcpListener>,
        upstream: Upstream,
        permits: &Arc<Semaphore>,
    ) -> Served {
        let token = CancellationToken::new();
        let listeners = listeners.into_iter().map(TcpListener::from_std);
        let listeners = listeners.filter_map(|listener| served_or_told(key, listener));
        let accept_on = |listener| {
            let accept = accept(listener, upstream.clone(), permits.clone(), self.tasks.clone());
            let token = token.clone();
            self.tasks.spawn("mesh-accept", async move {
                token.run_until_cancelled(accept).await;
            })
        };
        let listening = listeners.map(accept_on).collect();
        Served { token, listening }
    }

    fn relaying(
        &self,
        key: PortKey,
        sockets: Vec<std::net::UdpSocket>,
        target: SocketAddrV4,
    ) -> Served {
        let token = CancellationToken::new();
        let sockets = sockets.into_iter().map(UdpSocket::from_std);
        let sockets = sockets.filter_map(|socket| served_or_told(key, socket));
        let relay_from = |socket| {
            let relay = datagrams::relay(socket, target, self.sessions.clone());
            let token = token.clone();
            self.tasks.spawn("mesh-loopback-datagrams", async move {
                token.run_until_cancelled(relay).await;
            })
        };
        let listening = sockets.map(relay_from).collect();
        Served { token, listening }
    }

    /// From now on connections to a port that the daemon balances go to these tasks.
    pub(super) fn balance(&mut self, key: PortKey, relay: &Relay) {
        self.balances.entry(key).or_default().set(relay);
    }

    /// Stops accepting on a port; connections that are established go on. Its listeners are closed when
    /// the tasks have ended that are returned.
    pub(super) fn withdraw(&mut self, key: PortKey) -> Vec<JoinHandle<()>> {
        self.balances.remove(&key);
        let Some(served) = self.served.remove(&key) else { return Vec::new() };
        served.token.cancel();
        served.listening
    }

    /// Serves no port any more; returns the tasks that did, to be shut down.
    pub(super) fn end(&mut self) -> TaskSet {
        self.served.clear();
        self.balances.clear();
        std::mem::take(&mut self.tasks)
    }
}

fn served_or_told<T>(key: PortKey, socket: io::Result<T>) -> Option<T> {
    let told = |error: &io::Error| {
        tracing::warn!(port = %key, %error, "port is not served by this daemon");
    };
    socket.inspect_err(told).ok()
}

impl Drop for Relays {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

async fn accept(
    listener: TcpListener,
    upstream: Upstream,
    permits: Arc<Semaphore>,
    tasks: TaskSet,
) {
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                let upstream = upstream.clone();
                tasks.spawn("mesh-connection", async move {
                    forward(client, &upstream).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::debug!(?upstream, %error, "failed to accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Carries what both ends send until both have ended; an end of one side alone is passed on.
async fn forward(mut client: TcpStream, upstream: &Upstream) {
    let Some(mut backend) = upstream.connect(&client).await else { return refuse(&client) };
    for stream in [&client, &backend] {
        // Both ends are one machine or one network: nothing is gained by waiting to fill packets.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "failed to send small packets at once");
        }
        if let Err(error) = probe(stream) {
            tracing::debug!(%error, "failed to have a silent peer probed");
        }
    }
    if let Err(error) = tokio::io::copy_bidirectional(&mut client, &mut backend).await {
        tracing::debug!(%error, "a relayed connection broke");
        // What broke on one side must not look complete on the other.
        refuse(&client);
        refuse(&backend);
    }
}

fn probe(stream: &TcpStream) -> nix::Result<()> {
    setsockopt(stream, sockopt::TcpKeepIdle, &PROBE_AFTER_SECONDS)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &PROBE_EVERY_SECONDS)?;
    setsockopt(stream, sockopt::TcpKeepCount, &PROBES)?;
    setsockopt(stream, sockopt::KeepAlive, &true)
}

/// Closes with a reset, as the rules do for clients from elsewhere.
fn refuse(stream: &TcpStream) {
    if let Err(error) = stream.set_zero_linger() {
        tracing::debug!(%error, "failed to reset a relayed connection");
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use skep_common::spec::ProxyProtocol;
    use skep_worker_core::mesh::{Protocol, proxy_header};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn backend() -> (TcpListener, SocketAddrV4) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else { panic!("not IPv4") };
        (listener, address)
    }

    /// Relays of a port that is served on an address of its own.
    fn serve(
        proxy_protocol: Option<ProxyProtocol>,
        backends: &[SocketAddrV4],
    ) -> (Relays, PortKey, SocketAddr) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let key = PortKey { protocol: Protocol::Tcp, port: address.port() };
        let mut relays = Relays::new(Ipv4Addr::LOCALHOST);
        relays.balance(key, &Relay { proxy_protocol, backends: backends.to_vec() });
        relays.serve(key, Listeners::Everyone(vec![listener]));
        (relays, key, address)
    }

    #[tokio::test]
    async fn a_task_that_refuses_is_passed_over_and_the_header_comes_first() {
        let (gone, refusing) = backend().await;
        drop(gone);
        let (task, address) = backend().await;
        let (_relays, _, port) = serve(Some(ProxyProtocol::V2), &[refusing, address]);
        for _ in 0..2 {
            let mut client = TcpStream::connect(port).await.unwrap();
            let own = client.local_addr().unwrap();
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let (mut task, _) = task.accept().await.unwrap();
            let mut seen = Vec::new();
            task.read_to_end(&mut seen).await.unwrap();
            assert_eq!(seen, [&proxy_header(own, port)[..], b"question"].concat());
            // The task answers after the client's end, which is passed on alone.
            task.write_all(b"answer").await.unwrap();
            drop(task);
            let mut seen = Vec::new();
            client.read_to_end(&mut seen).await.unwrap();
            assert_eq!(seen, b"answer");
        }
    }

    #[tokio::test]
    async fn what_is_established_goes_on_when_its_task_is_withdrawn() {
        let (first, first_address) = backend().await;
        let (second, second_address) = backend().await;
        let (mut relays, key, port) = serve(None, &[first_address]);
        let mut client = TcpStream::connect(port).await.unwrap();
        let (mut task, _) = first.accept().await.unwrap();
        let moved = Relay { proxy_protocol: None, backends: vec![second_address] };
        relays.balance(key, &moved);
        let _other = TcpStream::connect(port).await.unwrap();
        second.accept().await.unwrap();
        relays.balance(key, &Relay { backends: Vec::new(), ..moved });
        let mut refused = TcpStream::connect(port).await.unwrap();
        let error = refused.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "there is no task");

        for listening in relays.withdraw(key) {
            listening.await.unwrap();
        }
        let error = TcpStream::connect(port).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "its listener is closed");
        task.write_all(b"still here").await.unwrap();
        drop(task);
        let mut seen = Vec::new();
        client.read_to_end(&mut seen).await.unwrap();
        assert_eq!(seen, b"still here");
    }
}
