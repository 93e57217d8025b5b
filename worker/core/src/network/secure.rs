//! Which nodes this one has WireGuard tunnels with: those that tasks of encrypted networks are on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4};

use skep_common::wireguard::{PublicKey, tunnel_address};

use super::NetworkTables;

/// One key of another node: with WireGuard, a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SecurePeer {
    /// Where it listens.
    pub endpoint: SocketAddrV4,
    /// Its address within the tunnel, the only one that it may speak for.
    pub address: Ipv4Addr,
}

/// Whether any network of this node is encrypted.
pub fn are_any_encrypted(tables: &NetworkTables) -> bool {
    tables.networks.values().any(|network| network.encrypted)
}

/// The peers of this node's tunnels, each key of each node.
pub fn secure_peers(tables: &NetworkTables) -> BTreeMap<PublicKey, SecurePeer> {
    let mut peers = BTreeMap::new();
    for number in secure_nodes(tables) {
        let (Some(underlay), Some(keys)) = (tables.peers.get(&number), tables.keys.get(&number))
        else {
            continue;
        };
        for key in &keys.keys {
            let endpoint = SocketAddrV4::new(*underlay, key.port);
            let address = tunnel_address(number, key.slot);
            peers.insert(key.public_key, SecurePeer { endpoint, address });
        }
    }
    peers
}

/// The nodes that tasks of encrypted networks are on and that are not reached there: none of their keys
/// is known.
pub fn nodes_without_key(tables: &NetworkTables) -> BTreeSet<u16> {
    let has_key = |number: &u16| {
        tables.keys.get(number).is_some_and(|keys| keys.current_address(*number).is_some())
    };
    secure_nodes(tables).into_iter().filter(|number| !has_key(number)).collect()
}

/// The other nodes that tasks of this node's encrypted networks are on.
pub fn secure_nodes(tables: &NetworkTables) -> BTreeSet<u16> {
    let encrypted = tables.networks.values().filter(|network| network.encrypted);
    let endpoints = encrypted.flat_map(|network| network.endpoints.values());
    let numbers = endpoints.map(|endpoint| endpoint.node_number);
    numbers.filter(|number| *number != tables.self_number).collect()
}
