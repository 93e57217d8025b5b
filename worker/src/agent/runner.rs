//! The life of one task on its node: from the assignment to the erasure of its container.
//!
//! ```text
//! Accepted ─► Preparing ─► Ready ─► Starting ─► Running ─► Complete | Failed
//!                 │          └ waits until managers want it running   │
//!                 └─ error: Rejected          managers want it ended: Shutdown
//! ```
//!
//! # Invariants
//!
//! - States reported only grow; a task is run once under managers. While none leads a container that ended is
//!   followed by another one of the same task, as the restart policy says: the state stays what it was, and
//!   managers hear of the attempt. From the moment that they have said what they want, they decide.
//! - A running task whose checks fail is reported as unhealthy and goes on until managers have taken it
//!   from the balancers and want it ended: nothing is killed under a connection.
//! - Whatever happens, the runner ends by erasing the container once managers have forgotten the task.

use std::sync::Arc;
use std::time::{Duration, Instant};

use skep_common::limits::DRAIN_ACK_WAIT;
use skep_common::object::{Attempt, ContainerStatus, TaskStatus};
use skep_common::{Task, TaskId, TaskState, Timestamp};
use skep_runtime::clock;
use skep_worker_core::attempts;
use skep_worker_core::health::{Counter, Health, HealthCheck};
use tokio::sync::{mpsc, watch};

use super::payloads::Payloads;
use crate::executor::{Error, Executor, Exit, Found};

/// The exit code of a container that was lost or could not be made.
const NO_EXIT_CODE: i32 = -1;

/// What managers want, as last assigned.
#[derive(Debug, Clone)]
pub(super) struct Assigned {
    pub(super) task: Arc<Task>,
    /// Managers have forgotten the task.
    pub(super) removed: bool,
    /// The number of the table that must be in force before the task is stopped: it is not in it.
    pub(super) withdrawn_by: u64,
}

impl Assigned {
    pub(super) fn is_ending(&self) -> bool {
        self.removed || !self.task.desired_state.wants_run()
    }

    fn may_start(&self) -> bool {
        self.task.desired_state.may_start()
    }
}

/// What a runner tells the agent.
#[derive(Debug)]
pub(super) enum Report {
    /// The task reached a state.
    Status(TaskId, TaskStatus),
    /// The task is erased; the runner has ended.
    Erased(TaskId),
}

/// One task's runner.
#[derive(Debug)]
pub(super) struct Runner {
    assigned: watch::Receiver<Assigned>,
    executor: Arc<dyn Executor>,
    payloads: Payloads,
    reports: mpsc::Sender<Report>,
    /// The number of the table that the kernel has.
    in_force: watch::Receiver<u64>,
    /// Whether managers have said what this node is to run, and are in reach.
    is_led: watch::Receiver<bool>,
    task_id: TaskId,
    status: TaskStatus,
    /// When the container began, by this node's clock.
    began: Timestamp,
    was_unhealthy: bool,
}

/// What came of trying a task again.
enum Again {
    Started(ContainerStatus, Instant),
    Failed(Error),
    /// Managers are back, or want it ended.
    Over,
}

/// How a task ended.
struct Ending {
    state: TaskState,
    message: &'static str,
    err: String,
    exit: Option<Exit>,
}

impl Ending {
    fn new(state: TaskState, message: &'static str) -> Self {
        Self { state, message, err: String::new(), exit: None }
    }

    fn error(state: TaskState, message: &'static str, error: Error) -> Self {
        Self { err: error.0, ..Self::new(state, message) }
    }
}

impl Runner {
    pub(super) fn new(
        assigned: watch::Receiver<Assigned>,
        (executor, payloads): (Arc<dyn Executor>, Payloads),
        reports: mpsc::Sender<Report>,
        (in_force, is_led): (watch::Receiver<u64>, watch::Receiver<bool>),
        status: TaskStatus,
    ) -> Self {
        let task_id = assigned.borrow().task.id;
        let was_unhealthy = status.unhealthy;
        let began = status.attempts.last().map_or(status.timestamp, |attempt| attempt.ended_at);
        Self {
            assigned,
            executor,
            payloads,
            reports,
            in_force,
            is_led,
            task_id,
            status,
            began,
            was_unhealthy,
        }
    }

    /// Runs the task. `found` is its container, where one outlived the last daemon.
    pub(super) async fn run(mut self, found: Option<Found>) {
        if !self.status.state.is_terminal() {
            let ending = self.live(found).await;
            let ending = self.go_on_alone(ending).await;
            self.report_end(ending).await;
        }
        // An error means that the agent has ended: the next daemon takes over.
        if self.assigned.wait_for(|assigned| assigned.removed).await.is_err() {
            return;
        }
        self.erase().await;
        let _ = self.reports.send(Report::Erased(self.task_id)).await; // As above.
    }

    /// From the assignment to the end of the container.
    async fn live(&mut self, found: Option<Found>) -> Ending {
        let since_start = match (found, self.status.state) {
            (Some(Found::Started(container)), _) => {
                self.status.container_status = Some(container);
                None
            }
            (_, state) if state >= TaskState::Starting => {
                let lost = Error("its container was gone when the daemon started again".into());
                return Ending::error(TaskState::Failed, "lost", lost);
            }
            _ => match self.prepare_and_start().await {
                Ok(started) => Some(started),
                Err(ending) => return ending,
            },
        };
        self.supervise(since_start).await
    }

    /// While no manager leads, what ends is tried again as the restart policy says.
    async fn go_on_alone(&mut self, mut ending: Ending) -> Ending {
        while self.is_to_be_tried_again(&ending).await {
            match self.try_again().await {
                Again::Started(container, started) => {
                    self.note_attempt(ending);
                    self.status.container_status = Some(container);
                    self.report(self.status.state, "started again while no manager led").await;
                    ending = self.supervise(Some(started)).await;
                }
                Again::Failed(error) => {
                    self.note_attempt(ending);
                    ending = Ending::error(TaskState::Failed, "starting", error);
                }
                Again::Over => break,
            }
        }
        ending
    }

    /// Returns when it is clear whether the node is to follow an ended container by another one.
    async fn is_to_be_tried_again(&mut self, ending: &Ending) -> bool {
        let pause = {
            let assigned = self.assigned.borrow();
            let pause = attempts::pause(&assigned.task, &self.status, ending.state, clock::now());
            pause.filter(|_| !assigned.is_ending())
        };
        // Managers in reach: they decide.
        let Some(pause) = pause.filter(|_| !*self.is_led.borrow()) else { return false };
        self.note_exit(ending.exit.as_ref());
        self.report(self.status.state, "ended while no manager led").await;
        tokio::select! {
            biased;
            () = self.over() => false,
            () = tokio::time::sleep(pause) => true,
        }
    }

    /// Makes and starts another container of the task.
    async fn try_again(&mut self) -> Again {
        let task = Arc::clone(&self.assigned.borrow().task);
        let (executor, payloads) = (Arc::clone(&self.executor), self.payloads.clone());
        tracing::info!(task.id = %self.task_id, "no manager leads: trying an ended task again");
        let again = async {
            prepare(executor.as_ref(), &payloads, &task).await?;
            let container = executor.start(&task).await?;
            Ok((container, clock::monotonic()))
        };
        let result = tokio::select! {
            biased;
            () = self.over() => None,
            result = again => Some(result),
        };
        match result {
            Some(Ok((container, started))) => Again::Started(container, started),
            Some(Err(error)) => Again::Failed(error),
            None => {
                // It may have been started, a moment before.
                if let Err(error) = self.executor.stop(&task).await {
                    tracing::warn!(task.id = %self.task_id, %error, "failed to stop a container");
                }
                // What connects it is undone with its end.
                self.executor.wait(self.task_id).await;
                Again::Over
            }
        }
    }

    /// Returns when managers decide again: they are back, or want the task ended.
    async fn over(&mut self) {
        let (assigned, is_led) = (&mut self.assigned, &mut self.is_led);
        // The agent has ended where one fails: the next daemon takes over.
        tokio::select! {
            _ = assigned.wait_for(Assigned::is_ending) => {}
            _ = is_led.wait_for(|is_led| *is_led) => {}
        }
    }

    /// Adds the container that ended to what managers are told.
    fn note_attempt(&mut self, ending: Ending) {
        let now = clock::now();
        let attempt = Attempt {
            container_id: self.task_id.to_string(),
            exit_code: ending.exit.map_or(NO_EXIT_CODE, |exit| exit.code),
            started_at: std::mem::replace(&mut self.began, now),
            ended_at: now,
            err: ending.err,
        };
        let limit = attempts::limit(&self.assigned.borrow().task).unwrap_or(0);
        self.status.note_attempt(attempt, limit);
        self.status.unhealthy = false;
        self.was_unhealthy = false;
    }

    async fn prepare_and_start(&mut self) -> Result<Instant, Ending> {
        self.reach(TaskState::Accepted, "accepted").await;
        self.reach(TaskState::Preparing, "preparing").await;
        let task = Arc::clone(&self.assigned.borrow().task);
        let (executor, payloads) = (Arc::clone(&self.executor), self.payloads.clone());
        tokio::select! {
            biased;
            () = self.wanted_ended() => return Err(Ending::new(TaskState::Shutdown, "shutdown")),
            prepared = prepare(executor.as_ref(), &payloads, &task) => {
                prepared.map_err(|error| Ending::error(TaskState::Rejected, "preparing", error))?;
            }
        }
        self.reach(TaskState::Ready, "prepared").await;
        let may_go_on = |assigned: &Assigned| assigned.may_start() || assigned.is_ending();
        let is_ending =
            self.assigned.wait_for(may_go_on).await.is_ok_and(|assigned| assigned.is_ending());
        if is_ending {
            return Err(Ending::new(TaskState::Shutdown, "shutdown"));
        }
        self.report(TaskState::Starting, "starting").await;
        let container = executor.start(&task).await;
        let container =
            container.map_err(|error| Ending::error(TaskState::Failed, "starting", error))?;
        let started = clock::monotonic();
        self.began = clock::now();
        self.status.container_status = Some(container);
        if !task.host_ports.is_empty() {
            // It is published from here on, also while its first check has not passed.
            self.report(TaskState::Starting, "started").await;
        }
        Ok(started)
    }

    /// Watches a started container to its end. `started` is absent for one that was found running.
    async fn supervise(&mut self, started: Option<Instant>) -> Ending {
        let task = Arc::clone(&self.assigned.borrow().task);
        let executor = Arc::clone(&self.executor);
        let check = match executor.health_check(&task).await {
            Ok(check) => check,
            Err(error) => {
                tracing::warn!(task.id = %self.task_id, %error, "running without its health check");
                None
            }
        };
        let is_found = started.is_none();
        let mut monitor =
            Monitor::new(check, started, is_found && self.status.state == TaskState::Running);
        if monitor.check.is_none() && self.status.state < TaskState::Running {
            self.report(TaskState::Running, "started").await;
        }
        let task_id = self.task_id;
        let exit = executor.wait(task_id);
        tokio::pin!(exit);
        loop {
            let event = tokio::select! {
                biased;
                exit = &mut exit => return self.ended(exit),
                () = self.wanted_ended() => None,
                health = monitor.next(executor.as_ref(), task_id) => Some(health),
            };
            match event {
                Some((Health::Healthy, _)) => {
                    self.status.unhealthy = false;
                    self.was_unhealthy = false;
                    self.report(TaskState::Running, "started").await;
                }
                Some((Health::Unhealthy, output)) => {
                    tracing::info!(task.id = %self.task_id, output, "the container is unhealthy");
                    self.was_unhealthy = true;
                    if self.status.state == TaskState::Running {
                        self.status.unhealthy = true;
                        self.report(TaskState::Running, "unhealthy").await;
                        continue;
                    }
                    let ending = self.stop(&task, exit.as_mut()).await;
                    return Ending { state: TaskState::Failed, ..ending };
                }
                Some((Health::Starting, _)) => {}
                None => return self.stop(&task, exit.as_mut()).await,
            }
        }
    }

    async fn stop(
        &self,
        task: &Task,
        exit: std::pin::Pin<&mut (impl Future<Output = Exit> + Send)>,
    ) -> Ending {
        self.until_withdrawn().await;
        if let Err(error) = self.executor.stop(task).await {
            tracing::warn!(task.id = %self.task_id, %error, "failed to stop a container");
        }
        let exit = exit.await;
        let state = if self.was_unhealthy { TaskState::Failed } else { TaskState::Shutdown };
        let err = if self.was_unhealthy { "unhealthy container".into() } else { String::new() };
        Ending { err, exit: Some(exit), ..Ending::new(state, "shutdown") }
    }

    /// Returns when this node's kernel sends nothing new to the task, or it took too long.
    async fn until_withdrawn(&self) {
        let withdrawn_by = self.assigned.borrow().withdrawn_by;
        let mut in_force = self.in_force.clone();
        let withdrawn = in_force.wait_for(|number| *number >= withdrawn_by);
        if tokio::time::timeout(DRAIN_ACK_WAIT, withdrawn).await.is_err() {
            tracing::warn!(task.id = %self.task_id, "stopping a task that may still be sent connections");
        }
    }

    /// The container ended by itself.
    fn ended(&self, exit: Exit) -> Ending {
        let is_wanted = self.assigned.borrow().is_ending();
        let (state, message, err) = match &exit {
            Exit { error: Some(error), .. } => (TaskState::Failed, "lost", error.clone()),
            _ if is_wanted => (TaskState::Shutdown, "shutdown", String::new()),
            Exit { code: 0, .. } => (TaskState::Complete, "finished", String::new()),
            Exit { code, oom_killed: true, .. } => (
                TaskState::Failed,
                "started",
                format!("task: non-zero exit ({code}): out of memory"),
            ),
            Exit { code, .. } => {
                (TaskState::Failed, "started", format!("task: non-zero exit ({code})"))
            }
        };
        Ending { err, exit: Some(exit), ..Ending::new(state, message) }
    }

    async fn wanted_ended(&mut self) {
        // The agent has ended where this fails: nothing is stopped then.
        if self.assigned.wait_for(Assigned::is_ending).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    fn note_exit(&mut self, exit: Option<&Exit>) {
        if let Some(exit) = exit {
            let container = self.status.container_status.get_or_insert_default();
            container.pid = 0;
            container.exit_code = exit.code;
            container.oom_killed = exit.oom_killed;
        }
    }

    async fn report_end(&mut self, ending: Ending) {
        self.status.err = ending.err;
        self.status.unhealthy = false;
        self.note_exit(ending.exit.as_ref());
        self.report(ending.state, ending.message).await;
    }

    /// Reports a step, unless the daemon of before had come further: it is taken again, and managers know it.
    async fn reach(&mut self, state: TaskState, message: &str) {
        if state >= self.status.state {
            self.report(state, message).await;
        }
    }

    async fn report(&mut self, state: TaskState, message: &str) {
        debug_assert!(state >= self.status.state, "{state} follows {}", self.status.state);
        if state > self.status.state {
            self.status.timestamp = clock::now();
        }
        self.status.state = state;
        message.clone_into(&mut self.status.message);
        // The agent has ended when this fails; the next daemon reports from its memory.
        let _ = self.reports.send(Report::Status(self.task_id, self.status.clone())).await;
    }

    async fn erase(&self) {
        let mut pause = Duration::from_millis(100);
        let mut is_first = true;
        while let Err(error) = self.executor.remove(self.task_id).await {
            if std::mem::take(&mut is_first) {
                tracing::warn!(task.id = %self.task_id, %error, "failed to erase a container, trying again");
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(30));
        }
    }
}

/// Makes the container, once this node has what is to be in it.
async fn prepare(executor: &dyn Executor, payloads: &Payloads, task: &Task) -> Result<(), Error> {
    let payloads = payloads.of_task(task).await?;
    executor.prepare(task, &payloads).await
}

/// Runs one container's health checks, one after the other.
struct Monitor {
    check: Option<HealthCheck>,
    counter: Counter,
    started: Option<Instant>,
    next_at: Option<Instant>,
}

impl Monitor {
    /// `is_running`: it was found with its checks passed.
    fn new(check: Option<HealthCheck>, started: Option<Instant>, is_running: bool) -> Self {
        let counter = if is_running { Counter::of_healthy() } else { Counter::default() };
        Self { check, counter, started, next_at: None }
    }

    /// Returns when a check has changed the container's health. Cancel-safe: the pause before the next
    /// check is kept in `self`, and a check that was cut off is run again.
    async fn next(&mut self, executor: &dyn Executor, task_id: TaskId) -> (Health, String) {
        let Some(check) = self.check.clone() else { return std::future::pending().await };
        loop {
            let delay = self.counter.delay(&check, self.since_start());
            let at = *self.next_at.get_or_insert_with(|| clock::monotonic() + delay);
            tokio::time::sleep_until(at.into()).await;
            let (passed, output) = executor.run_check(task_id, &check.argv, check.timeout).await;
            self.next_at = None;
            if let Some(health) = self.counter.observe(&check, passed, self.since_start()) {
                return (health, output);
            }
        }
    }

    /// A container that was found running has been started long ago.
    fn since_start(&self) -> Duration {
        self.started
            .map_or(Duration::MAX, |started| clock::monotonic().saturating_duration_since(started))
    }
}
