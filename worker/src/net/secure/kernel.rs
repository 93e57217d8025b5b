//! WireGuard of the kernel: an interface of kind `wireguard` that generic netlink configures.
//!
//! Interface and sessions outlive the daemon: a new one finds them, and changes what differs. A new peer
//! gets a keep-alive, so that there is a session before there is traffic: `rotation` waits for it.
//!
//! # Sources
//!
//! `include/uapi/linux/wireguard.h` and `include/uapi/linux/genetlink.h` of the kernel; WireGuard
//! whitepaper, section 6.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_sys::protocols::NETLINK_GENERIC;
use nix::sched::{CloneFlags, unshare};
use skep_common::Timestamp;
use skep_common::wireguard::PublicKey;
use skep_runtime::clock;
use skep_worker_core::network::SecurePeer;

use super::keyring::PrivateKey;
use super::session::Activity;
use crate::net::Error;
use crate::net::channel::{Channel, Refusal};
use crate::net::nft::{Attributes, attributes, find};
use crate::net::rtnetlink::{Mode, RouteChannel};

const CONTROLLER: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const GENERIC_HEADER_LENGTH: usize = 4;

const FAMILY: &str = "wireguard";
const WG_CMD_GET_DEVICE: u8 = 0;
const WG_CMD_SET_DEVICE: u8 = 1;
const WGDEVICE_A_IFNAME: u16 = 2;
const WGDEVICE_A_PRIVATE_KEY: u16 = 3;
const WGDEVICE_A_LISTEN_PORT: u16 = 6;
const WGDEVICE_A_PEERS: u16 = 8;
const WGPEER_A_PUBLIC_KEY: u16 = 1;
const WGPEER_A_FLAGS: u16 = 3;
const WGPEER_A_ENDPOINT: u16 = 4;
const WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL: u16 = 5;
const WGPEER_A_LAST_HANDSHAKE_TIME: u16 = 6;
const WGPEER_A_RX_BYTES: u16 = 7;
const WGPEER_A_TX_BYTES: u16 = 8;
const WGPEER_A_ALLOWEDIPS: u16 = 9;
const WGPEER_F_REMOVE_ME: u32 = 1;
const WGPEER_F_REPLACE_ALLOWEDIPS: u32 = 2;
const WGPEER_F_UPDATE_ONLY: u32 = 4;
const WGALLOWEDIP_A_FAMILY: u16 = 1;
const WGALLOWEDIP_A_IPADDR: u16 = 2;
const WGALLOWEDIP_A_CIDR_MASK: u16 = 3;

/// The elements of a list have their place for a kind, which the kernel does not read.
const ELEMENT: u16 = 0;

/// Seconds between keep-alives, the most there can be. The first is sent at once, and is what they are for.
const KEEPALIVE: u16 = u16::MAX;

/// How long after its handshake WireGuard forgets a session: three times `REJECT_AFTER_TIME`.
const SESSION_AGE_MAX: Duration = Duration::from_secs(3 * 180);

/// How many peers one message has: an attribute has up to 64 KiB, a peer takes about 120 bytes.
const PEERS_A_MESSAGE_MAX: usize = 256;

/// The interface of one slot.
#[derive(Debug)]
pub(super) struct Driver {
    name: String,
    channel: Channel,
    family: u16,
}

/// What the kernel has of a peer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Observed {
    endpoint: Option<SocketAddrV4>,
    addresses: BTreeSet<(Ipv4Addr, u8)>,
    last_handshake: Option<Timestamp>,
    sent: u64,
    received: u64,
}

impl Observed {
    fn has_session(&self, now: Timestamp) -> bool {
        self.last_handshake.is_some_and(|handshake| now.since(handshake) < SESSION_AGE_MAX)
    }

    fn has_address(&self, address: Ipv4Addr) -> bool {
        self.addresses.contains(&(address, 32))
    }

    fn activity(&self, now: Timestamp) -> Activity {
        let last_handshake = self.last_handshake.filter(|_| self.has_session(now));
        let last_handshake = last_handshake.map(|handshake| now.since(handshake));
        Activity { last_handshake, sent: self.sent, received: self.received }
    }

    fn is(&self, wanted: &SecurePeer) -> bool {
        let addresses = BTreeSet::from([(wanted.address, 32)]);
        self.endpoint == Some(wanted.endpoint) && self.addresses == addresses
    }
}

/// Whether this kernel has WireGuard. Found by making an interface, which has its module loaded, in a
/// network namespace that ends with the attempt.
pub(super) fn is_there() -> bool {
    let attempt = || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
        make(&mut RouteChannel::open().map_err(io::Error::other)?, "probe")
            .map_err(io::Error::other)?;
        open_family().map_err(|refusal| refusal.error)
    };
    let attempted = std::thread::spawn(attempt).join();
    match attempted {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => {
            tracing::debug!(%error, "this kernel has no WireGuard");
            false
        }
        Err(_) => false,
    }
}

fn make(host: &mut RouteChannel, name: &str) -> Result<(), Error> {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Wireguard)]),
    ];
    let message = RouteNetlinkMessage::NewLink(message);
    host.change(&format!("make interface {name}"), Mode::Create, message)
}

/// A channel, and the number that WireGuard has in generic netlink.
fn open_family() -> Result<(Channel, u16), Refusal> {
    let mut channel = Channel::open(NETLINK_GENERIC)?;
    let name = Attributes::new().text(CTRL_ATTR_FAMILY_NAME, FAMILY);
    let body = message(CTRL_CMD_GETFAMILY, &name);
    let frames = channel.request(CONTROLLER, NLM_F_REQUEST | NLM_F_ACK, &body)?;
    let mut ids = frames.iter().filter_map(|frame| {
        let id = find(frame.payload.get(GENERIC_HEADER_LENGTH..)?, CTRL_ATTR_FAMILY_ID)?;
        id.try_into().ok().map(u16::from_ne_bytes)
    });
    let id = ids.next_back().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok((channel, id))
}

/// A generic netlink message.
fn message(command: u8, list: &Attributes) -> Vec<u8> {
    const VERSION: u8 = 1;
    [&[command, VERSION, 0, 0], list.as_bytes()].concat()
}

impl Driver {
    /// Has the interface `name` with this key and UDP port, making it where it is not there; in the network
    /// namespace of `host` and of the calling thread.
    pub(super) fn start(
        host: &mut RouteChannel,
        name: &str,
        key: &PrivateKey,
        port: u16,
    ) -> Result<Self, Error> {
        let existing = host.link(name)?;
        match existing {
            Some(link) if link.is_kind(&InfoKind::Wireguard) => {}
            // A TUN device: an earlier daemon ran when the kernel had no WireGuard.
            Some(link) => {
                host.delete_link(name, link.index)?;
                make(host, name)?;
            }
            None => make(host, name)?,
        }
        let configure = || {
            let (channel, family) = open_family()?;
            let mut driver = Self { name: name.to_owned(), channel, family };
            let settings = driver.device().raw(WGDEVICE_A_PRIVATE_KEY, &key.secret().to_bytes());
            driver.set(&settings.raw(WGDEVICE_A_LISTEN_PORT, &port.to_ne_bytes()))?;
            Ok(driver)
        };
        configure().map_err(|refusal: Refusal| {
            Error::kernel(format!("start WireGuard on {name} at UDP port {port}"), refusal)
        })
    }

    fn device(&self) -> Attributes {
        Attributes::new().text(WGDEVICE_A_IFNAME, &self.name)
    }

    fn set(&mut self, settings: &Attributes) -> Result<(), Refusal> {
        let body = message(WG_CMD_SET_DEVICE, settings);
        self.channel.request(self.family, NLM_F_REQUEST | NLM_F_ACK, &body).map(drop)
    }

    /// The peers that the kernel has.
    fn peers(&mut self) -> Result<BTreeMap<PublicKey, Observed>, Error> {
        let body = message(WG_CMD_GET_DEVICE, &self.device());
        let frames = self.channel.request(self.family, NLM_F_REQUEST | NLM_F_DUMP, &body);
        let frames = frames.map_err(|refusal| {
            Error::kernel(format!("read WireGuard's peers on {}", self.name), refusal)
        })?;
        Ok(read_peers(frames.iter().map(|frame| frame.payload.as_slice())))
    }

    /// Has exactly these peers. Sessions with those that stay go on.
    pub(super) fn set_peers(
        &mut self,
        wanted: &BTreeMap<PublicKey, SecurePeer>,
    ) -> Result<(), Error> {
        let changes = changes(&self.peers()?, wanted);
        self.change_peers(&changes)
    }

    /// Asks every peer that there is no session with for one: a keep-alive that is set anew is sent at once.
    pub(super) fn greet_strangers(&mut self) -> Result<(), Error> {
        let now = clock::now();
        self.greet_those(|peer| !peer.has_session(now))
    }

    /// Sends a keep-alive to the peer with that address, or asks it for a session.
    pub(super) fn greet(&mut self, address: Ipv4Addr) -> Result<(), Error> {
        self.greet_those(|peer| peer.has_address(address))
    }

    fn greet_those(&mut self, is_one: impl Fn(&Observed) -> bool) -> Result<(), Error> {
        let peers = self.peers()?;
        let keys = || peers.iter().filter(|(_, peer)| is_one(peer)).map(|(key, _)| key);
        for interval in [0, KEEPALIVE] {
            let peer = |key: &PublicKey| {
                named(key)
                    .raw(WGPEER_A_FLAGS, &WGPEER_F_UPDATE_ONLY.to_ne_bytes())
                    .raw(WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL, &interval.to_ne_bytes())
            };
            self.change_peers(&keys().map(peer).collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// What has passed between this interface and the peer with that address.
    pub(super) fn activity(&mut self, address: Ipv4Addr) -> Result<Activity, Error> {
        let now = clock::now();
        let peers = self.peers()?.into_values().filter(|peer| peer.has_address(address));
        Ok(peers.fold(Activity::default(), |all, peer| all.and(peer.activity(now))))
    }

    fn change_peers(&mut self, changes: &[Attributes]) -> Result<(), Error> {
        for some in changes.chunks(PEERS_A_MESSAGE_MAX) {
            let list = some.iter().fold(Attributes::new(), |list, peer| list.nested(ELEMENT, peer));
            let settings = self.device().nested(WGDEVICE_A_PEERS, &list);
            self.set(&settings).map_err(|refusal| {
                Error::kernel(format!("change WireGuard's peers on {}", self.name), refusal)
            })?;
        }
        Ok(())
    }

    /// The peers that there is a session with, by their addresses.
    pub(super) fn sessions(&mut self) -> Result<BTreeSet<Ipv4Addr>, Error> {
        let now = clock::now();
        let peers = self.peers()?.into_values().filter(|peer| peer.has_session(now));
        Ok(peers.flat_map(|peer| peer.addresses).map(|(address, _)| address).collect())
    }
}

/// The peer with that key, to be changed.
fn named(key: &PublicKey) -> Attributes {
    Attributes::new().raw(WGPEER_A_PUBLIC_KEY, &key.0)
}

/// What makes the kernel's peers the wanted ones. Those that go come first: two cannot have one address.
fn changes(
    observed: &BTreeMap<PublicKey, Observed>,
    wanted: &BTreeMap<PublicKey, SecurePeer>,
) -> Vec<Attributes> {
    let gone = observed.keys().filter(|key| !wanted.contains_key(key));
    let gone = gone.map(|key| named(key).raw(WGPEER_A_FLAGS, &WGPEER_F_REMOVE_ME.to_ne_bytes()));
    let differs = |key: &PublicKey, peer: &SecurePeer| {
        observed.get(key).is_none_or(|observed| !observed.is(peer))
    };
    let changed = wanted.iter().filter(|(key, peer)| differs(key, peer));
    let changed = changed.map(|(key, peer)| {
        named(key)
            .raw(WGPEER_A_FLAGS, &WGPEER_F_REPLACE_ALLOWEDIPS.to_ne_bytes())
            .raw(WGPEER_A_ENDPOINT, &socket_address(peer.endpoint))
            .raw(WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL, &KEEPALIVE.to_ne_bytes())
            .nested(WGPEER_A_ALLOWEDIPS, &Attributes::new().nested(ELEMENT, &one(peer.address)))
    });
    gone.chain(changed).collect()
}

/// An allowed address.
fn one(address: Ipv4Addr) -> Attributes {
    Attributes::new()
        .raw(WGALLOWEDIP_A_FAMILY, &(libc::AF_INET as u16).to_ne_bytes())
        .raw(WGALLOWEDIP_A_IPADDR, &address.octets())
        .raw(WGALLOWEDIP_A_CIDR_MASK, &[32])
}

/// A `sockaddr_in`.
fn socket_address(address: SocketAddrV4) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    bytes[2..4].copy_from_slice(&address.port().to_be_bytes());
    bytes[4..8].copy_from_slice(&address.ip().octets());
    bytes
}

/// The peers in the messages of a dump; one with many addresses goes on in the next message.
fn read_peers<'a>(messages: impl Iterator<Item = &'a [u8]>) -> BTreeMap<PublicKey, Observed> {
    let mut peers: BTreeMap<PublicKey, Observed> = BTreeMap::new();
    for payload in messages {
        let device = payload.get(GENERIC_HEADER_LENGTH..).unwrap_or_default();
        for (_, bytes) in find(device, WGDEVICE_A_PEERS).into_iter().flat_map(attributes) {
            let key = find(bytes, WGPEER_A_PUBLIC_KEY).and_then(|key| key.try_into().ok());
            let Some(key) = key.map(PublicKey) else { continue };
            let peer = peers.entry(key).or_default();
            let endpoint = find(bytes, WGPEER_A_ENDPOINT).and_then(read_socket_address);
            peer.endpoint = endpoint.or(peer.endpoint);
            let handshake = find(bytes, WGPEER_A_LAST_HANDSHAKE_TIME).and_then(read_time);
            peer.last_handshake = handshake.or(peer.last_handshake);
            peer.received =
                find(bytes, WGPEER_A_RX_BYTES).and_then(read_u64).unwrap_or(peer.received);
            peer.sent = find(bytes, WGPEER_A_TX_BYTES).and_then(read_u64).unwrap_or(peer.sent);
            let addresses = find(bytes, WGPEER_A_ALLOWEDIPS).into_iter().flat_map(attributes);
            peer.addresses.extend(addresses.filter_map(|(_, bytes)| read_one(bytes)));
        }
    }
    peers
}

fn read_one(bytes: &[u8]) -> Option<(Ipv4Addr, u8)> {
    let address: [u8; 4] = find(bytes, WGALLOWEDIP_A_IPADDR)?.try_into().ok()?;
    Some((address.into(), *find(bytes, WGALLOWEDIP_A_CIDR_MASK)?.first()?))
}

fn read_socket_address(bytes: &[u8]) -> Option<SocketAddrV4> {
    let [f0, f1, p0, p1, a, b, c, d, ..] = *bytes else { return None };
    let is_ipv4 = u16::from_ne_bytes([f0, f1]) == libc::AF_INET as u16;
    is_ipv4.then(|| SocketAddrV4::new([a, b, c, d].into(), u16::from_be_bytes([p0, p1])))
}

fn read_u64(bytes: &[u8]) -> Option<u64> {
    bytes.try_into().ok().map(u64::from_ne_bytes)
}

/// A `__kernel_timespec`, to the second; it is zero where there was no handshake.
fn read_time(bytes: &[u8]) -> Option<Timestamp> {
    let seconds = i64::from_ne_bytes(*bytes.first_chunk()?);
    (seconds > 0).then(|| Timestamp::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u8) -> PublicKey {
        PublicKey([number; 32])
    }

    fn peer(number: u8) -> SecurePeer {
        let endpoint = SocketAddrV4::new([192, 0, 2, number].into(), 4790);
        SecurePeer { endpoint, address: Ipv4Addr::new(198, 18, 0, number) }
    }

    /// What the kernel says of peers that were set by `changes`, as it writes it.
    fn dumped(changes: &[Attributes]) -> Vec<u8> {
        let list = changes.iter().fold(Attributes::new(), |list, peer| list.nested(ELEMENT, peer));
        message(WG_CMD_GET_DEVICE, &Attributes::new().nested(WGDEVICE_A_PEERS, &list))
    }

    #[test]
    fn what_is_written_reads_as_what_was_wanted_and_is_written_once() {
        let wanted = BTreeMap::from([(key(1), peer(1)), (key(2), peer(2))]);
        let written = changes(&BTreeMap::new(), &wanted);
        let observed = read_peers(std::iter::once(dumped(&written).as_slice()));
        assert_eq!(observed.len(), 2);
        assert!(observed[&key(2)].is(&peer(2)), "{observed:?}");
        assert_eq!(changes(&observed, &wanted), []);
    }

    #[test]
    fn a_peer_that_moved_is_written_again_and_one_that_is_gone_is_removed_first() {
        let before = BTreeMap::from([(key(1), peer(1)), (key(2), peer(2)), (key(3), peer(3))]);
        let written = changes(&BTreeMap::new(), &before);
        let observed = read_peers(std::iter::once(dumped(&written).as_slice()));
        let moved = SecurePeer { endpoint: peer(9).endpoint, ..peer(2) };
        let wanted = BTreeMap::from([(key(1), peer(1)), (key(2), moved)]);
        let [gone, changed] = &changes(&observed, &wanted)[..] else { panic!("two changes") };
        assert_eq!(find(gone.as_bytes(), WGPEER_A_PUBLIC_KEY), Some(&key(3).0[..]));
        assert_eq!(
            find(gone.as_bytes(), WGPEER_A_FLAGS),
            Some(&WGPEER_F_REMOVE_ME.to_ne_bytes()[..])
        );
        let endpoint = find(changed.as_bytes(), WGPEER_A_ENDPOINT).and_then(read_socket_address);
        assert_eq!(endpoint, Some(moved.endpoint));
    }

    #[test]
    fn a_peer_that_goes_on_in_the_next_message_is_one_peer() {
        let with = |address: Ipv4Addr| {
            Attributes::new()
                .raw(WGPEER_A_PUBLIC_KEY, &key(1).0)
                .nested(WGPEER_A_ALLOWEDIPS, &Attributes::new().nested(ELEMENT, &one(address)))
        };
        let time = [7_i64.to_ne_bytes(), 0_i64.to_ne_bytes()].concat();
        let first = with(peer(1).address)
            .raw(WGPEER_A_LAST_HANDSHAKE_TIME, &time)
            .raw(WGPEER_A_RX_BYTES, &180_u64.to_ne_bytes())
            .raw(WGPEER_A_TX_BYTES, &148_u64.to_ne_bytes());
        let messages = [dumped(&[first]), dumped(&[with(peer(2).address)])];
        let observed = read_peers(messages.iter().map(Vec::as_slice));
        let expect = Observed {
            endpoint: None,
            addresses: [(peer(1).address, 32), (peer(2).address, 32)].into(),
            last_handshake: Some(Timestamp::from_secs(7)),
            sent: 148,
            received: 180,
        };
        assert!(expect.has_address(peer(2).address) && !expect.has_address(peer(3).address));
        let is = |last_handshake| Activity { last_handshake, sent: 148, received: 180 };
        let (soon, late) = (Timestamp::from_secs(9), Timestamp::from_secs(600));
        assert_eq!(expect.activity(soon), is(Some(Duration::from_secs(2))));
        assert_eq!(expect.activity(late), is(None), "it is forgotten by then");
        assert_eq!(observed, BTreeMap::from([(key(1), expect)]));
    }
}
