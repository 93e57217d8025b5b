//! What nodes reported of their tasks, on its way to the store.
//!
//! # Invariants
//!
//! - A task's state never falls, also where an older report comes after a newer one.
//! - A report that was taken is given until it is stored, or a newer one is.
//! - The nodes that a stop did not wait for are the manager's word: no report takes them out.

use std::collections::BTreeMap;

use skep_common::mistakes::{self, Mistake};
use skep_common::object::TaskStatus;
use skep_common::{NodeId, TaskId};

use crate::command::{Action, TaskPatch};
use crate::level;
use crate::store::State;

/// Statuses by task.
pub type Statuses = BTreeMap<TaskId, TaskStatus>;

/// A node reported a task that is not its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a report on another node's task is ignored")]
pub struct NotItsTask;

/// Reported and not stored yet; of each task only the newest counts.
#[derive(Debug, Default)]
pub struct Reports {
    statuses: Statuses,
    /// Tasks that were told to stop without the acknowledgement of these nodes, until that is stored.
    missed: BTreeMap<TaskId, Vec<String>>,
    /// The newest with attempts that a manager of before would stop at, until all managers know them.
    withheld: Statuses,
}

impl Reports {
    /// Takes a node's report. One of a task that is not there any more is dropped.
    ///
    /// # Errors
    ///
    /// The task is another node's.
    pub fn take(
        &mut self,
        state: &State,
        node_id: NodeId,
        task_id: TaskId,
        status: TaskStatus,
    ) -> Result<(), NotItsTask> {
        let Some(task) = state.task(task_id) else { return Ok(()) };
        if task.node_id != Some(node_id) {
            return Err(NotItsTask);
        }
        let mut known = task.status.clone();
        known.applied_at = status.applied_at;
        known.unacknowledged.clone_from(&status.unacknowledged); // Not for a node to say.
        let told = self.statuses.get(&task_id).map_or(known.state, |told| told.state);
        let is_later = status.state >= known.state.max(told) || mistakes::is(Mistake::StateFalls);
        if is_later && status != known {
            self.statuses.insert(task_id, status);
        }
        Ok(())
    }

    /// A task is stopped though these nodes, by name, may still balance to it.
    pub fn note_missed(&mut self, task_id: TaskId, nodes: Vec<String>) {
        self.missed.insert(task_id, nodes);
    }

    /// What is to be stored now; whoever fails to store it gives it [back](Self::give_back).
    pub fn next(&mut self, state: &State) -> Statuses {
        let level = level::of_managers(state);
        if level < level::FACTS {
            self.missed.clear(); // A manager of before would not keep it; the log of this one has it.
        }
        let statuses = &mut self.statuses;
        self.missed.retain(|task_id, names| {
            let Some(task) = state.task(*task_id) else { return false };
            let is_stored = task.status.unacknowledged == *names;
            if !is_stored {
                statuses.entry(*task_id).or_insert_with(|| task.status.clone());
            }
            !is_stored
        });
        if level >= level::CONTROL {
            for (task_id, told) in std::mem::take(&mut self.withheld) {
                let Some(task) = state.task(task_id) else { continue };
                if task.status.n_attempts >= told.n_attempts {
                    continue; // A later report brought them.
                }
                let status = statuses.entry(task_id).or_insert_with(|| task.status.clone());
                if status.n_attempts < told.n_attempts {
                    (status.attempts, status.n_attempts) = (told.attempts, told.n_attempts);
                }
            }
        }
        self.withheld.retain(|task_id, _| state.task(*task_id).is_some());
        for (task_id, status) in statuses {
            let stored = || state.task(*task_id).map(|task| task.status.unacknowledged.clone());
            let missed = self.missed.get(task_id).cloned();
            status.unacknowledged = missed.or_else(stored).unwrap_or_default();
            if level < level::CONTROL && status.n_attempts > 0 {
                self.withheld.insert(*task_id, status.clone());
                (status.attempts, status.n_attempts) = (Vec::new(), 0);
            }
        }
        std::mem::take(&mut self.statuses)
    }

    /// These were not stored.
    pub fn give_back(&mut self, statuses: Statuses) {
        for (task_id, status) in statuses {
            self.statuses.entry(task_id).or_insert(status); // A newer one counts.
        }
    }
}

/// The actions that store them.
pub fn patches(statuses: &Statuses) -> impl Iterator<Item = Action> {
    statuses.iter().map(|(task_id, status)| {
        Action::PatchTask(TaskPatch { status: Some(status.clone()), ..TaskPatch::of(*task_id) })
    })
}

#[cfg(test)]
mod tests {
    use skep_common::TaskState;

    use super::*;
    use crate::testing::{World, service};

    const TASK: TaskId = TaskId(1);
    const NODE: NodeId = NodeId(1);

    fn status(state: TaskState) -> TaskStatus {
        TaskStatus { state, ..TaskStatus::default() }
    }

    fn states(statuses: &Statuses) -> Vec<TaskState> {
        statuses.values().map(|status| status.state).collect()
    }

    fn world() -> World {
        World::new("1 2", service(1), "1@1:starting")
    }

    #[test]
    fn of_reports_the_newest_is_stored() {
        let world = world();
        let mut reports = Reports::default();
        let mut take = |node_id, task_id, state| {
            let taken = reports.take(&world.state, node_id, task_id, status(state));
            (taken.is_ok(), states(&reports.statuses))
        };
        for (name, node_id, task_id, state, expect) in [
            ("of another's task", NodeId(2), TASK, TaskState::Running, (false, vec![])),
            ("of a task that is gone", NODE, TaskId(9), TaskState::Running, (true, vec![])),
            ("an old one", NODE, TASK, TaskState::Preparing, (true, vec![])),
            ("news", NODE, TASK, TaskState::Failed, (true, vec![TaskState::Failed])),
            ("overtaken", NODE, TASK, TaskState::Running, (true, vec![TaskState::Failed])),
        ] {
            assert_eq!(take(node_id, task_id, state), expect, "{name}");
        }
    }

    #[test]
    fn what_was_not_stored_comes_again_unless_there_is_news() {
        let world = world();
        let mut reports = Reports::default();
        reports.take(&world.state, NODE, TASK, status(TaskState::Running)).unwrap();
        let lost = reports.next(&world.state);
        assert_eq!(states(&lost), [TaskState::Running]);
        assert_eq!(reports.next(&world.state), Statuses::new(), "given once");
        reports.give_back(lost.clone());
        assert_eq!(reports.next(&world.state), lost);
        reports.take(&world.state, NODE, TASK, status(TaskState::Failed)).unwrap();
        reports.give_back(lost);
        assert_eq!(states(&reports.next(&world.state)), [TaskState::Failed]);
    }

    #[test]
    fn nodes_that_were_not_waited_for_are_stored_whatever_a_node_reports() {
        let mut world = world();
        for number in [1, 2] {
            let mut node = crate::testing::node(number);
            node.description.as_mut().unwrap().format_level = level::FACTS;
            node.manager_status = Some(skep_common::object::ManagerStatus::default());
            world.replace(skep_common::Object::Node(Box::new(node)));
        }
        let mut reports = Reports::default();
        reports.note_missed(TASK, vec!["n2".to_owned()]);
        let first = reports.next(&world.state);
        assert_eq!(first[&TASK].unacknowledged, ["n2"]);
        assert_eq!(reports.next(&world.state), first, "until it is stored");
        world.apply(patches(&first).collect());
        assert_eq!(reports.next(&world.state), Statuses::new());
        reports.take(&world.state, NODE, TASK, status(TaskState::Running)).unwrap();
        assert_eq!(reports.next(&world.state)[&TASK].unacknowledged, ["n2"]);
    }

    #[test]
    fn attempts_are_stored_where_every_manager_understands_them() {
        let attempt = skep_common::object::Attempt::default();
        for (format_level, n_stored) in [(level::CONTROL - 1, 0), (level::CONTROL, 1)] {
            let mut world = world();
            let mut manager = crate::testing::node(2);
            manager.description.as_mut().unwrap().format_level = format_level;
            manager.manager_status = Some(skep_common::object::ManagerStatus::default());
            world.replace(skep_common::Object::Node(Box::new(manager)));
            let mut reports = Reports::default();
            let attempts = vec![attempt.clone()];
            let told = TaskStatus { attempts, n_attempts: 1, ..status(TaskState::Running) };
            reports.take(&world.state, NODE, TASK, told).unwrap();
            let next = reports.next(&world.state);
            assert_eq!(next[&TASK].state, TaskState::Running);
            world.apply(patches(&next).collect());
            assert_eq!(
                (next[&TASK].attempts.len(), next[&TASK].n_attempts),
                (n_stored, n_stored as u32),
                "{format_level}"
            );
            let command = crate::Command::new(crate::testing::NOW, patches(&next).collect());
            assert!(command.level <= format_level);
            assert_eq!(reports.next(&world.state), Statuses::new(), "nothing is new");
            let mut upgraded = crate::testing::node(2);
            upgraded.description.as_mut().unwrap().format_level = level::CONTROL;
            upgraded.manager_status = Some(skep_common::object::ManagerStatus::default());
            world.replace(skep_common::Object::Node(Box::new(upgraded)));
            world.apply(patches(&reports.next(&world.state)).collect());
            assert_eq!(world.state.task(TASK).unwrap().status.n_attempts, 1, "once all know it");
            assert_eq!(reports.next(&world.state), Statuses::new());
        }
    }
}
