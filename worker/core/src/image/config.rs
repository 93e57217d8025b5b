//! The OCI image configuration: what to run, and the digests that prove the layers.
//!
//! [`ConfigFile`] is the document, [`ImageConfig`] what the rest of skep reads from it.
//!
//! Source: OCI Image Format Specification 1.1, `config.md`; Docker adds `Healthcheck`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};

use super::digest::Digest;

/// The configuration document of an image.
///
/// Only what skep reads or writes: a document that came from outside stays whole in its blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigFile {
    /// When the image was made, as RFC 3339 text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// Processor architecture in Go's words.
    #[serde(default)]
    pub architecture: String,
    /// Revision of the architecture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Operating system.
    #[serde(default)]
    pub os: String,
    /// What to run.
    #[serde(default, deserialize_with = "null_is_default")]
    pub config: RunConfig,
    /// The layers.
    pub rootfs: RootFs,
    /// How the layers came about.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<History>,
}

/// The layers by the digests of their uncompressed streams.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFs {
    /// Always `layers`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Lowest first, one per layer of the manifest.
    #[serde(default, deserialize_with = "null_is_default")]
    pub diff_ids: Vec<Digest>,
}

/// One line of `docker history`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct History {
    /// When, as RFC 3339 text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// The instruction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_by: Option<String>,
    /// A remark.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
}

/// What a container of the image runs unless its service says otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RunConfig {
    /// `user`, `uid`, `user:group` or `uid:gid`; empty is root.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// `port/protocol`.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub exposed_ports: BTreeMap<String, Empty>,
    /// `NAME=value`.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// The program and its first arguments.
    #[serde(deserialize_with = "one_or_many", skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// Further arguments, or the whole command when there is no entrypoint.
    #[serde(deserialize_with = "one_or_many", skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Directories that get a volume.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub volumes: BTreeMap<String, Empty>,
    /// Directory that the program starts in; empty is `/`.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
    /// Free text for people and tools.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Instructions for an image built from this one.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub on_build: Vec<String>,
    /// Name or number of the signal that asks the program to end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// How to find out whether the program works.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<HealthcheckFile>,
}

/// The empty JSON object that Go writes for a member of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Empty {}

/// A health check as the document has it: durations in nanoseconds, 0 for the default.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct HealthcheckFile {
    /// `["NONE"]`, `["CMD", …]` or `["CMD-SHELL", text]`.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub test: Vec<String>,
    /// Nanoseconds between two checks.
    #[serde(skip_serializing_if = "is_zero")]
    pub interval: u64,
    /// Nanoseconds after which a check has failed.
    #[serde(skip_serializing_if = "is_zero")]
    pub timeout: u64,
    /// Nanoseconds in which failures do not count.
    #[serde(skip_serializing_if = "is_zero")]
    pub start_period: u64,
    /// Nanoseconds between two checks within the start period.
    #[serde(skip_serializing_if = "is_zero")]
    pub start_interval: u64,
    /// Failures in a row that make a container unhealthy.
    #[serde(skip_serializing_if = "is_zero")]
    pub retries: u64,
}

/// A health check of an image. `None` means that the image leaves it to Docker's default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Healthcheck {
    /// `["NONE"]`, `["CMD", …]` or `["CMD-SHELL", text]`.
    pub test: Vec<String>,
    /// Between two checks.
    pub interval: Option<Duration>,
    /// After which a check has failed.
    pub timeout: Option<Duration>,
    /// In which failures do not count.
    pub start_period: Option<Duration>,
    /// Between two checks within the start period.
    pub start_interval: Option<Duration>,
    /// Failures in a row that make a container unhealthy.
    pub retries: Option<u64>,
}

/// What an image tells about itself. Empty means: the image does not say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageConfig {
    /// The program and its first arguments.
    pub entrypoint: Vec<String>,
    /// Further arguments, or the whole command when `entrypoint` is empty.
    pub cmd: Vec<String>,
    /// `NAME=value`, in the image's order.
    pub env: Vec<String>,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty is root.
    pub user: String,
    /// Directory that the program starts in; empty is `/`.
    pub working_dir: String,
    /// Name or number of the signal that asks the program to end.
    pub stop_signal: Option<String>,
    /// `port/protocol`.
    pub exposed_ports: BTreeSet<String>,
    /// Directories that get a volume.
    pub volumes: BTreeSet<String>,
    /// How to find out whether the program works.
    pub healthcheck: Option<Healthcheck>,
    /// Free text for people and tools.
    pub labels: BTreeMap<String, String>,
    /// When the image was made, as RFC 3339 text.
    pub created: Option<String>,
    /// Operating system in Go's words.
    pub os: String,
    /// Processor architecture in Go's words.
    pub architecture: String,
    /// Revision of the architecture.
    pub variant: Option<String>,
    /// Digests of the uncompressed layers, lowest first.
    pub diff_ids: Vec<Digest>,
    /// Bytes of the manifest, the configuration and the layers as they are stored and sent.
    pub size_bytes: u64,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bytes are not the JSON that the specification asks for.
    #[error("not valid JSON of an image configuration")]
    Json(#[from] serde_json::Error),
}

impl ConfigFile {
    /// Reads the document.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        Ok(serde_json::from_slice(bytes)?)
    }

    /// The bytes that are stored and hashed.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a configuration has only string keys")
    }
}

impl ImageConfig {
    /// Reads the document for its users; `size_bytes` is counted by the store.
    pub fn new(file: ConfigFile, size_bytes: u64) -> Self {
        let run = file.config;
        Self {
            entrypoint: run.entrypoint,
            cmd: run.cmd,
            env: run.env,
            user: run.user,
            working_dir: run.working_dir,
            stop_signal: run.stop_signal.filter(|signal| !signal.is_empty()),
            exposed_ports: run.exposed_ports.into_keys().collect(),
            volumes: run.volumes.into_keys().collect(),
            healthcheck: run.healthcheck.and_then(HealthcheckFile::into_healthcheck),
            labels: run.labels,
            created: file.created,
            os: file.os,
            architecture: file.architecture,
            variant: file.variant,
            diff_ids: file.rootfs.diff_ids,
            size_bytes,
        }
    }
}

impl HealthcheckFile {
    /// An empty test inherits, and an image has nothing to inherit from: then there is no check.
    fn into_healthcheck(self) -> Option<Healthcheck> {
        let duration = |nanos: u64| (nanos > 0).then(|| Duration::from_nanos(nanos));
        (!self.test.is_empty()).then(|| Healthcheck {
            interval: duration(self.interval),
            timeout: duration(self.timeout),
            start_period: duration(self.start_period),
            start_interval: duration(self.start_interval),
            retries: (self.retries > 0).then_some(self.retries),
            test: self.test,
        })
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for this signature")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// Go writes `null` for an empty slice or map.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Old Docker wrote a command of one word as a string (`strslice.StrSlice`).
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }
    Ok(match Option::deserialize(deserializer)? {
        None => Vec::new(),
        Some(OneOrMany::One(word)) => vec![word],
        Some(OneOrMany::Many(words)) => words,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_of_docker_is_read_with_its_nulls() {
        let json = r#"{
            "architecture": "amd64", "os": "linux", "created": "2024-05-01T10:00:00Z",
            "config": {
                "User": "1000:1000", "ExposedPorts": {"80/tcp": {}}, "Env": ["A=1"],
                "Cmd": "serve", "Entrypoint": null, "Volumes": null, "WorkingDir": "/srv",
                "Labels": null, "OnBuild": null, "StopSignal": "SIGQUIT", "Image": "x",
                "Healthcheck": {"Test": ["CMD", "/check"], "Interval": 1000000000, "Retries": 2}
            },
            "container_config": {"Cmd": ["x"]},
            "rootfs": {"type": "layers", "diff_ids": []}
        }"#;
        let config = ImageConfig::new(ConfigFile::parse(json.as_bytes()).unwrap(), 7);
        assert_eq!(config.cmd, ["serve"]);
        assert_eq!(config.entrypoint, [""; 0]);
        assert_eq!(config.user, "1000:1000");
        assert_eq!(config.working_dir, "/srv");
        assert_eq!(config.stop_signal.as_deref(), Some("SIGQUIT"));
        assert_eq!(config.exposed_ports, BTreeSet::from(["80/tcp".to_owned()]));
        assert_eq!(config.size_bytes, 7);
        let check = config.healthcheck.unwrap();
        assert_eq!(check.test, ["CMD", "/check"]);
        assert_eq!(check.interval, Some(Duration::from_secs(1)));
        assert_eq!(check.timeout, None);
        assert_eq!(check.retries, Some(2));
    }

    #[test]
    fn a_document_without_config_is_an_image_that_says_nothing() {
        let json = br#"{"os":"linux","config":null,"rootfs":{"type":"layers","diff_ids":null}}"#;
        let config = ImageConfig::new(ConfigFile::parse(json).unwrap(), 0);
        assert_eq!((config.cmd, config.healthcheck, config.diff_ids), (vec![], None, vec![]));
    }

    #[test]
    fn what_is_no_configuration_is_refused() {
        let error = ConfigFile::parse(b"{\"os\":\"linux\"}").unwrap_err();
        assert_eq!(error.to_string(), "not valid JSON of an image configuration");
    }
}
