//! Secrets and configs: what users ask of them, and how a container refers to one.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::{Extra, Labels};
use crate::{ConfigId, SecretId};

/// Bytes that JSON has as base64. Never printed: they may be secret.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Base64(pub Vec<u8>);

impl fmt::Debug for Base64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Base64({} bytes)", self.0.len())
    }
}

impl Serialize for Base64 {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        // The text stays out of the message: it may be a secret.
        let refuse = |_| serde::de::Error::custom("data must be base64");
        STANDARD.decode(text).map(Self).map_err(refuse)
    }
}

/// What makes the bytes of a secret, or fills in its template.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Driver {
    /// Which one.
    pub name: String,
    /// Its settings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub options: Option<Labels>,
}

/// What users want of a secret.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct SecretSpec {
    /// Unique name.
    pub name: String,
    /// Labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
    /// Its bytes, in requests; the store has them by version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Base64>,
    /// What keeps its bytes in place of the swarm.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<Driver>,
    /// What fills in its bytes for each task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub templating: Option<Driver>,
    /// Kept and not acted on.
    #[serde(flatten)]
    pub extra: Extra,
}

/// What users want of a config.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ConfigSpec {
    /// Unique name.
    pub name: String,
    /// Labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
    /// Its bytes, in requests and answers; the store has them by version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Base64>,
    /// What fills in its bytes for each task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub templating: Option<Driver>,
    /// Kept and not acted on.
    #[serde(flatten)]
    pub extra: Extra,
}

/// The file that a container finds a secret or a config in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FileTarget {
    /// A path; relative ones begin where secrets, or configs, are.
    #[serde(rename = "Name")]
    pub name: String,
    /// Owner, a number.
    #[serde(rename = "UID")]
    pub uid: String,
    /// Group, a number.
    #[serde(rename = "GID")]
    pub gid: String,
    /// Permission bits.
    #[serde(rename = "Mode")]
    pub mode: u32,
}

impl Default for FileTarget {
    fn default() -> Self {
        Self { name: String::new(), uid: "0".into(), gid: "0".into(), mode: 0o444 }
    }
}

/// A secret that a container gets. Id, name and version are found when the service is written.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct SecretReference {
    /// Where it is found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<FileTarget>,
    /// Which one.
    #[serde(rename = "SecretID", skip_serializing_if = "Option::is_none")]
    pub secret_id: Option<SecretId>,
    /// Its name.
    pub secret_name: String,
    /// Which of its versions; absent is the newest at the time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// Whether the version stays when the secret gets another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pinned: Option<bool>,
}

/// A config that a container gets. Id, name and version are found when the service is written.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ConfigReference {
    /// Where it is found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<FileTarget>,
    /// In place of a file: it is for the runtime itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtime: Option<Extra>,
    /// Which one.
    #[serde(rename = "ConfigID", skip_serializing_if = "Option::is_none")]
    pub config_id: Option<ConfigId>,
    /// Its name.
    pub config_name: String,
    /// Which of its versions; absent is the newest at the time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// Whether the version stays when the config gets another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pinned: Option<bool>,
}
