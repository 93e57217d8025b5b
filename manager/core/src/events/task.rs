//! The steps of a task's life.

use skep_common::object::TaskStatus;
use skep_common::{Task, TaskState};

use super::{Attributes, Steps, stack_of};
use crate::scheduler::node_name;
use crate::store::State;

/// What became of a task. A report may tell several steps at once.
pub(super) fn steps(old: Option<&Task>, new: Option<&Task>, states: (&State, &State)) -> Steps {
    let Some(new) = new else {
        return old.map(|old| ("remove", attributes(old, states))).into_iter().collect();
    };
    let mut actions = Vec::new();
    if old.is_none() {
        actions.push("create");
    }
    if new.node_id.is_some() && old.is_none_or(|old| old.node_id.is_none()) {
        actions.push("assign");
    }
    let nothing = TaskStatus::default();
    let (before, after) = (old.map_or(&nothing, |old| &old.status), &new.status);
    let reaches = |state: TaskState| before.state < state && after.state >= state;
    let has_ended = after.state > TaskState::Running;
    if reaches(TaskState::Starting) && (!has_ended || has_run(after)) {
        actions.push("start");
    }
    actions.extend(health(new, before, after));
    let is_killed = |status: &TaskStatus| {
        status.container_status.as_ref().is_some_and(|container| container.oom_killed)
    };
    if is_killed(after) && !is_killed(before) {
        actions.push("oom");
    }
    if reaches(TaskState::Complete) {
        actions.push(match after.state {
            TaskState::Rejected => "reject",
            TaskState::Orphaned => "orphan",
            _ => "die",
        });
    }
    actions.into_iter().map(|action| (action, said(new, action, states))).collect()
}

/// Whether its container was started, of one that has ended.
fn has_run(status: &TaskStatus) -> bool {
    let is_own =
        matches!(status.state, TaskState::Complete | TaskState::Failed | TaskState::Shutdown);
    is_own && status.container_status.is_some()
}

fn health(task: &Task, before: &TaskStatus, after: &TaskStatus) -> Option<&'static str> {
    if after.state != TaskState::Running {
        return None;
    }
    let container = task.spec.container_spec.as_ref();
    let is_checked = container.is_some_and(|container| container.healthcheck.is_some());
    match (before.unhealthy, after.unhealthy) {
        (false, true) => Some("health_status: unhealthy"),
        (true, false) => Some("health_status: healthy"),
        (false, false) if is_checked && before.state < TaskState::Running => {
            Some("health_status: healthy")
        }
        _ => None,
    }
}

fn said(task: &Task, action: &str, states: (&State, &State)) -> Attributes {
    let mut said = attributes(task, states);
    if matches!(action, "die" | "reject" | "orphan") {
        said.push(("state", task.status.state.name().to_owned()));
        if let Some(container) = &task.status.container_status {
            said.push(("exitCode", container.exit_code.to_string()));
        }
        if !task.status.err.is_empty() {
            said.push(("error", task.status.err.clone()));
        }
    }
    said
}

fn attributes(task: &Task, (old, new): (&State, &State)) -> Attributes {
    let mut said = vec![("name", task.name())];
    if task.standalone.is_none() {
        said.push(("service", task.service_name.clone()));
        said.push(("service.id", task.service_id.to_string()));
        let service = new.service(task.service_id).or_else(|| old.service(task.service_id));
        said.extend(service.and_then(|service| stack_of(service.spec.labels.as_ref())));
    }
    let container = task.spec.container_spec.as_ref();
    said.extend(container.map(|container| ("image", container.image.clone())));
    if let Some(node_id) = task.node_id {
        said.push(("node.id", node_id.to_string()));
        let node = new.node(node_id).or_else(|| old.node(node_id));
        said.extend(node.map(|node| ("node", node_name(node))));
    }
    said
}
