//! Which nodes a task may go to.

use skep_common::spec::{PlacementStrategy, Platform, PortProtocol};
use skep_common::{Node, Task};

use super::generic;
use super::index::{self, Amounts, Entry};
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
    pub(super) constraints: Vec<Constraint>,
    pub(super) platforms: Vec<Platform>,
    pub(super) ports: Vec<(PortProtocol, u16)>,
    /// 0 is unlimited.
    pub(super) replicas_max: u64,
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
/// [`first_miss`] and one in each function of `explain` that goes by filters, and rows in `tests`.
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
