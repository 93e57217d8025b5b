//! The states of a task. Source: SwarmKit `api/types.proto`, `design/task_model.md`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What has happened to a task, or what managers want to happen to it.
///
/// State and desired state only grow. Managers write states up to `Assigned` (and `Orphaned`), the
/// worker writes the rest; managers alone write the desired state.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
#[repr(u16)]
pub enum TaskState {
    /// Made by an orchestrator.
    #[default]
    New = 0,
    /// Its addresses and ports are allocated; it waits for a node.
    Pending = 64,
    /// It has a node.
    Assigned = 192,
    /// The worker took it.
    Accepted = 256,
    /// The worker fetches its image and makes its container.
    Preparing = 320,
    /// Prepared; it waits until managers want it running.
    Ready = 384,
    /// Started, not healthy yet.
    Starting = 448,
    /// Running and, where it has a health check, healthy.
    Running = 512,
    /// Ended by itself with exit code 0.
    Complete = 576,
    /// Ended because managers wanted it.
    Shutdown = 640,
    /// Ended with an error at or after its start.
    Failed = 704,
    /// Ended with an error before its start.
    Rejected = 768,
    /// Only as desired state: to be stopped, then deleted.
    Remove = 800,
    /// Its node is gone for good.
    Orphaned = 832,
}

impl TaskState {
    /// Every state in order.
    pub const ALL: [Self; 14] = [
        Self::New,
        Self::Pending,
        Self::Assigned,
        Self::Accepted,
        Self::Preparing,
        Self::Ready,
        Self::Starting,
        Self::Running,
        Self::Complete,
        Self::Shutdown,
        Self::Failed,
        Self::Rejected,
        Self::Remove,
        Self::Orphaned,
    ];

    /// Whether the container of a task in this state has ended, or will never start.
    pub fn is_terminal(self) -> bool {
        self > Self::Running
    }

    /// Whether managers that desire this want the task to run, be it until it ends by itself.
    pub fn wants_run(self) -> bool {
        self <= Self::Complete
    }

    /// Whether a task may be started that managers desire this of; before, it is only prepared.
    pub fn may_start(self) -> bool {
        (Self::Running..=Self::Complete).contains(&self)
    }

    /// The name as JSON has it: lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Pending => "pending",
            Self::Assigned => "assigned",
            Self::Accepted => "accepted",
            Self::Preparing => "preparing",
            Self::Ready => "ready",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Complete => "complete",
            Self::Shutdown => "shutdown",
            Self::Failed => "failed",
            Self::Rejected => "rejected",
            Self::Remove => "remove",
            Self::Orphaned => "orphaned",
        }
    }
}

impl fmt::Display for TaskState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_managers_desire_says_whether_a_task_runs() {
        for state in TaskState::ALL {
            let (wants_run, may_start) = match state {
                TaskState::Running | TaskState::Complete => (true, true),
                state => (state < TaskState::Running, false),
            };
            assert_eq!((state.wants_run(), state.may_start()), (wants_run, may_start), "{state}");
        }
    }
}
