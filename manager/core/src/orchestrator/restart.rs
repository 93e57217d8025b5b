//! Decides what follows a task that failed, and when a successor may start.
//!
//! A task is never restarted: it is to be shut down, and a new task in its slot, with desired state
//! `Ready`, is prepared at once and released after the restart delay and when the old one stopped.
//!
//! The attempts of a slot are counted from its tasks in the store, which the reaper keeps for that.
//! Differs from SwarmKit, whose supervisor remembers them: a limit above [`MAX_ATTEMPTS_COUNTED`]
//! counts as none, since the history that it needs has brought clusters down (moby#35637).
//! Also differs: no delay where the node is down, drained or no longer fits, for the task did not fail.
//! Source: SwarmKit `manager/orchestrator/restart/restart.go`.

use std::sync::Arc;
use std::time::Duration;

use skep_common::limits::{MAX_ATTEMPTS_COUNTED, defaults};
use skep_common::spec::{RestartCondition, RestartPolicy};
use skep_common::{Service, Task, TaskState, Timestamp};

use super::{
    OLD_TASK_WAIT, STOP_SLACK, Scope, enforcer, global, is_live, is_stopping, updater, wanted_state,
};
use crate::scheduler::keeps_tasks;

/// Why a live task needs a successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// It ended, or its health check failed.
    Failed,
    /// Its node is down, gone or drained, or does not meet its constraints any more.
    Displaced,
}

/// Shuts down live tasks that failed or must move, and makes their successors.
pub(super) fn replace_failed(scope: &mut Scope<'_, '_>, service: &Service) {
    let now = scope.fork.now();
    let constraints = enforcer::Constraints::of(service);
    for (slot, tasks) in scope.slots(service.id).iter() {
        let fault = |task: &Task| fault(scope, &constraints, task);
        let mut live = tasks.iter().filter(|task| is_live(task));
        if live.all(|task| fault(task).is_none()) {
            continue; // As in almost all slots.
        }
        let live = tasks.iter().filter(|task| is_live(task));
        let (failed, sound): (Vec<_>, Vec<_>) =
            live.map(|task| (task, fault(task))).partition(|(_, fault)| fault.is_some());
        let is_clean = |task: &Task| updater::is_clean(scope.fork.state(), service, task);
        let needs_none =
            sound.iter().any(|(task, _)| is_clean(task)) || !global::may_fill(scope, service, slot);
        let mut start_after = failed
            .iter()
            .filter(|(task, _)| !needs_none && has_successor(task, tasks, now))
            .map(|(task, fault)| now.after(delay(task, *fault)));
        // Two of one slot fail together only mid-update; one successor is enough.
        let start_after = start_after.next().map(|first| start_after.fold(first, Timestamp::min));
        if !scope.fork.has_room() {
            return;
        }
        for (task, _) in failed {
            scope.fork.desire(task.id, TaskState::Shutdown);
        }
        if let Some(start_after) = start_after {
            scope.create_in_slot(service, slot, start_after);
        }
    }
}

fn fault(scope: &Scope<'_, '_>, constraints: &enforcer::Constraints, task: &Task) -> Option<Fault> {
    if task.job_iteration.is_some() && task.status.state == TaskState::Complete {
        return None; // It did what it was made for, wherever.
    }
    if let Some(node_id) = task.node_id {
        let is_fit = || {
            let node = scope.fork.state().node(node_id);
            node.is_some_and(|node| keeps_tasks(node) && constraints.allow(task, node))
        };
        // Most tasks need nothing of their node that it could lose.
        let is_undemanding = scope.index.keeps_tasks(node_id) && constraints.allow_any_node(task);
        if !(is_undemanding || is_fit()) || scope.evicted.contains(&task.id) {
            return Some(Fault::Displaced);
        }
    }
    let is_unhealthy = task.status.unhealthy && task.status.state == TaskState::Running;
    (task.status.state.is_terminal() || is_unhealthy).then_some(Fault::Failed)
}

fn delay(task: &Task, fault: Option<Fault>) -> Duration {
    if fault == Some(Fault::Displaced) {
        return Duration::ZERO;
    }
    let policy = task.spec.restart_policy.as_ref();
    let delay = policy.and_then(|policy| policy.delay);
    delay.map_or(defaults::RESTART_DELAY, |delay| delay.duration())
}

/// Whether a task's restart policy gives it a successor. `tasks` are those of its slot.
pub(super) fn has_successor(task: &Task, tasks: &[Arc<Task>], now: Timestamp) -> bool {
    let unset = RestartPolicy::default();
    let policy = task.spec.restart_policy.as_ref().unwrap_or(&unset);
    let is_wanted = match policy.condition.unwrap_or_default() {
        RestartCondition::None => false,
        RestartCondition::OnFailure => task.status.state != TaskState::Complete,
        RestartCondition::Any => true,
    };
    let max_attempts = policy.max_attempts.unwrap_or(0);
    if !is_wanted || max_attempts == 0 || max_attempts > MAX_ATTEMPTS_COUNTED {
        return is_wanted;
    }
    // Every task of this spec version but the first one is an attempt, made when it was created; so is each
    // container by which a node followed another one of the same task.
    let window = policy.window.map(|window| window.duration()).filter(|window| !window.is_zero());
    let ended_at = task.status.applied_at.unwrap_or(now);
    let same_spec = tasks.iter().filter(|other| other.spec_version == task.spec_version);
    let mut made_at: Vec<Timestamp> =
        same_spec.clone().map(|other| other.meta.created_at).collect();
    made_at.sort_unstable();
    let counts = |at: &&Timestamp| window.is_none_or(|window| at.after(window) >= ended_at);
    let attempts = made_at.iter().skip(1).filter(counts).count() as u64;
    let of_nodes = same_spec.map(|other| other.status.attempts_within(window, ended_at));
    attempts + of_nodes.sum::<u64>() < max_attempts
}

/// Lets prepared successors start whose delay is over and whose predecessors have stopped.
pub(super) fn release(scope: &mut Scope<'_, '_>, service: &Service) {
    let now = scope.fork.now();
    let started = wanted_state(service);
    for (_, tasks) in scope.slots(service.id).iter() {
        for task in tasks.iter().filter(|task| task.desired_state <= TaskState::Ready) {
            let start_after = task.start_after.unwrap_or(task.meta.created_at);
            let state = scope.fork.state();
            // Also those to be deleted stop first, so that a slot never runs twice.
            let slot = state.tasks_of_slot(service.id, task.slot_key());
            let stopping = slot.filter(|other| other.id != task.id && is_stopping(state, other));
            let patience = stopping.map(|old| task.meta.created_at.after(patience(old))).max();
            let at = patience.map_or(start_after, |patience| patience.max(start_after));
            if at <= now {
                if !scope.fork.has_room() {
                    return;
                }
                scope.fork.desire(task.id, started);
            } else {
                scope.wake_at(at, "restart delay or the stop of an older task");
            }
        }
    }
}

/// How long the successor of a task waits for it.
pub(super) fn patience(old: &Task) -> Duration {
    let grace = old.spec.container_spec.as_ref().and_then(|spec| spec.stop_grace_period);
    let grace = grace.map_or(defaults::STOP_GRACE_PERIOD, |grace| grace.duration());
    OLD_TASK_WAIT.max(grace + STOP_SLACK)
}
