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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{WEB, World, parse_task, service};

    #[test]
    fn a_row_that_was_updated_equals_one_read_anew() {
        let tasks = "1@1:running 1@1:failed>shutdown 2@1:running 4@2:running 5@2:running>remove";
        for changed in ["1@1:running>remove", "3@-:new", "2@1:running>shutdown", "6@-:new>ready"] {
            for id in [1, 3, 4, 9] {
                let mut world = World::new("1 2", service(4), tasks);
                let mut slots = Slots::read(&world.state, WEB);
                let mut task = parse_task(&world.web(), id, changed);
                if let Some(old) = world.state.task(task.id) {
                    task.slot = old.slot; // A task stays in its slot.
                }
                world.state.scratch_put_task(task.clone());
                slots.update(&Arc::new(task));
                let anew = Slots::read(&world.state, WEB);
                assert_eq!(slots.tasks, anew.tasks, "{changed} {id}");
                assert_eq!(slots.has_leaving, anew.has_leaving, "{changed} {id}");
            }
        }
    }

    #[test]
    fn slots_are_found_by_their_keys() {
        let world = World::new("1", service(3), "1@1:running 3@1:running 3@1:failed");
        let slots = Slots::read(&world.state, WEB);
        let n_tasks = |number| slots.get(Slot::Replica(number)).map(<[Arc<Task>]>::len);
        assert_eq!([0, 1, 2, 3, 4].map(n_tasks), [None, Some(1), None, Some(2), None]);
        let keys: Vec<Slot> = slots.iter().map(|(slot, _)| slot).collect();
        assert_eq!(keys, [1, 3].map(Slot::Replica));
    }
}
