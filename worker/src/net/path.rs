//! Probes the way to another node's tunnel, and observes that node's probes.
//!
//! A probe is a true packet of the tunnel: UDP to its port, a VXLAN header with the mesh's number, and
//! an Ethernet frame of a type that nobody else uses. Firewalls treat it as what it stands for, and no
//! service sees it. It is counted where it arrives, before any rule of a firewall, and again in the
//! tunnel, behind them: so it is known which side drops it.
//!
//! ```text
//! outer IPv4 20 | UDP 8 | VXLAN 8 | Ethernet 14 | token 8 | size 2 | sequence 2 | zeros
//! ```
//!
//! One check at a time: the table that counts has one name.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};
use skep_runtime::clock;
use skep_worker_core::mesh::Mac;

use super::Error;
use super::firewall::{Interface, Packet, Ruleset};
use super::nft::expression as rule;
use super::nft::{Batch, Hook, NftChannel, SetKind, Value};
use super::rtnetlink::RouteChannel;
use crate::sys;

const TABLE: &str = "skep-check";
const ARRIVED: &str = "arrived";
const SECURE: &str = "secure";
/// For local experiments (IEEE 802, "Local Experimental Ethertype 1").
const ETHER_TYPE: u16 = 0x88b5;
/// Of an echo's token, so that it is not taken for a probe.
const ECHO: u64 = 1 << 63;

const IP_UDP: usize = 28;
const HEADERS: usize = IP_UDP + 8 + 14;
/// From the UDP header on.
const TOKEN_OFFSET: u32 = 30;
const SIZE_OFFSET: u32 = 38;
const PORT_OFFSET: u32 = 2;

/// Small probes, whose loss and round trips are measured.
pub const BURST_SIZE: u16 = 128;
const BURST_COUNT: u16 = 50;
const BURST_PAUSE: Duration = Duration::from_millis(2);
/// Of each other size; one that gets through shows that it may.
const SIZE_COUNT: u16 = 3;
/// Sizes that tell how much gets through where the full size does not: usual tunnels and links.
const SIZES: [u16; 7] = [9000, 1500, 1480, 1450, 1400, 1280, 576];
/// What is under way when the other side has sent all arrives within this time.
const GRACE: Duration = Duration::from_millis(300);
const RECEIVE_TIMEOUT_MILLIS: i64 = 50;
/// A frame of the tunnel at most.
const FRAME_LENGTH_MAX: usize = 1 << 16;

/// Between which ends, and how.
#[derive(Debug, Clone)]
pub struct Ends {
    /// This node's underlay address.
    pub underlay: Ipv4Addr,
    /// The interface that has it.
    pub interface: String,
    /// Its number.
    pub number: u16,
    /// The other node's underlay address.
    pub peer_underlay: Ipv4Addr,
    /// Its number.
    pub peer_number: u16,
    /// The tunnel's network number.
    pub vni: u32,
    /// The tunnel's port.
    pub vxlan_port: u16,
    /// What VXLAN packets of this check are told by.
    pub token: u64,
    /// The ports of WireGuard, where both carry encrypted networks.
    pub secure: Option<SecurePorts>,
}

/// The UDP ports that two nodes send WireGuard's packets to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SecurePorts {
    /// This node's.
    pub own: u16,
    /// The other node's, where it is known.
    pub peer: Option<u16>,
}

/// What was seen. Counts are by size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// What the tunnel sends at most.
    pub full_size: u32,
    /// Own probes.
    pub sent: BTreeMap<u16, u32>,
    /// The other node's, at the interface.
    pub arrived: BTreeMap<u16, u32>,
    /// The other node's, in the tunnel.
    pub passed: BTreeMap<u16, u32>,
    /// Own probes of the burst that came back, and how long they took together.
    pub echoes: u32,
    /// The sum of their round trips.
    pub round_trips: Duration,
    /// What drops packets of the tunnel that come in here.
    pub obstacles: Vec<String>,
    /// What drops those that go out.
    pub outgoing_obstacles: Vec<String>,
    /// WireGuard's packets of the other node, at the interface.
    pub secure_arrived: u32,
    /// What drops such packets that come in here.
    pub secure_obstacles: Vec<String>,
    /// What drops those that go out.
    pub secure_outgoing_obstacles: Vec<String>,
}

/// A check under way, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Path {
    ends: Ends,
    seen: Seen,
    nft: NftChannel,
    socket: UdpSocket,
    started: Instant,
    is_ended: Arc<AtomicBool>,
    receiver: Option<JoinHandle<Received>>,
}

impl Ends {
    fn look_for_obstacles(&self, seen: &mut Seen) -> Result<(), Error> {
        let link = RouteChannel::open()?.link(&self.interface)?;
        let index = link.map(|link| link.index).unwrap_or_default();
        let interface = Interface { name: self.interface.clone(), index };
        let packet = |is_incoming: bool, source_port, port| {
            let (own, peer) = (self.underlay, self.peer_underlay);
            let (source, destination) = if is_incoming { (peer, own) } else { (own, peer) };
            let interface = interface.clone();
            Packet { source, destination, source_port, port, interface, is_incoming }
        };
        let rules = Ruleset::read()?;
        seen.obstacles = rules.obstacles(&packet(true, None, self.vxlan_port));
        seen.outgoing_obstacles = rules.obstacles(&packet(false, None, self.vxlan_port));
        if let Some(SecurePorts { own, peer }) = self.secure {
            seen.secure_obstacles = rules.obstacles(&packet(true, peer, own));
            let outgoing = peer.map(|peer| rules.obstacles(&packet(false, Some(own), peer)));
            seen.secure_outgoing_obstacles = outgoing.unwrap_or_default();
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Received {
    passed: BTreeMap<u16, u32>,
    /// When each echo came, after the start.
    echoes: BTreeMap<u16, Duration>,
    sent_at: BTreeMap<u16, Duration>,
}

impl Path {
    /// Begins to count the other node's probes.
    pub fn observe(ends: Ends) -> Result<Self, Error> {
        let tunnel = RouteChannel::open()?.link(super::mesh::options::TUNNEL)?;
        let missing = || std::io::Error::other("the routing mesh has not started on this node");
        let tunnel = tunnel.ok_or_else(|| Error::kernel("find the tunnel", missing()))?;
        let full_size = tunnel.mtu + super::mesh::options::VXLAN_OVERHEAD;
        let action = |what: &'static str| move |error: std::io::Error| Error::kernel(what, error);
        let socket = UdpSocket::bind(SocketAddrV4::new(ends.underlay, 0));
        let socket = socket.map_err(action("open a socket for probes"))?;
        sys::never_fragment(socket.as_fd()).map_err(action("forbid fragments of probes"))?;
        let frames = sys::frame_socket(ETHER_TYPE).map_err(action("open a socket for frames"))?;
        let timeout = TimeVal::milliseconds(RECEIVE_TIMEOUT_MILLIS);
        let limited = setsockopt(&frames, sockopt::ReceiveTimeout, &timeout);
        limited.map_err(|error| Error::kernel("limit a wait", std::io::Error::from(error)))?;
        let echo = socket.try_clone().map_err(action("share a socket"))?;
        let mut nft = NftChannel::open()?;
        nft.commit_any(&table(&ends))?;
        let receiving = ends.clone();
        let (started, is_ended) = (clock::monotonic(), Arc::new(AtomicBool::new(false)));
        let until = Arc::clone(&is_ended);
        let receive = move || receive(&frames, &echo, &receiving, started, &until);
        let thread = std::thread::Builder::new().name("skep-probes".into()).spawn(receive);
        let receiver = Some(thread.map_err(action("start a thread"))?);
        let seen = Seen { full_size, ..Seen::default() };
        Ok(Self { ends, seen, nft, socket, started, is_ended, receiver })
    }

    /// Sends all probes. What cannot be sent at its size is not counted as sent, but as lost by the sizes
    /// that the other node saw.
    pub fn send(&mut self) {
        let full = u16::try_from(self.seen.full_size).unwrap_or(u16::MAX);
        let smaller = SIZES.into_iter().filter(|size| *size < full);
        for size in std::iter::once(full).chain(smaller) {
            for sequence in 0..SIZE_COUNT {
                self.send_one(size, sequence);
            }
        }
        for sequence in 0..BURST_COUNT {
            self.send_one(BURST_SIZE, sequence);
            std::thread::sleep(BURST_PAUSE);
        }
    }

    fn send_one(&mut self, size: u16, sequence: u16) {
        let at = (clock::monotonic() - self.started).as_nanos();
        let packet = probe(&self.ends, self.ends.token, size, sequence, at);
        *self.seen.sent.entry(size).or_default() += 1;
        let to = SocketAddrV4::new(self.ends.peer_underlay, self.ends.vxlan_port);
        if let Err(error) = self.socket.send_to(&packet, to) {
            tracing::debug!(size, %error, "a probe was not sent"); // It is lost, as others see it.
        }
    }

    /// Ends the check; both sides have sent all.
    pub fn report(mut self) -> Result<Seen, Error> {
        std::thread::sleep(GRACE);
        let mut seen = std::mem::take(&mut self.seen);
        for count in self.nft.counts(TABLE, ARRIVED)? {
            let Some(size) = count.key.first_chunk::<2>() else { continue };
            let packets = u32::try_from(count.packets).unwrap_or(u32::MAX);
            seen.arrived.insert(u16::from_be_bytes(*size), packets);
        }
        for count in self.nft.counts(TABLE, SECURE)? {
            seen.secure_arrived += u32::try_from(count.packets).unwrap_or(u32::MAX);
        }
        let received = self.end();
        seen.passed = received.passed;
        for (sequence, came) in received.echoes {
            if let Some(sent) = received.sent_at.get(&sequence) {
                seen.echoes += 1;
                seen.round_trips += came.saturating_sub(*sent);
            }
        }
        self.ends.look_for_obstacles(&mut seen)?;
        Ok(seen)
    }

    fn end(&mut self) -> Received {
        self.is_ended.store(true, Ordering::Release);
        let received = self.receiver.take().and_then(|receiver| receiver.join().ok());
        received.unwrap_or_default()
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        self.end();
        let mut batch = Batch::new();
        batch.delete_table(TABLE);
        if let Err(error) = self.nft.commit_any(&batch) {
            tracing::warn!(%error, "the table of a check stays until the next one");
        }
    }
}

/// Counts probes in the tunnel, and answers those of the burst, until the check has ended.
fn receive(
    frames: &OwnedFd,
    echo: &UdpSocket,
    ends: &Ends,
    started: Instant,
    is_ended: &AtomicBool,
) -> Received {
    let mut received = Received::default();
    let mut frame = vec![0; FRAME_LENGTH_MAX];
    let to = SocketAddrV4::new(ends.peer_underlay, ends.vxlan_port);
    while !is_ended.load(Ordering::Acquire) {
        let Ok(length) = recv(frames.as_raw_fd(), &mut frame, MsgFlags::empty()) else { continue };
        let Some(read) = frame.get(14..length).and_then(Probe::read) else { continue };
        if read.token == ends.token {
            *received.passed.entry(read.size).or_default() += 1;
            if read.size == BURST_SIZE {
                let packet = probe(ends, ends.token ^ ECHO, read.size, read.sequence, read.at);
                let _ = echo.send_to(&packet, to); // It is lost, as others see it.
            }
        } else if read.token == ends.token ^ ECHO {
            let sent = Duration::from_nanos(u64::try_from(read.at).unwrap_or(u64::MAX));
            received.sent_at.insert(read.sequence, sent);
            received.echoes.insert(read.sequence, clock::monotonic() - started);
        }
    }
    received
}

/// What a frame of ours says.
#[derive(Debug, PartialEq, Eq)]
struct Probe {
    token: u64,
    size: u16,
    sequence: u16,
    /// When it was sent, by the sender's clock; an echo brings it back.
    at: u128,
}

impl Probe {
    fn read(bytes: &[u8]) -> Option<Self> {
        let (token, rest) = bytes.split_first_chunk::<8>()?;
        let (size, rest) = rest.split_first_chunk::<2>()?;
        let (sequence, rest) = rest.split_first_chunk::<2>()?;
        Some(Self {
            token: u64::from_be_bytes(*token),
            size: u16::from_be_bytes(*size),
            sequence: u16::from_be_bytes(*sequence),
            at: u128::from_be_bytes(*rest.first_chunk()?),
        })
    }
}

/// A probe's UDP payload; with IPv4 and UDP headers it is a packet of `size` bytes.
fn probe(ends: &Ends, token: u64, size: u16, sequence: u16, at: u128) -> Vec<u8> {
    const HAS_NUMBER: u8 = 0x08;
    let mut bytes = vec![HAS_NUMBER, 0, 0, 0];
    bytes.extend((ends.vni << 8).to_be_bytes());
    bytes.extend(Mac::tunnel(ends.peer_number).0);
    bytes.extend(Mac::tunnel(ends.number).0);
    bytes.extend(ETHER_TYPE.to_be_bytes());
    debug_assert_eq!(bytes.len() + IP_UDP, HEADERS);
    bytes.extend(token.to_be_bytes());
    bytes.extend(size.to_be_bytes());
    bytes.extend(sequence.to_be_bytes());
    bytes.extend(at.to_be_bytes());
    bytes.resize(usize::from(size) - IP_UDP, 0);
    bytes
}

/// Counts the other node's probes before any other rule sees them.
fn table(ends: &Ends) -> Batch {
    const UDP: u8 = 17;
    const TYPE_SERVICE: u32 = 13;
    let mut batch = Batch::new();
    batch.add_table(TABLE);
    batch.delete_table(TABLE);
    batch.add_table(TABLE);
    let kind =
        SetKind { key_type: TYPE_SERVICE, key_length: 2, is_host_order: false, value: Value::None };
    batch.add_dynamic_set(TABLE, ARRIVED, &kind, 64);
    let hook = Hook { kind: "filter", number: 0, priority: -450, drops_by_default: false };
    batch.add_chain(TABLE, "observe", Some(&hook));
    let peer = Ipv4Net::new_assert(ends.peer_underlay, 32);
    let parts = [
        rule::transport_protocol(UDP).to_vec(),
        rule::destination_port(ends.vxlan_port).to_vec(),
        rule::source_network(peer.into()).to_vec(),
        rule::transport_bytes(TOKEN_OFFSET, &ends.token.to_be_bytes()).to_vec(),
        rule::count_transport_bytes_in(ARRIVED, SIZE_OFFSET, 2).to_vec(),
    ];
    batch.add_rule(TABLE, "observe", &parts.concat(), "probes of another node");
    batch.add_dynamic_set(TABLE, SECURE, &kind, 64);
    if let Some(ports) = ends.secure {
        let parts = [
            rule::transport_protocol(UDP).to_vec(),
            rule::destination_port(ports.own).to_vec(),
            rule::source_network(peer.into()).to_vec(),
            rule::count_transport_bytes_in(SECURE, PORT_OFFSET, 2).to_vec(),
        ];
        batch.add_rule(TABLE, "observe", &parts.concat(), "WireGuard of another node");
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_has_its_size_and_is_read_back() {
        let ends = Ends {
            underlay: Ipv4Addr::new(192, 0, 2, 1),
            interface: "eth0".into(),
            number: 1,
            peer_underlay: Ipv4Addr::new(192, 0, 2, 2),
            peer_number: 2,
            vni: 9001,
            vxlan_port: 4789,
            token: 7,
            secure: None,
        };
        for size in SIZES.into_iter().chain([BURST_SIZE]) {
            let bytes = probe(&ends, 7, size, 3, 99);
            assert_eq!(bytes.len() + IP_UDP, usize::from(size));
            let token_at = TOKEN_OFFSET as usize - 8;
            assert_eq!(bytes[token_at..token_at + 8], 7u64.to_be_bytes());
            let read = Probe::read(&bytes[HEADERS - IP_UDP..]).unwrap();
            assert_eq!(read, Probe { token: 7, size, sequence: 3, at: 99 });
        }
        assert_eq!(Probe::read(&[0; 27]), None);
    }
}
