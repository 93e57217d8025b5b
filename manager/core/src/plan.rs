//! One reconcile pass: from a view to the actions that the leader proposes as one Raft entry.
//!
//! ```text
//! dirty ─► nodes: orphans, too small ─► services: orchestrate ─► schedule, allocate ─► reap ─► actions
//! ```
//!
//! Who drives it: the leader, with the changes since its last pass, whenever there are any, or the
//! [deadline](Plan::deadline) has come. What changes while a plan is being committed is for the next
//! pass; there are no waits to collect more.
//!
//! # Invariants
//!
//! - Level-triggered: changes choose what to look at, the view decides. A new leader starts with
//!   [`LeaderMemory::default`] and [`Dirty::all`].
//! - Planning on the result of a plan gives nothing, but what the pass left out for its size.
//! - A plan that was refused or lost is repeated: the next pass looks again at all that it touched.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use skep_common::spec::ModeKind;
use skep_common::{
    Kind, NetworkId, NodeId, Service, ServiceId, Task, TaskId, TaskState, Timestamp,
};

use crate::allocator::Cursors;
use crate::by_id::ById;
use crate::command::Action;
use crate::fork::{Fork, Room};
use crate::network;
use crate::orchestrator::{self, Scope, enforcer, is_live, updater};
use crate::scheduler::{self, Index};
use crate::store::{Change, Place, State};
use crate::{reaper, secrets};

/// What changed since the last pass.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dirty {
    /// Services to look at.
    pub services: BTreeSet<ServiceId>,
    /// Nodes to look at.
    pub nodes: BTreeSet<NodeId>,
    /// Tasks to look at, each with its service.
    pub tasks: BTreeMap<TaskId, ServiceId>,
    /// Networks to look at.
    pub networks: BTreeSet<NetworkId>,
    /// An image came, or moved.
    pub images: bool,
    /// A secret or a config came, or changed.
    pub payloads: bool,
    /// Everything is to be looked at.
    pub all: bool,
}

impl Dirty {
    /// Everything: what a new leader starts with.
    pub fn all() -> Self {
        Self { all: true, ..Self::default() }
    }

    /// Whether there is nothing to look at.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Adds changes that were applied.
    pub fn extend<'a>(&mut self, changes: impl IntoIterator<Item = &'a Change>) {
        for change in changes {
            match change.kind {
                Kind::Service => {
                    self.services.insert(ServiceId(change.id));
                }
                Kind::Node => {
                    self.nodes.insert(NodeId(change.id));
                }
                Kind::Task => {
                    if let Some(service_id) = change.service_id {
                        self.tasks.insert(TaskId(change.id), service_id);
                    }
                }
                Kind::Image => self.images = true,
                Kind::Cluster => self.all = true,
                Kind::Network => {
                    self.networks.insert(NetworkId(change.id));
                }
                Kind::Secret | Kind::Config => self.payloads = true,
                Kind::Stack | Kind::Revision => {}
            }
        }
    }
}

impl<'a> FromIterator<&'a Change> for Dirty {
    fn from_iter<I: IntoIterator<Item = &'a Change>>(changes: I) -> Self {
        let mut dirty = Self::default();
        dirty.extend(changes);
        dirty
    }
}

/// Settings of the passes.
#[derive(Debug, Clone)]
pub struct Options {
    /// A task of an update that does not run within this time is a failure of the update. Swarm has
    /// none and waits for ever; 10 minutes is Kubernetes' `progressDeadlineSeconds`.
    pub progress_deadline: Duration,
    /// Whether updates wait for their tasks without end, as where one only asks what would happen.
    pub is_patient: bool,
    /// Actions of each of a pass's three steps: what services need, placing, reaping. Bounds how long a
    /// pass and its commit take. The rest follows at once.
    pub actions_max: usize,
    /// Their bytes as JSON, estimated: three steps with much to decide stay well below the 16 MiB that a
    /// command may have.
    pub bytes_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            progress_deadline: Duration::from_mins(10),
            is_patient: false,
            actions_max: 4096,
            bytes_max: 3 << 20,
        }
    }
}

/// What a leader keeps from pass to pass to be fast. It holds nothing that the store does not say.
#[derive(Debug, Default)]
pub struct LeaderMemory {
    /// Settings.
    pub options: Options,
    index: Index,
    cursors: Cursors,
    updates: updater::Memory,
    timers: Timers,
    /// Services that lack a virtual address: looked at in each pass, since any change may free one.
    without_address: BTreeSet<ServiceId>,
    /// Global services: what becomes of a node decides about each.
    global: BTreeSet<ServiceId>,
    /// Networks on their way out: looked at in each pass, since any task may be the last on one.
    leaving: BTreeSet<NetworkId>,
    payloads: secrets::Memory,
    /// What the last plan touched: looked at again, in case that it was not committed. And what it left
    /// out for its size.
    last: Work,
}

impl LeaderMemory {
    /// An empty memory.
    pub fn new(options: Options) -> Self {
        Self { options, ..Self::default() }
    }
}

/// What a pass looks at.
#[derive(Debug, Default)]
struct Work {
    services: BTreeSet<ServiceId>,
    nodes: BTreeSet<NodeId>,
    /// Only to charge them anew.
    tasks: Vec<TaskId>,
    /// The same of those that the last pass placed.
    placed: Vec<Place>,
}

/// What a timer looks at when it is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Service(ServiceId),
    Node(NodeId),
}

/// At most one timer per subject.
#[derive(Debug, Default)]
struct Timers {
    by_subject: BTreeMap<Subject, (Timestamp, &'static str)>,
    by_time: BTreeSet<(Timestamp, Subject)>,
}

impl Timers {
    fn set(&mut self, subject: Subject, timer: Option<(Timestamp, &'static str)>) {
        if let Some((at, _)) = self.by_subject.remove(&subject) {
            self.by_time.remove(&(at, subject));
        }
        if let Some((at, why)) = timer {
            self.by_subject.insert(subject, (at, why));
            self.by_time.insert((at, subject));
        }
    }

    fn due(&self, now: Timestamp) -> impl Iterator<Item = Subject> {
        self.by_time.iter().take_while(move |(at, _)| *at <= now).map(|(_, subject)| *subject)
    }

    fn next(&self) -> Option<(Timestamp, &'static str)> {
        let (_, subject) = self.by_time.first()?;
        self.by_subject.get(subject).copied()
    }
}

/// What a pass decided.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// To be proposed as one command.
    pub actions: Vec<Action>,
    /// When to plan again though nothing changes, and why.
    pub deadline: Option<(Timestamp, &'static str)>,
}

/// Plans one pass over `view`.
///
/// Equal views, memories, times and random numbers give equal plans. A plan is proposed whole, or
/// dropped; then the next call sees to what it was about.
pub fn plan(
    view: &State,
    memory: &mut LeaderMemory,
    dirty: &Dirty,
    now: Timestamp,
    rng: &mut impl Rng,
) -> Plan {
    let mut work = memory.begin(view, dirty, now);
    let room = Room { actions: memory.options.actions_max, bytes: memory.options.bytes_max };
    let mut fork = Fork::new(view, now, rng, room);
    let mut rest = Work::default();
    let mut evicted = BTreeSet::new();
    // Only nodes that were decided about are looked at again if this plan is lost.
    let mut decided = BTreeSet::new();
    for node_id in &work.nodes {
        let n_changes = fork.n_changes();
        let wake = reaper::orphan_tasks(&mut fork, *node_id);
        memory.timers.set(Subject::Node(*node_id), wake.map(|at| (at, "node down for a day")));
        // The index knows it of most nodes without a look at their tasks. It counts also those that stop.
        let leaving = match memory.index.is_enough(*node_id) {
            true => Vec::new(),
            false => enforcer::overcommitted(fork.state(), *node_id),
        };
        if fork.n_changes() > n_changes || !leaving.is_empty() {
            decided.insert(*node_id);
        }
        evicted.extend(leaving);
        if !fork.has_room() {
            rest.nodes.insert(*node_id);
        }
    }
    work.nodes = decided;
    let to_reap = memory.reconcile(&mut fork, &work, &evicted, &mut rest);
    memory.give_virtual_ips(&mut fork, &work);
    let n_touches = memory.sync_touched(&fork, 0);
    fork.next_step();
    let is_all = scheduler::schedule(&mut fork, &mut memory.index, &mut memory.cursors);
    fork.next_step();
    for service_id in to_reap {
        reaper::reap(&mut fork, service_id);
        if !fork.has_room() {
            rest.services.insert(service_id);
        }
    }
    for network_id in &memory.leaving {
        if reaper::reap_network(&mut fork, *network_id) {
            memory.cursors.networks.retain(|(id, _), _| id != network_id);
        }
    }
    secrets::reap(&mut fork, &mut memory.payloads);
    memory.sync_touched(&fork, n_touches);
    let mut plan = memory.end(view, work, fork);
    if !is_all || !rest.services.is_empty() || !rest.nodes.is_empty() {
        memory.last.services.extend(rest.services);
        memory.last.nodes.extend(rest.nodes);
        plan.deadline = Some((now, "decisions that the pass had no room for"));
    }
    plan
}

impl LeaderMemory {
    /// Takes over what changed, and chooses what to look at.
    fn begin(&mut self, view: &State, dirty: &Dirty, now: Timestamp) -> Work {
        let mut work = std::mem::take(&mut self.last);
        self.payloads.note(dirty);
        if self.updates.since == Timestamp::default() {
            self.updates.since = now;
        }
        if dirty.all {
            self.index = Index::rebuild(view);
            self.timers = Timers::default();
            self.without_address.clear();
            let global = view.services().values().filter(|service| is_global(service));
            self.global = global.map(|service| service.id).collect();
            let leaving = view.networks().values().filter(|network| network.pending_delete);
            self.leaving = leaving.map(|network| network.id).collect();
            return everything(view);
        }
        for network_id in &dirty.networks {
            match view.network(*network_id).is_some_and(|network| network.pending_delete) {
                true => self.leaving.insert(*network_id),
                false => self.leaving.remove(network_id),
            };
        }
        for subject in self.timers.due(now) {
            match subject {
                Subject::Service(service_id) => work.services.insert(service_id),
                Subject::Node(node_id) => work.nodes.insert(node_id),
            };
        }
        work.services.extend(&dirty.services);
        work.nodes.extend(&dirty.nodes);
        self.sync_tasks(view, dirty, &mut work);
        for service_id in &dirty.services {
            match view.service(*service_id).is_some_and(|service| is_global(service)) {
                true => self.global.insert(*service_id),
                false => self.global.remove(service_id),
            };
        }
        if !work.nodes.is_empty() {
            work.services.extend(&self.global);
        }
        for node_id in &work.nodes {
            self.index.sync_node(view, *node_id);
            let tasks = view.tasks_of_node(*node_id);
            let unfinished = tasks.filter(|task| !task.status.state.is_terminal());
            work.services.extend(unfinished.map(|task| task.service_id));
        }
        // An image, a secret or a network may be what tasks wait for, and a service may have freed an address.
        let is_new = dirty.images || dirty.payloads || !dirty.networks.is_empty();
        if is_new || !dirty.services.is_empty() {
            self.index.set_changed();
        }
        work
    }

    /// Charges tasks that changed, or were to change, and has those looked at for which that matters.
    fn sync_tasks(&mut self, view: &State, dirty: &Dirty, work: &mut Work) {
        for task_id in work.tasks.iter().filter(|id| !dirty.tasks.contains_key(id)) {
            self.index.sync_task(*task_id, view.task(*task_id));
        }
        // Mostly all that the last pass placed changed, and nothing else did: they are neighbours in this order.
        let mut seen: ById<TaskId, ()> = ById::default();
        for place in std::mem::take(&mut work.placed) {
            let (.., task_id) = place;
            let task = view.task_at(&place);
            self.index.sync_task(task_id, task);
            if let Some(service_id) = dirty.tasks.get(&task_id) {
                self.note_task(task, *service_id, work);
                seen.insert(task_id, ());
            }
        }
        for (task_id, service_id) in &dirty.tasks {
            if !seen.contains_key(task_id) {
                let task = view.task(*task_id);
                self.index.sync_task(*task_id, task);
                self.note_task(task, *service_id, work);
            }
        }
    }

    /// Has the service of a changed task looked at, or its node.
    fn note_task(&self, task: Option<&Arc<Task>>, service_id: ServiceId, work: &mut Work) {
        if task.is_none_or(|task| matters_to_service(task)) {
            work.services.insert(service_id);
        }
        // A node that was removed while its user ran a container there: nobody else will look at it.
        let node_id = task.and_then(|task| task.node_id);
        work.nodes.extend(node_id.filter(|node_id| !self.index.has_node(*node_id)));
    }

    /// Decides what services need, and says which of them the reaper has to look at. Those that the room
    /// did not suffice for are to be looked at again, and with them the nodes, whose tasks may be among
    /// those that have to leave.
    fn reconcile(
        &mut self,
        fork: &mut Fork<'_>,
        work: &Work,
        evicted: &BTreeSet<TaskId>,
        rest: &mut Work,
    ) -> Vec<ServiceId> {
        let mut to_reap = Vec::new();
        for service_id in &work.services {
            if fork.has_room() {
                let Self { options, updates, index, .. } = &mut *self;
                let mut scope = Scope::new(fork, options, updates, index, evicted);
                if orchestrator::reconcile(&mut scope, *service_id) {
                    to_reap.push(*service_id);
                }
                let wake = scope.wake;
                self.timers.set(Subject::Service(*service_id), wake);
            }
            if !fork.has_room() {
                rest.services.insert(*service_id);
            }
        }
        if !rest.services.is_empty() {
            rest.nodes.extend(&work.nodes);
        }
        to_reap
    }

    /// Gives services the virtual addresses that they lack, as far as their networks have any left.
    fn give_virtual_ips(&mut self, fork: &mut Fork<'_>, work: &Work) {
        let lacking = std::mem::take(&mut self.without_address);
        for service_id in lacking.union(&work.services) {
            let state = fork.state();
            let Some(service) = state.service(*service_id) else { continue };
            if !network::is_incomplete(state, service) {
                continue;
            }
            let virtual_ips = network::virtual_ips(state, service);
            if virtual_ips != service.endpoint.virtual_ips {
                let mut service = (**service).clone();
                service.endpoint.virtual_ips = virtual_ips;
                fork.put_service(service);
            }
            let state = fork.state();
            if state
                .service(*service_id)
                .is_some_and(|service| network::is_incomplete(state, service))
            {
                self.without_address.insert(*service_id);
            }
        }
    }

    /// Charges tasks that the pass changed, but for its first changes, which are charged; says how many
    /// are now.
    fn sync_touched(&mut self, fork: &Fork<'_>, n_charged: usize) -> usize {
        let touches = fork.touches();
        for task_id in &touches[n_charged..] {
            self.index.sync_task(*task_id, fork.state().task(*task_id));
        }
        touches.len()
    }

    fn end(&mut self, view: &State, work: Work, fork: Fork<'_>) -> Plan {
        let mut last = Work::default();
        last.services.extend(fork.touched_services());
        for task_id in fork.touched_tasks() {
            let task = fork.state().task(*task_id).or_else(|| view.task(*task_id));
            last.services.extend(task.map(|task| task.service_id));
        }
        // A placement that is lost leaves the task waiting: that is nothing for its service.
        last.tasks.extend(fork.touched_tasks());
        last.placed.extend(fork.placed().iter().map(|placed| placed.place));
        let actions = fork.into_actions();
        self.last = Work::default();
        if !actions.is_empty() {
            last.nodes = work.nodes;
            self.last = last;
        }
        Plan { actions, deadline: self.timers.next() }
    }
}

fn is_global(service: &Service) -> bool {
    service.spec.mode_kind().is_some_and(ModeKind::is_global)
}

/// Whether a change of a task can change what its service needs. A task on its way from one state to
/// the next does not, and most changes are of this kind.
fn matters_to_service(task: &Task) -> bool {
    let on_its_way = TaskState::Assigned..=TaskState::Starting;
    !(is_live(task) && on_its_way.contains(&task.status.state))
}

fn everything(view: &State) -> Work {
    let mut work = Work {
        services: view.services().keys().copied().collect(),
        nodes: view.nodes().keys().copied().collect(),
        ..Work::default()
    };
    work.services.extend(view.services_with_tasks());
    work.nodes.extend(view.nodes_with_tasks());
    work
}

#[cfg(test)]
impl LeaderMemory {
    /// The scheduler's index.
    pub(crate) fn index(&self) -> &Index {
        &self.index
    }
}
