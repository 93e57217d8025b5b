//! What becomes of a single container that a node's user asks for: a task that no service made.
//!
//! It is bound to its node from the start, and nobody replaces, moves or restarts it. Stopped, it stays until it is
//! removed, so that its exit code and its output can be read. On its networks it is named by its
//! own name. Asking is for the node that it runs on: [`find`] knows no others.
//!
//! Source: moby `daemon/cluster/networks.go` (attachment tasks), `daemon/{create,delete,stop}.go` for words.
//! Differs from moby: the container is the task; managers know all of it, so that a node that goes takes it
//! along, and what is written of it is one record.

use std::sync::Arc;

use skep_common::limits::CONTAINERS_PER_NODE_MAX;
use skep_common::object::{Standalone, TaskStatus};
use skep_common::spec::{ServiceSpec, TaskSpec};
use skep_common::{Meta, NodeId, Object, ServiceId, Task, TaskId, TaskState, Timestamp, Version};

use crate::command::{Action, Expect, TaskPatch};
use crate::store::State;
use crate::{allocator, image, network, validate};

/// Why a request about a container is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It cannot be run as asked.
    #[error("{0}")]
    Invalid(String),
    /// It cannot be on its networks.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// Make the network with `--attachable`, or use a service.
    #[error("network {name} is not manually attachable")]
    NotAttachable {
        /// The network.
        name: String,
    },
    /// Remove that container, or choose another name.
    #[error(
        "Conflict. The container name {name:?} is already in use by container {holder:?}. You have to remove (or rename) that container to be able to reuse that name."
    )]
    NameTaken {
        /// The name.
        name: String,
        /// Who has it.
        holder: String,
    },
    /// The node has no container of this name or id.
    #[error("No such container: {reference}")]
    NotFound {
        /// What was asked for.
        reference: String,
    },
    /// Write more of the id.
    #[error("container {reference} is ambiguous ({matches} matches found)")]
    Ambiguous {
        /// What was asked for.
        reference: String,
        /// How many there are.
        matches: usize,
    },
    /// Stop it first, or force its removal.
    #[error(
        "cannot remove container {name:?}: container is running: stop the container before removing or force remove"
    )]
    Running {
        /// Its name.
        name: String,
    },
    /// The node or a network has no room for it now.
    #[error("{0}")]
    Exhausted(String),
}

/// What is to run.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Its name; empty is its short id.
    pub name: String,
    /// The container and its networks.
    pub spec: TaskSpec,
    /// Whether it is removed once it has ended.
    pub auto_remove: bool,
}

/// A new container of a node, with its addresses.
pub fn run(
    state: &State,
    id: TaskId,
    node_id: NodeId,
    request: Request,
    now: Timestamp,
) -> Result<Action, Error> {
    let node = state.node(node_id);
    let node = node.ok_or_else(|| Error::Invalid(format!("node {node_id} is no member")))?;
    // It is the task's service as well: with that of another one the container would be among its tasks.
    if state.task(id).is_some() || state.service(ServiceId(id.0)).is_some() {
        return Err(Error::Invalid(format!("id {id} is taken: run the container with a new one")));
    }
    if of_node(state, node_id).count() >= CONTAINERS_PER_NODE_MAX {
        return Err(Error::Exhausted(format!(
            "this node has {CONTAINERS_PER_NODE_MAX} containers that no service made: remove some with `skep rm`"
        )));
    }
    let name = if request.name.is_empty() { id.short() } else { request.name };
    check_name(&name)?;
    if let Some(other) = of_node(state, node_id).find(|task| task.name() == name) {
        return Err(Error::NameTaken { name, holder: other.id.to_string() });
    }
    let spec = resolved(state, request.spec)?;
    let wanted = network::wanted_by(state, &spec).map_err(Error::Exhausted)?;
    let mut cursors = allocator::Cursors::default();
    let mut networks_attachments =
        network::attach(state, &mut cursors.networks, &wanted).map_err(Error::Exhausted)?;
    if network::wants_uplink(None, &spec, &wanted) {
        let is_free = |address| state.address_owner(address).is_none();
        let uplink = allocator::grant(state, &mut cursors, node, is_free);
        networks_attachments.push(uplink.ok_or_else(|| {
            Error::Exhausted("this node has no free address for another container".to_owned())
        })?);
    }
    let status = TaskStatus {
        timestamp: now,
        applied_at: Some(now),
        state: TaskState::Assigned,
        message: "container created".to_owned(),
        ..TaskStatus::default()
    };
    let task = Task {
        id,
        meta: Meta::default(),
        spec: spec.into(),
        spec_version: Version::default(),
        service_id: ServiceId(id.0),
        slot: 0,
        node_id: Some(node_id),
        status,
        desired_state: TaskState::Running,
        networks_attachments,
        service_name: name,
        start_after: None,
        host_ports: Vec::new(),
        standalone: Some(Standalone { auto_remove: request.auto_remove }),
        job_iteration: None,
        preset_node: None,
        assigned_generic_resources: Vec::new(),
        service_labels: None,
    };
    Ok(Action::Put { object: Object::Task(Box::new(task)), expect: Expect::Absent })
}

/// The spec as it is stored: with its image pinned, and ids of networks that single containers may join.
fn resolved(state: &State, task_template: TaskSpec) -> Result<TaskSpec, Error> {
    let mut whole = ServiceSpec { task_template, ..ServiceSpec::default() };
    validate::task_spec(&whole.task_template).map_err(|error| Error::Invalid(error.0))?;
    // Its node would be given what only managers may hand out.
    let container = whole.task_template.container_spec.as_ref();
    let has_payloads = container.is_some_and(|container| {
        container.secrets.iter().flatten().next().is_some()
            || container.configs.iter().flatten().next().is_some()
    });
    if has_payloads {
        return Err(Error::Invalid(
            "a single container has no secrets and configs: use a service".to_owned(),
        ));
    }
    network::resolve(state, &mut whole)?;
    let targets = network::targets(&whole).filter_map(|id| state.network(id));
    if let Some(closed) =
        targets.into_iter().find(|network| !network.spec.attachable.unwrap_or_default())
    {
        return Err(Error::NotAttachable { name: closed.spec.name.clone() });
    }
    let mut spec = whole.task_template;
    if let Some(container) = &mut spec.container_spec {
        let pinned = image::pin(state, &container.image);
        container.image = pinned.ok_or_else(|| {
            let name = &container.image;
            Error::Invalid(format!(
                "no image named {name:?} in this swarm: load it with `skep image load` or `skep image import`"
            ))
        })?;
    }
    Ok(spec)
}

/// Docker's rule; it is a DNS name on the container's networks as well.
fn check_name(name: &str) -> Result<(), Error> {
    let is_inner = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    let is_name = name.len() <= 63
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(is_inner);
    match is_name {
        true => Ok(()),
        false => Err(Error::Invalid(format!(
            "Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed, and 63 characters"
        ))),
    }
}

/// The containers of a node, those of services too, without those that are being removed.
pub fn all_of_node(state: &State, node_id: NodeId) -> impl Iterator<Item = &Arc<Task>> {
    state.tasks_of_node(node_id).filter(|task| task.desired_state < TaskState::Remove)
}

/// The containers of a node that no service made.
pub fn of_node(state: &State, node_id: NodeId) -> impl Iterator<Item = &Arc<Task>> {
    all_of_node(state, node_id).filter(|task| task.standalone.is_some())
}

/// A container of a node, by its id, its name or the start of its id.
pub fn find<'a>(
    state: &'a State,
    node_id: NodeId,
    reference: &str,
) -> Result<&'a Arc<Task>, Error> {
    let not_found = || Error::NotFound { reference: reference.to_owned() };
    if reference.is_empty() {
        return Err(not_found());
    }
    let is_meant = |task: &&Arc<Task>| task.id.to_string() == reference || task.name() == reference;
    if let Some(task) = of_node(state, node_id).find(is_meant) {
        return Ok(task);
    }
    let starts = |task: &&Arc<Task>| task.id.to_string().starts_with(reference);
    let found: Vec<&Arc<Task>> = of_node(state, node_id).filter(starts).collect();
    match found.as_slice() {
        [] => Err(not_found()),
        [task] => Ok(task),
        several => {
            let matches = several.len();
            Err(Error::Ambiguous { reference: reference.to_owned(), matches })
        }
    }
}

/// Stops a container; one that has ended stays as it is.
pub fn stop(task: &Task) -> Action {
    desire(task, TaskState::Shutdown)
}

/// Removes a container; one that runs only where that is forced.
pub fn remove(task: &Task, is_forced: bool) -> Result<Action, Error> {
    if !is_forced && !task.status.state.is_terminal() {
        return Err(Error::Running { name: task.name() });
    }
    Ok(desire(task, TaskState::Remove))
}

fn desire(task: &Task, desired_state: TaskState) -> Action {
    let patch = TaskPatch { desired_state: Some(desired_state), ..TaskPatch::of(task.id) };
    Action::PatchTask(patch)
}

/// What a pass wants of a container: whether it is to be removed.
pub(crate) fn is_over(task: &Task, standalone: &Standalone) -> bool {
    let has_ended = standalone.auto_remove && task.status.state.is_terminal();
    // Nobody is left to ask for its removal.
    has_ended || task.status.state == TaskState::Orphaned
}

#[cfg(test)]
#[path = "container_tests.rs"]
mod tests;
