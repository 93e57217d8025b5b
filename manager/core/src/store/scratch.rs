//! Changes of a planning pass's own fork, without the bookkeeping of a committed command.
//!
//! A pass tries its decisions on a clone of the state before it proposes them. What it changes here
//! is never kept: the committed command repeats it through [`State::apply`].

use skep_common::object::NetworkAttachment;
use skep_common::{Task, TaskId};

use super::State;

impl State {
    /// Adds a task, or replaces the one with its id.
    pub(crate) fn scratch_put_task(&mut self, task: Task) {
        let old = self.tasks.get(&task.id).cloned();
        self.index_task(old.as_deref(), task)
            .expect("a pass grants an address only after it looked for its owner");
    }

    /// Changes a task in place; an absent one is left alone.
    pub(crate) fn scratch_edit_task(&mut self, task_id: TaskId, edit: impl FnOnce(&mut Task)) {
        if let Some(old) = self.tasks.get(&task_id).cloned() {
            let mut task = (*old).clone();
            edit(&mut task);
            self.index_task(Some(&old), task)
                .expect("a pass grants an address only after it looked for its owner");
        }
    }

    /// Changes a task where neither its place in an index nor its id changes.
    pub(crate) fn scratch_touch_task(&mut self, task_id: TaskId, edit: impl FnOnce(&mut Task)) {
        self.edit_task(task_id, edit);
    }

    /// Erases a task.
    pub(crate) fn scratch_delete_task(&mut self, task_id: TaskId) {
        if let Some(task) = self.tasks.remove(&task_id) {
            self.unindex_task(&task);
        }
    }

    /// Takes a task's addresses on networks, which nobody else has.
    pub(crate) fn scratch_claim(&mut self, task_id: TaskId, attachments: &[NetworkAttachment]) {
        self.claim_attachments(task_id, attachments)
            .expect("a pass grants an address only after it looked for its owner");
    }
}
