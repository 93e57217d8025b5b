//! 3. No assignment breaks constraint, resource, platform, port or max-replicas at the moment it is made,
//!    and none is made of a task that has a node.

use std::collections::BTreeSet;

use skep_common::object::NodeState;
use skep_common::spec::{Availability, PortProtocol, Resources};
use skep_common::{Node, NodeId, Object, Task, TaskId};
use skep_manager_core::{Action, Command, Outcome, State, constraint};

use super::{Invariant, ensure};
use crate::seen::Seen;
use crate::world::World;

pub(super) struct Placement;

/// The tasks that actions place, each with its node.
fn placed(state: &State, actions: &[Action]) -> Result<Vec<TaskId>, String> {
    let mut tasks = Vec::new();
    for action in actions {
        let (task_id, node_id) = match action {
            Action::Put { object: Object::Task(task), .. } => (Some(task.id), task.node_id),
            Action::PatchTask(patch) => (patch.task_id, patch.node_id),
            _ => (None, None),
        };
        let (Some(task_id), Some(node_id)) = (task_id, node_id) else { continue };
        let old: Option<NodeId> = state.task(task_id).and_then(|task| task.node_id);
        let is_patch = matches!(action, Action::PatchTask(_));
        ensure!(
            old.is_none() || (!is_patch && old == Some(node_id)),
            "{task_id} is placed on {node_id:?} and has the node {old:?}"
        );
        if old.is_none() {
            tasks.push(task_id);
        }
    }
    Ok(tasks)
}

/// What holds whatever changed between a decision and its commit: nobody but the leader places tasks.
fn fits(state: &State, task: &Task, node: &Node) -> Result<(), String> {
    let present: Vec<&Task> = state
        .tasks_of_node(node.id)
        .map(|other| &**other)
        .filter(|other| other.node_id == Some(node.id) && !other.status.state.is_terminal())
        .collect();
    let memory =
        |resources: Option<&Resources>| resources.and_then(|r| r.memory_bytes).unwrap_or(0);
    let reserved = |task: &Task| {
        memory(task.spec.resources.as_ref().and_then(|resources| resources.reservations.as_ref()))
    };
    let total = memory(node.description.as_ref().map(|description| &description.resources));
    let taken: i64 = present.iter().map(|other| reserved(other)).sum();
    ensure!(
        reserved(task) == 0 || taken <= total,
        "{} is over-reserved by {}",
        node.hostname(),
        task.name()
    );
    let mut ports: BTreeSet<(PortProtocol, u16)> = BTreeSet::new();
    for other in &present {
        for port in &other.host_ports {
            let Some(number) = port.published_port.filter(|number| *number != 0) else { continue };
            let is_free = ports.insert((port.protocol.unwrap_or_default(), number));
            ensure!(
                is_free,
                "port {number} of {} is published twice for {}",
                node.hostname(),
                task.name()
            );
        }
    }
    let max =
        task.spec.placement.as_ref().and_then(|placement| placement.max_replicas).unwrap_or(0);
    let replicas = present
        .iter()
        .filter(|other| other.service_id == task.service_id && other.desired_state.wants_run());
    ensure!(
        max == 0 || replicas.count() as u64 <= max,
        "too many of {} on {}",
        task.name(),
        node.hostname()
    );
    Ok(())
}

impl Invariant for Placement {
    fn name(&self) -> &'static str {
        "3: no assignment breaks a constraint, resource, port or limit, and no task is placed twice"
    }

    fn check(&mut self, _: &World, seen: &Seen) -> Result<(), String> {
        match seen {
            Seen::Planned { state, actions, now } => {
                let placed = placed(state, actions)?;
                if placed.is_empty() {
                    return Ok(());
                }
                let mut after = state.clone();
                let command = Command::new(*now, actions.to_vec());
                let (outcome, _) = after.apply(state.version().index + 1, &command);
                ensure!(
                    matches!(outcome, Outcome::Applied(_)),
                    "a plan is refused on its own view: {outcome:?}"
                );
                for task in placed.iter().filter_map(|id| after.task(*id)) {
                    let node = task.node_id.and_then(|node_id| after.node(node_id));
                    let node = node.ok_or_else(|| format!("{} is on no node", task.name()))?;
                    let is_open = node.status.state == NodeState::Ready
                        && node.spec.availability == Availability::Active;
                    ensure!(
                        is_open,
                        "{} is placed on {}, which takes none",
                        task.name(),
                        node.hostname()
                    );
                    let words =
                        task.spec.placement.as_ref().and_then(|one| one.constraints.clone());
                    let constraints = constraint::parse_all(&words.unwrap_or_default());
                    let constraints = constraints.map_err(|error| error.to_string())?;
                    ensure!(
                        constraint::matches_all(&constraints, node),
                        "{} breaks its constraints on {}",
                        task.name(),
                        node.hostname()
                    );
                    fits(&after, task, node)?;
                }
            }
            Seen::Committed { before, after, command, outcome: Outcome::Applied(_), .. } => {
                for task in
                    placed(before, &command.actions)?.iter().filter_map(|id| after.task(*id))
                {
                    let node = task.node_id.and_then(|node_id| after.node(node_id));
                    if let Some(node) = node.filter(|_| task.standalone.is_none()) {
                        fits(after, task, node)?;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}
