//! Finds tasks whose node no longer meets what they need.
//!
//! A node's labels, role, resources or kernel may change under its tasks. Only nodes with availability
//! `active` are enforced: a drained one loses all its tasks anyway, a paused one keeps them. Tasks on overlay networks
//! leave a paused one, too, that does not carry these any more: it cannot run them.
//! Source: SwarmKit `manager/orchestrator/constraintenforcer`. Differs: where a node has become too
//! small for the reservations of its tasks, or has lost
//! generic resources that they hold, the newest ones leave, where SwarmKit's choice is random.

use std::cmp::Reverse;
use std::sync::Arc;

use skep_common::object::Node;
use skep_common::spec::{Availability, TaskSpec};
use skep_common::{NodeId, Service, Task, TaskId, TaskState, Version};

use super::is_live;
use crate::constraint::{self, Constraint};
use crate::scheduler::{Amounts, Stock, carries_overlays};
use crate::store::State;

/// The constraints of one service, for its tasks of every spec version.
pub(super) struct Constraints {
    current: Vec<Constraint>,
    version: Version,
    /// Tasks of an older spec are moved by the update until that is over.
    is_update_over: bool,
}

impl Constraints {
    pub(super) fn of(service: &Service) -> Self {
        let status = service.update_status.as_ref().map(|status| status.state.as_str());
        Self {
            current: parsed(&service.spec.task_template),
            version: service.spec_version,
            is_update_over: matches!(status, Some("completed" | "rollback_completed")),
        }
    }

    /// Whether a task may stay on whichever node it is, as far as [`allow`](Self::allow) decides.
    pub(super) fn allow_any_node(&self, task: &Task) -> bool {
        let has_no_constraints = || match task.spec_version == self.version || self.is_update_over {
            true => self.current.is_empty(),
            false => task.spec.placement.as_ref().is_none_or(|placement| {
                placement.constraints.as_ref().is_none_or(|constraints| constraints.is_empty())
            }),
        };
        !is_on_overlays(task) && has_no_constraints()
    }

    /// Whether a task may stay on its node.
    pub(super) fn allow(&self, task: &Task, node: &Node) -> bool {
        // Not a matter of what its operator wants: the node has cut it off, and cannot run it.
        if is_on_overlays(task) && !carries_overlays(node) {
            return false;
        }
        if node.spec.availability != Availability::Active {
            return true;
        }
        if task.spec_version == self.version || self.is_update_over {
            return constraint::matches_all(&self.current, node);
        }
        constraint::matches_all(&parsed(&task.spec), node)
    }
}

fn is_on_overlays(task: &Task) -> bool {
    task.networks_attachments.iter().any(|one| one.network_id.is_some())
}

/// Whether a node meets the constraints of a task template.
pub(super) fn is_met(spec: &TaskSpec, node: &Node) -> bool {
    constraint::matches_all(&parsed(spec), node)
}

/// Validation refuses what cannot be read; what is stored nevertheless excludes no node here, for a
/// running task is not to be killed over its text. The scheduler places no new task by it.
fn parsed(spec: &TaskSpec) -> Vec<Constraint> {
    let expressions =
        spec.placement.as_ref().and_then(|placement| placement.constraints.as_deref());
    constraint::parse_all(expressions.unwrap_or_default()).unwrap_or_default()
}

/// The tasks that must leave a node because all of them together reserve more than it has.
pub(crate) fn overcommitted(state: &State, node_id: NodeId) -> Vec<TaskId> {
    let Some(node) = state.node(node_id) else { return Vec::new() };
    let Some(description) = &node.description else { return Vec::new() };
    if node.spec.availability != Availability::Active {
        return Vec::new();
    }
    let mut free = Amounts::of(Some(&description.resources));
    let mut stock = Stock::default();
    stock.set_node(Some(node));
    // Those that are stopping are on their way out already.
    let is_present = |task: &&Arc<Task>| is_live(task) && task.status.state <= TaskState::Running;
    let mut tasks: Vec<&Arc<Task>> = state.tasks_of_node(node_id).filter(is_present).collect();
    for task in &tasks {
        free.take(&Amounts::reserved_by(&task.spec));
        stock.take(&task.assigned_generic_resources);
    }
    tasks.sort_by_key(|task| Reverse((task.meta.created_at, task.id)));
    let mut leaving = Vec::new();
    for task in tasks {
        let amounts = Amounts::reserved_by(&task.spec);
        let helps = (free.nano_cpus < 0 && amounts.nano_cpus > 0)
            || (free.memory_bytes < 0 && amounts.memory_bytes > 0)
            || stock.is_overdrawn_by(&task.assigned_generic_resources);
        if helps {
            free.give_back(&amounts);
            stock.give_back(&task.assigned_generic_resources);
            leaving.push(task.id);
        }
    }
    leaving
}
