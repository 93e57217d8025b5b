//! Erases tasks and services that nobody needs any more.
//!
//! - A task to be deleted goes once it has stopped, was never on a node, or its node is down or gone
//!   (a node that comes back is told which tasks it shall have, and stops the others).
//! - Of each slot `TaskHistoryRetentionLimit` finished tasks stay, or as many as the restart policy's
//!   `MaxAttempts` needs to count. Differs from SwarmKit, which counts the live one in: five failures
//!   make the scheduler avoid a node, so that many must be left to see.
//! - A service that was removed goes with its last task.
//! - A network that was removed goes with the last task on it.
//! - A task whose node is gone, or down for a day, is `Orphaned`: it holds nothing any more.
//!
//! Source: SwarmKit `manager/orchestrator/taskreaper`, `manager/dispatcher` (`moveTasksToOrphaned`).

use std::sync::Arc;
use std::time::Duration;

use skep_common::limits::{MAX_ATTEMPTS_COUNTED, TASK_HISTORY_LIMIT};
use skep_common::object::NodeState;
use skep_common::{Kind, NetworkId, NodeId, ServiceId, Task, TaskId, TaskState, Timestamp};

use crate::command::{Action, TaskPatch};
use crate::fork::Fork;
use crate::kept_out;
use crate::orchestrator::is_live;
use crate::store::State;

/// SwarmKit's `defaultNodeDownPeriod`.
const NODE_DOWN_MAX: Duration = Duration::from_hours(24);

/// Erases a node, and refuses it from now on. Its tasks will never be heard of again: what they held is free.
///
/// Those of services that have ended stay as they are: what a job has done is not done again.
pub fn remove_node(state: &State, node_id: NodeId, now: Timestamp) -> Vec<Action> {
    let is_lost = |task: &&Arc<Task>| task.standalone.is_some() || !task.status.state.is_terminal();
    let orphaned = state.tasks_of_node(node_id).filter(is_lost).map(|task| {
        let mut status = task.status.clone();
        (status.state, status.timestamp) = (TaskState::Orphaned, now);
        "the node was removed".clone_into(&mut status.message);
        Action::PatchTask(TaskPatch { status: Some(status), ..TaskPatch::of(task.id) })
    });
    let erased = [Action::Delete { kind: Kind::Node, id: node_id.0 }];
    orphaned.chain(erased).chain(kept_out::keep_out(state, node_id, now)).collect()
}

/// Gives up the tasks of a node that is gone or was down for too long; says when to look again.
pub(crate) fn orphan_tasks(fork: &mut Fork<'_>, node_id: NodeId) -> Option<Timestamp> {
    let reason = match fork.state().node(node_id) {
        None => "the node was removed from the swarm",
        Some(node) if node.status.state == NodeState::Down => {
            // The last write is when it went down, or later.
            let at = node.meta.updated_at.after(NODE_DOWN_MAX);
            if fork.now() < at {
                let mut tasks = fork.state().tasks_of_node(node_id);
                return tasks.any(|task| !task.status.state.is_terminal()).then_some(at);
            }
            "the node was down for 24 hours"
        }
        Some(_) => return None,
    };
    let tasks = fork.state().tasks_of_node(node_id);
    let unfinished = tasks.filter(|task| !task.status.state.is_terminal());
    for task_id in unfinished.map(|task| task.id).collect::<Vec<TaskId>>() {
        if !fork.has_room() {
            break;
        }
        fork.orphan(task_id, reason);
    }
    None
}

/// Erases what a service does not need.
pub(crate) fn reap(fork: &mut Fork<'_>, service_id: ServiceId) {
    let state = fork.state();
    let history_limit = history_limit(state);
    let mut doomed: Vec<TaskId> = Vec::new();
    let mut kept: Vec<&Arc<Task>> = Vec::new();
    for task in state.tasks_of_service(service_id) {
        let is_unplaced = task.node_id.is_none() && !is_live(task);
        let is_gone = task.desired_state >= TaskState::Remove && has_stopped(state, task);
        if is_unplaced || is_gone {
            doomed.push(task.id);
        } else {
            kept.push(task);
        }
    }
    for tasks in kept.chunk_by_mut(|left, right| left.slot_key() == right.slot_key()) {
        doomed.extend(old_history(tasks, history_limit));
    }
    for task_id in doomed {
        if !fork.has_room() {
            return;
        }
        fork.delete_task(task_id);
    }
    let state = fork.state();
    let is_over = state.service(service_id).is_some_and(|service| service.pending_delete)
        && state.tasks_of_service(service_id).next().is_none();
    if is_over {
        fork.delete_service(service_id);
    }
}

/// Erases a network on its way out once no task is on it; says whether it is gone.
pub(crate) fn reap_network(fork: &mut Fork<'_>, network_id: NetworkId) -> bool {
    let state = fork.state();
    let Some(network) = state.network(network_id) else { return true };
    let is_over = network.pending_delete
        && !state.has_tasks_on(network_id)
        && state.user_of_network(network_id).is_none();
    if is_over {
        fork.delete_network(network_id);
    }
    is_over
}

fn has_stopped(state: &State, task: &Task) -> bool {
    let is_alive =
        |node_id| state.node(node_id).is_some_and(|node| node.status.state != NodeState::Down);
    task.status.state.is_terminal() || !task.node_id.is_some_and(is_alive)
}

/// The finished tasks of a slot beyond its history. The newest task is not among them: where no task
/// of the slot is live, it tells that the slot has ended.
fn old_history(tasks: &mut [&Arc<Task>], limit: i64) -> Vec<TaskId> {
    let Ok(limit) = usize::try_from(limit) else { return Vec::new() };
    tasks.sort_by_key(|task| (task.meta.created_at, task.spec_version, task.id));
    let Some(newest) = tasks.last() else { return Vec::new() };
    let policy = newest.spec.restart_policy.as_ref();
    let max_attempts = policy.and_then(|policy| policy.max_attempts).unwrap_or(0);
    let needed = if max_attempts <= MAX_ATTEMPTS_COUNTED { max_attempts + 1 } else { 1 };
    let kept = limit.max(usize::try_from(needed).unwrap_or(usize::MAX));
    // What a job has done is told by the task that did it.
    let is_result =
        |task: &Task| task.job_iteration.is_some() && task.status.state == TaskState::Complete;
    let is_finished =
        |task: &&&Arc<Task>| !is_live(task) && task.status.state.is_terminal() && !is_result(task);
    let n_surplus = tasks.iter().filter(is_finished).count().saturating_sub(kept);
    let surplus = tasks.iter().filter(is_finished).take(n_surplus);
    surplus.filter(|task| task.id != newest.id).map(|task| task.id).collect()
}

fn history_limit(state: &State) -> i64 {
    let spec = state.cluster().and_then(|cluster| cluster.spec.orchestration.as_ref());
    spec.and_then(|spec| spec.task_history_retention_limit).unwrap_or(TASK_HISTORY_LIMIT)
}
