//! The words for why a task waits: what each filter ruled out, and the node that came closest.
//!
//! A reason is a function of the state: the pass that writes it, the next pass, and whoever asks later
//! find the same words. So it names nothing that changes by itself, such as ages.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use skep_common::object::NodeState;
use skep_common::spec::{Availability, PortProtocol};
use skep_common::{Node, NodeId, ServiceId, Task};

use super::filter::{self, Filter, Requirement};
use super::index::{Amounts, Entry, Index};
use super::{generic, requirement};
use crate::allocator::SLICE_TASKS_MAX;
use crate::constraint::Constraint;
use crate::network;
use crate::placed::Placed;
use crate::store::State;

/// The longest reason, in bytes: it is written to every task that waits for it.
const REASON_LENGTH_MAX: usize = 512;

/// Why a task waits for a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// One sentence, as the scheduler writes it into the task.
    pub text: String,
    /// What each filter ruled out; empty where it is not a matter of nodes.
    pub filters: Vec<RuledOut>,
}

/// The nodes that one filter ruled out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuledOut {
    /// The filter.
    pub filter: &'static str,
    /// How many nodes passed those before it, and not this one.
    pub n_nodes: usize,
    /// The node of these that came closest, and what it lacks.
    pub nearest: String,
}

/// Why a task that has no node would wait, were the scheduler to look at it now; `None` where a node is
/// there for it. `index` is that of the state.
pub(crate) fn explain(state: &State, index: &Index, task: &Task) -> Option<Explanation> {
    let other = |text: String| Explanation { text: bounded(text), filters: Vec::new() };
    let requirement = match requirement(state, task.id) {
        Ok(requirement) => requirement,
        Err(reason) => return Some(other(reason)),
    };
    let case = Case { state, placed: &[], index, service_id: task.service_id };
    let misses = case.misses(&requirement, task.preset_node);
    if misses.has_fit {
        let attached = network::attach(state, &mut BTreeMap::new(), &requirement.networks);
        return attached.err().map(other);
    }
    let filters = misses.by_filter.iter().map(|(filter, entries)| RuledOut {
        filter: filter.name(),
        n_nodes: entries.len(),
        nearest: case.nearest(*filter, entries, &requirement),
    });
    Some(Explanation { filters: filters.collect(), text: case.text(&misses, &requirement) })
}

/// What a reason is about.
pub(super) struct Case<'a> {
    pub(super) state: &'a State,
    /// The tasks that got a node in this pass, which the state does not have yet.
    pub(super) placed: &'a [Placed],
    pub(super) index: &'a Index,
    pub(super) service_id: ServiceId,
}

/// The nodes that were asked, by what each lacks first.
struct Misses<'a> {
    by_filter: BTreeMap<Filter, Vec<&'a Entry>>,
    has_fit: bool,
}

impl Case<'_> {
    /// Why no node takes a task, or the only one that may.
    pub(super) fn reason(&self, requirement: &Requirement, only: Option<NodeId>) -> String {
        self.text(&self.misses(requirement, only), requirement)
    }

    fn misses(&self, requirement: &Requirement, only: Option<NodeId>) -> Misses<'_> {
        let counts = self.index.active_of_service(self.service_id);
        let mut misses = Misses { by_filter: BTreeMap::new(), has_fit: false };
        let is_asked = |entry: &Entry| entry.node.is_some() && only.is_none_or(|id| entry.id == id);
        let entries = self.index.entries().zip(counts).filter(|(entry, _)| is_asked(entry));
        for (entry, n_replicas) in entries {
            match filter::first_miss(entry, requirement, n_replicas) {
                Some(filter) => misses.by_filter.entry(filter).or_default().push(entry),
                None => misses.has_fit = true,
            }
        }
        misses
    }

    fn text(&self, misses: &Misses<'_>, requirement: &Requirement) -> String {
        if self.state.nodes().is_empty() {
            return "no suitable node (the swarm has no nodes)".to_owned();
        }
        let words = misses.by_filter.iter().map(|(filter, nodes)| filter.words(nodes.len()));
        let words = words.collect::<Vec<String>>().join("; ");
        let found = Filter::BY_USE.into_iter().find_map(|filter| {
            let entries = misses.by_filter.get(&filter)?;
            Some(self.nearest(filter, entries, requirement))
        });
        bounded(match found {
            Some(nearest) => format!("no suitable node ({words}): {nearest}"),
            None => format!("no suitable node ({words})"),
        })
    }

    /// Of the nodes that one filter ruled out, the one that came closest, and what it lacks.
    fn nearest(&self, filter: Filter, entries: &[&Entry], requirement: &Requirement) -> String {
        match filter {
            Filter::Ready => nearest_ready(entries),
            Filter::Constraint => self.nearest_by_constraints(entries, &requirement.constraints),
            Filter::Platform => nearest_platform(entries, requirement),
            Filter::Overlay => format!("{} balances in user space", name_of_first(entries)),
            Filter::Resource => nearest_by_resources(entries, &requirement.amounts),
            Filter::Generic => nearest_by_generic(entries, &requirement.generic),
            Filter::HostPort => self.nearest_by_ports(entries, &requirement.ports),
            Filter::Replicas => self.nearest_by_replicas(entries, requirement.replicas_max),
            Filter::Address => nearest_by_addresses(entries),
        }
    }

    /// The node that misses the fewest constraints.
    fn nearest_by_constraints(&self, entries: &[&Entry], constraints: &[Constraint]) -> String {
        let unmet = |entry: &Entry| -> Vec<&Constraint> {
            let node = entry.node.as_deref();
            let is_met =
                |constraint: &&Constraint| node.is_some_and(|node| constraint.matches(node));
            constraints.iter().filter(|constraint| !is_met(constraint)).collect()
        };
        let ranked = entries.iter().map(|entry| (unmet(entry), entry.id, *entry));
        let Some((unmet, _, entry)) = ranked.min_by_key(|(unmet, id, _)| (unmet.len(), *id)) else {
            return String::new();
        };
        let name = name(entry);
        let Some((first, others)) = unmet.split_first() else { return name };
        if !others.is_empty() {
            let n_others = others.len();
            let s = if n_others == 1 { "" } else { "s" };
            return format!("{name} does not meet {first} and {n_others} more constraint{s}");
        }
        let mut nodes = self.state.nodes().values();
        let is_lone = self.state.nodes().len() == 1;
        if !is_lone && nodes.all(|node| !first.matches(node)) {
            return format!("{name} does not meet {first}, nor does any other node");
        }
        format!("{name} does not meet {first}")
    }

    /// The node that has the fewest of the ports in use, and who holds one.
    fn nearest_by_ports(&self, entries: &[&Entry], wanted: &[(PortProtocol, u16)]) -> String {
        let taken = |entry: &Entry| -> Vec<(PortProtocol, u16)> {
            wanted.iter().filter(|port| entry.ports.contains_key(port)).copied().collect()
        };
        let ranked = entries.iter().map(|entry| (taken(entry), entry.id, *entry));
        let nearest = ranked.min_by_key(|(taken, id, _)| (taken.len(), *id));
        let Some((taken, node_id, entry)) = nearest else { return String::new() };
        let Some((protocol, port)) = taken.first() else { return String::new() };
        let text = format!("port {port}/{} of {} is held", protocol.name(), name(entry));
        match self.holder(node_id, (*protocol, *port)) {
            Some(holder) => format!("{text} by {holder}"),
            None => text,
        }
    }

    /// The task that holds a port of a node itself.
    fn holder(&self, node_id: NodeId, port: (PortProtocol, u16)) -> Option<String> {
        let placed = self.placed.iter().filter(|placed| placed.node_id == node_id);
        let placed = placed.filter_map(|placed| self.state.task_at(&placed.place));
        let tasks = self.state.tasks_of_node(node_id).chain(placed);
        let holds = |task: &&std::sync::Arc<Task>| {
            !task.status.state.is_terminal() && super::index::host_ports(task).contains(&port)
        };
        tasks.filter(holds).min_by_key(|task| task.id).map(|task| task.name())
    }

    fn nearest_by_replicas(&self, entries: &[&Entry], replicas_max: u64) -> String {
        let counts = self.index.active_of_service(self.service_id);
        let count = |entry: &Entry| {
            let number = self.index.number_of(entry.id);
            number.and_then(|number| counts.get(number).copied()).unwrap_or_default()
        };
        let ranked = entries.iter().map(|entry| (count(entry), entry.id, *entry));
        let Some((count, _, entry)) = ranked.min_by_key(|(count, id, _)| (*count, *id)) else {
            return String::new();
        };
        format!("{} has {count} of at most {replicas_max}", name(entry))
    }
}

impl Filter {
    /// The filters whose nearest miss says most of what to do, in that order.
    const BY_USE: [Self; 9] = [
        Self::Resource,
        Self::Generic,
        Self::HostPort,
        Self::Address,
        Self::Constraint,
        Self::Platform,
        Self::Overlay,
        Self::Replicas,
        Self::Ready,
    ];

    /// The filter for programs.
    fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Constraint => "constraint",
            Self::Platform => "platform",
            Self::Overlay => "overlay",
            Self::Resource => "resource",
            Self::Generic => "generic-resource",
            Self::HostPort => "host-port",
            Self::Replicas => "max-replicas",
            Self::Address => "address",
        }
    }

    /// SwarmKit's words (`Explain` of each filter) where it has that filter.
    fn words(self, n_nodes: usize) -> String {
        let nodes = if n_nodes == 1 { "1 node".to_owned() } else { format!("{n_nodes} nodes") };
        match self {
            Self::Ready => format!("{nodes} not available for new tasks"),
            Self::Constraint => format!("scheduling constraints not satisfied on {nodes}"),
            Self::Platform => format!("unsupported platform on {nodes}"),
            Self::Overlay if n_nodes == 1 => "1 node cannot carry overlay networks".to_owned(),
            Self::Overlay => format!("{nodes} cannot carry overlay networks"),
            Self::Resource => format!("insufficient resources on {nodes}"),
            Self::Generic => format!("insufficient generic resources on {nodes}"),
            Self::HostPort => format!("host-mode port already in use on {nodes}"),
            Self::Replicas => format!("max replicas per node limit exceeded on {nodes}"),
            Self::Address => format!("no free ingress address on {nodes}"),
        }
    }
}

/// The node that most likely takes tasks again.
fn nearest_ready(entries: &[&Entry]) -> String {
    let word = |entry: &Entry| {
        let Some(node) = entry.node.as_deref() else { return (6, "gone") };
        match (node.status.state, node.spec.availability) {
            (NodeState::Ready, Availability::Active) => (0, "ready"),
            (NodeState::Ready, Availability::Pause) => (1, "paused"),
            (NodeState::Ready, Availability::Drain) => (2, "drained"),
            (NodeState::Disconnected, _) => (3, "disconnected"),
            (NodeState::Unknown, _) => (4, "not heard of yet"),
            (NodeState::Down, _) => (5, "down"),
        }
    };
    let ranked = entries.iter().map(|entry| (word(entry), entry.id, *entry));
    let nearest = ranked.min_by_key(|((rank, _), id, _)| (*rank, *id));
    nearest.map_or_else(String::new, |((_, word), _, entry)| format!("{} is {word}", name(entry)))
}

fn nearest_platform(entries: &[&Entry], requirement: &Requirement) -> String {
    let Some(entry) = entries.iter().min_by_key(|entry| entry.id) else { return String::new() };
    let description = entry.node.as_deref().and_then(|node| node.description.as_ref());
    let own = description.map_or_else(String::new, |description| words(&description.platform));
    let wanted: Vec<String> = requirement.platforms.iter().map(words).collect();
    format!("{} is {own}, and {} is wanted", name(entry), wanted.join(" or "))
}

fn words(platform: &skep_common::spec::Platform) -> String {
    let parts = [platform.os.as_str(), platform.architecture.as_str()];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<&str>>().join("/")
}

/// Of the nodes that have too little, the one that lacks the smallest part.
fn nearest_by_resources(entries: &[&Entry], wanted: &Amounts) -> String {
    let share = |free: i64, wanted: i64| match wanted {
        1.. => i128::from(free.max(0)) * 1000 / i128::from(wanted),
        _ => 1000,
    };
    let best = entries.iter().max_by_key(|entry| {
        let cpu = share(entry.free.nano_cpus, wanted.nano_cpus);
        (cpu.min(share(entry.free.memory_bytes, wanted.memory_bytes)), Reverse(entry.id))
    });
    let Some(best) = best else { return String::new() };
    let lack = |wanted: i64, free: i64| if wanted > 0 { (wanted - free.max(0)).max(0) } else { 0 };
    let memory = lack(wanted.memory_bytes, best.free.memory_bytes);
    let cpu = lack(wanted.nano_cpus, best.free.nano_cpus);
    let memory = (memory > 0).then(|| format!("{} of memory", bytes(memory)));
    let cpu = (cpu > 0).then(|| match decimal(cpu, 1_000_000_000) {
        one if one == "1" => "1 CPU".to_owned(),
        many => format!("{many} CPUs"),
    });
    let lacks: Vec<String> = memory.into_iter().chain(cpu).collect();
    format!("{} lacks {}", name(best), lacks.join(" and "))
}

/// Of the nodes that have too little of a kind, the one that lacks least of it.
fn nearest_by_generic(entries: &[&Entry], wanted: &generic::Wanted) -> String {
    let short = entries.iter().filter_map(|entry| {
        let (kind, count) = entry.generic.lacks(wanted)?;
        Some((count - entry.generic.free(kind).max(0), entry.id, kind, *entry))
    });
    let nearest = short.min_by_key(|(lack, id, ..)| (*lack, *id));
    nearest.map_or_else(String::new, |(lack, _, kind, entry)| {
        format!("{} lacks {lack} {kind}", name(entry))
    })
}

fn nearest_by_addresses(entries: &[&Entry]) -> String {
    let Some(entry) = entries.iter().min_by_key(|entry| (entry.n_addresses_max == 0, entry.id))
    else {
        return String::new();
    };
    match entry.n_addresses_max {
        0 => format!("the pool of ingress addresses has none for {}", name(entry)),
        _ => format!("all {SLICE_TASKS_MAX} addresses of {} are in use", name(entry)),
    }
}

fn name_of_first(entries: &[&Entry]) -> String {
    entries.iter().min_by_key(|entry| entry.id).map_or_else(String::new, |entry| name(entry))
}

fn name(entry: &Entry) -> String {
    entry.node.as_deref().map_or_else(|| entry.id.short(), node_name)
}

/// The name by which people know a node.
pub fn node_name(node: &Node) -> String {
    let hostname = node.description.as_ref().map(|description| description.hostname.as_str());
    hostname.filter(|name| !name.is_empty()).map_or_else(|| node.id.short(), str::to_owned)
}

/// The reason as it is written.
pub(super) fn bounded(mut reason: String) -> String {
    const CUT: &str = "…";
    if reason.len() > REASON_LENGTH_MAX {
        let end = reason.floor_char_boundary(REASON_LENGTH_MAX - CUT.len());
        reason.truncate(end);
        reason.push_str(CUT);
    }
    reason
}

fn bytes(bytes: i64) -> String {
    let units = [("GiB", 1_i64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];
    let (unit, size) = units.into_iter().find(|(_, size)| bytes >= *size).unwrap_or(("B", 1));
    format!("{} {unit}", decimal(bytes, size))
}

/// A quotient rounded up to two places, without trailing zeros: of what is lacking, nothing is left out.
fn decimal(value: i64, unit: i64) -> String {
    let unit = i128::from(unit);
    let hundredths = (i128::from(value) * 100 + unit - 1) / unit;
    let text = format!("{}.{:02}", hundredths / 100, hundredths % 100);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
