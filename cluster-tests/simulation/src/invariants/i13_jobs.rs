//! 13. A job has no more tasks on their way than may run at once, and what is done is not done again.

use std::collections::BTreeSet;

use skep_common::object::Slot;
use skep_common::spec::ModeKind;
use skep_common::{Service, Task, TaskId, TaskState};
use skep_manager_core::State;

use super::{Invariant, ensure};
use crate::seen::Seen;
use crate::world::World;

pub(super) struct Jobs;

/// The tasks of a job's iteration.
fn tasks<'s>(state: &'s State, service: &Service) -> impl Iterator<Item = &'s Task> {
    let iteration = service.job_status.map(|status| status.job_iteration);
    let of_service = state.tasks_of_service(service.id).map(|task| &**task);
    of_service.filter(move |task| task.job_iteration == iteration)
}

impl Invariant for Jobs {
    fn name(&self) -> &'static str {
        "13: a job runs no more tasks than it may, and none that is done"
    }

    fn check(&mut self, _: &World, seen: &Seen) -> Result<(), String> {
        let Seen::Committed { before, after, .. } = seen else { return Ok(()) };
        for service in after.services().values() {
            let Some(mode) = service.spec.mode_kind().filter(|mode| mode.is_job()) else {
                continue;
            };
            let name = &service.spec.name;
            let may_run =
                |task: &&Task| task.desired_state.wants_run() && !task.status.state.is_terminal();
            let busy: BTreeSet<Slot> =
                tasks(after, service).filter(may_run).map(Task::slot_key).collect();
            if let ModeKind::ReplicatedJob { concurrent, .. } = mode {
                ensure!(
                    busy.len() as u64 <= concurrent,
                    "{name} has {} tasks on their way, {concurrent} may run at once",
                    busy.len()
                );
            }
            let is_done = |task: &&Task| task.status.state == TaskState::Complete;
            let done: BTreeSet<Slot> =
                tasks(before, service).filter(is_done).map(Task::slot_key).collect();
            let again = tasks(after, service)
                .filter(|task| done.contains(&task.slot_key()) && before.task(task.id).is_none());
            let again: Vec<TaskId> = again.map(|task| task.id).collect();
            ensure!(again.is_empty(), "{name} is to do again what is done: {again:?}");
        }
        Ok(())
    }
}
