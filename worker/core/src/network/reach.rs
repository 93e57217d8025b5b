//! How tasks of a network are reached: forwarding and neighbour entries of its tunnel, and the neighbours of
//! its containers.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use super::{NetworkTable, NetworkTables};
use crate::mesh::Mac;

/// The entries of one interface, wanted or observed: a network's tunnel, which has those of other nodes' tasks,
/// or a container's, which forwards nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reach {
    /// Who is known, and answered for by a tunnel: address to Ethernet address.
    pub neighbours: BTreeMap<IpAddr, Mac>,
    /// Where the tunnel sends: Ethernet address to the node's underlay address, or to its address
    /// within WireGuard.
    pub forwarding: BTreeMap<Mac, Ipv4Addr>,
}

/// One change of one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReachOp {
    /// Adds or replaces a forwarding entry.
    SetForwarding(Mac, Ipv4Addr),
    /// Adds or replaces a neighbour entry.
    SetNeighbour(IpAddr, Mac),
    /// Deletes a neighbour entry.
    DeleteNeighbour(IpAddr),
    /// Deletes a forwarding entry.
    DeleteForwarding(Mac),
}

impl fmt::Display for ReachOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetForwarding(mac, underlay) => write!(f, "set forwarding {mac} = {underlay}"),
            Self::SetNeighbour(address, mac) => write!(f, "set neighbour {address} = {mac}"),
            Self::DeleteNeighbour(address) => write!(f, "delete neighbour {address}"),
            Self::DeleteForwarding(mac) => write!(f, "delete forwarding {mac}"),
        }
    }
}

impl Reach {
    /// The entries that a network's table asks for on the node that `tables` are for.
    ///
    /// Endpoints on nodes that are not known, or without an IPv4 address, are left out. So are, where
    /// the network is encrypted, those on nodes without a key: nothing is ever sent to them in clear.
    pub fn of(tables: &NetworkTables, network: &NetworkTable) -> Self {
        let known = network.endpoints.values().filter_map(|endpoint| {
            let number = endpoint.node_number;
            if number == tables.self_number {
                return None;
            }
            let end = match network.encrypted {
                true => tables.keys.get(&number).and_then(|keys| keys.current_address(number)),
                false => tables.peers.get(&number).copied(),
            };
            Some((endpoint.mac()?, end?, &endpoint.addresses))
        });
        // Collected, which takes a fraction of the time of inserting: a network has thousands.
        let neighbours = known
            .clone()
            .flat_map(|(mac, _, addresses)| addresses.iter().map(move |address| (*address, mac)));
        Self {
            neighbours: neighbours.collect(),
            forwarding: known.map(|(mac, end, _)| (mac, end)).collect(),
        }
    }

    /// The operations that turn `self` into `wanted`, in the order that they must be carried out: the
    /// tunnel answers for an address only once it knows where to send.
    pub fn diff(&self, wanted: &Self) -> Vec<ReachOp> {
        let mut ops = Vec::new();
        // Most changes of a network are no matter of its entries.
        if self == wanted {
            return ops;
        }
        for (mac, underlay) in &wanted.forwarding {
            if self.forwarding.get(mac) != Some(underlay) {
                ops.push(ReachOp::SetForwarding(*mac, *underlay));
            }
        }
        for (address, mac) in &wanted.neighbours {
            if self.neighbours.get(address) != Some(mac) {
                ops.push(ReachOp::SetNeighbour(*address, *mac));
            }
        }
        let gone = self.neighbours.keys().filter(|key| !wanted.neighbours.contains_key(key));
        ops.extend(gone.map(|address| ReachOp::DeleteNeighbour(*address)));
        let gone = self.forwarding.keys().filter(|key| !wanted.forwarding.contains_key(key));
        ops.extend(gone.map(|mac| ReachOp::DeleteForwarding(*mac)));
        ops
    }

    /// Applies one operation to these entries, as the kernel does to its own.
    pub fn apply(&mut self, op: ReachOp) {
        match op {
            ReachOp::SetForwarding(mac, underlay) => drop(self.forwarding.insert(mac, underlay)),
            ReachOp::SetNeighbour(address, mac) => drop(self.neighbours.insert(address, mac)),
            ReachOp::DeleteNeighbour(address) => drop(self.neighbours.remove(&address)),
            ReachOp::DeleteForwarding(mac) => drop(self.forwarding.remove(&mac)),
        }
    }
}
