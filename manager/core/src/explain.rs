//! Why tasks do not run, and why there are none: for people who ask.
//!
//! Of a task that waits for a node this is what the scheduler would write now, found anew; of others, what
//! they wait for since they have one.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use skep_common::object::NodeState;
use skep_common::spec::ModeKind;
use skep_common::{NodeId, Service, ServiceId, Task, TaskState, Version};

use crate::orchestrator::{self, is_live};
use crate::scheduler::{self, Index, RuledOut, node_name};
use crate::service;
use crate::store::State;

/// Slots that are named of those that have ended for good.
const ENDED_NAMED_MAX: usize = 5;

/// What a task waits for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reason {
    /// One sentence; empty where it waits for nothing.
    pub text: String,
    /// Of a task without a node: what each filter ruled out.
    pub filters: Vec<RuledOut>,
}

impl From<String> for Reason {
    fn from(text: String) -> Self {
        Self { text, filters: Vec::new() }
    }
}

/// Answers questions about one state.
#[derive(Debug)]
pub struct Explainer<'s> {
    state: &'s State,
    index: Index,
    /// What was found of tasks without a node. The scheduler, too, looks for a node once for all tasks that
    /// have these in common.
    found: RefCell<BTreeMap<Alike, Reason>>,
}

/// What tasks have in common that wait for the same: service, its spec's version, and the node they are bound to.
type Alike = (ServiceId, Version, Option<NodeId>);

impl<'s> Explainer<'s> {
    /// Looks at all nodes and tasks once.
    pub fn new(state: &'s State) -> Self {
        Self { state, index: Index::rebuild(state), found: RefCell::default() }
    }

    /// What a task waits for.
    pub fn task(&self, task: &Task) -> Reason {
        if !is_live(task) || task.status.state.is_terminal() {
            return task.status.remark().into();
        }
        let node = task.node_id.map(|node_id| self.state.node(node_id));
        let Some(node) = node else {
            let group = (task.service_id, task.spec_version, task.preset_node);
            if task.standalone.is_some() {
                return self.without_node(task); // It has nothing in common with others.
            }
            let mut found = self.found.borrow_mut();
            return found.entry(group).or_insert_with(|| self.without_node(task)).clone();
        };
        if let Some(node) = node.filter(|node| node.status.state != NodeState::Ready) {
            let state = node.status.state.name();
            return format!("its node {} is {state}", node_name(node)).into();
        }
        if task.desired_state <= TaskState::Ready {
            return self.turn(task).into();
        }
        match task.status.unhealthy {
            true => "its health check fails".to_owned().into(),
            // That it was started again some day is nothing that it waits for.
            false => task.status.err.clone().into(),
        }
    }

    fn without_node(&self, task: &Task) -> Reason {
        match scheduler::explain(self.state, &self.index, task) {
            Some(explanation) => Reason { text: explanation.text, filters: explanation.filters },
            None => "a node is free for it: it is placed in a moment".to_owned().into(),
        }
    }

    /// What a task that has a node, and is not to start yet, waits for.
    fn turn(&self, task: &Task) -> String {
        let others = || {
            let tasks = self.state.tasks_of_slot(task.service_id, task.slot_key());
            tasks.filter(|other| other.id != task.id)
        };
        let mut stopping = others().filter(|other| orchestrator::is_stopping(self.state, other));
        if let Some(old) = stopping.next() {
            return format!("it starts once task {} has stopped", old.id);
        }
        let turn = match task.start_after {
            Some(at) => format!("it starts at {at}, when the delay of its restart is over"),
            None => "it starts in a moment".to_owned(),
        };
        let ended = others().filter(|other| other.status.state.is_terminal());
        let before = ended.max_by_key(|other| (other.meta.created_at, other.id));
        match before.map(|before| before.status.remark()).filter(|remark| !remark.is_empty()) {
            Some(remark) => format!("{turn}; the task before it ended: {remark}"),
            None => turn,
        }
    }

    /// What keeps a service from having the tasks that it is to have.
    pub fn service(&self, service: &Service) -> Vec<String> {
        let mut notes = Vec::new();
        if service.pending_delete {
            notes.push("it is being removed, and waits for its tasks to stop".to_owned());
            return notes;
        }
        if service::is_paused(service) {
            let message = service.update_status.as_ref().map(|status| status.message.clone());
            notes.extend(message);
        }
        let tasks: Vec<&Arc<Task>> = self.state.tasks_of_service(service.id).collect();
        let has_any = tasks.iter().any(|task| is_live(task));
        notes.extend(self.ended_slots(service));
        match service.spec.mode_kind() {
            Some(ModeKind::Replicated(0)) => notes.push("it is to have no tasks".to_owned()),
            Some(ModeKind::Global | ModeKind::GlobalJob) if !has_any => {
                notes.push("no node is active, up and meets its constraints".to_owned());
            }
            _ => {}
        }
        notes
    }

    /// Slots that have ended, and get no other task. Those of global services come and go with nodes.
    fn ended_slots(&self, service: &Service) -> Vec<String> {
        let mode = service.spec.mode_kind();
        if !matches!(mode, Some(ModeKind::Replicated(_) | ModeKind::ReplicatedJob { .. })) {
            return Vec::new();
        }
        let ended = orchestrator::ended_for_good(self.state, service);
        let mut notes: Vec<String> =
            ended.iter().take(ENDED_NAMED_MAX).map(|task| self.ended_note(task)).collect();
        if let n_more @ 1.. = ended.len().saturating_sub(ENDED_NAMED_MAX) {
            let slots = if n_more == 1 { "slot" } else { "slots" };
            notes.push(format!("so it is with {n_more} more {slots}"));
        }
        notes
    }

    fn ended_note(&self, task: &Task) -> String {
        let state = task.status.state;
        let how = match task.status.remark() {
            _ if !state.is_terminal() => {
                let node = task.node_id.and_then(|node_id| self.state.node(node_id));
                node.map_or_else(
                    || "its node is gone".to_owned(),
                    |node| format!("its node {} is {}", node_name(node), node.status.state.name()),
                )
            }
            remark if remark.is_empty() => state.name().to_owned(),
            remark => format!("{}: {remark}", state.name()),
        };
        format!("slot {} has ended ({how}): its restart policy makes no other task", task.slot)
    }
}
