//! Runs a job: tasks that are to end by themselves, once each.
//!
//! The slots of a replicated job count from 0, those of a global one are nodes. A slot is *done* once a
//! task of it ended with exit code 0; then it gets no other. One that failed is followed as the
//! restart policy says (`any` is as `on-failure`), and stays failed when that says no more.
//!
//! Each change of the spec begins a new *iteration*, which runs all of the job again. Tasks of older ones
//! are to be deleted, and those that still stop count towards the concurrency.
//! Differs from SwarmKit: an update that changes nothing begins no iteration; `MaxAttempts` holds for
//! global jobs, too.
//! Source: SwarmKit `manager/orchestrator/jobs/{replicated,global}`.

use std::collections::BTreeSet;
use std::sync::Arc;

use skep_common::object::Slot;
use skep_common::spec::ModeKind;
use skep_common::{Service, Task, TaskState};

use super::{Scope, global, is_live, is_stopping, newest, restart};

/// Gives up the tasks of older iterations, and those of slots and nodes that shall have none.
pub(super) fn retire(scope: &mut Scope<'_, '_>, service: &Service) {
    let iteration = service.job_status.map(|status| status.job_iteration);
    for (slot, tasks) in scope.slots(service.id).iter() {
        let node = slot.node().map(|node_id| scope.fork.state().node(node_id));
        let is_gone = node.is_some_and(|node| node.is_none());
        let may_stay = node.flatten().is_none_or(|node| global::keeps(service, node));
        let is_done = is_done(tasks.iter().filter(|task| task.job_iteration == iteration));
        for task in tasks {
            if !scope.fork.has_room() {
                return;
            }
            if task.job_iteration != iteration || is_gone {
                scope.fork.desire(task.id, TaskState::Remove);
            } else if (is_done || !may_stay) && task.status.state != TaskState::Complete {
                scope.fork.desire(task.id, TaskState::Shutdown);
            }
        }
    }
}

/// Makes the tasks of slots that have none yet, as many as may run at once.
pub(super) fn fill(scope: &mut Scope<'_, '_>, service: &Service, mode: ModeKind) {
    let now = scope.fork.now();
    let slots = scope.slots(service.id);
    let is_open = |slot: &Slot| {
        let Some(tasks) = slots.get(*slot) else { return true };
        let may_follow = newest(tasks).is_none_or(|task| restart::has_successor(task, tasks, now));
        may_follow && !is_done(tasks) && !tasks.iter().any(|task| is_live(task))
    };
    let open: Vec<Slot> = match mode {
        ModeKind::ReplicatedJob { total, concurrent } => {
            let room = concurrent.saturating_sub(n_busy(scope, service));
            let open = (0..total).map(Slot::Replica).filter(is_open);
            // A pass makes no more than these, and total and concurrent are whatever a user asks for.
            open.take(usize::try_from(room).unwrap_or(usize::MAX).min(scope.options.actions_max))
                .collect()
        }
        ModeKind::GlobalJob => {
            let nodes = scope.fork.state().nodes().values();
            let nodes = nodes.filter(|node| global::takes(service, node));
            nodes.map(|node| Slot::Node(node.id)).filter(is_open).collect()
        }
        ModeKind::Replicated(_) | ModeKind::Global => return,
    };
    for slot in open {
        if !scope.create_in_slot(service, slot, now) {
            break;
        }
    }
}

/// Slots with a task that runs, will run, or still stops, be it of an older iteration.
fn n_busy(scope: &mut Scope<'_, '_>, service: &Service) -> u64 {
    let now = scope.fork.now();
    let mut busy: BTreeSet<Slot> = BTreeSet::new();
    let mut patience = Vec::new();
    for task in scope.fork.state().tasks_of_service(service.id) {
        let may_run = is_live(task) && !task.status.state.is_terminal();
        // What never stops is waited for no longer than a successor in its slot would.
        let until = task.meta.updated_at.after(restart::patience(task));
        let is_stopping = is_stopping(scope.fork.state(), task) && now < until;
        if is_stopping {
            patience.push(until);
        }
        if may_run || is_stopping {
            busy.insert(task.slot_key());
        }
    }
    for until in patience {
        scope.wake_at(until, "the stop of a job's older task");
    }
    busy.len() as u64
}

/// Whether a slot with these tasks of one iteration has done its part.
pub(super) fn is_done<'t>(tasks: impl IntoIterator<Item = &'t Arc<Task>>) -> bool {
    tasks.into_iter().any(|task| task.status.state == TaskState::Complete)
}
