//! Which part a node plays, and how another one is asked of it.
//!
//! A node that is promoted is a manager at once, as far as its certificate goes; it joins the others by
//! itself. One that is demoted stays a manager until the others do not count it any more: the leader takes
//! it out of the Raft group first, and only then is it a worker. [`retiring`] names those on the way, so
//! that a new leader goes on where the one before stopped.

use skep_common::object::{Node, NodeState};
use skep_common::spec::NodeRole;

use crate::level::{self, CONTROL};
use crate::store::State;

/// Why a node keeps its part.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Remedy: wait until it is there, then ask again.
    #[error("node {0} is not ready: only a node that answers can be promoted, start it first")]
    NotReady(String),
    /// Remedy: ask again in a moment.
    #[error(
        "node {0} is still being demoted: promote it again when `skep node ls` shows no manager"
    )]
    Retiring(String),
    /// Remedy: promote another one first.
    #[error("attempting to demote the last manager of the swarm: promote another node first")]
    LastManager,
    /// Remedy: upgrade every manager, and the node.
    #[error(
        "the role of node {0} cannot be changed while a manager, or that node, runs an older version: upgrade them first"
    )]
    TooOld(String),
}

/// Changes the part that is asked of `node`.
pub fn ask(state: &State, node: &mut Node, role: NodeRole) -> Result<(), Error> {
    let name = || crate::node_name(node).to_owned();
    if node.spec.role == role {
        return Ok(());
    }
    let known = node.description.as_ref().map_or(0, |description| description.format_level);
    if level::of_managers(state).min(known) < CONTROL {
        return Err(Error::TooOld(name()));
    }
    match role {
        NodeRole::Manager if node.observed_role() == NodeRole::Manager => {
            return Err(Error::Retiring(name()));
        }
        NodeRole::Manager if node.status.state != NodeState::Ready => {
            return Err(Error::NotReady(name()));
        }
        NodeRole::Manager => node.role = None,
        NodeRole::Worker => {
            let managers = state.nodes().values().filter(|n| n.spec.role == NodeRole::Manager);
            if managers.count() <= 1 {
                return Err(Error::LastManager);
            }
            node.role = Some(NodeRole::Manager);
        }
    }
    node.spec.role = role;
    Ok(())
}

/// Whether the node is to be a worker, and still counts as a manager.
pub fn is_retiring(node: &Node) -> bool {
    node.spec.role == NodeRole::Worker && node.observed_role() == NodeRole::Manager
}

/// Managers on their way to be workers, by id.
pub fn retiring(state: &State) -> Vec<&Node> {
    state.nodes().values().map(|node| &**node).filter(|node| is_retiring(node)).collect()
}

/// The node once no manager counts it.
#[must_use]
pub fn retired(node: &Node) -> Node {
    Node { role: None, manager_status: None, ..node.clone() }
}

/// Whether `n_voters` managers keep a majority without one of them, when `n_others` of the others answer.
pub fn keeps_majority(n_voters: usize, n_others: usize) -> bool {
    n_voters > 1 && n_others > (n_voters - 1) / 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{World, node, service};
    use skep_common::Object;
    use skep_common::object::ManagerStatus;

    /// A manager or worker of the newest level.
    fn of_role(number: u16, role: NodeRole) -> Node {
        let mut node = node(number);
        node.spec.role = role;
        node.manager_status = (role == NodeRole::Manager).then(ManagerStatus::default);
        node.description.get_or_insert_default().format_level = CONTROL;
        node
    }

    /// What becomes of the first of `nodes` when it is asked to play `role`.
    fn asked(nodes: &[Node], role: NodeRole) -> Result<Node, Error> {
        let mut world = World::new("", service(0), "");
        world.put(nodes.iter().map(|node| Object::Node(Box::new(node.clone()))).collect());
        let mut node = nodes[0].clone();
        ask(&world.state, &mut node, role).map(|()| node)
    }

    #[test]
    fn a_promoted_node_is_a_manager_at_once_and_a_demoted_one_goes_on_the_way() {
        use NodeRole::{Manager, Worker};
        let (worker, manager, other) =
            (of_role(1, Worker), of_role(1, Manager), of_role(2, Manager));
        let promoted = asked(&[worker.clone(), other.clone()], Manager).unwrap();
        assert_eq!((promoted.spec.role, promoted.observed_role()), (Manager, Manager));
        let demoted = asked(&[manager.clone(), other.clone()], Worker).unwrap();
        assert_eq!((demoted.spec.role, demoted.observed_role()), (Worker, Manager));
        assert!(is_retiring(&demoted) && !is_retiring(&promoted) && !is_retiring(&worker));
        let retired = retired(&demoted);
        assert_eq!((retired.observed_role(), retired.manager_status.is_none()), (Worker, true));
        assert!(!is_retiring(&retired));
        assert_eq!(asked(&[demoted, other.clone()], Worker).unwrap().observed_role(), Manager);
    }

    #[test]
    fn a_change_of_role_is_refused_with_its_reason() {
        use NodeRole::{Manager, Worker};
        let other = of_role(2, Manager);
        let mut down = of_role(1, Worker);
        down.status.state = NodeState::Down;
        let mut retiring = of_role(1, Worker);
        retiring.role = Some(Manager);
        let mut old = of_role(1, Worker);
        old.description.get_or_insert_default().format_level = CONTROL - 1;
        for (node, role, why) in [
            (of_role(1, Manager), Worker, "last manager"),
            (down, Manager, "not ready"),
            (retiring, Manager, "still being demoted"),
            (old, Manager, "older version"),
        ] {
            let nodes = if why == "last manager" { vec![node] } else { vec![node, other.clone()] };
            let refused = asked(&nodes, role).unwrap_err().to_string();
            assert!(refused.contains(why), "{why:?} in {refused}");
        }
    }

    #[test]
    fn a_manager_may_go_where_the_rest_keeps_its_majority() {
        for (n_voters, enough) in [(2, 1), (3, 2), (4, 2), (5, 3), (6, 3), (7, 4)] {
            for n_others in 0..n_voters {
                let name = format!("{n_others} of the others of {n_voters} answer");
                assert_eq!(keeps_majority(n_voters, n_others), n_others >= enough, "{name}");
            }
        }
        assert!(!keeps_majority(1, 0), "the last one stays");
    }
}
