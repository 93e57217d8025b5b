//! What travels through the Raft log: a transaction on the store.
//!
//! A command is applied whole or refused whole, with a recorded outcome; applying never panics and
//! never depends on anything but the store and the command. Ids and times arrive inside it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use skep_common::object::{NetworkAttachment, TaskStatus};
use skep_common::spec::GenericResource;
use skep_common::{
    Kind, NetworkId, NodeId, Object, ServiceId, TaskId, TaskState, Timestamp, Version,
};

use crate::level;
pub use crate::level::FORMAT_LEVEL;

/// A transaction.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// Format level, at most [`FORMAT_LEVEL`].
    pub level: u32,
    /// The proposer's clock; becomes `CreatedAt` and `UpdatedAt`.
    pub at: Timestamp,
    /// Applied in order, all or none.
    pub actions: Vec<Action>,
    /// Who asked for it; absent of managers of before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actor: Option<Actor>,
}

/// Who asked for a command, for the events and the audit. Nothing is decided by it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Actor {
    /// The node whose certificate it came with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_id: Option<NodeId>,
    /// That node's role in the swarm, or of the leader's own commands `leader`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub role: String,
    /// How it came: `socket`, `tls` or `leader`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub via: String,
    /// What was asked: `UpdateService`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub method: String,
}

impl Command {
    /// A transaction of the lowest format level that it is understood at, so that managers of an earlier
    /// version go on in a swarm that does not use what is new.
    pub fn new(at: Timestamp, actions: Vec<Action>) -> Self {
        let level = level::of_actions(&actions);
        Self { level, at, actions, actor: None }
    }
}

/// One change.
#[expect(
    clippy::large_enum_variant,
    reason = "most changes of a large plan are patches of tasks: boxed, each would cost an allocation"
)]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Action {
    /// Creates or replaces an object. The store writes its `Meta`; a new node with number 0 is given
    /// the lowest free one.
    Put {
        /// The object, whole.
        object: Object,
        /// What must hold of the object that is there.
        expect: Expect,
    },
    /// Erases an object; an absent one is no error.
    Delete {
        /// Its kind.
        kind: Kind,
        /// The 128 bits of its id.
        id: u128,
    },
    /// Changes parts of a task. Ignored where the task is gone: it was decided or reported before.
    PatchTask(TaskPatch),
    /// Adds a node to the holders of every image record with this digest, or takes it away.
    ImageHolder {
        /// Manifest digest.
        digest: String,
        /// The node.
        node_id: NodeId,
        /// Whether it holds all blobs.
        holds: bool,
    },
}

/// The precondition of a [`Action::Put`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Expect {
    /// No object has this id (nor, where names are unique, this name).
    Absent,
    /// The object is at exactly this version.
    Version(Version),
    /// The object exists, whatever its version.
    Present,
}

/// Parts of a task to change. `state` and `desired_state` only grow: a lower one is ignored.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TaskPatch {
    /// The task.
    pub task_id: Option<TaskId>,
    /// What managers want.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_state: Option<TaskState>,
    /// Its node; refused once it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_id: Option<NodeId>,
    /// Its addresses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub networks_attachments: Option<Vec<NetworkAttachment>>,
    /// What happened; ignored whole where its state is below the task's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<TaskStatus>,
    /// Which of its node's generic resources it is given, as it is placed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generic_resources: Option<Vec<GenericResource>>,
}

impl TaskPatch {
    /// A patch of `task_id` that changes nothing yet.
    pub fn of(task_id: TaskId) -> Self {
        Self { task_id: Some(task_id), ..Self::default() }
    }
}

/// What became of a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Every action was applied; objects it wrote have this version.
    Applied(Version),
    /// Nothing was changed.
    Refused(Refusal),
}

/// Why a command was refused. The first action that fails decides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Two writers raced. The loser reads the object again before it asks again.
    #[error("update out of sequence: the {kind:?} is at version {current}, not {given}")]
    OutOfSequence {
        /// Kind of the object.
        kind: Kind,
        /// Expected version.
        given: Version,
        /// Stored version.
        current: Version,
    },
    /// The object to change is not there.
    #[error("the {kind:?} does not exist")]
    NotFound {
        /// Its kind.
        kind: Kind,
    },
    /// An object with this id or name is there.
    #[error("name conflicts with an existing object: a {kind:?} named {name:?} already exists")]
    NameTaken {
        /// Its kind.
        kind: Kind,
        /// The name (or id).
        name: String,
    },
    /// One service owns a published port on every node.
    #[error(
        "port {port}/{protocol} is already in use by service {owner_name:?} ({owner}) as an ingress port"
    )]
    PortInUse {
        /// Published port.
        port: u16,
        /// `tcp`, `udp` or `sctp`.
        protocol: String,
        /// The service that has it.
        owner: ServiceId,
        /// Its name.
        owner_name: String,
    },
    /// Two tasks of a node, or of a network, cannot have one address. A plan made on an old view; plan again.
    #[error("address {address} is already taken")]
    AddressInUse {
        /// The address.
        address: IpAddr,
    },
    /// Another network was given this identifier meanwhile. A decision on an old view; decide again.
    #[error("network identifier {vni} is already taken by another network")]
    VniInUse {
        /// The VXLAN network identifier.
        vni: u32,
    },
    /// Remove the service, or take it off the network, before the network is removed.
    #[error("network {name} is in use by service {service}")]
    NetworkInUse {
        /// The network.
        name: String,
        /// A service that is on it.
        service: String,
    },
    /// A service cannot be on a network that is not there, or on its way out.
    #[error("network {network_id} not found")]
    NetworkNotFound {
        /// The network.
        network_id: NetworkId,
    },
    /// Remove the secret from the services, or the services, first.
    #[error("secret '{name}' is in use by the following {}: {}", plural(.services, "service"), .services.join(", "))]
    SecretInUse {
        /// The secret.
        name: String,
        /// The services that use it.
        services: Vec<String>,
    },
    /// Remove the config from the services, or the services, first.
    #[error("config '{name}' is in use by the following {}: {}", plural(.services, "service"), .services.join(", "))]
    ConfigInUse {
        /// The config.
        name: String,
        /// The services that use it.
        services: Vec<String>,
    },
    /// A service cannot use what is not there; it was removed meanwhile. Decide again.
    #[error("{kind:?} {name} has no version {version}")]
    PayloadNotFound {
        /// A secret or a config.
        kind: Kind,
        /// Its name.
        name: String,
        /// The version that is named.
        version: u64,
    },
    /// A manager of before would not understand what is asked. Upgrade it first.
    #[error(
        "this needs format level {level}, and a manager knows {known}: upgrade that manager first"
    )]
    LevelTooHigh {
        /// The level of what is asked.
        level: u32,
        /// The level that all managers know.
        known: u32,
    },
    /// All node numbers are given out. Remove nodes that are gone with `node rm`.
    #[error("the swarm has its limit of 65534 nodes")]
    NodeNumbersExhausted,
}

impl Refusal {
    /// Whether another writer came between the view that a command was decided on and its commit, for all that the
    /// refusal says: then the next view decides.
    pub fn is_race(&self) -> bool {
        match self {
            Self::OutOfSequence { .. }
            | Self::NotFound { .. }
            | Self::PortInUse { .. }
            | Self::AddressInUse { .. }
            | Self::VniInUse { .. }
            | Self::NetworkInUse { .. }
            | Self::NetworkNotFound { .. }
            | Self::SecretInUse { .. }
            | Self::ConfigInUse { .. }
            | Self::PayloadNotFound { .. } => true,
            Self::NameTaken { .. } | Self::NodeNumbersExhausted | Self::LevelTooHigh { .. } => {
                false
            }
        }
    }
}

fn plural(list: &[String], word: &str) -> String {
    if list.len() == 1 { word.to_owned() } else { format!("{word}s") }
}
