//! Which task answers on which published port and on which network, and when a task may stop.
//!
//! [`table`] is what every node programs into its kernel: equal states give equal tables. Of networks
//! ([`networks`]) a node has those that its tasks are on. [`Drain`] numbers the tables, and holds the
//! stop of a task back until the nodes have taken it out.
//!
//! # Invariants
//!
//! - A backend is running, healthy, wanted, and on a node that is not silent.
//! - A task that was in the table is told to stop when every node that may balance to it acknowledged a
//!   table without it, and in any case [`DRAIN_ACK_WAIT`] after it was taken out, or [`DRAIN_ACK_WAIT_HEARD`]
//!   where a node that lacks the table is heard. The nodes that were not waited for any longer are named. A node
//!   may balance while it has a session, and without one until it counts as down: its kernel needs no daemon.
//! - Tables differ in version exactly where they differ. A node that is told nothing of a version, or will be told of
//!   other nodes alone, has it.

mod ingress;
pub mod networks;
mod peer_news;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use skep_common::limits::{DRAIN_ACK_WAIT, DRAIN_ACK_WAIT_HEARD};
use skep_common::mistakes::{self, Mistake};
use skep_common::object::{Node, NodeState};
use skep_common::serving::withheld;
use skep_common::{NetworkId, NodeId, Task, TaskId, TaskState, Timestamp};

use crate::recovery::ELECTION_BITS;
use crate::store::State;
use ingress::Ingress;
pub use ingress::{Peer, Port, PortKey, Table, TableChanges, diff, table};
use networks::{NetworkChanges, NetworkTable, NetworkTables};
pub use peer_news::{PeerNews, Round};

fn is_serving(state: &State, not_in_balancer: &BTreeSet<NodeId>, task: &Task) -> bool {
    let is_silent = task.node_id.is_some_and(|node_id| not_in_balancer.contains(&node_id));
    let node = task.node_id.and_then(|node_id| state.node(node_id));
    !is_silent && withheld(task, node.map(|node| &**node)).is_none()
}

/// What an update did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Update {
    /// Whether any table changed.
    is_changed: bool,
    /// Tasks that served and do not any more.
    withdrawn: BTreeSet<TaskId>,
    /// Tasks that began to serve.
    returned: BTreeSet<TaskId>,
}

/// What is new or changed, and what is gone.
fn difference<K: Ord + Copy, V: PartialEq>(
    old: &OrdMap<K, Arc<V>>,
    new: &OrdMap<K, Arc<V>>,
) -> (BTreeMap<K, Arc<V>>, Vec<K>) {
    let (mut set, mut removed) = (BTreeMap::new(), Vec::new());
    for item in old.diff(new) {
        match item {
            DiffItem::Add(key, value) | DiffItem::Update { new: (key, value), .. } => {
                set.insert(*key, value.clone());
            }
            DiffItem::Remove(key, _) => removed.push(*key),
        }
    }
    (set, removed)
}

/// All that one node must know.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeTable {
    /// Published ports and peers.
    pub table: Arc<Table>,
    /// The networks that tasks of the node are on.
    pub networks: BTreeMap<NetworkId, Arc<NetworkTable>>,
}

/// What is new for a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// Nothing.
    None,
    /// Other nodes, and nothing that a connection or a name leads to.
    OfPeersAlone,
    /// Ports or networks.
    OfConnections,
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
    /// What `new` has that it has not: what does not change is not copied.
    fn news(&self, new: &Self) -> News {
        let has_same_networks = self.networks.len() == new.networks.len()
            && self.networks.iter().all(|(network_id, table)| {
                new.networks.get(network_id).is_some_and(|new| Arc::ptr_eq(table, new))
            });
        if !has_same_networks || !self.table.ports.ptr_eq(&new.table.ports) {
            News::OfConnections
        } else if Arc::ptr_eq(&self.table, &new.table) {
            News::None
        } else {
            News::OfPeersAlone
        }
    }

    /// What makes `new` of it.
    pub fn diff(&self, new: &Self) -> NodeChanges {
        let mut changes = self.diff_networks(new);
        if !Arc::ptr_eq(&self.table, &new.table) {
            changes.table = diff(&self.table, &new.table);
        }
        changes
    }

    /// The same of networks alone.
    pub fn diff_networks(&self, new: &Self) -> NodeChanges {
        let mut changes = NodeChanges::default();
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
    /// A stop was not held back any longer for it, and it has acknowledged nothing since.
    is_late: bool,
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

/// How many bits of a version count the tables of one leader, in a swarm as it was founded; those above are its term.
const VERSION_BITS: u32 = 32;
/// The same in a swarm that began anew. A leader of more tables goes on in the range of the next term.
const VERSION_BITS_ANEW: u32 = 24;

/// What the versions of a term are above. An epoch ([`ELECTION_BITS`]) keeps its place in the upper half; so many
/// elections as do not fit between it and the count take more than the second after which the next epoch may begin.
pub fn first_version(term: u64) -> u64 {
    let election = term & ((1 << ELECTION_BITS) - 1);
    match term - election {
        0 => election << VERSION_BITS,
        epoch => epoch.saturating_add(election << VERSION_BITS_ANEW),
    }
}

/// The newest table, and the tasks that wait until nodes have it.
#[derive(Debug)]
pub struct Drain {
    version: u64,
    ingress: Ingress,
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
    deadline: Option<Timestamp>,
}

impl Drain {
    /// Starts to lead. Tasks that run and are in none of its tables may still be in those of nodes, so they count as
    /// withdrawn now: also those whose service is gone, or has no port any more.
    pub fn new(state: &State, not_in_balancer: &BTreeSet<NodeId>, now: Timestamp) -> Self {
        let ingress = Ingress::new(state, not_in_balancer);
        let networks = NetworkTables::new(state, not_in_balancer);
        let is_balanced_to = |task: &Task| {
            let mut places = task.networks_attachments.iter().filter_map(|place| place.network_id);
            ingress.is_backend(task.id) || places.any(|id| networks.is_serving(id, task.id))
        };
        let running = state.tasks().values().filter(|task| task.status.state == TaskState::Running);
        let taken_out = running.filter(|task| !is_balanced_to(task));
        Self {
            version: 1,
            withdrawn: taken_out.map(|task| (task.id, (1, now))).collect(),
            ingress,
            networks,
            state: state.clone(),
            not_in_balancer: not_in_balancer.clone(),
            overdue: BTreeMap::new(),
            sessions: BTreeMap::new(),
            deadline: None,
        }
    }

    /// Has versions of a term that are higher than all of earlier terms, so that nodes can tell whose is newer.
    #[must_use]
    pub fn in_term(mut self, term: u64) -> Self {
        let first = first_version(term);
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
    pub fn table(&self) -> &Arc<Table> {
        self.ingress.table()
    }

    /// All that a node must know.
    pub fn of_node(&self, node_id: NodeId) -> NodeTable {
        let networks = self.networks.of_node(node_id);
        let networks = networks.map(|(id, table)| (id, table.clone())).collect();
        NodeTable { table: self.ingress.table().clone(), networks }
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
        let (old, new) = ((&self.state, &self.not_in_balancer), (state, not_in_balancer));
        let on_networks = self.networks.update(old, new);
        let on_ports = self.ingress.update(old, new);
        let is_changed = on_ports.is_changed || on_networks.is_changed;
        if is_changed {
            self.version += 1;
            let returned: BTreeSet<&TaskId> =
                on_ports.returned.iter().chain(&on_networks.returned).collect();
            for task_id in on_ports.withdrawn.iter().chain(&on_networks.withdrawn) {
                // What left a network may still answer on a port.
                if !returned.contains(task_id) && !self.ingress.is_backend(*task_id) {
                    self.withdrawn.insert(*task_id, (self.version, now));
                }
            }
            self.withdrawn.retain(|task_id, _| !returned.contains(task_id));
            self.overdue.retain(|task_id, _| !returned.contains(task_id));
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

    /// A node's session ended: it acknowledges nothing before it has another one.
    pub fn session_closed(&mut self, node_id: NodeId) {
        self.sessions.remove(&node_id);
    }

    /// A node was sent the newest table.
    pub fn sent(&mut self, node_id: NodeId) {
        if let Some(progress) = self.sessions.get_mut(&node_id) {
            (progress.sent, progress.current) = (self.version, self.version);
        }
    }

    /// What the newest table has for a node that was told that one. Nothing new it is not told, and no stop waits for it;
    /// nor for other nodes alone, of which it may be told later.
    pub fn news_for(&mut self, node_id: NodeId, told: &NodeTable) -> News {
        let news = told.news(&self.of_node(node_id));
        if news != News::OfConnections
            && let Some(progress) = self.sessions.get_mut(&node_id)
        {
            progress.current = self.version;
        }
        news
    }

    /// A node's kernel has this version.
    pub fn acknowledge(&mut self, node_id: NodeId, version: u64) {
        if let Some(progress) = self.sessions.get_mut(&node_id) {
            progress.acknowledged = version.max(progress.acknowledged);
            progress.is_late = false;
        }
    }

    /// Tasks that are to stop but whose node must not be told yet.
    pub fn held_back(&mut self, state: &State, now: Timestamp) -> BTreeSet<TaskId> {
        self.deadline = None;
        if self.withdrawn.is_empty() {
            return BTreeSet::new();
        }
        let (oldest, oldest_heard) = (self.oldest(state), self.oldest_of(Self::is_heard));
        let (overdue, deadline) = (&mut self.overdue, &mut self.deadline);
        let mut given_up = 0;
        self.withdrawn.retain(|task_id, (version, at)| {
            if oldest >= *version {
                return false;
            }
            let is_slow = oldest_heard < *version;
            let until = at.after(if is_slow { DRAIN_ACK_WAIT_HEARD } else { DRAIN_ACK_WAIT });
            if now >= until {
                overdue.insert(*task_id, *version);
                given_up = given_up.max(if is_slow { *version } else { 0 });
                return false;
            }
            *deadline = Some(deadline.map_or(until, |soonest: Timestamp| soonest.min(until)));
            true
        });
        for progress in self.sessions.values_mut() {
            progress.is_late |= progress.version() < given_up;
        }
        let is_stopping = |task_id: &&TaskId| is_to_stop(state, **task_id);
        if mistakes::is(Mistake::DrainWithoutWait) {
            return BTreeSet::new();
        }
        self.withdrawn.keys().filter(is_stopping).copied().collect()
    }

    /// Tasks that are told to stop now without the acknowledgement of some nodes, and those nodes. Each
    /// is given once.
    pub fn take_missed(&mut self, state: &State) -> BTreeMap<TaskId, Vec<NodeId>> {
        if self.overdue.is_empty() {
            return BTreeMap::new();
        }
        let oldest = self.oldest(state);
        let sessions = &self.sessions;
        let absent: Vec<NodeId> = self.absent(state).collect();
        let mut missed = BTreeMap::new();
        self.overdue.retain(|task_id, version| {
            if oldest >= *version {
                return false;
            }
            if !is_to_stop(state, *task_id) {
                return true;
            }
            let late = sessions.iter().filter(|(_, progress)| progress.version() < *version);
            let late = late.map(|(node_id, _)| *node_id).chain(absent.iter().copied());
            missed.insert(*task_id, late.collect());
            false
        });
        missed
    }

    /// The nodes that may balance by a table of before, and have no session.
    fn absent(&self, state: &State) -> impl Iterator<Item = NodeId> {
        let may_balance = |node: &&Arc<Node>| match node.status.state {
            NodeState::Ready | NodeState::Disconnected => true,
            NodeState::Unknown | NodeState::Down => false,
        };
        let nodes = state.nodes().values().filter(may_balance).map(|node| node.id);
        nodes.filter(|node_id| !self.sessions.contains_key(node_id))
    }

    /// The version that every node that may balance has.
    fn oldest(&self, state: &State) -> u64 {
        if self.absent(state).next().is_some() {
            return 0;
        }
        self.oldest_of(|_, _, _| true)
    }

    /// The version that each of those nodes with a session has.
    fn oldest_of(&self, is_one: impl Fn(&Self, NodeId, Progress) -> bool) -> u64 {
        let those = self.sessions.iter().filter(|(id, progress)| is_one(self, **id, **progress));
        those.map(|(_, progress)| progress.version()).min().unwrap_or(u64::MAX)
    }

    /// Whether a node with a session is at work, and did not keep a stop waiting in vain since its last acknowledgement.
    fn is_heard(&self, node_id: NodeId, progress: Progress) -> bool {
        !progress.is_late && !self.not_in_balancer.contains(&node_id)
    }

    /// When the next wait for acknowledgements ends, as of [`Drain::held_back`].
    pub fn deadline(&self) -> Option<Timestamp> {
        self.deadline
    }
}
