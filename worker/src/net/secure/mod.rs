//! WireGuard between the nodes, inside of which the tunnels of encrypted networks run.
//!
//! ```text
//!  task ═ network ═ vx0: VXLAN from 198.18.0.1 to 198.18.0.2
//!                     └─ route by skep-wg0 ═ WireGuard: UDP from 10.0.0.1 to 10.0.0.2 ═► other node
//! ```
//!
//! Each key pair of the node has a slot, with an interface of its own (`skep-wg0`, `skep-wg1`), a UDP port
//! and an address. Peers are the keys of those nodes that tasks of this node's encrypted networks are on.
//! Interfaces are there while this node has such networks.
//!
//! # Reading order
//!
//! `keyring` (the node's key pairs), `rotation` (when they change), [`Secure`] (the order of things),
//! `routes`, then what carries packets: `kernel` where the kernel has WireGuard, else `user_space`.
//!
//! # Invariants
//!
//! - Private keys are in one file and in this process, nowhere else.
//! - What is for an address within the tunnels leaves by WireGuard or not at all: a route refuses what no
//!   interface takes, and a rule of the mesh's table drops what would leave elsewhere.
//! - The interfaces stay when the daemon ends; what is sent meanwhile is lost, not sent in clear.

mod kernel;
mod keyring;
mod rotation;
mod routes;
mod session;
mod user_space;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;

use ipnet::Ipv4Net;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use skep_common::wireguard::{PublicKey, SLOTS, WireguardKey, port, tunnel_address};
use skep_runtime::telemetry::Chain;
use skep_worker_core::network::{
    NetworkTables, SecurePeer, are_any_encrypted, nodes_without_key, secure_nodes, secure_peers,
};

pub use self::keyring::{Keyring, Pair, Pairs, PrivateKey};
pub use self::rotation::{Sessions, rotate};
pub use self::session::{Activity, PeerSession};

use super::mesh::links::ensure_address;
use super::rtnetlink::{Link, Mode, RouteChannel};
use super::{Error, sysctl};

/// What WireGuard adds to a packet: 32 bytes, UDP 8, IPv6 40 (or IPv4 20).
const OVERHEAD: u32 = 80;

/// What an encrypted network's packet grows by: [`OVERHEAD`], and that of VXLAN.
pub(super) const NETWORK_OVERHEAD: u32 = OVERHEAD + super::mesh::options::VXLAN_OVERHEAD;

/// The UDP port of VXLAN within the tunnels. It is not that of other networks, so that what comes on it in
/// clear is known to be forged.
pub(in crate::net) const VXLAN_PORT: u16 = 4792;

/// The file through which TUN devices are made.
const TUN: &str = "/dev/net/tun";

/// The interface of a slot.
pub(super) fn interface_name(slot: u8) -> String {
    format!("skep-wg{slot}")
}

/// What carries WireGuard on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Implementation {
    /// The kernel.
    Kernel,
    /// This daemon, by boringtun.
    UserSpace,
}

impl fmt::Display for Implementation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::UserSpace => "user space (boringtun)",
        })
    }
}

/// What carries WireGuard on this node, or why nothing can.
pub fn implementation() -> Result<Implementation, String> {
    if kernel::is_there() {
        return Ok(Implementation::Kernel);
    }
    match std::fs::File::options().read(true).write(true).open(TUN) {
        Ok(_) => Ok(Implementation::UserSpace),
        Err(error) => Err(format!(
            "this machine has no {TUN} (CONFIG_TUN; try: modprobe tun), which encrypted networks need: {error}"
        )),
    }
}

/// One slot's interface, by what carries it.
#[derive(Debug)]
enum Driver {
    Kernel(kernel::Driver),
    UserSpace(user_space::Driver),
}

impl Driver {
    fn set_peers(&mut self, wanted: &BTreeMap<PublicKey, SecurePeer>) -> Result<(), Error> {
        match self {
            Self::Kernel(driver) => driver.set_peers(wanted),
            Self::UserSpace(driver) => {
                driver.set_peers(wanted);
                Ok(())
            }
        }
    }

    /// Whether packets still pass by it.
    fn is_at_work(&self) -> bool {
        match self {
            Self::Kernel(_) => true,
            Self::UserSpace(driver) => driver.is_at_work(),
        }
    }

    /// Asks every peer that there is no session with for one.
    fn greet_strangers(&mut self) {
        match self {
            Self::Kernel(driver) => {
                if let Err(error) = driver.greet_strangers() {
                    tracing::warn!(error = %Chain(&error), "the node's key changes later");
                }
            }
            Self::UserSpace(driver) => driver.greet_strangers(),
        }
    }

    /// The peers that there is a session with, by their addresses.
    fn sessions(&mut self) -> BTreeSet<Ipv4Addr> {
        match self {
            Self::Kernel(driver) => driver.sessions().unwrap_or_else(|error| {
                tracing::warn!(error = %Chain(&error), "the node's key changes later: sessions are not known");
                BTreeSet::new()
            }),
            Self::UserSpace(driver) => driver.sessions(),
        }
    }

    /// Sends the peer with that address something that it hears of, or asks it for a session.
    fn greet(&mut self, address: Ipv4Addr) -> Result<(), Error> {
        match self {
            Self::Kernel(driver) => driver.greet(address),
            Self::UserSpace(driver) => {
                driver.greet(address);
                Ok(())
            }
        }
    }

    /// What has passed between this node and the peer with that address.
    fn activity(&mut self, address: Ipv4Addr) -> Result<Activity, Error> {
        match self {
            Self::Kernel(driver) => driver.activity(address),
            Self::UserSpace(driver) => Ok(driver.activity(address)),
        }
    }
}

/// WireGuard on this node.
#[derive(Debug)]
pub(super) struct Secure {
    keyring: Arc<Keyring>,
    implementation: Result<Implementation, String>,
    /// The interfaces that are up, each with the pair that it was made with.
    interfaces: BTreeMap<u8, (PrivateKey, Driver)>,
    /// Nodes that were said to have no key.
    without_key: BTreeSet<u16>,
}

impl Secure {
    pub(super) fn new(keyring: Arc<Keyring>) -> Self {
        Self {
            keyring,
            implementation: implementation(),
            interfaces: BTreeMap::new(),
            without_key: BTreeSet::new(),
        }
    }

    /// Refuses a network where this node cannot encrypt it.
    pub(super) fn check(&self, network: &str) -> Result<(), Error> {
        let network = || network.to_owned();
        let refused =
            |reason: &String| Error::Encryption { network: network(), reason: reason.clone() };
        self.implementation.as_ref().map(drop).map_err(refused)
    }

    /// Whether encrypted networks can be had here.
    pub(super) fn is_possible(&self) -> bool {
        self.implementation.is_ok()
    }

    /// Brings interfaces, peers and routes to what the tables ask for.
    pub(super) fn converge(
        &mut self,
        host: &mut RouteChannel,
        (underlay, underlay_mtu): (Ipv4Addr, u32),
        tables: &NetworkTables,
    ) -> Result<(), Error> {
        if !are_any_encrypted(tables) || !self.is_possible() {
            self.interfaces.clear();
            return remove(host);
        }
        let pairs = self.keyring.pairs();
        self.interfaces
            .retain(|slot, (key, _)| pairs.keys.get(slot).is_some_and(|pair| pair.key == *key));
        for slot in (0..SLOTS).filter(|slot| !pairs.keys.contains_key(slot)) {
            delete(host, &interface_name(slot))?;
        }
        routes::refuse_others(host)?;
        let peers = secure_peers(tables);
        for (slot, pair) in &pairs.keys {
            let link = self.ensure(host, (*slot, &pair.key), underlay, underlay_mtu)?;
            let address = tunnel_address(tables.self_number, *slot);
            ensure_address(host, &link.name, link.index, Ipv4Net::from(address))?;
            if let Some((_, driver)) = self.interfaces.get_mut(slot) {
                driver.set_peers(&peers)?;
            }
            // Others are sent to by the interface of the current slot alone.
            let wanted = match *slot == pairs.current {
                true => peers.values().map(|peer| peer.address).collect(),
                false => BTreeSet::new(),
            };
            routes::converge(host, link.index, address, &wanted)?;
        }
        self.tell_of_nodes_without_key(tables);
        Ok(())
    }

    /// The interface of a slot, up.
    fn ensure(
        &mut self,
        host: &mut RouteChannel,
        (slot, key): (u8, &PrivateKey),
        underlay: Ipv4Addr,
        underlay_mtu: u32,
    ) -> Result<Link, Error> {
        let name = interface_name(slot);
        let is_driven = self.interfaces.get(&slot).is_some_and(|(_, driver)| driver.is_at_work());
        if !is_driven || host.link(&name)?.is_none() {
            self.interfaces.remove(&slot);
            let driver = self.start(host, (slot, key), underlay)?;
            self.interfaces.insert(slot, (key.clone(), driver));
        }
        let missing = || Error::NoInterface { interface: name.clone() };
        let link = host.link(&name)?.ok_or_else(missing)?;
        let mtu = underlay_mtu.saturating_sub(OVERHEAD);
        if !link.is_up || link.mtu != mtu {
            sysctl::ensure_no_ipv6(&name)?;
            // While keys change, answers come in by one interface and questions leave by another.
            sysctl::ensure_loose_reverse_path(&name)?;
            let mut message = LinkMessage::default();
            message.header.index = link.index;
            message.header.flags = LinkFlags::Up;
            message.header.change_mask = LinkFlags::Up;
            message.attributes = vec![LinkAttribute::Mtu(mtu)];
            let message = RouteNetlinkMessage::SetLink(message);
            host.change(&format!("set up {name}"), Mode::Change, message)?;
        }
        Ok(link)
    }

    fn start(
        &self,
        host: &mut RouteChannel,
        (slot, key): (u8, &PrivateKey),
        underlay: Ipv4Addr,
    ) -> Result<Driver, Error> {
        let name = interface_name(slot);
        if self.implementation == Ok(Implementation::Kernel) {
            return kernel::Driver::start(host, &name, key, port(slot)).map(Driver::Kernel);
        }
        let listen = SocketAddrV4::new(underlay, port(slot));
        let driver = user_space::Driver::start(&name, key, listen);
        driver
            .map(Driver::UserSpace)
            .map_err(|error| Error::kernel(format!("start WireGuard on {name} at {listen}"), error))
    }

    /// The nodes that there are sessions with, by slot. Those without one in the slot that waits to become
    /// the current one are asked for it: sessions that nobody uses end, while the switch waits for all.
    pub(super) fn sessions(&mut self) -> Sessions {
        let coming = rotation::coming(&self.keyring.pairs());
        if let Some((_, driver)) = coming.and_then(|slot| self.interfaces.get_mut(&slot)) {
            driver.greet_strangers();
        }
        self.interfaces.iter_mut().map(|(slot, (_, driver))| (*slot, driver.sessions())).collect()
    }

    /// What there is with the node of that number, which is greeted before if asked for; `None` where no
    /// encrypted network has tasks on both.
    pub(super) fn session_with(
        &mut self,
        tables: &NetworkTables,
        number: u16,
        is_greeted: bool,
    ) -> Result<Option<PeerSession>, Error> {
        if !secure_nodes(tables).contains(&number) {
            return Ok(None);
        }
        let current = self.keyring.pairs().current;
        let keys = tables.keys.get(&number);
        let address = keys.and_then(|keys| keys.current_address(number));
        let greeting = address.filter(|_| is_greeted);
        if let (Some(address), Some((_, driver))) = (greeting, self.interfaces.get_mut(&current)) {
            driver.greet(address)?;
        }
        let mut activity = Activity::default();
        for (_, driver) in self.interfaces.values_mut() {
            for slot in 0..SLOTS {
                activity = activity.and(driver.activity(tunnel_address(number, slot))?);
            }
        }
        let of_current = |key: &&WireguardKey| keys.is_some_and(|keys| key.slot == keys.current);
        let peer_key = keys.and_then(|keys| keys.keys.iter().find(of_current));
        let peer_port = peer_key.map(|key| key.port);
        Ok(Some(PeerSession { own_port: port(current), peer_port, activity }))
    }

    /// Removes WireGuard from this node.
    pub(super) fn remove(&mut self, host: &mut RouteChannel) -> Result<(), Error> {
        self.interfaces.clear();
        remove(host)
    }

    fn tell_of_nodes_without_key(&mut self, tables: &NetworkTables) {
        let without_key = nodes_without_key(tables);
        for number in without_key.difference(&self.without_key) {
            tracing::warn!(
                node.number = number,
                "tasks of encrypted networks on a node are not reached: it has told no key \
                 (its version is older, or it lacks what `skep node inspect` names)"
            );
        }
        self.without_key = without_key;
    }
}

/// Removes all interfaces and routes of this module; fine if there are none.
pub(super) fn remove(host: &mut RouteChannel) -> Result<(), Error> {
    for slot in 0..SLOTS {
        delete(host, &interface_name(slot))?;
    }
    routes::refuse_no_others(host)
}

fn delete(host: &mut RouteChannel, name: &str) -> Result<(), Error> {
    match host.link(name)? {
        Some(link) => host.delete_link(name, link.index),
        None => Ok(()),
    }
}
