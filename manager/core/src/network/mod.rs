//! What becomes of a network when it is created or removed, and of a service's wish to be on some.
//!
//! Each function makes the action that a control API proposes; the store checks once more what may
//! have changed in between (names, identifiers, users). A network is never changed: what tasks have
//! of it (addresses, the kernel's objects on their nodes) was made of it.
//!
//! Reading order: this file, `spec` (what is refused, which subnets a network gets), `addresses`
//! (which address is next), `virtual_ip`, `predefined` (networks that are not made).
//!
//! Source: SwarmKit `manager/controlapi/network.go`, docker `daemon/cluster/networks.go`. Differs from
//! SwarmKit: a network whose last tasks are still stopping can be removed, and its name is free at
//! once (moby#29293); subnets of networks may overlap, as long as no service is on both.

mod addresses;
mod attach;
mod predefined;
mod spec;
#[cfg(test)]
mod tests;
mod virtual_ip;

use std::net::IpAddr;
use std::sync::Arc;

use skep_common::spec::{NetworkSpec, Predefined, ServiceSpec};
use skep_common::{Meta, Network, NetworkId, Object, Task};

use crate::command::{Action, Expect};
use crate::store::{AddressOwner, State};

pub(crate) use addresses::Cursors;
pub(crate) use attach::{Wanted, attach, has_uplink, wanted_by, wants_uplink};
pub use attach::{needs_uplink, resolve, targets};
pub use predefined::documents as predefined;
pub use spec::{DEFAULT_POOL, DEFAULT_SUBNET_SIZE, parse_pools, pools};
pub(crate) use spec::{is_encrypted, mtu};
pub(crate) use virtual_ip::is_incomplete;
pub use virtual_ip::virtual_ips;

/// The first identifier of overlays: far from those of Swarm (from 4096 on) and from the mesh's own.
pub const VNI_MIN: u32 = 0x5000;
/// The last one: the low 16 bits name a network's IPv6 subnet, so they must differ.
pub const VNI_MAX: u32 = 0xffff;
const N_VNIS: u32 = VNI_MAX - VNI_MIN + 1;

/// Why a request about a network is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The network cannot be made, or the service cannot be on it, as asked.
    #[error("{0}")]
    Invalid(String),
    /// Choose another name, or use that network.
    #[error("network with name {name} already exists")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// No network has this name or id.
    #[error("network {target} not found")]
    NotFound {
        /// What was asked for.
        target: String,
    },
    /// Remove its user first, or take it off the network.
    #[error("network {name} is in use by {user}")]
    InUse {
        /// The network.
        name: String,
        /// A service on it, or a container that no service made, with its kind.
        user: String,
    },
    /// Every node has it.
    #[error("operation is not permitted on predefined {name} network")]
    Reserved {
        /// Its name.
        name: String,
    },
    /// The routing mesh needs it, or every node has it.
    #[error("{name} is a pre-defined network and cannot be removed")]
    Predefined {
        /// Its name.
        name: String,
    },
    /// Remove networks that nobody uses, or give a subnet.
    #[error("{0}")]
    Exhausted(String),
}

/// A network made of `spec`, with the identifier and the subnets that it was given.
pub fn create(
    state: &State,
    id: NetworkId,
    spec: NetworkSpec,
) -> Result<(NetworkId, Action), Error> {
    spec::check(&spec)?;
    if Predefined::find(&spec.name).is_some() {
        return Err(Error::Reserved { name: spec.name });
    }
    if state.network_by_name(&spec.name).is_some() {
        return Err(Error::NameTaken { name: spec.name });
    }
    let vni = identifier(state, id).ok_or_else(|| {
        Error::Exhausted(format!("the swarm has its limit of {N_VNIS} networks: remove some"))
    })?;
    let subnets = spec::subnets(state, &spec, vni)?;
    let meta = Meta::default();
    let network = Network { id, meta, spec, vni, subnets, pending_delete: false };
    Ok((id, put(network, Expect::Absent)))
}

/// A free identifier. Where the search begins follows from the network's id, so that one that was free a
/// moment ago, and that nodes may still be taking down, is seldom given again at once.
fn identifier(state: &State, id: NetworkId) -> Option<u32> {
    let start =
        u32::try_from(id.0 % u128::from(N_VNIS)).expect("less than the number of identifiers");
    let is_free = |vni: &u32| state.vni_owner(*vni).is_none();
    (0..N_VNIS).map(|step| VNI_MIN + (start + step) % N_VNIS).find(is_free)
}

/// The network on its way out: its name is free at once, and it is erased with the last task on it.
/// `None` where it is on its way already.
pub fn remove(state: &State, network: &Network) -> Result<Option<Action>, Error> {
    if network.pending_delete {
        return Ok(None);
    }
    let name = || network.spec.name.clone();
    let is_predefined = Predefined::ALL.iter().any(|one| one.id() == network.id);
    if is_predefined || network.spec.ingress.unwrap_or_default() {
        return Err(Error::Predefined { name: name() });
    }
    if let Some(service) = user(state, network.id) {
        return Err(Error::InUse { name: name(), user: format!("service {service}") });
    }
    let stays = |task: &&Arc<Task>| task.standalone.is_some() && task.desired_state.wants_run();
    if let Some(container) = tasks_on(state, network.id).find(stays) {
        let user = format!("container {}", container.name());
        return Err(Error::InUse { name: name(), user });
    }
    Ok(Some(leaving(network)))
}

/// The same where tasks may go on there that an update is about to replace: `None` where a service's
/// spec names it.
pub(crate) fn prune(state: &State, network: &Network) -> Option<Action> {
    let is_used = network.pending_delete || state.user_of_network(network.id).is_some();
    (!is_used).then(|| leaving(network))
}

fn leaving(network: &Network) -> Action {
    let mut removed = network.clone();
    removed.pending_delete = true;
    put(removed, Expect::Version(network.meta.version))
}

/// The name of a service that uses a network: its spec names it, or its tasks are to go on there.
fn user(state: &State, network_id: NetworkId) -> Option<String> {
    if let Some(service) = state.user_of_network(network_id) {
        return Some(service.spec.name.clone());
    }
    let mut tasks = tasks_on(state, network_id);
    let goes_on = |task: &&Arc<Task>| {
        let service = state.service(task.service_id);
        task.desired_state.wants_run() && service.is_some_and(|s| !s.pending_delete)
    };
    tasks.find(goes_on).map(|task| task.service_name.clone())
}

/// The tasks on a network that have not ended.
fn tasks_on(state: &State, network_id: NetworkId) -> impl Iterator<Item = &Arc<Task>> {
    let owners = state.network_addresses(network_id, FIRST, LAST).map(|(_, owner)| owner);
    owners.filter_map(|owner| match owner {
        AddressOwner::Task(task_id) => state.task(task_id),
        AddressOwner::Network | AddressOwner::Service(_) => None,
    })
}

/// Before and behind every address of a network.
const FIRST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
const LAST: IpAddr = IpAddr::V6(std::net::Ipv6Addr::from_bits(u128::MAX));

fn put(network: Network, expect: Expect) -> Action {
    Action::Put { object: Object::Network(Box::new(network)), expect }
}

/// Addresses of a network that nobody gets: gateways and auxiliary ones.
pub(crate) fn reserved_addresses(network: &Network) -> impl Iterator<Item = IpAddr> {
    let gateways = network.subnets.iter().map(|subnet| subnet.gateway);
    let configs = network.spec.ipam.iter().flat_map(|ipam| ipam.config.iter().flatten());
    let auxiliary = configs.flat_map(|config| config.auxiliary_addresses.iter().flatten());
    let auxiliary = auxiliary.filter_map(|(_, text)| text.parse::<IpAddr>().ok());
    gateways.chain(auxiliary)
}

/// The networks of a stack, by id, without those on their way out.
pub fn of_stack<'a>(state: &'a State, stack: &'a str) -> impl Iterator<Item = &'a Arc<Network>> {
    let is_of = move |network: &&Arc<Network>| {
        let labels = network.spec.labels.as_ref();
        let label = labels.and_then(|labels| labels.get(crate::stack::NAMESPACE_LABEL));
        !network.pending_delete && label.is_some_and(|label| label == stack)
    };
    state.networks().values().filter(is_of)
}

/// Whether every network that a spec names is there: a spec of the past may name one that is gone.
pub(crate) fn are_there(state: &State, spec: &ServiceSpec) -> bool {
    let is_there = |id| state.network(id).is_some_and(|network| !network.pending_delete);
    targets(spec).all(is_there)
}
