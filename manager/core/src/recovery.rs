//! A swarm that goes on with one manager: what becomes of the nodes that its state names.
//!
//! Driven by the shell's `recovery`, where no other manager is asked: after a lost quorum, and where a backup
//! begins anew on another machine.
//!
//! # Invariants
//!
//! - Services, networks, secrets and settings stay as they are; only nodes, and the tasks on them, change.
//! - No manager is left but the one that goes on: the others are removed as `node rm --force` does, since they
//!   hold another log, and must join anew.

use skep_common::object::{ManagerStatus, Node};
use skep_common::spec::NodeRole;
use skep_common::{NodeId, Object, Timestamp};

use crate::command::{Action, Command, Expect, Outcome, Refusal};
use crate::kept_out::keep_all_out;
use crate::reaper::remove_node;
use crate::store::State;

/// Bits of a term that count elections: at ten a second they last for thirteen years. Those above are its epoch, when
/// the swarm began anew, in seconds since 1970.
pub const ELECTION_BITS: u32 = 32;

/// Why a manager cannot go on alone with what it has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Remedy: ask another former manager.
    #[error(
        "node {0} is not in the state of the swarm that it holds: it was removed, or never got so far; use another former manager"
    )]
    NotThere(NodeId),
    /// The store does not take it. Remedy: a bug report.
    #[error("the nodes of the swarm cannot be changed as they must be: {0}")]
    Refused(Refusal),
}

/// Nodes that take part as managers, or are on their way to it or from it, but for one.
pub fn other_managers(state: &State, node_id: NodeId) -> impl Iterator<Item = &Node> {
    let nodes = state.nodes().values().map(|node| &**node);
    nodes.filter(move |node| node.id != node_id && is_manager(node))
}

fn is_manager(node: &Node) -> bool {
    let roles = [node.spec.role, node.observed_role()];
    node.manager_status.is_some() || roles.contains(&NodeRole::Manager)
}

/// Makes a manager the only one: the others are removed, workers stay.
pub fn alone(
    mut state: State,
    node_id: NodeId,
    manager: ManagerStatus,
    now: Timestamp,
) -> Result<State, Error> {
    let own = state.node(node_id).ok_or(Error::NotThere(node_id))?;
    let mut node = (**own).clone();
    (node.spec.role, node.role) = (NodeRole::Manager, None);
    node.manager_status = Some(manager);
    let others: Vec<NodeId> = other_managers(&state, node_id).map(|other| other.id).collect();
    remove_all(&mut state, &others, now)?;
    let put = Action::Put { object: Object::Node(Box::new(node)), expect: Expect::Present };
    write(&mut state, vec![put], now)?;
    Ok(state)
}

/// Begins the swarm anew on a machine that it does not know: all nodes are removed, for their machines hold another
/// log or none.
pub fn elsewhere(mut state: State, node: Node, now: Timestamp) -> Result<State, Error> {
    let known: Vec<NodeId> = state.nodes().keys().copied().collect();
    remove_all(&mut state, &known, now)?;
    let put = Action::Put { object: Object::Node(Box::new(node)), expect: Expect::Absent };
    write(&mut state, vec![put], now)?;
    Ok(state)
}

/// One after the other: each removal may change what the next one reads. Each is refused from now on, also where
/// other managers were of a version that did not know how: none of them is left.
fn remove_all(state: &mut State, nodes: &[NodeId], now: Timestamp) -> Result<(), Error> {
    for id in nodes {
        let removal = remove_node(state, *id, now);
        write(state, removal, now)?;
    }
    let kept_out = keep_all_out(state, nodes, now).filter(|_| !nodes.is_empty());
    kept_out.map_or(Ok(()), |kept_out| write(state, vec![kept_out], now))
}

fn write(state: &mut State, actions: Vec<Action>, now: Timestamp) -> Result<(), Error> {
    let index = state.version().index + 1;
    match state.apply(index, &Command::new(now, actions)).0 {
        Outcome::Applied(_) => Ok(()),
        Outcome::Refused(refusal) => Err(Error::Refused(refusal)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NOW, WEB, World, cluster, node, service};
    use skep_common::TaskState;

    fn manager(number: u16) -> Node {
        let mut node = node(number);
        node.spec.role = NodeRole::Manager;
        let raft_id = number.into();
        node.manager_status = Some(ManagerStatus { raft_id, ..ManagerStatus::default() });
        node
    }

    /// Two managers, one that is being demoted, and a worker, each with a task.
    fn world() -> World {
        let tasks = "1@1:running 2@2:running 3@3:running 4@4:running";
        let mut world = World::new("1 2 3 4", service(4), tasks);
        let mut leaving = manager(3);
        (leaving.spec.role, leaving.role) = (NodeRole::Worker, Some(NodeRole::Manager));
        for node in [manager(1), manager(2), leaving] {
            world.replace(Object::Node(Box::new(node)));
        }
        world
    }

    fn states(state: &State) -> Vec<(u16, TaskState)> {
        let mut tasks: Vec<_> = state
            .tasks_of_service(WEB)
            .map(|task| (u16::try_from(task.slot).unwrap(), task.status.state))
            .collect();
        tasks.sort();
        tasks
    }

    #[test]
    fn who_goes_on_alone_keeps_the_workers_and_removes_who_is_or_was_a_manager() {
        let mut world = world();
        let new = ManagerStatus { raft_id: 77, addr: "10.0.0.9:1".into(), ..Default::default() };
        let own = node(1).id;
        world.state = alone(world.state, own, new.clone(), NOW).unwrap();
        let left: Vec<NodeId> = world.state.nodes().keys().copied().collect();
        assert_eq!(left, [node(1).id, node(4).id]);
        assert_eq!(world.state.node(own).unwrap().manager_status, Some(new));
        use TaskState::{Orphaned, Running};
        let expected = [(1, Running), (2, Orphaned), (3, Orphaned), (4, Running)];
        assert_eq!(states(&world.state), expected);
        assert_eq!(other_managers(&world.state, own).count(), 0);
    }

    #[test]
    fn all_who_are_removed_are_kept_out_whatever_the_managers_understood() {
        use crate::kept_out::is_kept_out;
        use crate::level::{CONTROL, FORMAT_LEVEL};
        let known = |number: u16| {
            move |levels: [u32; 3]| {
                let mut node = manager(number);
                node.description.get_or_insert_default().format_level =
                    levels[usize::from(number) - 1];
                Object::Node(Box::new(node))
            }
        };
        let kept_out = |state: &State| -> Vec<u16> {
            (1..=4).filter(|number| is_kept_out(state, node(*number).id)).collect()
        };
        for levels in [[FORMAT_LEVEL; 3], [CONTROL - 1; 3], [CONTROL, CONTROL, CONTROL - 1]] {
            let made = || {
                let mut world = World::new("1 2 3 4", service(4), "1@1:running 4@4:running");
                world.put(vec![Object::Cluster(Box::new(cluster()))]);
                (1..=3).for_each(|number| world.replace(known(number)(levels)));
                world.state
            };
            let own = node(1).id;
            let state = alone(made(), own, ManagerStatus::default(), NOW).unwrap();
            assert_eq!(kept_out(&state), [2, 3], "alone, {levels:?}");
            let state = elsewhere(made(), manager(9), NOW).unwrap();
            // The worker comes after the last manager.
            assert_eq!(kept_out(&state), [1, 2, 3, 4], "elsewhere, {levels:?}");
            assert!(!is_kept_out(&state, node(9).id));
        }
    }

    #[test]
    fn who_was_removed_does_not_go_on() {
        let gone = node(9).id;
        let refused = alone(world().state, gone, ManagerStatus::default(), NOW).unwrap_err();
        assert_eq!(refused, Error::NotThere(gone));
    }

    #[test]
    fn elsewhere_no_node_is_left_but_the_new_one() {
        let mut world = world();
        world.state = elsewhere(world.state, manager(9), NOW).unwrap();
        let left: Vec<NodeId> = world.state.nodes().keys().copied().collect();
        assert_eq!(left, [node(9).id]);
        assert!(states(&world.state).iter().all(|(_, state)| *state == TaskState::Orphaned));
        assert!(world.state.service(WEB).is_some());
    }
}
