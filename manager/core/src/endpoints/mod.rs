//! Which task answers on which published port and on which network, and when a task may stop.
//!
//! [`table`] is what every node programs into its kernel: equal states give equal tables. Of networks
//! ([`networks`]) a node has those that its tasks are on. [`Drain`] numbers the tables, and holds the
//! stop of a task back until the nodes have taken it out.
//!
//! # Invariants
//!
//! - A backend is running, healthy, wanted, and on a node that is not silent.
//! - A task that was in the table is told to stop when every node with a live session acknowledged a
//!   table without it, and in any case [`DRAIN_ACK_WAIT`] after it was taken out. The nodes that were not
//!   waited for any longer are named.
//! - Tables differ in version exactly where they differ. A node that is told nothing of a version has it.

pub mod networks;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use skep_common::limits::DRAIN_ACK_WAIT;
use skep_common::mistakes::{self, Mistake};
use skep_common::serving::withheld;
use skep_common::spec::{IngressPolicy, PortProtocol, ProxyProtocol, PublishMode};
use skep_common::wireguard::WireguardKeys;
use skep_common::{NetworkId, NodeId, ServiceId, Task, TaskId, TaskState, Timestamp};

use crate::store::State;
use networks::{NetworkChanges, NetworkTable, NetworkTables};

/// What a node must know to serve every published port.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Table {
    /// All nodes, by node number.
    pub peers: BTreeMap<u16, Peer>,
    /// Published ports.
    pub ports: BTreeMap<(PortProtocol, u16), Port>,
}

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
    pub backends: BTreeMap<TaskId, Ipv4Addr>,
}

/// Packet marks have 12 bits for the number of a node, and 4095 stays free: nodes beyond take no part in the
/// mesh.
const MESH_NUMBER_MAX: u16 = 4094;

/// The table of a state, without the tasks of nodes in `not_in_balancer`.
pub fn table(state: &State, not_in_balancer: &BTreeSet<NodeId>) -> Table {
    let mut table = Table::default();
    let numbered = state.nodes().values().filter(|node| node.number <= MESH_NUMBER_MAX);
    for node in numbered {
        // An address that is not IPv4 has no part in the mesh.
        if let Ok(underlay) = node.status.addr.parse() {
            let description = node.description.as_ref();
            let ipv6 = description.and_then(|description| description.ipv6_addresses.clone());
            let keys = description.and_then(|description| description.wireguard.as_ref());
            let keys = keys.filter(|keys| !keys.public.keys.is_empty());
            let wireguard = keys.map(|keys| keys.public.clone());
            let is_in_user_space =
                description.is_some_and(|description| description.is_in_user_space());
            let (node_id, port) = (node.id, node.port());
            let peer = Peer { underlay, ipv6, wireguard, node_id, port, is_in_user_space };
            table.peers.insert(node.number, peer);
        }
    }
    for service in state.services().values() {
        let ports = service.endpoint.ports.iter();
        let mut ingress = ports
            .filter(|port| port.publish_mode.unwrap_or_default() == PublishMode::Ingress)
            .filter_map(|port| Some((port, port.published_port.filter(|number| *number != 0)?)))
            .peekable();
        if ingress.peek().is_none() {
            continue;
        }
        let tasks = state.tasks_of_service(service.id);
        let serving = tasks.filter(|task| is_serving(state, not_in_balancer, task));
        let backends: BTreeMap<TaskId, Ipv4Addr> =
            serving.filter_map(|task| Some((task.id, task.ingress_address()?))).collect();
        let endpoint = service.spec.endpoint_spec.as_ref();
        for (port, published) in ingress {
            let entry = Port {
                service_id: service.id,
                service: service.spec.name.clone(),
                target_port: port.target_port,
                policy: endpoint.and_then(|endpoint| endpoint.ingress_policy).unwrap_or_default(),
                proxy_protocol: port.proxy_protocol,
                backends: backends.clone(),
            };
            table.ports.insert((port.protocol.unwrap_or_default(), published), entry);
        }
    }
    table
}

fn is_serving(state: &State, not_in_balancer: &BTreeSet<NodeId>, task: &Task) -> bool {
    let is_silent = task.node_id.is_some_and(|node_id| not_in_balancer.contains(&node_id));
    let node = task.node_id.and_then(|node_id| state.node(node_id));
    !is_silent && withheld(task, node.map(|node| &**node)).is_none()
}

/// What makes one table of another.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TableChanges {
    /// New peers, and those with other addresses or keys.
    pub peers: BTreeMap<u16, Peer>,
    /// Peers that are gone.
    pub removed_peers: Vec<u16>,
    /// New or changed ports, each whole.
    pub ports: BTreeMap<(PortProtocol, u16), Port>,
    /// Ports that are published no more.
    pub removed_ports: Vec<(PortProtocol, u16)>,
}

/// What makes `new` of `old`.
pub fn diff(old: &Table, new: &Table) -> TableChanges {
    let peers = new.peers.iter().filter(|(number, peer)| old.peers.get(number) != Some(peer));
    let ports = new.ports.iter().filter(|(key, port)| old.ports.get(key) != Some(port));
    TableChanges {
        peers: peers.map(|(number, peer)| (*number, peer.clone())).collect(),
        removed_peers: old.peers.keys().filter(|n| !new.peers.contains_key(n)).copied().collect(),
        ports: ports.map(|(key, port)| (*key, port.clone())).collect(),
        removed_ports: old
            .ports
            .keys()
            .filter(|key| !new.ports.contains_key(key))
            .copied()
            .collect(),
    }
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

    fn backends(&self) -> BTreeSet<TaskId> {
        self.ports.values().flat_map(|port| port.backends.keys().copied()).collect()
    }
}

/// All that one node must know.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeTable {
    /// Published ports and peers.
    pub table: Arc<Table>,
    /// The networks that tasks of the node are on.
    pub networks: BTreeMap<NetworkId, Arc<NetworkTable>>,
}

/// What makes one node's table of another.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeChanges {
    /// Of published ports and peers.
    pub table: TableChanges,
    /// New networks whole, and changes of the others.
    pub networks: BTreeMap<NetworkId, NetworkChanges>,
    /// Networks that no task of the node is on any more.
    pub removed_networks: Vec<NetworkId>,
}

impl NodeTable {
    /// Whether both are the very same: what does not change is not copied.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.table, &other.table)
            && self.networks.len() == other.networks.len()
            && self.networks.iter().all(|(network_id, table)| {
                other.networks.get(network_id).is_some_and(|other| Arc::ptr_eq(table, other))
            })
    }

    /// What makes `new` of it.
    pub fn diff(&self, new: &Self) -> NodeChanges {
        let is_same = Arc::ptr_eq(&self.table, &new.table);
        let mut changes = NodeChanges {
            table: if is_same { TableChanges::default() } else { diff(&self.table, &new.table) },
            ..NodeChanges::default()
        };
        for (network_id, table) in &new.networks {
            match self.networks.get(network_id) {
                Some(old) if Arc::ptr_eq(old, table) => {}
                old => {
                    let change = NetworkTable::diff(old.map(|old| &**old), table);
                    changes.networks.insert(*network_id, change);
                }
            }
        }
        let gone = self.networks.keys().filter(|id| !new.networks.contains_key(id));
        changes.removed_networks.extend(gone);
        changes
    }

    /// Makes the changes, as a node does.
    pub fn apply(&mut self, changes: &NodeChanges) {
        Arc::make_mut(&mut self.table).apply(&changes.table);
        for network_id in &changes.removed_networks {
            self.networks.remove(network_id);
        }
        for (network_id, changes) in &changes.networks {
            Arc::make_mut(self.networks.entry(*network_id).or_default()).apply(changes);
        }
    }
}

/// How far one node's session is.
#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    /// The version that is in its kernel, as it said.
    acknowledged: u64,
    /// The last version that it was sent.
    sent: u64,
    /// The last version up to which there was nothing more to send.
    current: u64,
}

impl Progress {
    fn version(self) -> u64 {
        match self.acknowledged >= self.sent {
            true => self.current.max(self.acknowledged),
            false => self.acknowledged,
        }
    }
}

fn is_to_stop(state: &State, task_id: TaskId) -> bool {
    state.task(task_id).is_some_and(|task| !task.desired_state.wants_run())
}

/// How many bits of a version count the tables of one leader; those above are its term.
const VERSION_BITS: u32 = 32;

/// The newest table, and the tasks that wait until nodes have it.
#[derive(Debug)]
pub struct Drain {
    version: u64,
    table: Arc<Table>,
    networks: NetworkTables,
    /// What the tables were made of.
    state: State,
    not_in_balancer: BTreeSet<NodeId>,
    /// Tasks that were taken out: by which version, when.
    withdrawn: BTreeMap<TaskId, (u64, Timestamp)>,
    /// Tasks that nobody waits for any longer although nodes may still balance to them, by the version
    /// that took them out.
    overdue: BTreeMap<TaskId, u64>,
    /// The nodes with a live session.
    sessions: BTreeMap<NodeId, Progress>,
}

impl Drain {
    /// Starts to lead. Tasks that are to stop may still be in the tables of nodes, so they count as
    /// withdrawn now.
    pub fn new(state: &State, not_in_balancer: &BTreeSet<NodeId>, now: Timestamp) -> Self {
        let is_balanced_to = |task: &Task| {
            let service = state.service(task.service_id);
            service.is_some_and(|service| !service.endpoint.ports.is_empty())
                || task.networks_attachments.iter().any(|place| place.network_id.is_some())
        };
        let stopping = state.tasks().values().filter(|task| {
            !task.desired_state.wants_run()
                && task.status.state == TaskState::Running
                && is_balanced_to(task)
        });
        Self {
            version: 1,
            table: Arc::new(table(state, not_in_balancer)),
            networks: NetworkTables::new(state, not_in_balancer),
            state: state.clone(),
            not_in_balancer: not_in_balancer.clone(),
            withdrawn: stopping.map(|task| (task.id, (1, now))).collect(),
            overdue: BTreeMap::new(),
            sessions: BTreeMap::new(),
        }
    }

    /// Has versions of a term that are higher than all of earlier terms, so that nodes can tell whose is newer.
    #[must_use]
    pub fn in_term(mut self, term: u64) -> Self {
        let first = term << VERSION_BITS;
        self.version += first;
        for (version, _) in self.withdrawn.values_mut() {
            *version += first;
        }
        self
    }

    /// The number of the newest table, which grows with each.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Published ports and peers.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// All that a node must know.
    pub fn of_node(&self, node_id: NodeId) -> NodeTable {
        let networks = self.networks.of_node(node_id);
        let networks = networks.map(|(id, table)| (id, table.clone())).collect();
        NodeTable { table: self.table.clone(), networks }
    }

    /// Takes over a new state; says whether the tables changed.
    pub fn update(
        &mut self,
        state: &State,
        not_in_balancer: &BTreeSet<NodeId>,
        now: Timestamp,
    ) -> bool {
        if state.version() == self.state.version() && *not_in_balancer == self.not_in_balancer {
            return false;
        }
        let old = (&self.state, &self.not_in_balancer);
        let on_networks = self.networks.update(old, (state, not_in_balancer));
        let new = table(state, not_in_balancer);
        let are_ports_changed = new != *self.table;
        let is_changed = are_ports_changed || on_networks.is_changed;
        if is_changed {
            self.version += 1;
            let was_serving = self.table.backends();
            let mut serving = new.backends();
            serving.extend(&on_networks.returned);
            let gone = was_serving.iter().chain(&on_networks.withdrawn);
            for task_id in gone.filter(|task_id| !serving.contains(task_id)) {
                self.withdrawn.insert(*task_id, (self.version, now));
            }
            self.withdrawn.retain(|task_id, _| !serving.contains(task_id));
            self.overdue.retain(|task_id, _| !serving.contains(task_id));
        }
        if are_ports_changed {
            self.table = Arc::new(new);
        }
        let is_stoppable = |task_id: &TaskId| {
            state.task(*task_id).is_some_and(|task| !task.status.state.is_terminal())
        };
        self.withdrawn.retain(|task_id, _| is_stoppable(task_id));
        self.overdue.retain(|task_id, _| is_stoppable(task_id));
        self.state = state.clone();
        self.not_in_balancer.clone_from(not_in_balancer);
        is_changed
    }

    /// A node has a live session.
    pub fn session_opened(&mut self, node_id: NodeId) {
        self.sessions.insert(node_id, Progress::default());
    }

    /// A node's session ended: nobody waits for it.
    pub fn session_closed(&mut self, node_id: NodeId) {
        self.sessions.remove(&node_id);
    }

    /// A node was sent the newest table.
    pub fn sent(&mut self, node_id: NodeId) {
        if let Some(progress) = self.sessions.get_mut(&node_id) {
            (progress.sent, progress.current) = (self.version, self.version);
        }
    }

    /// The newest table has nothing new for a node, which is not told of it.
    pub fn has_no_news_for(&mut self, node_id: NodeId) {
        if let Some(progress) = self.sessions.get_mut(&node_id) {
            progress.current = self.version;
        }
    }

    /// A node's kernel has this version.
    pub fn acknowledge(&mut self, node_id: NodeId, version: u64) {
        if let Some(progress) = self.sessions.get_mut(&node_id) {
            progress.acknowledged = version.max(progress.acknowledged);
        }
    }

    /// Tasks that are to stop but whose node must not be told yet.
    pub fn held_back(&mut self, state: &State, now: Timestamp) -> BTreeSet<TaskId> {
        let oldest = self.oldest();
        let overdue = &mut self.overdue;
        self.withdrawn.retain(|task_id, (version, at)| {
            let is_in_time = now < at.after(DRAIN_ACK_WAIT);
            if oldest < *version && !is_in_time {
                overdue.insert(*task_id, *version);
            }
            oldest < *version && is_in_time
        });
        let is_stopping = |task_id: &&TaskId| is_to_stop(state, **task_id);
        if mistakes::is(Mistake::DrainWithoutWait) {
            return BTreeSet::new();
        }
        self.withdrawn.keys().filter(is_stopping).copied().collect()
    }

    /// Tasks that are told to stop now without the acknowledgement of some nodes, and those nodes. Each
    /// is given once.
    pub fn take_missed(&mut self, state: &State) -> BTreeMap<TaskId, Vec<NodeId>> {
        let oldest = self.oldest();
        let sessions = &self.sessions;
        let mut missed = BTreeMap::new();
        self.overdue.retain(|task_id, version| {
            if oldest >= *version {
                return false;
            }
            if !is_to_stop(state, *task_id) {
                return true;
            }
            let late = sessions.iter().filter(|(_, progress)| progress.version() < *version);
            missed.insert(*task_id, late.map(|(node_id, _)| *node_id).collect());
            false
        });
        missed
    }

    /// The version that every node with a live session has.
    fn oldest(&self) -> u64 {
        self.sessions.values().map(|progress| progress.version()).min().unwrap_or(u64::MAX)
    }

    /// When waiting for acknowledgements ends.
    pub fn deadline(&self) -> Option<Timestamp> {
        self.withdrawn.values().map(|(_, at)| at.after(DRAIN_ACK_WAIT)).min()
    }
}
