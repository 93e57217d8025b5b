//! Virtual addresses of services as a container must know them, and which of its connections must end.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use skep_common::ServiceId;

use super::NetworkTable;

/// The virtual addresses in one container, each with its backends in the order of their turns.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Vips(pub BTreeMap<IpAddr, Vec<IpAddr>>);

/// One change of one virtual address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VipOp {
    /// Translates an address.
    Add(IpAddr, Vec<IpAddr>),
    /// Gives an address other backends, and starts its turns again.
    Replace(IpAddr, Vec<IpAddr>),
    /// Translates an address no longer.
    Delete(IpAddr),
}

impl fmt::Display for VipOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (verb, address, backends) = match self {
            Self::Add(address, backends) => ("add", address, backends.as_slice()),
            Self::Replace(address, backends) => ("replace", address, backends.as_slice()),
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
    /// The virtual addresses of all services on `networks`, as the container of task `task_id` must
    /// know them.
    ///
    /// Every container begins its turns at another backend: a hundred clients that connect once each
    /// must not all reach the first.
    pub fn of<'a>(networks: impl IntoIterator<Item = &'a NetworkTable>, task_id: u128) -> Self {
        let mut vips = BTreeMap::new();
        for network in networks {
            for (service_id, service) in &network.services {
                let serving = network
                    .endpoints
                    .values()
                    .filter(|endpoint| endpoint.serving && endpoint.service_id == *service_id);
                let addresses: BTreeSet<IpAddr> =
                    serving.flat_map(|endpoint| endpoint.addresses.iter().copied()).collect();
                for vip in &service.virtual_ips {
                    let is_same_family = |address: &&IpAddr| address.is_ipv4() == vip.is_ipv4();
                    let mut backends: Vec<IpAddr> =
                        addresses.iter().filter(is_same_family).copied().collect();
                    rotate(&mut backends, task_id);
                    vips.insert(*vip, backends);
                }
            }
        }
        Self(vips)
    }

    /// The operations that turn `self` into `wanted`. An address whose backends are the same is named
    /// by none.
    pub fn diff(&self, wanted: &Self) -> Vec<VipOp> {
        let gone = self.0.keys().filter(|vip| !wanted.0.contains_key(vip));
        let mut ops: Vec<VipOp> = gone.map(|vip| VipOp::Delete(*vip)).collect();
        for (vip, backends) in &wanted.0 {
            match self.0.get(vip) {
                Some(present) if present == backends => {}
                Some(_) => ops.push(VipOp::Replace(*vip, backends.clone())),
                None => ops.push(VipOp::Add(*vip, backends.clone())),
            }
        }
        ops
    }

    /// Applies one operation, as the kernel does to its rules.
    pub fn apply(&mut self, op: &VipOp) {
        match op {
            VipOp::Add(vip, backends) | VipOp::Replace(vip, backends) => {
                self.0.insert(*vip, backends.clone());
            }
            VipOp::Delete(vip) => drop(self.0.remove(vip)),
        }
    }
}

fn rotate(backends: &mut [IpAddr], task_id: u128) {
    if let Ok(count) = u128::try_from(backends.len())
        && count > 1
    {
        // The low bits of an id that is drawn at random.
        let by = usize::try_from(task_id % count).expect("less than the number of backends");
        backends.rotate_left(by);
    }
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

/// What a container's connections are judged by.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Peers {
    subnets: Vec<IpNet>,
    /// Virtual addresses, and the services that they stand for.
    virtual_ips: BTreeMap<IpAddr, ServiceId>,
    /// Every endpoint, with its service and whether it serves.
    endpoints: BTreeMap<IpAddr, (ServiceId, bool)>,
}

impl Peers {
    /// The endpoints of the container's networks.
    pub fn of<'a>(networks: impl IntoIterator<Item = &'a NetworkTable>) -> Self {
        let mut peers = Self::default();
        for network in networks {
            peers.subnets.extend(&network.subnets);
            for (service_id, service) in &network.services {
                let vips = service.virtual_ips.iter();
                peers.virtual_ips.extend(vips.map(|vip| (*vip, *service_id)));
            }
            for endpoint in network.endpoints.values() {
                let of = (endpoint.service_id, endpoint.serving);
                peers.endpoints.extend(endpoint.addresses.iter().map(|address| (*address, of)));
            }
        }
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
        let address = connection.answers_from;
        if !self.subnets.iter().any(|subnet| subnet.contains(&address)) {
            return false;
        }
        match self.endpoints.get(&address) {
            None => true,
            Some((service_id, serving)) => {
                let is_translated = connection.destination != address;
                let stands_for = self.virtual_ips.get(&connection.destination);
                let is_backend = *serving && stands_for == Some(service_id);
                is_translated && !is_backend && connection.protocol != TCP
            }
        }
    }
}
