//! The state as one planning pass wants it, and the actions that lead there.
//!
//! The steps of a pass change a [`Fork`]; each sees what the ones before it decided. The actions are
//! the difference between the fork and the view it started from, so a task that is made and placed
//! in one pass is one write, and one that is made and given up again is none.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::Ipv4Addr;
use std::sync::Arc;

use rand::Rng;
use skep_common::mistakes::{self, Mistake};
use skep_common::object::{NetworkAttachment, Slot, TaskStatus, UpdateStatus};
use skep_common::spec::{GenericResource, Labels, TaskSpec};
use skep_common::{
    Kind, NetworkId, Node, NodeId, Object, Service, ServiceId, Task, TaskId, TaskState, Timestamp,
};

use crate::allocator::{self, Cursors};
use crate::command::{Action, Command, Expect, TaskPatch};
use crate::placed::{Pinned, Placed, json_bytes};
use crate::store::{Place, State};
use crate::{level, ports, secrets};

/// A view and what a pass changed on it.
pub(crate) struct Fork<'a> {
    view: &'a State,
    state: State,
    now: Timestamp,
    rng: &'a mut dyn Rng,
    tasks: BTreeSet<TaskId>,
    /// Every change of a task, in its order.
    touches: Vec<TaskId>,
    placed: Vec<Placed>,
    /// The addresses of those.
    granted: HashSet<Ipv4Addr>,
    services: BTreeSet<ServiceId>,
    networks: BTreeSet<NetworkId>,
    /// Secrets and configs, each with the versions that it loses.
    payloads: BTreeMap<(Kind, u128), Vec<u64>>,
    room: Room,
    /// What the step may still decide.
    left: Room,
    n_changes: u64,
    /// That of the last task that was made, and its length as JSON.
    template: Option<(Arc<TaskSpec>, usize)>,
}

/// How much a step of a pass decides: its actions travel together, and a command that is too long for
/// the log would be too long whenever it is tried. What one decision needs may go beyond it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    /// Tasks and services that are changed.
    pub(crate) actions: usize,
    /// What they take as JSON, estimated.
    pub(crate) bytes: usize,
}

/// A patch of a task as JSON, with the longest texts that it has but for the reason of a task to wait.
const PATCH_BYTES: usize = 512;
/// A task as JSON, without its spec.
const TASK_BYTES: usize = 1024;
/// A place on a network as JSON, without its aliases.
const ATTACHMENT_BYTES: usize = 256;

impl<'a> Fork<'a> {
    /// Starts from `view`; each step has `room`.
    pub(crate) fn new(view: &'a State, now: Timestamp, rng: &'a mut dyn Rng, room: Room) -> Self {
        Self {
            view,
            state: view.clone(),
            now,
            rng,
            tasks: BTreeSet::new(),
            touches: Vec::new(),
            placed: Vec::new(),
            granted: HashSet::new(),
            services: BTreeSet::new(),
            networks: BTreeSet::new(),
            payloads: BTreeMap::new(),
            room,
            left: room,
            n_changes: 0,
            template: None,
        }
    }

    /// The state as decided so far.
    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    /// The pass's one reading of the clock.
    pub(crate) fn now(&self) -> Timestamp {
        self.now
    }

    /// The tasks that were changed, but for those that were [placed](Self::place).
    pub(crate) fn touched_tasks(&self) -> &BTreeSet<TaskId> {
        &self.tasks
    }

    /// The decisions to place tasks.
    pub(crate) fn placed(&self) -> &[Placed] {
        &self.placed
    }

    /// The same as [`touched_tasks`](Self::touched_tasks), one for each change, in their order.
    pub(crate) fn touches(&self) -> &[TaskId] {
        &self.touches
    }

    /// The services that were changed.
    pub(crate) fn touched_services(&self) -> &BTreeSet<ServiceId> {
        &self.services
    }

    /// Counts the changes: what was read at one count holds until the next.
    pub(crate) fn n_changes(&self) -> u64 {
        self.n_changes
    }

    fn touch(&mut self, task_id: TaskId) {
        self.n_changes += 1;
        self.touches.push(task_id);
        self.tasks.insert(task_id);
    }

    /// Whether the step can still decide something; the rest is for the next pass.
    pub(crate) fn has_room(&self) -> bool {
        self.left.actions > 0 && self.left.bytes > 0
    }

    /// Begins the next step of the pass, which has the whole room again: else steps that come late would
    /// never have their turn while there is much to do for the first.
    pub(crate) fn next_step(&mut self) {
        self.left = self.room;
    }

    fn spend(&mut self, bytes: usize) {
        self.left.actions = self.left.actions.saturating_sub(1);
        self.left.bytes = self.left.bytes.saturating_sub(bytes);
    }

    /// The service's template, shared with the task that was made of it last, and its length.
    fn template_of(&mut self, service: &Service) -> (Arc<TaskSpec>, usize) {
        let wanted = &service.spec.task_template;
        if let Some(template) = self.template.as_ref().filter(|(template, _)| **template == *wanted)
        {
            return template.clone();
        }
        let template = (Arc::new(wanted.clone()), json_bytes(wanted));
        self.template = Some(template.clone());
        template
    }

    /// Makes a task of the service's current spec; `false` where the pass has made enough.
    pub(crate) fn create_task(
        &mut self,
        service: &Service,
        slot: Slot,
        desired_state: TaskState,
        start_after: Option<Timestamp>,
    ) -> bool {
        if !self.has_room() {
            return false;
        }
        let (spec, spec_bytes) = self.template_of(service);
        self.spend(TASK_BYTES + spec_bytes);
        let service_labels = self.labels_for_templates(service);
        let mut task = Task {
            id: TaskId::random(&mut self.rng),
            meta: skep_common::Meta::default(),
            spec,
            spec_version: service.spec_version,
            service_id: service.id,
            slot: slot.number(),
            node_id: None,
            status: TaskStatus {
                timestamp: self.now,
                applied_at: Some(self.now),
                message: "created".to_owned(),
                ..TaskStatus::default()
            },
            desired_state,
            networks_attachments: Vec::new(),
            service_name: service.spec.name.clone(),
            start_after,
            host_ports: ports::host_mode(&service.endpoint.ports),
            standalone: None,
            job_iteration: service.job_status.map(|status| status.job_iteration),
            preset_node: slot.node(),
            assigned_generic_resources: Vec::new(),
            service_labels,
        };
        // Orders it among its slot's tasks within this pass; the store writes the same.
        task.meta.created_at = self.now;
        self.touch(task.id);
        self.state.scratch_put_task(task);
        true
    }

    /// The service's labels, where something that is filled in for its tasks may name them.
    fn labels_for_templates(&self, service: &Service) -> Option<Labels> {
        let labels = service.spec.labels.as_ref().filter(|labels| !labels.is_empty())?;
        let container = service.spec.task_template.container_spec.as_ref()?;
        let mut texts = container.env.iter().flatten().chain(&container.hostname);
        let is_named = texts.any(|text| text.contains(".Service.Labels"))
            && level::of_managers(&self.state) >= level::CONTROL;
        let is_meant = is_named || secrets::has_template(&self.state, &service.spec.task_template);
        is_meant.then(|| labels.clone())
    }

    /// Raises a task's desired state; a lower one is ignored.
    pub(crate) fn desire(&mut self, task_id: TaskId, desired_state: TaskState) {
        if self.state.task(task_id).is_some_and(|task| task.desired_state < desired_state) {
            self.touch(task_id);
            self.spend(PATCH_BYTES);
            self.state.scratch_touch_task(task_id, |task| task.desired_state = desired_state);
        }
    }

    /// The next address of a node for an uplink.
    pub(crate) fn grant_uplink(
        &self,
        cursors: &mut Cursors,
        node: &Node,
    ) -> Option<NetworkAttachment> {
        let is_free = |address| {
            self.state.address_owner(address).is_none() && !self.granted.contains(&address)
        };
        allocator::grant(&self.state, cursors, node, is_free)
    }

    /// Gives a waiting task a node, its addresses, and what it was given of the node's generic resources.
    pub(crate) fn place(
        &mut self,
        place: Place,
        node_id: NodeId,
        pinned: Option<&Pinned>,
        attachments: Vec<NetworkAttachment>,
        generic: Vec<GenericResource>,
    ) {
        let (.., task_id) = place;
        debug_assert!(
            self.state.task(task_id).is_none_or(|task| task.node_id.is_none())
                || mistakes::is(Mistake::PlacedTwice),
            "a task is placed once"
        );
        self.n_changes += 1;
        let mut bytes = PATCH_BYTES + pinned.map_or(0, |pinned| TASK_BYTES + pinned.bytes);
        for attachment in &attachments {
            bytes += ATTACHMENT_BYTES;
            bytes += attachment.aliases.iter().map(String::len).sum::<usize>();
        }
        self.spend(bytes);
        let is_uplink = |one: &&NetworkAttachment| one.network_id.is_none();
        self.granted.extend(attachments.iter().filter(is_uplink).map(|uplink| uplink.address));
        if attachments.iter().any(|attachment| attachment.network_id.is_some()) {
            self.state.scratch_claim(task_id, &attachments);
        }
        let pinned = pinned.map(|pinned| Arc::clone(&pinned.spec));
        self.placed.push(Placed { place, node_id, pinned, attachments, generic });
    }

    /// Writes why a task waits, where that is news.
    pub(crate) fn defer(&mut self, task_id: TaskId, reason: &str) {
        let now = self.now;
        let is_news =
            |task: &Arc<Task>| task.status.state != TaskState::Pending || task.status.err != reason;
        if !self.state.task(task_id).is_some_and(is_news) {
            return;
        }
        self.touch(task_id);
        self.spend(PATCH_BYTES + reason.len());
        self.state.scratch_touch_task(task_id, |task| {
            if task.status.state != TaskState::Pending {
                task.status.applied_at = Some(now);
            }
            task.status.timestamp = now;
            task.status.state = TaskState::Pending;
            task.status.message = "pending task scheduling".to_owned();
            reason.clone_into(&mut task.status.err);
        });
    }

    /// Writes that a task is lost with its node, which frees what it held.
    pub(crate) fn orphan(&mut self, task_id: TaskId, reason: &str) {
        let now = self.now;
        self.touch(task_id);
        self.spend(PATCH_BYTES);
        self.state.scratch_edit_task(task_id, |task| {
            task.status.timestamp = now;
            task.status.applied_at = Some(now);
            task.status.state = TaskState::Orphaned;
            reason.clone_into(&mut task.status.err);
        });
    }

    /// Erases a task.
    pub(crate) fn delete_task(&mut self, task_id: TaskId) {
        self.touch(task_id);
        self.spend(PATCH_BYTES);
        self.state.scratch_delete_task(task_id);
    }

    /// Erases a service.
    pub(crate) fn delete_service(&mut self, service_id: ServiceId) {
        self.services.insert(service_id);
        self.try_out(Action::Delete { kind: Kind::Service, id: service_id.0 });
    }

    /// Erases a network.
    pub(crate) fn delete_network(&mut self, network_id: NetworkId) {
        self.networks.insert(network_id);
        self.try_out(Action::Delete { kind: Kind::Network, id: network_id.0 });
    }

    /// Erases versions of a secret or a config.
    pub(crate) fn forget_versions(&mut self, kind: Kind, id: u128, versions: &[u64]) {
        let without = secrets::without_versions(&self.state, (kind, id), versions);
        if let Some(object) = without {
            self.payloads.insert((kind, id), versions.to_vec());
            self.try_out(Action::Put { object, expect: Expect::Present });
        }
    }

    /// Writes a service's update status.
    pub(crate) fn set_update_status(&mut self, service: &Service, status: UpdateStatus) {
        let mut service = service.clone();
        service.update_status = Some(status);
        self.put_service(service);
    }

    /// Replaces a service. Tasks of a changed spec are for the next pass: only the committed entry
    /// knows the new spec's version.
    pub(crate) fn put_service(&mut self, service: Service) {
        self.services.insert(service.id);
        self.spend(json_bytes(&service));
        self.try_out(Action::Put {
            object: Object::Service(Box::new(service)),
            expect: Expect::Present,
        });
    }

    fn try_out(&mut self, action: Action) {
        self.n_changes += 1;
        let index = self.view.version().index + 1;
        let (outcome, _) = self.state.apply(index, &Command::new(self.now, vec![action]));
        debug_assert!(
            matches!(outcome, crate::Outcome::Applied(_)),
            "the fork has this object, and what it holds is its own: {outcome:?}"
        );
    }

    /// The actions that make the view what the fork is. What gives addresses back comes first, since
    /// the pass may have granted them again: tasks that end, services that lose virtual addresses. Then
    /// other services, other tasks, and erased services and networks.
    pub(crate) fn into_actions(self) -> Vec<Action> {
        let Self { view, state, tasks, services, networks, payloads, mut placed, now, .. } = self;
        placed.sort_unstable_by_key(|placed| placed.task_id());
        let n_actions =
            tasks.len() + placed.len() + services.len() + networks.len() + payloads.len();
        let mut actions = Vec::with_capacity(n_actions);
        let ends = |id: &TaskId| {
            let goes_on = |task: &Arc<Task>| !task.status.state.is_terminal();
            view.task(*id).is_some_and(goes_on) && !state.task(*id).is_some_and(goes_on)
        };
        let (ending, going_on): (Vec<TaskId>, Vec<TaskId>) = tasks.iter().partition(|id| ends(id));
        for task_id in ending {
            actions.extend(task_action(view.task(task_id), state.task(task_id)));
        }
        let loses = |id: &ServiceId| {
            let (old, new) = (view.service(*id), state.service(*id));
            old.zip(new).is_some_and(|(old, new)| {
                let kept = &new.endpoint.virtual_ips;
                old.endpoint.virtual_ips.iter().any(|vip| !kept.contains(vip))
            })
        };
        let (losing, others): (Vec<ServiceId>, Vec<ServiceId>) =
            services.iter().partition(|id| loses(id));
        let in_order = losing.iter().chain(&others);
        for (old, new) in in_order.map(|id| (view.service(*id), state.service(*id))) {
            if let (Some(old), Some(new)) = (old, new)
                && (old.update_status != new.update_status
                    || old.spec != new.spec
                    || old.endpoint != new.endpoint)
            {
                let object = Object::Service(Box::new((**new).clone()));
                actions.push(Action::Put { object, expect: Expect::Version(old.meta.version) });
            }
        }
        let mut placed = placed.into_iter().peekable();
        for task_id in going_on {
            while let Some(placed) = placed.next_if(|placed| placed.task_id() < task_id) {
                actions.extend(placed.action(view, now));
            }
            let (old, new) = (view.task(task_id), state.task(task_id));
            match (placed.next_if(|placed| placed.task_id() == task_id), new) {
                (Some(placed), Some(new)) => {
                    let mut task = (**new).clone();
                    placed.write(&mut task, now);
                    actions.extend(task_action(old, Some(&Arc::new(task))));
                }
                (_, new) => actions.extend(task_action(old, new)),
            }
        }
        actions.extend(placed.filter_map(|placed| placed.action(view, now)));
        for service_id in services {
            if view.service(service_id).is_some() && state.service(service_id).is_none() {
                actions.push(Action::Delete { kind: Kind::Service, id: service_id.0 });
            }
        }
        for (key, versions) in payloads {
            let meta = view.meta_of(key.0, key.1);
            let object = secrets::without_versions(view, key, &versions);
            if let (Some(meta), Some(object)) = (meta, object) {
                actions.push(Action::Put { object, expect: Expect::Version(meta.version) });
            }
        }
        let erased = |id: NetworkId| Action::Delete { kind: Kind::Network, id: id.0 };
        actions.extend(networks.into_iter().map(erased));
        actions
    }
}

/// The action that makes `old` what `new` is.
fn task_action(old: Option<&Arc<Task>>, new: Option<&Arc<Task>>) -> Option<Action> {
    let (old, new) = match (old, new) {
        (None, None) => return None,
        (Some(old), None) => return Some(Action::Delete { kind: Kind::Task, id: old.id.0 }),
        (None, Some(new)) => return Some(put(new, Expect::Absent)),
        (Some(old), Some(new)) => (old, new),
    };
    if Arc::ptr_eq(old, new) || old == new {
        return None;
    }
    if old.spec != new.spec {
        return Some(put(new, Expect::Version(old.meta.version)));
    }
    let mut patch = TaskPatch::of(new.id);
    patch.desired_state = (old.desired_state != new.desired_state).then_some(new.desired_state);
    patch.node_id = new.node_id.filter(|_| old.node_id.is_none());
    patch.networks_attachments = (old.networks_attachments != new.networks_attachments)
        .then(|| new.networks_attachments.clone());
    patch.generic_resources = (old.assigned_generic_resources != new.assigned_generic_resources)
        .then(|| new.assigned_generic_resources.clone());
    patch.status = (old.status != new.status).then(|| new.status.clone());
    Some(Action::PatchTask(patch))
}

fn put(task: &Arc<Task>, expect: Expect) -> Action {
    Action::Put { object: Object::Task(Box::new((**task).clone())), expect }
}
