//! Which part a node has in the swarm, as it is told.

use skep_common::Node;
use skep_manager_core::roles;

/// What a node is told of its part: it gets a certificate for the role and plays it, and is a manager by the Raft id
/// alone that the managers count it with.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Part {
    /// `worker` or `manager`.
    pub(super) role: String,
    /// What [`roles::counted`] says.
    pub(super) raft_id: u64,
}

impl Part {
    pub(super) fn of(node: &Node) -> Self {
        Self { role: node.observed_role().name().to_owned(), raft_id: roles::counted(node) }
    }
}
