//! Tables of who serves, and of when a task may stop.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use skep_common::object::NodeState;
use skep_common::spec::{EndpointSpec, PortConfig, PortProtocol, ProxyProtocol, PublishMode};
use skep_common::{Object, Service, ServiceId};

use super::*;
use crate::testing::{NOW, World, parse_node, service};
use crate::{Action, Command, Expect, TaskPatch};

fn published(replicas: u64) -> Service {
    let mut web = service(replicas);
    let port = PortConfig { target_port: 80, published_port: Some(8080), ..PortConfig::default() };
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
fn nodes_are_told_of_the_proxy_protocol_and_managers_that_know_none_stop() {
    let proxy_protocol = Some(ProxyProtocol::V2);
    let mut web = published(1);
    let level = |web: &Service| {
        let object = skep_common::Object::Service(Box::new(web.clone()));
        Command::new(NOW, vec![Action::Put { object, expect: Expect::Present }]).level
    };
    assert_eq!(level(&web), 1);
    web.endpoint.ports[0].proxy_protocol = proxy_protocol;
    assert_eq!(level(&web), 3);
    let world = World::new("1", web.clone(), "");
    let table = table(&world.state, &nobody());
    assert_eq!(table.ports[&(PortProtocol::Tcp, 8080)].proxy_protocol, proxy_protocol);
    // The spec alone, as before its ports are allocated, and where they were given up.
    let ports = Some(std::mem::take(&mut web.endpoint.ports));
    web.spec.endpoint_spec = Some(EndpointSpec { ports, ..EndpointSpec::default() });
    assert_eq!(level(&web), 3);
}

#[test]
fn nodes_are_told_where_daemons_listen_and_which_of_them_balance() {
    let mut world = World::new("1 2:user-space", published(1), "");
    let mut moved = parse_node("1");
    moved.status.port = 2378;
    world.replace(skep_common::Object::Node(Box::new(moved)));
    let table = table(&world.state, &nobody());
    let told = table.peers.values().map(|peer| (peer.node_id, peer.port, peer.is_in_user_space));
    assert_eq!(told.collect::<Vec<_>>(), [(NodeId(1), 2378, false), (NodeId(2), 2377, true)]);
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
    assert_eq!(backends(&world, &nobody()), [], "an unhealthy one; the port stays, and refuses");
}

#[test]
fn a_node_with_ipv6_is_a_peer_with_its_addresses() {
    let (mut world, _) = running();
    let before = table(&world.state, &nobody());
    assert!(before.peers.values().all(|peer| peer.ipv6.is_none()), "IPv4 alone");
    let mut node = parse_node("1");
    let addresses = BTreeSet::from(["2001:db8::1".parse().unwrap()]);
    let description = node.description.get_or_insert_default();
    description.ipv6_addresses = Some(addresses.clone());
    let number = node.number;
    world.replace(skep_common::Object::Node(Box::new(node)));
    let after = table(&world.state, &nobody());
    assert_eq!(after.peers[&number].ipv6, Some(addresses));
    let changes = diff(&before, &after);
    assert_eq!(changes.peers.keys().copied().collect::<Vec<_>>(), [number]);
    let mut told = before;
    told.apply(&changes);
    assert_eq!(told, after);
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
    assert_eq!(drain.version(), 2);
    assert_eq!(drain.held_back(&world.state, NOW), [tasks[0]].into());
    assert_eq!(drain.deadline(), Some(NOW.after(DRAIN_ACK_WAIT_HEARD)));
    drain.acknowledge(NodeId(1), 2);
    assert_eq!(drain.held_back(&world.state, NOW), [tasks[0]].into(), "one of two");
    drain.session_closed(NodeId(2));
    assert_eq!(
        drain.held_back(&world.state, NOW),
        [tasks[0]].into(),
        "the other one's kernel balances without a session, too"
    );
    drain.session_opened(NodeId(2));
    assert_eq!(
        drain.held_back(&world.state, NOW),
        [tasks[0]].into(),
        "it is back, and was told nothing"
    );
    drain.session_closed(NodeId(2));
    set_state(&mut world, NodeId(2), NodeState::Down);
    drain.update(&world.state, &nobody(), NOW);
    drain.acknowledge(NodeId(1), drain.version());
    assert_eq!(
        drain.held_back(&world.state, NOW),
        nothing(),
        "nobody waits for a node that is down"
    );
    assert_eq!(drain.deadline(), None);
}

fn set_state(world: &mut World, node_id: NodeId, state: NodeState) {
    let mut node = Node::clone(world.state.node(node_id).unwrap());
    node.status.state = state;
    world.replace(Object::Node(Box::new(node)));
}

#[test]
fn versions_of_a_later_term_are_higher_and_go_on_by_one() {
    let (mut world, tasks) = running();
    let mut earlier = Drain::new(&world.state, &nobody(), NOW).in_term(3);
    desire(&mut world, tasks[0], TaskState::Shutdown);
    let mut later = Drain::new(&world.state, &nobody(), NOW).in_term(4);
    assert!(earlier.update(&world.state, &nobody(), NOW));
    assert!(later.version() > earlier.version());
    assert_eq!(later.held_back(&world.state, NOW), [tasks[0]].into());
    for node_id in [NodeId(1), NodeId(2)] {
        later.session_opened(node_id);
        assert_eq!(later.held_back(&world.state, NOW), [tasks[0]].into());
        later.acknowledge(node_id, later.version());
    }
    assert_eq!(later.held_back(&world.state, NOW), nothing());
}

#[test]
fn versions_are_in_the_order_of_epochs_and_elections() {
    let term = |epoch: u64, election: u64| epoch << ELECTION_BITS | election;
    let begun = 1_700_000_000;
    let terms = [
        term(0, 1),
        term(0, 2),
        term(0, 70_000),
        term(begun, 0),
        term(begun, 1),
        term(begun, 255),
        // As many elections as take longer than a second, and then some.
        term(begun, 256),
        term(begun, 70_000),
        term(begun + 3600, 0),
        term(begun + 3600, 2),
        term(begun + 3601, 0),
    ];
    for pair in terms.windows(2) {
        let n_tables = first_version(pair[1]) - first_version(pair[0]);
        assert!(n_tables >= 1 << VERSION_BITS_ANEW, "{pair:?}");
    }
    let world = running().0;
    let drain = Drain::new(&world.state, &nobody(), NOW).in_term(term(begun, 0));
    assert_eq!(drain.version(), first_version(term(begun, 0)) + 1);
    first_version(u64::MAX); // A clock that is far in the future does no harm.
}

fn nothing() -> BTreeSet<TaskId> {
    BTreeSet::new()
}

/// Node 1 is heard all the time, node 2 has no session, or has become silent.
#[test]
fn a_stop_waits_longer_for_a_node_that_is_heard_than_for_one_that_is_not() {
    let before = |wait: Duration| NOW.after(wait - Duration::from_millis(1));
    for (name, opens, silent, wait) in [
        ("both lack it", true, nobody(), DRAIN_ACK_WAIT_HEARD),
        ("one without a session lacks it", false, nobody(), DRAIN_ACK_WAIT),
        ("a silent one lacks it", true, [NodeId(2)].into(), DRAIN_ACK_WAIT),
    ] {
        let (mut world, tasks) = running();
        let on_first = |id: &&TaskId| world.state.task(**id).unwrap().node_id == Some(NodeId(1));
        let task_id = *tasks.iter().find(on_first).unwrap();
        let mut drain = Drain::new(&world.state, &nobody(), NOW);
        drain.session_opened(NodeId(1));
        if opens {
            drain.session_opened(NodeId(2));
        }
        desire(&mut world, task_id, TaskState::Remove);
        drain.update(&world.state, &silent, NOW);
        if wait == DRAIN_ACK_WAIT {
            drain.acknowledge(NodeId(1), drain.version());
        }
        assert_eq!(drain.held_back(&world.state, before(wait)), [task_id].into(), "{name}");
        assert_eq!(drain.deadline(), Some(NOW.after(wait)), "{name}");
        assert_eq!(drain.held_back(&world.state, NOW.after(wait)), nothing(), "{name}");
        assert_eq!(drain.deadline(), None, "{name}");
    }
}

#[test]
fn a_node_that_kept_a_stop_waiting_in_vain_is_given_less_until_it_acknowledges() {
    let (mut world, tasks) = running();
    let mut drain = Drain::new(&world.state, &nobody(), NOW);
    for node_id in [NodeId(1), NodeId(2)] {
        drain.session_opened(node_id);
        drain.acknowledge(node_id, drain.version());
    }
    desire(&mut world, tasks[0], TaskState::Shutdown);
    drain.update(&world.state, &nobody(), NOW);
    drain.acknowledge(NodeId(1), drain.version());
    let late = NOW.after(DRAIN_ACK_WAIT_HEARD);
    assert_eq!(drain.held_back(&world.state, late), nothing(), "node 2 says nothing");
    desire(&mut world, tasks[1], TaskState::Shutdown);
    drain.update(&world.state, &nobody(), late);
    drain.acknowledge(NodeId(1), drain.version());
    assert_eq!(drain.held_back(&world.state, late), [tasks[1]].into());
    assert_eq!(drain.deadline(), Some(late.after(DRAIN_ACK_WAIT)));
    drain.acknowledge(NodeId(2), drain.version() - 1);
    assert_eq!(drain.held_back(&world.state, late), [tasks[1]].into());
    assert_eq!(drain.deadline(), Some(late.after(DRAIN_ACK_WAIT_HEARD)), "it is at work again");
}

/// Nodes may balance to it by a table of the leader before.
#[test]
fn a_new_leader_holds_back_the_stop_of_a_task_whose_service_is_gone() {
    let (mut world, tasks) = running();
    let service_id = world.state.task(tasks[0]).unwrap().service_id;
    world.apply(vec![Action::Delete { kind: skep_common::Kind::Service, id: service_id.0 }]);
    assert_eq!(world.state.service(service_id), None);
    let mut drain = Drain::new(&world.state, &nobody(), NOW);
    desire(&mut world, tasks[0], TaskState::Remove);
    drain.update(&world.state, &nobody(), NOW);
    for node_id in [NodeId(1), NodeId(2)] {
        drain.session_opened(node_id);
        assert_eq!(drain.held_back(&world.state, NOW), [tasks[0]].into());
    }
    for node_id in [NodeId(1), NodeId(2)] {
        drain.acknowledge(node_id, drain.version());
    }
    assert_eq!(drain.held_back(&world.state, NOW), nothing());
}

/// Node 2 has a session and says nothing.
#[test]
fn nodes_that_are_not_waited_for_any_longer_are_named() {
    let (mut world, tasks) = running();
    let mut drain = Drain::new(&world.state, &nobody(), NOW);
    for node_id in [NodeId(1), NodeId(2)] {
        drain.session_opened(node_id);
        drain.acknowledge(node_id, 1);
    }
    desire(&mut world, tasks[0], TaskState::Shutdown);
    let mut status = world.state.task(tasks[1]).unwrap().status.clone();
    status.unhealthy = true;
    let patch = TaskPatch { status: Some(status), ..TaskPatch::of(tasks[1]) };
    world.apply(vec![Action::PatchTask(patch)]);
    drain.update(&world.state, &nobody(), NOW);
    drain.acknowledge(NodeId(1), 2);
    assert_eq!(drain.held_back(&world.state, NOW), [tasks[0]].into());
    assert_eq!(drain.take_missed(&world.state), BTreeMap::new(), "it is still waited for");
    let late = NOW.after(DRAIN_ACK_WAIT_HEARD);
    assert_eq!(drain.held_back(&world.state, late), nothing());
    assert_eq!(drain.take_missed(&world.state), [(tasks[0], vec![NodeId(2)])].into());
    assert_eq!(drain.take_missed(&world.state), BTreeMap::new(), "once");

    desire(&mut world, tasks[1], TaskState::Shutdown);
    drain.update(&world.state, &nobody(), late);
    assert_eq!(drain.held_back(&world.state, late), nothing(), "it was taken out long ago");
    assert_eq!(drain.take_missed(&world.state), [(tasks[1], vec![NodeId(2)])].into());
}

#[test]
fn a_late_acknowledgement_of_a_task_that_goes_on_counts() {
    let (mut world, tasks) = running();
    let mut drain = Drain::new(&world.state, &nobody(), NOW);
    for node_id in [NodeId(1), NodeId(2)] {
        drain.session_opened(node_id);
    }
    let mut status = world.state.task(tasks[0]).unwrap().status.clone();
    status.unhealthy = true;
    let patch = TaskPatch { status: Some(status), ..TaskPatch::of(tasks[0]) };
    world.apply(vec![Action::PatchTask(patch)]);
    drain.update(&world.state, &nobody(), NOW);
    let late = NOW.after(DRAIN_ACK_WAIT_HEARD);
    assert_eq!(drain.held_back(&world.state, late), nothing());
    for node_id in [NodeId(1), NodeId(2)] {
        drain.acknowledge(node_id, drain.version());
    }
    desire(&mut world, tasks[0], TaskState::Shutdown);
    drain.update(&world.state, &nobody(), late);
    assert_eq!(drain.held_back(&world.state, late), nothing());
    assert_eq!(drain.take_missed(&world.state), BTreeMap::new());
}

#[test]
fn a_task_that_is_in_no_table_is_not_held_once_every_node_has_one_of_this_leader() {
    let mut world = World::new("1", service(1), "1@1:running 1@1:starting");
    let mut drain = Drain::new(&world.state, &nobody(), NOW);
    drain.session_opened(NodeId(1));
    drain.acknowledge(NodeId(1), drain.version());
    assert_eq!(drain.held_back(&world.state, NOW), nothing());
    desire(&mut world, TaskId(1), TaskState::Shutdown);
    desire(&mut world, TaskId(2), TaskState::Shutdown);
    assert!(!drain.update(&world.state, &nobody(), NOW));
    assert_eq!(drain.held_back(&world.state, NOW), nothing());
}

#[test]
fn a_new_leader_holds_also_what_the_one_before_had_taken_out_for_another_reason() {
    let (mut world, tasks) = running();
    let mut status = world.state.task(tasks[0]).unwrap().status.clone();
    status.unhealthy = true;
    let patch = TaskPatch { status: Some(status), ..TaskPatch::of(tasks[0]) };
    world.apply(vec![Action::PatchTask(patch)]);
    let mut drain = Drain::new(&world.state, &nobody(), NOW);
    assert_eq!(drain.held_back(&world.state, NOW), nothing(), "it goes on");
    desire(&mut world, tasks[0], TaskState::Shutdown);
    drain.update(&world.state, &nobody(), NOW);
    assert_eq!(drain.held_back(&world.state, NOW), [tasks[0]].into());
}

#[test]
fn a_new_leader_holds_what_may_still_be_in_a_table() {
    let (mut world, tasks) = running();
    desire(&mut world, tasks[0], TaskState::Shutdown);
    let mut drain = Drain::new(&world.state, &nobody(), NOW);
    assert_eq!(drain.held_back(&world.state, NOW), [tasks[0]].into(), "nobody has a session yet");
    for node_id in [NodeId(1), NodeId(2)] {
        drain.session_opened(node_id);
        assert_eq!(drain.held_back(&world.state, NOW), [tasks[0]].into());
        drain.acknowledge(node_id, 1);
    }
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

/// One change at random, as the store would see it.
fn change(world: &mut World, silent: &mut BTreeSet<NodeId>, rng: &mut StdRng) {
    let tasks: Vec<Arc<Task>> = world.state.tasks().values().cloned().collect();
    let node_id = NodeId(rng.random_range(1..4));
    match rng.random_range(0..10) {
        0..5 => {
            let Some(task) = tasks.get(rng.random_range(0..tasks.len().max(1))) else { return };
            let mut status = task.status.clone();
            status.state = status.state.max(TaskState::Running);
            status.unhealthy = rng.random_ratio(1, 4);
            let patch = TaskPatch { status: Some(status), ..TaskPatch::of(task.id) };
            world.apply(vec![Action::PatchTask(patch)]);
        }
        5 => {
            let Some(task) = tasks.get(rng.random_range(0..tasks.len().max(1))) else { return };
            desire(world, task.id, TaskState::Shutdown);
            world.step();
        }
        6 => {
            let mut node = parse_node(&node_id.0.to_string());
            node.status.state =
                if rng.random() { NodeState::Ready } else { NodeState::Disconnected };
            node.status.port = rng.random_range(2377..2380);
            world.replace(Object::Node(Box::new(node)));
        }
        7 if !silent.remove(&node_id) => {
            silent.insert(node_id);
        }
        // Ports go from one service to the other in one step.
        _ => {
            let (mut web, mut other) = (world.web(), service(0));
            other.id = ServiceId(8);
            other.spec.name = "other".into();
            let ports = std::mem::take(&mut web.endpoint.ports);
            match rng.random_range(0..3) {
                0 => web.endpoint.ports = published(0).endpoint.ports,
                1 => other.endpoint.ports = published(0).endpoint.ports,
                _ => other.endpoint.ports = ports,
            }
            let put = |service| Object::Service(Box::new(service));
            let delete = Action::Delete { kind: skep_common::Kind::Service, id: 8 };
            if world.state.service(ServiceId(8)).is_some() {
                world.apply(vec![delete]);
            }
            world.replace(put(web));
            world.put(vec![put(other)]);
        }
    }
}

#[test]
fn a_table_fed_by_changes_is_the_one_made_anew() {
    let (mut n_ports, mut n_backends) = (0, 0);
    for seed in 0..20 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut world = World::new("1 2 3", published(6), "");
        world.step();
        let mut silent = nobody();
        let mut drain = Drain::new(&world.state, &silent, NOW);
        for _ in 0..100 {
            let before = drain.table().clone();
            for _ in 0..rng.random_range(1..4) {
                change(&mut world, &mut silent, &mut rng);
            }
            drain.update(&world.state, &silent, NOW);
            let anew = table(&world.state, &silent);
            assert_eq!(**drain.table(), anew, "seed {seed}");
            assert_eq!(Arc::ptr_eq(drain.table(), &before), *before == anew, "seed {seed}");
            let mut backends: BTreeSet<TaskId> = BTreeSet::new();
            anew.ports.values().for_each(|port| backends.extend(port.backends.keys()));
            for task in world.state.tasks().keys() {
                assert_eq!(drain.ingress.is_backend(*task), backends.contains(task));
            }
            (n_ports, n_backends) = (n_ports + anew.ports.len(), n_backends + backends.len());
        }
    }
    assert!(n_ports > 500 && n_backends > 500, "{n_ports} {n_backends}: nothing was seen");
}
