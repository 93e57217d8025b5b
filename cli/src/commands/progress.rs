//! Waits until a service has converged and shows how far it is.
//!
//! Driven by the change feed alone: every event is laid into [`State`], which then says what the
//! lines of the display are and whether the command is done. A service has converged when every
//! slot runs a task of the current spec and no update is under way; it must stay so for the update's
//! monitor time. Jobs are [`Job`]'s. Source: docker/cli `service/progress/progress.go`; differs from it: the feed
//! instead of a question every 200 ms, and an update that the managers still watch is not done.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use skep_common::object::Slot;
use skep_common::object::{NodeState, UpdateStatus};
use skep_common::spec::Nanos;
use skep_common::{Node, NodeId, Service, Task, TaskId, TaskState};
use skep_proto::WatchRequest;
use skep_proto::watch_event::Action;
use tokio::time::{Instant, sleep_until};

use super::progress_job::Job;
use crate::client::{Client, Refusal};
use crate::ui::Ui;

/// How long a converged service must stay so where its spec does not say. docker/cli `progress.go`.
const MONITOR: Duration = Duration::from_secs(5);
/// How long a job's failure must stand: the feed tells of a task that ended before it tells of the one that
/// follows, although both were written at once.
const FAILURE_STANDS: Duration = Duration::from_secs(1);
/// Most slots that get a line of their own. docker/cli `maxProgressBars`.
pub(super) const LINES_MAX: u64 = 20;
/// Longest error in a slot's line. docker/cli `truncError`.
const ERROR_LENGTH_MAX: usize = 75;

/// Which service, and what of it is old news.
#[derive(Debug)]
pub(super) struct Waiting {
    service_id: String,
    /// What was read before the change: an object of this version or below is not the changed one.
    version: u64,
    status: Option<UpdateStatus>,
}

impl Waiting {
    /// For a service that was just made, or that is to be taken as it is.
    pub(super) fn for_new(service_id: String) -> Self {
        Self { service_id, version: 0, status: None }
    }

    /// For a service that was changed after it was read.
    pub(super) fn for_changed(before: &Service) -> Self {
        Self {
            service_id: before.id.to_string(),
            version: before.meta.version.index,
            status: before.update_status.clone(),
        }
    }
}

/// How a wait stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Not every task is there yet.
    Working,
    /// Every task runs; it must stay so for a while.
    Stable,
    /// The managers say that the update is complete.
    Done(Option<String>),
    /// The update stopped, or the service is gone.
    Failed(String),
    /// No task of a job will follow those that failed, unless one is about to be told of.
    Over(String),
}

/// The service and what belongs to it, as the feed told.
#[derive(Debug)]
struct State {
    waiting: Waiting,
    service: Option<Service>,
    tasks: BTreeMap<TaskId, Task>,
    nodes_down: BTreeMap<NodeId, bool>,
    is_synced: bool,
    is_removed: bool,
}

impl State {
    fn new(waiting: Waiting) -> Self {
        Self {
            waiting,
            service: None,
            tasks: BTreeMap::new(),
            nodes_down: BTreeMap::new(),
            is_synced: false,
            is_removed: false,
        }
    }

    /// Lays one event in.
    fn take(&mut self, action: Action, kind: &str, id: &str, json: &str) -> Result<()> {
        match (action, kind) {
            (Action::Synced, _) => self.is_synced = true,
            (Action::Removed, "service") => self.is_removed = id == self.waiting.service_id,
            (Action::Removed, "task") => {
                if let Ok(id) = id.parse() {
                    self.tasks.remove(&id);
                }
            }
            (Action::Removed, _) => {}
            (Action::Initial | Action::Changed, "service") => {
                let service: Service = serde_json::from_str(json)?;
                self.is_removed = service.pending_delete;
                self.service = Some(service);
            }
            (Action::Initial | Action::Changed, "task") => {
                let task: Task = serde_json::from_str(json)?;
                self.tasks.insert(task.id, task);
            }
            (Action::Initial | Action::Changed, "node") => {
                let node: Node = serde_json::from_str(json)?;
                self.nodes_down.insert(node.id, node.status.state == NodeState::Down);
            }
            (Action::Initial | Action::Changed, _) => {}
        }
        Ok(())
    }

    /// The service once the feed has the change that is waited for.
    fn current(&self) -> Option<&Service> {
        let service = self.service.as_ref()?;
        (self.is_synced && service.meta.version.index > self.waiting.version).then_some(service)
    }

    /// The task that stands for each slot: of the current spec, on a node that is up, the one with
    /// the lowest desired state, then the lowest state.
    fn slots<'s>(&'s self, service: &Service) -> BTreeMap<Slot, &'s Task> {
        let mut slots: BTreeMap<Slot, &Task> = BTreeMap::new();
        for task in self.tasks.values() {
            let is_current = task.spec_version == service.spec_version
                || *task.spec == service.spec.task_template;
            let is_down = task.node_id.and_then(|id| self.nodes_down.get(&id)).copied();
            if !is_current || is_down == Some(true) {
                continue;
            }
            let rank = |task: &Task| (task.desired_state, task.status.state);
            match slots.get(&task.slot_key()) {
                Some(known) if rank(known) <= rank(task) => {}
                _ => {
                    slots.insert(task.slot_key(), task);
                }
            }
        }
        slots
    }

    /// How many tasks shall run: where no number is given, one on each node that has one, of whichever spec.
    fn wanted(&self, service: &Service) -> u64 {
        let nodes = || {
            let live = self.tasks.values().filter(|task| task.desired_state.wants_run());
            live.map(Task::slot_key).collect::<BTreeSet<Slot>>().len() as u64
        };
        service.spec.replicas().unwrap_or_else(nodes)
    }

    fn is_rolling_back(service: &Service) -> bool {
        service.update_status.as_ref().is_some_and(|status| status.state.starts_with("rollback"))
    }

    fn verdict(&self) -> Verdict {
        if self.is_removed {
            return Verdict::Failed("the service was removed".into());
        }
        let Some(service) = self.current() else { return Verdict::Working };
        if let Some(job) = Job::of(service, self.tasks.values()) {
            return job.verdict();
        }
        let mut is_updating = false;
        if let Some(status) = service
            .update_status
            .as_ref()
            .filter(|status| Some(*status) != self.waiting.status.as_ref())
        {
            match status.state.as_str() {
                "paused" => {
                    return Verdict::Failed(format!("service update paused: {}", status.message));
                }
                "rollback_paused" => {
                    return Verdict::Failed(format!("service rollback paused: {}", status.message));
                }
                "completed" => return Verdict::Done(None),
                "rollback_completed" => return Verdict::Done(Some(status.message.clone())),
                _ => is_updating = true,
            }
        }
        let slots = self.slots(service);
        let n_running = slots.values().filter(|task| is_running(task)).count() as u64;
        let n_wanted = self.wanted(service);
        let n_surplus = slots.values().filter(|task| task.desired_state.wants_run()).count() as u64;
        if n_running == n_wanted && n_surplus == n_wanted && !is_updating {
            Verdict::Stable
        } else {
            Verdict::Working
        }
    }

    fn is_job(&self) -> bool {
        self.service.as_ref().is_some_and(|service| service.job_status.is_some())
    }

    /// The time for which a converged service is watched.
    fn monitor(&self) -> Duration {
        if self.is_job() {
            return FAILURE_STANDS;
        }
        let config = self.service.as_ref().and_then(|service| service.spec.update_config.as_ref());
        let monitor = config.and_then(|config| config.monitor).map(Nanos::duration);
        monitor.filter(|monitor| !monitor.is_zero()).unwrap_or(MONITOR)
    }

    /// What is to be shown: a name and a text each.
    fn lines(&self) -> Vec<(String, String)> {
        let Some(service) = self.current() else { return Vec::new() };
        if let Some(job) = Job::of(service, self.tasks.values()) {
            return job.lines();
        }
        let slots = self.slots(service);
        let n_running = slots.values().filter(|task| is_running(task)).count();
        let replicas = self.wanted(service);
        let prefix = if Self::is_rolling_back(service) { "rolling back update: " } else { "" };
        let overall = format!("{prefix}{n_running} out of {replicas} tasks");
        let mut lines = vec![("overall progress".to_owned(), overall)];
        let conditions = service.conditions.iter();
        lines.extend(conditions.map(|one| ("warning".to_owned(), one.message.clone())));
        if replicas > LINES_MAX {
            return lines;
        }
        // Slots are shown as 1, 2, 3 …, also where their numbers have gaps.
        let live: Vec<&Task> =
            slots.values().copied().filter(|task| task.desired_state.wants_run()).collect();
        for number in 1..=replicas {
            let index = usize::try_from(number - 1).unwrap_or(usize::MAX);
            let task = live.get(index);
            let text = task.map_or_else(String::new, |task| slot_text(task));
            let node = task.and_then(|task| task.preset_node);
            let name = node.map_or_else(|| format!("{number}/{replicas}"), |node| node.short());
            lines.push((name, text));
        }
        lines
    }
}

fn is_running(task: &Task) -> bool {
    task.desired_state.wants_run() && task.status.state == TaskState::Running
}

/// The state of a slot's task, or what went wrong.
pub(super) fn slot_text(task: &Task) -> String {
    if !task.status.err.is_empty() {
        let error = task.status.err.replace('\n', " ");
        return crate::format::human::ellipsis(&error, ERROR_LENGTH_MAX);
    }
    task.status.state.name().to_owned()
}

/// Shows lines: in place on a terminal, elsewhere each text when it changes.
struct Display<'u> {
    ui: &'u mut Ui,
    is_quiet: bool,
    shown: Vec<(String, String)>,
}

impl Display<'_> {
    fn show(&mut self, lines: Vec<(String, String)>) -> Result<()> {
        if self.is_quiet || lines == self.shown {
            return Ok(());
        }
        if self.ui.is_terminal {
            let mut text = String::new();
            if !self.shown.is_empty() {
                text.push_str(&format!("\x1b[{}A", self.shown.len()));
            }
            let n_lines = lines.len().max(self.shown.len());
            for index in 0..n_lines {
                let line = lines
                    .get(index)
                    .map_or_else(String::new, |(name, value)| decorated(name, value));
                text.push_str(&format!("\x1b[2K{line}\n"));
            }
            self.ui.message(text)?;
            self.shown = lines;
            self.shown.resize(n_lines, (String::new(), String::new()));
            return Ok(());
        }
        for (name, value) in &lines {
            let is_old = self.shown.iter().any(|(n, v)| n == name && v == value);
            if !is_old && !value.is_empty() {
                self.ui.note(format_args!("{name}: {value}"))?;
            }
        }
        self.shown = lines;
        Ok(())
    }
}

/// A state's line with Docker's bar of fifty characters.
fn decorated(name: &str, value: &str) -> String {
    if name.is_empty() {
        return String::new();
    }
    let step = [
        TaskState::New,
        TaskState::Pending,
        TaskState::Assigned,
        TaskState::Accepted,
        TaskState::Preparing,
        TaskState::Ready,
        TaskState::Starting,
        TaskState::Running,
    ]
    .iter()
    .position(|state| state.name() == value);
    match step {
        Some(step) if name != "overall progress" => {
            let filled = (step + 1) * 50 / 8;
            format!("{name}: {value:<9} [{}>{}]", "=".repeat(filled), " ".repeat(50 - filled))
        }
        _ => format!("{name}: {value}"),
    }
}

/// Waits until the service has converged; an update that pauses or fails is an error.
pub(super) async fn wait(
    client: &Client,
    waiting: Waiting,
    is_quiet: bool,
    ui: &mut Ui,
) -> Result<()> {
    let service_id = waiting.service_id.clone();
    let request = WatchRequest {
        kinds: ["service", "task", "node"].map(str::to_owned).to_vec(),
        service_ids: vec![service_id.clone()],
    };
    let mut feed = client.control().watch(request).await.map_err(Refusal)?.into_inner();
    let mut state = State::new(waiting);
    let mut display = Display { ui, is_quiet, shown: Vec::new() };
    let mut stable_since: Option<Instant> = None;
    let interrupt = tokio::signal::ctrl_c();
    tokio::pin!(interrupt);
    loop {
        let deadline = stable_since.map(|since| since + state.monitor());
        let tick = stable_since.map(|since| next_tick(since, deadline, display.ui.is_terminal));
        // Every arm is cancel-safe: a stream's message stays queued, the others hold no data.
        tokio::select! {
            message = feed.message() => {
                let event = message.map_err(Refusal)?;
                let event = event.ok_or_else(|| anyhow!("the daemon closed the connection before service {service_id} converged"))?;
                state.take(event.action(), &event.kind, &event.id, &event.json)?;
            }
            () = sleep_to(tick), if tick.is_some() => {
                if deadline.is_some_and(|deadline| deadline <= now()) {
                    if let Verdict::Over(reason) = state.verdict() {
                        bail!(reason);
                    }
                    return converged(&state, &service_id, None, &mut display);
                }
            }
            _ = &mut interrupt => {
                display.ui.note("Operation continuing in background.")?;
                display.ui.note(format_args!("Use `skep service ps {service_id}` to check progress."))?;
                return Ok(());
            }
        }
        if !state.is_synced {
            continue;
        }
        let mut lines = state.lines();
        match state.verdict() {
            Verdict::Failed(reason) => {
                display.show(lines)?;
                bail!(reason);
            }
            Verdict::Done(message) => return converged(&state, &service_id, message, &mut display),
            Verdict::Working => {
                if stable_since.take().is_some() && !state.is_job() {
                    lines.push(("verify".into(), "Detected task failure".into()));
                }
            }
            Verdict::Over(_) => {
                stable_since.get_or_insert_with(now);
            }
            Verdict::Stable => {
                let since = *stable_since.get_or_insert_with(now);
                lines.push(("verify".into(), verifying(&state, since, display.ui.is_terminal)));
            }
        }
        display.show(lines)?;
    }
}

/// What is said while a converged service is watched: with a countdown on a terminal.
fn verifying(state: &State, since: Instant, is_terminal: bool) -> String {
    let left = (since + state.monitor()).saturating_duration_since(now());
    let seconds = if is_terminal { left.as_secs() + 1 } else { state.monitor().as_secs().max(1) };
    format!("Waiting {seconds} seconds to verify that tasks are stable...")
}

/// Tokio's clock, which is the one of its timers.
fn now() -> Instant {
    Instant::now()
}

/// When to look again: at the deadline, on a terminal also each second for the countdown.
fn next_tick(since: Instant, deadline: Option<Instant>, is_terminal: bool) -> Instant {
    let deadline = deadline.unwrap_or(since);
    if !is_terminal {
        return deadline;
    }
    let elapsed = now().saturating_duration_since(since).as_secs();
    deadline.min(since + Duration::from_secs(elapsed + 1))
}

async fn sleep_to(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

fn converged(
    state: &State,
    service_id: &str,
    message: Option<String>,
    display: &mut Display<'_>,
) -> Result<()> {
    let mut lines = state.lines();
    if let Some(message) = message {
        lines.push(("rollback".into(), message));
    }
    if state.is_job() {
        display.show(lines)?;
        return if display.is_quiet { Ok(()) } else { Ok(display.ui.note("job complete")?) };
    }
    lines.push(("verify".into(), format!("Service {service_id} converged")));
    display.show(lines)
}

/// Waits until services and their tasks are gone.
pub(super) async fn wait_removed(client: &Client, service_ids: BTreeSet<String>) -> Result<()> {
    if service_ids.is_empty() {
        return Ok(());
    }
    let request = WatchRequest {
        kinds: ["service", "task"].map(str::to_owned).to_vec(),
        service_ids: service_ids.into_iter().collect(),
    };
    let mut feed = client.control().watch(request).await.map_err(Refusal)?.into_inner();
    let mut left: BTreeSet<String> = BTreeSet::new();
    let mut is_synced = false;
    while !is_synced || !left.is_empty() {
        let event = feed.message().await.map_err(Refusal)?;
        let event = event
            .ok_or_else(|| anyhow!("the daemon closed the connection before all was removed"))?;
        match event.action() {
            Action::Synced => is_synced = true,
            Action::Initial | Action::Changed => {
                left.insert(event.id);
            }
            Action::Removed => {
                left.remove(&event.id);
            }
        }
    }
    Ok(())
}
