//! Makes, replaces and gives up the tasks of one service.
//!
//! [`reconcile`] looks at one service on the pass's fork, in this order:
//!
//! ```text
//! replicated: count of slots ─► restart: failed, evicted ─► updater: old spec ─► restart: release
//! global: count of nodes             −task +task                −task +task         Ready → Running
//!         +task  −slot
//!
//! jobs: older iterations ─► restart: failed, evicted ─► open slots ─► restart: release
//!             −task              −task +task              +task        Ready → Complete
//! ```
//!
//! # Words
//!
//! A task is *live* while managers want it to run (`desired_state` ≤ `Complete`), whatever happened
//! to it. A slot is *occupied* while it has a live task, or when its newest task ended and the
//! restart policy gives it no successor.
//!
//! # Invariants
//!
//! - Nothing is remembered that the store does not say, but when a task was first seen running
//!   during an update ([`updater::Memory`]).
//! - A successor in a slot waits with desired state `Ready` until its predecessors have stopped.
//! - A slot has at most one live task, but for a start-first update.
//!
//! Source: SwarmKit `manager/orchestrator/{replicated,global,jobs,restart,update,constraintenforcer}`.

pub(crate) mod enforcer;
mod global;
#[cfg(test)]
mod global_tests;
mod job;
#[cfg(test)]
mod job_tests;
mod replicated;
mod restart;
mod slots;
#[cfg(test)]
mod start_first_tests;
#[cfg(test)]
mod tests;
pub(crate) mod updater;

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use skep_common::object::{NodeState, Slot};
use skep_common::spec::ModeKind;
use skep_common::{Service, ServiceId, Task, TaskId, TaskState, Timestamp};

use crate::container;
use crate::fork::Fork;
use crate::plan::Options;
use crate::scheduler::Index;
use crate::store::State;

use slots::Slots;

/// How long a successor waits for its predecessors at least. SwarmKit's `defaultOldTaskTimeout`.
const OLD_TASK_WAIT: Duration = Duration::from_mins(1);
/// What it waits beyond the predecessor's stop grace period: to withdraw, kill and report it.
const STOP_SLACK: Duration = Duration::from_secs(10);

/// One service in one pass.
pub(crate) struct Scope<'p, 'a> {
    /// The state that the pass changes.
    pub(crate) fork: &'p mut Fork<'a>,
    /// Settings.
    pub(crate) options: &'p Options,
    /// What updates remember.
    pub(crate) updates: &'p mut updater::Memory,
    /// What is known of nodes, but for what this pass changes.
    pub(crate) index: &'p Index,
    /// Tasks that must leave their node because it has too little for all of its tasks.
    pub(crate) evicted: &'p BTreeSet<TaskId>,
    /// The earliest moment at which time alone changes the outcome.
    pub(crate) wake: Option<(Timestamp, &'static str)>,
    /// The slots as last read, with the number of the fork's changes of tasks then.
    slots: Option<(usize, Rc<Slots>)>,
}

/// Brings one service as close to its spec as this moment and the pass's room allow; `false` where the
/// reaper need not look at it, since all its tasks are live.
pub(crate) fn reconcile(scope: &mut Scope<'_, '_>, service_id: ServiceId) -> bool {
    let service = scope.fork.state().service(service_id).cloned();
    let Some(service) = service.filter(|service| !service.pending_delete) else {
        remove_all(scope, service_id);
        return true;
    };
    match service.spec.mode_kind() {
        Some(ModeKind::Replicated(replicas)) => replicated::scale(scope, &service, replicas),
        Some(ModeKind::Global) => global::scale(scope, &service),
        Some(mode @ (ModeKind::ReplicatedJob { .. } | ModeKind::GlobalJob)) => {
            job::retire(scope, &service);
            restart::replace_failed(scope, &service);
            job::fill(scope, &service, mode);
            restart::release(scope, &service);
            return true;
        }
        // Validation refuses it; what is stored nevertheless is left as it is.
        None => return true,
    }
    restart::replace_failed(scope, &service);
    updater::advance(scope, &service);
    updater::finish_start_first(scope, &service);
    restart::release(scope, &service);
    !scope.slots(service_id).are_live()
}

/// Removes the tasks of a service that is not there. Those that no service made are nobody's to decide about.
fn remove_all(scope: &mut Scope<'_, '_>, service_id: ServiceId) {
    let is_over = |task: &&Arc<Task>| match &task.standalone {
        Some(standalone) => container::is_over(task, standalone),
        None => true,
    };
    let tasks = scope.fork.state().tasks_of_service(service_id);
    let tasks: Vec<TaskId> = tasks.filter(is_over).map(|task| task.id).collect();
    for task_id in tasks {
        if !scope.fork.has_room() {
            return;
        }
        scope.fork.desire(task_id, TaskState::Remove);
    }
}

impl<'p, 'a> Scope<'p, 'a> {
    pub(crate) fn new(
        fork: &'p mut Fork<'a>,
        options: &'p Options,
        updates: &'p mut updater::Memory,
        index: &'p Index,
        evicted: &'p BTreeSet<TaskId>,
    ) -> Self {
        Self { fork, options, updates, index, evicted, wake: None, slots: None }
    }

    fn slots(&mut self, service_id: ServiceId) -> Rc<Slots> {
        let (state, touches) = (self.fork.state(), self.fork.touches());
        let slots = match self.slots.take() {
            Some((read_at, mut slots)) if touches.len() - read_at <= Slots::UPDATES_MAX => {
                let changed = touches[read_at..].iter().filter_map(|id| state.task(*id));
                for task in changed.filter(|task| task.service_id == service_id) {
                    Rc::make_mut(&mut slots).update(task);
                }
                slots
            }
            _ => Rc::new(Slots::read(state, service_id)),
        };
        self.slots = Some((touches.len(), slots.clone()));
        slots
    }

    fn wake_at(&mut self, at: Timestamp, why: &'static str) {
        if self.wake.is_none_or(|(earliest, _)| at < earliest) {
            self.wake = Some((at, why));
        }
    }

    /// Makes a task that starts at `start_after` or, later, once the slot's other tasks have stopped.
    /// `false` where the pass is full.
    fn create_in_slot(&mut self, service: &Service, slot: Slot, start_after: Timestamp) -> bool {
        let now = self.fork.now();
        let state = self.fork.state();
        let is_free = !state.tasks_of_slot(service.id, slot).any(|task| is_stopping(state, task));
        if is_free && start_after <= now {
            return self.fork.create_task(service, slot, wanted_state(service), None);
        }
        self.fork.create_task(service, slot, TaskState::Ready, Some(start_after))
    }
}

/// What managers want of a service's tasks: to run, or to run until they end by themselves.
fn wanted_state(service: &Service) -> TaskState {
    match service.spec.mode_kind().is_some_and(ModeKind::is_job) {
        true => TaskState::Complete,
        false => TaskState::Running,
    }
}

/// Whether an update of the service replaces the task.
pub(crate) fn is_outdated(state: &State, service: &Service, task: &Task) -> bool {
    !updater::is_clean(state, service, task)
}

/// Whether managers want the task to run.
pub(crate) fn is_live(task: &Task) -> bool {
    task.desired_state.wants_run()
}

/// Of a replicated service or job, the last task of each slot that has ended without having done what it was
/// for, and that its restart policy gives no other, by slot.
pub(crate) fn ended_for_good(state: &State, service: &Service) -> Vec<Arc<Task>> {
    let slots = Slots::read(state, service.id);
    let is_job = service.spec.mode_kind().is_some_and(ModeKind::is_job);
    let ended = slots.iter().filter_map(|(_, tasks)| {
        let is_over = !(tasks.iter().any(|task| is_live(task)) || is_job && job::is_done(tasks));
        // What still stops, where its node can say so, has not ended yet.
        let last = newest(tasks).filter(|task| is_over && !is_stopping(state, task))?;
        (!restart::has_successor(last, tasks, last.status.timestamp)).then(|| last.clone())
    });
    ended.collect()
}

/// Whether a task's container may run although it shall not, and its node can be asked to stop it.
pub(crate) fn is_stopping(state: &State, task: &Task) -> bool {
    let is_reachable = task
        .node_id
        .and_then(|id| state.node(id))
        .is_some_and(|node| node.status.state != NodeState::Down);
    !is_live(task) && !task.status.state.is_terminal() && is_reachable
}

/// The task of a slot that was made last.
fn newest(tasks: &[Arc<Task>]) -> Option<&Arc<Task>> {
    tasks.iter().max_by_key(|task| (task.meta.created_at, task.spec_version, task.id))
}
