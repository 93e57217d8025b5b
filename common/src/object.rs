//! What the store holds: spec, bookkeeping and status together.
//!
//! Field names are Docker's where Docker has such an object; [`Stack`] and [`Image`] are ours.
//! Managers write everything but [`TaskStatus`] from `Accepted` on, [`NodeDescription`] and the
//! container's facts, which the node's agent reports.

mod attempt;
mod identity;
mod node;
mod payload;
mod revision;
mod slot;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

pub use attempt::Attempt;
pub use identity::{RootRotation, TlsInfo};
pub use node::{
    EngineDescription, IngressBalancer, IngressDescription, ManagerStatus, NODE_PORT, Node,
    NodeDescription, NodeState, NodeStatus, PortCondition, ServiceCondition,
};
pub use payload::{Config, DataVersion, Secret};
pub use revision::{JobStatus, Revision};
pub use slot::Slot;

use crate::spec::Nanos;
use crate::spec::{
    Base64, Extra, GenericResource, Labels, NetworkSpec, NodeRole, PortConfig, ServiceSpec,
    StackSpec, SwarmSpec, TaskSpec,
};
use crate::{
    ClusterId, ImageId, NetworkId, NodeId, ServiceId, StackId, TaskId, TaskState, Timestamp,
};

/// The Raft index of an object's last write: the precondition of an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Version {
    /// Raft index.
    pub index: u64,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.index.fmt(f)
    }
}

/// Bookkeeping that the store writes on every change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Meta {
    /// Raft index of the last write.
    pub version: Version,
    /// When it was made, by the proposer's clock.
    pub created_at: Timestamp,
    /// When it was last written, by the proposer's clock.
    pub updated_at: Timestamp,
}

/// The swarm: settings, join tokens and the certificate authority.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Cluster {
    /// Id.
    #[serde(rename = "ID")]
    pub id: ClusterId,
    /// Bookkeeping.
    #[serde(flatten)]
    pub meta: Meta,
    /// What users ask.
    pub spec: SwarmSpec,
    /// The secret part of the join tokens.
    pub join_tokens: JoinTokens,
    /// Certificate of the root, PEM.
    pub root_ca_cert: String,
    /// Private key of the root, PEM. Never leaves the managers; the log is sealed.
    pub root_ca_key: String,
    /// Pool of ingress slices: one per node, by node number.
    pub ingress_pool: Ipv4Net,
    /// Pools that networks without a subnet of their own get one from; empty is the default pool.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub default_addr_pool: Vec<Ipv4Net>,
    /// Prefix length of such a subnet; 0 is the default.
    #[serde(default, skip_serializing_if = "is_zero_prefix")]
    pub subnet_size: u8,
    /// The root that takes the place of this one, while it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root_rotation: Option<RootRotation>,
    /// What managers that start locked are unlocked with: 32 bytes. Never leaves the managers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unlock_key: Option<Base64>,
    /// Raised with each change of the unlock key.
    #[serde(default, skip_serializing_if = "is_zero_u64")]
    pub unlock_key_version: u64,
    /// Removed nodes that are refused, until their certificates have long ended.
    #[serde(
        rename = "BlacklistedCertificates",
        default,
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub blacklisted: BTreeMap<NodeId, Timestamp>,
    /// How long certificates were good before that was shortened: some of then may be good still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub longest_node_cert_expiry: Option<Nanos>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_zero_u64(number: &u64) -> bool {
    *number == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_zero_prefix(prefix: &u8) -> bool {
    *prefix == 0
}

/// Secrets of the join tokens: 25 characters of base 36 each.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct JoinTokens {
    /// Makes a worker of its bearer.
    pub worker: String,
    /// Makes a manager of its bearer.
    pub manager: String,
}

impl std::fmt::Debug for JoinTokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JoinTokens(…)")
    }
}

/// A service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Service {
    /// Id.
    #[serde(rename = "ID")]
    pub id: ServiceId,
    /// Bookkeeping.
    #[serde(flatten)]
    pub meta: Meta,
    /// What users ask.
    pub spec: ServiceSpec,
    /// The spec before the last update.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous_spec: Option<ServiceSpec>,
    /// Version of the last change of `spec`; tasks carry the one they were made from.
    pub spec_version: Version,
    /// The last update's progress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_status: Option<UpdateStatus>,
    /// Ports as allocated.
    #[serde(default)]
    pub endpoint: Endpoint,
    /// `service rm` was asked: its tasks are stopped and deleted, then the service itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pending_delete: bool,
    /// What keeps it from being reached; filled in by the manager that answers, never stored.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<ServiceCondition>,
    /// How far it is, where it is a job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_status: Option<JobStatus>,
    /// The number of its spec among all that it had; 0 is the first.
    #[serde(default, skip_serializing_if = "is_zero_u64")]
    pub revision: u64,
}

/// An update's progress.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct UpdateStatus {
    /// `updating`, `paused`, `completed`, `rollback_started`, `rollback_paused`, `rollback_completed`.
    pub state: String,
    /// When it began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completed_at: Option<Timestamp>,
    /// For people.
    pub message: String,
}

/// A service's ports and addresses as allocated.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Endpoint {
    /// Every published port with its number; dynamic ones keep theirs across updates.
    pub ports: Vec<PortConfig>,
    /// Its address on each of its networks, where it has one; kept across updates.
    #[serde(rename = "VirtualIPs", skip_serializing_if = "Vec::is_empty")]
    pub virtual_ips: Vec<VirtualIp>,
    /// Kept and not acted on yet: Spec.
    #[serde(flatten)]
    pub extra: Extra,
}

/// An address that stands for all healthy tasks of a service on one network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtualIp {
    /// The network.
    #[serde(rename = "NetworkID")]
    pub network_id: NetworkId,
    /// The address, with the prefix of its subnet. A network with IPv6 has two for each service.
    #[serde(rename = "Addr")]
    pub addr: IpNet,
}

/// A task: one replica on one node. It is never moved, and restarted by its node alone, while no manager leads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Task {
    /// Id.
    #[serde(rename = "ID")]
    pub id: TaskId,
    /// Bookkeeping.
    #[serde(flatten)]
    pub meta: Meta,
    /// The task template it was made from; tasks of one version share it.
    pub spec: Arc<TaskSpec>,
    /// Version of the service's spec it was made from.
    pub spec_version: Version,
    /// Its service.
    #[serde(rename = "ServiceID")]
    pub service_id: ServiceId,
    /// Replica number, from 1, of jobs from 0; 0 where [`Self::preset_node`] takes its place.
    pub slot: u64,
    /// Its node, from `Assigned` on.
    #[serde(rename = "NodeID", default, skip_serializing_if = "Option::is_none")]
    pub node_id: Option<NodeId>,
    /// What happened.
    pub status: TaskStatus,
    /// What managers want. Only grows.
    pub desired_state: TaskState,
    /// Its addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks_attachments: Vec<NetworkAttachment>,
    /// Its service's name when it was made: `service.slot` names it to people.
    pub service_name: String,
    /// A task with desired state `Ready` may run from this moment on (restart delay).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_after: Option<Timestamp>,
    /// The ports that it publishes on its node in host mode; one without a number is given a free one
    /// by the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_ports: Vec<PortConfig>,
    /// Set where no service made it, but a user of its node: then its id is its service's too, and its own
    /// name is in place of the service's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standalone: Option<Standalone>,
    /// The iteration of the job that it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_iteration: Option<Version>,
    /// The only node that it may be on, known before it is placed: it is that node's of its service.
    #[serde(rename = "PresetNodeID", default, skip_serializing_if = "Option::is_none")]
    pub preset_node: Option<NodeId>,
    /// Which of its node's it was given.
    #[serde(rename = "GenericResources", default, skip_serializing_if = "Vec::is_empty")]
    pub assigned_generic_resources: Vec<GenericResource>,
    /// Its service's labels when it was made, where its templates name them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_labels: Option<Labels>,
}

/// What is particular about a task that no service made.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Standalone {
    /// Whether it is removed once it has ended.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub auto_remove: bool,
}

impl Task {
    /// Its place in its service.
    pub fn slot_key(&self) -> Slot {
        self.preset_node.map_or(Slot::Replica(self.slot), Slot::Node)
    }

    /// `service.slot`, as lists show it, or `service.node` with the node's id; its own name where no
    /// service made it.
    pub fn name(&self) -> String {
        match self.standalone {
            Some(_) => self.service_name.clone(),
            None => format!("{}.{}", self.service_name, self.slot_key()),
        }
    }

    /// The name of its container: `service.slot.task`, or its own where no service made it.
    pub fn container_name(&self) -> String {
        match self.standalone {
            Some(_) => self.service_name.clone(),
            None => format!("{}.{}", self.name(), self.id),
        }
    }

    /// The address of its uplink, once the allocator granted one.
    pub fn ingress_address(&self) -> Option<Ipv4Addr> {
        self.networks_attachments.iter().find(|attachment| attachment.ingress).map(|a| a.address)
    }
}

/// A task's place on one network, or its uplink.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct NetworkAttachment {
    /// Whether it is the uplink on the node's ingress bridge.
    pub ingress: bool,
    /// The address.
    pub address: Ipv4Addr,
    /// Bits of its network's prefix.
    pub prefix: u8,
    /// The overlay network; absent for the uplink.
    #[serde(rename = "NetworkID", default, skip_serializing_if = "Option::is_none")]
    pub network_id: Option<NetworkId>,
    /// The IPv6 address with its prefix, where the network has IPv6.
    #[serde(rename = "IPv6", default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Net>,
    /// More names of the service on this network.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
}

impl NetworkAttachment {
    /// The uplink at `address`, in a slice with a prefix of so many bits.
    pub fn uplink(address: Ipv4Addr, prefix: u8) -> Self {
        Self { ingress: true, address, prefix, network_id: None, ipv6: None, aliases: Vec::new() }
    }
}

/// What happened to a task.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TaskStatus {
    /// When the state was reached, by the clock of who wrote it.
    pub timestamp: Timestamp,
    /// Only grows.
    pub state: TaskState,
    /// For people: what is going on.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// For people: what went wrong, or what a waiting task waits for.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub err: String,
    /// The container's facts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_status: Option<ContainerStatus>,
    /// When the leader wrote the state; manager clocks outrank worker clocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub applied_at: Option<Timestamp>,
    /// A running task whose health check fails gets no connection and is replaced.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub unhealthy: bool,
    /// The ports that its node publishes for it in host mode, while its container runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port_status: Option<PortStatus>,
    /// Host names of the nodes that had not said that they balance to it no more when it was stopped:
    /// connections that they gave it meanwhile may have been lost. Written by the leader alone.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unacknowledged: Vec<String>,
    /// Containers of it that its node followed by others while no manager led, the newest last.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub attempts: Vec<Attempt>,
    /// How many there were in all.
    #[serde(skip_serializing_if = "is_zero_u32")]
    pub n_attempts: u32,
}

impl TaskStatus {
    /// What people should know of it beside the state; empty where there is nothing.
    pub fn remark(&self) -> String {
        let mut remarks = Vec::new();
        if !self.err.is_empty() {
            remarks.push(self.err.clone());
        }
        if !self.unacknowledged.is_empty() {
            let nodes = self.unacknowledged.join(", ");
            remarks.push(format!("stopped without the acknowledgement of {nodes}"));
        }
        if self.n_attempts > 0 {
            let times = if self.n_attempts == 1 { "time" } else { "times" };
            let n_attempts = self.n_attempts;
            remarks.push(format!("started again {n_attempts} {times} while no manager led"));
        }
        remarks.join("; ")
    }
}

/// What a node publishes for one task alone.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PortStatus {
    /// The ports with their numbers on the node.
    pub ports: Vec<PortConfig>,
}

/// A container's facts.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerStatus {
    /// Its id on the node: the task's.
    #[serde(rename = "ContainerID")]
    pub container_id: String,
    /// Process id of its first process on the node; 0 once it ended.
    #[serde(rename = "PID")]
    pub pid: i32,
    /// Exit code, once it ended; 128 + n after signal n.
    #[serde(rename = "ExitCode")]
    pub exit_code: i32,
    /// Whether the kernel killed a process of it for want of memory.
    #[serde(rename = "OOMKilled", skip_serializing_if = "std::ops::Not::not")]
    pub oom_killed: bool,
}

/// A network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Network {
    /// Id.
    #[serde(rename = "ID")]
    pub id: NetworkId,
    /// Bookkeeping.
    #[serde(flatten)]
    pub meta: Meta,
    /// What users ask.
    pub spec: NetworkSpec,
    /// Its VXLAN network identifier, unique; 0 for the ingress network, whose tunnel has its own.
    #[serde(rename = "VNI", default, skip_serializing_if = "is_zero_u32")]
    pub vni: u32,
    /// Its subnets as allocated: one IPv4, and one IPv6 where that is enabled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subnets: Vec<Subnet>,
    /// `network rm` was asked while tasks on their way out are still on it: its name is free, and it
    /// is erased with the last of them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pending_delete: bool,
}

/// A subnet of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Subnet {
    /// The subnet.
    pub subnet: IpNet,
    /// The address that no endpoint gets.
    pub gateway: IpAddr,
    /// Where endpoints' addresses come from; absent is the whole subnet.
    #[serde(rename = "IPRange", default, skip_serializing_if = "Option::is_none")]
    pub ip_range: Option<IpNet>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_zero_u32(number: &u32) -> bool {
    *number == 0
}

/// A stack.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Stack {
    /// Id.
    #[serde(rename = "ID")]
    pub id: StackId,
    /// Bookkeeping.
    #[serde(flatten)]
    pub meta: Meta,
    /// What users ask.
    pub spec: StackSpec,
}

/// What an image name means in this swarm, and who has its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Image {
    /// Id.
    #[serde(rename = "ID")]
    pub id: ImageId,
    /// Bookkeeping.
    #[serde(flatten)]
    pub meta: Meta,
    /// Normalised name: `docker.io/library/whoami:latest`.
    pub name: String,
    /// Digest of the manifest that the name means now: `sha256:…`.
    pub digest: String,
    /// Bytes of all its blobs.
    pub size: u64,
    /// When the image was made, as its config says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// Nodes that hold all its blobs.
    pub holders: std::collections::BTreeSet<NodeId>,
}

/// Kinds of objects in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "each is the object of that name")]
pub enum Kind {
    Cluster,
    Node,
    Service,
    Task,
    Network,
    Secret,
    Config,
    Stack,
    Image,
    Revision,
}

impl Kind {
    /// The word for it in messages, and for clients.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Node => "node",
            Self::Service => "service",
            Self::Task => "task",
            Self::Network => "network",
            Self::Secret => "secret",
            Self::Config => "config",
            Self::Stack => "stack",
            Self::Image => "image",
            Self::Revision => "revision",
        }
    }
}

/// Any object of the store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "each is the object of that name")]
pub enum Object {
    Cluster(Box<Cluster>),
    Node(Box<Node>),
    Service(Box<Service>),
    Task(Box<Task>),
    Network(Box<Network>),
    Secret(Box<Secret>),
    Config(Box<Config>),
    Stack(Box<Stack>),
    Image(Box<Image>),
    Revision(Box<Revision>),
}

impl Object {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Cluster(_) => Kind::Cluster,
            Self::Node(_) => Kind::Node,
            Self::Service(_) => Kind::Service,
            Self::Task(_) => Kind::Task,
            Self::Network(_) => Kind::Network,
            Self::Secret(_) => Kind::Secret,
            Self::Config(_) => Kind::Config,
            Self::Stack(_) => Kind::Stack,
            Self::Image(_) => Kind::Image,
            Self::Revision(_) => Kind::Revision,
        }
    }

    /// The 128 bits of its id; of a revision, those of its service's.
    pub fn raw_id(&self) -> u128 {
        match self {
            Self::Cluster(object) => object.id.0,
            Self::Node(object) => object.id.0,
            Self::Service(object) => object.id.0,
            Self::Task(object) => object.id.0,
            Self::Network(object) => object.id.0,
            Self::Secret(object) => object.id.0,
            Self::Config(object) => object.id.0,
            Self::Stack(object) => object.id.0,
            Self::Image(object) => object.id.0,
            Self::Revision(object) => object.service_id.0,
        }
    }

    /// Its bookkeeping.
    pub fn meta(&self) -> &Meta {
        match self {
            Self::Cluster(object) => &object.meta,
            Self::Node(object) => &object.meta,
            Self::Service(object) => &object.meta,
            Self::Task(object) => &object.meta,
            Self::Network(object) => &object.meta,
            Self::Secret(object) => &object.meta,
            Self::Config(object) => &object.meta,
            Self::Stack(object) => &object.meta,
            Self::Image(object) => &object.meta,
            Self::Revision(object) => &object.meta,
        }
    }
}

// Numbers come from JSON, which has none that differs from itself. With this, what two states share is seen to be the
// same by its address, and not compared in depth.
impl Eq for Cluster {}
impl Eq for Node {}
impl Eq for Service {}
impl Eq for Task {}
impl Eq for TaskSpec {}
impl Eq for Network {}
impl Eq for Secret {}
impl Eq for Config {}
impl Eq for Stack {}
impl Eq for Revision {}

impl NodeRole {
    /// The `OU` of a certificate, and the host name that a server of this role answers to.
    pub fn organizational_unit(self) -> &'static str {
        match self {
            Self::Worker => "swarm-worker",
            Self::Manager => "swarm-manager",
        }
    }
}
