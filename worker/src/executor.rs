//! The seam between the agent and what runs containers.
//!
//! [`crate::embedded::Embedded`] is the one that machines use; tests of the control plane use one that
//! runs nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use skep_common::object::ContainerStatus;
use skep_common::{Task, TaskId};
use skep_proto::SecretAssignment;
use skep_worker_core::health::HealthCheck;

/// A secret or a config at one version.
#[derive(Clone, PartialEq, Eq)]
pub struct Payload {
    /// `secret` or `config`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: u64,
    /// Its bytes; never printed.
    pub data: bytes::Bytes,
    /// The driver that fills them in for each task; empty: none.
    pub templating: String,
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, name, version, data, .. } = self;
        write!(f, "{kind} {name}@{version} ({} bytes)", data.len())
    }
}

impl From<SecretAssignment> for Payload {
    fn from(assigned: SecretAssignment) -> Self {
        let SecretAssignment { kind, name, version, data, templating, .. } = assigned;
        Self { kind, name, version, data, templating }
    }
}

/// The secrets and configs of one task, by [`payload_key`].
pub type TaskPayloads = BTreeMap<String, Arc<Payload>>;

/// What names a version of a secret or a config on a node: `ID@VERSION`.
pub fn payload_key(id: &str, version: u64) -> String {
    format!("{id}@{version}")
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Exit code; 128 + n after signal n.
    pub code: i32,
    /// Whether the kernel killed a process of it for want of memory.
    pub oom_killed: bool,
    /// Why there is no proper exit record, if so.
    pub error: Option<String>,
}

/// Why the container of a task cannot be made, started or stopped: one sentence for people, which
/// `service ps` shows, causes included.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(pub String);

impl Error {
    /// The error with its causes, as one sentence.
    pub fn of(error: &(dyn std::error::Error + 'static)) -> Self {
        Self(skep_runtime::telemetry::Chain(error).to_string())
    }
}

/// A container that was found when the daemon started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// It runs, or its exit is on record: `wait` tells.
    Started(ContainerStatus),
    /// It was made and never started: nothing of it is left.
    NotStarted,
}

/// Makes, starts, watches and ends the containers of tasks. One container a task at a time: one that is
/// prepared after another one of the same task ended follows it, and its output that one's.
///
/// Every call names the task; calls for different tasks run beside each other. Futures may be dropped
/// at any await: `remove` cleans up after whatever was begun.
#[tonic::async_trait]
pub trait Executor: Send + Sync + std::fmt::Debug + 'static {
    /// Fetches the image and makes the container, with an empty network namespace and its secrets and
    /// configs, which are written nowhere else.
    async fn prepare(&self, task: &Task, payloads: &TaskPayloads) -> Result<(), Error>;

    /// Connects the container and lets its process run.
    async fn start(&self, task: &Task) -> Result<ContainerStatus, Error>;

    /// The task's health check, as image and service define it.
    async fn health_check(&self, task: &Task) -> Result<Option<HealthCheck>, Error>;

    /// Runs a check inside the container: whether it passed, and its output's beginning.
    async fn run_check(
        &self,
        task_id: TaskId,
        argv: &[String],
        timeout: Duration,
    ) -> (bool, String);

    /// Returns when the container has ended. Must be called after `start`, or for a found container.
    async fn wait(&self, task_id: TaskId) -> Exit;

    /// Asks the process to end, and kills everything in the container after the grace period.
    async fn stop(&self, task: &Task) -> Result<(), Error>;

    /// Erases the container, its log and its connections. Idempotent.
    async fn remove(&self, task_id: TaskId) -> Result<(), Error>;

    /// Containers that outlived the last daemon.
    async fn find(&self) -> Result<Vec<(TaskId, Found)>, Error>;
}
