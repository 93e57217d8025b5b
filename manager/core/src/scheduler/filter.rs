//! Which nodes a task may go to, and the words for why none is left.

use std::collections::BTreeMap;

use skep_common::spec::{PlacementStrategy, Platform, PortProtocol};
use skep_common::{Node, NodeId, ServiceId, Task};

use super::generic;
use super::index::{self, Amounts, Entry, Index};
use super::preference;
use crate::constraint::{self, Constraint, LabelKey};
use crate::network::{self, Wanted};
use crate::placed::Pinned;
use crate::store::State;

/// What a task needs of its node.
#[derive(Debug)]
pub(super) struct Requirement {
    pub(super) amounts: Amounts,
    /// Numbers of generic resources.
    pub(super) generic: generic::Wanted,
    constraints: Vec<Constraint>,
    platforms: Vec<Platform>,
    pub(super) ports: Vec<(PortProtocol, u16)>,
    /// 0 is unlimited.
    replicas_max: u64,
    /// The spec with the digest of the image, where the service's has none: one for all tasks.
    pub(super) pinned: Option<Pinned>,
    /// The networks to be on.
    pub(super) networks: Vec<Wanted>,
    /// What tasks are spread over first.
    pub(super) preferences: Vec<LabelKey>,
    /// Which of the nodes that fit comes first.
    pub(super) strategy: PlacementStrategy,
    /// Whether an address of the node's slice is needed.
    pub(super) has_uplink: bool,
}

impl Requirement {
    /// An error is the reason for the task to wait, whatever the nodes have.
    pub(super) fn of(state: &State, task: &Task) -> Result<Self, String> {
        let networks = network::wanted_by(state, &task.spec)?;
        let service = state.service(task.service_id).map(|service| &**service);
        let placement = task.spec.placement.clone().unwrap_or_default();
        let preferences = preference::parse_all(Some(&placement))?;
        Ok(Self {
            amounts: Amounts::reserved_by(&task.spec),
            generic: generic::wanted(&task.spec),
            constraints: constraint::parse_all(
                placement.constraints.as_deref().unwrap_or_default(),
            )
            .map_err(|error| error.to_string())?,
            platforms: placement.platforms.unwrap_or_default(),
            ports: index::host_ports(task),
            replicas_max: placement.max_replicas.unwrap_or(0),
            pinned: None,
            preferences,
            strategy: placement.strategy.unwrap_or_else(|| default_strategy(state)),
            has_uplink: network::wants_uplink(service, &task.spec, &networks),
            networks,
        })
    }

    /// Whether CPU or memory is reserved.
    pub(super) fn reserves(&self) -> bool {
        self.amounts != Amounts::default()
    }
}

/// The swarm's strategy, for services that name none.
fn default_strategy(state: &State) -> PlacementStrategy {
    let orchestration = state.cluster().and_then(|cluster| cluster.spec.orchestration.as_ref());
    orchestration.and_then(|config| config.strategy).unwrap_or_default()
}

/// The filters in the order in which a node meets them: first what no placement changes, so that the
/// nearest miss is one of a node that could have had the task. A new filter gets a line in
/// [`first_miss`] and one in [`Filter::words`], and rows in `tests`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Filter {
    Ready,
    Constraint,
    Platform,
    Overlay,
    Resource,
    Generic,
    HostPort,
    Replicas,
    Address,
}

impl Filter {
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

/// The first filter that refuses a node; `n_replicas` counts the service's active tasks there.
pub(super) fn first_miss(
    entry: &Entry,
    requirement: &Requirement,
    n_replicas: u32,
) -> Option<Filter> {
    let Some(node) = entry.node.as_deref().filter(|_| entry.is_ready) else {
        return Some(Filter::Ready);
    };
    let amounts = &requirement.amounts;
    let is_short = |wanted: i64, free: i64| wanted > 0 && wanted > free;
    let lacks_replicas =
        requirement.replicas_max > 0 && u64::from(n_replicas) >= requirement.replicas_max;
    // One question after the other: most nodes of a large swarm are asked for every group.
    if !constraint::matches_all(&requirement.constraints, node) {
        Some(Filter::Constraint)
    } else if !runs_platform(node, &requirement.platforms) {
        Some(Filter::Platform)
    } else if !requirement.networks.is_empty() && !carries_overlays(node) {
        Some(Filter::Overlay)
    } else if is_short(amounts.nano_cpus, entry.free.nano_cpus)
        || is_short(amounts.memory_bytes, entry.free.memory_bytes)
    {
        Some(Filter::Resource)
    } else if entry.generic.lacks(&requirement.generic).is_some() {
        Some(Filter::Generic)
    } else if requirement.ports.iter().any(|port| entry.ports.contains_key(port)) {
        Some(Filter::HostPort)
    } else if lacks_replicas {
        Some(Filter::Replicas)
    } else if requirement.has_uplink && entry.n_addresses >= entry.n_addresses_max {
        Some(Filter::Address)
    } else {
        None
    }
}

fn runs_platform(node: &Node, platforms: &[Platform]) -> bool {
    if platforms.is_empty() {
        return true;
    }
    let Some(description) = &node.description else { return false };
    let own = &description.platform;
    platforms.iter().any(|platform| {
        let is_os = platform.os.is_empty() || platform.os.eq_ignore_ascii_case(&own.os);
        let wanted = architecture(&platform.architecture);
        is_os && (wanted.is_empty() || wanted == architecture(&own.architecture))
    })
}

/// Whether overlay networks reach the node: by a tunnel, and rules for their virtual addresses.
pub(crate) fn carries_overlays(node: &Node) -> bool {
    !node.description.as_ref().is_some_and(|description| description.is_in_user_space())
}

fn architecture(name: &str) -> &str {
    match name {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Why no node takes a task, or the only one that may, with the number of nodes per filter and the nearest miss.
pub(super) fn explain(
    state: &State,
    index: &Index,
    service_id: ServiceId,
    requirement: &Requirement,
    only: Option<NodeId>,
) -> String {
    let counts = index.active_of_service(service_id);
    let mut missed: BTreeMap<Filter, Vec<&Entry>> = BTreeMap::new();
    let is_asked = |entry: &Entry| entry.node.is_some() && only.is_none_or(|id| entry.id == id);
    let entries = index.entries().zip(counts).filter(|(entry, _)| is_asked(entry));
    for (entry, n_replicas) in entries {
        if let Some(filter) = first_miss(entry, requirement, n_replicas) {
            missed.entry(filter).or_default().push(entry);
        }
    }
    if state.nodes().is_empty() {
        return "no suitable node (the swarm has no nodes)".to_owned();
    }
    let words: Vec<String> =
        missed.iter().map(|(filter, nodes)| filter.words(nodes.len())).collect();
    let words = words.join("; ");
    let nearest = missed
        .get(&Filter::Resource)
        .and_then(|nodes| nearest_by_resources(nodes, &requirement.amounts))
        .or_else(|| nearest_by_generic(missed.get(&Filter::Generic)?, &requirement.generic))
        .or_else(|| unmet_constraint(missed.get(&Filter::Constraint)?, requirement));
    match nearest {
        Some(nearest) => format!("no suitable node ({words}): {nearest}"),
        None => format!("no suitable node ({words})"),
    }
}

/// Of the nodes that have too little, the one that lacks the smallest part.
fn nearest_by_resources(nodes: &[&Entry], wanted: &Amounts) -> Option<String> {
    let share = |free: i64, wanted: i64| match wanted {
        1.. => i128::from(free.max(0)) * 1000 / i128::from(wanted),
        _ => 1000,
    };
    let shares = |entry: &Entry| {
        let cpu = share(entry.free.nano_cpus, wanted.nano_cpus);
        (cpu, share(entry.free.memory_bytes, wanted.memory_bytes))
    };
    let best = nodes.iter().rev().max_by_key(|entry| {
        let (cpu, memory) = shares(entry);
        (cpu.min(memory), std::cmp::Reverse(entry.id))
    })?;
    let (cpu, memory) = shares(best);
    let name = best.node.as_deref().map_or_else(|| best.id.short(), node_name);
    Some(if memory <= cpu {
        let (free, wanted) = (bytes(best.free.memory_bytes), bytes(wanted.memory_bytes));
        format!("most free memory: {free} on {name}, {wanted} wanted")
    } else {
        let (free, wanted) = (cpus(best.free.nano_cpus), cpus(wanted.nano_cpus));
        format!("most free CPU: {free} on {name}, {wanted} wanted")
    })
}

/// Of the nodes that have too little of a kind, the one that has most of it.
fn nearest_by_generic(nodes: &[&Entry], wanted: &generic::Wanted) -> Option<String> {
    let short = nodes.iter().filter_map(|entry| {
        let (kind, count) = entry.generic.lacks(wanted)?;
        Some((std::cmp::Reverse(entry.generic.free(kind).max(0)), entry.id, kind, count, entry))
    });
    let (std::cmp::Reverse(free), _, kind, count, entry) =
        short.min_by_key(|(free, id, ..)| (*free, *id))?;
    let name = entry.node.as_deref().map_or_else(|| entry.id.short(), node_name);
    Some(format!("most free {kind}: {free} on {name}, {count} wanted"))
}

/// A constraint that none of these nodes meets.
fn unmet_constraint(nodes: &[&Entry], requirement: &Requirement) -> Option<String> {
    let is_unmet = |constraint: &&Constraint| {
        !nodes.iter().filter_map(|entry| entry.node.as_deref()).any(|node| constraint.matches(node))
    };
    let constraint = requirement.constraints.iter().find(is_unmet)?;
    Some(format!("none of them has {constraint}"))
}

/// The name by which people know a node.
pub fn node_name(node: &Node) -> String {
    let hostname = node.description.as_ref().map(|description| description.hostname.as_str());
    hostname.filter(|name| !name.is_empty()).map_or_else(|| node.id.short(), str::to_owned)
}

fn bytes(bytes: i64) -> String {
    let bytes = bytes.max(0);
    let units = [("GiB", 1_i64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];
    let (unit, size) = units.into_iter().find(|(_, size)| bytes >= *size).unwrap_or(("B", 1));
    format!("{} {unit}", decimal(bytes, size))
}

fn cpus(nano_cpus: i64) -> String {
    decimal(nano_cpus.max(0), 1_000_000_000)
}

/// A quotient rounded down to two places, without trailing zeros.
fn decimal(value: i64, unit: i64) -> String {
    let hundredths = i128::from(value) * 100 / i128::from(unit);
    let text = format!("{}.{:02}", hundredths / 100, hundredths % 100);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
