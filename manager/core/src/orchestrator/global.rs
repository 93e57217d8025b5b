//! Converges a global service: one task on every node that may have one.
//!
//! A node gets a task while it is up, active and meets the constraints. It keeps its task while it is
//! paused, and then that is not replaced either. A node that is down, drained or does not meet the
//! constraints any more gives its task up, and no other node takes it.
//! Source: SwarmKit `manager/orchestrator/global/global.go`.

use std::sync::Arc;

use skep_common::object::{Node, NodeState, Slot};
use skep_common::spec::Availability;
use skep_common::{NodeId, Service, Task, TaskState};

use super::{Scope, enforcer, replicated};
use crate::fork::Fork;

/// Makes the tasks that nodes lack, and gives up those of nodes that shall not have one.
pub(super) fn scale(scope: &mut Scope<'_, '_>, service: &Service) {
    let now = scope.fork.now();
    let slots = scope.slots(service.id);
    for (slot, tasks) in slots.iter() {
        if !scope.fork.has_room() {
            return;
        }
        let node = slot.node().and_then(|node_id| scope.fork.state().node(node_id));
        // A node's id never comes back: nothing will ask for the history either.
        let Some(node) = node else {
            desire_all(scope.fork, tasks, TaskState::Remove);
            continue;
        };
        if !keeps(service, node) {
            desire_all(scope.fork, tasks, TaskState::Shutdown);
        }
    }
    let nodes = scope.fork.state().nodes().values();
    let lacks = |node: &&Arc<Node>| {
        let tasks = slots.get(Slot::Node(node.id));
        takes(service, node) && !tasks.is_some_and(|tasks| replicated::is_occupied(tasks, now))
    };
    let missing: Vec<NodeId> = nodes.filter(lacks).map(|node| node.id).collect();
    for node_id in missing {
        if !scope.create_in_slot(service, Slot::Node(node_id), now) {
            break;
        }
    }
}

/// Whether a slot may get a new task now; one that no node names always may.
pub(super) fn may_fill(scope: &Scope<'_, '_>, service: &Service, slot: Slot) -> bool {
    slot.node().is_none_or(|node_id| {
        scope.fork.state().node(node_id).is_some_and(|node| takes(service, node))
    })
}

/// Whether a node may get a task.
pub(super) fn takes(service: &Service, node: &Node) -> bool {
    node.status.state != NodeState::Down
        && node.spec.availability == Availability::Active
        && enforcer::is_met(&service.spec.task_template, node)
}

/// Whether a node may keep the task that it has.
pub(super) fn keeps(service: &Service, node: &Node) -> bool {
    let is_paused = node.spec.availability == Availability::Pause;
    takes(service, node) || (is_paused && node.status.state != NodeState::Down)
}

fn desire_all(fork: &mut Fork<'_>, tasks: &[Arc<Task>], desired: TaskState) {
    for task in tasks {
        let is_history = !super::is_live(task) && desired == TaskState::Shutdown;
        if !is_history {
            fork.desire(task.id, desired);
        }
    }
}
