//! What the scheduler knows of each node, in dense arrays, kept up to date change by change.
//!
//! Each task is charged to its node: what it reserves while it may run there, its part in the counts
//! that spreading looks at, its failure. A change of a task takes the old charge back and makes the
//! new one, so the cost of a pass depends on what changed, not on what there is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use skep_common::mistakes::{self, Mistake};
use skep_common::object::{NodeState, Slot};
use skep_common::spec::{Availability, GenericResource, PortProtocol, Resources, TaskSpec};
use skep_common::{Node, NodeId, ServiceId, Task, TaskId, TaskState, Timestamp};

use super::generic::Stock;
use super::{FAILURE_WINDOW, GroupKey, Requirement};
use crate::allocator;
use crate::by_id::ById;
use crate::network;
use crate::orchestrator::is_live;
use crate::store::State;

/// CPU and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Amounts {
    pub(crate) nano_cpus: i64,
    pub(crate) memory_bytes: i64,
}

impl Amounts {
    pub(crate) fn of(resources: Option<&Resources>) -> Self {
        Self {
            nano_cpus: resources.and_then(|resources| resources.nano_cpus).unwrap_or(0),
            memory_bytes: resources.and_then(|resources| resources.memory_bytes).unwrap_or(0),
        }
    }

    pub(crate) fn reserved_by(spec: &TaskSpec) -> Self {
        Self::of(spec.resources.as_ref().and_then(|resources| resources.reservations.as_ref()))
    }

    pub(crate) fn take(&mut self, other: &Self) {
        self.nano_cpus = self.nano_cpus.saturating_sub(other.nano_cpus);
        self.memory_bytes = self.memory_bytes.saturating_sub(other.memory_bytes);
    }

    pub(crate) fn give_back(&mut self, other: &Self) {
        self.nano_cpus = self.nano_cpus.saturating_add(other.nano_cpus);
        self.memory_bytes = self.memory_bytes.saturating_add(other.memory_bytes);
    }
}

/// One node.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) id: NodeId,
    /// Absent once the node was removed; its tasks may still be charged to it.
    pub(crate) node: Option<Arc<Node>>,
    /// Whether it takes new tasks. Kept here, as is what follows, because a group of tasks asks every
    /// node: to look it up in the node's object would be most of the time that takes.
    pub(crate) is_ready: bool,
    /// Whether it keeps the tasks that it has, as far as that is not a matter of what they need.
    keeps_tasks: bool,
    pub(crate) total: Amounts,
    pub(crate) free: Amounts,
    /// The share of the scarcer resource that is reserved, in percent.
    pub(crate) reserved_percent: u32,
    pub(crate) generic: Stock,
    /// Tasks that managers want to run.
    pub(crate) n_active: u32,
    /// Addresses of its slice in use, and how many there are.
    pub(crate) n_addresses: u32,
    pub(crate) n_addresses_max: u32,
    /// Host-mode ports in use.
    pub(crate) ports: BTreeMap<(PortProtocol, u16), u32>,
}

impl Entry {
    /// Notes that what is free, or what there is, has changed.
    fn settle_reserved(&mut self) {
        let cpu = percent_taken(self.free.nano_cpus, self.total.nano_cpus);
        self.reserved_percent =
            cpu.max(percent_taken(self.free.memory_bytes, self.total.memory_bytes));
    }
}

fn percent_taken(free: i64, total: i64) -> u32 {
    if total <= 0 {
        return 0;
    }
    // 64 bits are enough for all but absurd amounts, and divide several times as fast as 128.
    let percent = match total.checked_sub(free).and_then(|taken| taken.checked_mul(100)) {
        Some(hundredfold) => i128::from(hundredfold / total),
        None => (i128::from(total) - i128::from(free)) * 100 / i128::from(total),
    };
    u32::try_from(percent).unwrap_or(0)
}

/// Whether a node is one to have tasks, whatever they need: it is up, and not drained.
pub(crate) fn keeps_tasks(node: &Node) -> bool {
    node.status.state != NodeState::Down && node.spec.availability != Availability::Drain
}

fn takes_tasks(node: &Node) -> bool {
    node.status.state == NodeState::Ready && node.spec.availability == Availability::Active
}

/// What one task adds to the index.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Charge {
    Waiting {
        key: GroupKey,
        slot: Slot,
    },
    Placed {
        number: usize,
        service_id: ServiceId,
        amounts: Amounts,
        is_active: bool,
        has_uplink: bool,
        /// Absent where there are none, as with most tasks: the table of all charges stays small.
        rare: Option<Box<Rare>>,
    },
    Failed {
        number: usize,
        key: GroupKey,
        at: Timestamp,
    },
}

type Ports = Vec<(PortProtocol, u16)>;

/// What few tasks hold of their node.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rare {
    generic: Vec<GenericResource>,
    ports: Ports,
}

impl Rare {
    fn of(generic: &[GenericResource], ports: Ports) -> Option<Box<Self>> {
        let is_nothing = generic.is_empty() && ports.is_empty();
        (!is_nothing).then(|| Box::new(Self { generic: generic.to_vec(), ports }))
    }
}

/// All nodes and what is charged to them.
#[derive(Debug, Default)]
pub(crate) struct Index {
    entries: Vec<Entry>,
    numbers: ById<NodeId, usize>,
    charges: ById<TaskId, Charge>,
    waiting: BTreeMap<GroupKey, BTreeSet<(Slot, TaskId)>>,
    active: BTreeMap<ServiceId, BTreeMap<usize, u32>>,
    failures: BTreeMap<GroupKey, BTreeMap<(usize, TaskId), Timestamp>>,
    is_changed: bool,
}

impl Index {
    /// Makes the index of a state anew.
    pub(crate) fn rebuild(state: &State) -> Self {
        let mut index = Self { is_changed: true, ..Self::default() };
        for node_id in state.nodes().keys() {
            index.sync_node(state, *node_id);
        }
        index.charges.reserve(state.tasks().len());
        // Of most tasks the group and the slot are behind those of the one before, which makes inserting
        // them cheap: the table of tasks has them in the order of their random ids.
        for task in state.tasks_by_service() {
            let is_forgotten = mistakes::is(Mistake::PlacedTwice)
                && task.status.state == TaskState::Assigned
                && is_live(task);
            // Nothing is charged to any of them yet.
            let charge = match is_forgotten {
                true => Some(waiting(task)),
                false => index.charge_of(task),
            };
            if let Some(charge) = charge {
                index.take(task.id, &charge);
                index.charges.insert(task.id, charge);
            }
        }
        index
    }

    /// Whether anything changed since this was last asked.
    pub(crate) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.is_changed)
    }

    /// Notes that something outside of the index changed what tasks wait for, such as an image.
    pub(crate) fn set_changed(&mut self) {
        self.is_changed = true;
    }

    /// Tasks without a node, by group, then slot.
    pub(crate) fn waiting(&self) -> &BTreeMap<GroupKey, BTreeSet<(Slot, TaskId)>> {
        &self.waiting
    }

    pub(crate) fn entry(&self, number: usize) -> &Entry {
        &self.entries[number]
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    /// Active tasks of a service, by the number of the node.
    pub(crate) fn active_of_service(&self, service_id: ServiceId) -> Vec<u32> {
        let mut counts = vec![0; self.entries.len()];
        for (number, count) in self.active.get(&service_id).into_iter().flatten() {
            counts[*number] = *count;
        }
        counts
    }

    /// Failures of a group within [`FAILURE_WINDOW`], by the number of the node.
    pub(crate) fn recent_failures(&self, key: GroupKey, now: Timestamp) -> BTreeMap<usize, u32> {
        let mut counts = BTreeMap::new();
        for ((number, _), at) in self.failures.get(&key).into_iter().flatten() {
            if now.since(*at) <= FAILURE_WINDOW {
                *counts.entry(*number).or_insert(0) += 1;
            }
        }
        counts
    }

    /// Takes over a node as it is, or notes that it is gone.
    pub(crate) fn sync_node(&mut self, state: &State, node_id: NodeId) {
        let number = self.number(node_id);
        let node = state.node(node_id).cloned();
        let description = node.as_ref().and_then(|node| node.description.as_ref());
        let total = Amounts::of(description.map(|description| &description.resources));
        let slice = node.as_ref().and_then(|n| allocator::slice(allocator::pool(state), n.number));
        let entry = &mut self.entries[number];
        entry.free.give_back(&total);
        entry.free.take(&entry.total);
        entry.total = total;
        entry.settle_reserved();
        entry.is_ready = node.as_deref().is_some_and(takes_tasks);
        entry.keeps_tasks = node.as_deref().is_some_and(keeps_tasks);
        entry.generic.set_node(node.as_deref());
        entry.n_addresses_max = slice.map_or(0, |_| allocator::SLICE_TASKS_MAX);
        entry.node = node;
        self.is_changed = true;
    }

    /// The number of a node, where it was heard of.
    pub(crate) fn number_of(&self, node_id: NodeId) -> Option<usize> {
        self.numbers.get(&node_id).copied()
    }

    /// Whether a node is there.
    pub(crate) fn has_node(&self, node_id: NodeId) -> bool {
        self.number_of(node_id).is_some_and(|number| self.entries[number].node.is_some())
    }

    /// Whether a node [keeps tasks](keeps_tasks); asked of every task, where the table of nodes would cost
    /// several times as much.
    pub(crate) fn keeps_tasks(&self, node_id: NodeId) -> bool {
        self.number_of(node_id).is_some_and(|number| self.entries[number].keeps_tasks)
    }

    /// Whether all that a node has is enough for what is charged to it, as far as numbers tell: those that
    /// hold generic resources have to be asked.
    pub(crate) fn is_enough(&self, node_id: NodeId) -> bool {
        let Some(number) = self.number_of(node_id) else { return false };
        let Entry { free, generic, .. } = &self.entries[number];
        free.nano_cpus >= 0 && free.memory_bytes >= 0 && !generic.is_held()
    }

    fn number(&mut self, node_id: NodeId) -> usize {
        *self.numbers.entry(node_id).or_insert_with(|| {
            self.entries.push(Entry {
                id: node_id,
                node: None,
                is_ready: false,
                keeps_tasks: false,
                total: Amounts::default(),
                free: Amounts::default(),
                reserved_percent: 0,
                generic: Stock::default(),
                n_active: 0,
                n_addresses: 0,
                n_addresses_max: 0,
                ports: BTreeMap::new(),
            });
            self.entries.len() - 1
        })
    }

    /// Takes over a task as it is, or notes that it is gone.
    pub(crate) fn sync_task(&mut self, task_id: TaskId, task: Option<&Arc<Task>>) {
        let new = task.and_then(|task| self.charge_of(task));
        if self.charges.get(&task_id) == new.as_ref() {
            return;
        }
        self.is_changed = true;
        if let Some(old) = self.charges.remove(&task_id) {
            self.give_back(task_id, &old);
        }
        if let Some(new) = new {
            self.take(task_id, &new);
            self.charges.insert(task_id, new);
        }
    }

    /// Charges a waiting task to the node that it was given, as [`sync_task`](Self::sync_task) will once
    /// that is committed. It has to be [taken out](Self::leave_waiting) of those that wait.
    pub(super) fn place(
        &mut self,
        task_id: TaskId,
        service_id: ServiceId,
        number: usize,
        requirement: &Requirement,
        generic: &[GenericResource],
    ) {
        let charge = Charge::Placed {
            number,
            service_id,
            amounts: requirement.amounts,
            is_active: true,
            has_uplink: requirement.has_uplink,
            rare: Rare::of(generic, requirement.ports.clone()),
        };
        self.take(task_id, &charge);
        self.charges.insert(task_id, charge);
        self.is_changed = true;
    }

    /// Takes tasks of a group that were placed out of those that wait; together, since mostly it is all.
    pub(super) fn leave_waiting(&mut self, key: GroupKey, placed: &[(Slot, TaskId)]) {
        let Some(tasks) = self.waiting.get_mut(&key) else { return };
        if tasks.len() > placed.len() {
            for one in placed {
                tasks.remove(one);
            }
        } else {
            self.waiting.remove(&key);
        }
    }

    fn charge_of(&mut self, task: &Task) -> Option<Charge> {
        let Some(node_id) = task.node_id else {
            let is_waiting = is_live(task) && task.status.state < TaskState::Assigned;
            return is_waiting.then(|| waiting(task));
        };
        let number = self.number(node_id);
        match task.status.state {
            TaskState::Failed | TaskState::Rejected => {
                let key = (task.service_id, task.spec_version);
                let at = task.status.applied_at.unwrap_or(task.status.timestamp);
                Some(Charge::Failed { number, key, at })
            }
            state if state.is_terminal() => None,
            _ => Some(Charge::Placed {
                number,
                service_id: task.service_id,
                amounts: Amounts::reserved_by(&task.spec),
                is_active: is_live(task),
                has_uplink: network::has_uplink(task),
                rare: Rare::of(&task.assigned_generic_resources, host_ports(task)),
            }),
        }
    }

    fn take(&mut self, task_id: TaskId, charge: &Charge) {
        match charge {
            Charge::Waiting { key, slot } => {
                self.waiting.entry(*key).or_default().insert((*slot, task_id));
            }
            Charge::Failed { number, key, at } => {
                self.failures.entry(*key).or_default().insert((*number, task_id), *at);
            }
            Charge::Placed { number, service_id, amounts, is_active, has_uplink, rare } => {
                let entry = &mut self.entries[*number];
                entry.free.take(amounts);
                entry.settle_reserved();
                entry.n_addresses += u32::from(*has_uplink);
                if let Some(Rare { generic, ports }) = rare.as_deref() {
                    entry.generic.take(generic);
                    for port in ports {
                        *entry.ports.entry(*port).or_insert(0) += 1;
                    }
                }
                if *is_active {
                    entry.n_active += 1;
                    let counts = self.active.entry(*service_id).or_default();
                    *counts.entry(*number).or_insert(0) += 1;
                }
            }
        }
    }

    fn give_back(&mut self, task_id: TaskId, charge: &Charge) {
        match charge {
            Charge::Waiting { key, slot } => {
                if let Some(tasks) = self.waiting.get_mut(key) {
                    tasks.remove(&(*slot, task_id));
                    if tasks.is_empty() {
                        self.waiting.remove(key);
                    }
                }
            }
            Charge::Failed { number, key, .. } => {
                if let Some(failures) = self.failures.get_mut(key) {
                    failures.remove(&(*number, task_id));
                    if failures.is_empty() {
                        self.failures.remove(key);
                    }
                }
            }
            Charge::Placed { number, service_id, amounts, is_active, has_uplink, rare } => {
                let entry = &mut self.entries[*number];
                entry.free.give_back(amounts);
                entry.settle_reserved();
                entry.n_addresses -= u32::from(*has_uplink);
                if let Some(Rare { generic, ports }) = rare.as_deref() {
                    entry.generic.give_back(generic);
                    for port in ports {
                        decrement(&mut entry.ports, port);
                    }
                }
                if *is_active {
                    entry.n_active -= 1;
                    if let Some(counts) = self.active.get_mut(service_id) {
                        decrement(counts, number);
                        if counts.is_empty() {
                            self.active.remove(service_id);
                        }
                    }
                }
            }
        }
    }
}

/// Of a task without a node.
fn waiting(task: &Task) -> Charge {
    Charge::Waiting { key: (task.service_id, task.spec_version), slot: task.slot_key() }
}

fn decrement<K: Ord>(counts: &mut BTreeMap<K, u32>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

/// The ports that a task takes on its node itself. One that the node numbers takes none from others.
pub(super) fn host_ports(task: &Task) -> Ports {
    let ports = task.host_ports.iter();
    ports
        .filter_map(|port| Some((port.protocol.unwrap_or_default(), port.published_port?)))
        .collect()
}

#[cfg(test)]
impl Index {
    /// All it knows, in an order that does not depend on how it came to know it.
    pub(crate) fn describe(&self) -> Vec<String> {
        let name = |number: &usize| self.entries[*number].id;
        let mut lines: Vec<String> = self
            .entries
            .iter()
            .filter(|entry| entry.node.is_some() || entry.n_addresses > 0)
            .map(|entry| format!("{entry:?}"))
            .collect();
        for (service_id, counts) in &self.active {
            let counts: BTreeMap<_, _> = counts.iter().map(|(n, count)| (name(n), count)).collect();
            lines.push(format!("active {service_id} {counts:?}"));
        }
        for (key, failures) in &self.failures {
            let failures: BTreeMap<_, _> =
                failures.iter().map(|((n, task_id), at)| ((name(n), task_id), at)).collect();
            lines.push(format!("failures {key:?} {failures:?}"));
        }
        lines.push(format!("waiting {:?}", self.waiting));
        lines.sort();
        lines
    }
}
