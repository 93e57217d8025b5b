//! The input of the mesh: what a manager tells a node about the cluster's published ports.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use skep_common::NodeId;
use skep_common::spec::ProxyProtocol;

use super::Slices;

/// Why a mesh table cannot be put into effect.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The pool is too small for slices of this size.
    #[error("the address pool {pool} cannot be cut into /{slice_prefix} slices")]
    SlicePrefix {
        /// The pool as configured.
        pool: Ipv4Net,
        /// The prefix length of a slice as configured.
        slice_prefix: u8,
    },
    /// A node number outside of the pool, or 0, which no node has.
    #[error("node number {number} has no slice in the address pool {pool}; the highest is {max}")]
    NumberOutOfRange {
        /// The number in question.
        number: u16,
        /// The pool as configured.
        pool: Ipv4Net,
        /// The highest number that has a slice.
        max: u16,
    },
    /// Two services claim one port; managers never allocate that.
    #[error("published port {port} is claimed by service {first} and by service {second}")]
    DuplicatePort {
        /// The port and its protocol.
        port: String,
        /// The service that comes first in the table.
        first: String,
        /// The service that comes second.
        second: String,
    },
}

/// Everything a node must know to serve every published port of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshTable {
    /// Grows with every change; a node acknowledges the version it has in effect.
    pub version: u64,
    /// The number of the node that this table is for.
    pub self_number: u16,
    /// The pool that node slices are cut from.
    #[serde(default = "MeshTable::default_pool")]
    pub pool: Ipv4Net,
    /// The prefix length of a node's slice.
    #[serde(default = "MeshTable::default_slice_prefix")]
    pub slice_prefix: u8,
    /// All nodes of the cluster, the receiving one included. A node with several addresses has
    /// several entries; the tunnel uses the first.
    pub peers: Vec<Peer>,
    /// The nodes that take part in IPv6, and their addresses there; those that are not listed serve IPv4
    /// alone.
    #[serde(default)]
    pub ipv6: BTreeMap<u16, BTreeSet<Ipv6Addr>>,
    /// How the nodes' daemons are reached; those that are not listed have nothing carried through theirs.
    #[serde(default)]
    pub daemons: BTreeMap<u16, Daemon>,
    /// All published ports of the cluster.
    pub ports: Vec<PublishedPort>,
}

/// An address of a node on the underlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The node's number, 1 to [`super::NODE_NUMBER_MAX`].
    pub number: u16,
    /// The address that other nodes reach it at.
    pub underlay: Ipv4Addr,
}

/// The daemon of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Daemon {
    /// Whose certificate it shows.
    pub node_id: NodeId,
    /// Where it listens for other nodes.
    pub address: SocketAddrV4,
    /// Whether it balances published ports, since its kernel does not: no tunnel ends there.
    #[serde(default)]
    pub is_balancer: bool,
}

/// The transport protocol of a published port.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// The protocol's number in an IP header (IANA protocol numbers).
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// Whether a flow has no end that the kernel could see: what a client goes on sending from one port
    /// belongs together for as long as it does.
    pub fn is_endless(self) -> bool {
        match self {
            Self::Tcp | Self::Sctp => false,
            Self::Udp => true,
        }
    }

    /// The protocol with that number, where the mesh carries it.
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp => f.write_str("tcp"),
            Self::Udp => f.write_str("udp"),
            Self::Sctp => f.write_str("sctp"),
        }
    }
}

/// A port that answers on every node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    /// The port on the nodes.
    pub published: u16,
    /// The transport protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// The service that publishes it.
    pub service_id: String,
    /// Its name, for people; empty where its manager does not say it.
    #[serde(default)]
    pub service: String,
    /// How its tasks are told of clients; with it, the node relays connections to them.
    #[serde(default)]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// The healthy tasks behind it; none means that clients are refused.
    pub backends: Vec<Backend>,
}

/// A task that serves a published port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// The task.
    pub task_id: String,
    /// Its address in its node's slice.
    pub address: Ipv4Addr,
    /// The port that it listens on.
    pub target_port: u16,
}

impl MeshTable {
    /// The pool where the swarm names none: far from what home, office and cloud networks use.
    pub fn default_pool() -> Ipv4Net {
        Ipv4Net::new_assert(Ipv4Addr::new(10, 192, 0, 0), 10)
    }

    /// The size of a slice where the swarm names none: 1021 tasks on each of 4094 nodes.
    pub fn default_slice_prefix() -> u8 {
        22
    }

    /// The address arithmetic of this table's pool.
    pub fn slices(&self) -> Result<Slices, Error> {
        Slices::new(self.pool, self.slice_prefix)
    }

    /// The other nodes that no tunnel leads to.
    pub fn beyond_tunnel(&self) -> BTreeSet<u16> {
        let of_others = self.daemons.iter().filter(|(number, _)| **number != self.self_number);
        of_others.filter(|(_, daemon)| daemon.is_balancer).map(|(number, _)| *number).collect()
    }

    /// Checks what [`super::Objects::of`] relies on.
    pub fn validate(&self) -> Result<(), Error> {
        let slices = self.slices()?;
        slices.check_number(self.self_number)?;
        self.peers.iter().try_for_each(|peer| slices.check_number(peer.number))?;
        self.ipv6.keys().try_for_each(|number| slices.check_number(*number))?;

        let mut seen = BTreeSet::new();
        for port in &self.ports {
            if !seen.insert((port.protocol, port.published)) {
                return Err(self.duplicate(port));
            }
        }
        Ok(())
    }

    fn duplicate(&self, port: &PublishedPort) -> Error {
        let same =
            |p: &&PublishedPort| (p.protocol, p.published) == (port.protocol, port.published);
        let first = self.ports.iter().find(same).unwrap_or(port);
        Error::DuplicatePort {
            port: format!("{}/{}", port.published, port.protocol),
            first: first.service_id.clone(),
            second: port.service_id.clone(),
        }
    }
}
