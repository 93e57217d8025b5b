//! Whether connections are given to a task: one rule for managers, which balance, and for clients, which show it.

use std::fmt;

use crate::object::NodeState;
use crate::{Node, Task, TaskState};

/// Why a task gets no new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Withheld {
    /// Managers want it stopped: it gets no new connections, and what it has may end.
    Draining,
    /// It has no node yet, or its node is a member no more.
    NoNode(TaskState),
    /// Its node is silent.
    NodeDown,
    /// It does not run yet, or has ended.
    NotRunning(TaskState),
    /// Its health check fails.
    Unhealthy,
}

impl fmt::Display for Withheld {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Draining => f.write_str("draining"),
            Self::NoNode(state) if *state < TaskState::Assigned => f.write_str(state.name()),
            Self::NoNode(_) => f.write_str("node removed"),
            Self::NodeDown => f.write_str("node down"),
            Self::NotRunning(state) => f.write_str(state.name()),
            Self::Unhealthy => f.write_str("unhealthy"),
        }
    }
}

/// Why `task`, whose node is `node`, is in no balancer; `None` where it is.
///
/// What the store says: a leader takes a node that falls silent out of the balancers some moments before
/// its state says so.
pub fn withheld(task: &Task, node: Option<&Node>) -> Option<Withheld> {
    let state = task.status.state;
    if state > TaskState::Running {
        return Some(Withheld::NotRunning(state));
    }
    if !task.desired_state.wants_run() {
        return Some(Withheld::Draining);
    }
    let Some(node) = node else { return Some(Withheld::NoNode(state)) };
    match () {
        () if node.status.state == NodeState::Down => Some(Withheld::NodeDown),
        () if state < TaskState::Running => Some(Withheld::NotRunning(state)),
        () if task.status.unhealthy => Some(Withheld::Unhealthy),
        () => None,
    }
}
