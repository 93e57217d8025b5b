//! `NodeSpec`, `SwarmSpec` and the stack's spec.

use serde::{Deserialize, Serialize};

use super::{
    ConfigSpec, Extra, Labels, LogDriver, Nanos, NetworkSpec, PlacementStrategy, SecretSpec,
    ServiceSpec,
};

/// What users want of a node.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NodeSpec {
    /// A name beside the host name; seldom used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Labels that constraints see as `node.labels.X`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
    /// Worker or manager.
    #[serde(default)]
    pub role: NodeRole,
    /// Whether it takes tasks.
    #[serde(default)]
    pub availability: Availability,
    /// Kept and not acted on.
    #[serde(flatten)]
    pub extra: Extra,
}

/// The role of a node; the `OU` of its certificate.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum NodeRole {
    /// Runs tasks.
    #[default]
    Worker,
    /// Runs tasks and is a member of the Raft group.
    Manager,
}

impl NodeRole {
    /// The name as JSON has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Manager => "manager",
        }
    }
}

/// Whether a node takes tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Availability {
    /// Takes new tasks.
    #[default]
    Active,
    /// Keeps its tasks, takes no new ones.
    Pause,
    /// Its tasks are moved elsewhere.
    Drain,
}

impl Availability {
    /// The name as JSON has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Pause => "pause",
            Self::Drain => "drain",
        }
    }
}

/// Settings of the whole swarm. Absent fields have Swarm's defaults.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct SwarmSpec {
    /// Always `default`.
    pub name: String,
    /// Labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
    /// How many finished tasks are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub orchestration: Option<OrchestrationConfig>,
    /// Life of node certificates.
    #[serde(rename = "CAConfig", skip_serializing_if = "Option::is_none")]
    pub ca_config: Option<CaConfig>,
    /// Snapshots of the log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub raft: Option<RaftConfig>,
    /// Heartbeats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dispatcher: Option<DispatcherConfig>,
    /// What tasks have where their service says nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task_defaults: Option<TaskDefaults>,
    /// Whether managers start locked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encryption_config: Option<EncryptionConfig>,
    /// Kept and not acted on.
    #[serde(flatten)]
    pub extra: Extra,
}

/// Settings of the orchestrators.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct OrchestrationConfig {
    /// Finished tasks kept per slot; negative keeps all; absent is 5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task_history_retention_limit: Option<i64>,
    /// Which nodes come first for services that say nothing; absent is spread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strategy: Option<PlacementStrategy>,
}

/// Settings of the log.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RaftConfig {
    /// Entries between two snapshots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_interval: Option<u64>,
    /// Snapshots kept beside the newest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_old_snapshots: Option<u64>,
    /// Kept and not acted on: LogEntriesForSlowFollowers, ElectionTick, HeartbeatTick.
    #[serde(flatten)]
    pub extra: Extra,
}

/// Settings of the dispatcher.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DispatcherConfig {
    /// Between two heartbeats of a node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heartbeat_period: Option<Nanos>,
    /// Kept and not acted on.
    #[serde(flatten)]
    pub extra: Extra,
}

/// What tasks have where their service says nothing.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TaskDefaults {
    /// How much of their output is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_driver: Option<LogDriver>,
    /// Kept and not acted on.
    #[serde(flatten)]
    pub extra: Extra,
}

/// How the managers' files are protected.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct EncryptionConfig {
    /// Whether a manager that starts needs the unlock key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_lock_managers: Option<bool>,
    /// Kept and not acted on.
    #[serde(flatten)]
    pub extra: Extra,
}

/// Settings of the certificate authority.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct CaConfig {
    /// Life of a node certificate; absent is 90 days.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_cert_expiry: Option<Nanos>,
    /// A counter; raising it changes the root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub force_rotate: Option<u64>,
    /// The root to change to, PEM; absent is a new one.
    #[serde(rename = "SigningCACert", skip_serializing_if = "Option::is_none")]
    pub signing_ca_cert: Option<String>,
    /// Its private key, PEM. Only in requests.
    #[serde(rename = "SigningCAKey", skip_serializing_if = "Option::is_none")]
    pub signing_ca_key: Option<String>,
    /// Kept and not acted on: ExternalCAs.
    #[serde(flatten)]
    pub extra: Extra,
}

/// What `stack deploy` asks: the services and networks of one file, by their full names (`STACK_SERVICE`).
///
/// Swarm has no such object: a stack there is a label. Here it is stored, so that a deploy is one
/// transaction and `stack rm` knows what belongs to it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct StackSpec {
    /// Unique name; the value of the label `com.docker.stack.namespace`.
    pub name: String,
    /// Its services, each with the stack's label and full name.
    pub services: Vec<ServiceSpec>,
    /// Its own networks, each with the stack's label and full name; external ones are not among them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<NetworkSpec>,
    /// Its own secrets, likewise. Their bytes are in requests only.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<SecretSpec>,
    /// Its own configs, likewise.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub configs: Vec<ConfigSpec>,
    /// Kept and not acted on yet.
    #[serde(flatten)]
    pub extra: Extra,
}
