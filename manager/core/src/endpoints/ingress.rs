//! What nodes know of published ports, and of each other.
//!
//! The table is of the whole swarm and most changes are small, so it is brought up to date change by
//! change, as the networks' tables are.
//!
//! # Invariants
//!
//! - The table is a function of the state and of the silent nodes: fed change by change it equals the
//!   one made anew.
//! - A port is one service's, which the store sees to.
//! - A table that did not change is the same allocation as before, and so is each of its parts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use imbl::OrdMap;
use skep_common::spec::{IngressPolicy, PortConfig, PortProtocol, ProxyProtocol, PublishMode};
use skep_common::wireguard::WireguardKeys;
use skep_common::{Node, NodeId, Service, ServiceId, TaskId};

use super::{Update, difference, is_serving};
use crate::store::{State, changed};

/// What a node must know to serve every published port.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Table {
    /// All nodes, by node number.
    pub peers: OrdMap<u16, Arc<Peer>>,
    /// Published ports.
    pub ports: OrdMap<PortKey, Arc<Port>>,
}

/// A port of the swarm.
pub type PortKey = (PortProtocol, u16);

/// How a node is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its underlay address.
    pub underlay: Ipv4Addr,
    /// Its IPv6 addresses; `None` where it serves IPv4 alone.
    pub ipv6: Option<BTreeSet<Ipv6Addr>>,
    /// Its keys, where it takes part in encrypted networks.
    pub wireguard: Option<WireguardKeys>,
    /// The node itself.
    pub node_id: NodeId,
    /// Where its daemon listens at the underlay address.
    pub port: u16,
    /// Whether its daemon balances, so that no tunnel leads to its tasks.
    pub is_in_user_space: bool,
}

/// A port that answers on every node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// The service that publishes it.
    pub service_id: ServiceId,
    /// Its name.
    pub service: String,
    /// The port that its containers listen on.
    pub target_port: u16,
    /// Which of the tasks a node sends connections to.
    pub policy: IngressPolicy,
    /// How tasks are told of clients.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Addresses of the tasks behind it; none means that connections are refused.
    pub backends: OrdMap<TaskId, Ipv4Addr>,
}

/// Packet marks have 12 bits for the number of a node, and 4095 stays free: nodes beyond take no part in the
/// mesh.
const MESH_NUMBER_MAX: u16 = 4094;

/// The table of a state, without the tasks of nodes in `not_in_balancer`.
pub fn table(state: &State, not_in_balancer: &BTreeSet<NodeId>) -> Table {
    (**Ingress::new(state, not_in_balancer).table()).clone()
}

/// What makes one table of another.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TableChanges {
    /// New peers, and those with other addresses or keys.
    pub peers: BTreeMap<u16, Arc<Peer>>,
    /// Peers that are gone.
    pub removed_peers: Vec<u16>,
    /// New or changed ports, each whole.
    pub ports: BTreeMap<PortKey, Arc<Port>>,
    /// Ports that are published no more.
    pub removed_ports: Vec<PortKey>,
}

/// What makes `new` of `old`.
pub fn diff(old: &Table, new: &Table) -> TableChanges {
    let (peers, removed_peers) = difference(&old.peers, &new.peers);
    let (ports, removed_ports) = difference(&old.ports, &new.ports);
    TableChanges { peers, removed_peers, ports, removed_ports }
}

impl Table {
    /// Makes the changes, as a node does.
    pub fn apply(&mut self, changes: &TableChanges) {
        for number in &changes.removed_peers {
            self.peers.remove(number);
        }
        for key in &changes.removed_ports {
            self.ports.remove(key);
        }
        self.peers.extend(changes.peers.clone());
        self.ports.extend(changes.ports.clone());
    }
}

/// The table, and what brings it up to date.
#[derive(Debug, Default)]
pub(super) struct Ingress {
    table: Arc<Table>,
    numbers: BTreeMap<NodeId, u16>,
    published: BTreeMap<ServiceId, Published>,
    /// The service of each task that is behind a port.
    of_tasks: BTreeMap<TaskId, ServiceId>,
}

/// What a service publishes.
#[derive(Debug, Default)]
struct Published {
    keys: Vec<PortKey>,
    backends: OrdMap<TaskId, Ipv4Addr>,
}

impl Ingress {
    /// The table of a state, without the tasks of silent nodes.
    pub(super) fn new(state: &State, not_in_balancer: &BTreeSet<NodeId>) -> Self {
        let mut ingress = Self::default();
        let nobody = BTreeSet::new();
        ingress.update((&State::default(), &nobody), (state, not_in_balancer));
        ingress
    }

    pub(super) fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// Whether a task is behind a published port.
    pub(super) fn is_backend(&self, task_id: TaskId) -> bool {
        self.of_tasks.contains_key(&task_id)
    }

    /// Makes the table of `new` of the one of `old`.
    pub(super) fn update(
        &mut self,
        (old, old_silent): (&State, &BTreeSet<NodeId>),
        (new, silent): (&State, &BTreeSet<NodeId>),
    ) -> Update {
        let mut update = Update::default();
        let nodes = changed(old.nodes(), new.nodes());
        update.is_changed |= self.refresh_peers(new, &nodes);
        let services = changed(old.services(), new.services());
        let mut tasks: BTreeSet<TaskId> = changed(old.tasks(), new.tasks()).into_iter().collect();
        for node_id in nodes.iter().chain(old_silent.symmetric_difference(silent)) {
            tasks.extend(new.tasks_of_node(*node_id).map(|task| task.id));
        }
        for service_id in &services {
            let is_known = self.published.contains_key(service_id);
            if !is_known && new.service(*service_id).is_some_and(|one| ingress_ports(one).is_some())
            {
                tasks.extend(new.tasks_of_service(*service_id).map(|task| task.id));
                self.published.insert(*service_id, Published::default());
            }
        }
        let mut touched: BTreeSet<ServiceId> = BTreeSet::new();
        for task_id in tasks {
            touched.extend(self.refresh_task(new, silent, task_id, &mut update));
        }
        // A port may go from one service to another in one step: all are taken before any is given.
        let gone = services.iter().filter(|id| self.published.contains_key(id));
        let gone: Vec<ServiceId> = gone.copied().collect();
        let mut ports = self.table.ports.clone();
        for service_id in &gone {
            self.withdraw_ports(new, *service_id, &mut ports, &mut update);
        }
        touched.extend(gone);
        for service_id in touched {
            self.publish(new, service_id, &mut ports);
        }
        if !ports.ptr_eq(&self.table.ports) && ports != self.table.ports {
            Arc::make_mut(&mut self.table).ports = ports;
            update.is_changed = true;
        }
        update
    }

    fn refresh_peers(&mut self, state: &State, nodes: &[NodeId]) -> bool {
        let mut peers = self.table.peers.clone();
        for number in nodes.iter().filter_map(|node_id| self.numbers.remove(node_id)) {
            peers.remove(&number);
        }
        for node in nodes.iter().filter_map(|node_id| state.node(*node_id)) {
            let Some(peer) = peer(node) else { continue };
            let same = self.table.peers.get(&node.number).filter(|known| ***known == peer);
            peers.insert(node.number, same.cloned().unwrap_or_else(|| Arc::new(peer)));
            self.numbers.insert(node.id, node.number);
        }
        let is_changed = !peers.ptr_eq(&self.table.peers) && peers != self.table.peers;
        if is_changed {
            Arc::make_mut(&mut self.table).peers = peers;
        }
        is_changed
    }

    /// The service whose backends that changed.
    fn refresh_task(
        &mut self,
        state: &State,
        silent: &BTreeSet<NodeId>,
        task_id: TaskId,
        update: &mut Update,
    ) -> Option<ServiceId> {
        let task = state.task(task_id);
        let service_id =
            task.map(|task| task.service_id).or_else(|| self.of_tasks.get(&task_id).copied())?;
        let published = self.published.get_mut(&service_id)?;
        let address = task.filter(|task| is_serving(state, silent, task));
        let address = address.and_then(|task| task.ingress_address());
        if published.backends.get(&task_id).copied() == address {
            return None;
        }
        match address {
            Some(address) => {
                if published.backends.insert(task_id, address).is_none() {
                    update.returned.insert(task_id);
                }
                self.of_tasks.insert(task_id, service_id);
            }
            None => {
                published.backends.remove(&task_id);
                self.of_tasks.remove(&task_id);
                update.withdrawn.insert(task_id);
            }
        }
        Some(service_id)
    }

    /// Takes back the ports that a changed service had, and its tasks where it publishes none any more.
    fn withdraw_ports(
        &mut self,
        state: &State,
        service_id: ServiceId,
        ports: &mut OrdMap<PortKey, Arc<Port>>,
        update: &mut Update,
    ) {
        let Some(published) = self.published.get_mut(&service_id) else { return };
        for key in published.keys.drain(..) {
            ports.remove(&key);
        }
        if state.service(service_id).is_some_and(|service| ingress_ports(service).is_some()) {
            return;
        }
        for task_id in published.backends.keys() {
            self.of_tasks.remove(task_id);
            update.withdrawn.insert(*task_id);
        }
        self.published.remove(&service_id);
    }

    fn publish(
        &mut self,
        state: &State,
        service_id: ServiceId,
        ports: &mut OrdMap<PortKey, Arc<Port>>,
    ) {
        let Some(published) = self.published.get_mut(&service_id) else { return };
        let Some(service) = state.service(service_id) else { return };
        let endpoint = service.spec.endpoint_spec.as_ref();
        published.keys.clear();
        for (key, port) in ingress_ports(service).into_iter().flatten() {
            let entry = Port {
                service_id,
                service: service.spec.name.clone(),
                target_port: port.target_port,
                policy: endpoint.and_then(|endpoint| endpoint.ingress_policy).unwrap_or_default(),
                proxy_protocol: port.proxy_protocol,
                backends: published.backends.clone(),
            };
            published.keys.push(key);
            let same = self.table.ports.get(&key).filter(|known| ***known == entry);
            ports.insert(key, same.cloned().unwrap_or_else(|| Arc::new(entry)));
        }
    }
}

/// The ports that every node answers on for a service; `None` where it has none.
fn ingress_ports(service: &Service) -> Option<Vec<(PortKey, &PortConfig)>> {
    let ports = service.endpoint.ports.iter();
    let ingress = ports
        .filter(|port| port.publish_mode.unwrap_or_default() == PublishMode::Ingress)
        .filter_map(|port| Some((port, port.published_port.filter(|number| *number != 0)?)))
        .map(|(port, published)| ((port.protocol.unwrap_or_default(), published), port));
    Some(ingress.collect::<Vec<_>>()).filter(|ports| !ports.is_empty())
}

/// How others reach a node; `None` where it has no part in the mesh.
fn peer(node: &Node) -> Option<Peer> {
    if node.number > MESH_NUMBER_MAX {
        return None;
    }
    let description = node.description.as_ref();
    let keys = description.and_then(|description| description.wireguard.as_ref());
    let keys = keys.filter(|keys| !keys.public.keys.is_empty());
    Some(Peer {
        // An address that is not IPv4 has no part in the mesh.
        underlay: node.status.addr.parse().ok()?,
        ipv6: description.and_then(|description| description.ipv6_addresses.clone()),
        wireguard: keys.map(|keys| keys.public.clone()),
        node_id: node.id,
        port: node.port(),
        is_in_user_space: description.is_some_and(|description| description.is_in_user_space()),
    })
}
