//! A node's agent with the rules of the real one, and containers that are only noted.
//!
//! # Rules
//!
//! 1. A welcome of a lower term than one it had before is that of a deposed leader, and is ignored.
//! 2. Assignments apply to the set that the last ones made, or to none; else it asks for a new session.
//! 3. The first assignments of a session are the whole set: what they do not name is stopped and erased.
//! 4. Every status is reported again in a new session.
//! 5. It goes on alone while there is no session; a daemon that starts again finds its tasks and containers.
//! 6. A container that ends then is followed by another one of the same task, where [`attempts`] says so, until a
//!    leader has said what the node is to run.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::RngExt as _;
use rand::rngs::StdRng;
use skep_common::mistakes::{self, Mistake};
use skep_common::object::{Attempt, TaskStatus};
use skep_common::{Kind, Task, TaskId, TaskState, Timestamp};
use skep_manager_core::endpoints::NodeTable;
use skep_manager_core::secrets::PayloadKey;
use skep_worker_core::attempts;

use crate::fault::{Fault, Rates};
use crate::message::{Assignments, MachineId};

/// A task of this node.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    pub(crate) task: Task,
    pub(crate) is_removed: bool,
    pub(crate) status: TaskStatus,
    was_unhealthy: bool,
    /// Its container has ended, and no manager was told of a task's end.
    ended: Option<Ended>,
    /// When its container began, by this machine's clock.
    began: Timestamp,
    /// When what it is doing ends.
    due: Timestamp,
    stop_at: Option<Timestamp>,
}

/// How a container ended, and when it is tried again; never where what it needs is not here.
#[derive(Debug, Clone)]
struct Ended {
    state: TaskState,
    err: String,
    again_at: Timestamp,
}

impl Held {
    fn is_ending(&self) -> bool {
        self.is_removed || !self.task.desired_state.wants_run()
    }
}

/// The session, as the agent sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    None,
    Asked { session: u64, manager: MachineId },
    Open { session: u64, manager: MachineId, term: u64, heard_at: Timestamp },
}

/// What the kernel balances to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Kernel {
    /// Of the leader whose table it is.
    pub(crate) term: u64,
    pub(crate) version: u64,
    pub(crate) table: NodeTable,
}

/// What one step of a task did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stepped {
    Nothing,
    Reported(TaskState),
    /// Its container runs from now on.
    Started,
    /// Its container is being stopped.
    Stopping,
    /// Its container has ended.
    Ended(TaskState),
    /// Another container of it was tried: it runs, or does not.
    TriedAgain {
        runs: bool,
    },
    Erased,
}

/// The secrets that a task finds as files.
pub(crate) fn used_by(task: &Task) -> impl Iterator<Item = PayloadKey> {
    let container = task.spec.container_spec.as_ref();
    let secrets = container.and_then(|container| container.secrets.as_ref());
    secrets.into_iter().flatten().filter_map(|secret| {
        let (id, version) = (secret.secret_id?.0, secret.version?);
        Some(PayloadKey { kind: Kind::Secret, id, version })
    })
}

/// One node's agent.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) link: Link,
    /// Rule 1.
    pub(crate) term_seen: u64,
    /// A leader in reach has said what this node is to run.
    is_led: bool,
    sequence: u64,
    pub(crate) held: BTreeMap<TaskId, Held>,
    pub(crate) unsent: BTreeSet<TaskId>,
    pub(crate) unsent_mesh: Option<u64>,
    told_table: Option<Kernel>,
    pub(crate) kernel: Kernel,
    /// The secrets and configs in the daemon's memory.
    pub(crate) payloads: BTreeSet<PayloadKey>,
    /// The containers that run: they outlive the daemon.
    pub(crate) running: BTreeSet<TaskId>,
    /// Whom to ask first.
    pub(crate) hint: Option<MachineId>,
    /// Where managers are, as it was told last.
    pub(crate) managers: Vec<MachineId>,
    pub(crate) n_failed: u32,
}

impl Agent {
    pub(crate) fn new(managers: Vec<MachineId>) -> Self {
        Self {
            link: Link::None,
            term_seen: 0,
            is_led: false,
            sequence: 0,
            held: BTreeMap::new(),
            unsent: BTreeSet::new(),
            unsent_mesh: None,
            told_table: None,
            kernel: Kernel::default(),
            payloads: BTreeSet::new(),
            running: BTreeSet::new(),
            hint: None,
            managers,
            n_failed: 0,
        }
    }

    /// The open session.
    pub(crate) fn session(&self) -> Option<(u64, MachineId, u64)> {
        match self.link {
            Link::Open { session, manager, term, .. } => Some((session, manager, term)),
            Link::None | Link::Asked { .. } => None,
        }
    }

    /// There is no session any more.
    pub(crate) fn lose_leader(&mut self) {
        (self.link, self.is_led) = (Link::None, false);
    }

    /// A leader takes it in; false where it is not obeyed.
    pub(crate) fn welcome(&mut self, session: u64, term: u64, now: Timestamp) -> bool {
        let Link::Asked { session: asked, manager } = self.link else { return false };
        if asked != session {
            return false;
        }
        if term < self.term_seen && !mistakes::is(Mistake::DeposedAssignment) {
            self.lose_leader();
            return false;
        }
        self.term_seen = self.term_seen.max(term);
        self.link = Link::Open { session, manager, term, heard_at: now };
        (self.sequence, self.is_led) = (0, false);
        self.n_failed = 0;
        self.unsent_mesh = None;
        self.told_table = None;
        self.unsent = self.held.keys().copied().collect();
        true
    }

    /// Applies what a leader says; the tasks to look at. `Err`: it does not follow from what is here.
    pub(crate) fn apply(
        &mut self,
        what: &Assignments,
        now: Timestamp,
        clock: Timestamp,
    ) -> Result<Vec<TaskId>, ()> {
        let Some((_, _, term)) = self.session() else { return Ok(Vec::new()) };
        if let Some(tasks) = &what.tasks {
            if tasks.applies_to != 0 && tasks.applies_to != self.sequence {
                return Err(());
            }
            self.sequence = tasks.results_in;
        }
        if let Some((version, table)) = &what.table {
            self.told_table = Some(Kernel { term, version: *version, table: table.clone() });
        }
        let Some(message) = &what.tasks else { return Ok(Vec::new()) };
        let mut touched = Vec::new();
        let named: BTreeSet<TaskId> = message.changes.tasks.iter().map(|one| one.task.id).collect();
        for assigned in &message.changes.tasks {
            self.assign(assigned.to_task(), now, clock);
            touched.push(assigned.task.id);
        }
        let is_whole = message.applies_to == 0;
        if is_whole {
            self.payloads.clear();
        }
        self.payloads.extend(&message.changes.payloads);
        for key in &message.changes.removed_payloads {
            self.payloads.remove(key);
        }
        let unnamed = self.held.keys().filter(|id| is_whole && !named.contains(id));
        let removed: Vec<TaskId> =
            message.changes.removed_tasks.iter().chain(unnamed).copied().collect();
        for task_id in removed {
            if let Some(held) = self.held.get_mut(&task_id) {
                held.is_removed = true;
                touched.push(task_id);
            }
        }
        if is_whole {
            self.is_led = true;
            // Leaders decide again about what has ended.
            let ended = self.held.iter().filter(|(_, held)| held.ended.is_some());
            touched.extend(ended.map(|(task_id, _)| *task_id));
        }
        Ok(touched)
    }

    pub(crate) fn assign(&mut self, task: Task, now: Timestamp, clock: Timestamp) {
        if let Some(held) = self.held.get_mut(&task.id) {
            if !held.is_removed {
                held.task = task;
            }
            return;
        }
        // What managers know of its past on this node is in the task.
        let status = task.status.clone();
        let was_unhealthy = status.unhealthy;
        let (task_id, stop_at) = (task.id, None);
        let began = status.attempts.last().map_or(status.timestamp, |attempt| attempt.ended_at);
        let held = Held {
            task,
            is_removed: false,
            status,
            was_unhealthy,
            ended: None,
            began,
            due: now,
            stop_at,
        };
        self.held.insert(task_id, held);
        self.expect_container(task_id, (now, clock));
    }

    /// A container that should run and does not is lost.
    fn expect_container(&mut self, task_id: TaskId, at: (Timestamp, Timestamp)) {
        let is_running = self.running.contains(&task_id);
        let Some(held) = self.held.get_mut(&task_id) else { return };
        held.ended = None;
        let state = held.status.state;
        if !is_running && state >= TaskState::Starting && !state.is_terminal() {
            let err = "its container was gone when the daemon started again".to_owned();
            self.end(task_id, TaskState::Failed, err, at);
        }
    }

    /// A container has ended: while no manager leads it may be tried again, else the task has.
    fn end(
        &mut self,
        task_id: TaskId,
        state: TaskState,
        err: String,
        (now, clock): (Timestamp, Timestamp),
    ) {
        let is_led = self.is_led;
        let Some(held) = self.held.get_mut(&task_id) else { return };
        let pause = attempts::pause(&held.task, &held.status, state, clock);
        match pause.filter(|_| !is_led && !held.is_ending()) {
            Some(pause) => held.ended = Some(Ended { state, err, again_at: now.after(pause) }),
            None => {
                held.ended = None;
                held.status.err = err;
                self.report(task_id, state, clock);
            }
        }
    }

    /// Another container of a task whose last one ended, where it is time for it.
    fn try_again(
        &mut self,
        task_id: TaskId,
        rates: &Rates,
        (now, clock): (Timestamp, Timestamp),
        rng: &mut StdRng,
    ) -> (Stepped, Option<Duration>) {
        let is_led = self.is_led;
        let Some(held) = self.held.get_mut(&task_id) else { return (Stepped::Nothing, None) };
        let Some(ended) = held.ended.clone() else { return (Stepped::Nothing, None) };
        if is_led || held.is_ending() {
            (held.ended, held.status.err) = (None, ended.err);
            self.report(task_id, ended.state, clock);
            return (Stepped::Ended(ended.state), Some(Duration::ZERO));
        }
        if now < ended.again_at {
            return (Stepped::Nothing, Some(ended.again_at.since(now)));
        }
        if !used_by(&held.task).all(|key| self.payloads.contains(&key)) {
            return (Stepped::Nothing, None); // They come with a leader, which decides then.
        }
        let attempt = Attempt {
            container_id: task_id.to_string(),
            exit_code: if ended.state == TaskState::Complete { 0 } else { 1 },
            started_at: std::mem::replace(&mut held.began, clock),
            ended_at: clock,
            err: ended.err,
        };
        held.status.note_attempt(attempt, attempts::limit(&held.task).unwrap_or(0));
        (held.status.unhealthy, held.was_unhealthy, held.ended) = (false, false, None);
        self.unsent.insert(task_id);
        if rates.hits(Fault::Reject, rng) {
            let err = "starting: no such thing".to_owned();
            self.end(task_id, TaskState::Failed, err, (now, clock));
            return (Stepped::TriedAgain { runs: false }, Some(Duration::ZERO));
        }
        self.running.insert(task_id);
        let delay = Duration::from_millis(rng.random_range(500..5000));
        held.due = now.after(delay);
        (Stepped::TriedAgain { runs: true }, Some(delay))
    }

    /// All its tasks end: it is no member any more.
    pub(crate) fn remove_all(&mut self) -> Vec<TaskId> {
        self.payloads.clear();
        self.held.values_mut().for_each(|held| held.is_removed = true);
        self.held.keys().copied().collect()
    }

    /// The daemon was killed and starts again.
    pub(crate) fn restart(&mut self, now: Timestamp, clock: Timestamp) -> Vec<TaskId> {
        self.lose_leader();
        (self.unsent_mesh, self.told_table) = (None, None);
        self.payloads.clear();
        let task_ids: Vec<TaskId> = self.held.keys().copied().collect();
        for task_id in &task_ids {
            self.expect_container(*task_id, (now, clock));
            if let Some(held) = self.held.get_mut(task_id) {
                (held.due, held.stop_at) = (now, None);
            }
        }
        task_ids
    }

    /// The machine lost power: containers are gone, and records that were not on the disk yet.
    pub(crate) fn lose_power(&mut self, rng: &mut StdRng) {
        self.kernel = Kernel::default();
        self.held.retain(|_, _| rng.random_bool(0.9));
        self.running.clear();
    }

    /// The kernel takes the newest table.
    pub(crate) fn program(&mut self, session: u64, version: u64) -> bool {
        let is_current = self.session().is_some_and(|(current, ..)| current == session);
        let Some(told) = self.told_table.clone().filter(|told| told.version == version) else {
            return false; // A newer one is on its way.
        };
        if is_current {
            self.unsent_mesh = Some(told.version);
            self.kernel = told;
        }
        is_current
    }

    fn report(&mut self, task_id: TaskId, state: TaskState, clock: Timestamp) {
        let Some(held) = self.held.get_mut(&task_id) else { return };
        if state > held.status.state {
            held.status.timestamp = clock;
        }
        held.status.state = state;
        if state.is_terminal() {
            held.status.unhealthy = false;
        }
        self.unsent.insert(task_id);
    }

    /// A container ended by itself.
    pub(crate) fn exit(
        &mut self,
        task_id: TaskId,
        is_failure: bool,
        at: (Timestamp, Timestamp),
    ) -> Option<TaskState> {
        if !self.running.remove(&task_id) {
            return None;
        }
        let held = self.held.get_mut(&task_id)?;
        let state = match (held.is_ending(), is_failure) {
            (true, _) => TaskState::Shutdown,
            (false, true) => TaskState::Failed,
            (false, false) => TaskState::Complete,
        };
        let err = if is_failure { "task: non-zero exit (1)" } else { "" };
        self.end(task_id, state, err.to_owned(), at);
        Some(state)
    }

    /// A running container's health check fails.
    pub(crate) fn sicken(&mut self, task_id: TaskId) -> bool {
        let Some(held) = self.held.get_mut(&task_id) else { return false };
        let is_running = held.ended.is_none() && held.status.state == TaskState::Running;
        let is_healthy = is_running && !held.status.unhealthy;
        if is_healthy {
            (held.status.unhealthy, held.was_unhealthy) = (true, true);
            self.unsent.insert(task_id);
        }
        is_healthy
    }

    /// One step of a task's life, and when to look again. `clock` is what the machine's clock shows `now`.
    pub(crate) fn step(
        &mut self,
        task_id: TaskId,
        rates: &Rates,
        (now, clock): (Timestamp, Timestamp),
        rng: &mut StdRng,
    ) -> (Stepped, Option<Duration>) {
        let is_running = self.running.contains(&task_id);
        let Some(held) = self.held.get_mut(&task_id) else { return (Stepped::Nothing, None) };
        let (state, is_ending) = (held.status.state, held.is_ending());
        if state.is_terminal() {
            if !held.is_removed {
                return (Stepped::Nothing, None);
            }
            self.held.remove(&task_id);
            self.unsent.remove(&task_id);
            return (Stepped::Erased, None);
        }
        if held.ended.is_some() {
            return self.try_again(task_id, rates, (now, clock), rng);
        }
        if is_running && is_ending {
            return self.stop(task_id, (now, clock), rng);
        }
        if is_ending {
            self.report(task_id, TaskState::Shutdown, clock);
            return (Stepped::Reported(TaskState::Shutdown), Some(Duration::ZERO));
        }
        let is_of_job = held.task.job_iteration.is_some();
        if now < held.due || (state == TaskState::Running && !is_of_job) {
            return (Stepped::Nothing, None);
        }
        if state == TaskState::Running {
            // It has done its work.
            let ended = self.exit(task_id, false, (now, clock));
            return (ended.map_or(Stepped::Nothing, Stepped::Ended), Some(Duration::ZERO));
        }
        if state == TaskState::Ready && held.task.desired_state < TaskState::Running {
            return (Stepped::Nothing, None);
        }
        let (next, millis) = match state {
            TaskState::Starting if !is_running => {
                self.running.insert(task_id);
                held.began = clock;
                // Its first health check has not passed yet.
                let delay = Duration::from_millis(rng.random_range(0..500));
                held.due = now.after(delay);
                return (Stepped::Started, Some(delay));
            }
            TaskState::Starting if is_of_job => (TaskState::Running, 500..5000),
            TaskState::Starting => (TaskState::Running, 0..1),
            TaskState::Ready => (TaskState::Starting, 5..300),
            TaskState::Preparing if rates.hits(Fault::Reject, rng) => {
                "preparing: no such thing".clone_into(&mut held.status.err);
                (TaskState::Rejected, 0..1)
            }
            TaskState::Preparing => (TaskState::Ready, 0..1),
            TaskState::Accepted => (TaskState::Preparing, 20..2000),
            _ => (TaskState::Accepted, 0..5),
        };
        let delay = Duration::from_millis(rng.random_range(millis));
        held.due = now.after(delay);
        self.report(task_id, next, clock);
        (Stepped::Reported(next), Some(delay))
    }

    /// Whether it has been told to stop a task, and does.
    pub(crate) fn is_stopping(&self, task_id: TaskId) -> bool {
        self.held.get(&task_id).is_some_and(|held| held.stop_at.is_some())
    }

    fn stop(
        &mut self,
        task_id: TaskId,
        (now, clock): (Timestamp, Timestamp),
        rng: &mut StdRng,
    ) -> (Stepped, Option<Duration>) {
        let Some(held) = self.held.get_mut(&task_id) else { return (Stepped::Nothing, None) };
        match held.stop_at {
            None => {
                let delay = Duration::from_millis(rng.random_range(10..3000));
                held.stop_at = Some(now.after(delay));
                (Stepped::Stopping, Some(delay))
            }
            Some(at) if at > now => (Stepped::Nothing, None),
            Some(_) => {
                let state =
                    if held.was_unhealthy { TaskState::Failed } else { TaskState::Shutdown };
                self.running.remove(&task_id);
                self.report(task_id, state, clock);
                (Stepped::Ended(state), Some(Duration::ZERO))
            }
        }
    }
}
