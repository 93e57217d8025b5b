//! Converges a service to its number of slots.
//!
//! Scaling up fills the lowest free slots. Scaling down first gives up extra copies on one node,
//! then slots that do not run, then high slots: a stateful primary usually has a low one.
//! Source: SwarmKit `manager/orchestrator/replicated/services.go`, `reconcile`.

use std::collections::BTreeMap;
use std::sync::Arc;

use skep_common::object::Slot;
use skep_common::{NodeId, Service, Task, TaskState};

use super::{Scope, is_live, newest, restart};

/// Slots that are not free, with their tasks.
type Occupied<'s> = BTreeMap<Slot, &'s [Arc<Task>]>;

/// Makes missing tasks and gives up surplus slots, each with its history.
pub(super) fn scale(scope: &mut Scope<'_, '_>, service: &Service, replicas: u64) {
    let now = scope.fork.now();
    let slots = scope.slots(service.id);
    let occupied: Vec<(Slot, &[Arc<Task>])> =
        slots.iter().filter(|(_, tasks)| is_occupied(tasks, now)).collect();
    let n_occupied = occupied.len() as u64;
    let mut taken = occupied.iter().map(|(slot, _)| *slot).peekable();
    let free_slots = (1..).map(Slot::Replica).filter(|slot| {
        while taken.next_if(|taken| taken < slot).is_some() {}
        taken.peek() != Some(slot)
    });
    for (_, slot) in (n_occupied..replicas).zip(free_slots) {
        if !scope.create_in_slot(service, slot, now) {
            break;
        }
    }
    if n_occupied > replicas {
        let occupied: Occupied<'_> = occupied.into_iter().collect();
        let surplus = (0..).zip(keep_order(&occupied)).filter(|(rank, _)| *rank >= replicas);
        // The last come first: where the pass is full, the next one finds the same order without them.
        let surplus: Vec<Slot> = surplus.map(|(_, slot)| slot).collect();
        for slot in surplus.into_iter().rev() {
            if !scope.fork.has_room() {
                break;
            }
            for task in occupied[&slot] {
                scope.fork.desire(task.id, TaskState::Remove);
            }
        }
    }
}

/// Whether a slot needs no new task: it has a live one, or ended for good.
pub(super) fn is_occupied(tasks: &[Arc<Task>], now: skep_common::Timestamp) -> bool {
    let ended_for_good =
        || newest(tasks).is_some_and(|task| !restart::has_successor(task, tasks, now));
    tasks.iter().any(|task| is_live(task)) || ended_for_good()
}

/// Orders slots from the first to keep to the first to give up.
fn keep_order(occupied: &Occupied<'_>) -> Vec<Slot> {
    let is_running = |tasks: &[Arc<Task>]| {
        tasks.iter().any(|task| is_live(task) && task.status.state == TaskState::Running)
    };
    let mut slots: Vec<Slot> = occupied.keys().copied().collect();
    slots.sort_by_key(|slot| (!is_running(occupied[slot]), *slot));

    let mut copies: BTreeMap<NodeId, u32> = BTreeMap::new();
    let mut ranked: Vec<(u32, Slot)> = Vec::with_capacity(slots.len());
    for slot in slots {
        let mut live = occupied[&slot].iter().filter(|task| is_live(task));
        let nth_copy = match (live.next().and_then(|task| task.node_id), live.next()) {
            (Some(node_id), None) => *copies.entry(node_id).and_modify(|n| *n += 1).or_insert(1),
            _ => u32::MAX, // Unplaced, ended or mid-update: cheapest to give up.
        };
        ranked.push((nth_copy, slot));
    }
    ranked.sort_by_key(|(nth_copy, _)| *nth_copy); // Stable: keeps the order above on ties.
    ranked.into_iter().map(|(_, slot)| slot).collect()
}
