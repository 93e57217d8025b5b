//! Machines of the swarm: what is asked of them, what they say of themselves, how they are.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use super::{Meta, TlsInfo, is_zero_u32};
use crate::spec::{Extra, NodeRole, NodeSpec, Platform, PortProtocol, Resources};
use crate::wireguard::WireguardDescription;
use crate::{NodeId, ServiceId};

/// A machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Node {
    /// Id; the CN of its certificate.
    #[serde(rename = "ID")]
    pub id: NodeId,
    /// Bookkeeping.
    #[serde(flatten)]
    pub meta: Meta,
    /// What users ask.
    pub spec: NodeSpec,
    /// What the node says of itself; absent until its first session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<NodeDescription>,
    /// Whether it is alive.
    pub status: NodeStatus,
    /// Its Raft member, where it is a manager.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manager_status: Option<ManagerStatus>,
    /// From 1, unique: names its ingress slice, tunnel address and packet mark.
    pub number: u16,
    /// The role it has, where that differs for a while from the one that is asked of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<NodeRole>,
}

impl Node {
    /// The role that it has, whichever is asked of it.
    pub fn observed_role(&self) -> NodeRole {
        self.role.unwrap_or(self.spec.role)
    }

    /// `ip:port` at which other nodes reach it.
    pub fn address(&self) -> String {
        format!("{}:{}", self.status.addr, self.port())
    }

    /// Where it listens at that address.
    pub fn port(&self) -> u16 {
        if self.status.port == 0 { NODE_PORT } else { self.status.port }
    }

    /// Its host name; empty until its first session.
    pub fn hostname(&self) -> &str {
        self.description.as_ref().map_or("", |description| &description.hostname)
    }
}

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NodeDescription {
    /// Host name.
    pub hostname: String,
    /// Operating system and architecture.
    pub platform: Platform,
    /// What it has in all.
    pub resources: Resources,
    /// Labels set by its own configuration: `engine.labels.X`.
    pub engine: EngineDescription,
    /// The highest format level of stored things that its daemon knows; 0 of versions that do not say so.
    #[serde(skip_serializing_if = "is_zero_u32")]
    pub format_level: u32,
    /// Its IPv6 addresses, where it has IPv6: published ports answer there, too.
    #[serde(rename = "IPv6Addresses", skip_serializing_if = "Option::is_none")]
    pub ipv6_addresses: Option<BTreeSet<Ipv6Addr>>,
    /// Its part in encrypted networks; absent of nodes of versions that have none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wireguard: Option<WireguardDescription>,
    /// Its certificates; absent of nodes of versions that do not say so.
    #[serde(rename = "TLSInfo", skip_serializing_if = "Option::is_none")]
    pub tls_info: Option<TlsInfo>,
    /// What balances published ports there; absent of nodes of versions that know the kernel alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingress: Option<IngressDescription>,
    /// Why its manager takes no writes, where its disk is full.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_full: Option<String>,
    /// Kept and not acted on: CSIInfo, ….
    #[serde(flatten)]
    pub extra: Extra,
}

impl NodeDescription {
    /// Whether the node's daemon balances published ports, so that no tunnel and no overlay network ends there.
    pub fn is_in_user_space(&self) -> bool {
        let ingress = self.ingress.as_ref();
        ingress.is_some_and(|ingress| ingress.balancer == IngressBalancer::UserSpace)
    }
}

/// How a node serves published ports.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct IngressDescription {
    /// What gives connections to tasks.
    pub balancer: IngressBalancer,
    /// Why it is not the kernel, in a sentence.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// What gives connections to tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IngressBalancer {
    /// Rules of the kernel, and a tunnel to the other nodes.
    #[default]
    Kernel,
    /// The node's daemon, and those of the other nodes.
    UserSpace,
}

impl IngressBalancer {
    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::UserSpace => "user-space",
        }
    }
}

/// The daemon's version and labels.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct EngineDescription {
    /// Version of skep.
    pub engine_version: String,
    /// Labels from the daemon's configuration.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// Whether a node is alive, as the leader last recorded it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NodeStatus {
    /// Ready or down.
    pub state: NodeState,
    /// Why, for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Underlay address: where its tunnel ends.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub addr: String,
    /// Where the node listens at this address; 0 is the usual port.
    #[serde(skip_serializing_if = "is_zero")]
    pub port: u16,
    /// Published ports that it cannot serve, as it last said.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub port_conditions: Vec<PortCondition>,
}

/// A published port that a node cannot serve.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PortCondition {
    /// The service that publishes it.
    #[serde(rename = "ServiceID")]
    pub service_id: ServiceId,
    /// The transport protocol.
    pub protocol: PortProtocol,
    /// The port on the node.
    pub published_port: u16,
    /// Why, and what to do: `is held by nginx (pid 812): stop it or publish another port`.
    pub message: String,
}

/// What keeps a service from being reached as it should.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ServiceCondition {
    /// The node that said so.
    #[serde(rename = "NodeID")]
    pub node_id: NodeId,
    /// The transport protocol.
    pub protocol: PortProtocol,
    /// The port on the node.
    pub published_port: u16,
    /// One sentence for people.
    pub message: String,
}

fn is_zero(port: &u16) -> bool {
    *port == 0
}

/// The port on which nodes listen unless told otherwise.
pub const NODE_PORT: u16 = 2377;

/// States of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// Joined, no session yet.
    #[default]
    Unknown,
    /// It has silently gone: its tasks are replaced.
    Down,
    /// It has a session and its heartbeats arrive.
    Ready,
    /// Its session closed a moment ago.
    Disconnected,
}

impl NodeState {
    /// The name as JSON has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Down => "down",
            Self::Ready => "ready",
            Self::Disconnected => "disconnected",
        }
    }
}

/// A manager's Raft member.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ManagerStatus {
    /// Raft id, random, never reused.
    #[serde(rename = "RaftID")]
    pub raft_id: u64,
    /// `ip:port` at which the other managers reach it.
    pub addr: String,
    /// Filled in by the manager that answers a question; never stored true.
    pub leader: bool,
    /// `reachable`, `unreachable` or `unknown`; filled in by the manager that answers.
    pub reachability: String,
}
