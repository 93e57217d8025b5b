//! Assigns waiting tasks to nodes.
//!
//! [`schedule`] looks at every task without a node: it gives it the node that ranks first among
//! those that pass all filters, with an address of that node's slice and one on each of
//! its networks, or writes why none passes.
//!
//! ```text
//! waiting ──► group by (service, spec version) ──► filter nodes ──► tree, by rank ──► Assigned
//!                                                       └── none left ─────────────► Pending, why
//! ```
//!
//! # Reading order
//!
//! [`schedule`], [`filter`] (requirements and filters), [`explain`](mod@explain) (the words for people), [`preference`],
//! then [`index`].
//!
//! # Invariants
//!
//! - A task is assigned once: nothing here moves a task that has a node.
//! - Decisions of one pass see each other: two tasks never take the same last CPU.
//! - Ties end in `NodeId` order, so every leader computes the same placement.
//! - The index is a function of the state: fed change by change it equals one made anew.
//! - Absent on purpose: preemption, random choice. Time enters only to forget failures
//!   older than [`FAILURE_WINDOW`].
//!
//! Reasons are written after all groups are placed, so that they speak of what is left.
//!
//! # Sources
//!
//! SwarmKit `design/scheduler.md`, `manager/scheduler/{pipeline,filter,nodeinfo,scheduler}.go`.
//! Differs: reservations count in the ranking; the text names the nearest miss; services and swarms can ask for
//! [`PlacementStrategy::Binpack`].

mod explain;
#[cfg(test)]
mod explain_tests;
mod filter;
mod generic;
mod index;
mod preference;
mod preset;
mod succession;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use skep_common::object::Slot;
use skep_common::spec::PlacementStrategy;
use skep_common::{NodeId, ServiceId, TaskId, Version};

use crate::allocator::Cursors;
use crate::fork::Fork;
use crate::image;
use crate::network;
use crate::placed::Pinned;
use crate::secrets;
use crate::store::State;

use explain::Case;
pub(crate) use explain::explain;
pub use explain::{Explanation, RuledOut, node_name};
use filter::Requirement;
pub(crate) use filter::carries_overlays;
pub(crate) use generic::Stock;
pub(crate) use index::{Amounts, Index, keeps_tasks};
use preference::Candidates;
pub(crate) use preference::parse_all as parse_preferences;

/// Failures of a service's tasks on a node count for this long. SwarmKit's `monitorFailures`.
pub const FAILURE_WINDOW: Duration = Duration::from_mins(5);
/// From this many failures on a node ranks last for that service. SwarmKit's `maxFailures`.
const FAILURES_MAX: u32 = 5;

/// Tasks of one service and one spec version have equal requirements.
pub(crate) type GroupKey = (ServiceId, Version);

/// What orders nodes; the least is taken. The last part is the dense number of the node.
///
/// 1. nodes where the service failed often come last. Spread: 2. fewer active tasks of the service,
///    3. less reserved, in percent of the scarcer resource, 4. fewer active tasks in all. Binpack:
///    2. more reserved, 3. more active tasks in all, 4. fewer of the service; where the service
///    reserves nothing, 3 comes before 2. Both: 5. `NodeId`.
type Rank = (u32, [u32; 3], NodeId, usize);

/// Places what can be placed and says of the rest why it waits; `false` where the pass was full before.
pub(crate) fn schedule(fork: &mut Fork<'_>, index: &mut Index, cursors: &mut Cursors) -> bool {
    if !index.take_changed() {
        return true; // The reasons that were written are still true.
    }
    let keys: Vec<GroupKey> = index.waiting().keys().copied().collect();
    let mut settled: BTreeMap<GroupKey, String> = BTreeMap::new();
    for key in keys {
        let Some(first) = index.waiting()[&key].first().map(|(_, task_id)| *task_id) else {
            continue;
        };
        match requirement(fork.state(), first) {
            Ok(requirement) => {
                let place = match preset::node_of(fork, first) {
                    Some(_) => preset::place,
                    None => place_group,
                };
                let mut reason = place(fork, index, cursors, key, &requirement).err();
                // A pass that is full has not tried them all.
                let are_left_out = reason.is_none() && fork.has_room();
                if are_left_out && succession::give_way(fork, index, key, &requirement) {
                    reason = place(fork, index, cursors, key, &requirement).err();
                }
                settled.extend(reason.map(|reason| (key, reason)));
            }
            Err(reason) => {
                settled.insert(key, reason);
            }
        }
        if !fork.has_room() {
            index.set_changed(); // The next pass goes on here.
            return false;
        }
    }
    explain_rest(fork, index, settled);
    let is_all = fork.has_room();
    if is_all {
        index.take_changed();
    } else {
        index.set_changed();
    }
    is_all
}

/// Writes why tasks still wait.
fn explain_rest(fork: &mut Fork<'_>, index: &Index, mut settled: BTreeMap<GroupKey, String>) {
    let left: Vec<(GroupKey, Vec<TaskId>)> = index
        .waiting()
        .iter()
        .map(|(key, tasks)| (*key, tasks.iter().map(|(_, task_id)| *task_id).collect()))
        .collect();
    for (key, tasks) in left {
        let reason = settled.remove(&key).or_else(|| {
            let requirement = requirement(fork.state(), *tasks.first()?).ok()?;
            if preset::node_of(fork, *tasks.first()?).is_some() {
                preset::explain(fork, index, key, &requirement, &tasks);
                return None;
            }
            Some(case(fork, index, key.0).reason(&requirement, None))
        });
        let reason = reason.map(explain::bounded);
        for task_id in tasks {
            if let Some(reason) = reason.as_ref().filter(|_| fork.has_room()) {
                fork.defer(task_id, reason);
            }
        }
    }
}

fn case<'f>(fork: &'f Fork<'_>, index: &'f Index, service_id: ServiceId) -> Case<'f> {
    Case { state: fork.state(), placed: fork.placed(), index, service_id }
}

/// What a group's tasks need; an error is their reason to wait, whatever the nodes have.
fn requirement(state: &State, task_id: TaskId) -> Result<Requirement, String> {
    let task = state.task(task_id).ok_or_else(String::new)?;
    let mut requirement = Requirement::of(state, task)?;
    if let Some(missing) = secrets::missing(state, &task.spec) {
        return Err(missing);
    }
    let name = task.spec.container_spec.as_ref().map_or("", |container| &container.image);
    if !name.is_empty() {
        let pinned = image::resolve(state, name).map_err(|missing| missing.to_string())?;
        requirement.pinned = (pinned != name).then(|| Pinned::of(&task.spec, pinned));
    }
    Ok(requirement)
}

/// Places a group's tasks, as far as there are nodes; an error is the reason of the rest where that is
/// not a matter of nodes.
fn place_group(
    fork: &mut Fork<'_>,
    index: &mut Index,
    cursors: &mut Cursors,
    key: GroupKey,
    requirement: &Requirement,
) -> Result<(), String> {
    let tasks: Vec<(Slot, TaskId)> = index.waiting()[&key].iter().copied().collect();
    let mut n_placed = 0;
    let result = fill(fork, index, cursors, key, requirement, &tasks, &mut n_placed);
    index.leave_waiting(key, &tasks[..n_placed]);
    result
}

/// Gives nodes to the first of the tasks, as many as there are nodes for.
fn fill(
    fork: &mut Fork<'_>,
    index: &mut Index,
    cursors: &mut Cursors,
    key: GroupKey,
    requirement: &Requirement,
    tasks: &[(Slot, TaskId)],
    n_placed: &mut usize,
) -> Result<(), String> {
    let failures = index.recent_failures(key, fork.now());
    let mut counts = index.active_of_service(key.0);
    let rank = |index: &Index, counts: &[u32], number: usize| -> Rank {
        let entry = index.entry(number);
        let failures = failures.get(&number).copied().filter(|n| *n >= FAILURES_MAX).unwrap_or(0);
        (failures, order(entry, requirement, counts[number]), entry.id, number)
    };
    let preferences = &requirement.preferences;
    let mut candidates = Candidates::default();
    for (number, entry) in index.entries().enumerate() {
        let Some(node) = entry.node.as_deref() else { continue };
        candidates.charge(preferences, node, counts[number]);
        if filter::first_miss(entry, requirement, counts[number]).is_none() {
            candidates.push(preferences, node, rank(index, &counts, number));
        }
    }
    'tasks: for (slot, task_id) in tasks {
        if !fork.has_room() {
            break;
        }
        let (number, uplink) = loop {
            let Some((.., number)) = candidates.pop() else { break 'tasks };
            let entry = index.entry(number);
            if filter::first_miss(entry, requirement, counts[number]).is_some() {
                continue; // Full now; it stays out for the rest of the group.
            }
            if !requirement.has_uplink {
                break (number, None);
            }
            let node = entry.node.as_deref();
            if let Some(uplink) = node.and_then(|node| fork.grant_uplink(cursors, node)) {
                break (number, Some(uplink));
            }
        };
        // Interfaces have this order in the container: networks as the spec names them, then the uplink.
        let networks = &requirement.networks;
        let mut attachments = network::attach(fork.state(), &mut cursors.networks, networks)?;
        attachments.extend(uplink);
        let entry = index.entry(number);
        let (node_id, pinned) = (entry.id, requirement.pinned.as_ref());
        let generic = entry.generic.choose(&requirement.generic);
        index.place(*task_id, key.0, number, requirement, &generic);
        fork.place((key.0, *slot, *task_id), node_id, pinned, attachments, generic);
        *n_placed += 1;
        counts[number] += 1;
        if let Some(node) = index.entry(number).node.as_deref() {
            candidates.charge(preferences, node, 1);
            candidates.push(preferences, node, rank(index, &counts, number));
        }
    }
    Ok(())
}

/// The part of a node's rank that the strategy decides.
fn order(entry: &index::Entry, requirement: &Requirement, n_replicas: u32) -> [u32; 3] {
    let (reserved, n_active) = (entry.reserved_percent, entry.n_active);
    match requirement.strategy {
        PlacementStrategy::Spread => [n_replicas, reserved, n_active],
        PlacementStrategy::Binpack if requirement.reserves() => {
            [u32::MAX - reserved, u32::MAX - n_active, n_replicas]
        }
        PlacementStrategy::Binpack => [u32::MAX - n_active, u32::MAX - reserved, n_replicas],
    }
}
