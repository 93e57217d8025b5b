//! Datagrams of clients that use 127.0.0.1 or ::1 on the node itself: what `relay` does for
//! connections.
//!
//! A client is the address and port that it sends from. It has a session: a socket of its own towards
//! the node's underlay address, so that the kernel sees one flow for each client. Datagrams are lost
//! rather than kept waiting, as anywhere on their way.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::net::UdpSocket;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::refusal;

/// Sessions of all ports at once, each a file descriptor; the port's own that was used the longest time
/// ago makes room.
pub(super) const SESSIONS_MAX: usize = 2048;

/// Sessions that each loopback socket may have besides, so that no port's clients keep out another's.
const SESSIONS_RESERVED: usize = 16;

/// A session ends after one to two of these without a datagram: the kernel forgets a flow after as long.
const IDLE: Duration = Duration::from_secs(60);

/// How long to wait before receiving again after a failure that is nobody's.
const PAUSE: Duration = Duration::from_millis(100);

/// More than a datagram can hold.
const DATAGRAM_MAX: usize = 1 << 16;

/// Serves the clients of one loopback socket until it is dropped.
pub(super) async fn relay(listener: UdpSocket, target: SocketAddrV4, permits: Arc<Semaphore>) {
    let listener = Arc::new(listener);
    let mut sessions = Sessions::new(permits);
    let mut answers = FuturesUnordered::new();
    let mut buffer = vec![0; DATAGRAM_MAX];
    loop {
        // Both wait in a way that loses nothing when the other comes first.
        tokio::select! {
            received = listener.recv_from(&mut buffer) => match received {
                Ok((length, client)) => {
                    if let Some(session) = sessions.of(client, target).await {
                        answers.push(answer(listener.clone(), client, session));
                    }
                    if sessions.send(client, &buffer[..length]).await.is_err_and(|error| is_refusal(&error)) {
                        refuse(&listener, client);
                    }
                }
                Err(error) => {
                    tracing::debug!(%target, %error, "failed to receive on loopback");
                    tokio::time::sleep(PAUSE).await;
                }
            },
            Some((client, id)) = answers.next() => sessions.end(client, id),
        }
    }
}

/// What the task that answers needs of a session.
struct Answering {
    id: u64,
    upstream: Arc<UdpSocket>,
    is_used: Arc<AtomicBool>,
    end: CancellationToken,
}

struct Session {
    id: u64,
    upstream: Arc<UdpSocket>,
    is_used: Arc<AtomicBool>,
    /// The turn of its last datagram.
    last: u64,
    permit: OwnedSemaphorePermit,
    _end: DropGuard,
}

struct Sessions {
    permits: Arc<Semaphore>,
    /// Of this socket alone, for when the others are given.
    reserved: Arc<Semaphore>,
    by_client: BTreeMap<SocketAddr, Session>,
    /// Counts datagrams, which orders them and names sessions.
    turn: u64,
}

impl Sessions {
    fn new(permits: Arc<Semaphore>) -> Self {
        let reserved = Arc::new(Semaphore::new(SESSIONS_RESERVED));
        Self { permits, reserved, by_client: BTreeMap::new(), turn: 0 }
    }

    /// Makes a session for a client that has none.
    async fn of(&mut self, client: SocketAddr, target: SocketAddrV4) -> Option<Answering> {
        self.turn += 1;
        if self.by_client.contains_key(&client) {
            return None;
        }
        let permit = self.permits.clone().try_acquire_owned();
        let permit = match permit.or_else(|_| self.reserved.clone().try_acquire_owned()) {
            Ok(permit) => permit,
            Err(_) => self.evict()?,
        };
        let upstream = match connected(target).await {
            Ok(upstream) => Arc::new(upstream),
            Err(error) => {
                tracing::debug!(%target, %error, "no socket for a loopback client's datagrams");
                return None;
            }
        };
        let (id, is_used, end) = (self.turn, Arc::default(), CancellationToken::new());
        let answering = Answering {
            id,
            upstream: upstream.clone(),
            is_used: Arc::clone(&is_used),
            end: end.clone(),
        };
        let _end = end.drop_guard();
        let session = Session { id, upstream, is_used, last: self.turn, permit, _end };
        self.by_client.insert(client, session);
        Some(answering)
    }

    /// Ends the session of this port that was used the longest time ago, for the sake of another.
    fn evict(&mut self) -> Option<OwnedSemaphorePermit> {
        let sessions = self.by_client.iter();
        let client = *sessions.min_by_key(|(_, session)| session.last)?.0;
        self.by_client.remove(&client).map(|session| session.permit)
    }

    async fn send(&mut self, client: SocketAddr, datagram: &[u8]) -> io::Result<()> {
        let Some(session) = self.by_client.get_mut(&client) else { return Ok(()) };
        session.last = self.turn;
        session.is_used.store(true, Ordering::Relaxed);
        session.upstream.send(datagram).await.map(drop)
    }

    fn end(&mut self, client: SocketAddr, id: u64) {
        if self.by_client.get(&client).is_some_and(|session| session.id == id) {
            self.by_client.remove(&client);
        }
    }
}

async fn connected(target: SocketAddrV4) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.connect(target).await?;
    Ok(socket)
}

/// Sends a client what comes back, until its session ends.
async fn answer(
    listener: Arc<UdpSocket>,
    client: SocketAddr,
    session: Answering,
) -> (SocketAddr, u64) {
    let Answering { id, upstream, is_used, end } = session;
    let pass_on = async {
        loop {
            match tokio::time::timeout(IDLE, upstream.readable()).await {
                Ok(Ok(())) => pass_on_all(&listener, client, &upstream).await,
                Ok(Err(_)) => return,
                Err(_) if is_used.swap(false, Ordering::Relaxed) => {}
                Err(_) => return,
            }
        }
    };
    end.run_until_cancelled(pass_on).await;
    (client, id)
}

async fn pass_on_all(listener: &UdpSocket, client: SocketAddr, upstream: &UdpSocket) {
    // Only for as long as there is something: there may be many sessions.
    let mut buffer = vec![0; DATAGRAM_MAX];
    loop {
        match upstream.try_recv(&mut buffer) {
            Ok(length) => {
                if let Err(error) = listener.send_to(&buffer[..length], client).await {
                    tracing::debug!(%client, %error, "failed to answer a loopback client");
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) if is_refusal(&error) => return refuse(listener, client),
            Err(_) => return,
        }
    }
}

/// Whether nobody listens: the rules refuse a port without healthy tasks at once, a task's kernel
/// answers for it.
fn is_refusal(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, PermissionDenied};
    matches!(error.kind(), ConnectionRefused | PermissionDenied)
}

fn refuse(listener: &UdpSocket, client: SocketAddr) {
    let refused = listener.local_addr().and_then(|server| refusal::send(client, server));
    if let Err(error) = refused {
        tracing::debug!(%client, %error, "failed to refuse a loopback client's datagram");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_has_room_for_some_clients_whatever_others_hold() {
        let target = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9);
        let client = |n: usize| SocketAddr::from(([127, 0, 0, 1], u16::try_from(n).unwrap()));
        let mut sessions = Sessions::new(Arc::new(Semaphore::new(0)));
        for n in 1..=SESSIONS_RESERVED + 1 {
            assert!(sessions.of(client(n), target).await.is_some(), "client {n}");
        }
        assert_eq!(sessions.by_client.len(), SESSIONS_RESERVED);
        assert!(!sessions.by_client.contains_key(&client(1)), "the oldest made room");
        sessions.end(client(2), 2);
        assert!(sessions.of(client(1), target).await.is_some());
    }
}
