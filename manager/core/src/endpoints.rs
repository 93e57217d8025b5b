//! Which task answers on which published port, and when a task may stop.
//!
//! [`table`] is what every node programs into its kernel: equal states give equal tables. [`Drain`]
//! numbers the tables, and holds the stop of a task back until the nodes have taken it out.
//!
//! # Invariants
//!
//! - A backend is running, healthy, wanted, and on a node that is not silent.
//! - A task that was in the table is told to stop when every node with a live session acknowledged a
//!   table without it, and in any case [`DRAIN_ACK_WAIT`] after it was taken out.
//! - Tables differ in version exactly where they differ.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use skep_common::limits::DRAIN_ACK_WAIT;
use skep_common::object::NodeState;
use skep_common::spec::{PortProtocol, PublishMode};
use skep_common::{NodeId, ServiceId, Task, TaskId, TaskState, Timestamp};

use crate::store::State;

/// What a node must know to serve every published port.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Table {
    /// Underlay addresses of all nodes, by node number.
    pub peers: BTreeMap<u16, Ipv4Addr>,
    /// Published ports.
    pub ports: BTreeMap<(PortProtocol, u16), Port>,
}

/// A port that answers on every node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// The service that publishes it.
    pub service_id: ServiceId,
    /// The port that its containers listen on.
    pub target_port: u16,
    /// Addresses of the tasks behind it; none means that connections are refused.
    pub backends: BTreeMap<TaskId, Ipv4Addr>,
}

/// The table of a state, without the tasks of nodes in `not_in_balancer`.
pub fn table(state: &State, not_in_balancer: &BTreeSet<NodeId>) -> Table {
    let mut table = Table::default();
    for node in state.nodes().values() {
        // An address that is not IPv4 has no part in the mesh.
        if let Ok(address) = node.status.addr.parse() {
            table.peers.insert(node.number, address);
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
        for (port, published) in ingress {
            let entry = Port {
                service_id: service.id,
                target_port: port.target_port,
                backends: backends.clone(),
            };
            table.ports.insert((port.protocol.unwrap_or_default(), published), entry);
        }
    }
    table
}

fn is_serving(state: &State, not_in_balancer: &BTreeSet<NodeId>, task: &Task) -> bool {
    let is_alive = |node_id: &NodeId| {
        !not_in_balancer.contains(node_id)
            && state.node(*node_id).is_some_and(|node| node.status.state != NodeState::Down)
    };
    task.status.state == TaskState::Running
        && !task.status.unhealthy
        && task.desired_state <= TaskState::Running
        && task.node_id.as_ref().is_some_and(is_alive)
}

/// What makes one table of another.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TableChanges {
    /// New peers, and those with another address.
    pub peers: BTreeMap<u16, Ipv4Addr>,
    /// Peers that are gone.
    pub removed_peers: Vec<u16>,
    /// New or changed ports, each whole.
    pub ports: BTreeMap<(PortProtocol, u16), Port>,
    /// Ports that are published no more.
    pub removed_ports: Vec<(PortProtocol, u16)>,
}

/// What makes `new` of `old`.
pub fn diff(old: &Table, new: &Table) -> TableChanges {
    let peers = new.peers.iter().filter(|(number, address)| old.peers.get(number) != Some(address));
    let ports = new.ports.iter().filter(|(key, port)| old.ports.get(key) != Some(port));
    TableChanges {
        peers: peers.map(|(number, address)| (*number, *address)).collect(),
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
        self.peers.extend(&changes.peers);
        self.ports.extend(changes.ports.clone());
    }

    fn backends(&self) -> BTreeSet<TaskId> {
        self.ports.values().flat_map(|port| port.backends.keys().copied()).collect()
    }
}

/// The newest table, and the tasks that wait until nodes have it.
#[derive(Debug, Default)]
pub struct Drain {
    version: u64,
    table: Table,
    /// Tasks that were taken out: by which version, when.
    withdrawn: BTreeMap<TaskId, (u64, Timestamp)>,
    /// The version that each node with a live session has in its kernel; 0 until it said so.
    acknowledged: BTreeMap<NodeId, u64>,
}

impl Drain {
    /// Starts to lead. Tasks that are to stop may still be in the tables of nodes, so they count as
    /// withdrawn now.
    pub fn new(state: &State, not_in_balancer: &BTreeSet<NodeId>, now: Timestamp) -> Self {
        let table = table(state, not_in_balancer);
        let publishes = |task: &Task| {
            let service = state.service(task.service_id);
            service.is_some_and(|service| !service.endpoint.ports.is_empty())
        };
        let stopping = state.tasks().values().filter(|task| {
            task.desired_state > TaskState::Running
                && task.status.state == TaskState::Running
                && publishes(task)
        });
        let withdrawn = stopping.map(|task| (task.id, (1, now))).collect();
        Self { version: 1, table, withdrawn, acknowledged: BTreeMap::new() }
    }

    /// The newest table and its number, from 1.
    pub fn table(&self) -> (u64, &Table) {
        (self.version, &self.table)
    }

    /// Takes over a new state; says whether the table changed.
    pub fn update(
        &mut self,
        state: &State,
        not_in_balancer: &BTreeSet<NodeId>,
        now: Timestamp,
    ) -> bool {
        let new = table(state, not_in_balancer);
        let is_changed = new != self.table;
        if is_changed {
            self.version += 1;
            let serving = new.backends();
            for task_id in self.table.backends().difference(&serving) {
                self.withdrawn.insert(*task_id, (self.version, now));
            }
            self.withdrawn.retain(|task_id, _| !serving.contains(task_id));
            self.table = new;
        }
        let is_stoppable = |task_id: &TaskId| {
            state.task(*task_id).is_some_and(|task| !task.status.state.is_terminal())
        };
        self.withdrawn.retain(|task_id, _| is_stoppable(task_id));
        is_changed
    }

    /// A node has a live session.
    pub fn session_opened(&mut self, node_id: NodeId) {
        self.acknowledged.insert(node_id, 0);
    }

    /// A node's session ended: nobody waits for it.
    pub fn session_closed(&mut self, node_id: NodeId) {
        self.acknowledged.remove(&node_id);
    }

    /// A node's kernel has this version.
    pub fn acknowledge(&mut self, node_id: NodeId, version: u64) {
        if let Some(acknowledged) = self.acknowledged.get_mut(&node_id) {
            *acknowledged = version.max(*acknowledged);
        }
    }

    /// Tasks that are to stop but whose node must not be told yet.
    pub fn held_back(&mut self, state: &State, now: Timestamp) -> BTreeSet<TaskId> {
        let oldest = self.acknowledged.values().copied().min().unwrap_or(u64::MAX);
        self.withdrawn
            .retain(|_, (version, at)| oldest < *version && now < at.after(DRAIN_ACK_WAIT));
        let is_stopping = |task_id: &&TaskId| {
            state.task(**task_id).is_some_and(|task| task.desired_state > TaskState::Running)
        };
        self.withdrawn.keys().filter(is_stopping).copied().collect()
    }

    /// When waiting for acknowledgements ends.
    pub fn deadline(&self) -> Option<Timestamp> {
        self.withdrawn.values().map(|(_, at)| at.after(DRAIN_ACK_WAIT)).min()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use skep_common::Service;
    use skep_common::spec::PortConfig;

    use super::*;
    use crate::testing::{NOW, World, parse_node, service};
    use crate::{Action, TaskPatch};

    fn published(replicas: u64) -> Service {
        let mut web = service(replicas);
        let port =
            PortConfig { target_port: 80, published_port: Some(8080), ..PortConfig::default() };
        let host = PortConfig {
            published_port: Some(9090),
            publish_mode: Some(PublishMode::Host),
            ..port.clone()
        };
        web.endpoint.ports = vec![port, host];
        web
    }

    fn nobody() -> BTreeSet<NodeId> {
        BTreeSet::new()
    }

    /// A swarm whose tasks have addresses: 1 and 2 run on nodes 1 and 2.
    fn running() -> (World, Vec<TaskId>) {
        let mut world = World::new("1 2", published(2), "");
        world.step();
        let mut tasks: Vec<(u64, TaskId)> =
            world.state.tasks().values().map(|task| (task.slot, task.id)).collect();
        tasks.sort_unstable();
        let tasks: Vec<TaskId> = tasks.into_iter().map(|(_, task_id)| task_id).collect();
        for task_id in &tasks {
            world.report(*task_id, TaskState::Running);
        }
        (world, tasks)
    }

    fn desire(world: &mut World, task_id: TaskId, desired_state: TaskState) {
        let patch = TaskPatch { desired_state: Some(desired_state), ..TaskPatch::of(task_id) };
        world.apply(vec![Action::PatchTask(patch)]);
    }

    #[test]
    fn a_backend_is_running_healthy_wanted_and_on_a_living_node() {
        let (mut world, tasks) = running();
        let backends = |world: &World, silent: &BTreeSet<NodeId>| -> Vec<TaskId> {
            let table = table(&world.state, silent);
            assert_eq!(table.ports.len(), 1, "host-mode ports are not the mesh's");
            assert_eq!(table.peers.len(), 2);
            table.ports[&(PortProtocol::Tcp, 8080)].backends.keys().copied().collect()
        };
        let mut both = tasks.clone();
        both.sort_unstable();
        assert_eq!(backends(&world, &nobody()), both);
        assert_eq!(backends(&world, &[NodeId(1)].into()), [tasks[1]], "a silent node");
        let mut down = parse_node("1:down");
        world.replace(skep_common::Object::Node(Box::new(down.clone())));
        assert_eq!(backends(&world, &nobody()), [tasks[1]], "a node that is down");
        down.status.state = NodeState::Ready;
        world.replace(skep_common::Object::Node(Box::new(down)));
        desire(&mut world, tasks[1], TaskState::Shutdown);
        assert_eq!(backends(&world, &nobody()), [tasks[0]], "a task that is to stop");
        let mut status = world.state.task(tasks[0]).unwrap().status.clone();
        status.unhealthy = true;
        let patch = TaskPatch { status: Some(status), ..TaskPatch::of(tasks[0]) };
        world.apply(vec![Action::PatchTask(patch)]);
        assert_eq!(
            backends(&world, &nobody()),
            [],
            "an unhealthy one; the port stays, and refuses"
        );
    }

    #[test]
    fn a_stop_waits_for_the_nodes_that_can_acknowledge() {
        let (mut world, tasks) = running();
        let mut drain = Drain::new(&world.state, &nobody(), NOW);
        for node_id in [NodeId(1), NodeId(2)] {
            drain.session_opened(node_id);
            drain.acknowledge(node_id, 1);
        }
        assert!(!drain.update(&world.state, &nobody(), NOW), "nothing changed");
        desire(&mut world, tasks[0], TaskState::Shutdown);
        assert!(drain.update(&world.state, &nobody(), NOW));
        assert_eq!(drain.table().0, 2);
        assert_eq!(drain.held_back(&world.state, NOW), [tasks[0]].into());
        assert_eq!(drain.deadline(), Some(NOW.after(DRAIN_ACK_WAIT)));
        drain.acknowledge(NodeId(1), 2);
        assert_eq!(drain.held_back(&world.state, NOW), [tasks[0]].into(), "one of two");
        drain.session_closed(NodeId(2));
        assert_eq!(
            drain.held_back(&world.state, NOW),
            nothing(),
            "the other is not there any more"
        );
        assert_eq!(drain.deadline(), None);
    }

    fn nothing() -> BTreeSet<TaskId> {
        BTreeSet::new()
    }

    #[test]
    fn a_stop_waits_two_seconds_at_most() {
        let (mut world, tasks) = running();
        let mut drain = Drain::new(&world.state, &nobody(), NOW);
        drain.session_opened(NodeId(1));
        desire(&mut world, tasks[0], TaskState::Remove);
        drain.update(&world.state, &nobody(), NOW);
        let just_before = NOW.after(DRAIN_ACK_WAIT - Duration::from_millis(1));
        assert_eq!(drain.held_back(&world.state, just_before), [tasks[0]].into());
        assert_eq!(drain.held_back(&world.state, NOW.after(DRAIN_ACK_WAIT)), nothing());
    }

    #[test]
    fn a_task_that_was_in_no_table_is_not_held() {
        let mut world = World::new("1", service(1), "1@1:running 1@1:starting");
        let mut drain = Drain::new(&world.state, &nobody(), NOW);
        drain.session_opened(NodeId(1));
        desire(&mut world, TaskId(1), TaskState::Shutdown);
        desire(&mut world, TaskId(2), TaskState::Shutdown);
        assert!(!drain.update(&world.state, &nobody(), NOW));
        assert_eq!(drain.held_back(&world.state, NOW), nothing());
    }

    #[test]
    fn a_new_leader_holds_what_may_still_be_in_a_table() {
        let (mut world, tasks) = running();
        desire(&mut world, tasks[0], TaskState::Shutdown);
        let mut drain = Drain::new(&world.state, &nobody(), NOW);
        drain.session_opened(NodeId(1));
        assert_eq!(drain.held_back(&world.state, NOW), [tasks[0]].into());
        drain.acknowledge(NodeId(1), 1);
        assert_eq!(drain.held_back(&world.state, NOW), nothing());
    }

    #[test]
    fn changes_make_the_new_table_of_the_old() {
        let (mut world, tasks) = running();
        let mut tables = vec![Table::default(), table(&world.state, &nobody())];
        desire(&mut world, tasks[0], TaskState::Shutdown);
        tables.push(table(&world.state, &nobody()));
        let mut web = world.web();
        web.endpoint.ports[0].published_port = Some(8081);
        world.replace(skep_common::Object::Service(Box::new(web)));
        world.apply(vec![Action::Delete { kind: skep_common::Kind::Node, id: 2 }]);
        tables.push(table(&world.state, &nobody()));
        for old in &tables {
            for new in &tables {
                let mut made = old.clone();
                made.apply(&diff(old, new));
                assert_eq!(&made, new);
            }
        }
    }
}
