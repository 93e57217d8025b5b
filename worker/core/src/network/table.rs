//! The input of overlay networks: what managers tell a node about those that its tasks are on.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::IpNet;
use skep_common::wireguard::WireguardKeys;
use skep_common::{NetworkId, ServiceId, TaskId};

use crate::mesh::Mac;

/// Every network that this node has tasks on, and where the nodes are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NetworkTables {
    /// The version of the mesh table that these came with.
    pub version: u64,
    /// The number of this node.
    pub self_number: u16,
    /// Underlay addresses of all nodes, by number.
    pub peers: BTreeMap<u16, Ipv4Addr>,
    /// The keys of those nodes that have some, by number.
    pub keys: BTreeMap<u16, WireguardKeys>,
    /// The networks; one that did not change is the same allocation as before.
    pub networks: BTreeMap<NetworkId, Arc<NetworkTable>>,
}

impl NetworkTables {
    /// Whether all of these networks are there.
    pub fn have(&self, networks: impl IntoIterator<Item = NetworkId>) -> bool {
        networks.into_iter().all(|id| self.networks.contains_key(&id))
    }
}

/// What a node knows of one network.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NetworkTable {
    /// Its name.
    pub name: String,
    /// Its VXLAN network identifier.
    pub vni: u32,
    /// Its subnets: one IPv4, and one IPv6 where it has that.
    pub subnets: Vec<IpNet>,
    /// The MTU that users ask; `None` is what the tunnel leaves.
    pub mtu: Option<u32>,
    /// Whether it has no way out.
    pub internal: bool,
    /// Whether its traffic between nodes must be encrypted.
    pub encrypted: bool,
    /// Tasks on it, on whichever node, from their placement until they have ended.
    pub endpoints: BTreeMap<TaskId, EndpointEntry>,
    /// Services that are on it.
    pub services: BTreeMap<ServiceId, ServiceEntry>,
}

/// A task on a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointEntry {
    /// Its service.
    pub service_id: ServiceId,
    /// The name of its container: `service.slot.task`.
    pub name: String,
    /// The host name that its service asks for.
    pub hostname: Option<String>,
    /// Its IPv4 address, and its IPv6 address where the network has that.
    pub addresses: Vec<IpAddr>,
    /// The node that it is on.
    pub node_number: u16,
    /// Whether it is balanced to and named in answers: it runs, is healthy and wanted, on a living node.
    pub serving: bool,
}

impl EndpointEntry {
    /// Its Ethernet address on the network, which follows from its IPv4 address.
    pub fn mac(&self) -> Option<Mac> {
        self.addresses.iter().find_map(|address| match address {
            IpAddr::V4(address) => Some(Mac::of_endpoint(*address)),
            IpAddr::V6(_) => None,
        })
    }
}

/// A service on a network.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServiceEntry {
    /// Its name.
    pub name: String,
    /// More names of it on this network.
    pub aliases: Vec<String>,
    /// Addresses that stand for its serving tasks; without one its names mean these tasks' addresses.
    pub virtual_ips: Vec<IpAddr>,
    /// Published ports that have a name.
    pub ports: Vec<NamedPort>,
}

/// A published port that has a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedPort {
    /// Its name.
    pub name: String,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// The port that containers listen on.
    pub target_port: u16,
}
