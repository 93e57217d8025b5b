//! How services get to what was asked, and what would be gone: for people.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use skep_common::limits::defaults;
use skep_common::object::NodeState;
use skep_common::spec::{ModeKind, UpdateConfig};
use skep_common::{NodeId, Object, Service, ServiceId};

use super::{Managers, PlannedTask, WhatIf};
use crate::command::Action;
use crate::orchestrator::{is_live, is_outdated};
use crate::plan::Options;
use crate::store::State;
use crate::{image, node_name};

/// Services that are named as users of an image.
const USERS_NAMED_MAX: usize = 3;

/// The services that a transaction gives another spec, and the jobs that it makes.
pub(super) struct Updated(Vec<ServiceId>);

impl Updated {
    pub(super) fn of(state: &State, actions: &[Action]) -> Self {
        let updated = actions.iter().filter_map(|action| match action {
            Action::Put { object: Object::Service(service), .. } => {
                let is_of_interest = match state.service(service.id) {
                    Some(old) => !old.pending_delete && !service.pending_delete,
                    None => service.spec.mode_kind().is_some_and(ModeKind::is_job),
                };
                is_of_interest.then_some(service.id)
            }
            _ => None,
        });
        Self(updated.collect())
    }

    /// What the update or the run of each does, in the order of the transaction.
    pub(super) fn steps(&self, answer: &WhatIf, after: &State) -> Vec<String> {
        let services = self.0.iter().filter_map(|id| after.service(*id));
        services.flat_map(|service| steps(service, answer, after)).collect()
    }
}

fn steps(service: &Service, answer: &WhatIf, after: &State) -> Vec<String> {
    let name = &service.spec.name;
    match service.spec.mode_kind() {
        Some(ModeKind::ReplicatedJob { total, concurrent }) => {
            return vec![format!("{name}: {}", course_of_job(total, concurrent))];
        }
        Some(ModeKind::GlobalJob) => return Vec::new(), // One on each node, all at once.
        _ => {}
    }
    let replaces = |task: &&PlannedTask| {
        task.service_id == service.id && (task.task_id.is_some() || task.from.is_some())
    };
    let n_done = answer.moved.iter().filter(replaces).count();
    let n_stopped_for = answer.unplaced.iter().filter(replaces).count();
    let tasks = after.tasks_of_service(service.id);
    let left = tasks.filter(|task| is_live(task) && is_outdated(after, service, task));
    let n_all = n_done + n_stopped_for + left.count();
    let n_waiting = answer.unplaced.iter().filter(|task| task.service_id == service.id).count();
    if n_all == 0 {
        return vec![format!("{name}: no task is replaced")];
    }
    let config = service.spec.update_config.clone().unwrap_or_default();
    let mut lines = vec![format!("{name}: {} replaced, {}", tasks_are(n_all), manner(&config))];
    if n_waiting > 0 {
        let action = deadline(&config, n_waiting as f64 / n_all as f64);
        lines.push(format!(
            "{name}: {} replaced, then {n_waiting} would wait for a node; {action}",
            tasks_are(n_done)
        ));
    }
    lines
}

fn tasks_are(n_tasks: usize) -> String {
    if n_tasks == 1 { "1 task is".to_owned() } else { format!("{n_tasks} tasks are") }
}

/// How many slots at a time, in which order, with which pause.
fn manner(config: &UpdateConfig) -> String {
    let at_a_time = match config.parallelism.unwrap_or(defaults::UPDATE_PARALLELISM) {
        0 => "all at once".to_owned(),
        parallelism => format!("{parallelism} at a time"),
    };
    let order = match config.order.as_deref() {
        Some("start-first") => "each started before the old one is stopped (start-first)",
        _ => "each started after the old one has stopped (stop-first)",
    };
    let delay = config.delay.map(|delay| delay.duration()).filter(|delay| !delay.is_zero());
    let delay = delay.map(|delay| format!(", {} apart", span(delay))).unwrap_or_default();
    format!("{at_a_time}, {order}{delay}")
}

/// How many tasks of a job are to be done, and how many of them run at a time: tables show only the first.
fn course_of_job(total: u64, concurrent: u64) -> String {
    let tasks = if total == 1 { "task" } else { "tasks" };
    match concurrent {
        _ if concurrent >= total => format!("{total} {tasks} in all, all at once"),
        _ => format!("{total} {tasks} in all, {concurrent} at a time"),
    }
}

/// What becomes of an update where this part of its tasks goes no further.
fn deadline(config: &UpdateConfig, ratio: f64) -> String {
    let is_allowed = ratio <= config.max_failure_ratio.unwrap_or(0.0);
    let within = config.progress_deadline.map(|deadline| deadline.duration());
    let within = span(within.unwrap_or(Options::default().progress_deadline));
    match config.failure_action.as_deref() {
        _ if is_allowed => format!("the update goes on with the others after {within}"),
        Some("rollback") => format!("the update is rolled back when that takes {within}"),
        Some("continue") => format!("the update goes on with the others after {within}"),
        _ => format!("the update is paused when that takes {within}"),
    }
}

fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 60, seconds % 60) {
        (0, 0) => format!("{} ms", duration.as_millis()),
        (0, seconds) => format!("{seconds} s"),
        (minutes, 0) => format!("{minutes} min"),
        (minutes, seconds) => format!("{minutes} min {seconds} s"),
    }
}

pub(super) fn name_of(state: &State, node_id: NodeId) -> String {
    state.node(node_id).map_or_else(|| node_id.short(), |node| node_name(node))
}

/// What would be gone with these nodes until they come back.
pub(super) fn losses(state: &State, down: &BTreeSet<NodeId>, managers: &Managers) -> Vec<String> {
    let mut losses: Vec<String> = quorum(state, down, managers).into_iter().collect();
    losses.extend(images(state, down));
    let alone = down.iter().flat_map(|node_id| state.tasks_of_node(*node_id));
    let alone = alone.filter(|task| task.standalone.is_some() && is_live(task));
    let alone = alone.filter(|task| !task.status.state.is_terminal());
    losses.extend(alone.map(|task| {
        let node = task.node_id.map(|node_id| name_of(state, node_id)).unwrap_or_default();
        format!(
            "container {} of {node}: no service made it, so that nothing replaces it",
            task.name()
        )
    }));
    losses
}

/// Slots of replicated services and jobs that would get no other task. Those of global ones come and go with nodes.
pub(super) fn lost_slots(stopped: &[PlannedTask], after: &State) -> Vec<String> {
    let mut by_service: BTreeMap<ServiceId, Vec<&PlannedTask>> = BTreeMap::new();
    for task in stopped {
        by_service.entry(task.service_id).or_default().push(task);
    }
    let has_slots = |service_id: &ServiceId| {
        let service = after.service(*service_id).filter(|service| !service.pending_delete);
        let mode = service.and_then(|service| service.spec.mode_kind());
        matches!(mode, Some(ModeKind::Replicated(_) | ModeKind::ReplicatedJob { .. }))
    };
    by_service.retain(|service_id, _| has_slots(service_id));
    for (service_id, stopped) in &mut by_service {
        let live = after.tasks_of_service(*service_id);
        let live = live.filter(|task| is_live(task) && !task.status.state.is_terminal());
        let live: BTreeSet<String> = live.map(|task| task.name()).collect();
        stopped.retain(|task| !live.contains(&task.name));
    }
    let line = |task: &PlannedTask| {
        let node = task.from.map(|node_id| format!(" of {}", name_of(after, node_id)));
        let node = node.unwrap_or_default();
        format!("{}{node}: its restart policy makes no other task", task.name)
    };
    by_service.into_values().flatten().map(line).collect()
}

fn is_up(state: &State, node_id: NodeId) -> bool {
    state.node(node_id).is_some_and(|node| node.status.state != NodeState::Down)
}

/// The majority of managers, without which nothing changes.
fn quorum(state: &State, down: &BTreeSet<NodeId>, managers: &Managers) -> Option<String> {
    let n_voters = managers.voters.len() + managers.n_unnamed;
    let n_needed = n_voters / 2 + 1;
    let is_left = |voter: &&NodeId| !down.contains(voter) && is_up(state, **voter);
    let n_left = managers.voters.iter().filter(is_left).count();
    let is_touched = managers.voters.iter().any(|voter| down.contains(voter));
    let unnamed = match managers.n_unnamed {
        0 => String::new(),
        n_unnamed => format!(" (without {n_unnamed} whose node is not known)"),
    };
    (is_touched && n_left < n_needed).then(|| {
        format!(
            "the majority of managers: {n_left} of {n_voters} would be left{unnamed}, and {n_needed} are needed: what \
             runs goes on, but nothing is replaced or changed until one is back"
        )
    })
}

/// Images that nobody else has.
fn images(state: &State, down: &BTreeSet<NodeId>) -> Vec<String> {
    let mut by_digest: BTreeMap<&str, (BTreeSet<NodeId>, Vec<&str>)> = BTreeMap::new();
    for image in state.images().values() {
        let (holders, names) = by_digest.entry(&image.digest).or_default();
        holders.extend(image.holders.iter().filter(|holder| is_up(state, **holder)));
        names.push(&image.name);
    }
    let is_lost = |holders: &BTreeSet<NodeId>| !holders.is_empty() && holders.is_subset(down);
    let lost = by_digest.into_iter().filter(|(_, (holders, _))| is_lost(holders));
    let mut lines: Vec<String> = lost
        .map(|(digest, (_, mut names))| {
            names.sort_unstable();
            let users = users(state, digest);
            format!("image {}: it would have no living holder{users}", names.join(", "))
        })
        .collect();
    lines.sort();
    lines
}

fn users(state: &State, digest: &str) -> String {
    let uses = |service: &&std::sync::Arc<Service>| {
        let name = &service.spec.container().image;
        let pinned = image::pin(state, name);
        pinned.is_some_and(|pinned| image::split_digest(&pinned).1 == Some(digest))
    };
    let mut names: Vec<&str> =
        state.services().values().filter(uses).map(|service| service.spec.name.as_str()).collect();
    names.sort_unstable();
    match names.len() {
        0 => String::new(),
        1..=USERS_NAMED_MAX => format!(" (services that use it: {})", names.join(", ")),
        n_names => format!(
            " (services that use it: {} and {} more)",
            names[..USERS_NAMED_MAX].join(", "),
            n_names - USERS_NAMED_MAX
        ),
    }
}
