//! Tasks whose node was decided when they were made: it takes them, or they wait for it.

use skep_common::object::Slot;
use skep_common::{NodeId, TaskId};

use super::filter::{self, Requirement};
use super::index::Index;
use super::{GroupKey, network};
use crate::allocator::Cursors;
use crate::fork::Fork;

/// The only node that a task may be on.
pub(super) fn node_of(fork: &Fork<'_>, task_id: TaskId) -> Option<NodeId> {
    fork.state().task(task_id).and_then(|task| task.preset_node)
}

/// Confirms the nodes of a group's tasks, where they pass all filters; an error is the reason of the
/// rest where that is not a matter of nodes.
pub(super) fn place(
    fork: &mut Fork<'_>,
    index: &mut Index,
    cursors: &mut Cursors,
    key: GroupKey,
    requirement: &Requirement,
) -> Result<(), String> {
    let tasks: Vec<(Slot, TaskId)> = index.waiting()[&key].iter().copied().collect();
    let mut placed = Vec::new();
    let result = fill(fork, index, cursors, key, requirement, &tasks, &mut placed);
    index.leave_waiting(key, &placed);
    result
}

fn fill(
    fork: &mut Fork<'_>,
    index: &mut Index,
    cursors: &mut Cursors,
    key: GroupKey,
    requirement: &Requirement,
    tasks: &[(Slot, TaskId)],
    placed: &mut Vec<(Slot, TaskId)>,
) -> Result<(), String> {
    let counts = index.active_of_service(key.0);
    for (slot, task_id) in tasks.iter().copied() {
        if !fork.has_room() {
            break;
        }
        let Some(number) = node_of(fork, task_id).and_then(|node_id| index.number_of(node_id))
        else {
            continue;
        };
        let entry = index.entry(number);
        // A node has one of them, so that no count changes under way.
        let n_replicas = counts.get(number).copied().unwrap_or_default();
        if filter::first_miss(entry, requirement, n_replicas).is_some() {
            continue;
        }
        let uplink = match (requirement.has_uplink, entry.node.as_deref()) {
            (true, Some(node)) => match fork.grant_uplink(cursors, node) {
                Some(uplink) => Some(uplink),
                None => continue,
            },
            _ => None,
        };
        let networks = &requirement.networks;
        let mut attachments = network::attach(fork.state(), &mut cursors.networks, networks)?;
        attachments.extend(uplink);
        let (node_id, pinned) = (entry.id, requirement.pinned.as_ref());
        let generic = entry.generic.choose(&requirement.generic);
        index.place(task_id, key.0, number, requirement, &generic);
        fork.place((key.0, slot, task_id), node_id, pinned, attachments, generic);
        placed.push((slot, task_id));
    }
    Ok(())
}

/// Writes why each waits for its node.
pub(super) fn explain(
    fork: &mut Fork<'_>,
    index: &Index,
    key: GroupKey,
    requirement: &Requirement,
    tasks: &[TaskId],
) {
    for task_id in tasks {
        if !fork.has_room() {
            break;
        }
        let node_id = node_of(fork, *task_id);
        let reason = super::case(fork, index, key.0).reason(requirement, node_id);
        fork.defer(*task_id, &reason);
    }
}
