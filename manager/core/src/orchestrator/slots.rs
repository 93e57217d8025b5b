//! The tasks of one service, by slot.

use std::sync::Arc;

use skep_common::object::Slot;
use skep_common::{ServiceId, Task, TaskState};

use super::is_live;
use crate::store::State;

/// The tasks of a service without those that are to be deleted, in one row: by slot, then id. Each of
/// the steps for a service walks over all of them, and what a slot has lies side by side.
#[derive(Debug, Clone, Default)]
pub(super) struct Slots {
    tasks: Vec<Arc<Task>>,
    /// Whether there are others, which are to be deleted.
    has_leaving: bool,
}

impl Slots {
    /// Up to so many changed tasks are written into the row, where most of a pass changes few tasks of
    /// many; with more of them, it is read anew.
    pub(super) const UPDATES_MAX: usize = 64;

    /// Those of a service.
    pub(super) fn read(state: &State, service_id: ServiceId) -> Self {
        let mut slots = Self::default();
        for task in state.tasks_of_service(service_id) {
            if is_leaving(task) {
                slots.has_leaving = true;
            } else {
                slots.tasks.push(task.clone());
            }
        }
        slots
    }

    /// Takes over a task of the service as it is.
    pub(super) fn update(&mut self, task: &Arc<Task>) {
        let place = (task.slot_key(), task.id);
        let found = self.tasks.binary_search_by_key(&place, |task| (task.slot_key(), task.id));
        match (found, is_leaving(task)) {
            (Ok(at), false) => self.tasks[at] = task.clone(),
            (Err(at), false) => self.tasks.insert(at, task.clone()),
            (Ok(at), true) => {
                self.tasks.remove(at);
            }
            (Err(_), true) => {}
        }
        self.has_leaving |= is_leaving(task);
    }

    /// Slots in their order, each with its tasks.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Slot, &[Arc<Task>])> {
        let slots = self.tasks.chunk_by(|left, right| left.slot_key() == right.slot_key());
        slots.map(|tasks| (tasks[0].slot_key(), tasks))
    }

    /// The tasks of one slot, if it has any.
    pub(super) fn get(&self, slot: Slot) -> Option<&[Arc<Task>]> {
        let from = self.tasks.partition_point(|task| task.slot_key() < slot);
        let n_tasks = self.tasks[from..].partition_point(|task| task.slot_key() == slot);
        (n_tasks > 0).then(|| &self.tasks[from..from + n_tasks])
    }

    /// Whether managers want all tasks of the service to run.
    pub(super) fn are_live(&self) -> bool {
        !self.has_leaving && self.tasks.iter().all(|task| is_live(task))
    }
}

fn is_leaving(task: &Task) -> bool {
    task.desired_state >= TaskState::Remove
}
