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
use std::time::Duration;

use rand::Rng;
use skep_common::spec::ModeKind;
use skep_common::{Kind, NetworkId, NodeId, Service, ServiceId, TaskId, TaskState, Timestamp};

use crate::allocator::Cursors;
use crate::command::Action;
use crate::fork::Fork;
use crate::network;
use crate::orchestrator::{self, Scope, enforcer, is_live, updater};
use crate::scheduler::{self, Index};
use crate::store::{Change, State};
use crate::{reaper, rotation, secrets};

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
    /// Tasks made in one pass: bounds the size of a Raft entry. The rest follows at once.
    pub new_tasks_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { progress_deadline: Duration::from_mins(10), new_tasks_max: 4096 }
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
    /// What the last plan touched: looked at again, in case that it was not committed.
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
    tasks: BTreeSet<TaskId>,
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
    let mut fork = Fork::new(view, now, rng, memory.options.new_tasks_max);
    rotation::advance(&mut fork);
    let mut evicted = BTreeSet::new();
    // Only nodes that were decided about are looked at again if this plan is lost.
    let mut decided = BTreeSet::new();
    for node_id in &work.nodes {
        let n_changes = fork.n_changes();
        let wake = reaper::orphan_tasks(&mut fork, *node_id);
        memory.timers.set(Subject::Node(*node_id), wake.map(|at| (at, "node down for a day")));
        let leaving = enforcer::overcommitted(fork.state(), *node_id);
        if fork.n_changes() > n_changes || !leaving.is_empty() {
            decided.insert(*node_id);
        }
        evicted.extend(leaving);
    }
    work.nodes = decided;
    for service_id in &work.services {
        let LeaderMemory { options, updates, .. } = &mut *memory;
        let mut scope = Scope::new(&mut fork, options, updates, &evicted);
        orchestrator::reconcile(&mut scope, *service_id);
        let wake = scope.wake;
        memory.timers.set(Subject::Service(*service_id), wake);
    }
    memory.give_virtual_ips(&mut fork, &work);
    memory.sync_touched(&fork);
    scheduler::schedule(&mut fork, &mut memory.index, &mut memory.cursors);
    for service_id in &work.services {
        reaper::reap(&mut fork, *service_id);
    }
    for network_id in &memory.leaving {
        if reaper::reap_network(&mut fork, *network_id) {
            memory.cursors.networks.retain(|(id, _), _| id != network_id);
        }
    }
    secrets::reap(&mut fork, &mut memory.payloads);
    memory.sync_touched(&fork);
    memory.end(view, work, fork)
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
        for (task_id, service_id) in &dirty.tasks {
            work.tasks.insert(*task_id);
            if matters_to_service(view, *task_id) {
                work.services.insert(*service_id);
            }
            // A node that was removed while its user ran a container there: nobody else will look at it.
            let node_id = view.task(*task_id).and_then(|task| task.node_id);
            work.nodes.extend(node_id.filter(|node_id| view.node(*node_id).is_none()));
        }
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
        for service_id in &dirty.services {
            // Their host ports may have changed.
            work.tasks.extend(view.tasks_of_service(*service_id).map(|task| task.id));
        }
        for task_id in &work.tasks {
            self.index.sync_task(view, *task_id);
        }
        // An image or a network may be what tasks wait for, and a service may have freed an address.
        if dirty.images || !dirty.networks.is_empty() || !dirty.services.is_empty() {
            self.index.set_changed();
        }
        work
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

    fn sync_touched(&mut self, fork: &Fork<'_>) {
        for task_id in fork.touched_tasks() {
            self.index.sync_task(fork.state(), *task_id);
        }
    }

    fn end(&mut self, view: &State, work: Work, fork: Fork<'_>) -> Plan {
        let mut last = Work { tasks: fork.touched_tasks().clone(), ..Work::default() };
        last.services.extend(fork.touched_services());
        for task_id in &last.tasks {
            let task = fork.state().task(*task_id).or_else(|| view.task(*task_id));
            last.services.extend(task.map(|task| task.service_id));
        }
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
fn matters_to_service(view: &State, task_id: TaskId) -> bool {
    let on_its_way = TaskState::Assigned..=TaskState::Starting;
    view.task(task_id)
        .is_none_or(|task| !(is_live(task) && on_its_way.contains(&task.status.state)))
}

fn everything(view: &State) -> Work {
    let mut work = Work {
        services: view.services().keys().copied().collect(),
        nodes: view.nodes().keys().copied().collect(),
        tasks: BTreeSet::new(),
    };
    for task in view.tasks().values() {
        work.services.insert(task.service_id);
        work.nodes.extend(task.node_id);
    }
    work
}

#[cfg(test)]
impl LeaderMemory {
    /// The scheduler's index.
    pub(crate) fn index(&self) -> &Index {
        &self.index
    }
}
