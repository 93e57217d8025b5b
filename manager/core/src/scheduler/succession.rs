//! Start-first tasks that fit nowhere but in the place of the task that they follow.
//!
//! Such a task waits for a port of its predecessor in the slot, or for its share of the replicas that a
//! node may have, and the predecessor waits for it. The predecessor gives way then: of that slot the
//! update is a stop-first one. Resources are no reason: they may become free elsewhere.
//! Differs from SwarmKit, where both wait for ever (moby#36934).

use std::sync::Arc;

use skep_common::{Task, TaskId, TaskState};

use super::filter::{self, Filter, Requirement};
use super::index::{Amounts, Entry, Index, host_ports};
use super::{GroupKey, network};
use crate::fork::Fork;
use crate::orchestrator::is_live;
use crate::service;

/// Stops the predecessors that tasks of one group, which fit nowhere, wait for. `true` where there are any.
pub(super) fn give_way(
    fork: &mut Fork<'_>,
    index: &mut Index,
    key: GroupKey,
    requirement: &Requirement,
) -> bool {
    if fork.state().service(key.0).is_some_and(|service| service::is_paused(service)) {
        return false; // What serves goes on until somebody says what is to become of the update.
    }
    let waiting = index.waiting().get(&key).into_iter().flatten();
    let waiting: Vec<TaskId> = waiting.map(|(_, task_id)| *task_id).collect();
    let counts = index.active_of_service(key.0);
    let mut predecessors: Vec<TaskId> = Vec::new();
    for task in waiting.iter().filter_map(|task_id| fork.state().task(*task_id)) {
        let stands_in_the_way = |old: &&Arc<Task>| {
            let is_predecessor = is_live(old)
                && old.spec_version < task.spec_version
                && !old.status.state.is_terminal()
                && task.preset_node.is_none_or(|node_id| old.node_id == Some(node_id));
            let number = old.node_id.and_then(|node_id| index.number_of(node_id));
            is_predecessor
                && number.is_some_and(|number| {
                    let n_replicas = counts.get(number).copied().unwrap_or_default();
                    is_for_want_of(index.entry(number), requirement, old, n_replicas)
                })
        };
        let slot = || fork.state().tasks_of_slot(task.service_id, task.slot_key());
        if slot().any(|other| is_on_its_way_out(other)) {
            continue; // Its place may be what is lacking, and is free soon.
        }
        predecessors.extend(slot().filter(stands_in_the_way).map(|old| old.id));
    }
    for task_id in &predecessors {
        fork.desire(*task_id, TaskState::Shutdown);
        index.sync_task(*task_id, fork.state().task(*task_id));
    }
    !predecessors.is_empty()
}

/// Whether a task was asked to end, and has not yet.
fn is_on_its_way_out(task: &Task) -> bool {
    !is_live(task) && !task.status.state.is_terminal() && task.node_id.is_some()
}

/// Whether a node refuses a task for a port or the replicas of `old` alone.
fn is_for_want_of(entry: &Entry, requirement: &Requirement, old: &Task, n_replicas: u32) -> bool {
    let mut without = entry.clone();
    without.free.give_back(&Amounts::reserved_by(&old.spec));
    without.generic.give_back(&old.assigned_generic_resources);
    without.n_addresses -= u32::from(network::has_uplink(old)).min(without.n_addresses);
    let miss = filter::first_miss(&without, requirement, n_replicas);
    if !matches!(miss, Some(Filter::HostPort | Filter::Replicas)) {
        return false;
    }
    for port in host_ports(old) {
        without.ports.remove(&port);
    }
    filter::first_miss(&without, requirement, n_replicas.saturating_sub(1)).is_none()
}
