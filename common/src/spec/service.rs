//! `ServiceSpec`, `TaskSpec` and their policies.

use serde::{Deserialize, Serialize};

use super::{
    ContainerSpec, Extra, GenericResource, Labels, LogDriver, Nanos, NetworkAttachmentConfig,
    Placement, ServiceMode,
};

/// What a service shall be.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ServiceSpec {
    /// Unique name.
    pub name: String,
    /// Labels of the service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
    /// The template of its tasks.
    pub task_template: TaskSpec,
    /// How many tasks; absent is one replica.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<ServiceMode>,
    /// How tasks are replaced; absent is one at a time, stop-first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_config: Option<UpdateConfig>,
    /// How tasks are replaced when the previous spec comes back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollback_config: Option<UpdateConfig>,
    /// Published ports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint_spec: Option<EndpointSpec>,
    /// Networks as old clients write them; [`TaskSpec::networks`] comes before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub networks: Option<Vec<NetworkAttachmentConfig>>,
    /// Kept whole.
    #[serde(flatten)]
    pub extra: Extra,
}

impl ServiceSpec {
    /// The container part of the task template; an absent one reads as empty.
    pub fn container(&self) -> std::borrow::Cow<'_, ContainerSpec> {
        self.task_template
            .container_spec
            .as_ref()
            .map_or_else(Default::default, std::borrow::Cow::Borrowed)
    }

    /// The networks that its tasks are on, in the order in which they are named.
    pub fn networks(&self) -> &[NetworkAttachmentConfig] {
        let of_task =
            self.task_template.networks.as_deref().filter(|networks| !networks.is_empty());
        of_task.or(self.networks.as_deref()).unwrap_or_default()
    }

    /// Whether its names mean the tasks' addresses instead of a virtual one.
    pub fn is_dnsrr(&self) -> bool {
        let mode = self.endpoint_spec.as_ref().and_then(|spec| spec.mode.as_deref());
        mode == Some("dnsrr")
    }

    /// The published ports; none where no endpoint spec is given.
    pub fn ports(&self) -> &[PortConfig] {
        self.endpoint_spec.as_ref().and_then(|spec| spec.ports.as_deref()).unwrap_or_default()
    }
}

/// The template of a service's tasks.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TaskSpec {
    /// The container.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_spec: Option<ContainerSpec>,
    /// Limits and reservations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
    /// What happens when a task ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restart_policy: Option<RestartPolicy>,
    /// Where tasks may run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
    /// A counter; raising it replaces every task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub force_update: Option<u64>,
    /// How much of its output is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_driver: Option<LogDriver>,
    /// Networks that the tasks are on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub networks: Option<Vec<NetworkAttachmentConfig>>,
    /// Kept and not acted on yet: Runtime, PluginSpec, ….
    #[serde(flatten)]
    pub extra: Extra,
}

/// Limits (enforced by the kernel) and reservations (subtracted by the scheduler).
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ResourceRequirements {
    /// What a container may use at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<Resources>,
    /// What a node must have free.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reservations: Option<Resources>,
    /// Kept and not acted on yet: SwapBytes, MemorySwappiness.
    #[serde(flatten)]
    pub extra: Extra,
}

/// Amounts of a node's resources.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Resources {
    /// Nano-CPUs; 10⁹ is one core.
    #[serde(rename = "NanoCPUs", skip_serializing_if = "Option::is_none")]
    pub nano_cpus: Option<i64>,
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<i64>,
    /// Processes and threads (limits only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids: Option<i64>,
    /// What a node says it has beside (reservations and nodes only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generic_resources: Option<Vec<GenericResource>>,
    /// Kept and not acted on.
    #[serde(flatten)]
    pub extra: Extra,
}

/// What happens when a task ends. Absent fields: any, 5 s, unlimited, unbounded.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RestartPolicy {
    /// Which ends are followed by a new task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub condition: Option<RestartCondition>,
    /// Between the end and the new task's start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delay: Option<Nanos>,
    /// Restarts within the window; 0 is unlimited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<u64>,
    /// Time over which attempts count; 0 is unbounded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<Nanos>,
}

/// Which ends of a task are followed by a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartCondition {
    /// None.
    None,
    /// Those with an error.
    OnFailure,
    /// All.
    #[default]
    Any,
}

/// An operating system and a processor architecture.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Platform {
    /// `amd64` or `x86_64` (the same), `arm64` or `aarch64` (the same).
    #[serde(rename = "Architecture")]
    pub architecture: String,
    /// `linux`.
    #[serde(rename = "OS")]
    pub os: String,
}

/// How tasks are replaced. Absent fields: 1, 0 s, pause, 5 s, 0, stop-first.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct UpdateConfig {
    /// Slots replaced at once; 0 is all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parallelism: Option<u64>,
    /// Between one slot's replacement and the next one's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delay: Option<Nanos>,
    /// `pause`, `continue` or `rollback`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_action: Option<String>,
    /// A task that ends within this time after it ran counts as a failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub monitor: Option<Nanos>,
    /// Failures to tolerate, as a part of the slots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_failure_ratio: Option<f64>,
    /// `stop-first` or `start-first`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<String>,
    /// A task that is not running after this time counts as a failure; absent is ten minutes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress_deadline: Option<Nanos>,
}

/// How clients reach a service.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct EndpointSpec {
    /// `vip` or `dnsrr`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// Published ports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<PortConfig>>,
    /// Where nodes send connections to ports in ingress mode; absent is spread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingress_policy: Option<IngressPolicy>,
}

/// Which tasks a node sends connections to that come in through it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IngressPolicy {
    /// All healthy tasks of the service, in turn.
    #[default]
    Spread,
    /// Those on the node itself, where it has healthy ones; otherwise all.
    Local,
}

impl IngressPolicy {
    /// The name as JSON has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Spread => "spread",
            Self::Local => "local",
        }
    }

    /// The policy of that name.
    pub fn of(name: &str) -> Option<Self> {
        [Self::Spread, Self::Local].into_iter().find(|policy| policy.name() == name)
    }
}

/// One published port.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PortConfig {
    /// A name for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Absent is tcp.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<PortProtocol>,
    /// The port inside the container.
    pub target_port: u16,
    /// The port on every node; absent or 0 is one of 30000–32767.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub published_port: Option<u16>,
    /// Absent is ingress.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub publish_mode: Option<PublishMode>,
    /// How tasks are told of clients; absent: not at all, since they see the clients' own addresses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
}

/// The header with the client's address that a task reads before all else of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyProtocol {
    /// Version 2, which is binary.
    V2,
}

impl ProxyProtocol {
    /// The name as JSON has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V2 => "v2",
        }
    }

    /// The version of that name.
    pub fn of(name: &str) -> Option<Self> {
        [Self::V2].into_iter().find(|version| version.name() == name)
    }
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortProtocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl PortProtocol {
    /// The protocol of that name.
    pub fn of(name: &str) -> Option<Self> {
        [Self::Tcp, Self::Udp, Self::Sctp].into_iter().find(|protocol| protocol.name() == name)
    }

    /// The name as JSON has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// Where a port is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PublishMode {
    /// On every node, balanced over all tasks.
    #[default]
    Ingress,
    /// On the task's node alone.
    Host,
}
