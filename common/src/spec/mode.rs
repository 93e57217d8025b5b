//! How many tasks a service has, and where: its mode.

use serde::{Deserialize, Serialize};

use super::{Extra, ServiceSpec};

/// Exactly one of its fields is set.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ServiceMode {
    /// A number of tasks, wherever they fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicated: Option<Replicated>,
    /// One task on every node that may have one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub global: Option<Global>,
    /// A number of tasks that end, some of them at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicated_job: Option<ReplicatedJob>,
    /// One task that ends, on every node that may have one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub global_job: Option<GlobalJob>,
    /// Kept and not acted on: modes of other versions.
    #[serde(flatten)]
    pub extra: Extra,
}

/// The replicated mode.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Replicated {
    /// Absent is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u64>,
}

/// The global mode.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Global {
    /// Kept and not acted on.
    #[serde(flatten)]
    pub extra: Extra,
}

/// The mode of a job with a number of tasks.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ReplicatedJob {
    /// Tasks that run at once; absent is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_concurrent: Option<u64>,
    /// Tasks that shall end well; absent is as many as run at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_completions: Option<u64>,
    /// Kept and not acted on.
    #[serde(flatten)]
    pub extra: Extra,
}

/// The mode of a job on every node.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct GlobalJob {
    /// Kept and not acted on.
    #[serde(flatten)]
    pub extra: Extra,
}

/// A mode with its defaults applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModeKind {
    /// So many tasks.
    Replicated(u64),
    /// One task a node.
    Global,
    /// Tasks that end.
    ReplicatedJob {
        /// How many shall end well.
        total: u64,
        /// How many run at once.
        concurrent: u64,
    },
    /// One task a node, which ends.
    GlobalJob,
}

impl ModeKind {
    /// The mode as lists show it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Replicated(_) => "replicated",
            Self::Global => "global",
            Self::ReplicatedJob { .. } => "replicated job",
            Self::GlobalJob => "global job",
        }
    }

    /// Whether its tasks are meant to end.
    pub fn is_job(self) -> bool {
        matches!(self, Self::ReplicatedJob { .. } | Self::GlobalJob)
    }

    /// Whether each of its tasks belongs to a node.
    pub fn is_global(self) -> bool {
        matches!(self, Self::Global | Self::GlobalJob)
    }
}

impl ServiceMode {
    /// So many tasks, wherever they fit.
    pub fn of_replicas(replicas: Option<u64>) -> Self {
        Self { replicated: Some(Replicated { replicas }), ..Self::default() }
    }

    /// The mode that is set; `None` where more or less than one is.
    pub fn kind(&self) -> Option<ModeKind> {
        let replicated =
            self.replicated.as_ref().map(|mode| ModeKind::Replicated(mode.replicas.unwrap_or(1)));
        let replicated_job = self.replicated_job.as_ref().map(|job| {
            let concurrent = job.max_concurrent.unwrap_or(1);
            let total = job.total_completions.unwrap_or(concurrent);
            ModeKind::ReplicatedJob { total, concurrent }
        });
        let global = self.global.as_ref().map(|_| ModeKind::Global);
        let global_job = self.global_job.as_ref().map(|_| ModeKind::GlobalJob);
        let mut given = [replicated, global, replicated_job, global_job].into_iter().flatten();
        let first = given.next()?;
        given.next().is_none().then_some(first)
    }
}

impl ServiceSpec {
    /// The service's mode: one replica where none is given, `None` where more or less than one is set.
    pub fn mode_kind(&self) -> Option<ModeKind> {
        self.mode.as_ref().map_or(Some(ModeKind::Replicated(1)), ServiceMode::kind)
    }

    /// The number of replicas wanted; `None` for the other modes.
    pub fn replicas(&self) -> Option<u64> {
        match self.mode_kind()? {
            ModeKind::Replicated(replicas) => Some(replicas),
            ModeKind::Global | ModeKind::ReplicatedJob { .. } | ModeKind::GlobalJob => None,
        }
    }
}
