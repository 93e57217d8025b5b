//! What nodes know of each network: where its tasks are, who of them serves, and its services.
//!
//! The tables of a large swarm are large and most changes are small, so they are brought up to date
//! change by change: the cost of a pass depends on what changed. Two states share all that is equal in
//! them, so their difference is found without looking at the rest.
//!
//! # Invariants
//!
//! - The tables are a function of the state and of the silent nodes: fed change by change they equal
//!   those made anew.
//! - A table that did not change is the same allocation as before.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use imbl::OrdMap;
use ipnet::IpNet;
use skep_common::placeholder::{self, NodeFacts};
use skep_common::spec::PortProtocol;
use skep_common::{Network, NetworkId, Node, NodeId, Service, ServiceId, Task, TaskId};

use super::{Update, difference, is_serving};
use crate::network;
use crate::store::{State, changed};

/// What nodes must know of a network to make it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settings {
    /// Its name.
    pub name: String,
    /// Its VXLAN network identifier.
    pub vni: u32,
    /// One IPv4 subnet, and one of IPv6 where it has that.
    pub subnets: Vec<IpNet>,
    /// MTU of its interfaces; 0 is what the tunnel leaves.
    pub mtu: u32,
    /// Whether it has no way out.
    pub internal: bool,
    /// Whether its traffic between nodes is encrypted.
    pub encrypted: bool,
}

/// A task that is placed and has not ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Its service.
    pub service_id: ServiceId,
    /// Of its container: `service.slot.task`.
    pub name: String,
    /// The host name that its service asks for.
    pub hostname: Option<String>,
    /// IPv4, and IPv6 where the network has it.
    pub addresses: Vec<IpAddr>,
    /// The number of its node.
    pub node_number: u16,
    /// Whether it is balanced to, and named in answers.
    pub serving: bool,
}

/// A service that names the network and is not on its way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkService {
    /// Its name.
    pub name: String,
    /// More names on this network.
    pub aliases: Vec<String>,
    /// None: its names mean the serving tasks.
    pub virtual_ips: Vec<IpAddr>,
    /// Published ports that have a name.
    pub ports: Vec<NamedPort>,
}

/// A published port that has a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedPort {
    /// Its name.
    pub name: String,
    /// Its protocol.
    pub protocol: PortProtocol,
    /// The port that containers listen on.
    pub target_port: u16,
}

/// One network.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NetworkTable {
    /// How it is made.
    pub settings: Settings,
    /// Tasks, on whichever node.
    pub endpoints: OrdMap<TaskId, Arc<Endpoint>>,
    /// Services.
    pub services: OrdMap<ServiceId, Arc<NetworkService>>,
}

/// What makes one table of another.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NetworkChanges {
    /// Whether it replaces everything that was known.
    pub is_whole: bool,
    /// Where they are new.
    pub settings: Option<Settings>,
    /// New or changed tasks.
    pub endpoints: BTreeMap<TaskId, Arc<Endpoint>>,
    /// Tasks that ended.
    pub removed_endpoints: Vec<TaskId>,
    /// New or changed services.
    pub services: BTreeMap<ServiceId, Arc<NetworkService>>,
    /// Services that left.
    pub removed_services: Vec<ServiceId>,
}

impl NetworkTable {
    /// What makes `new` of `old`, or of nothing.
    pub fn diff(old: Option<&Self>, new: &Self) -> NetworkChanges {
        let nothing = Self::default();
        let is_whole = old.is_none();
        let old = old.unwrap_or(&nothing);
        let (endpoints, removed_endpoints) = difference(&old.endpoints, &new.endpoints);
        let (services, removed_services) = difference(&old.services, &new.services);
        NetworkChanges {
            is_whole,
            settings: (is_whole || old.settings != new.settings).then(|| new.settings.clone()),
            endpoints,
            removed_endpoints,
            services,
            removed_services,
        }
    }

    /// Makes the changes, as a node does.
    pub fn apply(&mut self, changes: &NetworkChanges) {
        if changes.is_whole {
            *self = Self::default();
        }
        if let Some(settings) = &changes.settings {
            self.settings.clone_from(settings);
        }
        for task_id in &changes.removed_endpoints {
            self.endpoints.remove(task_id);
        }
        for service_id in &changes.removed_services {
            self.services.remove(service_id);
        }
        self.endpoints.extend(changes.endpoints.clone());
        self.services.extend(changes.services.clone());
    }
}

/// All networks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct NetworkTables {
    networks: BTreeMap<NetworkId, Arc<NetworkTable>>,
    /// How many endpoints of each network a node has.
    on_nodes: BTreeMap<(NodeId, NetworkId), usize>,
    /// Which endpoints each task has.
    of_tasks: BTreeMap<TaskId, Vec<(NodeId, NetworkId)>>,
    of_services: BTreeMap<ServiceId, Vec<NetworkId>>,
}

impl NetworkTables {
    /// The tables of a state, without the tasks of silent nodes among those that serve.
    pub(super) fn new(state: &State, not_in_balancer: &BTreeSet<NodeId>) -> Self {
        let mut tables = Self::default();
        let nobody = BTreeSet::new();
        tables.update((&State::default(), &nobody), (state, not_in_balancer));
        tables
    }

    /// The networks that tasks of a node are on.
    pub(super) fn of_node(
        &self,
        node_id: NodeId,
    ) -> impl Iterator<Item = (NetworkId, &Arc<NetworkTable>)> {
        let range = (node_id, NetworkId(0))..=(node_id, NetworkId(u128::MAX));
        let ids = self.on_nodes.range(range).map(|((_, network_id), _)| *network_id);
        ids.filter_map(|network_id| Some((network_id, self.networks.get(&network_id)?)))
    }

    /// Makes the tables of `new` of those of `old`.
    pub(super) fn update(
        &mut self,
        (old, old_silent): (&State, &BTreeSet<NodeId>),
        (new, silent): (&State, &BTreeSet<NodeId>),
    ) -> Update {
        let mut update = Update::default();
        for network_id in changed(old.networks(), new.networks()) {
            let network = new.network(network_id).map(|network| &**network);
            self.refresh_network(network_id, network, &mut update);
        }
        for service_id in changed(old.services(), new.services()) {
            let service = new.service(service_id).map(|service| &**service);
            self.refresh_service(service_id, service, &mut update);
        }
        let mut tasks: BTreeSet<TaskId> = changed(old.tasks(), new.tasks()).into_iter().collect();
        let mut nodes = changed(old.nodes(), new.nodes());
        nodes.extend(old_silent.symmetric_difference(silent));
        for node_id in nodes {
            tasks.extend(new.tasks_of_node(node_id).map(|task| task.id));
        }
        for task_id in tasks {
            self.refresh_task(new, silent, task_id, &mut update);
        }
        update
    }

    fn refresh_network(
        &mut self,
        network_id: NetworkId,
        network: Option<&Network>,
        update: &mut Update,
    ) {
        match network.filter(|network| network.vni != 0) {
            Some(network) => {
                let settings = settings(network);
                let is_known = |known: &Arc<NetworkTable>| known.settings == settings;
                if !self.networks.get(&network_id).is_some_and(is_known) {
                    Arc::make_mut(self.networks.entry(network_id).or_default()).settings = settings;
                    update.is_changed = true;
                }
            }
            None => update.is_changed |= self.networks.remove(&network_id).is_some(),
        }
    }

    fn refresh_service(
        &mut self,
        service_id: ServiceId,
        service: Option<&Service>,
        update: &mut Update,
    ) {
        let service = service.filter(|service| !service.pending_delete);
        let of_service = service.map(on_networks).unwrap_or_default();
        let old = self.of_services.remove(&service_id).unwrap_or_default();
        for network_id in old.iter().filter(|id| !of_service.contains_key(id)) {
            if let Some(table) = self.networks.get_mut(network_id) {
                Arc::make_mut(table).services.remove(&service_id);
                update.is_changed = true;
            }
        }
        if !of_service.is_empty() {
            self.of_services.insert(service_id, of_service.keys().copied().collect());
        }
        for (network_id, entry) in of_service {
            let Some(table) = self.networks.get_mut(&network_id) else { continue };
            if table.services.get(&service_id).is_none_or(|known| **known != entry) {
                Arc::make_mut(table).services.insert(service_id, Arc::new(entry));
                update.is_changed = true;
            }
        }
    }

    fn refresh_task(
        &mut self,
        state: &State,
        silent: &BTreeSet<NodeId>,
        task_id: TaskId,
        update: &mut Update,
    ) {
        let task = state.task(task_id).map(|task| &**task);
        let endpoints = task.map(|task| endpoints(state, silent, task)).unwrap_or_default();
        let old = self.of_tasks.remove(&task_id).unwrap_or_default();
        let served = old.iter().any(|(_, network_id)| self.is_serving(*network_id, task_id));
        let serves = endpoints.values().any(|endpoint| endpoint.serving);
        for place in old.iter().filter(|place| !endpoints.contains_key(place)) {
            self.count(*place, false);
            if let Some(table) = self.networks.get_mut(&place.1) {
                Arc::make_mut(table).endpoints.remove(&task_id);
            }
            update.is_changed = true;
        }
        if !endpoints.is_empty() {
            self.of_tasks.insert(task_id, endpoints.keys().copied().collect());
        }
        for (place, endpoint) in endpoints {
            if !old.contains(&place) {
                self.count(place, true);
                update.is_changed = true;
            }
            let Some(table) = self.networks.get_mut(&place.1) else { continue };
            if table.endpoints.get(&task_id).is_none_or(|known| **known != endpoint) {
                Arc::make_mut(table).endpoints.insert(task_id, Arc::new(endpoint));
                update.is_changed = true;
            }
        }
        if served && !serves {
            update.withdrawn.insert(task_id);
        }
        if serves && !served {
            update.returned.insert(task_id);
        }
    }

    pub(super) fn is_serving(&self, network_id: NetworkId, task_id: TaskId) -> bool {
        let table = self.networks.get(&network_id);
        let endpoint = table.and_then(|table| table.endpoints.get(&task_id));
        endpoint.is_some_and(|endpoint| endpoint.serving)
    }

    fn count(&mut self, place: (NodeId, NetworkId), is_more: bool) {
        let count = self.on_nodes.entry(place).or_default();
        *count = if is_more { *count + 1 } else { count.saturating_sub(1) };
        if *count == 0 {
            self.on_nodes.remove(&place);
        }
    }
}

fn settings(network: &Network) -> Settings {
    Settings {
        name: network.spec.name.clone(),
        vni: network.vni,
        subnets: network.subnets.iter().map(|subnet| subnet.subnet).collect(),
        mtu: network::mtu(&network.spec),
        internal: network.spec.internal.unwrap_or_default(),
        encrypted: network::is_encrypted(&network.spec),
    }
}

/// A service as each of its networks has it.
fn on_networks(service: &Service) -> BTreeMap<NetworkId, NetworkService> {
    let named = service.endpoint.ports.iter().filter_map(|port| {
        let name = port.name.clone().filter(|name| !name.is_empty())?;
        let protocol = port.protocol.unwrap_or_default();
        Some(NamedPort { name, protocol, target_port: port.target_port })
    });
    let ports: Vec<NamedPort> = named.collect();
    let configs = service.spec.networks().iter();
    let entries = configs.filter_map(|config| {
        let network_id: NetworkId = config.target.parse().ok()?;
        let of_network =
            service.endpoint.virtual_ips.iter().filter(|vip| vip.network_id == network_id);
        let entry = NetworkService {
            name: service.spec.name.clone(),
            aliases: config.aliases.clone().unwrap_or_default(),
            virtual_ips: of_network.map(|vip| vip.addr.addr()).collect(),
            ports: ports.clone(),
        };
        Some((network_id, entry))
    });
    entries.collect()
}

/// A task's endpoint on each of its networks, while it is placed and has not ended.
fn endpoints(
    state: &State,
    silent: &BTreeSet<NodeId>,
    task: &Task,
) -> BTreeMap<(NodeId, NetworkId), Endpoint> {
    let node = task.node_id.and_then(|node_id| state.node(node_id));
    let Some(node) = node.filter(|_| !task.status.state.is_terminal()) else {
        return BTreeMap::new();
    };
    let serving = is_serving(state, silent, task);
    let name = task.container_name();
    let hostname = hostname(task, node);
    let endpoints = task.networks_attachments.iter().filter_map(|place| {
        let v6 = place.ipv6.map(|net| IpAddr::V6(net.addr()));
        let endpoint = Endpoint {
            service_id: task.service_id,
            name: name.clone(),
            hostname: hostname.clone(),
            addresses: std::iter::once(IpAddr::V4(place.address)).chain(v6).collect(),
            node_number: node.number,
            serving,
        };
        Some(((node.id, place.network_id?), endpoint))
    });
    endpoints.collect()
}

/// The host name that a task's container has on its node, where its service asks for one.
fn hostname(task: &Task, node: &Node) -> Option<String> {
    let spec = task.spec.container_spec.as_ref()?;
    let asked = spec.hostname.as_ref().filter(|hostname| !hostname.is_empty())?;
    let facts = node.description.as_ref().map(|description| NodeFacts {
        node_id: node.id,
        hostname: description.hostname.clone(),
        architecture: description.platform.architecture.clone(),
    });
    // Where it cannot be filled in there is no container either.
    placeholder::expand(asked, task, &facts?).ok()
}
