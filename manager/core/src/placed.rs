//! Where a pass puts tasks.
//!
//! These decisions are kept beside the tables of the [fork](crate::fork): nothing else of the pass asks where
//! a task is, and to write it there copies a part of each table for every task.

use std::sync::Arc;

use skep_common::object::{NetworkAttachment, TaskStatus};
use skep_common::spec::{GenericResource, TaskSpec};
use skep_common::{NodeId, Object, Task, TaskId, TaskState, Timestamp};

use crate::command::{Action, Expect, TaskPatch};
use crate::store::{Place, State};

/// A decision to give a task a node.
pub(crate) struct Placed {
    pub(crate) place: Place,
    pub(crate) node_id: NodeId,
    /// What the task's spec becomes.
    pub(crate) pinned: Option<Arc<TaskSpec>>,
    pub(crate) attachments: Vec<NetworkAttachment>,
    pub(crate) generic: Vec<GenericResource>,
}

impl Placed {
    pub(crate) fn task_id(&self) -> TaskId {
        self.place.2
    }

    /// What a task that is not changed otherwise becomes by this.
    pub(crate) fn action(self, view: &State, now: Timestamp) -> Option<Action> {
        if self.pinned.is_some() {
            let old = view.task(self.task_id())?;
            let mut task = (**old).clone();
            self.write(&mut task, now);
            let expect = Expect::Version(old.meta.version);
            return Some(Action::Put { object: Object::Task(Box::new(task)), expect });
        }
        let task_id = self.task_id();
        Some(Action::PatchTask(TaskPatch {
            node_id: Some(self.node_id),
            networks_attachments: Some(self.attachments).filter(|list| !list.is_empty()),
            generic_resources: Some(self.generic).filter(|list| !list.is_empty()),
            status: Some(assigned(now)),
            ..TaskPatch::of(task_id)
        }))
    }

    /// Writes it into a task that is changed otherwise, too.
    pub(crate) fn write(self, task: &mut Task, now: Timestamp) {
        task.node_id = Some(self.node_id);
        task.networks_attachments = self.attachments;
        task.assigned_generic_resources = self.generic;
        if let Some(pinned) = self.pinned {
            task.spec = pinned;
        }
        task.status = assigned(now);
    }
}

fn assigned(now: Timestamp) -> TaskStatus {
    TaskStatus {
        timestamp: now,
        applied_at: Some(now),
        state: TaskState::Assigned,
        message: "scheduler assigned task to node".to_owned(),
        ..TaskStatus::default()
    }
}

/// The spec that tasks are placed with where the service's does not say which image that is.
#[derive(Debug)]
pub(crate) struct Pinned {
    pub(crate) spec: Arc<TaskSpec>,
    /// Its length as JSON.
    pub(crate) bytes: usize,
}

impl Pinned {
    /// `spec` with this image.
    pub(crate) fn of(spec: &TaskSpec, image: String) -> Self {
        let mut spec = spec.clone();
        if let Some(container) = &mut spec.container_spec {
            container.image = image;
        }
        let bytes = json_bytes(&spec);
        Self { spec: Arc::new(spec), bytes }
    }
}

/// What a value takes in the log.
pub(crate) fn json_bytes(value: &impl serde::Serialize) -> usize {
    serde_json::to_vec(value).map_or(0, |bytes| bytes.len())
}
