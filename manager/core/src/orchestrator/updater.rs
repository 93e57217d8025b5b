//! Replaces tasks of an old spec, a few slots at a time, and stops when the new spec fails.
//!
//! An update is not a process but a reading of the store: a slot is *dirty* while its tasks are of
//! another spec and none of the new one was made, *in flight* from the making of its first new task
//! until that task settled and the update's delay passed. Each pass replaces as many dirty slots as
//! `parallelism` leaves room for. States and messages are Docker's.
//!
//! A new task that ends (whatever its exit code) before or within `monitor` after it ran, or whose
//! health check fails then, is a failure of its slot. Differs from SwarmKit: so is one that does not
//! run within `ProgressDeadline`, or else [`Options::progress_deadline`]; SwarmKit waits for ever.
//! Source: SwarmKit `manager/orchestrator/update/updater.go`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use skep_common::limits::defaults;
use skep_common::object::{Slot, UpdateStatus};
use skep_common::spec::{ModeKind, NetworkAttachmentConfig, Placement, TaskSpec, UpdateConfig};
use skep_common::{Service, ServiceId, Task, TaskId, TaskState, Timestamp};

use super::{Scope, enforcer, global, is_live, newest};
use crate::plan::Options;
use crate::store::State;
use crate::{image, network, ports, secrets, service};

/// SwarmKit's default `Monitor`.
const MONITOR: Duration = Duration::from_secs(5);

/// What a leader remembers of running updates; a new one does without.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// From when on this leader has watched. Of what ended before, it knows no start.
    pub(crate) since: Timestamp,
    services: BTreeMap<ServiceId, Watched>,
}

/// Tasks of the new spec, as long as an update runs.
#[derive(Debug, Default)]
struct Watched {
    running_since: BTreeMap<TaskId, Timestamp>,
    unhealthy: BTreeSet<TaskId>,
}

/// An update's settings with its defaults.
struct Config {
    parallelism: usize,
    delay: Duration,
    monitor: Duration,
    max_failure_ratio: f64,
    action: Action,
    is_start_first: bool,
    /// What ended before is none of this update's failures.
    started_at: Timestamp,
    /// Within which a new task must run.
    progress_deadline: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    Pause,
    Continue,
    Rollback,
}

impl Config {
    fn of(given: Option<&UpdateConfig>, started_at: Timestamp, options: &Options) -> Self {
        let unset = UpdateConfig::default();
        let given = given.unwrap_or(&unset);
        let delay = given.delay.map_or(Duration::ZERO, |delay| delay.duration());
        let monitor = given.monitor.map_or(MONITOR, |monitor| monitor.duration());
        let parallelism = given.parallelism.unwrap_or(defaults::UPDATE_PARALLELISM);
        Self {
            parallelism: match usize::try_from(parallelism) {
                Ok(0) | Err(_) => usize::MAX,
                Ok(parallelism) => parallelism,
            },
            delay,
            // As SwarmKit: a failure of one slot must be seen before the next but one is replaced.
            monitor: if delay >= monitor { delay + Duration::from_secs(1) } else { monitor },
            max_failure_ratio: given.max_failure_ratio.unwrap_or(0.0),
            action: match given.failure_action.as_deref() {
                Some("continue") => Action::Continue,
                Some("rollback") => Action::Rollback,
                _ => Action::Pause,
            },
            is_start_first: given.order.as_deref() == Some("start-first"),
            started_at,
            progress_deadline: match given.progress_deadline {
                _ if options.is_patient => Duration::MAX,
                Some(deadline) => deadline.duration(),
                None => options.progress_deadline,
            },
        }
    }
}

/// Where an update stands.
struct Survey {
    /// Slots to replace, those that do not run first.
    dirty: Vec<(Slot, Vec<Arc<Task>>)>,
    /// Slots with tasks of the new spec.
    n_touched: usize,
    /// Replaced slots that still count towards the parallelism.
    n_in_flight: usize,
    /// Whether a new task has neither run nor failed yet.
    is_unsettled: bool,
    /// When the last new task settled.
    settled_at: Timestamp,
    /// Slots whose new task failed, each with the reason for people.
    failures: Vec<String>,
}

/// Starts, advances, pauses, rolls back or completes the update of a service.
pub(super) fn advance(scope: &mut Scope<'_, '_>, service: &Service) {
    let state = service.update_status.as_ref().map_or("", |status| status.state.as_str());
    let is_global = service.spec.mode_kind().is_some_and(ModeKind::is_global);
    let is_new = match state {
        "" => true,
        // A node that was paused meanwhile may be active again, with its task as it was.
        "completed" | "rollback_completed" => is_global,
        _ => false,
    };
    let is_rollback = match state {
        "" | "updating" => false,
        "rollback_started" => true,
        _ if is_new => false,
        _ => {
            scope.updates.services.remove(&service.id);
            return;
        }
    };
    let given =
        if is_rollback { &service.spec.rollback_config } else { &service.spec.update_config };
    let started_at = service.update_status.as_ref().and_then(|status| status.started_at);
    let config = Config::of(given.as_ref(), started_at.unwrap_or_default(), scope.options);
    if is_new && !has_dirty(scope, service) {
        scope.updates.services.remove(&service.id);
        return;
    }
    let survey = survey(scope, service, &config);
    if !is_new && fail(scope, service, &config, &survey, is_rollback) {
        return;
    }
    if is_new {
        let status = UpdateStatus {
            state: "updating".to_owned(),
            started_at: Some(scope.fork.now()),
            completed_at: None,
            message: "update in progress".to_owned(),
        };
        scope.fork.set_update_status(service, status);
    }
    let room = config.parallelism.saturating_sub(survey.n_in_flight);
    let is_last = survey.dirty.is_empty() && !survey.is_unsettled;
    for (slot, tasks) in survey.dirty.into_iter().take(room) {
        if !replace(scope, service, slot, &tasks, config.is_start_first) {
            break;
        }
    }
    if is_last {
        complete(scope, service, survey.settled_at.after(config.monitor), is_rollback);
    }
}

fn complete(scope: &mut Scope<'_, '_>, service: &Service, at: Timestamp, is_rollback: bool) {
    let now = scope.fork.now();
    if now < at {
        scope.wake_at(at, "update to be watched for failures");
        return;
    }
    let (state, message) = if is_rollback {
        ("rollback_completed", "rollback completed")
    } else {
        ("completed", "update completed")
    };
    let mut status = service.update_status.clone().unwrap_or_default();
    status.state = state.to_owned();
    status.completed_at = Some(now);
    status.message = message.to_owned();
    scope.fork.set_update_status(service, status);
    scope.updates.services.remove(&service.id);
}

/// Takes the failure action, where there are too many failures.
fn fail(
    scope: &mut Scope<'_, '_>,
    service: &Service,
    config: &Config,
    survey: &Survey,
    is_rollback: bool,
) -> bool {
    let Some(reason) = survey.failures.first() else { return false };
    let n_slots = survey.dirty.len() + survey.n_touched;
    let ratio = survey.failures.len() as f64 / n_slots as f64;
    if config.action == Action::Continue || ratio <= config.max_failure_ratio {
        return false;
    }
    let mut status = service.update_status.clone().unwrap_or_default();
    match &service.previous_spec {
        Some(previous)
            if config.action == Action::Rollback
                && !is_rollback
                && network::are_there(scope.fork.state(), previous)
                && secrets::are_there(scope.fork.state(), previous).is_ok() =>
        {
            status.state = "rollback_started".to_owned();
            status.message = format!("update rolled back due to {reason}");
            let mut service = service.clone();
            service.spec = previous.clone();
            service.previous_spec = None;
            service.update_status = Some(status);
            if let Ok(ports) = ports::allocate(scope.fork.state(), &service) {
                service.endpoint.ports = ports;
            }
            let virtual_ips = network::virtual_ips(scope.fork.state(), &service);
            service.endpoint.virtual_ips = virtual_ips;
            service::number(scope.fork.state(), &mut service);
            scope.fork.put_service(service);
        }
        _ => {
            let state = if is_rollback { "rollback_paused" } else { "paused" };
            status.state = state.to_owned();
            status.message = format!("update paused due to {reason}");
            scope.fork.set_update_status(service, status);
        }
    }
    scope.updates.services.remove(&service.id);
    true
}

/// Replaces the tasks of one slot; `false` where the pass is full.
fn replace(
    scope: &mut Scope<'_, '_>,
    service: &Service,
    slot: Slot,
    tasks: &[Arc<Task>],
    is_start_first: bool,
) -> bool {
    if !scope.fork.has_room() {
        return false;
    }
    if is_start_first && let Some(kept) = best(tasks) {
        // Successors of specs in between, which do not run yet, are not to pile up.
        for task in tasks.iter().filter(|task| is_live(task) && task.id != kept) {
            scope.fork.desire(task.id, TaskState::Shutdown);
        }
        return scope.fork.create_task(service, slot, TaskState::Running, None);
    }
    for task in tasks.iter().filter(|task| is_live(task)) {
        scope.fork.desire(task.id, TaskState::Shutdown);
    }
    scope.create_in_slot(service, slot, scope.fork.now())
}

/// The live task of a slot that serves, or comes closest to it.
fn best(tasks: &[Arc<Task>]) -> Option<TaskId> {
    let live = tasks.iter().filter(|task| is_live(task) && !task.status.state.is_terminal());
    let rank =
        |task: &&Arc<Task>| (task.status.state, !task.status.unhealthy, task.spec_version, task.id);
    live.max_by_key(rank).map(|task| task.id)
}

/// Gives up a slot's other tasks once one of the current spec runs.
pub(super) fn finish_start_first(scope: &mut Scope<'_, '_>, service: &Service) {
    for (_, tasks) in scope.slots(service.id).iter() {
        if tasks.len() < 2 {
            continue;
        }
        let live: Vec<&Arc<Task>> = tasks.iter().filter(|task| is_live(task)).collect();
        if live.len() < 2 || !scope.fork.has_room() {
            continue;
        }
        let runs = |task: &&&Arc<Task>| {
            let is_up = task.status.state == TaskState::Running && !task.status.unhealthy;
            is_up && is_clean(scope.fork.state(), service, task)
        };
        let Some(kept) = live.iter().filter(runs).max_by_key(|task| (task.spec_version, task.id))
        else {
            continue;
        };
        let kept = kept.id;
        for task in live.iter().filter(|task| task.id != kept) {
            scope.fork.desire(task.id, TaskState::Shutdown);
        }
    }
}

/// Whether a slot is to be replaced: all that is to be known where no update runs.
fn has_dirty(scope: &mut Scope<'_, '_>, service: &Service) -> bool {
    scope.slots(service.id).iter().any(|(slot, tasks)| {
        let is_touched = tasks.iter().any(|task| task.spec_version == service.spec_version);
        !is_touched
            && is_dirty(scope.fork.state(), service, tasks)
            && global::may_fill(scope, service, slot)
    })
}

fn survey(scope: &mut Scope<'_, '_>, service: &Service, config: &Config) -> Survey {
    let mut survey = Survey {
        dirty: Vec::new(),
        n_touched: 0,
        n_in_flight: 0,
        is_unsettled: false,
        settled_at: Timestamp::default(),
        failures: Vec::new(),
    };
    for (slot, tasks) in scope.slots(service.id).iter() {
        let is_new = |task: &&Arc<Task>| task.spec_version == service.spec_version;
        let touched: Vec<&Arc<Task>> = tasks.iter().filter(is_new).collect();
        if touched.is_empty() {
            let is_dirty = is_dirty(scope.fork.state(), service, tasks);
            if is_dirty && global::may_fill(scope, service, slot) {
                survey.dirty.push((slot, tasks.to_vec()));
            }
            continue;
        }
        survey.n_touched += 1;
        let settled_at = touched.iter().filter_map(|task| settled_at(scope, config, task)).min();
        match settled_at {
            Some(at) => {
                survey.settled_at = survey.settled_at.max(at);
                let free_at = at.after(config.delay);
                if free_at > scope.fork.now() {
                    survey.n_in_flight += 1;
                    scope.wake_at(free_at, "update delay");
                }
            }
            None => {
                survey.n_in_flight += 1;
                survey.is_unsettled = true;
            }
        }
        let failure = touched.iter().find_map(|task| failure(scope, config, task));
        survey.failures.extend(failure);
    }
    let runs =
        |tasks: &[Arc<Task>]| tasks.iter().any(|task| task.status.state == TaskState::Running);
    survey.dirty.sort_by_key(|(slot, tasks)| (runs(tasks), *slot));
    survey
}

fn is_dirty(state: &State, service: &Service, tasks: &[Arc<Task>]) -> bool {
    let mut live = tasks.iter().filter(|task| is_live(task)).peekable();
    if live.peek().is_some() {
        return !live.any(|task| is_clean(state, service, task));
    }
    newest(tasks).is_some_and(|task| !is_clean(state, service, task))
}

/// When a task was last waited for: it ran, ended, or took too long.
fn settled_at(scope: &mut Scope<'_, '_>, config: &Config, task: &Task) -> Option<Timestamp> {
    if task.status.state >= TaskState::Running {
        return Some(task.status.applied_at.unwrap_or(task.status.timestamp));
    }
    let deadline = progress_deadline(config, task);
    if deadline <= scope.fork.now() || !is_live(task) {
        return Some(deadline.min(scope.fork.now()));
    }
    scope.wake_at(deadline, "progress deadline of an update");
    None
}

fn progress_deadline(config: &Config, task: &Task) -> Timestamp {
    let start = task.start_after.map_or(task.meta.created_at, |at| at.max(task.meta.created_at));
    start.max(config.started_at).after(config.progress_deadline)
}

/// Why a new task counts against the update, if it does.
fn failure(scope: &mut Scope<'_, '_>, config: &Config, task: &Task) -> Option<String> {
    let now = scope.fork.now();
    let watched = scope.updates.services.entry(task.service_id).or_default();
    let written_at = task.status.applied_at.unwrap_or(task.status.timestamp);
    if written_at < config.started_at && task.status.state.is_terminal() {
        return None; // It was an earlier update's, which was paused for it.
    }
    if task.status.state == TaskState::Running {
        let since = *watched.running_since.entry(task.id).or_insert(written_at);
        if task.status.unhealthy && now.since(since) <= config.monitor {
            watched.unhealthy.insert(task.id);
        }
    }
    let has_ended =
        matches!(task.status.state, TaskState::Complete | TaskState::Failed | TaskState::Rejected);
    let is_early = match watched.running_since.get(&task.id) {
        Some(since) => written_at.since(*since) <= config.monitor,
        None if written_at >= scope.updates.since => true, // It never ran.
        // It may have run before this leader watched: then its making is the best guess.
        None => {
            let is_young = written_at.since(task.meta.created_at) <= config.monitor;
            task.status.state == TaskState::Rejected || is_young
        }
    };
    if watched.unhealthy.contains(&task.id) || (has_ended && is_early) {
        return Some(format!("failure or early termination of task {}", task.id));
    }
    let is_late = is_live(task)
        && task.status.state < TaskState::Running
        && progress_deadline(config, task) <= now;
    is_late.then(|| late(config, task))
}

fn late(config: &Config, task: &Task) -> String {
    let within = config.progress_deadline.as_secs();
    let reason = Some(task.status.err.as_str()).filter(|err| !err.is_empty());
    let reason = reason.map_or_else(|| task.status.state.to_string(), str::to_owned);
    format!("task {} not running within {within} s: {reason}", task.id)
}

/// Whether a task needs no replacement to be what the service's spec says.
///
/// Ports of the routing mesh are not part of it, as long as the task has an uplink: they are balanced
/// outside of the container. Those in host mode are: the scheduler chose the node by them. Differs from
/// SwarmKit, which replaces all tasks for a port (moby#41364).
pub(super) fn is_clean(state: &State, service: &Service, task: &Task) -> bool {
    if task.spec_version == service.spec_version {
        return true;
    }
    let (wanted, made) = (&service.spec.task_template, &task.spec);
    let has_its_ports = task.host_ports == ports::host_mode(&service.endpoint.ports);
    if !is_same_but_placement(wanted, made) || !has_its_ports || lacks_uplink(state, service, task)
    {
        return false;
    }
    if wanted.placement == made.placement {
        return true;
    }
    let is_met = |node: &Arc<skep_common::Node>| enforcer::is_met(wanted, node);
    let node = task.node_id.and_then(|node_id| state.node(node_id));
    is_same_but_choice(wanted, made) && node.is_some_and(is_met)
}

/// Whether a task on internal networks only is to be reached from outside all the same.
fn lacks_uplink(state: &State, service: &Service, task: &Task) -> bool {
    let is_attached = !task.networks_attachments.is_empty();
    let networks = network::targets(&service.spec).filter_map(|id| state.network(id));
    is_attached
        && task.ingress_address().is_none()
        && network::needs_uplink(
            Some(service),
            service.spec.networks(),
            networks.map(|network| &**network),
        )
}

fn networks_of(spec: &TaskSpec) -> &[NetworkAttachmentConfig] {
    spec.networks.as_deref().unwrap_or_default()
}

fn is_same_but_placement(wanted: &TaskSpec, made: &TaskSpec) -> bool {
    wanted.resources == made.resources
        && wanted.restart_policy == made.restart_policy
        && wanted.force_update.unwrap_or(0) == made.force_update.unwrap_or(0)
        && wanted.log_driver == made.log_driver
        && networks_of(wanted) == networks_of(made)
        && wanted.extra == made.extra
        && image::is_same_container(wanted.container_spec.as_ref(), made.container_spec.as_ref())
}

/// Whether two templates differ at most in which of the nodes that fit is chosen: preferences and the strategy
/// are for tasks to come, and constraints are checked on the task's own node.
fn is_same_but_choice(wanted: &TaskSpec, made: &TaskSpec) -> bool {
    let rest = |spec: &TaskSpec| {
        let placement = spec.placement.clone().unwrap_or_default();
        Placement { constraints: None, preferences: None, strategy: None, ..placement }
    };
    rest(wanted) == rest(made)
}
