//! How far a job is: what waiting for one shows, and when that is over.
//!
//! A job converges when all of its tasks have ended well; nothing is verified after that. Differs from
//! docker/cli `service/progress/progress.go`, which waits for ever where tasks have failed for good.

use std::collections::BTreeMap;

use skep_common::object::Slot;
use skep_common::spec::ModeKind;
use skep_common::{Service, Task, TaskState};

use super::progress::{LINES_MAX, Verdict, slot_text};

/// A job with the task that stands for each of its slots.
pub(super) struct Job<'s> {
    mode: ModeKind,
    slots: BTreeMap<Slot, &'s Task>,
}

impl<'s> Job<'s> {
    /// The service as a job, with the tasks of its iteration; `None` where it is none.
    pub(super) fn of(service: &Service, tasks: impl Iterator<Item = &'s Task>) -> Option<Self> {
        let mode = service.spec.mode_kind().filter(|mode| mode.is_job())?;
        let iteration = service.job_status.map(|status| status.job_iteration);
        let mut slots: BTreeMap<Slot, &Task> = BTreeMap::new();
        let rank = |task: &Task| (is_done(task), is_live(task), task.meta.created_at, task.id);
        for task in tasks.filter(|task| task.job_iteration == iteration) {
            let known = slots.entry(task.slot_key()).or_insert(task);
            if rank(known) < rank(task) {
                *known = task;
            }
        }
        Some(Self { mode, slots })
    }

    fn count(&self, counts: impl Fn(&Task) -> bool) -> u64 {
        self.slots.values().filter(|task| counts(task)).count() as u64
    }

    /// Tasks that ended well, one a slot.
    pub(super) fn n_done(&self) -> u64 {
        self.count(is_done)
    }

    /// Tasks that run now.
    pub(super) fn n_running(&self) -> u64 {
        self.count(|task| task.status.state == TaskState::Running && is_live(task))
    }

    /// Tasks that shall end well: of a global job, one on each node that has one.
    pub(super) fn total(&self) -> u64 {
        match self.mode {
            ModeKind::ReplicatedJob { total, .. } => total,
            _ => self.slots.len() as u64,
        }
    }

    /// Tasks that shall run at once; of a global job, those that have not ended.
    pub(super) fn concurrent(&self) -> u64 {
        match self.mode {
            ModeKind::ReplicatedJob { concurrent, .. } => concurrent,
            _ => self.total() - self.n_done(),
        }
    }

    /// Where it stands.
    pub(super) fn verdict(&self) -> Verdict {
        let failed = self.slots.values().filter(|task| !is_done(task) && !is_live(task));
        let failed: Vec<&Task> = failed.copied().collect();
        if self.n_done() == self.total() && (self.total() > 0 || !self.is_global()) {
            return Verdict::Done(None);
        }
        match failed.first().filter(|_| !self.slots.values().any(|task| is_live(task))) {
            None => Verdict::Working,
            Some(first) => Verdict::Over(format!(
                "{} of {} tasks of the job failed for good: {}: {}",
                failed.len(),
                self.total(),
                first.name(),
                slot_text(first)
            )),
        }
    }

    /// What is to be shown: a name and a text each.
    pub(super) fn lines(&self) -> Vec<(String, String)> {
        let (done, total) = (self.n_done(), self.total());
        let wanted = self.concurrent().min(total - done.min(total));
        let active = format!("{} out of {wanted} tasks", self.n_running());
        let mut lines = vec![
            ("job progress".to_owned(), format!("{done} out of {total} complete")),
            ("active tasks".to_owned(), active),
        ];
        if total > LINES_MAX {
            return lines;
        }
        let slots: Vec<Slot> = match self.mode {
            ModeKind::ReplicatedJob { total, .. } => (0..total).map(Slot::Replica).collect(),
            _ => self.slots.keys().copied().collect(),
        };
        for (number, slot) in (1..).zip(slots) {
            let name = slot.node().map_or_else(|| format!("{number}/{total}"), |node| node.short());
            let text = self.slots.get(&slot).map_or_else(String::new, |task| slot_text(task));
            lines.push((name, text));
        }
        lines
    }

    fn is_global(&self) -> bool {
        self.mode.is_global()
    }
}

fn is_done(task: &Task) -> bool {
    task.status.state == TaskState::Complete
}

fn is_live(task: &Task) -> bool {
    task.desired_state.wants_run() && !is_done(task)
}
