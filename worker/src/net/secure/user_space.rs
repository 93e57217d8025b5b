//! WireGuard in user space: a TUN device, a UDP socket, and three threads between them.
//!
//! ```text
//!  VXLAN ─► route ─► skep-wg0 (TUN) ─► thread out: seal ─► UDP ─► other nodes
//!  VXLAN ◄────────── skep-wg0 (TUN) ◄─ thread in: open  ◄─ UDP ◄─ other nodes
//!                                      thread timers: handshakes, keep-alives
//! ```
//!
//! The protocol is boringtun's; this file decides which peer a packet belongs to. A peer is where the
//! table says and nowhere else: endpoints do not roam. The device outlives the daemon, its sessions do
//! not: a new daemon asks every peer for one at once, so that they do not go on with the old.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, SockaddrIn, recvmsg, setsockopt, sockopt};
use skep_common::wireguard::PublicKey;
use skep_worker_core::network::SecurePeer;

use super::keyring::PrivateKey;
use super::session::Activity;
use crate::sys;

/// The longest packet with what WireGuard adds: IP allows no longer ones.
const PACKET_LENGTH_MAX: usize = 1 << 16;

/// How often boringtun looks at its timers, which count seconds; its own device does so too.
const TIMER_PERIOD_MILLIS: u16 = 250;

/// How many handshakes a second are answered before their senders must prove their address. Each is
/// looked at twice, by [`Shared::find`] and by the tunnel.
const HANDSHAKES_A_SECOND_MAX: u64 = 2 * 100;

/// Room for what comes while the thread waits for a processor.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// How many packets of one direction are handled before the other things a thread waits for.
const BURST: usize = 64;

/// The interface of one slot while a daemon drives it.
#[derive(Debug)]
pub(super) struct Driver {
    shared: Arc<Shared>,
    wake: Arc<EventFd>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    device: File,
    socket: UdpSocket,
    secret: x25519::StaticSecret,
    public: x25519::PublicKey,
    limiter: Arc<RateLimiter>,
    peers: RwLock<Arc<Peers>>,
    is_ended: AtomicBool,
    /// A thread has failed.
    is_broken: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("socket", &self.socket).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Peers {
    by_key: BTreeMap<PublicKey, Arc<Peer>>,
    by_address: BTreeMap<Ipv4Addr, Arc<Peer>>,
    /// By the number in messages to us.
    by_index: BTreeMap<u32, Arc<Peer>>,
    next_index: u32,
}

struct Peer {
    settings: SecurePeer,
    index: u32,
    tunnel: Mutex<Tunn>,
    /// Bytes of UDP, as the kernel's WireGuard counts them.
    sent: AtomicU64,
    received: AtomicU64,
}

impl Peer {
    fn tunnel(&self) -> MutexGuard<'_, Tunn> {
        self.tunnel.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver {
    /// Opens the device `name`, making it where it is not there, and listens at `listen`; in the network
    /// namespace of the calling thread.
    pub(super) fn start(name: &str, key: &PrivateKey, listen: SocketAddrV4) -> io::Result<Self> {
        let socket = UdpSocket::bind(listen)?;
        setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES)?;
        setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER_BYTES)?;
        let secret = key.secret();
        let public = x25519::PublicKey::from(&secret);
        let shared = Arc::new(Shared {
            device: sys::open_tun(name)?,
            socket,
            limiter: Arc::new(RateLimiter::new(&public, HANDSHAKES_A_SECOND_MAX)),
            secret,
            public,
            peers: RwLock::default(),
            is_ended: AtomicBool::new(false),
            is_broken: AtomicBool::new(false),
        });
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let mut driver = Self { shared, wake, threads: Vec::new() };
        driver.spawn("skep-wg-out", Shared::carry_out)?;
        driver.spawn("skep-wg-in", Shared::carry_in)?;
        driver.spawn("skep-wg-timers", Shared::keep_time)?;
        Ok(driver)
    }

    fn spawn(
        &mut self,
        name: &str,
        work: fn(&Shared, &EventFd) -> io::Result<()>,
    ) -> io::Result<()> {
        let (shared, wake) = (Arc::clone(&self.shared), Arc::clone(&self.wake));
        let run = move || {
            if let Err(error) = work(&shared, &wake) {
                tracing::error!(%error, "encrypted networks stand still until their interface is started again");
                shared.is_broken.store(true, Ordering::Release);
            }
        };
        self.threads.push(std::thread::Builder::new().name(name.to_owned()).spawn(run)?);
        Ok(())
    }

    /// Has exactly these peers. Sessions with those that stay go on.
    pub(super) fn set_peers(&self, wanted: &BTreeMap<PublicKey, SecurePeer>) {
        let known = self.shared.peers();
        let is_same = known.by_key.len() == wanted.len()
            && wanted.iter().all(|(key, settings)| {
                known.by_key.get(key).is_some_and(|peer| peer.settings == *settings)
            });
        if is_same {
            return;
        }
        let mut peers = Peers { next_index: known.next_index, ..Peers::default() };
        let mut fresh = Vec::new();
        for (key, settings) in wanted {
            let known = known.by_key.get(key).filter(|peer| peer.settings == *settings);
            let peer = match known {
                Some(peer) => Arc::clone(peer),
                None => {
                    let peer = self.shared.new_peer(*key, *settings, peers.next_index);
                    peers.next_index += 1;
                    fresh.push(Arc::clone(&peer));
                    peer
                }
            };
            peers.by_address.insert(settings.address, Arc::clone(&peer));
            peers.by_index.insert(peer.index, Arc::clone(&peer));
            peers.by_key.insert(*key, peer);
        }
        *self.shared.peers.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(peers);
        for peer in fresh {
            self.shared.greet(&peer);
        }
    }

    /// Asks every peer that there is no session with for one; nothing where that is under way.
    pub(super) fn greet_strangers(&self) {
        for peer in self.shared.peers().by_key.values() {
            if peer.tunnel().time_since_last_handshake().is_none() {
                self.shared.greet(peer);
            }
        }
    }

    /// Sends an empty packet to the peer with that address, or asks it for a session.
    pub(super) fn greet(&self, address: Ipv4Addr) {
        if let Some(peer) = self.shared.peers().by_address.get(&address) {
            let mut buffer = vec![0; PACKET_LENGTH_MAX];
            if let TunnResult::WriteToNetwork(packet) = peer.tunnel().encapsulate(&[], &mut buffer)
            {
                self.shared.send(peer, packet);
            }
        }
    }

    /// What has passed between this interface and the peer with that address.
    pub(super) fn activity(&self, address: Ipv4Addr) -> Activity {
        let peers = self.shared.peers();
        let Some(peer) = peers.by_address.get(&address) else { return Activity::default() };
        Activity {
            last_handshake: peer.tunnel().time_since_last_handshake(),
            sent: peer.sent.load(Ordering::Relaxed),
            received: peer.received.load(Ordering::Relaxed),
        }
    }

    /// Whether all of its threads are at work.
    pub(super) fn is_at_work(&self) -> bool {
        !self.shared.is_broken.load(Ordering::Acquire)
    }

    /// The peers that there is a session with, by their addresses.
    pub(super) fn sessions(&self) -> BTreeSet<Ipv4Addr> {
        let peers = self.shared.peers();
        let has_session = |peer: &Peer| peer.tunnel().time_since_last_handshake().is_some();
        let reached = peers.by_address.iter().filter(|(_, peer)| has_session(peer));
        reached.map(|(address, _)| *address).collect()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.shared.is_ended.store(true, Ordering::Release);
        // Never read: every thread sees it.
        if let Err(error) = self.wake.write(1) {
            tracing::error!(%error, "failed to end the threads of a tunnel");
            return;
        }
        for thread in self.threads.drain(..) {
            drop(thread.join()); // A panic stands in the log.
        }
    }
}

impl Shared {
    fn peers(&self) -> Arc<Peers> {
        Arc::clone(&self.peers.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn new_peer(&self, key: PublicKey, settings: SecurePeer, index: u32) -> Arc<Peer> {
        let tunnel = Tunn::new(
            self.secret.clone(),
            x25519::PublicKey::from(key.0),
            None,
            None,
            index,
            Some(Arc::clone(&self.limiter)),
        );
        let (sent, received) = (AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Peer { settings, index, tunnel: Mutex::new(tunnel), sent, received })
    }

    /// Asks a peer for a session.
    fn greet(&self, peer: &Peer) {
        let mut buffer = vec![0; PACKET_LENGTH_MAX];
        if let TunnResult::WriteToNetwork(packet) =
            peer.tunnel().format_handshake_initiation(&mut buffer, false)
        {
            self.send(peer, packet);
        }
    }

    /// Packets of this node to others.
    fn carry_out(&self, wake: &EventFd) -> io::Result<()> {
        let (mut packet, mut sealed) = (vec![0; PACKET_LENGTH_MAX], vec![0; PACKET_LENGTH_MAX]);
        while self.wait(wake, Some(self.device.as_fd()), PollTimeout::NONE)? {
            for _ in 0..BURST {
                let length = match (&self.device).read(&mut packet) {
                    Ok(length) => length,
                    Err(error) if is_transient(&error) => break,
                    Err(error) => return Err(error),
                };
                let Some(IpAddr::V4(to)) = Tunn::dst_address(&packet[..length]) else { continue };
                let peers = self.peers();
                let Some(peer) = peers.by_address.get(&to) else { continue };
                let mut tunnel = peer.tunnel();
                match tunnel.encapsulate(&packet[..length], &mut sealed) {
                    TunnResult::WriteToNetwork(sealed) => self.send(peer, sealed),
                    TunnResult::Err(error) => {
                        tracing::debug!(?error, to = %to, "a packet could not be sealed");
                    }
                    _ => {} // It waits for a session.
                }
            }
        }
        Ok(())
    }

    /// Packets of other nodes to this one.
    fn carry_in(&self, wake: &EventFd) -> io::Result<()> {
        let (mut sealed, mut packet) = (vec![0; PACKET_LENGTH_MAX], vec![0; PACKET_LENGTH_MAX]);
        while self.wait(wake, Some(self.socket.as_fd()), PollTimeout::NONE)? {
            for _ in 0..BURST {
                let (length, from) = match receive(&self.socket, &mut sealed) {
                    Ok(received) => received,
                    Err(error) if is_transient(&error) => break,
                    Err(error) => return Err(error),
                };
                self.receive(&sealed[..length], from, &mut packet);
            }
        }
        Ok(())
    }

    fn receive(&self, sealed: &[u8], from: SocketAddrV4, packet: &mut [u8]) {
        let peer = match self.find(sealed, from, packet) {
            Ok(peer) => peer,
            Err(error) => {
                tracing::debug!(%from, error, "a packet that belongs to no peer");
                return;
            }
        };
        let mut tunnel = peer.tunnel();
        let mut result = tunnel.decapsulate(Some((*from.ip()).into()), sealed, packet);
        if !matches!(result, TunnResult::Err(_)) {
            peer.received.fetch_add(sealed.len() as u64, Ordering::Relaxed);
        }
        loop {
            match result {
                TunnResult::WriteToNetwork(answer) => {
                    self.send(&peer, answer);
                    // What waited for the session follows.
                    result = tunnel.decapsulate(None, &[], packet);
                    continue;
                }
                TunnResult::WriteToTunnelV4(opened, source) if source == peer.settings.address => {
                    // A device that is down takes nothing.
                    drop((&self.device).write(opened));
                }
                TunnResult::Err(error) => tracing::debug!(%from, ?error, "a packet is not opened"),
                _ => {} // Nothing to hand on, or another's address.
            }
            return;
        }
    }

    /// The peer that a packet belongs to. Handshakes by strangers, or too many of them, belong to none.
    fn find(
        &self,
        sealed: &[u8],
        from: SocketAddrV4,
        buffer: &mut [u8],
    ) -> Result<Arc<Peer>, &'static str> {
        let packet = match self.limiter.verify_packet(Some((*from.ip()).into()), sealed, buffer) {
            Ok(packet) => packet,
            Err(TunnResult::WriteToNetwork(cookie)) => {
                drop(self.socket.send_to(cookie, from)); // Its sender asks again.
                return Err("too many handshakes");
            }
            Err(_) => return Err("not of WireGuard"),
        };
        let peers = self.peers();
        let by_index = |index: u32| peers.by_index.get(&(index >> 8)).cloned();
        let peer = match packet {
            Packet::HandshakeInit(init) => {
                let half = parse_handshake_anon(&self.secret, &self.public, &init);
                let half = half.map_err(|_| "not for this key")?;
                peers.by_key.get(&PublicKey(half.peer_static_public)).cloned()
            }
            Packet::HandshakeResponse(response) => by_index(response.receiver_idx),
            Packet::PacketCookieReply(reply) => by_index(reply.receiver_idx),
            Packet::PacketData(data) => by_index(data.receiver_idx),
        };
        peer.ok_or("a stranger, or an old session")
    }

    fn keep_time(&self, wake: &EventFd) -> io::Result<()> {
        let mut buffer = vec![0; PACKET_LENGTH_MAX];
        while self.wait(wake, None, PollTimeout::from(TIMER_PERIOD_MILLIS))? {
            self.limiter.reset_count();
            for peer in self.peers().by_key.values() {
                // One without a session has expired timers: it is asked for one with the next packet.
                if let TunnResult::WriteToNetwork(packet) = peer.tunnel().update_timers(&mut buffer)
                {
                    self.send(peer, packet);
                }
            }
        }
        Ok(())
    }

    fn send(&self, peer: &Peer, packet: &[u8]) {
        match self.socket.send_to(packet, peer.settings.endpoint) {
            Ok(length) => drop(peer.sent.fetch_add(length as u64, Ordering::Relaxed)),
            Err(error) => {
                tracing::debug!(to = %peer.settings.endpoint, %error, "a packet is lost");
            }
        }
    }

    /// Waits until there is something to read or the time is over; `false` at the end.
    fn wait(
        &self,
        wake: &EventFd,
        readable: Option<BorrowedFd<'_>>,
        timeout: PollTimeout,
    ) -> io::Result<bool> {
        let mut waits = vec![PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        waits.extend(readable.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        match poll(&mut waits, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(!self.is_ended.load(Ordering::Acquire)),
            Err(error) => Err(error.into()),
        }
    }
}

/// The next packet, without waiting for one. Sending waits: that keeps what is to be sent in the device.
fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, SocketAddrV4)> {
    let mut parts = [io::IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut parts, None, flags)?;
    let from = message.address.map(SocketAddrV4::from);
    Ok((message.bytes, from.unwrap_or(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0))))
}

/// Whether one goes on after it. A UDP socket reports here that an earlier packet found nobody.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted | ConnectionRefused)
}
