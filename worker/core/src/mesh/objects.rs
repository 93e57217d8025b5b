//! Kernel objects of the mesh as data, and the operations between two sets of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::relays::Reach;
use super::{Backend, Error, Mac, MeshTable, Protocol, twin, twin_net};

/// A published port on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortKey {
    /// The transport protocol.
    pub protocol: Protocol,
    /// The port's number on the nodes.
    pub port: u16,
}

impl fmt::Display for PortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.port, self.protocol)
    }
}

/// Where a connection is sent: an address of a task and its port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// The task's address.
    pub address: IpAddr,
    /// The port that it listens on.
    pub port: u16,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::net::SocketAddr::new(self.address, self.port).fmt(f)
    }
}

/// A routing table that the mesh has routes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteTable {
    /// The host's main table.
    Main,
    /// The table of answers to connections that came in through that peer.
    WayBack(u16),
}

impl fmt::Display for RouteTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Main => f.write_str("main"),
            Self::WayBack(number) => write!(f, "way-back-{number}"),
        }
    }
}

/// What names a route: a table holds one route of ours for each destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteKey {
    /// The table it stands in.
    pub table: RouteTable,
    /// What it leads to.
    pub destination: IpNet,
}

/// All kernel objects of the mesh that depend on the table, wanted or observed, of one IP version.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Objects {
    /// Permanent neighbour entries of the tunnel: peer's tunnel address to Ethernet address.
    pub neighbours: BTreeMap<IpAddr, Mac>,
    /// Forwarding entries of the tunnel: peer's Ethernet address to underlay address.
    pub forwarding: BTreeMap<Mac, Ipv4Addr>,
    /// Routes through the tunnel, with the next hop where there is one.
    pub routes: BTreeMap<RouteKey, Option<IpAddr>>,
    /// Peers whose mark on an answer selects their way back.
    pub return_rules: BTreeSet<u16>,
    /// Every address of every node.
    pub node_addresses: BTreeSet<IpAddr>,
    /// Peers that are recognised by Ethernet address: conntrack zone and mark.
    pub peers: BTreeMap<u16, Mac>,
    /// Published ports and their backends, ascending and without repetition.
    pub ports: BTreeMap<PortKey, Vec<Endpoint>>,
}

/// One change of one kernel object. The set is closed: the mesh acts in no other way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Adds or replaces a permanent neighbour entry of the tunnel.
    SetNeighbour(IpAddr, Mac),
    /// Adds or replaces a forwarding entry of the tunnel.
    SetForwarding(Mac, Ipv4Addr),
    /// Adds or replaces a route.
    SetRoute(RouteKey, Option<IpAddr>),
    /// Adds the rule that sends a peer's marked answers to its table.
    AddReturnRule(u16),
    /// Adds an address to the cluster's node addresses.
    AddNodeAddress(IpAddr),
    /// Removes an address from them.
    DeleteNodeAddress(IpAddr),
    /// Recognises a peer by the Ethernet address of its tunnel.
    AddPeer(u16, Mac),
    /// Forgets a peer.
    DeletePeer(u16, Mac),
    /// Publishes a port.
    AddPort(PortKey, Vec<Endpoint>),
    /// Gives a published port other backends, and starts its round-robin again.
    ReplaceBackends(PortKey, Vec<Endpoint>),
    /// Withdraws a port; connections that are established go on.
    DeletePort(PortKey),
    /// Deletes a peer's rule.
    DeleteReturnRule(u16),
    /// Deletes a route.
    DeleteRoute(RouteKey),
    /// Deletes a forwarding entry.
    DeleteForwarding(Mac),
    /// Deletes a neighbour entry.
    DeleteNeighbour(IpAddr),
}

impl Op {
    /// Whether the operation changes rules (all of which go into one atomic batch) and not routing.
    pub fn is_rules(&self) -> bool {
        match self {
            Self::AddNodeAddress(_)
            | Self::DeleteNodeAddress(_)
            | Self::AddPeer(..)
            | Self::DeletePeer(..)
            | Self::AddPort(..)
            | Self::ReplaceBackends(..)
            | Self::DeletePort(_) => true,
            Self::SetNeighbour(..)
            | Self::SetForwarding(..)
            | Self::SetRoute(..)
            | Self::AddReturnRule(_)
            | Self::DeleteReturnRule(_)
            | Self::DeleteRoute(_)
            | Self::DeleteForwarding(_)
            | Self::DeleteNeighbour(_) => false,
        }
    }

    /// Whether the operation must wait until the rules no longer refer to its object.
    pub fn is_after_rules(&self) -> bool {
        matches!(
            self,
            Self::DeleteReturnRule(_)
                | Self::DeleteRoute(_)
                | Self::DeleteForwarding(_)
                | Self::DeleteNeighbour(_)
        )
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetNeighbour(address, mac) => write!(f, "set neighbour {address} = {mac}"),
            Self::SetForwarding(mac, underlay) => write!(f, "set forwarding {mac} = {underlay}"),
            Self::SetRoute(key, None) => write!(f, "set route {}", Shown(key)),
            Self::SetRoute(key, Some(via)) => write!(f, "set route {} via {via}", Shown(key)),
            Self::AddReturnRule(number) => write!(f, "add return rule {number}"),
            Self::AddNodeAddress(address) => write!(f, "add node address {address}"),
            Self::DeleteNodeAddress(address) => write!(f, "delete node address {address}"),
            Self::AddPeer(number, mac) => write!(f, "add peer {number} = {mac}"),
            Self::DeletePeer(number, mac) => write!(f, "delete peer {number} = {mac}"),
            Self::AddPort(key, backends) => write!(f, "add port {key} ->{}", Listed(backends)),
            Self::ReplaceBackends(key, backends) => {
                write!(f, "replace backends {key} ->{}", Listed(backends))
            }
            Self::DeletePort(key) => write!(f, "delete port {key}"),
            Self::DeleteReturnRule(number) => write!(f, "delete return rule {number}"),
            Self::DeleteRoute(key) => write!(f, "delete route {}", Shown(key)),
            Self::DeleteForwarding(mac) => write!(f, "delete forwarding {mac}"),
            Self::DeleteNeighbour(address) => write!(f, "delete neighbour {address}"),
        }
    }
}

struct Shown<'a>(&'a RouteKey);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0.table, self.0.destination)
    }
}

struct Listed<'a>(&'a [Endpoint]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str(" reject");
        }
        self.0.iter().try_for_each(|endpoint| write!(f, " {endpoint}"))
    }
}

/// The operations that turn the objects of `old` into the objects of `new`.
pub fn diff(old: &MeshTable, new: &MeshTable) -> Result<Vec<Op>, Error> {
    Ok(Objects::of(old)?.diff(&Objects::of(new)?))
}

impl Objects {
    /// The objects of IPv4 that `table` asks for.
    pub fn of(table: &MeshTable) -> Result<Self, Error> {
        table.validate()?;
        let mut objects = Self::default();
        let slices = table.slices()?;
        for peer in &table.peers {
            objects.node_addresses.insert(peer.underlay.into());
            if peer.number == table.self_number || objects.peers.contains_key(&peer.number) {
                continue; // A further address of a node that stands in the tables already.
            }
            let (mac, tunnel) = (Mac::tunnel(peer.number), slices.tunnel_address(peer.number));
            objects.forwarding.insert(mac, peer.underlay);
            objects.add_peer(
                peer.number,
                tunnel.into(),
                [
                    Ipv4Net::from(tunnel).into(),
                    slices.slice(peer.number).into(),
                    Ipv4Net::default().into(),
                ],
            );
        }
        objects.add_ports(table, |backend| Some(backend.address.into()));
        Ok(objects)
    }

    /// The objects of IPv6 that `table` asks for: the twins of those of IPv4, as far as nodes have IPv6.
    ///
    /// `None` if this node has no IPv6. The tunnel's forwarding is by Ethernet addresses and the same for both.
    pub fn twin_of(table: &MeshTable) -> Result<Option<Self>, Error> {
        table.validate()?;
        let mut objects = Self::default();
        let slices = table.slices()?;
        if !table.ipv6.contains_key(&table.self_number) {
            return Ok(None);
        }
        let has_ipv6 = |number: &u16| table.ipv6.contains_key(number);
        let addresses = table.ipv6.values().flatten();
        objects.node_addresses = addresses.map(|address| IpAddr::V6(*address)).collect();
        let peers = table.peers.iter().map(|peer| peer.number).filter(has_ipv6);
        for number in peers.filter(|number| *number != table.self_number) {
            let tunnel = slices.tunnel_address(number);
            objects.add_peer(
                number,
                twin(tunnel).into(),
                [
                    twin_net(tunnel.into()).into(),
                    twin_net(slices.slice(number)).into(),
                    Ipv6Net::default().into(),
                ],
            );
        }
        objects.add_ports(table, |backend| {
            let number = slices.number_of(backend.address).filter(has_ipv6);
            number.map(|_| twin(backend.address).into())
        });
        Ok(Some(objects))
    }

    /// A peer and the ways to its end of the tunnel, through that to its slice, and back to its clients.
    fn add_peer(&mut self, number: u16, tunnel: IpAddr, [end, slice, anywhere]: [IpNet; 3]) {
        let mac = Mac::tunnel(number);
        self.peers.insert(number, mac);
        self.neighbours.insert(tunnel, mac);
        self.return_rules.insert(number);
        for (table, destination, via) in [
            (RouteTable::Main, end, None),
            (RouteTable::Main, slice, Some(tunnel)),
            (RouteTable::WayBack(number), anywhere, Some(tunnel)),
        ] {
            self.routes.insert(RouteKey { table, destination }, via);
        }
    }

    /// The ports with those backends that have an address.
    fn add_ports(&mut self, table: &MeshTable, address: impl Fn(&Backend) -> Option<IpAddr>) {
        let reach = Reach::of(table);
        for port in table.ports.iter().filter(|port| !reach.is_relayed(port)) {
            // A node beyond the tunnel takes connections of TCP alone, and those by its daemon.
            let within = port.backends.iter().filter(|backend| !reach.is_beyond_tunnel(backend));
            let endpoint =
                |b: &Backend| Some(Endpoint { address: address(b)?, port: b.target_port });
            let backends: BTreeSet<Endpoint> = within.filter_map(endpoint).collect();
            let key = PortKey { protocol: port.protocol, port: port.published };
            self.ports.insert(key, backends.into_iter().collect());
        }
    }

    /// The operations that turn `self` into `wanted`, in the order that they must be carried out.
    pub fn diff(&self, wanted: &Self) -> Vec<Op> {
        let mut ops = Vec::new();
        self.diff_routing_added(wanted, &mut ops);
        self.diff_rules(wanted, &mut ops);
        self.diff_routing_deleted(wanted, &mut ops);
        ops
    }

    fn diff_routing_added(&self, wanted: &Self, ops: &mut Vec<Op>) {
        let neighbours = changed(&self.neighbours, &wanted.neighbours);
        ops.extend(neighbours.map(|(address, mac)| Op::SetNeighbour(*address, *mac)));
        let forwarding = changed(&self.forwarding, &wanted.forwarding);
        ops.extend(forwarding.map(|(mac, underlay)| Op::SetForwarding(*mac, *underlay)));
        let routes = changed(&self.routes, &wanted.routes);
        ops.extend(routes.map(|(key, via)| Op::SetRoute(*key, *via)));
        let rules = wanted.return_rules.difference(&self.return_rules);
        ops.extend(rules.map(|number| Op::AddReturnRule(*number)));
    }

    fn diff_rules(&self, wanted: &Self, ops: &mut Vec<Op>) {
        let gone = self.node_addresses.difference(&wanted.node_addresses);
        ops.extend(gone.map(|address| Op::DeleteNodeAddress(*address)));
        let added = wanted.node_addresses.difference(&self.node_addresses);
        ops.extend(added.map(|address| Op::AddNodeAddress(*address)));

        let is_kept = |number: &u16, mac: &Mac| wanted.peers.get(number) == Some(mac);
        let gone = self.peers.iter().filter(|(number, mac)| !is_kept(number, mac));
        ops.extend(gone.map(|(number, mac)| Op::DeletePeer(*number, *mac)));
        let added = changed(&self.peers, &wanted.peers);
        ops.extend(added.map(|(number, mac)| Op::AddPeer(*number, *mac)));

        let gone = self.ports.keys().filter(|key| !wanted.ports.contains_key(key));
        ops.extend(gone.map(|key| Op::DeletePort(*key)));
        for (key, backends) in changed(&self.ports, &wanted.ports) {
            ops.push(match self.ports.contains_key(key) {
                true => Op::ReplaceBackends(*key, backends.clone()),
                false => Op::AddPort(*key, backends.clone()),
            });
        }
    }

    fn diff_routing_deleted(&self, wanted: &Self, ops: &mut Vec<Op>) {
        let rules = self.return_rules.difference(&wanted.return_rules);
        ops.extend(rules.map(|number| Op::DeleteReturnRule(*number)));
        // A route through a gateway goes before the route to that gateway.
        let gone = |key: &&RouteKey| !wanted.routes.contains_key(key);
        let routes = self.routes.iter().filter(|(key, _)| gone(key));
        let (direct, through): (Vec<_>, Vec<_>) = routes.partition(|(_, via)| via.is_none());
        let routes = through.into_iter().chain(direct);
        ops.extend(routes.map(|(key, _)| Op::DeleteRoute(*key)));
        let macs = self.forwarding.keys().filter(|mac| !wanted.forwarding.contains_key(mac));
        ops.extend(macs.map(|mac| Op::DeleteForwarding(*mac)));
        let gone = |address: &&IpAddr| !wanted.neighbours.contains_key(address);
        let addresses = self.neighbours.keys().filter(gone);
        ops.extend(addresses.map(|address| Op::DeleteNeighbour(*address)));
    }

    /// Applies one operation to these objects, as the kernel does to its own.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::SetNeighbour(address, mac) => drop(self.neighbours.insert(*address, *mac)),
            Op::SetForwarding(mac, underlay) => drop(self.forwarding.insert(*mac, *underlay)),
            Op::SetRoute(key, via) => drop(self.routes.insert(*key, *via)),
            Op::AddReturnRule(number) => expect_new(self.return_rules.insert(*number), op),
            Op::AddNodeAddress(address) => expect_new(self.node_addresses.insert(*address), op),
            Op::DeleteNodeAddress(address) => {
                expect_found(self.node_addresses.remove(address), op);
            }
            Op::AddPeer(number, mac) => {
                expect_new(self.peers.insert(*number, *mac).is_none(), op);
            }
            Op::DeletePeer(number, mac) => {
                expect_found(self.peers.remove(number) == Some(*mac), op);
            }
            Op::AddPort(key, backends) => {
                expect_new(self.ports.insert(*key, backends.clone()).is_none(), op);
            }
            Op::ReplaceBackends(key, backends) => {
                expect_found(self.ports.insert(*key, backends.clone()).is_some(), op);
            }
            Op::DeletePort(key) => expect_found(self.ports.remove(key).is_some(), op),
            Op::DeleteReturnRule(number) => expect_found(self.return_rules.remove(number), op),
            Op::DeleteRoute(key) => expect_found(self.routes.remove(key).is_some(), op),
            Op::DeleteForwarding(mac) => expect_found(self.forwarding.remove(mac).is_some(), op),
            Op::DeleteNeighbour(address) => {
                expect_found(self.neighbours.remove(address).is_some(), op);
            }
        }
    }
}

/// The entries of `new` that `old` lacks or has with another value.
fn changed<'a, K: Ord, V: PartialEq>(
    old: &'a BTreeMap<K, V>,
    new: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    new.iter().filter(|(key, value)| old.get(key) != Some(value))
}

fn expect_new(is_new: bool, op: &Op) {
    debug_assert!(is_new, "exists already: {op}");
}

fn expect_found(is_found: bool, op: &Op) {
    debug_assert!(is_found, "does not exist: {op}");
}
