//! Virtual addresses of services as containers must know them, and which of their connections must end.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use skep_common::ServiceId;

use super::{NetworkTable, Reach, ReachOp};

/// Virtual addresses, each with its backends in ascending order; [`in_turn`] says where a container begins.
///
/// Lists are shared: all containers of a network have the same ones, and a list that did not change is the
/// same allocation as before.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Vips(pub BTreeMap<IpAddr, Arc<[IpAddr]>>);

/// One change of one virtual address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VipOp {
    /// Translates an address.
    Add(IpAddr, Arc<[IpAddr]>),
    /// Gives an address other backends, and starts its turns again.
    Replace(IpAddr, Arc<[IpAddr]>),
    /// Translates an address no longer.
    Delete(IpAddr),
}

impl fmt::Display for VipOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (verb, address, backends) = match self {
            Self::Add(address, backends) => ("add", address, backends),
            Self::Replace(address, backends) => ("replace", address, backends),
            Self::Delete(address) => return write!(f, "delete vip {address}"),
        };
        write!(f, "{verb} vip {address} ->")?;
        if backends.is_empty() {
            return f.write_str(" reject");
        }
        backends.iter().try_for_each(|backend| write!(f, " {backend}"))
    }
}

impl Vips {
    /// The virtual addresses of all services on a network. Lists that are as in `before` are those.
    pub fn of(network: &NetworkTable, before: &Self) -> Self {
        let mut serving: BTreeMap<ServiceId, BTreeSet<IpAddr>> = BTreeMap::new();
        for endpoint in network.endpoints.values().filter(|endpoint| endpoint.serving) {
            serving.entry(endpoint.service_id).or_default().extend(&endpoint.addresses);
        }
        let none = BTreeSet::new();
        let mut vips = BTreeMap::new();
        for (service_id, service) in &network.services {
            let addresses = serving.get(service_id).unwrap_or(&none);
            for vip in &service.virtual_ips {
                let is_same_family = |address: &&IpAddr| address.is_ipv4() == vip.is_ipv4();
                let backends = || addresses.iter().filter(is_same_family).copied();
                let list = match before.0.get(vip) {
                    Some(before) if before.iter().copied().eq(backends()) => Arc::clone(before),
                    _ => backends().collect(),
                };
                vips.insert(*vip, list);
            }
        }
        Self(vips)
    }

    /// The virtual addresses of several networks, whose subnets do not overlap.
    pub fn union<'a>(all: impl IntoIterator<Item = &'a Self>) -> Self {
        let entries = all.into_iter().flat_map(|vips| &vips.0);
        Self(entries.map(|(vip, backends)| (*vip, Arc::clone(backends))).collect())
    }

    /// The operations that turn `self` into `wanted`. An address whose backends are the same is named
    /// by none.
    pub fn diff(&self, wanted: &Self) -> Vec<VipOp> {
        let gone = self.0.keys().filter(|vip| !wanted.0.contains_key(vip));
        let mut ops: Vec<VipOp> = gone.map(|vip| VipOp::Delete(*vip)).collect();
        for (vip, backends) in &wanted.0 {
            match self.0.get(vip) {
                Some(present) if Arc::ptr_eq(present, backends) || present == backends => {}
                Some(_) => ops.push(VipOp::Replace(*vip, Arc::clone(backends))),
                None => ops.push(VipOp::Add(*vip, Arc::clone(backends))),
            }
        }
        ops
    }

    /// Applies one operation, as the kernel does to its rules.
    pub fn apply(&mut self, op: &VipOp) {
        match op {
            VipOp::Add(vip, backends) | VipOp::Replace(vip, backends) => {
                self.0.insert(*vip, Arc::clone(backends));
            }
            VipOp::Delete(vip) => drop(self.0.remove(vip)),
        }
    }
}

/// The backends in the order of their turns in the container of a task.
///
/// Every container begins at another: a hundred clients that connect once each must not all reach the
/// first.
pub fn in_turn(backends: &[IpAddr], task_id: u128) -> Vec<IpAddr> {
    let mut turns = backends.to_vec();
    if let Ok(count) = u128::try_from(turns.len())
        && count > 1
    {
        // The low bits of an id that is drawn at random.
        let by = usize::try_from(task_id % count).expect("less than the number of backends");
        turns.rotate_left(by);
    }
    turns
}

/// A connection that the kernel of a container keeps track of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// The transport protocol's number.
    pub protocol: u8,
    /// Where it was sent to.
    pub destination: IpAddr,
    /// The port there; 0 where the protocol has none.
    pub destination_port: u16,
    /// Where its answers come from: after translation, the backend.
    pub answers_from: IpAddr,
    /// The port there.
    pub answers_from_port: u16,
}

/// What a network means for the containers on it, derived once for all of them.
#[derive(Debug, Clone, Default)]
pub struct Balance {
    /// The network's virtual addresses.
    pub vips: Vips,
    /// Who answers for which address on it, as each container knows without asking.
    pub neighbours: Reach,
    /// What makes these of those of the table before.
    neighbour_changes: Vec<ReachOp>,
    peers: Peers,
    /// Counts from the first table of the network.
    number: u64,
    /// The first number whose containers have no connections to forget.
    nothing_lost_since: u64,
}

impl Balance {
    /// What a table means, which follows on `before`.
    pub fn of(network: &NetworkTable, before: &Self) -> Self {
        let peers = Peers::of(network);
        let number = before.number + 1;
        let nothing_lost_since = match before.peers.has_lost(&peers) {
            true => number,
            false => before.nothing_lost_since,
        };
        let vips = Vips::of(network, &before.vips);
        let neighbours = neighbours(network);
        let neighbour_changes = before.neighbours.diff(&neighbours);
        Self { vips, neighbours, neighbour_changes, peers, number, nothing_lost_since }
    }

    /// What a container that has the neighbours of `before` must change.
    pub fn neighbour_changes_since(&self, before: &Self) -> Cow<'_, [ReachOp]> {
        match before.number + 1 == self.number {
            true => Cow::Borrowed(&self.neighbour_changes),
            false => Cow::Owned(before.neighbours.diff(&self.neighbours)),
        }
    }

    /// Whether a container that has the rules of `before` may have connections that it must forget.
    pub fn has_lost_since(&self, before: &Self) -> bool {
        before.number < self.nothing_lost_since
    }

    /// Whether the kernel must forget a connection of a container on the network; see [`Peers::is_stale`].
    pub fn is_stale(&self, connection: &Connection) -> bool {
        self.peers.is_stale(connection)
    }

    /// Whether the kernel must forget a request of a container on the network that nobody answered; see
    /// [`Peers::is_astray`].
    pub fn is_astray(&self, request: &Connection) -> bool {
        self.peers.is_astray(request)
    }
}

fn neighbours(network: &NetworkTable) -> Reach {
    let endpoints = network.endpoints.values();
    let known = endpoints.filter_map(|endpoint| Some((endpoint.mac()?, &endpoint.addresses)));
    let neighbours =
        known.flat_map(|(mac, addresses)| addresses.iter().map(move |address| (*address, mac)));
    Reach { neighbours: neighbours.collect(), ..Reach::default() }
}

/// What connections of a network's containers are judged by.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Peers {
    subnets: Vec<IpNet>,
    /// Virtual addresses, and the services that they stand for.
    virtual_ips: BTreeMap<IpAddr, ServiceId>,
    /// Every endpoint, with its service and whether it serves.
    endpoints: BTreeMap<IpAddr, (ServiceId, bool)>,
}

impl Peers {
    /// The endpoints and services of a network.
    pub fn of(network: &NetworkTable) -> Self {
        let mut peers = Self { subnets: network.subnets.clone(), ..Self::default() };
        for (service_id, service) in &network.services {
            let vips = service.virtual_ips.iter();
            peers.virtual_ips.extend(vips.map(|vip| (*vip, *service_id)));
        }
        let endpoints = network.endpoints.values().flat_map(|endpoint| {
            let of = (endpoint.service_id, endpoint.serving);
            endpoint.addresses.iter().map(move |address| (*address, of))
        });
        peers.endpoints = endpoints.collect();
        peers
    }

    /// Whether a change from `self` to `new` may leave connections that must be forgotten: an endpoint
    /// is gone or serves no longer, or an address has another meaning now.
    pub fn has_lost(&self, new: &Self) -> bool {
        let lost_endpoint = self.endpoints.iter().any(|(address, (service_id, serving))| {
            new.endpoints.get(address).is_none_or(|(service_now, serves_now)| {
                service_now != service_id || *serving && !serves_now
            })
        });
        let mut virtual_ips = self.virtual_ips.iter();
        lost_endpoint || virtual_ips.any(|(vip, of)| new.virtual_ips.get(vip) != Some(of))
    }

    /// Whether the kernel must forget a connection, so that its next packet is judged anew.
    ///
    /// With an endpoint everything with it goes. Of one that is only withdrawn, established TCP goes on
    /// while it drains; what has no end of its own (UDP, echo) moves on to other backends. It moves on
    /// also where the virtual address or the backend's address has passed to another service, which a
    /// table may bring in one step; TCP is reset there by the task that does not know it.
    pub fn is_stale(&self, connection: &Connection) -> bool {
        const TCP: u8 = 6;
        match self.target(connection) {
            Target::Valid => false,
            Target::Withdrawn => connection.protocol != TCP,
            Target::Gone => true,
        }
    }

    /// Whether the kernel must forget a request for a connection that nobody answered, so that it goes
    /// elsewhere when its client sends it again: the one that it went to is no backend any more, and may
    /// have ended by then.
    pub fn is_astray(&self, request: &Connection) -> bool {
        self.target(request) != Target::Valid
    }

    fn target(&self, connection: &Connection) -> Target {
        let address = connection.answers_from;
        if !self.subnets.iter().any(|subnet| subnet.contains(&address)) {
            return Target::Valid;
        }
        let Some((service_id, serving)) = self.endpoints.get(&address) else { return Target::Gone };
        let is_translated = connection.destination != address;
        let is_backend =
            *serving && self.virtual_ips.get(&connection.destination) == Some(service_id);
        if is_translated && !is_backend { Target::Withdrawn } else { Target::Valid }
    }
}

/// What a connection leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// An endpoint that may be reached so, or something that is not of the network.
    Valid,
    /// An endpoint that is no backend of the virtual address any more.
    Withdrawn,
    /// No endpoint.
    Gone,
}
