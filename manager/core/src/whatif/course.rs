//! The leader's passes over a copy of the state, until there is nothing left to do.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use skep_common::object::{NodeState, TaskStatus};
use skep_common::{Kind, Service, Task, TaskId, TaskState, Timestamp};

use super::Error;
use crate::command::{Action, Command, Outcome, TaskPatch};
use crate::orchestrator::{is_live, is_outdated};
use crate::plan::{Dirty, LeaderMemory, Options, plan};
use crate::store::State;

/// Passes of one question. An update of a slot at a time takes a few for each.
const PASSES_MAX: usize = 10_000;
/// Changes of tasks and services.
const STEPS_MAX: usize = 1_000_000;
/// Of delays no more is skipped: after a day, tasks of nodes that are down are given up.
pub(super) const HORIZON: Duration = Duration::from_hours(20);

/// What one question may cost, all its courses together.
pub(super) struct Budget<'a> {
    n_passes: usize,
    n_steps: usize,
    is_late: &'a dyn Fn() -> bool,
}

impl<'a> Budget<'a> {
    pub(super) fn new(is_late: &'a dyn Fn() -> bool) -> Self {
        Self { n_passes: 0, n_steps: 0, is_late }
    }

    fn spend(&mut self, n_passes: usize, n_steps: usize) -> Result<(), Error> {
        self.n_passes += n_passes;
        self.n_steps += n_steps;
        let is_over = self.n_passes > PASSES_MAX || self.n_steps > STEPS_MAX;
        if is_over || (n_passes > 0 && (self.is_late)()) {
            return Err(Error::TooLarge { n_passes: self.n_passes, n_steps: self.n_steps });
        }
        Ok(())
    }
}

/// One course of events.
pub(super) struct Course<'c, 'b, R> {
    state: State,
    memory: LeaderMemory,
    dirty: Dirty,
    now: Timestamp,
    until: Timestamp,
    rng: &'c mut R,
    budget: &'c mut Budget<'b>,
    /// Tasks of which their nodes may have something to report.
    told: BTreeSet<TaskId>,
    has_changed: bool,
    is_cut: bool,
}

impl<'c, 'b, R: Rng> Course<'c, 'b, R> {
    pub(super) fn new(
        state: State,
        now: Timestamp,
        rng: &'c mut R,
        budget: &'c mut Budget<'b>,
    ) -> Self {
        let told = state.tasks().values().filter(|task| !task.status.state.is_terminal());
        let told = told.filter(|task| task.node_id.is_some()).map(|task| task.id).collect();
        Self {
            memory: LeaderMemory::new(Options { is_patient: true, ..Options::default() }),
            dirty: Dirty::all(),
            until: now.after(HORIZON),
            has_changed: false,
            is_cut: false,
            state,
            now,
            rng,
            budget,
            told,
        }
    }

    pub(super) fn into_state(self) -> State {
        self.state
    }

    /// Whether there was anything to do.
    pub(super) fn has_changed(&self) -> bool {
        self.has_changed
    }

    /// Whether it ended at the limit, before what only time would bring.
    pub(super) fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// Goes on until nothing is left to do, or only what more time would bring.
    pub(super) fn run(&mut self) -> Result<(), Error> {
        loop {
            self.budget.spend(1, 0)?;
            let dirty = std::mem::take(&mut self.dirty);
            let plan = plan(&self.state, &mut self.memory, &dirty, self.now, self.rng);
            let is_news = self.commit(plan.actions)?;
            if self.report()? || is_news {
                self.has_changed = true;
                continue;
            }
            match plan.deadline {
                Some((at, _)) if at <= self.now => {} // The pass had no room for all.
                Some((at, _)) if at <= self.until && self.waits_for_time() => self.now = at,
                Some((at, _)) => {
                    self.is_cut = at > self.until && self.would_go_on();
                    return Ok(());
                }
                None => return Ok(()),
            }
        }
    }

    /// Commits actions; `false` where there are none.
    pub(super) fn commit(&mut self, actions: Vec<Action>) -> Result<bool, Error> {
        if actions.is_empty() {
            return Ok(false);
        }
        self.budget.spend(0, actions.len())?;
        let index = self.state.version().index + 1;
        let (outcome, changes) = self.state.apply(index, &Command::new(self.now, actions));
        if let Outcome::Refused(refusal) = outcome {
            return Err(Error::Refused(refusal));
        }
        let tasks = changes.iter().filter(|change| change.kind == Kind::Task);
        self.told.extend(tasks.map(|change| TaskId(change.id)));
        self.dirty.extend(&changes);
        Ok(true)
    }

    /// What the nodes that are up report of what they were told.
    fn report(&mut self) -> Result<bool, Error> {
        let told = std::mem::take(&mut self.told);
        let reports: Vec<Action> = told
            .into_iter()
            .filter_map(|task_id| {
                let state = self.reached(self.state.task(task_id)?)?;
                let status = TaskStatus {
                    timestamp: self.now,
                    applied_at: Some(self.now),
                    state,
                    ..TaskStatus::default()
                };
                Some(Action::PatchTask(TaskPatch {
                    status: Some(status),
                    ..TaskPatch::of(task_id)
                }))
            })
            .collect();
        let is_news = self.commit(reports)?;
        self.told.clear(); // Nothing more is to be said of these until managers want something else.
        Ok(is_news)
    }

    /// The state that a node brings a task to; `None` where it is there.
    fn reached(&self, task: &Task) -> Option<TaskState> {
        let node = self.state.node(task.node_id?)?;
        if node.status.state == NodeState::Down || task.status.state.is_terminal() {
            return None;
        }
        let reached = match task.desired_state {
            _ if !is_live(task) => TaskState::Shutdown,
            desired if desired <= TaskState::Ready => TaskState::Ready,
            _ => TaskState::Running,
        };
        (task.status.state < reached).then_some(reached)
    }

    /// Whether it is time that something waits for: an update, or the delay of a restart.
    fn waits_for_time(&self) -> bool {
        self.state.services().values().any(|service| is_updating(service))
            || self
                .state
                .tasks()
                .values()
                .any(|task| is_live(task) && task.desired_state <= TaskState::Ready)
    }

    /// Whether an update that is not over has nothing to wait for but time, or the delay of a restart is not over: a task that
    /// has no place is waited for without end, and is told of by itself.
    fn would_go_on(&self) -> bool {
        let is_late =
            |task: &Task| is_live(task) && task.start_after.is_some_and(|at| at > self.until);
        let runs = |task: &Arc<Task>| !is_live(task) || task.status.state >= TaskState::Running;
        let is_outdated = |service: &Service| {
            let mut tasks = self.state.tasks_of_service(service.id);
            tasks.any(|task| is_live(task) && is_outdated(&self.state, service, task))
        };
        self.state.tasks().values().any(|task| is_late(task))
            || self.state.services().values().any(|service| {
                is_updating(service)
                    && is_outdated(service)
                    && self.state.tasks_of_service(service.id).all(runs)
            })
    }
}

fn is_updating(service: &Service) -> bool {
    let status = service.update_status.as_ref();
    status.is_some_and(|status| matches!(&*status.state, "updating" | "rollback_started"))
}
