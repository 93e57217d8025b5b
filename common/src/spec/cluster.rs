//! `NodeSpec`, `SwarmSpec`, `SecretSpec`, `ConfigSpec` and the stack's spec.

use serde::{Deserialize, Serialize};

use super::{Extra, Labels, Nanos, NetworkSpec, ServiceSpec};

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

/// The part a node plays; the `OU` of its certificate.
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
    /// Kept and not acted on yet: Raft, Dispatcher, TaskDefaults, EncryptionConfig.
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
}

/// Settings of the certificate authority.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct CaConfig {
    /// Life of a node certificate; absent is 90 days.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_cert_expiry: Option<Nanos>,
    /// Kept and not acted on yet: ExternalCAs, SigningCACert, ForceRotate.
    #[serde(flatten)]
    pub extra: Extra,
}

/// What users want of a secret. `Data` is base64 and is never given back.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct SecretSpec {
    /// Unique name.
    pub name: String,
    /// Labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
    /// Kept whole: Data, Driver, Templating.
    #[serde(flatten)]
    pub extra: Extra,
}

/// What users want of a config. `Data` is base64.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ConfigSpec {
    /// Unique name.
    pub name: String,
    /// Labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
    /// Kept whole: Data, Templating.
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
    /// Kept and not acted on yet.
    #[serde(flatten)]
    pub extra: Extra,
}
