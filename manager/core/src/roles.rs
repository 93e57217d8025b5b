//! Which role a node has, and how another one is asked of it.
//!
//! A node that is promoted is a manager at once, as far as its certificate goes; it joins the others by
//! itself. One that is demoted stays a manager until it is no member of the Raft group any more: the leader takes
//! it out of the Raft group first, and only then is it a worker. [`retiring`] names those on the way, so
//! that a new leader goes on where the one before stopped.
//!
//! A program that was told to be a manager is [admitted](admit) in two steps: its node's object says so first, and
//! then it gets the log. In this order, so that `node rm` can undo what ended halfway.

use std::collections::BTreeSet;

use skep_common::NodeId;
use skep_common::object::{ManagerStatus, Node, NodeState};
use skep_common::spec::NodeRole;

use crate::level::{self, CONTROL, TooOldToManage};
use crate::store::State;

/// Why a node keeps its role.
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

/// Changes the role that is asked of `node`.
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

/// Whether the node is to be a worker, and still is a manager.
pub fn is_retiring(node: &Node) -> bool {
    node.spec.role == NodeRole::Worker && node.observed_role() == NodeRole::Manager
}

/// Managers on their way to be workers, by id.
pub fn retiring(state: &State) -> Vec<&Node> {
    state.nodes().values().map(|node| &**node).filter(|node| is_retiring(node)).collect()
}

/// The node once it is no member of the Raft group.
#[must_use]
pub fn retired(node: &Node) -> Node {
    Node { role: None, manager_status: None, ..node.clone() }
}

/// What the leader does next with a manager that is to be a worker, once the others can do without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retirement {
    /// It is the leader itself: another one is to lead, and goes on.
    TransferLeadership,
    /// It is to be no member of the Raft group any more; [`retired`] is written after that.
    TakeOut {
        /// Its Raft id.
        raft_id: u64,
    },
    /// It never came so far as to be a member of the Raft group.
    Note,
}

/// The next step of a manager on its way to be a worker, as the leader `own` sees it.
pub fn retirement(node: &Node, own: u64) -> Retirement {
    match &node.manager_status {
        Some(manager) if manager.raft_id == own => Retirement::TransferLeadership,
        Some(manager) => Retirement::TakeOut { raft_id: manager.raft_id },
        None => Retirement::Note,
    }
}

/// Why a program does not become a manager.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    /// Remedy: join anew.
    #[error("node {0} was removed from the swarm")]
    Removed(NodeId),
    /// Remedy: promote it.
    #[error("node {0} is to be a worker: promote it to have it join the managers")]
    ToBeWorker(NodeId),
    /// Remedy: upgrade it.
    #[error(transparent)]
    TooOld(TooOldToManage),
}

/// How far a program is that is to be a manager.
#[derive(Debug, Clone, PartialEq)]
pub enum Admission {
    /// Its node is to be written so, and then it is to be looked at anew: what was written before that may be
    /// beyond its program.
    Note(Box<Node>),
    /// It may be given the log, and a vote.
    Admitted,
}

/// Whether the program of a node becomes a manager that says so of itself; `said` is the format level that it knows,
/// 0 where it is of before managers said it.
pub fn admit(
    state: &State,
    node_id: NodeId,
    status: &ManagerStatus,
    said: u32,
) -> Result<Admission, NotAdmitted> {
    let node = state.node(node_id).ok_or(NotAdmitted::Removed(node_id))?;
    if node.spec.role != NodeRole::Manager {
        return Err(NotAdmitted::ToBeWorker(node_id));
    }
    level::check_new(state, node, said).map_err(NotAdmitted::TooOld)?;
    // Its session may have said more of another program: until its next one says what this program knows, nothing is
    // to be written that it does not.
    let has_said_more = said > 0
        && node.description.as_ref().is_some_and(|description| description.format_level > said);
    if node.manager_status.as_ref() == Some(status) && !has_said_more {
        return Ok(Admission::Admitted);
    }
    let mut noted = (**node).clone();
    noted.manager_status = Some(status.clone());
    if let Some(description) = noted.description.as_mut().filter(|_| has_said_more) {
        description.format_level = said;
    }
    Ok(Admission::Note(Box::new(noted)))
}

/// Whether a node is a manager by that Raft id: one that was demoted or removed while it was admitted is not, and
/// nobody else would take it out again.
pub fn is_manager(state: &State, node_id: NodeId, raft_id: u64) -> bool {
    let status = state.node(node_id).and_then(|node| node.manager_status.as_ref());
    status.is_some_and(|status| status.raft_id == raft_id)
}

/// What [`raft_id_of`] says of a node that is no manager.
pub const NOT_A_MANAGER: u64 = 0;

/// The Raft id by which a node is a manager: that of its object, which is written before the Raft group has it as a
/// member, and goes after it was taken out. [`NOT_A_MANAGER`] for a worker, and until then.
pub fn raft_id_of(node: &Node) -> u64 {
    node.manager_status.as_ref().map_or(NOT_A_MANAGER, |status| status.raft_id)
}

/// Whether the membership of a manager by its Raft id `own` is over, where the managers had admitted it, or refused to,
/// before they said that its node is a member by the id `current` now. Where it is, they took `own` out of the Raft
/// group, and a manager that is to go on needs another id and an empty log. `None`: whoever was asked does not say so.
pub fn is_over(own: u64, current: Option<u64>) -> bool {
    current.is_some_and(|current| current != own)
}

/// Those of the Raft group's `members` that no node of the state names, but not `own`, the leader's. A node names
/// its Raft id before the group has it: whoever is not named was demoted or removed while it was let in, and the
/// manager that let it in has ended before it took it out again.
pub fn unnamed(state: &State, members: &[u64], own: u64) -> Vec<u64> {
    let named: BTreeSet<u64> = state
        .nodes()
        .values()
        .filter_map(|node| node.manager_status.as_ref())
        .map(|status| status.raft_id)
        .collect();
    let is_unnamed = |raft_id: &u64| *raft_id != own && !named.contains(raft_id);
    members.iter().copied().filter(is_unnamed).collect()
}

/// Why a node stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotRemoved {
    /// Remedy: demote it.
    #[error(
        "node {0} is a cluster manager and is a member of the raft cluster. It must be demoted to worker before removal (skep node demote), or be down and removed with --force"
    )]
    Manager(NodeId),
    /// Remedy: stop it.
    #[error("node {0} is not down and can't be removed: stop it first, or use --force")]
    NotDown(NodeId),
}

/// Whether a node may be removed. The Raft id is that of a manager, which is to be taken out of the Raft group before.
pub fn check_removal(node: &Node, is_forced: bool) -> Result<Option<u64>, NotRemoved> {
    let is_down = node.status.state == NodeState::Down;
    if let Some(manager) = &node.manager_status {
        let may_go = is_down && is_forced;
        return may_go.then_some(Some(manager.raft_id)).ok_or(NotRemoved::Manager(node.id));
    }
    if node.status.state == NodeState::Ready && !is_forced {
        return Err(NotRemoved::NotDown(node.id));
    }
    Ok(None)
}

/// Why a manager stays.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Needed {
    /// Remedy: promote another one.
    #[error("it is the last manager of the swarm: promote another node first")]
    Last,
    /// Remedy: start them, or remove them.
    #[error(
        "the swarm would lose its quorum without it: {n_silent} of the {n_others} other managers do not answer ({silent}); start them again first, or remove them from the swarm"
    )]
    QuorumLost {
        /// How many do not answer.
        n_silent: usize,
        /// How many others there are.
        n_others: usize,
        /// Where those are that do not.
        silent: String,
    },
}

/// Whether the others of these voters keep a majority without `raft_id`, where `answers` says who answers the leader
/// and `address` where each is.
pub fn may_leave(
    voters: &BTreeSet<u64>,
    raft_id: u64,
    answers: impl Fn(u64) -> bool,
    address: impl Fn(u64) -> String,
) -> Result<(), Needed> {
    if !voters.contains(&raft_id) {
        return Ok(());
    }
    if voters.len() == 1 {
        return Err(Needed::Last);
    }
    let others = voters.iter().copied().filter(|voter| *voter != raft_id);
    let (answering, silent): (Vec<u64>, Vec<u64>) = others.partition(|voter| answers(*voter));
    if keeps_majority(voters.len(), answering.len()) {
        return Ok(());
    }
    let addresses: Vec<String> = silent.iter().map(|voter| address(*voter)).collect();
    let (n_silent, n_others) = (silent.len(), voters.len() - 1);
    Err(Needed::QuorumLost { n_silent, n_others, silent: addresses.join(", ") })
}

/// Whether `n_voters` managers keep a majority without one of them, when `n_others` of the others answer.
pub fn keeps_majority(n_voters: usize, n_others: usize) -> bool {
    n_voters > 1 && n_others > (n_voters - 1) / 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::level::FACTS;
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
    fn a_program_is_admitted_once_its_node_says_so() {
        use NodeRole::{Manager, Worker};
        let status = ManagerStatus { raft_id: 7, ..ManagerStatus::default() };
        let admitted = |node: &Node, said| {
            let mut world = World::new("", service(0), "");
            world.put(vec![Object::Node(Box::new(node.clone()))]);
            admit(&world.state, NodeId(1), &status, said)
        };
        let mut promoted = of_role(1, Manager);
        promoted.manager_status = None;
        let noted = match admitted(&promoted, CONTROL) {
            Ok(Admission::Note(noted)) => *noted,
            other => panic!("{other:?}"),
        };
        assert_eq!(noted.manager_status, Some(status.clone()));
        assert_eq!(admitted(&noted, CONTROL), Ok(Admission::Admitted));
        let noted = match admitted(&noted, FACTS) {
            Ok(Admission::Note(noted)) => *noted,
            other => panic!("an older program than its session said: {other:?}"),
        };
        assert_eq!(noted.description.as_ref().unwrap().format_level, FACTS);
        assert_eq!(admitted(&noted, FACTS), Ok(Admission::Admitted));
        assert_eq!(admitted(&noted, CONTROL), Ok(Admission::Admitted), "it was upgraded");
        assert_eq!(admitted(&noted, 0), Ok(Admission::Admitted), "one that does not say so");
        let worker = of_role(1, Worker);
        assert_eq!(admitted(&worker, CONTROL), Err(NotAdmitted::ToBeWorker(NodeId(1))));
        assert_eq!(admitted(&of_role(2, Manager), 0), Err(NotAdmitted::Removed(NodeId(1))));
    }

    #[test]
    fn a_membership_is_over_once_its_node_has_another_raft_id() {
        use NodeRole::{Manager, Worker};
        let status = |raft_id| ManagerStatus { raft_id, ..ManagerStatus::default() };
        let member = |number, raft_id| {
            let manager_status = Some(status(raft_id));
            Node { manager_status, ..of_role(number, Manager) }
        };
        let (manager, other) = (member(1, 7), member(2, 8));
        assert!(!is_over(7, Some(raft_id_of(&manager))));
        // It keeps its id on its way to be a worker, until it is taken out.
        let demoted = asked(&[manager, other.clone()], Worker).unwrap();
        assert!(!is_over(7, Some(raft_id_of(&demoted))));
        let promoted = asked(&[retired(&demoted), other], Manager).unwrap();
        assert_eq!((promoted.observed_role(), raft_id_of(&promoted)), (Manager, NOT_A_MANAGER));
        assert!(is_over(7, Some(raft_id_of(&promoted))));
        assert!(is_over(7, Some(raft_id_of(&member(1, 9)))), "it has joined by another id");
        assert!(!is_over(7, None), "nobody says so");
    }

    #[test]
    fn members_that_no_node_names_are_found_but_for_the_leader() {
        let mut world = World::new("", service(0), "");
        let named = [(1, NodeRole::Manager, 7), (2, NodeRole::Worker, 8)];
        let nodes = named.map(|(number, role, raft_id)| {
            let manager_status = Some(ManagerStatus { raft_id, ..ManagerStatus::default() });
            Object::Node(Box::new(Node { manager_status, ..of_role(number, role) }))
        });
        world.put(nodes.into());
        world.put(vec![Object::Node(Box::new(of_role(3, NodeRole::Worker)))]);
        for (members, own, expect) in [
            (vec![7, 8], 7, vec![]), // One that is to be a worker is taken out as such.
            (vec![7, 8, 9, 10], 7, vec![9, 10]),
            (vec![9], 9, vec![]), // It founds the swarm.
            (vec![], 7, vec![]),
        ] {
            assert_eq!(unnamed(&world.state, &members, own), expect, "{members:?} of {own}");
        }
    }

    #[test]
    fn a_retiring_leader_hands_over_and_others_are_taken_out() {
        let mut node = of_role(1, NodeRole::Worker);
        assert_eq!(retirement(&node, 7), Retirement::Note);
        node.manager_status = Some(ManagerStatus { raft_id: 7, ..ManagerStatus::default() });
        assert_eq!(retirement(&node, 7), Retirement::TransferLeadership);
        assert_eq!(retirement(&node, 8), Retirement::TakeOut { raft_id: 7 });
    }

    #[test]
    fn a_manager_is_removed_once_it_is_down_and_a_worker_that_answers_by_force() {
        use NodeRole::{Manager, Worker};
        for (role, state, is_forced, expect) in [
            (Manager, NodeState::Ready, true, None),
            (Manager, NodeState::Down, false, None),
            (Manager, NodeState::Down, true, Some(Some(0))),
            (Worker, NodeState::Ready, false, None),
            (Worker, NodeState::Ready, true, Some(None)),
            (Worker, NodeState::Down, false, Some(None)),
        ] {
            let mut node = of_role(1, role);
            node.status.state = state;
            let removal = check_removal(&node, is_forced);
            assert_eq!(removal.ok(), expect, "{role:?} {state:?} {is_forced}");
        }
    }

    #[test]
    fn who_is_needed_is_told_who_does_not_answer() {
        let voters: BTreeSet<u64> = [1, 2, 3].into();
        let leave = |voters: &BTreeSet<u64>, answering: &[u64]| {
            let answers = |id: u64| answering.contains(&id);
            may_leave(voters, 1, answers, |id| format!("n{id}")).map_err(|why| why.to_string())
        };
        assert_eq!(leave(&voters, &[2, 3]), Ok(()));
        let why = leave(&voters, &[2]).unwrap_err();
        assert!(why.contains("1 of the 2 other managers do not answer (n3)"), "{why}");
        assert_eq!(leave(&[2, 3].into(), &[]), Ok(()), "it has no vote");
        assert!(leave(&[1].into(), &[]).unwrap_err().contains("last manager"));
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
