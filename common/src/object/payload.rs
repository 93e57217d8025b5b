//! Secrets and configs as the store has them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Meta;
use crate::spec::{Base64, ConfigSpec, SecretSpec};
use crate::{ConfigId, SecretId, Timestamp};

/// The bytes of a secret or a config at one of its versions.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DataVersion {
    /// When it was made, by the proposer's clock.
    pub created_at: Timestamp,
    /// The bytes; in documents those of secrets are left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Base64>,
    /// SHA-256 of the bytes: `sha256:…`; in documents that of secrets is left out.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub digest: String,
}

/// A secret.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Secret {
    /// Id.
    #[serde(rename = "ID")]
    pub id: SecretId,
    /// Bookkeeping.
    #[serde(flatten)]
    pub meta: Meta,
    /// What users ask; without its bytes.
    pub spec: SecretSpec,
    /// Its bytes, by version, from 1.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub versions: BTreeMap<u64, DataVersion>,
}

/// A config.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Config {
    /// Id.
    #[serde(rename = "ID")]
    pub id: ConfigId,
    /// Bookkeeping.
    #[serde(flatten)]
    pub meta: Meta,
    /// What users ask; without its bytes.
    pub spec: ConfigSpec,
    /// Its bytes, by version, from 1.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub versions: BTreeMap<u64, DataVersion>,
}
